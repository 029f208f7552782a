import numpy as np
import pytest
from PIL import Image

from resdet.data.image_files import check_files
from resdet.data.images import FolderImages
from resdet.data.voc import VOC_CLASSES, read_voc
from resdet.errors import DataError


def voc_object(name, corners, difficult="<difficult>0</difficult>", part=""):
    xmin, ymin, xmax, ymax = corners
    box = f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>"
    return f"<object><name>{name}</name>{difficult}{box}{part}</object>"


def annotation(*objects, size="<size><width>60</width><height>40</height><depth>3</depth></size>"):
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def make_voc(root, annotations, lists, *, suffix=".jpg"):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for stem, text in annotations.items():
        (root / "Annotations" / f"{stem}.xml").write_text(text)
        Image.new("RGB", (60, 40)).save(root / "JPEGImages" / f"{stem}{suffix}")
    for name, lines in lists.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


PERSON = voc_object("person", (1, 1, 60, 40))


def test_inclusive_corners_from_1_become_continuous_boxes(tmp_path):
    root = make_voc(tmp_path, {"a": annotation(PERSON, voc_object("cat", (11, 21, 20, 22)))}, {"train": ["a"]})
    table = read_voc(root, "train")
    # A box from the first pixel to the last is the whole image.
    assert table.boxes_xywh.tolist() == [[0, 0, 60, 40], [10, 20, 10, 2]]
    assert table.boxes_in_image()[0].tolist() == [0, 0, 60, 40]
    assert table.area.tolist() == [2400, 20]
    assert table.sizes.tolist() == [[40, 60]]
    assert table.file_names.tolist() == ["JPEGImages/a.jpg"]


def test_voc_names_get_their_usual_labels(tmp_path):
    table = read_voc(make_voc(tmp_path, {"a": annotation(PERSON)}, {"train": ["a"]}), "train")
    assert tuple(c.name for c in table.categories) == VOC_CLASSES
    assert table.labels.tolist() == [15]


