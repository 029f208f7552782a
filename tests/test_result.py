"""A result's forms: pictures, COCO's entries, YOLO's lines, supervision's detections."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from resdet.data.video import Frame
from resdet.data.yolo import parse_labels
from resdet.drawing import class_color, is_drawing
from resdet.errors import UserError
from resdet.result import Result, coco_entries
from resdet.types import Category

CATEGORIES = (Category(1, 7, "cat"), Category(2, 3, "dog"))


@pytest.fixture
def result() -> Result:
    return Result(
        image=np.full((60, 80, 3), 128, dtype=np.uint8),
        boxes=torch.tensor([[10.0, 20.0, 50.0, 50.0], [0.0, 0.0, 80.0, 60.0], [1.0, 2.0, 4.0, 8.0]]),
        labels=torch.tensor([2, 1, 2]),
        scores=torch.tensor([0.875, 0.5, 0.25]),
        categories=CATEGORIES,
        path=Path("photos/a.jpg"),
    )


def test_a_result_is_read_as_people_read_one(result: Result) -> None:
    assert len(result) == 3
    assert result.names == ("dog", "cat", "dog")
    assert repr(result) == "<Result photos/a.jpg 80x60: 3 detections, of score >= 0.5: 1 dog, 1 cat>"
    nothing = dataclasses.replace(result.above(0.9), path=None, frame=Frame(7, 0.28), shown_from=0.123456)
    assert repr(nothing) == "<Result array frame 7 80x60: 0 detections, of score >= 0.123: none>"
    assert dataclasses.replace(result, categories=()).names == ("2", "1", "2")
    odd = dataclasses.replace(result, path="http://h/\x1b[31m", categories=(CATEGORIES[0], Category(2, 3, "a\nb")))
    assert repr(odd).isprintable()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.scores = torch.zeros(3)  # type: ignore[misc]


def test_above_keeps_equal_scores_and_all_else(result: Result) -> None:
    kept = result.above(0.5)
    assert (kept.scores.tolist(), kept.labels.tolist()) == ([0.875, 0.5], [2, 1])
    assert kept.boxes.shape == (2, 4)
    assert (kept.path, kept.categories, kept.image is result.image) == (result.path, CATEGORIES, True)
    assert len(result) == 3


def test_drawn_is_what_is_worth_showing_unless_asked_otherwise(result: Result) -> None:
    def has(picture: Image.Image, label: int) -> bool:
        return bool((np.asarray(picture) == np.array(class_color(label))).all(axis=2).any())

    assert result.draw(scale=1).size == (80, 60)
    assert result.draw().size == (480, 360)
    assert [has(result.draw(score), 1) for score in (0.4, 0.5, 0.6)] == [True, True, False]
    assert has(result.draw(), 1), "from 0.5 on, as shown_from says"
    assert not has(dataclasses.replace(result, shown_from=0.6).draw(), 1)
    assert (result.image == 128).all()
    np.testing.assert_array_equal(result.draw(0.9, scale=1), result.image)


@pytest.mark.parametrize("name", ["out.png", "out.JPG", "out.webp"])
def test_saved_is_what_is_drawn(result: Result, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("an earlier file is replaced")
    result.save(tmp_path / name, 0.4, scale=2)
    saved = Image.open(tmp_path / name)
    assert saved.format == {"out.png": "PNG", "out.JPG": "JPEG", "out.webp": "WEBP"}[name]
    difference = np.asarray(saved.convert("RGB")).astype(int) - np.asarray(result.draw(0.4, scale=2))
    assert np.abs(difference).mean() < (1 if name == "out.png" else 12)
    assert is_drawing(tmp_path / name) == (name == "out.png")


def test_what_cannot_be_saved_is_refused(result: Result, tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    Image.fromarray(result.image).save(source)
    before = source.read_bytes()
    with pytest.raises(UserError, match=r"a\.png: the output would overwrite an input"):
        dataclasses.replace(result, path=source).save(source)
    assert source.read_bytes() == before
    for name in ("out.bmp", "out"):
        with pytest.raises(UserError, match=rf"{name}: a picture's suffix must be one of \.png, \.jpg, \.jpeg, \.webp"):
            result.save(tmp_path / name)
    with pytest.raises(UserError, match="its directory does not exist"):
        result.save(tmp_path / "none" / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_coco_entries_are_those_that_pycocotools_reads(result: Result) -> None:
    entries = result.to_coco(5)
    assert entries[0] == {
        "image_id": 5,
        "file_name": "a.jpg",
        "category_id": 3,
        "category_name": "dog",
        "bbox": [10, 20, 40, 30],
        "score": 0.875,
    }
    ground_truth = COCO()
    ground_truth.dataset = {"images": [{"id": 5}], "annotations": [], "categories": [{"id": 3}, {"id": 7}]}
    ground_truth.createIndex()
    read = ground_truth.loadRes(json.loads(json.dumps(entries)))
    assert [one["category_id"] for one in read.loadAnns(read.getAnnIds(imgIds=[5]))] == [3, 7, 3]
    bare = dataclasses.replace(result, categories=(), path=None).to_coco(1)[0]
    assert bare == {"image_id": 1, "category_id": 2, "bbox": [10, 20, 40, 30], "score": 0.875}
    of_url = dataclasses.replace(result, path="https://host/x/b%20c.jpg?size=1/2").to_coco(1)[0]
    assert of_url["file_name"] == "b c.jpg"


def test_frames_have_their_index_and_time_and_a_number_each(result: Result) -> None:
    frames = [dataclasses.replace(result, path=Path("12.mp4"), frame=Frame(i, i / 25)) for i in (0, 5)]
    assert frames[1].to_coco(2)[0] | {"frame": 5, "seconds": 0.2} == frames[1].to_coco(2)[0]
    assert {one["image_id"] for one in coco_entries([None, frames[0]])} == {2}, "a video's name numbers no frame"
    photo = dataclasses.replace(result, path=Path("7.jpg"))
    assert [one["image_id"] for one in coco_entries([*frames, None, photo])] == [1] * 3 + [2] * 3 + [4] * 3
    assert {one["image_id"] for one in coco_entries([None, photo])} == {7}
    assert list(coco_entries([])) == []


def test_yolo_lines_are_fractions_of_the_image(result: Result) -> None:
    assert result.above(0.5).to_yolo() == "1 0.375 0.58333333 0.5 0.5\n0 0.5 0.5 1 1\n"
    assert result.to_yolo(scores=True).splitlines()[0] == "1 0.375 0.58333333 0.5 0.5 0.875"
    assert result.above(1).to_yolo() == ""
    rows = np.array([line.split()[1:] for line in result.to_yolo().splitlines()], dtype=float) * [80, 60, 80, 60]
    corners = np.concatenate([rows[:, :2] - rows[:, 2:] / 2, rows[:, :2] + rows[:, 2:] / 2], axis=1)
    np.testing.assert_allclose(corners, result.boxes, atol=1e-5)


def test_yolo_lines_are_read_back_as_labels(result: Result) -> None:
    corners = torch.rand(2000, 2, 2, generator=torch.Generator().manual_seed(0)).sort(1).values
    corners = torch.where(corners < 0.2, 0.0, torch.where(corners > 0.8, 1.0, corners))  # many at the image's border
    boxes = corners.flatten(1) * torch.tensor([80.0, 60.0, 80.0, 60.0])
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 1).all(dim=1)]
    many = dataclasses.replace(result, boxes=boxes, labels=torch.full((len(boxes),), 2), scores=torch.ones(len(boxes)))
    read = np.array(parse_labels(many.to_yolo(), 2))
    assert (read[:, 0] == 1).all()
    sizes = read[:, 3:5] * [80, 60]
    np.testing.assert_allclose(sizes, boxes[:, 2:] - boxes[:, :2], atol=1e-3)


def test_supervision_reads_it(result: Result) -> None:
    supervision = pytest.importorskip("supervision")
    found = result.to_supervision()
    assert isinstance(found, supervision.Detections)
    np.testing.assert_array_equal(found.xyxy, result.boxes)
    np.testing.assert_array_equal(found.confidence, result.scores)
    assert found.class_id.tolist() == [1, 0, 1]
    assert found["class_name"].tolist() == ["dog", "cat", "dog"]
    assert len(found[found.confidence > 0.4]) == 2
    annotated = supervision.BoxAnnotator().annotate(result.image.copy(), found)
    assert (annotated != result.image).any()
    assert len(result.above(1).to_supervision()) == 0


def test_without_supervision_the_package_is_named(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"needs the package supervision: pip install supervision"):
        result.to_supervision()
