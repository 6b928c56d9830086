"""Counters and gauges of a service → Prometheus' text format."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from medsa_deploy.machine import resident_bytes

Labels = tuple[tuple[str, str], ...]
Descriptions = Mapping[str, tuple[str, str]]
"""Metric → its type and meaning."""


class Metrics:
    """Counters with labels; any thread may count.

    >>> metrics = Metrics({"medsa_series_total": ("counter", "Series by what became of them")})
    >>> metrics.count("medsa_series_total", result="sent")
    >>> "medsa_series_total{result=\\"sent\\"} 1" in metrics.text()
    True
    """

    def __init__(self, descriptions: Descriptions) -> None:
        self.descriptions = descriptions
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

    def text(self, gauges: Mapping[tuple[str, Labels], float] | None = None) -> str:
        """All metrics; `gauges`: what is measured now, by name and labels."""
        with self._lock:
            values = dict(self._values)
        values |= gauges or {}
        values["medsa_resident_memory_bytes", ()] = resident_bytes() or 0
        lines = []
        for name, (kind, meaning) in self.descriptions.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            for (metric, labels), value in sorted(values.items()):
                if metric == name:
                    lines.append(f"{name}{_label_text(labels)} {value:.15g}")
        return "\n".join(lines) + "\n"


def _label_text(labels: Labels) -> str:
    quoted = ",".join(f'{name}="{value}"' for name, value in labels)
    return f"{{{quoted}}}" if labels else ""
