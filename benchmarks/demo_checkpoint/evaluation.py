"""Networks and held-out chunks → Dice by class and prompt, with parts switched off in turn.

Masks are made as the runtime makes them: logits upsampled to the slices' own pixels, above 0. Dice
is that of a whole chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medsa_deploy.transforms import Frame, pixel_values

from .chunks import Chunk
from .network import CLASSES, PROMPTED, DemoNetwork
from .prompts import KINDS, Kind, Mask, decoder_inputs, sample

VARIANTS = ("base", "adapted", "HyP-Adpt's prompt zeroed", "SD-Trans off")
DRAWS = 3
"""Prompts of each kind drawn for every structure."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One prompt on one chunk."""

    variant: str
    kind: Kind
    structure: str
    """The class that is prompted and compared."""
    dice: float
    wrong: float
    """Part of the pixels in masks of classes that are not in the chunk; 0 for the base."""


@torch.inference_mode()
def evaluate(
    base: DemoNetwork, adapted: DemoNetwork, chunks: Sequence[Chunk], *, seed: int
) -> Iterator[Score]:
    """Scores of all variants on every chunk, its structures, and DRAWS prompts of each kind.

    The base knows no classes, so it is asked for each structure by a prompt of its own, and its
    answer is the mask of what was prompted; prompts are the same for all variants.
    """
    for number, chunk in enumerate(chunks):
        image = torch.from_numpy(chunk.image)[:, None].expand(-1, 3, -1, -1)
        for variant in VARIANTS:
            network = base if variant == "base" else adapted
            with ExitStack() as switched:
                if variant == "SD-Trans off":
                    switched.enter_context(network.without_depth())
                if variant == "HyP-Adpt's prompt zeroed":
                    switched.enter_context(network.without_prompt_conditioning())
                embeddings = network.image_encoder(image)
                for at, (structure, mask) in enumerate(chunk.structures.items()):
                    rng = np.random.default_rng((seed, number, at))
                    for draw in range(DRAWS * len(KINDS)):
                        kind = KINDS[draw % len(KINDS)]
                        clicks = 0 if kind == "box" else int(kind[0])
                        coords, labels = decoder_inputs(
                            sample(rng, mask, clicks=clicks), chunk.frame
                        )
                        masks = _masks(network, embeddings, coords, labels, chunk.frame)
                        mine = masks[:, PROMPTED if network is base else CLASSES.index(structure)]
                        absent = [i for i, name in enumerate(CLASSES) if not _has(chunk, name)]
                        yield Score(
                            variant=variant,
                            kind=kind,
                            structure=structure,
                            dice=dice(mine, mask),
                            wrong=0.0 if network is base else float(masks[:, absent].mean()),
                        )


def dice(mask: Mask, label: Mask) -> float:
    """2·|A ∩ B| / (|A| + |B|)."""
    return float(2 * (mask & label).sum() / (mask.sum() + label.sum()))


def summary(scores: Sequence[Score]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean Dice by variant, prompt and class; `mean` is that of the classes."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for variant in VARIANTS:
        table[variant] = {}
        for kind in KINDS:
            row = {
                name: float(
                    np.mean(
                        [
                            score.dice
                            for score in scores
                            if (score.variant, score.kind, score.structure) == (variant, kind, name)
                        ]
                    )
                )
                for name in CLASSES
            }
            table[variant][kind] = row | {"mean": float(np.mean(list(row.values())))}
    return table


def _has(chunk: Chunk, name: str) -> bool:
    return name in chunk.structures


def _masks(
    network: DemoNetwork, embeddings: Tensor, coords: Tensor, labels: Tensor, frame: Frame
) -> Mask:
    """All classes' masks of a chunk (D, 4, H, W)."""
    logits, _ = network.mask_decoder(
        embeddings,
        network.prompt_encoder.get_dense_pe(),
        network.prompt_encoder.sparse(coords, labels),
        network.prompt_encoder.dense(None),
    )
    above: Mask = pixel_values(logits.numpy(), frame, "sam") > 0
    return above
