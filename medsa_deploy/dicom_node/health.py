"""Counters of the node → `/healthz` and `/metrics` (Prometheus text) on a loopback port."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from medsa_deploy.metrics import Metrics

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


def node_metrics() -> Metrics:
    """The node's counters, all 0."""
    return Metrics(HELP)


def _text(metrics: Metrics, states: Mapping[str, int]) -> str:
    """The metrics, with the series on disk by their state."""
    series = "medsa_series_in_queue"
    return metrics.text({(series, (("state", s),)): count for s, count in states.items()})


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
                self._answer(200, "text/plain; version=0.0.4", _text(metrics, states()))
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
