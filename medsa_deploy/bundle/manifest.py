"""A bundle's manifest: frozen dataclasses ⇄ `manifest.json`.

The manifest says what a bundle is (checkpoint, network, conventions, tensor contract), which files
it consists of, and how its graphs were proved equal to the checkpoint's own network. It is read
strictly: an unknown schema version, an unknown or missing field, a value of the wrong type, a file
that is missing or whose SHA-256 differs are refused, naming what was found.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medsa_deploy.errors import BundleError

from .atomic import write_text
from .strict_json import decode

MANIFEST_SCHEMA = 2
MANIFEST_FILENAME = "manifest.json"

Family = Literal["medsa", "sam", "litemedsam", "mobile_sam", "efficient_sam"]
EncoderKind = Literal["vit", "tiny_vit"]
RelPos = Literal["zero", "real", "none"]
TwoWay = Literal["meta", "public"]
Outputs = Literal["classes", "sam"]
PreprocessingName = Literal["medsa", "sam", "medsam", "litemedsam"]
PointOrder = Literal["xy", "yx"]
PointFrame = Literal["network", "image"]
DepthGrouping = Literal["public", "paper"]
PromptScope = Literal["chunk", "slice"]
Target = Literal["any", "tensorrt", "cpu"]
Role = Literal[
    "encoder",
    "encoder-onnxruntime",
    "encoder-openvino",
    "decoder",
    "decoder-image",
    "decoder-click",
    "weights",
    "reference",
]
"""`encoder-onnxruntime`, `encoder-openvino`: the encoder once more, with attention as that backend
runs it best; its weights are those in the encoder's file. `decoder-image` and `decoder-click`: the
decoder once more, cut into what runs once an image and what runs with every prompt that has no
mask. `weights`: external data of a graph over protobuf's limit. `reference`: outputs to verify by.
"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The checkpoint a bundle was made from."""

    checkpoint: str
    """File name, without its folder."""
    sha256: str
    container: str
    """How the file held weights: `training checkpoint`, `state dict`, `adapters over a base`…"""
    dtype: str
    """Floating-point types of the stored weights, before they were made float32."""
    base: str | None = None
    """File name of the checkpoint an adapter-only file was laid over."""
    base_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Network:
    """Facts about the network, read off the checkpoint's keys and shapes or set by an option."""

    family: Family
    encoder: EncoderKind
    widths: tuple[int, ...]
    """Embedding width of each stage; a ViT has one stage."""
    depths: tuple[int, ...]
    """Blocks of each stage."""
    heads: tuple[int, ...]
    """Attention heads of each stage; 0 for a stage without attention."""
    windows: tuple[int, ...]
    """Attention window of each stage, in tokens; 0 for a stage that is not cut into windows."""
    global_blocks: tuple[int, ...]
    """Indices of the ViT blocks that attend over the whole grid."""
    image_size: int
    """S: the encoder takes (B, 3, S, S)."""
    embedding_size: int
    """g: the encoder gives (B, 256, g, g); masks come as logits of side 4·g."""
    patch_size: int
    rel_pos: RelPos
    """Relative-position tables: all zero (no bias), real in at least one block, or absent."""
    adapters: tuple[str, ...]
    """Kinds of adapter in use: `space`, `mlp`, `depth`, `hyp`, `decoder-mlp`, `decoder-image`."""
    parameters: int
    adapter_parameters: int
    two_way: TwoWay
    """Form of the decoder's two-way blocks: Meta's, or the public Med-SA code's."""
    mask_tokens: int
    classes: int
    """N: how many masks a prompt yields when `outputs` is `classes`."""
    outputs: Outputs
    """`classes`: masks 0…N−1. `sam`: all mask tokens; mask 0 for one mask, 1… for several."""
    hyp_lengths: tuple[int, ...] = ()
    """HyP-Adpt's widths L_0…L_K of the first two-way block that has it; empty without."""
    hyp_prompt_length: int = 0
    sd_trans: DepthGrouping | None = None
    """How SD-Trans groups what attends over depth; None for a network that sees single images."""
    depth_chunk: int | None = None
    """D: neighbouring slices that attend to each other; the encoder's batch is a multiple of it.
    None with SD-Trans: the depth branch spans every window of exactly `slices` slices."""
    slices: int | None = None
    """Slices the encoder takes, no more and no less, where there is no `depth_chunk`."""

    @property
    def chunk(self) -> int:
        """Slices that are encoded together: 1 for a network that sees single images."""
        return self.depth_chunk or self.slices or 1

    @property
    def masks(self) -> int:
        """K: masks in the decoder's output."""
        return self.classes if self.outputs == "classes" else self.mask_tokens

    @property
    def mask_prompt_size(self) -> int | None:
        """Side of a mask prompt, 4·g; None for a decoder that takes none."""
        return None if self.family == "efficient_sam" else 4 * self.embedding_size


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What a caller must do around the graphs for the masks to be right."""

    preprocess: PreprocessingName
    point_order: PointOrder = "xy"
    """`yx`: the network was trained on (row, column) clicks. Callers always give x, y."""
    point_frame: PointFrame = "network"
    """`image`: coordinates go in as the image's own pixels, unscaled."""
    prompt_scope: PromptScope = "chunk"
    """In 3D, whom a prompt set is for: all slices of its chunk, with the clicks and boxes of all of
    them in one set, as the public code trains; or its own slice alone."""
    point_scale: float = 1.0
    """What coordinates are multiplied by, after `point_frame`."""
    pad_points: int | None = None
    """Points a set is padded to, box corners included, with (−1, −1) and label −1; 0 for no padding
    at all. None is SAM's way: one point (0, 0) of label −1 in a set without a box."""
    intensity_window: tuple[float, float] | None = None
    """Intensities mapped to black and white, for images that are not 8-bit."""
    threshold: float = 0.5
    """Probability above which a pixel belongs to the mask."""
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One input or output of a graph; a dynamic dimension is a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphContract:
    """Tensor contract of one graph."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of the bundle."""

    path: str
    """Relative to the bundle, with `/`."""
    role: Role
    precision: str
    bytes: int
    sha256: str
    opset: int | None = None


