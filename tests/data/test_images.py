import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from resdet.data.images import FolderImages, check_files, read_image, read_size
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


def test_float_pixels_are_refused(tmp_path):
    Image.fromarray(RGB[:, :, 0].astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="pixels must be 8- or 16-bit gray, RGB or CMYK, got mode F"):
        read_image(tmp_path / "a.tiff")


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "a.jpg"
    with pytest.raises(DataError, match=r"a\.jpg: no such image file"):
        read_image(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.jpg: the file is empty"):
        read_image(path)
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match=r"a\.jpg: not an image that Pillow can read \(16 bytes\)"):
        read_image(path)
    Image.fromarray(np.tile(RGB, (20, 20, 1))).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded: .*truncated"):
        read_image(path)
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path)


def table_of(file_names, sizes):
    table = shapes_table(len(file_names), 32, seed=0)
    return replace(table, file_names=np.array(file_names), sizes=np.array(sizes, dtype=np.int32), name="val.json")


def test_folder_images_check_size_and_name_the_image(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    images = FolderImages(tmp_path, table_of(["a.png", "a.png", "b.png"], [(6, 9), (6, 8), (6, 9)]))
    assert np.array_equal(pickle.loads(pickle.dumps(images))(0), RGB)
    with pytest.raises(DataError, match=r"image 2: .*a\.png is 9x6 pixels .* but val\.json says 8x6$"):
        images(1)
    with pytest.raises(DataError, match=r"image 3: .*b\.png: no such image file"):
        images(2)


def test_exif_orientation_is_not_applied_but_named_where_it_explains_the_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (6, 9, 3)
    assert FolderImages(tmp_path, table_of(["a.jpg"], [(6, 9)]))(0).shape == (6, 9, 3)
    with pytest.raises(DataError, match="says 6x9; its EXIF orientation says to turn it"):
        FolderImages(tmp_path, table_of(["a.jpg"], [(9, 6)]))(0)


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/etc/a.png", "C:\\a.png", "\\\\host\\a.png"])
def test_file_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(DataError, match=r"val\.json: image 1: file_name must lie in the image folder"):
        FolderImages(tmp_path, table_of([name], [(6, 9)]))


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
