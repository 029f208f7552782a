import time
from dataclasses import replace

import numpy as np
import pytest

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError
from resdet.evaluation.voc import voc_metrics
from resdet.types import Category, Detections

# Sums are taken in another order than in the development kit.
ROUNDING = 1e-12


def table_of(boxes: list[list[float]], labels: list[int] | None = None, difficult: list[int] = ()) -> AnnotationTable:
    """Return one image of 100 x 100; boxes as x1, y1, x2, y2."""
    num = len(boxes)
    xyxy = np.array(boxes, dtype=np.float64).reshape(num, 4)
    return AnnotationTable(
        name="one image",
        categories=(Category(1, 1, "cat"), Category(2, 2, "dog")),
        image_ids=np.array([1]),
        file_names=np.array(["1.jpg"]),
        sizes=np.array([[100, 100]], dtype=np.int32),
        offsets=np.array([0, num]),
        boxes_xywh=np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1),
        labels=np.array(labels or [1] * num, dtype=np.int64),
        area=np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1),
        crowd=np.zeros(num, dtype=np.bool_),
        difficult=np.isin(np.arange(num), difficult),
        annotation_ids=np.arange(num),
    )


def found(rows: list[tuple[list[float], float]], label: int = 1) -> Detections:
    return Detections(
        image_index=np.zeros(len(rows), dtype=np.int64),
        boxes=np.array([box for box, _ in rows], dtype=np.float64).reshape(-1, 4),
        labels=np.full(len(rows), label, dtype=np.int64),
        scores=np.array([score for _, score in rows], dtype=np.float64),
    )


A, B, ELSEWHERE = [0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]


def cat(table: AnnotationTable, detections: Detections) -> tuple[float, float]:
    row = voc_metrics(table, detections).per_class[0]
    return row.AP, row.AP_11point


def test_one_of_two_found():
    # Precision 1 up to recall 1/2: area 1/2; recalls 0, .1, ..., .5 of eleven.
    assert cat(table_of([A, B]), found([(A, 0.9)])) == pytest.approx((1 / 2, 6 / 11))


def test_false_positive_between_two_hits():
    # Precision 1 at recall 1/2, then 2/3 at recall 1.
    detections = found([(A, 0.9), (ELSEWHERE, 0.8), (B, 0.7)])
    assert cat(table_of([A, B]), detections) == pytest.approx((0.5 + 0.5 * 2 / 3, (6 + 5 * 2 / 3) / 11))


def test_duplicate_is_a_false_positive():
    # As above, with the second detection of A in place of the one elsewhere.
    detections = found([(A, 0.9), (A, 0.8), (B, 0.7)])
    assert cat(table_of([A, B]), detections) == pytest.approx((0.5 + 0.5 * 2 / 3, (6 + 5 * 2 / 3) / 11))


def test_a_taken_box_is_not_exchanged_for_a_free_one():
    # Both detections overlap the first box most. The second would also match the other box (IoU 2/3), as COCO's rule
    # would let it; the kit calls it a false positive.
    boxes = [[0, 0, 10, 10], [2, 0, 12, 10]]
    detections = found([([0, 0, 10, 10], 0.9), ([0, 0, 10.5, 10], 0.8)])
    assert cat(table_of(boxes), detections) == pytest.approx((1 / 2, 6 / 11))


def test_difficult_object_is_neither_hit_nor_miss():
    table = table_of([A, B], difficult=[1])
    assert cat(table, found([(A, 0.9)])) == (1, 1)
    assert cat(table, found([(B, 0.95), (B, 0.93), (A, 0.9)])) == (1, 1)
    assert cat(table, found([(ELSEWHERE, 0.95), (A, 0.9)])) == (0.5, 0.5)
    assert voc_metrics(table, found([(A, 0.9)])).per_class[0].num_boxes == 1


def test_iou_equal_to_the_threshold_matches():
    half = [0, 0, 10, 5]
    assert cat(table_of([A]), found([(half, 0.9)])) == (1, 1)
    assert cat(table_of([A]), found([([0, 0, 10, 4.999], 0.9)])) == (0, 0)


