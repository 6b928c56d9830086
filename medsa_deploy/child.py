"""A function and a JSON job → the function's JSON result, computed in a process of its own.

`run_in_child` starts `python -m medsa_deploy.child MODULE:FUNCTION JOB`. Libraries that cannot
share a process never meet, and a crash ends no more than its job. The child never outlives its
parent, however that ends and whichever signals both ignore.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medsa_deploy import errors
from medsa_deploy.errors import MedsaError, one_line

OnNote = Callable[[Any], None]
"""Called with a note, any JSON value, that the function sends while it works."""
Job = Callable[[Any, OnNote], Any]
"""A function that runs in a child: the job and the call that sends a note → the result."""

SECONDS_TO_END = 10.0
"""Time that a child has for its exit after its result."""
TAIL_LINES = 20
PR_SET_PDEATHSIG = 1
"""Of Linux's sys/prctl.h: the signal that a process receives when its parent ends."""


class ChildError(RuntimeError):
    """A child ended without a result, or with an error that is none of this package's.

    Its notes hold the end of the child's error stream, or the traceback. Whoever runs a child knows
    what that means for its caller and raises an error of this package.
    """

    def __init__(self, text: str, *, code: int | None = None, notes: str = "") -> None:
        super().__init__(text)
        self.code = code
        """The child's exit code, below 0 for the signal that ended it; None after an exception."""
        if notes:
            self.__notes__ = [notes]  # what `add_note` does, from Python 3.11 on

    @property
    def killed(self) -> bool:
        """Whether the child was killed, as a system does that runs out of memory."""
        return self.code == -9


def python_command(program: str | Path) -> list[str]:
    """The command that runs a module, or a script, without the working or the script's folder on
    its search path: a file that lies there cannot take a library's place.

    This is `python -P`, which Python 3.10 lacks.
    """
    is_script = isinstance(program, Path)
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", *([] if is_script else ["-m"]), str(program)]
    call = "run_path" if is_script else "run_module"
    code = f"import runpy, sys; del sys.path[0]; runpy.{call}({str(program)!r}, run_name='__main__'"
    return [sys.executable, "-c", code + (")" if is_script else ", alter_sys=True)")]


def run_in_child(
    function: Job,
    job: Any,
    *,
    on_note: OnNote = lambda note: None,
    show_stderr: bool = False,
) -> Any:
    """The result of `function(job, note)` in a process of its own.

    `function` is a module's function. Its errors of this package are raised here with their class
    and message, an OSError with its number and file; ChildError stands for everything else. A child
    that an exception leaves behind is killed. Ctrl-C in a terminal reaches this process only.
    Temporary files of the child are removed.

    show_stderr: whether the child writes to this process's error stream; otherwise its last lines
    are part of the ChildError.
    """
    target = f"{function.__module__}:{function.__qualname__}"
    with TemporaryDirectory(prefix="medsa-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "stderr"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*python_command(__name__), target, json.dumps(job)],
                stdin=subprocess.PIPE,  # closes when this process ends, however it does
                stdout=subprocess.PIPE,
                stderr=None if show_stderr else stderr,
                text=True,
                encoding="utf-8",
                env={**os.environ, **dict.fromkeys(("TMPDIR", "TMP", "TEMP"), folder)},
                start_new_session=True,
            )
        try:
            answer = _answer(process, on_note)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
        if answer is None:
            raise _death(process.returncode, log.read_text(encoding="utf-8", errors="replace"))
    if "result" not in answer:
        raise _error(answer)
    return answer["result"]


def _answer(process: subprocess.Popen[str], on_note: OnNote) -> dict[str, Any] | None:
    """The child's last message, after its exit; None if it ended without one."""
    stdout = process.stdout
    assert stdout is not None
    for line in stdout:
        if not line.endswith("\n"):
            break  # it ended while it wrote
        message: dict[str, Any] = json.loads(line)
        if "note" not in message:
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)
            return message
        on_note(message["note"])
    process.wait()
    return None


def _death(code: int, log: str) -> ChildError:
    """The error for a child that ended without a message."""
    lines = log.strip().splitlines()
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    text = ": ".join([ended, *(line.strip() for line in lines[-1:])])
    return ChildError(text, code=code, notes="\n".join(lines[-TAIL_LINES:]))


def _error(answer: dict[str, Any]) -> Exception:
    """The child's error, as an exception of this process."""
    match answer:
        case {"error": name, "text": text}:
            kind: type[MedsaError] = getattr(errors, name)
            return kind.__new__(kind, text)  # some have constructors of their own
        case {"errno": number, "strerror": text, "file": file}:
            return OSError(number, text, file)
    return ChildError(answer["fault"], notes=answer["traceback"])


def main() -> None:
    """Run the function that the command line names; one JSON message a line for `run_in_child`."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand between the messages
    _end_with_parent()

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        module, function = sys.argv[1].split(":")
        job: Job = getattr(import_module(module), function)
        send(result=job(json.loads(sys.argv[2]), lambda note: send(note=note)))
    except MedsaError as e:
        kind = next(kind for kind in type(e).__mro__ if kind.__module__ == errors.__name__)
        send(error=kind.__name__, text=str(e))
    except OSError as e:
        number, text = e.errno or errno.EIO, e.strerror or one_line(e)
        send(errno=number, strerror=text, file=e.filename and str(e.filename))
    except Exception as e:
        send(fault=f"{type(e).__name__}: {one_line(e)}", traceback=traceback.format_exc())


def _end_with_parent() -> None:
    """End this process when the one that started it is gone.

    The parent holds a pipe open, whose end a thread here waits for. A library that holds the
    interpreter's lock stops that thread, so on Linux the system sends a signal as well. It does so
    when the thread ends that started this process: `run_in_child` waits in that thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
