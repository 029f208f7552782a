"""Winograd's algorithm computes the convolution, and its gradients, that the direct one does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resdet.models import winograd
from resdet.models.convolution import convolve
from resdet.models.ready_weights import ELEMENT_PRODUCTS, Geometry, PackedWeight, ReadyWeight
from resdet.models.winograd import convolve_tiles, pays, transform_weight, weight_gradient

GEOMETRY = Geometry((1, 1), (1, 1), (1, 1), 1)
# Images, inputs, outputs, height, width: cut tiles on each side, maps smaller than a tile, bands of images.
SHAPES = [(1, 32, 48, 9, 13), (3, 32, 16, 4, 4), (2, 16, 32, 3, 2), (1, 16, 16, 40, 1), (5, 16, 16, 8, 8)]
# The float32 sums are off by some 1e-6 of the largest value; transforms multiply that by two or three.
FLOAT32 = 1e-5
# bfloat16: inputs, weights and products are rounded to 8 bits each, and amplified some four times (1.3e-2 for a
# convolution of 256 channels, top of the module); so few channels scatter more.
BFLOAT16 = 2.5e-2


def maps(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def product(weight: Tensor):
    """As in ``convolution``, by torch's own matrix product."""

    def run(tiles: Tensor) -> Tensor:
        matrices = weight.view(winograd.ELEMENTS, -1, weight.shape[1])  # [P, O, I]
        return torch.einsum("tpi,poi->tpo", tiles.float(), matrices.float()).to(tiles.dtype)

    return run


def largest_error(one: Tensor, exact: Tensor) -> float:
    return float((one.double() - exact).abs().max() / exact.abs().max())


