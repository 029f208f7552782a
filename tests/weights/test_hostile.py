"""Files made to hang, kill or fill the process that reads them: each is refused in a line and in little memory."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from resdet.errors import WeightsError
from resdet.weights.files import read_checkpoint, read_weights
from resdet.weights.torch_files import damage

MEGABYTE = 1 << 20
DEEP = 200_000  # ten times what overflows the stack of a recursion in C


def torch_file(path: Path, pickled: bytes, **records: bytes) -> Path:
    """Write an archive as torch.save does, with any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def bare_pickle(path: Path, pickled: bytes) -> Path:
    path.write_bytes(pickled)
    return path


def legacy_file(path: Path, pickled: bytes) -> Path:
    """Write a file as torch.save did before 1.6, with any pickle."""
    head = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    path.write_bytes(head + pickled + pickle.dumps([], protocol=2))
    return path


CONTAINERS: dict[str, Callable[[Path, bytes], Path]] = {
    ".pkl": bare_pickle,
    ".pt": torch_file,
    ".pth": legacy_file,
}


def refusal(path: Path) -> str:
    """Why a file is not read: one short line that names it."""
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    assert "weights_only" not in message
    return message.removeprefix(f"{path}: ")


def nested_tuple(levels: int) -> bytes:
    """Pickle ((..., ...), (..., ...)), each level once."""
    return b"K\x01" + b"".join(b"q%ch%c\x86" % (level, level) for level in range(levels))


def number_key(number: int) -> bytes:
    return pickle.dumps(number, protocol=2)[2:-1]


KEYS = "keys and members of sets must be text, bytes or numbers"
NESTED = "is nested too deeply, or in itself"
MEMORY = "its values claim more memory than a file of this size can hold"
COLLIDING = [(2**61 - 1) * i for i in range(1, 200_000)]  # all have the hash 0

STREAMS: dict[str, tuple[bytes, str]] = {
    "nested tuple as a key": (b"\x80\x02}" + nested_tuple(60) + b"Ns.", KEYS),
    "nested tuple in a set": (b"\x80\x04\x8f(" + nested_tuple(60) + b"\x90.", KEYS),
    "nested tuple in a frozenset": (b"\x80\x04(" + nested_tuple(60) + b"\x91.", KEYS),
    "nested tuple for set()": (b"\x80\x02c__builtin__\nset\n]" + nested_tuple(60) + b"a\x85R.", KEYS),
    "nested tuple as a key of an OrderedDict": (
        b"\x80\x02ccollections\nOrderedDict\n]" + nested_tuple(60) + b"N\x86a\x85R.",
        KEYS,
    ),
    "lists, very deep": (b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".", NESTED),
    "tuples, very deep": (b"\x80\x02)" + b"\x85" * DEEP + b".", NESTED),
    "dictionaries, very deep": (b"\x80\x02" + b"}K\x01" * DEEP + b"N" + b"s" * DEEP + b".", NESTED),
    "deep from the top": (b"\x80\x02]q\x00" + b"]q\x01ah\x010h\x01" * 1000 + b"0h\x00.", ""),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", NESTED),
    "a dictionary in itself": (b"\x80\x02}q\x00K\x01h\x00s.", NESTED),
    "very deep, a tuple as a key": (b"\x80\x02})" + b"\x85" * DEEP + b"Ns.", KEYS),
    "sets of one list": (
        b"\x80\x02(lq\x00(" + b"".join(b"M" + struct.pack("<H", i) for i in range(65536)) + b"e0"
        b"c__builtin__\nset\nq\x01](" + b"h\x01h\x00\x85R" * 20_000 + b"e.",
        MEMORY,
    ),
    "bytes of one text": (
        b"\x80\x02X" + struct.pack("<I", MEGABYTE) + b"a" * MEGABYTE + b"q\x00U\x06latin1q\x01"
        b"c_codecs\nencode\nq\x02](" + b"h\x02h\x00h\x01\x86R" * 10_000 + b"e.",
        MEMORY,
    ),
    "two million empty sets": (b"\x80\x04](" + b"\x8f" * 2_000_000 + b"e.", MEMORY),
    "two million places in the memo": (b"\x80\x04N" + b"\x94" * 2_000_000 + b".", MEMORY),
    "keys that collide": (
        b"\x80\x02}(" + b"".join(number_key(number) + b"N" for number in COLLIDING) + b"u.",
        "more than 1000 of its keys are fractions or numbers above 2^31",
    ),
    "a long string that is not there": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", "is damaged"),
    "a number of too many digits": (b"L" + b"9" * 1_000_000 + b"L\n.", "is damaged"),
    "a place in the stack below its end": (b"\x80\x02\x87.", "is damaged"),
}


