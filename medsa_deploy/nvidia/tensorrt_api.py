"""TensorRT and TensorRT-RTX: which is installed, its version, its targets.

The only module that imports them, and the only one that knows what their versions can do. Both
bring libraries that must not meet in one process: `query_library` imports one in a child process.
"""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

from medsa_deploy.child import ChildError, OnNote, run_in_child
from medsa_deploy.errors import (
    EngineFlavorError,
    MedsaError,
    MissingDependencyError,
    UsageError,
)

Flavor = Literal["tensorrt", "rtx"]
FLAVORS: tuple[Flavor, ...] = get_args(Flavor)
NAMES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
OLDEST = {"tensorrt": (10, 3), "rtx": (1, 7)}
"""TensorRT: JetPack 6's, whose interface has every name that is used. RTX: the oldest tried."""

PARSER_OPSET = 20
NOT_PARSED = frozenset(
    "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow "
    "CenterCropPad Col2Im Compress ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear "
    "HammingWindow HannWindow ImageDecoder MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix "
    "Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement "
    "QLinearConv QLinearMatMul RegexFullMatch STFT SequenceAt SequenceConstruct SequenceEmpty "
    "SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss "
    "SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique".split()
)
"""Operators up to `PARSER_OPSET` that TensorRT 10.3's ONNX parser lacks: those without support in
10.6's table, and those that its changes name after 10.3. Exports have none of them."""
ONNX_DOMAINS = ("", "ai.onnx")
NEWER_PARSER = (10, 6)
"""First version whose parser is left to say itself what it lacks."""

FLOAT32_TARGETS = 80
"""TensorRT-RTX compiles no float32 matrix product for older compute capabilities (Turing's 7.5)."""

IN_NAMES = {"ForeignNode": "Subgraph", "Reformat": "Reformat", "mha": "MHA", "gemm": "Gemm"}
"""Words in the names of an engine's layers → what these do; `ForeignNode` is many layers as one."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """An installed TensorRT or TensorRT-RTX."""

    flavor: Flavor
    version: str
    targets: tuple[str, ...]
    """Compute capabilities it builds for without a GPU, such as `sm86`; empty for TensorRT."""


def installed(flavor: Flavor) -> bool:
    """Whether the library can be found; it is not imported."""
    return find_spec(MODULES[flavor]) is not None


def load(flavor: Flavor) -> Any:
    """Import the library. Its version is checked, and that its other flavor is not here already."""
    (other,) = (name for name in FLAVORS if name != flavor)
    if MODULES[other] in sys.modules:
        raise EngineFlavorError(
            f"{NAMES[other]} is loaded in this process, where {NAMES[flavor]} cannot join it: "
            "use one of them in a process"
        )
    _require(flavor)
    try:
        library = import_module(MODULES[flavor])
    except (ImportError, OSError) as e:
        reason = " ".join(str(e).split())
        raise UsageError(f"{NAMES[flavor]} is installed, but does not load: {reason}") from e
    if version_numbers(library.__version__) < OLDEST[flavor]:
        oldest = ".".join(map(str, OLDEST[flavor]))
        raise UsageError(
            f"{NAMES[flavor]} {library.__version__} is installed; {oldest} or newer is needed: "
            f"pip install --upgrade 'medsa-deploy[{flavor}]'"
        )
    return library


def describe(library: Any, flavor: Flavor) -> Library:
    """Facts of an imported library."""
    members = getattr(getattr(library, "ComputeCapability", None), "__members__", {})
    numbers = sorted(int(name[2:]) for name in members if re.fullmatch(r"SM\d+", name))
    return Library(
        flavor=flavor, version=library.__version__, targets=tuple(f"sm{n}" for n in numbers)
    )


def query_library(flavor: Flavor) -> Library:
    """`describe` an installed library without importing it here."""
    _require(flavor)
    try:
        facts = run_in_child(describe_installed, flavor)
    except (ChildError, MedsaError, OSError) as e:
        raise UsageError(f"{NAMES[flavor]} cannot be used: {e}") from e
    return Library(**facts | {"targets": tuple(facts["targets"])})


def describe_installed(flavor: Flavor, note: OnNote) -> dict[str, Any]:
    """The child's part of `query_library`."""
    return asdict(describe(load(flavor), flavor))


def error_logger(library: Any) -> Any:
    """A logger for the library's runtime, whose list `errors` holds its errors."""

    class Listener(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                self.errors.append(" ".join(message.split()))

    return Listener()


def layer_timer(library: Any) -> Any:
    """A profiler for an execution context; `times`: layer → milliseconds of each run."""

    class Timer(library.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    return Timer()


def operator(layer: str) -> str:
    """The operator of a layer, by its name: engines name layers after their nodes.

    >>> operator("{ForeignNode[blocks.0.norm1/node_Sub_3...blocks.0/node_Add_61]}")
    'Subgraph'
    """
    for word, operator_name in IN_NAMES.items():
        if word in layer:
            return operator_name
    match = re.search(r"/node_([A-Za-z]+)", layer)
    return match[1] if match else "Subgraph"


def lacking_operators(version: str, model: Any) -> str | None:
    """What an `onnx.ModelProto` has that the parser of a TensorRT `version` lacks, in words."""
    if version_numbers(version) >= NEWER_PARSER:
        return None
    opset = max(entry.version for entry in model.opset_import if entry.domain in ONNX_DOMAINS)
    if opset > PARSER_OPSET:
        return f"operators of opset {opset}"
    nodes = model.graph.node
    lacking = {n.op_type for n in nodes if n.op_type in NOT_PARSED or n.domain not in ONNX_DOMAINS}
    if any(node.op_type == "Pad" and len(node.input) > 3 and node.input[3] for node in nodes):
        lacking.add("Pad along chosen axes")  # a tensor of axes is read from 10.4 on
    return ", ".join(sorted(lacking)) or None


def version_numbers(version: str) -> tuple[int, ...]:
    """Major and minor number: `10.3.0.26` → (10, 3)."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def float32_targets(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Those of TensorRT-RTX's targets that take float32 graphs."""
    return tuple(target for target in targets if int(target[2:]) >= FLOAT32_TARGETS)


def _require(flavor: Flavor) -> None:
    if not installed(flavor):
        raise MissingDependencyError(
            NAMES[flavor], extra=flavor, purpose=f"a {NAMES[flavor]} engine"
        )
