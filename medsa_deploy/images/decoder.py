"""An encoded DICOM frame → its pixels, decoded in a process that may fail.

Decoders are written in C, C++ and Rust. A damaged frame can end their process, or keep it busy for
good. So they run in a process of their own, with limits on memory and time. It is started once,
while headers are read, and started again if a frame has ended it.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import select
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from . import decoder_worker
from .decoder_worker import HEAD
from .limits import current_limits, size_text

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
                    _receive(process, time.monotonic() + START_SECONDS)
                    self._ready = True
                deadline = time.monotonic() + limits.seconds
                _send(process, request, content, deadline)
                reply, payload = _receive(process, deadline)
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
            [sys.executable, "-P", str(Path(decoder_worker.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders print what they read
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C in a terminal reaches this process only
        )
        self._owner, self._ready = os.getpid(), False
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            if hasattr(fcntl, "F_SETPIPE_SZ"):
                try:
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
                except OSError:  # the user has many large pipes already
                    pass
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


def _send(
    process: subprocess.Popen[bytes], request: dict[str, Any], content: bytes, deadline: float
) -> None:
    """Write a message; TimeoutError, or OSError if the process has ended."""
    assert process.stdin is not None
    pipe = process.stdin.fileno()
    text = json.dumps(request).encode()
    for part in (HEAD.pack(len(text), len(content)) + text, content):
        view = memoryview(part)
        while view:
            try:
                view = view[os.write(pipe, view) :]
            except BlockingIOError:
                _wait(pipe, select.POLLOUT, deadline)


def _receive(process: subprocess.Popen[bytes], deadline: float) -> tuple[dict[str, Any], bytearray]:
    """Read a message; TimeoutError, or OSError if the process has ended or writes nonsense."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    count, size = HEAD.unpack(_read(pipe, HEAD.size, deadline))
    if count > MOST_REPLY or size > current_limits().memory:
        raise OSError(f"an answer of {size_text(size)}")
    reply: dict[str, Any] = json.loads(_read(pipe, count, deadline))
    return reply, _read(pipe, size, deadline)


def _read(pipe: int, size: int, deadline: float) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        try:
            count = os.readv(pipe, [view])
        except BlockingIOError:
            _wait(pipe, select.POLLIN, deadline)
            continue
        if count == 0:
            raise OSError("the pipe has ended")
        view = view[count:]
    return content


def _wait(pipe: int, event: int, deadline: float) -> None:
    """Wait until a pipe can be used; TimeoutError."""
    seconds = deadline - time.monotonic()
    poll = select.poll()
    poll.register(pipe, event)
    if seconds <= 0 or not poll.poll(seconds * 1000):
        raise TimeoutError


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
