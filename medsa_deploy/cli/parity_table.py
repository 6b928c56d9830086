"""How graphs compare with the network they were made from, as a table."""

from __future__ import annotations

from medsa_deploy.bundle.manifest import Parity

from .console import out, plain_table


def print_parity(parity: Parity, against: str) -> None:
    images = f"{parity.images} image(s), " if parity.images else ""
    out.print(
        f"\n{parity.precision} in {parity.backend} against {against}, worst of {images}"
        f"{parity.seeded_images} seeded image(s), {parity.prompt_sets} prompt sets:"
    )
    table = plain_table("tensor", "relative L2", "max abs")
    for name, tensor in parity.tensors.items():
        table.add_row(name, f"{tensor.relative_l2:.1e}", f"{tensor.max_abs:.1e}")
    table.add_row("mask pixels differing", f"{parity.mask_pixels_differing:.1e}", "")
    variants = {"the decoder in two parts": parity.split, **parity.encoders}
    for words, variant in variants.items():
        if variant is not None:
            table.add_row(f"with {words}:", "", "")
            for name, tensor in variant.tensors.items():
                table.add_row(name, f"{tensor.relative_l2:.1e}", f"{tensor.max_abs:.1e}")
            table.add_row("mask pixels differing", f"{variant.mask_pixels_differing:.1e}", "")
    out.print(table)
    if parity.mask_dice_mean is not None and parity.mask_dice_worst is not None:
        dice = f"mean {parity.mask_dice_mean:.4f}, worst {parity.mask_dice_worst:.4f}"
        out.print(f"mask Dice {dice}; NaN or infinite values: {parity.nan_count}")
