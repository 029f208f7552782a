"""The model of a GPU's time: its arithmetic on operators made by hand, and what it counts of small detectors."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch
from benchmarks import gpu_model, run_benchmark
from benchmarks.gpu_model import (
    Card,
    Counted,
    build_models,
    count,
    device_seconds,
    modelled_seconds,
    random_batch,
    result_rows,
)
from benchmarks.pretend_gpu import Operator
from benchmarks.shape_only import LEAST, ShapeOnly, shape_only
from torch import nn
from torchvision.ops import nms

from resdet.errors import UserError
from resdet.models.spec import DetectorSpec

CARD = Card(
    bytes_per_second=1e12,
    half_flops=100e12,
    tf32_flops=50e12,
    fp32_flops=10e12,
    launch_s=4e-6,
    wait_s=20e-6,
)
SPEC = DetectorSpec(
    arch="resnet18",
    min_size=64,
    max_size=96,
    rpn_post_nms_top_n_train=40,
    rpn_post_nms_top_n_test=40,
    box_batch_size_per_image=16,
)


def operator(
    read: float, written: float, multiply_adds: float = 0, dtype: torch.dtype = torch.bfloat16, name: str = "aten.add"
) -> Operator:
    return Operator(name, "here:1", int(read), int(written), int(multiply_adds), dtype)


def test_an_operator_takes_the_longer_of_its_bytes_and_its_arithmetic() -> None:
    assert device_seconds(operator(1e9, 2e9), CARD) == pytest.approx(3e-3)
    assert device_seconds(operator(1e9, 2e9, 100e9), CARD) == pytest.approx(3e-3)
    assert device_seconds(operator(1e9, 2e9, 500e9), CARD) == pytest.approx(10e-3)
    assert device_seconds(operator(0, 0, 5e9, torch.float32, "aten.mm.default"), CARD) == pytest.approx(1e-3)
    assert device_seconds(operator(0, 0, 25e9, torch.float32, "aten.convolution.default"), CARD) == pytest.approx(1e-3)


def test_between_waits_host_and_device_work_side_by_side() -> None:
    long, short = operator(1e9, 0), operator(1e6, 0)  # 1 ms and 1 us; a launch takes 4 us
    counted = Counted([[long, short], [short] * 100, []], Counter({("item", "here:1"): 2}), 102)
    # By hand: 1001 us of the device, 400 us of the host, nothing, and two waits.
    assert modelled_seconds(counted, CARD) == pytest.approx(1001e-6 + 400e-6 + 2 * 20e-6)
    together = counted._replace(stretches=[counted.operators])
    assert modelled_seconds(together, CARD) == pytest.approx(max(1101e-6, 102 * 4e-6) + 40e-6)
    (row,) = result_rows({"torchvision": counted}, CARD)
    assert row["modelled GB read"] == pytest.approx(1.101)
    assert row["modelled ms"] == pytest.approx(1.441)
    assert row["waits"] == 2
    assert row["operators"] == 102


@pytest.mark.slow
def test_a_network_of_shapes_counts_what_a_computed_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """All operators on feature maps are the same, to the byte; other boxes are found, so some on boxes differ."""
    models, batch = build_models(SPEC, 0), random_batch(2, 64, 96, 0)
    for name, model in models.items():
        shapes = count(model, name, batch, training=False)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_model, "shape_only", lambda tensor: tensor)
            computed = count(model, name, batch, training=False)
        assert sum(map(len, shapes.stretches)) == len(shapes.operators) > 200
        assert len(shapes.stretches) == shapes.waits.total() + 1
        assert on_maps(shapes) == on_maps(computed)
        assert len(on_maps(shapes)) > 20
        assert on_maps(shapes) != on_maps(count(model, name, random_batch(1, 64, 96, 0), training=False))
        multiply_adds = [sum(o.multiply_adds for o in one.operators) for one in (shapes, computed)]
        assert multiply_adds[0] == pytest.approx(multiply_adds[1], rel=0.1)
        assert len(shapes.operators) == pytest.approx(len(computed.operators), rel=0.1)


def on_maps(counted: Counted) -> Counter[Operator]:
    return Counter(one for one in counted.operators if "convolution" in one.name or "relu" in one.name)


@pytest.mark.slow
def test_the_report_says_modelled_wherever_it_models(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["arch=resnet18", "min_size=64", "max_size=96", "batch_sizes=1"]
    report = run_benchmark(["work=gpu_model", *settings])
    for title, rows in report.tables.items():
        assert "odelled" in title
        assert rows
        for row in rows:
            for column, value in row.items():
                counted = column in ("waits", "operators", "before the optimizer")
                assert counted or isinstance(value, str) or "modelled" in column, column
    step, inference = (
        next(rows for title, rows in report.tables.items() if title.startswith(f"Modelled, not measured: {what}"))
        for what in ("training step", "inference")
    )
    assert [row["of"] for row in step] == ["torchvision", "ours"]
    assert step[0]["modelled ms, ratio"] == step[0]["modelled GB, ratio"] == 1
    for row, of_inference in zip(step, inference, strict=True):
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
        # A backward pass with C3 to C5 trained: up to twice the forward pass. At inference the box head, half of the
        # arithmetic at this size, sees 1,000 regions, in training 512, and ours goes back through a few anchors alone.
        assert 1.3 < float(row["modelled TFLOP"]) / float(of_inference["modelled TFLOP"]) < 3.2
        assert float(row["before the optimizer"]) < float(row["operators"])
    text = str(report)
    assert "Modelled, not measured. Counted on" in text
    assert "launch_us=4.0" in text
    assert "assumed" in text
    assert dataclasses.asdict(report)["settings"]["bandwidth_tb"] == 3.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bandwidth_tb=0", "bandwidth_tb must be above 0, got 0.0"),
        ("wait_us=-1", "wait_us must be 0 or more, got -1.0"),
        ("batch_sizes=2,x", "batch_sizes must be whole numbers from 1, separated by commas, got '2,x'"),
        ("batch_sizes=0", "batch_sizes must be whole numbers from 1"),
        ("max_size=100", "min_size must lie between 1 and max_size"),
    ],
)
def test_bad_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_benchmark(["work=gpu_model", setting])


# ---- tensors without values


def test_shapes_types_and_layouts_are_those_of_computed_tensors() -> None:
    layer = nn.Conv2d(3, 64, 3, stride=2, padding=1).to(memory_format=torch.channels_last)
    image = torch.randn(2, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    expected = layer(image).relu().bfloat16()
    weight = shape_only(layer.weight.detach().expand(64, 3, 3, 3).repeat(2, 1, 1, 1))
    assert isinstance(weight, ShapeOnly)
    layer.weight, layer.bias, layer.out_channels = nn.Parameter(weight), None, 128
    found = layer(image).relu().bfloat16()
    assert isinstance(found, ShapeOnly)
    assert found.shape == (2, 128, 16, 24)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    found.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (128, 3, 3, 3)


def test_small_results_and_outputs_of_heads_have_values() -> None:
    features = shape_only(torch.empty(64, 4096))
    assert isinstance(features.sum(), torch.Tensor)
    assert features.sum().item() == 1
    assert torch.isfinite(features).all().item()
    assert not torch.isnan(features).any().item()
    head = nn.Linear(4096, 91)
    nn.init.normal_(head.weight, std=0.1)
    outputs = head(features)
    assert not isinstance(outputs, ShapeOnly)
    assert outputs.shape == (64, 91)
    # 0.1 times the square root of 4096 inputs of mean square 1.
    assert outputs.std().item() == pytest.approx(6.4, rel=0.1)
    small = torch.zeros(LEAST - 1)
    assert shape_only(small) is small


def test_asking_for_values_that_are_not_there_is_an_error() -> None:
    boxes = shape_only(torch.empty(1000, 4))
    with pytest.raises(RuntimeError, match="asks for values of a tensor that is only a shape"):
        boxes.nonzero()
    with pytest.raises(RuntimeError, match="asks for values"):
        nms(boxes, torch.rand(1000), 0.5)


def test_what_is_written_to_stays_what_it_is() -> None:
    weight, gradient = shape_only(torch.empty(64, 64)), shape_only(torch.empty(64, 64))
    assert weight.add_(gradient) is weight
    torch._foreach_add_([weight, torch.zeros(3)], [gradient, torch.ones(3)])
    real = torch.zeros(64, 64)
    assert real.add_(gradient) is real
    assert not real.any()
