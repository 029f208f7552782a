import os
import pickle
import random
import subprocess
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest

from resdet.data.augment.pipeline import Augment, _transformed, build_augment
from resdet.data.augment.sample import Sample
from resdet.errors import DataError, UserError

HEIGHT, WIDTH = 90, 120
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
# Two decimals, as in COCO, so that hardly any is exact in binary.
BOXES = np.array([[3.17, 8.29, 50.41, 60.73], [0, 0, 120, 90], [100.07, 70.11, 119.99, 89.97]], dtype=np.float32)
LABELS = np.array([1, 2, 3])


def sample_of(image, boxes, labels):
    count = len(boxes)
    none = np.zeros(count, dtype=bool)
    return Sample(image, 1, boxes, labels, none, none, np.arange(count), np.ones(count))


def run(augment: Augment, image, boxes, labels, *, seed):
    """Give image, boxes, and the rows they had before."""
    out = augment(sample_of(image, boxes, labels), seed=seed)
    assert np.array_equal(out.labels, labels[out.annotation_ids])
    return out.image, out.boxes, out.annotation_ids


@pytest.mark.parametrize(
    "step",
    [
        {"ColorJitter": {"p": 1}},
        {"GaussianBlur": {"p": 1}},
        {"RandomBrightnessContrast": {"p": 1}},
        {"ToGray": {"p": 1}},
        {"ImageCompression": {"p": 1, "quality_range": [40, 60]}},
        {"HorizontalFlip": {"p": 0}},
        {"Rotate": {"p": 0}},
        {"OneOf": {"transforms": [{"GaussNoise": {}}, {"CLAHE": {}}], "p": 1}},
        {"NoOp": None},
    ],
)
def test_boxes_are_bit_identical_where_no_pixel_moves(step):
    image, boxes, kept = run(build_augment([step]), IMAGE, BOXES, LABELS, seed=1)
    assert boxes.dtype == np.float32
    assert np.array_equal(boxes, BOXES)
    assert kept.tolist() == [0, 1, 2]
    assert image.shape == IMAGE.shape


