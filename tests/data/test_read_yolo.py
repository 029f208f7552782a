"""Folders in YOLO's layout, as Ultralytics and labelling tools write them."""

from __future__ import annotations

import os
import re
import unicodedata

import numpy as np
import pytest
from PIL import Image

from resdet.check.check import check_dataset
from resdet.check.repair import repaired
from resdet.check.splits import yolo_split
from resdet.config import parse_config
from resdet.data.coco_rules import HOW_TO_FIX
from resdet.data.image_files import check_files
from resdet.data.images import FolderImages, turned_boxes
from resdet.data.yolo import LabelFileError, parse_labels, read_yolo, yolo_files
from resdet.data.yolo_layout import find_layout
from resdet.errors import DataError, UnreadableImageError

BOX = "1 0.5 0.5 0.2 0.1\n"
BOX_IN_PIXELS = [[24, 18, 12, 4]]  # of a 60x40 image


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def picture(path, size=(60, 40), orientation=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)
    return path


def ultralytics(root, labels=BOX, *, yaml="", names="[cat, dog]"):
    """Write a data set as Ultralytics documents it, one image a split."""
    write(root / "data.yaml", yaml or f"train: images/train\nval: images/val\nnames: {names}\n")
    for split in ("train", "val"):
        picture(root / "images" / split / "a.jpg")
        write(root / "labels" / split / "a.txt", labels)
    return root


def read_and_open(root, split="train"):
    """Read a data set, open its images, and expect its usual box."""
    table, folder = read_yolo(root, split)
    check_files(folder, table)
    images = FolderImages(folder, table, upright=True)
    for index in range(table.num_images):
        assert images(index).shape == (*table.sizes[index], 3)
    assert table.boxes_xywh.round(9).tolist() == BOX_IN_PIXELS * table.num_images
    assert [category.name for category in table.categories] == ["cat", "dog"]
    return table


def test_a_data_set_of_ultralytics_is_read(tmp_path):
    table = read_and_open(ultralytics(tmp_path))
    assert [(one.label, one.category_id) for one in table.categories] == [(1, 1), (2, 2)]
    assert table.file_names.tolist() == ["images/train/a.jpg"]
    assert (table.labels.tolist(), table.image_ids.tolist(), table.sizes.tolist()) == ([2], [1], [[40, 60]])
    assert (table.annotation_ids.tolist(), table.area.round(9).tolist()) == ([1], [48])
    assert table.notes == ()


# ---- Layouts, as tools write them ------------------------------------------------------------------------------------


def roboflow(root):
    write(
        root / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['cat', 'dog']\n",
    )
    for split in ("train", "valid"):
        picture(root / split / "images" / "a_jpg.rf.0123.jpg")
        write(root / split / "labels" / "a_jpg.rf.0123.txt", BOX)
    return (f"{root}/data.yaml: train: ../train/images does not exist; taken for {root}/train/images",)


def cvat(root):
    write(root / "data.yaml", "path: ./\ntrain: train.txt\nval: val.txt\nnames:\n  0: cat\n  1: dog\n")
    for split in ("train", "val"):
        write(root / f"{split}.txt", f"images/{split}/a.jpg\n")
        picture(root / "images" / split / "a.jpg")
        write(root / "labels" / split / "a.txt", BOX)


def cvat_1_1(root):
    write(
        root / "obj.data",
        "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/\n",
    )
    write(root / "obj.names", "cat\ndog\n")
    for split in ("train", "valid"):
        write(root / f"{split}.txt", f"data/obj_{split}_data/a.jpg\n")
        picture(root / f"obj_{split}_data" / "a.jpg")
        write(root / f"obj_{split}_data" / "a.txt", BOX)
    return (f"{root}/obj.data: train: data/train.txt does not exist; taken for {root}/train.txt",)


def roboflow_darknet(root):
    for split in ("train", "valid"):
        picture(root / split / "a.jpg")
        write(root / split / "a.txt", BOX)
        write(root / split / "_darknet.labels", "cat\ndog\n")


def folders_without_yaml(root):
    write(root / "classes.txt", "cat\ndog\n\n")
    for split in ("train", "val"):
        picture(root / "images" / split / "a.jpg")
        write(root / "labels" / split / "a.txt", BOX)


