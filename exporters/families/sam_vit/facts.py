"""A SAM ViT's keys and shapes → facts: heads, windows, global blocks, image size."""

from __future__ import annotations

from medsa_deploy.bundle.manifest import FamilyFacts
from medsa_deploy.errors import CheckpointError, UsageError
from medsa_deploy.exporters.guesses import Guess, Overrides, image_size_guess, whole_patches
from medsa_deploy.exporters.shapes import Shapes

GLOBAL_LAYOUTS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 32: (7, 15, 23, 31)}
"""Global blocks of SAM's ViT-B, L and H by depth."""
SAM_WINDOW = 14
SAM_IMAGE_SIZE = 1024

Rows = list[int | None]
"""Rows of each block's relative-position tables; None for a block without."""


def facts_of(
    shapes: Shapes, overrides: Overrides, guesses: list[Guess], *, adapted: bool
) -> FamilyFacts:
    """Heads, windows and image size from the relative-position tables."""
    width, _, patch, _ = shapes["image_encoder.patch_embed.proj.weight"]
    rows, head_size = tables(shapes)
    window = _window(rows, overrides, guesses)
    grid = token_grid(rows, window, patch, overrides, guesses)
    return FamilyFacts(
        family="medsa" if adapted else "sam",
        encoder="vit",
        widths=(width,),
        depths=(len(rows),),
        heads=(head_count(width, head_size, overrides, guesses),),
        windows=(window,),
        global_blocks=_global_blocks(rows, window, grid, overrides, guesses),
        image_size=grid * patch,
        embedding_size=grid,
        patch_size=patch,
    )


def tables(shapes: Shapes) -> tuple[Rows, int | None]:
    """Rows of each ViT block's relative-position tables, and the tables' width."""
    depth = shapes.count("image_encoder.blocks")
    shape_of_each = [shapes.get(f"image_encoder.blocks.{i}.attn.rel_pos_h") for i in range(depth)]
    rows: Rows = [None if shape is None else shape[0] for shape in shape_of_each]
    if even := sorted({n for n in rows if n is not None and n % 2 == 0}):
        raise CheckpointError(
            f"relative-position tables have {_counted(even)} rows, expected 2·n − 1, an odd number"
        )
    return rows, next((shape[1] for shape in shape_of_each if shape is not None), None)