def test_train_and_val_agree_on_labels_of_other_names(tmp_path):
    annotations = {"a": annotation(PERSON), "b": annotation(voc_object("helmet", (1, 1, 9, 9)))}
    root = make_voc(tmp_path, annotations, {"train": ["a"], "val": ["b"]})
    train, val = read_voc(root, "train"), read_voc(root, "val")
    assert train.categories == val.categories
    assert [c.name for c in train.categories] == ["helmet", "person"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([2], [1])


def test_parts_of_a_person_are_no_objects(tmp_path):
    head = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    root = make_voc(tmp_path, {"a": annotation(voc_object("person", (2, 2, 9, 9), part=head))}, {"train": ["a"]})
    table = read_voc(root, "train")
    assert table.num_boxes == 1
    assert len(table.categories) == 20


def test_classes_override(tmp_path):
    root = make_voc(tmp_path, {"a": annotation(PERSON, voc_object("cat", (1, 1, 9, 9)))}, {"train": ["a"]})
    table = read_voc(root, "train", classes=["cat", "dog"])
    assert [c.name for c in table.categories] == ["cat", "dog"]
    assert table.labels.tolist() == [1]
    with pytest.raises(DataError, match=r"unknown classes \['cow2'\]"):
        read_voc(root, "train", classes=["cow2"])


def test_difficult_is_kept_and_absent_means_0(tmp_path):
    objects = [
        voc_object("cat", (1, 1, 9, 9), "<difficult>1</difficult>"),
        voc_object("cat", (1, 1, 9, 9), ""),
        voc_object("cat", (1, 1, 9, 9), "<difficult/>"),
    ]
    table = read_voc(make_voc(tmp_path, {"a": annotation(*objects)}, {"train": ["a"]}), "train")
    assert table.difficult.tolist() == [True, False, False]


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>", "<size/>"])
def test_an_absent_size_comes_from_the_image(tmp_path, size):
    table = read_voc(make_voc(tmp_path, {"a": annotation(PERSON, size=size)}, {"train": ["a"]}), "train")
    assert table.sizes.tolist() == [[40, 60]]


def test_boxes_without_extent_are_left_out_and_noted(tmp_path):
    objects = [PERSON, voc_object("cat", (5, 5, 5, 9)), voc_object("cat", (5, 9, 8, 5))]
    table = read_voc(make_voc(tmp_path, {"a": annotation(*objects)}, {"train": ["a"]}), "train")
    assert table.num_boxes == 1
    assert table.notes == ("2 boxes without extent (xmax <= xmin or ymax <= ymin) left out: a, a",)


def test_zero_based_corners_are_noted(tmp_path):
    root = make_voc(tmp_path, {"a": annotation(voc_object("cat", (0, 3, 9, 9)))}, {"train": ["a"]})
    assert "with a corner at 0" in read_voc(root, "train").notes[0]


def test_lists_of_one_class_and_names_with_spaces(tmp_path):
    annotations = {name: annotation(PERSON) for name in ("a", "b", "scan 1")}
    root = make_voc(tmp_path, annotations, {"cat_train": ["a  1", "b -1"], "odd": ["scan 1", "", "a"]})
    assert read_voc(root, "cat_train").file_names.tolist() == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert read_voc(root, "odd").file_names.tolist() == ["JPEGImages/scan 1.jpg", "JPEGImages/a.jpg"]


def test_other_image_suffixes_are_found(tmp_path):
    root = make_voc(tmp_path, {"a": annotation(PERSON)}, {"train": ["a"]}, suffix=".png")
    assert read_voc(root, "train").file_names.tolist() == ["JPEGImages/a.png"]


def test_several_folders_below_one_root_are_joined(tmp_path):
    make_voc(tmp_path / "VOC2007", {"1": annotation(PERSON), "2": annotation()}, {"trainval": ["1", "2"]})
    make_voc(tmp_path / "VOC2012", {"1": annotation(voc_object("cat", (1, 1, 9, 9)))}, {"trainval": ["1"]})
    table = read_voc(tmp_path, ["VOC2007/trainval", "VOC2012/trainval"])
    assert table.file_names.tolist() == [
        "VOC2007/JPEGImages/1.jpg",
        "VOC2007/JPEGImages/2.jpg",
        "VOC2012/JPEGImages/1.jpg",
    ]
    assert table.offsets.tolist() == [0, 1, 1, 2]
    assert table.image_ids.tolist() == [1, 2, 3]
    check_files(tmp_path, table)
    assert FolderImages(tmp_path, table)(2).shape == (40, 60, 3)
    with pytest.raises(DataError, match=r"has no Annotations; below it lie VOC2007, VOC2012: name the split as"):
        read_voc(tmp_path, "trainval")


def test_a_class_with_only_boxes_without_extent_is_a_class_all_the_same(tmp_path):
    annotations = {
        "a": annotation(voc_object("helmet", (5, 5, 5, 9)), PERSON),
        "b": annotation(voc_object("helmet", (1, 1, 9, 9))),
    }
    root = make_voc(tmp_path, annotations, {"train": ["a"], "val": ["b"]})
    assert read_voc(root, "train").categories == read_voc(root, "val").categories


def test_missing_things_say_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"no such folder\. VOC is VOCtrainval_06-Nov-2007\.tar.*JPEGImages"):
        read_voc(tmp_path / "nowhere", "train")
    lists = {"train": ["a"], "val": ["a"], "cat_train": ["a 1"], "gone": ["z"], "empty": [], "twice": ["a", "a"]}
    root = make_voc(tmp_path, {"a": annotation(PERSON)}, lists)
    with pytest.raises(DataError, match=r"no such split; .* has empty, gone, train, twice, val$"):
        read_voc(root, "trainval")
    with pytest.raises(DataError, match=r"Annotations: no annotation 'z\.xml', but gone lists it"):
        read_voc(root, "gone")
    with pytest.raises(DataError, match="lists no images"):
        read_voc(root, "empty")
    with pytest.raises(DataError, match=r"JPEGImages/a\.jpg is listed twice, in twice and twice"):
        read_voc(root, "twice")
    with pytest.raises(DataError, match=r"listed twice, in train and val"):
        read_voc(root, ["train", "val"])
    with pytest.raises(DataError, match="at least one split"):
        read_voc(root, [])


def test_without_any_object_there_is_nothing_to_learn(tmp_path):
    with pytest.raises(DataError, match="no classes to learn"):
        read_voc(make_voc(tmp_path, {"a": annotation()}, {"train": ["a"]}), "train")


def test_blood_cells(assets):
    table = read_voc(assets / "bccd", ["train", "val", "test"])
    assert [c.name for c in table.categories] == ["Platelets", "RBC", "WBC"]
    assert table.num_images == 364
    assert "2 boxes without extent" in table.notes[0]
    assert "BloodImage_00338" in table.notes[0]
    assert "BloodImage_00343" in table.notes[0]
    assert table.categories == read_voc(assets / "bccd", "val").categories
    check_files(assets / "bccd", table)


def test_real_voc(assets):
    from xml.etree import ElementTree

    root = assets / "voc2012_mini"
    table = read_voc(root, ["VOC2012/train", "VOC2012/val"])
    assert (table.num_images, table.num_classes) == (100, 21)
    check_files(root, table)
    images = FolderImages(root, table)
    for index in range(0, 100, 10):
        assert images(index).shape[:2] == tuple(table.sizes[index])
        stem = table.file_names[index].split("/")[-1][:-4]
        tree = ElementTree.parse(root / "VOC2012" / "Annotations" / f"{stem}.xml")
        corners = [
            [float(b.findtext(t)) for t in ("xmin", "ymin", "xmax", "ymax")] for b in tree.findall("object/bndbox")
        ]
        x, y, w, h = table.boxes_xywh[table.rows(index)].T
        assert np.array_equal(np.stack([x + 1, y + 1, x + w, y + h], axis=1), corners)
