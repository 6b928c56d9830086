"""A session on a bundle: an image becomes an embedding once, prompts become masks as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Conventions, Manifest
from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images.image import Image, as_image, check_image, check_pixels, check_values
from medsa_deploy.kernels.postprocess import Region, region, regions, unpack
from medsa_deploy.nvidia.cuda import DeviceArray
from medsa_deploy.transforms import Frame, Prompt
from medsa_deploy.transforms.intensities import check_not_flat, intensities

from .backends.fallback import FallbackBackend
from .backends.interface import (
    Array,
    Backend,
    DeviceMasks,
    MaskRequest,
    as_split_decoder,
    check_finite,
    require_frame_encoder,
)
from .decoding import Embedding, decode_masks


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Masks of P prompt sets, K each: one per class, or SAM's candidates."""

    masks: NDArray[np.bool_]
    """(P, K, H, W) at the image's size; with `on_device` a `cuda.DeviceArray`, which belongs to its
    session."""
    scores: Array
    """(P, K) predicted IoU of each mask."""
    low_res_logits: Array
    """(P, K, 4g, 4g) float32; one of them can be the mask prompt of a further call."""
    threshold: float
    """Probability above which a pixel belongs to a mask."""
    classes: bool
    """Whether K counts classes; otherwise the K masks of a set are candidates for one object."""
    frame: Frame
    timings_ms: dict[str, float]
    """`decode`, `postprocess`; masks that a GPU makes count as `decode`, but for unpacking them."""
    counted: list[list[Region]] | None = None
    """What `regions` gives, where a GPU made the masks and counted it."""
    degraded: str | None = None
    """Why another backend than the one asked for made this, where a fallback did."""

    @property
    def best(self) -> NDArray[np.intp]:
        """(P,) the candidate with the highest score."""
        return np.asarray(self.scores.argmax(axis=1))

    @property
    def regions(self) -> list[list[Region]]:
        """Area and bounding box of each mask, K for each of P sets."""
        return self.counted or [[region(mask) for mask in of_set] for of_set in self.masks]

    def label_map(self) -> NDArray[np.uint8]:
        """(H, W): 0 where no mask is, else a number from 1; the highest logit wins an overlap.

        Numbers count the classes, where K does (over all prompt sets), and else the prompt sets,
        each with its best candidate.
        """
        if self.classes and self.masks.shape[1] > 1:
            sets = (transforms.upsample(one, self.frame) for one in self.low_res_logits)
            logits = reduce(np.maximum, sets)
        else:
            chosen = self.low_res_logits[np.arange(len(self.best)), self.best]
            logits = transforms.upsample(chosen, self.frame)
        return transforms.label_map(logits, transforms.probability_to_logit(self.threshold))


