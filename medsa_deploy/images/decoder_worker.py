"""Encoded DICOM frames on stdin → their pixels on stdout: the program of a decoding process.

`decoder` starts this file as a script, so it imports nothing of this package: a start costs half as
much. A message is the lengths of its two parts (`HEAD`), a JSON object, and bytes. Decoders in C++
and Rust may end this process, or be ended with it; the session that asked lives on.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import warnings
from typing import Any, BinaryIO

HEAD = struct.Struct("<IQ")
"""Bytes of the JSON object, and of what follows."""
GRACE_SECONDS = 5.0
"""Time after which this process ends by itself, beyond the time that its parent waits."""


def main() -> None:
    """Answer until stdin ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand between the messages
    import numpy  # noqa: F401
    import pydicom.pixels  # noqa: F401

    base = _virtual_memory()
    _forbid_cores()
    _send(replies, {"ready": os.getpid()}, b"")
    while head := requests.read(HEAD.size):
        count, size = HEAD.unpack(head)
        request = json.loads(requests.read(count))
        content = requests.read(size)
        memory = None if base is None else base + request["memory"]
        _limit(memory, request["seconds"] + GRACE_SECONDS)
        panicked, payload = False, b""
        reply: dict[str, Any] = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                reply, payload = _decode(request, content)
            except BaseException as e:  # a panic of Rust is no Exception
                panicked = not isinstance(e, Exception)
                reply = {"error": type(e).__name__, "text": str(e)[:2000], "panicked": panicked}
                payload = b""
        _limit(None, 0)
        reply["warnings"] = [str(warning.message)[:2000] for warning in caught[:20]]
        _send(replies, reply, payload)
        if panicked:
            return  # its memory may be anything


def _decode(request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], Any]:
    """The facts of the decoded array, and its bytes."""
    import numpy as np

    if "gdcm" in request:
        array, photometric = _gdcm(request["gdcm"]), ""
    else:
        from pydicom.encaps import encapsulate
        from pydicom.pixels import get_decoder
        from pydicom.uid import UID

        decoder = get_decoder(UID(request["syntax"]))
        array, meta = decoder.as_array(encapsulate([content], has_bot=False), **request["options"])
        photometric = str(meta["photometric_interpretation"])
    array = np.ascontiguousarray(array)
    facts = {"dtype": array.dtype.str, "shape": array.shape, "photometric": photometric}
    return facts, array.data.cast("B")


def _gdcm(request: dict[str, Any]) -> Any:
    """One frame of a file that gdcm reads, (H, W)."""
    import gdcm
    import numpy as np

    reader = gdcm.ImageReader()
    reader.SetFileName(request["path"])
    if not reader.Read():
        raise ValueError("its JPEG cannot be decoded: it is damaged")
    content = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    return np.frombuffer(content, request["dtype"]).reshape(request["shape"])[request["frame"]]


def _limit(memory: int | None, seconds: float) -> None:
    """Bound the address space, and end this process in some seconds; None and 0 for no bound."""
    try:
        import resource
    except ImportError:  # Windows: the parent's time alone
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = resource.RLIM_INFINITY if memory is None else memory
    if hard != resource.RLIM_INFINITY:
        soft = hard if memory is None else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # the signal's default is to end the process


def _forbid_cores() -> None:
    """A core file of a process that has crashed would hold a patient's image."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _virtual_memory() -> int | None:
    """Bytes of address space that this process has; None if the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _send(replies: BinaryIO, reply: dict[str, Any], payload: Any) -> None:
    text = json.dumps(reply).encode()
    replies.write(HEAD.pack(len(text), len(payload)) + text)
    replies.write(payload)
    replies.flush()


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)
