"""A client's clicks and boxes → the mask of one object, and what has changed in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.images import Volume
from medsa_deploy.images.volume import VolumeBox
from medsa_deploy.runtime import Structure
from medsa_deploy.runtime.volumes.structures import has_foreground, slice_prompts

from .bundles import ServedBundle
from .images import OpenImage
from .initial_mask import InitialMask
from .refusals import RefusedError
from .segmenting import SegmentRequest
from .service import Service
from .work import Job

ANSWER_SECONDS = 40.0
"""Time that following may take before what is there is answered: clients wait 60 s."""
Point = tuple[float, float, float]


class _OutOfTimeError(RefusedError):
    """Following takes longer than the client waits."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of an object."""

    points: tuple[Point, ...] = ()
    labels: tuple[int, ...] = ()
    boxes: tuple[VolumeBox, ...] = ()
    initial: InitialMask | None = None
    """The mask that the object began with."""
    again: bool = False
    """Whether all slices of this mask are segmented again, rather than those with prompts only."""

    @property
    def drawn(self) -> bool:
        """Whether there is a click or a box."""
        return bool(self.points or self.boxes)

    def with_box(self, box: VolumeBox, axis: int) -> Prompts:
        """With a further box, which replaces those on its slices."""
        low, high = box[axis], box[axis + 3]
        apart = tuple(b for b in self.boxes if b[axis + 3] <= low or b[axis] >= high)
        return replace(self, boxes=(*apart, box))

    def structure(self, class_name: str | None, volume: Volume) -> Structure | None:
        """What is to be segmented, None if nothing is; PromptError.

        A slice of the mask gets the box of its mask, unless it has a box or a foreground click.
        """
        clicked = Structure(
            points=self.points, labels=self.labels, boxes=self.boxes, class_name=class_name
        )
        of_slices = slice_prompts(clicked, volume) if self.drawn else {}
        boxes = list(self.boxes)
        if self.initial is not None:
            slices = self.initial.slices if self.again else self.initial.slices & of_slices.keys()
            boxes += [
                self.initial.box(index, volume)
                for index in sorted(slices)
                if index not in of_slices or not has_foreground(of_slices[index])
            ]
        return replace(clicked, boxes=tuple(boxes)) if self.points or boxes else None


@dataclass(kw_only=True)
class Interaction:
    """The state of one client."""

    bundle: ServedBundle
    class_name: str | None
    propagate: bool
    prompts: Prompts = field(default_factory=Prompts)
    earlier: list[Prompts] = field(default_factory=list)
    """Prompts before each interaction, for undo."""
    mask: NDArray[np.uint8] | None = None
    """(X, Y, Z) 0 and 1, as the client has it; other values where that is not known."""
    dtype: str = "uint8"
    """Of the client's buffer."""

    def forget(self) -> None:
        """Begin the next object."""
        self.prompts, self.earlier, self.mask = Prompts(), [], None

    @contextmanager
    def trying(self, prompts: Prompts, earlier: list[Prompts]) -> Iterator[None]:
        """Prompts and those for undo, which are taken back if they cannot be used."""
        before = self.prompts, self.earlier
        self.prompts, self.earlier = prompts, earlier
        try:
            yield
        except BaseException:
            if self.prompts is prompts:
                self.prompts, self.earlier = before
            raise

    def segment(
        self, service: Service, image: OpenImage, near: int | None, job: Job
    ) -> tuple[NDArray[np.uint8], bool]:
        """The object's mask (X, Y, Z) 0 and 1, and whether it was followed to its ends.

        Slices near the latest prompt come first. If following takes longer than clients wait, the
        rest is left out.
        """
        axes = (image.volume.axis, *image.volume.plane_axes)
        planes = np.zeros([image.volume.shape[axis] for axis in axes], np.uint8)
        mask = planes.transpose(np.argsort(axes))
        if self.prompts.initial is not None:
            planes[:] = self.prompts.initial.planes
        structure = self.prompts.structure(self.class_name, image.volume)
        if structure is None:
            return mask, True
        wish = SegmentRequest(
            structures=(structure,),
            near=near,
            propagate=self.propagate,
            initial=self.prompts.initial,
        )
        label, start = self._label, monotonic()

        def on_labels(index: int, plane: NDArray[np.uint8]) -> None:
            planes[index] = plane == label
            if wish.propagate and monotonic() - start > ANSWER_SECONDS:
                raise _OutOfTimeError("following takes too long")

        try:
            service.segment(self.bundle, image, wish, job, on_labels=on_labels)
        except _OutOfTimeError:
            return mask, False
        return mask, True

    @property
    def _label(self) -> int:
        """The class's label in a label map."""
        if self.class_name is None:
            return 1
        return self.bundle.session.classes.index(self.class_name) + 1


def bounds(inside: NDArray[np.bool_]) -> list[list[int]] | None:
    """[[low, high], …] along each axis, high one past the last; None if nothing is inside."""
    box = []
    for axis in range(inside.ndim):
        other_axes = tuple(k for k in range(inside.ndim) if k != axis)
        places = np.flatnonzero(inside.any(axis=other_axes))
        if not len(places):
            return None
        box.append([int(places[0]), int(places[-1]) + 1])
    return box
