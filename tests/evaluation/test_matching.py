import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError
from resdet.evaluation import matching
from resdet.evaluation.matching import AREA_RANGES, COCO_IOU_THRESHOLDS, Matches, match, match_areas, overlaps, to_xywh
from resdet.types import Category, Detections


def pycocotools_images(table: AnnotationTable, detections: Detections) -> list[dict]:
    """Return COCOeval's own record per class, size and image; ids are rows + 1."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    image_of_box = table.image_of_box()
    truth, found = COCO(), COCO()
    frame = {
        "images": [{"id": int(i)} for i in table.image_ids],
        "categories": [{"id": category.label} for category in table.categories],
    }
    truth.dataset = frame | {
        "annotations": [
            {
                "id": row + 1,
                "image_id": int(table.image_ids[image_of_box[row]]),
                "category_id": int(table.labels[row]),
                "bbox": table.boxes_xywh[row].tolist(),
                "area": float(table.area[row]),
                "iscrowd": int(table.crowd[row]),
            }
            for row in range(table.num_boxes)
        ]
    }
    xywh = to_xywh(detections.boxes)
    found.dataset = frame | {
        "annotations": [
            {
                "id": row + 1,
                "image_id": int(table.image_ids[detections.image_index[row]]),
                "category_id": int(detections.labels[row]),
                "bbox": xywh[row].tolist(),
                "area": float(xywh[row, 2] * xywh[row, 3]),
                "score": float(detections.scores[row]),
            }
            for row in range(len(detections))
        ]
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.evaluate()
    return [record for record in evaluator.evalImgs if record is not None]


def assert_same(matches: Matches, records: list[dict]) -> None:
    """Compare every detection and every box with COCOeval's record, at every threshold."""
    column = {int(row): column for column, row in enumerate(matches.detection)}
    seen_detections, seen_boxes = 0, 0
    for record in records:
        columns = [column[row - 1] for row in record["dtIds"]]
        np.testing.assert_array_equal(matches.box[:, columns] + 1, record["dtMatches"])
        np.testing.assert_array_equal(matches.ignored[:, columns], record["dtIgnore"])
        np.testing.assert_array_equal(matches.rank[columns], np.arange(len(columns)))
        rows = np.array(record["gtIds"], dtype=np.int64) - 1
        np.testing.assert_array_equal(matches.box_ignored[rows], record["gtIgnore"])
        np.testing.assert_array_equal(matches.detection_of_box[:, rows] + 1, record["gtMatches"])
        seen_detections += len(columns)
        seen_boxes += len(rows)
    assert (seen_detections, seen_boxes) == (matches.box.shape[1], matches.detection_of_box.shape[1])


@pytest.mark.parametrize("seed", range(20))
def test_every_match_is_that_of_pycocotools(case, seed):
    table, detections = case(seed)
    records = pycocotools_images(table, detections)
    for area_range, matches in zip(AREA_RANGES.values(), match_areas(table, detections), strict=True):
        of_area = [record for record in records if tuple(record["aRng"]) == area_range]
        assert_same(matches, of_area)
        alone = match(table, detections, area_range=area_range)
        for name in vars(matches):
            np.testing.assert_array_equal(getattr(alone, name), getattr(matches, name))


@pytest.mark.parametrize("perturb", ["box", "crowd", "score"])
def test_equality_notices_one_changed_value(case, perturb):
    table, detections = case(3)
    records = [record for record in pycocotools_images(table, detections) if record["aRng"] == [0, 1e10]]
    assert_same(match(table, detections), records)
    if perturb == "box":
        boxes_xywh = table.boxes_xywh.copy()
        boxes_xywh[match(table, detections).box.max()] += 700
        table = replace(table, boxes_xywh=boxes_xywh)
    elif perturb == "crowd":
        table = replace(table, crowd=~table.crowd)
    else:
        detections = replace(detections, scores=-detections.scores)
    with pytest.raises(AssertionError):
        assert_same(match(table, detections), records)


@pytest.mark.parametrize("seed", [2, 3, 6])
def test_overlaps_are_those_of_pycocotools_to_the_bit(case, seed, monkeypatch):
    from pycocotools import mask

    table, detections = case(seed)
    xywh = to_xywh(detections.boxes)
    for same_class in (True, False):
        pairs = overlaps(table, detections, same_class=same_class)
        iou = np.zeros((len(detections), table.num_boxes))
        for image in range(table.num_images):
            found = np.flatnonzero(detections.image_index == image)
            rows = np.arange(table.num_boxes)[table.rows(image)]
            if found.size and rows.size:
                iou[np.ix_(found, rows)] = mask.iou(xywh[found], table.boxes_xywh[rows], table.crowd[rows].tolist())
        if same_class:
            iou *= detections.labels[:, None] == table.labels
        detection, box = np.nonzero(iou)
        np.testing.assert_array_equal(pairs.detection, detection)
        np.testing.assert_array_equal(pairs.box, box)
        np.testing.assert_array_equal(pairs.iou, iou[detection, box])
        some = overlaps(table, detections, same_class=same_class, min_iou=0.3)
        np.testing.assert_array_equal(some.iou, pairs.iou[pairs.iou >= 0.3])
        # In several chunks, as for large data.
        with monkeypatch.context() as patch:
            patch.setattr(matching, "_PAIRS_AT_ONCE", 7)
            pieces = overlaps(table, detections, same_class=same_class)
        for name in vars(pairs):
            np.testing.assert_array_equal(getattr(pieces, name), getattr(pairs, name))


