"""What the folder of a dataset is taken for, and what it is refused for; only names and jsons matter, not pixels."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from resdet.config import Config, folder_config, parse_config
from resdet.config_reading import config_to_plain
from resdet.data import folder as module
from resdet.data.folder import folder_sections
from resdet.errors import ConfigError, DataError

LOOKED_FOR = (
    "Looked for COCO's json (annotations/instances_*.json, train.json and val.json, _annotations.coco.json) with its "
    "images, YOLO's data.yaml or images and labels, and Pascal VOC's Annotations, JPEGImages and ImageSets/Main, or "
    ".xml files beside images."
)
YAML = "names: [cat, dog]\ntrain: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
XML = "<annotation><size/></annotation>"


def coco(*names, **more):
    images = [{"id": number, "file_name": name, "height": 4, "width": 4} for number, name in enumerate(names)]
    annotations = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 2, 2]}]
    return json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]} | more)


def lay(folder, files):
    """Write files, texts by their paths; a list of paths is one of empty files."""
    for name, text in files.items() if isinstance(files, dict) else dict.fromkeys(files, "").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, my, in the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    return Path("my")


def told(folder, caplog):
    """Return what is logged on a folder, and its sections."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="resdet"):
        sections = folder_sections(str(folder))
    return caplog.messages, sections


def coco_section(images, annotations):
    return {"format": "coco", "images": images, "annotations": annotations}


def voc_section(split, root="my"):
    return {"format": "voc", "root": root, "split": split}


def yolo_section(split, root="my"):
    return {"format": "yolo", "root": root, "split": split}


HELD_OUT = {"fraction": 0.2}
PARTS = (("images", ".jpg"), ("labels", ".txt"))
KIT = ("VOC2012/Annotations/a.xml", "VOC2012/JPEGImages/a.jpg")
SEVENTH = ("VOC2007/Annotations/a.xml", "VOC2007/JPEGImages/a.jpg")


def lists(kit, *names):
    return [f"{kit}ImageSets/Main/{name}.txt" for name in names]


