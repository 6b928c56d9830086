"""A session, run again and again → how long its stages take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from . import verify
from .images import Image
from .manifest import Network
from .runtime import Session
from .transforms import Prompt

STAGES = ("preprocess", "encode", "decode", "postprocess", "first click", "next click")
"""`first click`: an image becomes a mask, all four stages. `next click`: the last two."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What is timed: one click on an image, or on one slice of a chunk."""

    images: Sequence[Image]
    """One, or the slices of a chunk."""
    prompt: Prompt


def seeded_work(network: Network) -> Work:
    """Images of the network's own size, made of nothing but a seed, and a click."""
    case = verify.seeded_case(network.image_size, network.mask_prompt_size, 1, network.chunk)
    return Work(images=case.images, prompt=case.prompts[0])


def run_once(session: Session, work: Work) -> dict[str, float]:
    """Milliseconds of each stage, of all the work's images together."""
    start = perf_counter()
    embeddings = session.encode_slices(work.images)
    encoded = perf_counter()
    prediction = session.segment_sets(embeddings[0], [work.prompt])
    end = perf_counter()
    encoding = embeddings[0].timings_ms
    return {
        **{name: ms * len(embeddings) for name, ms in encoding.items()},
        **prediction.timings_ms,
        "first click": 1e3 * (end - start),
        "next click": 1e3 * (end - encoded),
    }
