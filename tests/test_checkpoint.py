"""Checkpoint files → tensors: every container, and every kind of file that is refused, unrun."""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invented import adapter_keys, vit_keys, weights
from safetensors.torch import save_file

from medsa_deploy.bundle.files import sha256
from medsa_deploy.errors import CheckpointError
from medsa_deploy.exporters.architecture import Overrides, infer
from medsa_deploy.exporters.checkpoint import load_checkpoint

State = dict[str, torch.Tensor]
TABLE = "image_encoder.blocks.0.attn.rel_"
ADAPTER = "image_encoder.blocks.0.Space_Adapter.D_fc1.weight"


def tiny_state(rel: str = "pos_") -> State:
    """The least that looks like a whole SAM checkpoint: one small tensor under each part."""
    values = torch.linspace(-1, 1, 12).reshape(3, 4)
    names = ("image_encoder.patch_embed.proj.weight", "prompt_encoder.no_mask_embed.weight")
    tables = {f"{TABLE}{rel}{axis}": torch.zeros(3, 4) for axis in "hw"}
    state = {name: values.clone() for name in (*names, "mask_decoder.iou_token.weight", ADAPTER)}
    return state | tables


def training(state: State) -> dict[str, Any]:
    """What the public Med-SA training code saves."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
    helper = {"prefix": "logs", "log_path": "logs/a"}
    return {
        "epoch": 7,
        "model": "sam",
        "state_dict": state,
        "optimizer": optimizer,
        "best_tol": torch.tensor(0.25),
        "path_helper": helper,
    }


def parallel(state: State) -> State:
    return {f"module.{key}": value for key, value in state.items()}


def saved(path: Path, data: object, **options: Any) -> Path:
    torch.save(data, path, **options)
    return path


def assert_refused(path: Path, *words: str, base: Path | None = None) -> None:
    """A CheckpointError of one line that says these words and names the file."""
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(path, base=base)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 1500
    for word in (path.name, *words):
        assert word in message


@pytest.mark.parametrize(
    ("wrap", "container", "public_training"),
    [
        (dict, "state dict", False),
        (OrderedDict, "state dict", False),
        (training, "training checkpoint", True),
        (lambda s: training(parallel(s)), "training checkpoint", True),
        (lambda s: {"state_dict": s}, "state dict under 'state_dict'", False),
        (lambda s: {"model": s}, "state dict under 'model'", False),
        (lambda s: {"model": s, "optimizer": {}, "epoch": 2}, "training checkpoint", False),
        (parallel, "state dict", False),
        (lambda s: {"model": parallel(s)}, "state dict under 'model'", False),
        (lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()}, "state dict", False),
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_containers(
    tmp_path: Path, wrap: Callable, container: str, public_training: bool, zipped: bool
) -> None:
    data = wrap(tiny_state())
    path = saved(tmp_path / "a.pth", data, _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint(path)
    assert loaded.source.container == container
    assert loaded.source.checkpoint == "a.pth"
    assert loaded.source.sha256 == sha256(path)
    assert loaded.source.dtype == "float32"
    assert loaded.public_training == public_training
    prefixes = {"module."} & {loaded.source.prefix}
    assert loaded.notes == tuple(f"the prefix {p!r} was taken off its keys" for p in prefixes)
    torch.testing.assert_close(dict(loaded.tensors), tiny_state(), rtol=0, atol=0)
    assert not any(value.requires_grad for value in loaded.tensors.values())


@pytest.mark.parametrize("name", ["a.safetensors", "a.SAFETENSORS", "a.pth"])
@pytest.mark.parametrize("wrap", [dict, parallel])
def test_safetensors_by_suffix_or_content(tmp_path: Path, name: str, wrap: Callable) -> None:
    save_file(wrap(tiny_state()), tmp_path / name)
    loaded = load_checkpoint(tmp_path / name)
    assert loaded.source.container == "state dict"
    torch.testing.assert_close(dict(loaded.tensors), tiny_state(), rtol=0, atol=0)


def test_both_names_of_the_tables_become_metas(tmp_path: Path) -> None:
    new, old = (
        load_checkpoint(saved(tmp_path / f"a{rel}.pth", parallel(tiny_state(rel)))).tensors
        for rel in ("", "pos_")
    )
    assert set(new) == set(old)
    assert f"{TABLE}pos_h" in new


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_other_floats_are_made_float32_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    state = {key: value.to(dtype) for key, value in tiny_state().items()}
    loaded = load_checkpoint(saved(tmp_path / "a.pth", state))
    assert loaded.source.dtype == name
    assert loaded.notes == (f"{name} weights were made float32",)
    assert [r.getMessage() for r in caplog.records] == [f"a.pth: {loaded.notes[0]}"]
    for key, value in loaded.tensors.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].float())


def test_mixed_floats_are_all_named_and_integers_kept(tmp_path: Path) -> None:
    state = tiny_state()
    halves = zip(state, (torch.bfloat16, torch.float16, torch.float64), strict=False)
    state |= {key: state[key].to(dtype) for key, dtype in halves}
    state["image_encoder.bn.num_batches_tracked"] = torch.tensor(5)
    loaded = load_checkpoint(saved(tmp_path / "a.pth", state))
    assert loaded.source.dtype == "bfloat16, float16, float32, float64"
    assert loaded.notes == ("bfloat16 and float16 and float64 weights were made float32",)
    assert loaded.tensors["image_encoder.bn.num_batches_tracked"].dtype == torch.int64


def test_adapters_alone_need_a_base(tmp_path: Path) -> None:
    path = saved(tmp_path / "adapters.pth", {"state_dict": {ADAPTER: torch.ones(2, 4)}})
    assert_refused(path, "holds adapters only (1 tensors", "image_encoder.patch_embed.", "--base")


@pytest.mark.parametrize(
    "wrap", [dict, training, parallel, lambda s: {"model": s}, lambda s: {"state_dict": s}]
)
def test_adapters_are_laid_over_a_base_in_any_container(tmp_path: Path, wrap: Callable) -> None:
    state = tiny_state()
    del state[ADAPTER]
    base = saved(tmp_path / "sam.pth", wrap(state))
    path = saved(tmp_path / "adapters.pth", training(parallel({ADAPTER: torch.ones(2, 4)})))
    loaded = load_checkpoint(path, base=base)
    assert loaded.source.container == "adapters over a base"
    assert (loaded.source.base, loaded.source.base_sha256) == ("sam.pth", sha256(base))
    assert loaded.public_training
    assert loaded.notes == (
        "the prefix 'module.' was taken off its keys",
        "laid over sam.pth: 5 of its 5 tensors are used",
    )
    expected = state | {ADAPTER: torch.ones(2, 4)}
    torch.testing.assert_close(dict(loaded.tensors), expected, rtol=0, atol=0)


def test_adapters_outrank_the_base(tmp_path: Path) -> None:
    path = saved(tmp_path / "adapters.pth", {ADAPTER: torch.full((2, 4), 9.0)})
    base = saved(tmp_path / "sam.pth", {k: v.half() for k, v in tiny_state().items()})
    loaded = load_checkpoint(path, base=base)
    assert loaded.source.dtype == "float16, float32"
    assert torch.equal(loaded.tensors[ADAPTER], torch.full((2, 4), 9.0))


def test_real_tables_of_a_base_are_said_aloud(tmp_path: Path) -> None:
    """Adapters trained without tables, as since January 2024, would be wrong over Meta's."""
    path = saved(tmp_path / "adapters.pth", {ADAPTER: torch.ones(2, 4)})
    base = saved(tmp_path / "sam.pth", tiny_state() | {f"{TABLE}pos_h": torch.ones(3, 4)})
    assert "tables are those of sam.pth" in load_checkpoint(path, base=base).notes[1]