@pytest.mark.parametrize("container", [".pkl", ".pt", pytest.param(".pth", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_hangs_kills_or_fills(kind: str, container: str, tmp_path: Path) -> None:
    stream, expected = STREAMS[kind]
    path = CONTAINERS[container](tmp_path / f"weights{container}", stream)
    assert expected in refusal(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_streams_of_the_same_kinds_that_are_sound_are_read(container: str, tmp_path: Path) -> None:
    content = {
        "a": {1: 2, -5: 3, 2**40: 4, 0.5: 1, None: 0},
        "s": {1, 2.5, "x", b"y"},
        "deep": (((((1,),),),),),
    }
    content["floats"] = [i / 7 for i in range(100_000)]  # type: ignore[assignment]
    content["names"] = {f"name {i}": i for i in range(100_000)}
    path = CONTAINERS[container](tmp_path / f"weights{container}", pickle.dumps(content, protocol=2))
    assert read_checkpoint(path) == content


@pytest.mark.slow
def test_reading_hostile_files_takes_little_memory_and_time(tmp_path: Path) -> None:
    """In a process of its own that may take half a gigabyte more than it needs to start."""
    paths = [
        str(CONTAINERS[container](tmp_path / f"{index}{container}", stream))
        for index, (kind, (stream, _)) in enumerate(STREAMS.items())
        for container in (".pkl", ".pt")
        if kind.startswith(("sets", "bytes", "two million"))
    ]
    code = """
import resource, sys
from resdet.errors import WeightsError
from resdet.weights.files import read_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_checkpoint(path)
    except WeightsError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 500_000, "kilobytes"


# ---- what archives and tensors claim


class Storage:
    """Pickles as a storage of torch: its type, its record and how many numbers it has."""

    def __init__(self, count: Any, key: Any = "0", kind: Any = torch.FloatStorage) -> None:
        self.identity = ("storage", kind, key, "cpu", count)


class Claimed:
    """Pickles as a tensor that claims any place, shape and stride."""

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any) -> None:
        self.arguments = (storage, offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, Storage) else None


def pickled(content: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(content)
    return stream.getvalue()


TEN = struct.pack("<10f", *range(10))

CLAIMS: dict[str, tuple[Any, str]] = {
    "more numbers than the record has": (Claimed(Storage(11), 0, (11,), (1,)), "it holds no 44 bytes of 'data/0'"),
    "a storage of any size": (Claimed(Storage(2**61), 0, (1,), (1,)), "it holds no 9223372036854775808 bytes of"),
    "a negative storage": (Claimed(Storage(-1), 0, (1,), (1,)), "is damaged"),
    "a record that is not there": (Claimed(Storage(10, "../7"), 0, (10,), (1,)), "bytes of 'data/../7'"),
    "a shape beyond the storage": (
        Claimed(Storage(10), 0, (11,), (1,)),
        "'model.w' of shape [11] reaches beyond its 40 bytes",
    ),
    "an offset beyond the storage": (Claimed(Storage(10), 5, (6,), (1,)), "reaches beyond its 40 bytes"),
    "a stride beyond the storage": (Claimed(Storage(10), 0, (2, 2), (9, 1)), "reaches beyond its 40 bytes"),
    "a giant stride": (Claimed(Storage(10), 0, (2,), (2**62 - 1,)), "reaches beyond its 40 bytes"),
    "a stride of zero": (
        Claimed(Storage(10), 0, (10**9, 10), (0, 1)),
        "its tensors claim more memory than the file has, up to 'model.w' of shape [1000000000, 10] in 40 bytes",
    ),
    "strides that overlap": (Claimed(Storage(10), 0, (2,) * 40, (0,) * 40), "claim more memory than the file has"),
    "a negative size": (Claimed(Storage(10), 0, (-1,), (1,)), "the shape of 'model.w' is no shape of a tensor"),
    "a negative stride": (Claimed(Storage(10), 9, (10,), (-1,)), "is no shape of a tensor"),
    "a size of a million digits": (Claimed(Storage(10), 0, (1 << 3_000_000,), (1,)), "is no shape of a tensor"),
    "fractions as sizes": (Claimed(Storage(10), 0, (2.5,), (1,)), "is no shape of a tensor"),
    "fewer strides than sizes": (Claimed(Storage(10), 0, (2, 2), (1,)), "is no shape of a tensor"),
    "a tensor of no storage": (Claimed("bytes", 0, (2,), (1,)), "is no shape of a tensor"),
    "one storage in two sizes": (
        [Claimed(Storage(10), 0, (10,), (1,)), Claimed(Storage(5), 0, (5,), (1,))],
        "a storage of 40 and of 20 bytes",
    ),
    "a storage alone": (Storage(10), "neither a tensor nor a plain value"),
    "an id of something else": (Storage(10, "0", str), "loading it would run"),
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_tensors_that_claim_what_the_file_does_not_hold(kind: str, tmp_path: Path) -> None:
    claim, expected = CLAIMS[kind]
    path = torch_file(tmp_path / "w.pt", pickled({"model": {"w": claim}}), **{"data/0": TEN})
    assert expected in refusal(path)
    assert damage(path) is not None


def test_one_storage_under_many_names(tmp_path: Path) -> None:
    """Two are usual, as of tied weights; each copy of a hundred would have the size of the file."""
    storage = Storage(MEGABYTE)
    for number, is_read in ((3, True), (100, False)):
        content = {f"w{i}": Claimed(storage, 0, (MEGABYTE,), (1,)) for i in range(number)}
        path = torch_file(tmp_path / "w.pt", pickled(content), **{"data/0": bytes(4 * MEGABYTE)})
        if is_read:
            assert len(read_checkpoint(path)) == number
        else:
            assert "its tensors claim more memory than the file has" in refusal(path)


def test_tensors_that_the_file_does_hold(tmp_path: Path) -> None:
    storage = Storage(10)
    content = {
        "all": Claimed(storage, 0, (2, 5), (5, 1)),
        "transposed": Claimed(storage, 0, (5, 2), (1, 5)),
        "expanded": Claimed(storage, 3, (4,), (0,)),
        "empty": Claimed(storage, 0, (0, 7), (7, 1)),
        "scalar": Claimed(storage, 9, (), ()),
    }
    read = read_checkpoint(torch_file(tmp_path / "w.pt", pickled(content), **{"data/0": TEN}))
    whole = torch.arange(10.0)
    expected = {"all": whole.reshape(2, 5), "transposed": whole.reshape(2, 5).t(), "expanded": torch.full((4,), 3.0)}
    expected |= {"empty": torch.zeros(0, 7), "scalar": torch.tensor(9.0)}
    assert {name: torch.equal(read[name], value) for name, value in expected.items()} == dict.fromkeys(expected, True)
    assert read["all"].untyped_storage().data_ptr() == read["transposed"].untyped_storage().data_ptr()


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "a sparse tensor"),
    "meta": (lambda: torch.empty(3, device="meta"), "a tensor without data (on the device meta)"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantized tensor"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_tensors_of_other_kinds_are_named(kind: str, tmp_path: Path) -> None:
    make, expected = OTHERS[kind]
    torch.save({"model": {"conv1.weight": make()}}, tmp_path / "w.pt")
    assert f"'model.conv1.weight' is {expected}; weights must be dense tensors" in refusal(tmp_path / "w.pt")


def test_an_archive_that_inflates(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(25 * MEGABYTE)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as source, zipfile.ZipFile(tmp_path / "w.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "w.pt").stat().st_size < MEGABYTE
    assert "is compressed, which torch.save never does" in refusal(tmp_path / "w.pt")


def test_an_archive_whose_records_share_their_bytes(tmp_path: Path) -> None:
    """One record of a megabyte, named ten times in the archive's directory."""
    path = torch_file(tmp_path / "w.pt", pickled({}), **{"data/0": bytes(MEGABYTE)})
    with zipfile.ZipFile(path, "a") as archive:
        (record,) = (info for info in archive.infolist() if info.filename.endswith("data/0"))
        for index in range(1, 10):
            other = copy(record)
            other.filename = f"archive/data/{index}"
            archive.filelist.append(other)
        archive.comment = b"changed"  # so that the directory is written again
    assert "its records share their names or their bytes" in refusal(path)


def test_an_archive_with_two_pickles(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "w.pt", pickled({"a": 1}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickled({"a": 2}))
    assert "its records share their names or their bytes" in refusal(path)


def test_a_torchscript_program_is_refused_without_torchs_advice(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "model.pt"))
    assert refusal(tmp_path / "model.pt") == (
        "is a TorchScript program, which holds code: save torch.jit.load(FILE).state_dict() with torch.save, and give "
        "that file"
    )


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("a.jpg", b"")
    assert refusal(tmp_path / "photos.pt") == "is a zip archive, but not one of torch.save: it has no data.pkl"


def test_a_flipped_bit_is_found_wherever_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<3f", 500, 501, 502))] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch itself does not notice
    assert "is damaged: the checksum of data/0 is wrong" in refusal(path)


# ---- safetensors


def safetensors_file(path: Path, header: bytes, content: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + content)
    return path


def one_tensor(**values: Any) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]} | values}).encode()


