"""A bundle's manifest: frozen dataclasses ⇄ `manifest.json`.

The manifest describes a bundle (checkpoint, network, conventions, tensor contract), lists its
files, and records how far its graphs differ from the checkpoint's own network. Reading is strict:
an unknown schema version, an unknown or missing field, or a value of the wrong type is refused.
`bundle/files.py` compares the files with their entries.
"""

from __future__ import annotations

import dataclasses
import hashlib
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medsa_deploy.errors import BundleError, about

from .atomic import write_text
from .manifest_text import MANIFEST_FILENAME as MANIFEST_FILENAME
from .manifest_text import check_digest, document_from_text, document_to_text
from .manifest_values import check_values
from .recipe import Recipe
from .strict_json import decode

MANIFEST_SCHEMA = 2
MOST_BYTES = 64 << 20

RelPos = Literal["zero", "real", "none"]
TwoWay = Literal["meta", "public"]
Outputs = Literal["classes", "sam", "labels"]
PreprocessingName = Literal[
    "medsa", "sam", "medsam", "litemedsam", "efficientsam", "sam-med2d", "finetune-sam", "samed"
]
PostprocessingName = Literal["sam", "medsam", "efficientsam", "finetune-sam", "samed"]
PromptNeed = Literal["required", "optional", "none"]
MaskChoice = Literal["first", "best"]
PointOrder = Literal["xy", "yx"]
PointFrame = Literal["network", "image"]
DepthGrouping = Literal["public", "paper"]
PromptScope = Literal["chunk", "slice"]
Role = Literal[
    "encoder",
    "encoder-onnxruntime",
    "encoder-openvino",
    "decoder",
    "decoder-image",
    "decoder-click",
    "weights",
    "reference",
    "sbom",
]
"""`encoder-onnxruntime`, `encoder-openvino`: the encoder with attention as that backend runs it
fastest; it shares the weights in the encoder's file. `decoder-image` and `decoder-click`: the
decoder in two parts, one that runs once for each image and one that runs for each prompt without a
mask. `weights`: external data of a graph over protobuf's limit. `reference`: the checkpoint's
outputs, for `verify`. `sbom`: the bill of materials.
"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The checkpoint a bundle was exported from."""

    checkpoint: str
    """File name, without its folder."""
    sha256: str
    container: str
    """Form of the file: `training checkpoint`, `state dict`, `adapters over a base`…"""
    dtype: str
    """Floating-point types of the stored weights, before their conversion to float32."""
    base: str | None = None
    """File name of the base checkpoint, for a file that holds adapters only."""
    base_sha256: str | None = None
    weights: str = ""
    """Keys of the containers around the weights in the file, joined by dots; empty for none."""
    prefix: str = ""
    """What was taken off the weights' own keys: `module.`; empty for nothing."""


@dataclass(frozen=True, kw_only=True)
class FamilyFacts:
    """The facts about a network that its family reads, each in its own way."""

    family: str
    """`medsa`, `sam`, `litemedsam`, `mobile_sam`, `efficient_sam`…"""
    encoder: str
    """`vit`, `tiny_vit`…"""
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


