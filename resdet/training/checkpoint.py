"""A run's checkpoints: a model that rebuilds itself and, in last.pt, what a resumed run needs.

A file holds tensors and plain values only and loads with ``torch.load(weights_only=True)``. ``best.pt`` is a model
alone; ``last.pt`` carries the training state too, and ``previous.pt`` is the ``last.pt`` before it. All of them open
with ``resdet.load_detector``, or ``resdet.classification.model.load_classifier``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from resdet.errors import TrainingError, WeightsError
from resdet.files import save_tensors, written_whole
from resdet.models.detector import Detector
from resdet.models.loading import load_strictly
from resdet.weights.files import WeightsPath, read_weights
from resdet.weights.torch_files import damage

logger = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


@contextmanager
def reported_disk_errors(path: Path, what: str | None = None) -> Iterator[Path]:
    """Yield a path to write to; a disk that fails is a TrainingError that says how to go on.

    The message calls the file ``what``, or by its path.
    """
    try:
        yield path
    except OSError as error:
        raise TrainingError(
            f"{what or path} cannot be written ({error.strerror or error}): the run stops here; what was written "
            "before is whole, and resume=auto continues from it once there is room"
        ) from error


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    with reported_disk_errors(path, "a checkpoint"), written_whole(path) as temporary:
        yield temporary


def save_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write a checkpoint so that the path holds the old file or the whole new one, whatever happens meanwhile."""
    with _written(path) as temporary:
        save_tensors(payload, temporary)


def save_last(folder: Path, payload: dict[str, Any]) -> None:
    """Write a run's ``last.pt``; the one before it becomes ``previous.pt`` and replaces the one before that.

    At every instant at least one of the two is whole.
    """
    last = folder / LAST
    if last.exists() and damage(last) is None:
        # A second name for the same bytes, so that last.pt is never missing: only save_checkpoint replaces it.
        with _written(folder / PREVIOUS) as older:
            os.link(last, older)
    save_checkpoint(last, payload)


def load_training_state(path: WeightsPath, model: nn.Module) -> dict[str, Any]:
    """Load the weights of a run's ``last.pt`` into ``model`` and return its training state (``RunState``)."""
    file = read_weights(path)
    if "training" not in file.content:
        raise WeightsError(f"{file.path}: holds no training state to resume from (best.pt has none; use last.pt)")
    load_strictly(model, file, what="the configuration's model")
    if isinstance(model, Detector):
        model.score_threshold = file.score_threshold
    return _checked_state(file.content["training"], file.path)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_mapping_of_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values())


def _is_mapping_of_scalars(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, Tensor) and v.dim() == 0 for v in value.values())


_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("step", "num_worse", "log_steps"), ("a whole number that is not negative", _is_count)),
    "evaluated": ("a whole number that is not negative, or None", lambda value: value is None or _is_count(value)),
    "best": ("a number, or None", lambda value: value is None or isinstance(value, int | float)),
    **dict.fromkeys(("metrics", "schedule"), ("a mapping of numbers", _is_mapping_of_numbers)),
    "log_sums": ("a mapping of single numbers in tensors", _is_mapping_of_scalars),
    **dict.fromkeys(("optimizer", "scaler", "ema"), ("a mapping", lambda value: isinstance(value, dict))),
}
"""What entries of a training state must be."""


def _checked_state(saved: Any, path: Path) -> dict[str, Any]:
    """Return a training state whose entries are of the right types; which of them it must have, the run knows."""
    if not isinstance(saved, dict):
        raise WeightsError(f"{path}: its training state must be a mapping, got {type(saved).__name__}")
    for name, value in saved.items():
        must_be, is_sound = _ENTRIES.get(name, ("anything", lambda _: True))
        if not is_sound(value):
            raise WeightsError(f"{path}: {name!r} of its training state must be {must_be}")
    return saved


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that is whole, or None if it has none at all.

    A file cut short or with one flipped bit is skipped in favour of the one before it, and the log says so. A
    WeightsError is raised if there are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        problem = damage(path)
        if problem is None:
            if damaged:
                logger.warning("%s; resuming from %s", "; ".join(damaged), path)
            return path
        damaged.append(f"{path} {problem}")
    if damaged:
        raise WeightsError(f"{'; '.join(damaged)}: nothing to resume from; output_dir=... begins another run")
    return None
