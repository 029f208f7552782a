"""Whatever a file holds, a reader gives a table or array, or says in a DataError what is wrong; nothing is lost."""

from __future__ import annotations

import copy
import io
import json
import math
import struct
import warnings
import zlib
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from resdet.data.coco import read_coco
from resdet.data.images import FolderImages, read_header, read_image
from resdet.data.voc import read_voc
from resdet.errors import ConfigError, DataError
from resdet.yaml12 import read_yaml

# A hang is what the deadline is for: no input here takes a tenth of it on an idle core.
COMMON = {
    "deadline": timedelta(seconds=20),
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}
FEW = settings(max_examples=60, derandomize=True, **COMMON)
MANY = settings(max_examples=3000, **COMMON)


def fuzz(few=FEW):
    """Run a property on a few examples, always the same, and with ``-m slow`` on many that are new each time."""

    def decorate(test):
        runs = [pytest.param(few, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]

        @pytest.mark.parametrize("profile", runs)
        def run(tmp_path, profile):
            profile(given(st.data())(lambda data: test(tmp_path, data)))()

        run.__name__ = test.__name__
        return run

    return decorate


def read_or_refuse(read, *, kind=DataError):
    """Give what is read, or None if it is refused with a message that a person can read; nothing else may happen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return read()
        except kind as error:
            message = str(error)
            assert message.strip()
            assert kind is ConfigError or "\n" not in message
            assert len(message) < 2000
            return None


# ---- Values and damage ----------------------------------------------------------------------------------------------

ODD = (0.5, 60.0, 1e-320, 1e300, -1e300, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, math.nan, math.inf, -math.inf)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 9, *ODD])
TEXTS = st.one_of(st.sampled_from(["", "cat", "7", "../x", "a\0b", "\ud800", "\u202e"]), st.text(max_size=6))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=5),
    st.lists(NUMBERS, min_size=4, max_size=4),
    st.dictionaries(TEXTS, SCALARS, max_size=2),
)


def damaged_bytes(data, content):
    """Flip, drop, double, overwrite or insert bytes at a few places."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3), label="edits")):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)), label="at")
        length = data.draw(st.integers(1, 40), label="length")
        what = data.draw(st.sampled_from(["flip", "cut", "drop", "double", "write", "insert", "number"]), label="what")
        if what == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        elif what == "cut":
            del content[at:]
        elif what == "drop":
            del content[at : at + length]
        elif what == "double":
            content[at:at] = content[at : at + length]
        elif what == "number":
            number = data.draw(st.sampled_from([0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1]), label="number")
            content[at : at + 4] = struct.pack(data.draw(st.sampled_from(["<I", ">I"]), label="order"), number)
        else:
            new = data.draw(st.binary(max_size=8), label="bytes")
            content[at : at + (len(new) if what == "write" else 0)] = new
    return bytes(content)


def damaged_json(data, tree):
    """Drop, replace, double or move values anywhere in a tree of dicts and lists."""
    tree = copy.deepcopy(tree)
    for _ in range(data.draw(st.integers(0, 3), label="edits")):
        node = tree
        for _ in range(data.draw(st.integers(0, 4), label="depth")):
            below = list(node.values()) if isinstance(node, dict) else node
            below = [child for child in below if isinstance(child, (dict, list)) and child]
            if not below:
                break
            node = data.draw(st.sampled_from(below), label="below")
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            continue
        key = data.draw(st.sampled_from(keys), label="key")
        what = data.draw(st.sampled_from(["drop", "replace", "double", "swap"]), label="what")
        if what == "drop":
            del node[key]
        elif what == "replace":
            node[key] = data.draw(VALUES, label="value")
        elif what == "swap":
            other = data.draw(st.sampled_from(keys), label="other")
            node[key], node[other] = node[other], node[key]
        elif isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        else:
            node[data.draw(TEXTS, label="new key")] = node[key]
    return tree


def assert_sound(table):
    """What every part of the package relies on."""
    assert table.offsets[0] == 0
    assert table.offsets[-1] == table.num_boxes
    assert (np.diff(table.offsets) >= 0).all()
    assert len(table.offsets) == table.num_images + 1 == len(table.file_names) + 1 == len(table.sizes) + 1
    assert (table.sizes > 0).all()
    assert len(set(table.image_ids.tolist())) == table.num_images
    assert [category.label for category in table.categories] == list(range(1, table.num_classes))
    assert ((table.labels >= 1) & (table.labels < table.num_classes)).all()
    assert table.boxes_xywh.shape == (table.num_boxes, 4)
    assert np.isfinite(table.boxes_xywh).all()
    for column in (table.area, table.crowd, table.difficult, table.annotation_ids):
        assert len(column) == table.num_boxes
    boxes = table.boxes_in_image()[table.trainable(use_difficult=True)]
    assert np.isfinite(boxes).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


# ---- COCO json ------------------------------------------------------------------------------------------------------

COCO = {
    "info": {"year": 2017},
    "images": [
        {"id": 7, "file_name": "b.jpg", "height": 40, "width": 60},
        {"id": 3, "file_name": "a.jpg", "height": 50, "width": 30},
        {"id": 9, "file_name": "c.jpg", "height": 50, "width": 30},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1.5, 2, 3, 4], "area": 12, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 6, 5], "area": 30.5, "iscrowd": 1},
        {"id": 3, "image_id": 3, "category_id": 2, "bbox": [0, 0, 6, 5], "segmentation": [[1, 2, 3, 4, 5, 6]]},
    ],
    "categories": [{"id": 9, "name": "zebra", "supercategory": "animal"}, {"id": 2, "name": "cat"}],
}


