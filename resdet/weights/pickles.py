"""Interpret untrusted pickles of plain values, without running anything they name.

A pickle is a program: loading one may call any function, and a few hundred bytes can keep the standard unpickler busy
for years (a nested tuple as a key is hashed at every level) or have it take any memory. So this is an interpreter of
its own. A name is one of the stand-ins that the caller lists or is refused, nothing but text, bytes and numbers is ever
hashed, and every object is charged against a budget that grows with the stream. What the stand-ins stand for (arrays
and tensors) is made at the end, over the bytes that the file really holds.
"""

from __future__ import annotations

import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch

from resdet.errors import WeightsError

MAX_DEPTH = 100
"""Of containers in containers. A training state has about ten, and whatever recurses later has a stack for these."""

# They ask for objects from outside the stream: the reading program's, or a registry of the process.
_REFUSED = frozenset({"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"})
_MAY_HOLD = "a weights file may hold tensors, numbers, strings, lists and dictionaries only"

# Bytes of memory: what any stream may take, for each byte of it, for one opcode, and for those that make a table.
_FREE, _PER_BYTE, _COST, _COST_OF_TABLE = 128 << 20, 16, 128, 512
_TABLES = frozenset({"EMPTY_SET", "FROZENSET", "DICT", "REDUCE", "OBJ", "INST"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(  # opcodes that push their argument
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg is not None and not opcode.stack_before and opcode.stack_after not in ([], [pickletools.anyobject])
)
_LEAVES = (str, bytes, bytearray, int, float, complex, type(None), torch.dtype, torch.device, torch.layout)

_SMALL_INT = 1 << 31
_MAX_ODD_KEYS = 1000


class StandIn:
    """What a stream makes of an array or a tensor, before it is known whether it makes sense."""

    def set_state(self, state: Any) -> None:
        """Take the state that follows some objects in a stream."""
        raise ValueError(f"a state for a {type(self).__name__}")

    def value(self, where: str) -> Any:
        """Return what it stands for; messages name it ``where``."""
        raise NotImplementedError


class Function:
    """A function that a stream may call, and do nothing else with."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


Names: TypeAlias = Mapping[tuple[str, str], Any]
"""What a stream may name, by module and name: a ``Function``, or a value that only other functions take."""


def read_values(
    stream: IO[bytes], path: Path, names: Names, size: int, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Interpret a pickle and return what it holds, tensors and plain values.

    Args:
        stream: The pickle, read to its end.
        path: The file, for messages.
        names: What the stream may name in addition to Python's containers.
        size: Bytes of the stream.
        persistent: Makes the stand-in of an object outside the stream; None: it must not ask for any.

    Raises:
        WeightsError: If the pickle is refused; a damaged one raises whatever its bytes happen to mean.
    """
    return _Builder(path).build(_Interpreter(path, names, size, persistent).run(stream), (), 0)[0]


def is_plain(value: Any) -> bool:
    """Return whether a value that was read is one that YAML and JSON can say: no tensors, no bytes."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float)


class _Interpreter:
    """Makes objects and stand-ins; ``left`` is the memory in bytes that they may still take."""

    def __init__(self, path: Path, names: Names, size: int, persistent: Callable[[Any], Any] | None) -> None:
        self.path, self.left, self.persistent = path, _FREE + _PER_BYTE * size, persistent
        self.num_odd_keys = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): Function(self.ordered_dict),
            ("collections", "Counter"): Function(self.counter),
            ("_codecs", "encode"): Function(self.encode),
            **names,
        }
        for builtins in ("builtins", "__builtin__"):
            self.names[builtins, "set"] = Function(self.set_of)
            self.names[builtins, "frozenset"] = Function(lambda *items: frozenset(self.set_of(*items)))
            self.names[builtins, "complex"] = Function(complex)
            self.names[builtins, "bytes"] = Function(lambda: b"")  # with a number, bytes would allocate that many
            self.names[builtins, "bytearray"] = Function(lambda *data: bytearray(self.encode(*data)))

    def run(self, stream: IO[bytes]) -> Any:
        for opcode, argument, position in pickletools.genops(stream):
            name = opcode.name
            if name in _REFUSED or (name in ("PERSID", "BINPERSID") and self.persistent is None):
                raise WeightsError(
                    f"{self.path}: asks for objects from outside the file ({name} at byte {position}), which is "
                    f"refused; {_MAY_HOLD}"
                )
            self.charge(_COST_OF_TABLE if name in _TABLES else _COST)
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            else:
                self.step(name, argument)
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        """Run one opcode other than those that push a constant."""
        match name:
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE" | "PUT":
                self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                self.stack.append(self.memo[argument])
            case "MARK":
                self.marked.append(self.stack)
                self.stack = []
            case "POP" if self.stack:
                self.stack.pop()
            case "POP" | "POP_MARK":
                self.pop_mark()
            case "DUP":
                self.stack.append(self.stack[-1])
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.push(self.pop_some(int(name[-1]) if name[-1].isdigit() else 0))
            case "EMPTY_LIST":
                self.push([])
            case "EMPTY_DICT":
                self.push({})
            case "EMPTY_SET":
                self.push(set())
            case "TUPLE":
                self.push(tuple(self.pop_mark()))
            case "LIST":
                self.push(self.pop_mark())
            case "DICT":
                self.push(self.with_entries({}, self.pop_mark()))
            case "FROZENSET":
                self.push(frozenset(self.set_of(self.pop_mark())))
            case "APPEND" | "APPENDS":
                items = self.pop_some(1) if name == "APPEND" else self.pop_mark()
                _of_type(self.stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.pop_some(2) if name == "SETITEM" else self.pop_mark()
                self.with_entries(_of_type(self.stack[-1], dict, OrderedDict), items)
            case "ADDITEMS":
                items = self.pop_mark()
                _of_type(self.stack[-1], set).update(self.set_of(items))
            case "GLOBAL":
                self.push(self.named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self.push(self.named(*self.pop_some(2)))
            case "REDUCE":
                self.push(_called(*self.pop_some(2)))
            case "INST":
                items = self.pop_mark()
                self.push(_called(self.named(*argument.split(" ", 1)), tuple(items)))
            case "OBJ":
                items = self.pop_mark()
                self.push(_called(items[0], tuple(items[1:])))
            case "BUILD":
                state = self.stack.pop()
                _set_state(self.stack[-1], state)
            case "PERSID" | "BINPERSID":
                assert self.persistent is not None
                self.push(self.persistent(self.stack.pop() if argument is None else argument))
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:  # NEWOBJ: the rest has no use without classes
                raise ValueError(f"{name}, an object of another type")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop_some(self, number: int) -> tuple[Any, ...]:
        if len(self.stack) < number:
            raise ValueError("too few values")
        items = tuple(self.stack[len(self.stack) - number :])
        del self.stack[len(self.stack) - number :]
        return items

    def charge(self, num_bytes: int) -> None:
        self.left -= num_bytes
        if self.left < 0:
            raise WeightsError(f"{self.path}: its values claim more memory than a file of this size can hold")

    def key(self, key: Any) -> Any:
        if type(key) not in (str, bytes, int, float, bool, type(None)):
            raise WeightsError(
                f"{self.path}: keys and members of sets must be text, bytes or numbers, got a {type(key).__name__}"
            )
        # Python hashes text and bytes with a secret; numbers can be chosen so that all of them collide.
        if type(key) is float or (type(key) is int and abs(key) >= _SMALL_INT):
            self.num_odd_keys += 1
            if self.num_odd_keys > _MAX_ODD_KEYS:
                raise WeightsError(
                    f"{self.path}: more than {_MAX_ODD_KEYS} of its keys are fractions or numbers above 2^31"
                )
        return key

    def name(self, key: Any) -> Any:
        """Return a dictionary's key; those of Python 2 are byte strings."""
        if type(key) is not bytes:
            return self.key(key)
        self.charge(len(key))
        return key.decode("latin-1")

    def with_entries(self, target: dict[Any, Any], items: Sequence[Any]) -> dict[Any, Any]:
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.name(key)] = value
        return target

    def set_of(self, items: Any = ()) -> set[Any]:
        self.charge(_COST * len(_of_type(items, list, tuple, set, frozenset)))
        return {self.key(item) for item in items}

    def ordered_dict(self, items: Any = ()) -> OrderedDict[Any, Any]:
        self.charge(2 * _COST * len(_of_type(items, list, tuple)))
        return OrderedDict((self.name(key), value) for key, value in items)

    def counter(self, counts: Any) -> Counter[Any]:
        self.charge(2 * _COST * len(_of_type(counts, dict)))
        return Counter(counts)

    def encode(self, text: Any = b"", encoding: Any = "latin-1") -> bytes:
        # How Python 3 writes bytes for protocols that know none.
        if encoding not in ("latin1", "latin-1"):
            raise ValueError("bytes in another encoding than latin-1")
        self.charge(len(_of_type(text, str, bytes)))
        return text if isinstance(text, bytes) else str(text).encode("latin-1")

    def named(self, module: Any, name: Any) -> Any:
        found = self.names.get((_of_type(module, str), _of_type(name, str)))
        if found is not None:
            return found
        named = ascii(f"{module}.{name}")[1:-1][:100]
        how = (
            "mmdetection's tools/model_converters/publish_model.py takes it away"
            if named.startswith(("mmengine.", "mmcv."))
            else "save its state_dict() alone where the file comes from"
        )
        raise WeightsError(f"{self.path}: loading it would run code of its own ({named}), which is refused; {how}")


def _of_type(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise ValueError(f"a {type(value).__name__} in place of a {types[0].__name__}")
    return value


def _called(function: Any, arguments: Any) -> Any:
    return _of_type(function, Function).call(*_of_type(arguments, tuple))


def _set_state(target: Any, state: Any) -> None:
    if type(target) is OrderedDict:
        # As every state dict of torch has them.
        vars(target).update((_of_type(name, str), entry) for name, entry in _of_type(state, dict).items())
    elif isinstance(target, StandIn):
        target.set_state(state)
    else:
        raise ValueError(f"a state for a {type(target).__name__.lower()}")


class _Builder:
    """Puts values in the place of stand-ins; what a stream names several times is made once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: dict[int, tuple[Any, int]] = {}

    def build(self, value: Any, where: tuple[Any, ...], depth: int) -> tuple[Any, int]:
        """Return a value at ``depth`` containers from the top, and how many containers deep it is itself."""
        if isinstance(value, _LEAVES):
            return value, 0
        if id(value) not in self.made:
            if depth > MAX_DEPTH:
                raise WeightsError(f"{self.path}: is nested too deeply, or in itself")
            self.made[id(value)] = self._build(value, where, depth)
        made, height = self.made[id(value)]
        if depth + height > MAX_DEPTH:
            raise WeightsError(f"{self.path}: is nested too deeply, or in itself")
        return made, height

    def _build(self, value: Any, where: tuple[Any, ...], depth: int) -> tuple[Any, int]:
        if isinstance(value, StandIn):
            return value.value(".".join(map(str, where)) or "its content"), 1
        if isinstance(value, set | frozenset):
            return value, 1  # of plain values
        if isinstance(value, list | tuple):
            items = [self.build(item, (*where, index), depth + 1) for index, item in enumerate(value)]
            return type(value)(item for item, _ in items), 1 + max((height for _, height in items), default=0)
        if not isinstance(value, dict):
            raise WeightsError(f"{self.path}: holds something that is neither a tensor nor a plain value")
        height = 0
        made = type(value)()
        for key, entry in value.items():
            made[key], below = self.build(entry, (*where, key), depth + 1)
            height = max(height, below)
        if isinstance(value, OrderedDict):
            attributes, below = self.build(vars(value), where, depth + 1)
            # One that has a method's name would take its place.
            vars(made).update((name, entry) for name, entry in attributes.items() if not hasattr(OrderedDict, name))
            height = max(height, below)
        return made, 1 + height
