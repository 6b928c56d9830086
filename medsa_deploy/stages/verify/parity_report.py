"""A bundle's comparisons → `reports/parity.html` in it, with the worst mask of each precision."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Manifest
from medsa_deploy.evaluation.cases import Case
from medsa_deploy.evaluation.parity import (
    Array,
    CaseParity,
    FiniteBackend,
    run_case,
)
from medsa_deploy.images import Image, draw_overlay
from medsa_deploy.images.files import output_file
from medsa_deploy.images.overlay import PALETTE
from medsa_deploy.reports import parity as parity_page
from medsa_deploy.reports.parity import Result, WorstMask
from medsa_deploy.runtime import Session
from medsa_deploy.transforms import Prompt
from medsa_deploy.transforms.intensities import intensities

from .engine_check import EngineState

PATH = Path("reports", "parity.html")
"""In the bundle; not among the files its manifest lists."""
DIMMED = 0.7
"""How bright an image is under the masks."""
DETAIL_MARGIN, DETAIL_SIDE = 4, 32
"""Pixels around the differing part, and the least side of the enlarged part."""
MEANINGS = ("in both", "in the reference alone", "in this precision alone")


def write_report(
    bundle: Path,
    manifest: Manifest,
    results: Sequence[Result],
    *,
    against: str,
    engines: Sequence[EngineState] = (),
) -> Path:
    """Write the page; its path. `against`: the outputs that were compared with, in words."""
    path = bundle / PATH
    parity = results[0].parity
    source, base = manifest.source, manifest.source.base
    facts = {
        "checkpoint": f"{source.checkpoint} (SHA-256 {source.sha256})",
        **({} if base is None else {"over": f"{base} (SHA-256 {source.base_sha256})"}),
        "compared with": against,
        "cases": f"{parity.images} image(s), {parity.seeded_images} seeded image(s), "
        f"{parity.prompt_sets} prompt sets",
        "exported with": ", ".join(f"{name} {number}" for name, number in manifest.tools.items()),
        "verified with": f"medsa-deploy {version('medsa-deploy')}",
    }
    colours = [(int(r), int(g), int(b)) for r, g, b in PALETTE[: len(MEANINGS)]]
    text = parity_page.page(
        f"Parity of {bundle.resolve().name}",
        facts,
        results,
        engines=[(engine.folder, engine.state) for engine in engines],
        key=list(zip(MEANINGS, colours, strict=True)),
    )
    path.parent.mkdir(exist_ok=True)
    with output_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def worst_mask(
    session: Session,
    cases: Sequence[Case],
    expected: Sequence[dict[str, Array]],
    comparisons: Sequence[CaseParity],
) -> WorstMask:
    """The mask of lowest Dice, with pictures; its case is run again.

    Of masks with equal Dice, one in the case with the most differing pixels.
    """
    ranked = [
        (dice, -case_parity.mask_pixels_differing, i, k)
        for i, case_parity in enumerate(comparisons)
        for k, dice in enumerate(case_parity.mask_dice)
    ]
    dice, _, i, k = min(ranked)
    case = cases[i]
    actual = run_case(Session(session.manifest, FiniteBackend(session.backend)), case)
    rule = transforms.mask_rule(session.manifest)
    masks_of_set = actual.tensors["low_res_masks"].shape[1] - rule.exclusive
    number, channel = divmod(k, masks_of_set)
    reference, mask = (
        transforms.image_masks(tensors["low_res_masks"][number], actual.frame, rule)[channel]
        for tensors in (expected[i], actual.tensors)
    )
    image, prompt = _subject(case, number)
    return WorstMask(
        case=case.name,
        prompt=_in_words(prompt) + (f", mask {channel}" if channel else ""),
        dice=dice,
        pictures=_pictures(session, image, prompt, reference, mask),
    )


def _subject(case: Case, number: int) -> tuple[Image, Prompt]:
    """The image and the prompts that a case's mask set `number` is of."""
    slices = range(len(case.images))
    order = [(i, j) for k in slices for i, j in case.pairs if i == k]  # as they were decoded
    i, j = order[number]
    return case.images[i], case.prompts[j]


def _pictures(
    session: Session,
    image: Image,
    prompt: Prompt,
    reference: NDArray[np.bool_],
    mask: NDArray[np.bool_],
) -> tuple[NDArray[np.uint8], ...]:
    """The image with its prompts, and a square of it around the differing pixels."""
    background, _ = intensities(image, session.conventions, None)
    grey = np.asarray(background, np.float32) * DIMMED
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey  # no colour but the masks'
    labels = np.where(reference & mask, 1, np.where(reference, 2, np.where(mask, 3, 0)))
    overview = draw_overlay(
        grey,
        labels,
        points=prompt.points,
        labels=prompt.labels,
        boxes=() if prompt.box is None else [prompt.box],
    )
    differing = labels > 1
    if not differing.any():
        return (overview,)
    part = _square_around(differing)
    return overview, draw_overlay(grey[part], labels[part])


def _square_around(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """A square part of an image that holds a mask, as far as the image goes."""
    at = np.argwhere(mask)
    low, high = at.min(axis=0), at.max(axis=0) + 1
    side = max(int((high - low).max()) + 2 * DETAIL_MARGIN, DETAIL_SIDE)
    starts = (low + high - side) // 2
    bounds = zip(starts.tolist(), mask.shape, strict=True)
    return tuple(slice(max(start, 0), min(start + side, size)) for start, size in bounds)


def _in_words(prompt: Prompt) -> str:
    """`a box and 1 click`"""
    clicks = len(prompt.points)
    parts = [
        "a box" if prompt.box is not None else "",
        f"{clicks} click{'s' * (clicks > 1)}" if clicks else "",
        "a mask" if prompt.mask is not None else "",
    ]
    return " and ".join(part for part in parts if part)
