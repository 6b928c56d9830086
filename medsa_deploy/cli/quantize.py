"""medsa-deploy quantize: a bundle → float16 or INT8 graphs in it, and their parity in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from medsa_deploy import stages
from medsa_deploy.bundle.recipe import Recipe
from medsa_deploy.errors import UsageError

from . import console
from .options import Bundle, Images, Json, MaxMemory, Threads
from .parity_table import print_parity


def quantize(
    bundle: Bundle,
    fp16: Annotated[bool, typer.Option("--fp16", help="Float16 weights and arithmetic")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="INT8 linear layers, the rest in float16")
    ] = False,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Your images, or folders of them, to calibrate INT8 on"),
    ] = None,
    target: Annotated[
        Literal["tensorrt", "cpu"],
        typer.Option("--for", help="Where the INT8 graphs will run"),
    ] = "tensorrt",
    images: Images = None,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Add float16 or INT8 graphs to a bundle, and check that they give its masks.

    medsa-deploy quantize ckpt.medsa --fp16

    medsa-deploy quantize ckpt.medsa --int8 --calibration my-images/

    medsa-deploy quantize ckpt.medsa --int8 --calibration my-images/ --for cpu
    """
    if fp16 == int8:
        raise UsageError("give one of --fp16 and --int8")
    with console.steps() as (on_step, on_image):
        result = stages.quantize_bundle(
            bundle,
            precision="fp16" if fp16 else "int8",
            calibration=calibration or (),
            target=target,
            images=images,
            threads=threads,
            on_step=on_step,
            on_image=on_image,
        )
    console.print_json(result) if json else _print_quantization(result)


def _print_quantization(result: stages.Quantization) -> None:
    console.out.print(
        f"[bold green]{escape(str(result.bundle))}[/]  {result.precision} in {result.seconds:.0f} s"
    )
    console.print_facts(_recipe_facts(result.recipe))
    console.print_files([(file.path, file.bytes) for file in result.files])
    print_parity(result.parity, "the float32 graphs")


def _recipe_facts(recipe: Recipe) -> dict[str, str]:
    islands = ", ".join(f"{island.reason} ({island.nodes})" for island in recipe.islands)
    facts = {
        "made for": "any backend" if recipe.target == "any" else recipe.target,
        "float32 nodes": islands or "none",
        "float32 blocks": ", ".join(recipe.float32_blocks) or "none",
    }
    if recipe.calibration is not None:
        count = len(recipe.quantized) + len(recipe.left_out)
        facts["INT8 layers"] = f"{len(recipe.quantized)} of {count}"
        facts["left out"] = ", ".join(recipe.left_out) or "none"
        facts["calibration"] = f"{recipe.calibration.images} images, {recipe.calibration.method}"
        facts["codes"] = f"weights {recipe.weights}; activations {recipe.activations}"
    facts["runs"] = f"{recipe.runs} of the verification cases"
    if recipe.rounded_dice_mean is not None and recipe.rounded_dice_worst is not None:
        facts["mask Dice"] = (
            f"mean {recipe.rounded_dice_mean:.4f}, worst {recipe.rounded_dice_worst:.4f}, "
            "with every result rounded to float16"
        )
    return facts
