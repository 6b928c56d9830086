"""SAMed_s over the demonstration's base: tissues of the brain, segmented without a click.

Low-rank updates of the encoder's and the decoder's attention, and the decoder's output heads, are
trained; the base is `medsa_demo.pth` without its adapters. What is written is a SAMed_s file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy import transforms
from medsa_deploy.bundle.atomic import whole_file
from medsa_deploy.evaluation.metrics import dice
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.families.samed.reference import ImageEncoder
from medsa_deploy.exporters.reference.decoder import Decoder, PromptTokens
from medsa_deploy.exporters.shapes import Shapes
from medsa_deploy.transforms import preprocess

from .chunks import TEST_BLOCKS, VALIDATION_BLOCKS, Template
from .examples import Tissues
from .network import DEPTH, GLOBAL, GRID, HEADS, SIZE, WINDOW
from .recipe import CHECKPOINT, RESULT, machine_facts, step_bar
from .training import Stage, train

AUTOMATIC_CHECKPOINT = CHECKPOINT.with_name("samed_demo.pth")
AUTOMATIC_RESULT = RESULT.with_name("demo_automatic.json")
CLASSES = ("white matter", "grey matter", "fluid")
"""Fluid is what the template shows of neither: mostly cerebrospinal fluid."""
RANK = 4
SAM, UPDATES = "sam.", "updates."
"""Prefixes of the base's keys, and of the updates' keys."""
TRANSFORMER = "mask_decoder.transformer."
DICE_SHARE = 0.8
"""Of the loss; the rest is cross-entropy (SAMed, section 3.4)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some steps, all alike."""

    steps: int
    rate: float
    shrunk: int
    """Images are so many times smaller than the network's frame."""
    batch: int


@dataclass(frozen=True, kw_only=True)
class AutomaticRecipe:
    """All that decides the weights, besides the code."""

    seed: int
    parts: Mapping[str, Part]
    save_every: int = 50


AUTOMATIC = AutomaticRecipe(
    seed=21,
    parts={
        "automatic-half": Part(steps=300, rate=3e-3, shrunk=2, batch=8),
        "automatic": Part(steps=120, rate=1.5e-3, shrunk=1, batch=4),
    },
)


@dataclass(frozen=True, kw_only=True)
class Update:
    """One low-rank update: W + b @ a on a linear's rows."""

    name: str
    """Its keys are this with `a` and `b` in place of `{}`."""
    linear: str
    third: int | None = None
    """Of a fused projection's rows: 0 for q, 2 for v."""


def updates() -> Iterator[Update]:
    """Every update of a SAMed_s file, by its keys."""
    for block in range(DEPTH):
        for k, third in enumerate((0, 2)):
            yield Update(
                name=f"w_{{}}_{2 * block + k:03d}",
                linear=f"image_encoder.blocks.{block}.attn.qkv",
                third=third,
            )
    attentions = {
        "sa": "self_attn",
        "cti": "cross_attn_token_to_image",
        "cit": "cross_attn_image_to_token",
    }
    for layer in range(2):
        for kind, attention in attentions.items():
            for k, row in enumerate("qv"):
                yield Update(
                    name=f"{kind}_{{}}_{2 * layer + k:03d}",
                    linear=f"{TRANSFORMER}layers.{layer}.{attention}.{row}_proj",
                )
    for row in "qv":
        yield Update(
            name=f"fati_{row}{{}}", linear=f"{TRANSFORMER}final_attn_token_to_image.{row}_proj"
        )


class PlainSAM(nn.Module):
    """The base: an image → the logits of all mask tokens, without a prompt."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(
            shapes, heads=HEADS, window=WINDOW, global_blocks=GLOBAL, sd_trans=None
        )
        self.prompt_encoder = PromptTokens(shapes, image_size=SIZE, embedding_size=GRID)
        self.mask_decoder = Decoder(shapes, form="meta")

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, s, s) → (B, 4, s / 2, s / 2)."""
        embeddings = self.image_encoder(image)
        self.prompt_encoder.image_embedding_size = tuple(embeddings.shape[2:])
        no_prompt = torch.zeros(len(embeddings), 0, embeddings.shape[1])
        logits: Tensor = self.mask_decoder(
            embeddings,
            self.prompt_encoder.get_dense_pe(),
            no_prompt,
            self.prompt_encoder.dense(None),
        )[0]
        return logits


