"""Keys and shapes → facts and conventions of a SAM ViT, for many sizes and options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from inference import ADAPTED, TABLES, guessed, infer_keys, refusal
from invented import checkpoint, rows, vit_keys

from medsa_deploy.errors import CheckpointError, UsageError
from medsa_deploy.exporters.architecture import Overrides, infer

VIT_B, VIT_L, VIT_H = (2, 5, 8, 11), (5, 11, 17, 23), (7, 15, 23, 31)


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
    architecture = infer_keys(vit_keys(width=width, head_size=head_size, tables=tables))
    network = architecture.network
    assert (network.family, network.encoder, network.patch_size) == ("sam", "vit", 16)
    assert (network.widths, network.depths) == ((width,), (depth,))
    assert network.heads == (width // head_size,)
    if len(global_blocks) < depth:
        assert network.windows == (window,)
    assert network.global_blocks == global_blocks
    assert (network.image_size, network.embedding_size) == (image_size, image_size // 16)
    assert network.rel_pos == "zero"
    assert guessed(architecture).keys() <= {"--window-size"}


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
    architecture = infer_keys(vit_keys(tables=tables))
    network = architecture.network
    assert (network.windows[0], network.global_blocks, network.image_size) == facts
    assert guessed(architecture) == guesses


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
    architecture = infer_keys(vit_keys(tables=tables), **options)
    assert {name: getattr(architecture.network, name) for name in facts} == facts
    named = {f"--{name.replace('_', '-')}" for name in options}
    assert not named & {guess.option for guess in architecture.guesses}


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
    architecture = infer_keys(keys, classes=given_classes, class_names=names)
    assert (architecture.network.classes, architecture.network.masks) == (classes, classes)
    assert architecture.network.mask_tokens == mask_tokens
    assert architecture.conventions.class_names == names
    assert any(g.option == "--classes" for g in architecture.guesses) == guess


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
    architecture = infer_keys(vit_keys(**given_keys), public_training=public_training)
    assert (architecture.network.family, architecture.network.outputs) == (family, outputs)
    assert architecture.network.masks == (1 if outputs == "classes" else 4)
    conventions = architecture.conventions
    assert (conventions.preprocess, conventions.point_order) == (profile, order)
    assert (conventions.point_frame, conventions.threshold) == ("network", 0.5)
    assert (conventions.intensity_window, conventions.class_names) == (None, ())
    guesses = {g.option: g for g in architecture.guesses}
    assert guesses["--preprocess"].value == profile
    assert guesses["--point-order"].value == order
    assert ("--preprocess medsam" in guesses["--preprocess"].because) == (profile == "sam")


def test_conventions_given_are_kept_and_not_guessed() -> None:
    choices = {
        "preprocess": "medsam",
        "point_order": "yx",
        "point_frame": "image",
        "point_scale": 0.5,
        "intensity_window": (-175.0, 250.0),
        "threshold": 0.25,
        "class_names": ("liver",),
    }
    architecture = infer_keys(vit_keys(tables=(27, 31)), trained_with="sam", **choices)
    assert {name: getattr(architecture.conventions, name) for name in choices} == choices
    assert architecture.guesses == ()


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
