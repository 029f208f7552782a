"""What is taken for what: a confusion matrix of classes and background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable
from resdet.evaluation.matching import overlaps
from resdet.types import Detections


@dataclass(frozen=True)
class ConfusionMatrix:
    """Which class's objects were detected as which class.

    Attributes:
        names: ``"background"``, then the classes in label order: a row's or column's number is its label.
        counts: int64 ``[K + 1, K + 1]``. Row i, column j: boxes of class i that were detected as class j. Row 0:
            detections of each class where there is no box; column 0: boxes of each class that were not detected.
        score_threshold: Detections of lower score are left out.
        iou_threshold: IoU that makes a match.
    """

    names: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    score_threshold: float
    iou_threshold: float

    def normalised(self) -> npt.NDArray[np.float64]:
        """Give each row divided by its sum, float64 ``[K + 1, K + 1]``; rows without any count are 0.

        A class's diagonal element is then the share of its boxes that were found and rightly named.
        """
        sums = self.counts.sum(axis=1, keepdims=True)
        shares: npt.NDArray[np.float64] = self.counts / np.maximum(sums, 1)
        return shares


def confusion_matrix(
    table: AnnotationTable,
    detections: Detections,
    *,
    score_threshold: float,
    iou_threshold: float = 0.5,
) -> ConfusionMatrix:
    """Count what was taken for what.

    In each image, the detections of at least ``score_threshold`` take their turn by falling score (equal scores in
    the order given), whatever their class. Each takes the box it overlaps most, of any class, of those that are still
    free and that it overlaps by ``iou_threshold`` or more; of equal overlaps one of its own class, then the first.
    What is left over goes to the background's row (detections) and column (boxes).

    Crowd regions and difficult objects are not counted, and neither is a left-over detection of any class that lies
    in a crowd region by the share ``iou_threshold`` of its area, or overlaps a difficult object by that IoU: there is
    an object, but nobody says how many or which.

    Unlike average precision this depends on a score threshold, and unlike COCO's matching, which is per class, it lets
    a detection take a box of another class. A class's row is therefore not its recall at that threshold.

    Args:
        table: Ground truth.
        detections: What a model found in the images of ``table``.
        score_threshold: The least score that counts; the model's working point.
        iou_threshold: In (0, 1].

    Raises:
        ValueError: If ``iou_threshold`` is outside (0, 1].
        DataError: If a detection names an image or class that ``table`` does not have, or is not finite.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold: must be in (0, 1], got {iou_threshold}")
    pairs = overlaps(table, detections, min_iou=iou_threshold, same_class=False)
    shown = detections.scores >= score_threshold
    uncounted = table.crowd | table.difficult
    excused = np.zeros(len(detections), dtype=np.bool_)
    excused[pairs.detection[uncounted[pairs.box]]] = True

    of_interest = np.flatnonzero(shown[pairs.detection] & ~uncounted[pairs.box])
    detection, box, iou = (column[of_interest] for column in (pairs.detection, pairs.box, pairs.iou))
    same_class = detections.labels[detection] == table.labels[box]
    order = np.lexsort((box, ~same_class, -iou, detection, -detections.scores[detection]))
    # Few pairs overlap by so much: a plain walk through them is short.
    box_of: dict[int, int] = {}
    taken: set[int] = set()
    for d, b in zip(detection[order].tolist(), box[order].tolist(), strict=True):
        if d not in box_of and b not in taken:
            box_of[d] = b
            taken.add(b)

    matched = np.fromiter(box_of, dtype=np.int64, count=len(box_of))
    matched_box = np.fromiter(box_of.values(), dtype=np.int64, count=len(box_of))
    shown[matched] = False
    left_over = detections.labels[shown & ~excused]
    free = ~uncounted
    free[matched_box] = False
    not_found = table.labels[free]
    row = np.concatenate([table.labels[matched_box], np.zeros_like(left_over), not_found])
    column = np.concatenate([detections.labels[matched], left_over, np.zeros_like(not_found)])
    num = table.num_classes
    counts = np.bincount(row * num + column, minlength=num * num).reshape(num, num)
    names = ("background", *(category.name for category in table.categories))
    return ConfusionMatrix(names, counts, score_threshold, iou_threshold)
