"""Untrusted pickles: the files of model zoos are read; anything else is refused and never run."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import subprocess
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resdet.errors import WeightsError
from resdet.weights.arrays import read_pickle
from resdet.weights.files import read_checkpoint

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

# What Python 2 writes for {"conv1_w": array([1.5, -2], float32)} with protocol 2: strings for bytes, numpy's old paths.
PYTHON2 = (
    b"\x80\x02}q\x01U\x07conv1_wq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87"
    b"Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02f4K\x00K\x01\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff"
    b"\xffK\x00tb\x89U\x08\x00\x00\xc0\x3f\x00\x00\x00\xc0tbs."
)


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """Why a file is not read: one line that names it."""
    with pytest.raises(WeightsError) as caught:
        read_pickle(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def by_reduce(function: Any, *arguments: Any) -> Any:
    class Calls:
        def __reduce__(self) -> Any:
            return function, arguments

    return Calls()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_and_plain_values_come_back(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "float": np.arange(6, dtype="f4").reshape(2, 3),
        "half": np.arange(6, dtype="f2"),
        "big endian": np.arange(6, dtype=">f8"),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided": np.arange(12).reshape(3, 4)[:, ::2],
        "bool": np.array([True, False]),
        "bytes": np.arange(256, dtype="u1"),
        "scalar array": np.array(3.0),
        "empty": np.zeros((0, 4), "f4"),
    }
    plain = {
        "text": "Gr\u00fc\u00dfe",
        "bytes": b"\x00\xff",
        "no bytes": b"",
        "nested": [1, (2.5, None, True), {"a": [-(2**70)]}, {1, 2}],
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
    }
    numbers = {"f": np.float32(1.5), "i": np.int64(-7), "b": np.bool_(True)}
    path = written(tmp_path, pickle.dumps({"arrays": arrays, "plain": plain, "numbers": numbers}, protocol=protocol))
    content = read_pickle(path)
    assert content["plain"] == plain
    assert list(content["plain"]["ordered"]) == ["b", "a"]
    assert content["numbers"] == {"f": 1.5, "i": -7, "b": True}
    assert {type(value) for value in content["numbers"].values()} == {float, int, bool}
    for name, array in arrays.items():
        tensor = content["arrays"][name]
        assert isinstance(tensor, Tensor)
        assert tensor.shape == array.shape
        assert tensor.is_contiguous()
        assert np.array_equal(tensor.numpy(), array), name
    content["arrays"]["float"].add_(1)  # the tensor owns its memory


def test_python_2_and_both_of_numpys_paths(tmp_path: Path) -> None:
    for content in (PYTHON2, PYTHON2.replace(b"numpy.core", b"numpy._core")):
        read = read_pickle(written(tmp_path, content))
        assert torch.equal(read["conv1_w"], torch.tensor([1.5, -2.0]))
    other = read_pickle(written(tmp_path, PYTHON2.replace(b"\xc0\x3f", b"\x80\x3f")))
    assert not torch.equal(other["conv1_w"], read["conv1_w"])


def test_read_checkpoint_takes_pickles(tmp_path: Path) -> None:
    content = read_checkpoint(written(tmp_path, PYTHON2))
    assert list(content) == ["conv1_w"]
    by_bytes = read_checkpoint(written(tmp_path, pickle.dumps({b"conv1_w": np.zeros(3)})))
    assert list(by_bytes) == ["conv1_w"]
    with pytest.raises(WeightsError, match="must hold a dictionary of named tensors, got list"):
        read_checkpoint(written(tmp_path, pickle.dumps([1, 2])))
    torch.save({"a": torch.ones(2)}, tmp_path / "torch.pkl")
    assert torch.equal(read_checkpoint(tmp_path / "torch.pkl")["a"], torch.ones(2))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_runs(tmp_path: Path, protocol: int) -> None:
    victim = tmp_path / "victim"
    command = f"touch {victim}"
    attacks = {
        f"{os.system.__module__}.system": by_reduce(os.system, command),
        "subprocess.Popen": by_reduce(subprocess.Popen, ["touch", str(victim)]),
        "eval": by_reduce(eval, f"open({str(victim)!r}, 'w')"),
        "exec": by_reduce(exec, f"open({str(victim)!r}, 'w')"),
        "getattr": by_reduce(getattr, by_reduce(builtins.__import__, "os"), "system"),
        "__import__": by_reduce(builtins.__import__, "os"),
        "io.open": by_reduce(open, str(victim), "w"),
        "pathlib": victim,
        "numpy.fromfile": by_reduce(np.fromfile, "/etc/passwd"),
    }
    for name, attack in attacks.items():
        for content in (attack, {"model": {"weight": np.zeros(2), "bias": attack}}):
            message = refusal(written(tmp_path, pickle.dumps(content, protocol=protocol)))
            assert "loading it would run " in message
            assert name.split(".")[-1] in message
            assert "refused" in message
    assert not victim.exists()

    pickle.loads(pickle.dumps(attacks[f"{os.system.__module__}.system"], protocol=protocol))
    assert victim.exists()  # the attack is real


def test_nothing_runs_by_other_opcodes(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    touch = f"touch {victim}".encode()
    streams = {
        "os.system": b"(S'" + touch + b"'\nios\nsystem\n.",  # INST
        "posix.system": b"(cposix\nsystem\nS'" + touch + b"'\no.",  # OBJ
        "subprocess.Popen": b"\x80\x02csubprocess\nPopen\nS'" + touch + b"'\n\x85\x81.",  # NEWOBJ
        "builtins.eval.__call__": b"\x80\x04\x8c\x08builtins\x8c\x0deval.__call__\x93.",  # STACK_GLOBAL
        "numpy.dtype.__init__.__globals__": b"\x80\x04\x8c\x05numpy\x8c\x1bdtype.__init__.__globals__'\x93.",
        "PERSID": b"Pposix.system\n.",
        "BINPERSID": b"\x80\x02K\x01Q.",
        "EXT1": b"\x80\x02\x82\x01.",
    }
    for name, stream in streams.items():
        assert name.rstrip("_'") in refusal(written(tmp_path, stream))
    assert not victim.exists()


def test_what_is_allowed_cannot_be_bent(tmp_path: Path) -> None:
    # A state for a function, which the unpickler would set as its attributes; a dtype that makes pointers of bytes.
    state = b"\x80\x02ccollections\nOrderedDict\nN}U\x08__name__U\x04evils\x86b."
    assert "a state for a function" in refusal(written(tmp_path, state))
    new = b"\x80\x02ccollections\nOrderedDict\n)\x81."
    assert "type" in refusal(written(tmp_path, new))
    objects = written(tmp_path, pickle.dumps({"a": np.array([{}, "x"], dtype=object)}))
    assert "type 'O8'" in refusal(objects)
    records = written(tmp_path, pickle.dumps({"a": np.zeros(2, dtype=[("x", "f4")])}))
    assert "records" in refusal(records)
    forged = PYTHON2.replace(b"U\x02f4", b"U\x02O8")
    assert "type 'O8'" in refusal(written(tmp_path, forged))
    text = written(tmp_path, pickle.dumps({"a": np.array(["a", "b"])}))
    assert "only numbers are read" in refusal(text)


def test_an_array_must_be_as_large_as_its_bytes(tmp_path: Path) -> None:
    for shape in (b"K\x03\x85", b"K\x01\x85", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"J\xff\xff\xff\xff\x85"):
        assert "is damaged" in refusal(written(tmp_path, PYTHON2.replace(b"K\x01K\x02\x85c", b"K\x01" + shape + b"c")))


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    many = b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"."
    string = b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x."
    raw = b"\x00" * 400_000
    shared = pickle.dumps({f"a{i}": _shares(raw) for i in range(500)}, protocol=4)
    assert len(shared) < 2 * len(raw)
    tracemalloc.start()
    try:
        for stream in (many, string, shared, pickle.dumps(by_reduce(bytearray, 10**12))):
            assert "is damaged" in (message := refusal(written(tmp_path, stream))) or "more memory" in message
        assert tracemalloc.get_traced_memory()[1] < 20e6  # 500 arrays of 400 kB would be 200 MB
    finally:
        tracemalloc.stop()


class _shares:  # noqa: N801
    """Pickles as an array over bytes that the stream holds once."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def __reduce__(self) -> Any:
        from numpy._core.numeric import _frombuffer  # type: ignore[attr-defined]

        return _frombuffer, (self.raw, np.dtype("u1"), (len(self.raw),), "C")


def test_damaged_files(tmp_path: Path) -> None:
    for stream in (b"", b"no pickle", PYTHON2[:-1], PYTHON2[: len(PYTHON2) // 2], b"\x80\x02.", b"PK\x03\x04"):
        assert refusal(written(tmp_path, stream))
    itself: list[Any] = []
    itself.append(itself)
    assert "nested" in refusal(written(tmp_path, pickle.dumps(itself)))
    assert "nested" in refusal(written(tmp_path, b"\x80\x02" + b"(" * 0 + b"]" + b"]" * 50_000 + b"a" * 50_000 + b"."))
    with pytest.raises(FileNotFoundError):
        read_pickle(tmp_path / "absent.pkl")
    with pytest.raises(WeightsError, match=r"absent\.pkl: there is no such file"):
        read_checkpoint(tmp_path / "absent.pkl")
