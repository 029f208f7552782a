"""What resdet says to damaged data: each table gives a name, the damage, and the whole message.

In a message, ``{file}`` is the damaged file, ``{folder}`` the folder above it and ``{size}`` its bytes.
"""

# ruff: noqa: E501 - a table reads best with a row on a line

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from resdet.config import load_config
from resdet.data.annotations import FileNames
from resdet.data.coco import read_coco
from resdet.data.coco_rules import HOW_TO_FIX
from resdet.data.dataset import DetectionDataset
from resdet.data.image_files import check_files
from resdet.data.images import FolderImages, read_image
from resdet.data.shapes import shapes_table
from resdet.data.voc import read_voc
from resdet.data.voc_xml import MAX_XML_BYTES
from resdet.errors import ConfigError, DataError, UnreadableImageError

MAX_SECONDS = 10
"""Of processor time, for any one input: some ten times what the slowest takes."""


def cases(table):
    return [pytest.param(*row, id=name) for name, *row in table]


def message_of(read, *, kind=DataError):
    start = time.process_time()
    with pytest.raises(kind) as caught:
        read()
    assert time.process_time() - start < MAX_SECONDS
    return str(caught.value)


# ---- Image files ----------------------------------------------------------------------------------------------------

RGB = np.random.default_rng(0).integers(0, 256, size=(40, 60, 3), dtype=np.uint8)


