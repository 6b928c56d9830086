"""Train, evaluate and write the demonstration checkpoint: python -m benchmarks.demo_checkpoint"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "OMP_WAIT_POLICY": "passive",
}
"""Large tensors come and go in every step: memory is kept, in huge pages, or most of the time goes
into clearing pages. And threads wait asleep: where another process has one of two cores, those that
spin made a step thirty times slower."""


def main() -> int:
    """Everything from seeds; 130 if interrupted, and the next call goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--state", type=Path, default=Path("demo-training"), help="where progress is kept"
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="stop after the validation split, which is what the recipe may be decided by: figures "
        "and checkpoint go to the state's folder",
    )
    parser.add_argument(
        "--automatic",
        action="store_true",
        help="train the SAMed that needs no click, over the checkpoint that ships",
    )
    args = parser.parse_args()
    if not os.environ.keys() >= ENVIRONMENT.keys():  # read when a process starts
        os.environ.update(ENVIRONMENT | os.environ)
        os.execv(sys.executable, [sys.executable, "-m", __spec__.parent, *sys.argv[1:]])
    from .automatic import AUTOMATIC, make_automatic
    from .recipe import RECIPE, make

    try:
        if args.automatic:
            make_automatic(AUTOMATIC, args.state, release=not args.validate)
        else:
            make(RECIPE, args.state, release=not args.validate)
    except KeyboardInterrupt:
        print(f"interrupted; what is done is in {args.state}: call again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
