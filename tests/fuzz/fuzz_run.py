"""Damaged files of every format → how many were read or refused, and every other outcome.

    python tests/fuzz/fuzz_run.py --inputs 10000            each file follows from seed and number
    python tests/fuzz/fuzz_run.py --minutes 60 --workers 2
    python tests/fuzz/fuzz_run.py --reproduce fuzz-failures/png-0-1234.bin

Files are read in a process of its own. If it ends, the file that ended it is a failure, and another
process goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "fuzz")]

PROGRESS = struct.Struct("<qq")
"""Number of the format in the work, and of the input."""
SILENCE_SECONDS = 300.0
"""Time without progress after which a process hangs. Its own limit on processor time is lower."""
MOST_OF_A_KIND = 5
"""Inputs of one kind of failure that are kept."""
MOST_MESSAGES = 5000
"""Characters of what a process that ended has printed."""
MEMORY = "/dev/shm"


def main() -> int:
    """0 if no input failed, else 1."""
    options = _options()
    if options.child:
        _work(json.loads(options.child))
        return 0
    if options.reproduce:
        return _reproduce(options.reproduce)
    options.failures.mkdir(parents=True, exist_ok=True)
    totals: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=_supervise, args=(options, options.seed + k, totals))
        for k in range(options.workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if sum(total["ended"] is None for total in totals) < options.workers:
        raise SystemExit("a process that reads inputs did not start")
    return _report(options, totals)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=1000, help="of all formats together")
    parser.add_argument("--minutes", type=float, default=0, help="go on for so long instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes, with a seed each")
    parser.add_argument("--formats", help="of fuzz_readers, with commas between; default all")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--reproduce", type=Path, help="read one kept input again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _supervise(options: argparse.Namespace, seed: int, totals: list[dict[str, Any]]) -> None:
    """Run processes one after the other until the work of one seed is done."""
    end = time.monotonic() + 60 * options.minutes if options.minutes else None
    work: dict[str, Any] = {
        "seed": seed,
        "formats": options.formats,
        "inputs": options.inputs,
        "failures": str(options.failures),
        "next": {},
    }
    while True:
        with TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None) as folder:
            work["folder"] = folder
            work["seconds"] = None if end is None else end - time.monotonic()
            result = _watched(work, Path(folder))
            totals.append(result)
        if result["ended"] is None:
            return
        name, index = result["ended"]
        work["next"] = result["next"] | {name: index + 1}


def _watched(work: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a process has done; an input that ended it is kept."""
    progress = folder / "progress"
    progress.write_bytes(PROGRESS.pack(-1, -1))
    command = [sys.executable, __file__, "--child", json.dumps(work)]
    with (folder / "stderr").open("w") as messages:  # libraries in C print what they do not like
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True)
    watch = threading.Thread(target=_end_if_silent, args=(process, progress), daemon=True)
    watch.start()
    output, _ = process.communicate()
    if process.returncode == 0:
        return {**json.loads(output), "ended": None}
    number, index = PROGRESS.unpack(progress.read_bytes())
    if number < 0:
        raise SystemExit((folder / "stderr").read_text(errors="replace"))
    state = json.loads((folder / "state.json").read_text())
    name = list(state["next"])[number]
    state["counts"][name] = state["counts"].get(name, 0) + index - state["next"][name] + 1
    from fuzz_judge import Failure, Judge

    text = (folder / "stderr").read_text(errors="replace")[-MOST_MESSAGES:]
    failure = Failure(kind=f"{name}: the process ended with code {process.returncode}", text=text)
    content = Judge(folder).content(name, work["seed"], index)
    keep_input(Path(work["failures"]), f"{name}-{work['seed']}-{index}", content, failure)
    state["kinds"] = {**state["kinds"], failure.kind: 1}
    return {**state, "ended": (name, index)}


def _end_if_silent(process: subprocess.Popen[str], progress: Path) -> None:
    last, since = b"", time.monotonic()
    while process.poll() is None:
        time.sleep(1)
        try:
            state = progress.read_bytes()
        except OSError:
            return
        if state != last:
            last, since = state, time.monotonic()
        elif time.monotonic() - since > SILENCE_SECONDS:
            process.kill()