def lists_of_folders(root):
    write(root / "set.yaml", "path: .\ntrain: [images/one, images/two]\nval:\n  - images/two\nnames: classes.txt\n")
    write(root / "notes.yaml", "just: notes\n")
    write(root / "classes.txt", "\ufeffcat\r\ndog\r\n")
    for folder in ("one", "two/deep"):
        picture(root / "images" / folder / "a.jpg")
        write(root / "labels" / folder / "a.txt", BOX)


def a_list_with_dots(root):
    write(root / "data.yaml", "train: lists/train.txt\nvalidation: lists/val.txt\nnames: {'0': cat, '1': dog}\nnc: 2\n")
    for split in ("train", "val"):
        write(root / "lists" / f"{split}.txt", f"./../images/{split}/a.jpg\n")
        picture(root / "images" / split / "a.jpg")
        write(root / "labels" / split / "a.txt", BOX)


LAYOUTS = [roboflow, cvat, cvat_1_1, roboflow_darknet, folders_without_yaml, lists_of_folders, a_list_with_dots]


@pytest.mark.parametrize("make", LAYOUTS)
def test_layouts_of_tools_are_read(tmp_path, make):
    notes = make(tmp_path) or ()
    table = read_and_open(tmp_path, "train")
    assert table.notes == notes
    assert table.num_images == (2 if make is lists_of_folders else 1)
    assert read_and_open(tmp_path, "val").num_images == 1
    assert read_and_open(tmp_path, "valid").num_images == 1
    assert set(find_layout(tmp_path).splits) == {"train", "val"}


def test_label_studio_has_no_splits(tmp_path):
    write(tmp_path / "classes.txt", "cat\ndog\n")
    write(tmp_path / "notes.json", "{}")
    picture(tmp_path / "images" / "a.jpg")
    write(tmp_path / "labels" / "a.txt", BOX)
    assert read_and_open(tmp_path, None).file_names.tolist() == ["images/a.jpg"]
    with pytest.raises(DataError, match=r"has no split 'train'; split: null takes all of its images$"):
        read_yolo(tmp_path, "train")


def test_null_joins_the_splits(tmp_path):
    assert read_and_open(ultralytics(tmp_path), None).file_names.tolist() == ["images/train/a.jpg", "images/val/a.jpg"]


def test_each_section_takes_its_own_split(tmp_path):
    text = "data: {{train: {0}, val: {0}}}\ntrain: {{steps: 1}}\noutput_dir: out"
    config = parse_config(text.format("{format: yolo, root: my}"))
    assert (config.data.train.split, config.data.val.split) == ("train", "val")
    assert parse_config(text.format("{format: yolo, root: my, split: test}")).data.val.split == "test"
    assert parse_config(text.format("{format: yolo, root: my, split: null}")).data.train.split is None


def test_images_of_several_places_lie_below_the_folder_that_they_share(tmp_path):
    ultralytics(tmp_path / "a")
    ultralytics(tmp_path / "b")
    write(tmp_path / "a" / "data.yaml", f"train: [images/train, {tmp_path}/b/images/train]\nnames: [cat, dog]\n")
    table, root = read_yolo(tmp_path / "a", "train")
    assert root == tmp_path
    assert table.file_names.tolist() == ["a/images/train/a.jpg", "b/images/train/a.jpg"]


def test_a_path_of_another_machine_is_the_folder_of_the_yaml(tmp_path):
    yaml = "path: /content/datasets/mine\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
    table = read_and_open(ultralytics(tmp_path, yaml=yaml))
    assert table.notes == (
        f"{tmp_path}/data.yaml: its path /content/datasets/mine does not exist; paths are taken relative to {tmp_path}",
    )


def test_a_relative_path_starts_from_the_yaml_or_from_here(tmp_path, monkeypatch):
    ultralytics(tmp_path / "sets" / "mine")
    yaml = "path: mine\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
    read_and_open(write(tmp_path / "sets" / "mine.yaml", yaml))
    monkeypatch.chdir(tmp_path / "sets")
    read_and_open(write(tmp_path / "mine.yaml", yaml))
    read_and_open("mine/data.yaml")


