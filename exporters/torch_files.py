"""A file of `torch.save` → the objects in it, its tensors built and everything else inert.

Both formats are read: the archive of torch 1.6 and newer, and the pickles followed by raw numbers
of older versions. Declared sizes are compared with the file's own before memory is taken for them.
"""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from medsa_deploy.errors import CheckpointError

from .pickles import Name, PickleReader

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""The first pickle of the older format."""
REPEATED_BYTES = 64 * 2**20
"""By how much a tensor that repeats its storage's numbers may exceed the file."""
DTYPES: Mapping[str, torch.dtype] = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
    "QUInt8": torch.uint8,
    "QInt8": torch.int8,
    "QInt32": torch.int32,
}
"""Names of storages, without `Storage` → type of their numbers."""
SPECIAL = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_meta_tensor_no_storage": "without data",
    "torch._utils._rebuild_nested_tensor": "nested",
}
"""Functions that rebuild tensors which no network here has."""


@dataclass(frozen=True)
class SpecialTensor:
    """A tensor that cannot be a weight: sparse, quantized, nested or without data."""

    kind: str


@dataclass(eq=False)
class Storage:
    """Numbers of one type, which tensors are views of."""

    key: str
    dtype: torch.dtype
    count: int
    values: Tensor | None = None
    """(count,); None until a tensor is a view of them."""
    filled: bool = False


def read_torch_file(path: Path) -> Any:
    """The object that was saved; CheckpointError for a damaged file. See `pickles.StandIn`."""
    if is_archive(path):
        return _Archive(path).load()
    return _Sequence(path).load()


def is_archive(path: Path) -> bool:
    """Whether a file begins as a ZIP does, which all of them do that torch writes."""
    with path.open("rb") as f:
        return f.read(4) == b"PK\x03\x04"


class _TorchReader:
    """Rebuilds tensors out of storages that a subclass finds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.storages: dict[str, Storage] = {}
        self.reader = PickleReader(self.rebuild, self.persistent, budget=self.size + 64)

    def persistent(self, persistent_id: Any) -> Any:
        """A storage, by ('storage', type, key, place, count, …); or the class of a module."""
        match persistent_id:
            case ("module", Name() as module, *_):
                return module
            case ("storage", kind, str(key), _, int(count), *_):
                dtype = _dtype_of(kind)
            case _:
                raise CheckpointError("its pickle has a persistent id that is no storage")
        if key not in self.storages:
            if not 0 <= count * dtype.itemsize <= self.size:
                raise CheckpointError(
                    f"its storage {key[:40]!r} is said to hold {count} numbers of "
                    f"{dtype.itemsize} bytes, more than the file's {self.size} bytes"
                )
            self.storages[key] = Storage(key, dtype, count)
        return self.storages[key]

    def rebuild(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Tensors and parameters; NotImplemented for anything else."""
        match name, arguments:
            case "torch._utils._rebuild_tensor_v3", (
                storage,
                offset,
                size,
                stride,
                _,
                _,
                dtype,
                *_,
            ):
                return self.tensor(storage, offset, size, stride, dtype)
            case ("torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor"), (
                storage, offset, size, stride, *_,
            ):  # fmt: skip
                return self.tensor(storage, offset, size, stride, None)
            case (
                (
                    "torch._utils._rebuild_parameter"
                    | "torch._utils._rebuild_parameter_with_state"
                    | "torch.nn.parameter.Parameter"
                    | "torch.nn.parameter.Buffer"
                ),
                (data, *_),
            ):
                return data
            case "torch._tensor._rebuild_from_type_v2", (Name(function), _, tuple(inner), *_):
                return self.rebuild(function, inner)
        return SpecialTensor(SPECIAL[name]) if name in SPECIAL else NotImplemented

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any) -> Any:
        """A view of a storage's numbers, which must hold all of it."""
        if not isinstance(storage, Storage):
            raise CheckpointError("its pickle has a tensor without a storage")
        numbers = (offset, *size, *stride)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(
            stride
        ):
            raise CheckpointError("its pickle has a tensor of impossible shape")
        values = self.values_of(storage)
        if dtype is not None:
            values = values.view(_dtype_named(dtype))
        if math.prod(size) * values.element_size() > self.size + REPEATED_BYTES:
            raise CheckpointError(
                f"its pickle has a tensor of shape {tuple(size)}, larger than the whole file"
            )
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= len(values):
            raise CheckpointError(
                f"its pickle has a tensor of shape {tuple(size)} beyond its storage of "
                f"{len(values)} numbers"
            )
        return values.as_strided(tuple(size), tuple(stride), offset if len(values) else 0)

    def values_of(self, storage: Storage) -> Tensor:
        """The storage's numbers, (count,)."""
        raise NotImplementedError


def _dtype_of(kind: Any) -> torch.dtype:
    """The type of a storage's numbers by its class."""
    text = kind.text if isinstance(kind, Name) else ""
    dtype = DTYPES.get(text.rpartition(".")[2].removesuffix("Storage"))
    if dtype is None or not text.startswith("torch."):
        raise CheckpointError(f"its pickle has a storage of the unknown type {text[:60] or 'none'}")
    return dtype


