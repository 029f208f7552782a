"""Which class is mistaken for which: a confusion matrix of classes and background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resdet.data.annotations import AnnotationTable
from resdet.evaluation.matching import overlaps
from resdet.types import Detections, Floats, Ints


@dataclass(frozen=True)
class ConfusionMatrix:
    """Which class's objects were detected as which class; a row's or column's number is its label."""

    names: tuple[str, ...]  # "background", then the classes in label order
    # int64 [K + 1, K + 1], row i, column j: boxes of class i that were detected as class j. Row 0: detections where
    # there is no box; column 0: boxes that were not detected.
    counts: Ints
    score_threshold: float  # detections of lower score are left out
    iou_threshold: float

    def normalised(self) -> Floats:
        """Divide each row by its sum, float64 ``[K + 1, K + 1]``; rows without any count are 0.

        A class's diagonal element is then the share of its boxes that were found as that class.
        """
        sums = self.counts.sum(axis=1, keepdims=True)
        shares: Floats = self.counts / np.maximum(sums, 1)
        return shares


def confusion_matrix(
    table: AnnotationTable, detections: Detections, *, score_threshold: float, iou_threshold: float = 0.5
) -> ConfusionMatrix:
    """Count which class was detected as which.

    In each image, the detections of at least ``score_threshold`` are matched by falling score (equal scores in the
    order given), whatever their class. Each takes the box it overlaps most, of any class, among those that are still
    free and that it overlaps by ``iou_threshold`` or more; of equal overlaps one of its own class, then the first.
    Unmatched detections are counted in the background's row, unmatched boxes in its column.

    Crowd regions and difficult objects are not counted, and neither is an unmatched detection of any class with at
    least the share ``iou_threshold`` of its area in a crowd region, or with that IoU with a difficult object: objects
    are there, but the ground truth does not say how many or of which kind.

    Unlike average precision this depends on a score threshold, and unlike COCO's matching, which is per class, it lets
    a detection take a box of another class. A class's row is therefore not its recall at that threshold.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold: must be in (0, 1], got {iou_threshold}")
    pairs = overlaps(table, detections, min_iou=iou_threshold, same_class=False)
    shown = detections.scores >= score_threshold  # [D]
    uncounted = table.crowd | table.difficult  # [N]
    excused = np.zeros(len(detections), dtype=np.bool_)
    excused[pairs.detection[uncounted[pairs.box]]] = True

    of_interest = np.flatnonzero(shown[pairs.detection] & ~uncounted[pairs.box])
    detection, box, iou = (column[of_interest] for column in (pairs.detection, pairs.box, pairs.iou))
    same_class = detections.labels[detection] == table.labels[box]
    order = np.lexsort((box, ~same_class, -iou, detection, -detections.scores[detection]))
    # Few pairs overlap by so much: a plain loop over them is short.
    box_of: dict[int, int] = {}
    taken: set[int] = set()
    for d, b in zip(detection[order].tolist(), box[order].tolist(), strict=True):
        if d not in box_of and b not in taken:
            box_of[d] = b
            taken.add(b)

    matched, matched_box = np.array(list(box_of.items()), dtype=np.int64).reshape(-1, 2).T
    made_up, missed = shown & ~excused, ~uncounted  # [D], [N]
    made_up[matched] = False
    missed[matched_box] = False
    counts = np.zeros((table.num_classes, table.num_classes), dtype=np.int64)
    np.add.at(counts, (table.labels[matched_box], detections.labels[matched]), 1)
    np.add.at(counts[0], detections.labels[made_up], 1)
    np.add.at(counts[:, 0], table.labels[missed], 1)
    names = ("background", *(category.name for category in table.categories))
    return ConfusionMatrix(names, counts, score_threshold, iou_threshold)
