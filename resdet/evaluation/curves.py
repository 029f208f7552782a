"""Precision against recall, the mean of which is COCO's AP, and the score threshold that balances the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resdet.data.annotations import AnnotationTable
from resdet.evaluation.matching import COCO_IOU_THRESHOLDS, match
from resdet.types import Bools, Detections, Floats, Ints

UNDEFINED = -1.0
"""pycocotools' value of a metric that has no ground truth to measure it on; it never enters a mean."""

RECALLS: Floats = np.linspace(0.0, 1.0, 101)
"""The recalls 0, 0.01, ..., 1 at which COCO reads the interpolated precision, to the bit as pycocotools has them."""


@dataclass(frozen=True)
class BestF1:
    """Where F1, the harmonic mean of precision and recall, is highest; -1 without ground truth, 0 without any hit."""

    f1: float  # 2 TP / (detections + boxes) of the detections whose score is at least the threshold, in [0, 1]
    threshold: float | None  # the highest of those with equal F1; None if F1 is 0 or -1
    precision: float  # at that threshold, in [0, 1]
    recall: float  # at that threshold, in [0, 1]


@dataclass(frozen=True)
class Curve:
    """Precision against recall at one IoU threshold: one point per detection that counts, by falling score."""

    name: str  # the class, or "all" for all of them pooled
    iou_threshold: float
    num_boxes: int  # ground truth that counts
    hits: Bools  # [P], hit or false positive
    scores: Floats  # [P], falling; a threshold at ``scores[i]`` gives point ``i``, or the last of equal score

    @property
    def precision(self) -> Floats:
        """Hits among the detections so far, float64 ``[P]``."""
        precision: Floats = np.cumsum(self.hits) / np.arange(1, len(self.hits) + 1)
        return precision

    @property
    def recall(self) -> Floats:
        """Boxes found so far, float64 ``[P]``; -1 without ground truth."""
        if not self.num_boxes:
            return np.full(len(self.hits), UNDEFINED)
        recall: Floats = np.cumsum(self.hits) / self.num_boxes
        return recall

    @property
    def AP(self) -> float:  # noqa: N802 - the metric's name
        """COCO's average precision: the mean of ``interpolated_precision``, in [0, 1]; -1 without ground truth."""
        return float(interpolated_precision(self.hits, self.num_boxes).mean())

    def interpolated(self) -> tuple[Floats, Floats]:
        """Return precision and score at the 101 ``RECALLS``, float64 ``[101]`` each.

        The precision is that of ``interpolated_precision``. The score is the threshold that first reaches the recall,
        NaN where none does.
        """
        num_hits, scores = int(np.count_nonzero(self.hits)), np.full(len(RECALLS), np.nan)
        at = _first_hits(num_hits, self.num_boxes)
        reached = at < num_hits
        scores[reached] = self.scores[self.hits][at[reached]]
        return interpolated_precision(self.hits, self.num_boxes), scores

    def best_f1(self) -> BestF1:
        """Return the score threshold of the highest F1, out of the detections' own scores.

        A threshold keeps or drops detections of equal score together, so only the last of them is considered.
        """
        if not self.num_boxes:
            return BestF1(UNDEFINED, None, UNDEFINED, UNDEFINED)
        if not self.hits.any():
            return BestF1(0.0, None, 0.0, 0.0)
        last = np.flatnonzero(np.diff(self.scores, append=-np.inf))
        f1 = 2 * np.cumsum(self.hits)[last] / (last + 1 + self.num_boxes)
        best = int(np.argmax(f1))
        at = int(last[best])
        return BestF1(float(f1[best]), float(self.scores[at]), float(self.precision[at]), float(self.recall[at]))


@dataclass(frozen=True)
class Curves:
    """Precision-recall curves of a dataset at ``T`` IoU thresholds.

    Unlike a mean over classes, a pooled curve counts each box once, and detections of classes without ground truth as
    the false positives they are.
    """

    iou_thresholds: tuple[float, ...]
    per_class: tuple[tuple[Curve, ...], ...]  # [t][k]: of threshold t and of the class with label k + 1
    pooled: tuple[Curve, ...]  # [t]: all classes' detections on one scale of scores


