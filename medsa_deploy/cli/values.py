"""The text of an option → its value; UsageError for text that has no value."""

from __future__ import annotations

from math import isfinite
from typing import TypeVar

from medsa_deploy.errors import UsageError
from medsa_deploy.images.class_codes import parse_colour
from medsa_deploy.images.label_colours import Rgb
from medsa_deploy.nvidia.engines import AxisRange
from medsa_deploy.stages.run.dicomweb import WebSeries
from medsa_deploy.transforms.intensities import IntensityWindow

T = TypeVar("T", int, float)


def parse_depth_chunk(text: str | None) -> int | str | None:
    """D or `none`."""
    if text is None or text == "none":
        return text
    values = parse_numbers(text, int, "--depth-chunk")
    if len(values) != 1:
        raise UsageError(f"--depth-chunk {text}: expected a number of slices, or none")
    return values[0]


def parse_names(text: str | None) -> tuple[str, ...]:
    """A,B,…"""
    return () if text is None else tuple(name.strip() for name in text.split(","))


def parse_colours(text: str | None) -> dict[str, Rgb]:
    """NAME=RRGGBB,…; a # may lead."""
    colours = {}
    for part in () if text is None else text.split(","):
        name, _, colour = part.rpartition("=")
        if not name.strip():
            raise UsageError(f"--colors {part!r}: expected NAME=RRGGBB")
        colours[name.strip()] = parse_colour(colour, f"--colors {name.strip()}")
    return colours


def parse_web_series(url: str | None, study: str | None, series: str | None) -> WebSeries:
    """The values of --from-web, --study and --series."""
    if url is None or study is None:
        raise UsageError("--from-web URL and --study UID belong together: give both")
    return WebSeries(url=url, study=study, series=series)


def parse_window(text: str | None) -> tuple[float, float] | None:
    """LOW,HIGH."""
    if text is None:
        return None
    values = parse_numbers(text, float, "--intensity-window")
    if len(values) != 2 or not values[0] < values[1]:
        raise UsageError(f"--intensity-window {text}: expected LOW,HIGH with LOW < HIGH")
    return values[0], values[1]


def parse_measured_window(text: str | None) -> IntensityWindow:
    """LOW,HIGH, or `auto` for a window that is measured in each image or volume."""
    return "auto" if text == "auto" else parse_window(text)


def parse_range(text: str | None, option: str, *, least: int = 1) -> AxisRange | None:
    """MIN,OPT,MAX, of at least `least`."""
    if text is None:
        return None
    values = parse_numbers(text, int, option)
    if len(values) != 3 or not least <= values[0] <= values[1] <= values[2]:
        raise UsageError(f"{option} {text}: expected MIN,OPT,MAX with {least} ≤ MIN ≤ OPT ≤ MAX")
    return AxisRange(min=values[0], opt=values[1], max=values[2])


def parse_rows(texts: list[str] | None, option: str) -> tuple[tuple[float, ...], ...]:
    """The numbers of each use of an option that may be repeated."""
    return tuple(parse_numbers(text, float, option) for text in texts or ())


def parse_numbers(text: str, kind: type[T], option: str) -> tuple[T, ...]:
    """Finite numbers between commas."""
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(isfinite, values)):
        numbers = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} {text}: expected {numbers} between commas")
    return values
