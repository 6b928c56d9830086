"""Images, prompts and predictions ⇄ arrays of the tensors in `tensors.py`.

The models of a server and its clients use the same functions, each its own half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Manifest
from medsa_deploy.errors import ImageError, PromptError
from medsa_deploy.images.image import Image
from medsa_deploy.kernels.postprocess import Region, pack, unpack
from medsa_deploy.runtime import Embedding, Prediction, Session
from medsa_deploy.transforms import Prompt
from medsa_deploy.transforms.image import Frame
from medsa_deploy.transforms.intensities import IntensityWindow

from .tensors import TIMINGS

Arrays = Mapping[str, NDArray[Any]]
PIXELS = ("image", "display", "intensities")
SETS = ("points", "labels", "boxes", "mask_prompts")
SENT = Path("sent")
"""What errors call an image that a request carries."""


def image_arrays(planes: Sequence[NDArray[Any]], *, flat: bool) -> dict[str, NDArray[Any]]:
    """Display values of D slices, each (H, W) or (H, W, 3), uint8 or float32 → a request's arrays.

    `flat`: whether a slice may be one flat grey; a server refuses that for a lone uint8 image.
    ImageError for slices of different sizes.
    """
    if len({plane.shape for plane in planes}) > 1:
        sizes = sorted({plane.shape[:2] for plane in planes})
        raise ImageError(f"the slices of a chunk have different sizes: {sizes}")
    values = np.stack(planes)
    values = values[..., None] if values.ndim == 3 else values
    if values.dtype == np.uint8 and not (flat and len(values) == 1):
        return {"image": values}
    return {"display": values.astype(np.float32)}


def encode_request(session: Session, arrays: Arrays) -> list[Embedding]:
    """A request's image → embeddings of its D slices; ImageError, and what else `encode` raises."""
    kinds = [name for name in PIXELS if name in arrays]
    if len(kinds) != 1:
        raise ImageError(
            f"the request carries {' and '.join(kinds) or 'no image'}, expected one of: "
            f"{', '.join(PIXELS)}"
        )
    values = arrays[kinds[0]]
    if values.ndim != 4:
        raise ImageError(f"{kinds[0]} has shape {values.shape}, expected (D, H, W, C)")
    window: IntensityWindow = None
    if "window" in arrays:
        low, high = arrays["window"].tolist()
        window = (low, high)
    images = [_image(plane, kinds[0]) for plane in values]
    if kinds[0] != "display" and len(images) == session.manifest.network.chunk == 1:
        return [session.encode(images[0], intensity_window=window)]
    return session.encode_slices(images, intensity_window=window)


def _image(plane: NDArray[Any], kind: str) -> Image:
    """(H, W, C) → an image; display values that are no whole numbers are its rendering."""
    pixels = plane[:, :, 0] if plane.shape[2] == 1 else plane
    if kind != "display":
        return Image(pixels=pixels, path=SENT)
    if not (np.isfinite(pixels).all() and pixels.size):
        raise ImageError("display has NaN or infinite values, or no pixels: replace them first")
    if not 0 <= pixels.min() <= pixels.max() <= 255:
        raise ImageError(
            f"display has values {pixels.min():g}…{pixels.max():g}, expected display values "
            "0…255: send intensities with a window"
        )
    return Image(pixels=pixels.astype(np.uint8), path=SENT, display=pixels)


def prompt_arrays(prompts: Sequence[Prompt]) -> dict[str, NDArray[Any]]:
    """P prompt sets of equal length → a request's arrays; none for a set without a prompt."""
    arrays: dict[str, NDArray[Any]] = {}
    if any(len(prompt.points) for prompt in prompts):
        arrays["points"] = np.stack([prompt.points for prompt in prompts])
        arrays["labels"] = np.stack([prompt.labels for prompt in prompts])
    boxes = [prompt.box for prompt in prompts if prompt.box is not None]
    if boxes:
        arrays["boxes"] = np.stack(boxes)
    masks = [prompt.mask for prompt in prompts if prompt.mask is not None]
    if masks:
        arrays["mask_prompts"] = np.stack(masks)
    return arrays


def has_prompt(arrays: Arrays) -> bool:
    """Whether a request carries a prompt."""
    return any(name in arrays for name in SETS)


def segment_request(session: Session, embedding: Embedding, arrays: Arrays) -> Prediction:
    """A request's prompts → masks; PromptError, and what else `segment` raises."""
    for name, array in arrays.items():
        if name in SETS and array.shape[0] == 0:
            raise PromptError(f"{name} has shape {array.shape}, expected one prompt set or more")
    return session.segment(
        embedding,
        points=arrays.get("points"),
        labels=arrays.get("labels"),
        boxes=arrays.get("boxes"),
        mask=arrays.get("mask_prompts"),
        multimask=bool(np.ravel(arrays["multimask"])[0]) if "multimask" in arrays else False,
        threshold=float(np.ravel(arrays["threshold"])[0]) if "threshold" in arrays else None,
    )


def slice_of(arrays: Arrays) -> int:
    """The slice that a request's prompts are on."""
    return int(np.ravel(arrays["slice"])[0]) if "slice" in arrays else 0


def prediction_arrays(prediction: Prediction) -> dict[str, NDArray[Any]]:
    """A prediction → an answer's arrays."""
    rows = [
        [(region.area, *(region.box or (0, 0, 0, 0))) for region in of_set]
        for of_set in prediction.regions
    ]
    return {
        "masks": np.ascontiguousarray(pack(np.asarray(prediction.masks))),
        "scores": np.ascontiguousarray(prediction.scores),
        "regions": np.array(rows, np.int32),
        "low_res_logits": np.ascontiguousarray(prediction.low_res_logits),
    }


def fact_arrays(frame: Frame, *timings: Mapping[str, float]) -> dict[str, NDArray[Any]]:
    """An image's size and the times of what ran → an answer's arrays."""
    spent = {name: sum(times.get(name, 0.0) for times in timings) for name in TIMINGS}
    return {
        "image_size": np.array(frame.image_size, np.int32),
        "timings_ms": np.array(list(spent.values()), np.float64),
    }


def timings_of(arrays: Arrays, names: Sequence[str]) -> dict[str, float]:
    """The times of an answer that are asked for, in ms."""
    times = dict(zip(TIMINGS, arrays["timings_ms"].tolist(), strict=True))
    return {name: times[name] for name in names}


def prediction_of(
    arrays: Arrays, manifest: Manifest, frame: Frame, threshold: float | None
) -> Prediction:
    """An answer's arrays → the prediction that the server made."""
    regions = [
        [Region(area=row[0], box=(row[1], row[2], row[3], row[4]) if row[0] else None) for row in s]
        for s in arrays["regions"].tolist()
    ]
    return Prediction(
        masks=unpack(arrays["masks"], frame.image_size[1]),
        scores=arrays["scores"],
        low_res_logits=arrays["low_res_logits"],
        rule=transforms.mask_rule(manifest, threshold),
        classes=manifest.network.outputs != "sam",
        frame=frame,
        timings_ms=timings_of(arrays, ("decode", "postprocess")),
        counted=regions,
    )
