"""What a checkpoint file holds → its weights by the network's own key names.

People save state dicts under many keys (`state_dict`, `model`, `ema`, `module`…), beside metadata,
as whole modules, and with names that a wrapper has prefixed (`module.`, `_orig_mod.`, `model.`).
Weights are recognised by their key names: where two readings are possible, none is chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medsa_deploy.errors import CheckpointError

from .families import registry
from .pickles import StandIn

LEVELS = 3
"""How deep weights may be nested: `{"checkpoint": {"model": {"state_dict": {…}}}}`."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights that were found in a file."""

    entries: dict[str, Any]
    """Key without its prefix → tensor, or another entry that the caller refuses."""
    location: str
    """Keys of the containers around them, joined by dots; empty for the file's own dictionary."""
    prefix: str
    """What was removed from the keys: `module.`; empty for nothing."""
    left_out: int
    """Tensors beside those under the prefix."""


def find_weights(data: Any, *, location: str | None = None, prefix: str | None = None) -> Weights:
    """The one state dict in a file, under the one prefix that makes its keys a network's.

    `location`: a candidate's, where there are several. `prefix`: likewise, of its keys.
    CheckpointError where there is no candidate, or where several are left to choose from.

    >>> import torch
    >>> modules = ("image_encoder", "prompt_encoder", "mask_decoder")
    >>> state = {f"module.{module}.weight": torch.zeros(1) for module in modules}
    >>> find_weights({"epoch": 3, "state_dict": state}).prefix
    'module.'
    """
    candidates = dict(_candidates(data))
    chosen = _chosen_location(candidates, location, data)
    entries = candidates[chosen]
    removed = _chosen_prefix(entries, prefix)
    inside = {
        key.removeprefix(removed): value
        for key, value in entries.items()
        if key.startswith(removed)
    }
    return Weights(
        entries=inside,
        location=chosen,
        prefix=removed,
        left_out=sum(isinstance(value, Tensor) for value in entries.values())
        - sum(isinstance(value, Tensor) for value in inside.values()),
    )


def state_of_module(module: StandIn) -> dict[str, Any]:
    """Parameters and persistent buffers of a pickled `nn.Module`, by their dotted names."""
    state: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", module)]
    visited: set[int] = set()
    while pending:
        name, part = pending.pop()
        if not isinstance(part, StandIn) or id(part) in visited:
            continue
        visited.add(id(part))
        passing = part.state.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            tensors = part.state.get(kind)
            for key, value in tensors.items() if isinstance(tensors, dict) else ():
                if value is not None and not (isinstance(passing, set) and key in passing):
                    state[f"{name}{key}"] = value
        children = part.state.get("_modules")
        for key, child in reversed(children.items()) if isinstance(children, dict) else ():
            pending.append((f"{name}{key}.", child))
    return state


def _candidates(data: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(location, state dict) of everything that may be a network's weights."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), data)]
    visited: set[int] = set()
    while pending:
        location, part = pending.pop(0)
        if id(part) in visited:
            continue
        visited.add(id(part))
        entries = state_of_module(part) if isinstance(part, StandIn) else part
        if not isinstance(entries, dict):
            continue
        if _is_network(entries):
            yield ".".join(location), {k: v for k, v in entries.items() if _is_weight(k, v)}
        elif len(location) < LEVELS and isinstance(part, dict):
            pending += [((*location, key), v) for key, v in part.items() if isinstance(key, str)]


def _modules() -> list[set[str]]:
    """For each family, the modules that a whole network has; a file of adapters may lack some."""
    return [{f"{stem.partition('.')[0]}." for stem in family.stems} for family in registry.FAMILIES]


def _is_network(entries: Mapping[Any, Any]) -> bool:
    """Whether a dictionary has tensors under names of a network's modules."""
    return any(
        isinstance(key, str) and isinstance(value, Tensor) and any(_prefixes(key))
        for key, value in entries.items()
    )


def _is_weight(key: Any, value: Any) -> bool:
    """Whether an entry belongs to a state dict, and not to the metadata beside it."""
    return isinstance(key, str) and (isinstance(value, Tensor) or any(_prefixes(key)))


def _prefixes(key: str) -> Iterator[tuple[str]]:
    """What may stand before the network's own name in a key; in a tuple, since it may be empty."""
    for module in {module for family in _modules() for module in family}:
        start = f".{key}".find(f".{module}")
        if start >= 0:
            yield (key[:start],)


def _chosen_location(
    candidates: Mapping[str, Mapping[str, Any]], location: str | None, data: Any
) -> str:
    """Where the weights are; CheckpointError unless that is certain."""
    if location is not None:
        if location not in candidates:
            raise CheckpointError(
                f"there are no weights under {location!r}; found: {_listed(candidates) or 'none'}"
            )
        return location
    if not candidates:
        kind = data.name if isinstance(data, StandIn) else type(data).__name__
        keys = [key for key in data if isinstance(key, str)] if isinstance(data, dict) else []
        shown = f" with {', '.join(repr(key[:40])[1:-1] for key in keys[:6])}" if keys else ""
        raise CheckpointError(
            f"it holds no weights of a SAM: found a {kind[:60]}{shown}, expected keys under "
            f"{', '.join(sorted({module for family in _modules() for module in family}))}"
        )
    if len(candidates) > 1:
        raise CheckpointError(
            f"it holds several sets of weights: {_listed(candidates)}: choose one with --weights"
        )
    return next(iter(candidates))


def _listed(candidates: Mapping[str, Mapping[str, Any]]) -> str:
    """`state_dict (314 tensors), ema.model (314 tensors)`."""
    return ", ".join(
        f"{location or 'the file itself'} "
        f"({sum(isinstance(value, Tensor) for value in entries.values())} tensors)"
        for location, entries in candidates.items()
    )


def _chosen_prefix(entries: Mapping[str, Any], prefix: str | None) -> str:
    """What to remove from the keys; CheckpointError unless that is certain.

    A prefix that makes a whole network goes before those that make a part of one.
    """
    modules: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for key in entries:
        for (before,) in _prefixes(key):
            modules.setdefault(before, set()).add(f"{key[len(before) :].partition('.')[0]}.")
            counts[before] += 1
    if prefix is not None:
        if prefix not in modules:
            raise CheckpointError(
                f"no key of a network begins with {prefix!r}; found: {_counted(counts)}"
            )
        return prefix
    complete = [
        before
        for before, present in modules.items()
        if any(family <= present for family in _modules())
    ]
    possible = complete or list(modules)
    if len(possible) > 1:
        choices = _counted(Counter({before: counts[before] for before in possible}))
        raise CheckpointError(
            f"its keys are those of several networks: {choices}: choose one with --prefix"
        )
    return possible[0]


def _counted(counts: Mapping[str, int]) -> str:
    """`student. (314 keys), teacher. (314 keys)`."""
    return ", ".join(f"{prefix or 'no prefix'} ({n} keys)" for prefix, n in counts.items())
