"""Tables written in COCO's, YOLO's and Pascal VOC's layouts, and read again."""

from __future__ import annotations

import json
import os
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from resdet.build import build_parts
from resdet.config import folder_sources
from resdet.data.annotations import AnnotationTable
from resdet.data.coco import read_coco
from resdet.data.image_files import check_files
from resdet.data.images import FolderImages
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.data.voc import read_voc
from resdet.data.writing import Part, write_dataset
from resdet.data.yolo import read_yolo
from resdet.errors import UserError
from resdet.types import Category

LAYOUTS = ("coco", "yolo", "voc")


def picture(path, size=(60, 40), orientation=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def table(files, boxes, labels, *, names=("zebra", "ant"), **columns):
    """Make a table of 60x40 images; ``boxes`` and ``labels`` are lists for each image."""
    counts = [len(of_image) for of_image in boxes]
    flat = np.array([box for of_image in boxes for box in of_image], dtype=np.float64).reshape(-1, 4)
    made = AnnotationTable(
        name="made",
        categories=tuple(Category(label, 10 * label, name) for label, name in enumerate(names, start=1)),
        image_ids=np.arange(len(files)) + 5,
        file_names=files,
        sizes=np.array([[40, 60]] * len(files), dtype=np.int32).reshape(-1, 2),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xywh=flat,
        labels=np.array([label for of_image in labels for label in of_image], dtype=np.int64),
        area=flat[:, 2] * flat[:, 3] / 2,
        crowd=np.zeros(len(flat), dtype=np.bool_),
        difficult=np.zeros(len(flat), dtype=np.bool_),
        annotation_ids=np.arange(len(flat)) + 100,
    )
    return replace(made, **columns)


def read(layout, root, split="train"):
    """Return the table of a written data set and its images, which must all open."""
    if layout == "coco":
        found = read_coco(root / "annotations" / f"instances_{split}.json"), root / "images" / split
    else:
        found = read_yolo(root, split) if layout == "yolo" else (read_voc(root, split), root)
    check_files(found[1], found[0])
    images = FolderImages(found[1], found[0], upright=layout == "yolo")
    assert [images(index).shape[:2] for index in range(found[0].num_images)] == list(
        map(tuple, found[0].sizes.tolist())
    )
    return found[0]


def write(layout, root, *tables, **options):
    """Write tables with black pictures; return what is said."""
    for given_table in tables:
        for name in given_table.file_names:
            picture(root / "source" / name)
    parts = [Part(name, one, root / "source", "coco") for name, one in zip(("train", "val"), tables, strict=False)]
    return write_dataset(parts, layout, root / "out", **options)


# ---- Round trips -----------------------------------------------------------------------------------------------------

NAMES = st.lists(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8), min_size=1, max_size=4)
SIDE = st.floats(1.5, 20, allow_subnormal=False)


@st.composite
def tables(draw):
    """Draw a table whose boxes lie in their images and differ, and whose names are composed letters."""
    # Readers take names in Unicode's composed form.
    names = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in draw(NAMES)))
    num_images = draw(st.integers(1, 4))
    folders = [draw(st.sampled_from(["", "x/", "x/y/", "images/"])) for _ in range(num_images)]
    files = [f"{folder}{index}.jpg" for index, folder in enumerate(folders)]
    boxes, labels = [], []
    for _ in range(num_images):
        sides = draw(st.lists(st.tuples(SIDE, SIDE), max_size=3))
        corners = [(draw(st.floats(0, 60 - w)), draw(st.floats(0, 40 - h))) for w, h in sides]
        of_image = [(*corner, *side) for corner, side in zip(corners, sides, strict=True)]
        # YOLO has one line for boxes that are the same: the test below.
        different = list({tuple(round(value, 3) for value in box): box for box in of_image}.values())
        boxes.append(different)
        labels.append([draw(st.integers(1, len(names))) for _ in different])
    return table(files, boxes, labels, names=names)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(given_table=tables())
