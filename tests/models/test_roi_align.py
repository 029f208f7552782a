"""resdet.models.roi_align against torchvision's operator, which is the reference for every value here."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import pytest
import torch
from torch import Tensor
from torchvision import ops

from resdet.errors import UserError
from resdet.models import roi_align as module
from resdet.models.roi_align import FastMultiScaleRoIAlign, roi_align

SCALE = 0.25
NUM_IMAGES, CHANNELS, HEIGHT, WIDTH = 3, 5, 23, 31
# Largest error over the largest value. float64 and float32: both sides sum the same terms in another order. bfloat16
# (8 bits) and float16 (11 bits): each weight and the result are rounded once, against a reference in float64.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def make_rois(seed: int = 0, num_boxes: int = 40) -> Tensor:
    """Boxes of all sizes, some leaving the image on every side, and the odd ones, as float64 ``[K, 5]``."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([WIDTH, HEIGHT], dtype=torch.float64) / SCALE
    centre = (torch.rand(num_boxes, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2) * extent
    half = torch.exp(torch.randn(num_boxes, 2, generator=generator, dtype=torch.float64)) * 3 / SCALE
    boxes = torch.cat([centre - half, centre + half], dim=1)
    boxes[0, 2:] = boxes[0, :2]  # a point
    boxes[1] = torch.cat([-3 * extent, 4 * extent])  # far larger than the image
    boxes[2] = boxes[2, [2, 3, 0, 1]]  # reversed
    boxes[3] = torch.cat([0 * extent, extent])  # the image
    boxes[4] = torch.cat([5 * extent, 6 * extent])  # nowhere near it
    boxes[5, 2] = boxes[5, 0]  # a line
    image = torch.randint(0, NUM_IMAGES, (num_boxes, 1), generator=generator).double()
    return torch.cat([image, boxes], dim=1)


def make_features(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_IMAGES, CHANNELS, HEIGHT, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


LAYOUTS = {
    "nchw": lambda features: features.contiguous(),
    "channels_last": lambda features: features.contiguous(memory_format=torch.channels_last),
    "strided": lambda features: features.repeat_interleave(2, dim=3)[..., ::2],
    "transposed": lambda features: features.transpose(2, 3).contiguous().transpose(2, 3),
    "channel_slice": lambda features: torch.cat([features, features], dim=1).contiguous(
        memory_format=torch.channels_last
    )[:, :CHANNELS],
}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def pool_both(features: Tensor, rois: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs and feature gradients: ours, and torchvision's (in float64 for the 16-bit types)."""
    ours = features.detach().requires_grad_()
    theirs = features.detach().requires_grad_()
    exact = torch.float64 if features.dtype in (torch.bfloat16, torch.float16) else features.dtype
    out = roi_align(ours, rois.to(torch.float32 if exact != features.dtype else exact), *arguments)
    expected = ops.roi_align(theirs.to(exact), rois.to(torch.float32).to(exact), *arguments)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(features.dtype)
    out.backward(grad)
    expected.backward(grad.to(exact))
    return out, expected, ours.grad, theirs.grad


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("aligned", [False, True])
def test_equals_torchvision_forward_and_backward(aligned: bool, sampling_ratio: int, dtype: torch.dtype) -> None:
    rois = make_rois().float().double()
    for layout, output_size in itertools.product(LAYOUTS, (7, (3, 5))):
        features = LAYOUTS[layout](make_features(dtype))
        out, expected, grad, expected_grad = pool_both(features, rois, output_size, SCALE, sampling_ratio, aligned)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_near(out, expected, TOLERANCE[dtype])
        assert_near(grad, expected_grad, TOLERANCE[dtype])


@pytest.mark.parametrize("what", ["feature", "box", "scale", "aligned", "sampling_ratio"])
def test_comparison_notices_a_small_difference(what: str) -> None:
    features, rois = make_features(), make_rois()
    expected = ops.roi_align(features, rois, 7, SCALE, 2, False)
    assert_near(roi_align(features, rois, 7, SCALE, 2, False), expected, TOLERANCE[torch.float64])
    if what == "feature":
        features[0, 0] += 1e-9
    if what == "box":
        rois[10, 1] += 1e-6
    scale = SCALE * (1 + 1e-6) if what == "scale" else SCALE
    ratio = 3 if what == "sampling_ratio" else 2
    with pytest.raises(AssertionError, match="relative error"):
        assert_near(roi_align(features, rois, 7, scale, ratio, what == "aligned"), expected, TOLERANCE[torch.float64])


def test_gradient_comparison_notices_one_changed_entry() -> None:
    _, _, grad, expected = pool_both(make_features(), make_rois(), 7, SCALE, 2)
    grad[1, 2, 3, 4] += 1e-9
    with pytest.raises(AssertionError, match="relative error"):
        assert_near(grad, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("sampling_ratio", [-1, 2])
def test_gradcheck(sampling_ratio: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 2, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.3, 0.2, 4.1, 3.9], [1, -2, 1, 3, 7], [1, 2, 2, 2.5, 2.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, (2, 3), 1.0, sampling_ratio), features)


def test_second_derivative_is_refused_as_by_torchvision() -> None:
    features = make_features().requires_grad_()
    for function in (roi_align, ops.roi_align):
        (grad,) = torch.autograd.grad(function(features, make_rois(), 3).pow(2).sum(), features, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()


def test_boxes_as_one_tensor_for_each_image() -> None:
    features, rois = make_features(), make_rois()
    boxes = [rois[rois[:, 0] == image, 1:] for image in range(NUM_IMAGES)]
    boxes[1] = boxes[1][:0]
    assert_near(roi_align(features, boxes, 7, SCALE, 2), ops.roi_align(features, boxes, 7, SCALE, 2), 1e-13)


@pytest.mark.parametrize("num_images", [0, 2])
def test_no_boxes(num_images: int) -> None:
    features = torch.zeros(num_images, 4, 8, 8, requires_grad=True)
    out = roi_align(features, torch.zeros(0, 5), (3, 5))
    assert out.shape == (0, 4, 3, 5)
    out.sum().backward()
    assert features.grad is not None
    assert not features.grad.any()


def test_only_boxes_without_samples() -> None:
    rois = torch.tensor([[0.0, 3, 3, 3, 3], [0, 5, 5, 2, 2]])
    out, expected, grad, _ = pool_both(make_features(torch.float32), rois, 3, 1.0, -1, True)
    assert torch.equal(out, expected)
    assert not out.any()
    assert not grad.any()


def test_boxes_that_are_not_numbers_pool_zeros() -> None:
    nan = float("nan")
    rois = torch.tensor([[0, nan, nan, nan, nan], [0, 0, 0, float("inf"), 4]])
    for sampling_ratio in (-1, 2):
        assert not roi_align(make_features(torch.float32), rois, 3, 1.0, sampling_ratio)[0].any()


def test_mistakes_are_named() -> None:
    features = make_features()
    rois = make_rois()
    rois[7, 0] = NUM_IMAGES
    with pytest.raises(UserError, match=r"image index must lie in \[0, 3\), got 0 to 3"):
        roi_align(features, rois, 7)
    with pytest.raises(AssertionError, match=r"Tensor\[K, 5\]"):
        roi_align(features, rois[:, 1:], 7)


@pytest.mark.parametrize("sampling_ratio", [-1, 2])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, sampling_ratio: int) -> None:
    features, rois = make_features(), make_rois()
    whole = pool_both(features, rois, 7, SCALE, sampling_ratio)
    monkeypatch.setattr(module, "_ENTRIES", 2000)
    monkeypatch.setattr(module, "_BLOCK", 3)
    parts = pool_both(features, rois, 7, SCALE, sampling_ratio)
    assert_near(parts[0], whole[0], 1e-15)
    assert_near(parts[2], whole[2], 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_run_and_with_any_number_of_threads(dtype: torch.dtype) -> None:
    # Enough entries (49 * 16 * 200) for every parallel path: sorting, counting and summing split from 32768 on.
    features = make_features(dtype)
    rois = make_rois(num_boxes=200).float()
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 2):
            torch.set_num_threads(num_threads)
            leaf = features.clone().requires_grad_()
            out = roi_align(leaf, rois, 7, SCALE, 2)
            out.backward(torch.ones_like(out).cumsum(0))
            results.append((out.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


LEVELS = ["0", "1", "2", "3"]
IMAGE_SHAPES = [(160, 224), (150, 200)]


def make_pyramid(dtype: torch.dtype = torch.float64) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"0": (40, 56), "1": (20, 28), "2": (10, 14), "3": (5, 7), "pool": (3, 4)}
    return OrderedDict(
        (name, torch.randn(2, CHANNELS, *size, generator=generator, dtype=torch.float64).to(dtype))
        for name, size in sizes.items()
    )


def make_boxes(*counts: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Boxes of 1 to 1000 pixels, so that every level has some."""
    generator = torch.Generator().manual_seed(0)
    boxes = []
    for count in counts:
        half = 0.5 * 10 ** (3 * torch.rand(count, 2, generator=generator, dtype=torch.float64))
        centre = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 200
        boxes.append(torch.cat([centre - half, centre + half], dim=1).to(dtype))
    return boxes


def pool_pyramid(kind: type, features: OrderedDict[str, Tensor], boxes: list[Tensor], sampling_ratio: int = 2) -> list:
    """Pooled boxes, and the gradients of levels 0 to 3."""
    leaves = OrderedDict((name, feature.detach().requires_grad_()) for name, feature in features.items())
    out = kind(LEVELS, 7, sampling_ratio)(leaves, boxes, IMAGE_SHAPES)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, [leaves[name] for name in LEVELS], weights, allow_unused=True)
    zeros = [torch.zeros_like(leaves[name]) for name in LEVELS]
    return [out.detach(), *(zero if grad is None else grad for grad, zero in zip(grads, zeros, strict=True))]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@pytest.mark.parametrize("counts", [(60, 40), (0, 30), (30, 0), (1, 0)])
def test_pyramid_equals_torchvision(counts: tuple[int, int], sampling_ratio: int, layout: str) -> None:
    features = OrderedDict((name, LAYOUTS[layout](feature)) for name, feature in make_pyramid().items())
    boxes = make_boxes(*counts)
    ours = pool_pyramid(FastMultiScaleRoIAlign, features, boxes, sampling_ratio)
    theirs = pool_pyramid(ops.MultiScaleRoIAlign, features, boxes, sampling_ratio)
    assert ours[0].is_contiguous()
    for actual, expected in zip(ours, theirs, strict=True):
        if expected.any():
            assert_near(actual, expected, TOLERANCE[torch.float64])
        else:
            assert torch.equal(actual, expected)


def test_pyramid_comparison_notices_boxes_out_of_order() -> None:
    boxes = make_boxes(20, 20)
    ours = pool_pyramid(FastMultiScaleRoIAlign, make_pyramid(), boxes)
    boxes[0][[3, 4]] = boxes[0][[4, 3]]
    theirs = pool_pyramid(ops.MultiScaleRoIAlign, make_pyramid(), boxes)
    with pytest.raises(AssertionError, match="relative error"):
        assert_near(ours[0], theirs[0], TOLERANCE[torch.float64])


def test_pyramid_boxes_reach_every_level() -> None:
    pooler = FastMultiScaleRoIAlign(LEVELS, 7, 2)
    boxes = make_boxes(60, 40)
    pooler(make_pyramid(), boxes, IMAGE_SHAPES)
    assert pooler.map_levels(boxes).unique().tolist() == [0, 1, 2, 3]
    assert pooler.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_pyramid_without_any_boxes() -> None:
    out, *grads = pool_pyramid(FastMultiScaleRoIAlign, make_pyramid(), make_boxes(0, 0))
    assert out.shape == (0, CHANNELS, 7, 7)
    assert all(
        grad.shape == make_pyramid()[name].shape and not grad.any() for name, grad in zip(LEVELS, grads, strict=True)
    )


def test_pyramid_of_one_level() -> None:
    features = OrderedDict([("0", make_pyramid()["1"])])
    boxes = make_boxes(9, 5)
    ours = FastMultiScaleRoIAlign(["0"], 7, 2)(features, boxes, IMAGE_SHAPES)
    assert_near(ours, ops.MultiScaleRoIAlign(["0"], 7, 2)(features, boxes, IMAGE_SHAPES), 1e-13)


def test_frozen_levels_get_no_gradient() -> None:
    features = make_pyramid()
    features["0"].requires_grad_()
    FastMultiScaleRoIAlign(LEVELS, 7, 2)(features, make_boxes(60, 40), IMAGE_SHAPES).sum().backward()
    assert features["0"].grad is not None
    assert features["1"].grad is None


def test_autocast_gives_torchvisions_type_and_nearly_its_values() -> None:
    features, boxes = make_pyramid(torch.bfloat16), make_boxes(60, 40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = pool_pyramid(FastMultiScaleRoIAlign, features, boxes)
        theirs = pool_pyramid(ops.MultiScaleRoIAlign, features, boxes)
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == expected.dtype == torch.bfloat16
        assert_near(actual, expected, 2 * TOLERANCE[torch.bfloat16])  # both sides are rounded
    # Not only the largest error: the root mean square, where one rounding to bfloat16 alone makes 0.0017.
    error = (ours[0].double() - theirs[0].double()).pow(2).mean() / theirs[0].double().pow(2).mean()
    assert error.sqrt() < 0.004


def test_float32_stays_float32_under_autocast() -> None:
    features, rois = make_features(torch.float32), make_rois().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = roi_align(features, rois, 7, SCALE, 2)
    assert torch.equal(out, roi_align(features, rois, 7, SCALE, 2))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_scripting_uses_torchvisions_operator() -> None:
    def pool(features: Tensor, rois: Tensor) -> Tensor:
        return roi_align(features, rois, [7, 7], 0.25, 2)

    features, rois = make_features(torch.float32), make_rois().float()
    scripted = torch.jit.script(pool)
    assert "torchvision::roi_align" in str(scripted.inlined_graph)
    assert torch.equal(scripted(features, rois), ops.roi_align(features, rois, 7, SCALE, 2))

    scripted = torch.jit.script(FastMultiScaleRoIAlign(LEVELS, 7, 2))
    assert "torchvision::roi_align" in str(scripted.inlined_graph)
    pyramid, boxes = make_pyramid(), make_boxes(6, 4)
    theirs = ops.MultiScaleRoIAlign(LEVELS, 7, 2)(pyramid, boxes, IMAGE_SHAPES)
    assert torch.equal(scripted(dict(pyramid), boxes, IMAGE_SHAPES), theirs)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_and_export_see_torchvisions_operator() -> None:
    class Pool(torch.nn.Module):
        def forward(self, features: Tensor, rois: Tensor) -> Tensor:
            return roi_align(features, rois, 7, SCALE, 2)

    arguments = make_features(torch.float32), make_rois().float()
    traced = torch.jit.trace(Pool(), arguments)
    assert "torchvision::roi_align" in str(traced.inlined_graph)
    exported = torch.export.export(Pool(), arguments)
    assert "torchvision.roi_align" in str(exported.graph)


def test_other_devices_use_torchvisions_operator() -> None:
    assert roi_align(torch.zeros(1, 2, 8, 8, device="meta"), torch.zeros(3, 5, device="meta"), 7).shape == (3, 2, 7, 7)