def _dtype_named(name: Any) -> torch.dtype:
    text = name.text if isinstance(name, Name) else ""
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"its pickle has a tensor of the unknown type {text[:60] or 'none'}")
    return dtype


class _Archive(_TorchReader):
    """torch 1.6 and newer: a zip archive of one pickle and a file for each storage."""

    def load(self) -> Any:
        """The object of `data.pkl`."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.archive = archive
                self.entries = {entry.filename: entry for entry in archive.infolist()}
                pickles = [name for name in self.entries if name.rpartition("/")[2] == "data.pkl"]
                if len(pickles) != 1:
                    raise CheckpointError(f"it has {len(pickles)} entries data.pkl, expected one")
                self.folder = pickles[0].removesuffix("data.pkl")
                self.swapped = self._swapped()
                with archive.open(self._entry("data.pkl")) as file:
                    return self.reader.load(file)  # type: ignore[arg-type]
        except (CheckpointError, MemoryError):
            raise
        except Exception as e:  # a damaged archive makes the parser raise anything
            raise CheckpointError(f"its archive is damaged ({type(e).__name__})") from e

    def _entry(self, name: str) -> zipfile.ZipInfo:
        """An entry of the archive, whose declared size the file can hold."""
        entry = self.entries.get(self.folder + name)
        if entry is None:
            raise CheckpointError(f"its archive lacks {name[:60]!r}")
        if entry.file_size > self.size or entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"its archive's {name[:60]!r} is compressed or said to be larger than the file"
            )
        return entry

    def _swapped(self) -> bool:
        """Whether numbers have the other byte order than this machine's."""
        if self.folder + "byteorder" not in self.entries:
            return False
        return self.archive.read(self._entry("byteorder")).strip() != sys.byteorder.encode()

    def values_of(self, storage: Storage) -> Tensor:
        """Read an entry of the archive, once."""
        if storage.values is None:
            data = bytearray(self.archive.read(self._entry(f"data/{storage.key}")))
            expected = storage.count * storage.dtype.itemsize
            if len(data) < expected:
                raise CheckpointError(
                    f"its storage {storage.key[:40]!r} has {len(data)} bytes, expected {expected}"
                )
            storage.values = _numbers(data[:expected], storage.dtype, swapped=self.swapped)
        return storage.values


class _Sequence(_TorchReader):
    """Older files: four pickles, a list of storages' keys, and their numbers."""

    def load(self) -> Any:
        """The object of the fourth pickle; its tensors are filled from what follows."""
        with self.path.open("rb") as file:
            if self.reader.load(file) != MAGIC_NUMBER:
                raise CheckpointError("it does not begin as torch.save writes it")
            self.reader.load(file)
            system = self.reader.load(file)
            swapped = isinstance(system, dict) and (
                system.get("little_endian", True) != (sys.byteorder == "little")
            )
            loaded = self.reader.load(file)
            keys = self.reader.load(file)
            for key in keys if isinstance(keys, list) else ():
                self._fill(file, key, swapped=swapped)
        if unfilled := [key for key, storage in self.storages.items() if not storage.filled]:
            raise CheckpointError(f"it ends before the numbers of {len(unfilled)} storages")
        return loaded

    def _fill(self, file: BinaryIO, key: Any, *, swapped: bool) -> None:
        """Read one storage's numbers."""
        storage = self.storages.get(key) if isinstance(key, str) else None
        count = int.from_bytes(file.read(8), sys.byteorder)
        if storage is None or count != storage.count:
            raise CheckpointError("its storages are not those that its pickle names")
        data = bytearray(file.read(count * storage.dtype.itemsize))
        if len(data) < count * storage.dtype.itemsize:
            raise CheckpointError("it ends within a storage")
        self.values_of(storage).copy_(_numbers(data, storage.dtype, swapped=swapped))
        storage.filled = True

    def values_of(self, storage: Storage) -> Tensor:
        """Memory that is filled when the numbers are reached."""
        if storage.values is None:
            announced = sum(s.count * s.dtype.itemsize for s in self.storages.values())
            if announced > self.size:
                raise CheckpointError(
                    f"its storages are said to hold {announced} bytes, more than the file's "
                    f"{self.size}"
                )
            storage.values = torch.zeros(storage.count, dtype=storage.dtype)
        return storage.values


def _numbers(data: bytearray, dtype: torch.dtype, *, swapped: bool) -> Tensor:
    """Bytes as numbers of a type."""
    if not data:
        return torch.empty(0, dtype=dtype)
    if swapped:
        part = dtype.itemsize // (2 if dtype.is_complex else 1)
        rows = torch.frombuffer(data, dtype=torch.uint8).view(-1, part)
        return rows.flip(1).reshape(-1).view(dtype)
    return torch.frombuffer(data, dtype=dtype)
