"""An embedding and prompt sets → decoder outputs, with the masks that a GPU makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Manifest
from medsa_deploy.errors import PromptError, UsageError
from medsa_deploy.transforms import Frame, Prompt

from .backends.interface import (
    Array,
    Backend,
    Decoded,
    DeviceMasks,
    ImagePart,
    MakesMasks,
    MaskRequest,
    as_split_decoder,
    check_finite,
)

SETS_AT_ONCE = 8
"""Prompt sets that are decoded together: at an image size of 1024 each takes the decoder 34 MB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """An encoded image: all that prompts need of it."""

    values: Array
    """(1, 256, g, g) float32; on a GPU a `cuda.DeviceArray`, which belongs to its session."""
    image_part: ImagePart | None = None
    """What clicks need of `values` where the decoder is split; None has `decoder.onnx` run whole.
    """
    frame: Frame
    """How the image lies in the network's frame."""
    intensity_window: tuple[float, float] | None
    """Intensities that were mapped to black and white; None for display values taken as they are,
    for the file's own rendering, and for min–max profiles."""
    timings_ms: dict[str, float]
    """`preprocess`, `encode`; a slice's share of its chunk's. The decoder's image part, which runs
    here and not at the first click, counts as `encode`, as does the preprocessing of a GPU's frame.
    """


def decode(
    backend: Backend, manifest: Manifest, embedding: Embedding, prompts: Sequence[Prompt]
) -> tuple[Array, Array]:
    """Decoder outputs of P prompt sets, in their order: (P, K, 4g, 4g) and (P, K)."""
    return decode_masks(backend, manifest, embedding, prompts, None)[:2]


def decode_masks(
    backend: Backend,
    manifest: Manifest,
    embedding: Embedding,
    prompts: Sequence[Prompt],
    wanted: MaskRequest | None,
) -> Decoded:
    """See `decode`; and the masks of all prompt sets, if the backend makes them on a GPU.

    Sets with equally many tokens, and alike in having a mask, go through the decoder together, up
    to `SETS_AT_ONCE`: through its click part, where there is one and they have none.
    """
    network = manifest.network
    side = 4 * network.embedding_size
    _check_embedding(embedding, manifest)
    if not prompts or not all(map(_says_anything, prompts)):
        raise PromptError("a prompt set is empty: give points, a box or a mask")
    on_device = wanted is not None and wanted.on_device
    groups = _grouped(manifest, embedding, prompts, len(prompts) if on_device else SETS_AT_ONCE)
    if on_device and len(groups) > 1:
        raise UsageError(
            "prompt sets of different lengths are decoded one after another: with on_device give "
            "sets with equally many points"
        )
    logits = np.empty((len(prompts), network.masks, side, side), np.float32)
    scores = np.empty((len(prompts), network.masks), np.float32)
    made = []
    for group in groups:
        found = _decode_group(backend, embedding, group, wanted)
        logits[group.members], scores[group.members] = found[:2]
        made.append(found[2])
    check_finite(backend, "masks", logits, scores)
    return logits, scores, _in_order(groups, made)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Prompt sets that go through the decoder together."""

    members: list[int]
    """Their places among all."""
    coords: Array
    labels: Array
    mask: Array | None


def _grouped(
    manifest: Manifest, embedding: Embedding, prompts: Sequence[Prompt], most: int
) -> list[_Group]:
    """Prompt sets, as the decoder takes them, at most so many at once."""
    size = manifest.network.mask_prompt_size
    tokens = [
        transforms.network_prompt(one, embedding.frame, manifest.conventions, mask_size=size)
        for one in prompts
    ]
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, (_, labels) in enumerate(tokens):
        groups.setdefault((len(labels), prompts[i].mask is not None), []).append(i)
    found = []
    parts = [
        (has_mask, part.tolist())
        for (_, has_mask), members in groups.items()
        for part in np.array_split(members, -(-len(members) // most))
    ]
    for has_mask, members in parts:
        masks = [mask for i in members if (mask := prompts[i].mask) is not None]
        found.append(
            _Group(
                members=members,
                coords=np.stack([tokens[i][0] for i in members]),
                labels=np.stack([tokens[i][1] for i in members]),
                mask=np.stack(masks)[:, None] if has_mask else None,
            )
        )
    return found


def _decode_group(
    backend: Backend, embedding: Embedding, group: _Group, wanted: MaskRequest | None
) -> Decoded:
    """Run the decoder once."""
    split, part = as_split_decoder(backend), embedding.image_part
    if split is not None and part is not None and group.mask is None:
        return *split.decode_click(part, group.coords, group.labels), None
    given = embedding.values, group.coords, group.labels, group.mask
    if wanted is not None and isinstance(backend, MakesMasks):
        return backend.decode_masks(*given, wanted)
    return *backend.decode(*given), None


def _in_order(groups: Sequence[_Group], made: Sequence[DeviceMasks | None]) -> DeviceMasks | None:
    """Masks in the order of their prompt sets; None unless a GPU made all of them."""
    found = [one for one in made if one is not None]
    if len(found) < len(groups):
        return None
    if len(found) == 1:
        return found[0]
    order = np.argsort(np.concatenate([group.members for group in groups]))
    masks, tally = (
        np.concatenate([getattr(one, name) for one in found])[order] for name in ("masks", "tally")
    )
    return DeviceMasks(masks=masks, tally=tally)


def _says_anything(prompt: Prompt) -> bool:
    """Whether a prompt set holds more than the padding point that every set without a box gets."""
    return len(prompt.points) > 0 or prompt.box is not None or prompt.mask is not None


def _check_embedding(embedding: Embedding, manifest: Manifest) -> None:
    """UsageError for an embedding that cannot be this network's."""
    network = manifest.network
    (tensor,) = manifest.graphs["encoder"].outputs
    expected = (1, *tensor.shape[1:])
    found, size = embedding.values.shape, embedding.frame.network_size
    if found != expected or size != network.image_size:
        raise UsageError(
            f"the embedding has shape {found} and frame {size}, this network's have {expected} and "
            f"{network.image_size}: encode the image with this session"
        )
