"""Model repositories: configurations, as NVIDIA's client parses them, against the real graphs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_engines
import onnx
import pytest
from command_line import call
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from medsa_deploy import errors
from medsa_deploy.bundle.files import sha256
from medsa_deploy.bundle.manifest import load_manifest, manifest_from_json
from medsa_deploy.triton.models import RepositoryOptions
from medsa_deploy.triton.repository import write_repository
from medsa_deploy.triton.tensors import INPUTS, OUTPUTS

FILES = {
    "encoder": "encoder.onnx",
    "decoder": "decoder.onnx",
    "decoder_image": "decoder-image.onnx",
    "decoder_click": "decoder-click.onnx",
}


def configs(repository: Path) -> dict[str, Any]:
    """Every model's configuration by its name."""
    return {
        path.parent.name: text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        for path in repository.glob("*/config.pbtxt")
    }


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def graph_tensors(file: Path) -> dict[str, list[int]]:
    """Name → sizes of the inputs and outputs in an ONNX file, -1 for dynamic ones."""
    graph = onnx.load(file, load_external_data=False).graph
    return {
        value.name: [
            axis.dim_value if axis.HasField("dim_value") else -1
            for axis in value.type.tensor_type.shape.dim
        ]
        for value in (*graph.input, *graph.output)
    }


def check_graph_models(models: dict[str, Any], bundle: Path, kinds: tuple[str, ...]) -> None:
    """Tensors of each model are those of its ONNX file, less the batch axis if it batches."""
    for kind in kinds:
        config = models[f"{bundle.stem}_{kind}"]
        batched = config.max_batch_size > 0
        assert batched == (kind != "decoder")  # `has_mask_input` (1,) has no batch axis
        assert config.HasField("dynamic_batching") == batched
        actual = {t.name: list(t.dims) for t in (*config.input, *config.output)}
        expected = graph_tensors(bundle / FILES[kind])
        assert actual == {n: dims[1:] if batched else dims for n, dims in expected.items()}
        assert {t.data_type for t in (*config.input, *config.output)} == {
            model_config_pb2.DataType.TYPE_FP32
        }
        assert all(
            size <= config.max_batch_size for size in config.dynamic_batching.preferred_batch_size
        )
        (warm_up,) = config.model_warmup
        assert {t.name for t in config.input} == set(warm_up.inputs)
        assert all(size > 0 for value in warm_up.inputs.values() for size in value.dims)
        assert config.version_policy.latest.num_versions == 1


def test_python_models(bundle: Path, tmp_path: Path) -> None:
    repository = write_repository([bundle], tmp_path / "models", RepositoryOptions(instances=2))
    models = configs(tmp_path / "models")
    name = bundle.stem
    assert set(models) == {model.name for model in repository.models}
    assert set(models) == {f"{name}_{k}" for k in ("session", "segment", "encoder", "decoder")}
    check_graph_models(models, bundle, ("encoder", "decoder"))
    for config in models.values():
        assert config.backend == "python"
        assert parameters(config)["bundle_sha256"] == sha256(bundle / "manifest.json")
        copied = tmp_path / "models" / config.name / "1" / bundle.name
        assert sha256(copied / "encoder.onnx") == sha256(bundle / "encoder.onnx")
    session, segment = models[f"{name}_session"], models[f"{name}_segment"]
    assert session.sequence_batching.HasField("oldest")
    assert session.instance_group[0].count == 2
    assert segment.instance_group[0].count == 6
    assert manifest_from_json(parameters(session)["manifest"]) == load_manifest(bundle)
    for config in (session, segment):
        assert [t.name for t in config.input] == [tensor.name for tensor in INPUTS]
        assert [t.name for t in config.output] == [tensor.name for tensor in OUTPUTS]
        assert all(t.optional for t in config.input)
    text = (tmp_path / "models" / session.name / "config.pbtxt").read_text()
    assert all(tensor.description and tensor.description in text for tensor in (*INPUTS, *OUTPUTS))


