"""A run on a dataset's folder, of which a part is held out: what it writes down, and what continues it."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from small_runs import train_here

from resdet.commands.eval import main as evaluate
from resdet.errors import UserError

RUN = ("train.steps=1", "train.batch_size=2")


@pytest.fixture(scope="module", autouse=True)
def _no_cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESDET_CACHE", "off")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures of noise, each with two boxes, and one json."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    images, boxes = [], []
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
        boxes += [
            {"id": 2 * number + label, "image_id": number, "category_id": label, "bbox": [4 * label, 5, 20, 30]}
            for label in (1, 2)
        ]
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    text = json.dumps({"images": images, "annotations": boxes, "categories": categories})
    (folder / "labels.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    train_here(run, *RUN, f"data={folder}")
    return run


def listed(run, name):
    return set((run / name).read_text().split())


def test_what_was_recognised_and_held_out_is_written_down(folder, finished):
    train, val = (listed(finished, f"{side}_images.txt") for side in ("train", "val"))
    assert train | val == {f"{number}.png" for number in range(12)}
    assert val
    assert not train & val
    data = yaml.safe_load((finished / "config.yaml").read_text())["data"]
    assert data["train"] == {
        "format": "coco",
        "images": str(folder),
        "annotations": str(folder / "labels.json"),
        "unreadable": "error",
        "classes": None,
    }
    assert data["val"] == {"format": "held_out", "fraction": 0.2, "seed": 0}


def test_the_run_continues_on_the_same_images_alone(folder, finished):
    val = listed(finished, "val_images.txt")
    train_here(finished, *RUN, f"data={folder}", "train.steps=2", "resume=auto")
    assert listed(finished, "val_images.txt") == val
    with pytest.raises(UserError) as refusal:
        train_here(finished, *RUN, f"data={folder}", "data.val.seed=1", "train.steps=3", "resume=auto")
    assert str(refusal.value).startswith(f"{finished}: ")
    assert " images of data.val were trained on (" in str(refusal.value)
    assert " images of data.train were held out (" in str(refusal.value)
    assert listed(finished, "val_images.txt") == val


def test_evaluation_takes_the_images_that_were_held_out(folder, finished, tmp_path, capsys):
    evaluate([str(finished)])
    val = listed(finished, "val_images.txt")
    found = json.loads((finished / "eval" / "detections.json").read_text())
    assert {f"{detection['image_id']}.png" for detection in found} <= val
    with pytest.raises(UserError, match=r"images of data\.val were trained on"):
        evaluate([str(finished), "data.val.seed=1"])
    # Another dataset may have images of the same names.
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    evaluate([str(finished), f"data={other}", "data.val.seed=1"])
