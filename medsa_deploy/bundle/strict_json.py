"""Parsed JSON → frozen dataclasses, strictly: BundleError says which field is wrong and how."""

from __future__ import annotations

import dataclasses
import reprlib
import sys
import types
import typing
from typing import Any, Literal, TypeVar

from medsa_deploy.errors import BundleError

T = TypeVar("T")


def decode(cls: type[T], data: object, place: str) -> T:
    """An instance of the dataclass `cls` from parsed JSON; messages start with `place`.

    BundleError if a field is unknown or missing, or its value does not fit its annotation.

    >>> @dataclasses.dataclass
    ... class Box:
    ...     sides: tuple[int, int]
    >>> decode(Box, {"sides": [3, 4]}, "box.json")
    Box(sides=(3, 4))
    """
    if not isinstance(data, dict):
        raise BundleError(f"{place} is {reprlib.repr(data)}, expected an object")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        raise BundleError(f"{place} has unknown fields: {', '.join(unknown)}")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(data)):
        raise BundleError(f"{place} lacks fields: {', '.join(missing)}")
    return cls(**{k: _value(hints[k], v, f"{place}: {k}") for k, v in data.items()})


def _value(hint: Any, value: object, place: str) -> Any:
    """`value` converted to the annotation `hint`; BundleError if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), value, place)
    if origin is Literal and value in arguments:
        return value
    if origin in (typing.Union, types.UnionType):
        return _member_of(arguments, value, place)
    if origin is tuple and isinstance(value, list):
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) != len(value):
            raise BundleError(f"{place} has {len(value)} values, expected {len(hints)}")
        return tuple(
            _value(h, v, f"{place}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {k: _value(arguments[1], v, f"{place}: {k}") for k, v in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:
            return float(value)
    if hint in (int, str, bool, types.NoneType) and type(value) is hint:
        return value
    raise BundleError(f"{place} is {reprlib.repr(value)}, expected {_kind(hint)}")


def _member_of(hints: tuple[Any, ...], value: object, place: str) -> Any:
    """`value` converted to the member of a union that has its JSON type."""
    for hint in hints:
        if type(value) in _json_types(hint):
            return _value(hint, value, place)
    expected = " or ".join(_kind(hint) for hint in hints)
    raise BundleError(f"{place} is {reprlib.repr(value)}, expected {expected}")


def _json_types(hint: Any) -> tuple[type, ...]:
    """The types in which the JSON parser returns values of an annotation."""
    if dataclasses.is_dataclass(hint):
        return (dict,)
    origin = typing.get_origin(hint) or hint
    return {tuple: (list,), Literal: (str,), float: (int, float)}.get(origin, (origin,))


def _kind(hint: Any) -> str:
    """An annotation in the words of JSON."""
    if typing.get_origin(hint) is Literal:
        return f"one of: {', '.join(map(str, typing.get_args(hint)))}"
    names = {
        str: "a string",
        int: "an integer",
        float: "a number",
        bool: "true or false",
        list: "a list",
        dict: "an object",
        types.NoneType: "null",
    }
    return names[_json_types(hint)[-1]]
