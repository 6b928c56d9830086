"""Parity figures and their worst masks (PNG as data URIs) → one HTML page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from medsa_deploy.bundle.manifest import Parity
from medsa_deploy.evaluation.parity import Limits, parity_failures

from . import html

PICTURE_SIDE = 1024
"""Pixels; larger pictures are scaled down."""
DICE_AXES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
"""Where an axis of Dice may begin."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WorstMask:
    """The mask of one precision that differs most from the reference's."""

    case: str
    prompt: str
    """The prompt, in words."""
    dice: float
    pictures: Sequence[NDArray[np.uint8]]
    """(H, W, 3): the image with both masks, and a part of it enlarged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One precision in one backend."""

    parity: Parity
    limits: Limits
    mask_dice: tuple[float, ...]
    """Of every mask of every case."""
    worst: WorstMask | None
    """None if no page was requested."""

    @property
    def failures(self) -> list[str]:
        """What exceeds the limits."""
        return parity_failures(self.parity, self.limits)


def page(
    title: str,
    facts: Mapping[str, str],
    results: Sequence[Result],
    *,
    engines: Sequence[tuple[str, str]] = (),
    key: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> str:
    """The page's HTML. `engines`: (name, state). `key`: the meaning of the pictures' colours."""
    problems = [(r.parity, problem) for r in results for problem in r.failures]
    verdict = "".join(f"<li>{escape(p.precision)}: {escape(text)}</li>" for p, text in problems)
    parts = [
        f'<p class="verdict bad">Not verified</p><ul>{verdict}</ul>'
        if problems
        else '<p class="verdict good">Verified: every precision is within its limits</p>',
        html.table((), [(name, value) for name, value in facts.items()]),
        "<h2>Figures, worst of all cases</h2>",
        _figures(results),
        "<h2>Relative L2 by tensor</h2>",
        _l2_plot(results),
        '<p class="note">‖a − e‖ / ‖e‖ on a logarithmic axis. The upright line is the limit, where '
        "the precision has one.</p>",
        "<h2>Dice of every mask with the reference's</h2>",
        _dice_plot(results),
        '<p class="note">One dot a mask, at the image’s size; two empty masks count as 1. The '
        "upright lines are the limits of the mean and of the worst, where there are any.</p>",
        "<h2>Worst masks</h2>",
        '<p class="note">The mask of lowest Dice in each precision, with its prompts; beside it '
        "the part that differs, enlarged.</p>",
        *(_worst(result, key) for result in results),
    ]
    if engines:
        parts += ["<h2>Engines</h2>", html.table(("engine", "state"), engines)]
    return html.page(title, parts)


def _figures(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        parity = result.parity
        mean, worst = parity.mask_dice_mean, parity.mask_dice_worst
        common = (
            f"{parity.mask_pixels_differing:.1e}",
            "–" if mean is None else f"{mean:.4f}",
            "–" if worst is None else f"{worst:.4f}",
            str(parity.nan_count),
        )
        for i, (name, tensor) in enumerate(parity.tensors.items()):
            precision = f"{parity.precision} in {parity.backend}" if i == 0 else ""
            figures = (f"{tensor.relative_l2:.1e}", f"{tensor.max_abs:.1e}")
            rows.append((precision, name, *figures, *(common if i == 0 else ("",) * 4)))
    headers = ("precision", "tensor", "relative L2", "max abs", "mask pixels differing")
    return html.table((*headers, "Dice mean", "worst", "NaN, infinite"), rows, numbers=2)


def _l2_plot(results: Sequence[Result]) -> str:
    """A row for each tensor of each precision; decades as grid."""
    rows = [
        (r.parity, name, t.relative_l2) for r in results for name, t in r.parity.tensors.items()
    ]
    limits = [r.limits.relative_l2 for r in results for _ in r.parity.tensors]
    shown = [v for v in (*(v for *_, v in rows), *limits) if v and math.isfinite(v)] or [1.0]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    high = max(high, low + 1)

    def at(value: float) -> float:
        """Zero is at the left edge, infinite values at the right edge."""
        power = math.log10(value) if 0 < value < math.inf else low if value == 0 else high
        return html.across((power - low) / (high - low))

    step = max(1, (high - low) // 8)
    svg = [html.grid(at(10.0**p), f"1e{p}", len(rows)) for p in range(low, high + 1, step)]
    for i, ((parity, name, value), limit) in enumerate(zip(rows, limits, strict=True)):
        y = html.down(i)
        svg.append(html.label(f"{parity.precision}  {name}", y))
        if limit is not None:
            svg.append(html.limit(at(limit), y))
        svg.append(html.dot(at(value), y, f"{name} {value:.1e}", 5))
    return html.plot(svg, len(rows), "Relative L2 of each tensor in each precision")


def _dice_plot(results: Sequence[Result]) -> str:
    """A row for each precision, a dot for each mask."""
    bounds = [
        [v for v in (r.limits.dice_mean, r.limits.dice_worst) if v is not None] for r in results
    ]
    least = min(v for r, b in zip(results, bounds, strict=True) for v in (*r.mask_dice, *b))
    low = max(v for v in DICE_AXES if v <= least)

    def at(value: float) -> float:
        return html.across((value - low) / (1 - low))

    ticks = [low + (1 - low) * k / 5 for k in range(6)]
    svg = [html.grid(at(tick), f"{tick:.4g}", len(results)) for tick in ticks]
    for i, (result, bound) in enumerate(zip(results, bounds, strict=True)):
        y = html.down(i)
        svg.append(html.label(f"{result.parity.precision}  ({len(result.mask_dice)} masks)", y))
        svg += [html.limit(at(value), y) for value in bound]
        for k, dice in enumerate(result.mask_dice):
            svg.append(html.dot(at(dice), y + html.spread(k), f"{dice:.4f}", 3.5))
    return html.plot(svg, len(results), "Dice of every mask with the reference's, by precision")


def _worst(result: Result, key: Sequence[tuple[str, tuple[int, int, int]]]) -> str:
    worst = result.worst
    assert worst is not None
    colours = "".join(
        f'<span class="key" style="background: rgb{colour}"></span>{escape(meaning)}'
        for meaning, colour in key
    )
    caption = f"{result.parity.precision}: {worst.case}, {worst.prompt}, Dice {worst.dice:.4f}"
    images = "".join(f'<img alt="" src="{_data_uri(picture)}">' for picture in worst.pictures)
    return (
        f'<figure><div class="pair">{images}</div>'
        f"<figcaption>{escape(caption)}.{colours}</figcaption></figure>"
    )


def _data_uri(picture: NDArray[np.uint8]) -> str:
    image, stream = PIL.Image.fromarray(picture), io.BytesIO()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
