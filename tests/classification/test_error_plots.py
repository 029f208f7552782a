"""Error curves from the logs of runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from resdet.classification.plots import main, plot_errors, read_curves, smoothed
from resdet.errors import UserError


def write_log(run: Path, scale: float) -> Path:
    run.mkdir()
    lines = [{"step": step, "loss": 1.0, "error": scale / step, "lr": 0.1} for step in range(1, 9)]
    lines += [{"step": step, "top1": 1 - 2 * scale / step, "top5": 1.0, "val_loss": 1.0} for step in (4, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_curves_are_what_was_logged(tmp_path: Path) -> None:
    curves = read_curves(write_log(tmp_path / "resnet20", 0.4))
    assert curves.name == "resnet20"
    assert curves.train_steps == list(range(1, 9))
    assert curves.train_errors[:2] == [0.4, 0.2]
    assert curves.test_steps == [4, 8]
    assert curves.test_errors == pytest.approx([0.2, 0.1])


def test_smoothing_averages_what_came_before() -> None:
    assert smoothed([4, 2, 0, 6], 2) == [4, 3, 1, 3]
    assert smoothed([4, 2], 1) == [4, 2]


def test_one_command_draws_several_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [write_log(tmp_path / f"run{n}", 0.1 * n) for n in (1, 2, 3)]
    picture = tmp_path / "errors.png"
    main([*map(str, runs), "--output", str(picture), "--window", "2", "--top", "50"])
    with Image.open(picture) as image:
        # Each run has a colour of its own (matplotlib's first three) somewhere.
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours
    assert (214, 39, 40) not in colours


def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: must be the log of a run of `resdet pretrain`"):
        read_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="holds no errors of classification"):
        read_curves(tmp_path)
    curves = read_curves(write_log(tmp_path / "run", 0.1))
    with pytest.raises(UserError, match="cannot be written"):
        plot_errors([curves], tmp_path / "errors.nonsense")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'resdet\[plots\]'"):
        plot_errors([curves], tmp_path / "errors.png")
