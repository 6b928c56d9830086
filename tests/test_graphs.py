"""The exported graphs: contract, dynamic axes, operators that must survive, sizes beyond golden."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from golden_cases import relative_l2, seeded
from invented import rows, vit_keys, weights

from medsa_deploy import stages
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.bundle.node_names import block_of, module_named, module_of
from medsa_deploy.evaluation.parity import difference
from medsa_deploy.exporters import graphs
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.networks import build_reference, fold

ONNX_LIMIT = 2e-5


@pytest.fixture(scope="module")
def hyp(bundle_of) -> Path:
    return bundle_of("medsa_hyp_2d")


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(path, options)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_nodes_are_named_by_their_modules(hyp: Path, name: str) -> None:
    nodes = onnx.load(hyp / f"{name}.onnx").graph.node
    assert len({node.name for node in nodes}) == len(nodes)
    modules = [module_named(node.name) for node in nodes]
    assert modules == [module_of(node) for node in nodes]
    blocks = {block_of(module) for module in modules}
    known = {"encoder": {"patch_embed", "blocks.3", "neck"}, "decoder": {"sparse", "blocks.1"}}
    assert known[name] <= blocks
    assert modules.count("") < 0.3 * len(modules)


def test_the_files_do_not_say_where_they_were_made(hyp: Path) -> None:
    for name in ("encoder", "decoder"):
        content = (hyp / f"{name}.onnx").read_bytes()
        assert b"stack_trace" not in content
        assert str(Path(graphs.__file__).parent).encode() not in content


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_the_files_keep_the_manifests_contract(hyp: Path, name: str) -> None:
    contract = load_manifest(hyp).graphs[name]
    model = onnx.load(hyp / f"{name}.onnx")
    onnx.checker.check_model(model)
    for values, tensors in (
        (model.graph.input, contract.inputs),
        (model.graph.output, contract.outputs),
    ):
        for value, tensor in zip(values, tensors, strict=True):
            axes = value.type.tensor_type.shape.dim
            assert value.name == tensor.name
            assert tuple(axis.dim_param or axis.dim_value for axis in axes) == tensor.shape
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert model.opset_import[0].version == graphs.OPSET
    assert model.ir_version == 9, "ONNX Runtime 1.17 reads no newer files"


@pytest.mark.parametrize(
    ("embeddings", "sets", "points"),
    [(*pair, n) for pair in ((1, 1), (1, 3), (3, 1), (3, 3), (2, 2)) for n in (1, 2, 7)],
)
def test_embeddings_and_prompt_sets_broadcast(
    hyp: Path, embeddings: int, sets: int, points: int
) -> None:
    """Every pair of E and P equals the same prompts decoded one embedding and one set at a time."""
    decoder = session(hyp / "decoder.onnx")
    rng = np.random.default_rng([embeddings, sets, points])
    e = rng.normal(0, 0.5, (embeddings, 256, 16, 16)).astype(np.float32)
    coords = rng.uniform(0, 256, (sets, points, 2)).astype(np.float32)
    labels = rng.integers(-1, 4, (sets, points)).astype(np.float32)
    mask = rng.normal(0, 4, (sets, 1, 64, 64)).astype(np.float32)

    def decode(i: slice, j: slice) -> list[np.ndarray]:
        inputs = {
            "image_embeddings": e[i],
            "point_coords": coords[j],
            "point_labels": labels[j],
            "mask_input": mask[j],
            "has_mask_input": np.ones(1, np.float32),
        }
        return decoder.run(["low_res_masks", "iou_predictions"], inputs)

    together = decode(slice(None), slice(None))
    count = max(embeddings, sets)
    assert together[0].shape == (count, 1, 64, 64)
    for k in range(count):
        i, j = min(k, embeddings - 1), min(k, sets - 1)
        alone = decode(slice(i, i + 1), slice(j, j + 1))
        for single, joint in zip(alone, together, strict=True):
            assert relative_l2(joint[k : k + 1], single) <= ONNX_LIMIT


def test_embeddings_and_prompt_sets_that_do_not_match_are_refused(hyp: Path) -> None:
    inputs = {
        "image_embeddings": np.zeros((2, 256, 16, 16), np.float32),
        "point_coords": np.zeros((3, 1, 2), np.float32),
        "point_labels": np.zeros((3, 1), np.float32),
        "mask_input": np.zeros((3, 1, 64, 64), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
    }
    with pytest.raises(Exception, match="out of data bounds"):
        session(hyp / "decoder.onnx").run(None, inputs)


def test_a_mask_prompt_counts_only_when_it_is_announced(hyp: Path) -> None:
    decoder = session(hyp / "decoder.onnx")
    inputs = {
        "image_embeddings": np.zeros((1, 256, 16, 16), np.float32),
        "point_coords": np.zeros((1, 1, 2), np.float32),
        "point_labels": np.ones((1, 1), np.float32),
        "mask_input": np.full((1, 1, 64, 64), np.nan, np.float32),
        "has_mask_input": np.zeros(1, np.float32),
    }
    ignored = decoder.run(["low_res_masks"], inputs)[0]
    assert np.isfinite(ignored).all()
    assert np.isnan(
        decoder.run(["low_res_masks"], inputs | {"has_mask_input": np.ones(1, "f")})[0]
    ).any()


def test_encoder_batch_is_dynamic(hyp: Path) -> None:
    encoder = session(hyp / "encoder.onnx")
    images = seeded.image(4, (3, 3, 256, 256))
    (together,) = encoder.run(None, {"image": images})
    for i in range(3):
        (alone,) = encoder.run(None, {"image": images[i : i + 1]})
        assert relative_l2(together[i : i + 1], alone) <= ONNX_LIMIT


def test_norms_and_gelus_survive_the_exporter(hyp: Path) -> None:
    encoder, decoder = operators(hyp / "encoder.onnx"), operators(hyp / "decoder.onnx")
    blocks = 4
    assert encoder["LayerNormalization"] == 2 * blocks + 2
    assert encoder["Gelu"] == 2 * blocks  # one MLP with its adapter, one Space adapter
    assert decoder["LayerNormalization"] > 0
    assert not {"Erf", "ReduceMean", "Pow"} & (set(encoder) | set(decoder))


def test_the_adapters_gemms_are_merged(hyp: Path) -> None:
    """A block: q, k, v, [projection; fc1], fc2, [lin1; fc1], [lin2, fc2], two of attention."""
    blocks, neck = 4, 1
    assert operators(hyp / "encoder.onnx")["MatMul"] == 9 * blocks + neck


def test_hyper_weights_of_fixed_tokens_are_constants(hyp: Path) -> None:
    model = onnx.load(hyp / "decoder.onnx")
    shapes = [tuple(tensor.dims) for tensor in model.graph.initializer]
    assert shapes.count((5, 64, 64)) == 4  # two adapters of two steps, on iou and mask tokens


@pytest.mark.parametrize(
    ("width", "heads", "depth", "window", "size", "global_blocks", "rel_pos", "padded"),
    [
        (64, 1, 2, 7, 128, (1,), 0.3, True),
        (128, 2, 3, 14, 224, (0, 2), 0.2, False),
        (160, 2, 2, 5, 336, (1,), 0.2, True),
        (80, 1, 4, 14, 512, (1, 3), 0.0, True),
    ],
)
def test_other_sizes(
    tmp_path: Path, width, heads, depth, window, size, global_blocks, rel_pos, padded
) -> None:
    """Nothing is tied to the golden sizes: widths, heads, windows, image sizes, head size 80."""
    grid = size // 16
    assert padded == bool(grid % window)
    keys = vit_keys(
        width=width,
        head_size=width // heads,
        tables=rows(depth, window, grid, global_blocks),
        spelling="rel_",
        adapters={kind: range(depth) for kind in ("Space", "MLP", "Depth")},
        form="public",
    )
    path = tmp_path / "other.pth"
    torch.save(weights(keys, rel_pos=rel_pos, seed=31), path)
    loaded = load_checkpoint(path)
    network = infer(loaded, Overrides(global_blocks=global_blocks, heads=heads, classes=3)).network
    assert (network.image_size, network.windows, network.masks) == (size, (window,), 3)
    reference = build_reference(network, loaded.tensors)
    folded = fold(reference)
    image = torch.from_numpy(seeded.image(8, (1, 3, size, size)))
    expected = reference.encode(image).numpy()
    with torch.inference_mode():
        assert difference(expected, folded.encoder(image).numpy()).relative_l2 <= 3e-6
    graph = graphs.contract(network)
    graphs.export_encoder(folded.encoder, graph["encoder"], tmp_path / "encoder.onnx")
    (embeddings,) = session(tmp_path / "encoder.onnx").run(None, {"image": image.numpy()})
    assert relative_l2(embeddings, expected) <= ONNX_LIMIT


def test_an_odd_grid_and_weights_over_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole export, through its proof: 21×21 tokens, and weights in files of their own."""
    monkeypatch.setattr(graphs, "EXTERNAL_DATA_BYTES", 100_000)
    keys = vit_keys(
        width=32,
        head_size=16,
        tables=rows(2, 7, 21, (1,)),
        spelling="rel_",
        adapters={kind: range(2) for kind in ("Space", "MLP")},
        form="public",
    )
    torch.save(weights(keys, rel_pos=0.2, seed=31), tmp_path / "odd.pth")
    exported = stages.export_checkpoint(
        tmp_path / "odd.pth",
        output=None,
        base=None,
        images=None,
        overrides=Overrides(heads=2, global_blocks=(1,), classes=3),
        force=False,
    )
    manifest = exported.manifest
    assert (manifest.network.image_size, manifest.network.masks) == (336, 3)
    for tensor in manifest.parity[0].tensors.values():
        assert tensor.relative_l2 <= ONNX_LIMIT
    roles = {entry.path: entry.role for entry in manifest.files}
    assert roles["encoder.onnx.data"] == roles["decoder.onnx.data"] == "weights"
    assert (exported.bundle / "encoder.onnx").stat().st_size < 1_000_000
