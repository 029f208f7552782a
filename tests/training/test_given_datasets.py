"""Runs on datasets that a Python program gives, and programs that listen to runs."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import ROOT, SMALL, differences, logged, train_here
from torch.utils.data import Dataset, Subset

from resdet.build import build_dataset, config_of_checkpoint
from resdet.config import load_config
from resdet.data.augment.pipeline import build_augment
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.data.torch_datasets import wrap_dataset
from resdet.errors import InternalError, TrainingError, UserError
from resdet.evaluation.detect import evaluate
from resdet.models.checkpoint import load_detector
from resdet.processes import Processes
from resdet.training import detection, loop
from resdet.training.loop import TrainResult

CLASSES = ["circle", "square", "triangle"]
QUICK = ("loader.num_workers=0", "optim.warmup_steps=0", "train.steps=2")


class Shapes(Dataset[Any]):
    """The generated dataset as a user's own: float images, boxes and labels, and random mirroring if wanted."""

    def __init__(self, num_images: int, seed: int, *, mirrored: bool = False) -> None:
        self._table, self._images = shapes_table(num_images, 64, seed), ShapesImages(64, seed)
        self._mirrored = mirrored

    def __len__(self) -> int:
        return self._table.num_images

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = self._table.rows(index)
        boxes = torch.from_numpy(self._table.boxes_xywh[rows])
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        image = torch.from_numpy(self._images(index)).permute(2, 0, 1).double() / 255
        if self._mirrored and torch.rand(()) < 0.5:
            image, boxes = image.flip(2), torch.stack([64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]], 1)
        return image, {"boxes": boxes, "labels": torch.from_numpy(self._table.labels[rows])}


def train(folder: Path, *overrides: str, train_set: Any = None, **given: Any) -> TrainResult:
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*SMALL, *QUICK, f"output_dir={folder}", *overrides])
    datasets = {"train_set": train_set or Shapes(24, 0), "val_set": Shapes(4, 1), "classes": CLASSES}
    return detection.train(config, **(datasets | given))


def test_a_given_dataset_trains_as_one_of_files_does(tmp_path: Path) -> None:
    """The same images give the same bits: order, augmentation, losses, weights, metrics."""
    train(tmp_path / "given")
    train_here(tmp_path / "own", *QUICK)
    assert [
        name for name in differences(tmp_path / "given/last.pt", tmp_path / "own/last.pt") if "config" not in name
    ] == []
    for key in ("loss", "AP", "voc_AP50"):
        assert logged(tmp_path / "given", key) == logged(tmp_path / "own", key) != []
    config = config_of_checkpoint(tmp_path / "given" / "best.pt")
    given = {"format": "python", "dataset": "Shapes", "num_images": 24, "classes": CLASSES}
    assert config.data.train.model_dump() == given
    assert config.data.val.model_dump() == given | {"num_images": 4}
    told = (
        r"^data: missing \(it was Shapes of a Python program\): state a dataset by its folder "
        r"\(data=FOLDER\), or its format \(coco, voc, yolo, shapes\) and place, or give one to resdet\.train\("
        r"config, train_set=\.\.\., "
        r"val_set=\.\.\.\) or resdet\.evaluate\(model, dataset\)$"
    )
    with pytest.raises(UserError, match=told):
        build_dataset(config.data.val, training=False)

    # The detector knows the classes, which a dataset without names then takes from it.
    model = load_detector(tmp_path / "given" / "best.pt")
    own = DetectionDataset(shapes_table(4, 64, 1), ShapesImages(64, 1), training=False)
    expected = evaluate(model, own).metrics
    assert evaluate(model, Shapes(4, 1)).metrics == expected
    assert evaluate(model, Subset(Shapes(9, 1), range(4))).metrics == expected


@pytest.mark.slow
def test_a_run_on_random_transforms_continues_bit_for_bit(tmp_path: Path) -> None:
    moved = Shapes(24, 0, mirrored=True)
    train(tmp_path / "whole", train_set=moved)
    train(tmp_path / "parts", "train.steps=1", train_set=moved)
    train(tmp_path / "parts", "resume=auto", "loader.num_workers=1", train_set=moved)
    assert logged(tmp_path / "whole", "loss") == logged(tmp_path / "parts", "loss")
    trained = wrap_dataset(moved, classes=CLASSES, training=True)
    seen = {tuple(trained[(0, seed)][1]["boxes"].flatten().tolist()) for seed in range(8)}
    assert len(seen) == 2, "each draw is mirrored or not"


