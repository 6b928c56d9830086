"""ONNX → engine, really built by TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from struct import unpack_from
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import copied, edit_manifest
from fake_gpu import engine_shapes
from onnx import TensorProto, helper, numpy_helper

from medsa_deploy.bundle.manifest import GraphContract, load_manifest
from medsa_deploy.errors import BuildError, BundleError
from medsa_deploy.nvidia import engine_builder, tensorrt_api
from medsa_deploy.nvidia.engine_builder import Job
from medsa_deploy.nvidia.engines import AxisRange, EngineOptions, optimization_profile
from medsa_deploy.runtime.backends.tensor_contract import axis_ranges, check_contract
from medsa_deploy.stages.build_engine.plan import EngineRequest, plan_engines

pytestmark = pytest.mark.tensorrt

SINGLE = AxisRange(min=1, opt=1, max=1)
OPTIONS = EngineOptions(
    flavor="rtx",
    precision="fp32",
    targets=("sm86", "sm120"),
    batch=AxisRange(min=1, opt=1, max=2),
    points=AxisRange(min=1, opt=2, max=7),
    prompts=AxisRange(min=1, opt=1, max=3),
    embeddings=AxisRange(min=1, opt=1, max=3),
    tf32=True,
    fused_attention=True,
    workspace_gb=None,
    optimization_level=None,
)
ENCODERS = (
    "medsa_2d_relpos",
    "medsa_lora",
    "medsa_mobile",
    "medsa_3d_chunk6",
    "medsa_3d_no_chunk",
    "medsa_efficient",
)


def job_of(bundle: Path, role: str, output: Path, options: EngineOptions = OPTIONS) -> Job:
    manifest = load_manifest(bundle)
    chunk = manifest.network.chunk
    options = replace(options, batch=AxisRange(min=chunk, opt=chunk, max=2 * chunk))
    return Job(
        onnx=str(bundle / manifest.file(role, options.precision).path),
        output=str(output),
        options=options,
        profile=optimization_profile(manifest.graphs[role].inputs, options),
    )


def default_job(bundle: Path, role: str, output: Path) -> Job:
    """The job that build-engine makes of a bundle's graph where no option is given."""
    request = EngineRequest(precision="fp32", flavor="rtx", targets=("sm86",))
    plan = plan_engines(bundle, request, tensorrt_api.query_library("rtx"))
    (engine,) = (engine for engine in plan.engines if engine.role == role)
    onnx_path = bundle / next(iter(engine.sources))
    return Job(
        onnx=str(onnx_path), output=str(output), options=plan.options, profile=engine.profile
    )


def plan_shapes(plan: bytes, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes that a TensorRT-RTX plan records of its inputs and outputs; dynamic axes are -1.

    Each tensor's record has its name's length and its name, and ends with its rank, twice, and its
    axes. Dynamic ones are numbers below 0. Without a GPU no plan can be deserialized.
    """
    shapes = {}
    for name in names:
        record = re.compile(
            re.escape(len(name).to_bytes(8, "little") + name.encode())
            + rb"\x1c\x80\x01\0.{,400}?Y\x80\x01\0\x07\x80\x01\0"
            + rb"(.)\0\0\0\x01\x80\x09\x80\x01\0\1\0{7}",
            re.DOTALL,
        )
        (match,) = record.finditer(plan)
        axes = unpack_from(f"<{match[1][0]}q", plan, match.end())
        shapes[name] = tuple(max(axis, -1) for axis in axes)
    return shapes


def assert_shapes(plan: Path, graph: GraphContract, profile: dict[str, Any]) -> dict[str, Any]:
    """A plan's static axes are those of the stand-in, and the runtime takes them."""
    tensors = {tensor.name: tensor.shape for tensor in (*graph.inputs, *graph.outputs)}
    shapes = plan_shapes(plan.read_bytes(), tensors)
    assert shapes == engine_shapes(tensors, profile)
    smallest, largest = ({name: s[i] for name, s in profile.items()} for i in (0, 2))
    ranges = axis_ranges(graph, smallest, largest)
    opened = [(n, "float32", [None if a < 0 else a for a in s]) for n, s in shapes.items()]
    check_contract(plan, opened, graph, ranges)
    return shapes


def attention_graph(path: Path) -> Job:
    """softmax(q·kᵀ)·v in float16, as the networks have it: heads of 64."""
    shape = ["B", 2, 64, 64]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, shape) for n in "qkv"]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, shape)
    nodes = [
        helper.make_node("Transpose", ["k"], ["t"], "transpose", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "t"], ["s"], "scores"),
        helper.make_node("Softmax", ["s"], ["p"], "softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"], "sum"),
    ]
    graph = helper.make_graph(nodes, "attention", inputs, [output])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    shapes = ((1, 2, 64, 64), (1, 2, 64, 64), (2, 2, 64, 64))
    return Job(
        onnx=str(path),
        output=str(path.with_suffix(".engine")),
        options=OPTIONS,
        profile={name: shapes for name in "qkv"},
    )