@pytest.mark.parametrize("name", ["HorizontalFlip", "VerticalFlip"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_flips_are_exact_and_undo_themselves(name, dtype):
    boxes = BOXES.astype(dtype)
    once = build_augment([{name: {"p": 1}}])
    image, flipped, _ = run(once, IMAGE, boxes, LABELS, seed=0)
    expected = boxes.astype(np.float64)
    if name == "HorizontalFlip":
        expected[:, [0, 2]] = WIDTH - expected[:, [2, 0]]
        assert np.array_equal(image, IMAGE[:, ::-1])
    else:
        expected[:, [1, 3]] = HEIGHT - expected[:, [3, 1]]
        assert np.array_equal(image, IMAGE[::-1])
    assert np.array_equal(flipped, expected.astype(dtype))
    twice = build_augment([{name: {"p": 1}}, {name: {"p": 1}}])
    image, boxes_again, _ = run(twice, IMAGE, boxes, LABELS, seed=0)
    assert np.array_equal(image, IMAGE)
    assert np.array_equal(boxes_again, boxes)


@pytest.mark.parametrize("name", ["HorizontalFlip", "VerticalFlip"])
def test_flips_draw_and_turn_as_albumentations_own(name):
    steps = [{name: {"p": 0.5}}, {"ColorJitter": {"p": 1}}]
    ours = build_augment(steps)
    (place, flip), jitter = ours.parts
    transform, _ = flip.args
    library = Augment(steps, [(place, partial(_transformed, transform)), jitter], 0.1)
    num_flipped = 0
    for seed in range(20):
        image, boxes, kept = run(ours, IMAGE, BOXES, LABELS, seed=seed)
        expected_image, expected_boxes, expected_kept = run(library, IMAGE, BOXES, LABELS, seed=seed)
        # Equal colours: the stream of random numbers goes on from the same place.
        assert np.array_equal(image, expected_image)
        assert np.array_equal(kept, expected_kept)
        # albumentations computes fractions of the image; float32 boxes up to 512 px are exact to 3e-5.
        np.testing.assert_allclose(boxes, expected_boxes, rtol=0, atol=3e-5)
        num_flipped += not np.array_equal(boxes, BOXES)
    assert 4 < num_flipped < 16
    with pytest.raises(AssertionError):  # another draw would be noticed
        assert np.array_equal(run(ours, IMAGE, BOXES, LABELS, seed=1)[0], run(library, IMAGE, BOXES, LABELS, seed=2)[0])


STRONG = [
    {"RandomResizedCrop": {"size": [80, 100], "p": 1}},
    {"HorizontalFlip": {"p": 0.5}},
    {"OneOf": {"transforms": [{"Rotate": {"limit": 20}}, {"CoarseDropout": {}}, {"Blur": {}}], "p": 0.8}},
    {"ColorJitter": {"p": 0.8}},
]


def test_the_seed_alone_decides():
    first, second = build_augment(STRONG), pickle.loads(pickle.dumps(build_augment(STRONG)))
    outcomes = {}
    for seed in range(10):
        outcomes[seed] = run(first, IMAGE, BOXES, LABELS, seed=seed)
        random.seed(seed)  # the global state must not matter
    for seed in reversed(range(10)):
        for got, expected in zip(run(second, IMAGE, BOXES, LABELS, seed=seed), outcomes[seed], strict=True):
            assert np.array_equal(got, expected)
    assert len({image.tobytes() for image, _, _ in outcomes.values()}) == 10


def test_steps_draw_independent_numbers():
    """albumentations' own seeding gives all steps one number: then both flips always happen together."""
    augment = build_augment([{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}])
    box = np.array([[10, 10, 20, 20]], dtype=np.float32)
    seen = {tuple(run(augment, IMAGE, box, np.array([1]), seed=seed)[1][0, :2].tolist()) for seed in range(40)}
    assert len(seen) == 4


def test_boxes_reaching_out_of_the_image_are_clipped_and_never_raise():
    boxes = np.array([[-0.0001, -3, 120.00001, 95], [119.9999, 10, 130, 30]], dtype=np.float32)
    for step in ({"HorizontalFlip": {"p": 1}}, {"ColorJitter": {"p": 1}}, {"Rotate": {"p": 1}}):
        _, out, kept = run(build_augment([step]), IMAGE, boxes, np.array([1, 2]), seed=3)
        assert 0 in kept
        assert (out >= 0).all()
        assert (out <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()


def test_boxes_that_lose_too_much_are_dropped_and_rows_stay_aligned():
    crop = {"Crop": {"x_min": 0, "y_min": 0, "x_max": 60, "y_max": 90, "p": 1}}
    boxes = np.array([[70, 0, 80, 10], [10, 10, 30, 30], [50, 0, 70, 10], [57, 0, 77, 10]], dtype=np.float32)
    labels = np.array([4, 5, 6, 7])
    _, out, kept = run(build_augment([crop], min_visibility=0.2), IMAGE, boxes, labels, seed=0)
    assert kept.tolist() == [1, 2]  # fully inside, half inside; 3 of 20 columns and nothing are too little
    assert np.allclose(out, [[10, 10, 30, 30], [50, 0, 60, 10]], rtol=0, atol=1e-5)  # float32 of numbers below 64
    _, out, kept = run(build_augment([crop], min_visibility=0.0), IMAGE, boxes, labels, seed=0)
    assert kept.tolist() == [1, 2, 3]


def test_visibility_adds_up_over_steps():
    """Two crops that halve a box leave a quarter of it."""
    halves = [
        {"Crop": {"x_min": 0, "y_min": 0, "x_max": 60, "y_max": 90, "p": 1}},
        {"Crop": {"x_min": 0, "y_min": 0, "x_max": 60, "y_max": 45, "p": 1}},
    ]
    box = np.array([[40, 25, 80, 65]], dtype=np.float32)
    assert run(build_augment(halves, min_visibility=0.24), IMAGE, box, np.array([1]), seed=0)[2].tolist() == [0]
    assert run(build_augment(halves, min_visibility=0.26), IMAGE, box, np.array([1]), seed=0)[2].tolist() == []


def test_images_without_boxes_pass():
    image, boxes, kept = run(build_augment(STRONG), IMAGE, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), seed=0)
    assert image.shape == (80, 100, 3)
    assert boxes.shape == (0, 4)
    assert kept.shape == (0,)


def test_the_given_image_is_not_changed():
    before = IMAGE.copy()
    run(build_augment([{"CoarseDropout": {"p": 1}}, *STRONG]), IMAGE, BOXES, LABELS, seed=0)
    assert np.array_equal(IMAGE, before)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"HorizontalFlp": {}}], r"augment\[0\] \(HorizontalFlp\): no such .*; did you mean HorizontalFlip\?"),
        ([{"NoOp": {}}, {"horizontalflip": {}}], r"augment\[1\] \(horizontalflip\).*did you mean HorizontalFlip"),
        ([{"ColorJitter": {"brightnes": 1}}], r"no such parameter 'brightnes'; did you mean brightness\?"),
        ([{"HorizontalFlip": {"q": 1}}], r"\(HorizontalFlip\): no such parameter 'q'; it has p$"),
        ([{"HorizontalFlip": {"p": 2}}], r"p: Input should be less than or equal to 1, got 2"),
        ([{"ColorJitter": {"brightness": "a"}}], r"brightness: .*got 'a'"),
        ([{"RandomCrop": {}}], r"height: Field required; width: Field required"),
        ([{"OneOf": {"transforms": [{"Blur": {}}, {"Blr": {}}]}}], r"\(OneOf\)\.transforms\[1\] \(Blr\).*mean Blur"),
        ([{"OneOf": {"transforms": []}}], r"transforms must be a list of transforms, got \[\]"),
        ([{"Normalize": {}}], "must not be used here: the detector takes uint8 images"),
        ([{"MaskDropout": {}}], "needs mask, and there are only images, boxes and labels"),
        ([{"Blur": 3}], r"parameters must be given as"),
        (["HorizontalFlip"], r"augment\[0\]: must be one step as"),
        ([{"Blur": {}, "CLAHE": {}}], r"augment\[0\]: must be one step as"),
    ],
)
def test_mistakes_name_the_step_and_the_parameter(steps, message):
    with pytest.raises(DataError, match=message) as caught:
        build_augment(steps)
    assert "\n" not in str(caught.value)


