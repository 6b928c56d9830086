"""What can go wrong, as one tree. A message says what was found, what was expected, what to do.

MedsaError
├── UsageError             the call or the command line asks for something impossible     exit 2
├── InputError             something handed in cannot be used                             exit 2
│   ├── CheckpointError    a checkpoint: container, keys, shapes, another architecture
│   ├── BundleError        a bundle: missing, changed or unknown files
│   ├── ImageError         an image: unreadable, NaN, constant, wrong dimensions
│   └── PromptError        a prompt: outside the image, empty box, nothing given
├── EngineError            an engine cannot be loaded here; says what to rebuild          exit 2
│   ├── EngineFlavorError  TensorRT's where TensorRT-RTX's is wanted, or the reverse
│   ├── EngineVersionError built by another version of the library
│   ├── EngineDeviceError  built for other GPUs, or no NVIDIA driver here
│   ├── EngineChangedError its files are not those that were built
│   └── EngineStaleError   built from another ONNX file than the bundle holds now
├── MissingDependencyError an optional library is not installed; names the extra          exit 2
├── BuildError             an engine could not be built, or a kernel not compiled         exit 3
├── ParityError            a proof failed: two networks that must agree do not            exit 1
└── DeviceError            a backend failed while running                                 exit 3
    ├── DeviceMemoryError  the device's memory is full
    └── DeviceLostError    the device cannot be used any more in this process
"""

from __future__ import annotations


class MedsaError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is the command line's."""

    exit_code = 3


class UsageError(MedsaError):
    """The call asks for something impossible: options that exclude each other, an unknown name."""

    exit_code = 2


class InputError(MedsaError):
    """Something handed in cannot be used."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint cannot be used: container, keys, shapes, or another architecture."""


class BundleError(InputError):
    """A bundle cannot be used: missing, changed or unknown files."""


class ImageError(InputError):
    """An image cannot be used: unreadable, NaN, constant, or of the wrong dimensions."""


class PromptError(InputError):
    """A prompt cannot be used: outside the image, an empty box, or nothing given."""


class EngineError(MedsaError):
    """An engine cannot be loaded here; the message says what to rebuild."""

    exit_code = 2


class EngineFlavorError(EngineError):
    """A TensorRT engine where a TensorRT-RTX engine is wanted, or the reverse."""


class EngineVersionError(EngineError):
    """An engine that another version of the library built."""


class EngineDeviceError(EngineError):
    """An engine for other GPUs than this machine's, or a machine without an NVIDIA driver."""


class EngineChangedError(EngineError):
    """Files of an engine are missing or not those that were built."""


class EngineStaleError(EngineError):
    """An engine built from another ONNX file than the bundle holds now."""


class MissingDependencyError(MedsaError):
    """An optional library is not installed."""

    exit_code = 2

    def __init__(self, library: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed: "
            f"pip install 'medsa-deploy[{extra}]'"
        )


class BuildError(MedsaError):
    """TensorRT could not build an engine, or a CUDA compiler a kernel."""

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
    """The device cannot be used any more in this process: reset, unplugged, or a fault in it."""


def one_line(error: BaseException) -> str:
    """What a library said, as one line of bounded length; its type where it said nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
