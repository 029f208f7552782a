"""Random ground truth with detections that touch every rule of the evaluators."""

from collections.abc import Callable

import numpy as np
import pytest

from resdet.data.annotations import AnnotationTable
from resdet.types import Category, Detections

# Category ids neither contiguous nor in label order, as evaluators sort by id and tables by label.
CATEGORIES = (Category(1, 7, "cat"), Category(2, 3, "dog"), Category(3, 90, "owl"), Category(4, 12, "never there"))

Case = tuple[AnnotationTable, Detections]


def make_case(seed: int, *, integer: bool = False) -> Case:
    """Return boxes of all sizes (even 0), crowds or difficult objects, equal scores, duplicates and empty images."""
    rng = np.random.default_rng(seed)
    num_images = int(rng.integers(2, 7))
    counts = rng.integers(0, 9, num_images) * (rng.random(num_images) < 0.8)
    num_boxes = int(counts.sum())
    sides = np.exp(rng.uniform(np.log(2), np.log(300), (num_boxes, 2)))
    boxes_xywh = np.concatenate([rng.uniform(0, 300, (num_boxes, 2)), sides], axis=1)
    if integer:
        boxes_xywh = np.ceil(boxes_xywh)
    elif num_boxes:
        boxes_xywh[rng.random(num_boxes) < 0.05, 2] = 0
    flagged = rng.random(num_boxes) < 0.2
    table = AnnotationTable(
        name=f"case {seed}",
        categories=CATEGORIES,
        image_ids=rng.permutation(1000)[:num_images].astype(np.int64),
        file_names=np.array([f"{i}.jpg" for i in range(num_images)]),
        sizes=np.full((num_images, 2), 640, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xywh=boxes_xywh,
        labels=rng.integers(1, 4, num_boxes),
        area=boxes_xywh[:, 2] * boxes_xywh[:, 3] * rng.uniform(0.5, 1, num_boxes),
        crowd=flagged & (not integer),
        difficult=flagged & integer,
        annotation_ids=rng.permutation(10_000)[:num_boxes].astype(np.int64),
    )
    # Several detections near every box, some of them for another class, and many anywhere.
    near = np.repeat(np.arange(num_boxes), rng.integers(0, 5, num_boxes))
    num_far = int(rng.integers(0, 40)) if seed % 10 else 3000
    far = np.concatenate([rng.uniform(0, 300, (num_far, 2)), rng.uniform(1, 200, (num_far, 2))], axis=1)
    xywh = boxes_xywh[near] + rng.normal(0, 0.08, (len(near), 4)) * np.tile(boxes_xywh[near, 2:], 2)
    xywh = np.concatenate([np.where(rng.random((len(near), 1)) < 0.2, boxes_xywh[near], xywh), far])
    if integer:
        xywh = np.maximum(np.round(xywh), [0, 0, 1, 1])
    labels = np.concatenate([table.labels[near], rng.integers(1, 5, num_far)])
    labels = np.where(rng.random(len(labels)) < 0.1, rng.integers(1, 5, len(labels)), labels)
    order = rng.permutation(len(labels))
    detections = Detections(
        image_index=np.concatenate([table.image_of_box()[near], rng.integers(0, num_images, num_far)])[order],
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)[order],
        labels=labels[order].astype(np.int64),
        scores=np.round(rng.random(len(labels)), 1 if seed % 2 else 3),
    )
    return table, detections


@pytest.fixture(scope="session")
def case() -> Callable[..., Case]:
    return make_case


@pytest.fixture
def no_detections() -> Detections:
    return Detections(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))
