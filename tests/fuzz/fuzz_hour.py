"""Minutes → damaged files of every format: half of the time by seeds, half guided by coverage."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "fuzz")]


def main() -> int:
    """0 if no input failed, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args()
    options.failures.mkdir(parents=True, exist_ok=True)
    earlier = set(options.failures.iterdir())
    workers = os.cpu_count() or 1
    guided = importlib.util.find_spec("atheris") is not None
    if not guided:
        print("atheris is not installed: no input is guided by coverage (pip install atheris)")
    shared = ["--seed", options.seed, "--failures", options.failures]
    minutes = options.minutes / (2 if guided else 1)
    code = _python("fuzz_run.py", "--minutes", minutes, "--workers", workers, *shared)
    if guided:
        from fuzz_readers import FORMATS

        share = minutes * workers / len(FORMATS)
        with ThreadPoolExecutor(workers) as pool:
            codes = pool.map(
                lambda name: _python("fuzz_coverage.py", name, "--minutes", share, *shared),
                FORMATS,
            )
            code = max(code, *codes)
    failures = set(options.failures.iterdir()) - earlier
    print(f"{len(failures)} new files in {options.failures}")
    return int(bool(failures) or code != 0)


def _python(script: str, *arguments: object) -> int:
    command = [sys.executable, str(TESTS / "fuzz" / script), *map(str, arguments)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
