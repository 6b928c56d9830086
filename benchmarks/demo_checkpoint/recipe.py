"""The recipe: seeds and steps → the checkpoint and its figures."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
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
    RECONSTRUCTION,
    DemoNetwork,
    adapter_tensors,
    base_tensors,
    is_trained_with_adapters,
    save_container,
)
from .readout import readouts
from .training import OnStep, Stage, train

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "medsa_deploy" / "assets" / "medsa_demo.pth"
RESULT = ROOT / "benchmarks" / "results" / "demo_checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some steps of one of the two stages, all alike."""

    steps: int
    rate: float
    """Highest learning rate."""
    shrunk: int
    """Images are so many times smaller, and have as many times squared fewer tokens."""
    batch: int = 1
    """The base's images; the adapters see one chunk a step."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the weights, besides the code."""

    seed: int
    threads: int
    base: Mapping[str, Part]
    """Parts of the first stage by their names, in order."""
    base_images: int
    """Phantom images in the base's pool."""
    adapt: Mapping[str, Part]
    """Parts of the second stage."""
    adapt_phantoms: int
    """Phantom chunks in the adapters' pool."""
    save_every: int
    validation_phantoms: int
    test_phantoms: int


RECIPE = Recipe(
    seed=20,
    threads=2,
    base={
        "base-quarter": Part(steps=1000, rate=1.5e-3, shrunk=4, batch=16),
        "base-half": Part(steps=1400, rate=8e-4, shrunk=2, batch=8),
        "base": Part(steps=900, rate=5e-4, shrunk=1, batch=4),
    },
    base_images=2500,
    adapt={
        "adapt-half": Part(steps=500, rate=1e-3, shrunk=2),
        "adapt": Part(steps=800, rate=8e-4, shrunk=1),
    },
    adapt_phantoms=200,
    save_every=50,
    validation_phantoms=12,
    test_phantoms=24,
)


def make(recipe: Recipe, folder: Path, *, release: bool) -> None:
    """Train both stages, and evaluate on the validation split.

    With `release` also on the test split, and write what ships: the checkpoint and its figures.
    """
    torch.set_num_threads(recipe.threads)
    folder.mkdir(parents=True, exist_ok=True)
    base, figures = train_base(recipe, folder)
    adapted, adapt_figures = train_adapters(recipe, folder, base)
    figures |= adapt_figures
    path = CHECKPOINT if release else folder / CHECKPOINT.name
    path.parent.mkdir(exist_ok=True)
    steps = sum(int(each["steps"]) for each in figures.values())
    save_container(adapted, path, epoch=steps, loss=list(figures.values())[-1]["loss"])
    shipped = load_checkpoint(path).tensors
    scores, result = {}, {}
    for split in ("validation", "test") if release else ("validation",):
        scores[split] = evaluate_split(recipe, base, shipped, split)
        result = _result(recipe, figures, readouts(base), scores)
        print(json.dumps(result["dice"][split], indent=1), file=sys.stderr)
    path = RESULT if release else folder / RESULT.name
    path.write_text(json.dumps(result, indent=2) + "\n")


