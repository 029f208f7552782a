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
_BYTES_PER_BOX = 230  # what a box adds to the page
_KINDS = (*ERROR_KINDS, "uncounted", "hit")
_MISSED = ERROR_KINDS.index("missed")
_HIT, _UNCOUNTED = -1, -2  # a detection that is no error is one of these: indices into _KINDS


def gallery(
    dataset: DetectionDataset, measured: Sequence[MeasuredRun], max_images: int, max_bytes: int
) -> dict[str, Any]:
    """Return the images that cost most AP in any run, with all boxes, as many as the budget allows.

    Of images of equal cost, as when nothing at all was found, the one with more errors comes first.
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
        picture = jpeg_url(dataset.image(index), _MAX_SIDE, optimize=True)
        num_bytes += len(picture) + _BYTES_PER_BOX * (len(boxes) + len(found))
        if num_bytes > max_bytes:
            break
        height, width = dataset.table.sizes[index].tolist()
        shots.append(
            {
                "name": str(dataset.table.file_names[index]),
                "width": width,
                "height": height,
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
