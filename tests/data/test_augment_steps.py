import logging
import os
import pickle

import cv2
import numpy as np
import pytest

from resdet.data.augment.pipeline import build_augment
from resdet.data.augment.sample import Sample, uncovered
from resdet.data.augment.steps import _WHOLE, _scaled_pixels
from resdet.errors import DataError

RNG = np.random.default_rng(0)


def sample_of(boxes, *, size=(60, 80), value=None, first_id=0, crowd=None, difficult=None):
    """A sample of one colour, or of noise."""
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    count = len(boxes)
    image = RNG.integers(0, 256, (*size, 3), dtype=np.uint8) if value is None else np.full((*size, 3), value, np.uint8)
    return Sample(
        image=image,
        image_id=first_id,
        boxes=boxes,
        labels=np.arange(count) + 1,
        crowd=np.array(crowd if crowd is not None else [False] * count, dtype=bool),
        difficult=np.array(difficult if difficult is not None else [False] * count, dtype=bool),
        annotation_ids=np.arange(count) + first_id,
        visible=np.ones(count),
    )


def others(boxes, **what):
    """Partners of one kind, and the numbers they were asked for with."""
    numbers = []

    def partner(number):
        numbers.append(number)
        return sample_of(boxes, first_id=100 * len(numbers), **what)

    return partner, numbers


# --- large-scale jitter


@pytest.mark.parametrize("size", [(60, 80), (50, 120), (200, 30)])
def test_large_scale_jitter_always_gives_its_size(size):
    augment = build_augment([{"LargeScaleJitter": {"size": list(size)}}])
    for seed in range(10):
        out = augment(sample_of([(5, 5, 70, 50)]), seed=seed)
        assert out.image.shape == (*size, 3)
        assert out.image.dtype == np.uint8
        assert (out.boxes <= [size[1], size[0], size[1], size[0]]).all()


def test_large_scale_jitter_at_fixed_scales():
    before = sample_of([(10, 20, 30, 40)])
    same = build_augment([{"LargeScaleJitter": {"size": [60, 80], "scale_range": [1, 1]}}])(before, seed=0)
    assert np.array_equal(same.image, before.image)
    assert np.array_equal(same.boxes, before.boxes)
    half = build_augment([{"LargeScaleJitter": {"size": [60, 80], "scale_range": [0.5, 0.5], "fill": 7}}])
    out = half(before, seed=0)
    assert out.boxes.tolist() == [[5, 10, 15, 20]]
    assert (out.image[30:] == 7).all()
    assert (out.image[:, 40:] == 7).all()
    # Halved by area, every pixel is the mean of four; OpenCV rounds to the nearest.
    mean = before.image.reshape(30, 2, 40, 2, 3).mean(axis=(1, 3))
    assert np.abs(out.image[:30, :40] - mean).max() <= 0.5
    double = build_augment([{"LargeScaleJitter": {"size": [60, 80], "scale_range": [2, 2]}}], min_visibility=0)
    corners = {tuple(double(before, seed=seed).boxes.ravel().tolist()) for seed in range(20)}
    assert len(corners) > 10


@pytest.mark.parametrize(("corner", "window"), [((0, 0), (60, 50)), ((31, 17), (60, 64)), ((80, 130), (67, 61))])
def test_a_window_of_a_much_enlarged_image_is_cut_from_it(corner, window):
    """Only the window is computed; it must be the one that resizing everything would give."""
    image = cv2.GaussianBlur(RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8), (0, 0), 2)
    whole = cv2.resize(image, (191, 147), interpolation=cv2.INTER_LINEAR)
    assert whole.shape[0] * whole.shape[1] > _WHOLE * window[0] * window[1]
    expected = whole[corner[0] : corner[0] + window[0], corner[1] : corner[1] + window[1]].astype(int)
    got = _scaled_pixels(image, (147, 191), corner, window).astype(int)
    # warpAffine knows places to 1/32 of a pixel, here at most 1/32 of the steps between neighbours, below 50.
    assert np.abs(got - expected).max() <= 2
    with pytest.raises(AssertionError):
        assert np.abs(np.roll(got, 1, axis=1) - expected).max() <= 2


# --- random tiles


