"""medsa-deploy dicom-node: a bundle and rules → a node in the network, until a signal."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsa_deploy import stages
from medsa_deploy.images.limits import parse_size

from . import console
from .options import Backend, Bundle, Json, MaxMemory, Precision, Threads, with_options
from .values import parse_web_series

if TYPE_CHECKING:
    from medsa_deploy.dicom_node.node import NodeOptions


@dataclass(frozen=True, kw_only=True)
class NodeCommandOptions:
    """The options of dicom-node."""

    rules: Annotated[Path, typer.Option(help="Which series is segmented how: rules.json")]
    aet: Annotated[str, typer.Option(help="AE title of this node")] = "MEDSA"
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on")] = 11112
    send: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT:AET", help="PACS that gets the segmentations; repeatable"),
    ] = None
    to_web: Annotated[
        str | None, typer.Option(metavar="URL", help="DICOMweb server that gets them")
    ] = None
    from_web: Annotated[
        str | None,
        typer.Option(metavar="URL", help="DICOMweb server to fetch --study from at the start"),
    ] = None
    study: Annotated[str | None, typer.Option(metavar="UID", help="With --from-web")] = None
    series: Annotated[
        str | None, typer.Option(metavar="UID", help="With --from-web: one series of the study")
    ] = None
    spool: Annotated[Path, typer.Option(help="Folder of the queue")] = Path("medsa-spool")
    quiet_time: Annotated[
        float, typer.Option(help="Seconds without an image after which a series is complete")
    ] = 30.0
    expect: Annotated[
        int | None, typer.Option(help="Images after which a series is complete at once")
    ] = None
    max_queue: Annotated[
        int, typer.Option(help="Series on their way at most; more are refused (0xA700)")
    ] = 100
    max_object: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Largest object on the port; larger ones are refused"),
    ] = "2GB"
    prompt_wait: Annotated[
        float, typer.Option(help="Seconds that a series waits for prompts of its study")
    ] = 600.0
    keep_days: Annotated[
        float,
        typer.Option(min=0, help="Days that failed series and records of sent ones stay; 0 ever"),
    ] = 30.0
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="AET", help="AE title that may send; repeatable; default all"),
    ] = None
    tls_cert: Annotated[Path | None, typer.Option(help="TLS: this node's certificate, PEM")] = None
    tls_key: Annotated[Path | None, typer.Option(help="TLS: its key, PEM")] = None
    tls_ca: Annotated[
        Path | None, typer.Option(help="TLS: certificates that others must be signed by, PEM")
    ] = None
    send_tls: Annotated[bool, typer.Option("--send-tls", help="Reach the PACS by TLS, too")] = False
    http_port: Annotated[
        int, typer.Option(help="Port of /healthz and /metrics on 127.0.0.1; 0 for none")
    ] = 11180
    log_identifiers: Annotated[
        bool, typer.Option("--log-identifiers", help="Log UIDs, patient IDs and texts of headers")
    ] = False
    backend: Backend = "onnxruntime"
    precision: Precision = "fp32"
    threads: Threads = None
    max_memory: MaxMemory = None

    def node(self, bundle: Path) -> NodeOptions:
        """How the node runs."""
        from medsa_deploy.dicom_node.node import NodeOptions

        web = None
        if (self.from_web, self.study, self.series) != (None, None, None):
            web = parse_web_series(self.from_web, self.study, self.series)
        return NodeOptions(
            bundle=bundle,
            rules=self.rules,
            spool=self.spool,
            aet=self.aet,
            host=self.host,
            port=self.port,
            send=tuple(self.send or ()),
            to_web=self.to_web,
            from_web=web,
            quiet_time=self.quiet_time,
            expect=self.expect,
            max_queue=self.max_queue,
            max_object=parse_size(self.max_object, "--max-object"),
            prompt_wait=self.prompt_wait,
            keep_days=self.keep_days,
            allow=tuple(self.allow or ()),
            tls_certificate=self.tls_cert,
            tls_key=self.tls_key,
            tls_authority=self.tls_ca,
            send_tls=self.send_tls,
            http_port=self.http_port,
            log_identifiers=self.log_identifiers,
            session=stages.SessionOptions(
                backend=self.backend, precision=self.precision, threads=self.threads
            ),
        )


@with_options
def dicom_node(bundle: Bundle, options: NodeCommandOptions, json: Json = False) -> None:
    """Take series by C-STORE, segment them by rules, and send segmentations to the PACS.

    It runs until SIGTERM or Ctrl-C, logs JSON lines on stderr, and keeps its queue in --spool. At
    the end it prints what it did.

    medsa-deploy dicom-node ckpt.medsa --rules rules.json --send pacs:104:ORTHANC --host 0.0.0.0

    medsa-deploy dicom-node ckpt.medsa --rules rules.json --to-web http://pacs:8042/dicom-web

    rules.json: the first rule that matches a series counts; coordinates are fractions here:

    ```
    {"rules": [
      {"match": {"modality": "CT", "series_description": "*portal*"},
       "prompts": {"relative": true,
                   "structures": [{"name": "liver", "boxes": [[0.2, 0.2, 0.3, 0.8, 0.8, 0.7]]}]},
       "propagate": true}
    ]}
    ```
    """
    from medsa_deploy.dicom_node.node import Node
    from medsa_deploy.event_log import EventLog

    events = EventLog(sys.stderr, identifiers=options.log_identifiers)
    stop = threading.Event()
    with events.of_logger("medsa_deploy"), Node(options.node(bundle), events) as node:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda number, frame: stop.set())
        while not stop.wait(1.0):
            pass
    totals = node.totals()
    if json:
        console.print_json(totals)
    else:
        console.print_facts({name: str(count) for name, count in asdict(totals).items()})
