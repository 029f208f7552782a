"""A long run holds no more at its end than in its first half."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import ROOT, command, environment, logged


@pytest.mark.slow
def test_memory_and_file_handles_stay_flat_over_2000_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resident memory and open files of the training process and its worker, in the second and in the last quarter."""
    num_steps = int(os.environ.get("RESDET_SOAK_STEPS", "2000"))
    overrides = (f"train.steps={num_steps}", "train.batch_size=2", "train.save_every=250", "train.eval_every=500")
    process = subprocess.Popen(
        command(tmp_path, *overrides, "loader.num_workers=1", "train.ema_decay=0.99", "model.min_size=64"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seen: list[tuple[int, float, int]] = []
    while process.poll() is None:
        time.sleep(0.5)
        metrics = tmp_path / "metrics.jsonl"
        if metrics.exists():
            step = sum(1 for _ in metrics.open())
            try:
                pids = [process.pid, *children(process.pid)]
                megabytes = sum(resident_pages(pid) for pid in pids) * os.sysconf("SC_PAGE_SIZE") / 2**20
                handles = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
            except OSError:
                continue  # a worker of an evaluation came or went meanwhile
            seen.append((step, megabytes, handles))
    assert process.returncode == 0
    assert len(logged(tmp_path, "loss")) == num_steps
    steps, memory, handles = (np.array(column) for column in zip(*seen, strict=True))
    quarters = [(steps > num_steps * q / 4) & (steps <= num_steps * (q + 1) / 4) for q in range(4)]
    second, last = (float(np.median(memory[quarters[q]])) for q in (1, 3))
    files = [int(np.median(handles[quarters[q]])) for q in (1, 3)]
    with capsys.disabled():
        sys.stdout.write(f"\n{num_steps} steps: {second:.0f} MB in the second quarter, {last:.0f} MB in the last; ")
        sys.stdout.write(f"{files[0]} and {files[1]} open files\n")
    assert last <= 1.02 * second
    assert files[1] <= files[0]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def resident_pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