def test_names_are_texts_whatever_yaml_takes_them_for(tmp_path):
    ultralytics(tmp_path, "0 0.5 0.5 0.2 0.1", names="[no, 1, 2.5, off, true]")
    assert find_layout(tmp_path).names == ("no", "1", "2.5", "off", "True")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, b]\nnc: 3", "nc must be the number of names, but nc is 3 and there are 2 names"),
        ("names: [a, a]", "class names must differ, got 'a' twice"),
        ("names: {1: a, 2: b}", "names must have the keys 0 to 1, got 1, 2"),
        ("names: {a: 0}", "names must have the keys 0 to 0, got a"),
        ("names: [a, [b]]", r"each of names must be a text, got ['b']"),
        ("names: [a, ~]", "each of names must be a text, got None"),
        ("names: []", "names must be a list, a mapping from 0, 1, ... or a file, got []"),
        ("names: 5", "names must be a list, a mapping from 0, 1, ... or a file, got 5"),
        ("names: other.txt", "names: no such file: {root}/other.txt"),
        ("names: [a]\nkpt_shape: 17", "kpt_shape must be two whole numbers, got 17"),
        ("names: [a]\nnames: [b]", "names: written twice; keep one"),
        ("names: [a", "line 2, column 1: not YAML"),
        ("- a", "must hold keys such as train, val and names"),
    ],
)
def test_a_yaml_that_contradicts_itself_is_refused(tmp_path, text, message):
    write(tmp_path / "data.yaml", text + "\n")
    with pytest.raises(DataError, match=re.escape(message.format(root=tmp_path))) as caught:
        find_layout(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/data.yaml")


def test_names_that_are_only_counted_are_made_up_and_noted(tmp_path):
    table, _ = read_yolo(ultralytics(tmp_path, yaml="train: images/train\nnc: 3\n"), "train")
    assert [category.name for category in table.categories] == ["class_0", "class_1", "class_2"]
    assert table.notes == (f"{tmp_path}/data.yaml: has no 'names'; its 3 classes are called class_0 to class_2",)


def test_a_folder_without_names_says_what_is_needed(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    write(tmp_path / "labels" / "a.txt", BOX)
    with pytest.raises(DataError) as caught:
        read_yolo(tmp_path, None)
    assert str(caught.value) == (
        f"{tmp_path}: the names of the classes are needed: a data.yaml with 'names', or the class names one a line in "
        "classes.txt or obj.names, must lie in this folder"
    )
    for name in ("one.yaml", "two.yml"):
        write(tmp_path / name, "names: [cat, dog]\n")
    with pytest.raises(DataError, match=r"several files describe a data set: one.yaml, two.yml; name one of them"):
        find_layout(tmp_path)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", "test: no such folder or list of images: {root}/images/test"),
        ("minival", "has no split 'minival'; it has train, val"),
    ],
)
def test_a_split_that_does_not_exist_is_refused_when_it_is_asked_for(tmp_path, split, message):
    yaml = "train: images/train\nval: images/val\ntest: images/test\nnames: [cat, dog]\n"
    read_and_open(ultralytics(tmp_path, yaml=yaml))
    with pytest.raises(DataError) as caught:
        read_yolo(tmp_path, split)
    assert str(caught.value) == f"{tmp_path}/data.yaml: {message.format(root=tmp_path)}"


@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "a\0b", "data.yaml/x"])
def test_a_root_that_does_not_exist_is_refused(tmp_path, name):
    ultralytics(tmp_path)
    with pytest.raises(DataError, match=r"no such folder or data\.yaml") as caught:
        read_yolo(tmp_path / name, "train")
    assert len(str(caught.value)) < 1500


def test_links_into_a_loop_are_followed_once(tmp_path):
    root = ultralytics(tmp_path)
    (root / "images" / "train" / "again").symlink_to(root / "images", target_is_directory=True)
    assert len(yolo_files(root, "train")[0].table.file_names) == 2  # train and val, through the link


def test_hidden_files_are_no_images_and_no_labels(tmp_path):
    root = ultralytics(tmp_path)
    for name in ("._a.jpg", ".DS_Store", "__MACOSX/a.jpg"):
        write(root / "images" / "train" / name, b"\0")
    write(root / "labels" / "train" / "._a.txt", b"\0")
    assert read_and_open(root).num_images == 1


def test_names_in_another_unicode_form_and_labels_in_capitals_are_found(tmp_path):
    root = ultralytics(tmp_path)
    name = unicodedata.normalize("NFD", "Bär")
    picture(root / "images" / "train" / f"{name}.JPG")
    write(root / "labels" / "train" / f"{unicodedata.normalize('NFC', name)}.TXT", BOX)
    assert read_and_open(root).num_images == 2


