"""Arrays in one flat file that is mapped rather than read: processes that map the same file share its memory.

The layout: 16 bytes of magic with the layout's version, 32 bytes of SHA-256 over all that follows, 8 bytes of the
header's length, the header (json: for each array its type, shape and offset, then the writer's own facts), and the
arrays in native byte order, each starting at a multiple of 64 bytes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from resdet.errors import DataError

Arrays = dict[str, npt.NDArray[Any]]

_MAGIC = b"resdet arrays 1\n"
_DIGEST = slice(16, 48)
_LENGTH = slice(48, 56)
_ALIGNMENT = 64
_SMALL = 1 << 16
"""Bytes. Arrays that together take less are sent to a spawned process as they are: a mapping costs more."""


class MappedFile(mmap.mmap):
    """A read-only map of a whole file of arrays, which the arrays keep alive (it ends their chain of bases).

    Attributes:
        path: A name under which other processes can open the same file.
        file_id: Device and inode, which tell whether the name still leads to this file.
        digest: Of the contents, as the file states it.
        owner: Process that made the file for sharing and whose end is the file's end; None for a file that stays.
    """

    path: str
    file_id: tuple[int, int]
    digest: bytes
    owner: int | None

    @classmethod
    def of(cls, file: BinaryIO, path: str, *, owner: int | None = None) -> MappedFile:
        """Map an open file.

        Raises:
            OSError: If it cannot be mapped.
            ValueError: If it is empty.
        """
        mapped = cls(file.fileno(), 0, access=mmap.ACCESS_READ)
        stat = os.fstat(file.fileno())
        mapped.path, mapped.file_id, mapped.owner = path, (stat.st_dev, stat.st_ino), owner
        mapped.digest = mapped[_DIGEST]
        return mapped

    def array(self, dtype: str, shape: tuple[int, ...], offset: int, strides: tuple[int, ...] | None = None) -> Any:
        """Give an array that lies in the file, read-only."""
        return np.ndarray(shape, np.dtype(dtype), buffer=self, offset=offset, strides=strides)

    def is_reachable(self) -> bool:
        """Say whether ``path`` still leads to this file."""
        try:
            stat = os.stat(self.path)
        except OSError:
            return False
        return (stat.st_dev, stat.st_ino) == self.file_id


def write_arrays(file: BinaryIO, arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> None:
    """Write arrays and facts (plain values) in the flat layout.

    Raises:
        OSError: If the file cannot be written.
    """
    spec: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        spec[name] = {"dtype": array.dtype.str, "shape": array.shape, "offset": offset}
        offset += array.nbytes
    header = json.dumps({"arrays": spec, "facts": facts}).encode()
    # Offsets count from the end of the header, which is padded so that they are aligned in the file too.
    header += b" " * (-(_LENGTH.stop + len(header)) % _ALIGNMENT)

    checksum = hashlib.sha256()
    file.write(_MAGIC + bytes(_DIGEST.stop - _DIGEST.start))

    def write(part: Any) -> int:
        checksum.update(part)
        file.write(part)
        return len(part)

    write(len(header).to_bytes(8, "little"))
    write(header)
    position = 0
    for name, array in arrays.items():
        position += write(bytes(spec[name]["offset"] - position))
        if array.nbytes:
            flat: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            position += write(flat)
    file.seek(_DIGEST.start)
    file.write(checksum.digest())
    file.flush()


def map_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Map a file that ``write_arrays`` wrote, all of it checked, and give its arrays (read-only) and facts.

    The check reads the file once (50 MB in 0.04 s), which later makes the arrays' pages ready for use.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is not of this layout, cut short or changed; the message says which.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _LENGTH.stop:
            raise ValueError("cut short")
        mapped = MappedFile.of(file, str(path))
    if mapped[: len(_MAGIC)] != _MAGIC:
        raise ValueError("of another layout")
    with memoryview(mapped) as whole, whole[_DIGEST.stop :] as contents:
        if hashlib.sha256(contents).digest() != mapped.digest:
            raise ValueError("its checksum does not match: cut short or changed")
    return _arrays_in(mapped)


def _arrays_in(mapped: MappedFile) -> tuple[Arrays, dict[str, Any]]:
    start = _LENGTH.stop + int.from_bytes(mapped[_LENGTH], "little")
    header = json.loads(mapped[_LENGTH.stop : start])
    arrays: Arrays = {
        name: mapped.array(spec["dtype"], tuple(spec["shape"]), start + spec["offset"])
        for name, spec in header["arrays"].items()
    }
    return arrays, header["facts"]


def mapped_file_of(array: npt.NDArray[Any]) -> MappedFile | None:
    """Give the file that an array is a view of, None for one in ordinary memory."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, MappedFile) else None


