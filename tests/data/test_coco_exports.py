"""COCO json as labelling tools, other data sets and other systems write it."""

from __future__ import annotations

import codecs
import json
import unicodedata

import pytest
from PIL import Image

from resdet.check.check import check_dataset
from resdet.check.repair import repaired
from resdet.check.splits import coco_split
from resdet.data import cache
from resdet.data.coco import read_coco
from resdet.data.coco_rules import load_records, record_problems
from resdet.data.dataset import DetectionDataset
from resdet.data.image_files import check_files
from resdet.data.images import FolderImages
from resdet.errors import DataError


def coco(**changes):
    document = {
        "images": [{"id": 7, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 8, 6], "area": 48, "iscrowd": 0}],
        "categories": [{"id": 2, "name": "cat"}],
    }
    return document | changes


def write(path, document, encoding="utf-8", mark=b""):
    path.write_bytes(mark + json.dumps(document, ensure_ascii=False).encode(encoding))
    return path


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40)).save(path, format="PNG")


# Files whose values have the expected types are decoded by types, all others in general.
@pytest.fixture(params=["typed", "general"])
def any_way(request, monkeypatch):
    if request.param == "general":
        monkeypatch.setattr("resdet.data.coco._read_plain", lambda _data: None)


# ---- Encodings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16", b""),
        ("utf-16-le", b""),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32", b""),
    ],
)
def test_json_with_a_mark_and_in_utf_16_is_read(tmp_path, encoding, mark):
    document = coco(categories=[{"id": 2, "name": "größe"}])
    table = read_coco(write(tmp_path / "a.json", document, encoding, mark))
    assert [category.name for category in table.categories] == ["größe"]
    assert table.boxes_xywh.tolist() == [[1, 2, 8, 6]]


@pytest.mark.usefixtures("any_way")
def test_class_names_in_another_unicode_form_are_the_same(tmp_path):
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "Bär")
        path = write(tmp_path / "a.json", coco(categories=[{"id": 2, "name": name}]))
        assert read_coco(path).categories[0].name == "B\xe4r"
        assert read_coco(path, classes=[unicodedata.normalize("NFD", "Bär")]).num_boxes == 1


@pytest.mark.usefixtures("any_way")
def test_two_classes_whose_names_look_identical_stay_two(tmp_path):
    names = ["B\xe4r", "Ba\u0308r"]
    path = write(tmp_path / "a.json", coco(categories=[{"id": n, "name": name} for n, name in enumerate(names, 2)]))
    assert [category.name for category in read_coco(path).categories] == names
    assert [category.name for category in read_coco(path, classes=names[::-1]).categories] == names[::-1]


# ---- Other data sets ------------------------------------------------------------------------------------------------

URL = "http://images.cocodataset.org/train2017/000000391895.jpg"


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("absent", [{}, {"file_name": None}])
def test_lvis_names_its_images_by_their_url(tmp_path, absent):
    images = [{"id": 7, "coco_url": URL, "height": 40, "width": 60, "license": 1, "neg_category_ids": [3], **absent}]
    path = write(tmp_path / "lvis.json", coco(images=images))
    table = read_coco(path)
    assert table.file_names.tolist() == ["train2017/000000391895.jpg"]
    picture(tmp_path / "train2017" / "000000391895.jpg")
    check_files(tmp_path, table)
    assert FolderImages(tmp_path, table)(0).shape == (40, 60, 3)
    with pytest.raises(DataError, match=rf"did you mean .*391895\.jpg \(then the image folder is {tmp_path}\)\?$"):
        check_files(tmp_path / "train2017", table)
    assert list(record_problems(load_records(path))) == []


@pytest.mark.usefixtures("any_way")
def test_a_file_name_comes_before_the_url(tmp_path):
    images = [{"id": 7, "file_name": "a.png", "coco_url": URL, "height": 40, "width": 60}]
    assert read_coco(write(tmp_path / "a.json", coco(images=images))).file_names.tolist() == ["a.png"]


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize(("url", "got"), [(None, "nothing"), (5, "nothing"), ("", "''")])
def test_an_image_without_name_and_url_is_refused(tmp_path, url, got):
    path = write(tmp_path / "a.json", coco(images=[{"id": 7, "coco_url": url, "height": 40, "width": 60}]))
    with pytest.raises(DataError, match="image 7: file_name must be a string, got"):
        read_coco(path)


