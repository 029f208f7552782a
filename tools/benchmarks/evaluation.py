"""Time COCO evaluation at the size of val2017: pycocotools, faster-coco-eval and ours, in turn."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.report import Report
from resdet.data.annotations import AnnotationTable, FileNames
from resdet.evaluation.coco import coco_metrics, detections_to_coco
from resdet.types import Category, Detections


def benchmark_evaluation(
    *,
    num_images: int = 5000,
    num_classes: int = 80,
    detections_per_image: int = 100,
    num_repeats: int = 3,
    seed: int = 0,
) -> Report:
    """Time COCO's twelve numbers by each evaluator, one after the other, ``num_repeats`` times over.

    Timed is what stands between detections in the evaluator's own form and the twelve numbers. Bringing 500,000
    detections into that form is not: ``loadRes`` for the others (given as ``load_seconds``), nothing for ours.

    Args:
        num_images: val2017 has 5,000.
        num_classes: COCO has 80.
        detections_per_image: COCO's evaluation takes 100.
        num_repeats: Times each evaluator runs; medians are given.
        seed: Of the generated data.

    Returns:
        A row for each evaluator: medians in seconds of wall clock and of CPU (which does not grow when other programs
        want the processor), how many times longer than ours it took by each, the seconds of ``loadRes``, and the
        largest difference of any of the twelve numbers to pycocotools'. faster-coco-eval is left out where it is not
        installed.
    """
    settings = dict(locals())
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    table, detections = generated_case(
        num_images=num_images, num_classes=num_classes, detections_per_image=detections_per_image, seed=seed
    )
    twelve: dict[str, Callable[[], list[float]]] = {
        "resdet": lambda: list(coco_metrics(table, detections).as_dict().values())
    }
    load_seconds = {"resdet": 0.0}
    evaluators = {"pycocotools": (COCO, COCOeval)}
    if importlib.util.find_spec("faster_coco_eval"):
        from faster_coco_eval import (
            COCO as FastCOCO,  # noqa: N811 - the name is theirs
            COCOeval_faster,
        )

        evaluators["faster_coco_eval"] = (FastCOCO, COCOeval_faster)
    for name, (coco, coco_eval) in evaluators.items():
        twelve[name], load_seconds[name] = _prepared(coco, coco_eval, table, detections)

    seconds: dict[str, list[float]] = {name: [] for name in twelve}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in twelve}
    numbers: dict[str, list[float]] = {}
    for _ in range(num_repeats):
        for name, evaluate in twelve.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                numbers[name] = evaluate()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
    median = {name: statistics.median(runs) for name, runs in seconds.items()}
    cpu_median = {name: statistics.median(runs) for name, runs in cpu_seconds.items()}
    reference = np.array(numbers["pycocotools"])
    rows: list[dict[str, str | float]] = [
        {
            "evaluator": name,
            "wall s": median[name],
            "CPU s": cpu_median[name],
            "times ours, wall": median[name] / median["resdet"],
            "times ours, CPU": cpu_median[name] / cpu_median["resdet"],
            "loading s": load_seconds[name],
            "largest difference": f"{float(np.abs(np.array(numbers[name]) - reference).max()):.1e}",
        }
        for name in twelve
    ]
    title = f"COCO's twelve numbers of {len(detections):,} detections and {table.num_boxes:,} boxes"
    return Report(work="evaluation", settings=settings, tables={title: rows})


def generated_case(
    *, num_images: int, num_classes: int, detections_per_image: int, seed: int = 0
) -> tuple[AnnotationTable, Detections]:
    """Make ground truth and detections whose counts are those of a detector on COCO's val2017.

    7.3 boxes per image on average, few classes per image and some of them often, 1 % crowd regions, sides from 8 to
    400 pixels. Half of an image's detections lie near its boxes, a tenth of these under another class; the other half
    lie anywhere, most of them of classes that the image has.

    Args:
        num_images: Images of 640 x 480.
        num_classes: The first is as often as the other common ones together, as COCO's persons are.
        detections_per_image: In every image.
        seed: Equal seeds give equal data.
    """
    rng = np.random.default_rng(seed)
    counts = np.minimum(rng.geometric(1 / 8.3, num_images) - 1, 60)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    num_boxes = int(offsets[-1])
    often = 1 / np.arange(1, num_classes + 1)
    in_image = rng.choice(np.arange(1, num_classes + 1), size=(num_images, 3), p=often / often.sum())
    image_of_box = np.repeat(np.arange(num_images), counts)
    labels = in_image[image_of_box, rng.integers(0, 3, num_boxes)]

    def anywhere(num: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        sides = np.exp(rng.uniform(np.log(8), np.log(400), (num, 2)))
        return np.concatenate([rng.uniform(0, 1, (num, 2)) * np.maximum([640, 480] - sides, 1), sides], axis=1)

    boxes_xywh = np.round(anywhere(num_boxes), 2)
    table = AnnotationTable(
        name="generated",
        categories=tuple(Category(label, label, f"class {label}") for label in range(1, num_classes + 1)),
        image_ids=np.arange(1, num_images + 1),
        file_names=FileNames([f"{image_id}.jpg" for image_id in range(1, num_images + 1)]),
        sizes=np.tile(np.array([480, 640], dtype=np.int32), (num_images, 1)),
        offsets=offsets,
        boxes_xywh=boxes_xywh,
        labels=labels,
        area=boxes_xywh[:, 2] * boxes_xywh[:, 3] * rng.uniform(0.5, 1, num_boxes),
        crowd=rng.random(num_boxes) < 0.01,
        difficult=np.zeros(num_boxes, dtype=np.bool_),
        annotation_ids=np.arange(1, num_boxes + 1),
    )
    image_index = np.repeat(np.arange(num_images), detections_per_image)
    num = len(image_index)
    near = (rng.random(num) < 0.5) & (counts[image_index] > 0)
    box = offsets[image_index[near]] + (rng.random(near.sum()) * counts[image_index[near]]).astype(np.int64)
    found_labels = np.where(rng.random(num) < 0.8, in_image[image_index, rng.integers(0, 3, num)], 0)
    found_labels[near] = np.where(rng.random(len(box)) < 0.9, labels[box], 0)
    found_labels = np.where(found_labels > 0, found_labels, rng.integers(1, num_classes + 1, num))
    xywh = anywhere(num)
    noise = rng.normal(0, 1, (len(box), 4)) * rng.uniform(0.01, 0.3, (len(box), 1))
    xywh[near] = boxes_xywh[box] + noise * np.tile(boxes_xywh[box, 2:], 2)
    xywh[:, 2:] = np.maximum(xywh[:, 2:], 1)
    # float32, as scores and boxes come from a model; good boxes tend to score higher.
    quality = np.full(num, 0.1)
    quality[near] = 0.9 - np.abs(noise).mean(axis=1)
    scores = np.clip(quality + rng.normal(0, 0.2, num), 0.001, 0.999).astype(np.float32)
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)
    return table, Detections(image_index, boxes.astype(np.float64), found_labels, scores.astype(np.float64))


def _prepared(
    coco: Any, coco_eval: Any, table: AnnotationTable, detections: Detections
) -> tuple[Callable[[], list[float]], float]:
    """Load the data into another evaluator's objects; give its evaluation, and the seconds ``loadRes`` took."""
    image_of_box = table.image_of_box()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        truth.dataset = {
            "images": [{"id": int(image_id)} for image_id in table.image_ids],
            "categories": [{"id": c.category_id, "name": c.name} for c in table.categories],
            "annotations": [
                {
                    "id": row + 1,
                    "image_id": int(table.image_ids[image_of_box[row]]),
                    "category_id": int(table.labels[row]),
                    "bbox": table.boxes_xywh[row].tolist(),
                    "area": float(table.area[row]),
                    "iscrowd": int(table.crowd[row]),
                }
                for row in range(table.num_boxes)
            ],
        }
        truth.createIndex()
        results = detections_to_coco(table, detections)
        start = time.perf_counter()
        found = truth.loadRes(results)
        load_seconds = time.perf_counter() - start

    def evaluate() -> list[float]:
        evaluator = coco_eval(truth, found, iouType="bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        return [float(value) for value in evaluator.stats[:12]]

    return evaluate, load_seconds
