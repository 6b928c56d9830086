"""Parity figures and their worst masks → one HTML page that needs nothing else.

Style, plots (SVG) and pictures (PNG as data URIs) are inside, so that it can be filed or sent; it
follows the reader's light or dark colours.
"""

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

from .manifest import Parity
from .verify import FLOAT32_LIMITS, LIMITS, failures

PICTURE_SIDE = 1024
"""Pixels; larger pictures are scaled down."""
LEFT, RIGHT, ROW, TOP, WIDTH = 215, 20, 34, 30, 760
"""Of a plot, in SVG units: margins, a row's height, the height above the rows, the whole width."""
DICE_AXES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
"""Where an axis of Dice may begin."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6570; --line: #d5dade; --page: #fff;
  --dot: #0072b2; --limit: #c2410c; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --dim: #9aa5b0; --line: #3a4149;
  --page: #15181c; --dot: #56b4e9; --limit: #fb923c; --good: #4ac26b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--limit); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--dim); } td.number, th.number { text-align: right; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .dim { fill: var(--dim); font-size: 12px; }
svg .grid { stroke: var(--line); } svg .dot { fill: var(--dot); fill-opacity: .7; }
svg .limit { stroke: var(--limit); stroke-width: 2; } svg text.limit { stroke: none;
  fill: var(--limit); font-size: 12px; }
figure { margin: 1rem 0 2rem; } .pair { display: flex; flex-wrap: wrap; gap: .5rem; }
.pair img { flex: 1 1 18rem; min-width: 0; max-width: min(100%, 26rem); height: auto;
  align-self: flex-start; }
figcaption, .note { color: var(--dim); font-size: .9rem; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin: 0 .3em 0 .8em; }
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class WorstMask:
    """The mask of one precision that differs most from the reference's."""

    case: str
    prompt: str
    """What it was asked for with, in words."""
    dice: float
    pictures: Sequence[NDArray[np.uint8]]
    """(H, W, 3): the image with both masks, and a part of it enlarged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One precision in one backend."""

    parity: Parity
    mask_dice: tuple[float, ...]
    """Of every mask of every case."""
    worst: WorstMask


