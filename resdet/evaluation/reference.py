"""COCO's twelve numbers by pycocotools: what every final evaluation is compared with, so that it can be cited.

Nothing is shared with our own computation except the ground truth and the detections. Interim evaluations go without:
pycocotools matches image by image in Python (28 s for val2017, see ``matching.py``).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resdet.data.annotations import AnnotationTable
from resdet.errors import InternalError
from resdet.evaluation.coco import CocoMetrics, CocoNumbers, rows_of
from resdet.evaluation.matching import to_xywh
from resdet.types import Detections, Ints

TOLERANCE = 1e-9
"""Sums are taken in another order, and pycocotools adds 2.2e-16 to each denominator: last bits may differ."""

_NO_POLYGON: list[float] = []


@dataclass(frozen=True)
class Reference:
    """What pycocotools says of the same detections."""

    version: str  # of pycocotools
    metrics: dict[str, float]  # the twelve numbers under the names of CocoMetrics.as_dict
    differing: dict[str, tuple[float, float]]  # ours and pycocotools', if further apart than TOLERANCE

    def check(self, where: str) -> None:
        """Raise an InternalError that says which numbers differ, if any; ``where`` is where both are written."""
        if self.differing:
            pairs = (
                f"{name} {ours!r} and {theirs!r} (apart by {abs(ours - theirs):.2g})"
                for name, (ours, theirs) in self.differing.items()
            )
            raise InternalError(
                f"{where}: our numbers and those of pycocotools {self.version} must agree to {TOLERANCE:g}, but we "
                f"have {', '.join(pairs)}. Do not cite either: this is a fault of resdet or of pycocotools, please "
                "report it with the files; eval.reference=false evaluates without pycocotools"
            )


def reference_of(own: CocoMetrics, table: AnnotationTable, detections: Detections) -> Reference:
    """Compute with pycocotools what ``own`` holds of these detections, and compare."""
    evaluator = pycocotools_evaluator(coco_dataset(table), coco_results(table, detections), own.max_detections)
    numbers = twelve_numbers(evaluator, own.max_detections)
    theirs: dict[str, Any] = dict(zip((field.name for field in fields(CocoNumbers)), numbers, strict=True))
    metrics = replace(own, **theirs).as_dict()
    pairs = {name: (ours, metrics[name]) for name, ours in own.as_dict().items()}
    differing = {name: pair for name, pair in pairs.items() if not abs(pair[0] - pair[1]) <= TOLERANCE}  # NaN differs
    return Reference(version("pycocotools"), metrics, differing)


def coco_dataset(table: AnnotationTable) -> dict[str, list[dict[str, Any]]]:
    """Return a table as the dict of a COCO json, with ids of its own, from 1.

    Why not the table's ids: pycocotools takes a match with annotation id 0 for none, and images that occur twice would
    be one. Difficult objects have an area below every range, which is how pycocotools ignores an object that is no
    crowd: it overwrites their ``ignore`` by ``iscrowd``.
    """
    columns = {
        "id": np.arange(1, table.num_boxes + 1),
        "image_id": _image_ids(table)[table.image_of_box()],
        "category_id": table.labels,
        "bbox": table.boxes_xywh,
        "area": np.where(table.difficult, -1.0, table.area),
        "iscrowd": table.crowd.astype(np.int64),
    }
    return {
        "images": [{"id": image_id} for image_id in _image_ids(table).tolist()],
        "categories": [{"id": category.label, "name": category.name} for category in table.categories],
        "annotations": rows_of(columns),
    }


def coco_results(table: AnnotationTable, detections: Detections) -> list[dict[str, Any]]:
    """Return detections as pycocotools' ``loadRes`` takes them, with the ids of ``coco_dataset``."""
    columns = {
        "image_id": _image_ids(table)[detections.image_index],
        "category_id": detections.labels,
        "bbox": to_xywh(detections.boxes),  # [D, 4]
        "score": detections.scores,
    }
    # loadRes would give each detection a polygon of its own, which takes much memory and is not used for boxes.
    return [{**row, "segmentation": _NO_POLYGON} for row in rows_of(columns)]


def pycocotools_evaluator(ground_truth: Mapping[str, Any], results: list[dict[str, Any]], max_detections: int) -> Any:
    """Evaluate as pycocotools' own demo does, silently; ``results`` are changed. Returns the ``COCOeval``."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        if results:
            found = truth.loadRes(results)
        else:  # loadRes fails on an empty list
            found.dataset = {**ground_truth, "annotations": []}
            found.createIndex()
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.params.maxDets = [1, 10, max_detections]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def twelve_numbers(evaluator: Any, max_detections: int, category_id: int | None = None) -> list[float]:
    """Compute what ``COCOeval.summarize`` prints, of all classes or of one, from the arrays that it reads.

    ``summarize`` itself knows no limit but 100, and gives -1 for any other.
    """
    k = slice(None) if category_id is None else [list(evaluator.params.catIds).index(category_id)]
    precision = evaluator.eval["precision"][:, :, k]  # [IoU threshold, recall, class, area range, limit]
    recall = evaluator.eval["recall"][:, k]  # [IoU threshold, class, area range, limit]
    limits = list(evaluator.params.maxDets)
    one, ten, most = (limits.index(limit) for limit in (1, 10, max_detections))
    parts = [precision[..., 0, most], precision[0, ..., 0, most], precision[5, ..., 0, most]]
    parts += [precision[..., area, most] for area in (1, 2, 3)]
    parts += [recall[..., 0, one], recall[..., 0, ten], recall[..., 0, most]]
    parts += [recall[..., area, most] for area in (1, 2, 3)]
    return [float(part[part > -1].mean()) if (part > -1).any() else -1.0 for part in parts]


def _image_ids(table: AnnotationTable) -> Ints:
    """Return ids from 1 in the order of the table's, which decides between equal scores of different images."""
    ids = np.empty(table.num_images, dtype=np.int64)
    ids[np.argsort(table.image_ids, kind="stable")] = np.arange(1, table.num_images + 1)
    return ids
