"""A device computes what the CPU computes, up to rounding; each comparison fails when one value is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from small_detectors import (
    assert_same_detections,
    assert_same_gradients,
    assert_same_losses,
    detections,
    float_inputs,
    losses_and_gradients,
    make_batch,
    make_detector,
    moved,
)

from resdet.models.detector import Detector
from resdet.models.roi_align import FastMultiScaleRoIAlign
from resdet.models.spec import Tricks
from resdet.models.test_time import detect_with_tricks
from resdet.training.average import AveragedModel
from resdet.training.optim import build_optimizer


def test_losses_and_gradients(detector: Detector, device_quickly: torch.device_quickly) -> None:
    batch = make_batch()
    losses, gradients = losses_and_gradients(copy.deepcopy(detector), batch)
    found_losses, found_gradients = losses_and_gradients(moved(detector, device_quickly), batch)
    assert_same_losses(found_losses, losses)
    assert_same_gradients(found_gradients, gradients)


def test_losses_of_other_weights_differ(detector: Detector, device: torch.device) -> None:
    batch = make_batch()
    losses, gradients = losses_and_gradients(copy.deepcopy(detector), batch)
    other = copy.deepcopy(detector)
    with torch.no_grad():
        other.backbone.fpn.layer_blocks[1][0].weight[0] *= 1.5
    found_losses, found_gradients = losses_and_gradients(other.to(device), batch)
    with pytest.raises(AssertionError):
        assert_same_losses(found_losses, losses)
    with pytest.raises(AssertionError):
        assert_same_gradients(found_gradients, gradients)


def test_detections(detector: Detector, device_quickly: torch.device_quickly) -> None:
    batch = make_batch()
    assert_same_detections(detections(moved(detector, device_quickly), batch), detections(detector, batch))


def test_detections_of_other_weights_differ(detector: Detector, device: torch.device) -> None:
    batch = make_batch()
    other = copy.deepcopy(detector)
    with torch.no_grad():
        other.roi_heads.box_predictor.bbox_pred.bias += 0.01
    with pytest.raises(AssertionError):
        assert_same_detections(detections(other.to(device), batch), detections(detector, batch))


def test_channels_last(detector: Detector, device: torch.device) -> None:
    batch = make_batch()
    model = moved(detector, device).to(memory_format=torch.channels_last)
    assert_same_detections(detections(model, batch), detections(detector, batch))
    losses, gradients = losses_and_gradients(copy.deepcopy(detector), batch)
    found_losses, found_gradients = losses_and_gradients(model, batch)
    assert_same_losses(found_losses, losses)
    assert_same_gradients(found_gradients, gradients)


@pytest.mark.parametrize(
    "settings",
    [
        {"fast": False},
        {"layout": "c4", "arch": "resnet50", "anchor_sizes": (16, 32, 64)},
        {"layout": "dc5", "arch": "resnet50", "anchor_sizes": (16, 32, 64)},
    ],
    ids=["plain", "c4", "dc5"],
)
def test_other_kinds_of_detectors(device: torch.device, settings: dict[str, object]) -> None:
    model, batch = make_detector(**settings), make_batch()
    assert_same_detections(detections(moved(model, device), batch), detections(model, batch))


def test_images_of_one_size_in_a_batch(detector: Detector, device: torch.device) -> None:
    batch = make_batch()
    batch = batch._replace(images=[batch.images[0], batch.images[0].flip(2)])
    assert_same_detections(detections(moved(detector, device), batch), detections(detector, batch))


def test_images_without_objects(detector: Detector, device: torch.device) -> None:
    batch = make_batch()
    batch.targets[1]["boxes"], batch.targets[1]["labels"] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    losses, gradients = losses_and_gradients(copy.deepcopy(detector), batch)
    found_losses, found_gradients = losses_and_gradients(moved(detector, device), batch)
    assert_same_losses(found_losses, losses)
    assert_same_gradients(found_gradients, gradients)


def test_tricks(detector: Detector, device: torch.device) -> None:
    tricks = Tricks(scales=(64, 96), flip=True, refine=1, voting=0.8, nms="soft-linear")
    batch, model = make_batch(1), moved(detector, device)
    with torch.no_grad():
        expected = detect_with_tricks(detector, float_inputs(batch, torch.device("cpu")), tricks)
        found = detect_with_tricks(model, float_inputs(batch, device), tricks)
    assert {part.device for one in found for part in (one["boxes"], one["labels"], one["scores"])} == {device}
    assert_same_detections([{key: value.cpu() for key, value in one.items()} for one in found], expected)  # type: ignore[misc]


def test_roi_align(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = {str(level): torch.randn(2, 8, 64 >> level, 64 >> level, generator=generator) for level in range(4)}
    corners = torch.rand(40, 2, 2, generator=generator).mul(256).sort(dim=1).values.flatten(1)  # [N, 4]
    pool = FastMultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)

    def pooled(where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        maps = {name: level.to(where).requires_grad_() for name, level in levels.items()}
        result = pool(maps, [corners[:25].to(where), corners[25:].to(where)], [(256, 256)] * 2)
        result.square().sum().backward()
        assert maps["0"].grad is not None
        return result.detach().cpu(), maps["0"].grad.cpu()

    for found, expected in zip(pooled(device), pooled(torch.device("cpu")), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found.roll(1, 0), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_optimizer_and_average(detector: Detector, device: torch.device) -> None:
    """Two steps by given gradients, and the average of the weights."""

    def trained(where: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = moved(detector, where)
        average = AveragedModel(model, 0.9)
        optimizer = build_optimizer(model, name="adamw", lr=1e-3, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                generator = torch.Generator().manual_seed(number)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(where)
            optimizer.step()
            average.update_parameters(model)
        weights, means = model.state_dict(), average.module.state_dict()
        return {n: v.cpu() for n, v in weights.items()}, {n: v.cpu() for n, v in means.items()}

    for found, expected in zip(trained(device), trained(torch.device("cpu")), strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    weights, means = trained(torch.device("cpu"))
    assert any(not torch.allclose(weights[name], means[name], rtol=1e-5, atol=1e-6) for name in weights)
