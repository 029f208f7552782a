"""Names of image files: in folders that a computer's own files lie in too, and names that are not quite the disk's."""

from __future__ import annotations

import pickle
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from resdet.data.annotations import FileNames
from resdet.data.image_files import ImageFolder, check_files, find_images
from resdet.data.images import FolderImages
from resdet.data.names import list_folder
from resdet.data.shapes import shapes_table
from resdet.errors import DataError, UnreadableImageError


def nfc(text):
    return unicodedata.normalize("NFC", text)


def nfd(text):
    return unicodedata.normalize("NFD", text)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40)).save(path, format="PNG")


def table_of(*names):
    table = shapes_table(len(names), 32, seed=0)
    sizes = np.array([(40, 60)] * len(names), dtype=np.int32)
    return replace(table, file_names=FileNames(names), sizes=sizes, name="val.json")


# ---- Hidden files ---------------------------------------------------------------------------------------------------

CLUTTER = ("._a.jpg", ".a.png", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/._b.jpg", "@eaDir/thumb.jpg")


def test_hidden_files_are_no_images_of_a_folder(tmp_path):
    for name in ("a.jpg", *CLUTTER):
        picture(tmp_path / name)
    assert find_images([tmp_path]) == [tmp_path / "a.jpg"]
    assert find_images([tmp_path / "*.jpg"]) == [tmp_path / "a.jpg"]
    assert list_folder(tmp_path) == {"a.jpg", "Thumbs.db", "desktop.ini"}


def test_a_folder_of_hidden_files_alone_holds_no_images(tmp_path):
    picture(tmp_path / "._a.jpg")
    with pytest.raises(DataError, match="no images in this folder"):
        find_images([tmp_path])


def test_a_hidden_file_that_is_named_is_read(tmp_path):
    picture(tmp_path / ".a.jpg")
    assert find_images([tmp_path / ".a.jpg"]) == [tmp_path / ".a.jpg"]
    check_files(tmp_path, table_of(".a.jpg"))


# ---- Names that look identical --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_disk", "in_json"), [(nfd, nfc), (nfc, nfd)])
@pytest.mark.parametrize("name", ["größe.png", "fotos_ä/größe.png", "fotos_ä/a.png", "が/ê/é.png"])
def test_a_name_in_another_unicode_form_is_found(tmp_path, on_disk, in_json, name):
    picture(tmp_path / on_disk(name))
    assert on_disk(name) != in_json(name)
    assert ImageFolder(tmp_path).find(in_json(name)) == on_disk(name)
    table = table_of(in_json(name))
    check_files(tmp_path, table)
    assert FolderImages(tmp_path, table)(0).shape == (40, 60, 3)
    assert pickle.loads(pickle.dumps(FolderImages(tmp_path, table)))(0).shape == (40, 60, 3)


def test_the_exact_name_comes_before_another_form(tmp_path):
    picture(tmp_path / nfd("ä.png"))
    picture(tmp_path / nfc("ä.png"))
    for form in (nfc, nfd):
        assert ImageFolder(tmp_path).find(form("ä.png")) == form("ä.png")


def test_several_names_that_look_like_a_missing_one_are_refused(tmp_path):
    two = nfd("ä") + nfc("ä.png"), nfc("ä") + nfd("ä.png")
    for name in two:
        picture(tmp_path / name)
    table = table_of(nfc("ää.png"))
    message = rf"^{tmp_path}: several names look like ää\.png: '\\xe4a\\u0308\.png', 'a\\u0308\\xe4\.png'; rename"
    for read in (lambda: check_files(tmp_path, table), lambda: FolderImages(tmp_path, table)(0)):
        with pytest.raises(DataError, match=message):
            read()


@pytest.mark.parametrize("name", ["a.png", "ä.png", "ö/ä.png"])
def test_a_folder_that_vanishes_leaves_images_unreadable(tmp_path, name):
    picture(tmp_path / "images" / name)
    images = FolderImages(tmp_path / "images", table_of(name))
    (tmp_path / "images").rename(tmp_path / "unmounted")
    with pytest.raises(UnreadableImageError, match=r"^image \d+: .*\.png: no such image file$"):
        images(0)


def test_another_letter_is_another_name(tmp_path):
    picture(tmp_path / "große.png")
    assert [ImageFolder(tmp_path).find(name) for name in ("größe.png", "grosse.png")] == [None, None]


# ---- Names that are not quite those of existing files ---------------------------------------------------------------

MEANT = [
    ("img.jpg", "IMG.JPG", "IMG.JPG (upper and lower case differ)"),
    ("Train/a.jpg", "train/a.jpg", "train/a.jpg (upper and lower case differ)"),
    ("a.jpg", "a.png", "a.png (another suffix)"),
    ("a.jpg", "a.jpg.jpg", "a.jpg.jpg (another suffix)"),
    ("a.jpg.JPG", "a.jpg", "a.jpg (another suffix)"),
    ("a", "a.jpg", "a.jpg (another suffix)"),
    ("sub\\a.jpg", "sub/a.jpg", r"sub/a.jpg (folders must be separated by /, not by \)"),
    ("sub%2Fmy%20a.jpg", "sub/my a.jpg", "sub/my a.jpg (without escapes as in a URL)"),
    ("train/a.jpg", "a.jpg", "a.jpg (without train/ before it)"),
    ("a.jpg", "images/a.jpg", "images/a.jpg (then the image folder is {root}/images)"),
    ("photos/a.jpg", "a.jpg", "{root}/a.jpg (then the image folder is {above})"),
    ("val/a.jpg", "../val/a.jpg", "{above}/val/a.jpg (then the image folder is {above})"),
    ("JPEGImages/a.jpg", "JPEGImages/sub/A.png", "JPEGImages/sub/A.png (another folder)"),
    ("/home/me/a.jpg", "a.jpg", "a.jpg (without home/me/ before it)"),
    ("C:\\data\\images\\a.jpg", "images/a.jpg", "images/a.jpg (without data/ before it)"),
]


@pytest.mark.parametrize(("name", "existing", "meant"), MEANT)
def test_the_file_that_a_missing_name_was_perhaps_meant_for_is_named(tmp_path, name, existing, meant):
    root = tmp_path / "photos"
    root.mkdir()
    picture(root / existing)
    picture(root / "._a.jpg")
    picture(root / "other.jpg")
    with pytest.raises(DataError) as caught:
        check_files(root, table_of("other.jpg", name))
    assert str(caught.value).endswith(f"; did you mean {meant.format(root=root, above=tmp_path)}?")
    assert ImageFolder(root).meant(name).path.is_file()


@pytest.mark.parametrize("existing", [("x/a.jpg", "y/a.jpg"), ("a.png", "a.bmp"), ("b.jpg",), ("sub/._a.jpg",)])
def test_nothing_is_guessed_where_several_or_no_files_are_like_it(tmp_path, existing):
    for name in existing:
        picture(tmp_path / name)
    assert ImageFolder(tmp_path).meant("a.jpg") is None


def test_the_file_most_like_a_missing_name_is_named(tmp_path):
    for name in ("a.JPG", "a.png", "sub/a.png"):
        picture(tmp_path / name)
    assert ImageFolder(tmp_path).meant("a.jpg").name == "a.JPG"


@pytest.mark.parametrize("name", [".", "..", "", "a\0.jpg", "a" * 5000 + ".jpg", "\\", "C:"])
def test_names_that_no_file_can_have_lead_to_no_guess(tmp_path, name):
    picture(tmp_path / "b.jpg")
    assert ImageFolder(tmp_path).meant(name) is None
