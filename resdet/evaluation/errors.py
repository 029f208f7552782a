"""Why an AP is what it is: the errors of a detector by kind, what each kind costs, and the images that cost most.

Boxes and detections are matched as in ``coco_metrics``. With ``t_f`` for ``iou_threshold`` and ``t_b`` for
``background_threshold``, a false positive is the first of these that applies:

* localisation: its best IoU with a box of its class is in [t_b, t_f];
* classification: its best IoU with a box of another class is t_f or more;
* duplicate: its best IoU with a box of its class is above t_f (a better-scored detection has that box);
* both: it overlaps a box of another class by more than t_b;
* background: it overlaps no box by more than t_b.

Crowd regions and difficult objects are no boxes here, and a detection that evaluation ignores because of them is an
error only if fixing it would find an object that nothing found. An object is missed if no detection has it and no
localisation or classification error is about it.

Each kind is fixed alone, as by an oracle. A localisation or classification error becomes a hit on its box (of the
box's class, with its score) if no detection has that box and no better-scored error of the two kinds is about it;
otherwise it is removed, as are the other kinds. A missed object is not counted. A class with nothing left to find then
has AP 1, or 0 if it still has false positives. Fixing all six kinds at once gives an AP of 1.

Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, sections 2.2 to
2.4; the order of the kinds and the fixes are those of tidecv 1.0.1. Deviations from tidecv:

* matching, order of equal scores, the cut at ``max_detections`` (tidecv: per image) and the recalls at which precision
  is read are those of COCO's evaluation; tidecv moves errors before hits of equal score when it fixes them;
* classes without boxes stay out of the mean (tidecv: AP 0 if anything was detected), so a class stays in the mean when
  fixing leaves nothing to find in it (tidecv: dropped, unless false positives are left);
* ignored detections are counted only where a fix changes something (tidecv counts all);
* numbers are in [0, 1] (tidecv: percent).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable
from resdet.evaluation.curves import UNDEFINED, interpolated_precisions, mean_of_defined
from resdet.evaluation.matching import Matches, match, overlaps
from resdet.types import Bools, Detections, Floats, Ints

ERROR_KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
"""TIDE's six main errors, in the order that ``Errors.kind`` counts them."""

_COSTS = (*ERROR_KINDS, "false positives", "false negatives")
_CLASSIFICATION, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED, _FALSE_POSITIVE, _FALSE_NEGATIVE = range(8)
_GONE, _NEW, _NOT_COUNTED = range(3)  # what a fix does: remove a false positive, add a hit, no longer count a box
_NUMBERS_AT_ONCE = 1 << 20  # limits the arrays in one step of ``_fixed`` to 8 MB each


@dataclass(frozen=True)
class Errors:
    """Every error, one row each: by image, then by falling score, missed objects last."""

    kind: npt.NDArray[np.int8]  # [E], index into ERROR_KINDS
    image_index: Ints  # [E], row of the image in the annotation table
    label: Ints  # [E], 1..K: the detection's class; the object's for a missed one
    detection: Ints  # [E], row in the detections; -1 for a missed object
    # [E], row in the annotation table of the box that the error is about; -1 for background. It is of the detection's
    # class for localisation and duplicate, of another for classification and both.
    box: Ints
    iou: Floats  # [E], of that detection with that box; 0 where one of the two is missing
    score: Floats  # [E], the detection's; 0 for a missed object
    becomes_hit: Bools  # [E], a fix makes the detection find ``box``; other false positives are just removed

    def __len__(self) -> int:
        return len(self.kind)

    def of_image(self, index: int) -> slice:
        """Return the rows of the errors in image ``index``."""
        first, last = np.searchsorted(self.image_index, [index, index + 1]).tolist()
        return slice(first, last)


@dataclass(frozen=True)
class ErrorCost:
    """One kind of error."""

    kind: str  # one of ERROR_KINDS, "false positives" or "false negatives"
    count: int
    # How much AP rises when they, and nothing else, are fixed, in [0, 1]; -1 where AP is undefined.
    dAP: float  # noqa: N815 - the name it goes by


