"""What run made, in words."""

from __future__ import annotations

from rich.markup import escape

from medsa_deploy.stages import Segmentation, VolumeSegmentation

from .console import out, plain_table, print_error


def print_segmentation(result: Segmentation) -> None:
    """What came of one image."""
    if result.error is not None:
        print_error(result.error)
        return
    assert result.pixels is not None
    assert result.timings_ms is not None
    masks = ", ".join(f"{name} {count} px" for name, count in result.pixels.items())
    scores = ", ".join(f"{score:.3f}" for row in result.scores for score in row)
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in result.timings_ms.items())
    out.print(f"[bold]{escape(str(result.image))}[/]  {escape(masks)}  predicted IoU {scores}")
    out.print(f"  {times}", style="dim")
    for path in (result.mask, result.overlay, result.logits):
        if path is not None:
            out.print(f"  → {escape(str(path))}")


def print_volume(result: VolumeSegmentation) -> None:
    """What came of one volume."""
    shape = "×".join(map(str, result.shape))
    total = result.shape[result.axis]
    out.print(
        f"[bold]{escape(str(result.volume))}[/]  {shape} voxels, {len(result.slices)} of {total} "
        f"slices along axis {result.axis} segmented in {result.seconds:.1f} s"
    )
    table = plain_table("label", "name", "voxels", "ml")
    for label in result.labels:
        volume = "" if label.millilitres is None else f"{label.millilitres:.2f}"
        table.add_row(str(label.label), escape(label.name), str(label.voxels), volume)
    out.print(table)
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in result.timings_ms.items())
    window = result.intensity_window
    shown = "" if window is None else f"; intensities {window[0]:g}…{window[1]:g}"
    out.print(f"  {times} a slice (medians){shown}", style="dim")
    for path in (result.mask, result.overlay):
        if path is not None:
            out.print(f"  → {escape(str(path))}")
