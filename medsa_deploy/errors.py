"""Everything that can go wrong, as one tree of exceptions.

MedsaError
├── UsageError             the call or the command line is wrong: options, names         exit 2
├── InputError             a file, image or prompt cannot be used                        exit 2
│   ├── CheckpointError    a checkpoint: container, keys, shapes, another architecture
│   ├── BundleError        a bundle: missing, changed or unknown files
│   │   └── SignatureError a bundle that no trusted key has signed, or a damaged signature
│   ├── ImageError         an image: unreadable, NaN, constant, wrong shape, unwritable
│   └── PromptError        a prompt: outside the image, an empty box, no prompt at all
├── EngineError            an engine cannot be loaded on this machine; rebuild it        exit 2
│   ├── EngineFlavorError  a TensorRT engine for TensorRT-RTX, or the reverse
│   ├── EngineVersionError built by another version of the library
│   ├── EngineDeviceError  built for other GPUs, or this machine has no NVIDIA driver
│   ├── EngineChangedError its files are missing or changed since the build
│   └── EngineStaleError   built from another ONNX file than the bundle holds now
├── MissingDependencyError an optional library is not installed; names the extra         exit 2
├── BuildError             an engine was not built, or a CUDA kernel not compiled        exit 3
├── ParityError            two networks that must agree do not                           exit 1
└── DeviceError            a backend failed while running                                exit 3
    ├── DeviceMemoryError  the device's memory is full
    └── DeviceLostError    the device is unusable until the process is restarted

A message says what was found, what was expected and what to do, in that order. To handle them:

    import medsa_deploy
    from medsa_deploy import errors

    try:
        with medsa_deploy.load("liver.medsa") as session:
            embedding = session.encode(medsa_deploy.read_image("slice.png"))
            prediction = session.segment(embedding, points=[(120, 88)])
    except errors.InputError as e:
        print(f"skipped: {e}")  # the next image may be fine
    except errors.DeviceMemoryError as e:
        print(f"try again with a smaller batch, or on the CPU: {e}")
    except errors.MedsaError as e:
        raise SystemExit(f"stopped: {e}") from e
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MedsaError(Exception):
    """Base of every error this package raises on purpose.

    `exit_code` is the exit code of the command line. `path` is the file or folder that could not be
    used, if it is known.
    """

    exit_code = 3
    path: Path | None = None


class UsageError(MedsaError):
    """The call is wrong: options that exclude each other, an unknown name, an unusable output."""

    exit_code = 2


class InputError(MedsaError):
    """A file, an image or a prompt cannot be used."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint cannot be used: container, keys, shapes, or another architecture."""


class BundleError(InputError):
    """A bundle cannot be used: missing, changed or unknown files."""


class SignatureError(BundleError):
    """A bundle that no trusted key has signed, or whose signature cannot be used."""


class ImageError(InputError):
    """An image cannot be read, written or used: damaged, NaN, constant, or of the wrong shape."""


class PromptError(InputError):
    """A prompt cannot be used: outside the image, an empty box, or no prompt at all."""


class EngineError(MedsaError):
    """An engine cannot be loaded on this machine; the message says what to rebuild."""

    exit_code = 2


class EngineFlavorError(EngineError):
    """A TensorRT engine for a TensorRT-RTX backend, or the reverse."""


class EngineVersionError(EngineError):
    """An engine that another version of the library built."""


class EngineDeviceError(EngineError):
    """An engine for other GPUs than this machine's, or a machine without an NVIDIA driver."""


class EngineChangedError(EngineError):
    """Files of an engine are missing or have changed since the build."""


class EngineStaleError(EngineError):
    """An engine built from another ONNX file than the bundle holds now."""


class MissingDependencyError(MedsaError):
    """An optional library is not installed; the message names the extra to install.

    >>> print(MissingDependencyError("pydicom", extra="dicom", purpose="reading DICOM"))
    reading DICOM needs pydicom, which is not installed: pip install 'medsa-deploy[dicom]'
    """

    exit_code = 2

    def __init__(self, library: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed: "
            f"pip install 'medsa-deploy[{extra}]'"
        )


class BuildError(MedsaError):
    """TensorRT could not build an engine, or a CUDA compiler could not compile a kernel."""

    exit_code = 3


class ParityError(MedsaError):
    """Two networks that must agree do not."""

    exit_code = 1


class DeviceError(MedsaError):
    """A backend failed while it was running."""

    exit_code = 3


class DeviceMemoryError(DeviceError):
    """The device's memory is full."""


class DeviceLostError(DeviceError):
    """The device was reset, unplugged or faulted; it is unusable until the process is restarted."""


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Give errors of this package the path that they are about, unless they have one.

    >>> try:
    ...     with about(Path("a.png")):
    ...         raise ImageError("a.png is empty")
    ... except ImageError as e:
    ...     print(e.path)
    a.png
    """
    try:
        yield
    except MedsaError as e:
        e.path = e.path or path
        raise


def one_line(error: BaseException) -> str:
    """An exception's text as one line of at most 200 characters; its type if it has no text.

    >>> one_line(ValueError("bad header\\n  in byte 7"))
    'bad header in byte 7'
    >>> one_line(KeyboardInterrupt())
    'KeyboardInterrupt'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