HEADERS: dict[str, tuple[bytes, int | None]] = {
    "very deep": (b'{"w":' + b"[" * 1_000_000, None),
    "longer than the file": (b"{}", 2**62),
    "as long as a number can be": (b"{}", 2**64 - 1),
    "a shape of any size": (one_tensor(shape=[2**62, 2**62]), None),
    "a negative size": (one_tensor(shape=[-10]), None),
    "offsets beyond the file": (one_tensor(shape=[10**9], data_offsets=[0, 4 * 10**9]), None),
    "offsets in the wrong order": (one_tensor(data_offsets=[40, 0]), None),
    "two tensors in one place": (
        b'{"a":{"dtype":"F32","shape":[10],"data_offsets":[0,40]},"b":{"dtype":"F32","shape":[10],"data_offsets":[0,40]}}',
        None,
    ),
    "facts nested in themselves": (
        json.dumps({"__metadata__": {"resdet_facts": "[" * 100_000}} | json.loads(one_tensor())).encode(),
        None,
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_safetensors(kind: str, tmp_path: Path) -> None:
    header, length = HEADERS[kind]
    path = safetensors_file(tmp_path / "w.safetensors", header, TEN, length)
    assert "is damaged, cut short or not a safetensors file" in refusal(path)


def test_a_description_nested_in_itself_is_none(tmp_path: Path) -> None:
    metadata = {"format": "resdet-backbone-1", "backbone": "[" * 100_000}
    header = json.dumps({"__metadata__": metadata} | json.loads(one_tensor())).encode()
    path = safetensors_file(tmp_path / "w.safetensors", header, TEN)
    with pytest.raises(WeightsError, match="holds no ResNet"):
        read_weights(path)
