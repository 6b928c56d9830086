"""Every tensor that the models on a Triton server take and give, each described once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medsa_deploy.bundle.manifest import Tensor

TRITON_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint32": "TYPE_UINT32",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}
"""numpy's name of a type → its name in a model's configuration."""


@dataclass(frozen=True, kw_only=True)
class WireTensor:
    """A tensor as it travels."""

    name: str
    dtype: str
    """numpy's name."""
    dims: tuple[int, ...]
    """-1: any size. Without the batch axis of a model that batches."""
    optional: bool = False
    description: str = ""


ANY_IMAGE = (-1, -1, -1, -1)

IMAGE_INPUTS = (
    WireTensor(
        name="image",
        dtype="uint8",
        dims=ANY_IMAGE,
        optional=True,
        description="(D, H, W, C) display values 0…255; C is 1 or 3. D is 1, or for a 3D network a "
        "multiple of its chunk. One of image, display and intensities is given with an image.",
    ),
    WireTensor(
        name="display",
        dtype="float32",
        dims=ANY_IMAGE,
        optional=True,
        description="As image, for display values that are not whole numbers.",
    ),
    WireTensor(
        name="intensities",
        dtype="float32",
        dims=ANY_IMAGE,
        optional=True,
        description="As image, for raw intensities, such as Hounsfield units.",
    ),
    WireTensor(
        name="window",
        dtype="float64",
        dims=(2,),
        optional=True,
        description="Intensities that become black and white. Without it the bundle's window "
        "applies, else the whole range.",
    ),
)
PROMPT_INPUTS = (
    WireTensor(
        name="points",
        dtype="float32",
        dims=(-1, -1, 2),
        optional=True,
        description="(P, N, 2) x, y in pixels of the image, for P prompt sets.",
    ),
    WireTensor(
        name="labels",
        dtype="float32",
        dims=(-1, -1),
        optional=True,
        description="(P, N) 1 foreground, 0 background; all foreground without it.",
    ),
    WireTensor(
        name="boxes",
        dtype="float32",
        dims=(-1, 4),
        optional=True,
        description="(P, 4) x0, y0, x1, y1 in pixels of the image.",
    ),
    WireTensor(
        name="mask_prompts",
        dtype="float32",
        dims=(-1, -1, -1),
        optional=True,
        description="(P, 4g, 4g) low_res_logits of an earlier answer.",
    ),
    WireTensor(
        name="slice",
        dtype="int32",
        dims=(1,),
        optional=True,
        description="The slice that the prompts are on, from 0; 0 without it.",
    ),
    WireTensor(
        name="multimask",
        dtype="bool",
        dims=(1,),
        optional=True,
        description="Whether SAM's three candidates are wanted.",
    ),
    WireTensor(
        name="threshold",
        dtype="float64",
        dims=(1,),
        optional=True,
        description="Probability above which a pixel belongs to a mask; the bundle's without it.",
    ),
)
MASK_OUTPUTS = (
    WireTensor(
        name="masks",
        dtype="uint32",
        dims=(-1, -1, -1, -1),
        description="(P, K, H, ceil(W / 32)): bit i of word j of a row is pixel 32 j + i.",
    ),
    WireTensor(name="scores", dtype="float32", dims=(-1, -1), description="(P, K) predicted IoU."),
    WireTensor(
        name="regions",
        dtype="int32",
        dims=(-1, -1, 5),
        description="(P, K, 5) area, x0, y0, x1, y1 of each mask, the last two exclusive; zeros "
        "for an empty mask.",
    ),
    WireTensor(
        name="low_res_logits",
        dtype="float32",
        dims=(-1, -1, -1, -1),
        description="(P, K, 4g, 4g) logits; with a background's first if classes exclude each "
        "other.",
    ),
)
FACT_OUTPUTS = (
    WireTensor(
        name="image_size", dtype="int32", dims=(2,), description="H, W of the image in pixels."
    ),
    WireTensor(
        name="timings_ms",
        dtype="float64",
        dims=(4,),
        description="preprocess, encode, decode, postprocess; 0 for what did not run.",
    ),
)
TIMINGS = ("preprocess", "encode", "decode", "postprocess")
"""The places of `timings_ms`."""

INPUTS = (*IMAGE_INPUTS, *PROMPT_INPUTS)
OUTPUTS = (*MASK_OUTPUTS, *FACT_OUTPUTS)


def graph_tensors(tensors: Sequence[Tensor], *, batched: bool) -> tuple[WireTensor, ...]:
    """A graph's tensors as they travel; without their first axis if the model batches.

    >>> graph_tensors([Tensor(name="image", dtype="float32", shape=("B", 3, 8, 8))], batched=True)
    (WireTensor(name='image', dtype='float32', dims=(3, 8, 8), optional=False, description=''),)
    """
    return tuple(
        WireTensor(
            name=tensor.name,
            dtype=tensor.dtype,
            dims=tuple(
                axis if isinstance(axis, int) else -1
                for axis in (tensor.shape[1:] if batched else tensor.shape)
            ),
        )
        for tensor in tensors
    )


def can_batch(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor has a dynamic first axis, as a server needs to join requests.

    `has_mask_input` of the whole decoder is (1,): its requests run one by one.
    """
    return all(tensor.shape and isinstance(tensor.shape[0], str) for tensor in tensors)
