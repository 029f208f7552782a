"""Read PyTorch's files: the zip archive of ``torch.save``, and the format before 1.6.

``torch.load(weights_only=True)`` runs no code, but it looks at no checksum, believes the sizes that the pickle states
(and reads beyond a record that is smaller), inflates compressed records without limit, and its errors advise to switch
``weights_only`` off. Here every record must have the CRC-32 that it was written with, and tensors are views of the
bytes that the file holds.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from resdet.errors import WeightsError, first_line
from resdet.weights.arrays import Arrays
from resdet.weights.pickles import Function, Names, StandIn, read_values

ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_CHUNK = 1 << 20
_SHARED = 4
"""Times the file's size that all tensors may come to: several may share one storage (tied weights, averages)."""
_ALWAYS = 1 << 20

_STORAGES = {
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
    # Of quantized tensors, which are refused by name once they are found.
    **dict.fromkeys(("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4"), torch.uint8),
}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_OTHER_TENSORS = {
    "_rebuild_qtensor": "quantized tensor",
    "_rebuild_sparse_tensor": "sparse tensor",
    "_rebuild_meta_tensor_no_storage": "tensor without data (on the device meta)",
    "_rebuild_nested_tensor": "nested tensor",
    "_rebuild_wrapper_subclass": "tensor of another class",
    "_rebuild_device_tensor_from_numpy": "tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "tensor of another device",
}


def load_torch_file(file: IO[bytes], path: Path, *, device: str = "cpu") -> Any:
    """Read an open file of ``torch.save`` onto the CPU; on the device meta, check it whole without keeping its data.

    Raises:
        WeightsError: If it is damaged, holds anything but tensors and plain values, or is another program's file.
    """
    start = file.read(len(ZIP_START))
    file.seek(0)
    try:
        if start == ZIP_START:
            with zipfile.ZipFile(file) as archive:
                return _ZipReader(archive, path, device).read()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _LegacyReader(content, path, device).read()
    except (WeightsError, OSError):
        raise
    except Exception as error:  # damaged bytes fail in the unzipping, the interpreting or anything they call
        what = f"a {path.suffix} file" if path.suffix else "PyTorch's"
        raise WeightsError(f"{path}: is damaged, cut short or not {what} ({first_line(error)})") from error


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's bytes, or None if all its checksums match and it can be read."""
    try:
        with path.open("rb") as file:
            load_torch_file(file, path, device="meta")
    except (WeightsError, OSError) as error:
        return first_line(error).removeprefix(f"{path}: ")
    return None


