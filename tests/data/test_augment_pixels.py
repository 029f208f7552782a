"""Boxes and image stay together: every box is painted in a colour of its own and found again after augmentation."""

import itertools

import albumentations
import numpy as np
import pytest
import yaml

from resdet.data.augment.library import COMPOSITES, import_albumentations, transform_names
from resdet.data.augment.pipeline import OWN_STEPS, build_augment
from resdet.data.augment.sample import Sample

HEIGHT, WIDTH = 90, 120
MIN_VISIBILITY = 0.1
# Colours by label: full or no red, green and blue, so that half a channel says which side of an edge a pixel is on.
COLORS = {label: np.array([label >> 2 & 1, label >> 1 & 1, label & 1]) * 255 for label in range(1, 7)}

# Groups by what a box may miss its paint by, in pixels. Everywhere, 1e-3 is for the boxes' own float32 arithmetic.
# exact: pixels map onto pixels. resized: an interpolated edge is seen up to half a pixel from where it is.
# turned: the sharp corners of a turned box are interpolated away, and its fit into whole pixels may be scaled.
# bent: pixels are the unit in which distortions know where they go, and interpolation rounds thin tips off; an Affine
# that fits its output rounds size and shift apart.
TOLERANCES = {"exact": 0.0, "resized": 0.5, "turned": 2.0, "bent": 3.0}
STEPS = yaml.safe_load("""
exact:
- HorizontalFlip: {p: 1}
- VerticalFlip: {p: 1}
- TimeReverse: {p: 1}
- Transpose: {p: 1}
- D4: {p: 1}
- SquareSymmetry: {p: 1}
- RandomRotate90: {p: 1}
- AtLeastOneBBoxRandomCrop: {height: 60, width: 80, p: 1}
- BBoxSafeRandomCrop: {p: 1}
- CenterCrop: {height: 60, width: 80, p: 1}
- Crop: {x_min: 10, y_min: 20, x_max: 90, y_max: 80, p: 1}
- RandomCrop: {height: 60, width: 80, p: 1}
- RandomCropFromBorders: {p: 1}
- RandomTile: {side: 64}
- Pad: {padding: 10, p: 1}
- PadIfNeeded: {min_height: 128, min_width: 128, p: 1}
- CoarseDropout: {num_holes_range: [2, 4], hole_height_range: [0.2, 0.5], hole_width_range: [0.2, 0.5], p: 1}
- ConstrainedCoarseDropout: {bbox_labels: [1, 2, 3], num_holes_range: [1, 2], p: 1}
- Erasing: {p: 1}
- GridDropout: {p: 1}
- PixelDropout: {p: 1}
- XYMasking: {num_masks_x: [1, 3], num_masks_y: [1, 3], mask_x_length: [5, 20], mask_y_length: [5, 20], p: 1}
- TimeMasking: {p: 1}
- FrequencyMasking: {p: 1}
- NoOp: {p: 1}
- OneOf: {transforms: [CoarseDropout: {num_holes_range: [2, 4]}, Erasing: {}, Transpose: {}], p: 1}
- CopyPaste: {p: 1}
- CopyPaste: {num_objects: [1, 1], scale_range: [1, 3], max_area: 1, p: 1}
- CopyPaste: {num_objects: [2, 4], p: 1}
resized:
- CropAndPad: {percent: [-0.2, 0.2], p: 1}
- RandomSizedBBoxSafeCrop: {height: 60, width: 80, p: 1}
- RandomResizedCrop: {size: [80, 80], scale: [0.3, 1.0], p: 1}
- RandomSizedCrop: {min_max_height: [45, 90], size: [80, 80], p: 1}
- LongestMaxSize: {max_size: 100, p: 1}
- SmallestMaxSize: {max_size: [80, 100], p: 1}
- RandomScale: {scale_limit: 0.4, p: 1}
- Resize: {height: 45, width: 60, p: 1}
- LargeScaleJitter: {scale_range: [0.5, 2], size: [100, 100], fill: 0}
- LargeScaleJitter: {scale_range: [1, 1.3], size: [70, 140], fill: 0}
- Mosaic: {p: 1}
- Mosaic: {size: [100, 140], scale_range: [0.3, 1.5], center_range: [0.0, 1.0], p: 1}
turned:
- Rotate: {limit: 45, p: 1}
- Rotate: {limit: 45, crop_border: true, p: 1}
- SafeRotate: {limit: 45, p: 1}
- ShiftScaleRotate: {p: 1}
- Affine: {scale: [0.8, 1.2], translate_px: [-9, 9], rotate: [-20, 20], shear: [-10, 10], p: 1}
- Perspective: {p: 1}
bent:
- Affine: {scale: [0.8, 1.2], rotate: [-20, 20], fit_output: true, p: 1}
- ElasticTransform: {alpha: 30, p: 1}
- GridDistortion: {p: 1}
- OpticalDistortion: {p: 1}
- PiecewiseAffine: {p: 1}
- ThinPlateSpline: {p: 1}
- GridElasticDeform: {num_grid_xy: [4, 4], magnitude: 5, p: 1}
- OneOf: {transforms: [GridDistortion: {}, OpticalDistortion: {}], p: 1}
""")
CASES = [(step, group) for group, steps in STEPS.items() for step in steps]
IDS = [f"{group}-{next(iter(step))}" for step, group in CASES]


