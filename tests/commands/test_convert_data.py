"""``resdet convert-data``, and the other commands on what labelling tools export."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resdet.commands.main import main
from resdet.errors import UserError

TINY = (
    *("model.norm=group", "model.min_size=64", "model.max_size=96", "model.out_channels=32"),
    *("model.box_head_channels=32", "train.steps=2", "train.batch_size=2", "loader.num_workers=0"),
    *("eval.num_pictures=1", "train.log_every=1"),
)


def squares(path: Path, seed: int) -> tuple[int, int, int, int]:
    """Write noise with a bright square; return its ``x, y, width, height``."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 60, (48, 64, 3), dtype=np.uint8)
    x, y, side = (int(draw.integers(2, 20)), int(draw.integers(2, 20)), int(draw.integers(12, 24)))
    pixels[y : y + side, x : x + side] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return x, y, side, side


def yolo(root: Path) -> Path:
    """A data set as Roboflow exports it for YOLO: ../train/images, which is wrong relative to its own file."""
    for number, split in enumerate(["train"] * 4 + ["valid"] * 2):
        name = f"{number}_jpg.rf.0f1e2d3c"
        x, y, w, h = squares(root / split / "images" / f"{name}.jpg", number)
        labels = root / split / "labels" / f"{name}.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        polygon = " ".join(str(value / (48 if i % 2 else 64)) for i, value in enumerate(corners))
        labels.write_text(
            f"1 {(x + w / 2) / 64} {(y + h / 2) / 48} {w / 64} {h / 48}\n" if number % 2 else f"1 {polygon}\n"
        )
    (root / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['hole', 'square']\n\n"
        "roboflow:\n  workspace: mine\n  project: squares\n  version: 1\n  license: CC BY 4.0\n"
    )
    return root


def roboflow_coco(root: Path) -> Path:
    """A data set as Roboflow exports it for COCO: an empty root category, the json among the images."""
    for split, numbers in (("train", range(4)), ("valid", range(4, 6))):
        images, annotations = [], []
        for index, number in enumerate(numbers):
            name = f"{number}_jpg.rf.0f1e2d3c.jpg"
            box = squares(root / split / name, number)
            images.append({"id": index, "license": 1, "file_name": name, "height": 48, "width": 64})
            annotations.append(
                {
                    "id": index,
                    "image_id": index,
                    "category_id": 1,
                    "bbox": box,
                    "area": box[2] ** 2,
                    "segmentation": [],
                    "iscrowd": 0,
                }
            )
        categories = [
            {"id": 0, "name": "squares", "supercategory": "none"},
            {"id": 1, "name": "square", "supercategory": "squares"},
        ]
        document = {"info": {"version": "1"}, "images": images, "annotations": annotations, "categories": categories}
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))
    return root


@pytest.mark.parametrize("make", [yolo, pytest.param(roboflow_coco, marks=pytest.mark.slow)])
def test_a_data_set_of_roboflow_trains_checks_browses_and_evaluates(make, tmp_path, capsys):
    folder, run = make(tmp_path / "set"), tmp_path / "run"
    assert (
        main(["check", str(folder), "--browse", str(tmp_path / "page.html"), "--browse-images", "4", "--workers", "0"])
        == 0
    )
    told = capsys.readouterr().out
    assert "nothing is wrong" in told
    assert "4 images, 4 files decoded, 4 boxes of" in told
    assert (tmp_path / "page.html").stat().st_size > 10_000
    main(["train", "quickstart", *TINY, f"data={folder}", f"output_dir={run}"])
    main(["eval", str(run), "--output", str(tmp_path / "eval")])
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert list(metrics["per_class"]) == (["hole", "square"] if make is yolo else ["square"])
    assert metrics["per_class"]["square"]["num_boxes"] == 2


@pytest.mark.parametrize("layout", ["coco", "yolo", "voc"])
def test_a_folder_is_written_in_each_layout_and_recognised_again(layout, tmp_path, capsys):
    folder = yolo(tmp_path / "set")
    main(["convert-data", str(folder), "--to", layout, "--output", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"train: read {folder}/data.yaml (train) (yolo)",
        f"val: read {folder}/data.yaml (val) (yolo)",
        f"{folder}/data.yaml: train: ../train/images does not exist; taken for {folder}/train/images",
        f"{folder}/data.yaml: val: ../valid/images does not exist; taken for {folder}/valid/images",
        "train: 4 images, 4 objects",
        "val: 2 images, 2 objects",
        "6 images are hard links to the given files (--copy makes them files of their own)",
        f"written: {tmp_path}/out ({layout})",
    ]
    assert main(["check", str(tmp_path / "out"), "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert "4 images, 4 files decoded, 4 boxes of 2 classes" in told
    assert "2 images, 2 files decoded, 2 boxes of 2 classes" in told


def test_a_configuration_is_written_too(tmp_path, capsys):
    main(
        "convert-data quickstart data.train.num_images=2 data.val.num_images=1 data.train.image_size=32 "
        f"--to voc --output {tmp_path}/out --copy".split()
    )
    assert "train: 2 images" in capsys.readouterr().out
    assert (tmp_path / "out" / "ImageSets" / "Main" / "val.txt").read_text() == "shapes_1_000000\n"


def test_what_is_held_out_becomes_a_split(tmp_path, capsys):
    folder = yolo(tmp_path / "set")
    train = f"data.train={{format: yolo, root: {folder}, split: null}}"
    main(
        ["convert-data", "quickstart", train, "data.val={fraction: 0.4}", "--to", "yolo", "--output", f"{tmp_path}/out"]
    )
    counts = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines() if " images, " in line]
    assert len(counts) == 2
    assert sum(counts) == 6
    assert min(counts) > 0


def test_mistakes_are_told(tmp_path, capsys):
    folder = yolo(tmp_path / "set")
    to = ["--to", "coco", "--output", str(folder)]
    with pytest.raises(UserError, match=r"the output must be a new or an empty folder$"):
        main(["convert-data", str(folder), *to])
    with pytest.raises(SystemExit):
        main(["convert-data", str(folder), "data.train.split=test", *to])
    assert "key=value belongs to a configuration, got data.train.split=test with a dataset" in capsys.readouterr().err
    (folder / "train" / "labels" / "0_jpg.rf.0f1e2d3c.txt").write_text("5 0 0 0 0\n")
    with pytest.raises(
        UserError, match=r"train/labels/0_jpg\.rf\.0f1e2d3c\.txt: line 1: the class must be one of 0 to 1"
    ):
        main(["convert-data", str(folder / "data.yaml"), "--to", "coco", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
