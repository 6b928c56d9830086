"""Texts, tables and plots → one HTML page that needs nothing else.

Style and plots (SVG) are inside, so that a page can be filed or sent; it follows the reader's light
or dark colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

LEFT, RIGHT, ROW, TOP, WIDTH = 215, 20, 34, 30, 760
"""Of a plot, in SVG units: margins, a row's height, the height above the rows, the whole width."""

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
svg .bar { fill: var(--dot); fill-opacity: .55; }
svg .limit { stroke: var(--limit); stroke-width: 2; } svg text.limit { stroke: none;
  fill: var(--limit); font-size: 12px; }
figure { margin: 1rem 0 2rem; } .pair { display: flex; flex-wrap: wrap; gap: .5rem; }
.pair img { flex: 1 1 18rem; min-width: 0; max-width: min(100%, 26rem); height: auto;
  align-self: flex-start; }
figcaption, .note { color: var(--dim); font-size: .9rem; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin: 0 .3em 0 .8em; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page; `parts` are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join([f"<h1>{escape(title)}</h1>", *parts])
        + "\n</body>\n</html>\n"
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 99) -> str:
    """Columns from `numbers` on are figures."""

    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = [' class="number"' if k >= numbers else "" for k in range(len(values))]
        return "".join(
            f"<{tag}{kind}>{escape(v)}</{tag}>" for kind, v in zip(kinds, values, strict=True)
        )

    head = f"<tr>{cells('th', headers)}</tr>" if headers else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'


def note(text: str) -> str:
    """A sentence below a table or a plot."""
    return f'<p class="note">{escape(text)}</p>'


def plot(marks: Sequence[str], rows: int, title: str) -> str:
    """Marks in rows, as SVG."""
    height = TOP + ROW * rows + 8
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img"><title>{escape(title)}</title>'
        f"{''.join(marks)}</svg>"
    )


def across(share: float) -> float:
    """The x of a share of the axis, 0…1."""
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def down(row: float) -> float:
    """The y of the middle of a row, from 0."""
    return TOP + ROW * (row + 0.5)


def grid(x: float, text: str, rows: int) -> str:
    """An upright line through all rows, with its meaning above."""
    bottom = TOP + ROW * rows
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{bottom}"/>'
        f'<text class="dim" x="{x:.1f}" y="{TOP - 12}" text-anchor="middle">{escape(text)}</text>'
    )


def label(text: str, y: float) -> str:
    """The name of a row."""
    return f'<text x="0" y="{y + 4:.1f}">{escape(text)}</text>'


def limit(x: float, y: float) -> str:
    """An upright line in one row."""
    reach = ROW * 0.4
    return (
        f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{y - reach:.1f}" y2="{y + reach:.1f}"/>'
    )


def dot(x: float, y: float, text: str, radius: float) -> str:
    """A dot that shows a text when the pointer is on it."""
    return (
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(text)}</title>'
        "</circle>"
    )


def bar(x: float, y: float, text: str) -> str:
    """A bar from the axis' beginning to `x`, with its value behind it."""
    height = ROW * 0.55
    return (
        f'<rect class="bar" x="{LEFT}" y="{y - height / 2:.1f}" width="{max(x - LEFT, 0.5):.1f}" '
        f'height="{height:.1f}"/><text class="dim" x="{x + 6:.1f}" y="{y + 4:.1f}">'
        f"{escape(text)}</text>"
    )


def spread(k: int) -> float:
    """How far from its row's middle dot `k` goes, so that equal values do not hide each other."""
    return ((k * 0.618) % 1 - 0.5) * ROW * 0.6
