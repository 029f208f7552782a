"""Read untrusted pickles of arrays, numbers, strings and plain containers, without running anything they name.

The model zoos of detectron2 and Detectron are pickles, and a pickle is a program: loading one may call any function it
names. Here a name resolves to one of the few stand-ins below or is refused before anything is called. Not even numpy
takes part: its ``__setstate__`` trusts its input (a forged dtype turns bytes into pointers). Arrays are built at the
end, over the bytes that the file really holds. (``torch.load(weights_only=True)`` refuses numpy's arrays.)
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from resdet.errors import WeightsError, first_line

# They ask for objects from outside the stream: the reading program's, or a registry of the process.
_REFUSED_OPCODES = frozenset({"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"})
_MAY_HOLD = "a pickle may hold arrays, numbers, strings, lists and dictionaries only"
_DTYPES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle of arrays and plain values, of Python 2 or 3, any protocol, and any version of numpy.

    Numpy's arrays become tensors, an OrderedDict a dict. The byte strings of Python 2 are decoded by latin-1, and so
    are keys that are bytes. A WeightsError says what is damaged or refused.
    """
    path = Path(path)
    with path.open("rb") as file:
        return load_pickle(file, path)


def load_pickle(file: IO[bytes], path: Path) -> Any:
    """Read an open file as ``read_pickle`` does; messages name it by ``path``."""
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check_opcodes(content, path)
            content.seek(0)
            # A memory map gives no more bytes than there are, whatever length the stream asks for.
            loaded = _Unpickler(content, path).load()
            return _Builder(path, len(content)).build(loaded)
    except (WeightsError, OSError):
        raise
    except RecursionError:
        raise WeightsError(f"{path}: is nested too deeply, or in itself") from None
    except Exception as error:  # a damaged stream fails in whatever its bytes happen to mean
        raise WeightsError(f"{path}: is damaged, cut short or not a pickle ({first_line(error)})") from error


def _check_opcodes(content: mmap.mmap, path: Path) -> None:
    """Walk over the stream without building anything.

    A memo index far beyond the number of objects would have the unpickler allocate a table of that size (eight bytes
    in the file, gigabytes in memory).
    """
    for count, (opcode, argument, position) in enumerate(pickletools.genops(cast(IO[bytes], content))):
        if opcode.name in _REFUSED_OPCODES:
            raise WeightsError(
                f"{path}: asks for objects from outside the file ({opcode.name} at byte {position}), which is refused; "
                f"{_MAY_HOLD}"
            )
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= 2 * count + 256:
            raise WeightsError(f"{path}: is damaged: it numbers its {count} objects up to {argument}")


@dataclass(slots=True, eq=False)
class _Array:
    """The state in an array's pickle, not yet an array."""

    shape: Any = None
    dtype: Any = None
    fortran: Any = False
    data: Any = None

    def __setstate__(self, state: Any) -> None:
        # (version, shape, dtype, is_fortran, data); version 0 had no version.
        self.shape, self.dtype, self.fortran, self.data = state[-4:]


class _DType:
    """The state in a dtype's pickle."""

    __slots__ = ("order", "spec")

    def __init__(self, spec: Any, *flags: Any) -> None:
        self.spec = spec
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subdtype, names, fields, size, alignment, flags, ...)
        if any(part is not None for part in state[2:5]):
            raise ValueError("an array of records or subarrays")
        self.order = state[1]


@dataclass(slots=True, eq=False)
class _Scalar:
    """The arguments in a numpy scalar's pickle."""

    dtype: Any
    data: Any