def assert_nothing_lost(table, tree):
    """Every image and annotation of the file is in the table, with its own numbers."""
    images = {int(image["id"]): image for image in tree["images"]}
    objects = {int(item["id"]): item for item in tree["annotations"]}
    assert table.image_ids.tolist() == [int(image["id"]) for image in tree["images"]]
    assert sorted(table.annotation_ids.tolist()) == sorted(objects)
    assert len(objects) == len(tree["annotations"])
    category_id = {category.label: category.category_id for category in table.categories}
    for index, image_id in enumerate(table.image_ids.tolist()):
        image, rows = images[image_id], table.rows(index)
        assert table.file_names[index] == image["file_name"]
        assert table.sizes[index].tolist() == [image["height"], image["width"]]
        for row in range(rows.start, rows.stop):
            item = objects[int(table.annotation_ids[row])]
            assert item["image_id"] == image_id
            assert item["category_id"] == category_id[int(table.labels[row])]
            assert table.boxes_xywh[row].tolist() == [float(number) for number in item["bbox"]]
            assert table.crowd[row] == bool(item.get("iscrowd"))


def check_coco(path):
    table = read_or_refuse(lambda: read_coco(path))
    if table is not None:
        assert_sound(table)
        assert_nothing_lost(table, json.loads(path.read_bytes()))
        read_or_refuse(lambda: FolderImages(path.parent, table))
    return table


@fuzz()
def test_coco_with_damaged_values(tmp_path, data):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(damaged_json(data, COCO)))
    check_coco(path)


@fuzz()
def test_coco_with_damaged_bytes(tmp_path, data):
    path = tmp_path / "instances.json"
    path.write_bytes(damaged_bytes(data, json.dumps(COCO).encode()))
    check_coco(path)


@fuzz()
def test_coco_of_any_bytes_or_values(tmp_path, data):
    path = tmp_path / "instances.json"
    anything = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=10)
    content = st.one_of(st.binary(max_size=200), anything.map(lambda value: json.dumps(value).encode()))
    path.write_bytes(data.draw(content))
    assert check_coco(path) is None


def test_undamaged_coco_is_read_and_a_loss_would_be_noticed(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(COCO))
    table = check_coco(path)
    assert table.num_boxes == 3
    more = copy.deepcopy(COCO)
    more["annotations"].append(more["annotations"][0] | {"id": 4})
    with pytest.raises(AssertionError):
        assert_nothing_lost(table, more)


# ---- Pascal VOC -----------------------------------------------------------------------------------------------------