def one_image(boxes: list[list[float]], **flags: list[int]) -> AnnotationTable:
    num = len(boxes)
    boxes_xywh = np.array(boxes, dtype=np.float64).reshape(num, 4)
    return AnnotationTable(
        name="one image",
        categories=(Category(1, 1, "cat"),),
        image_ids=np.array([1]),
        file_names=np.array(["1.jpg"]),
        sizes=np.array([[100, 100]], dtype=np.int32),
        offsets=np.array([0, num]),
        boxes_xywh=boxes_xywh,
        labels=np.ones(num, dtype=np.int64),
        area=np.prod(boxes_xywh[:, 2:], axis=1),
        crowd=np.isin(np.arange(num), flags.get("crowd", [])),
        difficult=np.isin(np.arange(num), flags.get("difficult", [])),
        annotation_ids=np.zeros(num, dtype=np.int64),
    )


def found(boxes: list[list[float]], scores: list[float] | None = None) -> Detections:
    xywh = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    num = len(xywh)
    return Detections(
        np.zeros(num, dtype=np.int64),
        np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        np.ones(num, dtype=np.int64),
        np.linspace(0.9, 0.1, num) if scores is None else np.array(scores),
    )


A = [0, 0, 10, 10]


def outcome(table: AnnotationTable, detections: Detections, **options) -> tuple[list[int], list[bool]]:
    matches = match(table, detections, **{"iou_thresholds": [0.5], **options})
    back = np.argsort(matches.detection)
    return matches.box[0, back].tolist(), matches.ignored[0, back].tolist()


def test_of_equal_overlaps_the_later_box_and_then_the_other():
    assert outcome(one_image([A, A]), found([A, A, A])) == ([1, 0, -1], [False, False, False])


def test_a_box_that_counts_goes_before_a_better_ignored_one():
    table = one_image([A, [0, 0, 10, 8]], difficult=[0])
    assert outcome(table, found([A, A, A])) == ([1, 0, -1], [False, True, False])


def test_a_crowd_region_takes_any_number():
    table = one_image([[0, 0, 100, 100]], crowd=[0])
    assert outcome(table, found([A, A, A])) == ([0, 0, 0], [True] * 3)
    assert match(table, found([A, A, A])).detection_of_box[0].tolist() == [2]
    # By its share inside, not by IoU: half of this detection lies outside.
    assert outcome(table, found([[-5, 0, 10, 10]]))[0] == [0]
    assert outcome(table, found([[-5.1, 0, 10, 10]]))[0] == [-1]


def test_outside_of_the_area_range_nothing_counts():
    table = one_image([A, [50, 50, 20, 20]])
    detections = found([A, [80, 80, 5, 5], [80, 0, 20, 20]])
    assert outcome(table, detections, area_range=(200, 1e10)) == ([0, -1, -1], [True, True, False])
    matches = match(table, detections, area_range=(200, 1e10))
    assert matches.box_ignored.tolist() == [True, False]
    assert matches.num_boxes.tolist() == [0, 1]
    # Both ends are included in the range.
    assert match(table, detections, area_range=(100, 400)).box_ignored.tolist() == [False, False]


def test_the_limit_is_per_image_and_by_score():
    detections = found([A, A, A], scores=[0.1, 0.9, 0.5])
    matches = match(one_image([A]), detections, max_detections=2)
    assert matches.detection.tolist() == [1, 2]
    assert matches.rank.tolist() == [0, 1]
    assert matches.hits[0].tolist() == [True, False]
    assert matches.of_label(1) == slice(0, 2)


def test_threshold_one_is_reached_by_the_same_box():
    third = [0.1, 0.2, 1 / 3, 0.7]
    assert outcome(one_image([third]), found([third]), iou_thresholds=[1])[0] == [0]


def test_nothing_to_match(case, no_detections):
    table, detections = case(3)
    matches = match(table, no_detections)
    assert matches.box.shape == matches.ignored.shape == (10, 0)
    assert (matches.detection_of_box == -1).all()
    empty = table.select_images(np.zeros(0, np.int64))
    assert match(empty, no_detections).detection_of_box.shape == (10, 0)
    bare = replace(one_image([]), categories=table.categories)
    first = Detections(*(getattr(detections, name)[detections.image_index == 0] for name in vars(detections)))
    assert (match(bare, first).box == -1).all()
    assert not match(bare, first).ignored.any()


def test_invalid_options_and_detections_are_refused():
    table, detections = one_image([A]), found([A])
    for thresholds in ([], [0], [0.5, 1.1], [[0.5]]):
        with pytest.raises(ValueError, match=r"iou_thresholds: must be one or more numbers in \(0, 1\]"):
            match(table, detections, iou_thresholds=thresholds)
    with pytest.raises(ValueError, match="max_detections: must be at least 1, got 0"):
        match(table, detections, max_detections=0)
    wrong = replace(detections, labels=np.array([2]))
    for function in (match, overlaps):
        with pytest.raises(DataError, match=r"labels must be in 1\.\.1 for one image, got 2"):
            function(table, wrong)


def test_thresholds_are_pycocotools_own():
    from pycocotools.cocoeval import Params

    params = Params("bbox")
    assert list(COCO_IOU_THRESHOLDS) == params.iouThrs.tolist()
    assert [list(area_range) for area_range in AREA_RANGES.values()] == params.areaRng
    assert list(AREA_RANGES) == params.areaRngLbl
