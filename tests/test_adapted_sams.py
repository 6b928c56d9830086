"""Networks of other code than Med-SA's: golden ≙ reference ≙ folded ≙ ONNX; conventions."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from command_line import call
from direct_sam import DirectSAM
from golden_cases import ADAPTED_SAMS, GoldenCase, export_options, relative_l2, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from invented import (
    Keys,
    adapter_keys,
    efficient_keys,
    finetune_keys,
    med2d_keys,
    mobile_keys,
    own_efficient_keys,
    rows,
    samed_keys,
    vit_keys,
    weights,
)
from invented import checkpoint as checkpoint_of_tensors

from medsa_deploy.bundle.manifest import Network, load_manifest
from medsa_deploy.errors import CheckpointError, UsageError
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import Checkpoint, load_checkpoint
from medsa_deploy.exporters.families.registry import merged
from medsa_deploy.exporters.networks import build_reference, fold
from medsa_deploy.exporters.reference import ReferenceNetwork

LIMIT, IOU_LIMIT, ONNX_LIMIT = 3e-6, 3e-5, 2e-5


def loaded(name: str, path: Path) -> Checkpoint:
    base = path.with_name(f"{name}-base.pth")
    return load_checkpoint(path, base=base if GoldenCase(name).base is not None else None)


def reference_of(name: str, path: Path) -> ReferenceNetwork:
    checkpoint = loaded(name, path)
    network = infer(checkpoint, Overrides(**export_options(name))).network
    return build_reference(network, checkpoint.tensors)


def no_mask(case: GoldenCase) -> dict[str, np.ndarray]:
    """What a decoder with mask prompts takes if there is none."""
    if case.efficient:
        return {}
    side = case.size // 4
    return {
        "mask_input": np.zeros((1, 1, side, side), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
    }


def assert_golden(case: GoldenCase, outputs: tuple[np.ndarray, ...], limit: float) -> None:
    names = ("image_embeddings", "low_res_logits", "iou_predictions")
    for name, value in zip(names, outputs, strict=True):
        assert value.shape == case.expected[name].shape
        bound = IOU_LIMIT if name == "iou_predictions" else limit
        assert relative_l2(value, case.expected[name]) <= bound, name


@pytest.mark.parametrize("name", ADAPTED_SAMS)
@torch.inference_mode()
def test_reference_and_folded_are_golden(name: str, checkpoint_of) -> None:
    case = GoldenCase(name)
    reference = reference_of(name, checkpoint_of(name))
    image = torch.from_numpy(case.image)
    coords, labels = map(torch.from_numpy, case.coords_and_labels)
    embeddings = reference.encode(image)
    outputs = (embeddings, *reference.decode(embeddings, coords, labels))
    assert_golden(case, tuple(value.numpy() for value in outputs), LIMIT)

    folded = fold(reference)
    embeddings = folded.encoder(image)
    masks = map(torch.from_numpy, no_mask(case).values())
    outputs = (embeddings, *folded.decoder(embeddings, coords, labels, *masks))
    assert_golden(case, tuple(value.numpy() for value in outputs), LIMIT)
    outputs = (embeddings, *folded.click_part(*folded.image_part(embeddings), coords, labels))
    assert_golden(case, tuple(value.numpy() for value in outputs), LIMIT)


@pytest.mark.parametrize("name", ADAPTED_SAMS)
def test_golden_through_the_command_line(name: str, bundle_of) -> None:
    """The whole decoder and its parts, which clicks and unprompted images run through."""
    case, bundle = GoldenCase(name), bundle_of(name)
    parity = load_manifest(bundle).parity[0]
    assert parity.mask_pixels_differing <= 1e-4

    def run(graph: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        session = ort.InferenceSession(bundle / f"{graph}.onnx")
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, inputs), strict=True))

    coords, labels = case.coords_and_labels
    prompts = {"point_coords": coords, "point_labels": labels}
    encoded = run("encoder", image=case.image)
    parts = run("decoder-image", **encoded)
    for decoded in (
        run("decoder", **encoded, **prompts, **no_mask(case)),
        run("decoder-click", **parts, **prompts),
    ):
        outputs = (*encoded.values(), decoded["low_res_masks"], decoded["iou_predictions"])
        assert_golden(case, outputs, ONNX_LIMIT)


# Other sizes, subsets, classes and prompts: against plain equations on the file's own keys

CLICKS = (
    (torch.zeros(0, 2), torch.zeros(0)),
    (torch.tensor([[30.0, 44.0], [99.5, 7.0], [0, 0]]), torch.tensor([1.0, 0, -1])),
    (torch.tensor([[10.0, 20], [70, 80]]), torch.tensor([2.0, 3])),
)
"""Nothing, clicks with SAM's padding point, a box."""


