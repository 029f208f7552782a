"""Compute the least time that a network's arithmetic can take here: its operations over the best rate measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_backward_flop, conv_flop

from resdet.malloc import keep_freed_memory
from resdet.precision import Precision

MATMUL_SIDES = (1024, 2048, 4096, 8192)
"""Sides of the square matrices whose product is timed; a device that takes long for one skips the next."""

CONV_SIZE = (200, 304)
"""Pixels of the map (P2 of an image of 800x1216) on which a 3x3 convolution of 256 to 256 channels is timed."""

_LONG_S = 0.2  # the next product takes eight times as long
_RUNS = 5
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Rate(NamedTuple):
    """The best rate of arithmetic measured in a precision.

    Attributes:
        flops_per_second: Two for each multiply-add.
        seen_in: The operation that reached it.
    """

    flops_per_second: float
    seen_in: str


class Flops(NamedTuple):
    """Floating-point operations, two for each multiply-add, of convolutions and matrix products alone.

    Attributes:
        forward: Of the forward pass.
        total: Of all that was run; with a backward pass that of the gradients too.
        winograd: The same, if 3x3 convolutions of stride 1 and their gradients are computed by Winograd's algorithm
            with 4x4 tiles: a quarter of their multiplications. Its transforms count as free.
    """

    forward: int
    total: int
    winograd: int


PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
"""What is measured."""


def best_rates(device: torch.device, known: Mapping[Precision, Rate] | None = None) -> dict[Precision, Rate]:
    """Return the best rate of each precision over products of square matrices and a 3x3 convolution, five runs of each.

    Both, because neither is always faster: torch computes float32 products by MKL, which on CPUs of AMD reaches half
    the rate of oneDNN's convolutions.

    Args:
        device: What to measure.
        known: Rates measured before, which count too. Other programs can only lower a rate, so of two measurements
            the higher is nearer to what the machine can do.
    """
    keep_freed_memory()
    best = dict(known or {})
    for precision in PRECISIONS:
        for name, flops, run in _operations(device, _DTYPES[precision]):
            rate = Rate(flops / _least_seconds(run, device), name)
            best[precision] = max(best.get(precision, rate), rate)
    return best


def count_flops(forward: Callable[[], object], *, backward: bool = False) -> Flops:
    """Run something once and count the operations it takes.

    Args:
        forward: Returns losses by name if ``backward``, or anything.
        backward: Also run back through the sum of the losses.

    Source: ``torch.utils.flop_counter``, which counts a backward pass by the gradients that are computed: none of what
        is frozen, and none with respect to the input of the first layer that is trained.
    """
    saved = 0

    def counted(formula: Callable[..., int], weight_at: int) -> Callable[..., int]:
        def count(*arguments: Any, out_val: Any = None, **options: Any) -> int:
            nonlocal saved
            flops = formula(*arguments, out_val=out_val, **options)
            stride, dilation = arguments[weight_at + 2], arguments[weight_at + 4]
            if arguments[weight_at].shape[2:] == (3, 3) and set(stride) == set(dilation) == {1}:
                saved += flops * 3 // 4
            return flops

        count._get_raw = True  # type: ignore[attr-defined]  # it is given tensors, not their shapes
        return count

    formulas = {
        torch.ops.aten.convolution: counted(conv_flop, 1),
        torch.ops.aten.convolution_backward: counted(conv_backward_flop, 2),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        output = forward()
        forward_flops = counter.get_total_flops()
        if backward:
            assert isinstance(output, Mapping)
            torch.stack(list(output.values())).sum().backward()  # type: ignore[no-untyped-call]
    total = counter.get_total_flops()
    return Flops(forward_flops, total, total - saved)


def bound_row(
    precision: Precision,
    rate: Rate,
    flops: Flops,
    *,
    ours_seconds: float,
    torchvision_seconds: float,
    winograd: bool = False,
) -> dict[str, str | float]:
    """Return how near to the bound two measured times come.

    Args:
        precision: That of the times and of the rate.
        rate: The best measured.
        flops: What was computed in that time.
        ours_seconds: Time of our model.
        torchvision_seconds: Time of torchvision's, in the same precision.
        winograd: Whether to count by Winograd's algorithm what it can compute, or all directly.
    """
    counted = flops.winograd if winograd else flops.total
    bound = counted / rate.flops_per_second
    return {
        "precision": precision,
        "3x3 by": "Winograd" if winograd else "direct",
        "TFLOP": counted / 1e12,
        "times forward": flops.total / flops.forward,
        "best rate [TFLOP/s]": rate.flops_per_second / 1e12,
        "seen in": rate.seen_in,
        "bound [s]": bound,
        "ours reaches [%]": 100 * bound / ours_seconds,
        "torchvision reaches [%]": 100 * bound / torchvision_seconds,
    }


def bound_rows(
    rates: Mapping[Precision, Rate], flops: Flops, seconds: Mapping[str, Sequence[float]]
) -> list[dict[str, str | float]]:
    """Return two ``bound_row`` of each precision, for the medians of times as ``in_turn`` returns them."""
    return [
        bound_row(
            precision,
            rates[precision],
            flops,
            ours_seconds=median(seconds[f"ours {precision}"]),
            torchvision_seconds=median(seconds[f"torchvision {precision}"]),
            winograd=winograd,
        )
        for precision in PRECISIONS
        for winograd in (False, True)
    ]


def _operations(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """Yield names, numbers of operations and calls."""
    height, width = CONV_SIZE
    image = torch.randn(1, 256, height, width, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    flops = 2 * height * width * 256 * 256 * 9
    yield f"3x3 convolution of 256 channels, {height}x{width}", flops, lambda: F.conv2d(image, weight, padding=1)
    for side in MATMUL_SIDES:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        yield f"matrix product, {side}", 2 * side**3, lambda a=a, b=b: a @ b  # type: ignore[misc]
        if _seconds(lambda a=a, b=b: a @ b, device) > _LONG_S:  # type: ignore[misc]
            return


@torch.no_grad()
def _least_seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    _seconds(run, device)
    return min(_seconds(run, device) for _ in range(_RUNS))


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
