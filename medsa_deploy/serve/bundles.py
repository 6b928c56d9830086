"""Bundles on disk → the bundles that are served: opened once, each with a name."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsa_deploy.images import SegmentationDetails
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.backends.registry import BACKENDS
from medsa_deploy.stages.run.run import SessionOptions, bundle_details

from .refusals import UnknownError


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedBundle:
    """A bundle with its session."""

    name: str
    path: Path
    session: Session
    details: SegmentationDetails
    running: AbstractContextManager[Any]
    """Held while the network runs, if its backend runs one call at a time."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a client needs to know of it."""
        manifest = self.session.manifest
        return {
            "name": self.name,
            "classes": list(self.session.classes),
            "several_classes": manifest.network.outputs != "sam" and len(self.session.classes) > 1,
            "prompts": manifest.conventions.prompts,
            "chunk": manifest.network.chunk,
            "image_size": manifest.network.image_size,
            "intensity_window": manifest.conventions.intensity_window,
            "backend": self.session.backend.name,
            "mask_prompts": manifest.mask_prompt_size is not None,
        }


class ServedBundles:
    """The bundles by their names, in order; a context manager that closes their sessions."""

    def __init__(self, paths: Sequence[Path], options: SessionOptions) -> None:
        """BundleError, and what else `load` raises. Two bundles of one name get numbers."""
        self._opened = ExitStack()
        self._bundles: dict[str, ServedBundle] = {}
        with ExitStack() as opened:
            for path in paths:
                session = opened.enter_context(options.open(path))
                name = self._free_name(path.resolve().stem)
                spec = BACKENDS.get(session.backend.name)
                one_call = spec is None or spec.engines
                self._bundles[name] = ServedBundle(
                    name=name,
                    path=path,
                    session=session,
                    details=bundle_details(path),
                    running=threading.RLock() if one_call else nullcontext(),
                )
            self._opened = opened.pop_all()

    def __enter__(self) -> ServedBundles:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def __iter__(self) -> Iterator[ServedBundle]:
        return iter(self._bundles.values())

    @property
    def first(self) -> ServedBundle:
        """The bundle that is used unless another is named."""
        return next(iter(self._bundles.values()))

    def find(self, name: str | None) -> ServedBundle:
        """The bundle of a name, or the first; UnknownError."""
        if name is None:
            return self.first
        if name not in self._bundles:
            raise UnknownError(f"there is no bundle {name!r}: {', '.join(self._bundles)}")
        return self._bundles[name]

    def _free_name(self, stem: str) -> str:
        name, number = stem, 2
        while name in self._bundles:
            name, number = f"{stem}-{number}", number + 1
        return name
