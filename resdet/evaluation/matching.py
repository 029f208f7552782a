"""Which detection found which box: the matching of COCO's evaluation, for a whole dataset at once.

This, and the metrics, curves and error analysis that stand on it, are our own instead of a library's because

* pycocotools matches image by image in Python: at val2017's size it takes 28.0 s where this takes 0.64 s, so that
  evaluating during training would wait for it. faster-coco-eval takes 2.3 s. Both give numbers;
* the curves, the errors, the confusion matrix and the report need every single match, as rows of the annotation table
  and of the detections, under rules (COCO's, VOC's, TIDE's) that no one library has together.

The tests compare every match with pycocotools', and overlaps to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError
from resdet.types import Bools, Detections, Floats, Ints

COCO_IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
"""0.5, 0.55, ..., 0.95, to the bit as pycocotools has them."""

AREA_RANGES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""COCO's object sizes: the least and the greatest area in pixels, both included."""

_PAIRS_AT_ONCE = 1 << 18  # limits the temporary arrays of ``overlaps`` to about 50 MB


@dataclass(frozen=True)
class Overlaps:
    """Pairs of a detection and a ground-truth box of one image, by detection, then by box."""

    detection: Ints  # [P], row in the detections
    box: Ints  # [P], row in the annotation table
    iou: Floats  # [P], in (0, 1]

    def best_box(self, num_detections: int, which: Bools | slice = slice(None)) -> tuple[Ints, Floats]:
        """Return each detection's most overlapped box and their IoU, int64 and float64 ``[D]``.

        Only pairs of ``which`` count. Of equal overlaps it is the first box; without any, the box is -1 and the IoU 0.
        """
        best_box, best_iou = np.full(num_detections, -1, dtype=np.int64), np.zeros(num_detections)
        detection, box, iou = self.detection[which], self.box[which], self.iou[which]
        order = np.lexsort((box, -iou, detection))
        first = order[np.flatnonzero(np.diff(detection[order], prepend=-1))]  # [detections with a pair]
        best_box[detection[first]], best_iou[detection[first]] = box[first], iou[first]
        return best_box, best_iou


@dataclass(frozen=True)
class Matches:
    """The outcome of ``match``: ``T`` IoU thresholds, ``M`` detections that count, ``N`` ground-truth boxes.

    Detections are by label, then by falling score (equal scores by image id, then in the order given). One is a hit
    where ``box >= 0`` and not ``ignored``, a false positive where ``box < 0`` and not ``ignored``. A box is found where
    ``detection_of_box >= 0``, missed where it is -1 and not ``box_ignored``.
    """

    iou_thresholds: Floats  # [T]
    detection: Ints  # [M], row in the detections
    labels: Ints  # [M], 1..K
    scores: Floats  # [M]
    rank: Ints  # [M], position among the detections of its image and class, 0 for the best score
    box: npt.NDArray[np.int32]  # [T, M], row of the matched box in the annotation table, -1 where there is none
    ignored: Bools  # [T, M], matched to a box that is ignored, or unmatched and itself outside of the area range
    detection_of_box: npt.NDArray[np.int32]  # [T, N], row in the detections, -1: none; a crowd region's last
    box_ignored: Bools  # [N], crowd, difficult or outside of the area range
    num_boxes: Ints  # [K + 1], boxes of each label that are not ignored

    @property
    def hits(self) -> Bools:
        """True positives, bool ``[T, M]``."""
        return (self.box >= 0) & ~self.ignored

    def of_label(self, label: int) -> slice:
        """Return the columns of one class, by falling score."""
        first, last = np.searchsorted(self.labels, [label, label + 1]).tolist()
        return slice(first, last)


def match(
    table: AnnotationTable,
    detections: Detections,
    *,
    iou_thresholds: Sequence[float] = COCO_IOU_THRESHOLDS,
    max_detections: int = 100,
    area_range: tuple[float, float] = AREA_RANGES["all"],
) -> Matches:
    """Match detections to ground truth by COCO's rules, per image and class.

    The ``max_detections`` best-scored detections are matched by falling score (equal scores in the order given). Each
    takes the box it overlaps most, among those that are still free and that it overlaps by the threshold or more; of
    equal overlaps the later box. Only if there is none, it may take an ignored box: a crowd region (which any number of
    detections may take; overlap is then the share of the detection inside it), a difficult object, or a box outside of
    ``area_range``. Such a detection does not count, and neither does an unmatched one outside of ``area_range``: the
    least and the greatest area in pixels, both included, of a box's ``area`` in the table or a detection's width *
    height.

    Source: ``COCOeval.evaluateImg`` of pycocotools. Deviations: matches are kept as rows instead of ids (there, id 0
    reads as "no match"), images are identified by their row in the table instead of by id, and difficult objects are
    ignored (pycocotools overwrites such a flag by ``iscrowd``).
    """
    (matches,) = match_areas(
        table, detections, iou_thresholds=iou_thresholds, max_detections=max_detections, area_ranges=(area_range,)
    )
    return matches