def train_base(
    recipe: Recipe, folder: Path
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """All of a small SAM, on single phantom images, small ones first."""
    with step_bar("phantom images", recipe.base_images) as advance:
        images = PhantomImages(recipe.base_images, folder, lambda done: advance(done, 0.0))
    tensors, figures = base_tensors(recipe.seed), {}
    for number, (name, part) in enumerate(recipe.base.items()):
        stage = Stage(
            name=name,
            number=number,
            seed=recipe.seed,
            steps=part.steps,
            rate=part.rate,
            example=partial(images.example, batch=part.batch, shrunk=part.shrunk),
            is_trained=lambda name: True,
        )
        tensors, figures[name] = _train(stage, tensors, folder, recipe.save_every)
    adapted = {key: value for key, value in tensors.items() if not key.startswith(RECONSTRUCTION)}
    return adapted, figures


def train_adapters(
    recipe: Recipe, folder: Path, base: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The base frozen: adapters and the decoder's output heads, on chunks of slices."""
    with step_bar("phantom chunks", recipe.adapt_phantoms) as advance:
        chunks = Chunks(recipe.adapt_phantoms, folder, lambda done: advance(done, 0.0))
    tensors, figures = {**base, **adapter_tensors(recipe.seed)}, {}
    for number, (name, part) in enumerate(recipe.adapt.items()):
        stage = Stage(
            name=name,
            number=len(recipe.base) + number,
            seed=recipe.seed,
            steps=part.steps,
            rate=part.rate,
            example=partial(chunks.example, shrunk=part.shrunk),
            is_trained=is_trained_with_adapters,
        )
        tensors, figures[name] = _train(stage, tensors, folder, recipe.save_every)
    return tensors, figures


def evaluate_split(
    recipe: Recipe, base: Mapping[str, Tensor], adapted: Mapping[str, Tensor], split: str
) -> list[Score]:
    """Scores on the held-out slices and phantoms of `split`, validation or test."""
    blocks, first, phantoms = {
        "validation": (VALIDATION_BLOCKS, VALIDATION, recipe.validation_phantoms),
        "test": (TEST_BLOCKS, TEST, recipe.test_phantoms),
    }[split]
    template = Template()
    chunks = [template.chunk(block) for block in blocks]
    chunks += [phantom_chunk((first, 2, i)) for i in range(phantoms)]
    networks = [DemoNetwork(tensors).eval() for tensors in (base, adapted)]
    return list(evaluate(*networks, chunks, seed=recipe.seed))


def _train(
    stage: Stage, tensors: Mapping[str, Tensor], folder: Path, save_every: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    with step_bar(stage.name, stage.steps) as advance:
        return train(
            stage, tensors, folder / f"{stage.name}.pt", save_every=save_every, on_step=advance
        )


@contextmanager
def step_bar(name: str, total: int) -> Iterator[OnStep]:
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
        losses: list[float] = []

        def advance(done: int, loss: float) -> None:
            progress.update(task, completed=done, loss=f"loss {loss:.3f}" if loss else "")
            if loss:
                losses.append(loss)
            if not console.is_terminal and done % 50 == 0:
                mean = sum(losses[-50:]) / max(1, len(losses[-50:]))
                console.print(f"{name} {done}/{total} loss {mean:.3f}")

        yield advance


def _result(
    recipe: Recipe,
    training: dict[str, Any],
    read: dict[str, float],
    scores: dict[str, list[Score]],
) -> dict[str, Any]:
    """What was measured, with the machine and the versions."""
    return {
        "what": "Dice of the demonstration checkpoint on held-out slices of the MNI T1 template "
        f"and held-out phantoms, over chunks of 8 slices, {DRAWS} prompts of each kind",
        **machine_facts(),
        "recipe": asdict(recipe),
        "training": training,
        "white matter read out of the base": read,
        "chunks": {
            split: {
                "slices of the template": [[b.start, b.stop - 1] for b in blocks],
                "prompts": len(scores[split]) // 4,
            }
            for split, blocks in (("validation", VALIDATION_BLOCKS), ("test", TEST_BLOCKS))
            if split in scores
        },
        "dice": {split: summary(split_scores) for split, split_scores in scores.items()},
        "wrong": {
            split: sum(s.wrong for s in split_scores if s.variant == "adapted")
            / sum(s.variant == "adapted" for s in split_scores)
            for split, split_scores in scores.items()
        },
    }


def machine_facts() -> dict[str, Any]:
    """The machine, the system and the versions of the libraries that decide the weights."""
    machine = diagnose()
    return {
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.memory_gb} GB",
        "system": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "numpy", "nilearn")},
        "threads": torch.get_num_threads(),
    }