@dataclass(frozen=True)
class Reference:
    """An array as it is sent to another process: where it lies in which file."""

    path: str
    digest: bytes
    owner: int | None
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def share(arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Give the same arrays in memory that a process which is being spawned can map.

    Views of a file that it can open stay what they are. The others are written, all into one file in memory
    (``memfd_create``; elsewhere a temporary file), which lives until the last array in it is gone. Arrays that are
    small altogether, and all arrays where no process is being spawned, are left alone.
    """
    loose = {}
    for name, array in arrays.items():
        mapped = mapped_file_of(array)
        if mapped is None or not mapped.is_reachable():
            loose[name] = array
    if get_spawning_popen() is None or sum(array.nbytes for array in loose.values()) < _SMALL:
        return dict(arrays)
    return {**arrays, **_arrays_in(_in_shared_memory(loose))[0]}


def _in_shared_memory(arrays: Arrays) -> MappedFile:
    descriptor, path = _open_shared()
    with os.fdopen(descriptor, "wb+", closefd=False) as file:
        write_arrays(file, arrays, {})
        mapped = MappedFile.of(file, path, owner=os.getpid())
    weakref.finalize(mapped, _end_shared, descriptor, path, os.getpid())
    return mapped


def _open_shared() -> tuple[int, str]:
    if sys.platform == "linux" and hasattr(os, "memfd_create"):
        try:
            descriptor = os.memfd_create("resdet")
        except OSError:  # forbidden in some sandboxes
            pass
        else:
            path = f"/proc/{os.getpid()}/fd/{descriptor}"
            if os.path.exists(path):
                return descriptor, path
            os.close(descriptor)
    return tempfile.mkstemp(prefix="resdet-", suffix=".arrays")


def _end_shared(descriptor: int, path: str, owner: int) -> None:
    os.close(descriptor)
    # A forked process comes here too, and must leave its parent's file alone.
    if os.getpid() == owner and not path.startswith("/proc/"):
        Path(path).unlink(missing_ok=True)


def to_references(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Give each array as a ``Reference`` if whoever unpickles it can map it, else as it is.

    A file that stays can be mapped by everybody; one that ends with its owner by the processes it spawns.
    """
    sent: dict[str, Any] = {}
    spawning = get_spawning_popen() is not None
    for name, array in arrays.items():
        mapped = mapped_file_of(array)
        if mapped is None or not (mapped.owner is None or spawning) or not mapped.is_reachable():
            sent[name] = np.ascontiguousarray(array)
            continue
        start = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
        offset = array.ctypes.data - start if array.size else 0
        sent[name] = Reference(
            mapped.path, mapped.digest, mapped.owner, array.dtype.str, array.shape, array.strides, offset
        )
    return sent


def from_references(sent: Mapping[str, Any]) -> Arrays:
    """Undo ``to_references`` in the process that received them; each file is mapped once.

    Raises:
        DataError: If a file is gone, or is not the one that was meant.
    """
    files: dict[str, MappedFile] = {}
    arrays: Arrays = {}
    for name, item in sent.items():
        if not isinstance(item, Reference):
            arrays[name] = item
            continue
        if item.path not in files:
            try:
                with open(item.path, "rb") as file:
                    files[item.path] = MappedFile.of(file, item.path, owner=item.owner)
            except (OSError, ValueError) as error:
                raise DataError(f"{item.path}: the annotations that another process put here are gone") from error
        if files[item.path].digest != item.digest:
            raise DataError(f"{item.path}: holds other annotations than when another process named it")
        arrays[name] = files[item.path].array(item.dtype, item.shape, item.offset, item.strides)
    return arrays
