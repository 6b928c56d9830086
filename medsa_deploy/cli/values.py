"""The text of an option → its value; UsageError for one that cannot be."""

from __future__ import annotations

from math import isfinite
from typing import TypeVar

from medsa_deploy.errors import UsageError
from medsa_deploy.nvidia.engines import AxisRange

T = TypeVar("T", int, float)


def refuse(what: str, **options: object) -> None:
    """UsageError for options that were given, and are for images or volumes only."""
    for name, value in options.items():
        if value not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} is for {what}: leave it out here")


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


def parse_click(values: tuple[float, ...]) -> tuple[float, float, int]:
    """X,Y or X,Y,LABEL."""
    if len(values) not in (2, 3) or values[2:] not in ((), (0,), (1,)):
        text = ",".join(f"{value:g}" for value in values)
        raise UsageError(f"--point {text}: expected X,Y or X,Y,LABEL with label 1 or 0 in an image")
    return values[0], values[1], int(values[2]) if len(values) == 3 else 1


def parse_box(values: tuple[float, ...]) -> tuple[float, float, float, float]:
    """X0,Y0,X1,Y1."""
    if len(values) != 4:
        text = ",".join(f"{value:g}" for value in values)
        raise UsageError(f"--box {text}: expected X0,Y0,X1,Y1 in an image")
    return values[0], values[1], values[2], values[3]


def parse_window(text: str | None) -> tuple[float, float] | None:
    """LOW,HIGH."""
    if text is None:
        return None
    values = parse_numbers(text, float, "--intensity-window")
    if len(values) != 2 or not values[0] < values[1]:
        raise UsageError(f"--intensity-window {text}: expected LOW,HIGH with LOW < HIGH")
    return values[0], values[1]


def parse_range(text: str | None, option: str) -> AxisRange | None:
    """MIN,OPT,MAX."""
    if text is None:
        return None
    values = parse_numbers(text, int, option)
    if len(values) != 3 or not 1 <= values[0] <= values[1] <= values[2]:
        raise UsageError(f"{option} {text}: expected MIN,OPT,MAX with 1 ≤ MIN ≤ OPT ≤ MAX")
    return AxisRange(min=values[0], opt=values[1], max=values[2])


def parse_numbers(text: str, kind: type[T], option: str) -> tuple[T, ...]:
    """Finite numbers between commas."""
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(isfinite, values)):
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} {text}: expected {what} between commas")
    return values
