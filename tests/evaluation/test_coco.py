import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resdet.data.annotations import AnnotationTable
from resdet.data.coco import read_coco
from resdet.errors import DataError
from resdet.evaluation.coco import coco_metrics, detections_to_coco, read_coco_detections
from resdet.evaluation.reference import coco_dataset, coco_results, pycocotools_evaluator, twelve_numbers
from resdet.types import Category, Detections

# COCO's own record of what these detections score (val2014_fake_eval_res.txt of cocodataset/cocoapi).
PUBLISHED = (0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564)
NAMES = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
NAMES += ["AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"]
# Means are summed in another order, and precisions lack pycocotools' 2.2e-16: only the last bits may differ.
EXACT = 1e-12


def evaluator_of(table: AnnotationTable, detections: Detections, max_detections: int = 100):
    """What pycocotools computes in a final evaluation."""
    return pycocotools_evaluator(coco_dataset(table), coco_results(table, detections), max_detections)


def summarized(evaluator) -> np.ndarray:
    """The numbers that pycocotools itself makes of its arrays."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.summarize()
    return evaluator.stats


def assert_same(table: AnnotationTable, detections: Detections, stats: np.ndarray) -> None:
    metrics = coco_metrics(table, detections).as_dict()
    assert list(metrics) == NAMES
    np.testing.assert_allclose(list(metrics.values()), stats, rtol=0, atol=EXACT)


def assert_same_per_class(table: AnnotationTable, detections: Detections, evaluator, ids: str = "label") -> None:
    rows = coco_metrics(table, detections).per_class
    for row, category in zip(rows, table.categories, strict=True):
        numbers = [getattr(row, name) for name in [*NAMES[:8], "AR_max", *NAMES[9:]]]
        np.testing.assert_allclose(numbers, twelve_numbers(evaluator, 100, getattr(category, ids)), rtol=0, atol=EXACT)


@pytest.mark.parametrize("seed", range(200))
def test_twelve_numbers_equal_pycocotools_overall_and_per_class(case, seed):
    table, detections = case(seed)
    evaluator = evaluator_of(table, detections)
    assert_same(table, detections, summarized(evaluator))
    assert_same_per_class(table, detections, evaluator)


@pytest.mark.parametrize("max_detections", [2, 5, 30, 300])
@pytest.mark.parametrize("seed", [3, 10])
def test_any_limit_of_detections_equals_pycocotools(case, seed, max_detections):
    table, detections = case(seed)
    evaluator = evaluator_of(table, detections, max_detections)
    metrics = coco_metrics(table, detections, max_detections=max_detections).as_dict()
    assert f"AR_{max_detections}" in metrics
    expected = twelve_numbers(evaluator, max_detections)
    np.testing.assert_allclose(list(metrics.values()), expected, rtol=0, atol=EXACT)
    other = coco_metrics(table, detections, max_detections=1).as_dict().values()
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(list(other)[:8], expected[:8], rtol=0, atol=EXACT)


@pytest.mark.parametrize("max_detections", [100, 175, 500])
def test_dense_images_equal_pycocotools_at_any_limit(max_detections):
    """Two images of 225 objects that overlap, found twice over: more detections than any limit but the last."""
    rng = np.random.default_rng(5)
    num_boxes = 450
    xy = rng.uniform(0, 600, (num_boxes, 2))
    boxes_xywh = np.concatenate([xy, rng.uniform(5, 40, (num_boxes, 2))], axis=1)
    table = AnnotationTable(
        name="dense",
        categories=(Category(1, 5, "grain"), Category(2, 4, "stone")),
        image_ids=np.array([4, 9]),
        file_names=["a.png", "b.png"],
        sizes=np.full((2, 2), 640, dtype=np.int32),
        offsets=np.array([0, 225, 450]),
        boxes_xywh=boxes_xywh,
        labels=np.where(np.arange(num_boxes) % 9, 1, 2),
        area=boxes_xywh[:, 2] * boxes_xywh[:, 3],
        crowd=rng.random(num_boxes) < 0.01,
        difficult=np.zeros(num_boxes, dtype=np.bool_),
        annotation_ids=np.arange(1, num_boxes + 1),
    )
    twice = np.concatenate([np.arange(num_boxes)] * 2)
    moved = boxes_xywh[twice] + rng.normal(0, 1.5, (len(twice), 4)) * [1, 1, 0, 0]
    detections = Detections(
        image_index=table.image_of_box()[twice],
        boxes=np.concatenate([moved[:, :2], moved[:, :2] + moved[:, 2:]], axis=1),
        labels=table.labels[twice],
        scores=rng.random(len(twice)),
    )
    evaluator = evaluator_of(table, detections, max_detections)
    metrics = coco_metrics(table, detections, max_detections=max_detections).as_dict()
    expected = twelve_numbers(evaluator, max_detections)
    np.testing.assert_allclose(list(metrics.values()), expected, rtol=0, atol=EXACT)
    assert metrics["AP"] > coco_metrics(table, detections, max_detections=50).AP


def test_the_numbers_are_those_that_pycocotools_prints(case):
    """Ours are compared with ``summarize`` above; the arrays that it reads have any other limit and each class too."""
    evaluator = evaluator_of(*case(3))
    np.testing.assert_array_equal(twelve_numbers(evaluator, 100), summarized(evaluator))


def test_cases_cover_what_they_claim(case):
    cases = [case(seed) for seed in range(200)]
    assert any(table.crowd.any() for table, _ in cases)
    assert any((table.area < 1).any() for table, _ in cases)
    assert any((np.diff(table.offsets) == 0).any() for table, _ in cases)
    assert any(len(np.unique(found.scores)) < len(found) / 2 for _, found in cases)
    assert any(np.bincount(found.image_index * 5 + found.labels).max() > 100 for _, found in cases)


@pytest.mark.parametrize("perturb", ["score", "box", "crowd", "area"])
def test_equality_notices_one_changed_value(case, perturb):
    table, detections = case(3)
    evaluator = evaluator_of(table, detections)
    assert_same_per_class(table, detections, evaluator)
    if perturb == "score":
        scores = detections.scores.copy()
        scores[np.argmax(scores)] = 0
        detections = replace(detections, scores=scores)
    elif perturb == "box":
        boxes_xywh = table.boxes_xywh.copy()
        boxes_xywh[0, 0] += 500
        table = replace(table, boxes_xywh=boxes_xywh)
    elif perturb == "crowd":
        crowd = table.crowd.copy()
        crowd[0] = ~crowd[0]
        table = replace(table, crowd=crowd)
    else:
        area = table.area.copy()
        area[0] = 1e4 if area[0] < 1024 else 1
        table = replace(table, area=area)
    with pytest.raises(AssertionError):
        assert_same(table, detections, summarized(evaluator))
    with pytest.raises(AssertionError):
        assert_same_per_class(table, detections, evaluator)


def test_fake_detections_of_cocoapi_score_as_published(assets):
    folder = assets / "cocoapi_eval"
    annotations = folder / "instances_val2014_100.json"
    results = folder / "instances_val2014_fakebbox100_results.json"
    table = read_coco(annotations)
    detections = read_coco_detections(results, table)
    metrics = coco_metrics(table, detections)
    assert tuple(round(value, 3) for value in metrics.as_dict().values()) == PUBLISHED
    # The results cover 99 of the 100 images; the last one has no detections, and counts.
    assert len(np.unique(detections.image_index)) == 99
    assert table.num_images == 100
    evaluator = pycocotools_evaluator(json.loads(annotations.read_text()), json.loads(results.read_text()), 100)
    assert_same(table, detections, summarized(evaluator))
    assert_same_per_class(table, detections, evaluator, ids="category_id")
    assert sum(row.num_boxes for row in metrics.per_class) == int((~table.crowd).sum())
    defined = [row.AP for row in metrics.per_class if row.num_boxes]
    assert abs(metrics.AP - np.mean(defined)) < EXACT


def detections_at(detections: Detections, rows: np.ndarray, image_index: np.ndarray | None = None) -> Detections:
    chosen = Detections(*(getattr(detections, name)[rows] for name in vars(detections)))
    return chosen if image_index is None else replace(chosen, image_index=image_index)


def test_per_class_rows_are_in_label_order_and_undefined_ones_stay_out(case):
    table, detections = case(5)
    metrics = coco_metrics(table, detections)
    assert [row.name for row in metrics.per_class] == ["cat", "dog", "owl", "never there"]
    assert metrics.per_class[3].num_boxes == 0
    assert metrics.per_class[3].AP == metrics.per_class[3].AR_max == -1
    assert abs(metrics.AP - np.mean([row.AP for row in metrics.per_class[:3]])) < EXACT
    for row, category in zip(metrics.per_class[:3], table.categories, strict=False):
        alone = table.select_classes([category.name])
        mine = detections.labels == category.label
        found = Detections(
            detections.image_index[mine],
            detections.boxes[mine],
            np.ones(mine.sum(), np.int64),
            detections.scores[mine],
        )
        assert abs(coco_metrics(alone, found).AP - row.AP) < EXACT


def test_no_detections_score_zero_and_no_ground_truth_is_undefined(case, no_detections):
    table, detections = case(5)
    assert coco_metrics(table, no_detections).AP == 0
    np.testing.assert_array_equal(
        list(coco_metrics(table, no_detections).as_dict().values()), summarized(evaluator_of(table, no_detections))
    )
    empty = replace(table, offsets=np.zeros_like(table.offsets), boxes_xywh=np.zeros((0, 4)))
    empty = replace(empty, **{name: getattr(table, name)[:0] for name in ("labels", "area", "crowd", "difficult")})
    for found in (detections, no_detections):
        assert set(coco_metrics(empty, found).as_dict().values()) == {-1.0}
    nothing = empty.select_images(np.zeros(0, np.int64))
    assert set(coco_metrics(nothing, no_detections).as_dict().values()) == {-1.0}


def test_difficult_objects_neither_help_nor_hurt(case):
    table, detections = case(2, integer=True)
    assert table.difficult.any()
    hard = np.flatnonzero(table.difficult)[:1]
    x, y, w, h = table.boxes_xywh[hard[0]]
    on_it = Detections(
        table.image_of_box()[hard], np.array([[x, y, x + w, y + h]]), table.labels[hard], np.array([2.0])
    )
    both = Detections(*(np.concatenate([getattr(on_it, k), getattr(detections, k)]) for k in vars(on_it)))
    # A confident detection of a difficult object would be the first false positive if it counted.
    missed = replace(table, difficult=np.zeros_like(table.difficult))
    assert coco_metrics(table, both).AR_max == coco_metrics(table, detections).AR_max
    assert sum(row.num_boxes for row in coco_metrics(table, both).per_class) == (~table.difficult).sum()
    assert coco_metrics(missed, detections).AR_max != coco_metrics(table, detections).AR_max


def test_annotation_id_zero_and_image_without_detections(case):
    # pycocotools reads a match with annotation id 0 as no match (cocoapi issue 507 and others).
    table, _ = case(5)
    x, y, w, h = table.boxes_xywh.T
    perfect = Detections(
        table.image_of_box(), np.stack([x, y, x + w, y + h], axis=1), table.labels, np.ones(table.num_boxes)
    )
    counted = ~table.crowd & (w > 0)
    table = replace(table, annotation_ids=np.arange(table.num_boxes))
    assert counted.sum() == (~table.crowd).sum()
    assert abs(coco_metrics(table, perfect).AP - 1) < EXACT
    first = table.image_of_box() != table.image_of_box()[0]
    fewer = Detections(*(getattr(perfect, name)[first] for name in vars(perfect)))
    assert coco_metrics(table, fewer).AR_max < 1


@pytest.mark.parametrize(
    ("image_ids", "category_ids", "first_annotation_id"),
    [([0, 1, 2], [0, 1], 1), ([2**53, 5, 2**62], [90, 2**40], 2**60), ([-7, 3, 0], [7, 2], -100)],
    ids=["zero", "huge", "negative"],
)
def test_files_with_odd_ids_and_areas_equal_pycocotools(image_ids, category_ids, first_annotation_id, tmp_path):
    """Areas that are not width x height decide small, medium and large; crowds may have none."""
    rng = np.random.default_rng(0)
    annotations = []
    for number in range(60):
        x, y, w, h = rng.integers(1, 60, 4).tolist()
        is_crowd = number % 7 == 0
        area = [0, w * h, 3 * w * h, 5.5, 32**2, 96**2, 1e9][rng.integers(7)]
        entry = {"image_id": image_ids[number % 3], "category_id": category_ids[number % 2], "bbox": [x, y, w, h]}
        annotations.append(entry | {"area": 0 if is_crowd else area, "iscrowd": int(is_crowd)})
    results = [
        {key: entry[key] for key in ("image_id", "category_id")}
        | {"bbox": (np.array(entry["bbox"]) + rng.integers(0, 6, 4)).tolist(), "score": round(float(score), 2)}
        for entry, score in zip(annotations * 2, rng.random(120), strict=True)
    ]
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 640, "height": 640} for n in image_ids],
        "categories": [{"id": n, "name": f"class {n}"} for n in category_ids],
        "annotations": [entry | {"id": first_annotation_id + n} for n, entry in enumerate(annotations)],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    table = read_coco(path)
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = read_coco_detections(tmp_path / "results.json", table)
    evaluator = pycocotools_evaluator(document, results, 100)
    stats = summarized(evaluator)
    assert 0 < stats[0] < 1
    assert (stats[3:6] > 0).all()
    assert_same(table, found, summarized(evaluator))
    assert_same_per_class(table, found, evaluator, ids="category_id")


def test_limit_of_detections_can_be_raised(case):
    table, detections = case(10)
    usual, more = coco_metrics(table, detections), coco_metrics(table, detections, max_detections=1000)
    assert "AR_1000" in more.as_dict()
    assert "AR_100" not in more.as_dict()
    assert more.AR_max >= usual.AR_max
    assert more.AR_10 == usual.AR_10
    ten, one = (coco_metrics(table, detections, max_detections=limit) for limit in (10, 1))
    assert ten.AR_max == ten.AR_10 == usual.AR_10
    assert one.AR_max == one.AR_1 == usual.AR_1
    assert one.AR_10 == usual.AR_10
    with pytest.raises(ValueError, match="max_detections: must be at least 1, got 0"):
        coco_metrics(table, detections, max_detections=0)


def test_some_of_the_images_and_one_of_them_twice(case):
    # As in a Subset or a bootstrap sample: an image that is drawn twice counts twice.
    table, detections = case(3)
    assert table.num_images > 3
    chosen = np.array([2, 0, 2])
    rows = [np.flatnonzero(detections.image_index == image) for image in chosen]
    image_index = np.repeat(np.arange(3), [len(part) for part in rows])
    found = detections_at(detections, np.concatenate(rows), image_index)
    metrics = coco_metrics(table.select_images(chosen), found)
    apart = replace(table.select_images(chosen), image_ids=np.array([8, 3, 11]))
    assert_same(apart, found, summarized(evaluator_of(apart, found)))
    assert metrics.AR_max == coco_metrics(apart, found).AR_max
    assert sum(row.num_boxes for row in metrics.per_class) == (~table.select_images(chosen).crowd).sum()


def test_file_without_area_and_iscrowd_equals_one_that_states_the_defaults(assets, tmp_path):
    folder = assets / "cocoapi_eval"
    data = json.loads((folder / "instances_val2014_100.json").read_text())
    for annotation in data["annotations"]:
        annotation["area"], annotation["iscrowd"] = annotation["bbox"][2] * annotation["bbox"][3], 0
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    stats = summarized(pycocotools_evaluator(json.loads(json.dumps(data)), results, 100))
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(data))
    table = read_coco(bare)
    assert_same(table, read_coco_detections(folder / "instances_val2014_fakebbox100_results.json", table), stats)


def test_nothing_is_printed(case, capsys):
    coco_metrics(*case(1))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


WORKER = """
import pickle, sys
import torch
import torch.distributed as dist
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.evaluation.detect import evaluate
from resdet.processes import Processes