@pytest.mark.parametrize("dimensions", ["bundle", "bundle_3d"])
def test_onnx_models_are_not_loaded_here(
    dimensions: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Parsed and compared with the files; no server with that backend runs in these tests."""
    bundle: Path = request.getfixturevalue(dimensions)
    write_repository([bundle], tmp_path / "models", RepositoryOptions(backend="onnxruntime"))
    models = configs(tmp_path / "models")
    check_graph_models(models, bundle, tuple(FILES))
    chunk = load_manifest(bundle).network.chunk
    encoder = models[f"{bundle.stem}_encoder"]
    assert encoder.max_batch_size % chunk == 0
    assert all(s % chunk == 0 for s in encoder.dynamic_batching.preferred_batch_size)
    assert encoder.model_warmup[0].batch_size == chunk
    for kind, file in FILES.items():
        config = models[f"{bundle.stem}_{kind}"]
        assert config.backend == "onnxruntime"
        version = tmp_path / "models" / config.name / "1"
        assert sha256(version / config.default_model_filename) == sha256(bundle / file)
    assert models[f"{bundle.stem}_segment"].backend == "python"


def test_tensorrt_models_are_not_loaded_here(bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "liver.medsa"))
    manifest = load_manifest(copied)
    for target in ("sm86", "sm120"):
        options = replace(fake_engines.describe(), targets=(target,))
        fake_engines.write(copied / "engines" / f"tensorrt-fp32-{target}", manifest, options)
    with pytest.raises(errors.UsageError, match="GPUs only"):
        RepositoryOptions(backend="tensorrt", device="cpu")
    write_repository([copied], tmp_path / "models", RepositoryOptions(backend="tensorrt"))
    models = configs(tmp_path / "models")
    check_graph_models(models, copied, ("encoder", "decoder"))
    encoder = models["liver_encoder"]
    assert encoder.platform == "tensorrt_plan"
    assert encoder.max_batch_size == 2  # the engines' own
    assert dict(encoder.cc_model_filenames) == {
        "8.6": "model-8.6.plan",
        "12.0": "model-12.0.plan",
    }
    assert encoder.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    plan = tmp_path / "models/liver_encoder/1/model-12.0.plan"
    engines = copied / "engines/tensorrt-fp32-sm120"
    assert sha256(plan) == sha256(engines / "encoder.engine")
    assert parameters(models["liver_session"])["runtime"] == "tensorrt"
    (engines / "encoder.engine").write_text("{}")
    with pytest.raises(errors.EngineChangedError):
        write_repository([copied], tmp_path / "again", RepositoryOptions(backend="tensorrt"))
    assert not (tmp_path / "again").exists()
    with pytest.raises(errors.EngineError, match="no TensorRT engines"):
        write_repository([bundle], tmp_path / "again", RepositoryOptions(backend="tensorrt"))


def test_the_command_replaces_only_repositories(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    done = call("triton", bundle, "-o", output, "--instances", 2, "--cache", "64MB", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["models"][0]["name"] == f"{bundle.stem}_session"
    assert parameters(configs(output)[f"{bundle.stem}_session"])["embedding_bytes"] == "64000000"
    refused = call("triton", bundle, "-o", output)
    assert refused.code == 2
    assert "--force" in refused.err
    assert call("triton", bundle, "-o", output, "--force").code == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    refused = call("triton", bundle, "-o", tmp_path / "other", "--force")
    assert refused.code == 2
    assert "no repository" in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--instances", "0"], "expected 1 or more"),
        (["--precision", "fp16"], "has no encoder in fp16"),
        (["--cache", "much"], "is no size"),
        (["--idle-minutes", "0"], "more than 0"),
    ],
)
def test_unusable_options(options: list[str], message: str, bundle: Path, tmp_path: Path) -> None:
    done = call("triton", bundle, "-o", tmp_path / "models", *options)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "models").exists()


def test_bundles_that_cannot_be_models(bundle: Path, tmp_path: Path) -> None:
    """Two of one name, a name that no model has, and a changed file: nothing is written."""
    output = tmp_path / "models"
    with pytest.raises(errors.UsageError, match="two bundles are called"):
        write_repository([bundle, bundle], output)
    spaced = Path(shutil.copytree(bundle, tmp_path / "my liver.medsa"))
    with pytest.raises(errors.UsageError, match="cannot be the name of a model"):
        write_repository([spaced], output)
    (spaced / "decoder.onnx").write_bytes(b"changed")
    changed = spaced.rename(tmp_path / "changed.medsa")
    with pytest.raises(errors.BundleError, match=r"decoder\.onnx"):
        write_repository([changed], output)
    assert not output.exists()
