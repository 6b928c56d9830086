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
from torch import Tensor
from torch.nn import functional as F

from .network import SIZE, DemoNetwork

WARM_UP = 100
"""Steps over which the learning rate rises."""
COOL_DOWN = 0.3
"""Part of the steps, the last, over which it falls to nothing."""
LOSS_SIZE = SIZE // 2
"""Side of the frame in which masks are compared."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """What one step learns from."""

    image: Tensor
    """(B, 3, S, S)"""
    coords: Tensor
    """(P, N, 2), P = 1 or k·B."""
    labels: Tensor
    """(P, N)"""
    target: Tensor
    """(max(B, P), K, S, S) 0 or 1: the first K masks."""
    deep: bool = False
    """The B slices are one chunk, and SD-Trans sees them together."""


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
    example: Callable[[np.random.Generator], Example]
    is_trained: Callable[[str], bool]
    """By a parameter's name; the rest is frozen."""

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
    """Train `stage` from `tensors`, or from where `state_path` says it was.

    Returns the network's tensors; steps, seconds, and the mean loss of the last tenth of the steps.
    Steps after the last state saved are lost to an interrupt, and done again.
    """
    network = DemoNetwork(tensors).train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(stage.is_trained(name))
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01)
    done, seconds, losses = 0, 0.0, []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["stage"] != stage.identity:
            raise SystemExit(
                f"{state_path} is of the stage {state['stage']}, not {stage.identity}: give "
                "another folder, or remove it"
            )
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds, losses = state["done"], state["seconds"], state["losses"]
    began = time.perf_counter() - seconds
    while done < stage.steps:
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * schedule(done, stage.steps)
        loss = step(network, stage.example(np.random.default_rng((stage.seed, stage.number, done))))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        losses.append(loss.item())
        on_step(done, losses[-1])
        if done % save_every == 0 or done == stage.steps:
            seconds = time.perf_counter() - began
            _save(
                {
                    "stage": stage.identity,
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "done": done,
                    "seconds": seconds,
                    "losses": losses,
                },
                state_path,
            )
    last = losses[-max(1, stage.steps // 10) :]
    trained = {key: value.detach().clone() for key, value in network.state_dict().items()}
    return trained, {"steps": done, "seconds": seconds, "loss": sum(last) / len(last)}


def schedule(done: int, steps: int) -> float:
    """Part of the highest learning rate after `done` of `steps` steps."""
    return min((done + 1) / WARM_UP, 1.0, (1 - done / steps) / COOL_DOWN)


def step(network: DemoNetwork, example: Example) -> Tensor:
    """The loss of one example; matrices are multiplied in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if example.deep:
            logits, iou = network(example.image, example.coords, example.labels)
        else:
            with network.without_depth():
                logits, iou = network(example.image, example.coords, example.labels)
    classes = example.target.shape[1]
    return loss_of(logits[:, :classes].float(), iou[:, :classes].float(), example.target)


def loss_of(logits: Tensor, iou: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy and Dice, and the error of the predicted IoU.

    logits (B, K, 4g, 4g), iou (B, K), target (B, K, S, S).
    """
    target = F.avg_pool2d(target, SIZE // LOSS_SIZE)
    upsampled = F.interpolate(logits, (LOSS_SIZE, LOSS_SIZE), mode="bilinear", align_corners=False)
    entropy = F.binary_cross_entropy_with_logits(upsampled, target)
    probability = upsampled.sigmoid()
    both = (probability * target).sum((2, 3))
    total = probability.sum((2, 3)) + target.sum((2, 3))
    dice = 1 - (2 * both + 1) / (total + 1)
    with torch.no_grad():
        mask = (upsampled > 0).float()
        overlap = (mask * target).sum((2, 3))
        union = mask.sum((2, 3)) + target.sum((2, 3)) - overlap
        actual = (overlap + 1) / (union + 1)
    return entropy + 0.5 * dice.mean() + 0.05 * F.mse_loss(iou, actual)


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a state to a temporary name and rename it: there is always a whole one."""
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    temporary.replace(path)
