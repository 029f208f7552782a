"""Evaluations as one page for people: ``report.html``, a single file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError
from resdet.evaluation.confusion import ConfusionMatrix, confusion_matrix
from resdet.evaluation.curves import Curve, Curves, precision_recall
from resdet.evaluation.detect import Evaluation
from resdet.evaluation.errors import ERROR_KINDS, ErrorAnalysis, find_errors
from resdet.evaluation.matching import Matches, match
from resdet.files import written_whole
from resdet.types import Target

if TYPE_CHECKING:
    from markupsafe import Markup

    from resdet.data.dataset import DetectionDataset

_IOU_THRESHOLDS = (0.5, 0.75)  # of the curves; errors, confusions and the gallery are at the first
_MAX_IMAGE_SIDE = 640
_JPEG_QUALITY = 80
_BYTES_PER_BOX = 230  # what a box takes in the page
_MAX_CURVE_POINTS = 150
_MAX_CURVE_POINTS_IN_PAGE = 30_000
_MAX_LOG_POINTS = 400
_MAX_MATRIX_CLASSES = 100
_MAX_CONFUSIONS = 20
_HIT, _UNCOUNTED = -1, -2  # what a detection may be beside an error

_EXPLAINED = {
    "classification": "right place, wrong class",
    "localisation": "right class, wrong place",
    "both": "wrong class and wrong place",
    "duplicate": "an object that a better detection has",
    "background": "nothing there",
    "missed": "an object without any detection",
    "false positives": "all wrong detections, taken away",
    "false negatives": "all objects not found, not counted",
}
_NOTES = {
    "AP": "mean over IoU .50:.95",
    "AP50": "at IoU .50",
    "AP75": "at IoU .75",
    "AP_small": "area below 32\N{SUPERSCRIPT TWO} px",
    "AP_medium": "32\N{SUPERSCRIPT TWO} to 96\N{SUPERSCRIPT TWO} px",
    "AP_large": "above 96\N{SUPERSCRIPT TWO} px",
    "AR_1": "recall, 1 detection",
    "AR_10": "recall, 10 detections",
    "AR_small": "recall, small objects",
    "AR_medium": "recall, medium objects",
    "AR_large": "recall, large objects",
    "voc_AP50": "VOC2010, area under the curve",
    "voc_AP50_11point": "VOC2007, mean at 11 recalls",
}


@dataclass(frozen=True)
class ReportedRun:
    """What a report shows of one run.

    Attributes:
        name: What to call it; unique in a report.
        evaluation: What it found and how good that is.
        config: Its configuration as plain values; a report on several runs lists the keys in which they differ.
        log: The lines of its metrics.jsonl (``read_log``); drawn as curves over ``step``.
    """

    name: str
    evaluation: Evaluation
    config: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()


def write_report(
    path: Path,
    dataset: DetectionDataset | Subset[tuple[Tensor, Target]],
    runs: Sequence[ReportedRun],
    *,
    max_images: int = 40,
    max_image_bytes: int = 3_000_000,
) -> None:
    """Write one self-contained page on one or several evaluations of the same dataset.

    It shows the headline numbers, training curves, differences in configuration, precision-recall curves, a table per
    class with the score threshold of the best F1, what each kind of error costs, what is taken for what, and the images
    that cost most AP with ground truth and detections, to be filtered by class, kind of error and score.

    The page loads nothing, and its own content security policy forbids it to: styles and the script are allowed by
    their hashes, images as data only. All names are escaped.

    Args:
        path: The HTML file; its folder must exist. An old file is replaced as a whole.
        dataset: Ground truth and images of all ``runs``; a ``Subset`` as for ``evaluate``.
        runs: At least one; their evaluations' rows must be of ``dataset``.
        max_images: Images in the gallery, at most.
        max_image_bytes: What they may take in the page, boxes included. Images are embedded as JPEG, their longer
            side at most 640 pixels; those that would not fit are left out, and the page says so.

    Raises:
        ValueError: If there are no runs or two of the same name.
        DataError: If detections do not belong to the dataset, or an image cannot be read.
        UserError: If the folder of ``path`` does not exist.
    """
    from resdet.data.dataset import without_subset

    names = [run.name for run in runs]
    if not runs or len(set(names)) != len(names):
        raise ValueError(f"runs: must be at least one, with different names, got {names}")
    dataset = without_subset(dataset)
    table = dataset.table
    judged = [_judge(table, run) for run in runs]
    view = {
        "dataset": table.name,
        "num_images": table.num_images,
        "num_boxes": int(np.count_nonzero(~(table.crowd | table.difficult))),
        "runs": names,
        "classes": [category.name for category in table.categories],
        "metrics": _metrics(runs),
        "iou_thresholds": [f"{threshold:.2f}" for threshold in _IOU_THRESHOLDS],
        "config": _config_differences(runs),
        "compared": _compared_classes(judged) if len(runs) > 1 else None,
        "class_tables": [_class_table(one) for one in judged],
        "kinds": _kinds(judged),
        "explained": _EXPLAINED,
        "error_kinds": ERROR_KINDS,
        "error_tables": [_error_table(one) for one in judged],
        "confusions": [_confusions(one) for one in judged],
        "gallery": _gallery(dataset, judged, max_images, max_image_bytes),
        "threshold": int(100 * judged[0].score_threshold) / 100,
        "data": {
            "runs": names,
            "classes": ["all classes pooled", *(category.name for category in table.categories)],
            "curves": [_curves(one, len(judged)) for one in judged],
            "logs": _logs(runs),
        },
    }
    text = _render(view)
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_run_report(
    output_dir: Path,
    dataset: DetectionDataset | Subset[tuple[Tensor, Target]],
    evaluation: Evaluation,
    config: Mapping[str, Any],
) -> None:
    """Write ``report.html`` into a run's folder, with the curves of its ``metrics.jsonl``.

    Args:
        output_dir: The run's folder; its name is the run's.
        dataset: What was evaluated on.
        evaluation: The run's last.
        config: The run's configuration as plain values.

    Raises:
        DataError: As ``write_report`` and ``read_log``.
    """
    run = ReportedRun(output_dir.resolve().name, evaluation, config, read_log(output_dir))
    write_report(output_dir / "report.html", dataset, [run])


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """Read a run's ``metrics.jsonl``; none is an empty log, and so is a last line that was cut while being written.

    Raises:
        DataError: If another line is not a JSON object with a number ``step``.
    """
    path = output_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], (int, float)):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("}"):
                break
            raise DataError(f"{path}: line {number}: expected a JSON object with a step, got {line[:100]}") from error
        entries.append(entry)
    return entries


def check_same_ground_truth(tables: Sequence[tuple[str, AnnotationTable]]) -> None:
    """Make sure that numbers measured on these tables can stand side by side.

    Args:
        tables: At least one, each with what to call its run in messages.

    Raises:
        DataError: If classes (or their order), images or boxes are not the same.
    """
    (first, one), *others = tables
    for name, other in others:
        ours, theirs = ([category.name for category in table.categories] for table in (one, other))
        if ours != theirs:
            raise DataError(
                f"runs must be judged on the same classes in the same order: {first} has {_listed(ours)} "
                f"({one.name}), {name} has {_listed(theirs)} ({other.name})"
            )
        columns = ("image_ids", "file_names", "offsets", "boxes_xywh", "labels", "crowd", "difficult")
        wrong = [column for column in columns if not np.array_equal(getattr(one, column), getattr(other, column))]
        if wrong:
            raise DataError(
                f"runs must be judged on the same data: {first} has {one.num_images} images with {one.num_boxes} "
                f"boxes ({one.name}), {name} has {other.num_images} with {other.num_boxes} ({other.name}), and "
                f"{', '.join(wrong)} differ. Overrides of data.val.* make it the same for all"
            )


@dataclass(frozen=True)
class _Judged:
    """A run and all that is measured on its detections."""

    run: ReportedRun
    curves: Curves
    errors: ErrorAnalysis
    matches: Matches
    confusion: ConfusionMatrix
    score_threshold: float


def _judge(table: AnnotationTable, run: ReportedRun) -> _Judged:
    """Measure; the working point is the evaluation's, 0.5 where it has none."""
    detections, limit = run.evaluation.detections, run.evaluation.coco.max_detections
    curves = precision_recall(table, detections, iou_thresholds=_IOU_THRESHOLDS, max_detections=limit)
    threshold = 0.5 if run.evaluation.score_threshold is None else run.evaluation.score_threshold
    iou_threshold = _IOU_THRESHOLDS[0]
    return _Judged(
        run=run,
        curves=curves,
        errors=find_errors(table, detections, iou_threshold=iou_threshold, max_detections=limit),
        matches=match(table, detections, iou_thresholds=[iou_threshold], max_detections=limit),
        confusion=confusion_matrix(table, detections, score_threshold=threshold, iou_threshold=iou_threshold),
        score_threshold=threshold,
    )