def precision_recall(
    table: AnnotationTable,
    detections: Detections,
    *,
    iou_thresholds: Sequence[float] = COCO_IOU_THRESHOLDS,
    max_detections: int = 100,
) -> Curves:
    """Compute precision-recall curves over every image of ``table``, matched by COCO's rules.

    ``coco_metrics``'s AP of a class is the mean of its curves' ``AP``. The threshold that ``best_f1`` of a class's
    curve, or of the pooled one, returns at IoU 0.5 is a sound default for showing detections.
    """
    matches = match(table, detections, iou_thresholds=iou_thresholds, max_detections=max_detections)
    columns = np.arange(len(matches.scores))  # [M]
    groups = [("all", int(matches.num_boxes.sum()), np.argsort(-matches.scores, kind="stable"))]
    for label, category in enumerate(table.categories, start=1):
        groups.append((category.name, int(matches.num_boxes[label]), columns[matches.of_label(label)]))
    curves = []  # of each threshold: the pooled one, then one per class
    for threshold, hits, ignored in zip(matches.iou_thresholds.tolist(), matches.hits, matches.ignored, strict=True):
        kept = [(name, num_boxes, rows[~ignored[rows]]) for name, num_boxes, rows in groups]
        curves.append([Curve(name, threshold, num, hits[rows], matches.scores[rows]) for name, num, rows in kept])
    per_class = tuple(tuple(of_classes) for _, *of_classes in curves)
    return Curves(tuple(matches.iou_thresholds.tolist()), per_class, tuple(pooled for pooled, *_ in curves))


def best_score_threshold(table: AnnotationTable, detections: Detections) -> float | None:
    """Return the score threshold of the highest F1 at IoU 0.5, all classes pooled: from it on detections are shown.

    It is one of the detections' scores; None if there is no ground truth, or none of it was found.
    """
    return precision_recall(table, detections, iou_thresholds=[0.5]).pooled[0].best_f1().threshold


def interpolated_precision(hits: Bools, num_boxes: int) -> Floats:
    """Compute the best precision at each of the 101 ``RECALLS`` or a higher recall, float64 ``[101]``.

    It is 0 where the recall is not reached and -1 without ground truth. ``hits``, bool ``[P]``, says of the detections
    that count, by falling score, which are hits.

    Source: ``COCOeval.accumulate`` of pycocotools. Deviation: it adds 2.2e-16 to the number of detections against a
    division by zero, by which a single perfect detection falls short of precision 1 in the last bit.
    """
    if not num_boxes:
        return np.full(len(RECALLS), UNDEFINED)
    return interpolated_precisions(np.flatnonzero(hits)[None] + 1, num_boxes).ravel()


def interpolated_precisions(number: Ints, num_boxes: int) -> Floats:
    """Compute the ``interpolated_precision`` of ``S`` curves of ``T`` hits each at once, float64 ``[S, 101]``.

    ``number``, int64 ``[S, T]``, says how many detections count down to each hit, itself included.
    """
    num_hits = np.arange(1, number.shape[1] + 1)
    at = _first_hits(len(num_hits), num_boxes)
    at = at[at < len(num_hits)]
    interpolated = np.zeros((len(number), len(RECALLS)))
    if at.size:
        # Precision rises at hits only, so the best one from any point on is at a hit: take the best of the hits between
        # two recalls, then of all to the right.
        best = np.maximum.reduceat(num_hits / number, at, axis=1)
        interpolated[:, : len(at)] = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]
    return interpolated


def _first_hits(num_hits: int, num_boxes: int) -> Ints:
    """Return the index of the hit that first reaches each of ``RECALLS``, int64 ``[101]``; ``num_hits`` if none."""
    recall = np.arange(1, num_hits + 1) / max(num_boxes, 1)
    return np.searchsorted(recall, RECALLS, side="left")


def mean_of_defined(values: Floats) -> float:
    """Return the mean of those values that are not ``UNDEFINED``, or ``UNDEFINED`` if none is."""
    defined = values[values > UNDEFINED]
    return float(np.mean(defined)) if defined.size else UNDEFINED