def encoded(image_format, image=None, **options):
    buffer = io.BytesIO()
    (Image.fromarray(RGB) if image is None else image).save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def half(data):
    return data[: len(data) // 2]


def many_scans():
    jpeg = encoded("JPEG", Image.new("L", (8, 8)), progressive=True)
    last = jpeg.rfind(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * 200 + jpeg[-2:]


ZEROS = zlib.compress(bytes(64 * 2**20))
PIXELS = chunk(b"IDAT", zlib.compress(bytes(5 * 16)))
NO_IMAGE = "{file}: not a readable image ({size} bytes); formats are JPEG, PNG, WEBP, BMP, TIFF, GIF, PPM"
CUT_SHORT = "{file}: cannot be decoded: the file is cut short ({size} bytes)"
TOO_LARGE = "{file}: refused: an image may have at most 178956970 pixels, got "
PIXEL_KINDS = "{file}: pixels must be 8- or 16-bit gray, RGB or CMYK, got "

IMAGES = [
    ("an empty file", b"", "{file}: the file is empty"),
    ("a web page", b"<html>404 Not Found</html>", NO_IMAGE),
    ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", NO_IMAGE),
    ("zeros, as a disk that was full leaves them", bytes(5000), NO_IMAGE),
    ("a drawing", b"<svg xmlns='http://www.w3.org/2000/svg'/>", NO_IMAGE),
    (
        "PostScript, which Pillow would hand to Ghostscript",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        NO_IMAGE,
    ),
    ("a telephone's HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", NO_IMAGE),
    ("JPEG, half of it", half(encoded("JPEG")), CUT_SHORT),
    ("JPEG without its last two bytes", encoded("JPEG")[:-2], CUT_SHORT),
    ("JPEG, only the beginning of its header", encoded("JPEG")[:30], CUT_SHORT),
    (
        "JPEG with 200 scans more than it needs",
        many_scans(),
        "{file}: refused: a JPEG may have at most 100 scans, got 205",
    ),
    ("PNG, half of it", half(encoded("PNG")), CUT_SHORT),
    ("PNG with a flipped bit in its header", encoded("PNG").replace(b"IHDR\0\0\0", b"IHDR\0\1\0"), NO_IMAGE),
    ("PNG without pixels", png(5, 5), "{file}: cannot be decoded: cannot load this image"),
    ("PNG of no width", png(0, 5, PIXELS), NO_IMAGE),
    (
        "PNG with damaged pixels",
        png(5, 5, chunk(b"IDAT", b"not deflated")),
        "{file}: cannot be decoded: broken data stream when reading image file",
    ),
    ("PNG of 100 000 x 100 000 pixels in 50 bytes", png(100_000, 100_000, PIXELS), TOO_LARGE + "10000000000"),
    ("PNG one pixel too large", png(178_956_971, 1, PIXELS), TOO_LARGE + "178956971"),
    (
        "PNG with a comment of 64 MB in 64 kB",
        png(5, 5, chunk(b"zTXt", b"comment\0\0" + ZEROS), PIXELS),
        "{file}: cannot be decoded: Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK",
    ),
    (
        "PNG with a colour profile of 64 MB in 64 kB",
        png(5, 5, chunk(b"iCCP", b"profile\0\0" + ZEROS), PIXELS),
        "{file}: cannot be decoded: Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK",
    ),
    ("WebP, half of it", half(encoded("WEBP")), "{file}: cannot be decoded: could not create decoder object"),
    ("BMP, half of it", half(encoded("BMP")), CUT_SHORT),
    (
        "BMP of 60 000 x 60 000 pixels",
        encoded("BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encoded("BMP")[26:],
        TOO_LARGE + "3600000000",
    ),
    (
        "BMP of 7 bits a pixel",
        encoded("BMP")[:28] + b"\7\0" + encoded("BMP")[30:],
        "{file}: cannot be decoded: Unsupported BMP pixel depth (7)",
    ),
    ("GIF, half of it", half(encoded("GIF")), CUT_SHORT),
    (
        "GIF with a canvas of 65 535 x 65 535",
        encoded("GIF")[:6] + b"\xff" * 4 + encoded("GIF")[10:],
        TOO_LARGE + "4294836225",
    ),
    ("TIFF, half of it", half(encoded("TIFF")), CUT_SHORT),
    (
        "TIFF whose directory lies past its end",
        encoded("TIFF")[:4] + b"\xff\xff\xff\x7f" + encoded("TIFF")[8:],
        NO_IMAGE,
    ),
    ("TIFF of floats", encoded("TIFF", Image.fromarray(RGB[:, :, 0].astype(np.float32))), PIXEL_KINDS + "mode F"),
    (
        "TIFF of 32-bit integers",
        encoded("TIFF", Image.fromarray(RGB[:, :, 0].astype(np.int32))),
        PIXEL_KINDS + "signed or 32-bit gray",
    ),
    ("TIFF in CIELAB", encoded("TIFF", Image.new("LAB", (5, 5))), PIXEL_KINDS + "mode LAB"),
    ("PPM, its first pixels", b"P6 9 9 255 \0\0\0\0\0\0", CUT_SHORT),
]


@pytest.mark.parametrize(("data", "message"), cases(IMAGES))
def test_damaged_images(tmp_path, data, message):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    message = message.format(file=path, size=len(data))
    assert message_of(lambda: read_image(path), kind=UnreadableImageError) == message
    images = FolderImages(tmp_path, table_of(["a.jpg"]))
    assert message_of(lambda: images(0), kind=UnreadableImageError) == f"image 1: {message}"


def test_an_undamaged_image_of_each_kind_is_read(tmp_path):
    path = tmp_path / "a"
    for image_format in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        path.write_bytes(encoded(image_format))
        assert read_image(path).shape == (40, 60, 3)
    path.write_bytes(png(5, 5, PIXELS))
    assert read_image(path).shape == (5, 5, 3)


# ---- Names and sizes of images in a table ---------------------------------------------------------------------------


def table_of(file_names, size=(40, 60)):
    table = shapes_table(len(file_names), 32, seed=0)
    sizes = np.array([size] * len(file_names), dtype=np.int32)
    return replace(table, file_names=FileNames(file_names), sizes=sizes, name="val.json")


OUTSIDE = "val.json: image 1: file_name must lie in the image folder, got "
CONTROL = "val.json: image 1: file_name must hold no control characters and no half surrogates, got "

FILE_NAMES = [
    ("the folder above", "../a.png", OUTSIDE + "'../a.png'"),
    ("up again later", "x/../../a.png", OUTSIDE + "'x/../../a.png'"),
    ("up by backslashes", "x\\..\\..\\a.png", OUTSIDE + r"'x\\..\\..\\a.png'"),
    ("absolute", "/etc/passwd", OUTSIDE + "'/etc/passwd'"),
    ("a drive", "C:\\a.png", OUTSIDE + r"'C:\\a.png'"),
    ("a drive, relative to it", "C:a.png", OUTSIDE + "'C:a.png'"),
    ("another computer", "\\\\host\\share\\a.png", OUTSIDE + r"'\\\\host\\share\\a.png'"),
    ("a NUL", "a.png\0.jpg", CONTROL + r"'a.png\x00.jpg'"),
    ("a NUL at the end", "a.png\0", CONTROL + r"'a.png\x00'"),
    ("a line break", "a\nb.png", CONTROL + r"'a\nb.png'"),
    ("a terminal's escape", "\x1b[31ma.png", CONTROL + r"'\x1b[31ma.png'"),
    ("half a surrogate pair", "a\ud800.png", CONTROL + r"'a\ud800.png'"),
    ("the folder itself", ".", "val.json: image 1: file_name must name a file, got '.'"),
    ("nothing", "", "val.json: image 1: file_name must name a file, got ''"),
    (
        "a novel",
        "a" * 2000,
        f"val.json: image 1: file_name must have at most 1024 characters, got '{'a' * 77}'... (2000 characters)",
    ),
]


@pytest.mark.parametrize(("name", "message"), cases(FILE_NAMES))
def test_names_that_are_refused(tmp_path, name, message):
    assert message_of(lambda: FolderImages(tmp_path, table_of([name]))) == message
    assert message_of(lambda: check_files(tmp_path, table_of([name]))) == message


MISSING = "{folder}: 1 of the 1 images of val.json are missing: "

FILES = [
    ("no such file", "b.png", MISSING + "b.png (image 1)", "image 1: {folder}/b.png: no such image file"),
    (
        "a folder of that name",
        "sub",
        None,
        "image 1: {folder}/sub: not an image file, but a folder or a device",
    ),
    ("a name longer than disks take", "a" * 300, MISSING + f"{'a' * 300} (image 1)", f"image 1: {{folder}}/{'a' * 300}: no such image file"),
    (
        "Windows' separator",
        "sub\\a.png",
        MISSING + r"sub\a.png (image 1); did you mean a.png (without sub/ before it)?",
        "image 1: {folder}/sub\\a.png: no such image file",
    ),
    ("a file as a folder", "a.png/b.png", MISSING + "a.png/b.png (image 1)", "image 1: {folder}/a.png/b.png: no such image file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "at_the_start", "when_read"), cases(FILES))
def test_files_that_are_not_there(tmp_path, name, at_the_start, when_read):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    table = table_of([name])
    if at_the_start is not None:
        assert message_of(lambda: check_files(tmp_path, table)) == at_the_start.format(folder=tmp_path)
    message = message_of(lambda: FolderImages(tmp_path, table)(0), kind=UnreadableImageError)
    assert message == when_read.format(folder=tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os = pytest.importorskip("os")
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes, which this system does not have")
    os.mkfifo(tmp_path / "a.png")
    message = message_of(lambda: read_image(tmp_path / "a.png"))
    assert message == f"{tmp_path}/a.png: not an image file, but a folder or a device"


def test_a_size_that_contradicts_the_table_is_not_an_unreadable_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    dataset = DetectionDataset(
        table_of(["a.png"], (40, 59)), FolderImages(tmp_path, table_of(["a.png"], (40, 59))), training=False
    )
    with pytest.raises(DataError) as caught:
        dataset.image(0)
    assert not isinstance(caught.value, UnreadableImageError)
    assert str(caught.value) == (f"image 1: {tmp_path}/a.png is 60x40 pixels (width x height), but val.json says 59x40")


# ---- COCO json ------------------------------------------------------------------------------------------------------


def coco():
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "height": 40, "width": 60},
            {"id": 3, "file_name": "a.jpg", "height": 50, "width": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1.5, 2, 3, 4], "area": 12, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 6, 5], "area": 30, "iscrowd": 0},
        ],
        "categories": [{"id": 9, "name": "zebra"}, {"id": 2, "name": "cat"}],
    }


def at(section, position, **values):
    """Damage: set these keys of a record."""

    def damaged():
        data = coco()
        data[section][position].update(values)
        return json.dumps(data).encode()

    return damaged


def without(section, position, key):
    """Damage: drop a key of a record."""

    def damaged():
        data = coco()
        del data[section][position][key]
        return json.dumps(data).encode()

    return damaged


def section(**sections):
    """Damage: set whole sections; ``None`` drops one."""
    kept = {key: value for key, value in (coco() | sections).items() if value is not None}
    return lambda: json.dumps(kept).encode()


def text(data):
    """Damage: another file altogether."""
    return lambda: data if isinstance(data, bytes) else data.encode()


VALID = json.dumps(coco()).encode()
NO_JSON = "{file}: not a json file, or cut short ({size} bytes): "
NO_COCO = "{file}: not a COCO annotation file: "
MORE = " (and 1 more: `resdet check` lists them)"
BOX = "{file}: annotation 2 of image 7: bbox must be 4 finite numbers [x, y, width, height], got "

COCO = [
    ("an empty file", text(b""), NO_JSON + "Expecting value: line 1 column 1 (char 0)"),
    ("cut short", text(VALID[:40]), NO_JSON + "Unterminated string starting at: line 1 column 36 (char 35)"),
    ("cut short after a value", text(VALID[:-1]), NO_JSON + f"Expecting ',' delimiter: line 1 column {len(VALID)} (char {len(VALID) - 1})"),
    ("two files in one", text(VALID + VALID), NO_JSON + f"Extra data: line 1 column {len(VALID) + 1} (char {len(VALID)})"),
    ("a web page", text("<html>"), NO_JSON + "Expecting value: line 1 column 1 (char 0)"),
    (
        "Latin-1",
        text(VALID.replace(b"zebra", b"z\xe9bre")),
        NO_JSON + "'utf-8' codec can't decode byte 0xe9 in position {at}: invalid continuation byte",
    ),
    ("nested without end", text("[" * 200_000), NO_COCO + "nested too deeply"),
    ("a list", text("[]"), NO_COCO + "got a json list"),
    (
        "detections",
        text('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]'),
        NO_COCO + "these are detection results; the ground truth they were scored against is needed",
    ),
    ("a number", text("3"), NO_COCO + "got a json int"),
    ("no images", section(images=None), NO_COCO + "no 'images'; its keys are ['annotations', 'categories']"),
    (
        "image_info",
        section(annotations=None),
        NO_COCO + "no 'annotations' (COCO's image_info files have none); its keys are ['categories', 'images']",
    ),
    (
        "captions",
        section(categories=None),
        NO_COCO + "no 'categories' (COCO's captions files have none; instances_*.json is needed); "
        "its keys are ['annotations', 'images']",
    ),
    ("images by id", section(images={"7": {}}), "{file}: 'images' must be a list, got {'7': {}}"),
    ("images empty", section(images=[], annotations=[]), "{file}: 'images' is empty"),
    ("categories empty", section(categories=[], annotations=[]), "{file}: 'categories' is empty"),
]  # fmt: skip
COCO_RECORDS = [
    ("an annotation that is a number", section(annotations=[3]), "{file}: 'annotations'[0] must be an object, got 3"),
    ("an image twice", at("images", 1, id=7), "{file}: image id 7 is given 2 times" + MORE),
    ("an image id of letters", at("images", 1, id="x"), "{file}: image number 2: id must be an integer, got 'x'" + MORE),
    ("an image id of NaN", at("images", 1, id=float("nan")), "{file}: image number 2: id must be an integer, got nan" + MORE),
    ("an image id beyond 64 bits", at("images", 1, id=2**70), f"{{file}}: image number 2: id must be an integer, got {2**70}" + MORE),
    ("no image id", without("images", 1, "id"), "{file}: image number 2: id must be an integer, got nothing" + MORE),
    ("no width", without("images", 1, "width"), "{file}: image 3: width must be a whole number of pixels > 0, got nothing"),
    ("no height to speak of", at("images", 1, height=0), "{file}: image 3: height must be a whole number of pixels > 0, got 0"),
    ("negative width", at("images", 1, width=-5), "{file}: image 3: width must be a whole number of pixels > 0, got -5"),
    ("half a pixel", at("images", 1, height=50.5), "{file}: image 3: height must be a whole number of pixels > 0, got 50.5"),
    ("a width as text", at("images", 1, width="30"), "{file}: image 3: width must be a whole number of pixels > 0, got '30'"),
    ("a height of 10^12", at("images", 1, height=10**12), "{file}: image 3: height must be a whole number of pixels > 0, got 1000000000000"),
    ("no file name", without("images", 1, "file_name"), "{file}: image 3: file_name must be a string, got nothing"),
    ("a file name of numbers", at("images", 1, file_name=3), "{file}: image 3: file_name must be a string, got 3"),
    ("a category twice", at("categories", 1, id=9), "{file}: category id 9 is given 2 times" + MORE),
    ("two categories of one name", at("categories", 1, name="zebra"), "{file}: categories 2 and 9 have the same name 'zebra'"),
    ("a category without a name", without("categories", 1, "name"), "{file}: category 2: name must be a string, got nothing"),
    ("an annotation twice", at("annotations", 1, id=1), "{file}: annotation id 1 is given 2 times"),
    ("an annotation without an id", without("annotations", 1, "id"), "{file}: annotation number 2: id must be an integer, got nothing"),
    ("an annotation of no image", at("annotations", 1, image_id=99), "{file}: annotation 2: image_id 99 is not among its 'images'"),
    ("an annotation without image_id", without("annotations", 1, "image_id"), "{file}: annotation 2: image_id must be an integer, got nothing"),
    ("labels off by one", at("annotations", 1, category_id=1), "{file}: annotation 2: category_id 1 is not among its 'categories'"),
    ("no bbox", without("annotations", 1, "bbox"), BOX + "nothing"),
    ("a bbox of three", at("annotations", 1, bbox=[1, 2, 3]), BOX + "[1, 2, 3]"),
    ("a bbox of NaN", at("annotations", 1, bbox=[1, 2, float("nan"), 4]), BOX + "[1, 2, nan, 4]"),
    ("an infinite bbox", at("annotations", 1, bbox=[1, 2, float("inf"), 4]), BOX + "[1, 2, inf, 4]"),
    ("a bbox of texts", at("annotations", 1, bbox=["1", "2", "3", "4"]), BOX + "['1', '2', '3', '4']"),
    ("a bbox with a hole", at("annotations", 1, bbox=[1, None, 3, 4]), BOX + "[1, None, 3, 4]"),
    ("iscrowd of 2", at("annotations", 1, iscrowd=2), "{file}: annotation 2: iscrowd must be 0 or 1, got 2"),
    ("an area as text", at("annotations", 1, area="big"), "{file}: annotation 2: area must be a finite number, got 'big'"),
    ("an area of NaN", at("annotations", 1, area=float("nan")), "{file}: annotation 2: area must be a finite number, got nan"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), cases(COCO_RECORDS))
def test_damaged_coco_records_are_told_with_what_mends_them(tmp_path, damage, message):
    path = tmp_path / "instances.json"
    path.write_bytes(damage())
    assert message_of(lambda: read_coco(path)) == f"{message.replace('{file}', str(path))}; {HOW_TO_FIX}"


@pytest.mark.parametrize(("damage", "message"), cases(COCO))
def test_damaged_coco_files(tmp_path, damage, message):
    path = tmp_path / "instances.json"
    path.write_bytes(damage())
    expected = message.replace("{file}", str(path)).replace("{size}", str(path.stat().st_size))
    expected = expected.replace("{at}", str(path.read_bytes().find(b"\xe9")))
    assert message_of(lambda: read_coco(path)) == expected


def test_the_undamaged_coco_file_is_read(tmp_path):
    (tmp_path / "instances.json").write_bytes(VALID)
    assert read_coco(tmp_path / "instances.json").num_boxes == 2


# ---- Pascal VOC -----------------------------------------------------------------------------------------------------

SIZE = "<size><width>60</width><height>40</height><depth>3</depth></size>"
BOX_XML = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
OBJECT = f"<object><name>cat</name>{BOX_XML}</object>"
LAUGHS = (
    '<!DOCTYPE a [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in zip("abcdefghi", "bcdefghij", strict=True))
    + f"]><annotation>{SIZE}<object><name>&j;</name></object></annotation>"
)
BLOWUP = f'<!DOCTYPE a [<!ENTITY a "{"a" * 50_000}">]><annotation>{"&a;" * 50_000}</annotation>'
EXTERNAL = '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>'
NO_DOCTYPE = "{file}: refused: an annotation must be plain XML without <!DOCTYPE"
NO_XML = "{file}: not well-formed XML: "


def xml(inside, *, size=SIZE, head=""):
    return f"{head}<annotation>{size}{inside}</annotation>"


def with_box(**corners):
    corners = {"xmin": 2, "ymin": 3, "xmax": 9, "ymax": 8} | corners
    inside = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners.items() if value is not None)
    return xml(f"<object><name>cat</name><bndbox>{inside}</bndbox></object>")


