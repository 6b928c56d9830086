"""Why a request is refused → its HTTP status, as errors."""

from __future__ import annotations

from medsa_deploy.errors import DeviceMemoryError, MedsaError, MissingDependencyError


class RefusedError(MedsaError):
    """A request that is refused."""

    status = 400
    retry_after: int | None = None
    """Seconds after which it may be accepted."""


class BusyError(RefusedError):
    """Too much work, too many users, or the server is stopping."""

    status = 503

    def __init__(self, message: str, *, retry_after: int = 2) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LeaseError(RefusedError):
    """A lease that has expired, or never was."""

    status = 410


class UnknownError(RefusedError):
    """A bundle, a file or a route that does not exist."""

    status = 404


class UnsupportedError(RefusedError):
    """A request of a protocol that this server does not fulfil."""

    status = 501


class TooLargeError(RefusedError):
    """A body or an image beyond the limits."""

    status = 413


class SlowError(RefusedError):
    """A body that comes too slowly."""

    status = 408


class CancelledError(RefusedError):
    """Work whose answer nobody waits for any more."""

    status = 499


def status_of(error: MedsaError) -> int:
    """The HTTP status of an error: 4xx if the request is wrong, 5xx if the server cannot."""
    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, MissingDependencyError):
        return 501
    if isinstance(error, DeviceMemoryError):
        return 503
    return 422 if error.exit_code == 2 else 500
