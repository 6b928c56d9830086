"""A stage of training: an untrained network and a source of examples → trained weights.

Every step draws from a generator seeded with the stage and the step's number, so a run that was
interrupted and goes on computes exactly what an uninterrupted one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy.bundle.atomic import whole_file

from .network import DETAIL, PATCH, SIZE, DemoNetwork

WARM_UP = 100
"""Steps over which the learning rate rises."""
COOL_DOWN = 0.3
"""Part of the steps, the last, over which it falls to nothing."""
EMPTY_SMOOTHING = 100.0
"""Pixels added to both terms of Dice of a mask that ought to be empty: one is no catastrophe."""
IOU_WEIGHT = 0.05
RECONSTRUCTION_WEIGHT = 10.0
"""Of the mean squared error of grey values 0…1, whose variance is about 0.05."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """What one step learns from."""

    image: Tensor
    """(B, 3, s, s), s = S, S/2 or S/4; B counts whole chunks of `depth` slices."""
    coords: Tensor
    """(P, N, 2), P = 1 or k·B, k in turn for each image."""
    labels: Tensor
    """(P, N)"""
    target: Tensor
    """(M, 4, S, S) 0 or 1, M = max(B, P)."""
    weight: Tensor
    """(M / depth, 4) how much each mask counts, by chunk and prompt."""
    depth: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """What is trained, on what, and for how long."""

    name: str
    number: int
    """Distinguishes the stages' random numbers."""
    seed: int
    steps: int
    rate: float
    """Highest learning rate."""
    example: Callable[[np.random.Generator], Any]
    is_trained: Callable[[str], bool]
    """By a parameter's name; the rest is frozen."""
    network: Callable[[Mapping[str, Tensor]], nn.Module] = DemoNetwork
    """Of the tensors that are trained from."""
    loss: Callable[[Any, Any], Tensor] | None = None
    """Of the network and an example; None for `step`."""

    @property
    def identity(self) -> str:
        """What a state must agree on to be gone on from; the number of steps may still change."""
        return f"{self.name} {self.number}, seed {self.seed}, rate {self.rate:g}"


OnStep = Callable[[int, float], None]
"""Told the number of steps done and the last loss."""


def train(
    stage: Stage,
    tensors: Mapping[str, Tensor],
    state_path: Path,
    *,
    save_every: int,
    on_step: OnStep = lambda done, loss: None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train `stage` from `tensors`, or continue from the state in `state_path`.

    Returns the network's tensors; steps, seconds, processor seconds (of all threads together), and
    the mean loss of the last tenth of the steps. After an interrupt, steps since the last saved
    state are repeated.
    """
    network = stage.network(tensors).train()
    loss_of_step = stage.loss or step
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(stage.is_trained(name))
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01)
    done, seconds, cpu_seconds, losses = 0, 0.0, 0.0, []
    if state_path.exists():
        state = _state(state_path, stage)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        done, losses = state["done"], state["losses"]
        seconds, cpu_seconds = state["seconds"], state["cpu_seconds"]
    began, cpu_began = time.perf_counter() - seconds, time.process_time() - cpu_seconds
    while done < stage.steps:
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * schedule(done, stage.steps)
        example = stage.example(np.random.default_rng((stage.seed, stage.number, done)))
        loss = loss_of_step(network, example)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        losses.append(loss.item())
        on_step(done, losses[-1])
        if done % save_every == 0 or done == stage.steps:
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            _save(
                {
                    "stage": stage.identity,
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "done": done,
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    "losses": losses,
                },
                state_path,
            )
    last = losses[-max(1, stage.steps // 10) :]
    trained = {key: value.detach().clone() for key, value in network.state_dict().items()}
    figures = {"steps": done, "seconds": seconds, "cpu_seconds": cpu_seconds}
    return trained, figures | {"loss": sum(last) / len(last)}


def schedule(done: int, steps: int) -> float:
    """Part of the highest learning rate after `done` of `steps` steps."""
    return min((done + 1) / WARM_UP, 1.0, (1 - done / steps) / COOL_DOWN)


def step(network: DemoNetwork, example: Example) -> Tensor:
    """The loss of one example; matrices are multiplied in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = network.image_encoder(example.image)
        logits, iou = network.decode(embeddings, example.coords, example.labels)
        drawn = None if network.reconstruction is None else network.reconstruction(embeddings)
    loss = loss_of(logits.float(), iou.float(), example)
    if drawn is not None:
        grey = F.avg_pool2d(example.image[:, :1], PATCH // DETAIL)
        loss = loss + RECONSTRUCTION_WEIGHT * F.mse_loss(
            drawn.float(), F.pixel_unshuffle(grey, DETAIL)
        )
    return loss


def loss_of(logits: Tensor, iou: Tensor, example: Example) -> Tensor:
    """Cross-entropy, Dice and the error of the predicted IoU, by chunk and mask, weighted.

    logits (M, K, 4g, 4g), iou (M, K); masks are compared at the logits' resolution.
    """
    prompts = len(logits) // len(example.image)

    def of_chunks(x: Tensor) -> Tensor:
        """(M, K) → (M / depth, K), the sum over the slices of a chunk."""
        return x.unflatten(0, (-1, example.depth, prompts)).sum(1).flatten(0, 1)

    target = F.avg_pool2d(example.target, SIZE // logits.shape[-1])
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    entropy = of_chunks(entropy.mean((2, 3))) / example.depth
    probability = logits.sigmoid()
    soft_overlap = of_chunks((probability * target).sum((2, 3)))
    true = of_chunks(target.sum((2, 3)))
    smoothing = torch.where(true > 0, 1.0, EMPTY_SMOOTHING)
    total = of_chunks(probability.sum((2, 3))) + true
    dice = 1 - (2 * soft_overlap + smoothing) / (total + smoothing)
    with torch.no_grad():
        mask = (logits > 0).float()
        overlap = (mask * target).sum((2, 3))
        union = mask.sum((2, 3)) + target.sum((2, 3)) - overlap
        actual = (overlap + 1) / (union + 1)
    error = of_chunks((iou - actual) ** 2) / example.depth
    each = entropy + dice + IOU_WEIGHT * error
    return (example.weight * each).sum() / len(example.weight)


def _state(path: Path, stage: Stage) -> dict[str, Any]:
    """The state saved at `path`; SystemExit if it is of another stage."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["stage"] != stage.identity:
        raise SystemExit(
            f"{path} is of the stage {state['stage']}, not {stage.identity}: give another folder, "
            "or remove it"
        )
    return state


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a state whole or not at all."""
    with whole_file(path) as temporary:
        torch.save(state, temporary)
