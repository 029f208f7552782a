"""COCO's metrics: pycocotools' numbers, computed for all images and classes at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError
from resdet.evaluation.curves import RECALLS, UNDEFINED, interpolated_precision, mean_of_defined
from resdet.evaluation.matching import AREA_RANGES, COCO_IOU_THRESHOLDS, Matches, match_areas, to_xywh
from resdet.types import Bools, Detections, Floats

MAX_DETECTIONS = 100
"""Detections of a class in an image that count in published numbers."""


@dataclass(frozen=True)
class CocoNumbers:
    """COCO's twelve numbers, in [0, 1] as pycocotools gives them, or -1 if there are no such objects."""

    AP: float  # mean over the ten IoU thresholds .50:.05:.95
    AP50: float  # at IoU 0.5
    AP75: float  # at IoU 0.75
    AP_small: float  # objects below 32^2 pixels of area
    AP_medium: float  # from 32^2 to 96^2 pixels
    AP_large: float  # above 96^2 pixels
    AR_1: float  # recall with the best detection per class and image, mean over the IoU thresholds
    AR_10: float  # with the ten best
    AR_max: float  # with all detections that count; published tables call it AR_100
    AR_small: float  # as AR_max, of small objects
    AR_medium: float  # as AR_max, of medium objects
    AR_large: float  # as AR_max, of large objects


@dataclass(frozen=True)
class ClassMetrics(CocoNumbers):
    """One class's row of the COCO table."""

    name: str
    num_boxes: int  # ground truth that counts, without crowd regions and difficult objects


@dataclass(frozen=True)
class CocoMetrics(CocoNumbers):
    """COCO's twelve numbers of a dataset, each the mean over the classes that have such objects."""

    per_class: tuple[ClassMetrics, ...]  # in label order
    max_detections: int = MAX_DETECTIONS  # that count per class and image

    def as_dict(self) -> dict[str, float]:
        """Return the twelve numbers in pycocotools' order, ``AR_max`` by its usual name, ``AR_100``."""
        names = [field.name for field in fields(CocoNumbers)]
        return {name if name != "AR_max" else f"AR_{self.max_detections}": getattr(self, name) for name in names}


def coco_metrics(
    table: AnnotationTable, detections: Detections, *, max_detections: int = MAX_DETECTIONS
) -> CocoMetrics:
    """Compute COCO's detection metrics over every image of ``table``.

    An image without detections counts as such. An object's size is the table's ``area`` (COCO's segment area where
    given). Crowd regions are ignored as pycocotools ignores them, and so are VOC's difficult objects. A metric without
    any ground truth to measure it on is -1 and stays out of the means; objects without any detection give 0. Crowded
    scenes may need more than COCO's 100 detections per class and image, but such numbers are not comparable with
    published ones; ``AR_1`` and ``AR_10`` are unaffected.

    Source: ``pycocotools.cocoeval.COCOeval``; the numbers are the same except for rounding in the last bits. ``match``
    and ``interpolated_precision`` list their deviations. Any ``max_detections`` has means here (``summarize`` gives -1
    for limits other than 100).
    """
    if max_detections < 1:
        raise ValueError(f"max_detections: must be at least 1, got {max_detections}")
    # Detections beyond max_detections take no box from better ones, and AR_10 is always of ten.
    matched = match_areas(table, detections, max_detections=max(max_detections, 10))
    values: dict[str, Floats] = {}  # AP of a size: [K, T, 101]; AR: [K, T]
    for size, matches in zip(AREA_RANGES, matched, strict=True):
        best = matches.rank < max_detections
        suffix = "" if size == "all" else f"_{size}"
        values[f"AP{suffix}"] = _precision(matches, best)
        values[f"AR{suffix or '_max'}"] = _recall(matches, best)
        if size == "all":
            values |= {f"AR_{limit}": _recall(matches, matches.rank < limit) for limit in (1, 10)}
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        values[name] = values["AP"][:, COCO_IOU_THRESHOLDS.index(threshold)]  # [K, 101]

    def numbers(of: int | slice) -> dict[str, float]:
        return {name: mean_of_defined(value[of]) for name, value in values.items()}

    counted = np.bincount(table.labels[~(table.crowd | table.difficult)], minlength=table.num_classes)  # [K + 1]
    per_class = tuple(
        ClassMetrics(**numbers(category.label - 1), name=category.name, num_boxes=int(counted[category.label]))
        for category in table.categories
    )
    return CocoMetrics(**numbers(slice(None)), per_class=per_class, max_detections=max_detections)