def test_a_random_tile_is_cut_out_of_the_image_with_its_boxes():
    boxes = [(100, 100, 120, 120), (300, 40, 330, 60), (10, 180, 40, 199)]
    before = sample_of(boxes, size=(200, 400))
    augment = build_augment([{"RandomTile": {"side": 64}}], min_visibility=0.5)
    seen = set()
    for seed in range(60):
        tile = augment(before, seed=seed)
        assert tile.image.shape == (64, 64, 3)
        window = np.lib.stride_tricks.sliding_window_view(before.image[..., 0], 64, axis=1)
        (top, left), *more = [
            (y, x)
            for y, x in np.argwhere(
                (window[:137, :, 0] == tile.image[0, 0, 0]) & (window[:137, :, 63] == tile.image[0, 63, 0])
            )
            if np.array_equal(before.image[y : y + 64, x : x + 64], tile.image)
        ]
        assert not more
        expected = np.clip(before.boxes - [left, top, left, top], 0, 64)
        share = np.prod(expected[:, 2:] - expected[:, :2], axis=1) / np.prod(
            before.boxes[:, 2:] - before.boxes[:, :2], axis=1
        )
        assert tile.annotation_ids.tolist() == np.flatnonzero(share >= 0.5).tolist()
        assert np.array_equal(tile.boxes, expected[share >= 0.5].astype(np.float32))
        assert np.allclose(tile.visible, share[share >= 0.5])
        seen.add((int(top), int(left)))
    assert len(seen) > 50, "tiles are drawn anew for each seed"


@pytest.mark.parametrize("share", [0, 0.6, 1])
def test_random_tiles_hold_an_object_as_often_as_is_asked_for(share):
    """The object is a thousandth of the image: by chance a tile holds it in 1 of 40 draws."""
    before = sample_of([(1000, 500, 1020, 510)], size=(1000, 2000))
    augment = build_augment([{"RandomTile": {"side": 200, "object_share": share}}], min_visibility=1)
    held = sum(len(augment(before, seed=seed)) for seed in range(200)) / 200
    assert held == 1 if share == 1 else abs(held - share) < 0.1


def test_random_tiles_are_not_drawn_around_crowds_and_difficult_objects():
    boxes = [(0, 0, 20, 20), (380, 0, 400, 20), (200, 180, 210, 190)]
    before = sample_of(boxes, size=(200, 400), crowd=[1, 0, 0], difficult=[0, 1, 0])
    augment = build_augment([{"RandomTile": {"side": 32, "object_share": 1}}])
    assert all(2 in augment(before, seed=seed).annotation_ids for seed in range(20))


def test_an_object_larger_than_the_tile_fills_it():
    before = sample_of([(50, 20, 350, 190)], size=(200, 400))
    augment = build_augment([{"RandomTile": {"side": 64, "object_share": 1}}])
    for seed in range(20):
        tile = augment(before, seed=seed)
        assert tile.boxes.tolist() == [[0, 0, 64, 64]] or tile.visible.size == 0, "less than a tenth is left"
    whole = build_augment([{"RandomTile": {"side": 64, "object_share": 1}}], min_visibility=0)
    assert all(whole(before, seed=seed).boxes.tolist() == [[0, 0, 64, 64]] for seed in range(20))


def test_images_smaller_than_the_tile_stay_whole_along_that_side():
    before = sample_of([(10, 10, 20, 20)], size=(60, 80))
    same = build_augment([{"RandomTile": {"side": 80}}])(before, seed=3)
    assert np.array_equal(same.image, before.image)
    assert np.array_equal(same.boxes, before.boxes)
    assert build_augment([{"RandomTile": {"side": 70}}])(before, seed=3).image.shape == (60, 70, 3)


# --- what lies under what


def test_uncovered_by_hand():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 40], [50, 50, 60, 60], [70, 70, 71, 71]], dtype=np.float64)
    covers = np.array([[-5, -5, 4, 20], [3, 0, 6, 10], [22, 22, 28, 38], [50, 50, 60, 60]], dtype=np.float64)
    left, share = uncovered(boxes, covers)
    # The left six columns gone; a hole in the middle of 6 x 16 of 10 x 20; all gone; not met.
    assert left[[0, 1, 3]].tolist() == [[6, 0, 10, 10], [20, 20, 30, 40], [70, 70, 71, 71]]
    assert np.allclose(share, [0.4, 1 - 96 / 200, 0, 1], rtol=0, atol=1e-12)


