"""The command line: parse, call one function of `stages`, print its dataclass."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import typer
from click.exceptions import Abort, ClickException, Exit

from . import __version__, console, stages
from .errors import MedsaError, MissingDependencyError, UsageError
from .runtime import load

app = typer.Typer(
    name="medsa-deploy",
    help="From a trained Medical SAM Adapter checkpoint to masks on a scanner.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

T = TypeVar("T", int, float)
Checkpoint = Annotated[Path, typer.Argument(help="`.pth`, `.pt` or `.safetensors`")]
Bundle = Annotated[Path, typer.Argument(help="A bundle: the folder that export made")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout")]
Base = Annotated[Path | None, typer.Option(help="SAM checkpoint an adapter-only file goes over")]
Images = Annotated[Path | None, typer.Option(help="Your images, added to the proof")]
Heads = Annotated[int | None, typer.Option(help="Attention heads of the ViT")]
Window = Annotated[int | None, typer.Option(help="Attention window of the ViT, in tokens")]
GlobalBlocks = Annotated[str | None, typer.Option(help="Global blocks, such as 2,5,8,11")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the network's input, in pixels")]
Classes = Annotated[int | None, typer.Option(help="Classes the network was trained for")]
Preprocess = Annotated[
    Literal["medsa", "sam", "medsam", "litemedsam"] | None,
    typer.Option(help="How images become the network's input"),
]
IntensityWindow = Annotated[
    str | None,
    typer.Option(metavar="LOW,HIGH", help="Intensities of black and white, such as -175,250"),
]
PointOrder = Annotated[
    Literal["xy", "yx"] | None, typer.Option(help="Order of coordinates the network was trained on")
]
PointFrame = Annotated[
    Literal["network", "image"] | None, typer.Option(help="Frame of coordinates, likewise")
]
Threshold = Annotated[float | None, typer.Option(help="Probability above which a pixel is mask")]
ClassNames = Annotated[str | None, typer.Option(help="Names of the classes, such as liver,spleen")]
Backend = Annotated[str, typer.Option(help="What runs the graphs: onnxruntime")]
Precision = Annotated[str, typer.Option(help="Precision of the graphs to run")]
Threads = Annotated[int | None, typer.Option(help="Threads; default all cores")]


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks")] = False,
) -> None:
    """From a trained Medical SAM Adapter checkpoint to masks on a scanner."""


@app.command()
def inspect(
    checkpoint: Checkpoint,
    base: Base = None,
    heads: Heads = None,
    window_size: Window = None,
    global_blocks: GlobalBlocks = None,
    image_size: ImageSize = None,
    classes: Classes = None,
    preprocess: Preprocess = None,
    intensity_window: IntensityWindow = None,
    point_order: PointOrder = None,
    point_frame: PointFrame = None,
    threshold: Threshold = None,
    class_names: ClassNames = None,
    json: Json = False,
) -> None:
    """Say what a checkpoint is, and what it does not settle.

    medsa-deploy inspect ckpt.pth
    """
    overrides = _overrides(locals())
    found = stages.inspect(checkpoint, base=base, overrides=overrides)
    console.print_json(found) if json else console.print_inspection(found)


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The bundle to make")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle")] = False,
    base: Base = None,
    images: Images = None,
    heads: Heads = None,
    window_size: Window = None,
    global_blocks: GlobalBlocks = None,
    image_size: ImageSize = None,
    classes: Classes = None,
    preprocess: Preprocess = None,
    intensity_window: IntensityWindow = None,
    point_order: PointOrder = None,
    point_frame: PointFrame = None,
    threshold: Threshold = None,
    class_names: ClassNames = None,
    json: Json = False,
) -> None:
    """Export a checkpoint as a bundle, proved equal to its own network.

    medsa-deploy export ckpt.pth

    medsa-deploy export adapters.pth --base sam_vit_b_01ec64.pth --images my-images/

    medsa-deploy export medsam_vit_b.pth --preprocess medsam
    """
    overrides = _overrides(locals())
    with console.steps() as on_step:
        made = stages.export(
            checkpoint,
            output=output,
            base=base,
            images=images,
            overrides=overrides,
            force=force,
            on_step=on_step,
        )
    console.print_json(made) if json else console.print_export(made)


@app.command()
def run(
    bundle: Bundle,
    image: Annotated[Path, typer.Argument(help="An image, or a folder of images")],
    point: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y[,LABEL]", help="A click; label 1 foreground, 0 background"),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="X0,Y0,X1,Y1", help="A box; several are several objects"),
    ] = None,
    mask_input: Annotated[
        Path | None, typer.Option(help="`.npy` logits of an earlier mask (--save-logits)")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Mask: .png, .npy, .nii.gz; a folder for a folder"),
    ] = None,
    overlay: Annotated[Path | None, typer.Option(help="Picture of mask and prompts: .png")] = None,
    save_logits: Annotated[Path | None, typer.Option(help="Low-resolution logits: .npy")] = None,
    axis: Annotated[int | None, typer.Option(help="Axis of a volume to slice along")] = None,
    slice_: Annotated[int | None, typer.Option("--slice", help="Slice of a volume")] = None,
    intensity_window: IntensityWindow = None,
    threshold: Threshold = None,
    multimask: Annotated[
        bool, typer.Option("--multimask", help="SAM's three candidates; the best is written")
    ] = False,
    backend: Backend = "onnxruntime",
    precision: Precision = "fp32",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Segment an image, or every image of a folder, from clicks and boxes in its pixels.

    medsa-deploy run ckpt.medsa image.dcm --point 120,88 -o mask.png --overlay overlay.png

    medsa-deploy run ckpt.medsa image.png --point 120,88 --point 40,60,0 --box 30,40,200,210

    medsa-deploy run ckpt.medsa volume.nii.gz --axis 2 --slice 90 --box 40,60,200,210 -o mask.nii.gz

    medsa-deploy run ckpt.medsa frames/ --point 256,256 -o masks/
    """
    clicks = [_click(text) for text in point or ()]
    prompts = stages.Prompts(
        points=tuple((x, y) for x, y, _ in clicks),
        labels=tuple(label for _, _, label in clicks),
        boxes=tuple(_four(text) for text in box or ()),
        mask=mask_input,
    )
    default = Path("masks") if image.is_dir() else Path(f"{image.name}.mask.png")
    with (
        load(bundle, backend=backend, precision=precision, threads=threads) as session,
        console.image_progress(image.is_dir() and not json) as on_image,
    ):
        results = stages.run(
            session,
            image,
            prompts,
            stages.Outputs(mask=output or default, overlay=overlay, logits=save_logits),
            axis=axis,
            index=slice_,
            intensity_window=_window(intensity_window),
            threshold=threshold,
            multimask=multimask,
            on_image=on_image,
        )
    if json:
        console.print_json(results if image.is_dir() else results[0])
    else:
        for result in results:
            console.print_segmentation(result)
    if any(result.error for result in results):
        raise typer.Exit(2)