@dataclass(frozen=True)
class ErrorCosts:
    """What the kinds of errors cost one class, or all: means over the classes that have boxes.

    The ``dAP`` of the kinds need not add up to 1 - AP: errors hide each other.
    """

    AP: float  # COCO's at the IoU threshold of the analysis, in [0, 1]; -1 without boxes that count
    kinds: tuple[ErrorCost, ...]  # the six of ERROR_KINDS, each fixed alone
    false_positives: ErrorCost  # all unmatched detections, fixed by removing them
    false_negatives: ErrorCost  # all boxes that were not found, fixed by not counting them


@dataclass(frozen=True)
class ClassErrors(ErrorCosts):
    """One class's errors.

    A count is of detections of this class (missed: of its objects), while ``dAP`` is the rise of this class's AP when
    the errors of all classes are fixed: a dog found as a cat is the cat's error, and fixing it raises both.
    """

    name: str
    num_boxes: int  # ground truth that counts, without crowd regions and difficult objects


@dataclass(frozen=True)
class ErrorAnalysis(ErrorCosts):
    """The result of ``find_errors``."""

    iou_threshold: float
    background_threshold: float  # IoU up to which a detection is unrelated to a box
    max_detections: int  # that count per class and image
    per_class: tuple[ClassErrors, ...]  # in label order
    errors: Errors
    image_loss: Floats  # [I], how much AP rises when all errors of that image, and no others, are fixed

    def worst_images(self, num_images: int) -> Ints:
        """Return the indices of the images that cost most AP, worst first; images that cost nothing are left out."""
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
    """Find what went wrong with every false positive and every missed object, and how much AP that costs.

    The module's docstring defines the kinds of errors and their fixes. ``image_loss`` is exact, not an estimate: for
    each image and class, the curve is integrated again with the image's six kinds of errors fixed.

    Args:
        table: Ground truth.
        detections: What a model found in the images of ``table``.
        iou_threshold: In (0, 1]. AP over .50:.05:.95 is the mean of ten analyses, one for each threshold.
        background_threshold: Above 0, below ``iou_threshold``.
        max_detections: Detections that count per class and image, at least 1.

    Raises:
        ValueError: If an option is out of its range.
        DataError: If a detection names an image or class that ``table`` does not have, or is not finite.
    """
    if not 0 < background_threshold < iou_threshold:
        raise ValueError(
            f"background_threshold: must be above 0 and below iou_threshold ({iou_threshold}), "
            f"got {background_threshold}"
        )
    matches = match(table, detections, iou_thresholds=[iou_threshold], max_detections=max_detections)
    # Evaluation's order, for all classes at once: a detection that changes its class has its place there too.
    image_place = np.argsort(np.argsort(table.image_ids, kind="stable"))  # [I]
    place = np.argsort(np.lexsort((image_place[detections.image_index], -detections.scores)))  # [D]
    errors = _errors(table, detections, matches, place, background_threshold)
    costs, image_loss = _costs(table, detections, matches, place, errors)
    return ErrorAnalysis(
        *costs.of(np.arange(1, table.num_classes)),
        iou_threshold=iou_threshold,
        background_threshold=background_threshold,
        max_detections=max_detections,
        per_class=tuple(
            ClassErrors(*costs.of(np.array([category.label])), category.name, int(matches.num_boxes[category.label]))
            for category in table.categories
        ),
        errors=errors,
        image_loss=image_loss,
    )


