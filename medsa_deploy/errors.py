"""What can go wrong, as one tree. A message says what was found, what was expected, what to do.

MedsaError
├── UsageError             the call or the command line asks for something impossible     exit 2
├── InputError             something handed in cannot be used                             exit 2
│   ├── CheckpointError    a checkpoint: container, keys, shapes, another architecture
│   ├── BundleError        a bundle: missing, changed or unknown files
│   ├── ImageError         an image: unreadable, NaN, constant, wrong dimensions
│   └── PromptError        a prompt: outside the image, empty box, nothing given
├── MissingDependencyError an optional library is not installed; names the extra          exit 2
├── ParityError            a proof failed: two networks that must agree do not            exit 1
└── DeviceError            a backend failed while running                                 exit 3
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


class MissingDependencyError(MedsaError):
    """An optional library is not installed."""

    exit_code = 2

    def __init__(self, library: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed: "
            f"pip install 'medsa-deploy[{extra}]'"
        )


class ParityError(MedsaError):
    """Two networks that must agree do not."""

    exit_code = 1


class DeviceError(MedsaError):
    """A backend failed while it was running."""

    exit_code = 3