_Cell = dict[str, Any]
"""A table's cell: ``text``, None for a number that is undefined, and ``sort``, what the column is sorted by."""


def _number(value: float | None, digits: int = 3) -> _Cell:
    """Give a number's cell; None and -1, pycocotools' "undefined", have no text."""
    if value is None or value == -1:
        return {"text": None, "sort": ""}
    return {"text": f"{value:.{digits}f}", "sort": f"{value:.6g}"}


def _text(value: str) -> _Cell:
    return {"text": value, "sort": value}


def _column(label: str, note: str = "", *, is_number: bool = True) -> dict[str, Any]:
    return {"label": label, "note": note, "is_number": is_number}


def _metrics(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Give every overall number with each run's value, whether it is the best, and its distance to the first run's."""
    rows = []
    for name in runs[0].evaluation.metrics:
        values = [run.evaluation.metrics.get(name, -1.0) for run in runs]
        best = max(values)
        first = values[0]
        rows.append(
            {
                "label": name.replace("voc_", "VOC ").replace("_11point", ", 11 points").replace("_", " "),
                "note": _NOTES.get(name, f"recall, {runs[0].evaluation.coco.max_detections} detections"),
                "cells": [
                    _number(value)
                    | {
                        "is_best": len(runs) > 1 and value == best and best >= 0,
                        "change": f"{value - first:+.3f}" if index and min(value, first) >= 0 else "",
                    }
                    for index, value in enumerate(values)
                ],
            }
        )
    return rows


def _config_differences(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Give the dotted keys whose values are not the same in all runs; each run has its own folder anyway."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config if key not in ("output_dir", "resume"))
    rows = ((key, [config.get(key, "not set") for config in flat]) for key in keys)
    return [{"key": key, "values": values} for key, values in rows if len(set(values)) > 1]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str)
    return flat


def _class_table(judged: _Judged) -> dict[str, Any]:
    """Give the table per class of one run: COCO's and VOC's numbers, and the working point of the best F1."""
    evaluation = judged.run.evaluation
    columns = [
        _column("Class", is_number=False),
        _column("Boxes", "ground-truth boxes that count"),
        _column("AP", _NOTES["AP"]),
        _column("AP50", _NOTES["AP50"]),
        _column("AP75", _NOTES["AP75"]),
        _column("AP small", _NOTES["AP_small"]),
        _column("AP medium", _NOTES["AP_medium"]),
        _column("AP large", _NOTES["AP_large"]),
        _column("AR", f"recall, {evaluation.coco.max_detections} detections per class and image"),
        _column("VOC AP50", "VOC's AP, area under the curve"),
        _column("Best F1", "highest F1 at IoU .50"),
        _column("Score", "the score threshold of the best F1"),
        _column("Precision", "at that threshold"),
        _column("Recall", "at that threshold"),
    ]
    rows = []
    for row, voc, curve in zip(evaluation.per_class, evaluation.voc.per_class, judged.curves.per_class[0], strict=True):
        best = curve.best_f1()
        numbers = (row.AP, row.AP50, row.AP75, row.AP_small, row.AP_medium, row.AP_large, row.AR_max, voc.AP)
        point = (best.f1, best.threshold, best.precision, best.recall)
        cells = [_text(row.name), _number(row.num_boxes, 0), *map(_number, numbers), *map(_number, point)]
        rows.append(cells)
    best = judged.curves.pooled[0].best_f1()
    return {
        "caption": f"Each class of {judged.run.name}. Pooled over all classes, F1 is highest at the score "
        f"{_said(best.threshold)}: {_said(best.f1)}, with precision {_said(best.precision)} and recall "
        f"{_said(best.recall)}.",
        "columns": columns,
        "rows": rows,
    }


def _compared_classes(judged: Sequence[_Judged]) -> dict[str, Any]:
    """Give the table that has all runs' AP per class side by side."""
    columns = [_column("Class", is_number=False), _column("Boxes", "ground-truth boxes that count")]
    for what, note in (("AP", _NOTES["AP"]), ("AP50", _NOTES["AP50"]), ("Score", "the score threshold of the best F1")):
        columns += [_column(f"{what} {one.run.name}", note) for one in judged]
    rows = []
    for k, category in enumerate(judged[0].run.evaluation.per_class):
        of_runs = [one.run.evaluation.per_class[k] for one in judged]
        thresholds = [one.curves.per_class[0][k].best_f1().threshold for one in judged]
        rows.append(
            [
                _text(category.name),
                _number(category.num_boxes, 0),
                *(_number(row.AP) for row in of_runs),
                *(_number(row.AP50) for row in of_runs),
                *map(_number, thresholds),
            ]
        )
    return {"caption": "Each class in each run.", "columns": columns, "rows": rows}


def _kinds(judged: Sequence[_Judged]) -> list[dict[str, Any]]:
    """Give the kinds of errors with each run's count and cost; bars are in percent of the highest cost of all."""
    of_runs = [(*one.errors.kinds, one.errors.false_positives, one.errors.false_negatives) for one in judged]
    highest = max((cost.dAP for costs in of_runs for cost in costs), default=0)
    rows = []
    for costs in zip(*of_runs, strict=True):
        cells = [
            {
                "count": cost.count,
                "cost": _number(cost.dAP),
                "percent": f"{100 * max(cost.dAP, 0) / highest:.1f}" if highest > 0 else "0",
            }
            for cost in costs
        ]
        rows.append({"kind": costs[0].kind, "is_main": costs[0].kind in ERROR_KINDS, "cells": cells})
    return rows


def _error_table(judged: _Judged) -> dict[str, Any]:
    """Give one run's cost of each kind for each class."""
    columns = [
        _column("Class", is_number=False),
        _column("AP50"),
        *(_column(kind.capitalize(), _EXPLAINED[kind]) for kind in ERROR_KINDS),
    ]
    rows = [
        [_text(row.name), _number(row.AP), *(_number(cost.dAP) for cost in row.kinds)]
        for row in judged.errors.per_class
    ]
    return {
        "caption": f"How much AP50 of each class of {judged.run.name} would rise if the errors of one kind were fixed.",
        "columns": columns,
        "rows": rows,
    }


def _confusions(judged: _Judged) -> dict[str, Any]:
    """Give one run's confusion matrix with a step of shade (0 to 9) for each cell, and its most frequent confusions."""
    matrix = judged.confusion
    counts, shares = matrix.counts, matrix.normalised()
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    kept = np.arange(len(counts))
    if len(kept) - 1 > _MAX_MATRIX_CLASSES:
        most = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1))[1:], kind="stable")[:_MAX_MATRIX_CLASSES] + 1
        kept = np.concatenate([[0], np.sort(most)])
    shades = np.minimum(np.ceil(9 * shares), 9).astype(int)
    # Background comes last, as readers expect it.
    kept = np.roll(kept, -1)
    names = [matrix.names[i] for i in kept]
    rows = [
        [{"count": int(counts[i, j]), "shade": int(shades[i, j]), "is_diagonal": bool(i == j and i > 0)} for j in kept]
        for i in kept
    ]
    # Among classes first: what was missed or made up is the errors' business already.
    pairs = np.argwhere(wrong > 0)
    pairs = pairs[np.argsort(-wrong[tuple(pairs.T)], kind="stable")]
    among = [pair for pair in pairs.tolist() if 0 not in pair]
    top = [
        [
            _text(matrix.names[i]),
            _text(matrix.names[j]),
            _number(int(counts[i, j]), 0),
            _number(float(shares[i, j])),
        ]
        for i, j in among[:_MAX_CONFUSIONS]
    ]
    return {
        "run": judged.run.name,
        "score_threshold": f"{matrix.score_threshold:.2f}",
        "iou_threshold": f"{matrix.iou_threshold:.2f}",
        "names": names,
        "rows": rows,
        "num_left_out": len(counts) - len(kept),
        "top": {
            "caption": f"Most frequent confusions among classes of {judged.run.name}.",
            "columns": [
                _column("Object", is_number=False),
                _column("Detected as", is_number=False),
                _column("Count"),
                _column("Share", "of all boxes of the object's class"),
            ],
            "rows": top,
        },
    }