def _errors(
    table: AnnotationTable, detections: Detections, matches: Matches, place: Ints, background_threshold: float
) -> Errors:
    """Find every error; ``place`` is each detection's position by falling score."""
    (iou_threshold,) = matches.iou_thresholds.tolist()
    pairs = overlaps(table, detections, min_iou=background_threshold, same_class=False)
    counts = ~matches.box_ignored[pairs.box]  # [P]
    same_class = detections.labels[pairs.detection] == table.labels[pairs.box]  # [P]
    own_box, own_iou = pairs.best_box(len(detections), counts & same_class)  # [D]
    other_box, other_iou = pairs.best_box(len(detections), counts & ~same_class)
    columns = np.flatnonzero(~matches.hits[0])
    columns = columns[np.argsort(place[matches.detection[columns]])]
    wrong = matches.detection[columns]  # [W]
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

    found = matches.detection_of_box[0] >= 0  # [N]
    candidates = np.flatnonzero(np.isin(kind, [_LOCALISATION, _CLASSIFICATION]))
    candidates = candidates[~found[box[candidates]]]
    best = np.unique(box[candidates], return_index=True)[1]  # of each box the best-scored candidate
    becomes_hit = np.zeros(len(wrong), dtype=np.bool_)
    becomes_hit[candidates[best]] = True
    missed = ~found & ~matches.box_ignored
    missed[box[becomes_hit]] = False
    missed_box = np.flatnonzero(missed)

    kept = becomes_hit | ~matches.ignored[0, columns]
    wrong, kind, box, iou, becomes_hit = wrong[kept], kind[kept], box[kept], iou[kept], becomes_hit[kept]
    num = len(missed_box)
    image_index = np.concatenate([detections.image_index[wrong], table.image_of_box()[missed_box]])
    by_image = np.argsort(image_index, kind="stable")
    return Errors(
        kind=np.append(kind, np.full(num, _MISSED)).astype(np.int8)[by_image],
        image_index=image_index[by_image],
        label=np.append(detections.labels[wrong], table.labels[missed_box])[by_image],
        detection=np.append(wrong, np.full(num, -1))[by_image],
        box=np.append(box, missed_box)[by_image],
        iou=np.append(iou, np.zeros(num))[by_image],
        score=np.append(detections.scores[wrong], np.zeros(num))[by_image],
        becomes_hit=np.append(becomes_hit, np.zeros(num, dtype=np.bool_))[by_image],
    )


@dataclass(frozen=True)
class _Costs:
    """APs and counts by class (``K + 1`` labels, the background's unused) and by kind of error (``_COSTS``)."""

    before: Floats  # [K + 1]
    after: Floats  # [8, K + 1], each kind fixed alone
    counts: Ints  # [8, K + 1]
    num_boxes: Ints  # [K + 1]

    def of(self, labels: Ints) -> tuple[float, tuple[ErrorCost, ...], ErrorCost, ErrorCost]:
        """Return AP, kinds, false positives and false negatives: means over those of ``labels`` that have boxes."""
        defined = labels[self.num_boxes[labels] > 0]
        rise = (self.after - self.before)[:, defined].mean(axis=1) if defined.size else np.full(len(_COSTS), UNDEFINED)
        rows = zip(_COSTS, self.counts[:, labels].sum(axis=1).tolist(), rise.tolist(), strict=True)
        *kinds, false_positives, false_negatives = (ErrorCost(*row) for row in rows)
        return mean_of_defined(self.before[labels]), tuple(kinds), false_positives, false_negatives


def _costs(
    table: AnnotationTable, detections: Detections, matches: Matches, place: Ints, errors: Errors
) -> tuple[_Costs, Floats]:
    """Integrate the curves again with each kind of error fixed, then with each image's; return the image loss too."""
    curves = _curves(table, matches, place)
    nothing = [np.zeros(0, dtype=np.int64)]
    before = np.concatenate([curve.average_precision(nothing, nothing, 0) for curve in curves])  # [K + 1]

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

    num_defined = np.count_nonzero(matches.num_boxes)
    image_loss = np.zeros(table.num_images)
    for label, images, values in _fixed(curves, _fixes(table, errors, errors.image_index, place, on_curve)):
        if matches.num_boxes[label]:
            image_loss[images] += (values - before[label]) / num_defined
    return _Costs(before, after, counts, matches.num_boxes), image_loss


