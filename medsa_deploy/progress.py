"""The types of callables that report the progress of long work."""

from __future__ import annotations

from collections.abc import Callable

OnStep = Callable[[str], None]
"""Called with the name of a step when it begins."""
OnCount = Callable[[int, int], None]
"""Called with the done and the total number of a step's images, runs or percent."""
