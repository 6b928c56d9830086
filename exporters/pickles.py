"""A pickle → plain containers, tensors and inert stand-ins; nothing in it is imported or called.

`PickleReader` interprets the opcodes itself. It builds None, numbers, strings, bytes, lists,
tuples, sets and dictionaries, whatever its owner rebuilds from a few names, and whatever a
persistent id stands for. Every other object becomes a `StandIn` that remembers its name, its
arguments and its state: enough to find the weights of a pickled module, and to say what else a
file holds.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, cast

from medsa_deploy.errors import CheckpointError

MARK = object()
"""On the stack, where a group of items begins."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle refers to; it is never imported."""

    text: str


@dataclass(eq=False)
class StandIn:
    """An object that was not built."""

    name: str
    """Of its class, or of the function that would have made it."""
    arguments: tuple[Any, ...] = ()
    state: dict[Any, Any] = field(default_factory=dict)
    """Its attributes, as far as they are a dictionary."""


Rebuild = Callable[[str, tuple[Any, ...]], Any]
"""A name and arguments → an object, or NotImplemented where a stand-in is enough."""


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    return dict(*arguments)


def _default_dictionary(_factory: Any = None, *arguments: Any) -> dict[Any, Any]:
    return dict(*arguments)


CONTAINERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _default_dictionary,
    "builtins.dict": _dictionary,
    "__builtin__.dict": _dictionary,
    "builtins.list": list,
    "__builtin__.list": list,
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.frozenset": frozenset,
    "__builtin__.frozenset": frozenset,
    "torch.Size": tuple,
}
"""Names of plain containers → how they are built here."""


class BoundedFile:
    """A file whose reads ask for no more bytes than it can hold, whatever a length in it says."""

    def __init__(self, file: BinaryIO, most_bytes: int) -> None:
        self._file, self._most_bytes = file, most_bytes

    def read(self, count: int) -> bytes:
        """At most `count` bytes."""
        return self._file.read(min(count, self._most_bytes))

    def readline(self) -> bytes:
        """The bytes up to the next end of line."""
        return self._file.readline(self._most_bytes)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()


class PickleReader:
    """Interprets pickles, one after another."""

    def __init__(
        self, rebuild: Rebuild, load_persistent: Callable[[Any], Any], *, budget: int
    ) -> None:
        """`budget`: opcodes, and items copied into containers, that all pickles may have together.

        A file of n bytes holds at most n opcodes, so its size is a budget that no honest file
        exceeds.
        """
        self._rebuild = rebuild
        self._load_persistent = load_persistent
        self._budget = budget
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self, file: BinaryIO) -> Any:
        """The object of the pickle that begins at the file's position.

        CheckpointError for a pickle that is damaged, or longer than its file could make it.
        """
        self._stack, self._memo = [], {}
        try:
            bounded = cast(IO[bytes], BoundedFile(file, self._budget))
            for opcode, argument, _ in pickletools.genops(bounded):
                self._spend(1)
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except CheckpointError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
            raise CheckpointError(f"its pickle is damaged ({type(e).__name__})") from e
        raise CheckpointError("its pickle ends early")

    def _spend(self, count: int) -> None:
        self._budget -= count
        if self._budget < 0:
            raise CheckpointError("its pickle asks for more than its bytes can hold")

    def _step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in LITERALS:
            self._stack.append(LITERALS[name](argument))
        elif name in ACTIONS:
            ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(f"its pickle has the opcode {name}, which no checkpoint needs")

    def _group(self) -> list[Any]:
        """The items since the last mark, taken off the stack."""
        for start in range(len(self._stack) - 1, -1, -1):
            if self._stack[start] is MARK:
                items = self._stack[start + 1 :]
                del self._stack[start:]
                return items
        raise ValueError("no mark")

    def _call(self, function: Any, arguments: Any) -> Any:
        """What a call would give: a container, whatever the owner rebuilds, or a stand-in."""
        arguments = tuple(arguments)
        if not isinstance(function, Name):
            return StandIn(getattr(function, "name", type(function).__name__), arguments)
        if function.text in CONTAINERS:
            self._spend(sum(len(part) for part in arguments if isinstance(part, COPIED)))
            return CONTAINERS[function.text](*arguments)
        rebuilt = self._rebuild(function.text, arguments)
        return StandIn(function.text, arguments) if rebuilt is NotImplemented else rebuilt

    def put(self, argument: Any) -> None:
        """PUT, BINPUT, LONG_BINPUT."""
        self._memo[argument] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        """MEMOIZE."""
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, argument: Any) -> None:
        """GET, BINGET, LONG_BINGET."""
        self._stack.append(self._memo[argument])

    def duplicate(self, _: Any) -> None:
        """DUP."""
        self._stack.append(self._stack[-1])

    def pop(self, _: Any) -> None:
        """POP."""
        self._stack.pop()

    def pop_group(self, _: Any) -> None:
        """POP_MARK."""
        self._group()

    def append(self, _: Any) -> None:
        """APPEND."""
        item = self._stack.pop()
        self._extend([item])

    def append_group(self, _: Any) -> None:
        """APPENDS."""
        self._extend(self._group())

    def _extend(self, items: list[Any]) -> None:
        """Add to the list on the stack; a subclass of list stays a stand-in without its items."""
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)
        elif not isinstance(self._stack[-1], StandIn):
            raise TypeError("not a list")

    def set_item(self, _: Any) -> None:
        """SETITEM."""
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def set_group(self, _: Any) -> None:
        """SETITEMS."""
        self._update(self._group())

    def _update(self, items: list[Any]) -> None:
        """Add keys and values to the dictionary on the stack, or to a stand-in's state."""
        target = self._stack[-1]
        target = target.state if isinstance(target, StandIn) else target
        if not isinstance(target, dict):
            raise TypeError("not a dictionary")
        target.update(zip(items[::2], items[1::2], strict=True))

    def add_group(self, _: Any) -> None:
        """ADDITEMS."""
        items = self._group()
        if isinstance(self._stack[-1], set):
            self._stack[-1].update(items)
        elif not isinstance(self._stack[-1], StandIn):
            raise TypeError("not a set")

    def group_as(self, kind: Callable[[list[Any]], Any]) -> None:
        """LIST, TUPLE, DICT, FROZENSET."""
        self._stack.append(kind(self._group()))

    def last_as_tuple(self, count: int) -> None:
        """TUPLE1, TUPLE2, TUPLE3."""
        items = tuple(self._stack[-count:])
        if len(items) < count:
            raise IndexError("a short stack")
        self._stack[-count:] = [items]

    def refer(self, text: str) -> None:
        """GLOBAL; a copyreg extension is a name, too, and is not looked up."""
        self._stack.append(Name(text))

    def refer_by_stack(self, _: Any) -> None:
        """STACK_GLOBAL."""
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is no string")
        self._stack.append(Name(f"{module}.{name}"))

    def reduce(self, _: Any) -> None:
        """REDUCE, NEWOBJ."""
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def new_with_keywords(self, _: Any) -> None:
        """NEWOBJ_EX."""
        self._stack.pop()
        self.reduce(None)

    def object_of_group(self, _: Any) -> None:
        """OBJ."""
        function, *arguments = self._group()
        self._stack.append(self._call(function, arguments))

    def instance(self, text: str) -> None:
        """INST."""
        self._stack.append(self._call(Name(text.replace(" ", ".")), self._group()))

    def build(self, _: Any) -> None:
        """BUILD: attributes of an object that stands in; a built one has none that matter."""
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, StandIn):
            parts = state if isinstance(state, tuple) else (state,)
            for part in parts:
                if isinstance(part, dict):
                    target.state.update(part)

    def persistent(self, argument: Any) -> None:
        """PERSID, BINPERSID."""
        self._stack.append(
            self._load_persistent(self._stack.pop() if argument is None else argument)
        )