def sized(width, height):
    return xml(OBJECT, size=f"<size><width>{width}</width><height>{height}</height></size>")


VOC = [
    ("an empty file", "", "{file}: the file is empty"),
    ("cut short", xml(OBJECT)[:-30], NO_XML + "unclosed token: line 1, column {last}"),
    ("a billion laughs", LAUGHS, NO_DOCTYPE),
    ("a billion laughs in UTF-16", LAUGHS.encode("utf-16"), NO_DOCTYPE),
    ("a billion laughs in UTF-7", LAUGHS.encode("utf-7").replace(b"<", b'<?xml version="1.0" encoding="utf-7"?><', 1), "{file}: cannot be read as text: encoding utf-7 is not among those read; save it as UTF-8"),
    ("quadratic growth", BLOWUP, NO_DOCTYPE),
    ("an external entity", EXTERNAL, NO_DOCTYPE),
    ("an entity of its own", xml("<object><name>&cat;</name></object>"), NO_XML + "undefined entity: line 1, column 91"),
    ("too large", xml(" " * MAX_XML_BYTES), "{file}: refused: an annotation may have at most 8388608 bytes, got {size}"),
    ("nested without end", xml("<a>" * 100_000), NO_XML + "mismatched tag: line 1, column 300079"),
    ("Latin-1 that says UTF-8", xml(OBJECT).replace("cat", "b\xe9b\xe9").encode("latin-1"), "{file}: cannot be read as text: 'utf-8' codec can't decode byte 0xe9 in position {at}: invalid continuation byte"),
    ("an encoding nobody has", xml(OBJECT, head='<?xml version="1.0" encoding="utf-9"?>'), "{file}: cannot be read as text: unknown encoding: utf-9"),
    ("an encoding that is none of text", xml(OBJECT, head='<?xml version="1.0" encoding="rot13"?>'), "{file}: cannot be read as text: encoding rot13 is not among those read; save it as UTF-8"),
    ("a NUL", xml("\0"), NO_XML + "not well-formed (invalid token): line 1, column 77"),
    ("another outermost element", "<annotations/>", "{file}: the outermost element must be <annotation>, got <annotations>"),
    ("an object without a name", xml(f"<object>{BOX_XML}</object>"), "{file}: <object> has no <name>"),
    ("an empty name", xml(f"<object><name> </name>{BOX_XML}</object>"), "{file}: <object> has no <name>"),
    ("a name of two lines", xml(f"<object><name>a\nb</name>{BOX_XML}</object>"), r"{file}: <name> must be one line of at most 200 characters, got 'a\nb'"),
    ("a name of 300 letters", xml(f"<object><name>{'a' * 300}</name>{BOX_XML}</object>"), "{file}: <name> must be one line of at most 200 characters, got '" + "a" * 77 + "'... (300 characters)"),
    ("markup in a name", xml(f"<object><name><b>cat</b></name>{BOX_XML}</object>"), "{file}: <name> must hold text alone, got <b> in it"),
    ("no box", xml("<object><name>cat</name></object>"), "{file}: the object 'cat' has no <bndbox>"),
    ("two boxes", xml(f"<object><name>cat</name>{BOX_XML}{BOX_XML}</object>"), "{file}: <object> must have one <bndbox>, got 2"),
    ("objects in a list of their own", xml(f"<objects>{OBJECT}{OBJECT}</objects>"), "{file}: every <object> must stand directly in <annotation>, but 2 of 2 do not"),
    ("an object in an object", xml(OBJECT.replace("</object>", OBJECT + "</object>")), "{file}: every <object> must stand directly in <annotation>, but 1 of 2 do not"),
    ("no xmin", with_box(xmin=None), "{file}: <bndbox> has no <xmin>"),
    ("two corners of one name", with_box(xmin="2</xmin><xmin>4"), "{file}: <bndbox> must have one <xmin>, got 2"),
    ("a corner of letters", with_box(xmax="nine"), "{file}: <xmax> must be a number of pixels up to 2**31, got 'nine'"),
    ("a corner of NaN", with_box(ymax="NaN"), "{file}: <ymax> must be a number of pixels up to 2**31, got 'NaN'"),
    ("a corner at infinity", with_box(xmax="1e999"), "{file}: <xmax> must be a number of pixels up to 2**31, got '1e999'"),
    ("a corner very far out", with_box(xmax="1e300"), "{file}: <xmax> must be a number of pixels up to 2**31, got '1e300'"),
    ("a decimal comma", with_box(xmax="9,5"), "{file}: <xmax> must be a number of pixels up to 2**31, got '9,5'"),
    ("a corner as Python writes it", with_box(xmax="1_0"), "{file}: <xmax> must be a number of pixels up to 2**31, got '1_0'"),
    ("markup in difficult", xml(OBJECT.replace("<bndbox>", "<difficult><b/></difficult><bndbox>")), "{file}: <difficult> must hold text alone, got <b> in it"),
    ("a negative width", sized(-60, 40), "{file}: <width> must be a whole number of pixels, got '-60'"),
    ("half a pixel", sized(60, 40.5), "{file}: <height> must be a whole number of pixels, got '40.5'"),
    ("a height of 2^31", sized(60, 2**31), "{file}: <height> must be a whole number of pixels, got '2147483648'"),
    ("two sizes", xml(SIZE + OBJECT), "{file}: <annotation> must have one <size>, got 2"),
    ("no size, and the image is damaged", xml(OBJECT, size=""), "{folder}/JPEGImages/a.jpg: the file is empty"),
    ("sizes of 0, and the image is damaged", sized(0, 0), "{folder}/JPEGImages/a.jpg: the file is empty"),
]  # fmt: skip