CASES = {
    "COCO 2017": (
        {
            "annotations/instances_train2017.json": coco("a.jpg"),
            "annotations/instances_val2017.json": coco("b.jpg"),
            "annotations/captions_val2017.json": '{"images": [{"file_name": "b.jpg"}], "annotations":[{"caption":1}]}',
            "annotations/person_keypoints_train2017.json": coco("a.jpg"),
            "annotations/image_info_test2017.json": '{"images": [{"file_name": "c.jpg"}], "categories": []}',
            "annotations/panoptic_val2017.json": '{"images": [], "annotations": [{"segments_info": [{"bbox": 1}]}]}',
            "train2017/a.jpg": "",
            "val2017/b.jpg": "",
        },
        coco_section("my/train2017", "my/annotations/instances_train2017.json"),
        coco_section("my/val2017", "my/annotations/instances_val2017.json"),
        "COCO (annotations/instances_train2017.json, annotations/instances_val2017.json)",
        [
            "  not used: annotations/captions_val2017.json is COCO's captions, annotations/image_info_test2017.json is "
            "a list of images without boxes, annotations/panoptic_val2017.json is of COCO's panoptic format, "
            "annotations/person_keypoints_train2017.json is not for detection, by its name or content"
        ],
    ),
    "one folder of images, three jsons": (
        {
            "train.json": coco("a.jpg"),
            "val.json": coco("b.jpg"),
            "test.json": coco("b.jpg"),
            **dict.fromkeys(("images/a.jpg", "images/b.jpg"), ""),
        },
        coco_section("my/images", "my/train.json"),
        coco_section("my/images", "my/val.json"),
        "COCO (train.json, val.json)",
        ["  not used: test.json"],
    ),
    "one json and images beside it": (
        {"labels.json": coco("a.jpg"), "a.jpg": ""},
        coco_section("my", "my/labels.json"),
        HELD_OUT,
        "COCO (labels.json)",
        ["  nothing is named val or test: data.val.fraction of the images are held out of training"],
    ),
    "Label Studio's COCO, below the folder of an archive": (
        {
            "project-1/result.json": coco("images/a.jpg"),
            "project-1/images/a.jpg": "",
            "__MACOSX/._x": "",
            ".DS_Store": "",
        },
        coco_section("my/project-1", "my/project-1/result.json"),
        HELD_OUT,
        "COCO (project-1/result.json)",
        ["  nothing is named val or test: data.val.fraction of the images are held out of training"],
    ),
    "CVAT's COCO": (
        {"annotations/instances_default.json": coco("a.jpg"), "images/default/a.jpg": ""},
        coco_section("my/images/default", "my/annotations/instances_default.json"),
        HELD_OUT,
        "COCO (annotations/instances_default.json)",
        ["  nothing is named val or test: data.val.fraction of the images are held out of training"],
    ),
    "Roboflow's COCO": (
        {
            f"{split}/{name}": text
            for split in ("train", "valid", "test")
            for name, text in (("_annotations.coco.json", coco("1.jpg")), ("1.jpg", ""))
        },
        coco_section("my/train", "my/train/_annotations.coco.json"),
        coco_section("my/valid", "my/valid/_annotations.coco.json"),
        "Roboflow's COCO export (train/_annotations.coco.json, valid/_annotations.coco.json)",
        ["  not used: test/_annotations.coco.json"],
    ),
    "upper case, and a test for want of a val": (
        {
            "Annotations/Train.json": coco("1.jpg"),
            "Annotations/Testing.json": coco("1.jpg"),
            "Images/Train/1.jpg": "",
            "Images/Testing/1.jpg": "",
        },
        coco_section("my/Images/Train", "my/Annotations/Train.json"),
        coco_section("my/Images/Testing", "my/Annotations/Testing.json"),
        "COCO (Annotations/Train.json, Annotations/Testing.json)",
        ["  test is taken for val, as nothing is named val"],
    ),
    "LVIS": (
        {
            "lvis_v1_train.json": '{"annotations": [{"bbox": [1, 2, 3, 4]}], "images": '
            '[{"coco_url": "http://images.cocodataset.org/train2017/a.jpg"}]}',
            "train2017/a.jpg": "",
        },
        coco_section("my", "my/lvis_v1_train.json"),
        HELD_OUT,
        "COCO (lvis_v1_train.json)",
        ["  nothing is named val or test: data.val.fraction of the images are held out of training"],
    ),
    "a single year of VOC": (
        [*KIT, *lists("VOC2012/", "train", "val", "trainval", "aeroplane_train")],
        voc_section("VOC2012/train"),
        voc_section("VOC2012/val"),
        "Pascal VOC (VOC2012/ImageSets/Main/train.txt, VOC2012/ImageSets/Main/val.txt)",
        [],
    ),
    "VOC 2007 and 2012 without 2007's train and val": (
        [*KIT, *SEVENTH, *lists("VOC2012/", "train", "val", "trainval"), *lists("VOC2007/", "trainval", "test")],
        voc_section(["VOC2007/trainval", "VOC2012/trainval"]),
        voc_section("VOC2007/test"),
        "Pascal VOC (VOC2007/ImageSets/Main/trainval.txt + VOC2012/ImageSets/Main/trainval.txt, "
        "VOC2007/ImageSets/Main/test.txt)",
        ["  test is taken for val, as nothing is named val"],
    ),
    "CVAT's VOC": (
        ["Annotations/a.xml", "JPEGImages/a.jpg", "ImageSets/Main/default.txt", "labelmap.txt"],
        voc_section("default"),
        HELD_OUT,
        "Pascal VOC (ImageSets/Main/default.txt)",
        ["  nothing is named val or test: data.val.fraction of the images are held out of training"],
    ),
    "Roboflow's VOC": (
        {"train/a.xml": XML, "train/a.jpg": "", "valid/b.xml": XML, "valid/b.jpg": "", "README.txt": ""},
        voc_section("train"),
        voc_section("valid"),
        "Pascal VOC (train/*.xml, valid/*.xml)",
        [],
    ),
    "labelImg's VOC": (
        {"a.xml": XML, "a.jpg": "", "classes.txt": "cat"},
        voc_section(None),
        HELD_OUT,
        "Pascal VOC (./*.xml)",
        ["  nothing is named val or test: data.val.fraction of the images are held out of training"],
    ),
    "Roboflow's YOLO": (
        {
            "data.yaml": YAML,
            **{f"{split}/{part}": "" for split in ("train", "valid") for part in ("images/a.jpg", "labels/a.txt")},
        },
        yolo_section("train"),
        yolo_section("val"),
        "YOLO (train/images by data.yaml, valid/images by data.yaml)",
        ["  not used: test by data.yaml does not exist (my/../test/images)"],
    ),
    "YOLO without a yaml": (
        {
            "classes.txt": "cat",
            **{f"{part}/{split}/a{end}": "" for split in ("train", "val") for part, end in PARTS},
        },
        yolo_section("train"),
        yolo_section("val"),
        "YOLO (images/train, images/val)",
        [],
    ),
    "Label Studio's YOLO": (
        {"classes.txt": "cat", "notes.json": '{"categories": []}', "images/a.jpg": "", "labels/a.txt": "0 .5 .5 .1 .1"},
        yolo_section(None),
        HELD_OUT,
        "YOLO (images and labels)",
        [
            "  nothing is named val or test: data.val.fraction of the images are held out of training",
            "  not used: notes.json is not of COCO's format",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_folder_is_taken_for(case, here, caplog):
    files, train, val, taken_for, more = CASES[case]
    lay(here, files)
    (message,), sections = told("my", caplog)
    assert sections == {"train": train, "val": val}
    first, *lines = message.splitlines()
    assert first == f"my: taken for {taken_for}. As keys:"
    keys = [line.strip().strip("'").split("=", 1) for line in lines[:2]]
    assert {key: yaml.safe_load(text) for key, text in keys} == {"data.train": train, "data.val": val}
    assert lines[2:] == more


REFUSED = {
    "two jsons that could be train": (
        {"train_a.json": coco("a.jpg"), "train_b.json": coco("a.jpg"), "a.jpg": ""},
        "it cannot be told which of these is train: train_a.json (COCO), train_b.json (COCO). State data.train and "
        "data.val, of\n"
        "    'data.train={format: coco, images: my, annotations: my/train_a.json}'\n"
        "    'data.train={format: coco, images: my, annotations: my/train_b.json}'",
    ),
    "jsons whose names say nothing": (
        {"a.json": coco("a.jpg"), "b.json": coco("a.jpg"), "a.jpg": ""},
        "nothing is named train: a.json (COCO), b.json (COCO). State data.train and data.val, of\n"
        "    'data.train={format: coco, images: my, annotations: my/a.json}'\n"
        "    'data.train={format: coco, images: my, annotations: my/b.json}'",
    ),
    "train's images are elsewhere": (
        {"annotations/train.json": coco("a.jpg"), "annotations/val.json": coco("b.jpg"), "val/b.jpg": ""},
        "nothing is named train (annotations/train.json names images that are not here (a.jpg)): annotations/val.json "
        "(COCO). State data.train and data.val, of\n"
        "    'data.val={format: coco, images: my/val, annotations: my/annotations/val.json}'",
    ),
    "images in two places": (
        {"labels.json": coco("a.jpg"), "images/a.jpg": "", "resized/a.jpg": ""},
        "the images of labels.json may be in my/images, my/resized: state data.train and data.val",
    ),
    "COCO and YOLO": (
        {
            "train.json": coco("a.jpg"),
            "data.yaml": "names: [cat]\ntrain: images",
            "images/a.jpg": "",
            "labels/a.txt": "0 .5 .5 .1 .1",
        },
        "more than one layout is here: train.json (COCO), images by data.yaml (YOLO). State data.train and data.val, "
        "of\n    'data.train={format: coco, images: my/images, annotations: my/train.json}'\n"
        "    'data.train={format: yolo, root: my, split: train}'",
    ),
    "classes as folders": (
        ["cat/a.jpg", "dog/b.jpg"],
        "this is a classification dataset, a folder of images for each of 2 classes (cat, dog): resdet pretrain trains "
        "on it, with data.train.root=my",
    ),
    "classes as folders of train": (
        ["train/cat/a.jpg", "train/dog/b.jpg", "val/cat/a.jpg"],
        "this is a classification dataset, a folder of images for each of 2 classes (cat, dog): resdet pretrain trains "
        "on it, with data.train.root=my/train",
    ),
    "images alone": (
        ["images/a.jpg", "images/b.JPG", "masks/a.png"],
        f"has images (3) and nothing that labels them. {LOOKED_FOR} There: the folders images, masks; files: 2 .jpg, "
        "1 .png.",
    ),
    "nothing": ([], f"no dataset is recognised. {LOOKED_FOR} There: no folders; files: none."),
    "other files": (
        {"notes.txt": "", "scores.json": "[]", "LICENSE": ""},
        f"no dataset is recognised. {LOOKED_FOR} There: no folders; files: 1 without suffix, 1 .txt, 1 .json. Of what "
        "is there, scores.json is not of COCO's format.",
    ),
    "captions": (
        {"captions.json": '{"images": [{"file_name": "a.jpg"}], "annotations": [{"caption": "x"}]}', "a.jpg": ""},
        f"has images (1) and nothing that labels them. {LOOKED_FOR} There: no folders; files: 1 .jpg, 1 .json. Of what "
        "is there, captions.json is COCO's captions.",
    ),
    "labelme": (
        {"a.jpg": "", "a.json": '{"shapes": [], "imagePath": "a.jpg"}'},
        f"has images (1) and nothing that labels them. {LOOKED_FOR} There: no folders; files: 1 .jpg, 1 .json. Of what "
        "is there, a.json is labelme's file of one image (labelme2coco makes COCO's format of them).",
    ),
    "CVAT's own": (
        {"annotations.xml": "<?xml version='1.0'?><annotations><image/></annotations>", "images/a.jpg": ""},
        f"has images (1) and nothing that labels them. {LOOKED_FOR} There: the folders images; files: 1 .xml, 1 .jpg. "
        "Of what is there, annotations.xml is no annotation of VOC (of CVAT's own format?): export it as COCO, YOLO or "
        "VOC.",
    ),
    "an archive within": (["data.zip"], "unpack data.zip first; data takes the folder that comes out of it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_refused(case, here):
    files, message = REFUSED[case]
    lay(here, files)
    with pytest.raises(DataError) as refusal:
        folder_sections("my")
    assert str(refusal.value) == f"my: {message}"


def test_what_is_no_folder_is_refused(here):
    lay(here, ["data.ZIP", "train.json", "Set/x"])
    for path, message in {
        "my/data.ZIP": "my/data.ZIP: an archive: unpack it first; data takes the folder that comes out of it",
        "my/train.json": "my/train.json: data must be a folder (or a data.yaml of YOLO); single files are stated in "
        "data.train and data.val",
        "my/set": "my/set: no such folder; did you mean my/Set?",
        "my/none": "my/none: no such folder",
    }.items():
        with pytest.raises(DataError) as refusal:
            folder_sections(path)
        assert str(refusal.value) == message


def test_yolo_labels_without_names_are_not_used_beside_coco(here, caplog):
    lay(here, {"train.json": coco("a.jpg"), "images/a.jpg": "", "labels/a.txt": ""})
    (message,), sections = told("my", caplog)
    assert sections["train"]["format"] == "coco"
    assert message.splitlines()[-1].startswith("  not used: YOLO's labels cannot be read (my: the names of the classes")
    (here / "train.json").unlink()
    with pytest.raises(DataError, match="my: the names of the classes are needed"):
        folder_sections("my")


def test_a_data_yaml_stands_for_its_dataset(here, caplog):
    lay(here, {"x.yaml": YAML, "y.yaml": YAML, "train/images/a.jpg": "", "train/labels/a.txt": ""})
    _, sections = told("my/x.yaml", caplog)
    assert sections == {"train": yolo_section("train", "my/x.yaml"), "val": HELD_OUT}


def test_paths_as_people_write_them(here, caplog, monkeypatch):
    lay(here, {"a set/train.json": coco("a.jpg"), "a set/a.jpg": ""})
    monkeypatch.setenv("HOME", str(here.absolute()))
    os.symlink("a set", here / "link")
    expected = [("my/a set/", "my/a set"), ("my/link", "my/link"), ("~/a set", f"{here.absolute()}/a set")]
    for written, path in expected:
        assert told(written, caplog)[1]["train"] == coco_section(path, f"{path}/train.json")
    assert (
        "    'data.train={format: coco, images: my/a set, annotations: my/a set/train.json}'"
        in told("my/a set", caplog)[0][0]
    )


def test_only_one_process_of_a_run_tells(here, caplog, monkeypatch):
    lay(here, {"train.json": coco("a.jpg"), "a.jpg": ""})
    monkeypatch.setenv("RANK", "1")
    assert told("my", caplog)[0] == []


def test_large_jsons_are_not_read_whole(here, caplog, monkeypatch):
    filler = " " * (3 * module._LOOK)
    text = coco("a.jpg").replace('"annotations"', filler + '"annotations"', 1)
    lay(here, {"train.json": text, "a.jpg": ""})
    assert told("my", caplog)[1]["train"]["format"] == "coco"
    assert len(module._ends_of(here / "train.json")) <= 2 * module._LOOK < len(text)


CONFIG = "train: {steps: 1}\noutput_dir: runs\n"


def test_a_folder_in_yaml_overrides_and_python(here):
    lay(here, {"train.json": coco("a.jpg"), "a.jpg": ""})
    explicit = parse_config(
        f"{CONFIG}data: {{train: {{format: coco, images: my, annotations: my/train.json}}, val: {{fraction: 0.2}}}}"
    )
    assert parse_config(f"{CONFIG}data: my") == explicit
    assert parse_config(CONFIG, ["data=my"]) == explicit
    assert (
        Config.model_validate_json(json.dumps({"data": "my", "train": {"steps": 1}, "output_dir": "runs"})) == explicit
    )
    assert folder_config("my", ["output_dir=runs"]).data == explicit.data
    assert Config(data=here, train={"steps": 1}, output_dir="runs") == explicit
    # What a run writes down is explicit.
    assert config_to_plain(explicit)["data"]["val"] == {"format": "held_out", "fraction": 0.2, "seed": 0}
    changed = parse_config(CONFIG, ["data=my", "data.train.classes=[a]", "data.val.seed=3"])
    assert (changed.data.train.classes, changed.data.val.seed) == (["a"], 3)


def test_mistakes_are_told_with_their_place(here):
    lay(here, {"train.json": coco("a.jpg"), "a.jpg": ""})
    train = "{format: coco, images: my, annotations: my/train.json}"
    for text, overrides, message in [
        ("data: nowhere", [], "<text>:3: data: nowhere: no such folder"),
        ("", ["data=nowhere"], "command line (data=nowhere): data: nowhere: no such folder"),
        ("", ["data=nowhere", "data.val.seed=1"], "command line (data=nowhere): data: nowhere: no such folder"),
        (
            f"data: {{train: {train}, val: {{fraction: 0.2, sed: 1}}}}",
            [],
            "data.val.sed: unknown key; did you mean seed?",
        ),
        (f"data: {{train: {train}, val: {{fraction: 1}}}}", [], "data.val.fraction: must be less than 1; got 1"),
        (
            "data: {train: {format: shapes}, val: {fraction: 0.5}}",
            [],
            "val.fraction: shapes are drawn, not divided: give val format shapes with another seed",
        ),
    ]:
        with pytest.raises(ConfigError) as refusal:
            parse_config(CONFIG + text, overrides)
        assert len(refusal.value.problems) == 1
        assert message in refusal.value.problems[0]


def test_reading_a_configuration_of_a_folder_imports_nothing_heavy(here):
    lay(here, {"data.yaml": YAML, "train/images/a.jpg": "", "train/labels/a.txt": ""})
    script = (
        "import sys; from resdet.config import folder_config; folder_config('my'); "
        "print([name for name in ('torch', 'torchvision', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