@dataclass(frozen=True, kw_only=True)
class Network(FamilyFacts):
    """Facts about the network, inferred from the checkpoint's keys and shapes or set by options."""

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
    """N: the classes that masks are of, the background not counted."""
    outputs: Outputs
    """`classes`: masks 0…N−1. `sam`: all mask tokens; mask 0 for one mask, 1… for several.
    `labels`: masks 0…N of classes that exclude each other; the highest wins, 0 is background."""
    hyp_lengths: tuple[int, ...] = ()
    """HyP-Adpt's widths L_0…L_K in the first two-way block that has it; empty without HyP-Adpt."""
    hyp_prompt_length: int = 0
    sd_trans: DepthGrouping | None = None
    """How SD-Trans groups slices for attention over depth; None for a network on single images."""
    depth_chunk: int | None = None
    """D: neighbouring slices that attend to each other; the encoder's batch is a multiple of D.
    None together with SD-Trans: the depth branch spans windows of exactly `slices` slices."""
    slices: int | None = None
    """The exact number of slices the encoder takes, if there is no `depth_chunk`."""

    @property
    def chunk(self) -> int:
        """Slices that are encoded together: 1 for a network on single images."""
        return self.depth_chunk or self.slices or 1

    @property
    def masks(self) -> int:
        """K: masks in the decoder's output."""
        return {
            "classes": self.classes,
            "labels": self.classes + 1,
            "sam": self.mask_tokens,
        }[self.outputs]


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """How a caller prepares images and prompts for the graphs, and turns logits into masks."""

    preprocess: PreprocessingName
    point_order: PointOrder = "xy"
    """`yx`: the network was trained on (row, column) clicks. Callers always give x, y."""
    point_frame: PointFrame = "network"
    """`image`: coordinates go in as the image's own pixels, unscaled."""
    prompt_scope: PromptScope = "chunk"
    """In 3D, the slices a prompt set is for. `chunk`: all slices of its chunk, with the prompts of
    all of them in one set, as the public code trains. `slice`: its own slice alone."""
    point_scale: float = 1.0
    """Factor on coordinates, applied after `point_frame`."""
    pad_points: int | None = None
    """Points in a padded set, box corners included; padding is (−1, −1) with label −1. 0: none.
    None: SAM's rule, one point (0, 0) with label −1 after points without a box."""
    intensity_window: tuple[float, float] | None = None
    """Intensities mapped to black and white, for images that are not 8-bit."""
    threshold: float = 0.5
    """Probability above which a pixel belongs to the mask. Masks of `labels` have none."""
    class_names: tuple[str, ...] = ()
    postprocess: PostprocessingName = "sam"
    """How low-resolution logits become values of the image's pixels. Bundles that do not say have
    SAM's way."""
    prompts: PromptNeed = "required"
    """Whether the network segments without a prompt: `required` never, `optional` with or without,
    `none` only without."""
    trained_with: str | None = None
    """The code that trained the network, as `--trained-with` names it; older bundles do not say."""
    mask_choice: MaskChoice = "first"
    """Of `sam` outputs, the mask of a caller who wants a single one: mask 0, or of the candidates
    the one with the best score."""


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
    """Differences between one precision's graphs and the checkpoint's own network."""

    precision: str
    backend: str
    images: int
    seeded_images: int
    prompt_sets: int
    tensors: dict[str, TensorParity]
    mask_pixels_differing: float
    """Share of a case's mask pixels that differ, worst over all cases."""
    mask_dice_mean: float | None = None
    """Dice of each decoded mask with the reference's, at image size; 1 for two empty masks."""
    mask_dice_worst: float | None = None
    nan_count: int = 0
    """NaN and infinite values in any output."""
    split: Parity | None = None
    """The same comparison with the decoder's two parts, for prompt sets without a mask. None if the
    precision has no such files."""
    encoders: dict[str, Parity] = field(default_factory=dict)
    """The same comparison with each backend's own encoder that exists and ran, by role."""


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
    """One for each precision derived from the float32 graphs."""
    tools: dict[str, str] = field(default_factory=dict)
    """Versions of the tools that wrote the bundle."""
    schema: int = MANIFEST_SCHEMA

    @property
    def mask_prompt_size(self) -> int | None:
        """Side of a mask prompt, 4·g; None for a decoder that takes none."""
        takes_masks = any(t.name == "mask_input" for t in self.graphs["decoder"].inputs)
        return 4 * self.network.embedding_size if takes_masks else None

    def file(self, role: Role, precision: str = "fp32") -> File:
        """The file of `role` in `precision`; BundleError lists the precisions that exist.

        >>> manifest.file("encoder").path
        'encoder.onnx'
        """
        for entry in self.files:
            if entry.role == role and entry.precision == precision:
                return entry
        precisions = sorted({entry.precision for entry in self.files if entry.role == role})
        raise BundleError(
            f"the bundle has no {role} in {precision}; it has: {', '.join(precisions) or 'none'}"
        )

    def has(self, role: Role, precision: str = "fp32") -> bool:
        """Whether the bundle has a file of `role` in `precision`."""
        return any((entry.role, entry.precision) == (role, precision) for entry in self.files)

    def recipe(self, precision: str) -> Recipe | None:
        """The recipe of a derived precision; None for float32, which is exported as it is."""
        return next((r for r in self.recipes if r.precision == precision), None)


