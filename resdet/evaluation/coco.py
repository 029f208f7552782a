"""COCO's metrics: pycocotools' numbers, computed for all images and classes at once."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError
from resdet.evaluation.curves import RECALLS, UNDEFINED, interpolated_precision
from resdet.evaluation.matching import AREA_RANGES, COCO_IOU_THRESHOLDS, match_areas, to_xywh
from resdet.types import Detections


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
        AR_1: Recall with the best detection of each image, mean over the IoU thresholds.
        AR_10: With the ten best.
        AR_max: With all detections that count.
        AR_small: As ``AR_max``, of small objects.
        AR_medium: As ``AR_max``, of medium objects.
        AR_large: As ``AR_max``, of large objects.
    """

    name: str
    num_boxes: int
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


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's twelve numbers, in [0, 1] as pycocotools gives them, or -1 where nothing defines them.

    Each is the mean over the classes that have such objects.

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
        max_detections: Detections that count per class and image, at least 1; COCO's own is 100. Crowded scenes may
            need more, and such numbers compare with no published ones. ``AR_1`` and ``AR_10`` stay what they are.

    Raises:
        ValueError: If ``max_detections`` is below 1.
        DataError: If a detection names an image or class that ``table`` does not have, or is not finite.

    Source: ``pycocotools.cocoeval.COCOeval``; the numbers are its own but for rounding in the last bits. ``match`` and
    ``interpolated_precision`` name their deviations. Here, means are taken for any ``max_detections`` (``summarize``
    answers -1 for limits other than 100).
    """
    if max_detections < 1:
        raise ValueError(f"max_detections: must be at least 1, got {max_detections}")
    # More than max_detections take nothing from those before them, and AR_10 is always of ten.
    matched = match_areas(table, detections, max_detections=max(max_detections, 10))
    labels = range(1, table.num_classes)
    precision: dict[str, npt.NDArray[np.float64]] = {}  # by size: [class, IoU, recall]
    recall: dict[str, npt.NDArray[np.float64]] = {}  # by size, and of the 1 and the 10 best: [class, IoU]
    for size, matches in zip(AREA_RANGES, matched, strict=True):
        hits, counts, best = matches.hits, ~matches.ignored, matches.rank < max_detections
        precision[size] = np.empty((len(labels), len(COCO_IOU_THRESHOLDS), len(RECALLS)))
        for k, label in enumerate(labels):
            rows, num_boxes = matches.of_label(label), int(matches.num_boxes[label])
            for t in range(len(COCO_IOU_THRESHOLDS)):
                kept = counts[t, rows] & best[rows]
                precision[size][k, t] = interpolated_precision(hits[t, rows][kept], num_boxes)
        limits = {size: max_detections} | ({"1": 1, "10": 10} if size == "all" else {})
        for name, limit in limits.items():
            recall[name] = _recall(hits & (matches.rank < limit), matches.labels, matches.num_boxes)

    counted = np.bincount(table.labels[~(table.crowd | table.difficult)], minlength=table.num_classes)
    at75 = COCO_IOU_THRESHOLDS.index(0.75)

    def numbers(which: slice) -> dict[str, float]:
        return {
            "AP": _mean(precision["all"][which]),
            "AP50": _mean(precision["all"][which, 0]),
            "AP75": _mean(precision["all"][which, at75]),
            "AP_small": _mean(precision["small"][which]),
            "AP_medium": _mean(precision["medium"][which]),
            "AP_large": _mean(precision["large"][which]),
            "AR_1": _mean(recall["1"][which]),
            "AR_10": _mean(recall["10"][which]),
            "AR_max": _mean(recall["all"][which]),
            "AR_small": _mean(recall["small"][which]),
            "AR_medium": _mean(recall["medium"][which]),
            "AR_large": _mean(recall["large"][which]),
        }

    per_class = tuple(
        ClassMetrics(name=c.name, num_boxes=int(counted[c.label]), **numbers(slice(c.label - 1, c.label)))
        for c in table.categories
    )
    return CocoMetrics(**numbers(slice(None)), per_class=per_class, max_detections=max_detections)


def detections_to_coco(table: AnnotationTable, detections: Detections) -> list[dict[str, Any]]:
    """Give detections in COCO's result format.

    Each has ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``.

    Args:
        table: The table that ``detections.image_index`` points into; its own image and category ids are written.
        detections: Any order; it is kept.
    """
    category_ids = np.array([0] + [category.category_id for category in table.categories], dtype=np.int64)
    columns = (
        table.image_ids[detections.image_index].tolist(),
        category_ids[detections.labels].tolist(),
        to_xywh(detections.boxes).tolist(),
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


def _recall(
    hits: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64], num_boxes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Give the share of each class's boxes that are found at each threshold, float64 ``[K, T]``; -1 without boxes."""
    found = np.stack([np.bincount(labels[row], minlength=len(num_boxes)) for row in hits], axis=1)
    recall = np.full(found.shape, UNDEFINED)
    np.divide(found, num_boxes[:, None], out=recall, where=num_boxes[:, None] > 0)
    return recall[1:]


def _mean(values: npt.NDArray[np.float64]) -> float:
    defined = values[values > UNDEFINED]
    return float(np.mean(defined)) if defined.size else UNDEFINED


def _is_key_of(value: Any, known: dict[int, int]) -> bool:
    # True == 1 would pass as a key, and a list would raise.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value in known