def voc_xml(objects, size=("60", "40")):
    boxes = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>\n"
        for name, difficult, box in objects
    )
    return f"<annotation>\n<size><width>{size[0]}</width><height>{size[1]}</height></size>\n{boxes}</annotation>\n"


OBJECTS = [("cat", 0, (2, 3, 9, 8)), ("dog", 1, (1, 1, 60, 40)), ("cat", 0, (5.5, 5, 20, 20))]


def make_voc(root):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in "ab":
        Image.new("RGB", (60, 40)).save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(voc_xml(OBJECTS))
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")


def left_out(table):
    return sum(int(note.split()[0]) for note in table.notes if "left out" in note)


def check_voc(root, num_objects=None):
    """Read; where the number of objects in the file is known, all are in the table or counted in its notes."""
    table = read_or_refuse(lambda: read_voc(root, "train"))
    if table is not None:
        assert_sound(table)
        if num_objects is not None:
            assert table.num_boxes + left_out(table) == num_objects
        read_or_refuse(lambda: FolderImages(root, table))
    return table


@fuzz()
def test_voc_with_damaged_values(tmp_path, data):
    make_voc(tmp_path)
    value = st.one_of(SCALARS.map(str), st.integers(-3, 70).map(str), st.just(" 7\n"))
    escaped = value.map(lambda text: "".join(c for c in text if c.isprintable() and c not in "<>&"))
    objects = [
        [data.draw(st.one_of(st.just(str(default)), escaped)) for default in (name, difficult, *box)]
        for name, difficult, box in OBJECTS * data.draw(st.integers(0, 2), label="times")
    ]
    size = data.draw(st.one_of(st.just(("60", "40")), st.tuples(escaped, escaped)), label="size")
    text = voc_xml([(name, difficult, box) for name, difficult, *box in objects], size)
    (tmp_path / "Annotations" / "a.xml").write_text(text, encoding="utf-8")
    check_voc(tmp_path, len(objects) + len(OBJECTS))


@fuzz()
def test_voc_with_damaged_structure(tmp_path, data):
    make_voc(tmp_path)
    lines = voc_xml(OBJECTS).replace("><", ">\n<").splitlines()
    for _ in range(data.draw(st.integers(0, 3), label="edits")):
        at = data.draw(st.integers(0, len(lines) - 1), label="at")
        what = data.draw(st.sampled_from(["drop", "double", "swap", "wrap", "rename"]), label="what")
        if what == "drop" and len(lines) > 1:
            del lines[at]
        elif what == "double":
            lines.insert(at, lines[at])
        elif what == "swap":
            other = data.draw(st.integers(0, len(lines) - 1), label="other")
            lines[at], lines[other] = lines[other], lines[at]
        elif what == "wrap":
            lines[at] = f"<part>{lines[at]}</part>"
        else:
            lines[at] = lines[at].replace("object", "part")
    text = "\n".join(lines)
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    # A well-formed file has as many objects as tags that open one.
    check_voc(tmp_path, text.count("<object>") + len(OBJECTS))


@fuzz()
def test_voc_with_damaged_bytes(tmp_path, data):
    make_voc(tmp_path)
    encoding = data.draw(st.sampled_from(["utf-8", "utf-16", "utf-8-sig", "utf-32"]), label="encoding")
    name = data.draw(st.sampled_from(["Annotations/a.xml", "ImageSets/Main/train.txt"]), label="name")
    path = tmp_path / name
    whole = st.binary(max_size=100)
    part = st.builds(lambda: damaged_bytes(data, path.read_text().encode(encoding)))
    path.write_bytes(data.draw(st.one_of(part, part, whole)))
    check_voc(tmp_path)


def test_undamaged_voc_is_read_and_what_is_left_out_is_counted(tmp_path):
    make_voc(tmp_path)
    assert check_voc(tmp_path, 6).num_boxes == 6
    (tmp_path / "Annotations" / "a.xml").write_text(voc_xml([*OBJECTS, ("cat", 0, (9, 9, 9, 9))]))
    table = check_voc(tmp_path, 7)
    assert (table.num_boxes, left_out(table)) == (6, 1)
    with pytest.raises(AssertionError):
        check_voc(tmp_path, 8)


