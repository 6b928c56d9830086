"""A bundle that one command is changing → a refusal for every other one that would change it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medsa_deploy.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


@contextmanager
def changing(bundle: Path) -> Iterator[None]:
    """Keep others from changing a bundle's folder during the block; reading it stays possible.

    The lock is on the folder itself, ends with the process, and leaves no file. UsageError if
    another command holds it. Some network file systems have no such locks: there it is left out.

    >>> with changing(bundle):
    ...     save_manifest(manifest, bundle)
    """
    if fcntl is None or not os.path.isdir(bundle):
        yield
        return
    descriptor = os.open(bundle, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UsageError(
                f"{bundle} is being changed by another command: try again when it has ended"
            ) from e
        except OSError as e:
            logger.info("%s cannot be locked (%s)", bundle, e.strerror)
        yield
    finally:
        os.close(descriptor)
