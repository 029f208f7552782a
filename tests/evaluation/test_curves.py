import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest

from resdet.errors import DataError
from resdet.evaluation.coco import coco_metrics, detections_to_coco
from resdet.evaluation.curves import (
    RECALLS,
    BestF1,
    Curve,
    best_score_threshold,
    interpolated_precision,
    interpolated_precisions,
    precision_recall,
)
from resdet.evaluation.matching import COCO_IOU_THRESHOLDS, match

# Means are summed in another order, and precisions lack pycocotools' 2.2e-16.
EXACT = 1e-12


def curve(hits: list[int], scores: list[float] | None = None, num_boxes: int = 4) -> Curve:
    falling = np.linspace(0.9, 0.1, len(hits)) if scores is None else np.array(scores, dtype=np.float64)
    return Curve("cat", 0.5, num_boxes, np.array(hits, dtype=np.bool_), falling)


def test_points_by_hand():
    points = curve([1, 0, 1, 0])
    np.testing.assert_allclose(points.precision, [1, 1 / 2, 2 / 3, 1 / 2])
    np.testing.assert_allclose(points.recall, [1 / 4, 1 / 4, 1 / 2, 1 / 2])
    precision, scores = points.interpolated()
    # Recalls 0..0.25, then to 0.5, and no further.
    np.testing.assert_allclose(precision, [1] * 26 + [2 / 3] * 25 + [0] * 50)
    np.testing.assert_array_equal(scores, [points.scores[0]] * 26 + [points.scores[2]] * 25 + [np.nan] * 50)
    expected = pytest.approx((26 + 25 * 2 / 3) / 101)
    assert expected == points.AP
    assert expected == interpolated_precision(points.hits, 4).mean()


