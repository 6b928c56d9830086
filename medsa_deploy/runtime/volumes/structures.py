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
"""Labels that a label map of uint8 can hold, beside the background."""

SlicePrompts = dict[int, Prompt]
"""Slice → its prompt set, in pixels of the slice."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """An object to segment in a volume, with its prompts: x, y, z in voxels.

    >>> from medsa_deploy import Structure
    >>> liver = Structure(boxes=((5, 5, 1, 30, 25, 4),), name="liver")
    >>> vessel = Structure(points=((12, 20, 2), (30, 4, 2)), labels=(1, 0), name="vessel")
    """

    points: tuple[tuple[float, float, float], ...] = ()
    labels: tuple[int, ...] = ()
    """One for each point: 1 foreground, 0 background."""
    boxes: tuple[VolumeBox, ...] = ()
    """x0, y0, z0, x1, y1, z1; voxel i reaches from i to i + 1. At most one box on each slice."""
    name: str | None = None
    """The name of its label; structures of one name share a label."""
    class_name: str | None = None
    """For a network of several classes: the only class to segment with these prompts."""


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """Which label each structure's masks become."""

    names: tuple[str, ...]
    """The name of label k is `names[k − 1]`."""
    channels: tuple[tuple[tuple[int, int], ...], ...]
    """For each structure, (mask of the decoder, label) of the masks that it needs."""


def class_names(manifest: Manifest) -> tuple[str, ...]:
    """Names of a network's classes: the bundle's, else "class 1"…, or "mask" for a lone one."""
    classes = 1 if manifest.network.outputs == "sam" else manifest.network.classes
    names = manifest.conventions.class_names
    if classes > 1:
        return names or tuple(f"class {i + 1}" for i in range(classes))
    return names[:1] or ("mask",)


def labelling(structures: Sequence[Structure], manifest: Manifest) -> Labelling:
    """Labels are the classes of a network that has several, and otherwise the structures' names.

    PromptError for a class that the network does not have, no structures, or too many labels.
    """
    if not structures:
        raise PromptError("there is no structure to segment: give one with points or a box")
    classes = class_names(manifest)
    if len(classes) > MOST_LABELS:
        raise PromptError(
            f"this network has {len(classes)} classes; a label map holds {MOST_LABELS}"
        )
    if len(classes) > 1:
        channels = tuple(_channels(structure, classes) for structure in structures)
        return Labelling(names=classes, channels=channels)
    for structure in structures:
        if structure.class_name not in (None, *manifest.conventions.class_names):
            raise PromptError(
                f"the class {structure.class_name!r} was asked for, but this network has one "
                "class: give the structure a name instead"
            )
    lone = classes[0] if len(structures) == 1 else None
    label_names = [
        structure.name or structure.class_name or lone or f"structure {i}"
        for i, structure in enumerate(structures, 1)
    ]
    names = tuple(dict.fromkeys(label_names))
    if len(names) > MOST_LABELS:
        raise PromptError(
            f"{len(names)} structures of different names were given; a label map holds "
            f"{MOST_LABELS}: segment them in several runs"
        )
    channels = tuple(((0, names.index(name) + 1),) for name in label_names)
    return Labelling(names=names, channels=channels)


def _channels(structure: Structure, classes: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """The (mask, label) pairs of one structure in a network of several classes."""
    if structure.name is not None:
        raise PromptError(
            f"the structure is called {structure.name!r}, but this network's masks are its "
            "classes: give a class instead of a name, or neither for all"
        )
    if structure.class_name is None:
        return tuple((i, i + 1) for i in range(len(classes)))
    if structure.class_name not in classes:
        raise PromptError(
            f"this network has no class {structure.class_name!r}; it has: {', '.join(classes)}"
        )
    index = classes.index(structure.class_name)
    return ((index, index + 1),)


def slice_prompts(structure: Structure, volume: Volume) -> SlicePrompts:
    """The prompts of each slice; PromptError outside the volume, or for two boxes on a slice."""
    points: dict[int, list[tuple[float, float, int]]] = {}
    for point, label in zip(structure.points, structure.labels, strict=True):
        index, x, y = volume.locate(point)
        points.setdefault(index, []).append((x, y, label))
    boxes: dict[int, np.ndarray] = {}
    for volume_box in structure.boxes:
        slices, box = volume.locate_box(volume_box)
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
    prompts = list(prompts)
    boxes = [prompt.box for prompt in prompts if prompt.box is not None]
    around = None
    if boxes:
        corners = np.stack(boxes)
        around = np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)])
    return Prompt(
        points=np.concatenate([prompt.points for prompt in prompts]),
        labels=np.concatenate([prompt.labels for prompt in prompts]),
        box=around,
        mask=None,
    )


def has_foreground(prompt: Prompt) -> bool:
    """Whether a set has a box, a foreground click or nothing, and not background clicks only."""
    return prompt.box is not None or not len(prompt.labels) or bool((prompt.labels == 1).any())


def check_foreground(prompt: Prompt, place: str) -> None:
    """PromptError for a set of background clicks only."""
    if not has_foreground(prompt):
        raise PromptError(
            f"{place} has background clicks only: add a foreground click or a box there, "
            "or leave them out"
        )


def _prompt(points: Sequence[tuple[float, float, int]], box: np.ndarray | None) -> Prompt:
    """One slice's prompt set."""
    table = np.array(points, np.float32).reshape(-1, 3)
    return Prompt(points=table[:, :2], labels=table[:, 2], box=box, mask=None)
