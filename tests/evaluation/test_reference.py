"""Every final evaluation is compared with pycocotools: the numbers agree, and one that does not ends with an error."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resdet.data.annotations import AnnotationTable
from resdet.data.coco import read_coco
from resdet.data.voc import read_voc
from resdet.errors import InternalError
from resdet.evaluation import reference
from resdet.evaluation.coco import coco_metrics, read_coco_detections
from resdet.evaluation.detect import Evaluation
from resdet.evaluation.reference import TOLERANCE, reference_of
from resdet.evaluation.voc import voc_metrics
from resdet.evaluation.write import write_evaluation
from resdet.types import Detections


def compared(table: AnnotationTable, detections: Detections, max_detections: int = 100) -> reference.Reference:
    metrics = coco_metrics(table, detections, max_detections=max_detections)
    return reference_of(metrics, table, detections)


def noisy(table: AnnotationTable, seed: int = 0) -> Detections:
    """Two detections near each box, crowds and difficult objects included, and one in eight of another class."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(table.num_boxes), 2)
    xywh = table.boxes_xywh[rows] + rng.normal(0, 0.1, (len(rows), 4)) * np.tile(table.boxes_xywh[rows, 2:], 2)
    other = rng.integers(1, table.num_classes, len(rows))
    return Detections(
        table.image_of_box()[rows],
        np.concatenate([xywh[:, :2], xywh[:, :2] + np.abs(xywh[:, 2:])], axis=1),
        np.where(rng.random(len(rows)) < 0.125, other, table.labels[rows]),
        rng.random(len(rows)).round(2),
    )


def assert_written_with_reference(folder: Path, table: AnnotationTable, detections: Detections) -> None:
    coco = coco_metrics(table, detections)
    evaluation = Evaluation(coco, voc_metrics(table, detections), detections, None).with_reference(table)
    write_evaluation(folder, evaluation, table)
    document = json.loads((folder / "metrics.json").read_text())
    theirs = document["reference"]
    assert re.fullmatch(r"2\.\d+\.\d+", theirs.pop("pycocotools"))
    assert list(theirs) == list(coco.as_dict())
    assert len(theirs) == 12
    assert {name: document["metrics"][name] for name in theirs} == pytest.approx(theirs, rel=0, abs=TOLERANCE)
    assert 0 < theirs["AP"] < 1
    assert evaluation.reference is not None
    evaluation.reference.check("here")


def test_both_have_the_same_numbers_of_cocoapis_own_demo(assets: Path, tmp_path: Path) -> None:
    folder = assets / "cocoapi_eval"
    table = read_coco(folder / "instances_val2014_100.json")
    found = read_coco_detections(folder / "instances_val2014_fakebbox100_results.json", table)
    assert_written_with_reference(tmp_path, table, found)


def test_both_have_the_same_numbers_of_bccd(assets: Path, tmp_path: Path) -> None:
    table = read_voc(assets / "bccd", "val")
    assert_written_with_reference(tmp_path, table, noisy(table))


@pytest.mark.parametrize("max_detections", [1, 2, 10, 100, 300])
@pytest.mark.parametrize("seed", [2, 3, 10])
def test_crowds_and_any_limit_agree(case, seed: int, max_detections: int) -> None:
    found = compared(*case(seed), max_detections)
    assert found.differing == {}
    assert f"AR_{max_detections}" in found.metrics


def test_difficult_objects_agree(case) -> None:
    as_objects = as_crowds = 0
    for seed in range(12):
        table, _ = case(seed, integer=True)
        detections = noisy(table)
        assert compared(table, detections).differing == {}
        # They do count for pycocotools unless it is told: as ordinary objects, or as crowd regions.
        own, none = coco_metrics(table, detections), np.zeros_like(table.difficult)
        as_objects += bool(reference_of(own, replace(table, difficult=none), detections).differing)
        as_crowds += bool(
            reference_of(own, replace(table, difficult=none, crowd=table.difficult), detections).differing
        )
    assert min(as_objects, as_crowds) > 5


def test_no_detections_no_objects_of_a_size_and_images_twice_agree(case, no_detections: Detections) -> None:
    table, detections = case(3)
    assert compared(table, no_detections).differing == {}
    small = replace(table, area=np.full_like(table.area, 50.0))
    found = compared(small, detections)
    assert found.differing == {}
    assert found.metrics["AP_large"] == found.metrics["AR_medium"] == -1
    empty = {name: getattr(table, name)[:0] for name in ("labels", "area", "crowd", "difficult", "boxes_xywh")}
    nothing = replace(table, offsets=np.zeros_like(table.offsets), **empty)
    assert set(compared(nothing, detections).metrics.values()) == {-1.0}
    chosen = table.select_images(np.array([2, 0, 2]))  # image ids repeat, and are not in order
    assert compared(chosen, noisy(chosen)).differing == {}


def test_a_difference_is_told_with_both_numbers(case) -> None:
    table, detections = case(3)
    own = coco_metrics(table, detections)
    assert reference_of(replace(own, AP=own.AP + 0.9e-9), table, detections).differing == {}
    found = reference_of(replace(own, AP=own.AP + 0.25), table, detections)
    assert list(found.differing) == ["AP"]
    with pytest.raises(InternalError) as caught:
        found.check("runs/x/metrics.json")
    theirs = found.metrics["AP"]
    assert str(caught.value) == (
        f"runs/x/metrics.json: our numbers and those of pycocotools {found.version} must agree to 1e-09, but we have "
        f"AP {own.AP + 0.25!r} and {theirs!r} (apart by 0.25). Do not cite either: this is a fault of resdet or of "
        "pycocotools, please report it with the files; eval.reference=false evaluates without pycocotools"
    )


def test_a_number_that_is_not_finite_is_a_difference(case) -> None:
    table, detections = case(3)
    own = coco_metrics(table, detections)
    assert list(reference_of(replace(own, AR_10=float("nan")), table, detections).differing) == ["AR_10"]


@pytest.mark.parametrize("what", ["score", "bbox"])
def test_one_other_detection_is_noticed(case, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = case(3)
    detections = noisy(table)
    results = reference.coco_results

    def one_changed(*arguments):
        changed = results(*arguments)
        best = max(changed, key=lambda result: result["score"])
        best[what] = 0.0 if what == "score" else [500, 500, 3, 3]
        return changed

    monkeypatch.setattr(reference, "coco_results", one_changed)
    assert "AP" in compared(table, detections).differing


def test_nothing_is_printed(case, capsys: pytest.CaptureFixture[str]) -> None:
    compared(*case(1))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
