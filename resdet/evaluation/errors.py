"""Why an AP is what it is: the errors of a detector by kind, what each kind costs, and the images that cost most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable
from resdet.evaluation.curves import UNDEFINED, interpolated_precisions
from resdet.evaluation.matching import Matches, Overlaps, match, overlaps
from resdet.types import Detections

ERROR_KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
"""TIDE's six main errors, in the order that ``Errors.kind`` counts them."""

_COSTS = (*ERROR_KINDS, "false positives", "false negatives")
_CLASSIFICATION, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED, _FALSE_POSITIVE, _FALSE_NEGATIVE = range(8)
_GONE, _NEW, _NOT_COUNTED = range(3)  # what a fix does: a false positive goes, a hit comes, a box does not count
_NUMBERS_AT_ONCE = 1 << 20  # what one step of ``_fixed`` holds: some arrays of 8 MB


@dataclass(frozen=True)
class Errors:
    """Every error, one row each: by image, then by falling score, missed objects last.

    Attributes:
        kind: int8 ``[E]``, index into ``ERROR_KINDS``.
        image_index: int64 ``[E]``, row of the image in the annotation table.
        label: int64 ``[E]``, 1..K: the detection's class; the object's for a missed one.
        detection: int64 ``[E]``, row in the detections; -1 for a missed object.
        box: int64 ``[E]``, row in the annotation table of the box that the error is about; -1 for background. It is
            of the detection's class for localisation and duplicate, of another for classification and both.
        iou: float64 ``[E]``, of that detection with that box; 0 where there are not both.
        score: float64 ``[E]``, the detection's; 0 for a missed object.
        becomes_hit: bool ``[E]``: fixed, the detection finds ``box``. Every other false positive only goes away.
    """

    kind: npt.NDArray[np.int8]
    image_index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    detection: npt.NDArray[np.int64]
    box: npt.NDArray[np.int64]
    iou: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]
    becomes_hit: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.kind)

    def of_image(self, index: int) -> slice:
        """Give the rows of the errors in image ``index``."""
        first, last = np.searchsorted(self.image_index, [index, index + 1]).tolist()
        return slice(first, last)


@dataclass(frozen=True)
class ErrorCost:
    """One kind of error.

    Attributes:
        kind: One of ``ERROR_KINDS``, or ``"false positives"`` or ``"false negatives"``.
        count: How many there are.
        dAP: How much AP rises when they, and nothing else, are fixed, in [0, 1]; -1 where AP is undefined.
    """

    kind: str
    count: int
    dAP: float  # noqa: N815 - the name it goes by


@dataclass(frozen=True)
class ClassErrors:
    """One class's errors.

    Attributes:
        AP: In [0, 1], or -1 for a class without boxes that count.
        kinds: The six of ``ERROR_KINDS``. A count is of detections of this class (missed: of objects of it), while
            ``dAP`` is the rise of this class's AP when the errors of all classes are fixed: a dog found as a cat
            is the cat's error, and fixing it lifts both.
        false_positives: As in ``ErrorAnalysis``.
        false_negatives: As in ``ErrorAnalysis``.
        name: Class name.
        num_boxes: Ground-truth boxes that count, without crowd regions and difficult objects.
    """

    AP: float
    kinds: tuple[ErrorCost, ...]
    false_positives: ErrorCost
    false_negatives: ErrorCost
    name: str
    num_boxes: int


@dataclass(frozen=True)
class ErrorAnalysis:
    """What ``find_errors`` finds.

    Attributes:
        AP: COCO's AP at ``iou_threshold``, in [0, 1], mean over the classes that have boxes; -1 if none has.
        kinds: The six of ``ERROR_KINDS``, each fixed alone. ``dAP`` is the mean of the classes' and need not
            add up to 1 - AP: errors hide each other.
        false_positives: All unmatched detections, fixed by taking them away.
        false_negatives: All boxes that were not found, fixed by not counting them.
        iou_threshold: IoU that makes a match.
        background_threshold: IoU up to which a detection has nothing to do with a box.
        max_detections: Detections that count per class and image.
        per_class: One row per class, in label order.
        errors: Every single error.
        image_loss: float64 ``[I]``: how much ``AP`` rises when all errors of that image, and no others, are fixed.
    """

    AP: float
    kinds: tuple[ErrorCost, ...]
    false_positives: ErrorCost
    false_negatives: ErrorCost
    iou_threshold: float
    background_threshold: float
    max_detections: int
    per_class: tuple[ClassErrors, ...]
    errors: Errors
    image_loss: npt.NDArray[np.float64]

    def worst_images(self, num_images: int) -> npt.NDArray[np.int64]:
        """Give the indices of the images that cost most AP, worst first; images that cost nothing are left out."""
        order = np.argsort(-self.image_loss, kind="stable")[:num_images]
        return order[self.image_loss[order] > 0]