class _Allowed:
    """A function that the stream may call, and do nothing else with.

    The unpickler would set attributes on a bare function; here it passes them to ``__setstate__``.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state for a function")


def _reconstruct(*arguments: Any) -> _Array:
    # numpy's takes (class, shape (0,), type "b"), all of which the state that follows replaces.
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(shape, dtype, order == "F", data)


def _encode(text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes for protocols that know none.
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return str(text).encode("latin-1")


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _DType,
    # The class of arrays is only ever an argument of _reconstruct.
    ("numpy", "ndarray"): _reconstruct,
}
for _builtins in ("builtins", "__builtin__"):
    _FUNCTIONS[_builtins, "bytes"] = lambda: b""  # with a number, bytes would allocate that many
    _FUNCTIONS[_builtins, "set"] = set
    _FUNCTIONS[_builtins, "frozenset"] = frozenset
for _package in ("numpy.core", "numpy._core"):
    _FUNCTIONS[f"{_package}.multiarray", "_reconstruct"] = _reconstruct
    _FUNCTIONS[f"{_package}.multiarray", "scalar"] = _Scalar
    _FUNCTIONS[f"{_package}.numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: mmap.mmap, path: Path) -> None:
        super().__init__(content, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        function = _FUNCTIONS.get((module, name))
        if function is None:
            named = ascii(f"{module}.{name}")[1:-1][:100]
            raise WeightsError(f"{self.path}: loading it would run {named}, which is refused; {_MAY_HOLD}")
        return _Allowed(function)


class _Builder:
    """Builds the arrays that the stand-ins describe: no more bytes than the file has, even if some share theirs."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self.left = num_bytes
        self.built: dict[int, Any] = {}

    def build(self, value: Any) -> Any:
        if isinstance(value, str | bytes | bytearray | int | float) or value is None:
            return value
        if id(value) in self.built:
            return self.built[id(value)]
        made: Any
        if isinstance(value, dict):
            made = {self._key(key): self.build(entry) for key, entry in dict.items(value)}
        elif isinstance(value, list | tuple | set | frozenset):
            made = type(value)(self.build(entry) for entry in value)
        elif isinstance(value, _Array):
            made = self._array(value)
        elif isinstance(value, _Scalar):
            made = self._values(value.dtype, value.data, 1).item()
        else:
            raise WeightsError(f"{self.path}: holds something that is neither an array nor a plain value")
        self.built[id(value)] = made
        return made

    def _key(self, key: Any) -> Any:
        return key.decode("latin-1") if isinstance(key, bytes) else self.build(key)

    def _array(self, array: _Array) -> Tensor:
        shape = tuple(array.shape)
        if not all(isinstance(size, int) and size >= 0 for size in shape) or len(shape) > 32:
            raise WeightsError(f"{self.path}: is damaged: it holds an array of shape {str(shape)[:80]}")
        values = self._values(array.dtype, array.data, math.prod(shape))
        array.data = None  # a copy was made; without this the file would be held twice
        ordered = values.reshape(shape, order="F" if array.fortran else "C")
        return torch.from_numpy(np.ascontiguousarray(ordered).reshape(shape))

    def _values(self, dtype: Any, data: Any, count: int) -> np.ndarray[Any, Any]:
        if not isinstance(dtype, _DType) or dtype.spec not in _DTYPES or dtype.order not in ("<", ">", "=", "|"):
            kind = dtype.spec if isinstance(dtype, _DType) else type(dtype).__name__
            raise WeightsError(f"{self.path}: holds an array of type {str(kind)[:80]!r}; only numbers are read")
        stored = np.dtype(dtype.spec).newbyteorder(dtype.order)
        num_bytes = len(data) if isinstance(data, str | bytes | bytearray) else -1
        if num_bytes != count * stored.itemsize:
            raise WeightsError(
                f"{self.path}: is damaged: {count} numbers of {stored.itemsize} bytes from {max(num_bytes, 0)} bytes"
            )
        self.left -= num_bytes
        if self.left < 0:
            raise WeightsError(f"{self.path}: its arrays claim more memory than the whole file has")
        # Python 2 wrote the bytes as a string.
        raw = bytearray(data, "latin-1") if isinstance(data, str) else bytearray(data)
        values = np.frombuffer(raw, stored) if raw else np.empty(0, stored)
        return values.astype(stored.newbyteorder("="), copy=False)