def match_areas(
    table: AnnotationTable,
    detections: Detections,
    *,
    iou_thresholds: Sequence[float] = COCO_IOU_THRESHOLDS,
    max_detections: int = 100,
    area_ranges: Sequence[tuple[float, float]] = tuple(AREA_RANGES.values()),
) -> tuple[Matches, ...]:
    """Match as ``match`` does for each of several area ranges (by default COCO's), sharing what they have in common."""
    thresholds = np.asarray(iou_thresholds, dtype=np.float64)
    if thresholds.ndim != 1 or not thresholds.size or not ((thresholds > 0) & (thresholds <= 1)).all():
        raise ValueError(f"iou_thresholds: must be one or more numbers in (0, 1], got {iou_thresholds}")
    if max_detections < 1:
        raise ValueError(f"max_detections: must be at least 1, got {max_detections}")
    # pycocotools' slack: an overlap of 1 that lost a bit to rounding reaches a threshold of 1.
    least = np.minimum(thresholds, 1 - 1e-10)[:, None]  # [T, 1]
    pairs = overlaps(table, detections, min_iou=float(least.min()))

    order, rank = _by_score(table, detections)
    order, rank = order[rank < max_detections], rank[rank < max_detections]  # [M]
    sides = to_xywh(detections.boxes[order])[:, 2:]
    area, own_area = table.area, sides[:, 0] * sides[:, 1]
    low, high = np.asarray(area_ranges, dtype=np.float64).reshape(-1, 2).T[:, :, None]  # [A, 1]
    box_ignored = table.crowd | table.difficult | (area < low) | (area > high)  # [A, N]
    outside = (own_area < low) | (own_area > high)  # [A, M]
    ignored = np.repeat(outside[:, None], len(least), axis=1)  # [A, T, M]
    matched = np.full(ignored.shape, -1, dtype=np.int32)  # [A, T, M]
    detection_of_box = np.full((*ignored.shape[:2], table.num_boxes), -1, dtype=np.int32)  # [A, T, N]

    for column, box, iou in _turns(pairs, order, rank, len(detections)):  # [P] each
        allowed = (iou >= least) & (table.crowd[box] | (detection_of_box[:, :, box] < 0))  # [A, T, P]
        # A detection takes its last allowed pair (the best overlap), and an ignored box only for want of others.
        preference = np.arange(len(box)) + np.where(box_ignored[:, None, box], 0, len(box))  # [A, 1, P]
        starts = np.flatnonzero(np.diff(column, prepend=-1))  # [S], the first pair of each detection
        best = np.maximum.reduceat(np.where(allowed, preference, -1), starts, axis=2)  # [A, T, S]
        a, t, taker = np.nonzero(best >= 0)
        taken, taker = box[best[a, t, taker] % len(box)], column[starts[taker]]
        matched[a, t, taker] = taken
        ignored[a, t, taker] = box_ignored[a, taken]
        detection_of_box[a, t, taken] = order[taker]

    return tuple(
        Matches(
            iou_thresholds=thresholds,
            detection=order,
            labels=detections.labels[order],
            scores=detections.scores[order],
            rank=rank,
            box=matched[a],
            ignored=ignored[a],
            detection_of_box=detection_of_box[a],
            box_ignored=box_ignored[a],
            num_boxes=np.bincount(table.labels[~box_ignored[a]], minlength=table.num_classes),
        )
        for a in range(len(area_ranges))
    )


