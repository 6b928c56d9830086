"""A bundle → the same with compiled CUDA kernels, so that a device needs no compiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from medsa_deploy.bundle.checked import check_changeable
from medsa_deploy.kernels import cubins
from medsa_deploy.kernels.cubins import Cubin
from medsa_deploy.progress import OnStep


@dataclass(frozen=True, kw_only=True)
class KernelBuild:
    """The kernels that were compiled."""

    bundle: Path
    folder: str
    """Of the cubins, in the bundle."""
    compiler: str
    files: tuple[Cubin, ...]
    seconds: float


def build_bundle_kernels(
    bundle: Path, targets: Sequence[str] = (), *, on_step: OnStep = lambda step: None
) -> KernelBuild:
    """Compile the kernels for `targets`, such as `sm87` or `sm_87`; `compute75` is PTX.

    Without targets, for those of `cubins.TARGETS` that the compiler knows.
    """
    start = perf_counter()
    check_changeable(bundle)
    architectures = [target.replace("_", "") for target in targets]
    build = cubins.build(bundle, architectures, on_step=on_step)
    return KernelBuild(
        bundle=bundle,
        folder=cubins.FOLDER,
        compiler=build.compiler,
        files=build.files,
        seconds=perf_counter() - start,
    )
