"""What is timed before a plan is made."""

from __future__ import annotations

import pytest
import torch

from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.models.detector import Detector, build_detector
from resdet.models.spec import DetectorSpec
from resdet.plan import machine
from resdet.plan.machine import measure_machine

DATASET = DetectionDataset(shapes_table(4, 64, 3), ShapesImages(image_size=64, seed=3), training=True)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Precision and shorter side of each step, which is not computed."""
    taken: list[tuple[str, int]] = []

    def losses(model: Detector, *arguments: object) -> dict[str, torch.Tensor]:
        taken.append((str(arguments[-1]), model.transform.min_size[0]))
        return {"loss": torch.zeros((), requires_grad=True)}

    monkeypatch.setattr(machine, "detection_losses", losses)
    return taken


def small_detector() -> Detector:
    return build_detector(DetectorSpec(arch="resnet18", out_channels=16, box_head_channels=16), num_classes=4)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bfloat16_is_timed_only_where_there_is_arithmetic_for_it(
    steps: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    """Without it a step takes half a minute."""
    monkeypatch.setattr(machine, "_has_bf16", lambda _: has_bf16)
    measured = measure_machine(small_detector(), DATASET, torch.device("cpu"))
    assert {precision for precision, _ in steps} >= ({"fp32", "bf16"} if has_bf16 else {"fp32"})
    assert (measured.gain is not None) == has_bf16
    assert has_bf16 or measured.precision == "fp32"
    assert {side for _, side in steps} == {256, 512}


def test_a_cpu_is_asked_what_it_can() -> None:
    assert machine._has_bf16(torch.device("cuda"))
    can = torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert machine._has_bf16(torch.device("cpu")) == can


def test_slow_steps_are_taken_twice(steps: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_has_bf16", lambda _: False)
    measure_machine(small_detector(), DATASET, torch.device("cpu"))
    assert steps == 3 * [("fp32", 256)] + 3 * [("fp32", 512)]
    steps.clear()
    monkeypatch.setattr(machine, "_ENOUGH_S", 0.0)
    measure_machine(small_detector(), DATASET, torch.device("cpu"))
    assert steps == 2 * [("fp32", 256)] + 2 * [("fp32", 512)]


def test_the_detector_is_as_before() -> None:
    """Though its steps are whole ones, with that of an optimizer."""
    model = small_detector().eval()
    sizes = model.transform.min_size, model.transform.max_size
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    measure_machine(model, DATASET, torch.device("cpu"))
    assert (model.transform.min_size, model.transform.max_size) == sizes
    assert not model.training
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
