"""The command line, called from tests: in this process for speed, or as its own process."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from medsa_deploy import cli

WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
"""What makes libraries look not installed: no finder finds them."""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that says what was wrong, with nothing on stdout but what --json says."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert self.err.endswith(f"{errors[0]}\n"), self.err
        assert "Traceback" not in self.err
        message = errors[0].removeprefix("error: ")
        if self.out:
            assert self.json["error"]["message"] == message
        return message


def call(*arguments: object) -> Done:
    """`medsa-deploy ARGUMENTS` in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["medsa-deploy", *map(str, arguments)]),
        _signals_kept(),
    ):
        try:
            cli.main()
        except SystemExit as e:
            code = int(e.code or 0)
    return Done(code, *(_text(stream) for stream in (out, err)))


def start(*arguments: object, without: tuple[str, ...] = (), **options: Any) -> Done:
    """`medsa-deploy ARGUMENTS` as a process; `without` the libraries named, as if not installed."""
    done = subprocess.run(
        command(*arguments, without=without),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        **options,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def command(*arguments: object, without: tuple[str, ...] = ()) -> list[str]:
    """The argument list of a `medsa-deploy` process."""
    words = [str(argument) for argument in arguments]
    if not without:
        return [str(Path(sys.executable).with_name("medsa-deploy")), *words]
    code = WITHOUT.format(names=without) + "from medsa_deploy.cli import main\nmain()"
    return [sys.executable, "-c", code, *words]


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, with the SHA-256 of what it holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def copied(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle that a test may change."""
    return Path(shutil.copytree(bundle, folder / "copy.medsa"))


def manifest_data(bundle: Path) -> Any:
    """`manifest.json` without its digest: a changed one loads, as those of earlier versions do."""
    data = json.loads((bundle / "manifest.json").read_text())
    data.pop("digest", None)
    return data


def edit_manifest(bundle: Path, **changes: Any) -> None:
    """Change values of `manifest.json`, each named by its path: `conventions__threshold=0.2`."""
    path = bundle / "manifest.json"
    data = manifest_data(bundle)
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = data
        for parent in parents:
            place = place[int(parent) if isinstance(place, list) else parent]
        place[last] = value
    path.write_text(json.dumps(data))


def accept_changes(bundle: Path) -> None:
    """Make the manifest's sizes and hashes those of the files there are."""
    path = bundle / "manifest.json"
    data = manifest_data(bundle)
    for entry in data["files"]:
        content = (bundle / entry["path"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(data))


@contextmanager
def _signals_kept() -> Iterator[None]:
    """The command line catches signals; a test run's own handlers come back afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    content = stream.buffer.getvalue()  # type: ignore[attr-defined]
    return content.decode("utf-8")
