"""TensorRT and TensorRT-RTX on a GPU: a bundle's engines, with memory that is allocated once.

An embedding stays on the GPU between `encode` and `decode`, and logits until masks are made of
them. Copies to the GPU, the engine, kernels and copies from it are queued in one stream and waited
for once a run of the engine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy.bundle.manifest import Conventions, GraphContract, Manifest
from medsa_deploy.errors import (
    BuildError,
    ImageError,
    MissingDependencyError,
    PromptError,
    UsageError,
)
from medsa_deploy.kernels.cubins import load_kernels
from medsa_deploy.nvidia import cuda, tensorrt_api
from medsa_deploy.nvidia.cuda import Gpu
from medsa_deploy.nvidia.device_array import DeviceArray, on_device
from medsa_deploy.nvidia.engines import check_loadable
from medsa_deploy.transforms import Frame

from .device_frames import FramePreprocessor
from .device_masks import MaskMaker
from .device_memory import MemoryPool
from .engine_run import EngineRun, Opening
from .interface import Array, Decoded, DeviceMasks, MaskRequest, TimedLayer
from .tensor_contract import decoder_inputs, mask_shape

logger = logging.getLogger(__name__)


class TensorRTBackend:
    """Both engines of a folder, with their memory on the first GPU. It serves one call at a time.

    Owns its stream, the pinned memory its inputs and outputs pass through, and all memory on the
    GPU, embeddings included: `close` frees them. An embedding's memory serves another image once
    nothing holds the embedding any more.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        flavor: tensorrt_api.Flavor,
        *,
        cuda_graphs: bool = True,
        time_layers: bool = False,
    ) -> None:
        """Load the engines in `folder`, a folder in the manifest's bundle.

        EngineError for engines that do not fit this machine or bundle. MissingDependencyError
        without the library or pycuda. DeviceMemoryError where they do not fit the GPU's memory.
        """
        device = cuda.device()
        library = tensorrt_api.load(flavor)
        described = tensorrt_api.describe(library, flavor)
        self._engine = check_loadable(folder, manifest, library=described, device=device)
        self._bundle, self._device = folder.parent.parent, device
        self._about = {"version": described.version, "device": device.name if device else None}
        self.name: str = flavor
        self._flavor = flavor
        self._cuda_graphs, self._time_layers = cuda_graphs and not time_layers, time_layers
        self._lock = threading.Lock()
        self._gpu = Gpu()
        self._pool = MemoryPool(self._gpu)
        with cuda.LOADING:
            try:
                self._open(folder, manifest.graphs, library)
            except BaseException:
                self._gpu.close()
                raise

    def _open(self, folder: Path, graphs: dict[str, GraphContract], library: Any) -> None:
        """Load both engines, and allocate what images and prompts need of memory."""
        if self._cuda_graphs and self._flavor == "tensorrt":
            cuda.check_graphs()
        opening = Opening(
            library=library,
            gpu=self._gpu,
            flavor=self._flavor,
            cuda_graphs=self._cuda_graphs,
            time_layers=self._time_layers,
        )
        with self._gpu.current():
            self._encoder = EngineRun(
                opening, folder, self._engine.file("encoder"), graphs["encoder"], keeps=True
            )
            self._decoder = EngineRun(
                opening, folder, self._engine.file("decoder"), graphs["decoder"]
            )
            self._mask_shape = mask_shape(graphs["decoder"])
            if self._mask_shape is not None:
                self._no_mask = self._zeros(self._decoder.largest["mask_input"])
            (shape,) = self._encoder.output_shapes(self._encoder.smallest["image"][0])
            size = self._encoder.largest["image"][-1]
            self._frames = FramePreprocessor(
                self._gpu, size, partial(self._load_kernels, "preprocess")
            )
            self._masks = self._mask_maker()
            embeddings = self._pool.array(shape), self._pool.array(shape)
            del embeddings  # the pool now has memory for an image and the next

    def _mask_maker(self) -> MaskMaker | None:
        """The maker of masks on this GPU; None, with a warning, if its kernels cannot be had."""
        most_rows = max(shape[0] for shape in self._decoder.largest.values())
        logits, *_ = self._decoder.output_shapes(most_rows)
        try:
            return MaskMaker(self._gpu, self._load_kernels("postprocess"), logits)
        except (BuildError, MissingDependencyError) as e:
            logger.warning(
                "masks are made on the processor: %s; or put kernels for this GPU into the bundle, "
                "with medsa-deploy build-kernels where a compiler is",
                e,
            )
            return None

    def _load_kernels(self, source: str) -> Any:
        """Kernels that this GPU's driver takes; see `load_kernels`."""
        assert self._device is not None  # check_loadable saw it
        return load_kernels(
            source,
            self._device.capability,
            self._gpu.module,
            bundle=self._bundle,
            driver_cuda=int(self._device.driver_cuda.partition(".")[0]),
        )

    def encode(self, image: Any) -> Any:
        """image (B, 3, S, S) on the host or the GPU → image_embeddings (B, 256, g, g) on the GPU.

        ImageError for another size than the network's, or more images than the engine takes.
        """
        with self._working():
            device_image = on_device(image, self._gpu)
            if device_image is None:
                return self._encode(np.asarray(image, np.float32))
            return self._encode(device_image)

    def encode_frame(
        self, frame: Any, conventions: Conventions, window: tuple[float, float] | None
    ) -> tuple[Any, Frame]:
        """See `TakesFrames.encode_frame`. MissingDependencyError where the bundle has no kernels
        for this GPU, none are cached and there is no compiler."""
        with self._working():
            image, placed = self._frames.run(frame, conventions, window)
            return self._encode(image), placed

    def _encode(self, image: Any) -> DeviceArray:
        """Encode what was prepared; the GPU is current."""
        smallest, largest = self._encoder.smallest["image"], self._encoder.largest["image"]
        if image.shape[1:] != largest[1:] or not smallest[0] <= len(image) <= largest[0]:
            raise ImageError(
                f"images of shape {tuple(image.shape)} were given, this engine encodes "
                f"{smallest} to {largest}: --batch of build-engine sets how many"
            )
        (shape,) = self._encoder.output_shapes(len(image))
        embeddings = self._pool.array(shape)
        self._encoder.queue({"image": image}, len(image), [embeddings.address])
        self._gpu.wait()
        return embeddings

    def decode(
        self, image_embeddings: Any, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`; embeddings may be on the GPU or the host.

        More prompt sets than the engine takes are decoded in several runs. PromptError for more
        points than it takes.
        """
        return self.decode_masks(image_embeddings, point_coords, point_labels, mask, None)[:2]

    def decode_masks(
        self,
        image_embeddings: Any,
        point_coords: Array,
        point_labels: Array,
        mask: Array | None,
        request: MaskRequest | None,
    ) -> Decoded:
        """See `MakesMasks.decode_masks` and `decode`. No masks without kernels for this GPU."""
        with self._working():
            embeddings, sets = self._on_this_gpu(image_embeddings), len(point_coords)
            self._check_prompts(len(embeddings), point_coords)
            request, device_masks = (request if self._masks else None), None
            if request is not None and request.on_device:
                shape = (request.count, *request.frame.image_size)
                device_masks = self._pool.array((max(len(embeddings), sets), *shape), np.bool_)
            parts, start = [], 0
            for count in _even_parts(sets, self._decoder.largest["point_coords"][0]):
                part = slice(start, start + count)
                mask_input = None if mask is None else mask[part]
                inputs = self._inputs(
                    embeddings, point_coords[part], point_labels[part], mask_input
                )
                rows = max(len(embeddings), len(point_coords[part]))
                target = None if device_masks is None else device_masks[start : start + rows]
                parts.append(self._run_decoder(inputs, rows, request, target))
                start += count
        return _joined(parts, device_masks)

    def _inputs(
        self, embeddings: Any, coords: Array, labels: Array, mask: Array | None
    ) -> dict[str, Any]:
        """The inputs of the decoder's engine; without a mask, zeros that lie on the GPU."""
        inputs: dict[str, Any] = decoder_inputs(embeddings, coords, labels, mask, self._mask_shape)
        if mask is None and self._mask_shape is not None:
            inputs["mask_input"] = self._no_mask[: len(coords)]
        return inputs

    def _run_decoder(
        self,
        inputs: dict[str, Any],
        rows: int,
        request: MaskRequest | None,
        target: DeviceArray | None,
    ) -> Decoded:
        """One run of the decoder's engine, and the kernels on its logits.

        target: where masks go that stay on the GPU.
        """
        logits, _ = self._decoder.queue(inputs, rows)
        fetch_masks = None
        if request is not None and self._masks is not None:
            fetch_masks = self._masks.queue(logits, rows, request, target)
        low_res_masks, scores = self._decoder.fetch(rows)
        return low_res_masks, scores, fetch_masks and fetch_masks()

    def layers(self) -> dict[str, list[TimedLayer]]:
        """See `TimesLayers.layers`; empty if not opened for it. Engines then run without graphs."""
        runs = {"encoder": self._encoder, "decoder": self._decoder}
        return {name: layers for name, run in runs.items() if (layers := run.layers())}

    def facts(self) -> dict[str, Any]:
        """Version, GPU, engines, whether CUDA graphs are replayed, where masks are made."""
        return {
            "backend": self.name,
            **self._about,
            "precision": self._engine.options.precision,
            "state": self._engine.state,
            "tf32": self._engine.options.tf32,
            "cuda_graphs": self._encoder.cuda_graphs and self._decoder.cuda_graphs,
            "masks": "processor" if self._masks is None else "GPU",
        }

    def close(self) -> None:
        """Release everything on the GPU, once a call that is running has ended."""
        with self._lock, cuda.LOADING:
            self._encoder.close()
            self._decoder.close()
            self._frames.close()
            if self._masks is not None:
                self._masks.close()
            self._gpu.close()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """The one call at a time that uses the GPU; UsageError for a second."""
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                f"two threads use one session on {self.name}, which serves one call at a time: "
                "load the bundle once for each thread"
            )
        try:
            with self._gpu.current():
                self._gpu.join_default_stream()
                yield
        finally:
            self._lock.release()

    def _check_prompts(self, embeddings: int, point_coords: Array) -> None:
        """PromptError or UsageError for what the decoder's engine was not built for."""
        smallest, largest = (
            sizes["point_coords"] for sizes in (self._decoder.smallest, self._decoder.largest)
        )
        sets, points = point_coords.shape[:2]
        if not smallest[1] <= points <= largest[1]:
            raise PromptError(
                f"a prompt of {points} points, a box counting as two and a padding point as one: "
                f"these engines take {smallest[1]} to {largest[1]}, which --points of build-engine "
                "sets"
            )
        if min(_even_parts(sets, largest[0])) < smallest[0]:
            raise PromptError(
                f"{sets} prompt sets: these engines take {smallest[0]} to {largest[0]} at a time, "
                "which --prompts of build-engine sets"
            )
        most_embeddings = self._decoder.largest["image_embeddings"][0]
        if embeddings > most_embeddings or (embeddings > 1 and sets > largest[0]):
            raise UsageError(
                f"{embeddings} embeddings and {sets} prompt sets: these engines take up to "
                f"{most_embeddings} and {largest[0]}, which --embeddings and --prompts of "
                "build-engine set"
            )

    def _on_this_gpu(self, embeddings: Any) -> Any:
        """Embeddings on this GPU, or on the host; UsageError for another session's."""
        device_embeddings = on_device(embeddings, self._gpu)
        if device_embeddings is None:
            return np.asarray(embeddings)
        if getattr(device_embeddings.owner, "gpu", self._gpu) is not self._gpu:
            raise UsageError(
                "this embedding belongs to another session, which may have released it: "
                "encode the image with this session"
            )
        return device_embeddings

    def _zeros(self, shape: tuple[int, ...]) -> DeviceArray:
        """Zeros on the GPU."""
        zeros = self._pool.array(shape)
        self._gpu.clear(zeros.address, zeros.nbytes)
        return zeros


def _even_parts(count: int, most: int) -> list[int]:
    """Sizes of the fewest parts of at most `most` each; they differ by 1 or not at all."""
    parts = -(-count // most)
    return [count // parts + (i < count % parts) for i in range(parts)]


def _joined(parts: list[Decoded], device_masks: DeviceArray | None) -> Decoded:
    """Outputs of several runs as those of one run.

    device_masks: all their masks, if they are on the GPU.
    """
    logits, scores, run_masks = zip(*parts, strict=True)
    joined = None
    if made_masks := [masks for masks in run_masks if masks is not None]:
        words = device_masks or np.concatenate([masks.masks for masks in made_masks])
        tally = np.concatenate([masks.tally for masks in made_masks])
        joined = DeviceMasks(masks=words, tally=tally)
    return np.concatenate(logits), np.concatenate(scores), joined
