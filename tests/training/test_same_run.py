"""The same images and the same updates, however a step is cut up and however often the run is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import ROOT, command, differences, environment, logged, train, train_here

# Float32 sums in another order, a relative error of 1e-7, until one of them changes which proposal survives
# non-maximum suppression; a small learning rate keeps that away for ten steps. The twin below differs by far more.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-6
TEN_STEPS = ("train.steps=10", "optim.name=sgd", "optim.lr=0.0002", "optim.warmup_steps=0", "optim.schedule=constant")


def weights(folder: Path) -> torch.Tensor:
    model = torch.load(folder / "last.pt", weights_only=True)["model"]
    return torch.cat([value.flatten() for value in model.values() if value.is_floating_point()])


def assert_same_run(one: Path, other: Path) -> None:
    np.testing.assert_allclose(logged(one, "loss"), logged(other, "loss"), rtol=LOSS_TOLERANCE)
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.fixture(scope="module")
def batch_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    train_here(folder, *TEN_STEPS)
    return folder


@pytest.mark.slow
def test_accumulation_is_the_same_run(batch_of_four: Path, tmp_path: Path) -> None:
    train_here(tmp_path / "two", *TEN_STEPS, "train.accumulate=2")
    assert_same_run(batch_of_four, tmp_path / "two")


@pytest.mark.slow
def test_two_processes_are_the_same_run(batch_of_four: Path, tmp_path: Path) -> None:
    train(tmp_path / "two", *TEN_STEPS, num_processes=2)
    assert_same_run(batch_of_four, tmp_path / "two")


def test_another_seed_is_another_run(batch_of_four: Path, tmp_path: Path) -> None:
    """What must fail where the others pass."""
    train_here(tmp_path / "other", *TEN_STEPS, "train.accumulate=2", "seed=1")
    with pytest.raises(AssertionError):
        assert_same_run(batch_of_four, tmp_path / "other")


KILLED_RUN = (
    "train.steps=12",
    "train.eval_every=4",
    "train.save_every=1",
    "train.log_every=5",
    "train.ema_decay=0.9",
    "loader.num_workers=1",
)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    train(folder, *KILLED_RUN, "resume=auto")
    return folder


def assert_equal_runs(one: Path, other: Path) -> None:
    assert differences(one / "last.pt", other / "last.pt") == []
    assert differences(one / "best.pt", other / "best.pt") == []
    keys = ("loss", "grad_norm", "loss_classifier", "AP", "AR_100")
    assert [logged(one, key) for key in keys] == [logged(other, key) for key in keys]


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_bit_equal(
    untouched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at random moments, in steps, in evaluations, while a checkpoint is written; RESDET_KILLS says how many.

    A run is killed again and again until it happens to finish; then another begins.
    """
    wanted = int(os.environ.get("RESDET_KILLS", "6"))
    generator = np.random.default_rng(0)
    num_kills = num_runs = 0
    where: list[str] = []
    while num_kills < wanted:
        folder = tmp_path / f"run_{num_runs}"
        num_runs += 1
        while True:
            process = subprocess.Popen(
                command(folder, *KILLED_RUN, "resume=auto"),
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            assert process.stderr is not None
            if num_kills < wanted:
                # Counted from the first sign of training: starting up takes longer than all the steps together.
                for line in process.stderr:
                    if "learning rate" in line:
                        break
                time.sleep(generator.uniform(0, 4))
            else:
                process.stderr.read()
            if process.poll() is None and num_kills < wanted:
                process.send_signal(signal.SIGKILL)
                num_kills += 1
                where.append("".join(sorted(path.name[:1] for path in folder.glob(".*.pt"))) or "-")
            process.stderr.close()
            code = process.wait()
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                break
        assert_equal_runs(untouched, folder)
    num_writing = sum(place != "-" for place in where)
    with capsys.disabled():
        sys.stdout.write(f"\n{num_kills} SIGKILLs in {num_runs} runs, {num_writing} of them while a file was written\n")


@pytest.mark.slow
def test_a_signal_leaves_a_checkpoint_and_a_clear_line(untouched: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder, *KILLED_RUN, "resume=auto"), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not (folder / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "stopped by SIGTERM after step " in told.splitlines()[-1]
    assert "resume=auto continues the run" in told
    assert "Traceback" not in told
    train(folder, *KILLED_RUN, "resume=auto")
    assert_equal_runs(untouched, folder)
    train(tmp_path / "other", *KILLED_RUN, "seed=1")
    with pytest.raises(AssertionError):
        assert_equal_runs(untouched, tmp_path / "other")


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    settings = ("train.steps=2", "train.eval_every=1", "resume=auto")
    assert train_here(tmp_path, *settings).steps == 2
    before = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(before.splitlines()[-1])["step"] == 2
    assert train_here(tmp_path, *settings).steps == 2
    assert (tmp_path / "metrics.jsonl").read_text() == before
