"""The protocols of a backend: a bundle's graphs, run on arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.bundle.manifest import Conventions, Role
from medsa_deploy.errors import DeviceError, UsageError
from medsa_deploy.nvidia.device_array import DeviceArray
from medsa_deploy.transforms import Frame, MaskRule

Array = NDArray[np.float32]
HostOrDevice: TypeAlias = NDArray[np.float32] | DeviceArray
"""Values in the host's memory, or on a GPU."""


@dataclass(frozen=True, kw_only=True)
class TimedLayer:
    """A layer as a backend runs it: one node of the graph, or several fused into one."""

    name: str
    operator: str
    """In the backend's own words."""
    samples_ms: tuple[float, ...]
    """One for each run."""


class Backend(Protocol):
    """Runs encoder and decoder with the bundle's tensor contract; float32 in and out.

    A backend on a GPU may give embeddings as a `DeviceArray`. Only that backend decodes them.
    """

    name: str

    def encode(self, image: Array) -> HostOrDevice:
        """image (B, 3, S, S) → image_embeddings (B, 256, g, g)."""
        ...

    def decode(
        self, image_embeddings: Any, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """(E, 256, g, g), (P, N, 2), (P, N), (P, 1, 4g, 4g) or None →
        low_res_masks (max(E, P), K, 4g, 4g), iou_predictions (max(E, P), K).

        `mask` is None for a network without mask prompts.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """Its version and how it runs, for reports."""
        ...

    def close(self) -> None:
        """Release its memory and files."""
        ...


PARTS: tuple[Role, Role] = ("decoder-image", "decoder-click")
"""The graphs of a split decoder, in the order they run."""
ImagePart = Mapping[str, Array]
"""Outputs of `decoder-image` by name: the decoder's work that depends on the image alone."""


@runtime_checkable
class SplitsDecoder(Protocol):
    """A backend that can also run the decoder's two parts, for prompts without a mask."""

    splits: bool
    """Whether it was opened with them."""

    def decode_image(self, image_embeddings: Any) -> ImagePart:
        """(E, 256, g, g) → the inputs of `decode_click`, E first in every array."""
        ...

    def decode_click(
        self, image_part: ImagePart, point_coords: Array, point_labels: Array
    ) -> tuple[Array, Array]:
        """As `Backend.decode` without a mask."""
        ...


def as_split_decoder(backend: Backend) -> SplitsDecoder | None:
    """The backend, if it was opened with the decoder's two parts; else None."""
    return backend if isinstance(backend, SplitsDecoder) and backend.splits else None


@runtime_checkable
class TakesFrames(Protocol):
    """A backend on a GPU that prepares frames which lie there."""

    def encode_frame(
        self, frame: Any, conventions: Conventions, window: tuple[float, float] | None
    ) -> tuple[Any, Frame]:
        """A frame with `__cuda_array_interface__` → its embedding, and how it lies in the network's
        frame. `window`: intensities of black and white; None for display values."""
        ...


def require_frame_encoder(backend: Backend) -> TakesFrames:
    """The backend, if it takes frames on a GPU; else UsageError."""
    if not isinstance(backend, TakesFrames):
        raise UsageError(f"{backend.name} takes no frames on a GPU: copy it to the host")
    return backend


@dataclass(frozen=True, kw_only=True)
class MaskRequest:
    """Which masks a backend makes from the decoder's logits, and how."""

    frame: Frame
    """How the image lies in the network's frame."""
    rule: MaskRule
    chosen: range
    """Which of a prompt set's K masks: n neighbours."""
    on_device: bool = False
    """Whether the masks stay on the GPU."""

    @property
    def count(self) -> int:
        """n: masks of a prompt set, without the background of those that exclude each other."""
        return len(self.chosen) - self.rule.exclusive


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceMasks:
    """Masks that a GPU made of P prompt sets, n each."""

    masks: NDArray[np.uint32] | DeviceArray
    """(P, n, H, ceil(W / 32)), packed as `kernels.postprocess.unpack` takes them; or those that
    stayed on the GPU, (P, n, H, W) bool."""
    tally: NDArray[np.uint32]
    """(P, n, 5), as `kernels.postprocess.regions` takes it."""


Decoded = tuple[Array, Array, DeviceMasks | None]
"""low_res_masks, iou_predictions, and masks of the image's size if a GPU made them."""


@runtime_checkable
class MakesMasks(Protocol):
    """A backend that makes masks of the image's size on its GPU."""

    def decode_masks(
        self,
        image_embeddings: Any,
        point_coords: Array,
        point_labels: Array,
        mask: Array | None,
        request: MaskRequest,
        /,
    ) -> Decoded:
        """As `Backend.decode`, with masks; None in their place if it cannot make them now."""
        ...


@runtime_checkable
class TimesLayers(Protocol):
    """A backend that was opened to time its layers, which makes it slower."""

    def layers(self) -> dict[str, list[TimedLayer]]:
        """Layers of each graph that ran, in the order they run, over all runs so far.

        Call it last: a backend may end its measurement with it.
        """
        ...


def check_finite(backend: Backend, kind: str, *arrays: HostOrDevice) -> None:
    """DeviceError if a backend gave NaN or Inf; arrays on a GPU are not checked.

    NaN or Inf in an embedding there becomes NaN in every mask, which comes to the host.
    """
    if not all(np.isfinite(array).all() for array in arrays if isinstance(array, np.ndarray)):
        raise DeviceError(f"{backend.name} gave {kind} with NaN or Inf: nothing returned")
