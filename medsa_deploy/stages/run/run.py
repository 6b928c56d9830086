"""A bundle, one image, folder or volume, and prompts → mask files: `run`, whatever the input is.

An input is segmented as images or as a volume. Each way has options of its own; an option of the
other way is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from medsa_deploy.bundle.files import sha256
from medsa_deploy.bundle.manifest import MANIFEST_FILENAME, load_manifest
from medsa_deploy.errors import PromptError, UsageError
from medsa_deploy.images import SegmentationDetails, holds_volume
from medsa_deploy.images.class_codes import SegmentStyle, read_class_codes
from medsa_deploy.images.files import suffix
from medsa_deploy.images.label_colours import Rgb
from medsa_deploy.progress import OnCount
from medsa_deploy.runtime import BackendName, Precision, Session, VolumeOptions, load
from medsa_deploy.transforms.intensities import IntensityWindow

from .dicomweb import WebSeries, store_files
from .images import (
    ImageOptions,
    MaskTargets,
    Segmentation,
    check_file_targets,
    prompts_of,
    segment_folder,
    segment_image,
)
from .pictures import segment_picture
from .prompt_file import read_styles
from .volumes import VolumeSegmentation, VolumeSelection, segment_volume_file, structures_of

IMAGE_PROMPTS = "--point X,Y, --box X0,Y0,X1,Y1 or --mask-input FILE"
VOLUME_PROMPTS = "--point X,Y,Z, --box X0,Y0,Z0,X1,Y1,Z1 or --prompts FILE"
"""Options that give prompts."""
RunResult = VolumeSegmentation | Segmentation | list[Segmentation]
"""For a volume, an image, or a folder of images."""


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How the bundle is opened; see `medsa_deploy.load`."""

    backend: BackendName = "onnxruntime"
    fallback: tuple[BackendName, ...] = ()
    cuda_graphs: bool = True
    precision: Precision = "fp32"
    threads: int | None = None
    trusted: tuple[Path, ...] | None = None
    """Files and folders of public keys; None for those that the machine configures."""

    def open(self, bundle: Path) -> Session:
        """A session on the bundle."""
        return load(
            bundle,
            backend=self.backend,
            fallback=self.fallback,
            cuda_graphs=self.cuda_graphs,
            precision=self.precision,
            threads=self.threads,
            trusted=self.trusted,
        )


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The prompts and options for an input, and the outputs to write."""

    points: tuple[tuple[float, ...], ...] = ()
    """Image: (x, y) or (x, y, label). Volume: (x, y, z) or (x, y, z, label)."""
    boxes: tuple[tuple[float, ...], ...] = ()
    """Image: (x0, y0, x1, y1). Volume: (x0, y0, z0, x1, y1, z1)."""
    prompts: Path | None = None
    """A JSON file with the prompts of several structures, for a volume or a picture (z = 0)."""
    mask_input: Path | None = None
    """Image only: `.npy` with (4g, 4g) logits of an earlier prediction."""
    targets: MaskTargets = field(default_factory=MaskTargets)
    """Without a mask path, the mask is named after the input. Logits are for images only."""
    measurements: Path | None = None
    """Volume only: a DICOM report on the segmentation, which must be a .dcm."""
    class_codes: Path | None = None
    """Volume only: a file with codes and colours of classes."""
    colours: dict[str, Rgb] = field(default_factory=dict)
    """Volume only: name of a label → its colour, over every other source of colours."""
    to_web: str | None = None
    """Volume only: URL of a DICOMweb server that gets the segmentation, which must be a .dcm."""
    selection: VolumeSelection = field(default_factory=VolumeSelection)
    """Which volume of the path; of an image only the axis and what NaN is."""
    slice_index: int | None = None
    """The slice of a volume to segment as an image."""
    overlap: int | None = None
    """Volume only; see `VolumeOptions`, as for `propagate` and `margin`."""
    propagate: bool = False
    margin: float | None = None
    intensity_window: IntensityWindow = None
    threshold: float | None = None
    multimask: bool = False
    """Image only: write the best of SAM's three candidates."""


