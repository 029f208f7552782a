from dataclasses import replace

import numpy as np
import pytest

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError
from resdet.evaluation.confusion import confusion_matrix
from resdet.types import Category, Detections

A, B, ELSEWHERE = [0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]
CAT, DOG = 1, 2


def table_of(*boxes: tuple[list[float], int], **flags: list[bool]) -> AnnotationTable:
    """Return one image; boxes as x1, y1, x2, y2 with their label."""
    num = len(boxes)
    xyxy = np.array([box for box, _ in boxes], dtype=np.float64).reshape(num, 4)
    no = np.zeros(num, dtype=np.bool_)
    return AnnotationTable(
        name="one image",
        categories=(Category(1, 7, "cat"), Category(2, 3, "dog")),
        image_ids=np.array([1]),
        file_names=np.array(["1.jpg"]),
        sizes=np.array([[100, 100]], dtype=np.int32),
        offsets=np.array([0, num]),
        boxes_xywh=np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1),
        labels=np.array([label for _, label in boxes], dtype=np.int64),
        area=np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1),
        crowd=np.array(flags.get("crowd", no)),
        difficult=np.array(flags.get("difficult", no)),
        annotation_ids=np.arange(num),
    )


def found(*rows: tuple[list[float], int, float]) -> Detections:
    return Detections(
        image_index=np.zeros(len(rows), dtype=np.int64),
        boxes=np.array([box for box, _, _ in rows], dtype=np.float64).reshape(-1, 4),
        labels=np.array([label for _, label, _ in rows], dtype=np.int64),
        scores=np.array([score for _, _, score in rows], dtype=np.float64),
    )


def counts(table: AnnotationTable, detections: Detections, **options: float) -> list[list[int]]:
    return confusion_matrix(table, detections, **{"score_threshold": 0.5, **options}).counts.tolist()


def test_each_cell_by_hand():
    table = table_of((A, CAT), (B, DOG), ([20, 20, 30, 30], DOG))
    detections = found((A, CAT, 0.9), (B, CAT, 0.8), (ELSEWHERE, DOG, 0.7), (A, CAT, 0.6), (ELSEWHERE, CAT, 0.4))
    matrix = confusion_matrix(table, detections, score_threshold=0.5)
    assert matrix.names == ("background", "cat", "dog")
    # Background: a duplicate cat, and a dog that is not there. The cat is found; one dog is a cat, one is not found.
    assert matrix.counts.tolist() == [[0, 1, 1], [0, 1, 0], [1, 1, 0]]
    assert matrix.normalised().tolist() == [[0, 0.5, 0.5], [0, 1, 0], [0.5, 0.5, 0]]


def test_thresholds_are_reached_by_equality():
    half = [0, 0, 10, 5]
    assert counts(table_of((A, CAT)), found((half, CAT, 0.5))) == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert counts(table_of((A, CAT)), found((half, CAT, 0.499))) == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert counts(table_of((A, CAT)), found((half, CAT, 0.5)), iou_threshold=0.51) == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_the_better_score_goes_first_and_takes_the_best_box_of_any_class():
    shifted = [0, 0, 10, 9]
    table = table_of((A, CAT))
    # The dog overlaps more, the cat has the higher score.
    assert counts(table, found((A, DOG, 0.6), (shifted, CAT, 0.7))) == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert counts(table, found((A, DOG, 0.8), (shifted, CAT, 0.7))) == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    # The best box is of another class; the next one is taken only once that is gone.
    table = table_of((A, DOG), ([0, 0, 10, 8], CAT))
    assert counts(table, found((shifted, CAT, 0.9))) == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert counts(table, found((A, DOG, 0.95), (shifted, CAT, 0.9))) == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_of_equal_overlaps_the_own_class_is_taken():
    table = table_of((A, CAT), (A, DOG))
    assert counts(table, found((A, DOG, 0.9), (A, CAT, 0.8))) == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("flag", ["crowd", "difficult"])
def test_ignored_boxes_and_detections_on_them_are_not_counted(flag):
    table = table_of((A, CAT), (B, CAT), **{flag: [True, False]})
    detections = found((A, CAT, 0.9), (A, DOG, 0.8), (B, CAT, 0.7))
    assert counts(table, detections) == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    # A detection of a part of a crowd lies inside it; one of a part of a difficult object has a low IoU.
    part = found(([0, 0, 3, 3], CAT, 0.9), (B, CAT, 0.7))
    assert counts(table, part)[0] == ([0, 0, 0] if flag == "crowd" else [0, 1, 0])
    # An ignored box takes no detection away from one that counts.
    table = table_of((A, CAT), ([0, 0, 10, 9], CAT), **{flag: [True, False]})
    assert counts(table, found((A, CAT, 0.9))) == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_perfect_detections_give_a_diagonal_and_rows_sum_to_the_boxes(case, seed):
    table, detections = case(seed)
    table = replace(table, boxes_xywh=np.maximum(table.boxes_xywh, [0, 0, 1, 1]))
    counted = ~(table.crowd | table.difficult)
    num_boxes = np.bincount(table.labels[counted], minlength=table.num_classes)
    boxes = table.boxes_xywh.copy()
    boxes[:, 2:] += boxes[:, :2]
    perfect = Detections(table.image_of_box(), boxes, table.labels, np.linspace(0.6, 0.9, table.num_boxes))
    matrix = confusion_matrix(table, perfect, score_threshold=0.5)
    assert matrix.counts.tolist() == np.diag(num_boxes).tolist()

    counts = confusion_matrix(table, detections, score_threshold=0.3).counts
    assert counts[1:].sum(axis=1).tolist() == num_boxes[1:].tolist()
    shown = np.bincount(detections.labels[detections.scores >= 0.3], minlength=table.num_classes)
    assert counts[0, 0] == 0
    assert (counts[:, 1:].sum(axis=0) <= shown[1:]).all()
    if not (~counted).any():
        assert counts[:, 1:].sum(axis=0).tolist() == shown[1:].tolist()


def test_images_are_kept_apart_and_inputs_untouched():
    table = replace(table_of((A, CAT), (A, DOG)), image_ids=np.array([4, 2]), offsets=np.array([0, 1, 2]))
    table = replace(table, sizes=np.array([[100, 100]] * 2), file_names=np.array(["1.jpg", "2.jpg"]))
    detections = replace(found((A, CAT, 0.9), (A, CAT, 0.8)), image_index=np.array([0, 1]))
    scores = detections.scores.copy()
    assert counts(table, detections) == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert detections.scores.tolist() == scores.tolist()


def test_no_detections_and_no_boxes(no_detections):
    assert counts(table_of((A, CAT)), no_detections) == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    matrix = confusion_matrix(table_of(), found((A, DOG, 0.9)), score_threshold=0.5)
    assert matrix.counts.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert matrix.normalised()[1].tolist() == [0, 0, 0]
    assert not confusion_matrix(table_of(), no_detections, score_threshold=0.5).counts.any()


def test_options_are_checked():
    for threshold in (0, 1.5):
        with pytest.raises(ValueError, match=r"iou_threshold: must be in \(0, 1\]"):
            confusion_matrix(table_of((A, CAT)), found(), score_threshold=0.5, iou_threshold=threshold)
    with pytest.raises(DataError, match=r"labels must be in 1\.\.2"):
        confusion_matrix(table_of((A, CAT)), found((A, 3, 0.9)), score_threshold=0.5)