def detections_to_coco(table: AnnotationTable, detections: Detections) -> list[dict[str, Any]]:
    """Convert detections, in their order, to COCO's result format, with the table's own image and category ids."""
    category_ids = np.array([0] + [category.category_id for category in table.categories], dtype=np.int64)
    columns = {
        "image_id": table.image_ids[detections.image_index],
        "category_id": category_ids[detections.labels],
        "bbox": to_xywh(detections.boxes),  # [D, 4]
        "score": detections.scores,
    }
    return rows_of(columns)


def rows_of(columns: Mapping[str, npt.NDArray[Any]]) -> list[dict[str, Any]]:
    """Return columns of equal length as a dict of plain values for each row."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def read_coco_detections(path: Path, table: AnnotationTable) -> Detections:
    """Read a COCO result file, the JSON list that ``detections_to_coco`` makes, in any order; other keys are ignored.

    A DataError names the entry that is malformed or not finite, or has an id that ``table`` does not have.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of detections, got {type(entries).__name__}")
    image_index = {image_id: index for index, image_id in enumerate(table.image_ids.tolist())}
    label = {category.category_id: category.label for category in table.categories}
    rows = np.empty((len(entries), 7))
    for number, entry in enumerate(entries):
        try:
            image_id, category_id = entry["image_id"], entry["category_id"]
            x, y, width, height = (float(value) for value in entry["bbox"])
            score = float(entry["score"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: entry {number}: expected image_id, category_id, bbox (x, y, width, height) and score, "
                f"got {str(entry)[:200]}"
            ) from error
        if not _is_key_of(image_id, image_index):
            raise DataError(f"{path}: entry {number}: image_id {image_id!r} is not an image of {table.name}")
        if not _is_key_of(category_id, label):
            raise DataError(
                f"{path}: entry {number}: category_id {category_id!r} is not a category of {table.name}, "
                f"which has {sorted(label)}"
            )
        if not all(map(math.isfinite, (x, y, width, height, score))):
            raise DataError(f"{path}: entry {number}: bbox and score must be finite, got {entry['bbox']}, {score}")
        rows[number] = image_index[image_id], label[category_id], x, y, x + width, y + height, score
    return Detections(
        image_index=rows[:, 0].astype(np.int64),
        boxes=rows[:, 2:6].copy(),
        labels=rows[:, 1].astype(np.int64),
        scores=rows[:, 6].copy(),
    )


def _precision(matches: Matches, best: Bools) -> Floats:
    """Compute each class's interpolated precision from the detections of ``best``, float64 ``[K, T, 101]``."""
    precision = np.empty((len(matches.num_boxes) - 1, len(matches.iou_thresholds), len(RECALLS)))
    for label, num_boxes in enumerate(matches.num_boxes[1:].tolist(), start=1):
        rows = matches.of_label(label)
        for t, (hits, ignored) in enumerate(zip(matches.hits[:, rows], matches.ignored[:, rows], strict=True)):
            precision[label - 1, t] = interpolated_precision(hits[~ignored & best[rows]], num_boxes)
    return precision


def _recall(matches: Matches, best: Bools) -> Floats:
    """Compute each class's share of boxes found by the detections of ``best``, float64 ``[K, T]``; -1 without boxes."""
    labels, num_boxes = matches.labels, matches.num_boxes
    found = np.stack([np.bincount(labels[row], minlength=len(num_boxes)) for row in matches.hits & best], axis=1)
    recall = np.full(found.shape, UNDEFINED)
    np.divide(found, num_boxes[:, None], out=recall, where=num_boxes[:, None] > 0)
    return recall[1:]


def _is_key_of(value: Any, known: dict[int, int]) -> bool:
    # True == 1 would pass as a key, and a list would raise.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value in known
