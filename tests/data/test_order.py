import itertools
import math
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from resdet.data import order as sampling
from resdet.data.order import (
    TrainBatches,
    class_balanced_order,
    image_order,
    repeat_factor_order,
    repeat_factors,
    uniform_order,
)
from resdet.data.shapes import shapes_table
from resdet.errors import UserError

# A third portrait, sizes as in COCO.
SIZES = np.array([(640, 480) if i % 3 == 0 else (480, 640) for i in range(100)])
PINNED = [(79, 4967302838313901235), (43, 2779043681976988642), (31, 4677062646242300233), (50, 6036632939799842505)]

# 100 images: class 1 in all but the last ten, class 2 in 20 of them, class 3 in two, class 4 in one; ten have none.
CLASSES = [{1} | ({2} if i < 20 else set()) | ({3} if i in (7, 40) else set()) for i in range(90)] + [set()] * 10
CLASSES[55] = {4}


def pairs(classes):
    images, labels = zip(*((i, label) for i, found in enumerate(classes) for label in sorted(found)), strict=True)
    return np.array(images), np.array(labels)


ORDERS = {
    "uniform": uniform_order(100),
    "repeat_factor": repeat_factor_order(repeat_factors(*pairs(CLASSES), 100, threshold=0.3)),
    "class_balanced": class_balanced_order(*pairs(CLASSES), 100),
}
each_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


def take(batches, count):
    return list(itertools.islice(batches, count))


def draws(order, count, seed=0):
    """The first images of an order, before they are grouped into batches."""
    chunks = itertools.chain.from_iterable(chunk.tolist() for chunk in order.draws(seed))
    return take(chunks, count)


def global_batches(count, *, batch_size=8, world_size=1, num_micro_batches=1, **options):
    """Global batches put together again from the shares of all processes, in the order of the slices."""
    cut = {"world_size": world_size, "num_micro_batches": num_micro_batches}
    shares = [
        take(iter(TrainBatches(SIZES, batch_size, rank=rank, **cut, **options)), count * num_micro_batches)
        for rank in range(world_size)
    ]
    return [
        [
            item
            for share in shares
            for part in share[i * num_micro_batches : (i + 1) * num_micro_batches]
            for item in part
        ]
        for i in range(count)
    ]


@each_order
@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(2, 1), (1, 2), (2, 2), (8, 1), (1, 8), (2, 4)])
def test_images_and_seeds_do_not_depend_on_how_a_batch_is_cut(order, world_size, num_micro_batches):
    cut = global_batches(60, world_size=world_size, num_micro_batches=num_micro_batches, order=order)
    assert cut == global_batches(60, order=order)


@each_order
def test_another_seed_gives_another_order(order):
    assert global_batches(10, seed=1, order=order) != global_batches(10, seed=0, order=order)


@each_order
@pytest.mark.parametrize("start", [1, 12, 13, 300])
@pytest.mark.parametrize("chunk", [1, 250, 1 << 17])
def test_resuming_gives_the_tail(monkeypatch, order, start, chunk):
    whole = global_batches(start + 20, order=order)
    monkeypatch.setattr(sampling, "_CHUNK", chunk)
    assert global_batches(20, start_batch=start, order=order) == whole[start:]


@each_order
def test_grouping_by_shape_loses_no_draw(order):
    """Batches hold what was drawn, but for the draws still waiting; every augmentation has a seed of its own."""
    batches = global_batches(500, order=order)
    items = [item for batch in batches for item in batch]
    drawn = Counter(draws(order, len(items) + 16))
    late = drawn - Counter(index for index, _ in items)
    early = Counter(index for index, _ in items) - drawn
    assert early.total() == 0
    assert late.total() == 16
    seeds = [seed for _, seed in items]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) <= max(seeds) < 2**63


def test_every_image_is_drawn_once_per_epoch():
    images = np.array(draws(uniform_order(100), 1000)).reshape(10, 100)
    assert (np.sort(images, axis=1) == np.arange(100)).all()
    assert len({tuple(epoch) for epoch in images.tolist()}) == 10


@each_order
def test_portrait_and_landscape_do_not_mix(order):
    for batch in global_batches(100, order=order, batch_size=4):
        portrait = {bool(SIZES[index, 0] > SIZES[index, 1]) for index, _ in batch}
        assert len(portrait) == 1