def test_what_is_resumed_must_be_the_same_kind_of_data_and_classes(tmp_path: Path) -> None:
    train(tmp_path, "train.steps=1")
    with pytest.raises(UserError, match=r"label 1, 'circle' there and 'square' here"):
        train(tmp_path, "resume=auto", classes=["square", "circle", "triangle"])
    with pytest.raises(UserError, match=r'data\.train\.format was "python" and is "shapes"'):
        train_here(tmp_path, *QUICK, "resume=auto")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_dataset_that_is_nowhere_is_told_before_anything_else(split: str, tmp_path: Path) -> None:
    config = load_config({"train.steps": 1, "output_dir": tmp_path / "run"})
    given = {"val_set": Shapes(4, 1)} if split == "train" else {"train_set": Shapes(4, 1)}
    with pytest.raises(UserError, match=rf"^data\.{split}: missing: state a dataset by its folder") as refusal:
        detection.train(config, **given)
    assert ("or data.val={fraction: 0.2} for a part of data.train, or" in str(refusal.value)) == (split == "val")
    assert not (tmp_path / "run").exists()


def test_a_fraction_divides_files_only(tmp_path: Path) -> None:
    config = load_config({"train.steps": 1, "output_dir": tmp_path / "run", "data": {"val": {"fraction": 0.2}}})
    with pytest.raises(
        UserError, match=r"^data\.val\.fraction: divides a dataset of files, not train_set: give val_set"
    ):
        detection.train(config, train_set=Shapes(4, 0))


def test_a_bad_item_of_either_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train_set\[\d+\]: a label must be in 1\.\.2 \(0 is the background\); got 3"):
        train(tmp_path, classes=CLASSES[:2])
    # Without names, the classes of val_set are those of train_set.
    only_circles = [(torch.zeros(3, 64, 64), {"boxes": [[1, 2, 30, 30]], "labels": [1]})] * 4
    with pytest.raises(UserError, match=r"^val_set\[\d+\]: a label must be in 1\.\.1 \(0 is the background\); got"):
        train(tmp_path, train_set=only_circles, classes=None)


def test_a_detection_dataset_is_trained_on_as_it_is() -> None:
    own = wrap_dataset(Shapes(24, 0), classes=CLASSES)
    augment = build_augment([{"HorizontalFlip": {"p": 1.0}}])
    mirrored = wrap_dataset(own, training=True, augment=augment)
    expected = wrap_dataset(Shapes(24, 0), classes=CLASSES, training=True, augment=augment)
    assert torch.equal(mirrored[3][0], own[3][0].flip(2))
    assert torch.equal(mirrored[3][1]["boxes"], expected[3][1]["boxes"])
    assert torch.equal(wrap_dataset(mirrored, training=True, augment=None)[3][0], mirrored[3][0]), "its own steps stay"
    crowded = replace(own.table, crowd=np.ones_like(own.table.crowd))
    with pytest.raises(UserError, match="are crowd regions"):
        wrap_dataset(DetectionDataset(crowded, own.image, training=False), training=True)


# Callbacks


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_callbacks_get_the_lines_of_the_log(tmp_path: Path) -> None:
    logs: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [*SMALL, *QUICK, "train.eval_every=1", f"output_dir={tmp_path / 'run'}"]
    )
    detection.train(config, on_log=logs.append, on_evaluation=evaluations.append)
    assert logs == [line for line in lines(tmp_path / "run") if "lr" in line]
    assert evaluations == [line for line in lines(tmp_path / "run") if "AP" in line]
    assert [line["step"] for line in logs] == [line["step"] for line in evaluations] == [1, 2]


class Pruned(Exception):  # noqa: N818
    """As optuna.TrialPruned: no error of ours."""


