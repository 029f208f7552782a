"""tools/check_data.py as a user runs it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from resdet.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "check_data.py"


@pytest.fixture(scope="module")
def main():
    """The tool's main, without a process and its imports for every run."""
    spec = importlib.util.spec_from_file_location("check_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def on_voc(root, train="train", val="val"):
    places = {"data.train.root": root, "data.val.root": root, "data.train.split": train, "data.val.split": val}
    return [str(ROOT / "configs" / "frcnn_r101_voc.yaml"), *(f"{key}={value}" for key, value in places.items())]


def on_coco(images, train, val):
    places = {"data.train.images": images[0], "data.train.annotations": train}
    places |= {"data.val.images": images[1], "data.val.annotations": val}
    return [str(ROOT / "configs" / "frcnn_r101.yaml"), *(f"{key}={value}" for key, value in places.items())]


def test_two_boxes_of_bccd_make_exit_code_1(assets, tmp_path):
    done = run(*on_voc(assets / "bccd"), "--no-images", "--json", tmp_path / "report.json")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert len(lines) == 2
    for name in ("BloodImage_00338.jpg", "BloodImage_00343.jpg"):
        assert name in done.stdout
    assert done.stdout.splitlines()[-3:] == [
        "wrong: 2 errors: training would be refused, or wrong",
        "",
        f"written: {tmp_path / 'report.json'}",
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["wrong"] is True
    assert [finding["kind"] for finding in report["findings"]] == ["zero_box", "zero_box"]
    assert all(problem["annotation_ids"] for finding in report["findings"] for problem in finding["problems"])


def test_a_place_that_is_not_there_makes_exit_code_2(tmp_path):
    done = run(*on_coco((tmp_path, tmp_path), tmp_path / "train.json", tmp_path / "val.json"))
    assert done.returncode == 2
    assert "no such annotation file" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_fixed_copies_of_bccd_pass(main, assets, tmp_path, capsys):
    for split in ("train", "val"):
        copy = ["--fix", str(tmp_path / f"{split}.json"), "--split", split]
        assert main([*on_voc(assets / "bccd"), "--no-images", *copy]) == 1
        text = capsys.readouterr().out
        assert text.count("dropped: box") == 1
        assert f"written: {tmp_path / split}.json" in text
    images = (assets / "bccd", assets / "bccd")
    fixed = on_coco(images, tmp_path / "train.json", tmp_path / "val.json")
    assert main([*fixed, "--no-images", "--json", str(tmp_path / "report.json")]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert {finding["severity"] for finding in report["findings"]} <= {"info"}


@pytest.mark.parametrize("data", ["tiny_coco", "voc2012_mini"])
def test_real_data_without_faults_pass_with_every_image_decoded(main, assets, capsys, data):
    if data == "tiny_coco":
        folder = assets / "tiny_coco"
        annotations = [folder / "annotations" / f"instances_{part}2017.json" for part in ("train", "val")]
        arguments = on_coco((folder / "train2017", folder / "val2017"), *annotations)
    else:
        arguments = on_voc(assets / "voc2012_mini", "VOC2012/train", "VOC2012/val")
    assert main([*arguments, "--workers", "0"]) == 0
    text = capsys.readouterr().out
    assert "files decoded" in text
    assert "ERROR" not in text


def test_generated_data_pass(main, capsys):
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), "data.train.num_images=200", "data.val.num_images=50"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "train: shapes(seed=0): 200 images" in text
    assert "ERROR" not in text


@pytest.mark.parametrize("option", ["--examples=-1", "--split=test"])
def test_a_wrong_option_makes_exit_code_2(main, option):
    with pytest.raises(SystemExit) as left:
        main([str(ROOT / "configs" / "quickstart.yaml"), option])
    assert left.value.code == 2


def test_a_folder_needs_no_configuration(assets, tmp_path, main, capsys, caplog, monkeypatch):
    monkeypatch.setenv("RESDET_CACHE", "off")
    monkeypatch.chdir(assets / "panel")
    caplog.set_level("INFO", logger="resdet")
    report = tmp_path / "report.json"
    assert main(["cells", "data.val={fraction: 0.3}", "--no-images", "--json", str(report)]) == 0
    assert "cells: taken for COCO (train.json, val.json). As keys:" in caplog.text
    train, val = json.loads(report.read_text())["splits"]
    assert train["num_images"] + val["num_images"] == 192
    assert 30 <= val["num_images"] <= 85
    with pytest.raises(DataError, match=r"panel: it cannot be told which of these is train: aquarium/train\.json"):
        main([str(assets / "panel")])
    picture = next((assets / "panel" / "cells" / "images").iterdir())
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (tmp_path / "yolo" / split / part).mkdir(parents=True)
        shutil.copy(picture, tmp_path / "yolo" / split / "images")
        (tmp_path / "yolo" / split / "labels" / f"{picture.stem}.txt").write_text("0 .5 .5 .2 .2\n")
    (tmp_path / "yolo" / "data.yaml").write_text("names: [cell]\ntrain: train/images\nval: val/images\n")
    assert main([str(tmp_path / "yolo" / "data.yaml"), "--no-images"]) == 0
    # A run's folder may have its recipe's name.
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--no-images"]) == 0


def test_the_split_of_a_folder_has_no_leaks(assets, main, capsys, monkeypatch):
    monkeypatch.setenv("RESDET_CACHE", "off")
    assert main([str(assets / "panel" / "chess"), "data.val={fraction: 0.3}"]) == 0
    told = capsys.readouterr().out
    assert "near_duplicate_image" in told
    assert "train_val_overlap" not in told