class Noisy(torch.nn.Module):
    # Answers depend on the image alone: every process gets the same boxes for it.
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return [self.answer(image) for image in images]

    def answer(self, image):
        dataset = DATASET
        index = next(i for i in range(len(dataset)) if torch.equal(dataset[i][0].float() / 255, image))
        generator = torch.Generator().manual_seed(index)
        boxes = torch.from_numpy(dataset.table.boxes_in_image()[dataset.table.rows(index)]).float().repeat(3, 1)
        labels = torch.from_numpy(dataset.table.labels[dataset.table.rows(index)]).repeat(3)
        boxes += 5 * torch.randn(boxes.shape, generator=generator)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = torch.rand(len(labels), generator=generator).sort(descending=True).values
        return {"boxes": boxes, "labels": labels, "scores": scores}

DATASET = DetectionDataset(shapes_table(7, 96, 3), ShapesImages(image_size=96, seed=3), training=False)
dist.init_process_group("gloo")
result = evaluate(Noisy(), DATASET, team=Processes(dist.get_rank(), 2, torch.device("cpu")))
with open(f"{sys.argv[1]}/{dist.get_rank()}.pickle", "wb") as file:
    pickle.dump((DATASET.table, result), file)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_and_an_odd_number_of_images_equal_pycocotools(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, str(script), str(tmp_path)], check=True, env=environment)
    results = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    for table, evaluation in results:
        found = evaluation.detections
        assert table.num_images == 7
        np.testing.assert_array_equal(np.bincount(found.image_index), 3 * np.diff(table.offsets))
        stats = summarized(evaluator_of(table, found))
        np.testing.assert_allclose(list(evaluation.coco.as_dict().values()), stats, rtol=0, atol=EXACT)
        assert 0 < evaluation.coco.AP < 1
        twice = detections_at(found, np.repeat(np.arange(len(found)), 2))
        with pytest.raises(AssertionError):
            assert_same(table, twice, stats)


