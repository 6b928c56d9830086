"""Logits on the GPU → masks of the image's size beside them, by the kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import MedsaError
from medsa_deploy.kernels.axes import ALIGNMENT, BLOCK
from medsa_deploy.kernels.postprocess import Postprocessing, postprocessing
from medsa_deploy.nvidia.cuda import Gpu
from medsa_deploy.nvidia.device_array import FLOAT32, DeviceArray

from .interface import DeviceMasks, MaskRequest

VIEWS = 4
"""Sizes of images, with their thresholds, whose tables and masks have memory on the GPU."""
WORD = np.dtype(np.uint32).itemsize


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """The kernel's plan for a launch on images of one size, and memory for all launches."""

    plan: Postprocessing
    launch_bytes: int
    """Size of the masks that a launch makes."""
    tables: int
    tally: int
    masks: int
    """Addresses, of one allocation at `tables`; `masks` only for those that go to the host."""
    pinned: NDArray[np.uint32]
    """The tally, then the masks, on the host."""


class MaskMaker:
    """Runs the postprocessing kernels on a `Gpu` that is current, which owns the memory."""

    def __init__(self, gpu: Gpu, module: Any, logits: tuple[int, ...]) -> None:
        """module: the kernels, loaded. logits: (P, K, 4g, 4g), of the decoder's largest run."""
        self._gpu = gpu
        self._most_sets, self._count, self._side, _ = logits
        self._module = module
        self._planned: OrderedDict[tuple[Any, ...], _Planned] = OrderedDict()

    def queue(
        self, logits: int, sets: int, request: MaskRequest, target: DeviceArray | None
    ) -> Callable[[], DeviceMasks]:
        """Queue the masks of P prompt sets; the call that returns them, once the GPU is done.

        logits: address of (P, K, 4g, 4g) float32. target: (P, n, H, W) bool, for masks that stay on
        the GPU.
        """
        planned, n = self._plan(request), request.count
        launch_masks, figures = planned.plan.tally_shape
        self._gpu.clear(planned.tally, WORD * figures * n * sets)
        output = planned.masks if target is None else target.address
        exclusive = request.rule.exclusive
        for first in range(0, n * sets, launch_masks):
            # masks that exclude each other are made from all of a set's logits
            channel = 0 if exclusive else request.chosen[first % n]
            launch = planned.plan.launch(
                logits=logits + FLOAT32 * (first // n * self._count + channel) * self._side**2,
                output=output + first // launch_masks * planned.launch_bytes,
                tally=planned.tally + WORD * figures * first,
                tables=planned.tables,
                only=first % n + 1 if exclusive and target is not None else 0,
            )
            parameters = bytes(launch.parameters)
            self._gpu.launch(self._module, launch.entry, launch.grid, BLOCK, parameters)
        tally = planned.pinned[: figures * n * sets].reshape(sets, n, figures)
        self._gpu.download(tally, planned.tally)
        if target is not None:
            return lambda: DeviceMasks(masks=target, tally=tally.copy())
        shape = (sets, *planned.plan.shape)
        words = planned.pinned[figures * n * self._most_sets :][: int(np.prod(shape))].reshape(
            shape
        )
        self._gpu.download(words, planned.masks)
        return lambda: DeviceMasks(masks=words.copy(), tally=tally.copy())

    def close(self) -> None:
        """Unload the kernels; the `Gpu` frees the memory."""
        with suppress(MedsaError), self._gpu.current():
            self._module = None

    def _plan(self, request: MaskRequest) -> _Planned:
        """The plan for masks like these, with its memory; made once.

        Masks for the host are made packed, a prompt set a launch; those that stay on the GPU as
        label maps of one class.
        """
        n, on_device = request.count, request.on_device
        key = (request.frame, request.rule, n, on_device)
        if key in self._planned:
            self._planned.move_to_end(key)
            return self._planned[key]
        plan = postprocessing(
            (self._side, self._side),
            1 if on_device else n,
            request.frame,
            request.rule,
            labels=on_device,
            channels=len(request.chosen) if request.rule.exclusive else None,
        )
        self._planned[key] = planned = self._allocate(plan, n * self._most_sets)
        if len(self._planned) > VIEWS:
            _, old = self._planned.popitem(last=False)
            self._gpu.free(old.tables)
            self._gpu.unpin(old.pinned)
        return planned

    def _allocate(self, plan: Postprocessing, mask_count: int) -> _Planned:
        """A plan with memory for `mask_count` masks."""
        launch_masks, figures = plan.tally_shape
        packed = plan.entry == "threshold_masks"
        launch_bytes = int(np.prod(plan.shape)) * (WORD if packed else 1)
        tally = -(-WORD * figures * mask_count // ALIGNMENT) * ALIGNMENT
        masks = launch_bytes * mask_count // launch_masks if packed else 0
        tables = self._gpu.allocate(len(plan.tables) + tally + masks)
        try:
            pinned = self._gpu.pinned(figures * mask_count + masks // WORD).view(np.uint32)
        except BaseException:
            self._gpu.free(tables)
            raise
        self._gpu.write(tables, plan.tables)
        return _Planned(
            plan=plan,
            launch_bytes=launch_bytes,
            tables=tables,
            tally=tables + len(plan.tables),
            masks=tables + len(plan.tables) + tally,
            pinned=pinned,
        )