def run_bundle(
    bundle: Path,
    image: Path | WebSeries,
    request: RunRequest,
    session: SessionOptions,
    *,
    on_image: OnCount = lambda done, total: None,
    on_slice: OnCount = lambda done, total: None,
) -> RunResult:
    """Segment one image, each image of a folder, or a volume, and write the masks.

    A series of a DICOMweb server is a volume; its segmentation is `seg.dcm`, unless named.
    The input and the options are checked before the bundle is opened. UsageError for options that
    do not fit the input, ImageError for an input that cannot be read, PromptError for prompts that
    cannot be used. An image of a folder that cannot be segmented is reported in its result instead.
    """
    if isinstance(image, WebSeries):
        mask = request.targets.mask or Path("seg.dcm")
        request = replace(request, targets=replace(request.targets, mask=mask))
        with TemporaryDirectory() as folder:
            image.fetch(Path(folder))
            return _run_volume(bundle, Path(folder), request, session, on_slice)
    if takes_volume(image, request):
        return _run_volume(bundle, image, request, session, on_slice)
    return _run_images(bundle, image, request, session, on_image)


def takes_volume(path: Path, request: RunRequest) -> bool:
    """Whether `path` is segmented as a volume: it holds one, and no single slice is asked for.

    A single plane is treated as an image, unless prompts, options or the output are a volume's.
    ImageError for a path that cannot be read, UsageError for a slice of a DICOM series.
    """
    mask = request.targets.mask
    as_volume = (
        request.propagate
        or request.prompts is not None
        or request.selection.volume is not None
        or request.selection.series is not None
        or request.selection.orientation is not None
        or request.selection.phase is not None
        or any(len(row) == 4 for row in request.points)
        or any(len(row) == 6 for row in request.boxes)
        or (mask is not None and suffix(mask) == ".dcm")
    )
    index = request.slice_index
    if not holds_volume(path, lone=as_volume):
        return False
    if index is not None and path.is_dir():
        raise UsageError(
            f"--slice {index} is for a NIfTI or .npy volume; {path} is a DICOM series: leave it "
            "out, or give the file of one slice"
        )
    return index is None


def _run_volume(
    bundle: Path, path: Path, request: RunRequest, session: SessionOptions, on_slice: OnCount
) -> VolumeSegmentation:
    _refuse(
        "images",
        {
            "--mask-input": request.mask_input,
            "--save-logits": request.targets.logits,
            "--multimask": request.multimask,
        },
    )
    mask = request.targets.mask
    if request.to_web is not None and (mask is None or suffix(mask) != ".dcm"):
        raise UsageError("--to-web takes a DICOM segmentation: write it to a .dcm (-o seg.dcm)")
    structures = structures_of(request.points, request.boxes, request.prompts)
    _check_needed(bundle, bool(structures), VOLUME_PROMPTS)
    details = replace(bundle_details(bundle), styles=_styles(request))
    options = VolumeOptions(
        intensity_window=request.intensity_window,
        threshold=request.threshold,
        overlap=request.overlap or 0,
        propagate=request.propagate,
        margin=request.margin,
    )
    with session.open(bundle) as opened:
        segmentation = segment_volume_file(
            opened,
            path,
            structures,
            options,
            mask=mask,
            overlay=request.targets.overlay,
            measurements=request.measurements,
            details=details,
            selection=request.selection,
            on_slice=on_slice,
        )
    if request.to_web is not None:
        written = (segmentation.mask, segmentation.measurements)
        store_files(request.to_web, [path for path in written if path is not None])
    return segmentation


def bundle_details(bundle: Path) -> SegmentationDetails:
    """What a segmentation says of the bundle that computed it: its name, and its manifest's hash.

    >>> bundle_details(Path("liver.medsa")).bundle
    'liver.medsa'
    """
    try:
        digest = sha256(bundle / MANIFEST_FILENAME)
    except OSError:
        digest = None  # opening the bundle says what is wrong with it
    return SegmentationDetails(bundle=bundle.resolve().name, bundle_sha256=digest)


