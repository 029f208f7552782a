"""metrics.jsonl of a run that is resumed after an interruption."""

import json
from pathlib import Path

import pytest
import torch

from resdet.training.runlog import RunLog, memory_in_use

VALUES = {"loss": 1.0, "lr": 0.1, "images_per_s": 3.0}


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_steps_that_will_happen_again_are_dropped(tmp_path: Path) -> None:
    with RunLog(tmp_path, num_steps=4, start_step=0, enabled=True) as log:
        for step in (1, 2, 3):
            log.losses(step, VALUES)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    with RunLog(tmp_path, num_steps=4, start_step=2, enabled=True) as log:
        log.losses(3, {**VALUES, "loss": 2.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_an_evaluation_that_will_happen_again_is_dropped(tmp_path: Path) -> None:
    """Killed after an evaluation was logged and before it was in a checkpoint."""
    metrics = {"AP": 0.5, "AP50": 0.5, "AP75": 0.5}
    with RunLog(tmp_path, num_steps=4, start_step=0, enabled=True) as log:
        for step in (2, 4):
            log.losses(step, VALUES)
            log.evaluation(step, metrics, shown=("AP", "AP50", "AP75"))
    with RunLog(tmp_path, num_steps=4, start_step=4, evaluated=2, enabled=True) as log:
        log.evaluation(4, metrics, shown=("AP", "AP50", "AP75"))
    assert [(line["step"], "AP" in line) for line in lines(tmp_path)] == [(2, False), (2, True), (4, False), (4, True)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", num_steps=1, start_step=0, enabled=False) as log:
        log.losses(1, VALUES)
        log.advance(1)
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, num_steps=2, start_step=0, enabled=True) as log:
        log.losses(1, VALUES)
        log.evaluation(2, {"AP": 0.25, "AP50": 0.5, "AP75": 0.2}, shown=("AP", "AP50", "AP75"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/AP")] == [(2, 0.25)]
    assert "train/loss" in events.Tags()["scalars"]


def test_a_gpu_that_tells_no_load_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        """NVML's errors derive from nothing more specific."""

    def not_supported(device: torch.device) -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "utilization", not_supported)
    values = memory_in_use(torch.device("cuda", 0))
    assert values["gpu_memory_mb"] == 3
    assert "gpu_use" not in values