def test_uncovered_counts_what_a_raster_counts():
    for _ in range(50):
        corners = np.sort(RNG.integers(0, 30, (6, 2, 2)), axis=1)
        boxes = corners.reshape(6, 4).astype(np.float64)
        boxes[:, 2:] += 1
        left, share = uncovered(boxes[:1], boxes[1:])
        raster = np.zeros((32, 32), dtype=bool)
        x1, y1, x2, y2 = boxes[0].astype(int)
        raster[y1:y2, x1:x2] = True
        for a, b, c, d in boxes[1:].astype(int):
            raster[b:d, a:c] = False
        assert np.isclose(share[0], raster.sum() / ((x2 - x1) * (y2 - y1)))
        if raster.any():
            y, x = np.nonzero(raster)
            assert left[0].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


# --- mosaic


def test_mosaic_fills_four_quarters_with_four_images():
    partner, numbers = others([(0, 0, 80, 60)], value=200)
    augment = build_augment([{"Mosaic": {"center_range": [0.25, 0.25], "p": 1}}], min_visibility=0)
    out = augment(sample_of([(0, 0, 80, 60)], value=50), seed=1, partner=partner)
    assert out.image.shape == (60, 80, 3)
    assert (out.image[:15, :20] == 50).all()
    assert (out.image == 200).sum() == 3 * (60 * 80 - 15 * 20)
    assert out.annotation_ids.tolist() == [0, 100, 200, 300]
    assert out.boxes.tolist() == [[0, 0, 20, 15], [20, 0, 80, 15], [0, 15, 20, 60], [20, 15, 80, 60]]
    assert len(set(numbers)) == 3


def test_mosaic_of_a_fixed_size_takes_images_of_any():
    partner, _ = others([(1, 1, 9, 30)], size=(40, 10))
    augment = build_augment([{"Mosaic": {"size": [128, 96], "p": 1}}])
    for seed in range(10):
        assert augment(sample_of([], size=(11, 200)), seed=seed, partner=partner).image.shape == (128, 96, 3)


# --- copy-paste


def test_what_lies_within_a_pasted_rectangle_comes_along():
    """The other image's object holds a crowd region and half of a second object, and touches nothing of a third."""
    boxes = [(10, 10, 30, 30), (12, 12, 20, 20), (20, 10, 40, 30), (50, 40, 60, 50)]
    flags = {"crowd": [False, True, True, True], "difficult": [False, False, True, False]}
    partner, _ = others(boxes, value=9, **flags)
    step = {"CopyPaste": {"num_objects": [1, 1], "scale_range": [1, 1], "p": 1}}
    out = build_augment([step])(sample_of([], value=0), seed=3, partner=partner)
    left, top = out.boxes[0, :2]
    assert (out.image[int(top) : int(top) + 20, int(left) : int(left) + 20] == 9).all()
    assert (out.image == 9).sum() == 20 * 20 * 3
    expected = np.array([[0, 0, 20, 20], [2, 2, 10, 10], [10, 0, 20, 20]]) + np.array([left, top, left, top])
    assert out.boxes.tolist() == expected.tolist()
    assert out.annotation_ids.tolist() == [100, 101, 102]
    assert out.labels.tolist() == [1, 2, 3]
    assert (out.crowd.tolist(), out.difficult.tolist()) == ([False, True, True], [False, False, True])
    assert out.visible.tolist() == [1, 1, 0.5]


def test_pasted_objects_cover_boxes():
    partner, _ = others([(0, 0, 40, 30)], value=9)
    step = {"CopyPaste": {"num_objects": [1, 1], "scale_range": [1, 1], "max_area": 0.25, "p": 1}}
    augment = build_augment([step], min_visibility=0.3)
    num_dropped = 0
    for seed in range(30):
        out = augment(sample_of([(0, 0, 40, 30), (40, 30, 80, 60)], value=0), seed=seed, partner=partner)
        for label, half in ((1, out.image[:30, :40, 0]), (2, out.image[30:, 40:, 0])):
            free = (half == 0).mean()
            rows = np.flatnonzero((out.labels == label) & (out.annotation_ids < 100))
            num_dropped += len(rows) == 0
            assert len(rows) == (free >= 0.3)
            if len(rows):
                assert np.isclose(out.visible[rows[0]], free)
    assert 0 < num_dropped < 60


