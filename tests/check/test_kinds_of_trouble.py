"""What `check` says to kinds of trouble that real datasets have: each is a finding, which says what to do."""

import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resdet.build import anchor_layout, annotation_files, build_dataset, build_split
from resdet.check.check import check_dataset
from resdet.check.kinds import KINDS
from resdet.check.limits import DetectorLimits
from resdet.check.repair import repaired, write_fixed
from resdet.check.report import report_text
from resdet.check.splits import coco_split, voc_split
from resdet.commands.check import main
from resdet.config import ModelConfig, load_config
from resdet.data.coco import read_coco
from resdet.data.image_files import check_files
from resdet.data.voc import read_voc
from resdet.errors import DataError, UserError

LIMITS = DetectorLimits(num_detections=3, detections_key="eval.max_detections", num_proposals=5, proposals_key="rpn.n")
ESCAPES = "\x1b]0;owned\x07"


def coco(boxes=((2, 3, 20, 15), (5, 5, 30, 20)), *, num_images=4, size=(64, 48), **changes):
    """Images with the same boxes each, of the classes 1 and 2 in turn; ``changes`` are keys of every annotation."""
    images = [{"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(1, num_images + 1)]
    annotations = [
        {"image_id": image["id"], "category_id": number % 2 + 1, "bbox": list(box), "area": box[2] * box[3]} | changes
        for image in images
        for number, box in enumerate(boxes)
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def write(folder, data, name="train"):
    """Write an annotation file and pictures unlike each other."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for record in data["images"]:
        pixels = np.random.default_rng([record["id"], len(name)]).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((record["width"], record["height"]), Image.Resampling.BICUBIC)
        picture.save(folder / name / record["file_name"])
    (folder / f"{name}.json").write_text(json.dumps(data))
    return coco_split(name, folder / name, folder / f"{name}.json")


def found(*splits, **options):
    """The messages of each finding, by split and kind."""
    report = check_dataset(splits, decode=False, **options)
    assert all(finding.kind in KINDS for finding in report.findings)
    return {(f.split, f.kind): [problem.message for problem in f.problems] for f in report.findings}


# ---- images that are too long, or hold too much ----


def test_strips_are_found(tmp_path):
    data = coco(num_images=3)
    data["images"][1] |= {"width": 3000, "height": 2}
    data["images"][2] |= {"width": 2, "height": 320}  # exactly one pixel is left
    layout = anchor_layout(ModelConfig(min_size=96, max_size=160))
    findings = found(write(tmp_path, data), anchors=layout)
    message = "image 2 (2.png): 3000x2 px, of which 0.11 px are left at a long side of 160 px"
    assert findings["train", "strip"] == [message]


def test_images_with_more_objects_than_a_detector_returns_are_found(tmp_path):
    data = coco(boxes=[(i, i, 10, 10) for i in range(6)], num_images=2)
    for annotation in data["annotations"][6:8]:
        annotation["iscrowd"] = 1
    split = write(tmp_path, data)
    findings = found(split, limits=LIMITS)
    assert findings["train", "more_objects_than_detections"] == [
        "image 1 (1.png): 6 objects, but 3 detections are kept per image (eval.max_detections)",
        "image 2 (2.png): 4 objects, but 3 detections are kept per image (eval.max_detections)",
    ]
    assert findings["train", "more_objects_than_proposals"] == [
        "image 1 (1.png): 6 objects, but 5 proposals are judged per image (rpn.n)"
    ]
    assert found(split) == {}


# ---- crowds ----


@pytest.mark.parametrize(("num_crowds", "kind"), [(8, "nothing_to_train_on"), (4, "many_crowds"), (2, None)])
def test_crowds_are_said_not_to_be_trained_on(tmp_path, num_crowds, kind):
    data = coco()
    for annotation in data["annotations"][:num_crowds]:
        annotation["iscrowd"] = 1
    split = write(tmp_path, data)
    messages = found(split)
    assert set(messages) == ({("train", kind)} if kind else set())
    if kind == "many_crowds":
        assert messages["train", kind] == ["4 of 8 objects have iscrowd 1 (50%)"]
        assert "not trained on" in KINDS[kind].meaning
    if kind == "nothing_to_train_on":
        assert messages["train", kind][0].startswith("all of its 8 objects are crowd regions (iscrowd 1), which are")
    # Whether an object is a crowd is for its annotator to say.
    document, changes = repaired(split, check_dataset([split], decode=False))
    assert (document, changes) == (data, [])


def test_crowds_alone_are_a_finding_in_validation_data_too(tmp_path):
    for data, what in (
        (coco(iscrowd=1), "all of its 8 objects are crowd regions (iscrowd 1)"),
        (coco([]), "it has no boxes"),
    ):
        findings = found(write(tmp_path / what[:2], coco()), write(tmp_path / what[:2], data, "val"))
        message = f"{what}: every AP is undefined, and shown as -1"
        assert findings["val", "nothing_to_evaluate_on"] == [message]


def test_objects_that_are_all_difficult(tmp_path):
    folder = voc(tmp_path, difficult=1)
    messages = found(voc_split("train", folder, "train"))["train", "nothing_to_train_on"]
    assert messages == ["all boxes that can be trained on, of 1, are difficult; use_difficult: true uses them"]
    assert found(voc_split("train", folder, "train", use_difficult=True)) == {}


# ---- names of classes ----


@pytest.mark.parametrize(
    ("names", "similar"),
    [
        (("Cat", "cat "), ["'Cat' and 'cat '"]),
        (("CAT", "cat"), ["'CAT' and 'cat'"]),
        (("traffic light", "Traffic_Light"), ["'traffic light' and 'Traffic_Light'"]),
        (("Stra\u00dfe", "STRASSE"), ["'Stra\u00dfe' and 'STRASSE'"]),
        (("gro\u0308\u00dfe", "gr\u00f6\u00dfe"), ["'gro\u0308\u00dfe' and 'gr\u00f6\u00dfe'"]),
        (("1-1", "11"), None),
        (("cat", "cats"), None),
        (("-", "_"), None),
    ],
)
def test_class_names_that_differ_in_writing_alone(tmp_path, names, similar):
    one = coco()
    for category, name in zip(one["categories"], names, strict=True):
        category["name"] = name
    assert found(write(tmp_path / "one", one)).get(("train", "similar_class_names")) == similar

    train, val = coco(), coco()
    train["categories"][0]["name"], val["categories"][0]["name"] = names
    findings = found(write(tmp_path / "two", train), write(tmp_path / "two", val, "val"))
    # In different files, names that differ in Unicode's form alone are one class.
    two = similar and unicodedata.normalize("NFC", names[0]) != unicodedata.normalize("NFC", names[1])
    expected = [f"{names[0]!r} of train and {names[1]!r} of val"] if two else None
    assert findings.get(("train and val", "similar_class_names")) == expected


# ---- areas ----


@pytest.mark.parametrize(
    ("area", "said"),
    [
        (lambda w, h: 4 * w * h, "8 of 8 areas exceed their box's"),
        (lambda w, h: 0, "8 are less than a hundredth of it"),
        (lambda w, h: -w * h, "8 are less than a hundredth of it"),
        (lambda w, h: w * h / (64 * 48), "8 are less than a hundredth of it"),
        (lambda w, h: 1, "8 are less than a hundredth of it"),
        (lambda w, h: round(w * h / 4), "8 of 8 areas are their box's times one factor per image, 0.25"),
        (lambda w, h: w * h, None),
        (lambda w, h: (w + 1) * (h + 1), None),
        (lambda w, h: w * h * 0.5 + w, None),  # masks
    ],
)
def test_areas_that_contradict_the_boxes_everywhere(tmp_path, area, said):
    data = coco()
    for annotation in data["annotations"]:
        annotation["area"] = area(*annotation["bbox"][2:])
    split = write(tmp_path, data)
    messages = found(split).get(("train", "areas_contradict_boxes"), [])
    assert len(messages) == (0 if said is None else 1)
    assert said is None or said in messages[0]
    changes = write_fixed(split, check_dataset([split], decode=False), tmp_path / "fixed.json")
    fixed = coco_split("train", tmp_path / "train", tmp_path / "fixed.json")
    assert ("train", "areas_contradict_boxes") not in found(fixed)
    assert changes == ([] if said is None else ["areas of 8 annotations removed: width * height counts"])


def test_one_odd_area_is_no_finding_and_ellipses_are_masks(tmp_path):
    data = coco()
    data["annotations"][0]["area"] = 10_000
    assert found(write(tmp_path / "one", data)) == {}
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[1, 2, 3, 4, 5, 6]]
        annotation["area"] = 0.785 * annotation["bbox"][2] * annotation["bbox"][3]
    assert found(write(tmp_path / "masks", data)) == {}


# ---- numbers written as texts ----


@pytest.mark.parametrize(
    ("text", "number"),
    [("12", 12), ("12.5", 12.5), (" 3 ", 3), ("1.2e1", 12.0), ("+7", 7), (".5", 0.5), ("8.0", 8.0)],
)
def test_numbers_written_as_texts_are_mended_in_every_place(tmp_path, text, number):
    sound = coco(boxes=[(2, 3, number, 20)], num_images=1, area=number, iscrowd=0)
    data = json.loads(json.dumps(sound))
    (annotation,) = data["annotations"]
    annotation |= {"bbox": ["2", 3, text, "20 "], "area": text, "iscrowd": "0", "category_id": " 1 ", "image_id": "1"}
    data["images"][0] |= {"id": "1", "width": "64", "height": " 48"}
    data["categories"][0]["id"] = "1"
    write(tmp_path, sound)
    (tmp_path / "train.json").write_text(json.dumps(data))
    split = coco_split("train", tmp_path / "train", tmp_path / "train.json")
    changes = write_fixed(split, check_dataset([split], decode=False), tmp_path / "fixed.json")
    assert json.loads((tmp_path / "fixed.json").read_text()) == sound
    assert f"annotations[0]: bbox ['2', 3, {text!r}, '20 '] -> [2, 3, {number}, 20]" in changes
    assert read_coco(tmp_path / "fixed.json").boxes_xywh.tolist() == [[2, 3, number, 20]]


@pytest.mark.parametrize("text", ["2, 3, 20, 15", "[2 3 20 15]", "(2;3;20;15)", " 2\t3 20,15 "])
def test_a_box_written_as_one_text_is_mended(tmp_path, text):
    data = coco(num_images=1)
    data["annotations"][0]["bbox"] = text
    split = write(tmp_path, data)
    document, _ = repaired(split, check_dataset([split], decode=False))
    assert document["annotations"][0]["bbox"] == [2, 3, 20, 15]


@pytest.mark.parametrize("text", ["twelve", "nan", "inf", "1e999", "1_0", "", "12,5", "0x10", "\u0663", "9" * 5000])
def test_texts_that_are_no_finite_numbers_are_dropped_and_listed(tmp_path, text):
    data = coco(num_images=2)
    data["annotations"][0]["bbox"][2] = text
    split = write(tmp_path, data)
    document, changes = repaired(split, check_dataset([split], decode=False))
    assert [record["id"] for record in document["annotations"]] == [2, 3, 4]
    (change,) = changes
    assert change.startswith("annotation 1: dropped: its bbox [2, 3, ")
    assert len(change) < 200


# ---- names of files ----


@pytest.mark.parametrize(
    ("name", "on_disk", "meant"),
    [
        ("a.JPG", "a.jpg", "a.jpg (upper and lower case differ)"),
        ("Sub/a.jpg", "sub/a.jpg", "sub/a.jpg (upper and lower case differ)"),
        ("a.jpeg", "a.jpg", "a.jpg (another suffix)"),
        ("a.jpg.jpg", "a.jpg", "a.jpg (another suffix)"),
        ("a.jpg", "a.jpg.jpg", "a.jpg.jpg (another suffix)"),
        ("sub\\a.jpg", "sub/a.jpg", "sub/a.jpg (folders must be separated by /, not by \\)"),
        ("images/a.jpg", "a.jpg", "a.jpg (without images/ before it)"),
        ("C:\\data\\a.jpg", "a.jpg", "a.jpg (without data/ before it)"),
        ("/data/a.jpg", "a.jpg", "a.jpg (without data/ before it)"),
        ("z.jpg", "a.jpg", None),
    ],
)
def test_a_missing_file_comes_with_the_one_that_was_perhaps_meant(tmp_path, name, on_disk, meant):
    data = coco(num_images=1)
    write(tmp_path, data)
    (tmp_path / "train" / on_disk).parent.mkdir(exist_ok=True)
    (tmp_path / "train" / "1.png").rename(tmp_path / "train" / on_disk)
    data["images"][0]["file_name"] = name
    (tmp_path / "train.json").write_text(json.dumps(data))
    split = coco_split("train", tmp_path / "train", tmp_path / "train.json")
    findings = found(split)
    (message,) = findings.get(("train", "missing_file"), []) + findings.get(("train", "bad_file_name"), [])
    assert message.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in message
    report = check_dataset([split], decode=False)
    if meant is None:
        with pytest.raises(UserError, match="no image would be left"):
            repaired(split, report)
        return
    document, changes = repaired(split, report)
    assert changes == [f"image 1 ({name}): file_name -> {meant}"]
    assert document["images"][0]["file_name"] == on_disk
    # Another size: another picture.
    picture = Image.new("RGB", (63, 48))
    picture.save(tmp_path / "train" / on_disk)
    with pytest.raises(UserError, match="no image would be left"):
        repaired(split, report)


@pytest.mark.parametrize(
    ("name", "on_disk", "renamed"),
    [
        ("gr\u00f6\u00dfe.png", "gro\u0308\u00dfe.png", None),
        ("A.PNG", "a.png", "a.png (upper and lower case differ)"),
        ("sub\\a.png", "sub/a.png", "sub/a.png (folders must be separated by /, not by \\)"),
        ("/data/a.png", "a.png", "a.png (without data/ before it)"),
    ],
)
def test_a_missing_size_is_that_of_the_file_that_is_found(tmp_path, name, on_disk, renamed):
    data = coco(num_images=2)
    write(tmp_path, data)
    (tmp_path / "train" / on_disk).parent.mkdir(exist_ok=True)
    (tmp_path / "train" / "1.png").rename(tmp_path / "train" / on_disk)
    data["images"][0] = {"id": 1, "file_name": name}
    (tmp_path / "train.json").write_text(json.dumps(data))
    split = coco_split("train", tmp_path / "train", tmp_path / "train.json")
    document, changes = repaired(split, check_dataset([split], decode=False))
    expected = [f"image 1 ({name}): file_name -> {renamed}"] if renamed else []
    assert changes == [*expected, f"image 1 ({name}): height and width -> 48 and 64, from the file"]
    file_name = on_disk if renamed else name
    assert document["images"][0] == {"id": 1, "file_name": file_name, "height": 48, "width": 64}
    assert len(document["annotations"]) == 4


@pytest.mark.parametrize(("name", "on_disk"), [("gr\u00f6\u00dfe.png", "gro\u0308\u00dfe.png")] * 1)
def test_a_name_in_another_unicode_form_is_an_info(tmp_path, name, on_disk):
    data = coco(num_images=1)
    write(tmp_path, data)
    (tmp_path / "train" / "1.png").rename(tmp_path / "train" / on_disk)
    data["images"][0]["file_name"] = name
    (tmp_path / "train.json").write_text(json.dumps(data))
    split = coco_split("train", tmp_path / "train", tmp_path / "train.json")
    what = f"image 1 ({name}): the annotations have {name!a}, the disk {on_disk!a}"
    assert found(split) == {("train", "other_unicode_form"): [what]}
    assert KINDS["other_unicode_form"].severity == "info"


@pytest.mark.parametrize(("wrong", "right"), [("Train", "train"), ("TRAIN.json", "train.json")])
def test_a_configured_path_that_differs_in_case(tmp_path, wrong, right):
    write(tmp_path, coco())
    paths = {"images": tmp_path / "train", "annotations": tmp_path / "train.json"}
    paths["annotations" if wrong.endswith("json") else "images"] = tmp_path / wrong
    message = re.escape(f"; did you mean {tmp_path / right}?")
    with pytest.raises(DataError, match=message):
        coco_split("train", paths["images"], paths["annotations"])
    if wrong.endswith("json"):
        with pytest.raises(DataError, match=message):
            read_coco(paths["annotations"])
    else:
        with pytest.raises(DataError, match=message):
            check_files(paths["images"], read_coco(paths["annotations"]))


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("format_", ["coco", "voc"])
def test_configured_paths_in_another_unicode_form_are_taken(tmp_path, format_, written, stored):
    folder = tmp_path / unicodedata.normalize(stored, "Größen") / unicodedata.normalize(stored, "Bär")
    folder.mkdir(parents=True)
    if format_ == "coco":
        write(folder, coco(), unicodedata.normalize(stored, "ü"))
        (source,) = ({"format": "coco", "images": folder / "ü", "annotations": folder / "ü.json"},)
    else:
        source = {"format": "voc", "root": voc(folder), "split": "train"}
    source = {key: unicodedata.normalize(written, str(value)) for key, value in source.items()}
    config = load_config(recipe(tmp_path, train=source, val=source))
    assert build_dataset(config.data.train, training=True)[0][0].shape == (3, 48, 64)
    report = check_dataset([build_split(config.data.train, "train")])
    assert {finding.kind for finding in report.findings} <= {"unused_category", "image_without_boxes"}
    assert all(path.is_file() for path in annotation_files(config))


def test_file_names_that_come_from_urls_are_an_info(tmp_path):
    data = coco(num_images=3)
    write(tmp_path, data)
    for record in data["images"][:2]:
        record["coco_url"] = f"http://images.cocodataset.org/train/{record.pop('file_name')}"
    (tmp_path / "train.json").write_text(json.dumps(data))
    split = coco_split("train", tmp_path, tmp_path / "train.json")
    assert found(split)["train", "file_name_from_url"] == ["2 of 3 images have no file_name, but a coco_url"]
    assert found(split)["train", "missing_file"] == [
        "image 3 (3.png): no such file in the image folder; did you mean train/3.png (then the image folder is "
        f"{tmp_path / 'train'})?"
    ]


def test_a_voc_file_in_another_unicode_form_is_an_info(tmp_path):
    folder, composed, decomposed = voc(tmp_path), "gr\u00f6\u00dfe", "gro\u0308\u00dfe"
    (folder / "Annotations" / "a.xml").rename(folder / "Annotations" / f"{decomposed}.xml")
    (folder / "JPEGImages" / "a.jpg").rename(folder / "JPEGImages" / f"{composed}.jpg")
    (folder / "ImageSets" / "Main" / "train.txt").write_text(f"{composed}\n", encoding="utf-8")
    split = voc_split("train", folder, "train")
    what = f"train lists {composed!a}, the disk has {decomposed!a}"
    assert found(split) == {("train", "other_unicode_form"): [what]}
    assert str(folder / "Annotations" / f"{decomposed}.xml") in report_text(check_dataset([split], decode=False))
    assert read_voc(folder, "train").num_boxes == 1


@pytest.mark.parametrize("part", ["Annotations", "JPEGImages"])
def test_voc_files_that_differ_in_unicode_form_alone_are_a_finding(tmp_path, part):
    folder = voc(tmp_path)
    composed, decomposed = "\u00e4", "a\u0308"
    names = [composed + decomposed, decomposed + composed]
    for place, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        content = (folder / place / f"a{suffix}").read_bytes()
        for name in names if place == part else [composed * 2]:
            (folder / place / f"{name}{suffix}").write_bytes(content)
    (folder / "ImageSets" / "Main" / "train.txt").write_text(f"a\n{composed * 2}\n", encoding="utf-8")
    findings = found(voc_split("train", folder, "train"))
    suffix = ".xml" if part == "Annotations" else ".jpg"
    several = ", ".join(sorted(ascii(name + suffix) for name in names))
    message = f"{folder / part}: several names look like {composed * 2}: {several}; rename all but one"
    assert findings["train", "bad_annotation_file"] == [message]
    with pytest.raises(DataError, match=re.escape(message)):
        read_voc(folder, "train")


# ---- every finding names its file, and every refusal what mends it ----


def voc(folder, *, difficult=0, name="a"):
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(folder / "JPEGImages" / "a.jpg")
    (folder / "Annotations" / "a.xml").write_text(
        f"<annotation><size><width>64</width><height>48</height></size><object><name>{name}</name><difficult>{difficult}"
        "</difficult><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>"
    )
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    return folder


def test_every_finding_names_its_file(tmp_path):
    folder = voc(tmp_path / "voc")
    (folder / "Annotations" / "b.xml").write_text("<annotation>")
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\na\n")
    (folder / "JPEGImages" / "a.jpg").write_bytes(b"")
    data = coco(num_images=2)
    data["annotations"][0]["bbox"] = ["x"]
    val = write(tmp_path, data, "val")
    (tmp_path / "val" / "2.png").unlink()
    report = check_dataset([voc_split("train", folder, "train"), val])
    text = report_text(report, num_examples=100)
    for path in ("Annotations/b.xml", "Annotations/c.xml", "JPEGImages/a.jpg"):
        assert f"          {folder / path}: " in text
    assert f"          {tmp_path / 'val' / '2.png'}: image 2 (2.png): no such file" in text
    assert text.startswith(f"train: {folder} (train): ")
    assert f"\nval: {tmp_path / 'val.json'}: " in text
    for finding in report.to_plain()["findings"]:
        if "and" not in finding["split"]:
            assert all(problem["file"] for problem in finding["problems"]), finding


def test_a_root_category_with_its_class_s_name_is_made_one_with_it(tmp_path):
    data = coco()
    data["categories"] = [{"id": 0, "name": "cat", "supercategory": "none"}, {"id": 1, "name": "cat"}]
    for annotation in data["annotations"]:
        annotation["category_id"] = 1
    split = write(tmp_path, data)
    with pytest.raises(UserError, match=r"same name 'cat'; `resdet check CONFIG --fix OUT.json` writes a mended"):
        read_coco(tmp_path / "train.json")
    report = check_dataset([split], decode=False)
    assert "--fix makes them one" in report_text(report)
    write_fixed(split, report, tmp_path / "fixed.json")
    table = read_coco(tmp_path / "fixed.json")
    assert [category.name for category in table.categories] == ["cat"]
    assert table.num_boxes == 8


# ---- the command: outputs, escapes, arguments ----


def recipe(folder: Path, **splits: dict) -> Path:
    train = splits.get("train") or {
        "format": "coco", "images": str(folder / "train"), "annotations": str(folder / "train.json")
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps(
            {"data": {"train": train, "val": splits.get("val", train)}, "train": {"steps": 2}, "output_dir": "run"}
        )
    )
    return path


@pytest.mark.parametrize("option", ["--json", "--fix", "--browse"])
@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_no_output_overwrites_an_input(tmp_path, option, kind):
    if kind == "coco":
        write(tmp_path, coco())
        config, inputs = recipe(tmp_path), ["recipe.yaml", "train.json", "train/3.png"]
    else:
        folder = voc(tmp_path / "voc")
        config = recipe(tmp_path, train={"format": "voc", "root": str(folder), "split": "train"})
        inputs = ["recipe.yaml", "voc/Annotations/a.xml", "voc/ImageSets/Main/train.txt", "voc/JPEGImages/a.jpg"]
    (tmp_path / "link").symlink_to(tmp_path / inputs[1])
    for name in [*inputs, "link"]:
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UserError, match="the output would overwrite an input of this command"):
            main([str(config), option, str(tmp_path / name), "--workers", "0"])
        assert (tmp_path / name).read_bytes() == before


def test_outputs_do_not_overwrite_each_other(tmp_path, capsys):
    write(tmp_path, coco())
    with pytest.raises(SystemExit) as left:
        main([str(recipe(tmp_path)), "--json", str(tmp_path / "out"), "--fix", f"{tmp_path}/./out", "--no-images"])
    assert left.value.code == 2
    assert "--json, --fix and --browse must name different files, got" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--fix", "--browse"])
@pytest.mark.parametrize(
    ("place", "message"),
    [("", "a folder has this name"), ("no/out", "its directory does not exist"), ("x" * 300, "File name too long")],
)
def test_an_output_that_cannot_be_is_told_before_the_work(tmp_path, monkeypatch, option, place, message):
    write(tmp_path, coco())
    monkeypatch.setattr("resdet.check.check.check_dataset", None)  # not reached
    with pytest.raises(UserError, match=message):
        main([str(recipe(tmp_path)), option, str(tmp_path / place)])


def test_files_are_written_before_the_report_is_shown(tmp_path, monkeypatch):
    write(tmp_path, coco())

    def stopped(_text):
        raise BrokenPipeError

    monkeypatch.setattr("resdet.commands.check.show", stopped)
    outputs = [tmp_path / name for name in ("a.json", "b.json", "c.html")]
    with pytest.raises(BrokenPipeError):
        main([str(recipe(tmp_path)), *(word for pair in zip(("--json", "--fix", "--browse"), map(str, outputs), strict=True) for word in pair)])  # fmt: skip # noqa: E501
    assert all(path.stat().st_size for path in outputs)


def test_a_report_is_shown_though_the_copy_cannot_be_made(tmp_path, capsys):
    data = coco()
    for annotation in data["annotations"]:
        annotation["bbox"] = [20, 20, 50, 45]
    write(tmp_path, data)
    with pytest.raises(UserError, match="correct what writes the file"):
        main([str(recipe(tmp_path)), "--fix", str(tmp_path / "fixed.json"), "--no-images"])
    assert "boxes_are_corners" in capsys.readouterr().out


@pytest.mark.parametrize("format_", ["coco", "voc"])
def test_no_name_of_the_data_steers_the_terminal(tmp_path, capsys, format_):
    if format_ == "coco":
        data = coco()
        data["categories"][0]["name"] = f"cat{ESCAPES}"
        data["categories"].append({"id": 3, "name": f"unused{ESCAPES}"})
        data["annotations"][0]["bbox"] = [ESCAPES]
        write(tmp_path, data)
        config = recipe(tmp_path)
    else:
        folder = voc(tmp_path / "voc", name="cat\x9b31m")
        config = recipe(tmp_path, train={"format": "voc", "root": str(folder), "split": "train"})
    assert main([str(config), "--fix", str(tmp_path / "fixed.json"), "--workers", "0"]) in (0, 1)
    told = capsys.readouterr()
    assert not set("\x1b\x07\x9b") & set(told.out + told.err)


def test_overrides_may_stand_after_options(tmp_path):
    write(tmp_path, coco())
    config, other = recipe(tmp_path), tmp_path / "other.json"
    other.write_text(json.dumps(coco(num_images=3)))
    out = tmp_path / "out.json"
    main([str(config), "--no-images", "--json", str(out), f"data.train.annotations={other}", "--examples", "1"])
    assert [split["num_images"] for split in json.loads(out.read_text())["splits"]] == [3, 4]


@pytest.mark.parametrize("key", ["images", "annotations", "root", "split"])
def test_a_name_of_thousands_of_letters_is_one_line(tmp_path, key):
    voc(tmp_path / "voc")
    write(tmp_path, coco())
    place = {"format": "voc", "root": str(tmp_path / "voc"), "split": "train"} if key in ("root", "split") else None
    config = recipe(tmp_path, train=place) if place else recipe(tmp_path)
    with pytest.raises(DataError, match=r"no such (image folder|annotation file|folder|split)") as caught:
        main([str(config), f"data.train.{key}={'x' * 5000}"])
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    write(tmp_path, coco())
    with pytest.raises(UserError, match=r"cannot be written|this folder cannot be written to"):
        main([str(recipe(tmp_path)), "--json", "/dev/full/out.json", "--no-images"])


# ---- odd pictures on the page ----


def test_strips_and_two_thousand_boxes_are_on_the_page(tmp_path):
    data = coco(num_images=2)
    data["images"][0] |= {"width": 3000, "height": 2}
    boxes = [(i % 60, i // 60, 3, 3) for i in range(2000)]
    many = coco(boxes=boxes, num_images=1)["annotations"]
    data["annotations"] = [record | {"image_id": 2} for record in many]
    data["annotations"].append({"id": 5000, "image_id": 1, "category_id": 1, "bbox": [100, 0, 200, 2], "area": 400})
    write(tmp_path, data)
    page = tmp_path / "page.html"
    main([str(recipe(tmp_path)), "--browse", str(page), "--workers", "0", "augment=[]"])
    text = page.read_text()
    assert "3000 x 2" in text
    assert text.count("of 2000 boxes the 125 largest are shown") == 24
    assert text.count("Boxes trained on: 2000; stored: 2000") == 24
    assert text.count('class="box ') == 48 * 126
    assert page.stat().st_size < 8_000_000
