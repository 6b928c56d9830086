"""Functions that tests/test_child.py runs in child processes."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from medsa_deploy import errors


def echo(job, note):
    return {"job": job, "process": os.getpid(), "session": os.getsid(0)}


def count(job, note):
    for number in range(job):
        note(number)
    return "counted"


def fail(job, note):
    name, text = job
    raise getattr(errors, name)(text)


def fail_without_extra(job, note):
    raise errors.MissingDependencyError("pydicom", extra="dicom", purpose="reading DICOM")


class LocalError(errors.DeviceError):
    """An error that another process does not know."""


def fail_locally(job, note):
    raise LocalError("no such device")


def read(job, note):
    return Path(job).read_text(encoding="utf-8")


def fault(job, note):
    raise KeyError("no such\nkey")


def unanswerable(job, note):
    return object()


def leave(job, note):
    print("a last word")
    sys.exit(job)


def crash(job, note):
    print("first words\nlast words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), job)


def speak(job, note):
    os.write(1, b"a library speaks\n")
    print("and again")
    return "said"


def keep_a_file(job, note):
    descriptor, path = tempfile.mkstemp()
    os.close(descriptor)
    return path


def linger(job, note):
    """Ends late after its result: a library's thread is not done."""
    import threading

    threading.Thread(target=time.sleep, args=(job,)).start()
    return os.getpid()


def wait(job, note):
    """Sends its process's number, and goes on for good. `deaf`: without the interpreter's lock."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(os.getpid())
    if job == "deaf":
        import ctypes

        ctypes.PyDLL(None).sleep(600)
    time.sleep(600)