def find_errors(
    table: AnnotationTable,
    detections: Detections,
    *,
    iou_threshold: float = 0.5,
    background_threshold: float = 0.1,
    max_detections: int = 100,
) -> ErrorAnalysis:
    """Say for every false positive and every unfound object what went wrong, and what AP that costs.

    Boxes and detections are matched as in ``coco_metrics``, so that ``AP`` is its AP at ``iou_threshold``. With
    ``t_f`` for ``iou_threshold`` and ``t_b`` for ``background_threshold``, a false positive is the first of these
    that it can be:

    * localisation: its best IoU with a box of its class is in [t_b, t_f];
    * classification: its best IoU with a box of another class is t_f or more;
    * duplicate: its best IoU with a box of its class is above t_f (a better-scored detection has that box);
    * both: it overlaps a box of another class by more than t_b;
    * background: it overlaps no box by more than t_b.

    Crowd regions and difficult objects are no boxes here, and a detection that evaluation ignores for their sake is an
    error only where fixing it would find an object that nothing found. An object is missed if no detection has it and
    no localisation or classification error is about it.

    Each kind is fixed alone, as by an oracle. A localisation or classification error becomes a hit on its box (of the
    box's class, with its score), if no detection has that box and no better-scored error of the two kinds is about
    it; otherwise it goes away, as do the kinds that remain. A missed object is not counted. A class with nothing left
    to find has AP 1 then, or 0 if it still has false positives. Fixing all six kinds at once gives an AP of 1.

    ``image_loss`` is exact, not an estimate: for each image and class, the curve is integrated again with the image's
    six kinds of errors fixed.

    Args:
        table: Ground truth.
        detections: What a model found in the images of ``table``.
        iou_threshold: In (0, 1]. AP over .50:.05:.95 is the mean of ten analyses, one for each threshold.
        background_threshold: Above 0, below ``iou_threshold``.
        max_detections: Detections that count per class and image, at least 1.

    Raises:
        ValueError: If an option is out of its range.
        DataError: If a detection names an image or class that ``table`` does not have, or is not finite.

    Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, sections 2.2 to
    2.4; the order of the kinds and the fixes are tidecv 1.0.1's. Deviations from tidecv:

    * matching, order of equal scores, the cut at ``max_detections`` (tidecv: per image) and the recalls at which
      precision is taken are those of COCO's evaluation; tidecv moves errors before hits of equal score when it fixes;
    * classes without boxes stay out of the mean (tidecv: AP 0 if anything was detected), and so a class stays in the
      mean when fixing leaves nothing to find in it (tidecv: dropped, unless false positives are left);
    * ignored detections are counted only where a fix changes something (tidecv counts all);
    * numbers are in [0, 1] (tidecv: percent).
    """
    if not 0 < background_threshold < iou_threshold:
        raise ValueError(
            f"background_threshold: must be above 0 and below iou_threshold ({iou_threshold}), "
            f"got {background_threshold}"
        )
    matches = match(table, detections, iou_thresholds=[iou_threshold], max_detections=max_detections)
    errors, place = _errors(table, detections, matches, iou_threshold, background_threshold)
    curves = _curves(table, matches, place)
    nothing = [np.zeros(0, dtype=np.int64)]
    before = np.concatenate([curve.average_precision(nothing, nothing, 0) for curve in curves])

    false_positive = matches.detection[(matches.box[0] < 0) & ~matches.ignored[0]]
    not_found = np.flatnonzero((matches.detection_of_box[0] < 0) & ~matches.box_ignored)
    on_curve = np.zeros(len(detections), dtype=np.bool_)
    on_curve[matches.detection] = ~matches.ignored[0]
    fixes_of_kind = [
        *_fixes(table, errors, errors.kind.astype(np.int64), place, on_curve),
        _fix(_GONE, _FALSE_POSITIVE, detections.labels[false_positive], place[false_positive]),
        _fix(_NOT_COUNTED, _FALSE_NEGATIVE, table.labels[not_found], not_found),
    ]
    after = np.tile(before, (len(_COSTS), 1))
    for label, groups, values in _fixed(curves, fixes_of_kind):
        after[groups, label] = values
    counts = np.zeros_like(after, dtype=np.int64)
    np.add.at(counts, (errors.kind, errors.label), 1)
    np.add.at(counts[_FALSE_POSITIVE], detections.labels[false_positive], 1)
    np.add.at(counts[_FALSE_NEGATIVE], table.labels[not_found], 1)

    defined = np.flatnonzero(matches.num_boxes)
    image_loss = np.zeros(table.num_images)
    for label, images, values in _fixed(curves, _fixes(table, errors, errors.image_index, place, on_curve)):
        if matches.num_boxes[label]:
            image_loss[images] += (values - before[label]) / len(defined)

    def costs(labels: npt.NDArray[np.int64]) -> tuple[float, tuple[ErrorCost, ...], ErrorCost, ErrorCost]:
        with_boxes = labels[matches.num_boxes[labels] > 0]
        rise = (after - before)[:, with_boxes].mean(axis=1) if with_boxes.size else np.full(len(_COSTS), UNDEFINED)
        rows = zip(_COSTS, counts[:, labels].sum(axis=1).tolist(), rise.tolist(), strict=True)
        *kinds, false_positives, false_negatives = (ErrorCost(*row) for row in rows)
        value = float(before[with_boxes].mean()) if with_boxes.size else UNDEFINED
        return value, tuple(kinds), false_positives, false_negatives

    return ErrorAnalysis(
        *costs(np.arange(1, table.num_classes)),
        iou_threshold=iou_threshold,
        background_threshold=background_threshold,
        max_detections=max_detections,
        per_class=tuple(
            ClassErrors(*costs(np.array([category.label])), category.name, int(matches.num_boxes[category.label]))
            for category in table.categories
        ),
        errors=errors,
        image_loss=image_loss,
    )