def pycocotools_arrays(table, detections) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    image_ids = table.image_ids[table.image_of_box()]
    category_id = {category.label: category.category_id for category in table.categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": int(i)} for i in table.image_ids],
            "categories": [{"id": category.category_id} for category in table.categories],
            "annotations": [
                {
                    "id": row + 1,
                    "image_id": int(image_ids[row]),
                    "category_id": category_id[int(table.labels[row])],
                    "bbox": table.boxes_xywh[row].tolist(),
                    "area": float(table.area[row]),
                    "iscrowd": int(table.crowd[row]),
                }
                for row in range(table.num_boxes)
            ],
        }
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(detections_to_coco(table, detections)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    column = [evaluator.params.catIds.index(category.category_id) for category in table.categories]
    return evaluator.eval["precision"][:, :, column, 0, -1], evaluator.eval["scores"][:, :, column, 0, -1]


def assert_same_curves(table, detections, precision: np.ndarray, scores: np.ndarray) -> None:
    curves = precision_recall(table, detections)
    for t in range(10):
        for k, points in enumerate(curves.per_class[t]):
            mine, my_scores = points.interpolated()
            np.testing.assert_allclose(mine, precision[t, :, k], rtol=0, atol=EXACT)
            # At recall 0 pycocotools gives the score of the first detection, hit or not.
            reached = np.flatnonzero(~np.isnan(my_scores))[1:]
            np.testing.assert_array_equal(my_scores[reached], scores[t, reached, k])
            assert (mine[np.isnan(my_scores)] <= 0).all()


@pytest.mark.parametrize("seed", range(1, 9))
def test_curves_are_those_of_pycocotools(case, seed):
    table, detections = case(seed)
    precision, scores = pycocotools_arrays(table, detections)
    assert_same_curves(table, detections, precision, scores)
    matches = match(table, detections, iou_thresholds=[0.5])
    changed = detections.scores.copy()
    changed[matches.detection[matches.hits[0]][0]] = -1
    other = replace(detections, scores=changed)
    with pytest.raises(AssertionError):
        assert_same_curves(table, other, precision, scores)


@pytest.mark.parametrize("max_detections", [3, 100])
def test_ap_of_the_metrics_is_the_mean_over_curves(case, max_detections):
    table, detections = case(10)
    metrics = coco_metrics(table, detections, max_detections=max_detections)
    curves = precision_recall(table, detections, max_detections=max_detections)
    assert curves.iou_thresholds == COCO_IOU_THRESHOLDS
    for k, row in enumerate(metrics.per_class):
        assert row.name == curves.per_class[0][k].name
        assert row.num_boxes == curves.per_class[0][k].num_boxes
        assert abs(row.AP - np.mean([curves.per_class[t][k].AP for t in range(10)])) < EXACT
        assert abs(row.AP50 - curves.per_class[0][k].AP) < EXACT


def test_pooled_is_all_classes_on_one_scale(case):
    table, detections = case(3)
    curves = precision_recall(table, detections, iou_thresholds=[0.5])
    pooled = curves.pooled[0]
    assert pooled.name == "all"
    assert pooled.num_boxes == (~table.crowd).sum()
    assert pooled.hits.sum() == sum(points.hits.sum() for points in curves.per_class[0])
    # The class without ground truth has detections, and they are false positives here.
    assert len(curves.per_class[0][3].hits) > 0
    assert len(pooled.hits) == sum(len(points.hits) for points in curves.per_class[0])
    assert (np.diff(pooled.scores) <= 0).all()


def best_by_trying_all(points: Curve) -> tuple[float, float]:
    tried = []
    for threshold in np.unique(points.scores):
        kept = points.scores >= threshold
        hits = np.count_nonzero(points.hits[kept])
        precision, recall = hits / kept.sum(), hits / points.num_boxes
        tried.append((2 * precision * recall / (precision + recall) if hits else 0.0, threshold))
    best = max(f1 for f1, _ in tried)
    return best, max(threshold for f1, threshold in tried if f1 > best - EXACT)


@pytest.mark.parametrize("seed", range(1, 13))
def test_best_f1_is_the_best_of_all_thresholds(case, seed):
    curves = precision_recall(*case(seed), iou_thresholds=[0.5])
    for points in (*curves.per_class[0], *curves.pooled):
        if points.hits.any() and points.num_boxes:
            best = points.best_f1()
            assert (best.f1, best.threshold) == pytest.approx(best_by_trying_all(points), abs=EXACT)
            assert best.f1 == pytest.approx(2 / (1 / best.precision + 1 / best.recall))
            kept = points.scores >= best.threshold
            assert best.recall == points.hits[kept].sum() / points.num_boxes


def test_best_f1_by_hand():
    # F1 of the best 1, 2, 3, 4: 2/5, 2/6, 4/7, 4/8.
    best = curve([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6]).best_f1()
    assert best == BestF1(pytest.approx(4 / 7), 0.7, pytest.approx(2 / 3), 0.5)
    # Of equal F1 (2/3 twice) the higher threshold, which shows fewer boxes.
    assert curve([1, 0, 0, 1], [0.9, 0.8, 0.7, 0.6], num_boxes=2).best_f1().threshold == 0.9
    # A threshold cannot separate equal scores: all three are kept, or none.
    assert curve([1, 0, 0], [0.5, 0.5, 0.5], num_boxes=1).best_f1() == BestF1(0.5, 0.5, pytest.approx(1 / 3), 1.0)


def test_many_curves_at_once_equal_each_alone():
    rng = np.random.default_rng(0)
    for num_hits, num_boxes in ((0, 3), (1, 1), (5, 9), (60, 70), (300, 200)):
        orders = [rng.permutation([True] * num_hits + [False] * 200) for _ in range(4)]
        together = interpolated_precisions(np.array([np.flatnonzero(hits) + 1 for hits in orders]), num_boxes)
        assert together.tobytes() == np.array([interpolated_precision(hits, num_boxes) for hits in orders]).tobytes()
        # By definition: the best precision at this recall or a higher one.
        for hits, row in zip(orders, together, strict=True):
            precision, recall = np.cumsum(hits) / np.arange(1, len(hits) + 1), np.cumsum(hits) / num_boxes
            assert row.tolist() == [max(precision[recall >= r], default=0.0) for r in RECALLS]


def test_best_score_threshold_is_the_pooled_curves_at_iou_one_half(case, no_detections):
    table, detections = case(3)
    best = best_score_threshold(table, detections)
    assert best == precision_recall(table, detections, iou_thresholds=[0.75, 0.5]).pooled[1].best_f1().threshold
    assert best in detections.scores
    assert best != precision_recall(table, detections, iou_thresholds=[0.95]).pooled[0].best_f1().threshold
    assert best_score_threshold(table, no_detections) is None


def test_without_hits_or_ground_truth_or_detections():
    assert curve([0, 0]).best_f1() == curve([]).best_f1() == BestF1(0.0, None, 0.0, 0.0)
    assert curve([0, 0]).AP == curve([]).AP == 0
    for nothing_there in (curve([0, 0], num_boxes=0), curve([], num_boxes=0)):
        assert nothing_there.best_f1() == BestF1(-1.0, None, -1.0, -1.0)
        assert nothing_there.AP == -1
        assert (nothing_there.recall == -1).all()
        precision, scores = nothing_there.interpolated()
        assert (precision == -1).all()
        assert np.isnan(scores).all()
    assert curve([]).precision.shape == curve([]).recall.shape == (0,)


def test_empty_data_gives_curves_without_points(case, no_detections):
    table, detections = case(5)
    for points in precision_recall(table, no_detections).per_class[0]:
        expected = 0 if points.num_boxes else -1
        assert expected == points.AP
    empty = table.select_images(np.zeros(0, np.int64))
    curves = precision_recall(empty, no_detections, iou_thresholds=[0.5, 0.75])
    assert [points.AP for points in curves.pooled] == [-1, -1]
    with pytest.raises(DataError, match="labels must be in"):
        precision_recall(table, replace(detections, labels=detections.labels + 9))
    with pytest.raises(ValueError, match="iou_thresholds"):
        precision_recall(table, detections, iou_thresholds=[2])


def test_recalls_are_pycocotools_own():
    from pycocotools.cocoeval import Params

    np.testing.assert_array_equal(RECALLS, Params("bbox").recThrs)
