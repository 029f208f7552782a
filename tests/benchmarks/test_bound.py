"""The operations of a network, and how fast the machine does them."""

import pytest
import torch
import torchvision
from benchmarks.bound import Flops, Rate, best_rates, bound_row, count_flops
from torch import nn

from resdet.classification.summary import summarise


def test_operations_of_a_resnet_are_twice_the_published_multiply_adds():
    with torch.device("meta"):
        model, image = torchvision.models.resnet101(), torch.empty(1, 3, 224, 224)
    flops = count_flops(lambda: model(image))
    assert flops.forward == flops.total == 2 * summarise("resnet101")[-1].num_multiply_adds
    published = torchvision.models.ResNet101_Weights.IMAGENET1K_V1.meta["_ops"]  # GFLOPS as it calls multiply-adds
    assert flops.forward / 2e9 == pytest.approx(published, abs=5e-4)


def test_gradients_are_counted_as_they_are_computed():
    frozen, first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3)
    frozen.requires_grad_(False)
    layers = nn.Sequential(frozen, first, second)
    flops = count_flops(lambda: {"loss": layers(torch.randn(1, 3, 10, 10)).sum()}, backward=True)
    of_frozen, of_first, of_second = 2 * 8 * 8 * 4 * 27, 2 * 6 * 6 * 5 * 36, 2 * 4 * 4 * 6 * 45
    assert flops.forward == of_frozen + of_first + of_second
    # Of what is trained the weight's gradient, and the input's but for the first: less than three times the forward.
    assert flops.total == flops.forward + of_first + 2 * of_second
    assert flops.total < 3 * flops.forward


def test_rates_only_rise():
    seen = best_rates(torch.device("cpu"))
    assert set(seen) == {"fp32", "bf16"}
    assert all(rate.flops_per_second > 0 and rate.seen_in for rate in seen.values())
    known = {**seen, "fp32": Rate(1e30, "elsewhere")}
    assert best_rates(torch.device("cpu"), known)["fp32"] == Rate(1e30, "elsewhere")


def test_the_bound_is_operations_over_rate():
    flops = Flops(10**12, 3 * 10**12, 10**12)
    row = bound_row("fp32", Rate(2e12, "x"), flops, ours_seconds=3.0, torchvision_seconds=6.0)
    assert (row["bound [s]"], row["ours reaches [%]"], row["torchvision reaches [%]"]) == (1.5, 50, 25)
    assert (row["TFLOP"], row["times forward"], row["best rate [TFLOP/s]"]) == (3, 3, 2)
    by_winograd = bound_row("fp32", Rate(2e12, "x"), flops, ours_seconds=1, torchvision_seconds=2, winograd=True)
    assert (by_winograd["bound [s]"], by_winograd["ours reaches [%]"], by_winograd["3x3 by"]) == (0.5, 50, "Winograd")


def test_winograds_multiplications_are_a_quarter_of_those_of_3x3_at_stride_1():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, stride=2), nn.Conv2d(5, 6, 1), nn.Conv2d(6, 7, 3))
    flops = count_flops(lambda: {"loss": layers(torch.randn(1, 3, 12, 12)).sum()}, backward=True)
    first, second, third, last = 2 * 100 * 4 * 27, 2 * 16 * 5 * 36, 2 * 16 * 6 * 5, 2 * 4 * 7 * 54
    assert flops.total == 2 * first + 3 * (second + third + last)
    assert flops.winograd == (2 * first + 3 * last) // 4 + 3 * (second + third)
