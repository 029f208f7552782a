"""COCO's metrics, computed by pycocotools and handed back as numbers instead of prints."""

from __future__ import annotations

import contextlib
import io
import json
import math
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError
from resdet.types import Detections

UNDEFINED = -1.0
"""pycocotools' value of a metric that has no ground truth to measure it on; it never enters a mean."""

_STDOUT = threading.Lock()


@dataclass(frozen=True)
class ClassMetrics:
    """One class's row of the COCO table; every metric in [0, 1], or -1 where the class has no such objects.

    Attributes:
        name: Class name.
        num_boxes: Ground-truth boxes that count, without crowd regions and difficult objects.
        AP: Mean over the ten IoU thresholds .50:.05:.95.
        AP50: At IoU 0.5.
        AP75: At IoU 0.75.
        AP_small: Of objects below 32^2 pixels of area.
        AP_medium: Of objects from 32^2 to 96^2 pixels.
        AP_large: Of objects above 96^2 pixels.
        AR_max: Recall with all detections that count, mean over the IoU thresholds.
    """

    name: str
    num_boxes: int
    AP: float
    AP50: float
    AP75: float
    AP_small: float
    AP_medium: float
    AP_large: float
    AR_max: float


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's twelve numbers, in [0, 1] as pycocotools gives them, or -1 where nothing defines them.

    Attributes:
        AP: Mean over classes and the ten IoU thresholds .50:.05:.95.
        AP50: At IoU 0.5.
        AP75: At IoU 0.75.
        AP_small: Of objects below 32^2 pixels of area.
        AP_medium: Of objects from 32^2 to 96^2 pixels.
        AP_large: Of objects above 96^2 pixels.
        AR_1: Recall with the one best detection per class and image.
        AR_10: With the ten best.
        AR_max: With the ``max_detections`` best; published tables call it AR_100.
        AR_small: As ``AR_max``, of small objects.
        AR_medium: As ``AR_max``, of medium objects.
        AR_large: As ``AR_max``, of large objects.
        per_class: One row per class, in label order.
        max_detections: Detections that count per class and image.
    """

    AP: float
    AP50: float
    AP75: float
    AP_small: float
    AP_medium: float
    AP_large: float
    AR_1: float
    AR_10: float
    AR_max: float
    AR_small: float
    AR_medium: float
    AR_large: float
    per_class: tuple[ClassMetrics, ...]
    max_detections: int = 100

    def as_dict(self) -> dict[str, float]:
        """Give the twelve numbers in pycocotools' order; ``AR_max`` goes by its usual name, ``AR_100``."""
        return {
            "AP": self.AP,
            "AP50": self.AP50,
            "AP75": self.AP75,
            "AP_small": self.AP_small,
            "AP_medium": self.AP_medium,
            "AP_large": self.AP_large,
            "AR_1": self.AR_1,
            "AR_10": self.AR_10,
            f"AR_{self.max_detections}": self.AR_max,
            "AR_small": self.AR_small,
            "AR_medium": self.AR_medium,
            "AR_large": self.AR_large,
        }


def coco_metrics(table: AnnotationTable, detections: Detections, *, max_detections: int = 100) -> CocoMetrics:
    """Compute COCO's detection metrics over every image of ``table``.

    An image without detections counts as such. Sizes are judged by the table's ``area`` (COCO's segment area where
    given), crowd regions are ignored as pycocotools ignores them, and so are VOC's difficult objects. A metric without
    any ground truth to measure it on is -1 and stays out of the means; objects without any detection give 0.

    Args:
        table: Ground truth.
        detections: What a model found in the images of ``table``.
        max_detections: Detections that count per class and image, at least 10; COCO's own is 100. Crowded scenes may
            need more, and such numbers compare with no published ones.

    Raises:
        ValueError: If ``max_detections`` is below 10.
        DataError: If a detection names an image or class that ``table`` does not have, or is not finite.

    Source: ``pycocotools.cocoeval.COCOeval`` does the matching and the interpolation. Three deviations, none of which
    changes a number on COCO's own files: boxes carry row numbers as ids (pycocotools takes a ground-truth id of 0 for
    "unmatched" and merges equal ids), the means are taken here (``summarize`` answers -1 for limits other than 100),
    and difficult objects are ignored (pycocotools overwrites such a flag by ``iscrowd``).
    """
    if max_detections < 10:
        raise ValueError(f"max_detections: must be at least 10, got {max_detections}")
    check_detections(table, detections)
    from pycocotools.cocoeval import COCOeval

    evaluator = COCOeval(iouType="bbox")
    evaluator.params.imgIds = table.image_ids.tolist()
    evaluator.params.catIds = [category.category_id for category in table.categories]
    evaluator.params.maxDets = [1, 10, max_detections]
    evaluator._gts = _ground_truth(table)
    evaluator._dts = defaultdict(list)
    for number, found in enumerate(detections_to_coco(table, detections), start=1):
        found |= {"id": number, "area": found["bbox"][2] * found["bbox"][3]}
        evaluator._dts[found["image_id"], found["category_id"]].append(found)
    evaluator._prepare = lambda: None  # it would fill _gts and _dts from COCO objects, by way of two more copies
    # The redirection is the process's: two at once could restore each other's and leave stdout lost.
    with _STDOUT, contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()

    precision = evaluator.eval["precision"]  # [IoU, recall, class, area, max detections]
    recall = evaluator.eval["recall"]  # [IoU, class, area, max detections]
    counted = table.labels[~(table.crowd | table.difficult)]
    num_boxes = np.bincount(counted, minlength=table.num_classes)
    column_of_id = {int(category_id): column for column, category_id in enumerate(evaluator.params.catIds)}
    per_class = []
    for category in table.categories:
        k = column_of_id[category.category_id]
        per_class.append(
            ClassMetrics(
                name=category.name,
                num_boxes=int(num_boxes[category.label]),
                AP=_mean(precision[:, :, k, 0, -1]),
                AP50=_mean(precision[0, :, k, 0, -1]),
                AP75=_mean(precision[5, :, k, 0, -1]),
                AP_small=_mean(precision[:, :, k, 1, -1]),
                AP_medium=_mean(precision[:, :, k, 2, -1]),
                AP_large=_mean(precision[:, :, k, 3, -1]),
                AR_max=_mean(recall[:, k, 0, -1]),
            )
        )
    return CocoMetrics(
        AP=_mean(precision[..., 0, -1]),
        AP50=_mean(precision[0, ..., 0, -1]),
        AP75=_mean(precision[5, ..., 0, -1]),
        AP_small=_mean(precision[..., 1, -1]),
        AP_medium=_mean(precision[..., 2, -1]),
        AP_large=_mean(precision[..., 3, -1]),
        AR_1=_mean(recall[..., 0, 0]),
        AR_10=_mean(recall[..., 0, 1]),
        AR_max=_mean(recall[..., 0, 2]),
        AR_small=_mean(recall[..., 1, 2]),
        AR_medium=_mean(recall[..., 2, 2]),
        AR_large=_mean(recall[..., 3, 2]),
        per_class=tuple(per_class),
        max_detections=max_detections,
    )