def test_copy_paste_draws_objects_only_and_leaves_the_rest():
    before = sample_of([(1, 1, 20, 20)])
    for what in ({"crowd": [True]}, {"difficult": [True]}):
        partner, _ = others([(5, 5, 30, 30)], **what)
        out = build_augment([{"CopyPaste": {"p": 1}}])(before, seed=0, partner=partner)
        assert np.array_equal(out.image, before.image)
        assert np.array_equal(out.boxes, before.boxes)
    out = build_augment([{"CopyPaste": {"p": 1}}])(before, seed=0, partner=others([])[0])
    assert np.array_equal(out.image, before.image)


def test_the_given_samples_are_not_changed():
    before, other = sample_of([(1, 1, 40, 40)]), sample_of([(1, 1, 40, 40)])
    images, boxes = (before.image.copy(), other.image.copy()), before.boxes.copy()
    steps = [{"CopyPaste": {"p": 1}}, {"Mosaic": {"p": 1}}, {"LargeScaleJitter": {"size": [60, 80]}}]
    build_augment(steps)(before, seed=0, partner=lambda number: other)
    assert np.array_equal(before.image, images[0])
    assert np.array_equal(other.image, images[1])
    assert np.array_equal(before.boxes, boxes)


# --- steps together


def test_partners_go_through_the_steps_before_and_not_those_after():
    for steps, value in (
        ([{"InvertImg": {"p": 1}}, {"Mosaic": {"p": 1}}], {245, 235}),
        ([{"Mosaic": {"p": 1}}, {"InvertImg": {"p": 1}}], {245, 235}),
        ([{"InvertImg": {"p": 1}}, {"Mosaic": {"p": 1}}, {"InvertImg": {"p": 1}}], {10, 20}),
    ):
        partner, numbers = others([], value=20)
        out = build_augment(steps)(sample_of([], value=10), seed=0, partner=partner)
        assert set(np.unique(out.image).tolist()) == value
        assert len(numbers) == 3
    # Each by random choices of its own.
    augment = build_augment([{"InvertImg": {"p": 0.5}}, {"Mosaic": {"p": 1}}])
    seen = [
        set(np.unique(augment(sample_of([], value=10), seed=s, partner=others([], value=10)[0]).image))
        for s in range(20)
    ]
    assert {10, 245} in seen


def test_images_are_drawn_only_when_a_step_is_applied():
    partner, numbers = others([(1, 1, 20, 20)])
    build_augment([{"Mosaic": {"p": 0}}, {"CopyPaste": {"p": 0}}])(sample_of([]), seed=0, partner=partner)
    assert numbers == []
    # 3 for the mosaic, 1 to paste from, which is a mosaic of 3 more.
    build_augment([{"Mosaic": {"p": 1}}, {"CopyPaste": {"p": 1}}])(sample_of([]), seed=0, partner=partner)
    assert len(numbers) == 7


def test_the_seed_decides_mixtures_too():
    steps = [{"CopyPaste": {}}, {"Mosaic": {}}, {"LargeScaleJitter": {"size": [60, 80]}}, {"ColorJitter": {}}]
    first, second = build_augment(steps), pickle.loads(pickle.dumps(build_augment(steps)))
    pool = [sample_of([(5, 5, 50, 40), (20, 20, 70, 55)], first_id=10 * i) for i in range(5)]

    def partner(number):
        return pool[number % 5]

    outcomes = [first(pool[0], seed=seed, partner=partner) for seed in range(12)]
    for seed in reversed(range(12)):
        again = second(pool[0], seed=seed, partner=partner)
        assert np.array_equal(again.image, outcomes[seed].image)
        assert np.array_equal(again.boxes, outcomes[seed].boxes)
        assert np.array_equal(again.annotation_ids, outcomes[seed].annotation_ids)
    assert len({out.image.tobytes() for out in outcomes}) == 12


