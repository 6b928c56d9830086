"""Structures prompted in voxels → prompt sets of a volume's slices, and labels of their masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medsa_deploy.bundle.manifest import Manifest
from medsa_deploy.errors import PromptError
from medsa_deploy.images.volume import Volume, VolumeBox
from medsa_deploy.transforms import Prompt

MOST_LABELS = 255
"""In a label map of uint8, beside the background."""

SlicePrompts = dict[int, Prompt]
"""Slice → what is prompted there, in pixels of the slice."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What is to be segmented as one, and where it was pointed at: x, y, z in voxels."""

    points: tuple[tuple[float, float, float], ...] = ()
    labels: tuple[int, ...] = ()
    """1 foreground, 0 background, for each point."""
    boxes: tuple[VolumeBox, ...] = ()
    """x0, y0, z0, x1, y1, z1; corners are edges. On a slice there may be one."""
    name: str | None = None
    """What its label is called; structures of one name share a label."""
    class_name: str | None = None
    """For a network of several classes: the only class wanted of these prompts."""


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """Which label each structure's masks become."""

    names: tuple[str, ...]
    """What label k is called: `names[k − 1]`."""
    channels: tuple[tuple[tuple[int, int], ...], ...]
    """For each structure, (mask of the decoder, label) of the masks that are wanted."""


def labelling(structures: Sequence[Structure], manifest: Manifest) -> Labelling:
    """Labels count the classes of a network that has several, and else the structures' names.

    PromptError for a class that the network does not have, no structures, or too many labels.
    """
    if not structures:
        raise PromptError("there is no structure to segment: give one with points or a box")
    classes = manifest.network.classes if manifest.network.outputs == "classes" else 1
    given = manifest.conventions.class_names
    if classes > MOST_LABELS:
        raise PromptError(f"this network has {classes} classes; a label map holds {MOST_LABELS}")
    if classes > 1:
        names = given or tuple(f"class {i + 1}" for i in range(classes))
        every = tuple((i, i + 1) for i in range(classes))
        return Labelling(
            names=names, channels=tuple(_channels(one, names, every) for one in structures)
        )
    lone = given[0] if given else "mask"
    for one in structures:
        if one.class_name not in (None, *given):
            raise PromptError(
                f"the class {one.class_name!r} was asked for, but this network has one class: "
                "give the structure a name instead"
            )
    called = [
        one.name or one.class_name or (lone if len(structures) == 1 else f"structure {i}")
        for i, one in enumerate(structures, 1)
    ]
    names = tuple(dict.fromkeys(called))
    if len(names) > MOST_LABELS:
        raise PromptError(
            f"{len(names)} structures of different names were given; a label map holds "
            f"{MOST_LABELS}: segment them in several runs"
        )
    return Labelling(names=names, channels=tuple(((0, names.index(c) + 1),) for c in called))


def _channels(
    one: Structure, names: tuple[str, ...], every: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    """The masks wanted of one structure by a network of several classes."""
    if one.name is not None:
        raise PromptError(
            f"the structure is called {one.name!r}, but this network's masks are its classes: "
            "give a class instead of a name, or neither for all"
        )
    if one.class_name is None:
        return every
    if one.class_name not in names:
        raise PromptError(
            f"this network has no class {one.class_name!r}; it has: {', '.join(names)}"
        )
    return (every[names.index(one.class_name)],)


def slice_prompts(structure: Structure, volume: Volume) -> SlicePrompts:
    """The prompts of each slice; PromptError outside the volume, or for two boxes on a slice."""
    points: dict[int, list[tuple[float, float, int]]] = {}
    for point, label in zip(structure.points, structure.labels, strict=True):
        index, x, y = volume.locate(point)
        points.setdefault(index, []).append((x, y, label))
    boxes: dict[int, np.ndarray] = {}
    for given in structure.boxes:
        slices, box = volume.locate_box(given)
        for index in slices:
            if index in boxes:
                raise PromptError(
                    f"two boxes of one structure lie on slice {index}: several boxes on a slice "
                    "are several structures"
                )
            boxes[index] = np.asarray(box, np.float32)
    if not points and not boxes:
        raise PromptError("a structure has no prompt: give points or a box")
    return {
        index: _prompt(points.get(index, ()), boxes.get(index))
        for index in sorted({*points, *boxes})
    }


def shared_prompt(prompts: Iterable[Prompt]) -> Prompt:
    """The prompts of several slices as one set, with the smallest box around all their boxes."""
    found = list(prompts)
    boxes = [prompt.box for prompt in found if prompt.box is not None]
    around = None
    if boxes:
        corners = np.stack(boxes)
        around = np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)])
    return Prompt(
        points=np.concatenate([prompt.points for prompt in found]),
        labels=np.concatenate([prompt.labels for prompt in found]),
        box=around,
        mask=None,
    )


def has_foreground(prompt: Prompt) -> bool:
    """Whether a set says where a structure is, and not only where it is not."""
    return prompt.box is not None or bool((prompt.labels == 1).any())


def check_foreground(prompt: Prompt, where: str) -> None:
    """PromptError for a set that says only what a structure is not."""
    if not has_foreground(prompt):
        raise PromptError(
            f"{where} has background clicks only: add a foreground click or a box there, "
            "or leave them out"
        )


def _prompt(points: Sequence[tuple[float, float, int]], box: np.ndarray | None) -> Prompt:
    """One slice's prompt set."""
    table = np.array(points, np.float32).reshape(-1, 3)
    return Prompt(points=table[:, :2], labels=table[:, 2], box=box, mask=None)
