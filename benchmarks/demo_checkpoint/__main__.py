"""Train, evaluate and write the demonstration checkpoint: python -m benchmarks.demo_checkpoint"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .recipe import RECIPE, make


def main() -> int:
    """Everything from seeds; 130 if interrupted, and the next call goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--state", type=Path, default=Path("demo-training"), help="where progress is kept"
    )
    folder = parser.parse_args().state
    try:
        make(RECIPE, folder)
    except KeyboardInterrupt:
        print(f"interrupted; what is done is in {folder}: call again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
