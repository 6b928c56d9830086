"""What export and verify share: the cases of a proof, the checkpoint's outputs, the comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medsa_deploy import verify
from medsa_deploy.errors import ImageError
from medsa_deploy.images import Image, find_images, is_volume, read_image, read_volume
from medsa_deploy.manifest import Manifest, Network, Parity
from medsa_deploy.runtime import Session
from medsa_deploy.verify import Array, Case, Outputs

if TYPE_CHECKING:
    from medsa_deploy.exporters.reference import ReferenceNetwork

SEEDS = (1, 2)
"""Seeded images of every proof, besides the user's own."""

Progress = Callable[[str], None]
"""Called with the name of a step when it begins."""


def cases(network: Network, images: Path | None) -> list[Case]:
    """Seeded cases, then one for each of the user's images: a file, or a folder of them.

    For a network that sees depth these are volumes, each with a chunk from its middle.
    """
    side, chunk = network.mask_prompt_size, network.chunk
    made = [verify.seeded_case(network.image_size, side, seed, chunk) for seed in SEEDS]
    return made + [verify.image_case(name, found, side) for name, found in _users(images, chunk)]


def _users(path: Path | None, chunk: int) -> Iterator[tuple[str, list[Image]]]:
    """The user's images, or chunks of slices, each with its name."""
    if path is None:
        return
    one = not path.is_dir() or (chunk > 1 and is_volume(path))
    for file in [path] if one else find_images(path):
        yield file.name, [read_image(file)] if chunk == 1 else middle_slices(file, chunk)


def middle_slices(path: Path, chunk: int) -> list[Image]:
    """`chunk` slices from the middle of a volume."""
    volume = read_volume(path)
    if len(volume) < chunk:
        raise ImageError(
            f"{path} has {len(volume)} slices; this network sees {chunk} at a time: give a volume "
            "of as many"
        )
    start = (len(volume) - chunk) // 2
    return [volume.slice(start + i) for i in range(chunk)]


def reference_outputs(
    reference: ReferenceNetwork, made: Manifest, cases: Sequence[Case]
) -> list[Outputs]:
    """What the checkpoint's own network gives for the cases, through the session's own code."""
    from medsa_deploy.exporters.reference import ReferenceBackend

    with Session(made, ReferenceBackend(reference)) as session:
        return [verify.run_case(session, case) for case in cases]


def parity(
    session: Session, cases: Sequence[Case], expected: Iterable[dict[str, Array]], precision: str
) -> Parity:
    """Run the cases and compare; one case's outputs are held at a time."""
    comparisons = []
    for case, tensors in zip(cases, expected, strict=True):
        actual = verify.run_case(session, case)
        wanted = Outputs(tensors=tensors, frame=actual.frame)
        comparisons.append(verify.compare(case, wanted, actual, session.conventions.threshold))
    return verify.summarise(cases, comparisons, precision=precision, backend=session.backend.name)
