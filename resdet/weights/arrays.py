"""Read pickles of NumPy arrays, as the model zoos of detectron2 and Detectron are.

Not even NumPy takes part: its ``__setstate__`` trusts its input (a forged dtype turns bytes into pointers). Arrays are
built over the bytes that the file really holds.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from resdet.errors import WeightsError, first_line
from resdet.weights.pickles import Function, StandIn, read_values

_DTYPES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
_MAX_DIMENSIONS = 32


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle of arrays and plain values, of Python 2 or 3, any protocol, and any version of numpy.

    Numpy's arrays become tensors. The byte strings of Python 2 are decoded by latin-1, and so are keys that are bytes.
    A WeightsError says what is damaged or refused.
    """
    path = Path(path)
    with path.open("rb") as file:
        return load_pickle(file, path)


def load_pickle(file: IO[bytes], path: Path) -> Any:
    """Read an open file as ``read_pickle`` does; messages name it by ``path``."""
    try:
        # A memory map gives no more bytes than there are, whatever length the stream asks for.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return read_values(cast(IO[bytes], content), path, Arrays(path, len(content)).names, len(content))
    except (WeightsError, OSError):
        raise
    except Exception as error:  # a damaged stream fails in whatever its bytes happen to mean
        raise WeightsError(f"{path}: is damaged, cut short or not a pickle ({first_line(error)})") from error


class Arrays:
    """Builds arrays: no more bytes than the file has, even if some share theirs."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self.left = num_bytes
        reconstruct = Function(lambda *_: _Array(self))  # (class, shape (0,), type "b"), which the state replaces
        self.names: dict[tuple[str, str], Any] = {
            ("numpy", "dtype"): Function(_DType),
            ("numpy", "ndarray"): reconstruct,  # the class of arrays is only ever an argument of it
        }
        for package in ("numpy.core", "numpy._core"):
            self.names |= {
                (f"{package}.multiarray", "_reconstruct"): reconstruct,
                (f"{package}.multiarray", "scalar"): Function(lambda dtype, data: _Scalar(self, dtype, data)),
                (f"{package}.numeric", "_frombuffer"): Function(
                    lambda data, dtype, shape, order: _Array(self, (shape, dtype, order == "F", data))
                ),
            }

    def array(self, where: str, shape: Any, dtype: Any, fortran: Any, data: Any) -> Tensor:
        """Build an array."""
        sound = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
        if not sound or len(shape) > _MAX_DIMENSIONS:
            raise WeightsError(f"{self.path}: is damaged: the shape of {where!r} is no shape of an array")
        ordered = self.values(where, dtype, data, math.prod(shape)).reshape(shape, order="F" if fortran else "C")
        return torch.from_numpy(np.ascontiguousarray(ordered).reshape(shape))

    def values(self, where: str, dtype: Any, data: Any, count: int) -> np.ndarray[Any, Any]:
        """Build ``count`` numbers."""
        if not isinstance(dtype, _DType) or dtype.spec not in _DTYPES or dtype.order not in ("<", ">", "=", "|"):
            kind = dtype.spec if isinstance(dtype, _DType) and isinstance(dtype.spec, str) else type(dtype).__name__
            raise WeightsError(f"{self.path}: {where!r} is an array of type {kind[:80]!r}; only numbers are read")
        stored = np.dtype(dtype.spec).newbyteorder(dtype.order)
        num_bytes = len(data) if isinstance(data, str | bytes | bytearray) else -1
        if num_bytes != count * stored.itemsize:
            raise WeightsError(
                f"{self.path}: is damaged: {where!r} has {max(num_bytes, 0)} bytes for "
                f"{count if count < 1 << 63 else 'too many'} numbers of {stored.itemsize} bytes"
            )
        self.left -= num_bytes
        if self.left < 0:
            raise WeightsError(f"{self.path}: its arrays claim more memory than the whole file has")
        # Python 2 wrote the bytes as a string.
        raw = bytearray(data, "latin-1") if isinstance(data, str) else bytearray(data)
        values = np.frombuffer(raw, stored) if raw else np.empty(0, stored)
        return values.astype(stored.newbyteorder("="), copy=False)


class _Array(StandIn):
    """The state in an array's pickle: shape, dtype, whether in Fortran's order, data."""

    def __init__(self, arrays: Arrays, state: tuple[Any, ...] = (None, None, None, None)) -> None:
        self.arrays, self.state = arrays, state

    def set_state(self, state: Any) -> None:
        # (version, shape, dtype, is_fortran, data); version 0 had no version.
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise ValueError("an array's state of another kind")
        self.state = state[-4:]

    def value(self, where: str) -> Tensor:
        array = self.arrays.array(where, *self.state)
        self.state = ()  # a copy was made; without this the file would be held twice
        return array


class _Scalar(StandIn):
    """The arguments in a numpy scalar's pickle."""

    def __init__(self, arrays: Arrays, dtype: Any, data: Any) -> None:
        self.arrays, self.dtype, self.data = arrays, dtype, data

    def value(self, where: str) -> Any:
        return self.arrays.values(where, self.dtype, self.data, 1).item()


class _DType(StandIn):
    """The state in a dtype's pickle."""

    def __init__(self, spec: Any, *_flags: Any) -> None:
        self.spec: Any = spec
        self.order: Any = "|"

    def set_state(self, state: Any) -> None:
        # (version, byte order, subdtype, names, fields, size, alignment, flags, ...)
        if any(part is not None for part in state[2:5]):
            raise ValueError("an array of records or subarrays")
        self.order = state[1]

    def value(self, where: str) -> str:
        return str(self.spec)
