"""An embedding and prompt sets → decoder outputs, with the masks that a GPU makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medsa_deploy import transforms
from medsa_deploy.bundle.manifest import Manifest, PromptNeed
from medsa_deploy.errors import PromptError, UsageError
from medsa_deploy.transforms import Frame, Prompt

from .backends.interface import (
    Array,
    Backend,
    Decoded,
    DeviceMasks,
    HostOrDevice,
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
    """An encoded image: all that prompts need of it.

    >>> from medsa_deploy import load, read_image
    >>> with load("liver.medsa") as session:
    ...     embedding = session.encode(read_image("slice.png"))
    >>> embedding.values.shape, embedding.frame.image_size
    ((1, 256, 16, 16), (240, 320))
    """

    values: HostOrDevice
    """(1, 256, g, g) float32; on a GPU a `DeviceArray`, which belongs to its session."""
    image_part: ImagePart | None = None
    """The inputs that the split decoder's clicks need; with None, `decoder.onnx` runs whole."""
    frame: Frame
    """How the image lies in the network's frame."""
    intensity_window: tuple[float, float] | None
    """Intensities that were mapped to black and white. None for display values taken as they are,
    for the file's own rendering, and for preprocessing from minimum to maximum."""
    timings_ms: dict[str, float]
    """`preprocess` and `encode`; of a slice, its share of its chunk's. `encode` includes the
    decoder's image part, which runs once per image, and the preprocessing of a frame on a GPU."""


def decode_masks(
    backend: Backend,
    manifest: Manifest,
    embedding: Embedding,
    prompts: Sequence[Prompt],
    request: MaskRequest | None,
) -> Decoded:
    """Decoder outputs of P prompt sets, in their order: (P, K, 4g, 4g) and (P, K) float32.

    With a `request` also the masks of all prompt sets, if the backend makes them on a GPU. Sets
    with equally many tokens, all with a mask or all without, go through the decoder together, up to
    `SETS_AT_ONCE`. Without a mask they run the split decoder's click part, if there is one.
    """
    network = manifest.network
    side = 4 * network.embedding_size
    _check_embedding(embedding, manifest)
    _check_prompted(manifest.conventions.prompts, prompts)
    on_device = request is not None and request.on_device
    groups = _grouped(manifest, embedding, prompts, len(prompts) if on_device else SETS_AT_ONCE)
    if on_device and len(groups) > 1:
        raise UsageError(
            "prompt sets of different lengths are decoded one after another: with on_device give "
            "sets with equally many points"
        )
    logits = np.empty((len(prompts), network.masks, side, side), np.float32)
    scores = np.empty((len(prompts), network.masks), np.float32)
    device_masks = []
    for group in groups:
        decoded = _decode_group(backend, embedding, group, request)
        logits[group.members], scores[group.members] = decoded[:2]
        device_masks.append(decoded[2])
    check_finite(backend, "masks", logits, scores)
    return logits, scores, _in_order(groups, device_masks)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Prompt sets that go through the decoder together."""

    members: list[int]
    """Their places among all sets."""
    coords: Array
    labels: Array
    mask: Array | None


def _grouped(
    manifest: Manifest, embedding: Embedding, prompts: Sequence[Prompt], most: int
) -> list[_Group]:
    """Prompt sets as the decoder takes them, at most `most` at once."""
    size = manifest.mask_prompt_size
    tokens = [
        transforms.network_prompt(prompt, embedding.frame, manifest.conventions, mask_size=size)
        for prompt in prompts
    ]
    alike: dict[tuple[int, bool], list[int]] = {}
    for i, (_, labels) in enumerate(tokens):
        alike.setdefault((len(labels), prompts[i].mask is not None), []).append(i)
    batches = [
        (has_mask, batch.tolist())
        for (_, has_mask), members in alike.items()
        for batch in np.array_split(members, -(-len(members) // most))
    ]
    groups = []
    for has_mask, members in batches:
        masks = [mask for i in members if (mask := prompts[i].mask) is not None]
        groups.append(
            _Group(
                members=members,
                coords=np.stack([tokens[i][0] for i in members]),
                labels=np.stack([tokens[i][1] for i in members]),
                mask=np.stack(masks)[:, None] if has_mask else None,
            )
        )
    return groups


def _decode_group(
    backend: Backend, embedding: Embedding, group: _Group, request: MaskRequest | None
) -> Decoded:
    """Run the decoder once."""
    split, part = as_split_decoder(backend), embedding.image_part
    if split is not None and part is not None and group.mask is None:
        return *split.decode_click(part, group.coords, group.labels), None
    inputs = embedding.values, group.coords, group.labels, group.mask
    if request is not None and isinstance(backend, MakesMasks):
        return backend.decode_masks(*inputs, request)
    return *backend.decode(*inputs), None


def _in_order(
    groups: Sequence[_Group], device_masks: Sequence[DeviceMasks | None]
) -> DeviceMasks | None:
    """Masks in the order of their prompt sets; None unless a GPU made all of them."""
    parts = [part for part in device_masks if part is not None]
    if len(parts) < len(groups):
        return None
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate([group.members for group in groups]))
    masks, tally = (
        np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("masks", "tally")
    )
    return DeviceMasks(masks=masks, tally=tally)


def _check_prompted(need: PromptNeed, prompts: Sequence[Prompt]) -> None:
    """PromptError for empty sets of a network that needs prompts, or prompts if it takes none."""
    prompted = [
        len(prompt.points) > 0 or prompt.box is not None or prompt.mask is not None
        for prompt in prompts
    ]
    if need == "none" and any(prompted):
        raise PromptError(
            "this network segments without prompts: leave points, boxes and masks out"
        )
    if not prompts or (need == "required" and not all(prompted)):
        raise PromptError(
            "a prompt set is empty: give points, a box or a mask. Only networks trained without "
            "prompts (SAMed, finetune-SAM, or exported with --no-prompts) segment without"
        )


def _check_embedding(embedding: Embedding, manifest: Manifest) -> None:
    """UsageError for an embedding that cannot be this network's."""
    network = manifest.network
    (tensor,) = manifest.graphs["encoder"].outputs
    expected = (1, *tensor.shape[1:])
    shape, size = embedding.values.shape, embedding.frame.network_size
    if shape != expected or size != network.image_size:
        raise UsageError(
            f"the embedding has shape {shape} and frame {size}, this network's have {expected} and "
            f"{network.image_size}: encode the image with this session"
        )
