"""What the training loop needs to know of a run, whatever is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resdet.config import OptimConfig, TrainConfig


@dataclass(frozen=True)
class RunSettings:
    """The part of a run's configuration that is not about its model and data.

    Attributes:
        config: The whole configuration as plain values, for config.yaml and the checkpoints.
        output_dir: The run's folder.
        resume_from: The checkpoint to resume from; None starts anew.
        seed: Where all random numbers start.
        train: Length, batch, precision, intervals.
        optim: Optimizer and learning rate.
        best_metric: The metric whose highest value makes an evaluation the best.
        num_images: Training images: an epoch.
        plateau_patience: See ``LearningRate``; so is the next.
        warmup_until_error: See there.
    """

    config: dict[str, Any]
    output_dir: Path
    resume_from: Path | None
    seed: int
    train: TrainConfig
    optim: OptimConfig
    best_metric: str
    num_images: int
    plateau_patience: int | None = None
    warmup_until_error: float | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train.steps or math.ceil((self.train.epochs or 0) * self.num_images / self.train.batch_size)
