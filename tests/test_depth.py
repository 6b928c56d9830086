"""3D (SD-Trans) from the options of export to a bundle's graphs, its proof and its session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command_line import call
from golden_cases import GoldenCase, relative_l2, seeded
from invented import Keys, hollow, rows, vit_keys, weights

from medsa_deploy import load
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.errors import ImageError, UsageError
from medsa_deploy.evaluation.cases import parity_cases, seeded_case, seeded_image
from medsa_deploy.evaluation.parity import run_case
from medsa_deploy.exporters.architecture import Architecture, Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.families.sam_vit import folded as vit
from medsa_deploy.exporters.graphs import contract, export_encoder
from medsa_deploy.exporters.networks import build_reference, fold
from medsa_deploy.exporters.reference import ReferenceNetwork

ADAPTERS: dict[str, Any] = dict.fromkeys(("Space", "MLP", "Depth"), range(4))
KEYS_3D = vit_keys(adapters=ADAPTERS)


def inferred(keys: Keys = KEYS_3D, **overrides: Any) -> Architecture:
    return infer(hollow(keys, public_training=True), Overrides(**overrides))


# What the options make of a checkpoint


def test_facts_of_chunks() -> None:
    architecture = inferred(depth_chunk=6)
    network = architecture.network
    assert (network.sd_trans, network.depth_chunk, network.slices) == ("public", 6, None)
    assert network.chunk == 6
    assert network.adapters == ("space", "mlp", "depth")
    assert architecture.conventions.prompt_scope == "chunk"
    guesses = {g.option: g.value for g in architecture.guesses}
    assert guesses["--sd-trans"] == "public"
    assert guesses["--prompt-scope"] == "chunk"
    assert "--depth-chunk" not in guesses
    (image,) = contract(network)["encoder"].inputs
    assert image.shape == ("B", 3, network.image_size, network.image_size)


def test_facts_of_a_fixed_number_of_slices() -> None:
    architecture = inferred(depth_chunk="none", slices=5, prompt_scope="slice")
    network = architecture.network
    assert (network.sd_trans, network.depth_chunk, network.slices) == ("public", None, 5)
    assert network.chunk == 5
    assert architecture.conventions.prompt_scope == "slice"
    guesses = {g.option for g in architecture.guesses}
    assert not guesses & {"--sd-trans", "--prompt-scope", "--depth-chunk"}
    graph = contract(network)["encoder"]
    assert graph.inputs[0].shape[0] == graph.outputs[0].shape[0] == 5


def test_facts_of_2d_and_the_guess_that_it_is() -> None:
    architecture = inferred()
    network = architecture.network
    assert (network.sd_trans, network.depth_chunk, network.slices) == (None, None, None)
    assert (network.chunk, network.adapters) == (1, ("space", "mlp"))
    (guess,) = (g for g in architecture.guesses if g.option == "--depth-chunk")
    assert (guess.fact, guess.value) == ("3D", "no")
    no_depth = vit_keys(adapters={kind: range(4) for kind in ("Space", "MLP")})
    assert all(g.option != "--depth-chunk" for g in inferred(no_depth).guesses)


def test_depth_adapters_count_where_they_run() -> None:
    flat, deep = inferred().network, inferred(depth_chunk=2).network
    share = 4 * (2 * 64 * 16 + 64 + 16)
    assert deep.parameters - flat.parameters == share
    assert deep.adapter_parameters - flat.adapter_parameters == share


def lacking(**adapters: Any) -> Keys:
    return vit_keys(adapters=ADAPTERS | adapters)


@pytest.mark.parametrize(
    ("keys", "overrides", "message"),
    [
        (KEYS_3D, {"depth_chunk": 1}, "--depth-chunk 1: depth takes at least 2 slices"),
        (KEYS_3D, {"depth_chunk": 0}, "--depth-chunk 0: depth takes at least 2 slices"),
        (KEYS_3D, {"depth_chunk": -4}, "--depth-chunk -4: depth takes at least 2 slices"),
        (KEYS_3D, {"depth_chunk": "none"}, "give --slices D"),
        (KEYS_3D, {"depth_chunk": "none", "slices": 1}, "--slices 1: depth takes at least 2"),
        (KEYS_3D, {"depth_chunk": 4, "slices": 8}, "--slices goes with --depth-chunk none"),
        (
            KEYS_3D,
            {"depth_chunk": "none", "slices": 4, "sd_trans": "paper"},
            "--sd-trans paper groups the slices of a chunk: give --depth-chunk D",
        ),
        (KEYS_3D, {"slices": 4}, "--slices is for 3D networks: add --depth-chunk"),
        (KEYS_3D, {"sd_trans": "paper"}, "--sd-trans is for 3D networks"),
        (KEYS_3D, {"prompt_scope": "slice"}, "--prompt-scope is for 3D networks"),
        (vit_keys(), {"depth_chunk": 4}, "no image_encoder.blocks.0.Space_Adapter: leave"),
        (lacking(MLP=(0, 1, 3)), {"depth_chunk": 4}, "no image_encoder.blocks.2.MLP_Adapter"),
        (lacking(Depth=(0, 1)), {"depth_chunk": 4}, "no image_encoder.blocks.2.Depth_Adapter"),
    ],
)
def test_options_that_do_not_fit(keys: Keys, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inferred(keys, **overrides)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("medsa_mobile", ["--image-size", 256], "3D is for SAM ViTs with adapters"),
        ("medsa_lora", ["--image-size", 256], "no image_encoder.blocks.0.Space_Adapter"),
        ("sam_plain", [], "3D needs a Space, an MLP and a Depth adapter in every block"),
    ],
)
def test_networks_that_are_not_3d(
    checkpoint_of, tmp_path: Path, name: str, options: list[object], message: str
) -> None:
    output = tmp_path / "x.medsa"
    done = call("export", checkpoint_of(name), "--depth-chunk", 4, *options, "-o", output)
    assert done.code == 2
    assert message in done.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["four", "2.5", "4,8", "", "None"])
def test_a_chunk_is_a_number_or_none(checkpoint_of, text: str) -> None:
    done = call("inspect", checkpoint_of("medsa_hyp_3d"), "--depth-chunk", text)
    assert done.code == 2
    assert f"--depth-chunk {text}" in done.error


def test_what_inspect_says(checkpoint_of) -> None:
    path = checkpoint_of("medsa_hyp_3d")
    done = call("inspect", path, "--depth-chunk", 8, "--sd-trans", "paper")
    assert done.code == 0, done.err
    assert "SD-Trans, paper grouping, chunks of 8 slices" in done.out
    assert "for their chunk" in done.out
    done = call("inspect", path, "--depth-chunk", "none", "--slices", 3, "--prompt-scope", "slice")
    assert "SD-Trans, public grouping, no chunks, exactly 3 slices" in done.out
    assert "for their slice" in done.out
    flat = call("inspect", path)
    assert "SD-Trans" not in flat.out
    assert "--depth-chunk" in flat.out


# The network


def reference(*, chunk: int | str, slices: int | None = None, grouping: Any = None):
    """A small network whose windows do not divide its grid: 6×6 tokens in windows of 4."""
    keys = vit_keys(tables=rows(2, 4, 6, (1,)), adapters=ADAPTERS | dict.fromkeys(ADAPTERS, (0, 1)))
    tensors = weights(keys, rel_pos=0.3, seed=9)
    overrides = Overrides(
        depth_chunk=chunk, slices=slices, sd_trans=grouping, window_size=4, global_blocks=(1,)
    )
    architecture = infer(hollow(keys), overrides)
    return build_reference(architecture.network, tensors)


def encoded(network: ReferenceNetwork, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the reference gives, and the folded encoder."""
    batch = torch.from_numpy(images)
    with torch.inference_mode():
        return network.encode(batch).numpy(), fold(network).encoder(batch).numpy()