def test_hand_computed_at_other_thresholds():
    # IoU with A: 0.8 and 0.6. At 0.7 only the first hits, at 0.5 it takes A and the second is its duplicate.
    good, fair = [0, 0, 10, 8], [0, 0, 10, 6]
    table, detections = table_of([A, B]), found([(fair, 0.9), (good, 0.8), (B, 0.7)])

    def at(threshold: float) -> tuple[float, float]:
        row = voc_metrics(table, detections, iou_threshold=threshold).per_class[0]
        return row.AP, row.AP_11point

    assert at(0.5) == at(0.6) == pytest.approx((1 / 2 * 1 + 1 / 2 * 2 / 3, (6 * 1 + 5 * 2 / 3) / 11))
    # Miss, hit, hit: precision 0, 1/2, 2/3; the best from any recall on is 2/3.
    assert at(0.7) == at(0.8) == pytest.approx((2 / 3, 2 / 3))
    # Miss, miss, hit: one of two found at precision 1/3.
    assert at(0.9) == at(1) == pytest.approx((1 / 2 * 1 / 3, 6 / 11 * 1 / 3))


def test_crowd_region_is_measured_by_iou_and_does_not_count():
    table = replace(table_of([A, [20, 0, 40, 20]]), crowd=np.array([False, True]))
    inside, like_it = [20, 0, 30, 10], [20, 0, 40, 18]
    assert cat(table, found([(like_it, 0.95), (A, 0.9)])) == (1, 1)
    assert cat(table, found([(inside, 0.95), (A, 0.9)])) == (0.5, 0.5)


def test_equal_scores_keep_their_order():
    right_first, wrong_first = found([(A, 0.5), (ELSEWHERE, 0.5)]), found([(ELSEWHERE, 0.5), (A, 0.5)])
    assert cat(table_of([A]), right_first) == (1, 1)
    assert cat(table_of([A]), wrong_first) == (0.5, 0.5)


def test_recall_of_three_tenths_is_reached_by_three_of_ten():
    boxes = [[10 * i, 0, 10 * i + 9, 9] for i in range(10)]
    detections = found([(boxes[i], 0.9 - i / 10) for i in range(3)])
    assert cat(table_of(boxes), detections)[1] == pytest.approx(4 / 11)


def test_classes_without_ground_truth_stay_out_of_the_mean(no_detections):
    metrics = voc_metrics(table_of([A]), found([(A, 0.9)]))
    assert metrics.as_dict() == {"voc_AP50": 1.0, "voc_AP50_11point": 1.0}
    assert metrics.per_class[1].AP == metrics.per_class[1].AP_11point == -1
    # A detection of a class without ground truth costs nothing; the one of the other class finds no box here.
    assert voc_metrics(table_of([A]), found([(A, 0.9)], label=2)).AP == 0
    assert voc_metrics(table_of([A]), no_detections).AP == 0
    assert voc_metrics(table_of([]), found([(A, 0.9)])).AP == -1
    assert voc_metrics(table_of([A], difficult=[0]), found([(A, 0.9)])).AP == -1
    assert voc_metrics(table_of([]), no_detections).AP_11point == -1


def test_threshold_is_in_the_name_and_checked(no_detections):
    assert "voc_AP55" in voc_metrics(table_of([A]), no_detections, iou_threshold=0.55).as_dict()
    for threshold in (0, 1.5):
        with pytest.raises(ValueError, match="iou_threshold"):
            voc_metrics(table_of([A]), no_detections, iou_threshold=threshold)
    with pytest.raises(DataError, match=r"labels must be in 1\.\.2"):
        voc_metrics(table_of([A]), found([(A, 0.9)], label=3))


