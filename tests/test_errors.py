"""The tree of exceptions is the one its docstring draws, and its examples run."""

from __future__ import annotations

import doctest
import re

from medsa_deploy import errors

LINE = re.compile(r"^((?:│   |    |├── |└── )*)(\w+Error) +(?:.*exit (\d))?", re.MULTILINE)


def test_the_drawn_tree_is_the_tree_of_classes() -> None:
    drawn: list[tuple[str, str]] = []
    ancestors = ["MedsaError"]
    for branches, name, exit_code in LINE.findall(errors.__doc__ or ""):
        depth = len(branches) // 4
        ancestors[depth:] = [name]
        drawn.append((name, ancestors[depth - 1]))
        if exit_code:
            assert getattr(errors, name).exit_code == int(exit_code)
    values = vars(errors).values()
    classes = [v for v in values if isinstance(v, type) and v.__module__ == errors.__name__]
    bases = [(kind.__name__, kind.__bases__[0].__name__) for kind in classes]
    assert bases == [("MedsaError", "Exception"), *drawn]


def test_examples_run() -> None:
    assert doctest.testmod(errors, raise_on_error=True).attempted == 4
