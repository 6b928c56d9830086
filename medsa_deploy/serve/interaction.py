"""A client's clicks and boxes → the mask of one object, and what has changed in it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.images.volume import VolumeBox
from medsa_deploy.runtime import Structure

from .bundles import ServedBundle
from .images import OpenImage
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

    def with_box(self, box: VolumeBox, axis: int) -> Prompts:
        """With a further box, which replaces those on its slices."""
        low, high = box[axis], box[axis + 3]
        apart = tuple(b for b in self.boxes if b[axis + 3] <= low or b[axis] >= high)
        return replace(self, boxes=(*apart, box))


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
    """(X, Y, Z) 0 and 1, as the client has it."""
    dtype: str = "uint8"
    """Of the client's buffer."""

    def forget(self) -> None:
        """Begin the next object."""
        self.prompts, self.earlier, self.mask = Prompts(), [], None

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
        if self.prompts == Prompts():
            return mask, True
        structure = Structure(
            points=self.prompts.points,
            labels=self.prompts.labels,
            boxes=self.prompts.boxes,
            class_name=self.class_name,
        )
        wish = SegmentRequest(structures=(structure,), near=near, propagate=self.propagate)
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
