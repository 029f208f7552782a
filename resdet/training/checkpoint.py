"""Checkpoints: a detector that rebuilds itself, and beside it what a resumed run needs.

A file holds tensors and plain values only and loads with ``torch.load(weights_only=True)``. ``best.pt`` is a detector
alone; ``last.pt`` carries the training state too. Both open with ``resdet.load_detector``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resdet.errors import WeightsError
from resdet.files import written_whole
from resdet.models.detector import Detector, checkpoint_payload
from resdet.models.weights import read_checkpoint


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands after ``step`` optimizer steps.

    There is no random state in it: every random number of a run follows from its seed and the step.

    Attributes:
        step: Optimizer steps done.
        best_ap: Highest AP on the validation data so far; -1 before the first evaluation.
        optimizer: The optimizer's state dict.
        scaler: The loss scaler's state dict (fp16 only; else empty).
        config: The run's configuration as plain values.
    """

    step: int
    best_ap: float
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    config: dict[str, Any]


def save_checkpoint(path: Path, model: Detector, *, config: dict[str, Any], training: TrainingState | None) -> None:
    """Write a checkpoint so that the path holds the old file or the whole new one, whatever happens meanwhile.

    Args:
        path: Where.
        model: The detector.
        config: The run's configuration as plain values: tools/eval.py finds its data there.
        training: What a resumed run needs; None for a detector alone.
    """
    payload = checkpoint_payload(model)
    payload["config"] = config
    if training is not None:
        payload["training"] = {
            "step": training.step,
            "best_ap": training.best_ap,
            "optimizer": training.optimizer,
            "scaler": training.scaler,
        }
    with written_whole(path) as beside:
        torch.save(payload, beside)


def load_training_state(path: Path, model: Detector) -> TrainingState:
    """Load a run's ``last.pt``: its weights into ``model``, and give the rest.

    Raises:
        WeightsError: If the file is missing, damaged, holds no training state, or was made by another model.
    """
    payload = read_checkpoint(path)
    if "training" not in payload:
        raise WeightsError(f"{path}: holds no training state to resume from (best.pt has none; use last.pt)")
    try:
        model.load_state_dict(payload["model"])
    except RuntimeError as error:
        raise WeightsError(f"{path}: made by another model than the configuration's: {_first_line(error)}") from None
    training = payload["training"]
    return TrainingState(
        int(training["step"]),
        float(training["best_ap"]),
        training["optimizer"],
        training["scaler"],
        payload["config"],
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]
