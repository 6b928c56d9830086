"""What quantize, build-engine, build-kernels and verify made or found, in words."""

from __future__ import annotations

from rich.markup import escape

from medsa_deploy.bundle.manifest import Recipe
from medsa_deploy.nvidia.tensorrt_api import NAMES
from medsa_deploy.stages import EngineBuild, EnginePlan, KernelBuild, Quantization, Verification
from medsa_deploy.stages.verify.verify import AGAINST

from .console import out, plain_table, print_error, print_facts, print_files
from .parity_table import print_parity


def print_engines(made: EngineBuild) -> None:
    """Engines that were built, are up to date, or would be built."""
    plan, found = made.plan, made.engine
    if found is None:
        what = "would be built" if plan.reasons else "up to date"
    else:
        what = f"built in {made.seconds:.0f} s" if made.built else "up to date"
    out.print(f"[bold green]{escape(str(plan.folder))}[/]  {what}")
    for reason in plan.reasons:
        out.print(f"  because: {escape(reason)}", style="dim")
    print_facts(_engine_facts(plan))
    table = plain_table("input", "smallest", "optimal", "largest")
    for planned in plan.engines:
        for name, shapes in planned.profile.items():
            cells = ["×".join(map(str, shape)) for shape in shapes]
            table.add_row(f"{planned.role} {name}", *cells)
    out.print(table)
    if found is not None:
        out.print()
        table = plain_table("engine", "size", "attention", "built in")
        for file in found.files:
            size = f"{file.bytes / 1e6:.1f} MB"
            table.add_row(file.path, size, file.attention, f"{file.seconds:.1f} s")
        out.print(table)
        if found.state == "built":
            out.print("built, not run: nothing is known of their masks until a GPU has run them")


def print_kernels(made: KernelBuild) -> None:
    """CUDA kernels that were just compiled into a bundle."""
    out.print(
        f"[bold green]{escape(str(made.bundle / made.folder))}[/]  compiled by {made.compiler} "
        f"in {made.seconds:.0f} s"
    )
    print_files([(f.path, f.bytes) for f in made.files])


def print_quantization(made: Quantization) -> None:
    """A precision that was just added to a bundle."""
    out.print(
        f"[bold green]{escape(str(made.bundle))}[/]  {made.precision} in {made.seconds:.0f} s"
    )
    print_facts(_recipe_facts(made.recipe))
    print_files([(f.path, f.bytes) for f in made.files])
    print_parity(made.parity, "the float32 graphs")


def print_verification(found: Verification) -> None:
    """How a bundle compares."""
    for parity in found.parity:
        print_parity(parity, AGAINST[found.against])
    for engine in found.engines:
        out.print(escape(f"{engine.folder}: {engine.state}"))
    if found.report is not None:
        out.print(f"report {escape(str(found.report))}")
    if found.failures:
        for failure in found.failures:
            print_error(failure)
    else:
        out.print("[bold green]verified[/]")


def _engine_facts(plan: EnginePlan) -> dict[str, str]:
    options = plan.options
    switches = {
        "TF32": options.tf32,
        "fused attention": options.fused_attention,
    }
    facts = {
        "library": f"{NAMES[plan.library.flavor]} {plan.library.version}",
        "precision": options.precision + (", made first" if plan.makes_graphs else ""),
        "targets": ", ".join(options.targets),
        "allowed": ", ".join(name for name, on in switches.items() if on)
        or "neither TF32 nor fused attention",
    }
    if options.workspace_gb is not None:
        facts["workspace"] = f"{options.workspace_gb:g} GB"
    if options.optimization_level is not None:
        facts["optimization level"] = str(options.optimization_level)
    return facts


def _recipe_facts(recipe: Recipe) -> dict[str, str]:
    kept = ", ".join(f"{island.reason} ({island.nodes})" for island in recipe.islands)
    facts = {
        "made for": "any backend" if recipe.target == "any" else recipe.target,
        "float32 nodes": kept or "none",
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
