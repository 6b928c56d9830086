"""The command line: parse, call one function of `stages`, print its dataclass."""

try:
    from .app import main
except KeyboardInterrupt:  # the imports take a moment, and `main` is not there yet
    raise SystemExit(130) from None

__all__ = ["main"]