def devkit_ap(table: AnnotationTable, detections: Detections, label: int) -> tuple[float, float]:
    """Compute what VOCevaldet.m and VOCap.m do, line by line: 1-based inclusive integer corners, "+ 1", box by box."""
    image_of_box = table.image_of_box()
    truth = {}
    npos = 0
    for image in range(table.num_images):
        rows = [r for r in range(table.num_boxes) if image_of_box[r] == image and table.labels[r] == label]
        corners = [
            (x + 1, y + 1, x + w, y + h) for x, y, w, h in (table.boxes_xywh[r].astype(int).tolist() for r in rows)
        ]
        truth[image] = corners, [bool(table.difficult[r]) for r in rows], [False] * len(rows)
        npos += sum(not table.difficult[r] for r in rows)
    if npos == 0:
        return -1, -1
    rows = [r for r in range(len(detections)) if detections.labels[r] == label]
    rows.sort(key=lambda r: -detections.scores[r])
    tp, fp = [], []
    for r in rows:
        x1, y1, x2, y2 = detections.boxes[r].astype(int).tolist()
        bb = (x1 + 1, y1 + 1, x2, y2)
        corners, difficult, taken = truth[detections.image_index[r]]
        ovmax, jmax = -np.inf, -1
        for j, gt in enumerate(corners):
            bi = max(bb[0], gt[0]), max(bb[1], gt[1]), min(bb[2], gt[2]), min(bb[3], gt[3])
            iw, ih = bi[2] - bi[0] + 1, bi[3] - bi[1] + 1
            if iw > 0 and ih > 0:
                ua = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1) + (gt[2] - gt[0] + 1) * (gt[3] - gt[1] + 1) - iw * ih
                if iw * ih / ua > ovmax:
                    ovmax, jmax = iw * ih / ua, j
        hit = miss = 0
        if ovmax >= 0.5:
            if not difficult[jmax]:
                hit, miss = (0, 1) if taken[jmax] else (1, 0)
                taken[jmax] = True
        else:
            miss = 1
        tp.append(hit)
        fp.append(miss)
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    recall = [t / npos for t in tp]
    precision = [t / (t + f) if t + f else 0.0 for t, f in zip(tp, fp, strict=True)]
    eleven = sum(max((p for r, p in zip(recall, precision, strict=True) if r >= k / 10), default=0) for k in range(11))
    mrec, mpre = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in reversed(range(len(mpre) - 1)):
        mpre[i] = max(mpre[i], mpre[i + 1])
    area = sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)) if mrec[i] != mrec[i - 1])
    return area, eleven / 11


def assert_same(table: AnnotationTable, detections: Detections, expected: np.ndarray) -> None:
    metrics = voc_metrics(table, detections)
    rows = np.array([[row.AP, row.AP_11point] for row in metrics.per_class])
    np.testing.assert_allclose(rows, expected, rtol=0, atol=ROUNDING)
    defined = expected[expected[:, 0] >= 0]
    if len(defined):
        np.testing.assert_allclose([metrics.AP, metrics.AP_11point], defined.mean(axis=0), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_development_kit(case, seed):
    table, detections = case(seed, integer=True)
    assert_same(table, detections, np.array([devkit_ap(table, detections, label) for label in range(1, 5)]))


@pytest.mark.parametrize("perturb", ["score", "box", "difficult"])
def test_equality_notices_one_changed_value(case, perturb):
    table, detections = case(3, integer=True)
    expected = np.array([devkit_ap(table, detections, label) for label in range(1, 5)])
    assert_same(table, detections, expected)
    if perturb == "score":
        scores = detections.scores.copy()
        scores[np.argmax(scores)] = 0
        detections = replace(detections, scores=scores)
    elif perturb == "box":
        boxes_xywh = table.boxes_xywh.copy()
        boxes_xywh[0, 0] += 900
        table = replace(table, boxes_xywh=boxes_xywh)
    else:
        difficult = table.difficult.copy()
        difficult[0] = ~difficult[0]
        table = replace(table, difficult=difficult)
    with pytest.raises(AssertionError):
        assert_same(table, detections, expected)


def test_voc2007_size_takes_seconds():
    rng = np.random.default_rng(0)
    num_images, num_boxes, num_found = 4952, 14976, 495_200
    table = replace(
        table_of([]),
        image_ids=np.arange(num_images),
        offsets=np.linspace(0, num_boxes, num_images + 1).astype(np.int64),
        boxes_xywh=rng.uniform(1, 300, (num_boxes, 4)),
        labels=rng.integers(1, 3, num_boxes),
        crowd=np.zeros(num_boxes, np.bool_),
        difficult=rng.random(num_boxes) < 0.2,
        sizes=np.full((num_images, 2), 500, np.int32),
        file_names=np.array([""] * num_images),
    )
    corners = rng.uniform(0, 300, (num_found, 2))
    detections = Detections(
        rng.integers(0, num_images, num_found),
        np.concatenate([corners, corners + rng.uniform(1, 200, (num_found, 2))], axis=1),
        rng.integers(1, 3, num_found),
        rng.random(num_found),
    )
    start = time.process_time()
    voc_metrics(table, detections)
    assert time.process_time() - start < 10