def detections_to_coco(table: AnnotationTable, detections: Detections) -> list[dict[str, Any]]:
    """Give detections in COCO's result format.

    Each has ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``.

    Args:
        table: The table that ``detections.image_index`` points into; its own image and category ids are written.
        detections: Any order; it is kept.
    """
    boxes_xywh = detections.boxes.copy()
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    category_ids = np.array([0] + [category.category_id for category in table.categories], dtype=np.int64)
    columns = (
        table.image_ids[detections.image_index].tolist(),
        category_ids[detections.labels].tolist(),
        boxes_xywh.tolist(),
        detections.scores.tolist(),
    )
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}
        for image_id, category_id, bbox, score in zip(*columns, strict=True)
    ]


def read_coco_detections(path: Path, table: AnnotationTable) -> Detections:
    """Read a COCO result file, the JSON list that ``detections_to_coco`` makes, in any order.

    Args:
        path: JSON file; other keys than the four are left alone.
        table: Ground truth of the images that the file speaks of.

    Raises:
        DataError: If the file cannot be read, is not such a list, names an image or category id that ``table`` does
            not have, or holds a number that is not finite.
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


def check_detections(table: AnnotationTable, detections: Detections) -> None:
    """Refuse detections that cannot belong to ``table``.

    Raises:
        DataError: If an array has a wrong shape, an image index or a label is out of range, or a box or score is not
            finite (metrics would silently call it a miss).
    """
    num = len(detections.scores)
    shapes = (detections.image_index.shape, detections.boxes.shape, detections.labels.shape, detections.scores.shape)
    if shapes != ((num,), (num, 4), (num,), (num,)):
        raise DataError(f"detections: expected image_index [D], boxes [D, 4], labels [D], scores [D], got {shapes}")
    for what, values, first, last in (
        ("image_index", detections.image_index, 0, table.num_images - 1),
        ("labels", detections.labels, 1, len(table.categories)),
    ):
        wrong = np.flatnonzero((values < first) | (values > last))
        if wrong.size:
            raise DataError(
                f"detections: {what} must be in {first}..{last} for {table.name}, "
                f"got {values[wrong[0]]} in row {wrong[0]}"
            )
    wrong = np.flatnonzero(~(np.isfinite(detections.boxes).all(axis=1) & np.isfinite(detections.scores)))
    if wrong.size:
        row = wrong[0]
        raise DataError(
            f"detections: boxes and scores must be finite, got {detections.boxes[row].tolist()} with score "
            f"{detections.scores[row]} in image_id={table.image_ids[detections.image_index[row]]}"
        )


def _ground_truth(table: AnnotationTable) -> defaultdict[tuple[int, int], list[dict[str, Any]]]:
    """Give the table's boxes as COCOeval keeps them: by image and category id, in the table's order."""
    category_ids = np.array([0] + [category.category_id for category in table.categories], dtype=np.int64)
    truth: defaultdict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    columns = (
        table.image_ids[table.image_of_box()].tolist(),
        category_ids[table.labels].tolist(),
        table.boxes_xywh.tolist(),
        table.area.tolist(),
        table.crowd.astype(int).tolist(),
        (table.crowd | table.difficult).astype(int).tolist(),
    )
    for row, (image_id, category_id, bbox, area, crowd, ignore) in enumerate(zip(*columns, strict=True)):
        truth[image_id, category_id].append(
            {"id": row + 1, "bbox": bbox, "area": area, "iscrowd": crowd, "ignore": ignore}
        )
    return truth


def _mean(values: npt.NDArray[np.float64]) -> float:
    defined = values[values > UNDEFINED]
    return float(np.mean(defined)) if defined.size else UNDEFINED


def _is_key_of(value: Any, known: dict[int, int]) -> bool:
    # True == 1 would pass as a key, and a list would raise.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value in known
