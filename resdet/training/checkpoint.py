"""Checkpoints: a model that rebuilds itself, and beside it what a resumed run needs.

A file holds tensors and plain values only and loads with ``torch.load(weights_only=True)``. ``best.pt`` is a model
alone; ``last.pt`` carries the training state too, and ``previous.pt`` is the ``last.pt`` before it. All of them open
with ``resdet.load_detector``, or ``resdet.classification.model.load_classifier``.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resdet.errors import WeightsError
from resdet.files import save_tensors, written_whole
from resdet.models.checkpoint import checkpoint_payload
from resdet.models.detector import Detector
from resdet.models.loading import load_strictly
from resdet.weights.files import read_weights

logger = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"

Payload = Callable[[Any], dict[str, Any]]
"""Gives a model as plain values and tensors, its state dict under ``model``: ``checkpoint_payload`` for a detector."""


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands after ``step`` optimizer steps.

    There is no random state in it: every random number of a run follows from its seed and the step.

    Attributes:
        step: Optimizer steps done.
        best: Value of the best evaluation so far (its ``eval.best_metric``); None before the first.
        num_worse: Evaluations since then.
        evaluated: Step of the last evaluation; None before the first.
        metrics: That evaluation's numbers.
        log_sums: What has been added up since the last line of metrics.jsonl, by name, scalars.
        log_steps: Steps added up there.
        optimizer: The optimizer's state dict.
        scaler: The loss scaler's state dict (fp16 only; else empty).
        ema: The averaged model's state dict; empty without one.
        schedule: Where a learning rate stands that follows the run's own numbers; empty if it follows the step alone.
    """

    step: int
    best: float | None
    num_worse: int
    evaluated: int | None
    metrics: dict[str, float]
    log_sums: dict[str, Tensor]
    log_steps: int
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    ema: dict[str, Any]
    schedule: dict[str, int] = field(default_factory=dict)

    @classmethod
    def begin(cls) -> TrainingState:
        """Give the state of a run that has done nothing yet."""
        return cls(0, None, 0, None, {}, {}, 0, {}, {}, {})


def save_checkpoint(
    path: Path,
    model: nn.Module,
    *,
    config: dict[str, Any],
    training: TrainingState | None,
    payload_of: Payload = checkpoint_payload,
) -> None:
    """Write a checkpoint so that the path holds the old file or the whole new one, whatever happens meanwhile.

    Args:
        path: Where.
        model: A detector, or whatever ``payload_of`` takes.
        config: The run's configuration as plain values: tools/eval.py finds its data there.
        training: What a resumed run needs; None for a model alone.
        payload_of: What is written of the model.

    Raises:
        OSError: If it cannot be written (a full disk); the old file is as it was.
    """
    payload = payload_of(model)
    payload["config"] = config
    if training is not None:
        # asdict would copy every tensor of the optimizer.
        payload["training"] = {part.name: getattr(training, part.name) for part in fields(training)}
    with written_whole(path) as beside:
        save_tensors(payload, beside)


def save_last(
    folder: Path,
    model: nn.Module,
    *,
    config: dict[str, Any],
    training: TrainingState,
    payload_of: Payload = checkpoint_payload,
) -> None:
    """Write a run's ``last.pt``; what was there becomes ``previous.pt``, and what was that goes.

    At every instant at least one of the two is whole.

    Raises:
        OSError: As ``save_checkpoint``.
    """
    last = folder / LAST
    if last.exists() and damage(last) is None:
        # A second name for the same bytes, so that last.pt never misses: only the replacement below changes it.
        with written_whole(folder / PREVIOUS) as older:
            os.link(last, older)
    save_checkpoint(last, model, config=config, training=training, payload_of=payload_of)


def load_training_state(path: Path, model: nn.Module) -> TrainingState:
    """Load a run's ``last.pt``: its weights into ``model``, and give the rest.

    Raises:
        WeightsError: If the file is missing, damaged, holds no training state, or was made by another model.
    """
    file = read_weights(path)
    if "training" not in file.content:
        raise WeightsError(f"{path}: holds no training state to resume from (best.pt has none; use last.pt)")
    load_strictly(model, file, what="the configuration's model")
    if isinstance(model, Detector):
        model.score_threshold = file.score_threshold
    try:
        return TrainingState(**file.content["training"])
    except TypeError as error:
        raise WeightsError(f"{path}: its training state is another version's: {error}") from None


def newest_whole(folder: Path) -> Path | None:
    """Give the run's newest checkpoint that is whole, or None if it has none at all.

    Every tensor in the file has a checksum, and all are compared: a file cut short or with one flipped bit is passed
    over for the one before it, and the log says so.

    Raises:
        WeightsError: If there are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        problem = damage(path)
        if problem is None:
            if damaged:
                logger.warning("%s; going on from %s", "; ".join(damaged), path)
            return path
        damaged.append(f"{path} is damaged ({problem})")
    if damaged:
        raise WeightsError(f"{'; '.join(damaged)}: nothing to resume from; output_dir=... begins another run")
    return None


def damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint's bytes, or None if every checksum in it is right and torch can open it.

    ``torch.save`` writes a zip archive with a CRC-32 of every record. ``torch.load`` does not look at them, and the
    archive's own directory has none: both are tried.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong is None:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes raise whatever the first reader that meets them raises
        return f"not a whole file: {_first_line(error)}"
    return None if wrong is None else f"checksum of {wrong} is wrong"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if len(lines) > 1 else lines[0]