def test_the_last_folder_of_images_counts(tmp_path):
    """``/images/`` above the data set is no folder of images, and Ultralytics replaces the last one."""
    root = ultralytics(tmp_path / "images" / "set")
    picture(root / "images" / "train" / "images" / "b.jpg")
    write(root / "images" / "train" / "labels" / "b.txt", BOX)
    assert read_and_open(root).num_images == 2


# ---- Lines -----------------------------------------------------------------------------------------------------------

POLYGON = "0 0.1 0.2 0.5 0.2 0.5 0.6"  # a triangle

LINES = {
    "0 0.5 0.5 0.2 0.1": (0, 0.4, 0.45, 0.2, 0.1, 0.02),
    "0\t0.5\t0.5\t0.2\t0.1  ": (0, 0.4, 0.45, 0.2, 0.1, 0.02),
    "1.0 5e-1 .5 2E-1 +0.1": (1, 0.4, 0.45, 0.2, 0.1, 0.02),
    "0 0.5 0.5 1.005 1": (0, -0.0025, 0, 1.005, 1, 1.005),
    "0 1 1 0.5 0.5": (0, 0.75, 0.75, 0.5, 0.5, 0.25),
    "0 0.5 0.5 0 0.1": (0, 0.5, 0.45, 0, 0.1, 0),
    POLYGON: (0, 0.1, 0.2, 0.4, 0.4, 0.08),
    "1 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5": (1, 0.1, 0.1, 0.8, 0.8, 0.32),  # four corners: an oriented box
}


@pytest.mark.parametrize("line", LINES)
def test_lines_are_read(line):
    assert np.allclose(parse_labels(line, 2), [LINES[line]], atol=1e-12)


def test_boxes_and_polygons_of_one_file_are_read_each_for_itself():
    """Ultralytics would take the box for a polygon of two points, (0.5, 0.5) and (0.2, 0.1)."""
    rows = parse_labels(f"0 0.5 0.5 0.2 0.1\n\n{POLYGON}\r\n", 2)
    assert np.allclose(rows, [LINES["0 0.5 0.5 0.2 0.1"], LINES[POLYGON]])


COLUMNS = (
    "a line has 5 for class x y width height, or 7, 9, ... for a class and the corners of a polygon; keypoints need "
    "kpt_shape in data.yaml"
)
WRONG = {
    "0 0.5 0.5 0.2": f"4 columns: {COLUMNS}",
    "0": f"1 columns: {COLUMNS}",
    "0 0.5 0.5 0.2 0.1 0.9": "6 columns: a sixth is the confidence of a detection; labels are class x y width height",
    "0 0.5 0.5 0.2 0.1 0.3 0.4 2": f"8 columns: {COLUMNS}",
    "0 0.5 0.5 0.2 0.1 0.3 0.4 1 0.3 0.4 0": f"11 columns: {COLUMNS}",  # two keypoints and their visibility
    "0 0.5 0.5 0.2 nan": "columns must be numbers, got 'nan'",
    "0 0.5 0.5 0.2 inf": "columns must be numbers, got 'inf'",
    "0 0.5 0.5 0.2 1_0": "columns must be numbers, got '1_0'",
    "0 0.5 0.5 0.2 x\x1b[31m": "columns must be numbers, got 'x\\x1b[31m'",
    "cat 0.5 0.5 0.2 0.1": "the class must be its position among the names, got 'cat'",
    "0,0.5,0.5,0.2,0.1": "columns must be separated by blanks and numbers have a point, got '0,0.5,0.5,0.2,0.1'",
    "0 0,5 0,5 0,2 0,1": "columns must be separated by blanks and numbers have a point, got '0,5'",
    "2 0.5 0.5 0.2 0.1": "the class must be one of 0 to 1, got 2",
    "-1 0.5 0.5 0.2 0.1": "the class must be one of 0 to 1, got -1",
    "0.5 0.5 0.5 0.2 0.1": "the class must be one of 0 to 1, got 0.5",
    "0 30 20 12 4": "coordinates must be shares of the image's sides, from 0 to 1, got 30",
    "0 0.5 -0.02 0.2 0.1": "coordinates must be shares of the image's sides, from 0 to 1, got -0.02",
    "0 0.1 0.2 0.5 0.2 1.02 0.6": "coordinates must be shares of the image's sides, from 0 to 1, got 1.02",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines_are_refused_with_their_number(line):
    with pytest.raises(LabelFileError) as caught:
        parse_labels(f"{BOX}\n{line}\n", 2)
    assert str(caught.value) == f"line 3: {WRONG[line]}"
    with pytest.raises(LabelFileError, match=r"^line 1: .* \(and 2 more lines\)$"):
        parse_labels(f"{line}\n{line}\n{BOX}{line}\n", 2)


def test_keypoints_are_left_aside_where_the_yaml_has_them(tmp_path):
    points = " 0.3 0.4 2 0.3 0.4 0"
    yaml = "train: images/train\nval: images/val\nnames: [cat, dog]\nkpt_shape: [2, 3]\n"
    read_and_open(ultralytics(tmp_path, BOX.strip() + points, yaml=yaml))
    with pytest.raises(LabelFileError, match="line 1: 8 columns: by kpt_shape a line has 11, or 5 without keypoints"):
        parse_labels("0 0.5 0.5 0.2 0.1 0.3 0.4 2", 2, 6)
    assert len(parse_labels(BOX + BOX.strip() + " 1", 2, 1)) == 2  # one number after the box is then no confidence


# ---- Files of labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [b"\xef\xbb\xbf" + BOX.encode(), BOX.encode("utf-16"), BOX.replace("\n", "\r\n").encode()]
)
def test_marks_and_line_ends_do_not_matter(tmp_path, text):
    read_and_open(ultralytics(tmp_path, text))


