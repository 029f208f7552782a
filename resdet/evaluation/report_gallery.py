"""A report's gallery: the images that cost most AP, with ground truth and detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from resdet.data.annotations import AnnotationTable
from resdet.data.dataset import DetectionDataset
from resdet.drawing import jpeg_url
from resdet.evaluation.errors import ERROR_KINDS
from resdet.evaluation.matching import to_xywh
from resdet.evaluation.report_runs import MeasuredRun
from resdet.types import Floats, Ints

_MAX_SIDE = 640
_LEGIBLE = 24  # pixels of a picture that an object should have; of larger images a part is shown where it has fewer
_BYTES_PER_BOX = 230  # what a box adds to the page
_MAX_CANDIDATES = 1000  # errors around which a part of the image is considered
_KINDS = (*ERROR_KINDS, "uncounted", "hit")
_MISSED = ERROR_KINDS.index("missed")
_HIT, _UNCOUNTED = -1, -2  # a detection that is no error is one of these: indices into _KINDS


def gallery(
    dataset: DetectionDataset, measured: Sequence[MeasuredRun], max_images: int, max_bytes: int
) -> dict[str, Any]:
    """Return the images that cost most AP in any run, with all boxes, as many as the budget allows.

    Of images of equal cost, as when nothing at all was found, the one with more errors comes first. Of an image whose
    objects would be too small to see, the part with most errors is shown.
    """
    every_error = [one.errors.errors for one in measured]
    loss = np.stack([one.errors.image_loss for one in measured])  # [runs, I]
    error_rows = np.concatenate([errors.image_index for errors in every_error])
    num_errors = np.bincount(error_rows, minlength=dataset.table.num_images)  # [I]
    order = np.lexsort((-num_errors, -loss.max(axis=0)))
    order = order[num_errors[order] > 0]
    verdicts = [_verdicts(one) for one in measured]
    missed = [set(errors.box[errors.kind == _MISSED].tolist()) for errors in every_error]
    shots: list[dict[str, Any]] = []
    num_bytes = 0
    for index in order[:max_images].tolist():
        boxes = _ground_truth(dataset.table, measured, missed, index)
        found = [box for run in range(len(measured)) for box in _found(measured[run], *verdicts[run], run, index)]
        height, width = dataset.table.sizes[index].tolist()
        x1, y1, x2, y2 = part = _part(boxes, found, width, height)
        boxes, found = _within(boxes, part), _within(found, part)
        picture = jpeg_url(dataset.image(index)[y1:y2, x1:x2], _MAX_SIDE, optimize=True)
        num_bytes += len(picture) + _BYTES_PER_BOX * (len(boxes) + len(found))
        if num_bytes > max_bytes:
            break
        shots.append(
            {
                "name": str(dataset.table.file_names[index]),
                "width": x2 - x1,
                "height": y2 - y1,
                "part": f"{x2 - x1}x{y2 - y1} of {width}x{height} px, at {x1}, {y1}",
                "is_part": part != (0, 0, width, height),
                "picture": picture,
                "ground_truth": boxes,
                "detections": found,
                "costs": [(loss[run, index], _summary(one, index)) for run, one in enumerate(measured)],
            }
        )
    return {
        "shots": shots,
        "num_wrong": len(order),
        "max_side": _MAX_SIDE,
        "megabytes": f"{max_bytes / 1e6:g}",
        "max_images": max_images,
    }


def _part(
    boxes: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], width: int, height: int
) -> tuple[int, int, int, int]:
    """Return what to show of an image, ``(x1, y1, x2, y2)``: all of it if its objects are large enough to see."""
    rects = np.array([box["rect"] for box in (*boxes, *found)]).reshape(-1, 4)  # x, y, width, height
    if not len(rects):
        return 0, 0, width, height
    objects = rects[: len(boxes)] if boxes else rects
    side = max(_MAX_SIDE, round(_MAX_SIDE * float(np.median(objects[:, 2:].max(axis=1))) / _LEGIBLE))
    size = np.minimum([width, height], side)
    wrong = [any(box["missed"]) for box in boxes] + [box["kind"] in ERROR_KINDS for box in found]
    centers = (rects[:, :2] + rects[:, 2:] / 2)[wrong][-_MAX_CANDIDATES:]  # [E, 2], the surest detections last
    if max(width, height) <= side or not len(centers):
        return 0, 0, width, height
    corners = np.clip(np.round(centers - size / 2), 0, [width, height] - size)  # [E, 2]
    held = ((centers >= corners[:, None]) & (centers <= corners[:, None] + size)).all(axis=2).sum(axis=1)  # [E]
    x, y = corners[held.argmax()].astype(int).tolist()
    return x, y, x + int(size[0]), y + int(size[1])


def _within(boxes: list[dict[str, Any]], part: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    """Return the boxes that meet a part of the image, in pixels of the part."""
    x1, y1, x2, y2 = part
    return [
        box | {"rect": [x - x1, y - y1, width, height]}
        for box in boxes
        for x, y, width, height in [box["rect"]]
        if x < x2 and y < y2 and x + width > x1 and y + height > y1
    ]


def _verdicts(measured: MeasuredRun) -> tuple[Ints, Floats]:
    """Return each detection's kind, an index into ``_KINDS``, and an error's IoU with its box, ``[D]`` each."""
    errors, num = measured.errors.errors, len(measured.run.evaluation.detections)
    kinds, iou = np.full(num, _UNCOUNTED, dtype=np.int64), np.zeros(num)
    kinds[measured.matches.detection[measured.matches.hits[0]]] = _HIT
    rows = np.flatnonzero(errors.detection >= 0)
    kinds[errors.detection[rows]], iou[errors.detection[rows]] = errors.kind[rows], errors.iou[rows]
    return kinds, iou


def _ground_truth(
    table: AnnotationTable, measured: Sequence[MeasuredRun], missed: Sequence[set[int]], index: int
) -> list[dict[str, Any]]:
    """Return an image's boxes; for each run the score of the detection that has the box, and whether it is missed."""
    scores = [one.run.evaluation.detections.scores for one in measured]  # [D] each
    found_by = [one.matches.detection_of_box[0] for one in measured]  # [N] each
    return [
        {
            "label": int(table.labels[row]),
            "rect": table.boxes_xywh[row].tolist(),
            "is_counted": not (table.crowd[row] or table.difficult[row]),
            "scores": [score[d[row]] if d[row] >= 0 else None for score, d in zip(scores, found_by, strict=True)],
            "missed": [row in rows for rows in missed],
        }
        for row in range(table.num_boxes)[table.rows(index)]
    ]


def _found(measured: MeasuredRun, kinds: Ints, iou: Floats, run: int, index: int) -> list[dict[str, Any]]:
    """Return a run's detections in an image, the best last, so that they are drawn on top."""
    detections = measured.run.evaluation.detections
    rows = np.flatnonzero(detections.image_index == index)
    rows = rows[np.argsort(detections.scores[rows], kind="stable")]
    rects = to_xywh(detections.boxes[rows]).tolist()
    return [
        {
            "run": run,
            "label": int(detections.labels[row]),
            "score": detections.scores[row],
            "kind": _KINDS[kinds[row]],
            "iou": iou[row],
            "rect": rect,
        }
        for row, rect in zip(rows.tolist(), rects, strict=True)
    ]


def _summary(measured: MeasuredRun, index: int) -> str:
    """Count the errors of each kind in an image, in words."""
    errors = measured.errors.errors
    counts = np.bincount(errors.kind[errors.of_image(index)], minlength=len(ERROR_KINDS)).tolist()
    return ", ".join(f"{count} {kind}" for kind, count in zip(ERROR_KINDS, counts, strict=True) if count) or "no errors"
