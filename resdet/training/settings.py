"""What the training loop needs to know of a run, whatever is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from typing_extensions import Self

from resdet.config import OptimConfig, TrainConfig
from resdet.data.order import evenly_spread
from resdet.training.clock import OPEN_END
from resdet.types import Ints

logger = logging.getLogger(__name__)

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
    minutes: float | None = None  # the schedule follows the clock, to the most steps; None: their number is fixed
    is_rejudged: bool = False  # evaluations before resuming are not comparable with those to come
    evaluation_s: float = 0.0  # seconds that an evaluation is expected to take; only ``minutes`` needs it
    body_lr_factor: float = 1.0  # of the rate, for a detector's body
    plateau_patience: int | None = None  # for LearningRate, as is the next
    warmup_until_error: float | None = None
    on_log: Callback | None = None  # called after each line on losses
    on_evaluation: Callback | None = None  # called after each line on an evaluation

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; with ``minutes`` the most of them (``RunState.num_steps`` has them)."""
        return fixed_steps(self.train, self.num_images) or OPEN_END


class _Selectable(Protocol):
    def __len__(self) -> int: ...

    def select_images(self, indices: Ints) -> Self: ...


_Images = TypeVar("_Images", bound=_Selectable)


def evaluated_part(val_set: _Images, number: int | None) -> _Images:
    """Return ``number`` of the validation images, evenly spread; all of them if there are no more, or for None."""
    if number is None or number >= len(val_set):
        return val_set
    logger.info(
        "evaluations look at %d of the %d images of data.val, evenly spread (train.eval_images)", number, len(val_set)
    )
    return val_set.select_images(evenly_spread(len(val_set), number))


def seconds_beside_detection(num_images: int) -> float:
    """Return the seconds that an evaluation of so many images takes beside detecting in them, on 2 cores.

    They go to checkpoints, pictures and ``report.html``, and to the metrics of each image.
    """
    return 4.0 + 0.05 * num_images


def fixed_steps(train: TrainConfig, num_images: int) -> int:
    """Return the optimizer steps that ``train`` states, directly or by passes over ``num_images`` images, or 0."""
    return train.steps or math.ceil((train.epochs or 0) * num_images / train.batch_size)
