"""VOC folders as other tools, other systems and file managers leave them."""

from __future__ import annotations

import unicodedata

import pytest
from PIL import Image

from resdet.check.check import check_dataset
from resdet.check.splits import voc_split
from resdet.data.image_files import check_files
from resdet.data.images import FolderImages
from resdet.data.voc import read_voc, voc_records
from resdet.errors import DataError

SIZE = "<size><width>60</width><height>40</height><depth>3</depth></size>"
BOX = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
CAT = f"<annotation>{SIZE}<object><name>cat</name>{BOX}</object></annotation>"
CAT_BOX = [[1, 2, 8, 6]]


def nfc(text):
    return unicodedata.normalize("NFC", text)


def nfd(text):
    return unicodedata.normalize("NFD", text)


def voc(root, annotations, lines=None, *, split="train", suffix=".xml", image_suffix=".jpg"):
    """Write annotations by stem, an image for each, and a list of them."""
    for stem, text in annotations.items():
        for path in (root / "Annotations" / f"{stem}{suffix}", root / "JPEGImages" / f"{stem}{image_suffix}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        (root / "Annotations" / f"{stem}{suffix}").write_text(text, encoding="utf-8")
        Image.new("RGB", (60, 40)).save(root / "JPEGImages" / f"{stem}{image_suffix}", format="PNG")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("\n".join(lines or annotations) + "\n", encoding="utf-8")
    return root


def read_and_open(root, split="train"):
    table = read_voc(root, split)
    check_files(root, table)
    for index in range(table.num_images):
        assert FolderImages(root, table)(index).shape == (40, 60, 3)
    return table


# ---- The same box, as five tools write it ---------------------------------------------------------------------------

TOOLS = {
    "Pascal VOC": """<annotation><folder>VOC2012</folder><filename>a.jpg</filename>
        <object><name>person</name><actions><jumping>0</jumping></actions><bndbox><xmax>9</xmax><xmin>2</xmin>
        <ymax>8</ymax><ymin>3</ymin></bndbox><difficult>0</difficult><pose>Unspecified</pose><point><x>4</x><y>5</y></point>
        <part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part></object>
        <segmented>0</segmented><size><depth>3</depth><height>40</height><width>60</width></size>
        <source><annotation>PASCAL VOC2012</annotation><database>VOC2012</database></source></annotation>""",
    "labelImg": """<annotation verified="yes">
        <folder>images</folder><filename>a.jpg</filename><path>C:\\Users\\me\\images\\a.jpg</path>
        <source><database>Unknown</database></source>
        <size><width>60</width><height>40</height><depth>3</depth></size><segmented>0</segmented>
        <object><name>person</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
        <bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>""",
    "CVAT": """<annotation><folder></folder><filename>/data/tasks/a.jpg</filename><source><database>Unknown</database>
        <annotation>Unknown</annotation><image>Unknown</image></source>
        <size><width>60</width><height>40</height><depth></depth></size><segmented>0</segmented>
        <object><name>person</name><truncated>0</truncated><occluded>1</occluded><difficult>0</difficult>
        <bndbox><xmin>2.0</xmin><ymin>3.00</ymin><xmax>9.0</xmax><ymax>8.0</ymax></bndbox>
        <attributes><attribute><name>rotation</name><value>0.0</value></attribute>
        <attribute><name>track_id</name><value>7</value></attribute></attributes></object></annotation>""",
    "Roboflow": """<annotation><folder></folder><filename>a_jpg.rf.0123456789abcdef.jpg</filename><path>a.jpg</path>
        <source><database>roboflow.com</database></source><size><width>60</width><height>40</height><depth>3</depth></size>
        <segmented>0</segmented><object><name>person</name><pose>Unspecified</pose><truncated>0</truncated>
        <difficult>0</difficult><occluded>0</occluded>
        <bndbox><xmin>2</xmin><xmax>9</xmax><ymin>3</ymin><ymax>8</ymax></bndbox>
        <polygon><x1>2</x1><y1>3</y1><x2>9</x2><y2>8</y2></polygon></object></annotation>""",
    "a converter from LabelMe": """<?xml version='1.0' encoding='utf-8'?>
        <annotation><filename>/home/me/a.jpg</filename><source><database/></source>
        <size><height>40</height><width>60</width><depth>3</depth></size><segmented/>
        <object><name>person</name><pose/><truncated/><difficult/>
        <bndbox><xmin>2.0</xmin><ymin>3.0</ymin><xmax>9.0</xmax><ymax>8.0</ymax></bndbox></object></annotation>""",
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_annotations_of_five_tools_hold_the_same_box(tmp_path, tool):
    table = read_and_open(voc(tmp_path, {"a": TOOLS[tool].strip()}))
    assert table.boxes_xywh.tolist() == CAT_BOX
    assert table.sizes.tolist() == [[40, 60]]
    assert table.categories[int(table.labels[0]) - 1].name == "person"
    assert not table.difficult.any()
    assert table.notes == ()


def test_corners_between_pixels_keep_their_fractions(tmp_path):
    text = CAT.replace("<xmin>2<", "<xmin>2.25<").replace("<ymax>8<", "<ymax>8.5<")
    assert read_and_open(voc(tmp_path, {"a": text})).boxes_xywh.tolist() == [[1.25, 2, 7.75, 6.5]]


# ---- Nearly empty sets ----------------------------------------------------------------------------------------------


def test_images_without_objects_are_kept(tmp_path):
    table = read_and_open(voc(tmp_path, {"a": CAT, "b": f"<annotation>{SIZE}</annotation>"}))
    assert (table.num_images, table.num_boxes) == (2, 1)
    only = read_and_open(voc(tmp_path, {"a": CAT, "b": f"<annotation>{SIZE}</annotation>"}, ["b"], split="val"), "val")
    assert (only.num_images, only.num_boxes) == (1, 0)
    assert only.categories == table.categories


# ---- difficult ------------------------------------------------------------------------------------------------------

DIFFICULT = {
    "0": False, "1": True, "0.0": False, "1.0": True, "False": False, "True": True, "false": False, "TRUE": True,
    "no": False, "Yes": True, "": False, " 0 ": False, "+1": True,
}  # fmt: skip


@pytest.mark.parametrize("text", DIFFICULT)
def test_every_way_to_write_yes_and_no_is_read(tmp_path, text):
    table = read_voc(voc(tmp_path, {"a": CAT.replace("<bndbox>", f"<difficult>{text}</difficult><bndbox>")}), "train")
    assert table.difficult.tolist() == [DIFFICULT[text]]
    assert table.notes == ()


@pytest.mark.parametrize("text", ["Unspecified", "maybe", "2", "-1", "nan", "0.5", "None"])
def test_a_difficult_that_is_neither_yes_nor_no_is_counted(tmp_path, text):
    odd = CAT.replace("<bndbox>", f"<difficult>{text}</difficult><bndbox>")
    root = voc(tmp_path, {"a": odd, "b": odd, "c": CAT})
    table = read_voc(root, "train")
    assert table.difficult.tolist() == [False] * 3
    assert table.notes == ("2 boxes whose <difficult> is neither yes nor no, taken as not difficult: a, b",)
    records, problems = voc_records(root, "train")
    assert [(problem.kind, problem.message) for problem in problems] == [
        ("unclear_difficult", f"object {number}: <difficult> {text!r} is taken as 0") for number in (1, 2)
    ]
    assert [record["difficult"] for record in records.annotations] == [0, 0, 0]


@pytest.mark.parametrize("field", ["truncated", "occluded", "pose", "segmented"])
def test_fields_that_are_not_used_may_hold_anything(tmp_path, field):
    text = CAT.replace("<bndbox>", f"<{field}>Unspecified<b/></{field}><bndbox>")
    assert read_voc(voc(tmp_path, {"a": text}), "train").boxes_xywh.tolist() == CAT_BOX


# ---- Hidden files ---------------------------------------------------------------------------------------------------


def test_hidden_files_are_no_annotations_images_or_lists(tmp_path):
    root = voc(tmp_path, {"a": CAT, "b": CAT})
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main", "."):
        for name in ("._a.xml", "._a.jpg", "._train.txt", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (root / folder / name).write_bytes(b"\0\5\x16\7")
        (root / folder / "__MACOSX").mkdir()
        (root / folder / "__MACOSX" / "a.xml").write_bytes(b"\0")
    table = read_and_open(root)
    assert table.file_names.tolist() == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert [category.name for category in table.categories][7] == "cat"
    assert voc_records(root, "train")[1] == []
    with pytest.raises(DataError, match=r"test\.txt: no such split; .*Main has train$"):
        read_voc(root, "test")


# ---- Names in another Unicode form ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_disk", "in_list"), [(nfd, nfc), (nfc, nfd)])
def test_a_list_in_another_unicode_form_is_read(tmp_path, on_disk, in_list):
    root = voc(tmp_path, {on_disk("größe"): CAT, "b": CAT}, [in_list("größe"), "b"], split=on_disk("für"))
    table = read_and_open(root, in_list("für"))
    assert table.file_names.tolist() == [f"JPEGImages/{on_disk('größe')}.jpg", "JPEGImages/b.jpg"]


def test_annotation_and_image_may_be_in_different_forms(tmp_path):
    root = voc(tmp_path, {nfd("größe"): CAT}, [nfd("größe")])
    (root / "JPEGImages" / f"{nfd('größe')}.jpg").rename(root / "JPEGImages" / f"{nfc('größe')}.jpg")
    assert read_and_open(root).file_names.tolist() == [f"JPEGImages/{nfc('größe')}.jpg"]


def test_one_image_listed_in_both_forms_is_listed_twice(tmp_path):
    root = voc(tmp_path, {nfd("ä"): CAT}, [nfd("ä"), nfc("ä")])
    with pytest.raises(DataError, match=r"is listed twice, in train and train$"):
        read_voc(root, "train")


def test_class_names_in_both_forms_are_one_class(tmp_path):
    table = read_voc(voc(tmp_path, {"a": CAT.replace("cat", nfd("Bär")), "b": CAT.replace("cat", nfc("Bär"))}), "train")
    assert [category.name for category in table.categories] == [nfc("Bär")]
    assert read_voc(tmp_path, "train", classes=[nfd("Bär")]).num_boxes == 2


# ---- Where files lie ------------------------------------------------------------------------------------------------


def test_lists_may_name_subfolders(tmp_path):
    table = read_and_open(
        voc(tmp_path, {"day/a": CAT, "night/a": CAT, "b": CAT.replace("cat", "owl")}, ["day/a", "night/a  1"])
    )
    assert table.file_names.tolist() == ["JPEGImages/day/a.jpg", "JPEGImages/night/a.jpg"]
    assert [category.name for category in table.categories] == ["cat", "owl"]


def test_annotations_in_subfolders_that_no_list_names_add_no_classes(tmp_path):
    root = voc(tmp_path, {"a": CAT, "old/b": CAT.replace("cat", "owl")}, ["a"])
    assert "owl" not in [category.name for category in read_and_open(root).categories]


@pytest.mark.parametrize(("suffix", "image_suffix"), [(".XML", ".JPG"), (".Xml", ".PNG")])
def test_suffixes_in_capitals_are_found(tmp_path, suffix, image_suffix):
    table = read_and_open(voc(tmp_path, {"a": CAT}, suffix=suffix, image_suffix=image_suffix))
    assert table.file_names.tolist() == [f"JPEGImages/a{image_suffix}"]


@pytest.mark.parametrize(
    ("stem", "line", "hint"),
    [
        ("IMG_1", "img_1", "; did you mean IMG_1.xml (upper and lower case differ)?"),
        ("sub/a", "a", "; it lies in a subfolder: list it as sub/a"),
        ("a", "a.jpg", "; lists give names without folder and suffix, one a line"),
        ("a", "JPEGImages/a.jpg Annotations/a.xml", "; lists give names without folder and suffix, one a line"),
        ("a", "sub\\a", "; lists give names without folder and suffix, one a line"),
        ("sub/a", "sub\\a", r"; did you mean sub/a.xml (folders must be separated by /, not by \)?"),
    ],
)
def test_the_annotation_that_was_perhaps_meant_is_named(tmp_path, stem, line, hint):
    root = voc(tmp_path, {stem: CAT}, [line])
    with pytest.raises(DataError) as caught:
        read_voc(root, "train")
    assert str(caught.value).endswith(f"but train lists it{hint.format(root=root)}")


def test_folders_in_another_case_are_named(tmp_path):
    (tmp_path / "annotations").mkdir()
    with pytest.raises(DataError, match=r"Annotations: no such folder\. did you mean annotations \(upper and lower"):
        read_voc(tmp_path, "train")


@pytest.mark.parametrize(
    "split", ["x" * 5000, "x" * 5000 + "/train", "train/" + "x" * 300, "a\0b", "a\0/train", "/", ""]
)
def test_a_split_that_no_file_can_have_is_refused(tmp_path, split):
    voc(tmp_path, {"a": CAT})
    for read in (read_voc, voc_records):
        with pytest.raises(DataError, match=r"no such (split|folder)") as caught:
            read(tmp_path, split)
        assert len(str(caught.value)) < 1500
        assert "\n" not in str(caught.value)


# ---- Folders without lists -------------------------------------------------------------------------------------------


def loose(root, *places):
    """Write annotations and images by ``(annotation, image)``, without lists of images."""
    for annotation, image in places:
        for path in (root / annotation, root / image):
            path.parent.mkdir(parents=True, exist_ok=True)
        (root / annotation).write_text(CAT, encoding="utf-8")
        Image.new("RGB", (60, 40)).save(root / image)
    return root


@pytest.mark.parametrize(
    ("tool", "annotation", "image"),
    [
        ("Roboflow", "train/a.xml", "train/a.jpg"),
        ("labelImg", "a.xml", "a.png"),
        ("Label Studio", "Annotations/a.xml", "images/a.jpg"),
        ("lower case", "annotations/sub/a.xml", "images/sub/a.jpg"),
        ("VOC without ImageSets", "Annotations/a.xml", "JPEGImages/a.jpg"),
    ],
)
def test_a_folder_without_lists_is_read(tmp_path, tool, annotation, image):
    table = read_and_open(loose(tmp_path, (annotation, image)), None)
    assert table.file_names.tolist() == [image], tool
    assert table.boxes_xywh.tolist() == CAT_BOX
    split = voc_split("train", tmp_path, None)
    report = check_dataset([split])
    assert not report.wrong
    assert "unlisted_file" not in {finding.kind for finding in report.findings}
    assert {tmp_path / annotation, tmp_path / image} <= set(split.input_files())


def test_subfolders_of_a_folder_without_lists_are_splits(tmp_path):
    loose(tmp_path, ("train/a.xml", "train/a.jpg"), ("valid/b.xml", "valid/b.jpg"))
    other = CAT.replace("cat", "owl")
    (tmp_path / "valid" / "b.xml").write_text(other, encoding="utf-8")
    for split, image in (("train", "train/a.jpg"), ("valid", "valid/b.jpg"), ("val", "valid/b.jpg")):
        table = read_and_open(tmp_path, split)
        assert table.file_names.tolist() == [image]
        assert [category.name for category in table.categories] == ["cat", "owl"]
    assert read_and_open(tmp_path, ["train", "valid"]).num_images == 2
    with pytest.raises(DataError, match=r"Annotations: no such folder"):
        read_voc(tmp_path, "test")


def test_a_missing_image_of_a_folder_without_lists_is_named(tmp_path):
    loose(tmp_path, ("a.xml", "b.jpg"))
    with pytest.raises(DataError, match=r"1 of the 1 images of .* are missing: a\.jpg"):
        read_and_open(tmp_path, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: voc(root, {"a": CAT}), "has lists of images in ImageSets/Main: split must name one or several"),
        (lambda root: voc(root / "VOC2007", {"a": CAT}), "has no split; below it lie VOC2007: name the split as"),
        (lambda root: None, "no annotations (*.xml) in this folder; a folder in VOC's layout holds Annotations/*.xml"),
    ],
)  # fmt: skip
def test_null_takes_no_folder_with_lists_and_none_without_annotations(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError) as caught:
        read_voc(tmp_path, None)
    assert message in str(caught.value)


def test_a_split_of_a_folder_without_lists_says_that_null_takes_it(tmp_path):
    loose(tmp_path, ("Annotations/a.xml", "JPEGImages/a.jpg"))
    with pytest.raises(DataError, match="Without lists of images, split: null takes every annotation of the folder"):
        read_voc(tmp_path, "train")


# ---- The order of classes --------------------------------------------------------------------------------------------


def test_labelmap_gives_the_order_of_the_classes(tmp_path):
    """CVAT and datumaro write all labels of a task, with a background that is no class."""
    root = voc(tmp_path, {"a": CAT, "b": CAT.replace("cat", "extra")})
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", "owl:1,2,3::", "cat:4,5,6:head,tail:sit", ""]
    (root / "labelmap.txt").write_text("\n".join(lines), encoding="utf-8")
    assert [category.name for category in read_voc(root, "train").categories] == ["owl", "cat", "extra"]
    (root / "Annotations" / "b.xml").write_text(CAT.replace("cat", "background"), encoding="utf-8")
    assert [category.name for category in read_voc(root, "train").categories] == ["background", "owl", "cat"]
    (root / "labelmap.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"labelmap\.txt: cannot be read as text"):
        read_voc(root, "train")