def _check_needed(bundle: Path, prompted: bool, options: str) -> None:
    """PromptError for a lack of prompts, or for prompts of a network that segments without.

    `options`: those that give prompts.
    """
    need = load_manifest(bundle).conventions.prompts
    if prompted and need == "none":
        raise PromptError(
            "this bundle's network segments without prompts: leave points, boxes and prompt files "
            "out"
        )
    if not prompted and need == "required":
        raise PromptError(f"no prompt: give {options}")


def _styles(request: RunRequest) -> dict[str, SegmentStyle]:
    """Codes and colours by label: of the file of codes, the prompt file, and the colours."""
    styles = {} if request.class_codes is None else read_class_codes(request.class_codes)
    prompted = {} if request.prompts is None else read_styles(request.prompts)
    coloured = {name: SegmentStyle(colour=c) for name, c in request.colours.items()}
    for later in (prompted, coloured):
        for name, style in later.items():
            earlier = styles.get(name, SegmentStyle())
            styles[name] = SegmentStyle(
                codes=style.codes or earlier.codes, colour=style.colour or earlier.colour
            )
    return styles


def _run_images(
    bundle: Path, path: Path, request: RunRequest, session: SessionOptions, on_image: OnCount
) -> Segmentation | list[Segmentation]:
    picture = request.prompts is not None and request.slice_index is None and not path.is_dir()
    _refuse(
        "volumes",
        {
            "--prompts": None if picture else request.prompts,
            "--volume": request.selection.volume,
            "--series": request.selection.series,
            "--orientation": request.selection.orientation,
            "--phase": request.selection.phase,
            "--overlap": request.overlap,
            "--propagate": request.propagate,
            "--margin": request.margin,
            "--measurements": request.measurements,
            "--class-codes": request.class_codes,
            "--colors": request.colours or None,
            "--to-web": request.to_web,
        },
    )
    options = ImageOptions(
        axis=request.selection.axis,
        index=request.slice_index,
        nan=request.selection.nan,
        intensity_window=request.intensity_window,
        threshold=request.threshold,
        multimask=request.multimask,
    )
    folder = path.is_dir()
    targets = request.targets
    if targets.mask is None:
        targets = replace(targets, mask=Path("masks" if folder else f"{path.name}.mask.png"))
    if picture:
        return _run_picture(bundle, path, request, session, targets, options)
    prompts = prompts_of(request.points, request.boxes, request.mask_input)
    prompted = bool(request.points or request.boxes or request.mask_input)
    _check_needed(bundle, prompted, IMAGE_PROMPTS)
    with session.open(bundle) as opened:
        if folder:
            return segment_folder(opened, path, prompts, targets, options, on_image=on_image)
        return segment_image(opened, path, prompts, targets, options)


def _run_picture(
    bundle: Path,
    path: Path,
    request: RunRequest,
    session: SessionOptions,
    targets: MaskTargets,
    options: ImageOptions,
) -> Segmentation:
    """Segment the structures of a prompt file in a picture."""
    _refuse(
        "--point and --box",
        {
            "--mask-input": request.mask_input,
            "--save-logits": targets.logits,
            "--multimask": request.multimask,
        },
    )
    structures = structures_of(request.points, request.boxes, request.prompts)
    _check_needed(bundle, bool(structures), IMAGE_PROMPTS)
    check_file_targets(path, None, targets)
    with session.open(bundle) as opened:
        return segment_picture(opened, path, structures, targets, options)


def _refuse(kind: str, options: dict[str, object]) -> None:
    """UsageError for the first option that has a value: it is for another kind of input."""
    for name, value in options.items():
        if value not in (None, False):
            raise UsageError(f"{name} is for {kind}: leave it out here")