def head_count(
    width: int, head_size: int | None, overrides: Overrides, guesses: list[Guess]
) -> int:
    """Attention heads: width over the tables' width, else over SAM's head size."""
    if overrides.heads is not None:
        heads = overrides.heads
        if heads < 1 or width % heads:
            raise UsageError(f"--heads {heads} does not divide the embedding width {width}")
        if head_size not in (None, width // heads):
            raise UsageError(
                f"--heads {heads} gives a head size of {width // heads}, but the relative-position "
                f"tables are {head_size} wide: leave the option out"
            )
        return heads
    size = head_size or (80 if width == 1280 else 64)
    if width % size:
        raise CheckpointError(
            f"the relative-position tables are {size} wide, which does not divide the embedding "
            f"width {width}: the checkpoint is damaged, or not a SAM ViT"
            if head_size
            else f"SAM's head size {size} does not divide the embedding width {width}, and there "
            "are no relative-position tables to show another: give --heads"
        )
    if head_size is None:
        guesses.append(
            Guess(
                fact="heads",
                value=str(width // size),
                because=f"no relative-position tables; SAM's head size {size}",
                option="--heads",
            )
        )
    return width // size


def _window(rows: Rows, overrides: Overrides, guesses: list[Guess]) -> int:
    """Side of a window in tokens: a windowed block's tables have 2·window − 1 rows."""
    lengths = _lengths(rows)
    sam = 2 * SAM_WINDOW - 1
    if overrides.window_size is not None:
        window = overrides.window_size
        if window < 1:
            raise UsageError(f"--window-size {window} is not a window: give its side in tokens")
        if lengths and None not in rows and 2 * window - 1 not in lengths:
            raise UsageError(
                f"--window-size {window} needs relative-position tables of {2 * window - 1} rows; "
                f"the checkpoint's have {_counted(lengths)}"
            )
        return window
    if length := _windowed_by_layout(rows):
        return (length + 1) // 2
    if sam in lengths or len(lengths) != 2:
        window, because = SAM_WINDOW, "SAM's window"
    else:
        window, because = (lengths[0] + 1) // 2, "the shorter taken for the windows'"
    shown = lengths[:1] == [sam] or (len(lengths) == 1 and None not in rows)
    if not shown:
        evidence = (
            f"tables of {_counted(lengths)} rows" if lengths else "no relative-position tables"
        )
        guesses.append(
            Guess(
                fact="window",
                value=str(window),
                because=f"{evidence}; {because}",
                option="--window-size",
            )
        )
    return window


def _windowed_by_layout(rows: Rows) -> int | None:
    """Rows of the windowed blocks' tables, if the tables change exactly where SAM's layout does."""
    layout = GLOBAL_LAYOUTS.get(len(rows), ())
    windowed = {n for i, n in enumerate(rows) if i not in layout}
    whole_grid = {n for i, n in enumerate(rows) if i in layout}
    return (
        windowed.pop() if len(windowed) == len(whole_grid) == 1 and windowed != whole_grid else None
    )


def token_grid(
    rows: Rows, window: int, patch: int, overrides: Overrides, guesses: list[Guess]
) -> int:
    """Side of the token grid: a global block's tables have 2·grid − 1 rows."""
    if overrides.image_size is not None:
        return whole_patches(overrides.image_size, patch) // patch
    lengths = _lengths(rows)
    grid_lengths = [n for n in lengths if n != 2 * window - 1]
    if len(grid_lengths) > 1 or (lengths and not grid_lengths and None in rows):
        raise CheckpointError(
            f"relative-position tables of {_counted(lengths)} rows do not show the image size: "
            "expected those of the whole grid, and of a window where there are any; give "
            "--image-size"
        )
    if lengths:
        return ((grid_lengths or lengths)[0] + 1) // 2
    grid = SAM_IMAGE_SIZE // patch
    guesses.append(image_size_guess(grid * patch, "no relative-position tables; SAM's size"))
    return grid


def _global_blocks(
    rows: Rows, window: int, grid: int, overrides: Overrides, guesses: list[Guess]
) -> tuple[int, ...]:
    """Blocks that attend over the whole grid: those whose tables are not a window's.

    A windowed block's tables must be its window's; a global one's are resized to the grid.
    """
    blocks = _chosen_global_blocks(rows, window, grid, overrides, guesses)
    for i, n in enumerate(rows):
        if i not in blocks and n not in (None, 2 * window - 1):
            raise UsageError(
                f"block {i} would be windowed, but its relative-position tables have {n} rows, not "
                f"a window's {2 * window - 1}: change --global-blocks or --window-size"
            )
    return blocks


def _chosen_global_blocks(
    rows: Rows, window: int, grid: int, overrides: Overrides, guesses: list[Guess]
) -> tuple[int, ...]:
    depth = len(rows)
    if overrides.global_blocks is not None:
        if outside := sorted(i for i in overrides.global_blocks if not 0 <= i < depth):
            raise UsageError(
                f"--global-blocks {', '.join(map(str, outside))}: the encoder has blocks "
                f"0…{depth - 1}"
            )
        return tuple(sorted(set(overrides.global_blocks)))
    if None not in rows and _lengths(rows) != [2 * window - 1]:
        return tuple(i for i, n in enumerate(rows) if n != 2 * window - 1)
    if depth in GLOBAL_LAYOUTS:
        guesses.append(
            Guess(
                fact="global blocks",
                value=", ".join(map(str, GLOBAL_LAYOUTS[depth])),
                because=f"the tables cannot tell; SAM's layout for {depth} blocks",
                option="--global-blocks",
            )
        )
        return GLOBAL_LAYOUTS[depth]
    if grid == window:  # one window is the whole grid: every block computes the same either way
        return ()
    raise CheckpointError(
        f"the tables of this {depth}-block encoder do not tell windowed from global blocks: "
        "give --global-blocks"
    )


def _lengths(rows: Rows) -> list[int]:
    return sorted({n for n in rows if n is not None})


def _counted(lengths: list[int]) -> str:
    return " and ".join(map(str, lengths))