class _Reader(ABC):
    """Makes tensors of what a stream states and the file holds."""

    def __init__(self, path: Path, device: str, size: int) -> None:
        self.path, self.device, self.size = path, device, size
        self.left = _SHARED * size + _ALWAYS
        self.storages: dict[Any, Tensor] = {}  # uint8 [number of bytes], by key

    @abstractmethod
    def read(self) -> Any:
        """Read the file."""

    @abstractmethod
    def bytes_of(self, storage: _Storage) -> Tensor:
        """Return the bytes of a storage, uint8."""

    def names(self) -> Names:
        """Return what a stream of torch may name."""
        tensor = Function(lambda *arguments: _Tensor(self, *arguments[:4]))
        with_dtype = Function(lambda *arguments: _Tensor(self, *arguments[:4], arguments[6]))
        names: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor"): tensor,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_tensor_v3"): with_dtype,
            ("torch._utils", "_rebuild_parameter"): Function(_first),
            ("torch._utils", "_rebuild_parameter_with_state"): Function(_first),
            ("torch.nn.parameter", "Parameter"): Function(_first),
            ("torch._tensor", "_rebuild_from_type_v2"): Function(_from_type),
            ("torch", "Tensor"): torch.strided,  # a class, which only _rebuild_from_type_v2 takes
            ("torch", "Size"): Function(lambda sizes: sizes),  # a tuple
            ("torch", "device"): Function(torch.device),
            ("torch.serialization", "_get_layout"): Function(_LAYOUTS.__getitem__),
        }
        constants = (torch.dtype, torch.qscheme)
        names |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, constants)}
        names |= {("torch", f"{name}Storage"): _StorageType(dtype) for name, dtype in _STORAGES.items()}
        names["torch.storage", "UntypedStorage"] = names["torch", "UntypedStorage"]
        for name, kind in _OTHER_TENSORS.items():
            names["torch._utils", name] = Function(lambda *_, kind=kind: _OtherTensor(self.path, kind))
        return names | Arrays(self.path, self.size).names

    def storage(self, identity: Any) -> _Storage:
        """Return the storage that an id in a stream stands for."""
        kind, storage_type, key, _location, count, *view = identity
        is_known = isinstance(storage_type, _StorageType) and type(key) in (str, int)
        if kind not in ("storage", b"storage") or not is_known or not _are_sizes([count]):
            raise ValueError("an object outside the stream that is no storage")
        # The format before 1.6 knows parts of storages: (another key, the part's first element, its length).
        start = view[0][1] if view and view[0] is not None else 0
        return _Storage(key, storage_type.dtype, count, start)

    def tensor(self, where: str, storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None) -> Tensor:
        """Return the tensor of some elements of a storage."""
        sound = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(stride, tuple)
        if not sound or len(shape) != len(stride) or not _are_sizes([offset, storage.start, *shape, *stride]):
            raise WeightsError(f"{self.path}: is damaged: the shape of {where!r} is no shape of a tensor")
        dtype = dtype if isinstance(dtype, torch.dtype) else storage.dtype
        whole = self.elements(storage)  # uint8
        offset, count = offset + storage.start, math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
        if count and last * dtype.itemsize > len(whole):
            raise WeightsError(
                f"{self.path}: is damaged: {where!r} of shape {list(shape)} reaches beyond its {len(whole)} bytes"
            )
        self.left -= count * dtype.itemsize
        if self.left < 0:
            raise WeightsError(
                f"{self.path}: its tensors claim more memory than the file has, up to {where!r} of shape {list(shape)} "
                f"in {len(whole)} bytes"
            )
        made = torch.empty(0, dtype=dtype, device=self.device)
        return made.set_(whole.untyped_storage(), offset, shape, stride) if count else made.reshape(shape)

    def elements(self, storage: _Storage) -> Tensor:
        """Return the bytes of a storage, which are read once."""
        if storage.key not in self.storages:
            self.storages[storage.key] = self.bytes_of(storage)
        whole = self.storages[storage.key]
        if len(whole) != storage.num_bytes:
            raise WeightsError(f"{self.path}: is damaged: a storage of {len(whole)} and of {storage.num_bytes} bytes")
        return whole