def test_adapters_in_the_public_form_replace_metas_mlp(tmp_path: Path) -> None:
    """Adapters and the public code's decoder over Meta's file give one whole network."""
    public = vit_keys(tables=(27, 15), adapters={"Space": (0, 1), "MLP": (0, 1)}, form="public")
    only = {k for k in public if "_Adapter." in k or k.startswith("mask_decoder.transformer.")}
    path = saved(tmp_path / "a.pth", {"state_dict": weights({k: public[k] for k in only})})
    base = saved(tmp_path / "sam.pth", weights(vit_keys(tables=(27, 15)), rel_pos=0.1))
    loaded = load_checkpoint(path, base=base)
    assert set(loaded.tensors) == set(public)
    network = infer(loaded, Overrides()).network
    assert (network.two_way, network.outputs, network.rel_pos) == ("public", "classes", "real")


def test_keys_still_missing_over_the_base_are_listed(tmp_path: Path) -> None:
    adapters = weights(adapter_keys("image_encoder.blocks.1.MLP_Adapter", 64))
    path = saved(tmp_path / "a.pth", adapters)
    base = weights(vit_keys(tables=(27, 15)))
    for key in ("image_encoder.neck.3.bias", "mask_decoder.iou_token.weight"):
        del base[key]
    loaded = load_checkpoint(path, base=saved(tmp_path / "sam.pth", base))
    with pytest.raises(CheckpointError) as refusal:
        infer(loaded, Overrides())
    for word in ("missing keys", "image_encoder.neck.3.bias", "mask_decoder.iou_token.weight"):
        assert word in str(refusal.value)