def relative_error(one: Tensor, exact: Tensor) -> float:
    return float((one.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_direct_convolutions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch, num_in, num_out, height, width = shape
    x, residual = maps(batch, num_in, height, width), maps(batch, num_out, height, width)
    weight, bias, scale = torch.randn(num_out, num_in, 3, 3), torch.randn(num_out), torch.rand(num_out) + 0.5
    out = convolve_tiles(
        x, product(transform_weight(weight, scale, x.dtype)), num_out, bias=bias, residual=residual, relu=True
    )
    folded = weight.double() * scale.view(-1, 1, 1, 1)
    exact = (F.conv2d(x.double(), folded, bias.double(), padding=1) + residual).relu()
    assert largest_error(out, exact) < FLOAT32
    assert out.is_contiguous(memory_format=torch.channels_last)
    folded[:, 0, 1, 1] += 0.01
    other = (F.conv2d(x.double(), folded, bias.double(), padding=1) + residual).relu()
    assert largest_error(out, other) > FLOAT32


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_direct_convolutions(shape: tuple[int, ...], dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    batch, num_in, num_out, height, width = shape
    x, grad = maps(batch, num_in, height, width, dtype=dtype), maps(batch, num_out, height, width, dtype=dtype)
    weight = torch.randn(num_out, num_in, 3, 3)
    to_x, to_weight, _ = torch.ops.aten.convolution_backward.default(
        grad.double(), x.double(), weight.double(), None, *GEOMETRY[:3], False, [0, 0], 1, [True, True, False]
    )
    turned = convolve_tiles(grad, product(transform_weight(weight, None, dtype, turned=True)), num_in)
    assert relative_error(turned, to_x) < limit
    assert relative_error(weight_gradient(x, grad), to_weight) < limit
    unturned = convolve_tiles(grad, product(transform_weight(weight.transpose(0, 1), None, dtype)), num_in)
    assert relative_error(unturned, to_x) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bands_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad = maps(3, 16, 21, 18, dtype=dtype), maps(3, 16, 21, 18, dtype=dtype)
    multiply = product(transform_weight(torch.randn(16, 16, 3, 3), None, dtype))
    whole, gradient = convolve_tiles(x, multiply, 16), weight_gradient(x, grad).float()
    for tiles in (1, 5, 10, 31, 70):
        monkeypatch.setattr(winograd, "_band_tiles", lambda *_, most=tiles: most)
        monkeypatch.setattr(winograd, "_GRADIENT_TILES", tiles)
        # Sums over channels are in one order whatever the band; einsum's may not be, by a rounding.
        assert relative_error(convolve_tiles(x, multiply, 16), whole.double()) < (1e-6 if dtype.itemsize == 4 else 4e-3)
        # Parts of a gradient are rounded to bfloat16 each, which is amplified like all roundings.
        assert relative_error(weight_gradient(x, grad), gradient.double()) < (1e-5 if dtype.itemsize == 4 else BFLOAT16)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("kept", [True, False])
def test_convolve_takes_it_forward_and_back(dtype: torch.dtype, limit: float, kept: bool) -> None:
    torch.manual_seed(0)
    x, residual = maps(2, 256, 26, 22, dtype=dtype), maps(2, 256, 26, 22, dtype=dtype)
    weight, bias, scale = torch.randn(256, 256, 3, 3) / 48, torch.randn(256), torch.rand(256) + 0.5
    if not pays(x, weight, GEOMETRY, kept=False):
        pytest.skip("this processor's convolutions are direct")
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN does not compute in bfloat16 on this processor")
    exact_parts = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
    folded = exact_parts[1] * scale.double().view(-1, 1, 1, 1)
    exact = F.conv2d(exact_parts[0], folded, exact_parts[2], padding=1) + exact_parts[3]
    upstream = maps(2, 256, 26, 22, dtype=dtype)
    if kept:
        ready = ReadyWeight(weight, bias, GEOMETRY, dtype, scale)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = convolve(x, weight, bias, GEOMETRY, ready=ready, residual=residual, relu=True)
        assert "transformed" in vars(ready), "another algorithm ran"
        assert "packed" not in vars(ready), "the weight was ordered for the direct one, too"
        assert relative_error(out, exact.detach().relu()) < limit
        return
    parts = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = convolve(parts[0], parts[1], parts[2], GEOMETRY, scale=scale, residual=parts[3])
    assert relative_error(out, exact.detach()) < limit
    ours = torch.autograd.grad(out, parts, upstream)
    theirs = torch.autograd.grad(exact, exact_parts, upstream.double())
    assert [g.dtype for g in ours] == [p.dtype for p in parts]
    for one, other, name in zip(ours, theirs, ("x", "weight", "bias", "residual"), strict=True):
        assert relative_error(one, other) < limit, name


def test_a_trained_detectors_convolutions_are_those_of_its_file() -> None:
    """Whether a weight is kept does not choose the algorithm at inference."""
    torch.manual_seed(0)
    x, weight = maps(1, 512, 9, 9), torch.randn(512, 512, 3, 3)
    assert pays(x, weight, GEOMETRY, kept=True) != pays(x, weight, GEOMETRY, kept=False)
    with torch.no_grad():
        fresh = convolve(x, weight, None, GEOMETRY)
        kept = convolve(x, weight, None, GEOMETRY, ready=ReadyWeight(weight, None, GEOMETRY, torch.float32))
    assert torch.equal(fresh, kept)


@pytest.mark.parametrize(
    ("shape", "out", "geometry", "layout"),
    [
        ((1, 32, 40, 40), 32, GEOMETRY, torch.channels_last),  # few channels: the transforms would take longer
        ((1, 256, 2, 2), 256, GEOMETRY, torch.channels_last),  # few pixels: a tile computes 16
        ((1, 256, 40, 40), 256, GEOMETRY, torch.contiguous_format),
        ((1, 256, 40, 40), 256, GEOMETRY._replace(stride=(2, 2)), torch.channels_last),
        ((1, 256, 40, 40), 256, GEOMETRY._replace(padding=(0, 0)), torch.channels_last),
        ((1, 256, 40, 40), 256, Geometry((1, 1), (2, 2), (2, 2), 1), torch.channels_last),
        ((1, 256, 40, 40), 256, GEOMETRY._replace(groups=2), torch.channels_last),
    ],
)
def test_what_stays_direct(shape, out: int, geometry: Geometry, layout: torch.memory_format) -> None:
    x = torch.empty(shape).contiguous(memory_format=layout)
    assert not pays(x, torch.empty(out, shape[1] // geometry.groups, 3, 3), geometry, kept=True)
    assert not pays(torch.empty(1, 256, 40, 40), torch.empty(256, 256, 1, 1), GEOMETRY, kept=True)


def test_the_rule_knows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = maps(1, 256, 40, 40), torch.empty(256, 256, 3, 3)

    def answers(capability: str, amx: bool) -> list[bool]:
        winograd._transform_cost.cache_clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        return [pays(x.to(dtype), weight, GEOMETRY, kept=True) for dtype in (torch.float32, torch.bfloat16)]

    try:
        assert answers("AVX512", False) == [True, True]
        assert answers("AVX512", True) == [True, False]
        assert answers("DEFAULT", False) == [False, False]
    finally:
        winograd._transform_cost.cache_clear()


def test_nothing_that_is_not_finite_vanishes() -> None:
    torch.manual_seed(0)
    x, weight = maps(1, 256, 20, 20), torch.randn(256, 256, 3, 3)
    x[0, 3, 10, 10] = torch.nan
    weight[7] = torch.inf
    with torch.no_grad():
        out = convolve(x, weight, None, GEOMETRY, relu=True)
    assert out[0, 0, 9:12, 9:12].isnan().all()
    assert out[0, 7].isnan().all()
    assert out[0, 0, :4, :4].isfinite().all()
    assert ELEMENT_PRODUCTS.groups == winograd.ELEMENTS
    assert PackedWeight(transform_weight(weight, None, x.dtype), ELEMENT_PRODUCTS).total != 0