def test_a_table_comes_back_as_it_was(layout, given_table):
    with tempfile.TemporaryDirectory() as folder:
        write(layout, Path(folder), given_table)
        again = read(layout, Path(folder) / "out")
    by_name = {os.path.basename(name): index for index, name in enumerate(again.file_names)}
    assert [category.name for category in again.categories] == [one.name for one in given_table.categories]
    assert len(by_name) == given_table.num_images
    for index, name in enumerate(given_table.file_names):
        own, other = given_table.rows(index), again.rows(by_name[os.path.basename(name)])
        assert again.file_names[by_name[os.path.basename(name)]].endswith(name)
        assert np.abs(again.boxes_xywh[other] - given_table.boxes_xywh[own]).max(initial=0) < 1e-3
        assert again.labels[other].tolist() == given_table.labels[own].tolist()


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_one_layout_becomes_another(tmp_path, first, second):
    """Through the recognition of the folder; names and splits stay, and classes of val alone come last."""
    train = table(["one/a.jpg", "two/a.jpg"], [[(1, 2, 30.25, 20)], []], [[2], []])
    val = table(["b.jpg"], [[(0, 0, 60, 40), (5, 5, 5.125, 5)]], [[1, 2]], names=("new", "zebra"))
    write(first, tmp_path, train, val)
    parts = build_parts(folder_sources(tmp_path / "out"))
    assert write_dataset(parts, second, tmp_path / "again")[:2] == [
        "train: 2 images, 1 objects",
        "val: 1 images, 2 objects",
    ]
    again, other = read(second, tmp_path / "again"), read(second, tmp_path / "again", "val")
    assert [category.name for category in again.categories] == ["zebra", "ant", "new"]
    assert [category.name for category in other.categories] == ["zebra", "ant", "new"]
    start = {"coco": "", "yolo": "images/train/", "voc": "JPEGImages/"}[second]
    assert again.file_names.tolist() == [f"{start}one/a.jpg", f"{start}two/a.jpg"]
    assert np.allclose(again.boxes_xywh, [[1, 2, 30.25, 20]], atol=1e-3)
    assert np.allclose(other.boxes_xywh, [[0, 0, 60, 40], [5, 5, 5.125, 5]], atol=1e-3)
    assert (again.labels.tolist(), other.labels.tolist()) == ([2], [3, 1])
    if (first, second) == ("coco", "coco"):
        assert again.area.tolist() == train.area.tolist()
        assert [category.category_id for category in again.categories] == [10, 20, 21]
        assert (again.image_ids.tolist(), again.annotation_ids.tolist()) == ([5, 6], [100])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_stay_on_what_they_show(tmp_path, layout, orientation):
    """A white block in a photograph on its side, from YOLO's layout, which means it upright, and on to each."""
    for name, side in (("a", 60), ("square", 40)):
        pixels = np.zeros((40, side, 3), np.uint8)
        pixels[8:16, 12:24] = 255
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.jpg", exif=exif, quality=95)
    stored = table(
        ["a.jpg", "square.jpg"], [[(12, 8, 12, 8)]] * 2, [[1]] * 2, sizes=np.array([[40, 60], [40, 40]], "i4")
    )
    write_dataset([Part("train", stored, tmp_path / "in", "coco")], "yolo", tmp_path / "yolo")
    upright, root = read_yolo(tmp_path / "yolo", "train")
    assert upright.sizes[0].tolist() == ([60, 40] if orientation >= 5 else [40, 60])
    write_dataset([Part("train", upright, root, "yolo")], layout, tmp_path / "out")
    again = read(layout, tmp_path / "out")
    root = tmp_path / "out" / ("images/train" if layout == "coco" else "")
    images = FolderImages(root, again, upright=layout == "yolo")
    for index in range(2):
        x, y, w, h = again.boxes_xywh[index].round().astype(int)
        assert sorted((w, h)) == [8, 12]
        assert images(index)[y : y + h, x : x + w].mean() > 240


