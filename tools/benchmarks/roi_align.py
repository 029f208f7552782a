"""Time RoIAlign over a feature pyramid, forward and backward: torchvision's and ours, in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import ops

from benchmarks.bound import PRECISIONS
from benchmarks.report import Report
from benchmarks.settings import check_counts, find_device
from benchmarks.timing import in_turn, time_rows
from resdet.models.roi_align import FastMultiScaleRoIAlign
from resdet.precision import Precision, autocast

LEVELS = {"0": 4, "1": 8, "2": 16, "3": 32}
"""Strides of P2 to P5."""

_LEAST_SIDE = 16.0


class _Case(NamedTuple):
    pool: nn.Module
    precision: Precision
    features: dict[str, Tensor]
    boxes: list[Tensor]
    image_hw: tuple[int, int]


def benchmark_roi_align(
    *,
    num_boxes: int = 1000,
    channels: int = 256,
    height: int = 800,
    width: int = 1216,
    repeats: int = 10,
    warmup: int = 2,
    device: str = "auto",
    seed: int = 0,
) -> Report:
    """Time ``MultiScaleRoIAlign`` of torchvision and of ours as a detector calls it: 7x7 bins of 2x2 samples, P2 to P5.

    Features are random; torchvision's are contiguous and ours channels-last, as each one's backbone returns them.
    In bfloat16 both are given the same rounded features under autocast, where torchvision computes in float32. The
    geometric mean of a box's sides is log-uniform from 16 pixels to the image's shorter side, and their ratio is
    log-uniform from 1/2 to 2.

    Args:
        num_boxes: Boxes, all of one image.
        channels: Of each level.
        height: Of the image, in pixels.
        width: Of the image.
        repeats: Calls of each, of which medians are given.
        warmup: Calls of each before these.
        device: auto, cpu or cuda.
        seed: Of features and boxes.

    Raises:
        UserError: If a setting is out of range.
    """
    settings = dict(locals())
    check_counts(settings, "num_boxes", "channels", "repeats")
    check_counts(settings, "height", "width", least=64)
    check_counts(settings, "warmup", "seed", least=0)
    torch_device = find_device(device)
    settings["device"] = str(torch_device)
    generator = torch.Generator().manual_seed(seed)
    boxes = [random_boxes(num_boxes, height, width, generator).to(torch_device)]
    features = {
        name: torch.randn(1, channels, math.ceil(height / stride), math.ceil(width / stride), generator=generator)
        for name, stride in LEVELS.items()
    }
    grad = torch.randn(num_boxes, channels, 7, 7, generator=generator).to(torch_device)
    cases = _cases(features, boxes, (height, width), torch_device)
    forward: dict[str, Callable[[int], Tensor]] = {name: partial(_pool, case) for name, case in cases.items()}
    both: dict[str, Callable[[int], Tensor]] = {name: partial(_pool_back, case, grad) for name, case in cases.items()}
    forward_s = in_turn(forward, repeats=repeats, warmup=warmup, device=torch_device)
    both_s = in_turn(both, repeats=repeats, warmup=warmup, device=torch_device)
    pooled = {name: run(0) for name, run in both.items()}
    what = f"{num_boxes:,} boxes, {channels} channels, P2..P5 of {height}x{width}, {torch_device.type}"
    return Report(
        work="roi_align",
        settings=settings,
        tables={
            f"RoIAlign forward: {what}; medians of {repeats}": time_rows(forward_s),
            f"RoIAlign forward and backward: {what}; medians of {repeats}": time_rows(both_s),
            "Largest differences": [_differences(precision, cases, pooled) for precision in PRECISIONS],
        },
    )


def _cases(
    features: Mapping[str, Tensor], boxes: list[Tensor], image_hw: tuple[int, int], device: torch.device
) -> dict[str, _Case]:
    """Return torchvision's and our pooling in each precision, each with features of its own."""
    cases = {}
    for precision in PRECISIONS:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        for name, pool, layout in (
            ("torchvision", ops.MultiScaleRoIAlign, torch.contiguous_format),
            ("ours", FastMultiScaleRoIAlign, torch.channels_last),
        ):
            levels = {
                level: feature.detach().to(device, dtype).contiguous(memory_format=layout).requires_grad_()
                for level, feature in features.items()
            }
            cases[f"{name} {precision}"] = _Case(pool(list(LEVELS), 7, 2), precision, levels, boxes, image_hw)
    return cases


def _pool(case: _Case, _repetition: int) -> Tensor:
    with autocast(case.boxes[0].device, case.precision):
        pooled: Tensor = case.pool(case.features, case.boxes, [case.image_hw])  # [N, C, 7, 7]
    return pooled


def _pool_back(case: _Case, grad: Tensor, repetition: int) -> Tensor:
    for feature in case.features.values():
        feature.grad = None
    pooled = _pool(case, repetition)
    pooled.backward(grad.to(pooled.dtype))  # type: ignore[no-untyped-call]
    return pooled.detach()


def _differences(
    precision: Precision, cases: Mapping[str, _Case], pooled: Mapping[str, Tensor]
) -> dict[str, str | float]:
    """Compare features and gradients, ours with torchvision's."""
    theirs, ours = f"torchvision {precision}", f"ours {precision}"
    pairs = [(cases[theirs].features[level].grad, cases[ours].features[level].grad) for level in LEVELS]
    return {
        "ours against torchvision": precision,
        "features": f"{_largest_difference(pooled[theirs], pooled[ours]):.1e}",
        "largest feature": f"{float(pooled[theirs].abs().max()):.1e}",
        "gradients": f"{max(_largest_difference(a, b) for a, b in pairs):.1e}",
        "largest gradient": f"{max(float(a.abs().max()) for a, _ in pairs if a is not None):.1e}",
    }


def random_boxes(num_boxes: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return boxes inside an image, float32 ``[N, 4]``, of the sizes that ``benchmark_roi_align`` describes."""
    size = _log_uniform(num_boxes, _LEAST_SIDE, min(height, width), generator)
    aspect = _log_uniform(num_boxes, 0.5, 2.0, generator).sqrt()
    sides = torch.stack([(size / aspect).clamp(max=width), (size * aspect).clamp(max=height)], dim=1)
    start = torch.rand(num_boxes, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return torch.cat([start, start + sides], dim=1)


def _log_uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(count).uniform_(math.log(low), math.log(high), generator=generator).exp()


def _largest_difference(one: Tensor | None, other: Tensor | None) -> float:
    assert one is not None
    assert other is not None
    return float((one.float() - other.float()).abs().max())