def test_empty_and_missing_files_mean_no_objects_and_missing_ones_are_counted(tmp_path):
    root = ultralytics(tmp_path)
    for name in "bcd":
        picture(root / "images" / "train" / f"{name}.jpg")
    write(root / "labels" / "train" / "b.txt", "\n")
    table, _ = read_yolo(root, "train")
    assert table.offsets.tolist() == [0, 1, 1, 1, 1]
    assert table.notes == ("2 of 4 images have no label file, taken for images without objects: c.jpg, d.jpg",)
    for path in (root / "labels" / "train").iterdir():
        path.unlink()
    with pytest.raises(DataError) as caught:
        read_yolo(root, "train")
    where = root / "labels" / "train" / "*.txt"
    assert str(caught.value).endswith(f"(train): none of the 4 images has a label file; looked for {where}")


def test_repeated_lines_are_left_out_and_counted(tmp_path):
    table, _ = read_yolo(ultralytics(tmp_path, BOX + POLYGON + "\n" + BOX + BOX), "train")
    assert table.labels.tolist() == [2, 1]
    assert table.notes == ("2 lines that repeat another of their file left out",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOX + "7 0.5 0.5 0.2 0.1", "labels/train/a.txt: line 2: the class must be one of 0 to 1, got 7"),
        (b"\x89PNG", "labels/train/a.txt: cannot be read as text: 'utf-8' codec can't decode byte 0x89"),
        (b"<?xml encoding='utf-7'?>", "labels/train/a.txt: cannot be read as text: encoding utf-7 is not among those"),
    ],
)
def test_a_damaged_label_file_is_refused_by_name_and_line(tmp_path, text, message):
    with pytest.raises(DataError) as caught:
        read_yolo(ultralytics(tmp_path, text), "train")
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert str(caught.value).endswith(f"; {HOW_TO_FIX}")


def test_an_image_listed_twice_is_refused(tmp_path):
    root = ultralytics(tmp_path, yaml="train: [images/train, list.txt]\nnames: [cat, dog]\n")
    write(root / "list.txt", "images/train/a.jpg\n")
    with pytest.raises(DataError, match=r"images/train/a.jpg: listed twice, in train and list.txt; "):
        read_yolo(root, "train")


def test_images_without_a_readable_size_are_refused_or_left_out(tmp_path):
    root = ultralytics(tmp_path)
    write(root / "images" / "train" / "b.jpg", b"")
    write(root / "labels" / "train" / "b.txt", BOX)
    with pytest.raises(UnreadableImageError, match=r"train/b\.jpg: the file is empty$"):
        read_yolo(root, "train")
    table, _ = read_yolo(root, "train", skip_unreadable=True)
    assert table.file_names.tolist() == ["images/train/a.jpg"]
    assert table.notes == ("1 images cannot be read and are left out: b.jpg",)


def test_classes_are_selected_by_name(tmp_path):
    table, _ = read_yolo(ultralytics(tmp_path, BOX + POLYGON), "train", classes=["dog"])
    assert (table.labels.tolist(), [one.name for one in table.categories]) == ([1], ["dog"])


