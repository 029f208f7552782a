import io
import pickle
import random
import struct
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from resdet.data import images
from resdet.data.annotations import FileNames
from resdet.data.images import FolderImages, ImageHeader, check_files, read_header, read_image, read_size
from resdet.data.shapes import shapes_table
from resdet.errors import DataError, UnreadableImageError

RGB = np.random.default_rng(0).integers(0, 256, size=(6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff"])
def test_lossless_formats_give_the_pixels_back(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(path)
    assert np.array_equal(image, RGB)
    assert image.flags.writeable
    assert image.flags.c_contiguous
    assert read_size(path) == (6, 9)


def test_jpeg_gives_the_pixels_of_opencv(assets):
    cv2 = pytest.importorskip("cv2")
    for path in sorted((assets / "tiny_coco" / "val2017").glob("*.jpg"))[:10]:
        reference = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)[:, :, ::-1]
        image = read_image(path)
        assert image.shape == reference.shape
        # Both wrap libjpeg-turbo, whose versions may round differently by a level; here they agree to the bit.
        assert np.abs(image.astype(int) - reference).max() <= 1
        with pytest.raises(AssertionError):  # the comparison can tell RGB from BGR
            assert np.abs(image.astype(int) - reference[:, :, ::-1]).max() <= 1


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


# Edges, noise and sides that are no multiples of a block.
PHOTO = Image.fromarray(
    np.clip(
        np.add.outer(np.arange(37) * 3, np.arange(53) * 2)[:, :, None]
        + np.random.default_rng(1).normal(0, 20, size=(37, 53, 3)),
        0,
        255,
    ).astype(np.uint8)
)

SOUND_JPEGS = {
    "4:4:4": jpeg(PHOTO, subsampling="4:4:4"),
    "4:2:2": jpeg(PHOTO, subsampling="4:2:2", quality=95),
    "4:2:0": jpeg(PHOTO, subsampling="4:2:0", quality=30),
    "tables of its own": jpeg(PHOTO, optimize=True),
    "restarts": jpeg(PHOTO, restart_marker_blocks=2),
    "gray": jpeg(PHOTO.convert("L")),
    "one pixel": jpeg(PHOTO.crop((0, 0, 1, 1))),
    "one row": jpeg(PHOTO.crop((0, 0, 53, 1))),
    "bytes after its end": jpeg(PHOTO) + b"more",
}
OTHER_JPEGS = {
    "progressive": jpeg(PHOTO, progressive=True),
    "CMYK": jpeg(PHOTO.convert("CMYK")),
    "fill before its end": jpeg(PHOTO)[:-2] + b"\xff\xff\xd9",
}


def by_pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert("RGB"))


@pytest.mark.parametrize("name", [*SOUND_JPEGS, *OTHER_JPEGS])
def test_jpegs_give_pillows_pixels_whoever_decodes_them(tmp_path, monkeypatch, name):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "a.jpg"
    content = {**SOUND_JPEGS, **OTHER_JPEGS}[name]
    path.write_bytes(content)
    decoded = []
    sound_jpeg = images._sound_jpeg
    monkeypatch.setattr(images, "_sound_jpeg", lambda path: decoded.append(sound_jpeg(path)) or decoded[-1])
    image = read_image(path)
    if hasattr(cv2, "IMREAD_COLOR_RGB"):
        assert any(by_opencv is not None for by_opencv in decoded) == (name in SOUND_JPEGS)
    assert np.array_equal(image, by_pillow(content))
    assert image.flags.writeable
    assert image.flags.c_contiguous
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB", raising=False)
    assert np.array_equal(read_image(path), by_pillow(content))
    image[0, 0, 0] ^= 1
    with pytest.raises(AssertionError):  # one level of one pixel would be noticed
        assert np.array_equal(image, by_pillow(content))


def test_real_jpegs_give_pillows_pixels(assets):
    files = [
        path for folder in ("tiny_coco", "bccd", "voc2012_mini") for path in sorted((assets / folder).rglob("*.jpg"))
    ]
    assert len(files) > 100
    for path in files[::10]:
        assert np.array_equal(read_image(path), by_pillow(path.read_bytes()))


def damaged(content, rng):
    content = bytearray(content)
    at = rng.randrange(len(content))
    how = rng.randrange(5)
    if how == 0:
        content[at] = rng.randrange(256)
    elif how == 1:
        del content[at : at + rng.randrange(1, 9)]
    elif how == 2:
        content[at : at + 2] = b"\xff" + bytes([rng.choice(b"\xd9\xd0\xd3\xda\xc4\xe0\xff\xfe\xdd\xc0\xdb\xd8")])
    elif how == 3:
        content[at:] = b"\xff\xd9"
    else:
        del content[at:]
    return bytes(content)


def what_is_read(path):
    try:
        image = read_image(path)
    except UnreadableImageError as error:
        return str(error)
    return image.shape, image.tobytes()


def compare_readers(tmp_path, monkeypatch, num_files):
    """Read damaged JPEGs as they are read, and by Pillow alone; both must give the same pixels or the same message."""
    rng = random.Random(0)
    path = tmp_path / "a.jpg"
    kinds = sorted({**SOUND_JPEGS, **OTHER_JPEGS}.items())
    num_read = 0
    for _ in range(num_files):
        path.write_bytes(damaged(rng.choice(kinds)[1], rng))
        found = what_is_read(path)
        with monkeypatch.context() as patch:
            patch.setattr(images, "_sound_jpeg", lambda path: None)
            assert found == what_is_read(path)
        num_read += not isinstance(found, str)
    return num_read


def test_damaged_jpegs_give_what_pillow_gives(tmp_path, monkeypatch):
    num_read = compare_readers(tmp_path, monkeypatch, 300)
    assert 50 < num_read < 250  # both kinds of outcome are among them


def test_a_reader_that_trusts_opencv_would_be_noticed(tmp_path, monkeypatch):
    class Trusting:
        def search(self, data, start):
            return [b"\xff\xd9"]

    monkeypatch.setattr(images, "_MARKER", Trusting())
    with pytest.raises(AssertionError):
        compare_readers(tmp_path, monkeypatch, 200)


def test_every_kind_of_pixel_becomes_rgb(tmp_path):
    path = tmp_path / "a.png"
    gray = RGB[:, :, 0]
    Image.fromarray(gray).save(path)
    assert np.array_equal(read_image(path), np.repeat(gray[:, :, None], 3, axis=2))
    Image.fromarray(gray > 127).save(path)
    assert np.array_equal(read_image(path)[:, :, 1], np.where(gray > 127, 255, 0))
    Image.fromarray(gray.astype(np.uint16) << 8 | 7).save(path)
    assert np.array_equal(read_image(path)[:, :, 2], gray)
    Image.fromarray(np.dstack([RGB, gray])).save(path)
    assert np.array_equal(read_image(path), RGB)
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(path, transparency=bytes(range(16)))
    assert np.array_equal(read_image(path), np.array(palette.convert("RGB")))
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "a.tiff")
    assert np.abs(read_image(tmp_path / "a.tiff").astype(int) - RGB).max() <= 1  # rounding on the way to CMYK and back

    Image.fromarray(np.dstack([gray, gray])).save(path)  # gray with alpha
    assert np.array_equal(read_image(path)[:, :, 0], gray)


