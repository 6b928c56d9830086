"""Prompts of slices → the prompt sets of each chunk of slices, in the order they are decoded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medsa_deploy.transforms import Prompt

from .chunk_encoder import ChunkEncoder
from .structures import SlicePrompts, check_foreground, has_foreground, shared_prompt

if TYPE_CHECKING:
    from medsa_deploy.runtime.session import Session

Work = dict[int, dict[int, dict[int, Prompt]]]
"""Chunk → slice → structure → its prompt set."""


def prompted_chunks(
    prompts: Sequence[SlicePrompts], encoder: ChunkEncoder, session: Session
) -> Work:
    """The prompt sets, chunk by chunk.

    If prompts are for a whole chunk, they segment all of its slices, or if a structure has boxes,
    only the slices of the boxes. If chunks overlap, background clicks without foreground are left
    to a chunk that has both.
    """
    by_chunk = encoder.size > 1 and session.conventions.prompt_scope == "chunk"
    work: Work = defaultdict(lambda: defaultdict(dict))
    with_foreground = [
        {start for i in of_slices if has_foreground(of_slices[i]) for start in encoder.holding(i)}
        for of_slices in prompts
    ]
    for start in encoder.starts:
        slices = sorted(encoder.slices(start))
        for structure, of_slices in enumerate(prompts):
            in_chunk = {index: of_slices[index] for index in slices if index in of_slices}
            if by_chunk and in_chunk:
                if start not in with_foreground[structure] and all(
                    with_foreground[structure] & set(encoder.holding(index)) for index in in_chunk
                ):
                    continue
                boxed = any(prompt.box is not None for prompt in of_slices.values())
                shared = shared_prompt(in_chunk.values())
                check_foreground(shared, f"the chunk of slices {slices[0]}…{slices[-1]}")
                in_chunk = dict.fromkeys(in_chunk if boxed else slices, shared)
            for index, prompt in in_chunk.items():
                check_foreground(prompt, f"slice {index}")
                work[start][index][structure] = prompt
    return work


def nearest_first(work: Work, near: int | None) -> Work:
    """The same work, chunks and their slices by their distance from slice `near`.

    >>> list(nearest_first({0: {}, 4: {}, 8: {}}, 9))
    [8, 4, 0]
    """
    if near is None:
        return work

    def slices(start: int) -> list[int]:
        return sorted(work[start], key=lambda index: (abs(index - near), index))

    def distance(start: int) -> tuple[int, int]:
        return min((abs(index - near) for index in work[start]), default=abs(start - near)), start

    return {
        start: {index: work[start][index] for index in slices(start)}
        for start in sorted(work, key=distance)
    }