# ---- Photographs on their side ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 40), (40, 40)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_mean_the_upright_image(tmp_path, orientation, size):
    """A white block in the upright picture lies in its box, however the file stores it."""
    root = ultralytics(tmp_path, "0 0.3 0.2 0.2 0.2\n")
    width, height = size[::-1] if orientation >= 5 else size  # of the upright picture
    upright = np.zeros((height, width, 3), np.uint8)
    x, y, w, h = (round(share * side) for share, side in ((0.2, width), (0.1, height), (0.2, width), (0.2, height)))
    upright[y : y + h, x : x + w] = 255
    # Pillow's transpositions that undo each orientation.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = Image.fromarray(upright)
    stored = stored if orientation == 1 else stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(root / "images" / "train" / "a.jpg", exif=exif, quality=95)

    table, folder = read_yolo(root, "train")
    assert table.sizes.tolist() == [[height, width]]
    image = FolderImages(folder, table, upright=True)(0)
    assert np.abs(image.astype(int) - upright).mean() < 8
    assert table.boxes_xywh.round(6).tolist() == [[x, y, w, h]]

    back = turned_boxes(table.boxes_xywh, (height, width), orientation, back=True)
    left, top, wide, high = back[0].round().astype(int)
    block = np.array(stored)[top : top + high, left : left + wide]
    assert block.mean() > 240
    assert np.allclose(turned_boxes(back, stored.size[::-1], orientation, back=False), table.boxes_xywh)

    report = check_dataset([yolo_split("train", root, "train")])
    kinds = {finding.kind for finding in report.findings}
    assert ("exif_turned" in kinds, "exif_rotation" in kinds) == (orientation > 1, False)
    assert not report.wrong
    # --fix writes COCO's json, which readers take as stored where the size does not tell.
    document, changes = repaired(yolo_split("train", root, "train"), report)
    tells = orientation >= 5 and width != height
    assert np.allclose(document["annotations"][0]["bbox"], (table.boxes_xywh if tells else back)[0])
    assert len(changes) == int(orientation > 1 and not tells)


# ---- check -----------------------------------------------------------------------------------------------------------


def test_check_lists_what_is_wrong_with_file_and_line(tmp_path):
    root = ultralytics(tmp_path, BOX + BOX)
    for name in ("b.jpg", "c.jpg", "c.png", "d.jpg", "e.jpg"):
        picture(root / "images" / "train" / name)
    write(root / "images" / "train" / "f.jpg", b"")
    labels = root / "labels" / "train"
    write(labels / "b.txt", "9 0.5 0.5 0.2 0.1\n")
    write(labels / "c.txt", BOX)
    write(labels / "e.txt", "0 0.5 0.5 0 0.1\n")
    write(labels / "f.txt", BOX)
    write(labels / "lost.txt", BOX)
    write(labels / "classes.txt", "cat\ndog\n")
    write(labels / "train.txt", "images/train/a.jpg\n")
    split = yolo_split("train", root, "train")
    report = check_dataset([split])
    found = {finding.kind: [(one.file, one.message) for one in finding.problems] for finding in report.findings}
    where = os.path.join(root, "images", "train", "")
    assert found["bad_annotation_file"] == [(str(labels / "b.txt"), "line 1: the class must be one of 0 to 1, got 9")]
    assert found["unreadable_file"] == [(f"{where}f.jpg", "the file is empty")]
    assert found["missing_label_file"] == [(f"{where}d.jpg", "no label file")]
    assert found["shared_label_file"] == [(str(labels / "c.txt"), "the labels of both c.jpg and c.png")]
    assert found["label_without_image"] == [(str(labels / "lost.txt"), f"no image of this name in {where[:-1]}")]
    assert len(found["repeated_box"]) == len(found["zero_box"]) == 1
    assert found.keys().isdisjoint({"unlisted_file", "areas_contradict_boxes"})
    assert report.wrong
    document, changes = repaired(split, report)
    assert [image["file_name"] for image in document["images"]] == [
        f"images/train/{n}" for n in ("a.jpg", "c.jpg", "c.png", "d.jpg", "e.jpg")
    ]
    assert f"{labels / 'b.txt'}: left out: line 1: the class must be one of 0 to 1, got 9" in changes
    inputs = set(split.input_files())
    assert {labels / "c.txt", root / "images/train/a.jpg", root / "data.yaml"} <= inputs