@pytest.mark.parametrize(
    ("where", "kind"), [pytest.param("on_log", SystemExit, marks=pytest.mark.slow), ("on_evaluation", Pruned)]
)
def test_what_a_callback_raises_ends_the_run_in_order(where: str, kind: type[BaseException], tmp_path: Path) -> None:
    reason = kind("not promising")

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 1:
            raise reason

    settings = [*SMALL, *QUICK, "train.eval_every=1", f"output_dir={tmp_path}", "resume=auto", "loader.num_workers=1"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", settings)
    with pytest.raises(kind) as caught:
        detection.train(config, **{where: stop})
    assert caught.value is reason
    assert multiprocessing.active_children() == [], "no worker goes on for an error that is kept"
    state = torch.load(tmp_path / "last.pt", weights_only=True)["training"]
    assert (state["step"], state["evaluated"]) == (1, None if where == "on_log" else 1)
    assert detection.train(config).steps == 2, "the folder is free, and the run goes on"
    assert [line["step"] for line in lines(tmp_path)] == [1, 1, 2, 2]


def test_the_other_processes_end_with_the_one_whose_callback_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 hears of it and raises an error of its own; nobody waits for ever."""
    team = Processes(1, 2, torch.device("cpu"))
    monkeypatch.setattr(Processes, "gather", lambda self, share: [True, share])
    learner: Any = type("Learner", (), {"team": team})()
    state: Any = type("State", (), {"saved": 3, "step": 3})()
    never: Any = lambda line: pytest.fail("only rank 0 calls it")  # noqa: E731
    with pytest.raises(TrainingError, match=r"^process 1: a callback in process 0 has ended the run$"):
        loop.tell(never, {"step": 3}, object(), learner, state)  # type: ignore[arg-type]


# The final evaluation


def test_a_run_whose_last_numbers_are_not_pycocotools_own_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect = importlib.import_module("resdet.evaluation.detect")  # the package has a function of this name
    real = detect.coco_metrics
    monkeypatch.setattr(detect, "coco_metrics", lambda *a, **k: replace(real(*a, **k), AR_1=0.5))
    evaluations: list[dict[str, Any]] = []
    settings = [*SMALL, *QUICK, "train.eval_every=1", f"output_dir={tmp_path}"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", settings)
    with pytest.raises(InternalError, match=r"/metrics\.json: our numbers and those of pycocotools .* AR_1 0\.5 and "):
        detection.train(config, on_evaluation=evaluations.append)
    assert [line["step"] for line in evaluations] == [1], "the first is not the last, and is not compared"
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["metrics"]["AR_1"] == 0.5 != document["reference"]["AR_1"]
    assert "computes other values of AR_1: do not cite them." in (tmp_path / "report.html").read_text()
    assert (tmp_path / "best.pt").exists()
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*settings, "resume=auto", "eval.reference=false"])
    assert detection.train(config).metrics["AR_1"] == 0.5
    assert "reference" not in json.loads((tmp_path / "metrics.json").read_text())
    assert np.isfinite(logged(tmp_path, "AP")).all()


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
from test_given_datasets import CLASSES, QUICK, SMALL, Shapes, load_config, detection

def listen(line):
    print("heard", line["step"], flush=True)
    if line["step"] == 1 and sys.argv[3] == "stop":
        raise KeyError("my own reason")

settings = [*SMALL, *QUICK, "train.eval_every=1", f"output_dir={sys.argv[1]}", "resume=auto"]
config = load_config("configs/quickstart.yaml", settings)
try:
    detection.train(config, train_set=Shapes(25, 0), val_set=Shapes(5, 1), classes=CLASSES, on_evaluation=listen)
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    sys.exit(3)
"""


@pytest.mark.slow
def test_two_processes_share_the_reading_and_end_together(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(mode: str) -> subprocess.CompletedProcess[str]:
        command = [*torchrun, str(script), str(tmp_path / "run"), str(Path(__file__).parent), mode]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    stopped = run("stop")
    assert stopped.returncode == 1, stopped.stderr
    assert stopped.stdout.count("heard 1") == 1, "rank 0 alone is told"
    assert "KeyError: 'my own reason'" in stopped.stdout
    assert "TrainingError: process 1: a callback in process 0 has ended the run" in stopped.stdout
    done = run("go")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("heard 2") == 1
    document = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert document["num_images"] == 5
    assert document["reference"]["AP"] == pytest.approx(document["metrics"]["AP"], rel=0, abs=1e-9)