def _work(work: dict[str, Any]) -> None:
    """Read inputs, a few of each format in turn, and print what became of them."""
    from fuzz_judge import Judge, bound_process
    from fuzz_readers import FORMATS

    bound_process()
    folder = Path(work["folder"])
    names = work["formats"].split(",") if work["formats"] else list(FORMATS)
    judge = Judge(folder)
    weights = sum(FORMATS[name].weight for name in names)
    numbers = {name: work["next"].get(name, 0) for name in names}
    stops = {name: 1 + work["inputs"] * FORMATS[name].weight // weights for name in names}
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    end = None if work["seconds"] is None else time.monotonic() + work["seconds"]
    with (folder / "progress").open("r+b") as f, mmap.mmap(f.fileno(), PROGRESS.size) as place:
        while True:
            busy = False
            for number, name in enumerate(names):
                stop = numbers[name] + FORMATS[name].weight
                if end is None:
                    stop = min(stop, stops[name])
                _save_state(folder, numbers, counts, kinds, judge.refused)
                start = time.process_time()
                for index in range(numbers[name], stop):
                    place[:] = PROGRESS.pack(number, index)
                    content = judge.content(name, work["seed"], index)
                    if failure := judge.judge(name, content):
                        kinds[failure.kind] += 1
                        if kinds[failure.kind] <= MOST_OF_A_KIND:
                            stem = f"{name}-{work['seed']}-{index}"
                            keep_input(Path(work["failures"]), stem, content, failure)
                counts[name] += stop - numbers[name]
                busy = busy or stop > numbers[name]
                numbers[name] = stop
                seconds[name] += time.process_time() - start
            if not busy or (end is not None and time.monotonic() > end):
                break
    _save_state(folder, numbers, counts, kinds, judge.refused)
    done = json.loads((folder / "state.json").read_text())
    print(json.dumps({**done, "seconds": seconds}))


def _save_state(
    folder: Path, numbers: dict[str, int], counts: Any, kinds: Any, refused: int
) -> None:
    state = {"next": numbers, "counts": counts, "kinds": kinds, "refused": refused}
    (folder / "state.json").write_text(json.dumps(state))


def keep_input(folder: Path, name: str, content: bytes, failure: Any) -> None:
    """Write an input and its `fuzz_judge.Failure` into the folder of failures."""
    (folder / f"{name}.bin").write_bytes(content)
    (folder / f"{name}.txt").write_text(f"{failure.kind}\n{failure.text}\n", errors="replace")


def _reproduce(path: Path) -> int:
    """Read one input again: 1 if it fails. A file's name begins with its format's."""
    from fuzz_judge import Judge, bound_process
    from fuzz_readers import FORMATS

    bound_process()
    name = max((name for name in FORMATS if path.name.startswith(f"{name}-")), key=len, default="")
    if not name:
        raise SystemExit(f"{path}: its name begins with no format: {', '.join(FORMATS)}")
    with TemporaryDirectory() as folder:
        judge = Judge(Path(folder))
        failure = judge.judge(name, path.read_bytes())
    print("refused" if judge.refused else "read" if failure is None else failure.kind)
    if failure is not None:
        print(failure.text)
    return int(failure is not None)


def _report(options: argparse.Namespace, totals: list[dict[str, Any]]) -> int:
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for total in totals:
        counts.update(total["counts"])
        kinds.update(total["kinds"])
        seconds.update(total.get("seconds", {}))
    inputs = sum(counts.values())
    result = {
        "inputs": inputs,
        "refused": sum(total["refused"] for total in totals),
        "failures": dict(kinds.most_common()),
        "counts": dict(counts),
        "milliseconds": {n: round(1000 * seconds[n] / counts[n], 2) for n in counts if counts[n]},
        "processor_seconds": round(sum(os.times()[:4])),
    }
    print(json.dumps(result, indent=2))
    if kinds:
        print(f"{sum(kinds.values())} of {inputs} inputs failed; see {options.failures}")
    return int(bool(kinds))


if __name__ == "__main__":
    sys.exit(main())