ROOT = {"id": 0, "name": "animals", "supercategory": "none"}
CAT = {"id": 2, "name": "cat", "supercategory": "animals"}


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize(
    "root", [ROOT, ROOT | {"name": "cat"}, {"id": 0, "name": "animals"}, ROOT | {"supercategory": ""}]
)
def test_the_root_category_of_roboflow_is_no_class(tmp_path, root):
    categories = [root, CAT | {"supercategory": root["name"]}, {"id": 3, "name": "dog", "supercategory": root["name"]}]
    path = write(tmp_path / "a.json", coco(categories=categories))
    table = read_coco(path)
    assert [(one.label, one.category_id, one.name) for one in table.categories] == [(1, 2, "cat"), (2, 3, "dog")]
    assert table.labels.tolist() == [1]
    assert table.notes == (f"category 0 '{root['name']}' is no class: no box has it, and all others lie below it",)
    assert list(record_problems(load_records(path))) == []
    picture(tmp_path / "a.png")
    problems = coco_split("train", tmp_path, path).problems
    assert [(problem.kind, problem.message) for problem in problems] == [("root_category", table.notes[0])]


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize(
    ("categories", "used"),
    [
        ([ROOT, CAT], 0),  # it has a box
        ([ROOT, CAT, {"id": 3, "name": "car", "supercategory": "vehicles"}], 2),  # not the supercategory of all
        ([ROOT, CAT, {"id": 3, "name": "thing", "supercategory": "none"}], 2),  # two roots
        ([{"id": 0, "name": "animals"}, {"id": 2, "name": "cat"}], 2),  # no supercategories
        ([ROOT], 0),
    ],
)
def test_any_other_category_without_boxes_is_a_class(tmp_path, categories, used):
    annotation = coco()["annotations"][0] | {"category_id": used}
    table = read_coco(write(tmp_path / "a.json", coco(categories=categories, annotations=[annotation])))
    assert [one.name for one in table.categories] == [one["name"] for one in categories]
    assert table.notes == ()


# ---- Labelling tools -------------------------------------------------------------------------------------------------

BOX = [1.0, 2.0, 8.0, 6.0]
CORNERS = [[1.0, 2.0, 9.0, 2.0, 9.0, 8.0, 1.0, 8.0]]


def cvat(root):
    """Write CVAT's "COCO 1.0": attributes with occluded, sizes and ids as numbers, one json for each subset."""
    picture(root / "images" / "default" / "a.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [], "area": 48.0, "bbox": BOX, "iscrowd": 0}
    document = {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": {"contributor": "", "date_created": "", "description": "", "url": "", "version": "", "year": ""},
        "categories": [{"id": 1, "name": "cat", "supercategory": ""}],
        "images": [
            {"id": 1, "width": 60, "height": 40, "file_name": "a.png", "license": 0}
            | {"flickr_url": "", "coco_url": "", "date_captured": 0}
        ],
        "annotations": [
            annotation | {"attributes": {"occluded": False, "rotation": 0.0, "track_id": 3, "keyframe": True}}
        ],
    }
    return root / "images" / "default", document


def datumaro(root):
    """Write datumaro's COCO: as CVAT's, whose exporter it is, with a subset's name and score attributes."""
    images, document = cvat(root)
    document["annotations"][0]["attributes"] = {"is_crowd": False, "score": 1.0}
    return images, document


def label_studio(root):
    """Write Label Studio's COCO: ids from 0, images/ before the names, whole pixels, an ``ignore``."""
    picture(root / "images" / "1f2e3d4c-a.png")
    return root, {
        "images": [{"width": 60, "height": 40, "id": 0, "file_name": "images/1f2e3d4c-a.png"}],
        "categories": [{"id": 0, "name": "cat"}],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 0, "segmentation": [], "bbox": [1, 2, 8, 6]}
            | {"ignore": 0, "iscrowd": 0, "area": 48}
        ],
        "info": {"year": 2024, "version": "1.0", "description": "", "contributor": "Label Studio", "url": ""},
    }


def labelme2coco(root):
    """Write labelme2coco's dataset.json, which sahi writes: polygons, areas of whole pixels, no info."""
    picture(root / "a.png")
    return root, {
        "images": [{"height": 40, "width": 60, "id": 1, "file_name": "a.png"}],
        "categories": [{"id": 0, "name": "cat", "supercategory": "cat"}],
        "annotations": [
            {"iscrowd": 0, "image_id": 1, "bbox": [1, 2, 8, 6], "segmentation": CORNERS, "category_id": 0}
            | {"id": 1, "area": 48}
        ],
    }


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("tool", [cvat, datumaro, label_studio, labelme2coco])
def test_exports_of_labelling_tools_are_read(tmp_path, tool):
    images, document = tool(tmp_path)
    path = write(tmp_path / "export.json", document)
    table = read_coco(path)
    check_files(images, table)
    assert FolderImages(images, table)(0).shape == (40, 60, 3)
    assert (table.boxes_xywh.tolist(), table.area.tolist(), table.crowd.tolist()) == ([BOX], [48], [False])
    assert [(one.label, one.name) for one in table.categories] == [(1, "cat")]
    assert table.notes == ()
    report = check_dataset([coco_split("train", images, path)])
    assert not report.wrong