# ---- What a layout cannot hold ---------------------------------------------------------------------------------------

BOXES = [[(1, 1, 10, 10), (2, 2, 10, 10), (3, 3, 10, 10), (4, 4, 1, 10), (50, 30, 20, 20), (5, 5, 0, 3)]]
FLAGS = {"crowd": np.array([1, 0, 0, 0, 0, 0], bool), "difficult": np.array([0, 1, 0, 0, 0, 0], bool)}
LINKED = "1 images are hard links to the given files (--copy makes them files of their own)"
SAID = {
    "coco": (["1 difficult objects have iscrowd 1, which leaves them out of training and scores"], 6),
    "yolo": (
        [
            "1 crowd regions left out",
            "1 difficult objects left out",
            "1 boxes thinner than 0.1 px inside their images left out",
        ],
        3,
    ),
    "voc": (
        [
            "1 crowd regions are marked difficult",
            "2 boxes of one pixel or less in width or height left out",
        ],
        4,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_lost_is_counted(tmp_path, layout):
    lines = write(layout, tmp_path, table(["a.jpg"], BOXES, [[1, 1, 2, 2, 2, 2]], **FLAGS))
    said, num_kept = SAID[layout]
    assert lines == ["train: 1 images, 6 objects", LINKED, *said]
    again = read(layout, tmp_path / "out")
    assert again.num_boxes == num_kept
    assert (again.crowd.sum(), again.difficult.sum()) == {"coco": (2, 0), "yolo": (0, 0), "voc": (0, 2)}[layout]


def test_boxes_that_yolo_would_refuse_are_clipped(tmp_path):
    lines = write("yolo", tmp_path, table(["a.jpg"], [[(-30, 10, 40, 10), (59.9, 0, 0.3, 5)]], [[1, 2]]))
    assert lines[-1] == "1 boxes clipped to their images"
    assert np.allclose(read("yolo", tmp_path / "out").boxes_xywh, [[0, 10, 10, 10], [59.9, 0, 0.3, 5]], atol=1e-3)


def test_boxes_that_are_repeated_are_counted_where_one_line_stands_for_them(tmp_path):
    box = (0, 1, 2, 2)
    lines = write("yolo", tmp_path, table(["a.jpg", "b.jpg"], [[box, box, box], [box]], [[1, 2, 1], [1]]))
    assert lines[-1] == "1 boxes that repeat another of their image and class left out"
    again = read("yolo", tmp_path / "out")
    assert again.labels.tolist() == [1, 2, 1]
    assert again.notes == ()


def test_ids_that_would_change_the_order_of_classes_are_given_anew(tmp_path):
    categories = (Category(1, 9, "zebra"), Category(2, 3, "ant"))
    lines = write("coco", tmp_path, table(["a.jpg"], [[(1, 1, 5, 5)]], [[2]], categories=categories))
    assert lines[-1] == "2 category ids changed: they are 1, 2, ... in the order of the classes"
    assert [(one.category_id, one.name) for one in read("coco", tmp_path / "out").categories] == [
        (1, "zebra"),
        (2, "ant"),
    ]


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
def test_images_are_linked_or_copied(tmp_path, copy):
    lines = write("coco", tmp_path, table(["a.jpg"], [[(1, 1, 5, 5)]], [[1]]), copy=copy)
    source, target = tmp_path / "source" / "a.jpg", tmp_path / "out" / "images" / "train" / "a.jpg"
    assert os.path.samefile(source, target) != copy
    assert target.read_bytes() == source.read_bytes()
    assert lines[1] == (f"1 images copied, {source.stat().st_size:,} bytes" if copy else LINKED)


def test_links_to_images_are_not_links_to_links(tmp_path):
    picture(tmp_path / "real.jpg")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jpg").symlink_to(tmp_path / "real.jpg")
    made = table(["a.jpg"], [[(1, 1, 5, 5)]], [[1]])
    write_dataset([Part("train", made, tmp_path / "source", "coco")], "yolo", tmp_path / "out")
    assert not (tmp_path / "out" / "images" / "train" / "a.jpg").is_symlink()


def test_two_files_of_one_name_in_two_splits_stay_two(tmp_path):
    same = table(["a.jpg"], [[(1, 1, 5, 5)]], [[1]])
    write("voc", tmp_path, same, replace(same, boxes_xywh=same.boxes_xywh + 1))
    assert read("voc", tmp_path / "out", "val").file_names.tolist() == ["JPEGImages/val/a.jpg"]
    assert read("voc", tmp_path / "out", "val").boxes_xywh.tolist() == [[2, 2, 6, 6]]


def test_images_that_would_share_a_label_file_are_refused(tmp_path):
    files = table(["a.jpg", "a.png"], [[(1, 1, 5, 5)], []], [[1], []])
    write("coco", tmp_path, files)
    for layout, start in (("yolo", ""), ("voc", "train/")):
        with pytest.raises(UserError) as caught:
            write_dataset([Part("train", files, tmp_path / "source", "coco")], layout, tmp_path / layout)
        both = f"images {start}a.jpg and {start}a.png"
        assert str(caught.value) == f"{both} would share one annotation file; rename one of them"
        assert not (tmp_path / layout).exists()


def test_images_that_yolo_would_not_find_are_refused(tmp_path):
    files = table(["a"], [[(1, 1, 5, 5)]], [[1]])
    with pytest.raises(UserError, match=r"^images must end in one of \.jpg, .*, got a$"):
        write_dataset([Part("train", files, tmp_path, "coco")], "yolo", tmp_path / "out")


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_nothing_is_written_over(tmp_path, taken):
    (tmp_path / "out").write_text("mine") if taken == "file" else picture(tmp_path / "out" / "mine.jpg")
    with pytest.raises(UserError, match="out: the output must be a new or an empty folder"):
        write("coco", tmp_path, table(["a.jpg"], [[]], [[]]))
    assert len(list(tmp_path.rglob("*mine*"))) == (taken == "folder")


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    made = table(["a.jpg", "lost.jpg"], [[(1, 1, 5, 5)], []], [[1], []])
    picture(tmp_path / "source" / "a.jpg")
    with pytest.raises(UserError, match=r"lost\.jpg: no such image file"):
        write_dataset([Part("train", made, tmp_path / "source", "coco")], "coco", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not list((tmp_path / "out").iterdir())


def test_generated_images_are_drawn(tmp_path):
    made = shapes_table(3, 64, 0)
    lines = write_dataset([Part("train", made, ShapesImages(64, 0), "shapes")], "yolo", tmp_path / "out")
    assert lines[1].startswith("3 images copied, ")
    again, root = read_yolo(tmp_path / "out", "train")
    assert np.allclose(again.boxes_xywh, made.boxes_xywh, atol=1e-3)
    assert np.array_equal(FolderImages(root, again, upright=True)(2), ShapesImages(64, 0)(2))


def test_other_tools_can_read_the_yaml_and_the_json(tmp_path):
    made = table(["a.jpg"], [[(1, 1, 5, 5)]], [[1]], names=("no", "1e-4"))
    write("yolo", tmp_path, made)
    content = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())
    assert content == {"train": "images/train", "nc": 2, "names": {0: "no", 1: "1e-4"}}
    write_dataset([Part("train", made, tmp_path / "source", "coco")], "coco", tmp_path / "coco")
    document = json.loads((tmp_path / "coco" / "annotations" / "instances_train.json").read_text())
    assert document["annotations"] == [
        {"id": 100, "image_id": 5, "category_id": 10, "bbox": [1.0, 1.0, 5.0, 5.0], "area": 12.5, "iscrowd": 0}
    ]
