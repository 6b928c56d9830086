"""Commands under faults at random moments: python tests/fault_rounds.py BUNDLE FOLDER SEED ROUNDS.

One process imports the package, then forks for every round, so that a round costs no imports. It
has a mount namespace of its own if the system allows it: full disks are small tmpfs, read-only
folders are mounts. Elsewhere a limit on the size of files and permissions stand in for them.

Every round prints one JSON line. After every fault the same command runs undisturbed, and must
succeed and leave no temporary file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
LIBC = ctypes.CDLL(None, use_errno=True)
NOWHERE = "/dev/null"
SPARE_BYTES = {"run": 1500, "sign": 4000, "folder": 30_000}
"""Most that a file may have, or that a disk has left: some more than the command writes."""
MOST_SPARE_BYTES = 400_000
PAGE = 4096
FAULTS = ("kill", "term", "disk", "file size", "read-only", "descriptors", "memory")
PROMPT = ("--point", "40,40")


def private_mounts() -> bool:
    """Give this process mounts of its own; False if the system does not allow it."""
    user, group = os.getuid(), os.getgid()
    flags = CLONE_NEWNS if user == 0 else CLONE_NEWNS | CLONE_NEWUSER
    if LIBC.unshare(flags):
        return False
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return not LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)


HAS_MOUNTS = private_mounts() if __name__ == "__main__" else False

import pydantic  # noqa: E402, F401

from medsa_deploy import cli  # noqa: E402
from medsa_deploy.bundle.additions import add_files, work_folder  # noqa: E402
from medsa_deploy.bundle.checked import check_bundle  # noqa: E402
from medsa_deploy.bundle.files import check_files, describe_file  # noqa: E402
from medsa_deploy.bundle.leftovers import is_temporary  # noqa: E402
from medsa_deploy.bundle.manifest import load_manifest  # noqa: E402
from medsa_deploy.errors import MedsaError  # noqa: E402
from medsa_deploy.runtime import loading  # noqa: E402, F401
from medsa_deploy.runtime.backends import onnxruntime_cpu  # noqa: E402, F401


@dataclass
class Round:
    """One command under one fault."""

    number: int
    command: str
    fault: str
    code: int = 0
    """Exit code; negative for a signal."""
    seconds: float = 0.0
    amount: float = 0.0
    """Seconds to a signal, bytes or descriptors left."""
    error: str = ""
    violations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """A command of this package and the files it changes."""

    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    change: Callable[[Path], None] | None = None
    """In place of arguments: work on the bundle, in Python."""


def replace_graphs(bundle: Path) -> None:
    """What quantize does at its end: replaces a file, adds a file, removes a file."""
    manifest = load_manifest(bundle)
    with work_folder(bundle) as work:
        (work / "reference.npz").write_bytes(b"new" * 20_000)
        (work / "added.bin").write_bytes(b"added" * 10_000)
        files = sorted(work.iterdir())
        entries = [describe_file(file, work, role="reference", precision="fp32") for file in files]
        listed = [file for file in manifest.files if file.role not in ("reference", "sbom")]
        add_files(bundle, files, replace(manifest, files=(*listed, *entries)))


COMMANDS = {
    "run": Command(("run", "a.medsa", "a.png", *PROMPT, "-o", "out/m.png"), ("out/m.png",)),
    "folder": Command(
        ("run", "a.medsa", "in", *PROMPT, "-o", "out", "--overlay", "out/o"),
        (
            *(f"out/{name}.png.mask.png" for name in "ab"),
            *(f"out/o/{name}.png.overlay.png" for name in "ab"),
        ),
    ),
    "sign": Command(("sign", "a.medsa", "--key", "k.pem"), ("a.medsa.sig",)),
    "change": Command((), (), replace_graphs),
    "verify": Command(("verify", "a.medsa", "--report"), ()),
    "quantize": Command(("quantize", "a.medsa", "--fp16"), ()),
}


class Workplace:
    """A folder that holds a bundle and images, anew for every round."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.mounted = False

    def renew(self, free_bytes: int | None = None) -> None:
        """Copy the source again; with `free_bytes`, into a file system that has no more."""
        self.remove()
        self.folder.mkdir()
        if free_bytes is not None:
            size = used_bytes(self.source) + free_bytes
            self._mount(b"tmpfs", b"tmpfs", 0, f"size={size}".encode())
        shutil.copytree(self.source, self.folder, dirs_exist_ok=True)

    def make_read_only(self) -> None:
        """Let nobody write into the folder, not even root."""
        path = os.fsencode(self.folder)
        self._mount(path, None, MS_BIND, None)
        if LIBC.mount(None, path, None, MS_BIND | MS_REMOUNT | MS_RDONLY, None):
            raise OSError(ctypes.get_errno(), "the folder cannot be made read-only")

    def make_writable(self) -> None:
        """Undo `make_read_only`."""
        self._unmount()

    def remove(self) -> None:
        """Remove the folder and its mount."""
        self._unmount()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _mount(self, device: bytes, kind: bytes | None, flags: int, options: bytes | None) -> None:
        if LIBC.mount(device, os.fsencode(self.folder), kind, flags, options):
            raise OSError(ctypes.get_errno(), "no mount")
        self.mounted = True

    def _unmount(self) -> None:
        if self.mounted:
            LIBC.umount2(os.fsencode(self.folder), 0)
            self.mounted = False