def test_flags_and_ids_travel_with_their_boxes():
    before = sample_of([(2, 2, 12, 12), (60, 40, 75, 55), (30, 20, 50, 40)], crowd=[1, 0, 0], difficult=[0, 1, 0])
    steps = [{"HorizontalFlip": {"p": 1}}, {"RandomCrop": {"height": 40, "width": 60, "p": 1}}]
    for seed in range(10):
        out = build_augment(steps)(before, seed=seed)
        assert np.array_equal(out.labels, before.labels[out.annotation_ids])
        assert np.array_equal(out.crowd, before.crowd[out.annotation_ids])
        assert np.array_equal(out.difficult, before.difficult[out.annotation_ids])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"Mosiac": {}}], r"augment\[0\] \(Mosiac\): no such transform .*; did you mean Mosaic\?"),
        ([{"LargeScaleJitter": {"scale": 1}}], r"no such parameter 'scale'; did you mean scale_range\?"),
        ([{"CopyPaste": {"zz": 1}}], r"no such parameter 'zz'; it has p, num_objects, scale_range, max_area$"),
        ([{"LargeScaleJitter": {"scale_range": [2, 1]}}], r"scale_range: must not fall, got \[2.0, 1.0\]"),
        ([{"LargeScaleJitter": {"scale_range": [0, 1]}}], r"scale_range: Input should be greater than 0, got 0"),
        ([{"LargeScaleJitter": {"size": [100]}}], r"size: Field required"),
        ([{"LargeScaleJitter": {"size": 100}}], r"size: Input should be a valid array, got 100"),
        ([{"LargeScaleJitter": {"fill": 256}}], r"fill: Input should be less than or equal to 255, got 256"),
        ([{"Mosaic": {"center_range": [0.2, 1.2]}}], r"center_range: Input should be less than or equal to 1, got 1.2"),
        ([{"RandomTile": {"side": 8}}], r"side: Input should be greater than or equal to 32, got 8"),
        ([{"RandomTile": {"side": [64, 64]}}], r"side: Input should be a valid integer, got \[64, 64\]"),
        ([{"Mosaic": {"p": "often"}}], r"p: Input should be a valid number, got 'often'"),
        ([{"CopyPaste": {"num_objects": [0, 2]}}], r"num_objects: Input should be greater than or equal to 1, got 0"),
        ([{"OneOf": {"transforms": [{"Mosaic": {}}]}}], r"transforms\[0\] \(Mosaic\): must stand at the top level"),
        ([{"Morphological": {}}], r"must not be used here: albumentations gives wrong boxes with it"),
        ([{"RandomGridShuffle": {}}], r"must not be used here: it tears objects apart"),
    ],
)
def test_mistakes_name_the_step_and_the_parameter(steps, message):
    with pytest.raises(DataError, match=message) as caught:
        build_augment(steps)
    assert "\n" not in str(caught.value)


def test_mixing_needs_other_images():
    with pytest.raises(DataError, match=r"augment\[0\] \(Mosaic\): mixes several images, and only one is given"):
        build_augment([{"Mosaic": {"p": 1}}])(sample_of([]), seed=0)


# --- strips

STRIPS = [(2, 3000), (3000, 2), (1, 5000), (5000, 1), (1, 40_000), (1, 1)]
ON_STRIPS = [
    {"LargeScaleJitter": {"size": [96, 128]}},
    {"LargeScaleJitter": {"size": [1, 1], "scale_range": [0.01, 5]}},
    {"RandomTile": {"side": 48}},
    {"Mosaic": {"p": 1}},
    {"Mosaic": {"size": [96, 128], "center_range": [0, 1], "p": 1}},
    {"CopyPaste": {"max_area": 1, "p": 1}},
    {"HorizontalFlip": {"p": 1}},
    {"VerticalFlip": {"p": 1}},
    {"Transpose": {"p": 1}},
    {"Resize": {"height": 64, "width": 64, "p": 1}},
    {"RandomResizedCrop": {"size": [64, 64], "p": 1}},
    {"BBoxSafeRandomCrop": {"p": 1}},
    {"Affine": {"scale": [0.5, 2], "rotate": [-20, 20], "p": 1}},
    {"ColorJitter": {"p": 1}},
    {"GaussianBlur": {"p": 1}},
]


