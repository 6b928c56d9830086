"""An encoded DICOM frame → its pixels, decoded in a process that may fail.

Decoders are written in C, C++ and Rust. A damaged frame can end their process, or keep it busy for
good. So they run in a process of their own, with limits on memory and time. It is started once,
while headers are read, and started again if a frame has ended it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.child import python_command

from . import decoder_worker
from .decoder_worker import HEAD
from .limits import current_limits, size_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

START_SECONDS = 60.0
"""Time that a process has to start in."""
END_SECONDS = 5.0
MOST_REPLY = 2**20
"""Bytes of a reply's facts."""
PIPE_BYTES = 2**20
"""Of the pipes, where the system lets them be set: a slice of 512×512 is one write."""


class DecodingError(RuntimeError):
    """A frame that cannot be decoded, or whose decoder has ended or took too long."""


class DecoderProcess:
    """The process, started when `start` or `decode` is first called; any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        """The process id of this process: a fork must not use its parent's pipes."""
        self._ready = False

    def start(self) -> None:
        """Start the process, without waiting for it."""
        if self._process is None or self._owner != os.getpid():
            with self._lock:
                self._started()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def decode(self, request: dict[str, Any], content: bytes) -> tuple[np.ndarray, str]:
        """Pixels, (H, W) or (H, W, 3), and their photometric interpretation.

        `request`: see `decoder_worker`. The process's warnings are issued here. DecodingError.
        """
        limits = current_limits()
        request = {**request, "memory": limits.memory, "seconds": limits.seconds}
        with self._lock:
            process = self._started()
            try:
                if not self._ready:
                    with _ended_after(process, START_SECONDS):
                        _receive(process)
                    self._ready = True
                with _ended_after(process, limits.seconds):
                    _send(process, request, content)
                    reply, payload = _receive(process)
            except TimeoutError as e:
                self._end()
                raise DecodingError(
                    f"its decoder did not end within {limits.seconds:g} s; in Python, Limits has "
                    "the limit"
                ) from e
            except OSError as e:
                code = self._end(END_SECONDS)
                raise DecodingError(f"its decoder has ended: {_ending(code)}") from e
            except BaseException:  # an interrupt leaves a message half read
                self._end()
                raise
            if reply.get("panicked"):
                self._end()
        for text in reply.get("warnings", ()):
            warnings.warn(text, stacklevel=2)
        return _pixels(reply, payload)

    def _started(self) -> subprocess.Popen[bytes]:
        """The running process; a new one if there is none, or another process's."""
        process = self._process
        if process is not None and self._owner == os.getpid():
            if process.poll() is None:
                return process
            self._end()
        self._process = process = subprocess.Popen(
            python_command(Path(decoder_worker.__file__)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders print what they read
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C in a terminal reaches this process only
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # on Windows, too
        )
        self._owner, self._ready = os.getpid(), False
        for pipe in (process.stdin, process.stdout):
            _enlarge(pipe)
        return process

    def _end(self, seconds: float = 0.05) -> int:
        """End the process, which has some seconds for that, and return its exit code.

        The code is below 0 for the signal that ended it.
        """
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(END_SECONDS)
        return process.returncode


decoder = DecoderProcess()
"""The process that all readers share."""
atexit.register(decoder.close)


def _enlarge(pipe: Any) -> None:
    """Let a pipe hold a slice, so that processes take turns less often; Linux can."""
    if fcntl is None or not hasattr(fcntl, "F_SETPIPE_SZ"):
        return
    with contextlib.suppress(OSError):  # the user has many large pipes already
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


@contextlib.contextmanager
def _ended_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """Kill a process that has not answered in some seconds: TimeoutError instead of its OSError.

    Pipes with a time limit of their own are not portable; a pipe whose other side has ended is.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(max(seconds, 0.0), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except OSError as e:
        if late.is_set():
            raise TimeoutError from e
        raise
    finally:
        timer.cancel()


def _send(process: subprocess.Popen[bytes], request: dict[str, Any], content: bytes) -> None:
    """Write a message; OSError if the process has ended."""
    assert process.stdin is not None
    text = json.dumps(request).encode()
    for part in (HEAD.pack(len(text), len(content)) + text, content):
        view = memoryview(part)
        while view:
            view = view[process.stdin.write(view) :]


def _receive(process: subprocess.Popen[bytes]) -> tuple[dict[str, Any], bytearray]:
    """Read a message; OSError if the process has ended or writes nonsense."""
    count, size = HEAD.unpack(_read(process, HEAD.size))
    if count > MOST_REPLY or size > current_limits().memory:
        raise OSError(f"an answer of {size_text(size)}")
    reply: dict[str, Any] = json.loads(_read(process, count))
    return reply, _read(process, size)


def _read(process: subprocess.Popen[bytes], size: int) -> bytearray:
    pipe: Any = process.stdout  # without a buffer, so that its bytes are copied once
    content = bytearray(size)
    view = memoryview(content)
    while view:
        count = pipe.readinto(view)
        if count == 0:
            raise OSError("the pipe has ended")
        view = view[count:]
    return content


def _pixels(reply: dict[str, Any], payload: bytearray) -> tuple[np.ndarray, str]:
    """The array of a reply; DecodingError for an error."""
    if "error" in reply:
        name, text = reply["error"], reply["text"]
        if name == "MemoryError":
            text = "its decoder needs more memory than the limit; raise it with --max-memory"
        elif reply["panicked"]:
            text = f"its decoder has failed: {name}"
        raise DecodingError(text or name)
    array = np.frombuffer(payload, reply["dtype"]).reshape(reply["shape"])
    return array, str(reply["photometric"])


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