@dataclass(frozen=True, kw_only=True)
class TensorParity:
    """Difference of one tensor from the reference network's, worst over all cases."""

    relative_l2: float
    max_abs: float


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How one precision's graphs compared with the checkpoint's own network."""

    precision: str
    backend: str
    images: int
    seeded_images: int
    prompt_sets: int
    tensors: dict[str, TensorParity]
    mask_pixels_differing: float
    """Share of a case's mask pixels that differ, worst over all cases."""
    mask_dice_mean: float | None = None
    """Dice of each decoded mask with the reference's, at the image's size; two empty masks are 1.
    """
    mask_dice_worst: float | None = None
    nan_count: int = 0
    """NaN and infinite values in any output."""
    split: Parity | None = None
    """The same with the decoder's two parts in its place, for prompt sets without a mask. None
    where a precision has no such files."""
    encoders: dict[str, Parity] = field(default_factory=dict)
    """The same with a backend's own encoder in its place, by role, where there is one and it ran.
    """


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How the ranges of activations were measured."""

    images: int
    """Images and slices of volumes."""
    names_sha256: str
    """Of their names, one a line."""
    method: str
    """`min-max`, or `percentile 99.99` of magnitudes."""


@dataclass(frozen=True, kw_only=True)
class Island:
    """Nodes of a float16 graph that stay float32 for one reason."""

    reason: str
    """`norms`, `softmax`, `coordinates`, `values beyond float16`…"""
    nodes: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one precision's graphs compute in which type, and how that was decided."""

    precision: str
    target: Target = "any"
    """What the graphs are made for."""
    islands: tuple[Island, ...] = ()
    """Nodes that stay float32, over both graphs."""
    float32_blocks: tuple[str, ...] = ()
    """Blocks returned to float32 because masks needed it: `encoder blocks.3`."""
    rounded_dice_mean: float | None = None
    """Mask Dice to float32 when each operator's result is rounded to float16, which ONNX Runtime on
    a CPU does not do."""
    rounded_dice_worst: float | None = None
    quantized: tuple[str, ...] = ()
    """Linear layers with INT8 weights and inputs: `blocks.3.attention.query`."""
    left_out: tuple[str, ...] = ()
    """Linear layers that were not quantized because masks needed it, most costly first."""
    weights: str | None = None
    """`int8, symmetric, per channel`"""
    activations: str | None = None
    """`int8, symmetric` or `uint8`"""
    calibration: Calibration | None = None
    reference_dice_mean: float | None = None
    """Mask Dice on the bundle's saved reference, a seeded image. INT8 is fitted to a user's images
    and judged on them; on the reference it need only give again what it gave when it was made."""
    runs: int = 0
    """How often the search ran the verification cases."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything `manifest.json` holds."""

    source: Source
    network: Network
    conventions: Conventions
    graphs: dict[str, GraphContract]
    files: tuple[File, ...]
    parity: tuple[Parity, ...] = ()
    recipes: tuple[Recipe, ...] = ()
    """One for each precision that was made from the float32 graphs."""
    tools: dict[str, str] = field(default_factory=dict)
    """Versions of what made the bundle."""
    schema: int = MANIFEST_SCHEMA

    def file(self, role: Role, precision: str = "fp32") -> File:
        """The file of `role` in `precision`; BundleError names the precisions there are."""
        for entry in self.files:
            if entry.role == role and entry.precision == precision:
                return entry
        there = sorted({entry.precision for entry in self.files if entry.role == role})
        raise BundleError(
            f"the bundle has no {role} in {precision}; it has: {', '.join(there) or 'none'}"
        )

    def has(self, role: Role, precision: str = "fp32") -> bool:
        """Whether the bundle has a file of `role` in `precision`."""
        return any((entry.role, entry.precision) == (role, precision) for entry in self.files)

    def recipe(self, precision: str) -> Recipe | None:
        """How a precision's graphs were made; None for float32, which was exported."""
        return next((r for r in self.recipes if r.precision == precision), None)