def test_a_base_without_its_parts_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "adapters.pth", {ADAPTER: torch.ones(2, 4)})
    base = saved(tmp_path / "resnet.pth", {"layer1.0.conv1.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"resnet\.pth: it holds no weights of a SAM"):
        load_checkpoint(path, base=base)


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, created: Path) -> None:
        self.created = created

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.created),)


def pickled(path: Path, data: object, protocol: int) -> Path:
    path.write_bytes(pickle.dumps(data, protocol))
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_beside_the_weights_do_not_matter_and_do_not_run(
    tmp_path: Path, zipped: bool
) -> None:
    created = tmp_path / "created"
    beside = {
        "path_helper": Payload(created),
        "best_tol": np.float64(0.5),
        "curve": np.arange(3),
        "args": argparse.Namespace(lr=1e-4, folder=Path("x")),
        "optimizer": defaultdict(dict, {"state": {}}),
        "model_copy": torch.nn.Linear(2, 2),
    }
    data = training(tiny_state()) | beside
    path = saved(tmp_path / "a.pth", data, _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint(path)
    torch.testing.assert_close(dict(loaded.tensors), tiny_state(), rtol=0, atol=0)
    assert loaded.public_training
    assert loaded.source.weights == "state_dict"
    assert not created.exists()
    pickle.loads(pickle.dumps(Payload(created)))
    assert created.exists()  # the payload works where it is let


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_is_no_checkpoint_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    created = tmp_path / "created"
    data = training(tiny_state()) | {"path_helper": Payload(created)}
    assert_refused(pickled(tmp_path / "a.pth", data, protocol), "expected a checkpoint file")
    assert not created.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.nn.Linear(2, 2), "found a torch.nn.modules.linear.Linear"),
        ({"a": np.zeros(3)}, "found a dict with a"),
        ({"a": Path("x")}, "found a dict with a"),
    ],
)
def test_what_a_file_holds_instead_is_named(
    tmp_path: Path, data: object, words: str, zipped: bool
) -> None:
    path = saved(tmp_path / "a.pth", data, _use_new_zipfile_serialization=zipped)
    assert_refused(path, "no weights of a SAM", words)


