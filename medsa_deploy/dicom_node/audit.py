"""Studies that a node has finished → lines of its audit trail."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from medsa_deploy.event_log import now


class Audit:
    """Appends one line for each study to a file, and to no log."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **facts: Any) -> None:
        """Append a line; it is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"time": now(), **facts}) + "\n")
            f.flush()
            os.fsync(f.fileno())