def manifest_to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`."""
    data = dataclasses.asdict(manifest)
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def manifest_from_json(text: str) -> Manifest:
    """A manifest from its text; BundleError says which field is wrong and how."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        raise BundleError(
            f"{MANIFEST_FILENAME} is not JSON ({e}): copy the bundle again or export it again"
        ) from e
    if not isinstance(data, dict) or "schema" not in data:
        raise BundleError(
            f"{MANIFEST_FILENAME} has no schema version: it is not a bundle's manifest"
        )
    if data["schema"] != MANIFEST_SCHEMA:
        raise BundleError(
            f"{MANIFEST_FILENAME} has schema version {reprlib.repr(data['schema'])}; this "
            f"medsa-deploy reads version {MANIFEST_SCHEMA}: export the checkpoint again, or "
            "install a matching medsa-deploy"
        )
    try:
        return decode(Manifest, data, MANIFEST_FILENAME)
    except RecursionError as e:  # a parity may hold a parity
        raise BundleError(
            f"{MANIFEST_FILENAME} is nested too deeply: export the checkpoint again"
        ) from e


def _refuse_constant(name: str) -> None:
    """NaN and Infinity, which Python's parser takes for JSON."""
    raise ValueError(f"{name} is not a number")


def save_manifest(manifest: Manifest, bundle: Path) -> None:
    """Write `manifest.json` into the folder `bundle`, in place of an earlier one."""
    write_text(bundle / MANIFEST_FILENAME, manifest_to_json(manifest))


def load_manifest(bundle: Path) -> Manifest:
    """Read and validate a bundle's manifest; the files it lists are not opened."""
    if not bundle.is_dir():
        what = "is a file, not a bundle folder" if bundle.exists() else "does not exist"
        raise BundleError(f"{bundle} {what}: make a bundle with medsa-deploy export CHECKPOINT")
    path = bundle / MANIFEST_FILENAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise BundleError(f"{bundle} has no {MANIFEST_FILENAME}: it is not a bundle") from e
    except (OSError, UnicodeDecodeError) as e:
        raise BundleError(f"{path} cannot be read ({e}): copy the bundle again") from e
    try:
        return manifest_from_json(text)
    except BundleError as e:
        raise BundleError(f"{bundle}: {e}") from e
