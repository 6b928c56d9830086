"""A checkpoint among this package's assets → its bundle, exported and verified."""

from __future__ import annotations

from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from medsa_deploy.progress import OnStep
from medsa_deploy.stages.export import Export, export_checkpoint
from medsa_deploy.stages.verify.verify import verify_bundle

if TYPE_CHECKING:
    from medsa_deploy.exporters.architecture import Overrides


def export_asset(
    name: str,
    folder: Path,
    overrides: Overrides,
    *,
    base: str | None = None,
    images: Path | None = None,
    on_step: OnStep,
) -> tuple[Export, bool]:
    """Export `assets/NAME.pth` into `folder`, and whether the bundle alone could be verified.

    `base`: the asset that it goes over. `images`: compared besides the seeded ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        checkpoint, base_file = (
            None
            if asset is None
            else files.enter_context(
                resources.as_file(resources.files("medsa_deploy") / f"assets/{asset}.pth")
            )
            for asset in (name, base)
        )
        assert checkpoint is not None
        export = export_checkpoint(
            checkpoint,
            output=folder / f"{name}.medsa",
            base=base_file,
            images=images,
            overrides=overrides,
            force=True,
            on_step=on_step,
        )
    verification = verify_bundle(
        export.bundle,
        checkpoint=None,
        base=None,
        images=None,
        backend="onnxruntime",
        precision=None,
        threads=None,
        on_step=on_step,
    )
    return export, not verification.failures