@pytest.mark.parametrize("size", STRIPS)
@pytest.mark.parametrize("step", ON_STRIPS, ids=lambda step: next(iter(step)))
def test_boxes_in_strips_stay_valid(step, size):
    augment = build_augment([step])
    height, width = size
    boxes = [(0, 0, width, height), (0.1 * width, 0, 0.6 * width, height)]
    for seed in range(4):
        # Strips are mixed with ordinary images, and with strips.
        partner, _ = others([(0, 0, 20, 20)]) if seed % 2 else others(boxes, size=size)
        after = augment(sample_of(boxes, size=size), seed=seed, partner=partner)
        own_height, own_width = after.image.shape[:2]
        assert min(own_height, own_width) >= 1
        assert (after.boxes >= 0).all()
        assert (after.boxes <= [own_width, own_height] * 2).all()
        assert (after.boxes[:, 2:] - after.boxes[:, :2] >= 0.1).all()


LIBRARY_STEPS = [
    {"Erasing": {}},
    {"CoarseDropout": {}},
    {"GridDropout": {}},
    {"GridDistortion": {}},
    {"RandomScale": {}},
    {"RandomCrop": {"height": 60, "width": 80}},
    {"CenterCrop": {"height": 60, "width": 80}},
    {"Crop": {"x_max": 60, "y_max": 80}},
    {"AtLeastOneBBoxRandomCrop": {"height": 60, "width": 80}},
    {"Downscale": {}},
    {"GlassBlur": {}},
    {"Superpixels": {}},
    {"ToGray": {}},
    {"FrequencyMasking": {}},
    {"TimeMasking": {}},
    {"OneOf": {"transforms": [{"Erasing": {"p": 1}}, {"GridDropout": {"p": 1}}]}},
]


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2), (1, 5000), (40, 6000), (1, 1)])
@pytest.mark.parametrize("step", LIBRARY_STEPS, ids=lambda step: next(iter(step)))
def test_a_strip_that_a_step_of_albumentations_cannot_take_stays_as_it_is(step, size, caplog):
    ((name, parameters),) = step.items()
    augment = build_augment([{name: {**parameters, "p": 1}}])
    height, width = size
    before = sample_of([(0, 0, width, height), (0.1 * width, 0, 0.6 * width, height)], size=size)
    for seed in range(3):
        after = augment(before, seed=seed)
        assert min(after.image.shape[:2]) >= 1
        assert (after.boxes <= [after.image.shape[1], after.image.shape[0]] * 2).all()
        if caplog.records:
            assert f"augment[0] ({name}): cannot be applied to image 0 of {width}x{height} pixels: " in caplog.text
    assert len(caplog.records) <= 1, "one warning for a step"


def test_a_crop_larger_than_the_image_leaves_it_whole_with_one_warning(caplog):
    augment = build_augment([{"RandomCrop": {"height": 300, "width": 300, "p": 1}}, {"HorizontalFlip": {"p": 1}}])
    before = sample_of([(0, 0, 30, 40)], size=(200, 400), first_id=7)
    for seed in range(3):
        after = augment(before, seed=seed)
        assert np.array_equal(after.image, before.image[:, ::-1])
        assert after.boxes.tolist() == [[370, 0, 400, 40]]
    (record,) = caplog.records
    assert record.getMessage() == (
        "augment[0] (RandomCrop): cannot be applied to image 7 of 400x200 pixels: Crop size (height, width) exceeds "
        "image dimensions (height, width): (300, 300) vs (200, 400); it and others like it stay as they are"
    )


def test_forked_workers_warn_of_a_step_once(tmp_path):
    step = [{"RandomCrop": {"height": 300, "width": 300, "p": 1}}]
    augment, log = build_augment(step), tmp_path / "log"
    handler = logging.FileHandler(log)
    logging.getLogger("resdet").addHandler(handler)
    try:
        for _ in range(2):
            if (child := os.fork()) == 0:
                augment(sample_of([]), seed=0)
                os._exit(0)
            os.waitpid(child, 0)
    finally:
        logging.getLogger("resdet").removeHandler(handler)
    assert log.read_text().count("cannot be applied") == 1


def test_a_mistake_that_no_image_could_take_still_ends_the_run():
    augment = build_augment([{"ToGray": {"num_output_channels": 1, "p": 1}}])
    with pytest.raises(DataError, match=r"^image 7: augment\[0\] \(ToGray\): must give a uint8 image"):
        augment(sample_of([], size=(100, 100), first_id=7), seed=0)
