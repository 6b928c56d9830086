"""TensorRT and TensorRT-RTX on a GPU: a bundle's engines, with memory that is allocated once.

An embedding stays on the GPU between `encode` and `decode`. Copies to the GPU, the engine and
copies from it are queued in one stream and waited for once a call.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medsa_deploy import cuda, engine, trt
from medsa_deploy.cuda import DeviceArray, Gpu
from medsa_deploy.errors import (
    ImageError,
    PromptError,
    UsageError,
)
from medsa_deploy.kernels.cubins import cubin
from medsa_deploy.manifest import Conventions, Graph, Manifest
from medsa_deploy.transforms import Frame

from .backend import Array
from .contract import decoder_inputs, mask_shape
from .engine_run import EngineRun, Opening
from .frames import FramePreprocessor


class TensorRTBackend:
    """Both engines of a folder, with their memory on the first GPU. It serves one call at a time.

    Owns its stream, the pinned memory its inputs and outputs pass through, and all memory on the
    GPU, embeddings included: `close` frees them. An embedding's memory serves another image once
    nothing holds the embedding any more.
    """

    def __init__(
        self, folder: Path, made: Manifest, flavor: trt.Flavor, *, cuda_graphs: bool = True
    ) -> None:
        """Load the engines in `folder`, a folder in the bundle of the manifest `made`.

        EngineError for engines that do not fit this machine or bundle. MissingDependencyError
        without the library or pycuda. DeviceMemoryError where they do not fit the GPU's memory.
        """
        device = cuda.device()
        library = trt.load(flavor)
        described = trt.describe(library, flavor)
        self._engine = engine.check_loadable(folder, made, library=described, device=device)
        bundle, capability = folder.parent.parent, device.capability if device else ""
        self._cubin = partial(cubin, "preprocess", capability, bundle=bundle)
        self._about = {"version": described.version, "device": device.name if device else None}
        self.name: str = flavor
        self._flavor = flavor
        self._cuda_graphs = cuda_graphs
        self._lock = threading.Lock()
        self._free: dict[int, list[int]] = {}
        """Images in an embedding → addresses of memory for it that none uses."""
        self._gpu = Gpu()
        try:
            self._open(folder, made.graphs, library)
        except BaseException:
            self._gpu.close()
            raise

    def _open(self, folder: Path, graphs: dict[str, Graph], library: Any) -> None:
        """Load both engines, and allocate what images and prompts need of memory."""
        if self._cuda_graphs and self._flavor == "tensorrt":
            cuda.check_graphs()
        opening = Opening(
            library=library, gpu=self._gpu, flavor=self._flavor, cuda_graphs=self._cuda_graphs
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
            self._frames = FramePreprocessor(self._gpu, size, self._cubin)
            two = self._embedding(shape), self._embedding(shape)
            del two  # their memory is there for an image and the next

    def encode(self, image: Any) -> Any:
        """image (B, 3, S, S) on the host or the GPU → image_embeddings (B, 256, g, g) on the GPU.

        ImageError for another size than the network's, or more images than the engine takes.
        """
        with self._working():
            given = cuda.on_device(image, self._gpu)
            return self._encode(np.asarray(image, np.float32) if given is None else given)

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
        embeddings = self._embedding(shape)
        self._encoder.run({"image": image}, len(image), [embeddings.address])
        return embeddings

    def decode(
        self, image_embeddings: Any, point_coords: Array, point_labels: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """See `Backend.decode`; embeddings may be on the GPU or the host.

        More prompt sets than the engine takes are decoded in several runs. PromptError for more
        points than it takes.
        """
        with self._working():
            given = cuda.on_device(image_embeddings, self._gpu)
            if given is not None and getattr(given.owner, "gpu", self._gpu) is not self._gpu:
                raise UsageError(
                    "this embedding belongs to another session, which may have released it: "
                    "encode the image with this session"
                )
            embeddings: Any = np.asarray(image_embeddings) if given is None else given
            sets, most = len(point_coords), self._decoder.largest["point_coords"][0]
            self._check_prompts(len(embeddings), point_coords)
            parts = []
            for start in range(0, sets, most):
                part = slice(start, start + most)
                inputs: dict[str, Any] = decoder_inputs(
                    embeddings,
                    point_coords[part],
                    point_labels[part],
                    None if mask is None else mask[part],
                    self._mask_shape,
                )
                if mask is None and self._mask_shape is not None:
                    inputs["mask_input"] = self._no_mask[: len(point_coords[part])]
                rows = max(len(embeddings), len(point_coords[part]))
                parts.append(self._decoder.run(inputs, rows))
        masks, scores = zip(*parts, strict=True)
        return np.concatenate(masks), np.concatenate(scores)

    def facts(self) -> dict[str, Any]:
        """Version, GPU, what the engines are and whether CUDA graphs are replayed."""
        return {
            "backend": self.name,
            **self._about,
            "precision": self._engine.options.precision,
            "state": self._engine.state,
            "cuda_graphs": self._cuda_graphs,
        }

    def close(self) -> None:
        """Release everything on the GPU, once a call that is running has ended."""
        with self._lock:
            self._encoder.close()
            self._decoder.close()
            self._frames.close()
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
        most = self._decoder.largest["image_embeddings"][0]
        if embeddings > most or (embeddings > 1 and sets > largest[0]):
            raise UsageError(
                f"{embeddings} embeddings and {sets} prompt sets: these engines take up to {most} "
                f"and {largest[0]}, which --embeddings and --prompts of build-engine set"
            )

    def _embedding(self, shape: tuple[int, ...]) -> DeviceArray:
        """Memory for embeddings, which is free again when nothing holds the array or a part."""
        free = self._free.setdefault(shape[0], [])
        address = free.pop() if free else self._gpu.allocate(cuda.FLOAT32 * int(np.prod(shape)))
        owner = _Owner(self._gpu)
        weakref.finalize(owner, free.append, address)
        return DeviceArray(address, shape, owner, self._gpu.read)

    def _zeros(self, shape: tuple[int, ...]) -> DeviceArray:
        """Zeros on the GPU."""
        values = self._gpu.pinned(int(np.prod(shape)))
        values[:] = 0
        address = self._gpu.allocate(values.nbytes)
        self._gpu.upload(address, values)
        self._gpu.wait()
        return DeviceArray(address, shape, self, self._gpu.read)


@dataclass(frozen=True, eq=False)
class _Owner:
    """What an embedding and its parts hold in common."""

    gpu: Gpu