@pytest.mark.parametrize("grouping", ["public", "paper"])
def test_chunks_of_a_batch_do_not_see_each_other(grouping: str) -> None:
    network = reference(chunk=3, grouping=grouping)
    images = seeded.image(3, (6, 3, 96, 96))
    both, folded = encoded(network, images)
    assert relative_l2(folded, both) <= 3e-6
    for half in (slice(0, 3), slice(3, 6)):
        alone, _ = encoded(network, images[half])
        assert relative_l2(both[half], alone) <= 1e-6


def test_slices_of_a_chunk_see_each_other() -> None:
    network = reference(chunk=3)
    images = seeded.image(3, (3, 3, 96, 96))
    before, _ = encoded(network, images)
    images[2] = 0
    after, _ = encoded(network, images)
    assert relative_l2(after[0], before[0]) > 1e-3


def test_groupings_differ() -> None:
    images = seeded.image(3, (3, 3, 96, 96))
    public, paper = (
        encoded(reference(chunk=3, grouping=g), images)[0] for g in ("public", "paper")
    )
    assert relative_l2(paper, public) > 1e-3


@pytest.mark.parametrize("chunk", [{"chunk": 3}, {"chunk": "none", "slices": 3}])
@pytest.mark.parametrize("limit", [2 * 3 * 36**2, 1])
def test_attending_a_few_heads_at_a_time_is_exact(
    monkeypatch: pytest.MonkeyPatch, chunk: dict[str, Any], limit: int
) -> None:
    network = reference(**chunk)
    images = seeded.image(3, (3, 3, 96, 96))
    expected, folded = encoded(network, images)
    monkeypatch.setattr(vit, "SCORES", limit)
    blocks = fold(network).encoder.blocks
    assert [block.attention.heads for block in blocks] == [4, 4]
    assert [b.attention.heads_at_once for b in blocks] == ([2, 2] if limit > 1 else [1, 1])
    _, split = encoded(network, images)
    assert relative_l2(split, expected) <= 3e-6
    np.testing.assert_allclose(split, folded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "window", "grid", "slices", "expected"),
    [
        (12, 0, 64, 1, 12),  # SAM ViT-B at 1024: 16.8 M scores a head and slice
        (12, 0, 64, 8, 2),
        (12, 0, 64, 16, 1),
        (12, 0, 64, 100, 1),
        (12, 14, 64, 8, 12),
        (16, 14, 64, 24, 11),
        (1, 0, 64, 50, 1),
    ],
)
def test_scores_are_held_for_as_many_heads_as_fit(
    heads: int, window: int, grid: int, slices: int, expected: int
) -> None:
    heads_at_once = vit._heads_at_once(heads, window, grid, slices)
    assert heads_at_once == expected
    side = window or grid
    scores = slices * (-(-grid // side)) ** 2 * side**4
    assert heads_at_once == 1 or heads_at_once * scores <= vit.SCORES
    assert heads_at_once == heads or (heads_at_once + 1) * scores > vit.SCORES


# The bundle


def test_the_manifest_of_a_3d_bundle(bundle_3d: Path) -> None:
    manifest = load_manifest(bundle_3d)
    network = manifest.network
    assert (network.sd_trans, network.depth_chunk, network.slices) == ("public", 4, None)
    assert "depth" in network.adapters
    assert manifest.conventions.prompt_scope == "chunk"
    (parity,) = manifest.parity
    assert (parity.seeded_images, parity.prompt_sets) == (2, 10)
    for tensor in parity.tensors.values():
        assert tensor.relative_l2 <= 2e-5


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_batches_of_whole_chunks_in_onnxruntime(
    bundle_3d: Path, checkpoint_of, chunks: int
) -> None:
    encoder = ort.InferenceSession(bundle_3d / "encoder.onnx")
    images = seeded.image(5, (4 * chunks, 3, 256, 256))
    (embeddings,) = encoder.run(None, {"image": images})
    parts = [encoder.run(None, {"image": images[i : i + 4]})[0] for i in range(0, 4 * chunks, 4)]
    assert relative_l2(embeddings, np.concatenate(parts)) <= 1e-6
    loaded = load_checkpoint(checkpoint_of("medsa_hyp_3d"))
    network = build_reference(load_manifest(bundle_3d).network, loaded.tensors)
    assert relative_l2(embeddings, network.encode(torch.from_numpy(images)).numpy()) <= 2e-5


def test_paper_grouping_in_onnxruntime(checkpoint_of, tmp_path: Path) -> None:
    loaded = load_checkpoint(checkpoint_of("medsa_hyp_3d"))
    network = infer(loaded, Overrides(depth_chunk=4, sd_trans="paper", classes=2)).network
    assert network.sd_trans == "paper"
    reference = build_reference(network, loaded.tensors)
    path = tmp_path / "encoder.onnx"
    export_encoder(fold(reference).encoder, contract(network)["encoder"], path, chunk=4)
    images = seeded.image(6, (8, 3, 256, 256))
    (embeddings,) = ort.InferenceSession(path).run(None, {"image": images})
    assert relative_l2(embeddings, reference.encode(torch.from_numpy(images)).numpy()) <= 2e-5


def test_the_depth_branch_projects_nothing_twice(bundle_3d: Path) -> None:
    """No second query, key and value; of the projection only what its adapter sees (folding 3)."""
    graph = onnx.load(bundle_3d / "encoder.onnx").graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    width = 96
    for block in range(4):
        products = [
            weights[node.input[1]]
            for node in graph.node
            if node.op_type == "MatMul"
            and node.name.startswith(f"blocks.{block}.")
            and len(weights.get(node.input[1], ())) == 2
        ]
        assert products.count((width, width)) == 3
        assert products.count((width, width // 4)) == 1
        assert len(products) == 3 + 1 + 5  # and [projection; fc1], fc2, Depth's fc2, two of the MLP


def test_a_session_takes_whole_chunks(bundle_3d: Path) -> None:
    pixels = [seeded_image(60, i)[:50] for i in range(8)]
    with load(bundle_3d, threads=2) as session:
        embeddings = session.encode_slices(pixels)
        assert [embedding.values.shape for embedding in embeddings] == [(1, 256, 16, 16)] * 8
        second = session.encode_slices(pixels[4:])
        np.testing.assert_array_equal(embeddings[5].values, second[1].values)
        alone = session.segment(embeddings[5], points=[(30, 20)])
        assert alone.masks.shape == (1, 2, 50, 60)
        for count in (0, 3, 5):
            with pytest.raises(UsageError, match=f"{count} slices were given; .* a multiple of 4"):
                session.encode_slices(pixels[:count])
        with pytest.raises(UsageError, match="sees 4 neighbouring slices at a time: give it a vol"):
            session.encode(pixels[0])
        with pytest.raises(ImageError, match=r"different sizes: \[\(50, 60\), \(60, 60\)\]"):
            session.encode_slices([*pixels[:3], seeded_image(60, 3)])
        with pytest.raises(ImageError, match="array has 3000 NaN or infinite values"):
            session.encode_slices([*pixels[:3], np.full((50, 60), np.nan)])


def test_a_flat_slice_is_encoded(bundle_3d: Path) -> None:
    """Volumes end in air; a single image that is flat is refused."""
    with load(bundle_3d, threads=2) as session:
        embeddings = session.encode_slices([np.zeros((50, 60), np.int16)] * 4)
    assert np.isfinite(embeddings[0].values).all()


# The proof


def volume(path: Path, count: int) -> Path:
    planes = [seeded_image(50, [3, i])[:40, :, 0] for i in range(count)]
    array = np.stack(planes, axis=2).astype(np.int16) * 8 - 1024
    nibabel.save(nibabel.Nifti1Image(array, np.diag([0.8, 0.8, 5, 1])), path)
    return path


def test_a_3d_bundle_is_verified(bundle_3d: Path, checkpoint_of, tmp_path: Path) -> None:
    done = call("verify", bundle_3d, "--json")
    assert done.code == 0, done.err
    (parity,) = done.json["parity"]
    assert (parity["images"], parity["seeded_images"], parity["prompt_sets"]) == (0, 1, 5)
    volume(tmp_path / "ct.nii.gz", 7)
    arguments = ["--checkpoint", checkpoint_of("medsa_hyp_3d"), "--images", tmp_path / "ct.nii.gz"]
    done = call("verify", bundle_3d, *arguments, "--json")
    assert done.code == 0, done.err
    (parity,) = done.json["parity"]
    assert (parity["images"], parity["seeded_images"], parity["prompt_sets"]) == (1, 2, 15)
    for tensor in parity["tensors"].values():
        assert tensor["relative_l2"] <= 2e-5


def test_the_users_images_of_a_proof(bundle_3d: Path, bundle: Path, tmp_path: Path) -> None:
    """A chunk from the middle of each volume in 3D; every file of a series in 2D."""
    from test_volumes_dicom import save, slices

    volume(tmp_path / "a.nii.gz", 9)
    volume(tmp_path / "b.nii.gz", 4)
    deep, flat = (load_manifest(path) for path in (bundle_3d, bundle))
    cases = parity_cases(deep, tmp_path)[2:]
    assert [case.name for case in cases] == ["a.nii.gz", "b.nii.gz"]
    assert [[image.plane.index for image in case.images] for case in cases] == [  # type: ignore[union-attr]
        [2, 3, 4, 5],
        [0, 1, 2, 3],
    ]
    assert [len(case.pairs) for case in cases] == [5, 5]
    series = save(slices(6), tmp_path / "series")
    assert [case.name for case in parity_cases(deep, series)[2:]] == ["series"]
    assert [case.name for case in parity_cases(flat, series)[2:]] == [f"{n}.dcm" for n in "abcdef"]
    volume(tmp_path / "short.nii.gz", 3)
    with pytest.raises(ImageError, match=r"short\.nii\.gz has 3 slices; this network sees 4 at"):
        parity_cases(deep, tmp_path / "short.nii.gz")
    with pytest.raises(ImageError, match="none does not exist"):
        parity_cases(deep, tmp_path / "none")


def test_the_seeded_case_of_a_golden_chunk(bundle_3d: Path) -> None:
    case = seeded_case(GoldenCase("medsa_hyp_3d").size, 64, 1, slices=4)
    assert len(case.images) == 4
    assert case.pairs == [(0, 0), (1, 1), (2, 2), (3, 3), (0, 4)]
    with load(bundle_3d, threads=2) as session:
        outputs = run_case(session, case)
    assert outputs.tensors["image_embeddings"].shape == (4, 256, 16, 16)
    assert outputs.tensors["low_res_masks"].shape == (5, 2, 64, 64)
