"""efficient_sam and mobile_sam of other sizes, with adapters and updates, by every command."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import call, copied, edit_manifest
from golden_cases import relative_l2, seeded
from invented import Keys, efficient_keys, low_rank_keys, mobile_keys, weights
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from medsa_deploy import load, stages
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.errors import PromptError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.families.registry import family_named
from medsa_deploy.exporters.networks import build_reference, fold
from medsa_deploy.exporters.reference import ReferenceNetwork

LIMIT, IOU_LIMIT, ONNX_LIMIT = 3e-6, 3e-5, 2e-5


def saved(path: Path, keys: Keys, *, seed: int = 5) -> Path:
    """A bare state dict of seeded weights."""
    torch.save(weights(keys, rel_pos=0.2, seed=seed), path)
    return path


def with_updates(keys: Keys, kind: str, rank: int = 4) -> Keys:
    return keys | low_rank_keys(keys, kind, rank)


def network_of(path: Path, **options: Any) -> ReferenceNetwork:
    loaded = load_checkpoint(path)
    return build_reference(infer(loaded, Overrides(**options)).network, loaded.tensors)


# Sizes, in torch


@pytest.mark.parametrize(
    ("keys", "options", "size"),
    [
        (efficient_keys(width=64, grid=6), {}, 96),
        (efficient_keys(width=128, depth=3, grid=14), {}, 224),
        (efficient_keys(width=384, depth=1, grid=20), {}, 320),
        (efficient_keys(width=64, grid=6), {"image_size": 208}, 208),
        (efficient_keys(width=96, grid=None), {"image_size": 128, "heads": 3}, 128),
        (efficient_keys(width=64, grid=6, adapted=False), {}, 96),
        (mobile_keys(), {"image_size": 112}, 112),  # stages of 14×14 and 7×7: one window each
        (mobile_keys(depths=(2, 1, 2, 1)), {"image_size": 224}, 224),
        (mobile_keys(), {"image_size": 336}, 336),
        (mobile_keys(adapted=False), {"image_size": 240}, 240),
    ],
)
@torch.inference_mode()
def test_folded_networks_of_other_sizes_agree(
    tmp_path: Path, keys: Keys, options: dict[str, Any], size: int
) -> None:
    reference = network_of(saved(tmp_path / "x.pth", keys), **options)
    assert reference.network.image_size == size
    folded = fold(reference)
    image = torch.from_numpy(seeded.image(4, (2, 3, size, size)))
    coords = torch.tensor([[[30.0, 40.0], [99.0, 7.5], [-1, -1]], [[1, 2], [70, 80], [9, 9]]])
    labels = torch.tensor([[1.0, 0, -1], [2, 3, 1]])
    side = size // 4
    no_mask = (torch.zeros(2, 1, side, side), torch.zeros(1))

    embedding = reference.encode(image)
    masks, iou = reference.decode(embedding, coords, labels)
    mask_inputs = no_mask if family_named(reference.network.family).decoder.takes_masks else ()
    folded_masks, folded_iou = folded.decoder(embedding, coords, labels, *mask_inputs)
    assert masks.shape == (2, 4, side, side)
    assert relative_l2(folded.encoder(image).numpy(), embedding.numpy()) <= LIMIT
    assert relative_l2(folded_masks.numpy(), masks.numpy()) <= LIMIT
    assert relative_l2(folded_iou.numpy(), iou.numpy()) <= IOU_LIMIT


def direct_embedding(t: dict[str, Tensor], image: Tensor, heads: int) -> Tensor:
    """efficient_sam's encoder with adapters as plain equations, on tables of the grid's length."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        scaled = deviation / (deviation.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * t[f"{name}.weight"] + t[f"{name}.bias"]

    def adapter(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}.D_fc1")), f"{name}.D_fc2")

    t = {key.removeprefix("image_encoder."): value for key, value in t.items()}
    x = F.conv2d(image, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=16)
    g, c = x.shape[-1], x.shape[1]
    positions = t["pos_embed"][:, 1:].reshape(1, 14, 14, c).permute(0, 3, 1, 2)
    x = (x + F.interpolate(positions, (g, g), mode="bicubic")).flatten(2).mT
    row, column = torch.arange(g * g) // g, torch.arange(g * g) % g
    for i in range(2):
        block = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-5), f"{block}.attn.qkv").chunk(3, -1)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        rows = t[f"{block}.attn.rel_h"][row[:, None] - row + g - 1]
        columns = t[f"{block}.attn.rel_w"][column[:, None] - column + g - 1]
        bias = torch.einsum("bhid,ijd->bhij", q, rows + columns)
        a = ((q @ k.mT / (c // heads) ** 0.5 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = linear(a, f"{block}.attn.proj")
        x = x + y + adapter(y, f"{block}.Space_Adapter")
        n = norm(x, f"{block}.norm2", 1e-5)
        y = linear(F.gelu(linear(n, f"{block}.mlp.lin1")), f"{block}.mlp.lin2")
        x = x + y + 0.5 * adapter(n, f"{block}.MLP_Adapter")
    x = norm(x @ t["neck.0.weight"].flatten(1).T, "neck.1", 1e-6).mT.unflatten(2, (g, g))
    x = F.conv2d(x, t["neck.2.weight"], padding=1).permute(0, 2, 3, 1)
    return norm(x, "neck.3", 1e-6).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("width", "grid"), [(64, 6), (128, 14), (192, 20)])
@torch.inference_mode()
def test_efficient_sams_encoder_is_its_equations(tmp_path: Path, width: int, grid: int) -> None:
    keys = efficient_keys(width=width, grid=grid, spelling="rel_")
    path = saved(tmp_path / "x.pth", keys, seed=grid)
    image = torch.from_numpy(seeded.image(3, (1, 3, 16 * grid, 16 * grid)))
    expected = direct_embedding(weights(keys, rel_pos=0.2, seed=grid), image, width // 64)
    assert relative_l2(network_of(path).encode(image).numpy(), expected.numpy()) <= LIMIT


def update(linear: str, parts: dict[str, Tensor], rank: int) -> Any:
    """A hook that adds a linear's low-rank update to its output, unmerged."""
    a, b = parts[f"{linear}.lora_A"], parts[f"{linear}.lora_B"]

    def add(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        if f"{linear}.lora_E" in parts:
            e = parts[f"{linear}.lora_E"][:, 0]
            return output + (x @ a.T) * e @ b.T / (parts[f"{linear}.ranknum"] + 1e-5)
        if linear.endswith("qkv"):
            third = output.shape[-1] // 3
            added = torch.zeros_like(output)
            added[..., :third] = x @ a[:rank].T @ b[:third].T / rank
            added[..., -third:] = x @ a[rank:].T @ b[third:].T / rank
            return output + added
        return output + x @ a.T @ b.T / rank

    return add


@pytest.mark.parametrize(("kind", "rank"), [("lora", 4), ("lora", 1), ("adalora", 3)])
@pytest.mark.parametrize(
    "base",
    [efficient_keys(grid=64, adapted=False), mobile_keys(adapted=False)],
    ids=["vit", "tiny"],
)
@torch.inference_mode()
def test_merged_updates_are_the_unmerged_network(
    tmp_path: Path, base: Keys, kind: str, rank: int
) -> None:
    """Against the network without updates whose linears are given them as they run."""
    parts = weights(low_rank_keys(base, kind, rank), seed=6)
    parts |= {k: torch.tensor([2.5]) for k in parts if k.endswith("ranknum")}
    torch.save(weights(base, rel_pos=0.2) | parts, tmp_path / "x.pth")
    merged = network_of(tmp_path / "x.pth", image_size=96)
    assert merged.network.adapters == (kind,)
    plain = network_of(saved(tmp_path / "plain.pth", base), image_size=96)
    linears = [key.removesuffix(".lora_A") for key in parts if key.endswith("lora_A")]
    for linear in linears:
        plain.get_submodule(linear).register_forward_hook(update(linear, parts, rank))
    image = torch.from_numpy(seeded.image(3, (1, 3, 96, 96)))
    expected = plain.encode(image).numpy()
    assert len(linears) == 3 * sum(merged.network.depths[-3:])
    assert relative_l2(merged.encode(image).numpy(), expected) <= 1e-5  # of rank 1 they are large


# Exported, and run by every command


@pytest.fixture(scope="module")
def efficient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small efficient_sam's checkpoint, bundle and some images."""
    folder = tmp_path_factory.mktemp("efficient")
    saved(folder / "efficient.pth", efficient_keys(grid=8))
    image = seeded_image(200, 4)[:150]
    (folder / "images").mkdir()
    Image.fromarray(image).save(folder / "images" / "a.png")
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 0, 2))).save(folder / "images/b.png")
    done = call("export", folder / "efficient.pth", "--images", folder / "images", "--json")
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a small mobile_sam with LoRA."""
    folder = tmp_path_factory.mktemp("mobile")
    saved(folder / "mobile.pth", with_updates(mobile_keys(adapted=False), "lora"))
    done = call("export", folder / "mobile.pth", "--image-size", 128, "--json")
    assert done.code == 0, done.err
    return folder / "mobile.medsa"


def model_of(bundle: Path, name: str) -> tuple[onnx.ModelProto, Counter[str]]:
    model = onnx.load(bundle / f"{name}.onnx")
    return model, Counter(node.op_type for node in model.graph.node)


def test_efficient_sams_graphs_are_folded(efficient: Path) -> None:
    blocks, neck = 2, 1
    model, operators = model_of(efficient / "efficient.medsa", "encoder")
    # q, k, v, [projection; fc1], fc2, [lin1; fc1], [lin2, fc2], two of attention, two of tables
    assert operators["MatMul"] == 11 * blocks + neck
    assert operators["Gelu"] == 2 * blocks
    epsilons = Counter(
        round(attribute.f, 9)
        for node in model.graph.node
        if node.op_type == "LayerNormalization"
        for attribute in node.attribute
        if attribute.name == "epsilon"
    )
    assert epsilons[1e-5] + (operators["LayerNormalization"] - epsilons.total()) == 2 * blocks
    assert epsilons[1e-6] == 2
    decoder = model_of(efficient / "efficient.medsa", "decoder")[0]
    assert [value.name for value in decoder.graph.input] == [
        "image_embeddings",
        "point_coords",
        "point_labels",
    ]


def test_lora_and_batch_norms_are_merged(mobile: Path) -> None:
    model, operators = model_of(mobile, "encoder")
    blocks, neck, stage_0, downsamples = 3, 1, 3, 9
    assert operators["BatchNormalization"] == 0
    assert operators["Conv"] == 2 + stage_0 + downsamples + blocks + neck
    assert operators["MatMul"] == 8 * blocks + neck  # q, k, v, projection, MLP, two of attention
    names = [tensor.name for tensor in model.graph.initializer]
    assert not [name for name in names if re.search("lora|running|ranknum", name)]
    inner = [tuple(tensor.dims) for tensor in model.graph.initializer if 4 in tensor.dims]
    assert not [dims for dims in inner if len(dims) == 2]  # no factor of rank 4


def test_inspect_says_where_updates_are(tmp_path: Path) -> None:
    keys = efficient_keys(grid=64, adapted=False)
    path = saved(tmp_path / "x.pth", with_updates(keys, "adalora", 6))
    done = call("inspect", path, "--image-size", 128)
    assert done.code == 0
    for fact in ("efficient_sam, ViT", "image_encoder.blocks.*.mlp.lin2", "adalora", "rank 6"):
        assert fact in done.out
    document = call("inspect", path, "--image-size", 128, "--json").json
    assert Counter(entry["linear"].rpartition(".")[2] for entry in document["lora"]) == {
        "qkv": 2,
        "lin1": 2,
        "lin2": 2,
    }
    without = call("inspect", path)
    assert "give --image-size" in without.error


def test_efficient_sams_conventions_are_recorded(efficient: Path) -> None:
    conventions = load_manifest(efficient / "efficient.medsa").conventions
    assert (conventions.preprocess, conventions.point_order) == ("medsa", "yx")
    assert (conventions.point_scale, conventions.pad_points) == (8, 6)
    done = call("inspect", efficient / "efficient.pth")
    assert "order yx, frame network, times 8, padded to 6" in done.out
    assert "--point-scale" in done.out
    assert "--pad-points" in done.out


@pytest.mark.parametrize(
    "prompts",
    [
        ["--point", "120,88"],
        ["--point", "120,88", "--point", "10,12,0", "--box", "30,40,190,140"],
        ["--box", "30,40,190,140", "--box", "0,0,50,50", "--box", "100,100,200,150"],
        ["--point", "120,88", "--multimask"],
        [word for i in range(6) for word in ("--point", f"{20 * i},30")],
    ],
)
def test_efficient_sam_segments(efficient: Path, tmp_path: Path, prompts: list[str]) -> None:
    image, mask = efficient / "images/a.png", tmp_path / "mask.png"
    done = call("run", efficient / "efficient.medsa", image, *prompts, "-o", mask, "--json")
    assert done.code == 0, done.err
    with Image.open(mask) as written:
        assert written.size == (200, 150)
    assert len(done.json["scores"]) == max(1, prompts.count("--box"))
    assert len(done.json["scores"][0]) == (3 if "--multimask" in prompts else 1)


def test_what_the_decoder_gets_is_padded_and_scaled(efficient: Path) -> None:
    """The session's masks are the graph's for prompts prepared by hand."""
    with load(efficient / "efficient.medsa", threads=1) as session:
        embedding = session.encode(seeded_image(200, 4)[:150])
        prediction = session.segment(embedding, points=[(100, 30)], box=(20, 15, 190, 120))
        # (y, x) of the 128×128 frame, then times 1024/128
        coords = np.array([[30, 100], [15, 20], [120, 190]]) * (128 / 150, 128 / 200) * 8
        coords = np.concatenate([coords, np.full((3, 2), -1)]).astype(np.float32)
        labels = np.array([1, 2, 3, -1, -1, -1], np.float32)
        logits, _ = session.backend.decode(embedding.values, coords[None], labels[None], None)
    np.testing.assert_allclose(prediction.low_res_logits, logits[:, :1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            [word for i in range(7) for word in ("--point", f"{20 * i},30")],
            "the prompt has 7 points (a box counts as two), but this network takes at most 6",
        ),
        (
            ["--box", "1,1,9,9", *[w for i in range(5) for w in ("--point", f"{20 * i},30")]],
            "the prompt has 7 points (a box counts as two)",
        ),
        (["--mask-input", "LOGITS"], "this network takes no mask prompt: give points or a box"),
    ],
)
def test_prompts_efficient_sam_cannot_take(
    efficient: Path, tmp_path: Path, prompts: list[str], message: str
) -> None:
    np.save(tmp_path / "logits.npy", np.zeros((32, 32), np.float32))
    arguments = [str(tmp_path / "logits.npy") if p == "LOGITS" else p for p in prompts]
    done = call("run", efficient / "efficient.medsa", efficient / "images/a.png", *arguments)
    assert done.code == 2
    assert message in done.error


def test_a_mask_prompt_is_refused_from_python_too(efficient: Path) -> None:
    with load(efficient / "efficient.medsa") as session:
        embedding = session.encode(seeded_image(64, 4))
        with pytest.raises(PromptError, match="takes no mask prompt"):
            session.segment(embedding, points=[(3, 3)], mask=np.zeros((32, 32)))


@pytest.mark.parametrize("options", [[], ["--checkpoint", "efficient.pth", "--images", "images"]])
def test_efficient_sam_verifies(efficient: Path, options: list[str]) -> None:
    arguments = [o if o.startswith("--") else efficient / o for o in options]
    done = call("verify", efficient / "efficient.medsa", *arguments, "--json")
    assert done.code == 0, done.err
    (parity,) = done.json["parity"]
    assert parity["prompt_sets"] == (4 * 4 if options else 4)
    assert all(t["relative_l2"] <= ONNX_LIMIT for t in parity["tensors"].values())


@pytest.mark.parametrize("pad", [0, 3])
def test_other_conventions_are_kept(efficient: Path, tmp_path: Path, pad: int) -> None:
    """Unpadded prompt sets differ in length; three points are a box and a click."""
    bundle = copied(efficient / "efficient.medsa", tmp_path)
    names = {"pad_points": pad, "point_scale": 1.0, "point_order": "xy"}
    edit_manifest(bundle, **{f"conventions__{name}": value for name, value in names.items()})
    with load(bundle) as session:
        embedding = session.encode(seeded_image(128, 4))
        prediction = session.segment(embedding, points=[(100, 30)])
        coords = np.array([[[100, 30], [-1, -1], [-1, -1]]], np.float32)[:, : max(1, pad)]
        labels = np.array([[1, -1, -1]], np.float32)[:, : max(1, pad)]
        logits, _ = session.backend.decode(embedding.values, coords, labels, None)
    np.testing.assert_allclose(prediction.low_res_logits, logits[:, :1], atol=1e-5, rtol=1e-5)
    # the sets of a proof fit, and go to the checkpoint's own network as they go to the graphs
    done = call("verify", bundle, "--checkpoint", efficient / "efficient.pth", "--json")
    assert done.code == 0, done.err


# Sizes users have, exported


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "image_size"),
    [
        (efficient_keys(width=192, depth=12, grid=64), None),
        (efficient_keys(width=384, depth=12, grid=32), None),
        (efficient_keys(width=192, depth=12, grid=20), None),
        (with_updates(efficient_keys(width=384, depth=12, grid=64, adapted=False), "lora", 8), 320),
        (with_updates(efficient_keys(width=192, depth=12, grid=64, adapted=False), "adalora"), 512),
        (mobile_keys(depths=(2, 2, 6, 2)), 1024),
        (mobile_keys(depths=(2, 2, 6, 2)), 384),
        (with_updates(mobile_keys(depths=(2, 2, 6, 2), adapted=False), "lora"), 512),
        (with_updates(mobile_keys(depths=(2, 2, 6, 2), adapted=False), "adalora", 12), 256),
    ],
)
def test_whole_networks_export_with_proof(
    tmp_path: Path, keys: Keys, image_size: int | None
) -> None:
    path = saved(tmp_path / "x.pth", keys, seed=11)
    exported = stages.export_checkpoint(
        path,
        output=None,
        base=None,
        images=None,
        overrides=Overrides(image_size=image_size),
        force=False,
    ).manifest
    for tensor in exported.parity[0].tensors.values():
        assert tensor.relative_l2 <= ONNX_LIMIT
