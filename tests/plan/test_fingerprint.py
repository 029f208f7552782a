"""The facts of a dataset that a plan stands on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from resdet.data.annotations import AnnotationTable, FileNames
from resdet.data.dataset import DetectionDataset
from resdet.errors import DataError
from resdet.plan.fingerprint import Fingerprint, fingerprint
from resdet.types import Category

HEIGHT, WIDTH = 100, 200


def pictures(index: int) -> npt.NDArray[np.uint8]:
    """Return noise in large patches, another for each index, in colour."""
    noise = np.random.default_rng(index).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    return noise.repeat(10, axis=0).repeat(10, axis=1)


def gray_pictures(index: int) -> npt.NDArray[np.uint8]:
    """Return the same pictures without colour."""
    return pictures(index)[:, :, :1].repeat(3, axis=2)


def table(boxes_xywh: list[list[list[float]]], labels: list[list[int]] | None = None) -> AnnotationTable:
    """Make a table of images of one size with these boxes in each; class 1 unless ``labels`` says otherwise."""
    counts = [len(of_image) for of_image in boxes_xywh]
    every = np.array([box for of_image in boxes_xywh for box in of_image], dtype=np.float64).reshape(-1, 4)
    number = len(every)
    classes = [label for of_image in labels for label in of_image] if labels else [1] * number
    return AnnotationTable(
        name="made",
        categories=(Category(1, 1, "one"), Category(2, 2, "two")),
        image_ids=np.arange(len(counts), dtype=np.int64),
        file_names=FileNames(f"{i}.png" for i in range(len(counts))),
        sizes=np.full((len(counts), 2), [HEIGHT, WIDTH], dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xywh=every,
        labels=np.array(classes, dtype=np.int64),
        area=every[:, 2] * every[:, 3],
        crowd=np.zeros(number, dtype=np.bool_),
        difficult=np.zeros(number, dtype=np.bool_),
        annotation_ids=np.arange(number, dtype=np.int64),
    )


def facts(made: AnnotationTable, images=pictures) -> Fingerprint:
    """Return the facts of a table with these pictures."""
    return fingerprint(DetectionDataset(made, images, training=True))


def test_sizes_and_shapes_are_those_of_the_boxes() -> None:
    found = facts(table([[[10, 10, 20, 20]], [[0, 0, 40, 10], [50, 50, 40, 10]]]))
    assert (found.num_images, found.num_boxes, found.image_size) == (3 - 1, 3, (HEIGHT, WIDTH))
    assert found.object_sides[2] == pytest.approx(20)
    assert found.relative_sides[2] == pytest.approx(0.2)
    assert found.aspects[2] == pytest.approx(0.25)
    assert found.most_objects == 2


def test_only_objects_of_one_class_crowd_each_other() -> None:
    boxes = [[[10.0, 10, 20, 20], [12.0, 10, 20, 20], [100.0, 10, 20, 20]]]
    assert facts(table(boxes)).crowded == pytest.approx(2 / 3)
    assert facts(table(boxes, [[1, 2, 1]])).crowded == 0


def test_boxes_of_different_images_do_not_crowd_each_other() -> None:
    assert facts(table([[[10, 10, 20, 20]], [[10, 10, 20, 20]]])).crowded == 0


def test_the_rarest_class_is_the_one_in_the_fewest_images() -> None:
    found = facts(table([[[0, 0, 9, 9]] * 3, [[0, 0, 9, 9]], [[0, 0, 9, 9]]], [[2, 2, 2], [1], [1]]))
    assert found.images_of_class == {"one": 2, "two": 1}
    assert found.rarest == ("two", 1)
    assert "two" in found.lines()[3]


def test_gray_pictures_are_told_from_coloured_ones() -> None:
    made = table([[[0, 0, 9, 9]], [[0, 0, 9, 9]]])
    assert facts(made, gray_pictures).gray
    assert not facts(made).gray


def test_pictures_that_are_the_same_are_alike() -> None:
    made = table([[[0, 0, 9, 9]]] * 4)
    assert facts(made).alike == 0
    assert facts(made, lambda index: pictures(index // 2 if index < 2 else index)).alike == pytest.approx(0.5)


def test_pictures_that_cannot_be_read_are_left_out() -> None:
    def broken(index: int) -> npt.NDArray[np.uint8]:
        if index == 1:
            raise DataError("1.png: damaged")
        return pictures(index)

    assert facts(table([[[0, 0, 9, 9]]] * 3), broken).num_images == 3


def test_validation_images_count_for_the_most_objects_alone() -> None:
    train, val = table([[[0, 0, 9, 9]]]), table([[[i, 0, 9, 9] for i in range(50)]])
    found = fingerprint(DetectionDataset(train, pictures, training=True), val)
    assert (found.most_objects, found.num_boxes) == (50, 1)
