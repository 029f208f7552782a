"""What the training loop needs to know of a run, whatever is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resdet.config import OptimConfig, TrainConfig

Callback = Callable[[dict[str, Any]], object]
"""Takes a line of metrics.jsonl, in the main process; what it returns is ignored, and what it raises ends the run."""


@dataclass(frozen=True)
class RunSettings:
    """The part of a run's configuration that is not about its model and data."""

    config: dict[str, Any]  # all of it as plain values, for config.yaml and the checkpoints
    output_dir: Path
    resume_from: Path | None  # None starts anew
    seed: int
    train: TrainConfig
    optim: OptimConfig
    best_metric: str  # its highest value makes an evaluation the best
    num_images: int  # an epoch
    num_val_images: int
    is_rejudged: bool = False  # evaluations before resuming are not comparable with those to come
    plateau_patience: int | None = None  # for LearningRate, as is the next
    warmup_until_error: float | None = None
    on_log: Callback | None = None  # called after each line on losses
    on_evaluation: Callback | None = None  # called after each line on an evaluation

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train.steps or math.ceil((self.train.epochs or 0) * self.num_images / self.train.batch_size)
