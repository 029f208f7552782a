"""A run's folder that is not as a run left it, and a disk that fails: one line, and what was written is whole."""

from __future__ import annotations

import errno
import json
import os
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import ROOT, command, differences, logged, train_here

from resdet.commands.run import run_tool
from resdet.commands.train import main
from resdet.errors import UserError
from resdet.evaluation.report_runs import read_log
from resdet.training import checkpoint, detection, loop
from resdet.training.folder import claimed
from resdet.training.loop import TrainResult
from resdet.training.runlog import RunLog

RUN = ("train.steps=2", "train.save_every=1", "loader.num_workers=0", "resume=auto")


def run(folder: Path, *overrides: str) -> TrainResult:
    return train_here(folder, *RUN, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(folder)
    return folder


# What a killed run left --------------------------------------------------------------------------------------------


def test_what_killed_writes_left_is_removed_by_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    names = [f".{uuid.uuid4().hex}{end}" for end in (".last.pt", ".tmp.pt", ".tmp.jsonl", ".tmp.html")]
    left = [tmp_path / name for name in names] + [tmp_path / "pictures" / f".{uuid.uuid4().hex}.tmp.png"]
    own = [tmp_path / ".hidden.pt", tmp_path / ".0123abc.last.pt", tmp_path / "notes.txt"]
    for path in (*left, *own):
        path.write_bytes(b"x")
    with claimed(tmp_path):
        assert [path for path in left if path.exists()] == []
        assert [path for path in own if not path.exists()] == []


def test_another_run_s_half_written_files_are_left_alone(tmp_path: Path) -> None:
    """Whoever does not hold the folder removes nothing."""
    being_written = tmp_path / f".{uuid.uuid4().hex}.tmp.pt"
    with claimed(tmp_path):
        being_written.write_bytes(b"x")
        child = os.fork()
        if child == 0:  # a POSIX lock is not inherited
            try:
                with claimed(tmp_path):
                    os._exit(0)
            except UserError:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        assert being_written.exists()


# Entries of the wrong kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".lock", "config.yaml", "metrics.jsonl", "last.pt", "previous.pt", "best.pt"])
def test_a_folder_in_a_file_s_place_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError) as caught, claimed(tmp_path):
        pass
    assert str(caught.value) == f"{tmp_path / name}: must be a file of the run, but a folder has this name"


@pytest.mark.parametrize("name", ["tensorboard", "pictures"])
def test_a_file_in_a_folder_s_place_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(UserError) as caught, claimed(tmp_path):
        pass
    assert str(caught.value) == f"{tmp_path / name}: must be a folder of the run, but a file has this name"


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("file", "the output must be a folder, but a file has this name or a parent's"),
        ("file/below", "the output must be a folder, but a file has this name or a parent's"),
        ("x" * 5000, "cannot be created: File name too long"),
    ],
)
def test_an_output_dir_that_cannot_be_is_told_before_the_data_is_read(
    place: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(detection, "build_train_set", None)
    with pytest.raises(UserError) as caught:
        run(tmp_path / place)
    assert str(caught.value) == f"{tmp_path / place}: {told}"


# metrics.jsonl ------------------------------------------------------------------------------------------------------

DAMAGED = {
    "NULs after a power loss": b"\0" * 40 + b"\n",
    "bad UTF-8": b'{"step": 1, "lr": "\xff\xfe"}\n',
    "no step": b'{"lr": 0.5, "loss": 1.0}\n',
    "a step that is text": b'{"step": "1", "lr": 0.5}\n',
    "a step without end": b'{"step": 1e999, "lr": 0.5}\n',
    "a list": b"[1, 2]\n",
    "nested without end": b"[" * 100_000 + b"\n",
    "cut off and gone on": b'{"step": 1, "l\n',
    "an empty line": b"\n",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_lines_of_a_log_are_dropped_and_named_when_a_run_goes_on(
    line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sound = [b'{"step": 1, "lr": 0.1, "loss": 3.0}\n', b'{"step": 2, "lr": 0.1, "loss": 2.0}\n']
    (tmp_path / "metrics.jsonl").write_bytes(sound[0] + line + sound[1] + b'{"step": 3, "lr": 0.1}\n{"step": 4, "l')
    with RunLog(tmp_path, num_steps=4, start_step=2, enabled=True):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(sound)
    path = tmp_path / "metrics.jsonl"
    assert f"{path}: dropped damaged lines (no JSON object with a step): 2" in caplog.text


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_report_leaves_damaged_lines_out(line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "lr": 0.1}\n' + line + b'{"step": 2, "lr": 0.1}\n')
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]
    assert caplog.messages == [f"{path}: left out of the curves, as damaged: line 2"]


# A disk that is full ------------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFrom:
    """A function that fails for want of room from its n-th call on."""

    def __init__(self, real: Any, calls: int) -> None:
        self.real, self.left = real, calls

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        return full() if self.left < 0 else self.real(*arguments, **options)


def fill_disk(place: str, patched: pytest.MonkeyPatch) -> None:
    """Let writing at one place of a run fail."""
    from tensorboard.summary.writer import record_writer

    if place == "config.yaml":
        patched.setattr(loop, "write_text", full)
    elif place == "metrics.jsonl":
        real = Path.open
        patched.setattr(
            Path, "open", lambda path, mode="r", **options: full() if mode == "a" else real(path, mode, **options)
        )
    elif place == "tensorboard":
        write = FullFrom(record_writer.RecordWriter.write, 4)
        patched.setattr(record_writer.RecordWriter, "write", lambda writer, data: write(writer, data))
    elif place == "tensorboard from the start":
        patched.setattr(record_writer.RecordWriter, "write", full)
    elif place == "tensorboard at the end":
        patched.setattr(record_writer.RecordWriter, "close", full)
    elif place == "last.pt":
        patched.setattr(checkpoint, "save_tensors", FullFrom(checkpoint.save_tensors, 1))
    elif place == "pictures":
        patched.setattr(Image.Image, "save", full)
    else:
        patched.setattr(detection, "write_run_report", full)


@pytest.mark.parametrize(
    "place",
    [
        "config.yaml",
        pytest.param("metrics.jsonl", marks=pytest.mark.slow),
        pytest.param("tensorboard from the start", marks=pytest.mark.slow),
        "tensorboard",
        pytest.param("tensorboard at the end", marks=pytest.mark.slow),
        "last.pt",
        pytest.param("pictures", marks=pytest.mark.slow),
        pytest.param("report.html", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_later(
    place: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures = ("eval.num_pictures=1",) if place == "pictures" else ()
    excepthook = threading.excepthook
    with monkeypatch.context() as patched:
        fill_disk(place, patched)
        patched.setattr("sys.argv", ["train.py", *command(tmp_path, *RUN, *pictures)[2:]])
        patched.chdir(ROOT)
        with pytest.raises(SystemExit) as caught:
            run_tool(main)
    told = capfd.readouterr().err
    assert caught.value.code == 2
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert "No space left on device): the run stops here; what was written before is whole, and resume=auto" in last
    assert threading.excepthook == excepthook
    run(tmp_path, *pictures)
    if not pictures:
        assert differences(finished / "last.pt", tmp_path / "last.pt") == []
    assert logged(tmp_path, "loss") == logged(finished, "loss")
    assert [path.name for path in tmp_path.rglob(".*") if path.name != ".lock"] == []


def test_lines_are_json(finished: Path) -> None:
    assert [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()] == [1, 2, 2]
