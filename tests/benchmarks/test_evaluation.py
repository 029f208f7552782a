import importlib.util

import numpy as np
import pytest
from benchmarks.evaluation import benchmark_evaluation, generated_case

# What the README promises of the twelve numbers.
PROMISED_DIFFERENCE = 1e-9


def rows(**settings):
    (table,) = benchmark_evaluation(**settings).tables.values()
    return {row["evaluator"]: row for row in table}


def test_small_case_gives_a_row_each_and_equal_numbers():
    report = benchmark_evaluation(num_images=30, num_classes=5, detections_per_image=20, num_repeats=2)
    assert report.settings["num_images"] == 30
    assert "600 detections" in next(iter(report.tables))
    found = rows(num_images=30, num_classes=5, detections_per_image=20, num_repeats=2)
    assert {"resdet", "pycocotools"} <= set(found)
    assert ("faster_coco_eval" in found) == bool(importlib.util.find_spec("faster_coco_eval"))
    assert found["resdet"]["times ours, wall"] == found["resdet"]["times ours, CPU"] == 1
    assert float(found["resdet"]["largest difference"]) < PROMISED_DIFFERENCE


def test_generated_case_has_what_it_says():
    table, detections = generated_case(num_images=300, num_classes=80, detections_per_image=50)
    assert 5 < table.num_boxes / table.num_images < 10
    assert table.crowd.any()
    assert (np.bincount(detections.image_index) == 50).all()
    again = generated_case(num_images=300, num_classes=80, detections_per_image=50)[1]
    np.testing.assert_array_equal(again.scores, detections.scores)
    sizes = [(table.area < 32**2).mean(), (table.area > 96**2).mean()]
    assert all(share > 0.1 for share in sizes)


@pytest.mark.slow
def test_three_times_faster_than_pycocotools_at_the_size_of_val2017():
    found = rows(num_repeats=1)
    assert found["pycocotools"]["times ours, CPU"] > 3
    assert float(found["resdet"]["largest difference"]) < PROMISED_DIFFERENCE
