"""A case and its expected outputs ⇄ `reference.npz`, to verify a bundle without its checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medsa_deploy.errors import BundleError
from medsa_deploy.images import Image
from medsa_deploy.transforms import Prompt

from .cases import Case
from .parity import TENSORS, Array, NetworkOutputs


def save_reference(path: Path, case: Case, outputs: NetworkOutputs) -> None:
    """Write a case and the outputs of the checkpoint's own network for it."""
    pixels = np.stack([image.pixels for image in case.images])
    arrays: dict[str, NDArray[np.generic]] = {"images": pixels, **outputs.tensors}
    for i, prompt in enumerate(case.prompts):
        parts = {"points": prompt.points, "labels": prompt.labels}
        parts |= {} if prompt.box is None else {"box": prompt.box}
        parts |= {} if prompt.mask is None else {"mask": prompt.mask}
        arrays |= {f"prompt.{i}.{name}": part for name, part in parts.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load_reference(path: Path) -> tuple[Case, dict[str, Array]]:
    """A saved case and its expected tensors; BundleError if the file is not a reference."""
    try:
        with path.open("rb") as f, np.load(f, allow_pickle=False) as data:
            arrays = dict(data)
        sets = len({name.split(".")[1] for name in arrays if name.startswith("prompt.")})
        case = Case(
            name="saved reference",
            images=[Image(pixels=pixels, path=path) for pixels in arrays["images"]],
            prompts=[
                Prompt(
                    points=arrays[f"prompt.{i}.points"],
                    labels=arrays[f"prompt.{i}.labels"],
                    box=arrays.get(f"prompt.{i}.box"),
                    mask=arrays.get(f"prompt.{i}.mask"),
                )
                for i in range(sets)
            ],
            seeded=True,
        )
        return case, {name: arrays[name] for name in TENSORS}
    except Exception as e:  # numpy and zipfile raise nearly anything over a damaged archive
        raise BundleError(
            f"{path} is not a reference that medsa-deploy wrote ({e}): export the checkpoint again"
        ) from e