def voc(root, annotation, split=b"a\n"):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    path = root / "Annotations" / "a.xml"
    path.write_bytes(annotation if isinstance(annotation, bytes) else annotation.encode())
    (root / "JPEGImages" / "a.jpg").touch()
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(split)
    return path


@pytest.mark.parametrize(("annotation", "message"), cases(VOC))
def test_damaged_voc_annotations(tmp_path, annotation, message):
    path = voc(tmp_path, annotation)
    data = path.read_bytes()
    places = {"size": len(data), "at": data.find(b"\xe9"), "last": data.rfind(b"<")}
    assert message_of(lambda: read_voc(tmp_path, "train")) == message.format(file=path, folder=tmp_path, **places)
    # The same file outside the split is read for its class names alone, and may not be worse company.
    if message.startswith(NO_DOCTYPE):
        (tmp_path / "Annotations" / "b.xml").write_bytes(data)
        path.write_text(xml(OBJECT))
        assert message_of(lambda: read_voc(tmp_path, "train")).startswith(f"{tmp_path}/Annotations/b.xml: refused")


UNLISTED = "{folder}/Annotations: no annotation "
HINT = "; lists give names without folder and suffix, one a line"

SPLITS = [
    ("an empty list", b"", "{file}: lists no images"),
    ("blank lines alone", b"\n \r\n\t\n", "{file}: lists no images"),
    ("an image twice", b"a\na\n", "{folder}: image JPEGImages/a.jpg is listed twice, in train and train"),
    ("an image twice, with flags", b"a  1\na -1\n", "{folder}: image JPEGImages/a.jpg is listed twice, in train and train"),
    ("an image without annotation", b"a\nb\n", UNLISTED + "'b.xml', but train lists it"),
    ("a way out of the folder", b"../../etc/passwd\n", UNLISTED + "'../../etc/passwd.xml', but train lists it"),
    ("an absolute path", b"/etc/passwd\n", UNLISTED + "'/etc/passwd.xml', but train lists it"),
    ("file names", b"a.jpg\n", UNLISTED + "'a.jpg.xml', but train lists it" + HINT),
    ("paths", b"JPEGImages\\a.jpg Annotations\\a.xml\n", UNLISTED + r"'JPEGImages\\a.jpg Annotations\\a.xml.xml', but train lists it" + HINT),
    ("a NUL", b"a\0\n", UNLISTED + r"'a\x00.xml', but train lists it"),
    ("Latin-1", b"b\xe9b\xe9\n", "{file}: cannot be read as text: 'utf-8' codec can't decode byte 0xe9 in position 1: invalid continuation byte"),
    ("a novel", b"word" * 1000, UNLISTED + "'" + "word" * 25 + "', but train lists it"),
]  # fmt: skip


