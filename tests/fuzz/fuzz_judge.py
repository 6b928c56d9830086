"""One damaged file → nothing, or what is wrong with how it was read.

A reader may raise an error of the tree, in one line, or return a valid result, within time and
memory. Anything else is a failure, and its kind is the error and the line that raised it.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz_readers import FORMATS, Format

from medsa_deploy.errors import MedsaError
from medsa_deploy.images.limits import Limits, reading_within
from medsa_deploy.machine import resident_bytes

LIMITS = Limits(
    memory=256_000_000, pixels=2**22, voxels=2**24, decompressed=2**24, items=20_000, seconds=10
)
"""Low, so that a reader that passes them is noticed soon."""
SLACK_BYTES = 64_000_000
MOST_SECONDS = 3.0
"""Processor time of an input: the files are small, and most take a thousandth."""
HANG_SECONDS = 30.0
"""Processor time after which the process is ended; its parent reports the input."""
ADDRESS_SPACE = 8_000_000_000
MOST_MESSAGE = 4000


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An input that was read as none should be."""

    kind: str
    text: str


class _Formatting(logging.Handler):
    """Formats every message, as a handler of a program would."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


def bound_process() -> None:
    """Prepare a process that reads nothing but damaged files: it logs all, and never swaps."""
    logging.getLogger().addHandler(_Formatting())
    logging.getLogger().setLevel(logging.DEBUG)
    for name in ("PIL", "nibabel", "pydicom"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Judge:
    """Reads damaged files in a folder of its own; one for a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refused = 0
        self._seeds: dict[str, list[bytes]] = {}
        _forget_peak()

    def content(self, name: str, seed: int, index: int) -> bytes:
        """The damaged file of a format, a seed and a number; the first files are intact."""
        intact = self.intact(name)
        if index < len(intact):
            return intact[index]
        random = Random(f"{seed}/{name}/{index}")
        return FORMATS[name].mutation(random, intact)

    def intact(self, name: str) -> list[bytes]:
        """The files of a format that mutations start from."""
        if name not in self._seeds:
            self._seeds[name] = FORMATS[name].seeds()
        return self._seeds[name]

    def judge(self, name: str, content: bytes) -> Failure | None:
        """Read a file; a failure if that went wrong."""
        kind = FORMATS[name]
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        path = folder / f"{kind.name}{kind.suffix}"
        path.write_bytes(content)
        ceiling = (resident_bytes() or 0) + LIMITS.memory + SLACK_BYTES
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
        failure = self._read(kind, path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - start
        if failure is not None:
            return failure
        if seconds > MOST_SECONDS:
            return Failure(kind=f"{name}: slow", text=f"{seconds:.1f} s of processor time")
        peak = _peak_bytes()
        if peak > ceiling - LIMITS.memory:
            _forget_peak()
        if peak > ceiling:
            return Failure(kind=f"{name}: memory", text=f"{(peak - ceiling) / 1e6:.0f} MB too much")
        return None

    def _read(self, kind: Format, path: Path) -> Failure | None:
        try:
            with reading_within(LIMITS):
                kind.read(path)
        except MedsaError as e:
            self.refused += 1
            text = str(e)
            if "\n" in text or not text.strip() or len(text) > MOST_MESSAGE:
                return Failure(kind=f"{_place(e)}: a message of several lines", text=text)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # a panic of Rust is no Exception
            text = "".join(traceback.format_exception(e))
            return Failure(kind=f"{type(e).__name__} at {_place(e)}", text=text)
        return None


def _place(error: BaseException) -> str:
    """The last line of this project's code that an error came through."""
    root = str(Path(__file__).parents[2])
    place = "?"
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(root) and "site-packages" not in frame.filename:
            place = f"{os.path.relpath(frame.filename, root)}:{frame.lineno}"
    return place


def _forget_peak() -> None:
    """Let the peak of this process's memory begin again."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        for line in f:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


if sys.platform != "linux":
    raise SystemExit("the fuzzer reads /proc: run it on Linux")
