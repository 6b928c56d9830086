"""Callables that long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

OnStep = Callable[[str], None]
"""Called with the name of a step when it begins."""
OnCount = Callable[[int, int], None]
"""Called with how much of a step is done and how much there is: images, runs or percent."""
