"""Signals: granted where nothing is half done, also while something hangs; a second one ends a run at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from small_runs import ROOT, command, differences, environment, train_here

from resdet.data.shapes import ShapesImages
from resdet.errors import Interrupted
from resdet.training import detection, interrupt
from resdet.training.interrupt import StopSignals
from resdet.training.loop import TrainResult

RUN = ("train.steps=6", "train.eval_every=4", "loader.num_workers=1", "resume=auto")


def run(folder: Path, *overrides: str) -> TrainResult:
    return train_here(folder, *RUN, *overrides)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "untouched"
    run(folder)
    return folder


def signal_after_a_step(number: int, folder: Path) -> None:
    """Send this process a signal when the first step has been logged, and the run waits for images."""

    def send() -> None:
        log = folder / "metrics.jsonl"
        while not (log.exists() and log.read_text()):
            time.sleep(0.05)
        time.sleep(1)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.fixture(autouse=True)
def _hangups_are_not_ignored() -> Iterator[None]:
    """As they are where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def stop_worker_after(num_images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each worker process stop itself for ever, as one that hangs in a file system does."""
    real, seen, trainer = ShapesImages.__call__, [0], os.getpid()

    def read(images: ShapesImages, index: int) -> npt.NDArray[np.uint8]:
        seen[0] += 1
        if os.getpid() != trainer and seen[0] > num_images:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(images, index)

    monkeypatch.setattr(ShapesImages, "__call__", read)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, id="TERM"),
        pytest.param(signal.SIGHUP, 129, id="HUP"),
        pytest.param(signal.SIGINT, 130, id="INT"),
    ],
)
@pytest.mark.slow
def test_a_signal_is_granted_while_a_worker_hangs(
    number: int, code: int, untouched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_worker_after(9, patched)
        signal_after_a_step(number, tmp_path)
        begun = time.monotonic()
        with pytest.raises(Interrupted, match=r"after step 1 of 6: .*last\.pt holds everything") as caught:
            run(tmp_path)
    assert caught.value.exit_code == code
    assert time.monotonic() - begun < 20
    assert multiprocessing.active_children() == [], "Python would wait for a stopped worker at its exit for ever"
    run(tmp_path)
    assert differences(untouched / "last.pt", tmp_path / "last.pt") == []


def test_a_signal_is_granted_in_an_evaluation(untouched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(detection, "evaluate", evaluate)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM after step 4 of 6: .*last\.pt holds everything"):
            run(tmp_path)
    run(tmp_path)
    assert differences(untouched / "last.pt", tmp_path / "last.pt") == []
    assert (untouched / "metrics.jsonl").read_text().count("AP50") == (
        (tmp_path / "metrics.jsonl").read_text().count("AP50")
    )


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_ends_at_once(second: int) -> None:
    def twice() -> None:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == signal.SIGTERM
            os.kill(os.getpid(), second)
            time.sleep(60)

    name = signal.Signals(second).name
    with pytest.raises(Interrupted, match=f"ended at once by {name}: what was saved before") as caught:
        twice()
    assert caught.value.exit_code == 128 + second


def test_what_torchrun_passes_on_is_no_second_signal() -> None:
    with StopSignals(world_size=2) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert stop.received == signal.SIGTERM


@pytest.mark.parametrize("arrives", ["before", "within"])
def test_one_of_several_processes_ends_by_itself_where_it_hangs(arrives: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "ECHO_SECONDS", 0.5)
    monkeypatch.setattr(interrupt, "GRACE_SECONDS", 1)

    def hang() -> None:
        with StopSignals(world_size=2) as stop:
            if arrives == "before":
                os.kill(os.getpid(), signal.SIGTERM)
            with stop.at_once():
                if arrives == "within":
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)  # no hang: the processes stop together, later
            with stop.at_once():
                time.sleep(60)

    begun = time.monotonic()
    with pytest.raises(Interrupted, match="ended at once by SIGTERM: what was saved before is whole") as caught:
        hang()
    assert caught.value.exit_code == 143
    assert 1 < time.monotonic() - begun < 10


def test_nohup_still_ignores_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_handlers_are_there_around_the_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stalls, or a dataset that takes long to read, is interrupted as any program is."""
    seen: dict[str, Any] = {}

    def noting(name: str) -> Any:
        real = getattr(detection, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            seen[name] = signal.getsignal(signal.SIGTERM)
            return real(*arguments, **options)

        return noted

    for name in ("build_train_set", "build_model", "evaluate"):
        monkeypatch.setattr(detection, name, noting(name))
    before = signal.getsignal(signal.SIGTERM)
    run(tmp_path, "train.steps=1")
    assert seen["build_train_set"] == seen["build_model"] == before == signal.getsignal(signal.SIGTERM)
    assert seen["evaluate"] != before


@pytest.mark.slow
@pytest.mark.parametrize("num_signals", [1, 2])
def test_ctrl_c_with_workers(num_signals: int, tmp_path: Path) -> None:
    """It reaches the whole process group; once or twice, the run ends with its code and no traceback."""
    process = subprocess.Popen(
        command(tmp_path, "train.steps=5000", "train.save_every=1", "loader.num_workers=2"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(num_signals):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.01)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert "by SIGINT" in told.splitlines()[-1]


@pytest.mark.slow
def test_stop_and_continue_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, "train.steps=8", "train.save_every=1", "loader.num_workers=1"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=sys.stderr,
        text=True,
    )
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    process.send_signal(signal.SIGCONT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