@pytest.mark.parametrize(("split", "message"), cases(SPLITS))
def test_damaged_split_lists(tmp_path, split, message):
    voc(tmp_path, xml(OBJECT), split)
    expected = message.format(file=tmp_path / "ImageSets" / "Main" / "train.txt", folder=tmp_path)
    assert message_of(lambda: read_voc(tmp_path, "train")) == expected


@pytest.mark.parametrize(
    "split",
    [b"a", b"\r\na\r\n\r\n", b"a  1\n", b"a -1\n", b"\xef\xbb\xbfa\n", "a\n".encode("utf-16"), b"  a\t\n"],
    ids=["no end of line", "CRLF and blank lines", "flag 1", "flag -1", "UTF-8 with mark", "UTF-16", "spaces"],
)
def test_lists_that_only_look_damaged_are_read(tmp_path, split):
    voc(tmp_path, xml(OBJECT), split)
    assert read_voc(tmp_path, "train").boxes_xywh.tolist() == [[1, 2, 8, 6]]


@pytest.mark.parametrize(
    "annotation",
    [
        xml(OBJECT, head='<?xml version="1.0" encoding="utf-8"?>\n'),
        b"\xef\xbb\xbf" + xml(OBJECT).encode(),
        xml(OBJECT, head='<?xml version="1.0" encoding="utf-16"?>').encode("utf-16"),
        xml(OBJECT, head='<?xml version="1.0" encoding="utf-16"?>'),
        xml(OBJECT + "<note>b\xe9b\xe9</note>", head="<?xml version='1.0' encoding='ISO-8859-1'?>").encode("latin-1"),
        xml(OBJECT + "<note>\u732b</note>", head="<?xml version='1.0' encoding='GB2312'?>").encode("gbk"),
        with_box(xmin=" 2.0 ", xmax="\n9\n"),
        xml("<part><object/></part>".replace("object", "name") + OBJECT),
    ],
    ids=["declared", "mark", "UTF-16", "UTF-16 declared, UTF-8 written", "Latin-1", "GBK", "floats and spaces", "more"],
)
def test_annotations_that_only_look_damaged_are_read(tmp_path, annotation):
    voc(tmp_path, annotation)
    table = read_voc(tmp_path, "train")
    assert table.boxes_xywh.tolist() == [[1, 2, 8, 6]]
    assert table.sizes.tolist() == [[40, 60]]


