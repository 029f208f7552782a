"""Pascal VOC's average precision, by the rules of its development kit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resdet.data.annotations import AnnotationTable
from resdet.evaluation.curves import UNDEFINED, mean_of_defined
from resdet.evaluation.matching import overlaps
from resdet.types import Bools, Detections


@dataclass(frozen=True)
class VocClassMetrics:
    """One class's row of the VOC table; AP in [0, 1], or -1 where the class has no ground truth."""

    name: str
    num_boxes: int  # ground truth that counts, without difficult objects
    AP: float  # area under the interpolated precision-recall curve (VOC2010 and later)
    AP_11point: float  # mean precision at recall 0, 0.1, ..., 1 (VOC2007 to VOC2009)


@dataclass(frozen=True)
class VocMetrics:
    """VOC's mean AP over the classes that have ground truth, by both interpolations; -1 if no class has any."""

    AP: float
    AP_11point: float  # what tables for VOC2007 usually report
    iou_threshold: float
    per_class: tuple[VocClassMetrics, ...]  # in label order

    def as_dict(self) -> dict[str, float]:
        """Return ``voc_AP50`` and ``voc_AP50_11point``; the number in the key is the IoU threshold in percent."""
        key = f"voc_AP{100 * self.iou_threshold:g}"
        return {key: self.AP, f"{key}_11point": self.AP_11point}


def voc_metrics(table: AnnotationTable, detections: Detections, *, iou_threshold: float = 0.5) -> VocMetrics:
    """Compute VOC's average precision over every image of ``table``.

    Per class, detections are matched by falling score (equal scores in the order given), each to the box of its class
    and image that it overlaps most: a hit if that IoU reaches ``iou_threshold`` and no better-scored detection had that
    box, a false positive otherwise, even if another, free box overlaps enough. A match with a difficult object (or a
    crowd region of COCO data) does not count. A class without ground truth has AP -1 and stays out of the mean.

    IoU is computed in continuous coordinates. The development kit adds 1 to every width and height of its 1-based,
    inclusive corners; reading VOC data into continuous coordinates took 1 off ``xmin`` and ``ymin``, so widths here
    are the kit's widths and the IoU is the same number wherever the kit's corners are integers.

    Source: VOCdevkit ``VOCevaldet.m`` (2007 and 2012). IoU equal to the threshold matches, as there and unlike in
    py-faster-rcnn's ``voc_eval``. Deviation: the eleven recalls are the doubles nearest to k / 10, so that 3 of 10
    objects reach the recall 0.3 (``0:0.1:1`` misses it by the last bit).
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold: must be in (0, 1], got {iou_threshold}")
    ignored = table.crowd | table.difficult  # [N]
    num_boxes = np.bincount(table.labels[~ignored], minlength=table.num_classes)  # [K + 1]
    order = np.argsort(-detections.scores, kind="stable")
    labels = detections.labels[order]
    pairs = overlaps(table, detections, min_iou=iou_threshold, crowd_as_region=False)
    best_box = pairs.best_box(len(detections))[0][order]  # [D], -1 where none overlaps by the threshold

    nothing = np.append(ignored, False)[best_box]  # [D], matches with boxes that do not count
    first = np.zeros(len(labels), dtype=np.bool_)
    candidates = np.flatnonzero((best_box >= 0) & ~nothing)
    first[candidates[np.unique(best_box[candidates], return_index=True)[1]]] = True

    per_class = []
    for category in table.categories:
        count = int(num_boxes[category.label])
        hits = first[(labels == category.label) & ~nothing]
        area, eleven = _average_precision(hits, count) if count else (UNDEFINED, UNDEFINED)
        per_class.append(VocClassMetrics(category.name, count, area, eleven))
    both = np.array([(row.AP, row.AP_11point) for row in per_class]).reshape(-1, 2)  # [K, 2]
    return VocMetrics(mean_of_defined(both[:, 0]), mean_of_defined(both[:, 1]), iou_threshold, tuple(per_class))


def _average_precision(hits: Bools, num_boxes: int) -> tuple[float, float]:
    """Compute the area under the interpolated curve and the 11-point mean of one class, from hits by falling score."""
    if not hits.size:
        return 0.0, 0.0
    num_hits = np.cumsum(hits)
    recall = num_hits / num_boxes
    precision = num_hits / np.arange(1, hits.size + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
    area = float(np.sum(np.diff(recall, prepend=0.0) * precision))
    at = np.searchsorted(recall, np.arange(11) / 10, side="left")
    return area, float(np.append(precision, 0.0)[at].mean())
