"""Weights are found wherever people save them, and never chosen where two readings are possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medsa_deploy.errors import CheckpointError
from medsa_deploy.exporters.containers import find_weights
from medsa_deploy.exporters.torch_files import read_torch_file

STEMS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
STATE = {f"{stem}layer.weight": torch.full((2,), float(i)) for i, stem in enumerate(STEMS)}


def prefixed(prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in STATE.items()}


@pytest.mark.parametrize(
    ("data", "location"),
    [
        (STATE, ""),
        (STATE | {"epoch": 3, "optimizer": {"state": {0: torch.zeros(3)}}}, ""),
        ({"state_dict": STATE, "epoch": 3}, "state_dict"),
        ({"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, "model"),
        ({"module": STATE, "dp_world_size": 1}, "module"),
        ({"checkpoint": {"net": {"weights": STATE}}}, "checkpoint.net.weights"),
        ({"state_dict_ema": STATE, "args": None}, "state_dict_ema"),
    ],
)
def test_the_one_state_dict_is_found(data: Any, location: str) -> None:
    weights = find_weights(data)
    assert (weights.location, weights.prefix, weights.left_out) == (location, "", 0)
    assert weights.entries == STATE


@given(st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,8}\.", fullmatch=True), max_size=3).map("".join))
def test_any_prefix_is_removed(prefix: str) -> None:
    weights = find_weights({"state_dict": prefixed(prefix)})
    assert weights.prefix == prefix
    assert weights.entries == STATE


def test_tensors_beside_the_prefix_are_counted() -> None:
    state = prefixed("model.") | {"criterion.weight": torch.ones(3)}
    weights = find_weights(state)
    assert weights.entries == STATE
    assert (weights.prefix, weights.left_out) == ("model.", 1)


def test_a_whole_network_goes_before_a_part_of_one() -> None:
    part = {"aux.image_encoder.layer.weight": torch.ones(2)}
    assert find_weights(prefixed("net.") | part).prefix == "net."


def test_several_state_dicts_are_listed() -> None:
    data = {"state_dict": STATE, "ema": {"module": prefixed("module.")}}
    with pytest.raises(CheckpointError, match=r"state_dict \(3 tensors\), ema.module \(3 tensors"):
        find_weights(data)
    assert find_weights(data, location="ema.module").prefix == "module."
    with pytest.raises(CheckpointError, match="no weights under 'net'; found: state_dict"):
        find_weights(data, location="net")


def test_several_networks_in_one_state_dict_are_listed() -> None:
    data = prefixed("student.") | prefixed("teacher.")
    with pytest.raises(CheckpointError, match=r"student. \(3 keys\), teacher. \(3 keys\)"):
        find_weights(data)
    assert find_weights(data, prefix="teacher.").left_out == 3
    with pytest.raises(CheckpointError, match=r"no key of a network begins with 'x\."):
        find_weights(data, prefix="x.")


@pytest.mark.parametrize("data", [{"epoch": 3}, [1], None, {"layer.weight": torch.ones(2)}])
def test_a_file_without_weights_is_said_to_have_none(data: Any) -> None:
    with pytest.raises(CheckpointError, match="it holds no weights of a SAM: found a"):
        find_weights(data)


def test_a_pickled_module_has_its_parameters_and_persistent_buffers(tmp_path: Path) -> None:
    module = nn.ModuleDict({stem[:-1]: nn.Sequential(nn.Linear(2, 2)) for stem in STEMS})
    module["image_encoder"].register_buffer("steps", torch.ones(1))
    module["image_encoder"].register_buffer("passing", torch.ones(1), persistent=False)
    torch.save({"epoch": 1, "model": module}, tmp_path / "m.pth")
    weights = find_weights(read_torch_file(tmp_path / "m.pth"))
    expected = module.state_dict()
    assert set(weights.entries) == set(expected)
    assert all(torch.equal(value, expected[key]) for key, value in weights.entries.items())
    assert weights.location == "model"