def test_colours_of_cmyk_jpegs_are_those_of_opencv(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "a.jpg"
    Image.new("RGB", (32, 32), (200, 40, 90)).convert("CMYK").save(path)
    with Image.open(path) as image:
        assert (image.mode, "adobe" in image.info) == ("CMYK", True)
    image = read_image(path).astype(int)
    # A level or two from JPEG, and one from the way to CMYK and back.
    assert np.abs(image - [200, 40, 90]).max() <= 3
    assert np.abs(image - cv2.imread(str(path))[:, :, ::-1]).max() <= 3
    with pytest.raises(AssertionError):  # taken as not inverted, it would be another colour
        assert np.abs(255 - image - [200, 40, 90]).max() <= 3


def tiff(width, height, data, *, bits, photometric=1, samples=1, order="<"):
    """A TIFF of one strip, for what Pillow reads but does not write."""
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0), (277, samples)]
    tags += [(278, height), (279, len(data))]
    end = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    extra = b""
    for tag, value in tags:
        if tag == 258 and samples > 1:
            entries += struct.pack(order + "HHII", tag, 3, samples, end)
            extra = struct.pack(order + f"{samples}H", *[bits] * samples)
        elif tag == 273:
            entries += struct.pack(order + "HHII", tag, 4, 1, end + (2 * samples if samples > 1 else 0))
        else:
            entries += struct.pack(order + "HHI" + "HH", tag, 3, 1, value, 0)
    return head + struct.pack(order + "H", len(tags)) + entries + bytes(4) + extra + data


def test_deep_samples_keep_their_high_byte(tmp_path):
    path = tmp_path / "a.tiff"
    deep = RGB.astype(np.uint16) << 8 | 0x7F
    for order in "<>":
        path.write_bytes(tiff(9, 6, deep[:, :, 0].astype(f"{order}u2").tobytes(), bits=16, order=order))
        assert np.array_equal(read_image(path)[:, :, 1], RGB[:, :, 0])
        path.write_bytes(
            tiff(9, 6, deep.astype(f"{order}u2").tobytes(), bits=16, photometric=2, samples=3, order=order)
        )
        assert np.array_equal(read_image(path), RGB)
    path.write_bytes(tiff(2, 1, b"\xab\xc1\x23", bits=12))
    assert read_image(path)[0, :, 0].tolist() == [0xAB, 0x12]


def test_a_deep_tiff_whose_0_is_white_is_not_a_negative(tmp_path):
    path = tmp_path / "a.tiff"
    path.write_bytes(tiff(3, 1, struct.pack("<3H", 0, 0x8000, 0xFFFF), bits=16, photometric=0))
    assert read_image(path)[0, :, 0].tolist() == [255, 127, 0]


