"""Checkpoint files are read without running anything in them, as torch reads the harmless ones."""

from __future__ import annotations

import argparse
import collections
import io
import logging
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medsa_deploy.errors import CheckpointError
from medsa_deploy.exporters import torch_files
from medsa_deploy.exporters.pickles import PickleReader, StandIn
from medsa_deploy.exporters.torch_files import SpecialTensor, read_torch_file

VALUES = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "whole": VALUES,
    "part": VALUES[1:, 2:],
    "transposed": VALUES.T,
    "half": VALUES.half(),
    "bfloat16": VALUES.bfloat16(),
    "double": VALUES.double(),
    "integers": torch.arange(3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "booleans": VALUES > 3,
    "complex": torch.complex(VALUES, -VALUES),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.0),
    "parameter": nn.Parameter(VALUES.clone()),
    "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
}
NEW_TYPES = {
    "uint16": torch.arange(5, dtype=torch.int32).to(torch.uint16),
    "float8": VALUES.to(torch.float8_e4m3fn),
}
FORMATS = [(legacy, protocol) for legacy in (False, True) for protocol in (2, 3, 4, 5)]


def save(data: object, path: Path, *, legacy: bool = False, protocol: int = 2) -> Path:
    torch.save(data, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return path


def assert_bits_are_equal(actual: Any, expected: torch.Tensor) -> None:
    assert isinstance(actual, torch.Tensor)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if expected.numel():
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected)]
        assert torch.equal(*bits)


@pytest.mark.parametrize(("legacy", "protocol"), FORMATS)
def test_tensors_are_torchs_bit_for_bit(tmp_path: Path, legacy: bool, protocol: int) -> None:
    tensors = TENSORS if legacy else TENSORS | NEW_TYPES
    path = save(tensors, tmp_path / "t.pth", legacy=legacy, protocol=protocol)
    loaded = read_torch_file(path)
    reference = torch.load(path, weights_only=False)  # only protocol 2 loads otherwise
    assert list(loaded) == list(reference)
    for name, value in reference.items():
        assert_bits_are_equal(loaded[name], value)


class Configuration:
    """A class that the reader must not import."""

    def __init__(self) -> None:
        self.depth = 12


@pytest.mark.parametrize(("legacy", "protocol"), FORMATS)
def test_anything_beside_the_weights_is_inert(tmp_path: Path, legacy: bool, protocol: int) -> None:
    data = {
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-4),
        "path": Path("logs"),
        "best": np.float64(0.5),
        "array": np.arange(4),
        "optimizer": collections.defaultdict(dict, {"state": {0: VALUES}}),
        "log": logging.getLogger("x"),
        "configuration": Configuration(),
        "names": {"liver", "spleen"},
        "complex": 1j,
        "state_dict": TENSORS,
    }
    loaded = read_torch_file(save(data, tmp_path / "t.pth", legacy=legacy, protocol=protocol))
    assert list(loaded) == list(data)
    for name, value in TENSORS.items():
        assert_bits_are_equal(loaded["state_dict"][name], value)
    assert loaded["epoch"] == 3
    assert loaded["names"] == data["names"]
    assert_bits_are_equal(loaded["optimizer"]["state"][0], VALUES)
    assert isinstance(loaded["args"], StandIn)
    assert loaded["args"].name.endswith("Namespace") or loaded["args"].arguments
    assert loaded["args"].state == {"lr": 1e-4}
    assert loaded["configuration"].state == {"depth": 12}


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_module_keeps_its_parameters_and_buffers(tmp_path: Path, legacy: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm2d(4))
    loaded = read_torch_file(save(module, tmp_path / "m.pth", legacy=legacy))
    children = loaded.state["_modules"]
    assert_bits_are_equal(children["0"].state["_parameters"]["weight"], module[0].weight)
    assert_bits_are_equal(children["1"].state["_buffers"]["running_var"], module[1].running_var)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_special_tensors_are_named(tmp_path: Path) -> None:
    data = {"sparse": torch.eye(3).to_sparse(), "meta": torch.empty(3, device="meta")}
    loaded = read_torch_file(save(data, tmp_path / "t.pth"))
    assert loaded == {"sparse": SpecialTensor("sparse"), "meta": SpecialTensor("without data")}


FLAG = "medsa_pickle_ran"


class Malicious:
    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


RUN = f"import sys; sys.{FLAG} = True"
SYSTEM = f"touch {FLAG}"