def used_bytes(folder: Path) -> int:
    """What a folder takes in pages of memory, names included."""
    paths = list(folder.rglob("*"))
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in paths if path.is_file())


def forked(command: Command, folder: Path, limit: Callable[[], None], delay: float | None) -> Round:
    """Run a command in a child; `delay`: seconds until it is killed."""
    result = Round(0, "", "")
    reading, writing = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        _run_child(command, folder, writing, limit)
    os.close(writing)
    if delay is not None:
        signal_number = signal.SIGKILL if delay > 0 else signal.SIGTERM
        time.sleep(abs(delay))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal_number)
    with open(reading, encoding="utf-8", errors="replace") as errors:
        result.error = errors.read().strip()
    _, status = os.waitpid(child, 0)
    result.code = os.waitstatus_to_exitcode(status)
    result.seconds = time.perf_counter() - start
    return result


def _run_child(command: Command, folder: Path, log: int, limit: Callable[[], None]) -> None:
    """The command, in a process that ends with it."""
    code = 70
    try:
        os.chdir(folder)
        os.dup2(log, 2)
        os.dup2(os.open(NOWHERE, os.O_WRONLY), 1)
        os.closerange(3, 64)
        sys.argv = ["medsa-deploy", *command.arguments]
        limit()
        if command.change is None:
            cli.main()
        else:
            command.change(Path("a.medsa"))
            code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    except (OSError, MedsaError):
        code = 2
    except MemoryError:
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def contents(folder: Path, outputs: tuple[str, ...]) -> dict[str, bytes | None]:
    """Output → its bytes; None if it is absent."""
    return {
        name: (folder / name).read_bytes() if (folder / name).exists() else None for name in outputs
    }


def bundle_state(bundle: Path) -> dict[str, bytes]:
    """Every file of a bundle that a command may load."""
    manifest = check_bundle(bundle).manifest
    check_files(manifest, bundle)
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in bundle.rglob("*")
        if path.is_file() and not any(map(is_temporary, path.relative_to(bundle).parts))
    }


def temporary_files(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if is_temporary(path.name)]


@contextlib.contextmanager
def quiet_violations(result: Round, doing: str) -> Iterator[None]:
    """An exception of a check is a violation."""
    try:
        yield
    except Exception as e:
        result.violations.append(f"{doing}: {type(e).__name__}: {e}")