def _turns(pairs: Overlaps, order: Ints, rank: Ints, num_detections: int) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Yield the pairs of all detections of one rank at a time: column in ``order``, box and IoU, ``[P]`` each.

    Detections of equal rank are of different images or classes and never compete for a box, so all of them are matched
    at once. Pairs are sorted by detection, then by rising IoU, then by box.
    """
    column_of = np.full(num_detections, -1, dtype=np.int64)
    column_of[order] = np.arange(len(order))
    column = column_of[pairs.detection]  # [pairs], -1 beyond max_detections
    kept = np.flatnonzero(column >= 0)
    kept = kept[np.lexsort((pairs.box[kept], pairs.iou[kept], column[kept], rank[column[kept]]))]
    ends = np.cumsum(np.bincount(rank[column[kept]])).tolist()
    for first, last in zip([0, *ends], ends, strict=False):
        turn = kept[first:last]
        if turn.size:
            yield column[turn], pairs.box[turn], pairs.iou[turn]


def overlaps(
    table: AnnotationTable,
    detections: Detections,
    *,
    min_iou: float = 0.0,
    same_class: bool = True,
    crowd_as_region: bool = True,
) -> Overlaps:
    """Return all pairs of a detection and a box of its image that share an area and overlap by ``min_iou`` or more.

    ``same_class`` keeps pairs of one class only. With ``crowd_as_region`` the overlap with a crowd region is the share
    of the detection inside it, as COCO has it, instead of the IoU.

    Source: ``bbIou`` of pycocotools' maskApi.c: the same operations on the same (x, y, width, height), so that the
    overlaps are the same to the bit.
    """
    check_detections(table, detections)
    xywh = to_xywh(detections.boxes)
    key_of_box, key = table.image_of_box(), detections.image_index  # [N], [D]
    if same_class:
        key_of_box, key = key_of_box * table.num_classes + table.labels, key * table.num_classes + detections.labels
    # A detection's candidates are a run of box_order: ``count`` boxes from ``start``, both [D].
    box_order = np.argsort(key_of_box, kind="stable")
    start = np.searchsorted(key_of_box[box_order], key, side="left")
    count = np.searchsorted(key_of_box[box_order], key, side="right") - start
    some = np.flatnonzero(count)
    start, count = start[some], count[some]
    total = np.cumsum(count)
    parts = []
    for chunk in np.split(np.arange(len(some)), np.flatnonzero(np.diff(total // _PAIRS_AT_ONCE)) + 1):
        counts = count[chunk]
        detection = np.repeat(some[chunk], counts)  # [pairs of the chunk]
        box = box_order[np.arange(len(detection)) + np.repeat(start[chunk] - np.cumsum(counts) + counts, counts)]
        crowd = table.crowd[box] if crowd_as_region else np.zeros(len(box), dtype=np.bool_)
        iou = _iou(xywh[detection], table.boxes_xywh[box], crowd)
        near = (iou > 0) & (iou >= min_iou)
        parts.append((detection[near], box[near], iou[near]))
    return Overlaps(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def check_detections(table: AnnotationTable, detections: Detections) -> None:
    """Raise a DataError if detections cannot belong to ``table``.

    That is, if an array has a wrong shape, an image index or a label is out of range, or a box or score is not finite
    (metrics would silently count it as a miss).
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


def to_xywh(boxes: Floats) -> Floats:
    """Convert boxes ``(x1, y1, x2, y2)`` to ``(x, y, width, height)``, float64 ``[D, 4]``."""
    xywh = boxes.copy()
    xywh[:, 2:] -= xywh[:, :2]
    return xywh


def _by_score(table: AnnotationTable, detections: Detections) -> tuple[Ints, Ints]:
    """Return the rows of all detections in the order of ``Matches.detection``, and the rank of each of them."""
    image_place = np.argsort(np.argsort(table.image_ids, kind="stable"))  # [I], by image id
    order = np.lexsort((image_place[detections.image_index], -detections.scores, detections.labels))
    key = (detections.image_index * table.num_classes + detections.labels)[order]
    grouped = np.argsort(key, kind="stable")
    sizes = np.unique(key, return_counts=True)[1]
    rank = np.empty_like(order)
    rank[grouped] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order, rank


def _iou(detections_xywh: Floats, boxes_xywh: Floats, crowd: Bools) -> Floats:
    """Compute the IoU of each pair of rows, float64 ``[P]``; for crowd regions, the share of the detection inside."""
    x, y, w, h = detections_xywh.T
    box_x, box_y, box_w, box_h = boxes_xywh.T
    width = np.minimum(x + w, box_x + box_w) - np.maximum(x, box_x)
    height = np.minimum(y + h, box_y + box_h) - np.maximum(y, box_y)
    inter = width * height
    area = w * h
    union = np.where(crowd, area, area + box_w * box_h - inter)
    iou: Floats = np.zeros_like(inter)
    np.divide(inter, union, out=iou, where=(width > 0) & (height > 0))
    return iou
