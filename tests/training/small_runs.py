"""Short runs of a small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from resdet.config import load_config
from resdet.training import detection
from resdet.training.loop import TrainResult
from resdet.training.settings import Callback

ROOT = Path(__file__).resolve().parents[2]

# Group norm: batch statistics would make an image depend on its neighbours in the batch. Few boxes are sampled of each
# image, so that every image fills its samples, and the mean over a batch is the mean over its parts.
SMALL = (
    "data.train.num_images=24",
    "data.val.num_images=4",
    "data.train.image_size=64",
    "data.val.image_size=64",
    "model.norm=group",
    "model.min_size=[48, 64]",
    "model.max_size=64",
    "model.out_channels=32",
    "model.box_head_channels=32",
    "model.rpn_batch_size_per_image=32",
    "model.box_batch_size_per_image=16",
    "train.batch_size=4",
    "train.log_every=1",
    "eval.num_pictures=0",
    "eval.tricks={}",
    "plan=false",  # its measurements would take longer than the run
)


def command(output_dir: Path, *overrides: str, num_processes: int = 1, torchrun: tuple[str, ...] = ()) -> list[str]:
    """Give the command line of a small run."""
    start = [sys.executable]
    if num_processes > 1 or torchrun:
        start += [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(num_processes),
            *(torchrun or ["--standalone"]),
        ]
    config = ["configs/quickstart.yaml", *SMALL, f"output_dir={output_dir}", *overrides]
    return [*start, str(ROOT / "tools" / "train.py"), *config]


def environment() -> dict[str, str]:
    """Give the environment of a small run: one thread, as results are to be compared bit for bit."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def train(
    output_dir: Path, *overrides: str, num_processes: int = 1, torchrun: tuple[str, ...] = (), expected: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, and check the exit code."""
    done = subprocess.run(
        command(output_dir, *overrides, num_processes=num_processes, torchrun=torchrun),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=environment(),
        check=False,
    )
    assert done.returncode == expected, done.stderr
    return done


def train_here(output_dir: Path, *overrides: str, on_log: Callback | None = None) -> TrainResult:
    """Run it in this process, where parts can be replaced."""
    settings = [*SMALL, f"output_dir={output_dir}", *overrides]
    return detection.train(load_config(ROOT / "configs" / "quickstart.yaml", settings), on_log=on_log)


def logged(folder: Path, key: str) -> list[float]:
    """Give what a run logged under a name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """Flatten a checkpoint."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{name}.{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, value in enumerate(tree) for k, v in leaves(value, f"{name}.{i}").items()}
    return {name: tree}


def differences(one: Path, other: Path) -> list[str]:
    """Name everything in which two checkpoints differ, bit for bit, but for the folder they were written to."""
    first, second = (leaves(torch.load(path, weights_only=True)) for path in (one, other))
    assert len(first) > 100
    names = sorted(first.keys() | second.keys())
    different = []
    for name in names:
        a, b = first.get(name), second.get(name)
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        if not same and not name.startswith((".config.output_dir", ".config.resume")):
            different.append(name)
    return different
