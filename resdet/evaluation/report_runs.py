"""The runs of a report: what is known of each, and what is measured on its detections."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from resdet.data.annotations import AnnotationTable
from resdet.drawing import shown_from
from resdet.errors import DataError, name_some
from resdet.evaluation.confusion import ConfusionMatrix, confusion_matrix
from resdet.evaluation.curves import Curves, precision_recall
from resdet.evaluation.detect import Evaluation
from resdet.evaluation.errors import ErrorAnalysis, find_errors
from resdet.evaluation.matching import Matches, match

logger = logging.getLogger(__name__)

IOU_THRESHOLDS = (0.5, 0.75)
"""Of the precision-recall curves; errors, confusion matrix and gallery are at the first."""


@dataclass(frozen=True)
class ReportedRun:
    """What a report shows of one run."""

    name: str  # unique in the report
    evaluation: Evaluation
    config: Mapping[str, Any] = field(default_factory=dict)  # plain values; the page lists keys that differ
    log: Sequence[Mapping[str, Any]] = ()  # of metrics.jsonl (read_log)
    plan: Mapping[str, Any] | None = None  # of plan.json (read_plan): facts, and rows of key, value and reason


@dataclass(frozen=True)
class MeasuredRun:
    """A run and all that is measured on its detections, at the score threshold from which they are shown."""

    run: ReportedRun
    curves: Curves
    errors: ErrorAnalysis
    matches: Matches
    confusion: ConfusionMatrix
    score_threshold: float


def measure(table: AnnotationTable, run: ReportedRun) -> MeasuredRun:
    """Measure all that the report shows of a run."""
    detections, limit = run.evaluation.detections, run.evaluation.coco.max_detections
    threshold, iou_threshold = shown_from(run.evaluation)[0], IOU_THRESHOLDS[0]
    return MeasuredRun(
        run=run,
        curves=precision_recall(table, detections, iou_thresholds=IOU_THRESHOLDS, max_detections=limit),
        errors=find_errors(table, detections, iou_threshold=iou_threshold, max_detections=limit),
        matches=match(table, detections, iou_thresholds=[iou_threshold], max_detections=limit),
        confusion=confusion_matrix(table, detections, score_threshold=threshold, iou_threshold=iou_threshold),
        score_threshold=threshold,
    )


def read_plan(output_dir: Path) -> dict[str, Any] | None:
    """Read the plan of a run that chose its own settings; None for other runs, and with a warning if it is damaged."""
    path = output_dir / "plan.json"
    if not path.is_file():
        return None
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = [{name: row[name] for name in ("key", "value", "because", "is_stated")} for row in plan["rows"]]
        return {"facts": [str(fact) for fact in plan["facts"]], "rows": rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: left out of the report, as damaged: %s", path, error)
        return None


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """Read a run's ``metrics.jsonl``; without one the log is empty.

    Lines that are no JSON object with a number ``step`` are left out: a killed process leaves the last one cut off, a
    lost machine zeros. What else is damaged is logged as a warning, because an evaluation does not depend on it.
    """
    path = output_dir / "metrics.jsonl"
    lines = read_log_lines(path)
    damaged = [
        str(number)
        for number, (line, entry) in enumerate(lines, start=1)
        if entry is None and (number < len(lines) or line.rstrip().endswith(b"}"))
    ]
    if damaged:
        logger.warning("%s: left out of the curves, as damaged: line %s", path, name_some(damaged))
    return [entry for _, entry in lines if entry is not None]


def read_log_lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Read a ``metrics.jsonl``: each line, and the object that it holds, or None if it has no number ``step``."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [(line, _log_entry(line)) for line in lines]


def _log_entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # no JSON, no UTF-8, nested too deeply
        return None
    return entry if isinstance(entry, dict) and is_finite_number(entry.get("step")) else None


def is_finite_number(value: object) -> bool:
    """Return whether a value of a log can be drawn: JSON's numbers may be NaN, infinite, or too large for a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def check_same_ground_truth(tables: Sequence[tuple[str, AnnotationTable]]) -> None:
    """Raise a DataError unless metrics measured on these tables, each with its run's name, are comparable.

    That takes the same classes in the same order, the same images and the same boxes.
    """
    (first, one), *others = tables
    for name, other in others:
        ours, theirs = ([category.name for category in table.categories] for table in (one, other))
        if ours != theirs:
            raise DataError(
                f"runs must be evaluated on the same classes in the same order: {first} has {name_some(ours, 10)} "
                f"({one.name}), {name} has {name_some(theirs, 10)} ({other.name})"
            )
        columns = ("image_ids", "file_names", "offsets", "boxes_xywh", "labels", "crowd", "difficult")
        wrong = [column for column in columns if not np.array_equal(getattr(one, column), getattr(other, column))]
        if wrong:
            raise DataError(
                f"runs must be evaluated on the same data: {first} has {one.num_images} images with {one.num_boxes} "
                f"boxes ({one.name}), {name} has {other.num_images} with {other.num_boxes} ({other.name}), and "
                f"{', '.join(wrong)} differ. Overrides of data.val.* make it the same for all"
            )