@app.command()
def verify(
    bundle: Bundle,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Compare with this checkpoint's network (needs torch)")
    ] = None,
    base: Base = None,
    images: Images = None,
    backend: Backend = "onnxruntime",
    precision: Annotated[str | None, typer.Option(help="One precision; default all")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Check a bundle's files, and prove its graphs equal to the checkpoint's network.

    Without a checkpoint, against what its network gave at export; no torch is needed.

    medsa-deploy verify ckpt.medsa

    medsa-deploy verify ckpt.medsa --checkpoint ckpt.pth --images my-images/
    """
    with console.steps() as on_step:
        found = stages.verify_bundle(
            bundle,
            checkpoint=checkpoint,
            base=base,
            images=images,
            backend=backend,
            precision=precision,
            threads=threads,
            on_step=on_step,
        )
    console.print_json(found) if json else console.print_verification(found)
    if found.failures:
        raise typer.Exit(1)


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine has, and what is missing.

    medsa-deploy doctor
    """
    found = stages.diagnose()
    console.print_json(found) if json else console.print_diagnosis(found)
    if found.problems:
        raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[Literal["litemedsam"], typer.Option(help="Which model")] = "litemedsam",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write")] = Path("demo"),
    json: Json = False,
) -> None:
    """Export real weights, segment a real MR image, print Dice and timings.

    medsa-deploy demo
    """
    if not json:
        console.err.print(
            "LiteMedSAM's weights → a bundle, proved equal to its own network → masks on the\n"
            "MNI T1 template (an average of 152 heads) from boxes and clicks, against its labels."
        )
    with console.steps() as on_step:
        found = stages.demonstrate(output, on_step=on_step)
    console.print_json(found) if json else console.print_demonstration(found)