class AutomaticNetwork(nn.Module):
    """The base with its updates. `tensors` has the keys of its state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        base = {key.removeprefix(SAM): value for key, value in tensors.items() if SAM in key}
        self.sam = PlainSAM(Shapes({key: tuple(value.shape) for key, value in base.items()}))
        self.updates = nn.ParameterDict(
            {key.removeprefix(UPDATES): v for key, v in tensors.items() if UPDATES in key}
        )
        self.load_state_dict(dict(tensors))

    def forward(self, image: Tensor) -> Tensor:
        """See `PlainSAM.forward`."""
        logits: Tensor = torch.func.functional_call(self.sam, self._merged(), (image,))
        return logits

    def _merged(self) -> dict[str, Tensor]:
        """The weights of the linears that have updates."""
        merged: dict[str, Tensor] = {}
        for update in updates():
            key = f"{update.linear}.weight"
            weight = merged.get(key, self.sam.get_parameter(key))
            product = self.updates[update.name.format("b")] @ self.updates[update.name.format("a")]
            if update.third is not None:
                size = len(product)
                rows = (update.third * size, (2 - update.third) * size)
                product = F.pad(product, (0, 0, *rows))
            merged[key] = weight + product
        return merged


def fresh_tensors(base: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The base without adapters, and updates that change nothing, by `AutomaticNetwork`'s keys."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {SAM + key: value for key, value in base.items() if "_Adapter." not in key}
    for update in updates():
        rows, columns = base[f"{update.linear}.weight"].shape
        rows = rows if update.third is None else rows // 3
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        tensors[UPDATES + update.name.format("a")] = a
        tensors[UPDATES + update.name.format("b")] = torch.zeros(rows, RANK)
    return tensors


def is_trained(name: str) -> bool:
    """Whether a parameter is trained: updates, and the decoder without its transformer."""
    key = name.removeprefix(SAM)
    return name.startswith(UPDATES) or (
        key.startswith(("mask_decoder.", "prompt_encoder.no_mask_embed"))
        and not key.startswith(TRANSFORMER)
    )


def loss_of(network: AutomaticNetwork, example: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy and Dice over background and classes, at the logits' resolution."""
    image, labels = example
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(image)
    logits = logits.float()
    one_hot = F.one_hot(labels, len(CLASSES) + 1).permute(0, 3, 1, 2).float()
    target = F.avg_pool2d(one_hot, SIZE // logits.shape[-1])
    entropy = F.cross_entropy(logits, target)
    probability = logits.softmax(dim=1)
    overlap = 2 * (probability * target).sum((0, 2, 3))
    total = (probability + target).sum((0, 2, 3))
    overlap_loss = (1 - (overlap + 1) / (total + 1)).mean()
    return DICE_SHARE * overlap_loss + (1 - DICE_SHARE) * entropy


def train_automatic(
    recipe: AutomaticRecipe,
    base: Mapping[str, Tensor],
    folder: Path,
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """All parts in order, each going on from its state in `folder`; tensors and figures."""
    slices, tensors = Tissues(), fresh_tensors(base, recipe.seed)
    figures: dict[str, dict[str, float]] = {}
    for number, (name, part) in enumerate(recipe.parts.items()):
        stage = Stage(
            name=name,
            number=100 + number,
            seed=recipe.seed,
            steps=part.steps,
            rate=part.rate,
            example=partial(slices.example, batch=part.batch, shrunk=part.shrunk),
            is_trained=is_trained,
            network=AutomaticNetwork,
            loss=loss_of,
        )
        with step_bar(name, part.steps) as on_step:
            tensors, figures[name] = train(
                stage, tensors, folder / f"{name}.pt", save_every=recipe.save_every, on_step=on_step
            )
    return tensors, figures


def save_samed(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a SAMed_s file in half precision: updates, and the parts that are no base's."""
    written = {k.removeprefix(UPDATES): v for k, v in tensors.items() if k.startswith(UPDATES)}
    for name, value in tensors.items():
        key = name.removeprefix(SAM)
        module = key.partition(".")[0]
        if module in ("mask_decoder", "prompt_encoder") and not key.startswith(TRANSFORMER):
            written[key] = value
    with whole_file(path) as temporary:
        torch.save({key: value.half() for key, value in written.items()}, temporary)


@torch.inference_mode()
def evaluate_automatic(
    tensors: Mapping[str, Tensor], blocks: Sequence[range]
) -> dict[str, dict[str, float]]:
    """Dice of each class, and of the brain (both matters), by block and over all blocks.

    Label maps are made as the runtime makes them.
    """
    network, template = AutomaticNetwork(tensors).eval(), Template()
    truth, segmented = {}, {}
    for z in (z for block in blocks for z in block):
        image, frame = preprocess(template.plane(z), "samed", SIZE)
        logits = network(torch.from_numpy(image)[None])[0].numpy()
        segmented[z] = transforms.exclusive_labels(transforms.pixel_values(logits, frame, "samed"))
        truth[z] = template.labels(z)
    result = {}
    for name, slices in {
        **{f"{block.start}…{block.stop - 1}": list(block) for block in blocks},
        "all": list(truth),
    }.items():
        pair = [np.stack([maps[z] for z in slices]) for maps in (segmented, truth)]
        row = {label: dice(*(m == k for m in pair)) for k, label in enumerate(CLASSES, 1)}
        row["brain"] = dice(*((m == 1) | (m == 2) for m in pair))
        result[name] = row
    return result


def make_automatic(recipe: AutomaticRecipe, folder: Path, *, release: bool) -> None:
    """Train over the demonstration checkpoint, and evaluate on the validation split.

    With `release` also on the test split, and write what ships: the checkpoint and its figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, figures = train_automatic(recipe, load_checkpoint(CHECKPOINT).tensors, folder)
    save_samed(tensors, (AUTOMATIC_CHECKPOINT if release else folder / AUTOMATIC_CHECKPOINT.name))
    shipped = {key: value.half().float() for key, value in tensors.items()}
    splits = {"validation": VALIDATION_BLOCKS} | ({"test": TEST_BLOCKS} if release else {})
    result = {
        "what": "Dice of the demonstration's SAMed on held-out axial slices of the MNI T1 template",
        **machine_facts(),
        "recipe": asdict(recipe),
        "training": figures,
        "dice": {name: evaluate_automatic(shipped, blocks) for name, blocks in splits.items()},
    }
    print(json.dumps(result["dice"], indent=1), file=sys.stderr)
    path = AUTOMATIC_RESULT if release else folder / AUTOMATIC_RESULT.name
    path.write_text(json.dumps(result, indent=2) + "\n")