@dataclass(frozen=True)
class _Curve:
    """One class's precision-recall curve, by the places of its detections in the order by falling score."""

    detections: Ints  # ascending; all that count
    hits: Ints  # [T], ascending; those of them that are hits
    num_boxes: int

    def average_precision(self, gone: list[Ints], new: list[Ints], num_not_counted: int) -> Floats:
        """Compute COCO's AP after each of ``S`` sets of fixes, float64 ``[S]``.

        ``gone`` has for each set the detections that do not count, none of them a hit; ``new`` those that become hits,
        as many in each set and each of another class or in ``gone``; both ascending. ``num_not_counted`` boxes do not
        count in each set, and no hit is on one of them. Only hits can raise the interpolated precision, so the cost of
        a set grows with hits and not with detections. Where no box is left the AP is 1, or 0 if false positives are.
        """
        num_sets, num_boxes = len(gone), self.num_boxes - num_not_counted
        if not self.num_boxes:
            return np.full(num_sets, UNDEFINED)
        if not num_boxes:
            return np.array([float(len(places) == len(self.detections)) for places in gone])
        # How many detections count down to each hit.
        number = np.searchsorted(self.detections, self.hits) + 1 - _num_before(gone, self.hits)  # [S, T]
        if len(new[0]):
            of_new = np.searchsorted(self.detections, new) + np.arange(1, len(new[0]) + 1)
            of_new -= np.array([np.searchsorted(g, n) for g, n in zip(gone, new, strict=True)])
            number = np.sort(np.concatenate([number + _num_before(new, self.hits), of_new], axis=1), axis=1)
        mean: Floats = interpolated_precisions(number, num_boxes).mean(axis=1)
        return mean


def _num_before(places: list[Ints], hits: Ints) -> Ints:
    """Count how many of each set's places come before each hit, int64 ``[S, T]``."""
    row = np.repeat(np.arange(len(places)), [len(part) for part in places])
    cell = row * (len(hits) + 1) + np.searchsorted(hits, np.concatenate(places))
    counts = np.bincount(cell, minlength=len(places) * (len(hits) + 1)).reshape(len(places), -1)
    return np.cumsum(counts, axis=1)[:, :-1]


def _curves(table: AnnotationTable, matches: Matches, place: Ints) -> list[_Curve]:
    """Return the curve of each label; the background's is empty."""
    curves = []
    for label in range(table.num_classes):
        columns = matches.of_label(label)
        places = place[matches.detection[columns]]
        counts, hits = ~matches.ignored[0, columns], matches.hits[0, columns]
        curves.append(_Curve(places[counts], places[hits], int(matches.num_boxes[label])))
    return curves


_Fix = Ints  # [4, F]: label of the curve, group, what is done, place of the detection (any where a box is not counted)


def _fixes(table: AnnotationTable, errors: Errors, group: Ints, place: Ints, on_curve: Bools) -> list[_Fix]:
    """Return the fixes of all errors.

    Errors of one ``group``, int64 ``[E]``, are fixed together. Detections that are not ``on_curve``, bool ``[D]``, do
    not count anyway and need not be removed.
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


def _fix(what: int, group: Ints | int, label: Ints, place: Ints) -> _Fix:
    return np.stack([label, np.broadcast_to(group, label.shape), np.full_like(label, what), place])


def _fixed(curves: list[_Curve], fixes: list[_Fix]) -> Iterator[tuple[int, Ints, Floats]]:
    """Apply the fixes of each group alone; yield a label, groups and the label's AP after the fixes of each group.

    Each group is yielded once with every label that it concerns.
    """
    rows = np.concatenate(fixes, axis=1)
    label, group, what, place = rows[:, np.lexsort(rows[::-1])]
    if not place.size:
        return
    # A set: the fixes of one group on the curve of one label. Sets of a label that add equally many hits and leave out
    # equally many boxes are integrated together.
    starts = np.flatnonzero((np.diff(label, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0))
    num_gone, num_new, num_not_counted = (
        np.add.reduceat((what == which).astype(np.int64), starts) for which in (_GONE, _NEW, _NOT_COUNTED)
    )
    alike, which = np.unique(np.stack([label[starts], num_new, num_not_counted]), axis=1, return_inverse=True)
    by_alike = np.split(np.argsort(which.ravel(), kind="stable"), np.cumsum(np.bincount(which.ravel()))[:-1])
    for (k, _, not_counted), sets in zip(alike.T.tolist(), by_alike, strict=True):
        num_parts = 1 + len(sets) * (len(curves[k].hits) + 1) // _NUMBERS_AT_ONCE
        for part in np.array_split(sets, min(num_parts, len(sets))):
            first, middle = starts[part], starts[part] + num_gone[part]
            gone = [place[start:end] for start, end in zip(first, middle, strict=True)]
            new = [place[start:end] for start, end in zip(middle, middle + num_new[part], strict=True)]
            yield k, group[starts[part]], curves[k].average_precision(gone, new, not_counted)