def test_detections_survive_writing_and_reading(case, tmp_path: Path):
    table, detections = case(7)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(detections_to_coco(table, detections)))
    read = read_coco_detections(path, table)
    np.testing.assert_array_equal(read.image_index, detections.image_index)
    np.testing.assert_array_equal(read.labels, detections.labels)
    np.testing.assert_array_equal(read.scores, detections.scores)
    # x2 goes through x + (x2 - x), rounded twice in float64.
    np.testing.assert_allclose(read.boxes, detections.boxes, rtol=0, atol=1e-12)


GOOD = {"image_id": 5, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "expected a list of detections, got dict"),
        (json.dumps([GOOD, {**GOOD, "image_id": 6}]), "entry 1: image_id 6 is not an image of case 1"),
        (json.dumps([{**GOOD, "image_id": "5"}]), "entry 0: image_id '5' is not an image"),
        (json.dumps([{**GOOD, "image_id": [5]}]), "is not an image"),
        (json.dumps([{**GOOD, "category_id": 8}]), r"category_id 8 is not a category of case 1, .*\[3, 7, 12, 90\]"),
        (json.dumps([{**GOOD, "category_id": True}]), "category_id True is not a category"),
        (json.dumps([{**GOOD, "bbox": [1, 2, 3]}]), "entry 0: expected image_id, category_id, bbox"),
        (json.dumps([{**GOOD, "score": None}]), "entry 0: expected image_id"),
        (json.dumps([{**GOOD, "score": float("nan")}]), "must be finite"),
        (json.dumps([1]), "entry 0: expected image_id"),
    ],
)
def test_bad_result_files_say_what_is_wrong(case, tmp_path, content, message):
    table, _ = case(1)
    table = replace(table, image_ids=np.array([5, *range(100, 99 + table.num_images)]))
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_coco_detections(path, table)
    assert str(path) in str(caught.value)


def test_missing_result_file(case, tmp_path):
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        read_coco_detections(tmp_path / "none.json", case(1)[0])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_index", 99, "image_index must be in 0..3 for case 1, got 99 in row 2"),
        ("image_index", -1, "image_index must be in 0..3"),
        ("labels", 0, "labels must be in 1..4 for case 1, got 0 in row 2"),
        ("labels", 5, "labels must be in 1..4"),
        ("scores", np.nan, "must be finite, got .* with score nan in image_id="),
        ("boxes", np.inf, "must be finite"),
    ],
)
def test_impossible_detections_are_refused(case, field, value, message):
    table, detections = case(1)
    values = getattr(detections, field).copy()
    values[2] = value
    with pytest.raises(DataError, match=message):
        coco_metrics(table, replace(detections, **{field: values}))
    with pytest.raises(DataError, match="expected image_index"):
        coco_metrics(table, replace(detections, scores=detections.scores[:-1]))