def _errors(
    table: AnnotationTable,
    detections: Detections,
    matches: Matches,
    iou_threshold: float,
    background_threshold: float,
) -> tuple[Errors, npt.NDArray[np.int64]]:
    """Find every error; give each detection's place by falling score as well, int64 ``[D]``."""
    # Evaluation's order, for all classes: a detection that changes its class has its place there too.
    image_place = np.empty(table.num_images, dtype=np.int64)
    image_place[np.argsort(table.image_ids, kind="stable")] = np.arange(table.num_images)
    place = np.empty(len(detections), dtype=np.int64)
    place[np.lexsort((image_place[detections.image_index], -detections.scores))] = np.arange(len(detections))

    pairs = overlaps(table, detections, min_iou=background_threshold, same_class=False)
    judged = ~matches.box_ignored[pairs.box]
    same_class = detections.labels[pairs.detection] == table.labels[pairs.box]
    own_box, own_iou = _best(pairs, judged & same_class, len(detections))
    other_box, other_iou = _best(pairs, judged & ~same_class, len(detections))
    wrong = matches.detection[~matches.hits[0]]
    wrong = wrong[np.argsort(place[wrong])]
    own, other = own_iou[wrong], other_iou[wrong]
    kind = np.select(
        [
            (own >= background_threshold) & (own <= iou_threshold),
            other >= iou_threshold,
            own > iou_threshold,
            other > background_threshold,
        ],
        [_LOCALISATION, _CLASSIFICATION, _DUPLICATE, _BOTH],
        _BACKGROUND,
    )
    about_own = np.isin(kind, [_LOCALISATION, _DUPLICATE])
    box = np.where(about_own, own_box[wrong], np.where(kind == _BACKGROUND, -1, other_box[wrong]))
    iou = np.where(about_own, own, np.where(kind == _BACKGROUND, 0, other))

    found = matches.detection_of_box[0] >= 0
    candidates = np.flatnonzero(np.isin(kind, [_LOCALISATION, _CLASSIFICATION]))
    candidates = candidates[~found[box[candidates]]]
    explained, best = np.unique(box[candidates], return_index=True)
    becomes_hit = np.zeros(len(wrong), dtype=np.bool_)
    becomes_hit[candidates[best]] = True
    missed = ~found & ~matches.box_ignored
    missed[explained] = False
    missed_box = np.flatnonzero(missed)

    ignored = np.zeros(len(detections), dtype=np.bool_)
    ignored[matches.detection[matches.ignored[0]]] = True
    kept = becomes_hit | ~ignored[wrong]
    wrong, kind, box, iou, becomes_hit = wrong[kept], kind[kept], box[kept], iou[kept], becomes_hit[kept]
    none = np.full(len(missed_box), -1, dtype=np.int64)
    image_index = np.concatenate([detections.image_index[wrong], table.image_of_box()[missed_box]])
    by_image = np.argsort(image_index, kind="stable")
    errors = Errors(
        kind=np.concatenate([kind, np.full(len(none), _MISSED)]).astype(np.int8)[by_image],
        image_index=image_index[by_image],
        label=np.concatenate([detections.labels[wrong], table.labels[missed_box]])[by_image],
        detection=np.concatenate([wrong, none])[by_image],
        box=np.concatenate([box, missed_box])[by_image],
        iou=np.concatenate([iou, np.zeros(len(none))])[by_image],
        score=np.concatenate([detections.scores[wrong], np.zeros(len(none))])[by_image],
        becomes_hit=np.concatenate([becomes_hit, np.zeros(len(none), dtype=np.bool_)])[by_image],
    )
    return errors, place