COPIED = (list, tuple, dict, set, frozenset, str, bytes, bytearray)
"""What a container can be built from, item by item."""

LITERALS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
        "SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
        "BINBYTES8 BYTEARRAY8".split(),
        lambda argument: argument,
    ),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "MARK": lambda _: MARK,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: set(),
}
"""Opcodes that put a value on the stack."""

ACTIONS: Mapping[str, Callable[[PickleReader, Any], None]] = {
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), PickleReader.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), PickleReader.get),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), PickleReader.reduce),
    **dict.fromkeys(("PERSID", "BINPERSID"), PickleReader.persistent),
    **dict.fromkeys(
        ("EXT1", "EXT2", "EXT4"), lambda reader, code: reader.refer(f"copyreg extension {code}")
    ),
    "MEMOIZE": PickleReader.memoize,
    "DUP": PickleReader.duplicate,
    "POP": PickleReader.pop,
    "POP_MARK": PickleReader.pop_group,
    "APPEND": PickleReader.append,
    "APPENDS": PickleReader.append_group,
    "SETITEM": PickleReader.set_item,
    "SETITEMS": PickleReader.set_group,
    "ADDITEMS": PickleReader.add_group,
    "LIST": lambda reader, _: reader.group_as(list),
    "TUPLE": lambda reader, _: reader.group_as(tuple),
    "FROZENSET": lambda reader, _: reader.group_as(frozenset),
    "DICT": lambda reader, _: reader.group_as(
        lambda items: dict(zip(items[::2], items[1::2], strict=True))
    ),
    "TUPLE1": lambda reader, _: reader.last_as_tuple(1),
    "TUPLE2": lambda reader, _: reader.last_as_tuple(2),
    "TUPLE3": lambda reader, _: reader.last_as_tuple(3),
    "GLOBAL": lambda reader, text: reader.refer(text.replace(" ", ".")),
    "STACK_GLOBAL": PickleReader.refer_by_stack,
    "NEWOBJ_EX": PickleReader.new_with_keywords,
    "OBJ": PickleReader.object_of_group,
    "INST": PickleReader.instance,
    "BUILD": PickleReader.build,
}
"""Opcodes that work on the stack."""
