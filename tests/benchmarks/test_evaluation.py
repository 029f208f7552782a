import importlib.util

import numpy as np
import pytest

from resdet.benchmarks.evaluation import benchmark_evaluation, generated_case

# What the README promises of the twelve numbers.
PROMISED_DIFFERENCE = 1e-9


def test_small_case_gives_plain_data_and_equal_numbers():
    result = benchmark_evaluation(num_images=30, num_classes=5, detections_per_image=20, num_repeats=2)
    assert result["case"]["num_images"] == 30
    assert result["case"]["num_detections"] == 600
    assert {"resdet", "pycocotools"} <= set(result["seconds"])
    assert ("faster_coco_eval" in result["seconds"]) == bool(importlib.util.find_spec("faster_coco_eval"))
    assert all(len(runs) == 2 for runs in result["seconds"].values())
    assert result["ratio"]["resdet"] == result["cpu_ratio"]["resdet"] == 1
    assert result["largest_difference"]["resdet"] < PROMISED_DIFFERENCE


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
    result = benchmark_evaluation(num_repeats=1)
    assert result["cpu_ratio"]["pycocotools"] > 3
    assert result["largest_difference"]["resdet"] < PROMISED_DIFFERENCE
