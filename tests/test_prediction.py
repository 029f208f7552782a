import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from resdet.data.image_files import find_images
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.drawing import above, class_color, draw, legible_scale, shown_from
from resdet.errors import DataError
from resdet.evaluation.coco import read_coco_detections
from resdet.evaluation.settings import InferenceSettings
from resdet.prediction import predict, to_coco_json
from resdet.types import Category, Prediction

CATEGORIES = (Category(1, 7, "cat"), Category(2, 3, "dog"))


def prediction(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Prediction:
    return Prediction(
        boxes=torch.tensor(boxes).float().reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        scores=torch.tensor(scores),
    )


class Corner(nn.Module):
    """Returns for each image one box of the image's size and one of half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batch_sizes: list[int] = []

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batch_sizes.append(len(images))
        answers = []
        for image in images:
            assert 0 <= float(image.min()) <= float(image.max()) <= 1
            height, width = image.shape[1:]
            answers.append(prediction([[0, 0, width, height], [0, 0, width / 2, height / 2]], [1, 2], [0.9, 0.3]))
        return answers


def write_image(path: Path, height: int = 8, width: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def test_images_are_found_in_files_folders_and_patterns(tmp_path):
    b, a = write_image(tmp_path / "b.png"), write_image(tmp_path / "a.JPG")
    deep = write_image(tmp_path / "deep" / "c.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    odd = tmp_path / "odd"
    a.replace(odd)
    a = write_image(tmp_path / "a.JPG")
    assert find_images([tmp_path]) == [a, b]
    assert find_images([b, tmp_path, str(a)]) == [b, a]
    assert find_images([odd]) == [odd]
    assert find_images([tmp_path / "**" / "*.jpg"]) == [deep]
    assert find_images([tmp_path / "?.png", tmp_path / "deep"]) == [b, deep]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jpg", r"none\.jpg: no such file or folder"),
        ("empty", r"empty: no images in this folder \(looked for \.jpg"),
        ("*.tif", r"\*\.tif: no image matches this pattern"),
    ],
)
def test_nothing_found_is_an_error(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("")
    with pytest.raises(DataError, match=message):
        find_images([tmp_path / name])
    with pytest.raises(DataError, match="no images given"):
        find_images([])


def test_predictions_come_in_order_with_their_images(tmp_path):
    paths = [write_image(tmp_path / f"{i}.png", height=8 + i) for i in range(4)]
    array = np.zeros((20, 30, 3), dtype=np.uint8)
    model = Corner().train()
    results = list(predict(model, [*paths, array], InferenceSettings(batch_size=2), score_threshold=0.5))
    assert model.batch_sizes == [2, 2, 1]
    assert [path for path, _, _ in results] == [*paths, None]
    assert model.training
    for i, (_, image, found) in enumerate(results[:4]):
        assert image.shape == (8 + i, 12, 3)
        np.testing.assert_array_equal(image, np.asarray(Image.open(paths[i])))
        assert found["boxes"].tolist() == [[0, 0, 12, 8 + i]]
        assert found["labels"].tolist() == [1]
    assert len(next(predict(model, [array]))[2]["scores"]) == 2


def test_predicting_leaves_the_callers_gradients_alone_and_ends_cleanly():
    model = Corner().train()
    results = predict(model, [np.zeros((4, 4, 3), dtype=np.uint8)] * 3)
    next(results)
    assert torch.is_grad_enabled()
    results.close()
    assert model.training
    assert model.batch_sizes == [1]


def test_unreadable_images_are_named(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        list(predict(Corner(), [broken]))
    good = np.zeros((4, 4, 3), dtype=np.uint8)
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(DataError, match=r"images\[1\]: expected uint8 RGB \[H, W, 3\], got"):
            list(predict(Corner(), [good, bad]))


def test_threshold_keeps_equal_scores():
    kept = above(prediction([[0, 0, 1, 1]] * 3, [1, 2, 1], [0.75, 0.5, 0.25]), 0.5)
    assert kept["labels"].tolist() == [1, 2]
    assert kept["boxes"].shape == (2, 4)


def test_drawing_marks_the_box_and_nothing_far_from_it():
    image = np.full((200, 300, 3), 128, dtype=np.uint8)
    before = image.copy()
    drawn = draw(image, prediction([[100, 80, 160, 140]], [1], [0.9]), CATEGORIES)
    np.testing.assert_array_equal(image, before)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    color = np.array(class_color(1))
    # First and last pixel of the box: continuous corners 100 and 160 enclose columns 100..159.
    for row, column in ((139, 100), (139, 159), (110, 100), (110, 159)):
        np.testing.assert_array_equal(drawn[row, column], color)
    assert (drawn[110, [99, 160]] == 128).all()
    changed = np.argwhere((drawn != image).any(axis=2))
    assert changed.min(axis=0)[0] >= 60  # the name above
    assert changed[:, 0].max() == 139
    assert changed[:, 1].min() == 100
    assert (drawn[85:135, 105:155] == 128).all()


def test_small_images_are_enlarged_with_their_boxes():
    image = np.full((100, 128, 3), 128, dtype=np.uint8)
    assert legible_scale(image) == 4
    assert legible_scale(np.zeros((320, 640, 3), dtype=np.uint8)) == 1
    drawn = draw(image, prediction([[40, 50, 80, 90]], [1], [0.9]), CATEGORIES, scale=4)
    assert drawn.shape == (400, 512, 3)
    marked = np.argwhere((drawn[200:360] == np.array(class_color(1))).all(axis=2))
    assert (marked[:, 1].min(), marked[:, 1].max()) == (160, 319)


def test_nothing_below_the_threshold_is_drawn():
    image = np.full((50, 60, 3), 128, dtype=np.uint8)
    found = prediction([[5, 5, 30, 30]], [1], [0.4])
    np.testing.assert_array_equal(draw(image, found, CATEGORIES, score_threshold=0.5), image)
    np.testing.assert_array_equal(draw(image, prediction([], [], []), CATEGORIES), image)
    assert (draw(image, found, CATEGORIES, score_threshold=0.4) != image).any()


@pytest.mark.parametrize("size", [(5, 5), (40, 60), (1200, 1600), (3, 400)])
@pytest.mark.parametrize(
    "box", [[0, 0, 3, 3], [-20, -20, 2000, 2000], [2.4, 2.4, 2.5, 2.5], [50, 35, 60, 40], [5000, 5000, 5010, 5010]]
)
def test_any_box_can_be_drawn_in_any_image(size, box):
    image = np.full((*size, 3), 128, dtype=np.uint8)
    drawn = draw(image, prediction([box, box, box, box], [1, 2, 3, 99], [0.9, 0.8, 0.7, 0.6]), CATEGORIES)
    assert drawn.shape == image.shape
    assert (drawn != image).any()


def test_the_name_stays_inside_the_image():
    image = np.full((120, 160, 3), 128, dtype=np.uint8)

    def plate(box: list[float]) -> int:
        drawn = draw(image, prediction([box], [1], [0.9]), CATEGORIES)
        return int((drawn == np.array(class_color(1))).all(axis=2).sum())

    # As many coloured pixels as for the same box in the middle: no row or column of the plate (ten pixels and more
    # each) is cut off. The box itself, a pixel or two, may be covered.
    middle = plate([80, 60, 81, 61])
    for box in ([158, 60, 159, 61], [80, 0, 81, 1], [158, 118, 160, 120], [0, 0, 1, 1]):
        assert abs(plate(box) - middle) < 5


def test_names_do_not_cover_each_other():
    image = np.full((200, 200, 3), 128, dtype=np.uint8)
    boxes = [[50, 80, 120, 140], [52, 81, 121, 141]]
    both = draw(image, prediction(boxes, [1, 2], [0.9, 0.8]), CATEGORIES)
    alone = draw(image, prediction(boxes[:1], [1], [0.9]), CATEGORIES)
    plate = (slice(60, 80), slice(50, 120))
    np.testing.assert_array_equal(both[plate], alone[plate])


def test_colors_are_fixed_and_distinct():
    assert class_color(1) == class_color(1)
    colors = np.array([class_color(label) for label in range(1, 21)]).astype(int)
    distance = np.abs(colors[:, None] - colors[None]).sum(axis=2) + 1000 * np.eye(20, dtype=int)
    assert distance.min() > 25
    assert len({class_color(label) for label in range(1, 81)}) == 80


def test_coco_json_names_images_by_number_or_position():
    found = [prediction([[1, 2, 4, 6], [0, 0, 1, 1]], [1, 2], [0.5, 0.25]), prediction([], [], [])]
    entries = to_coco_json([Path("a/000139.jpg"), Path("7.png")], found, CATEGORIES)
    assert entries[0] == {
        "image_id": 139,
        "file_name": "000139.jpg",
        "category_id": 7,
        "category_name": "cat",
        "bbox": [1, 2, 3, 4],
        "score": 0.5,
    }
    assert [entry["category_id"] for entry in entries] == [7, 3]
    # One name is not a number, or two are the same number: images are numbered, so that no two share an id.
    for names in (["139.jpg", "b.jpg"], ["x/1.jpg", "y/1.jpg"], ["2.jpg", "\u00b2.jpg"]):
        entries = to_coco_json(list(map(Path, names)), [found[0], found[0]], CATEGORIES)
        assert [entry["image_id"] for entry in entries] == [1, 1, 2, 2]
    assert to_coco_json([Path("x.jpg")], found[:1], ())[0]["category_id"] == 1
    assert "category_name" not in to_coco_json([Path("x.jpg")], found[:1], ())[0]
    with pytest.raises(ValueError, match="zip"):
        to_coco_json([Path("x.jpg")], found, CATEGORIES)


def test_coco_json_is_read_back_as_detections(tmp_path):
    table = shapes_table(3, 64, 0)
    images = ShapesImages(image_size=64, seed=0)
    paths = []
    for index in range(3):
        paths.append(tmp_path / f"{index + 1:06d}.png")
        Image.fromarray(images(index)).save(paths[-1])
    results = list(predict(Corner(), find_images([tmp_path])))
    entries = to_coco_json(
        [path for path, _, _ in results if path], [found for _, _, found in results], table.categories
    )
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(entries))
    read = read_coco_detections(path, table)
    assert read.image_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert read.boxes[0].tolist() == [0, 0, 64, 64]
    assert read.labels.tolist() == [1, 2] * 3


def test_detections_are_shown_from_the_last_evaluations_best_f1_or_a_half():
    model = Corner()
    assert shown_from(model) == (0.5, "no threshold has been evaluated yet")
    model.score_threshold = None
    assert shown_from(model)[0] == 0.5
    model.score_threshold = 0.0
    assert shown_from(model) == (0.0, "best F1 of the last evaluation")
