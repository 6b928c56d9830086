"""Errors of this package ⇄ the text of a server's error.

A server's error is one text. It begins with the name of the class, so that a client raises the same
error.
"""

from __future__ import annotations

import re

from medsa_deploy import errors
from medsa_deploy.errors import MedsaError, MissingDependencyError, one_line

MARK = re.compile(r"\[medsa-deploy (\w+)\] (.*)", re.DOTALL)


def error_text(error: BaseException) -> str:
    """An exception as a text that `error_of` reads.

    >>> error_text(errors.PromptError("the box is empty"))
    '[medsa-deploy PromptError] the box is empty'
    """
    if isinstance(error, MedsaError):
        kind = type(error)
        while getattr(errors, kind.__name__, None) is not kind:  # a room's own error
            kind = kind.__bases__[0]
        return f"[medsa-deploy {kind.__name__}] {error}"
    return (
        f"[medsa-deploy DeviceError] the model failed ({type(error).__name__}): {one_line(error)}"
    )


def error_of(text: str) -> MedsaError | None:
    """The error that a text was written from; None for a text of the server itself.

    >>> error_of("[medsa-deploy PromptError] the box is empty")
    PromptError('the box is empty')
    """
    match = MARK.search(text)
    kind = None if match is None else getattr(errors, match[1], None)
    if match is None or not isinstance(kind, type) or not issubclass(kind, MedsaError):
        return None
    if issubclass(kind, MissingDependencyError):  # its arguments are a library and an extra
        return MedsaError(match[2])
    return kind(match[2])