@pytest.mark.parametrize(
    ("name", "role", "axes"),
    [
        ("medsa_3d_chunk6", "encoder", {"image": (6,), "image_embeddings": (6,)}),
        ("medsa_3d_chunk6", "decoder", {"image_embeddings": (1,), "point_coords": (-1, -1)}),
        ("medsa_efficient", "decoder", {"image_embeddings": (1,), "point_coords": (-1, 6)}),
    ],
)
def test_axes_that_the_default_profile_does_not_vary_are_static(
    name: str, role: str, axes: dict[str, tuple[int, ...]], bundle_of, tmp_path: Path
) -> None:
    """Those of a 2D network: see test_build_engine.py; of more embeddings than one: below.

    EfficientSAM's decoder has no mask inputs.
    """
    job = default_job(bundle_of(name), role, tmp_path / "default.engine")
    assert ("mask_input" in job.profile) == (role == "decoder" and name != "medsa_efficient")
    engine_builder.build(job)
    graph = load_manifest(bundle_of(name)).graphs[role]
    shapes = assert_shapes(Path(job.output), graph, job.profile)
    assert {tensor: shapes[tensor][: len(first)] for tensor, first in axes.items()} == axes


@pytest.mark.parametrize(("need", "points"), [("required", -1), ("none", 0)])
def test_decoders_build_for_no_points(need: str, points: int, sam_bundle, tmp_path: Path) -> None:
    """A mask alone, and networks without prompts: N is 0, where it is dynamic and where static."""
    bundle = copied(sam_bundle, tmp_path)
    edit_manifest(bundle, conventions__prompts=need)
    job = default_job(bundle, "decoder", tmp_path / "decoder.engine")
    assert job.profile["point_coords"][0] == (1, 0, 2)
    engine_builder.build(job)
    graph = load_manifest(bundle).graphs["decoder"]
    assert assert_shapes(Path(job.output), graph, job.profile)["point_coords"][1] == points


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_build(name: str, bundle_of, tmp_path: Path) -> None:
    percents: list[int] = []
    output = tmp_path / "encoder.engine"
    job = job_of(bundle_of(name), "encoder", output)
    done = engine_builder.build(job, on_progress=percents.append)
    assert_shapes(output, load_manifest(bundle_of(name)).graphs["encoder"], job.profile)
    assert output.stat().st_size > 1e6
    assert done.seconds > 0
    assert percents == sorted(set(percents))
    assert 50 < percents[-1] <= 100


def test_a_decoder_builds_with_every_axis_dynamic(bundle_of, tmp_path: Path) -> None:
    output = tmp_path / "decoder.engine"
    job = job_of(bundle_of("medsa_hyp_2d"), "decoder", output)
    assert job.profile["point_coords"] == ((1, 1, 2), (1, 2, 2), (3, 7, 2))
    assert job.profile["image_embeddings"][2][0] == 3
    engine_builder.build(job)
    assert output.stat().st_size > 1e7
    graph = load_manifest(bundle_of("medsa_hyp_2d")).graphs["decoder"]
    assert assert_shapes(output, graph, job.profile)["image_embeddings"][0] == -1


