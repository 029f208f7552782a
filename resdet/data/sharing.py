"""Send a table to worker processes without copying its arrays.

A forked worker shares its parent's memory. A spawned one receives a pickle, in which eight workers would find eight
copies of every array. Here the arrays stay out of the pickle (as buffers of its protocol 5): those in a mapped file are
sent as the file's name and their position in it, the others are moved into shared memory, once for all workers.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.multiprocessing  # registers how tensors in shared memory are sent
from torch import Tensor

from resdet.errors import DataError

Bytes = npt.NDArray[np.uint8]
MappedFile = np.memmap[tuple[int], np.dtype[np.uint8]]

_SMALL = 1 << 16
"""Bytes. Arrays that together take less are sent by value: shared memory costs more."""

_ALIGNMENT = 64


@dataclass(frozen=True)
class _Part:
    """A piece of a mapped file or of a tensor in shared memory."""

    memory: str | Tensor
    digest: bytes
    start: int
    num_bytes: int


def map_file(path: str | Path) -> MappedFile:
    """Map a safetensors file read-only, without looking into it; an empty one raises a ValueError.

    A PermissionError is raised unless it is this user's own and others cannot write to it: what is mapped can change
    at any time.
    """
    with open(path, "rb") as file:
        if not is_private(os.fstat(file.fileno())):
            raise PermissionError(errno.EACCES, "it is not yours alone to write to", str(path))
        mapped = np.memmap(file, dtype=np.uint8, mode="r")
    mapped.filename = str(path)
    return mapped


def is_private(state: os.stat_result) -> bool:
    """Return whether a file or folder is this user's, and nobody else can write to it (on Windows, always)."""
    return os.name != "posix" or (state.st_uid == os.geteuid() and not state.st_mode & 0o022)


def header_of(file: MappedFile) -> bytes:
    """Return the header of a safetensors file: the length of a json text in 8 bytes, and that text."""
    return file[: 8 + int.from_bytes(file[:8].tobytes(), "little")].tobytes()


def memory_of(array: npt.NDArray[Any]) -> MappedFile | Tensor | None:
    """Return the mapped file or the shared tensor that an array is a view of, None for an array in ordinary memory."""
    base: object = array
    while isinstance(base, (np.ndarray, memoryview)) and not isinstance(base, np.memmap):
        base = base.obj if isinstance(base, memoryview) else base.base
    if isinstance(base, Tensor) and not base.is_shared():  # type: ignore[no-untyped-call]
        return None
    return base if isinstance(base, (np.memmap, Tensor)) else None


def reduce_for_worker(table: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Reduce an object with arrays to what ``ForkingPickler`` sends to another process.

    Arrays in ordinary memory are first moved to shared memory, and stay there: the next worker finds them, and this
    process drops its own copy. They are read-only from then on. Small ones are left alone.
    """
    buffers: list[pickle.PickleBuffer] = []
    outline = pickle.dumps(table, protocol=5, buffer_callback=buffers.append)
    arrays = [np.frombuffer(memoryview(buffer), dtype=np.uint8) for buffer in buffers]
    parts = [_part_of(array) for array in arrays]
    loose = [index for index, part in enumerate(parts) if part is None]
    if sum(arrays[index].nbytes for index in loose) >= _SMALL:
        moved = _in_shared_memory([arrays[index] for index in loose])
        for index, array in zip(loose, moved, strict=True):
            arrays[index], parts[index] = array, _part_of(array)
        vars(table).update(vars(pickle.loads(outline, buffers=arrays)))
    sent = [array.tobytes() if part is None else part for array, part in zip(arrays, parts, strict=True)]
    return _rebuild, (outline, sent)


def _part_of(array: Bytes) -> _Part | None:
    memory = memory_of(array)
    if memory is None or not len(array):
        return None
    address = array.ctypes.data
    if isinstance(memory, Tensor):
        return _Part(memory, b"", address - memory.data_ptr(), len(array))
    path, digest = str(memory.filename), _digest(memory)
    try:
        still_there = _digest(map_file(path)) == digest
    except (OSError, ValueError):
        still_there = False
    # This process still maps the file when its name is gone or has passed to another.
    return _Part(path, digest, address - memory.ctypes.data, len(array)) if still_there else None


def _digest(file: MappedFile) -> bytes:
    return hashlib.sha256(header_of(file)).digest()


def _in_shared_memory(arrays: Sequence[Bytes]) -> list[Bytes]:
    """Copy arrays into one block of shared memory, which ends with the last array in it."""
    sizes = [-(-len(array) // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    block = torch.empty(sum(sizes), dtype=torch.uint8).share_memory_().numpy()  # type: ignore[no-untyped-call]
    starts = np.cumsum([0, *sizes]).tolist()
    moved = [block[start : start + len(array)] for start, array in zip(starts, arrays, strict=False)]
    for array, copy in zip(arrays, moved, strict=True):
        copy[:] = array
        copy.flags.writeable = False
    return moved


def _rebuild(outline: bytes, parts: Sequence[bytes | _Part]) -> Any:
    """Undo ``reduce_for_worker`` in the process that received the parts."""
    mapped = functools.cache(_map_again)  # each file once
    buffers: list[bytes | Bytes] = []
    for part in parts:
        if isinstance(part, bytes):
            buffers.append(part)
            continue
        if isinstance(part.memory, Tensor):
            whole = part.memory.numpy()
            whole.flags.writeable = False
        else:
            whole = mapped(part.memory, part.digest)
        buffers.append(whole[part.start : part.start + part.num_bytes])
        if len(buffers[-1]) != part.num_bytes:
            raise DataError(f"{part.memory}: the annotations that another process put here were cut short")
    return pickle.loads(outline, buffers=buffers)


def _map_again(path: str, digest: bytes) -> Bytes:
    try:
        file = map_file(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the annotations that another process put here are gone") from error
    if _digest(file) != digest:
        raise DataError(f"{path}: holds other annotations than when another process named it")
    return np.asarray(file)