def test_a_group_smaller_than_a_batch_is_not_kept_apart():
    sizes = np.array([(640, 480)] * 3 + [(480, 640)] * 50)
    batches = take(iter(TrainBatches(sizes, 8)), 7)
    counts = Counter(index for batch in batches for index, _ in batch)
    assert max(counts.values()) <= 2
    assert {0, 1, 2} <= set(counts)


def test_a_group_of_which_too_few_are_ever_drawn_is_not_kept_apart():
    """Of 40 portrait images only the first has a box: on its own it would fill whole batches."""
    sizes = np.array([(640, 480)] * 40 + [(480, 640)] * 40)
    order = class_balanced_order(np.array([0, *range(40, 80)]), np.array([1] * 41), 80)
    for batch in take(iter(TrainBatches(sizes, 8, order=order)), 50):
        assert max(Counter(index for index, _ in batch).values()) <= 2


def test_fewer_images_than_a_batch():
    batches = take(iter(TrainBatches(SIZES[:3], 8)), 30)
    counts = Counter(index for batch in batches for index, _ in batch)
    assert sorted(counts.values()) == [80, 80, 80]


def reference_repeat_factors(classes, threshold):
    """detectron2's repeat_factors_from_category_frequency, over sets of classes."""
    num_images_with = defaultdict(int)
    for found in classes:
        for label in found:
            num_images_with[label] += 1
    of_class = {
        label: max(1.0, math.sqrt(threshold / (count / len(classes)))) for label, count in num_images_with.items()
    }
    return [max((of_class[label] for label in found), default=1.0) for found in classes]


def test_repeat_factors_follow_the_paper():
    """LVIS, appendix B.2. At 0.08, class 3 (2 of 100 images) is repeated sqrt(4) times, class 4 (1) sqrt(8) times."""
    factors = repeat_factors(*pairs(CLASSES), 100, threshold=0.08)
    assert factors[[7, 40]].tolist() == [2.0, 2.0]
    assert factors[55] == pytest.approx(math.sqrt(8), rel=1e-15)
    assert Counter(factors.tolist())[1.0] == 97


@pytest.mark.parametrize("threshold", [1e-3, 0.02, 0.3, 1.0])
def test_repeat_factors_are_those_of_detectron2(threshold):
    rng = np.random.default_rng(0)
    classes = [{label for label in range(1, 9) if rng.random() < 0.5**label} for _ in range(200)]
    assert set() in classes
    expected = reference_repeat_factors(classes, threshold)
    np.testing.assert_allclose(repeat_factors(*pairs(classes), 200, threshold), expected, rtol=1e-14)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(repeat_factors(*pairs(classes), 201, 2.0)[:200], expected, rtol=1e-14)


def test_images_are_repeated_as_their_factors_say():
    factors = np.array([1.0, 1.25, 2.0, 3.7, 0.5, 0.0])
    num_epochs = 4000
    images = draws(repeat_factor_order(factors), int(num_epochs * factors.sum()))
    counts = np.bincount(images, minlength=6) / num_epochs
    # A fraction is drawn in each epoch or not: the mean's standard error is at most 0.5 / sqrt(4000) = 0.008.
    np.testing.assert_allclose(counts, factors, atol=0.03)
    assert counts[5] == 0
    # Whole parts come in every single epoch.
    whole = draws(repeat_factor_order(np.array([1.0, 2.0, 3.0])), 600)
    assert all(sorted(whole[i : i + 6]) == [0, 1, 1, 2, 2, 2] for i in range(0, 600, 6))


def test_with_factors_of_one_every_image_is_drawn_once_per_epoch():
    assert draws(repeat_factor_order(np.ones(100)), 1000) == draws(uniform_order(100), 1000)


def test_every_class_is_drawn_equally_often_and_its_images_in_turn():
    images = draws(ORDERS["class_balanced"], 4 * 900)
    counts = Counter(images)
    # A class that shares no image with others says how often it was drawn: once per round of 4.
    assert counts[55] == 900
    # Each of class 3's two images in every other of its draws, and as members of the larger classes besides.
    exclusive = np.array(draws(class_balanced_order(*pairs([{1}, {1}, {2}, {1}, set()]), 5), 600)).reshape(300, 2)
    assert ((exclusive == 2).sum(axis=1) == 1).all()
    ones = exclusive[exclusive != 2].reshape(100, 3)
    assert (np.sort(ones, axis=1) == [0, 1, 3]).all()
    assert not any(counts[image] for image in range(90, 100))