def scene(rng, labels):
    """Paint boxes side by side, with gaps, on black."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    boxes = []
    column = WIDTH // len(labels)
    for i, label in enumerate(labels):
        x1 = i * column + rng.integers(2, column - 16)
        x2 = rng.integers(x1 + 12, (i + 1) * column - 1)
        y1 = rng.integers(0, HEIGHT - 20)
        y2 = rng.integers(y1 + 12, HEIGHT + 1)
        image[y1:y2, x1:x2] = COLORS[label]
        boxes.append((x1, y1, x2, y2))
    none = np.zeros(len(labels), dtype=bool)
    columns = np.array(labels), none, none, np.array(labels), np.ones(len(labels))
    return Sample(image, 1, np.array(boxes, dtype=np.float32), *columns)


def paint_of(image, label):
    """Give the rows and columns of the pixels that are nearest to a label's colour."""
    return np.nonzero(((image > 127) == (COLORS[label] > 127)).all(axis=2))


def check_paint(augment, group, seed, shift=0.0):
    """Compare boxes and paint after one augmentation; gives the number of boxes that were compared."""
    before = scene(np.random.default_rng(seed), (1, 2, 3))
    partners = itertools.count(4)
    after = augment(before, seed=seed, partner=lambda number: scene(np.random.default_rng(number), [next(partners)]))
    assert np.array_equal(after.labels, after.annotation_ids)
    height, width = after.image.shape[:2]
    boxes = after.boxes + np.float32(shift)
    if not shift:
        assert (boxes >= 0).all()
        assert (boxes <= [width, height, width, height]).all()
    tolerance = TOLERANCES[group] + 1e-3
    for label in (1, 2, 3, 4, 5, 6):
        y, x = paint_of(after.image, label)
        found = boxes[after.labels == label]
        if len(found) == 0:
            if label <= 3:
                x1, y1, x2, y2 = before.boxes[label - 1]
                zoom = 3.0 if group == "resized" else 1.0
                # The perimeter: pixels that a border or a hole cuts.
                allowed = MIN_VISIBILITY * zoom * (x2 - x1) * (y2 - y1) + 2 * zoom**0.5 * (x2 - x1 + y2 - y1)
                assert len(x) <= allowed, (label, len(x), allowed)
            continue
        # Several boxes where a step shows parts of an object at several places.
        distance = [
            np.maximum.reduce([x1 - x, x + 1 - x2, y1 - y, y + 1 - y2]) for x1, y1, x2, y2 in found.astype(np.float64)
        ]
        if len(x) == 0:
            # All edge: interpolation has left nothing that is nearer to the paint than to black. A turned object that
            # reaches over the border with a corner fills half of the box around that corner, or less.
            at_border = (found[:, :2] <= 0).any() or (found[:, 2:] >= [width, height]).any()
            widest = 2 * tolerance * (2 if group == "turned" and at_border else 1)
            assert (found[:, 2:] - found[:, :2]).min() <= widest, (label, found)
            continue
        assert np.min(distance, axis=0).max() <= tolerance, (label, found)
        # Where a turned box is cut by the border its corner may be gone, and the box stays larger than its paint.
        x1, y1, x2, y2 = found[0]
        inside = x1 > 0 and y1 > 0 and x2 < width and y2 < height
        if len(found) == 1 and (inside or group != "turned"):
            extent = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert np.abs(extent - found[0]).max() <= tolerance, (label, extent, found[0])
    return len(boxes)


