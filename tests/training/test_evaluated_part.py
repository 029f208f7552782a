"""Evaluations during training may look at a part of the validation images; those of a finished run take all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_runs import logged, train_here

from resdet.commands import eval as eval_command
from resdet.data.order import evenly_spread


def num_images(file: Path) -> int:
    """Return how many images an evaluation's numbers are of."""
    number: int = json.loads(file.read_text())["num_images"]
    return number


def test_a_part_is_evaluated_in_training_and_all_afterwards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "resdet")
    run = tmp_path / "run"
    train_here(run, "train.eval_images=2", "train.steps=2", "eval.loss=true")
    assert num_images(run / "metrics.json") == 2
    assert "evaluations look at 2 of the 4 images of data.val" in caplog.text
    eval_command.main([str(run), "--output", str(tmp_path / "all")])
    assert num_images(tmp_path / "all" / "metrics.json") == 4
    caplog.clear()
    train_here(run, "train.eval_images=9", "train.steps=4", "resume=auto")  # more than there are: all
    assert num_images(run / "metrics.json") == 4
    assert len(logged(run, "AP")) == 2
    assert "train.eval_images from 2 to 9" in caplog.text
    assert "evaluations look at" not in caplog.text


@pytest.mark.parametrize(("number", "expected"), [(1, [0]), (2, [0, 10]), (3, [0, 5, 10]), (40, list(range(11)))])
def test_a_part_is_spread_over_all(number: int, expected: list[int]) -> None:
    chosen = evenly_spread(11, number)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == expected
