"""A volume, a bundle and structures → labels, the slice that the user looks at first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import PromptError
from medsa_deploy.runtime import Structure, VolumeOptions, VolumePrediction, segment_volume
from medsa_deploy.stages.run.prompt_file import parsed_structure
from medsa_deploy.transforms.intensities import IntensityWindow

from .bodies import is_number
from .bundles import ServedBundle
from .cache import NetworkCache
from .cached_session import CachedSession
from .images import OpenImage
from .initial_mask import InitialMask

MOST_STRUCTURES = 255
MOST_PROMPTS = 10_000
MOST_VALUE = 1e30
"""Of an intensity or a threshold."""


@dataclass(frozen=True, kw_only=True)
class SegmentRequest:
    """What a user wants segmented."""

    structures: tuple[Structure, ...] = ()
    near: int | None = None
    """The slice to begin with."""
    propagate: bool = False
    intensity_window: IntensityWindow = None
    threshold: float | None = None
    initial: InitialMask | None = None
    """Prompts its slices with their masks, beside the structure's prompts."""

    def options(self, window: IntensityWindow) -> VolumeOptions:
        """The options of `segment_volume`, with the window that `intensity_window` means."""
        return VolumeOptions(
            intensity_window=window,
            threshold=self.threshold,
            propagate=self.propagate,
        )


def segment(
    bundle: ServedBundle,
    image: OpenImage,
    request: SegmentRequest,
    cache: NetworkCache,
    *,
    check: Callable[[], None],
    on_slice: Callable[[int, int], None] = lambda done, total: None,
    on_labels: Callable[[int, NDArray[np.uint8]], None] = lambda index, plane: None,
) -> VolumePrediction:
    """As `segment_volume`, with what is known from earlier requests.

    `on_labels` is called once for each slice, as soon as all structures that are known there are in
    its labels, and again if others reach it later. `check` raises to stop.
    """
    start = perf_counter()
    session = CachedSession(bundle, cache, check, request.initial)
    window = image.window(bundle.name, session, request.intensity_window)
    pending: dict[int, NDArray[np.uint8]] = {}

    def flush() -> None:
        for index, plane in pending.items():
            on_labels(index, plane)
        pending.clear()

    def take_labels(index: int, plane: NDArray[np.uint8]) -> None:
        check()
        if index not in pending:
            flush()
        pending[index] = plane
        if len(request.structures) == 1:
            flush()

    prediction = segment_volume(
        session,
        image.volume,
        request.structures,
        request.options(window),
        on_slice=on_slice,
        near=request.near,
        on_labels=take_labels,
    )
    flush()
    prediction.timings_ms["request"] = 1e3 * (perf_counter() - start)
    prediction.timings_ms["encoded_slices"] = session.encoded
    return prediction


def parse_request(data: Mapping[str, Any]) -> SegmentRequest:
    """A JSON object → a request; PromptError for one that cannot be used."""
    entries = data.get("structures", [])
    if not isinstance(entries, list) or len(entries) > MOST_STRUCTURES:
        raise PromptError(f"structures should be a list of at most {MOST_STRUCTURES}")
    structures = tuple(
        parsed_structure(entry, f"structure {i}") for i, entry in enumerate(entries, 1)
    )
    if sum(len(s.points) + len(s.boxes) for s in structures) > MOST_PROMPTS:
        raise PromptError(f"more than {MOST_PROMPTS} prompts")
    near, propagate = data.get("near"), data.get("propagate", False)
    if near is not None and (type(near) is not int or not 0 <= near < 2**31):
        raise PromptError(f"near should be the index of a slice, found {near!r:.40}")
    if type(propagate) is not bool:
        raise PromptError("propagate should be true or false")
    return SegmentRequest(
        structures=structures,
        near=near,
        propagate=propagate,
        intensity_window=_window(data.get("intensity_window")),
        threshold=_threshold(data.get("threshold")),
    )


def _window(value: Any) -> IntensityWindow:
    """[LOW, HIGH], "auto" or null."""
    if value is None:
        return None
    if value == "auto":
        return "auto"
    if isinstance(value, list) and len(value) == 2 and all(is_number(v, MOST_VALUE) for v in value):
        low, high = (float(v) for v in value)
        if low < high:
            return low, high
    raise PromptError('intensity_window should be [LOW, HIGH] with LOW < HIGH, "auto" or null')


def _threshold(value: Any) -> float | None:
    if value is None:
        return None
    if not is_number(value, MOST_VALUE):
        raise PromptError("threshold should be a probability or null")
    return float(value)
