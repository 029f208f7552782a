import numpy as np
import pytest

from resdet.data.annotations import MIN_TRAINABLE_SIDE, AnnotationTable
from resdet.errors import DataError
from resdet.types import Category


def table(boxes_per_image, *, labels=None, crowd=None, difficult=None, size=(40, 60)):
    """A table of images of one size, each with the given xywh boxes."""
    boxes = np.array([box for image in boxes_per_image for box in image], dtype=np.float64).reshape(-1, 4)
    num_images, num_boxes = len(boxes_per_image), len(boxes)
    return AnnotationTable(
        name="test",
        categories=(Category(1, 10, "cat"), Category(2, 20, "dog"), Category(3, 30, "bird")),
        image_ids=np.arange(100, 100 + num_images),
        file_names=np.array([f"{i}.png" for i in range(num_images)]),
        sizes=np.tile(np.array([size], dtype=np.int32), (num_images, 1)),
        offsets=np.concatenate([[0], np.cumsum([len(image) for image in boxes_per_image])]).astype(np.int64),
        boxes_xywh=boxes,
        labels=np.ones(num_boxes, dtype=np.int64) if labels is None else np.array(labels),
        area=boxes[:, 2] * boxes[:, 3],
        crowd=np.zeros(num_boxes, dtype=bool) if crowd is None else np.array(crowd),
        difficult=np.zeros(num_boxes, dtype=bool) if difficult is None else np.array(difficult),
        annotation_ids=np.arange(1000, 1000 + num_boxes),
    )


def test_boxes_are_clipped_to_their_image():
    boxes = table([[(-5, -5, 20, 20)], [(50, 30, 100, 100)]]).boxes_in_image()
    assert boxes.tolist() == [[0, 0, 15, 15], [50, 30, 60, 40]]


@pytest.mark.parametrize(
    ("box", "trained"),
    [
        ((1, 1, 5, 5), True),
        ((1, 1, MIN_TRAINABLE_SIDE * 2, 5), True),
        ((1, 1, MIN_TRAINABLE_SIDE / 2, 5), False),
        ((1, 1, 0, 5), False),
        ((1, 1, -3, 5), False),
        ((70, 1, 5, 5), False),  # beside its image
        ((59.95, 1, 5, 5), False),  # only a sliver inside
        ((float("nan"), 1, 5, 5), False),
        ((1, 1, float("inf"), 5), False),
    ],
)
def test_only_boxes_with_extent_inside_the_image_are_trained_on(box, trained):
    assert table([[box]]).trainable().tolist() == [trained]


def test_crowd_is_never_and_difficult_only_on_demand_trained_on():
    boxes = table([[(1, 1, 5, 5)] * 3], crowd=[True, False, False], difficult=[False, True, False])
    assert boxes.trainable().tolist() == [False, False, True]
    assert boxes.trainable(use_difficult=True).tolist() == [False, True, True]


def test_selected_images_bring_their_own_boxes():
    whole = table([[(0, 0, 1, 1)], [], [(0, 0, 2, 2), (0, 0, 3, 3)]], labels=[1, 2, 3])
    part = whole.select_images(np.array([2, 1]))
    assert part.image_ids.tolist() == [102, 101]
    assert part.boxes_xywh[part.rows(0)].tolist() == [[0, 0, 2, 2], [0, 0, 3, 3]]
    assert part.labels[part.rows(0)].tolist() == [2, 3]
    assert part.rows(1) == slice(2, 2)


def test_selected_classes_are_relabelled_in_the_given_order():
    whole = table([[(0, 0, 1, 1), (0, 0, 2, 2)], [(0, 0, 3, 3)]], labels=[1, 2, 3])
    part = whole.select_classes(["bird", "cat"])
    assert part.categories == (Category(1, 30, "bird"), Category(2, 10, "cat"))
    assert part.num_images == 2
    assert part.labels.tolist() == [2, 1]
    assert part.boxes_xywh[:, 2].tolist() == [1, 3]
    assert part.offsets.tolist() == [0, 1, 2]


@pytest.mark.parametrize("names", [["cow"], ["cat", "cat"]])
def test_unknown_or_repeated_classes_are_refused(names):
    with pytest.raises(DataError, match="classes must name each class once"):
        table([[(0, 0, 1, 1)]]).select_classes(names)
