import pickle
import time

import numpy as np
import pytest

from resdet.data import shapes
from resdet.data.shapes import SHAPE_CLASSES, ShapesImages, shapes_table
from resdet.errors import DataError


def test_a_picture_depends_on_seed_and_index_only():
    long, short = shapes_table(20, 96, seed=3), shapes_table(5, 96, seed=3)
    assert np.array_equal(long.boxes_xywh[: short.num_boxes], short.boxes_xywh)
    assert np.array_equal(long.offsets[:6], short.offsets)
    images = ShapesImages(96, seed=3)
    ahead = images(4)
    assert np.array_equal(images(4), ahead)
    assert np.array_equal(pickle.loads(pickle.dumps(images))(4), ahead)
    assert not np.array_equal(ShapesImages(96, seed=4)(4), ahead)
    assert not np.array_equal(images(3), ahead)


def test_pictures_are_rgb_of_the_size_in_the_table():
    table = shapes_table(4, 100, seed=0)
    image = ShapesImages(100, seed=0)(2)
    assert (image.shape, image.dtype) == ((100, 100, 3), np.uint8)
    assert table.sizes.tolist() == [[100, 100]] * 4


@pytest.mark.parametrize("size", [64, 128, 201])
def test_boxes_are_tight_around_what_is_painted(size):
    worst = 0.0
    for index in range(40):
        for shape in shapes._layout(11, index, size)[0]:
            rows, columns, coverage = shapes._coverage(shape, size)
            covered = np.zeros((size, size), dtype=np.float32)
            covered[rows, columns] = coverage
            canvas = np.full((size, size, 3), 128, dtype=np.float32)
            shapes._paint(canvas, shape, np.random.default_rng(index))
            assert not (canvas != 128).any(axis=2)[covered == 0].any()
            assert np.median(np.abs(canvas - 128).max(axis=2)[covered == 1]) > 20
            # Pixels covered by less than a quarter are soft edge.
            y, x = np.nonzero(covered > 0.25)
            extent = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            worst = max(worst, float(np.abs(extent - shape.box()).max()))
    # An edge may end anywhere inside its pixel.
    assert worst < 1


def test_objects_are_as_promised():
    table = shapes_table(300, 128, seed=0)
    counts = np.diff(table.offsets)
    assert counts.min() >= 1
    assert counts.max() == shapes.MAX_OBJECTS
    assert np.bincount(table.labels, minlength=4)[1:].min() > 0.25 * table.num_boxes
    assert [c.name for c in table.categories] == list(SHAPE_CLASSES)
    boxes = table.boxes_in_image()
    assert np.allclose(boxes[:, 2:] - boxes[:, :2], table.boxes_xywh[:, 2:], atol=1e-9)  # all inside; rounding of x + w
    longest = table.boxes_xywh[:, 2:].max(axis=1)
    # The extent of a rotated square or triangle is between 0.7 and 1 of its circumscribed circle's.
    assert longest.min() >= 0.7 * 128 / 8
    assert longest.max() <= 128 / 2
    assert longest.max() > 2.5 * longest.min()
    assert table.trainable().all()


def test_objects_cover_little_of_each_other():
    table = shapes_table(100, 128, seed=5)
    for index in range(100):
        boxes = table.boxes_in_image()[table.rows(index)].tolist()
        for i, a in enumerate(boxes):
            assert all(shapes._covered(a, b) <= 0.15 + 1e-9 for b in boxes[:i])  # rounding of x + w


def test_objects_can_be_told_from_the_background():
    table, images = shapes_table(30, 128, seed=0), ShapesImages(128, seed=0)
    contrast = []
    for index in range(30):
        image = images(index).astype(float)
        for x, y, w, h in table.boxes_xywh[table.rows(index)]:
            middle = image[int(y + 0.4 * h) : int(y + 0.6 * h) + 1, int(x + 0.4 * w) : int(x + 0.6 * w) + 1]
            contrast.append(np.abs(middle.mean(axis=(0, 1)) - np.median(image, axis=(0, 1))).max())
    assert np.median(contrast) > 40


def test_drawing_is_quick():
    images = ShapesImages(128, seed=0)
    times = []
    for index in range(20):
        start = time.perf_counter()
        images(index)
        times.append(time.perf_counter() - start)
    # About 1.3 ms on one core; the margin is for a loaded machine.
    assert np.median(times) < 0.02


@pytest.mark.parametrize("arguments", [(0, 128, 0), (1, 31, 0), (1, 128, -1)])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(DataError, match="image_size >= 32 and seed >= 0, got num_images"):
        shapes_table(*arguments)
