"""Counters of the node → `/healthz` and `/metrics` (Prometheus text) on a loopback port."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Labels = tuple[tuple[str, str], ...]

HELP = {
    "medsa_images_received_total": ("counter", "Images taken into the queue"),
    "medsa_images_refused_total": ("counter", "C-STORE requests refused, by reason"),
    "medsa_series_total": ("counter", "Series by what became of them"),
    "medsa_send_failures_total": ("counter", "Attempts to send that failed"),
    "medsa_worker_restarts_total": ("counter", "Times the worker process ended unexpectedly"),
    "medsa_segment_seconds_sum": ("counter", "Seconds spent on segmenting series"),
    "medsa_segment_seconds_count": ("counter", "Series that were segmented"),
    "medsa_delivery_seconds_sum": ("counter", "Seconds from a series' last image to the PACS"),
    "medsa_delivery_seconds_count": ("counter", "Series whose segmentation the PACS has"),
    "medsa_series_in_queue": ("gauge", "Series on disk, by state"),
    "medsa_resident_memory_bytes": ("gauge", "Memory of the node's process"),
}
"""Metric → its type and meaning."""


class Metrics:
    """Counters with labels; any thread may count.

    >>> metrics = Metrics()
    >>> metrics.count("medsa_series_total", result="sent")
    >>> "medsa_series_total{result=\\"sent\\"} 1" in metrics.text({})
    True
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, Labels], float] = {}
        self._lock = threading.Lock()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def total(self, name: str, **labels: str) -> int:
        """What a counter has counted."""
        with self._lock:
            return int(self._values.get((name, tuple(sorted(labels.items()))), 0))

    def text(self, states: Mapping[str, int]) -> str:
        """All metrics in Prometheus' text format; `states`: series on disk by their state."""
        with self._lock:
            values = dict(self._values)
        for state, count in states.items():
            values["medsa_series_in_queue", (("state", state),)] = count
        values["medsa_resident_memory_bytes", ()] = resident_memory()
        lines = []
        for name, (kind, meaning) in HELP.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            for (metric, labels), value in sorted(values.items()):
                if metric == name:
                    lines.append(f"{name}{_label_text(labels)} {value:.15g}")
        return "\n".join(lines) + "\n"


def _label_text(labels: Labels) -> str:
    quoted = ",".join(f'{name}="{value}"' for name, value in labels)
    return f"{{{quoted}}}" if labels else ""


def resident_memory() -> int:
    """Bytes of memory that this process has in RAM; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * 4096


def serve_health(
    port: int,
    faults: Callable[[], list[str]],
    states: Callable[[], dict[str, int]],
    metrics: Metrics,
) -> ThreadingHTTPServer:
    """Answer on 127.0.0.1:`port` in a thread. `/healthz` is 503 while there are `faults`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/healthz":
                problems = faults()
                body = {"status": "failing" if problems else "ok", "faults": problems}
                text = json.dumps(body | {"series": states()}) + "\n"
                self._answer(503 if problems else 200, "application/json", text)
            elif self.path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4", metrics.text(states()))
            else:
                self._answer(404, "text/plain", "/healthz or /metrics\n")

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not events of the node."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