def _curves(judged: _Judged, num_runs: int) -> list[list[dict[str, Any]]]:
    """Give one run's curves for the page's script, by IoU threshold; the pooled one comes before the classes'."""
    num_curves = num_runs * len(_IOU_THRESHOLDS) * (1 + len(judged.curves.per_class[0]))
    num_points = min(_MAX_CURVE_POINTS, max(20, _MAX_CURVE_POINTS_IN_PAGE // num_curves))
    return [
        [_curve(curve, num_points) for curve in (pooled, *per_class)]
        for pooled, per_class in zip(judged.curves.pooled, judged.curves.per_class, strict=True)
    ]


def _curve(curve: Curve, num_points: int) -> dict[str, Any]:
    """Give a curve by some of its working points, evenly over recall, the one of the best F1 among them.

    Each is ``[recall, precision, score]`` of what a threshold at that score really gives; detections of equal score
    come and go together.
    """
    drawn: dict[str, Any] = {"ap": round(curve.AP, 4), "points": [], "best": -1}
    if not curve.num_boxes or not len(curve.hits):
        return drawn
    last = np.flatnonzero(np.diff(curve.scores, append=-np.inf))
    recall, precision, scores = curve.recall[last], curve.precision[last], curve.scores[last]
    some = np.searchsorted(recall, np.linspace(recall[0], recall[-1], num_points - 2))
    threshold = curve.best_f1().threshold
    best = [] if threshold is None else [int(np.searchsorted(-scores, -threshold))]
    chosen = np.unique(np.concatenate([some, best, [len(last) - 1]])).astype(int)
    points = np.stack([recall, precision, scores], axis=1)[chosen].round(4)
    drawn["points"] = points.tolist()
    if best:
        drawn["best"] = int(np.searchsorted(chosen, best[0]))
    return drawn


def _logs(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Give the training curves for the page's script: one chart per quantity that any run's log has."""
    charts = []
    quantities = (
        ("Loss", ("loss", "val_loss")),
        ("AP", ("AP",)),
        ("AP50", ("AP50",)),
        ("Learning rate", ("lr",)),
    )
    for title, keys in quantities:
        series: list[dict[str, Any]] = []
        for index, run in enumerate(runs):
            for key in keys:
                # An undefined AP is no point of a curve; neither is a loss that is not finite.
                points = [
                    [entry["step"], entry[key]]
                    for entry in run.log
                    if isinstance(entry.get(key), (int, float)) and entry[key] >= 0 and np.isfinite(entry[key])
                ]
                chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), _MAX_LOG_POINTS)).astype(int))
                if points:
                    name = f"{run.name}, validation" if key == "val_loss" else run.name
                    kept = [[points[i][0], float(f"{points[i][1]:.5g}")] for i in chosen.tolist()]
                    series.append({"run": index, "name": name, "dashed": key == "val_loss", "points": kept})
        if any(len(line["points"]) > 1 for line in series):
            charts.append({"title": title, "series": series})
    return charts


def _gallery(
    dataset: DetectionDataset, judged: Sequence[_Judged], max_images: int, max_image_bytes: int
) -> dict[str, Any]:
    """Give the images that cost most AP in any run, with all boxes, as many as the budget allows.

    Of equal cost, as where nothing at all was found, the image with more errors is the worse.
    """
    loss = np.stack([one.errors.image_loss for one in judged])
    num_images = dataset.table.num_images
    num_errors = np.zeros(num_images, dtype=np.int64)
    for one in judged:
        num_errors += np.bincount(one.errors.errors.image_index, minlength=num_images)
    order = np.lexsort((-num_errors, -loss.max(axis=0)))
    order = order[num_errors[order] > 0]
    kinds = [_kind_of_detection(one) for one in judged]
    shots: list[dict[str, Any]] = []
    num_bytes = 0
    for index in order[:max_images].tolist():
        boxes = _ground_truth(dataset.table, judged, index)
        found = [box for run in range(len(judged)) for box in _found(judged[run], kinds[run], run, index)]
        picture = _data_url(dataset.image(index))
        num_bytes += len(picture) + _BYTES_PER_BOX * (len(boxes) + len(found))
        if num_bytes > max_image_bytes:
            break
        height, width = dataset.table.sizes[index].tolist()
        shots.append(
            {
                "name": str(dataset.table.file_names[index]),
                "image_id": int(dataset.table.image_ids[index]),
                "width": width,
                "height": height,
                "picture": picture,
                "ground_truth": boxes,
                "detections": found,
                "costs": [
                    {"run": one.run.name, "loss": f"{loss[run, index]:.4f}", "errors": _summary(one, index)}
                    for run, one in enumerate(judged)
                ],
            }
        )
    return {
        "shots": shots,
        "num_wrong": len(order),
        "max_side": _MAX_IMAGE_SIDE,
        "megabytes": f"{max_image_bytes / 1e6:g}",
        "max_images": max_images,
    }


def _data_url(image: npt.NDArray[np.uint8]) -> str:
    """Give an image as a JPEG in a data URL, made smaller where it is larger than the page shows it."""
    picture = Image.fromarray(image)
    picture.thumbnail((_MAX_IMAGE_SIDE, _MAX_IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _kind_of_detection(judged: _Judged) -> npt.NDArray[np.int64]:
    """Give each detection's kind, int64 ``[D]``: index into ``ERROR_KINDS``, ``_HIT`` or ``_UNCOUNTED``."""
    kinds = np.full(len(judged.run.evaluation.detections), _UNCOUNTED, dtype=np.int64)
    kinds[judged.matches.detection[judged.matches.hits[0]]] = _HIT
    rows = np.flatnonzero(judged.errors.errors.detection >= 0)
    kinds[judged.errors.errors.detection[rows]] = judged.errors.errors.kind[rows]
    return kinds


def _ground_truth(table: AnnotationTable, judged: Sequence[_Judged], index: int) -> list[dict[str, Any]]:
    """Give an image's boxes, and in each run the score of the detection that has the box."""
    missed_kind = ERROR_KINDS.index("missed")
    missed = []
    for one in judged:
        errors, rows = one.errors.errors, one.errors.errors.of_image(index)
        missed.append(set(errors.box[rows][errors.kind[rows] == missed_kind].tolist()))
    boxes = []
    for row in range(table.num_boxes)[table.rows(index)]:
        scores = []
        for one in judged:
            detection = int(one.matches.detection_of_box[0, row])
            scores.append(_short(float(one.run.evaluation.detections.scores[detection]), 3) if detection >= 0 else "")
        x, y, width, height = table.boxes_xywh[row].tolist()
        boxes.append(
            {
                "label": int(table.labels[row]),
                "rect": [_short(value, 1) for value in (x, y, width, height)],
                "is_counted": not (table.crowd[row] or table.difficult[row]),
                "found": ",".join(scores),
                "missed": ",".join("1" if row in rows else "" for rows in missed),
            }
        )
    return boxes


def _found(judged: _Judged, kinds: npt.NDArray[np.int64], run: int, index: int) -> list[dict[str, Any]]:
    """Give a run's detections in an image, the best last, so that they lie on top."""
    detections, errors = judged.run.evaluation.detections, judged.errors.errors
    of_image = errors.of_image(index)
    iou = dict(zip(errors.detection[of_image].tolist(), errors.iou[of_image].tolist(), strict=True))
    rows = np.flatnonzero(detections.image_index == index)
    rows = rows[np.argsort(detections.scores[rows], kind="stable")]
    found = []
    for row in rows.tolist():
        x1, y1, x2, y2 = detections.boxes[row].tolist()
        kind = int(kinds[row])
        found.append(
            {
                "run": run,
                "label": int(detections.labels[row]),
                "score": _short(float(detections.scores[row]), 3),
                "kind": ERROR_KINDS[kind] if kind >= 0 else {_HIT: "hit", _UNCOUNTED: "uncounted"}[kind],
                "iou": _short(iou[row], 2) if iou.get(row) else "",
                "rect": [_short(value, 1) for value in (x1, y1, x2 - x1, y2 - y1)],
            }
        )
    return found


def _summary(judged: _Judged, index: int) -> str:
    """Say how many errors of each kind are in an image."""
    errors = judged.errors.errors
    counts = np.bincount(errors.kind[errors.of_image(index)], minlength=len(ERROR_KINDS)).tolist()
    parts = [f"{count} {kind}" for kind, count in zip(ERROR_KINDS, counts, strict=True) if count]
    return ", ".join(parts) or "no errors"


def _short(value: float, digits: int) -> str:
    """Write a number without the zeros that say nothing."""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")


def _said(value: float | None) -> str:
    return _number(value)["text"] or "undefined"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _render(view: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = resources.files("resdet.evaluation")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    style, script = (Markup(folder.joinpath(f"report.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    return template.render(view, style=style, script=script, style_hash=_csp_hash(style), script_hash=_csp_hash(script))


def _csp_hash(text: Markup) -> str:
    """Name a text as a content security policy does."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
