import pickle
import struct
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from resdet.data.annotations import FileNames
from resdet.data.image_files import check_files
from resdet.data.images import FolderImages, ImageHeader, read_header, read_image, read_size
from resdet.data.shapes import shapes_table
from resdet.errors import DataError

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


MODES = {
    "1-bit": (Image.fromarray(RGB[:, :, 0] > 127), "png", "1"),
    "gray": (Image.fromarray(RGB[:, :, 0]), "png", "L"),
    "gray with alpha": (Image.fromarray(np.dstack([RGB[:, :, 0]] * 2)), "png", "LA"),
    "palette": (Image.fromarray(RGB).quantize(16), "png", "P"),
    "palette of a GIF": (Image.fromarray(RGB).quantize(16), "gif", "P"),
    "colour with alpha": (Image.fromarray(np.dstack([RGB, RGB[:, :, 0]])), "png", "RGBA"),
    "CMYK": (Image.fromarray(RGB).convert("CMYK"), "tiff", "CMYK"),
    "YCbCr": (Image.fromarray(RGB).convert("YCbCr"), "tiff", "YCbCr"),
    "16-bit gray": (Image.fromarray(RGB[:, :, 0].astype(np.uint16) << 8), "png", "I;16"),
}


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_pixel_modes_in_a_folder_of_images(tmp_path, mode, upright):
    image, suffix, name = MODES[mode]
    path = tmp_path / f"a.{suffix}"
    transparent = {"transparency": bytes(range(16))} if mode == "palette" else {}
    image.save(path, **transparent)
    assert read_header(path).mode == name
    pixels = read_image(path, upright=upright)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (6, 9, 3))
    assert pixels.max() > pixels.min()
    assert np.array_equal(FolderImages(tmp_path, table_of([path.name], [(6, 9)]))(0), pixels)


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
    images = FolderImages(tmp_path, table_of(["a.png", "a.png", "b.png"], [(6, 9), (6, 8), (6, 9)]))
    assert np.array_equal(pickle.loads(pickle.dumps(images))(0), RGB)
    with pytest.raises(DataError, match=r"image 2: .*a\.png is 9x6 pixels .* but val\.json says 8x6$"):
        images(1)
    with pytest.raises(DataError, match=r"image 3: .*b\.png: no such image file"):
        images(2)


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


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_an_image_read_upright_is_what_a_browser_shows(tmp_path, orientation):
    path = tmp_path / "a.png"
    write_turned(path, RGB, orientation)
    with Image.open(path) as image:
        reference = np.array(ImageOps.exif_transpose(image))
    upright = read_image(path, upright=True)
    assert np.array_equal(upright, reference)
    assert upright.flags.writeable
    assert upright.flags.c_contiguous
    if orientation in range(2, 9):
        assert not np.array_equal(upright, read_image(path))


def test_a_tiff_is_turned_upright_once(tmp_path):
    write_turned(tmp_path / "a.tiff", RGB, 6)
    assert np.array_equal(read_image(tmp_path / "a.tiff", upright=True), np.rot90(RGB, -1))


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
