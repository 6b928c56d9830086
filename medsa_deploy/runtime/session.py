"""A session on a bundle: it encodes an image once, then decodes a mask for every prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Thread
from time import perf_counter
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Conventions, Manifest
from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.images.image import Image, as_image, check_image, check_values
from medsa_deploy.images.volume import Volume
from medsa_deploy.kernels.postprocess import regions
from medsa_deploy.transforms import Prompt
from medsa_deploy.transforms.intensities import IntensityWindow, check_not_flat, intensities

from .backends.fallback import FallbackBackend
from .backends.interface import (
    Array,
    Backend,
    MaskRequest,
    as_split_decoder,
    check_finite,
    require_frame_encoder,
)
from .decoding import Embedding, decode_masks
from .health import CallRecord, Health, counted
from .prediction import Prediction, best_candidates, full_size_masks
from .volumes.segment import VolumeOptions, VolumePrediction, segment_volume
from .volumes.structures import Structure, class_names


class Session:
    """Runs one bundle on one backend. A context manager; `close` releases the backend.

    Threads: any number of threads may use a session on `onnxruntime`, `openvino` or
    `onnxruntime-cuda` at the same time. A session with a `fallback` lets one call run at a time,
    and the others wait. On `tensorrt` and `rtx` a call during another is a UsageError: load the
    bundle once for each thread. Close a session when no thread uses it any more.

    >>> from medsa_deploy import load, read_image
    >>> with load("liver.medsa") as session:
    ...     embedding = session.encode(read_image("slice.png"))
    ...     click = session.segment(embedding, points=[(120, 88)])
    ...     refined = session.segment(embedding, points=[(120, 88)], box=(40, 60, 200, 210))
    >>> click.mask.shape, session.classes, session.image_size
    ((240, 320), ('mask',), 256)
    """

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self.manifest = manifest
        self._backend: Backend | None = backend
        self._calls = CallRecord()

    @property
    def backend(self) -> Backend:
        """The backend; UsageError once the session is closed."""
        if self._backend is None:
            raise UsageError("this session is closed: load the bundle again")
        return self._backend

    @property
    def degraded(self) -> str | None:
        """Why a fallback backend is in use; None while the one that was asked for is."""
        return _degraded(self.backend)

    @property
    def conventions(self) -> Conventions:
        """How images and prompts are prepared for this network."""
        return self.manifest.conventions

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that masks are of, in order.

        If the bundle names none, they are "class 1", "class 2"… of several classes, and "mask" of a
        network that finds one object.
        """
        return class_names(self.manifest)

    @property
    def image_size(self) -> int:
        """S: the side of the network's square frame, in pixels. Images may have any size."""
        return self.manifest.network.image_size

    @counted
    def encode(
        self, image: Image | ArrayLike, *, intensity_window: IntensityWindow = None
    ) -> Embedding:
        """Encode an image; every prompt on it then costs a decoder run only.

        `image`: an `Image`, or an array (H, W) or (H, W, 3). uint8 is taken as display values.
        Other types are mapped to them by `intensity_window` (low, high), else the bundle's, else
        the file's own, else from minimum to maximum, with a warning; "auto" takes percentiles.
        Padding that the file marks is black. On `tensorrt` and `rtx` the
        image may also be an array with `__cuda_array_interface__`. It is prepared on the GPU, where
        it is not checked for being constant, and nothing is stretched.

        ImageError for NaN, constant or misshapen images. UsageError for a 3D network, which takes
        `encode_slices`.
        """
        if (chunk := self.manifest.network.chunk) > 1:
            raise UsageError(
                f"this network sees {chunk} neighbouring slices at a time: give it a volume, "
                "or slices to encode_slices"
            )
        if hasattr(image, "__cuda_array_interface__"):
            return self._encode_frame(image, intensity_window)
        source = check_image(as_image(image))
        return self._encode([source], intensity_window, flat=False)[0]

    @counted
    def encode_slices(
        self,
        slices: Sequence[Image | ArrayLike],
        *,
        intensity_window: IntensityWindow = None,
    ) -> list[Embedding]:
        """Encode neighbouring slices of a volume, all of one size, in their order.

        A 3D network attends over each chunk of `manifest.network.chunk` slices, so the number of
        slices must be a multiple of it: repeat the last slice to complete one. A slice may be
        constant. Give the window of the whole volume, or slices are stretched one by one.
        `segment_volume` does all of this.
        """
        chunk = self.manifest.network.chunk
        if not slices or len(slices) % chunk:
            raise UsageError(
                f"{len(slices)} slices were given; this network takes a multiple of {chunk}: "
                "repeat the last slice to complete a chunk"
            )
        embeddings = []
        for start in range(0, len(slices), chunk):
            sources = [as_image(image) for image in slices[start : start + chunk]]
            checked = [check_values(source, str(source.path)) for source in sources]
            embeddings += self._encode(checked, intensity_window, flat=True)
        return embeddings

    def _encode(
        self,
        images: Sequence[Image],
        intensity_window: IntensityWindow,
        *,
        flat: bool,
    ) -> list[Embedding]:
        """Checked images that the network sees together → their embeddings.

        `flat`: whether an image may be one flat grey, such as a slice in air.
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
        side = 4 * self.manifest.network.embedding_size
        # for the first click; onnxruntime and openvino compute outside of Python's lock
        preparing = Thread(
            target=transforms.prepare_postprocessing,
            args=(side, frames[0], self.conventions.postprocess),
        )
        preparing.start()
        try:
            values = backend.encode(batch[0][None] if len(batch) == 1 else np.stack(batch))
            split = as_split_decoder(backend)
            part = None if split is None else split.decode_image(values)
        finally:
            preparing.join()
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

    def _encode_frame(self, frame: object, window: IntensityWindow) -> Embedding:
        """A frame on the GPU → its embedding; no pixel comes to the host."""
        backend, start = require_frame_encoder(self.backend), perf_counter()
        if window == "auto":
            raise UsageError(
                "the window of a frame on a GPU is not measured: give intensity_window=(low, high)"
            )
        uint8 = frame.__cuda_array_interface__["typestr"] == "|u1"  # type: ignore[attr-defined]
        window = window or (None if uint8 else self.conventions.intensity_window)
        values, placement = backend.encode_frame(frame, self.conventions, window)
        timings = {"preprocess": 0.0, "encode": 1e3 * (perf_counter() - start)}
        return Embedding(
            values=values, frame=placement, intensity_window=window, timings_ms=timings
        )

    @counted
    def segment(
        self,
        embedding: Embedding,
        *,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        multimask: bool = False,
        threshold: float | None = None,
        on_device: bool = False,
    ) -> Prediction:
        """Masks for prompts, in pixels (x, y) of the image.

        `points` (N, 2) or (P, N, 2) with `labels` (N,) or (P, N): 1 foreground (default), 0
        background. `box` (4,) as x0, y0, x1, y1, or `boxes` (P, 4) of P objects. `mask` (4g, 4g) or
        (P, 4g, 4g) from an earlier prediction's `low_res_logits`. P sets are decoded in one call.
        `multimask` gives SAM's three candidates. `threshold`: probability above which a pixel
        belongs to a mask; None for the bundle's. On `tensorrt` and `rtx` the GPU makes the masks;
        with `on_device` they stay there.

        A network trained without prompts takes none: `segment(embedding)` gives the masks of its
        classes, and `Prediction.labels` their label map.

        PromptError for prompts outside the image, empty boxes, or no prompt. UsageError for `box`
        together with `boxes`, and for `on_device` if no GPU makes the masks.
        """
        parts = {"points": points, "labels": labels, "box": box, "boxes": boxes, "mask": mask}
        sets = transforms.prompts_for(self.conventions, **parts)
        return self.segment_sets(
            embedding, sets, multimask=multimask, threshold=threshold, on_device=on_device
        )

    @counted
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

        Sets of equal length are decoded together. A set is never padded to the length of another,
        because a padding point is a token, and moves the masks.
        """
        backend, network = self.backend, self.manifest.network
        if multimask and network.outputs != "sam":
            raise UsageError("multimask is for SAM's outputs; this network's masks are classes")
        chosen, best_alone = range(network.masks), False
        if network.outputs == "sam":
            best_alone = not multimask and self.conventions.mask_choice == "best"
            chosen = chosen[1:] if multimask or best_alone else chosen[:1]
        if best_alone and on_device:
            raise UsageError(
                "this network's mask is the best of its candidates, chosen on the host: give "
                "multimask with on_device, or leave on_device out"
            )
        rule = transforms.mask_rule(self.manifest, threshold)
        request = MaskRequest(frame=embedding.frame, rule=rule, chosen=chosen, on_device=on_device)
        start = perf_counter()
        logits, scores, device_masks = decode_masks(
            backend, self.manifest, embedding, prompts, request
        )
        if on_device and device_masks is None:
            raise UsageError(f"{backend.name} makes no masks on a GPU: leave on_device out")
        logits, scores = (a[:, chosen.start : chosen.stop] for a in (logits, scores))
        decoded = perf_counter()
        if best_alone:
            logits, scores, device_masks = best_candidates(logits, scores, device_masks)
        masks = full_size_masks(logits, device_masks, request)
        if rule.exclusive:
            scores = scores[:, 1:]
        end = perf_counter()
        size = embedding.frame.image_size
        return Prediction(
            masks=masks,
            scores=scores,
            low_res_logits=logits,
            rule=rule,
            classes=network.outputs != "sam",
            frame=embedding.frame,
            timings_ms={"decode": 1e3 * (decoded - start), "postprocess": 1e3 * (end - decoded)},
            counted=None
            if device_masks is None
            else [regions(of_set, size) for of_set in device_masks.tally],
            degraded=_degraded(backend),  # another thread may have closed the session
        )

    @counted
    def decode_logits(self, embedding: Embedding, prompts: Sequence[Prompt]) -> tuple[Array, Array]:
        """The decoder's outputs for P prompt sets, in their order, without masks.

        low_res_masks (P, K, 4g, 4g) and iou_predictions (P, K), float32, with all K masks of the
        decoder: of SAM's outputs mask 0 is the single mask, and 1 to 3 are the candidates.
        PromptError and UsageError as for `segment`.
        """
        return decode_masks(self.backend, self.manifest, embedding, prompts, None)[:2]

    def segment_volume(
        self,
        volume: Volume,
        structures: Sequence[Structure],
        options: VolumeOptions | None = None,
        *,
        on_slice: Callable[[int, int], None] = lambda done, total: None,
    ) -> VolumePrediction:
        """Segment a volume, encoding its slices as they are needed: see `segment_volume`."""
        return segment_volume(self, volume, structures, options, on_slice=on_slice)

    def health(self) -> Health:
        """Age of the last result, faults, memory: for a watchdog, cheap enough for every frame.

        >>> from medsa_deploy import load
        >>> with load("liver.medsa") as session:
        ...     health = session.health()
        >>> health.faults, health.last_result_age_s
        (0, None)
        """
        backend = self._backend
        degraded = None if backend is None else _degraded(backend)
        return self._calls.health(is_open=backend is not None, degraded=degraded)

    def close(self) -> None:
        """Release the backend; the session cannot be used afterwards."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _degraded(backend: Backend) -> str | None:
    """See `Session.degraded`."""
    return backend.degraded if isinstance(backend, FallbackBackend) else None
