"""What a run asks of a GPU outside the detector: a wait in a step, one in a batch of an evaluation, few kernels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from benchmarks.pretend_gpu import DEVICE, pretend_gpu
from small_runs import ROOT, SMALL

from resdet import processes
from resdet.config import load_config
from resdet.training import detection

OUTSIDE = ("resdet/training/", "resdet/evaluation/", "resdet/data/")


def outside(lines: Counter[str]) -> Counter[str]:
    """Return the counts of the modules that are not the detector's, by their names."""
    counts: Counter[str] = Counter()
    for line, number in lines.items():
        if line.startswith(OUTSIDE):
            counts[line.partition(":")[0]] += number
    return counts


def test_a_step_and_a_batch_wait_once_outside_the_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three lines of the log the second is counted: two steps, and what the line itself takes."""
    monkeypatch.setattr(processes, "choose_device", lambda *_: DEVICE)
    waits: list[Counter[str]] = []
    kernels: list[Counter[str]] = []
    settings = ("train.steps=6", "train.log_every=2", "train.ema_decay=0.9", "optim.clip_grad_norm=10")
    settings += ("loader.num_workers=0", "eval.batch_size=2", f"output_dir={tmp_path}")
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*SMALL, *settings])
    with pretend_gpu() as record:

        def count(_line: dict[str, Any]) -> None:
            waits.append(outside(Counter({line: number for (_, line), number in record.waits.items()})))
            kernels.append(outside(Counter(operator.line for operator in record.operators)))
            record.clear()

        detection.train(config, on_log=count, on_evaluation=count)
    steps, evaluation = waits[1], waits[3]
    assert steps == {"resdet/training/loop.py": 2 + 1}
    # The optimizer and the average launch a foreach operator or two for all 68 parameters, not one for each.
    assert sum(kernels[1].values()) <= 2 * 40, kernels[1]
    assert evaluation == {"resdet/evaluation/inference.py": 2}