def _best(
    pairs: Overlaps, which: npt.NDArray[np.bool_], num_detections: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Give each detection's most overlapped box, int64 ``[D]`` (the first of equals; -1: none), and the IoU or 0."""
    best_box, best_iou = np.full(num_detections, -1, dtype=np.int64), np.zeros(num_detections)
    detection, box, iou = pairs.detection[which], pairs.box[which], pairs.iou[which]
    order = np.lexsort((box, -iou, detection))
    first = order[np.flatnonzero(np.diff(detection[order], prepend=-1))]
    best_box[detection[first]], best_iou[detection[first]] = box[first], iou[first]
    return best_box, best_iou


@dataclass(frozen=True)
class _Curve:
    """One class's precision-recall curve, by the places of its detections in the order by falling score."""

    detections: npt.NDArray[np.int64]  # ascending; all that count
    hits: npt.NDArray[np.int64]  # ascending; those of them that are hits
    num_boxes: int

    def average_precision(
        self, gone: list[npt.NDArray[np.int64]], new: list[npt.NDArray[np.int64]], num_not_counted: int
    ) -> npt.NDArray[np.float64]:
        """Give COCO's AP after each of ``S`` sets of fixes, float64 ``[S]``.

        Only hits can raise the interpolated precision, so a set costs time by the hits and not by the detections.
        Where no box is left the AP is 1, or 0 if false positives are.

        Args:
            gone: For each set the detections that do not count, ascending; none of them a hit.
            new: For each set the detections that become hits, ascending, as many in each; each of another class or
                in ``gone``.
            num_not_counted: Boxes that do not count, in each of the sets; no hit is on one of them.
        """
        num_sets, num_boxes = len(gone), self.num_boxes - num_not_counted
        if not self.num_boxes:
            return np.full(num_sets, UNDEFINED)
        if not num_boxes:
            return np.array([float(len(places) == len(self.detections)) for places in gone])
        number = np.searchsorted(self.detections, self.hits) + 1 - _num_before(gone, self.hits)
        if len(new[0]):
            of_new = np.searchsorted(self.detections, new) + np.arange(1, len(new[0]) + 1)
            of_new -= np.array([np.searchsorted(g, n) for g, n in zip(gone, new, strict=True)])
            number = np.sort(np.concatenate([number + _num_before(new, self.hits), of_new], axis=1), axis=1)
        mean: npt.NDArray[np.float64] = interpolated_precisions(number, num_boxes).mean(axis=1)
        return mean


def _num_before(places: list[npt.NDArray[np.int64]], hits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Give how many of each set's places come before each hit, int64 ``[S, T]``."""
    row = np.repeat(np.arange(len(places)), [len(part) for part in places])
    cell = row * (len(hits) + 1) + np.searchsorted(hits, np.concatenate(places))
    counts = np.bincount(cell, minlength=len(places) * (len(hits) + 1)).reshape(len(places), -1)
    return np.cumsum(counts, axis=1)[:, :-1]


def _curves(table: AnnotationTable, matches: Matches, place: npt.NDArray[np.int64]) -> list[_Curve]:
    """Give the curve of each label; the background's is empty."""
    curves = []
    for label in range(table.num_classes):
        columns = matches.of_label(label)
        places = place[matches.detection[columns]]
        counts, hits = ~matches.ignored[0, columns], matches.hits[0, columns]
        curves.append(_Curve(places[counts], places[hits], int(matches.num_boxes[label])))
    return curves


_Fix = npt.NDArray[np.int64]
"""``[4, F]``: label of the curve, group, what is done, place of the detection (of a box that does not count: any)."""


def _fixes(
    table: AnnotationTable,
    errors: Errors,
    group: npt.NDArray[np.int64],
    place: npt.NDArray[np.int64],
    on_curve: npt.NDArray[np.bool_],
) -> list[_Fix]:
    """Give the fixes of all errors.

    Args:
        table: Ground truth.
        errors: All of them.
        group: int64 ``[E]``, which errors are fixed together.
        place: int64 ``[D]``, of each detection by falling score.
        on_curve: bool ``[D]``: the detection counts, so that it can go away.
    """
    missed = errors.kind == _MISSED
    gone = np.flatnonzero(~missed)
    gone = gone[on_curve[errors.detection[gone]]]
    new = np.flatnonzero(errors.becomes_hit)
    return [
        _fix(_GONE, group[gone], errors.label[gone], place[errors.detection[gone]]),
        _fix(_NEW, group[new], table.labels[errors.box[new]], place[errors.detection[new]]),
        _fix(_NOT_COUNTED, group[missed], errors.label[missed], errors.box[missed]),
    ]


def _fix(
    what: int, group: npt.NDArray[np.int64] | int, label: npt.NDArray[np.int64], place: npt.NDArray[np.int64]
) -> _Fix:
    return np.stack([label, np.broadcast_to(group, label.shape), np.full_like(label, what), place])


def _fixed(
    curves: list[_Curve], fixes: list[_Fix]
) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """Make the fixes of each group, and no others: a label, groups and the label's AP after the fixes of each group.

    A group comes with the labels that it concerns, once with each.
    """
    rows = np.concatenate(fixes, axis=1)
    label, group, what, place = rows[:, np.lexsort(rows[::-1])]
    if not place.size:
        return
    # Sets of one label that bring as many hits and uncount as many boxes are integrated together.
    starts = np.flatnonzero((np.diff(label, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0))
    num_gone, num_new, num_not_counted = (
        np.add.reduceat((what == which).astype(np.int64), starts) for which in (_GONE, _NEW, _NOT_COUNTED)
    )
    alike, which = np.unique(np.stack([label[starts], num_new, num_not_counted]), axis=1, return_inverse=True)
    by_alike = np.split(np.argsort(which.ravel(), kind="stable"), np.cumsum(np.bincount(which.ravel()))[:-1])
    for (k, _, not_counted), sets in zip(alike.T.tolist(), by_alike, strict=True):
        num_parts = 1 + len(sets) * (len(curves[k].hits) + 1) // _NUMBERS_AT_ONCE
        for part in np.array_split(sets, min(num_parts, len(sets))):
            bounds = zip(starts[part], starts[part] + num_gone[part], strict=True)
            gone = [place[start:end] for start, end in bounds]
            bounds = zip(starts[part] + num_gone[part], starts[part] + (num_gone + num_new)[part], strict=True)
            new = [place[start:end] for start, end in bounds]
            yield k, group[starts[part]], curves[k].average_precision(gone, new, not_counted)