def assert_direct(checkpoint: Checkpoint, direct: DirectSAM, **options: object) -> Network:
    """Reference, folded and parts are the equations, for every prompt."""
    network = infer(checkpoint, Overrides(**options)).network
    reference = build_reference(network, checkpoint.tensors)
    folded = fold(reference)
    size = network.image_size
    image = torch.from_numpy(seeded.image(4, (2, 3, size, size)))
    direct.heads, direct.window = network.heads[0], network.windows[0]
    direct.global_blocks = network.global_blocks
    with torch.inference_mode():
        expected = direct.encode(image)
        for encoder in (reference.encode, folded.encoder):
            assert relative_l2(encoder(image).numpy(), expected.numpy()) <= LIMIT
        embedding = reference.encode(image)[:1]
        no_mask = (torch.zeros(1, 1, size // 4, size // 4), torch.zeros(1))
        leaving = slice(reference.leaving.start, reference.leaving.stop)
        for coords, labels in CLICKS:
            masks, iou = (part[leaving] for part in direct.decode(embedding, coords, labels))
            prompts = (coords[None], labels[None])
            for outputs in (
                reference.decode(embedding, *prompts),
                folded.decoder(embedding, *prompts, *no_mask),
                folded.click_part(*folded.image_part(embedding), *prompts),
            ):
                assert outputs[0].shape == (1, network.masks, size // 4, size // 4)
                assert relative_l2(outputs[0][0].numpy(), masks.numpy()) <= LIMIT
                assert relative_l2(outputs[1][0].numpy(), iou.numpy()) <= IOU_LIMIT
    return network


def loaded_from(folder: Path, keys: Keys, base: Keys | None = None, *, seed: int = 5) -> Checkpoint:
    torch.save(weights(keys, rel_pos=0.2, seed=seed), folder / "x.pth")
    if base is None:
        return load_checkpoint(folder / "x.pth")
    torch.save(weights(base, rel_pos=0.2, seed=seed + 1), folder / "base.pth")
    return load_checkpoint(folder / "x.pth", base=folder / "base.pth")


TABLES = (27, 15, 27, 15)


@pytest.mark.parametrize(
    ("tables", "blocks"),
    [(TABLES, range(4)), ((27, 31), (1,)), ((27, 39, 27), (0, 2)), ((31, 31), (0, 1))],
)
def test_sam_med2d_of_other_sizes(tmp_path: Path, tables: Any, blocks: Any) -> None:
    keys = med2d_keys(vit_keys(tables=tables), blocks)
    network = assert_direct(loaded_from(tmp_path, keys), DirectSAM(weights(keys, rel_pos=0.2)))
    assert (network.family, network.outputs, network.masks) == ("sam_med2d", "sam", 4)


ADAPTERS = {"Space": (0, 2), "MLP": (0, 2), "Depth": (0, 2)}


@pytest.mark.parametrize(
    ("vit", "adapted", "options"),
    [
        ({"adapters": ADAPTERS, "mask_tokens": 3}, {"layers": (1,)}, {}),
        ({"adapters": ADAPTERS, "tables": (27, 39, 27, 39)}, {"layers": (0, 1)}, {}),
        ({"mask_tokens": 6}, {"layers": (0,)}, {}),
        ({"adapters": ADAPTERS, "mask_tokens": 3}, {}, {"trained_with": "finetune-sam"}),
        ({"mask_tokens": 5}, {}, {"trained_with": "finetune-sam"}),
        ({"mask_tokens": 3}, {"lora_blocks": (0, 3)}, {}),
        ({"mask_tokens": 9}, {"lora_blocks": range(4), "rank": 2}, {"classes": 7}),
        (
            {"mask_tokens": 4},
            {"lora_attentions": ("layers.1.self_attn", "layers.0.cross_attn_image_to_token")},
            {"classes": 3},
        ),
        (
            {"mask_tokens": 3},
            {"lora_blocks": (1,), "lora_attentions": ("final_attn_token_to_image",), "rank": 8},
            {},
        ),
    ],
)
def test_finetune_sam_of_any_subset(
    tmp_path: Path, vit: Any, adapted: Any, options: dict[str, Any]
) -> None:
    keys = finetune_keys(vit_keys(**{"tables": TABLES} | vit), **adapted)
    direct = DirectSAM(weights(keys, rel_pos=0.2), windows_first=True)
    network = assert_direct(loaded_from(tmp_path, keys), direct, **options)
    assert (network.family, network.outputs) == ("finetune_sam", "labels")
    assert network.masks == vit.get("mask_tokens", 4) - 1 == network.classes + 1


@pytest.mark.parametrize(
    ("classes", "small", "base_grid", "size"),
    [(1, False, 16, 128), (2, True, 16, 224), (8, False, 8, 208), (3, True, 16, 256)],
)
def test_samed_over_a_base_of_another_size(
    tmp_path: Path, classes: int, small: bool, base_grid: int, size: int
) -> None:
    """The base's positions are resized bilinearly, its global tables linearly."""
    base = vit_keys(tables=rows(4, 14, base_grid, (1, 3)))
    base["image_encoder.pos_embed"] = (1, base_grid, base_grid, 64)
    keys = samed_keys(base, classes, small=small)
    tensors = weights(base, rel_pos=0.2, seed=6) | weights(keys, rel_pos=0.2)
    direct = DirectSAM(tensors, positions="bilinear")
    network = assert_direct(loaded_from(tmp_path, keys, base), direct, image_size=size)
    assert (network.family, network.outputs, network.adapters) == ("samed", "labels", ("lora",))
    assert (network.classes, network.masks, network.image_size) == (classes, classes + 1, size)


def test_samed_saved_whole(tmp_path: Path) -> None:
    """Its keys are finetune-SAM's LoRA; the option says which code trained it."""
    keys = finetune_keys(vit_keys(tables=TABLES, mask_tokens=3), lora_blocks=range(4))
    checkpoint = loaded_from(tmp_path, keys)
    direct = DirectSAM(weights(keys, rel_pos=0.2), positions="bilinear")
    network = assert_direct(checkpoint, direct, trained_with="samed")
    assert (network.family, network.masks, network.classes) == ("samed", 3, 2)
    (guess,) = (g for g in infer(checkpoint, Overrides()).guesses if g.fact == "trained with")
    assert (guess.value, guess.option) == ("finetune-sam", "--trained-with")
    assert "samed" in guess.because


@pytest.mark.parametrize(("width", "depth", "size"), [(64, 2, 96), (192, 1, 256), (128, 3, 224)])
@torch.inference_mode()
def test_efficientsam_of_other_sizes(tmp_path: Path, width: int, depth: int, size: int) -> None:
    keys = own_efficient_keys(width=width, depth=depth)
    checkpoint = loaded_from(tmp_path, keys)
    architecture = infer(checkpoint, Overrides(image_size=size))
    reference = build_reference(architecture.network, checkpoint.tensors)
    image = torch.from_numpy(seeded.image(4, (2, 3, size, size)))
    blocks = tuple(range(depth))
    direct = DirectSAM(weights(keys), heads=width // 64, window=0, global_blocks=blocks)
    expected = direct.encode(image).numpy()
    assert relative_l2(reference.encode(image).numpy(), expected) <= LIMIT
    assert relative_l2(fold(reference).encoder(image).numpy(), expected) <= LIMIT
    conventions = architecture.conventions
    assert (conventions.preprocess, conventions.postprocess) == ("efficientsam", "efficientsam")
    assert (conventions.point_order, conventions.point_scale, conventions.pad_points) == (
        "xy",
        1,
        6,
    )


@torch.inference_mode()
def test_efficientsam_as_a_base_of_adapters(tmp_path: Path) -> None:
    """Its names are the own code's; the network is the public Med-SA code's, whose eps differs."""
    base_keys = efficient_keys(grid=None)
    names = {"lin1": "fc1", "lin2": "fc2"}
    base = {re.sub(r"lin[12]", lambda m: names[m[0]], k): v for k, v in base_keys.items()}
    adapters = {k: v for k, v in base_keys.items() if "_Adapter." in k}
    base = {k: v for k, v in base.items() if "_Adapter." not in k}
    checkpoint = loaded_from(tmp_path, adapters, base)
    network = infer(checkpoint, Overrides(image_size=96)).network
    assert (network.family, network.adapters) == ("efficient_sam", ("space", "mlp"))
    tensors = weights(base, seed=6) | weights(adapters)
    direct = DirectSAM(tensors, heads=1, window=0, global_blocks=(0, 1), eps=1e-5)
    image = torch.from_numpy(seeded.image(4, (1, 3, 96, 96)))
    embedding = build_reference(network, checkpoint.tensors).encode(image)
    assert relative_l2(embedding.numpy(), direct.encode(image).numpy()) <= LIMIT


# What keys leave open, and options that say it


def unweighted(keys: Keys) -> Checkpoint:
    """A file of zeros that take no memory, its updates merged."""
    zeros = {key: torch.zeros(()).expand(shape) for key, shape in keys.items()}
    tensors, lora = merged(zeros)
    return replace(checkpoint_of_tensors(tensors), lora=lora, stored=keys)


ALL_ADAPTERS = {"Space": range(4), "MLP": range(4)}
LORA = {"lora_blocks": range(4)}


@pytest.mark.parametrize(
    ("keys", "family", "guess", "alternatives"),
    [
        (vit_keys(), "sam", "sam", "medsam, sam-med2d, med-sa, samed, finetune-sam"),
        (vit_keys(adapters=ALL_ADAPTERS), "medsa", "med-sa", "finetune-sam"),
        (vit_keys(adapters=ALL_ADAPTERS, form="public"), "medsa", None, ""),
        (vit_keys(form="public"), "sam", None, ""),
        (vit_keys(hyp={0: (16, 8, 8)}), "medsa", None, ""),
        (finetune_keys(vit_keys(), layers=(0,)), "finetune_sam", None, ""),
        (finetune_keys(vit_keys(), **LORA), "finetune_sam", "finetune-sam", "samed"),
        (vit_keys(mask_tokens=3), "finetune_sam", "finetune-sam", "samed"),
        (vit_keys(mask_tokens=3, adapters=ALL_ADAPTERS), "finetune_sam", None, ""),
        (
            finetune_keys(vit_keys(), **LORA, lora_attentions=("layers.0.self_attn",)),
            "finetune_sam",
            None,
            "",
        ),
        (med2d_keys(vit_keys(), range(4)), "sam_med2d", None, ""),
        (own_efficient_keys(), "efficientsam", None, ""),
        (efficient_keys(), "efficient_sam", None, ""),
        (mobile_keys(), "mobile_sam", None, ""),
        (mobile_keys(adapted=False), "mobile_sam", "sam", "medsam, med-sa"),
    ],
)
def test_readings_of_keys_are_said(
    keys: Keys, family: str, guess: str | None, alternatives: str
) -> None:
    architecture = infer(unweighted(keys), Overrides())
    assert architecture.network.family == family
    readings = [
        (g.value, g.option, g.because) for g in architecture.guesses if g.fact == "trained with"
    ]
    if guess is None:
        assert readings == []
    else:
        ((value, option, because),) = readings
        assert (value, option) == (guess, "--trained-with")
        assert f"files of {alternatives} may look the same" in because


@pytest.mark.parametrize(
    ("keys", "code", "family", "outputs", "conventions"),
    [
        (vit_keys(), "sam", "sam", "sam", ("sam", "sam", "xy", "required")),
        (vit_keys(), "medsam", "sam", "sam", ("medsam", "medsam", "xy", "required")),
        (vit_keys(), "sam-med2d", "sam", "sam", ("sam-med2d", "sam", "xy", "required")),
        (vit_keys(), "med-sa", "sam", "classes", ("medsa", "sam", "yx", "required")),
        (vit_keys(), "samed", "samed", "labels", ("samed", "samed", "xy", "none")),
        (
            vit_keys(adapters=ALL_ADAPTERS),
            "finetune-sam",
            "finetune_sam",
            "labels",
            ("finetune-sam", "finetune-sam", "xy", "none"),
        ),
    ],
)
def test_trained_with_sets_what_keys_cannot(
    keys: Keys, code: Any, family: str, outputs: str, conventions: tuple[str, ...]
) -> None:
    architecture = infer(unweighted(keys), Overrides(trained_with=code))
    assert (architecture.network.family, architecture.network.outputs) == (family, outputs)
    c = architecture.conventions
    assert (c.preprocess, c.postprocess, c.point_order, c.prompts) == conventions
    facts = {g.fact for g in architecture.guesses}
    assert not facts & {"trained with", "preprocess", "point order"}


def test_prompts_are_an_option() -> None:
    plain = unweighted(vit_keys())
    assert infer(plain, Overrides(prompts=False)).conventions.prompts == "none"
    finetuned = unweighted(finetune_keys(vit_keys(), layers=(0,)))
    architecture = infer(finetuned, Overrides())
    assert architecture.conventions.prompts == "none"
    (guess,) = (g for g in architecture.guesses if g.fact == "prompts")
    assert "with a box" in guess.because
    assert guess.option == "--prompts"
    architecture = infer(finetuned, Overrides(prompts=True))
    assert architecture.conventions.prompts == "required"
    assert "prompts" not in {g.fact for g in architecture.guesses}


@pytest.mark.parametrize(
    ("keys", "options", "words"),
    [
        (
            vit_keys(adapters=ALL_ADAPTERS),
            {"trained_with": "samed"},
            "--trained-with samed: the checkpoint's keys are those of a SAM ViT, which med-sa or "
            "finetune-sam trains",
        ),
        (
            med2d_keys(vit_keys(), (0,)),
            {"trained_with": "sam"},
            "keys are those of SAM-Med2D's network, which sam-med2d trains",
        ),
        (
            finetune_keys(vit_keys(mask_tokens=3), layers=(0,)),
            {"classes": 5},
            "--classes 5: a decoder with 3 mask tokens has 1 classes and the background",
        ),
        (
            med2d_keys(vit_keys(), (0,)),
            {"image_size": 144},
            "a grid of 9×9 tokens, which its adapters cannot halve: give --image-size a multiple",
        ),
        (
            finetune_keys(vit_keys(), layers=(0,)),
            {"depth_chunk": 4},
            "3D is for SAM ViTs with adapters; this is finetune-SAM's network",
        ),
    ],
)
def test_options_that_contradict_the_keys(keys: Keys, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        infer(unweighted(keys), Overrides(**options))


def test_a_samed_file_needs_its_base_and_size(checkpoint_of) -> None:
    path = checkpoint_of("samed")
    with pytest.raises(CheckpointError, match=r"adapters only .* with --base FILE"):
        load_checkpoint(path)
    with pytest.raises(UsageError, match="a SAMed file does not show its image size"):
        infer(loaded("samed", path), Overrides())
    assert "laid over samed-base.pth: 51 of its 188 tensors are used" in loaded("samed", path).notes


def with_part(keys: Keys, key: str, shape: tuple[int, ...] | None) -> Keys:
    return {k: v for k, v in (keys | {key: shape}).items() if v is not None}


ATTENTION = "mask_decoder.transformer.layers.0.self_attn"
QKV = "image_encoder.blocks.0.attn.qkv"
WRAPPED = finetune_keys(vit_keys(), lora_blocks=(0,), lora_attentions=("layers.0.self_attn",))
NUMBERED = samed_keys(vit_keys(), 2, small=True)


@pytest.mark.parametrize(
    ("keys", "base", "words"),
    [
        (
            with_part(WRAPPED, f"{QKV}.linear_b_v.weight", None),
            None,
            f"{QKV} carries a low-rank update, but the checkpoint lacks {QKV}.linear_b_v",
        ),
        (
            with_part(WRAPPED, f"{ATTENTION}.q_proj.w_a.weight", (4, 255)),
            None,
            f"{ATTENTION}.q_proj: its low-rank update ((4, 255), (256, 4)) does not fit its weight",
        ),
        (
            with_part(WRAPPED, f"{ATTENTION}.v_proj.proj.weight", None),
            None,
            f"the checkpoint lacks {ATTENTION}.v_proj.proj.weight",
        ),
        (
            with_part(NUMBERED, "w_a_003", None),
            vit_keys(),
            f"w_b_003 is half of a low-rank update of {QKV.replace('0', '1')}: expected two",
        ),
        (
            NUMBERED,
            vit_keys(tables=(27, 15)),
            "there are 8 low-rank updates w_a, but the encoder has 2 blocks",
        ),
        (
            with_part(NUMBERED, "sa_b_001", (255, 4)),
            vit_keys(),
            f"{ATTENTION}.v_proj: its low-rank update ((4, 256), (255, 4)) does not fit",
        ),
        (
            with_part(NUMBERED, "cti_a_004", (4, 256)) | {"cti_b_004": (128, 4)},
            vit_keys(),
            "there is a low-rank update of mask_decoder.transformer.layers.2.cross_attn_token_to_",
        ),
    ],
)
def test_updates_that_do_not_fit_are_refused(keys: Keys, base: Keys | None, words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)):
        unweighted((base or {}) | keys)


def test_decoder_adapters_of_no_known_code_are_refused() -> None:
    keys = vit_keys(form="public") | adapter_keys("mask_decoder.transformer.layers.0.Adapter", 256)
    with pytest.raises(CheckpointError, match=r"unknown keys: .*layers\.\*\.Adapter|layers\.0\."):
        infer(unweighted(keys), Overrides())


def test_inspect_prints_the_reading(checkpoint_of) -> None:
    path = checkpoint_of("samed")
    base = path.with_name("samed-base.pth")
    options = ("--base", base, "--image-size", 256, "--class-names", "a,b,c")
    facts = " ".join(call("inspect", path, *options).out.split())
    for words in (
        "network SAMed, ViT",
        "3 class(es) and a background, which exclude each other: mask tokens 0…3 of 4",
        "prompts none",
        "3× image_encoder.blocks.*.attn.qkv lora on q and v rank 4",
    ):
        assert words in facts
    facts = " ".join(call("inspect", base, "--trained-with", "finetune-sam").out.split())
    for words in ("network finetune-SAM, ViT", "mask tokens 1…3 of 4", "prompts none"):
        assert words in facts
    assert "trained with sam SAM's keys; files of" in " ".join(call("inspect", base).out.split())


DAMAGED: dict[str, tuple[Keys, dict[str, Any]]] = {
    "sam_med2d": (med2d_keys(vit_keys(tables=(27, 15)), (0, 1)), {}),
    "finetune_sam": (
        finetune_keys(
            vit_keys(tables=(27, 15), adapters={"Space": (0,), "MLP": (0,)}, mask_tokens=3),
            layers=(0,),
            lora_blocks=(1,),
            lora_attentions=("layers.1.self_attn", "final_attn_token_to_image"),
        ),
        {},
    ),
    "samed": (
        vit_keys(tables=(27, 15)) | samed_keys(vit_keys(tables=(27, 15)), 3, small=True),
        {"image_size": 96},
    ),
    "efficientsam": (own_efficient_keys(), {"image_size": 96}),
}


@pytest.mark.parametrize("family", DAMAGED)
def test_undamaged_files_are_read(family: str) -> None:
    keys, options = DAMAGED[family]
    assert infer(unweighted(keys), Overrides(**options)).network.family == family


@settings(deadline=None, max_examples=12)
@given(data=st.data())
@pytest.mark.parametrize("family", DAMAGED)
def test_damaged_files_are_refused_or_read(family: str, data: st.DataObject) -> None:
    """One key taken out, renamed or of another shape."""
    keys, options = DAMAGED[family]
    key = data.draw(st.sampled_from(sorted(keys)))
    shape = data.draw(st.none() | st.lists(st.sampled_from([0, 1, 2, 3, 4, 64, 256]), max_size=4))
    damaged = {k: v for k, v in keys.items() if k != key}
    if shape is not None:
        damaged[data.draw(st.sampled_from([key, f"{key}.x", key.replace("0", "1")]))] = tuple(shape)
    try:
        checkpoint = unweighted(damaged)
        network = infer(checkpoint, Overrides(**options)).network
        build_reference(network, checkpoint.tensors)
    except (CheckpointError, UsageError):
        return