def page(
    title: str,
    facts: Mapping[str, str],
    results: Sequence[Result],
    *,
    engines: Sequence[tuple[str, str]] = (),
    key: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> str:
    """The whole page. `engines`: (name, state). `key`: what the pictures' colours mean."""
    problems = [(r.parity, problem) for r in results for problem in failures(r.parity)]
    verdict = "".join(f"<li>{escape(p.precision)}: {escape(text)}</li>" for p, text in problems)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict bad">Not verified</p><ul>{verdict}</ul>'
        if problems
        else '<p class="verdict good">Verified: every precision is within its limits</p>',
        _table((), [(name, value) for name, value in facts.items()]),
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
        parts += ["<h2>Engines</h2>", _table(("engine", "state"), engines)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


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
            which = f"{parity.precision} in {parity.backend}" if i == 0 else ""
            figures = (f"{tensor.relative_l2:.1e}", f"{tensor.max_abs:.1e}")
            rows.append((which, name, *figures, *(common if i == 0 else ("",) * 4)))
    headers = ("precision", "tensor", "relative L2", "max abs", "mask pixels differing")
    return _table((*headers, "Dice mean", "worst", "NaN, infinite"), rows, numbers=2)


def _l2_plot(results: Sequence[Result]) -> str:
    """A row for each tensor of each precision; decades as grid."""
    rows = [
        (r.parity, name, t.relative_l2) for r in results for name, t in r.parity.tensors.items()
    ]
    limits = [LIMITS.get(parity.precision, FLOAT32_LIMITS).relative_l2 for parity, *_ in rows]
    shown = [v for v in (*(v for *_, v in rows), *limits) if v and math.isfinite(v)] or [1.0]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    high = max(high, low + 1)

    def at(value: float) -> float:
        """What is 0 stands at the left edge, what is infinite at the right."""
        power = math.log10(value) if 0 < value < math.inf else low if value == 0 else high
        return _x((power - low) / (high - low))

    step = max(1, (high - low) // 8)
    svg = [_grid(at(10.0**p), f"1e{p}", len(rows)) for p in range(low, high + 1, step)]
    for i, ((parity, name, value), limit) in enumerate(zip(rows, limits, strict=True)):
        y = TOP + ROW * (i + 0.5)
        svg.append(_label(f"{parity.precision}  {name}", y))
        if limit is not None:
            svg.append(_limit(at(limit), y))
        svg.append(_dot(at(value), y, f"{name} {value:.1e}", 5))
    return _svg(svg, len(rows), "Relative L2 of each tensor in each precision")


def _dice_plot(results: Sequence[Result]) -> str:
    """A row for each precision, a dot for each mask."""
    limits = [LIMITS.get(result.parity.precision, FLOAT32_LIMITS) for result in results]
    bounds = [[v for v in (one.dice_mean, one.dice_worst) if v is not None] for one in limits]
    least = min(v for r, b in zip(results, bounds, strict=True) for v in (*r.mask_dice, *b))
    low = max(v for v in DICE_AXES if v <= least)

    def at(value: float) -> float:
        return _x((value - low) / (1 - low))

    ticks = [low + (1 - low) * k / 5 for k in range(6)]
    svg = [_grid(at(tick), f"{tick:.4g}", len(results)) for tick in ticks]
    for i, (result, bound) in enumerate(zip(results, bounds, strict=True)):
        y = TOP + ROW * (i + 0.5)
        svg.append(_label(f"{result.parity.precision}  ({len(result.mask_dice)} masks)", y))
        svg += [_limit(at(value), y) for value in bound]
        for k, dice in enumerate(result.mask_dice):
            # Spread over the row, or equal values would hide each other.
            spread = ((k * 0.618) % 1 - 0.5) * ROW * 0.6
            svg.append(_dot(at(dice), y + spread, f"{dice:.4f}", 3.5))
    return _svg(svg, len(results), "Dice of every mask with the reference's, by precision")


def _worst(result: Result, key: Sequence[tuple[str, tuple[int, int, int]]]) -> str:
    worst = result.worst
    colours = "".join(
        f'<span class="key" style="background: rgb{colour}"></span>{escape(meaning)}'
        for meaning, colour in key
    )
    said = f"{result.parity.precision}: {worst.case}, {worst.prompt}, Dice {worst.dice:.4f}"
    images = "".join(f'<img alt="" src="{_data_uri(picture)}">' for picture in worst.pictures)
    return (
        f'<figure><div class="pair">{images}</div>'
        f"<figcaption>{escape(said)}.{colours}</figcaption></figure>"
    )


def _data_uri(picture: NDArray[np.uint8]) -> str:
    image, stream = PIL.Image.fromarray(picture), io.BytesIO()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 99) -> str:
    """Columns from `numbers` on are figures."""

    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = [' class="number"' if k >= numbers else "" for k in range(len(values))]
        return "".join(
            f"<{tag}{kind}>{escape(v)}</{tag}>" for kind, v in zip(kinds, values, strict=True)
        )

    head = f"<tr>{cells('th', headers)}</tr>" if headers else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _svg(parts: Sequence[str], rows: int, title: str) -> str:
    height = TOP + ROW * rows + 8
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _grid(x: float, text: str, rows: int) -> str:
    bottom = TOP + ROW * rows
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{bottom}"/>'
        f'<text class="dim" x="{x:.1f}" y="{TOP - 12}" text-anchor="middle">{text}</text>'
    )


def _label(text: str, y: float) -> str:
    return f'<text x="0" y="{y + 4:.1f}">{escape(text)}</text>'


def _limit(x: float, y: float) -> str:
    reach = ROW * 0.4
    return (
        f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{y - reach:.1f}" y2="{y + reach:.1f}"/>'
    )


def _dot(x: float, y: float, text: str, radius: float) -> str:
    return (
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(text)}</title>'
        "</circle>"
    )