class _ZipReader(_Reader):
    """Reads what ``torch.save`` writes: one record for the pickle, one for each storage, none of them compressed."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, device: str) -> None:
        size = path.stat().st_size
        super().__init__(path, device, size)
        self.archive = archive
        infos = archive.infolist()
        self.records = {info.filename.partition("/")[2]: info for info in infos}
        if any(name.startswith("code/") for name in self.records):
            raise WeightsError(
                f"{path}: is a TorchScript program, which holds code: save torch.jit.load(FILE).state_dict() with "
                "torch.save, and give that file"
            )
        if "data.pkl" not in self.records:
            raise WeightsError(f"{path}: is a zip archive, but not one of torch.save: it has no data.pkl")
        packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise WeightsError(f"{path}: {packed[0]!r} in it is compressed, which torch.save never does; save it anew")
        if len(self.records) != len(infos) or sum(info.file_size for info in infos) > size:
            raise WeightsError(f"{path}: is damaged: its records share their names or their bytes")
        self.unread = set(self.records)

    def read(self) -> Any:
        data = self.record("data.pkl")
        content = read_values(BytesIO(data), self.path, self.names(), len(data), self.storage)
        for name in sorted(self.unread):
            self.copy(name, None)
        return content

    def record(self, name: str) -> bytearray:
        """Return the bytes of a small record."""
        content = bytearray(self.records[name].file_size)
        self.copy(name, memoryview(content))
        return content

    def copy(self, name: str, target: memoryview | None) -> None:
        """Copy the bytes of a record to ``target``, or nowhere, and check their CRC."""
        self.unread.discard(name)
        start = 0
        try:
            with self.archive.open(self.records[name]) as record:
                while part := record.read(_CHUNK):  # the last one looks at the CRC
                    if target is not None:
                        target[start : start + len(part)] = part
                    start += len(part)
        except zipfile.BadZipFile as error:
            raise WeightsError(f"{self.path}: is damaged: the checksum of {name} is wrong ({error})") from error

    def bytes_of(self, storage: _Storage) -> Tensor:
        name = f"data/{storage.key}"
        if name not in self.records or self.records[name].file_size != storage.num_bytes:
            raise WeightsError(f"{self.path}: is damaged: it holds no {storage.num_bytes} bytes of {name!r:.80}")
        whole = torch.empty(storage.num_bytes, dtype=torch.uint8, device=self.device)
        self.copy(name, None if self.device == "meta" else memoryview(whole.numpy()))  # type: ignore[arg-type]
        if "byteorder" in self.records and bytes(self.record("byteorder")) != sys.byteorder.encode():
            whole.untyped_storage().byteswap(storage.dtype)  # type: ignore[no-untyped-call]
        return whole


class _LegacyReader(_Reader):
    """Reads what ``torch.save`` wrote before 1.6: pickles, the keys of the storages, and their bytes in that order."""

    def __init__(self, content: mmap.mmap, path: Path, device: str) -> None:
        super().__init__(path, device, len(content))
        self.content = content
        self.itemsizes: dict[Any, int] = {}
        self.starts: dict[Any, int] | None = None  # of the bytes of each storage

    def read(self) -> Any:
        if self.pickle() != _LEGACY_MAGIC or self.pickle() != _LEGACY_PROTOCOL:
            raise ValueError("it does not begin as PyTorch's files do")
        self.pickle()  # the machine that wrote it
        return read_values(cast(IO[bytes], self.content), self.path, self.names(), self.size, self.storage)

    def pickle(self) -> Any:
        """Read the next pickle."""
        return read_values(cast(IO[bytes], self.content), self.path, {}, self.size)

    def storage(self, identity: Any) -> _Storage:
        storage = super().storage(identity)
        self.itemsizes[storage.key] = storage.dtype.itemsize
        return storage

    def bytes_of(self, storage: _Storage) -> Tensor:
        if self.starts is None:
            self.starts = {}
            for key in self.pickle():
                count = int.from_bytes(self.content.read(8), "little")
                self.starts[key] = self.content.tell()
                self.content.seek(count * self.itemsizes[key], os.SEEK_CUR)
        start, count = self.starts[storage.key], storage.num_bytes
        stated = int.from_bytes(self.content[start - 8 : start], "little")
        if stated != storage.count or start + count > self.size:
            raise ValueError(f"{count} bytes of a storage are not there")
        if self.device == "meta":
            return torch.empty(count, dtype=torch.uint8, device="meta")
        return torch.frombuffer(bytearray(self.content[start : start + count]) or bytearray(1), dtype=torch.uint8)[
            :count
        ]


@dataclass(frozen=True)
class _StorageType:
    """The class of a storage."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    """Numbers outside the pickle."""

    key: str | int
    dtype: torch.dtype
    count: int
    start: int  # of the part that is meant, in elements

    @property
    def num_bytes(self) -> int:
        return self.count * self.dtype.itemsize


class _Tensor(StandIn):
    """The arguments in a tensor's pickle."""

    def __init__(self, reader: _Reader, *arguments: Any) -> None:
        self.reader, self.arguments = reader, arguments  # storage, offset, shape, stride, and sometimes a dtype

    def set_state(self, state: Any) -> None:
        # Before 0.4 that of a Parameter: whether it takes gradients, and its hooks.
        pass

    def value(self, where: str) -> Tensor:
        return self.reader.tensor(where, *self.arguments)


class _OtherTensor(StandIn):
    """A tensor of a kind that no weights have here."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind

    def value(self, where: str) -> Tensor:
        raise WeightsError(f"{self.path}: {where!r} is a {self.kind}; weights must be dense tensors with data")


def _are_sizes(numbers: Sequence[Any]) -> bool:
    return all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)


def _first(data: Any, *_: Any) -> StandIn:
    """Return a parameter's tensor."""
    if not isinstance(data, StandIn):
        raise ValueError("a parameter without a tensor")
    return data


def _from_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    """Return a tensor that had attributes, without them."""
    if not isinstance(function, Function):
        raise ValueError("a call of no function")
    return function.call(*arguments)
