"""The convolution with what follows it in one: the same values and gradients as one operation after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resdet.models import convolution
from resdet.models.convolution import conv, convolve
from resdet.models.norm import FrozenBatchNorm2d, conv_norm
from resdet.models.ready_weights import Geometry, PackedWeight, ReadyWeight

# kernel, stride, dilation, groups; the first is the one whose weight gradient is a matrix product in bfloat16.
KINDS = [(1, 1, 1, 1), (1, 2, 1, 1), (3, 1, 1, 1), (3, 2, 1, 4), (3, 1, 2, 1)]
# float32 sums of 288 products near 1 are off by some 1e-6; bfloat16 has 8 bits, and each tensor is rounded to it
# once on the way.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def one_after_the_other(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, scale: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    out = F.conv2d(x, weight * scale.view(-1, 1, 1, 1), bias, *geometry)
    out = out if residual is None else out + residual
    return F.relu(out) if relu else out


def operands(kind: tuple[int, int, int, int]) -> tuple[Geometry, dict[str, Tensor]]:
    kernel, stride, dilation, groups = kind
    padding = dilation * (kernel // 2)
    geometry = Geometry((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(2, 32, 9, 7),
        "weight": torch.randn(16, 32 // groups, kernel, kernel) / kernel / 32**0.5,
        "bias": torch.randn(16),
        "scale": torch.rand(16) + 0.5,
    }
    shape = F.conv2d(tensors["x"], tensors["weight"], None, *geometry).shape
    tensors |= {"residual": torch.randn(shape), "upstream": torch.randn(shape)}
    return geometry, tensors


def relative_error(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach()).norm() / other.detach().norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("relu", "added"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_operations(kind, relu: bool, added: bool, dtype: torch.dtype) -> None:
    geometry, tensors = operands(kind)
    # What both start from is rounded to bfloat16, so that only what is computed differs.
    given = {name: (t if name in ("weight", "bias", "scale") else t.to(dtype)) for name, t in tensors.items()}
    leaves = ["x", "weight", "bias"] + (["residual"] if added else [])

    def run(function, kind_of: torch.dtype | None) -> list[Tensor]:
        parts = {name: (t if kind_of is None else t.to(kind_of)).clone() for name, t in given.items()}
        parts["x"] = parts["x"].contiguous(memory_format=torch.channels_last)
        for name in leaves:
            parts[name].requires_grad_()
        residual = parts["residual"] if added else None
        out = function(parts, residual)
        return [out, *torch.autograd.grad(out, [parts[name] for name in leaves], parts["upstream"].to(out.dtype))]

    def fused(parts: dict[str, Tensor], residual: Tensor | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return convolve(
                parts["x"], parts["weight"], parts["bias"], geometry, scale=parts["scale"], residual=residual, relu=relu
            )

    ours = run(fused, None)
    exact = run(
        lambda p, residual: one_after_the_other(p["x"], p["weight"], p["bias"], geometry, p["scale"], residual, relu),
        torch.float64,
    )
    assert ours[0].dtype == dtype
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert [t.dtype for t in ours[1:]] == [given[name].dtype for name in leaves]
    for name, one, other in zip(["out", *leaves], ours, exact, strict=True):
        # A value that rounding carries over ReLU's corner takes its whole gradient along: some in a thousand do.
        limit = TOLERANCE[dtype] if name == "out" or not relu or dtype == torch.float32 else 0.06
        assert relative_error(one, other) < limit, name
    given["scale"][3] *= 2
    assert relative_error(run(fused, None)[0], exact[0]) > TOLERANCE[dtype]


def test_one_operation_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = convolution._run
    monkeypatch.setattr(convolution, "_run", lambda *arguments: calls.append(arguments) or run(*arguments))
    module = nn.Conv2d(8, 8, 3, padding=1)
    x = torch.randn(1, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    conv(x, module, relu=nn.ReLU())
    assert len(calls) == 1
    # Where it may not run, the usual operations do, and give the same.
    assert torch.equal(conv(x.double(), module.double()), module(x.double()))
    with torch.backends.mkldnn.flags(enabled=False):
        conv(x, module.float())
    module.requires_grad_(False)
    torch.jit.trace(lambda image: conv(image, module), x, check_trace=False)
    torch.func.vmap(lambda image: conv(image[None], module))(x)
    assert len(calls) == 1


def test_inputs_keep_their_values() -> None:
    geometry, tensors = operands(KINDS[2])
    x = tensors["x"].contiguous(memory_format=torch.channels_last)
    residual = tensors["residual"]
    before = x.clone(), residual.clone()
    with torch.no_grad():
        convolve(x, tensors["weight"], None, geometry, residual=residual, relu=True)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("watched", ["conv", "norm", "relu"])
def test_hooks_see_what_goes_through_their_module(watched: str) -> None:
    torch.manual_seed(0)
    modules = {"conv": nn.Conv2d(4, 6, 3, bias=False), "norm": FrozenBatchNorm2d(6), "relu": nn.ReLU()}
    modules["norm"].running_var.uniform_(0.5, 2)
    x, residual = torch.randn(1, 4, 6, 6), torch.randn(1, 6, 4, 4)
    plain = conv_norm(x, modules["conv"], modules["norm"], residual=residual, relu=modules["relu"])
    seen = []
    modules[watched].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    hooked = conv_norm(x, modules["conv"], modules["norm"], residual=residual, relu=modules["relu"])
    # float32 rounding of sums of 36 products.
    torch.testing.assert_close(hooked, plain, rtol=1e-5, atol=1e-6)
    (output,) = seen
    expected = {"conv": modules["conv"](x)}
    expected["norm"] = modules["norm"](expected["conv"])
    expected["relu"] = plain
    torch.testing.assert_close(output, expected[watched], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 5])
def test_maps_of_one_pixel_and_of_any_layout_are_added_to(size: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, size, size).bfloat16().contiguous(memory_format=layout)
    residual, module = torch.randn(2, 16, size, size).bfloat16(), nn.Conv2d(32, 16, 1).bfloat16()
    out = conv(x, module, residual=residual, relu=nn.ReLU())
    expected = F.relu(F.conv2d(x.double(), module.weight.double(), module.bias.double()) + residual.double())
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]


def test_a_residual_of_another_type_is_brought_to_the_convolutions() -> None:
    geometry, tensors = operands(KINDS[2])
    with torch.autocast("cpu", torch.bfloat16):
        out = convolve(tensors["x"], tensors["weight"], None, geometry, residual=tensors["residual"])
    assert out.dtype == torch.bfloat16


def test_gradients_reach_an_input_through_frozen_weights() -> None:
    geometry, tensors = operands(KINDS[2])
    x = tensors["x"].requires_grad_()
    grad = torch.autograd.grad(convolve(x, tensors["weight"], None, geometry).sum(), x)[0]
    expected = torch.autograd.grad(F.conv2d(x, tensors["weight"], None, *geometry).sum(), x)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)  # sums of 144 float32 products


def test_packed_weights_share_their_orders_and_forget_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, tensors = operands(KINDS[2])
    packed = PackedWeight(tensors["weight"].contiguous(memory_format=torch.channels_last), geometry)
    shapes = [torch.Size((1, 32, height, 9)) for height in range(3, 40)]
    orders = {id(packed.of(shape)) for shape in shapes}
    assert len(orders) < len(shapes)
    assert packed.of(shapes[0]) is packed.of(shapes[0])
    x = torch.randn(shapes[5]).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = convolve(x, tensors["weight"], tensors["bias"], geometry, relu=True)
        ready = ReadyWeight(tensors["weight"], tensors["bias"], geometry, torch.float32)
        assert torch.equal(convolve(x, tensors["weight"], None, geometry, ready=ready, relu=True), plain)
    monkeypatch.setattr(PackedWeight, "_MOST_SHAPES", 37)
    packed.of(torch.Size((2, 32, 3, 9)))
    assert len(packed._by_shape) == 1


@pytest.mark.parametrize("scaled", [False, True])
def test_other_devices_bring_input_and_shortcut_to_the_weights_type(
    monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    """A model brought to bfloat16 takes float32 images on a CPU, so it must elsewhere too."""
    geometry, tensors = operands(KINDS[2])
    monkeypatch.setattr(convolution, "_runs_in_one", lambda *_: False)
    weight, bias = tensors["weight"].bfloat16(), tensors["bias"].bfloat16()
    residual = tensors["residual"].requires_grad_()
    x = tensors["x"].requires_grad_()
    scale = tensors["scale"] if scaled else None
    out = convolve(x, weight, bias, geometry, scale=scale, residual=residual, relu=True)
    assert out.dtype == torch.bfloat16
    factor = tensors["scale"] if scaled else torch.ones(16)
    exact = one_after_the_other(x.double(), weight.double(), bias.double(), geometry, factor.double(), residual, True)
    assert relative_error(out, exact) < TOLERANCE[torch.bfloat16]
    grads = torch.autograd.grad(out.float().sum(), [x, residual])
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_other_devices_add_the_shortcut_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_runs_in_one", lambda *_: False)
    geometry, tensors = operands(KINDS[0])
    weight = tensors["weight"].requires_grad_()
    outputs = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *arguments: outputs.append(conv2d(*arguments)) or outputs[-1])
    out = convolve(tensors["x"], weight, None, geometry, residual=tensors["residual"], relu=True)
    assert out.data_ptr() == outputs[0].data_ptr()
    expected = F.relu(conv2d(tensors["x"], weight, None, *geometry) + tensors["residual"])
    assert torch.equal(out, expected)
    (slope,), (exact,) = torch.autograd.grad(out.sum(), weight), torch.autograd.grad(expected.sum(), weight)
    assert torch.equal(slope, exact)