PREFIXES = (
    *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net."),
    *("sam.", "sam_model.", "medsam_model.", "a.b.c."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_taken_off_aloud(tmp_path: Path, prefix: str) -> None:
    state = {f"{prefix}{key}": value for key, value in tiny_state().items()}
    loaded = load_checkpoint(saved(tmp_path / "a.ckpt", {"state_dict": state, "epoch": 1}))
    torch.testing.assert_close(dict(loaded.tensors), tiny_state(), rtol=0, atol=0)
    assert loaded.source.prefix == prefix
    assert f"the prefix {prefix!r} was taken off its keys" in loaded.notes


def test_two_networks_in_one_file_are_a_choice(tmp_path: Path) -> None:
    teacher = {f"teacher.{k}": v + 1 for k, v in tiny_state().items()}
    student = {f"student.{k}": v for k, v in tiny_state().items()}
    path = saved(tmp_path / "a.pth", teacher | student)
    assert_refused(path, "teacher. (6 keys), student. (6 keys)", "choose one with --prefix")
    loaded = load_checkpoint(path, prefix="student.")
    torch.testing.assert_close(dict(loaded.tensors), tiny_state(), rtol=0, atol=0)
    assert "6 tensors beside those under the prefix are left out" in loaded.notes
    with pytest.raises(CheckpointError, match=r"begins with 'net\.'"):
        load_checkpoint(path, prefix="net.")


def test_two_sets_of_weights_are_a_choice(tmp_path: Path) -> None:
    ema = {key: value + 1 for key, value in tiny_state().items()}
    path = saved(tmp_path / "a.pth", {"model": tiny_state(), "state_dict_ema": ema, "epoch": 3})
    assert_refused(path, "model (6 tensors), state_dict_ema (6 tensors)", "one with --weights")
    loaded = load_checkpoint(path, weights="state_dict_ema")
    torch.testing.assert_close(dict(loaded.tensors), ema, rtol=0, atol=0)
    assert loaded.source.weights == "state_dict_ema"
    with pytest.raises(CheckpointError, match="there are no weights under 'ema'"):
        load_checkpoint(path, weights="ema")


def test_a_whole_pickled_module_is_read_by_its_state(tmp_path: Path) -> None:
    class Sam(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("image_encoder", "prompt_encoder", "mask_decoder"):
                setattr(self, name, torch.nn.ModuleDict({"patch_embed": torch.nn.Linear(2, 2)}))

    module = Sam()
    globals()["Sam"], Sam.__qualname__ = Sam, "Sam"
    try:
        path = saved(tmp_path / "a.pth", module)
    finally:
        del globals()["Sam"]  # as where the class is not installed
    loaded = load_checkpoint(path)
    torch.testing.assert_close(dict(loaded.tensors), dict(module.state_dict()), rtol=0, atol=0)
    assert loaded.source.container.startswith("pickled module ")


def test_what_torch_save_writes_of_tensors_alone_is_named_by_no_object(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", tiny_state(), _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint"):
        load_checkpoint(path)


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


def csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([torch.ones(2)], "no weights of a SAM: found a list"),
        (torch.ones(2), "no weights of a SAM: found a Tensor"),
        (None, "no weights of a SAM: found a NoneType"),
        ({}, "no weights of a SAM: found a dict"),
        ({"epoch": 3, "loss": 0.5}, "found a dict with epoch, loss"),
        ({"state_dict": {}}, "found a dict with state_dict"),
        ({"state_dict": [torch.ones(2)]}, "found a dict with state_dict"),
        (tiny_state() | {ADAPTER: "text"}, f"entries that are not tensors: {ADAPTER}"),
        (tiny_state() | {ADAPTER: torch.full((2,), torch.nan)}, f"NaN or infinite: {ADAPTER}"),
        (tiny_state() | {ADAPTER: torch.tensor([1, -torch.inf])}, f"NaN or infinite: {ADAPTER}"),
        (tiny_state() | {"x": torch.tensor([1e300], dtype=torch.float64)}, "NaN or infinite: x"),
        (tiny_state() | {ADAPTER: torch.eye(3).to_sparse()}, f"sparse tensors: {ADAPTER}"),
        (tiny_state() | {ADAPTER: csr()}, f"sparse tensors: {ADAPTER}"),
        (tiny_state() | {ADAPTER: quantized()}, f"quantized tensors: {ADAPTER}"),
        (
            tiny_state() | {ADAPTER: torch.ones(3, device="meta")},
            f"tensors without data: {ADAPTER}",
        ),
        ({7: torch.ones(2)}, "found a dict"),
        ({10**6000: torch.ones(2)}, "found a dict"),
        ({("a", 1): torch.ones(2)}, "found a dict"),
        (tiny_state() | {f"{TABLE}h": torch.ones(2)}, f"two entries for {TABLE}pos_h"),
        (
            {"conv1.weight": torch.ones(2), "fc.bias": torch.ones(2)},
            "found a dict with conv1.weight, fc.bias",
        ),
        ({f"layer{i}": torch.ones(1) for i in range(99)}, "layer4, layer5, expected"),
        ({"a\nb" * 5000: torch.ones(2)}, "no weights of a SAM"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, data: object, words: str) -> None:
    assert_refused(saved(tmp_path / "a.pth", data), words)


def onnx_file() -> bytes:
    """ir_version 8 and a producer: how every ONNX file begins."""
    return b"\x08\x08\x12\x07pytorch\x1a\x052.9.0:\x80\x01\n\x1b\n\x01x\x12\x01y"


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"hello, this is text\n",
        b"<!DOCTYPE html><html>not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        onnx_file(),
        pickle.dumps({"a": [1, 2]}),
        bytes(range(256)) * 20,
    ],
    ids=["empty", "zip", "pickle", "text", "html", "lfs", "onnx", "plain-pickle", "bytes"],
)
def test_files_that_are_no_checkpoint_are_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, "expected a checkpoint file (.pth, .pt or .safetensors)")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.pth", "does not exist", "expected a checkpoint file")
    assert_refused(tmp_path, "is a folder", "expected a checkpoint file")
    path = saved(tmp_path / "adapters.pth", {ADAPTER: torch.ones(2, 4)})
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist"):
        load_checkpoint(path, base=tmp_path / "none.pth")


def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in ("constants.pkl", "data.pkl", "version"):
            archive.writestr(f"a/{name}", "3")
    assert_refused(tmp_path / "a.pt", "TorchScript", "torch.save(model.state_dict()")


def file_kinds() -> dict[str, Callable[[Path], object]]:
    return {
        "zip.pth": lambda path: torch.save(tiny_state(), path),
        "legacy.pth": lambda path: torch.save(
            tiny_state(), path, _use_new_zipfile_serialization=False
        ),
        "a.safetensors": lambda path: save_file(tiny_state(), path),
    }


@pytest.mark.parametrize("name", file_kinds())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_load_or_are_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Cut anywhere, with bytes changed anywhere: no other exception than CheckpointError."""
    intact, path = tmp_path / f"whole-{name}", tmp_path / name
    if not intact.exists():  # once: torch's older format writes addresses, and so varies in length
        file_kinds()[name](intact)
    content = bytearray(intact.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with suppress(CheckpointError):
        loaded = load_checkpoint(path)
        assert all(value.isfinite().all() for value in loaded.tensors.values())