class Faults:
    """Rounds of one seed."""

    def __init__(self, source: Path, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.place = Workplace(source, folder)
        self.usual: dict[str, Round] = {}
        self.new: dict[str, dict[str, bytes | None]] = {}
        self.memory = _memory_bytes()

    def measure(self, name: str) -> None:
        """Run a command undisturbed: its time and its outputs."""
        self.place.renew()
        result = forked(COMMANDS[name], self.place.folder, lambda: None, None)
        if result.code:
            raise SystemExit(f"{name} fails undisturbed: {result.error}")
        self.usual[name] = result
        self.new[name] = contents(self.place.folder, COMMANDS[name].outputs)

    def round(self, number: int, name: str, fault: str) -> Round:
        """One round, with what it violated."""
        command, folder = COMMANDS[name], self.place.folder
        if name not in self.usual:
            self.measure(name)
        amount = self._amount(name, fault)
        is_disk = fault == "disk" and HAS_MOUNTS
        self.place.renew(int(amount) if is_disk else None)
        before = bundle_state(folder / "a.medsa")
        old = contents(folder, command.outputs)
        read_only = fault == "read-only"
        if read_only and HAS_MOUNTS:
            self.place.make_read_only()
        delay = {"kill": amount, "term": -amount}.get(fault)
        result = forked(command, folder, self._limit(fault, amount), delay)
        result.number, result.command, result.fault = number, name, fault
        result.amount = amount
        if read_only and HAS_MOUNTS:
            self.place.make_writable()
        self._check(result, old, before)
        if is_disk:
            return result
        with quiet_violations(result, "the next command"):
            again = forked(command, folder, lambda: None, None)
            left = temporary_files(folder)
            if again.code or left:
                result.violations.append(f"next command: {again.code} {again.error} {left}")
        return result

    def _amount(self, name: str, fault: str) -> float:
        """How much a fault leaves."""
        if fault in ("kill", "term"):
            return self.random.uniform(0.0, self.usual[name].seconds)
        if fault == "disk":
            pages = SPARE_BYTES.get(name, MOST_SPARE_BYTES) // PAGE + 1
            return float(PAGE * self.random.randrange(0, pages + 1))
        if fault == "file size":
            return float(self.random.randrange(0, SPARE_BYTES.get(name, MOST_SPARE_BYTES)))
        if fault == "descriptors":
            return float(self.random.randrange(4, 16))
        if fault == "memory":
            return float(self.random.randrange(0, 160 << 20))
        return 0.0

    def _limit(self, fault: str, amount: float) -> Callable[[], None]:
        """What a child does before it begins."""
        size = int(amount)

        def limit() -> None:
            if fault == "file size" or (fault == "disk" and not HAS_MOUNTS):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            elif fault == "descriptors":
                resource.setrlimit(resource.RLIMIT_NOFILE, (size, size))
            elif fault == "memory":
                resource.setrlimit(resource.RLIMIT_AS, (self.memory + size, self.memory + size))
            elif fault == "read-only" and not HAS_MOUNTS:
                os.umask(0o777)

        return limit

    def _check(self, result: Round, old: dict[str, bytes | None], before: dict[str, bytes]) -> None:
        """Note what an ended command violated."""
        folder, new = self.place.folder, self.new[result.command]
        codes = {"kill": (0, -9), "term": (0, 130, -15)}.get(result.fault, (0, 2, 3))
        if result.code not in codes:
            result.violations.append(f"exit code {result.code}")
        if "Traceback" in result.error or "a fault in medsa-deploy" in result.error:
            result.violations.append("not an error of the tree")
        errors = [line for line in result.error.splitlines() if line.startswith("error: ")]
        is_alone = result.command not in ("change", "folder")  # which has an error for each image
        if result.code > 0 and is_alone and len(errors) != 1:
            result.violations.append(f"{len(errors)} errors")
        for name, content in contents(folder, COMMANDS[result.command].outputs).items():
            is_whole = content in (old[name], new[name]) or name.endswith(".sig")
            if not is_whole or (result.code == 0 and content is None):
                result.violations.append(f"{name} is neither old nor new")
        with quiet_violations(result, "the bundle"):
            after = bundle_state(folder / "a.medsa")
            unchanged = {k: v for k, v in before.items() if after.get(k) == v}
            is_new = result.command in ("change", "quantize", "verify")
            if len(unchanged) < len(before) and not is_new:
                result.violations.append("the bundle changed")
            if result.code == 0 and result.command == "change" and "added.bin" not in after:
                result.violations.append("the change is lost")


def _memory_bytes() -> int:
    """Address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(source: Path, folder: Path, seed: int, rounds: int, names: list[str]) -> None:
    """Print a line for each round."""
    faults = Faults(source, folder, seed)
    for number in range(rounds):
        name, fault = names[number % len(names)], FAULTS[(number // len(names)) % len(FAULTS)]
        result = faults.round(number, name, fault)
        print(json.dumps(asdict(result)), flush=True)
    faults.place.remove()


if __name__ == "__main__":
    source, folder, seed, rounds, *names = sys.argv[1:]
    main(Path(source), Path(folder), int(seed), int(rounds), names)
