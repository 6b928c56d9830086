"""medsa-deploy serve: bundles → a server for viewers and browsers, until a signal."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsa_deploy import stages
from medsa_deploy.errors import MissingDependencyError, UsageError
from medsa_deploy.images.limits import parse_size

from . import console
from .options import Backend, Json, MaxMemory, Precision, Threads, with_options

if TYPE_CHECKING:
    from medsa_deploy.serve.service import ServeOptions


@dataclass(frozen=True, kw_only=True)
class ServeCommandOptions:
    """The options of serve."""

    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any that is free")] = 8000
    host: Annotated[str, typer.Option(help="Address to listen on; others need --token and TLS")] = (
        "127.0.0.1"
    )
    token: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Its first line is a token that every request must have"),
    ] = None
    tls_cert: Annotated[Path | None, typer.Option(help="TLS: this server's certificate, PEM")] = (
        None
    )
    tls_key: Annotated[Path | None, typer.Option(help="TLS: its key, PEM")] = None
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder whose images the page offers")
    ] = None
    propagate: Annotated[
        bool, typer.Option("--propagate", help="nnInteractive: follow structures through volumes")
    ] = False
    cache: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for embeddings, such as 500MB")
    ] = "2GB"
    image_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for the images of all users")
    ] = "4GB"
    max_upload: Annotated[str, typer.Option(metavar="SIZE", help="Largest image sent")] = "1GB"
    workers: Annotated[int, typer.Option(help="Requests that are computed at a time")] = 2
    queue: Annotated[int, typer.Option(help="Requests that wait; more get status 503")] = 32
    users: Annotated[int, typer.Option(help="Users at a time; more get status 503")] = 32
    idle_minutes: Annotated[
        float, typer.Option(help="Minutes without an action after which a user's image is dropped")
    ] = 10.0
    log_identifiers: Annotated[
        bool, typer.Option("--log-identifiers", help="Log messages with names of files")
    ] = False
    backend: Backend = "onnxruntime"
    precision: Precision = "fp32"
    threads: Threads = None
    max_memory: MaxMemory = None

    def server(self, bundles: list[Path]) -> ServeOptions:
        """How the server runs."""
        from medsa_deploy.serve.service import ServeOptions

        for name in ("workers", "users"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: expected 1 or more")
        return ServeOptions(
            bundles=tuple(bundles),
            host=self.host,
            port=self.port,
            token=self.token,
            tls_certificate=self.tls_cert,
            tls_key=self.tls_key,
            images=self.images,
            cache_bytes=parse_size(self.cache, "--cache"),
            image_bytes=parse_size(self.image_memory, "--image-memory"),
            upload_bytes=parse_size(self.max_upload, "--max-upload"),
            workers=self.workers,
            queue=self.queue,
            users=self.users,
            idle_seconds=60 * self.idle_minutes,
            propagate=self.propagate,
            session=stages.SessionOptions(
                backend=self.backend, precision=self.precision, threads=self.threads
            ),
        )


@with_options
def serve(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles: folders that export wrote")],
    options: ServeCommandOptions,
    json: Json = False,
) -> None:
    """Serve bundles to a browser, and to viewers that speak nnInteractive or MONAI Label.

    It runs until SIGTERM or Ctrl-C and logs JSON lines on stderr. Open the address that it prints.

    medsa-deploy serve ckpt.medsa

    medsa-deploy serve liver.medsa brain.medsa --images studies/ --port 8080

    medsa-deploy serve ckpt.medsa --host 0.0.0.0 --token token.txt --tls-cert c.pem --tls-key k.pem
    """
    from medsa_deploy.event_log import EventLog

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise MissingDependencyError("starlette", extra="serve", purpose="serve") from e
    from medsa_deploy.serve.server import Server

    events = EventLog(sys.stderr, identifiers=options.log_identifiers)
    stop = threading.Event()
    with events.of_logger("medsa_deploy"), Server(options.server(bundles), events) as server:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda number, frame: stop.set())
        if json:
            console.print_json({"url": server.url})
            sys.stdout.flush()  # whoever started it waits for the address
        else:
            console.out.print(server.url)
        while not stop.wait(1.0) and server.alive:
            pass