@pytest.mark.parametrize(
    ("name", "folder", "hint"),
    [
        ("images\\a.png", "", r"did you mean images/a\.png \(folders must be separated by /, not by \\\)\?"),
        ("../../label-studio/data/media/upload/1/a.png", "images", "file_name must lie in the image folder"),
    ],
)
def test_names_of_label_studio_that_are_paths_elsewhere_are_mended(tmp_path, name, folder, hint):
    picture(tmp_path / "images" / "a.png")
    images = [{"id": 7, "file_name": name, "height": 40, "width": 60}]
    path = write(tmp_path / "result.json", coco(images=images))
    with pytest.raises(DataError, match=hint):
        check_files(tmp_path / folder, read_coco(path))
    split = coco_split("train", tmp_path / folder, path)
    document, changes = repaired(split, check_dataset([split]))
    assert [image["file_name"] for image in document["images"]] == ["a.png" if folder else "images/a.png"]
    assert len(changes) == 1


# ---- Ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("images", "id", "7", "image number 1: id must be an integer, got '7'"),
        ("annotations", "id", "1", "annotation number 1: id must be an integer, got '1'"),
        ("annotations", "image_id", "7", "annotation 1: image_id must be an integer, got '7'"),
        ("annotations", "category_id", "2", "annotation 1: category_id must be an integer, got '2'"),
        ("categories", "id", "2", "category number 1: id must be an integer, got '2'"),
    ],
)
def test_ids_that_are_texts_are_refused(tmp_path, section, key, value, message):
    document = coco()
    document[section][0][key] = value
    with pytest.raises(DataError) as caught:
        read_coco(write(tmp_path / "a.json", document))
    assert message in str(caught.value)


@pytest.mark.usefixtures("any_way")
def test_repeated_annotation_ids_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"annotation id 1 is given 2 times"):
        read_coco(write(tmp_path / "a.json", coco(annotations=coco()["annotations"] * 2)))


# ---- Nearly empty sets ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_way")
def test_nearly_empty_sets_are_read(tmp_path):
    one = read_coco(write(tmp_path / "a.json", coco()))
    picture(tmp_path / "a.png")
    dataset = DetectionDataset(one, FolderImages(tmp_path, one), training=True)
    assert dataset[0][1]["boxes"].tolist() == [[1, 2, 9, 8]]

    images = [{"id": n, "file_name": f"{n}.png", "height": 40, "width": 60} for n in (7, 3, 5)]
    some = read_coco(write(tmp_path / "b.json", coco(images=images)))
    assert some.offsets.tolist() == [0, 1, 1, 1]

    none = read_coco(write(tmp_path / "c.json", coco(annotations=[])))
    assert (none.num_images, none.num_boxes) == (1, 0)
    picture(tmp_path / "a.png")
    judged = DetectionDataset(none, FolderImages(tmp_path, none), training=False)
    assert tuple(judged[0][1]["boxes"].shape) == (0, 4)
    with pytest.raises(DataError, match="it has no boxes, or none that can be read"):
        DetectionDataset(none, FolderImages(tmp_path, none), training=True)


# ---- Paths ----------------------------------------------------------------------------------------------------------

LONG = "x" * 5000


@pytest.mark.parametrize("name", [LONG, f"{LONG}/a.json", "x" * 300 + ".json", "a\0b.json", "a.json/b.json"])
def test_an_annotation_path_that_no_file_can_have_is_missing(tmp_path, name):
    write(tmp_path / "a.json", coco())
    for read in (read_coco, load_records):
        with pytest.raises(DataError, match="no such annotation file") as caught:
            read(tmp_path / name)
        assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", [LONG, "a\0b", "nowhere"])
def test_an_image_folder_that_no_folder_can_be_is_missing(tmp_path, name):
    table = read_coco(write(tmp_path / "a.json", coco()))
    with pytest.raises(DataError, match="no such image folder") as caught:
        check_files(tmp_path / name, table)
    assert len(str(caught.value)) < 1500


def test_a_cached_table_is_the_one_read(tmp_path, monkeypatch, contents):
    monkeypatch.setenv("RESDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST", 0)
    images = [{"id": 7, "coco_url": URL, "height": 40, "width": 60}]
    name = unicodedata.normalize("NFD", "Bär")
    path = write(tmp_path / "a.json", coco(images=images, categories=[{"id": 2, "name": name}]))
    first, second = read_coco(path), read_coco(path)
    assert contents(first) == contents(second)
    assert second.file_names.tolist() == ["train2017/000000391895.jpg"]