def test_drawing_an_image_of_a_class_means_that_class():
    """Over whole passes: image i is drawn sum over its classes c of 1 / (number of images of c) times a round."""
    num_rounds = 88 * 20
    images, labels = pairs(CLASSES)
    counts = np.bincount(draws(ORDERS["class_balanced"], 4 * num_rounds), minlength=100)
    share = 1 / np.bincount(labels)[labels]
    expected = num_rounds * np.bincount(images, weights=share, minlength=100)
    # Each class's pass that has begun may have got to an image or not.
    classes_of_image = np.bincount(images, minlength=100)
    assert (np.abs(counts - expected) <= classes_of_image).all()


def test_only_boxes_that_are_trained_on_count():
    """An image whose boxes are all left out counts as one without boxes."""
    table = shapes_table(40, 64, seed=0)
    labels_of = [set(table.labels[table.rows(i)].tolist()) for i in range(40)]
    trained = np.ones(table.num_boxes, dtype=bool)
    trained[table.rows(3)] = False
    labels_of[3] = set()
    expected = reference_repeat_factors(labels_of, 0.9)
    order = image_order("repeat_factor", table, trained, repeat_threshold=0.9)
    counts = np.bincount(draws(order, int(2000 * sum(expected))), minlength=40) / 2000
    np.testing.assert_allclose(counts, expected, atol=0.05)
    balanced = image_order("class_balanced", table, trained, repeat_threshold=0.9)
    assert np.flatnonzero(~balanced.drawn).tolist() == [3]
    assert image_order("uniform", table, trained, repeat_threshold=0.9).drawn.all()


def test_what_comes_of_a_sampling_is_said(caplog):
    caplog.set_level("INFO")
    table = shapes_table(40, 64, seed=0)
    everything = np.ones(table.num_boxes, dtype=bool)
    image_order("repeat_factor", table, everything, repeat_threshold=1e-3)
    image_order("class_balanced", table, everything, repeat_threshold=1e-3)
    assert (
        "repeat-factor sampling at 0.001: 0 of 40 images repeated, at most 1.00 times; an epoch is 40 draws"
        in (caplog.messages[0])
    )
    assert "each of 3 classes in 1 of 3 draws" in caplog.messages[1]
    assert "0 images without a box to train on are never drawn" in caplog.messages[1]


@pytest.mark.parametrize("num_images", [117_266, 10])
def test_resuming_late_is_quick(num_images):
    """0.15 s and 0.02 s; the limit is for slower machines."""
    sizes = np.tile(SIZES, (num_images // len(SIZES) + 1, 1))[:num_images]
    start = time.process_time()
    next(iter(TrainBatches(sizes, 16, start_batch=90_000)))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", ["repeat_factor", "class_balanced"])
def test_resuming_late_is_quick_with_rare_classes(name):
    """COCO's size: 80 classes of 2 to 64,000 images. 0.16 s and 0.32 s; the limit is for slower machines."""
    num_images = 117_266
    rng = np.random.default_rng(0)
    sizes_of_classes = np.geomspace(2, 64_000, 80).astype(int)
    images = np.concatenate([rng.choice(num_images, size, replace=False) for size in sizes_of_classes])
    labels = np.repeat(np.arange(1, 81), sizes_of_classes)
    if name == "class_balanced":
        order = class_balanced_order(images, labels, num_images)
    else:
        order = repeat_factor_order(repeat_factors(images, labels, num_images, 1e-3))
    sizes = np.tile(SIZES, (num_images // len(SIZES) + 1, 1))[:num_images]
    start = time.process_time()
    next(iter(TrainBatches(sizes, 16, order=order, start_batch=90_000)))
    assert time.process_time() - start < 4


def test_the_order_is_pinned():
    """A run must resume into the same data with later versions of this package, NumPy and torch."""
    assert take(iter(TrainBatches(SIZES, 4, seed=0)), 1)[0] == PINNED


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(UserError, match=r"batch_size must be a multiple of .* got 6 for 2 x 2"):
        TrainBatches(SIZES, 6, world_size=2, num_micro_batches=2)