# ---- Images ---------------------------------------------------------------------------------------------------------


def images():
    """Small valid files of each format, and of kinds of pixels that take another way through the decoder."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "JPEG": [
            (rgb, {"exif": exif}),
            (rgb.convert("CMYK"), {}),
            (rgb, {"progressive": True}),
            (rgb.convert("L"), {}),
        ],
        "PNG": [
            (rgb, {"exif": exif}),
            (rgb.quantize(8), {"transparency": 3}),
            (rgb.convert("LA"), {}),
            (rgb.convert("1"), {}),
        ],
        "WEBP": [(rgb, {}), (rgb.convert("RGBA"), {"lossless": True})],
        "BMP": [(rgb, {}), (rgb.quantize(8), {})],
        "TIFF": [(rgb, {"exif": exif}), (rgb, {"compression": "tiff_lzw"}), (rgb.convert("CMYK"), {})],
        "GIF": [(rgb, {}), (rgb, {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180)]})],
        "PPM": [(rgb, {}), (rgb.convert("1"), {})],
    }
    deep = Image.fromarray(np.arange(108, dtype=np.uint16).reshape(12, 9) * 600)
    for image_format in ("PNG", "TIFF", "PPM"):
        kinds[image_format].append((deep, {}))
    files = []
    for image_format, variants in kinds.items():
        for image, options in variants:
            buffer = io.BytesIO()
            image.save(buffer, image_format, **options)
            files.append(buffer.getvalue())
    return files


IMAGES = images()


def mended_png(content):
    """Set the checksums of a PNG's chunks right, so that damage reaches what lies behind them."""
    at, parts = 8, [content[:8]]
    while at + 12 <= len(content):
        length = min(int.from_bytes(content[at : at + 4], "big"), len(content) - at - 12)
        kind_and_data = content[at + 4 : at + 8 + length]
        parts.append(content[at : at + 4] + kind_and_data + struct.pack(">I", zlib.crc32(kind_and_data)))
        at += 12 + length
    return b"".join(parts) + content[at:]


def check_image(path):
    image = read_or_refuse(lambda: read_image(path))
    header = read_or_refuse(lambda: read_header(path))
    if image is not None:
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
        assert image.flags.writeable
        assert header is not None
        assert header.size == image.shape[:2]
    return image


@fuzz(settings(FEW, max_examples=300))
def test_images_with_damaged_bytes(tmp_path, data):
    path = tmp_path / "a.img"
    content = damaged_bytes(data, data.draw(st.sampled_from(IMAGES), label="file"))
    path.write_bytes(mended_png(content) if content.startswith(b"\x89PNG") else content)
    check_image(path)


@fuzz()
def test_images_of_any_bytes(tmp_path, data):
    path = tmp_path / "a.img"
    path.write_bytes(
        data.draw(st.sampled_from(IMAGES))[: data.draw(st.integers(0, 16))] + data.draw(st.binary(max_size=80))
    )
    check_image(path)


def test_undamaged_images_are_read(tmp_path):
    path = tmp_path / "a.img"
    for content in IMAGES:
        path.write_bytes(content)
        assert check_image(path).shape in ((12, 9, 3), (9, 12, 3))


# ---- YAML -----------------------------------------------------------------------------------------------------------


@fuzz()
def test_yaml_of_any_text(tmp_path, data):
    valid = (
        "data:\n  train: {images: a, annotations: b}\n  size: [1, 2.5, 1e-4]\noptim:\n  lr: &x 0.02\nseed: !!int 0\n"
    )
    text = data.draw(
        st.one_of(
            st.builds(lambda: damaged_bytes(data, valid.encode()).decode("utf-8", "replace")),
            st.text(st.sampled_from("[]{}:-,#&*!|>'\"%@`? \n\ta10.e~"), max_size=60),
            st.text(max_size=30),
        )
    )
    problems = []
    read_or_refuse(lambda: read_yaml(text, "x.yaml", problems, {}), kind=ConfigError)
    assert all("\n" not in problem for problem in problems)