# ---- YAML -----------------------------------------------------------------------------------------------------------

LAUGHING = "a0: &a0 [ha, ha]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
ONE = "{file}: 1 problem\n  "

YAML = [
    ("a billion laughs", LAUGHING.encode(), ONE + "line 2: anchors and aliases (*a0) are not read"),
    ("a list that holds itself", b"a: &a [*a]", ONE + "line 1: anchors and aliases (*a) are not read"),
    ("lists without end", b"a: " + b"[" * 5000, ONE + "line 1: refused: lists and mappings nested more than 50 deep"),
    ("mappings without end", b"\n".join(b" " * i + b"a:" for i in range(200)), ONE + "line 51: refused: lists and mappings nested more than 50 deep"),
    ("dashes without end", b"- " * 5000, ONE + "line 1: refused: lists and mappings nested more than 50 deep"),
    ("a database", b"a: b\n" * 30_000, ONE + "refused: at most 100000 characters are read, got 150000"),
    ("code", b"a: !!python/object/apply:os.system [ls]", ONE + "line 1: tags (tag:yaml.org,2002:python/object/apply:os.system) are not read"),
    ("code that calls itself a number", b"a: !!python/object:int 5", ONE + "line 1: tags (tag:yaml.org,2002:python/object:int) are not read"),
    ("a tag", b"a: 1\nb: !!int x", ONE + "line 2: tags (tag:yaml.org,2002:int) are not read"),
    ("two documents", b"a: 1\n---\nb: 2\n", ONE + "line 2: one document is read, and '---' begins another"),
    ("a NUL", b"a: 1\nb: \0\n", ONE + "line 2: not YAML: the character U+0000 may not stand here"),
    ("an escape", b"a: \x1b[31m", ONE + "line 1: not YAML: the character U+001B may not stand here"),
    ("Latin-1", b"a: b\xe9b\xe9", ONE + "cannot be read: 'utf-8' codec can't decode byte 0xe9 in position 4: invalid continuation byte"),
    ("a list that stays open", b"a: [1", ONE + "line 1, column 6: not YAML: expected ',' or ']', but got '<stream end>'"),
    ("a tab", b"a:\n\t- b", ONE + "line 2, column 1: not YAML: found character '\\t' that cannot start any token"),
    ("an empty file", b"", ONE + "must be a mapping of sections, got nothing (null)"),
    ("a list", b"- a", ONE + 'must be a mapping of sections, got ["a"] (list)'),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), cases(YAML))
def test_damaged_configurations(tmp_path, data, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    assert message_of(lambda: load_config(path), kind=ConfigError) == message.replace("{file}", str(path))


PROBLEMS = [
    ("a key twice", "seed: 1\nseed: 2\n", "{file}:2: seed: written twice; keep one"),
    ("a number of 5000 digits", f"seed: {'9' * 5000}\n", "{file}:1: seed: a number has at most 100 digits, got 5000"),
    ("a list as a key", "seed: {[a]: 1}\n", "{file}:1: a key of seed must be a text, got a list or mapping"),
    ("a list as the first key", "[a]: 1\n", "{file}:1: a key must be a text, got a list or mapping"),
]


@pytest.mark.parametrize(("data", "message"), cases(PROBLEMS))
def test_configurations_that_are_read_on_after_a_mistake(tmp_path, data, message):
    path = tmp_path / "a.yaml"
    path.write_text(data)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message.format(file=path) in caught.value.problems


def test_there_are_enough_of_them():
    tables = (IMAGES, FILE_NAMES, FILES, COCO, COCO_RECORDS, VOC, SPLITS, YAML, PROBLEMS)
    assert sum(map(len, tables)) >= 160
