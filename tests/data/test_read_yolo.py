"""Folders in YOLO's layout, as Ultralytics and labelling tools write them."""

from __future__ import annotations

from PIL import Image

from resdet.data.image_files import check_files
from resdet.data.images import FolderImages
from resdet.data.yolo import read_yolo

BOX = "1 0.5 0.5 0.2 0.1\n"
BOX_IN_PIXELS = [[24, 18, 12, 4]]  # of a 60x40 image


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def picture(path, size=(60, 40), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)
    return path


def ultralytics(root, labels=BOX, names="[cat, dog]", splits=("train", "val")):
    """Write a data set as Ultralytics documents it, one image a split."""
    lines = [f"{split}: images/{split}" for split in splits]
    write(root / "data.yaml", "\n".join([f"path: {root}", *lines, f"names: {names}", ""]))
    for split in splits:
        picture(root / "images" / split / "a.jpg")
        write(root / "labels" / split / "a.txt", labels)
    return root


def read_and_open(root, split="train"):
    table, folder = read_yolo(root, split)
    check_files(folder, table)
    images = FolderImages(folder, table, upright=True)
    for index in range(table.num_images):
        assert images(index).shape == (*table.sizes[index], 3)
    return table


def test_a_data_set_of_ultralytics_is_read(tmp_path):
    table = read_and_open(ultralytics(tmp_path))
    assert [(one.label, one.category_id, one.name) for one in table.categories] == [(1, 1, "cat"), (2, 2, "dog")]
    assert table.file_names.tolist() == ["images/train/a.jpg"]
    assert table.boxes_xywh.round(9).tolist() == BOX_IN_PIXELS
    assert (table.labels.tolist(), table.image_ids.tolist(), table.sizes.tolist()) == ([2], [1], [[40, 60]])
    assert table.area.round(9).tolist() == [48]
    assert table.notes == ()
