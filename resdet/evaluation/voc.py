"""Pascal VOC's average precision, by the rules of its development kit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable
from resdet.evaluation.coco import UNDEFINED, check_detections
from resdet.types import Detections


@dataclass(frozen=True)
class VocClassMetrics:
    """One class's row of the VOC table; AP in [0, 1], or -1 where the class has no ground truth.

    Attributes:
        name: Class name.
        num_boxes: Ground-truth boxes that count, without difficult ones.
        AP: Area under the interpolated precision-recall curve (VOC2010 and later).
        AP_11point: Mean precision at recall 0, 0.1, ..., 1 (VOC2007 to VOC2009).
    """

    name: str
    num_boxes: int
    AP: float
    AP_11point: float


@dataclass(frozen=True)
class VocMetrics:
    """VOC's mean AP over the classes that have ground truth, both interpolations; -1 where no class has any.

    Attributes:
        AP: VOC2010 and later: area under the interpolated precision-recall curve.
        AP_11point: VOC2007 to VOC2009: mean precision at eleven recalls. What tables for VOC2007 usually report.
        iou_threshold: IoU that makes a match.
        per_class: One row per class, in label order.
    """

    AP: float
    AP_11point: float
    iou_threshold: float
    per_class: tuple[VocClassMetrics, ...]

    def as_dict(self) -> dict[str, float]:
        """Give ``voc_AP50`` and ``voc_AP50_11point``; the number in the key is the IoU threshold in percent."""
        key = f"voc_AP{100 * self.iou_threshold:g}"
        return {key: self.AP, f"{key}_11point": self.AP_11point}


def voc_metrics(table: AnnotationTable, detections: Detections, *, iou_threshold: float = 0.5) -> VocMetrics:
    """Compute VOC's average precision over every image of ``table``.

    Per class, detections are taken by falling score (equal scores in the order given). Each is matched to the box of
    its class and image that it overlaps most: a hit if that IoU reaches ``iou_threshold`` and no better-scored
    detection had that box, a false positive otherwise - also where another, free box overlaps enough. A match with a
    difficult object (or a crowd region of COCO data) counts as nothing. A class without ground truth has AP -1 and
    stays out of the mean.

    IoU is computed in continuous coordinates. The development kit adds 1 to every width and height of its 1-based,
    inclusive corners; reading VOC data into continuous coordinates took 1 off ``xmin`` and ``ymin``, so widths here
    are the kit's widths and the IoU is the same number wherever the kit's corners are integers.

    Args:
        table: Ground truth.
        detections: What a model found in the images of ``table``.
        iou_threshold: In (0, 1]; VOC's is 0.5.

    Raises:
        ValueError: If ``iou_threshold`` is outside (0, 1].
        DataError: If a detection names an image or class that ``table`` does not have, or is not finite.

    Source: VOCdevkit ``VOCevaldet.m`` (2007 and 2012). IoU equal to the threshold matches, as there and unlike in
    py-faster-rcnn's ``voc_eval``. Deviation: the eleven recalls are the doubles nearest to k / 10, so that 3 of 10
    objects reach the recall 0.3 (``0:0.1:1`` misses it by the last bit).
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold: must be in (0, 1], got {iou_threshold}")
    check_detections(table, detections)
    ignored = table.crowd | table.difficult
    num_boxes = np.bincount(table.labels[~ignored], minlength=table.num_classes)
    order = np.argsort(-detections.scores, kind="stable")
    labels = detections.labels[order]
    best_box, best_iou = _best_overlaps(table, detections)
    best_box, matched = best_box[order], best_iou[order] >= iou_threshold

    nothing = matched & ignored[best_box] if table.num_boxes else matched
    first = np.zeros(len(labels), dtype=np.bool_)
    candidates = np.flatnonzero(matched & ~nothing)
    first[candidates[np.unique(best_box[candidates], return_index=True)[1]]] = True

    per_class = []
    for category in table.categories:
        count = int(num_boxes[category.label])
        hits = first[(labels == category.label) & ~nothing]
        area, eleven = _average_precision(hits, count) if count else (UNDEFINED, UNDEFINED)
        per_class.append(VocClassMetrics(category.name, count, area, eleven))
    defined = [row for row in per_class if row.num_boxes]
    return VocMetrics(
        AP=float(np.mean([row.AP for row in defined])) if defined else UNDEFINED,
        AP_11point=float(np.mean([row.AP_11point for row in defined])) if defined else UNDEFINED,
        iou_threshold=iou_threshold,
        per_class=tuple(per_class),
    )


def _average_precision(hits: npt.NDArray[np.bool_], num_boxes: int) -> tuple[float, float]:
    """Give the area under the interpolated curve and the 11-point mean of one class's detections.

    Args:
        hits: bool ``[D]``, by falling score: hit or false positive.
        num_boxes: Boxes there were to find, at least 1.
    """
    if not hits.size:
        return 0.0, 0.0
    num_hits = np.cumsum(hits)
    recall = num_hits / num_boxes
    precision = num_hits / np.arange(1, hits.size + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
    area = float(np.sum(np.diff(recall, prepend=0.0) * precision))
    at = np.searchsorted(recall, np.arange(11) / 10, side="left")
    return area, float(np.append(precision, 0.0)[at].mean())


def _best_overlaps(
    table: AnnotationTable, detections: Detections
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Give each detection's most overlapped box of its class and image.

    Returns:
        Row of that box in the table, int64 ``[D]`` (the first of equals; 0 where there is none), and its IoU, float64
        ``[D]`` (0 where there is none).
    """
    # All pairs of one image and class, one after the other: D detections times the few boxes each can match.
    box_key = table.image_of_box() * table.num_classes + table.labels
    box_order = np.argsort(box_key, kind="stable")
    key = detections.image_index * table.num_classes + detections.labels
    start = np.searchsorted(box_key[box_order], key, side="left")
    count = np.searchsorted(box_key[box_order], key, side="right") - start
    row, iou = np.zeros(len(key), dtype=np.int64), np.zeros(len(key))
    some = np.flatnonzero(count)
    if not some.size:
        return row, iou
    start, count = start[some], count[some]
    segment = np.cumsum(count) - count
    box = box_order[np.repeat(start - segment, count) + np.arange(count.sum())]
    pair_iou = _iou(detections.boxes[np.repeat(some, count)], table.boxes_xywh[box])
    best = np.maximum.reduceat(pair_iou, segment)
    place = np.where(pair_iou == np.repeat(best, count), np.arange(len(box)), len(box))
    row[some], iou[some] = box[np.minimum.reduceat(place, segment)], best
    return row, iou


def _iou(boxes: npt.NDArray[np.float64], boxes_xywh: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Give the IoU of row i of one with row i of the other, float64 ``[P]``; 0 where either has no area."""
    low = np.maximum(boxes[:, :2], boxes_xywh[:, :2])
    high = np.minimum(boxes[:, 2:], boxes_xywh[:, :2] + boxes_xywh[:, 2:])
    inter = np.prod(np.clip(high - low, 0, None), axis=1)
    union = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(boxes_xywh[:, 2:], axis=1) - inter
    iou: npt.NDArray[np.float64] = np.zeros_like(inter)
    np.divide(inter, union, out=iou, where=inter > 0)
    return iou