def manifest_to_json(manifest: Manifest) -> str:
    """A manifest as the text of `manifest.json`, with a digest of the text."""
    return document_to_text(dataclasses.asdict(manifest))


def manifest_from_json(text: str) -> Manifest:
    """The manifest in a text; BundleError names the field that is wrong, and how.

    A text with a digest must match it. Values are checked by `load_manifest` only.
    """
    data = document_from_text(text)
    if data["schema"] != MANIFEST_SCHEMA:
        raise BundleError(
            f"{MANIFEST_FILENAME} has schema version {reprlib.repr(data['schema'])}; this "
            f"medsa-deploy reads version {MANIFEST_SCHEMA}: export the checkpoint again, or "
            "install a matching medsa-deploy"
        )
    check_digest(data, text)
    try:
        return decode(Manifest, data, MANIFEST_FILENAME)
    except RecursionError as e:  # a parity may hold a parity
        raise BundleError(
            f"{MANIFEST_FILENAME} is nested too deeply: export the checkpoint again"
        ) from e
    except BundleError as e:
        raise BundleError(f"{e}; export the checkpoint again") from e


def save_manifest(manifest: Manifest, bundle: Path) -> None:
    """Write `manifest.json` into the folder `bundle`, in place of an earlier one."""
    write_text(bundle / MANIFEST_FILENAME, manifest_to_json(manifest))


def load_manifest(bundle: Path) -> Manifest:
    """Read and validate a bundle's manifest, without opening the files it lists.

    BundleError if `bundle` is not a folder, has no manifest, or has one this version cannot read.

    >>> load_manifest(bundle).network.image_size
    256
    """
    return read_manifest(bundle)[0]


def read_manifest(bundle: Path) -> tuple[Manifest, str]:
    """A bundle's manifest, and the SHA-256 of the bytes that it was read from.

    Errors as for `load_manifest`.
    """
    with about(bundle):
        content = _read_content(bundle)
        try:
            manifest = manifest_from_json(content.decode())
            check_values(manifest)
        except UnicodeDecodeError as e:
            path = bundle / MANIFEST_FILENAME
            raise BundleError(f"{path} cannot be read ({e}): copy the bundle again") from e
        except RecursionError as e:
            raise BundleError(f"{bundle}: {MANIFEST_FILENAME} is nested too deeply") from e
        except BundleError as e:
            raise BundleError(f"{bundle}: {e}") from e
    return manifest, hashlib.sha256(content).hexdigest()


def _read_content(bundle: Path) -> bytes:
    """The bytes of a bundle's `manifest.json`."""
    if not bundle.is_dir():
        state = "is a file, not a bundle folder" if bundle.exists() else "does not exist"
        raise BundleError(f"{bundle} {state}: make a bundle with medsa-deploy export CHECKPOINT")
    path = bundle / MANIFEST_FILENAME
    try:
        with path.open("rb") as f:
            content = f.read(MOST_BYTES + 1)
    except FileNotFoundError as e:
        raise BundleError(
            f"{bundle} has no {MANIFEST_FILENAME}: it is not a bundle; name a folder "
            "that medsa-deploy export has written"
        ) from e
    except OSError as e:
        raise BundleError(f"{path} cannot be read ({e}): copy the bundle again") from e
    if len(content) > MOST_BYTES:
        raise BundleError(
            f"{path} has more than {MOST_BYTES} bytes: no bundle's manifest is so long; copy the "
            "bundle again"
        )
    return content