def attacks() -> dict[str, bytes]:
    """Pickles that would run code where a pickle is loaded, by the opcode that calls."""
    text = RUN.encode()
    call = b"(S'" + text + b"'\n"
    files = {
        f"reduce, protocol {protocol}": pickle.dumps(Malicious(exec, (RUN,)), protocol)
        for protocol in range(6)
    }
    files |= {
        "global and reduce": b"cbuiltins\nexec\n" + call + b"tR.",
        "global of an old name": b"c__builtin__\nexec\n" + call + b"tR.",
        "global of another module": b"cos\nsystem\n(S'" + SYSTEM.encode() + b"'\ntR.",
        "global of a submodule": b"csubprocess\nPopen\n((lp0\nS'touch'\naS'" + FLAG.encode()
        + b"'\natR.",
        "stack global": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93" + b"\x8c"
        + bytes([len(text)]) + text + b"\x85R.",
        "stack global by a dotted name": b"\x80\x04\x8c\x02os\x8c\x0bpath.os.abc\x93)R.",
        "inst": b"(S'" + text + b"'\nibuiltins\nexec\n.",
        "obj": b"(cbuiltins\nexec\nS'" + text + b"'\no.",
        "newobj": b"\x80\x02cbuiltins\nexec\n" + call + b"t\x81.",
        "newobj with keywords": b"\x80\x04cbuiltins\nexec\n" + call + b"t}\x92.",
        "build with a state": b"\x80\x02cbuiltins\nobject\n)\x81}S'__setstate__'\ncbuiltins\nexec\n"
        b"sb" + call[1:] + b"b.",
        "build with slots": b"\x80\x02cbuiltins\nobject\n)\x81N}S'x'\ncbuiltins\nexec\ns\x86b.",
        "extension": b"\x80\x02\x82\x01" + call + b"tR.",
        "extension of two bytes": b"\x80\x02\x83\x01\x01" + call + b"tR.",
        "extension of four bytes": b"\x80\x02\x84\x01\x01\x01\x01" + call + b"tR.",
        "persistent id": b"Pcbuiltins exec\n.",
        "binary persistent id": b"\x80\x02cbuiltins\nexec\n" + call + b"tRQ.",
        "call by getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'"
        + SYSTEM.encode() + b"'\ntR.",
        "call by apply": b"cfunctools\npartial\n(cbuiltins\nexec\nS'" + text + b"'\ntR)R.",
        "import": b"cbuiltins\n__import__\n(S'antigravity'\ntR.",
        "eval": b"cbuiltins\neval\n(S'__import__(\"os\").system(\"touch x\")'\ntR.",
        "memo": b"cbuiltins\nexec\np0\n0g0\n" + call + b"tR.",
        "memo of a call": b"cbuiltins\nexec\nq\x00h\x00" + call + b"tR.",
        "duplicate": b"cbuiltins\nexec\n20" + call + b"tR.",
        "popped": b"cbuiltins\nexec\n" + call + b"tR0N.",
        "popped with its group": b"(cbuiltins\nexec\n" + call + b"tR1N.",
        "in a dictionary's key": b"}cbuiltins\nexec\n" + call + b"tRNs.",
        "in a set": b"\x80\x04\x8f(cbuiltins\nexec\n" + call + b"tR\x90.",
        "as a default factory": b"ccollections\ndefaultdict\n(cbuiltins\nexec\ntR.",
        "as a parameter": b"ctorch._utils\n_rebuild_parameter\n(cbuiltins\nexec\nI01\n}tR.",
        "as a hook": b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n(t(tI00\ncbuiltins\nexec\ntR.",
        "by rebuild from type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nexec\n"
        b"cbuiltins\nstr\n" + call + b"t}tR.",
        "by copyreg": b"ccopyreg\n_reconstructor\n(cbuiltins\nexec\ncbuiltins\nobject\nNtR.",
        "by copyreg's newobj": b"ccopyreg\n__newobj__\n(cbuiltins\nexec\nS'" + text + b"'\ntR.",
        "by numpy": b"cnumpy.core.multiarray\n_reconstruct\n(cbuiltins\nexec\n(I0\ntS'b'\ntR.",
        "by pickle itself": b"cpickle\nloads\n(" + pickle.dumps(
            pickle.dumps(Malicious(exec, (RUN,))), 2)[2:-1] + b"tR.",
    }  # fmt: skip
    return files


ATTACKS = attacks()


def archive(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        z.writestr("archive/data.pkl", pickled)
        z.writestr("archive/version", "3\n")
    return path


def refuse(path: Path) -> Any:
    try:
        return read_torch_file(path)
    except CheckpointError as e:
        return str(e)


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_in_a_file_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    refuse(archive(tmp_path / "a.pth", ATTACKS[name]))
    refuse(archive(tmp_path / "nested.pth", pickle.dumps({"weights": ATTACKS[name]})))
    old = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    (tmp_path / "old.pth").write_bytes(old + ATTACKS[name] + pickle.dumps([], 2))
    refuse(tmp_path / "old.pth")
    assert not hasattr(sys, FLAG)
    assert not (tmp_path / FLAG).exists()
    assert {m for m in set(sys.modules) - modules if not m.startswith("encodings")} == set()


def test_there_are_at_least_forty_attacks_and_they_would_work() -> None:
    assert len(ATTACKS) >= 40
    pickle.loads(ATTACKS["global and reduce"])
    assert getattr(sys, FLAG)
    delattr(sys, FLAG)


def load(pickled: bytes) -> Any:
    reader = PickleReader(lambda *_: NotImplemented, lambda _: None, budget=len(pickled))
    return reader.load(io.BytesIO(pickled))


def test_containers_cannot_be_copied_without_end() -> None:
    """A list of many items, copied again and again by calls that are a few bytes long."""
    copies = b"(lp0\n" + b"(" + b"I1\n" * 1000 + b"e0" + b"c__builtin__\nlist\n(g0\ntR0" * 5000
    with pytest.raises(CheckpointError, match="more than its bytes can hold"):
        load(copies + b"N.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda args: (args[0], 0, (4, 7), (7, 1), *args[4:]), "beyond its storage"),
        (lambda args: (args[0], -1, *args[2:]), "impossible shape"),
        (lambda args: (args[0], 0, (4, 6), (6,), *args[4:]), "impossible shape"),
        (lambda args: (args[0], 0, (2**62, 2**62), (0, 0), *args[4:]), "larger than"),
        (lambda args: (None, *args[1:]), "without a storage"),
    ],
)
def test_shapes_are_checked_against_storages(
    change: Callable[[Any], Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save({"w": VALUES}, tmp_path / "t.pth")
    rebuild = torch_files._Archive.rebuild
    monkeypatch.setattr(
        torch_files._Archive, "rebuild", lambda self, name, args: rebuild(self, name, change(args))
    )
    with pytest.raises(CheckpointError, match=words):
        read_torch_file(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_memory_is_bounded_by_the_files_size(tmp_path: Path, legacy: bool) -> None:
    """A storage that is said to hold 2^40 numbers is refused before memory is taken."""
    path = save({"w": torch.zeros(258)}, tmp_path / "t.pth", legacy=legacy)
    data = path.read_bytes()
    declared = b"M" + (258).to_bytes(2, "little")
    assert data.count(declared) >= 1
    larger = b"\x8a\x06" + (2**40).to_bytes(6, "little")
    if legacy:
        path.write_bytes(data.replace(declared, larger))
    else:
        with zipfile.ZipFile(path) as z:
            entries = {entry.filename: z.read(entry) for entry in z.infolist()}
        with zipfile.ZipFile(path, "w") as z:
            for name, content in entries.items():
                z.writestr(name, content.replace(declared, larger))
    with pytest.raises(CheckpointError, match="more than the file"):
        read_torch_file(path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", pickle.dumps([0] * 10**6))
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch_file(path)


@given(seed=st.integers(0, 2**32), legacy=st.booleans())
def test_damaged_files_are_errors_or_tensors(seed: int, legacy: bool) -> None:
    changes = random.Random(seed)
    stream = io.BytesIO()
    data = {"epoch": 1, "w": VALUES, "args": argparse.Namespace(x=1)}
    torch.save(data, stream, _use_new_zipfile_serialization=not legacy)
    content = bytearray(stream.getvalue())
    for _ in range(changes.randint(1, 8)):
        content[changes.randrange(len(content))] = changes.randrange(256)
    if changes.random() < 0.3:
        del content[changes.randrange(len(content)) :]
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"medsa-pickle-{os.getpid()}.pth"
    path.write_bytes(content)
    try:
        refuse(path)
    finally:
        path.unlink()