def test_a_step_that_fails_is_named():
    augment = build_augment([{"NoOp": {}}, {"Crop": {"x_max": 500, "y_max": 500, "p": 1}}])
    with pytest.raises(DataError, match=r"augment\[1\] \(Crop\): ") as caught:
        run(augment, IMAGE, BOXES, LABELS, seed=0)
    assert "\n" not in str(caught.value)


def test_a_step_that_changes_the_kind_of_image_is_named():
    augment = build_augment([{"ToGray": {"p": 1, "num_output_channels": 1}}])
    with pytest.raises(DataError, match=r"augment\[0\] \(ToGray\): must give a uint8 image \[H, W, 3\], gave uint8"):
        run(augment, IMAGE, BOXES, LABELS, seed=0)


def test_albumentations_is_imported_late_and_asks_no_network():
    code = (
        "import sys, socket, warnings; warnings.simplefilter('error', UserWarning)\n"
        "import resdet.data.augment.pipeline as augment\n"
        "assert 'albumentations' not in sys.modules\n"
        "def refuse(*args): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "augment.build_augment([{'HorizontalFlip': {}}])\n"
        "assert 'albumentations' in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


LIBRARY_RUN = "from resdet.data.augment.pipeline import build_augment; build_augment([{'HorizontalFlip': {}}])"


def test_albumentationsx_is_refused_before_it_is_imported(tmp_path):
    """It is imported by albumentations' name, under the AGPL, and reports what it is used for."""
    (tmp_path / "albumentations").mkdir()
    (tmp_path / "albumentations" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "albumentationsx-2.5.1.dist-info").mkdir()
    (tmp_path / "albumentationsx-2.5.1.dist-info" / "METADATA").write_text("Name: albumentationsx\nVersion: 2.5.1\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY_RUN], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == (
        "resdet.errors.UserError: augmentation needs albumentations>=2.0.8,<2.1 (MIT license), but `import "
        "albumentations` finds albumentationsx 2.5.1: pip uninstall albumentationsx, then pip install "
        "--force-reinstall 'albumentations>=2.0.8,<2.1'"
    )


def test_another_library_by_the_name_of_albumentations_is_refused(monkeypatch):
    other = ModuleType("albumentations")
    other.__version__, other.__file__ = "unknown", "/somewhere/albumentations/__init__.py"
    monkeypatch.setitem(sys.modules, "albumentations", other)
    with pytest.raises(UserError, match=r"finds version unknown \(/somewhere/albumentations/__init__.py\)"):
        build_augment([{"HorizontalFlip": {}}])


def test_albumentations_reports_nothing(monkeypatch):
    for name in ("NO_ALBUMENTATIONS_UPDATE", "ALBUMENTATIONS_NO_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    build_augment([{"HorizontalFlip": {}}])
    assert (os.environ["NO_ALBUMENTATIONS_UPDATE"], os.environ["ALBUMENTATIONS_NO_TELEMETRY"]) == ("1", "1")