@pytest.mark.parametrize(("step", "group"), CASES, ids=IDS)
def test_paint_inside_a_box_is_found_inside_the_box(step, group):
    augment = build_augment([step], min_visibility=MIN_VISIBILITY)
    assert sum(check_paint(augment, group, seed) for seed in range(12)) >= 12


@pytest.mark.slow
@pytest.mark.parametrize(("step", "group"), CASES, ids=IDS)
def test_paint_inside_a_box_is_found_inside_the_box_for_many_seeds(step, group):
    augment = build_augment([step], min_visibility=MIN_VISIBILITY)
    for seed in range(12, 200):
        check_paint(augment, group, seed)


@pytest.mark.parametrize(("step", "group"), CASES, ids=IDS)
def test_the_comparison_with_paint_can_fail(step, group):
    augment = build_augment([step], min_visibility=MIN_VISIBILITY)
    # Half a pixel more than the paint's own edges can hide: interpolated ones hide twice the tolerance.
    shift = 2 * TOLERANCES[group] + 0.51
    with pytest.raises(AssertionError):
        [check_paint(augment, group, seed, shift) for seed in range(12)]


def test_several_steps_in_a_row():
    steps = [
        {"HorizontalFlip": {"p": 0.5}},
        {"Mosaic": {"p": 0.5}},
        {"CoarseDropout": {"p": 0.5}},
        {"LargeScaleJitter": {"scale_range": [0.7, 1.5], "size": [100, 120], "fill": 0}},
    ]
    augment = build_augment(steps, min_visibility=MIN_VISIBILITY)
    # Two interpolations, half a pixel each, the first enlarged by the second.
    for seed in range(10):
        check_paint(augment, "turned", seed)


def test_reflections_have_boxes_of_their_own():
    step = {"Affine": {"scale": [0.5, 0.8], "border_mode": 4, "p": 1}}
    augment = build_augment([step], min_visibility=0)
    for seed in range(12):
        check_paint(augment, "turned", seed)


def test_every_transform_that_takes_boxes_is_among_these():
    library = import_albumentations()
    tried = {name for steps in STEPS.values() for step in steps for name in step}
    other_inputs = {"MaskDropout", "OverlayElements", "RandomCropNearBBox"}
    moving = {
        name
        for name in transform_names(library)
        if name not in COMPOSITES and issubclass(getattr(library, name), albumentations.DualTransform)
    }
    assert (moving | set(OWN_STEPS)) - tried == other_inputs


@pytest.mark.parametrize(
    "steps",
    [
        [
            {
                "CoarseDropout": {
                    "num_holes_range": [1, 1],
                    "hole_height_range": [2, 2],
                    "hole_width_range": [2, 2],
                    "p": 1,
                }
            }
        ],
        [{"PixelDropout": {"p": 1}}],
    ],
)
def test_boxes_around_small_holes_are_bit_identical(steps):
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(0, 90, size=(20, 2, 2)), axis=1).reshape(20, 4).astype(np.float32)
    none = np.zeros(20, dtype=bool)
    before = Sample(np.zeros((90, 90, 3), np.uint8), 1, boxes, none + 1, none, none, np.arange(20), np.ones(20))
    after = build_augment(steps, min_visibility=0)(before, seed=1)
    same = (after.boxes == boxes[after.annotation_ids]).all(axis=1)
    # One hole of 2x2 may lie on the edge of a few boxes.
    assert same.sum() >= 16
