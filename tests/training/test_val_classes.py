"""Validation sets with other classes than the training set, in training, evaluation and check."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import ROOT, SMALL

import resdet
from resdet.commands import check as check_command, eval as eval_command
from resdet.config_reading import config_to_plain
from resdet.errors import DataError

CLASSES = {"cell": (4, 4, 24, 20), "rare": (30, 10, 28, 30), "Blut": (8, 26, 30, 20)}  # boxes by class, xywh


def coco(folder: Path, split: str, ids: dict[str, int], used: list[str]) -> dict[str, str]:
    """Write three images with a box of each used class; the json lists the classes of ``ids``."""
    rng = np.random.default_rng(len(ids))
    (folder / split).mkdir(parents=True)
    images = [{"id": n, "file_name": f"{n}.png", "height": 64, "width": 64} for n in (3, 1, 2)]
    for image in images:
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / image["file_name"])
    pairs = [(image["id"], name) for image in images for name in used]
    annotations = [
        {"id": n, "image_id": image, "category_id": ids[name], "bbox": CLASSES[name]}
        for n, (image, name) in enumerate(pairs, 1)
    ]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(document))
    return {"format": "coco", "images": str(folder / split), "annotations": str(folder / f"{split}.json")}


def voc(folder: Path, split: str, used: list[str]) -> dict[str, str]:
    """Write the same in VOC's layout, in a folder of its own."""
    root = folder / split
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / name).mkdir(parents=True)
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
        f"<ymax>{y + h}</ymax></bndbox></object>"
        for name, (x, y, w, h) in CLASSES.items()
        if name in used
    )
    for stem in ("a", "b"):
        Image.new("RGB", (64, 64), (90, 40, 200)).save(root / "JPEGImages" / f"{stem}.png")
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("a\nb\n")
    return {"format": "voc", "root": str(root), "split": split}


def write_config(folder: Path, train: dict[str, str], val: dict[str, str]) -> Path:
    small = [item for item in SMALL if not item.startswith("data.")]
    extra = ["train.steps=1", "loader.num_workers=0", "eval.loss=true", f"output_dir={folder / 'run'}"]
    plain = config_to_plain(resdet.load_config(ROOT / "configs" / "quickstart.yaml", [*small, *extra]))
    plain["data"] = {"train": train, "val": val}
    (folder / "config.yaml").write_text(json.dumps(plain))  # json is YAML
    return folder / "config.yaml"


def sources(folder: Path, kind: str) -> tuple[dict[str, str], dict[str, str]]:
    """Write a training set of three classes and a validation set in which one of them does not occur."""
    three = {"cell": 1, "rare": 2, "Blut": 3}
    if kind == "voc":
        return voc(folder, "train", list(CLASSES)), voc(folder, "val", ["cell", "Blut"])
    ids = {
        "coco without the class": {"Blut": 1, "cell": 2},
        "coco with the class unused": {"rare": 9, "Blut": 5, "cell": 7},
        "coco with a class more that is not used": {"Blut": 2, "objects": 0, "cell": 30},
    }[kind]
    return coco(folder, "train", three, list(CLASSES)), coco(folder, "val", ids, ["cell", "Blut"])


KINDS = (
    "voc",
    "coco without the class",
    "coco with the class unused",
    "coco with a class more that is not used",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_validation_set_without_one_of_the_classes(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    config = write_config(tmp_path, *sources(tmp_path, kind))
    metrics = resdet.train(resdet.load_config(config)).metrics
    assert 0 <= metrics["AP"] <= 1
    assert metrics["val_loss"] > 0

    eval_command.main([str(tmp_path / "run")])
    per_class = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())["per_class"]
    assert set(per_class) == set(CLASSES)
    assert per_class["rare"]["AP"] == -1
    assert min(per_class["cell"]["AP"], per_class["Blut"]["AP"]) >= 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rare"))
    assert "-" in row.split()

    check_command.main([str(config)])
    assert "different_classes" not in capsys.readouterr().out


def test_classes_named_on_both_sides_may_be_empty(tmp_path: Path) -> None:
    train, val = sources(tmp_path, "voc")
    named = {"classes": ["rare", "cell"]}
    assert 0 <= resdet.train(resdet.load_config(write_config(tmp_path, train | named, val | named))).metrics["AP"] <= 1


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_a_class_that_the_model_does_not_know_is_named(tmp_path: Path, kind: str) -> None:
    known = ["cell", "rare"]
    if kind == "voc":
        train, val = voc(tmp_path, "train", known), voc(tmp_path, "val", ["cell", "Blut"])
    else:
        train = coco(tmp_path, "train", {"cell": 1, "rare": 2}, known)
        val = coco(tmp_path, "val", {"cell": 1, "Blut": 2}, ["cell", "Blut"])
    config = write_config(tmp_path, train, val)
    with pytest.raises(DataError, match=r"only .*val.* has 'Blut'; only the model has 'rare'"):
        resdet.train(resdet.load_config(config))