def test_attention_is_fused_unless_it_is_to_stay_plain(tmp_path: Path) -> None:
    """The engine carries the sources of its kernels, fused attention among them."""
    job = attention_graph(tmp_path / "attention.onnx")
    assert engine_builder.build(job).attention == "fused"
    plain = replace(job, options=replace(OPTIONS, fused_attention=False))
    assert engine_builder.build(plain).attention == "plain"
    assert engine_builder.FUSED_KERNEL not in Path(job.output).read_bytes()


def test_tf32_is_a_flag_of_the_engine(tmp_path: Path) -> None:
    """Float32 products: in TF32 and in float32 they are other kernels."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 128])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 256])],
        [numpy_helper.from_array(np.ones((128, 256), np.float32), "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "x.onnx")
    engines = []
    for tf32 in (True, True, False):
        job = Job(
            onnx=str(tmp_path / "x.onnx"),
            output=str(tmp_path / "x.engine"),
            options=replace(OPTIONS, tf32=tf32),
            profile={"x": ((64, 128),) * 3},
        )
        engine_builder.build(job)
        engines.append(Path(job.output).read_bytes())
    assert engines[0] == engines[1]
    assert engines[0] != engines[2]


def test_a_workspace_that_is_too_small_is_the_builders_complaint(tmp_path: Path, bundle) -> None:
    options = replace(OPTIONS, workspace_gb=1 / 1024)
    job = job_of(bundle, "encoder", tmp_path / "encoder.engine", options)
    with pytest.raises(BuildError, match=r"cannot build encoder.onnx: .*workspace"):
        engine_builder.build(job)
    assert not Path(job.output).exists()


def test_a_damaged_graph_is_named_in_one_line(bundle: Path, tmp_path: Path) -> None:
    content = (bundle / "encoder.onnx").read_bytes()
    (tmp_path / "encoder.onnx").write_bytes(content[: len(content) // 2])
    job = job_of(bundle, "encoder", tmp_path / "encoder.engine")
    with pytest.raises(BundleError) as caught:
        engine_builder.build(replace(job, onnx=str(tmp_path / "encoder.onnx")))
    assert "encoder.onnx cannot be parsed by TensorRT-RTX: " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    job = attention_graph(tmp_path / "unknown.onnx")
    model = onnx.load(job.onnx)
    model.graph.node[2].op_type = "Frobnicate"
    onnx.save(model, job.onnx)
    with pytest.raises(BundleError, match=r"cannot be parsed by TensorRT-RTX: .*Frobnicate"):
        engine_builder.build(job)


def test_a_full_disk_is_an_error_of_the_file(tmp_path: Path) -> None:
    job = attention_graph(tmp_path / "attention.onnx")
    with pytest.raises(OSError, match="No space left") as caught:
        engine_builder.build(replace(job, output="/dev/full"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


def child_processes() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_an_interrupt_ends_the_builder(bundle: Path, tmp_path: Path) -> None:
    children: set[str] = set()
    earlier = child_processes()

    def interrupt(percent: int) -> None:
        children.update(child_processes() - earlier)
        raise KeyboardInterrupt

    job = job_of(bundle, "encoder", tmp_path / "encoder.engine")
    with pytest.raises(KeyboardInterrupt):
        engine_builder.build(job, on_progress=interrupt)
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not Path(job.output).exists()


def test_a_builder_that_was_killed_is_explained(bundle: Path, tmp_path: Path) -> None:
    """As by a system that ran out of memory."""
    job = job_of(bundle, "encoder", tmp_path / "encoder.engine")

    def kill(percent: int) -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        os.kill(int(children[-1]), 9)

    with pytest.raises(BuildError, match="it was killed, most likely for want of memory"):
        engine_builder.build(job, on_progress=kill)