class Session:
    """Runs one bundle on one backend. A context manager; `close` releases the backend."""

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self.manifest = manifest
        self._backend: Backend | None = backend

    @property
    def backend(self) -> Backend:
        """The backend; UsageError once the session is closed."""
        if self._backend is None:
            raise UsageError("this session is closed: load the bundle again")
        return self._backend

    @property
    def degraded(self) -> str | None:
        """Why another backend than the one asked for is in use, where a fallback is."""
        return _degraded(self.backend)

    @property
    def conventions(self) -> Conventions:
        """How images and prompts are prepared for this network."""
        return self.manifest.conventions

    def encode(
        self, image: Image | ArrayLike, *, intensity_window: tuple[float, float] | None = None
    ) -> Embedding:
        """Encode an image; every prompt on it then costs a decoder run only.

        `image`: what `read_image` gives, or an array (H, W) or (H, W, 3). uint8 is taken as display
        values; other types are mapped to them by `intensity_window` (low, high), else the bundle's,
        else the file's own, else from minimum to maximum, with a warning. ImageError for NaN,
        constant or misshapen images. UsageError for a 3D network, which takes `encode_slices`.
        On `tensorrt` and `rtx` also an array with `__cuda_array_interface__`, which is prepared
        where it is: whether it is constant is not seen there, and nothing is stretched.
        """
        if (chunk := self.manifest.network.chunk) > 1:
            raise UsageError(
                f"this network sees {chunk} neighbouring slices at a time: give it a volume, "
                "or slices to encode_slices"
            )
        if hasattr(image, "__cuda_array_interface__"):
            return self._encode_frame(image, intensity_window)
        source = as_image(image)
        check_pixels(source)
        return self._encode([check_image(source)], intensity_window, flat=False)[0]

    def encode_slices(
        self,
        slices: Sequence[Image | ArrayLike],
        *,
        intensity_window: tuple[float, float] | None = None,
    ) -> list[Embedding]:
        """Encode neighbouring slices of a volume, all of one size, in their order.

        A 3D network attends over each chunk of `manifest.network.chunk` slices, so the number of
        slices is a multiple of it: repeat the last slice to complete one. Unlike an image, a slice
        may be constant. Give the window of the whole volume, or slices are stretched one by one.
        """
        chunk = self.manifest.network.chunk
        if not slices or len(slices) % chunk:
            raise UsageError(
                f"{len(slices)} slices were given; this network takes a multiple of {chunk}: "
                "repeat the last slice to complete a chunk"
            )
        found = []
        for start in range(0, len(slices), chunk):
            sources = [as_image(one) for one in slices[start : start + chunk]]
            for source in sources:
                check_pixels(source)
            checked = [check_values(source, str(source.path)) for source in sources]
            found += self._encode(checked, intensity_window, flat=True)
        return found

    def _encode(
        self,
        images: Sequence[Image],
        intensity_window: tuple[float, float] | None,
        *,
        flat: bool,
    ) -> list[Embedding]:
        """Checked images that the network sees together → their embeddings.

        `flat`: whether an image may be one flat grey, as slices in air are.
        """
        backend = self.backend
        start = perf_counter()
        batch, frames, windows = [], [], []
        for image in images:
            pixels, window = intensities(image, self.conventions, intensity_window)
            if not flat:
                check_not_flat(image, pixels, window)
            network_image, frame = transforms.preprocess(
                pixels, self.conventions.preprocess, self.manifest.network.image_size
            )
            batch.append(network_image)
            frames.append(frame)
            windows.append(window)
        if len(set(frames)) > 1:
            sizes = sorted({frame.image_size for frame in frames})
            raise ImageError(f"the slices of a chunk have different sizes: {sizes}")
        prepared = perf_counter()
        values = backend.encode(batch[0][None] if len(batch) == 1 else np.stack(batch))
        split = as_split_decoder(backend)
        part = None if split is None else split.decode_image(values)
        end = perf_counter()
        check_finite(backend, "an embedding", values)
        each = 1e3 / len(images)
        timings = {"preprocess": each * (prepared - start), "encode": each * (end - prepared)}
        return [
            Embedding(
                values=values[i : i + 1],
                image_part=None if part is None else {k: v[i : i + 1] for k, v in part.items()},
                frame=frames[i],
                intensity_window=windows[i],
                timings_ms=dict(timings),
            )
            for i in range(len(images))
        ]

    def _encode_frame(self, frame: object, window: tuple[float, float] | None) -> Embedding:
        """A frame on the GPU → its embedding; none of it comes to the host."""
        backend, start = require_frame_encoder(self.backend), perf_counter()
        uint8 = frame.__cuda_array_interface__["typestr"] == "|u1"  # type: ignore[attr-defined]
        window = window or (None if uint8 else self.conventions.intensity_window)
        values, placed = backend.encode_frame(frame, self.conventions, window)
        timings = {"preprocess": 0.0, "encode": 1e3 * (perf_counter() - start)}
        return Embedding(values=values, frame=placed, intensity_window=window, timings_ms=timings)

    def segment(
        self,
        embedding: Embedding,
        *,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        multimask: bool = False,
        threshold: float | None = None,
        on_device: bool = False,
    ) -> Prediction:
        """Masks for prompts, in pixels (x, y) of the image.

        `points` (N, 2) or (P, N, 2) with `labels` (N,) or (P, N), 1 foreground (default), 0
        background; `box` (4,) or (P, 4) as x0, y0, x1, y1; `mask` (4g, 4g) or (P, 4g, 4g) from an
        earlier prediction's `low_res_logits`. P sets are decoded in one call. `multimask` gives
        SAM's three candidates. `tensorrt` and `rtx` make the masks on the GPU, where `on_device`
        leaves them. PromptError for prompts outside the image, empty boxes, or none. UsageError for
        `on_device` where the masks are not made on a GPU.
        """
        sets = transforms.prompts(points=points, labels=labels, box=box, mask=mask)
        return self.segment_sets(
            embedding, sets, multimask=multimask, threshold=threshold, on_device=on_device
        )

    def segment_sets(
        self,
        embedding: Embedding,
        prompts: Sequence[Prompt],
        *,
        multimask: bool = False,
        threshold: float | None = None,
        on_device: bool = False,
    ) -> Prediction:
        """Masks for prompt sets that may differ in how many points they have.

        Sets of equal length are decoded together. They are never padded to each other: a padding
        point is a token, and moves the masks.
        """
        backend, network = self.backend, self.manifest.network
        if multimask and network.outputs == "classes":
            raise UsageError("multimask is for SAM's outputs; this network's masks are classes")
        chosen = range(network.masks)
        if network.outputs == "sam":
            chosen = chosen[1:] if multimask else chosen[:1]
        probability = self.conventions.threshold if threshold is None else threshold
        wanted = MaskRequest(
            frame=embedding.frame,
            cut=transforms.probability_to_logit(probability),
            chosen=chosen,
            on_device=on_device,
        )
        start = perf_counter()
        logits, scores, made = decode_masks(backend, self.manifest, embedding, prompts, wanted)
        logits, scores = (a[:, chosen.start : chosen.stop] for a in (logits, scores))
        decoded = perf_counter()
        masks = _masks(logits, made, wanted, backend)
        end = perf_counter()
        size = embedding.frame.image_size
        return Prediction(
            masks=masks,
            scores=scores,
            low_res_logits=logits,
            threshold=probability,
            classes=network.outputs == "classes",
            frame=embedding.frame,
            timings_ms={"decode": 1e3 * (decoded - start), "postprocess": 1e3 * (end - decoded)},
            counted=None if made is None else [regions(of_set, size) for of_set in made.tally],
            degraded=_degraded(backend),
        )

    def close(self) -> None:
        """Release the backend; the session cannot be used afterwards."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _degraded(backend: Backend) -> str | None:
    """Why another backend than the one asked for is in use, where a fallback is."""
    return backend.degraded if isinstance(backend, FallbackBackend) else None


def _masks(logits: Array, made: DeviceMasks | None, wanted: MaskRequest, backend: Backend) -> Any:
    """The masks that a GPU made, or those of the logits."""
    if made is None:
        if wanted.on_device:
            raise UsageError(f"{backend.name} makes no masks on a GPU: leave on_device out")
        # set by set: the logits of an image's size take four times as much as their masks
        return np.stack([transforms.upsample(one, wanted.frame) > wanted.cut for one in logits])
    if isinstance(made.masks, DeviceArray):
        return made.masks
    return unpack(made.masks, wanted.frame.image_size[1])