def main() -> None:
    """Entry point: every error becomes one line and an exit code."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if "--version" in arguments:
        print(f"medsa-deploy {__version__}")
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, _interrupt)
    logging.getLogger("medsa_deploy").addHandler(console.WarningLines())
    try:
        code = app([a for a in arguments if a != "--debug"], standalone_mode=False)
    except Exit as e:
        code = e.exit_code
    except (KeyboardInterrupt, Abort):
        console.print_error("interrupted: nothing half-written was left")
        code = 130
    except ClickException as e:
        e.show()
        code = 2
    except Exception as e:
        if debug:
            raise
        code = _report(e)
    raise SystemExit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Print an error as one line; its exit code."""
    if isinstance(error, MedsaError):
        console.print_error(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        console.print_error(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return 2
    if isinstance(error, MemoryError):
        console.print_error("out of memory: use a smaller image size or fewer prompts at a time")
        return 3
    console.print_error(
        f"{type(error).__name__}: {error} (a fault in medsa-deploy; --debug shows where)"
    )
    return 3


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A polite kill ends like Ctrl-C, so that nothing half-written is left."""
    raise KeyboardInterrupt


def _overrides(given: dict[str, Any]) -> Any:
    """The architecture and convention options of a command, by their names."""
    try:
        from .exporters.architecture import Overrides
    except ModuleNotFoundError as e:
        raise MissingDependencyError(
            (e.name or "torch").split(".")[0], extra="export", purpose="reading a checkpoint"
        ) from e
    names, blocks = given["class_names"], given["global_blocks"]
    return Overrides(
        heads=given["heads"],
        window_size=given["window_size"],
        global_blocks=None if blocks is None else tuple(_numbers(blocks, int, "--global-blocks")),
        image_size=given["image_size"],
        classes=given["classes"],
        preprocess=given["preprocess"],
        intensity_window=_window(given["intensity_window"]),
        point_order=given["point_order"],
        point_frame=given["point_frame"],
        threshold=given["threshold"],
        class_names=None if names is None else tuple(n.strip() for n in names.split(",")),
    )


def _click(text: str) -> tuple[float, float, int]:
    """X,Y or X,Y,LABEL."""
    values = _numbers(text, float, "--point")
    if len(values) not in (2, 3) or values[2:] not in ([], [0.0], [1.0]):
        raise UsageError(f"--point {text}: expected X,Y or X,Y,LABEL with label 1 or 0")
    return values[0], values[1], int(values[2]) if len(values) == 3 else 1


def _four(text: str) -> tuple[float, float, float, float]:
    """X0,Y0,X1,Y1."""
    values = _numbers(text, float, "--box")
    if len(values) != 4:
        raise UsageError(f"--box {text}: expected X0,Y0,X1,Y1")
    return values[0], values[1], values[2], values[3]


def _window(text: str | None) -> tuple[float, float] | None:
    """LOW,HIGH."""
    if text is None:
        return None
    values = _numbers(text, float, "--intensity-window")
    if len(values) != 2 or not values[0] < values[1]:
        raise UsageError(f"--intensity-window {text}: expected LOW,HIGH with LOW < HIGH")
    return values[0], values[1]


def _numbers(text: str, kind: type[T], option: str) -> list[T]:
    """Numbers between commas."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as e:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} {text}: expected {what} between commas") from e


if __name__ == "__main__":
    main()
