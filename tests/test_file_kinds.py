"""A file that is no checkpoint is called what it is, with what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from medsa_deploy.errors import CheckpointError
from medsa_deploy.exporters.checkpoint import load_checkpoint


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        (b"\n <!DOCTYPE html><html>sign in</html>", "a web page"),
        (b"<html><body>404</body></html>", "a web page"),
        (gzip.compress(b"x" * 99, mtime=0), "unpack it first (gunzip)"),
        (b'{"a": 1}', "JSON, not a checkpoint"),
        (b'{"a": ', "JSON, not a checkpoint"),
    ],
    ids=["lfs", "doctype", "html", "gzip", "json", "cut-json"],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_what_was_downloaded_instead(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert words in refusal(path)


def test_an_onnx_file(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    path = tmp_path / "model.pth"
    onnx.save(helper.make_model(graph, producer_name="pytorch"), path)
    assert "an ONNX graph" in refusal(path)


def test_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", weight=np.ones(3))
    assert "an NPZ of numpy arrays" in refusal(tmp_path / "a.npz")


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    message = refusal(tmp_path / "a.pt")
    assert "a TorchScript program" in message
    assert "torch.save(model.state_dict()" in message


def test_a_sharded_index(tmp_path: Path) -> None:
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    message = refusal(path)
    assert "the index of a sharded checkpoint (2 files, such as model-00001-of-00002" in message


@pytest.mark.parametrize(
    ("files", "argument"),
    [
        (["version_0.txt", "checkpoints/epoch=3.ckpt", "checkpoints/last.ckpt"], "last.ckpt"),
        (["latest", "global_step9/mp_rank_00_model_states.pt"], "mp_rank_00_model_states.pt"),
        (["config.json", "model.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin"),
        (["best.pth", "log.txt"], "best.pth"),
    ],
)
def test_a_trainers_folder_names_the_file_to_give(
    tmp_path: Path, files: list[str], argument: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    message = refusal(tmp_path)
    assert "is a folder: give the file in it" in message
    assert argument in message


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert "is a folder; expected a checkpoint file" in refusal(tmp_path)