def test_deep_png_colours_keep_their_high_byte(tmp_path):
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "a.png"), (RGB.astype(np.uint16) << 8 | 0x7F)[:, :, ::-1])
    assert np.array_equal(read_image(tmp_path / "a.png"), RGB)


def test_odd_but_readable_files_are_read_without_a_warning(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(RGB).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "a.png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).shape == (6, 9, 3)
        assert read_header(path).orientation == 1
        assert read_image(tmp_path / "a.png").shape == (6, 9, 3)


def test_the_limit_on_pixels_holds_where_pillows_is_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.ppm").write_bytes(b"P6 99999 99999 255 ")
    with pytest.raises(DataError, match=r"refused: an image may have at most 178956970 pixels, got 99999x99999$"):
        read_size(tmp_path / "a.ppm")


def table_of(file_names, sizes):
    table = shapes_table(len(file_names), 32, seed=0)
    return replace(table, file_names=FileNames(file_names), sizes=np.array(sizes, dtype=np.int32), name="val.json")


def test_folder_images_check_size_and_name_the_image(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    folder = FolderImages(tmp_path, table_of(["a.png", "a.png", "b.png"], [(6, 9), (6, 8), (6, 9)]))
    assert np.array_equal(pickle.loads(pickle.dumps(folder))(0), RGB)
    with pytest.raises(DataError, match=r"image 2: .*a\.png is 9x6 pixels .* but val\.json says 8x6$"):
        folder(1)
    with pytest.raises(DataError, match=r"image 3: .*b\.png: no such image file"):
        folder(2)


def write_turned(path, image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_where_only_then_its_size_is_the_tables(tmp_path, orientation):
    path = tmp_path / "a.png"
    write_turned(path, RGB, orientation)
    assert read_header(path) == ImageHeader((6, 9), "PNG", "RGB", orientation)
    assert np.array_equal(read_image(path), RGB)
    # Annotated as stored: pycocotools and torchvision see it so.
    assert np.array_equal(FolderImages(tmp_path, table_of(["a.png"], [(6, 9)]))(0), RGB)
    # Annotated as a browser shows it.
    upright = FolderImages(tmp_path, table_of(["a.png"], [(9, 6)]))
    if orientation >= 5:
        with Image.open(path) as image:
            reference = np.array(ImageOps.exif_transpose(image))
        assert np.array_equal(upright(0), reference)
        assert upright(0).flags.writeable
        assert upright(0).flags.c_contiguous
        with pytest.raises(AssertionError):  # another turn would be noticed
            assert np.array_equal(upright(0), reference[::-1])
    else:
        with pytest.raises(DataError, match=r"image 1: .*a\.png is 9x6 pixels .* but val\.json says 6x9$"):
            upright(0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_square_images_are_taken_as_stored(tmp_path, orientation):
    write_turned(tmp_path / "a.png", RGB[:, :6], orientation)
    assert np.array_equal(FolderImages(tmp_path, table_of(["a.png"], [(6, 6)]))(0), RGB[:, :6])


def test_pillow_turns_tiff_files_by_itself_once(tmp_path):
    write_turned(tmp_path / "a.tiff", RGB, 6)
    turned = np.rot90(RGB, -1)
    assert np.array_equal(read_image(tmp_path / "a.tiff"), turned)
    assert np.array_equal(FolderImages(tmp_path, table_of(["a.tiff"], [(9, 6)]))(0), turned)
    with pytest.raises(DataError, match="is 6x9 pixels"):
        FolderImages(tmp_path, table_of(["a.tiff"], [(6, 9)]))(0)


def test_links_inside_the_folder_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "images").mkdir()
    Image.fromarray(RGB).save(tmp_path / "disk" / "a.png")
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "disk" / "a.png")
    table = table_of(["a.png"], [(6, 9)])
    check_files(tmp_path / "images", table)
    assert np.array_equal(FolderImages(tmp_path / "images", table)(0), RGB)


def test_names_that_only_look_odd_are_accepted(tmp_path):
    FolderImages(tmp_path, table_of(["a..b.png", "12:30.png"], [(6, 9)] * 2))


def test_missing_files_are_found_before_training(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.fromarray(RGB).save(tmp_path / "sub" / "a.png")
    check_files(tmp_path, table_of(["sub/a.png"], [(6, 9)]))
    names = ["sub/a.png", "sub/b.png", "c.png", "no/d.png", "e.png"]
    with pytest.raises(DataError) as caught:
        check_files(tmp_path, table_of(names, [(6, 9)] * 5))
    assert str(caught.value) == (
        f"{tmp_path}: 4 of the 5 images of val.json are missing: "
        "sub/b.png (image 2), c.png (image 3), no/d.png (image 4), ..."
    )
    with pytest.raises(DataError, match="no such image folder"):
        check_files(tmp_path / "nowhere", table_of(names, [(6, 9)] * 5))
