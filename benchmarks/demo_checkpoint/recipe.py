"""The recipe: seeds and steps → the checkpoint, its figures and its model card."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.stages import diagnose

from .chunks import TEST, TEST_BLOCKS, VALIDATION, VALIDATION_BLOCKS, Template, phantom_chunk
from .evaluation import DRAWS, Score, evaluate, summary
from .examples import Chunks, PhantomImages
from .network import (
    DemoNetwork,
    adapter_tensors,
    base_tensors,
    is_trained_with_adapters,
    save_container,
)
from .training import OnStep, Stage, train

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "medsa_deploy" / "assets" / "medsa_demo.pth"
RESULT = ROOT / "benchmarks" / "results" / "demo_checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the weights, besides the code."""

    seed: int
    base_steps: int
    base_rate: float
    base_images: int
    """Phantom images in the base's pool."""
    base_batch: int
    adapt_steps: int
    adapt_rate: float
    adapt_phantoms: int
    """Phantom chunks in the adapters' pool."""
    save_every: int
    test_phantoms: int


RECIPE = Recipe(
    seed=20,
    base_steps=1800,
    base_rate=4e-4,
    base_images=1000,
    base_batch=4,
    adapt_steps=1000,
    adapt_rate=8e-4,
    adapt_phantoms=200,
    save_every=50,
    test_phantoms=24,
)


def make(recipe: Recipe, folder: Path) -> None:
    """Train both stages, evaluate what ships, and write checkpoint and figures."""
    torch.set_num_threads(1)  # on busy cores, threads spend their time waiting for each other
    folder.mkdir(parents=True, exist_ok=True)
    base, base_figures = train_base(recipe, folder)
    adapted, adapt_figures = train_adapters(recipe, folder, base)
    CHECKPOINT.parent.mkdir(exist_ok=True)
    save_container(
        adapted, CHECKPOINT, epoch=recipe.base_steps + recipe.adapt_steps,
        loss=adapt_figures["loss"],
    )  # fmt: skip
    shipped = load_checkpoint(CHECKPOINT).tensors
    scores = {
        split: evaluate_split(recipe, base, shipped, split) for split in ("validation", "test")
    }
    result = _result(recipe, {"base": base_figures, "adapt": adapt_figures}, scores)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def train_base(recipe: Recipe, folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Stage 1: all of a small SAM, on single phantom images; its first mask is the answer."""
    with _progress("phantom images", recipe.base_images) as advance:
        images = PhantomImages(recipe.base_images, folder, lambda done: advance(done, 0.0))
    stage = Stage(
        name="base",
        number=1,
        seed=recipe.seed,
        steps=recipe.base_steps,
        rate=recipe.base_rate,
        example=lambda rng: images.example(rng, recipe.base_batch),
        is_trained=lambda name: True,
    )
    return _train(stage, base_tensors(recipe.seed), folder, recipe.save_every)


def train_adapters(
    recipe: Recipe, folder: Path, base: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Stage 2: the base frozen, adapters and the decoder's output heads on chunks of slices."""
    with _progress("phantom chunks", recipe.adapt_phantoms) as advance:
        chunks = Chunks(recipe.adapt_phantoms, folder, lambda done: advance(done, 0.0))
    stage = Stage(
        name="adapt",
        number=2,
        seed=recipe.seed,
        steps=recipe.adapt_steps,
        rate=recipe.adapt_rate,
        example=chunks.example,
        is_trained=is_trained_with_adapters,
    )
    return _train(stage, {**base, **adapter_tensors(recipe.seed)}, folder, recipe.save_every)


def evaluate_split(
    recipe: Recipe, base: Mapping[str, Tensor], adapted: Mapping[str, Tensor], split: str
) -> list[Score]:
    """Scores on the held-out slices and phantoms of `split`, validation or test."""
    blocks, first = {
        "validation": (VALIDATION_BLOCKS, VALIDATION),
        "test": (TEST_BLOCKS, TEST),
    }[split]
    template = Template()
    phantoms = recipe.test_phantoms if split == "test" else recipe.test_phantoms // 3
    chunks = [template.chunk(block) for block in blocks]
    chunks += [phantom_chunk((first, 2, i)) for i in range(phantoms)]
    networks = [DemoNetwork(tensors).eval() for tensors in (base, adapted)]
    return list(evaluate(*networks, chunks, seed=recipe.seed))


def _train(
    stage: Stage, tensors: Mapping[str, Tensor], folder: Path, save_every: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    with _progress(stage.name, stage.steps) as advance:
        return train(
            stage, tensors, folder / f"{stage.name}.pt", save_every=save_every, on_step=advance
        )


@contextmanager
def _progress(name: str, total: int) -> Iterator[OnStep]:
    """A bar on stderr: steps done, the loss, the time left; off when that is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total, loss="")

        def advance(done: int, loss: float) -> None:
            progress.update(task, completed=done, loss=f"loss {loss:.3f}" if loss else "")
            if not console.is_terminal and done % 50 == 0:
                console.print(f"{name} {done}/{total} loss {loss:.3f}")

        yield advance


def _result(
    recipe: Recipe, training: dict[str, Any], scores: dict[str, list[Score]]
) -> dict[str, Any]:
    """What was measured, with the machine and the versions."""
    machine = diagnose()
    return {
        "what": "Dice of the demonstration checkpoint on held-out slices of the MNI T1 template "
        f"and held-out phantoms, over chunks of 8 slices, {DRAWS} prompts of each kind",
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
        "system": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "numpy", "nilearn")},
        "threads": torch.get_num_threads(),
        "recipe": asdict(recipe),
        "training": training,
        "chunks": {
            split: {
                "slices of the template": [[b.start, b.stop - 1] for b in blocks],
                "prompts": len(scores[split]) // 4,
            }
            for split, blocks in (("validation", VALIDATION_BLOCKS), ("test", TEST_BLOCKS))
        },
        "dice": {split: summary(found) for split, found in scores.items()},
        "wrong": {
            split: sum(s.wrong for s in found if s.variant == "adapted")
            / sum(s.variant == "adapted" for s in found)
            for split, found in scores.items()
        },
    }
