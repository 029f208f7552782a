"""A convolution with all that follows it, in one pass over its output: bias, sum with a shortcut, ReLU.

``relu(conv(x, weight * scale) + bias + residual)`` is what a residual network is made of. On a CPU each of these steps
as an operation of its own reads and writes the whole feature map, and in bfloat16 that costs as much as the arithmetic
of a 1x1 convolution. oneDNN does them while a block of the output is still in the core's cache; torch exposes this as
operators that its compiler uses (``torch.ops.mkldnn``), which are called here without compiling. It is our own because
torch has neither a module nor a gradient for them.

Measured on 2 cores (AMD Zen 5, bfloat16), 64 -> 256 channels at 120x160, two images: convolution, addition and ReLU
take 2.94 ms one after the other and 1.75 ms in one. Weights that are kept are brought into oneDNN's own order once
(``PackedWeight``): at inference reading, ordering and writing them back had taken 58 of 640 ms. What did not pay:

* Adding into the shortcut in place, 303 for 321 ms of a ResNet-101: callers that hold a block's input would see it
  overwritten.
* ``torch.compile`` of body and pyramid with inductor's freezing: 447 ms where this took 494 before weights were kept in
  oneDNN's order, which is what it gained by, and 21 s of compiling for each size of image.

oneDNN's ReLU turns NaN into 0, where torch's keeps it: a diverged network would pass for one that finds nothing. So
before each fused ReLU the operands are looked at, and if one is not finite, torch's ReLU runs. Biases are looked at
whole, maps at the middle pixel of each image. That is enough, as images are refused before (``check_finite``), and a
channel whose weights are not finite is made NaN all over, though with infinite weights it need not be. What can still
vanish is an overflow inside a network of finite weights, where it misses the middle of the map. A step of training
reads its weights one time more than the dozen times that it does anyway, inference not at all, as weights are kept; of
a map of 200x300 one pixel in 60,000 is read again. On 2 cores of an AMD EPYC (Zen 4), 800x1088, ResNet-101 with FPN in
bfloat16 took 922 ms where it had taken 909, and steps of training differed by less than they scatter.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resdet.devices import is_queued
from resdet.errors import UserError
from resdet.models.epilogue import run_epilogue
from resdet.models.ready_weights import (
    ELEMENT_PRODUCTS,
    POINT,
    Geometry,
    KeepsReadyWeights,
    PackedWeight,
    ReadyWeight,
    cast_weight,
)
from resdet.models.tracing import is_captured
from resdet.models.winograd import convolve_tiles, pays, transform_weight, weight_gradient

# A 1x1 convolution's weight gradient is a matrix product, and oneDNN's product is faster than its convolution (in
# bfloat16, 512 -> 2048 channels of 600 pixels 1.4 ms for 2.1) up to some number of pixels to sum over: of 27,200
# 5.8 ms for 6.1, of 38,400 the same, of 108,800 23 ms for 21.
_PRODUCT_PIXELS = 32_768


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the type in which a convolution of ``x`` runs: autocast's, where that is on, or else its weight's."""
    device = x.device.type
    # Older compilers cannot follow the first question, and ask only of devices that have autocast.
    if (is_captured() or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def convolve(
    x: Tensor,  # [B, I, H, W]
    weight: Tensor,  # [O, I / groups, kh, kw]
    bias: Tensor | None,  # [O]
    geometry: Geometry,
    *,
    scale: Tensor | None = None,  # [O]
    ready: ReadyWeight | None = None,
    residual: Tensor | None = None,  # [B, O, H', W']
    relu: bool = False,
) -> Tensor:
    """Compute ``relu(conv(x, weight * scale) + bias + residual)``.

    On a CPU with oneDNN it is one operation, or Winograd's algorithm where that is faster (``winograd.pays``); on other
    devices a convolution and one operator for the rest (``run_epilogue``); elsewhere, and under tracing and
    compilation, the usual operations. It is differentiable once, with respect to
    ``x``, ``weight``, ``bias`` and ``residual``, but not ``scale``. ``ready`` is what was kept of weight, scale and
    bias, of the type below, and is used where nothing goes backward. The result, ``[B, O, H', W']``, has the type
    ``compute_dtype(x, weight)`` and is channels-last where ``x`` is.
    """
    dtype = compute_dtype(x, weight)
    # Asked first, so that programs do not hold conversions that do nothing.
    x, residual = x if x.dtype == dtype else x.to(dtype), _cast(residual, dtype)
    if not _runs_in_one(x, weight, residual, dtype):
        if ready is not None:
            weight, bias = ready.weight, ready.bias
        elif scale is not None:
            weight = (weight * scale.reshape(-1, 1, 1, 1)).to(dtype=dtype, memory_format=torch.channels_last)
            bias = _cast(bias, dtype)
        if _is_queued_plainly(x):
            return run_epilogue(F.conv2d(x, weight, None, *geometry), bias, residual, relu)
        out: Tensor = F.conv2d(x, weight, bias, *geometry)
        if residual is not None:
            out += residual  # the output is ours alone, and a convolution's gradient does not need it
        return F.relu(out, inplace=True) if relu else out
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        if ready is not None:
            weight, bias, scale = ready.weight, ready.bias, None
        return cast(Tensor, _Convolution.apply(x, weight, bias, scale, residual, dtype, geometry, relu))
    is_kept = ready is not None
    ready = ready or ReadyWeight(weight, bias, geometry, dtype, scale)
    # As if the weight were kept, even where it is not: a detector just trained computes what its file will.
    if pays(x, weight, geometry, kept=True):
        return _run_tiles(x, ready.transformed, ready.bias, residual, relu)
    return _run(x, ready.weight, ready.bias, residual, geometry, relu, ready.packed if is_kept else None)


def conv(
    x: Tensor,
    module: nn.Conv2d,
    *,
    residual: Tensor | None = None,
    relu: nn.Module | None = None,
    keeper: KeepsReadyWeights | None = None,
    name: str = "",
) -> Tensor:
    """Compute ``relu(module(x) + residual)``; modules with hooks are called as modules, so that the hooks see it.

    The keeper, if there is one, keeps the module's weight under the name.
    """
    if has_hooks(module):
        out: Tensor = module(x) if residual is None else module(x) + residual
        return out if relu is None else relu(out)
    fused = relu is not None and not has_hooks(relu)
    weight, bias, geometry = module.weight, module.bias, Geometry.of(module)
    ready = None
    if keeper is not None:
        dtype = compute_dtype(x, weight)
        ready = keeper.ready_weight(name, module, (), (dtype,), lambda: ReadyWeight(weight, bias, geometry, dtype))
    out = convolve(x, weight, bias, geometry, ready=ready, residual=residual, relu=fused)
    return out if relu is None or fused else relu(out)


def linear_relu(x: Tensor, layer: nn.Linear, keeper: KeepsReadyWeights, name: str) -> Tensor:
    """Compute ``relu(layer(x))``, ``[N, O]`` from ``[N, I]``, with the weight that the keeper keeps under the name.

    A weight in oneDNN's order is neither cast nor ordered in each call, and float32 is not left to MKL: 1,000 vectors
    of 12,544 to 1,024 take 117 ms for 135 in float32, 58 for 63 in bfloat16 (2 cores, AMD Zen 4).
    """
    dtype = compute_dtype(x, layer.weight)
    make = partial(ReadyWeight, layer.weight, layer.bias, POINT, dtype)
    ready = keeper.ready_weight(name, layer, (), (dtype,), make)  # asked in training too, to know what is trained
    goes_back = torch.is_grad_enabled() and any(t.requires_grad for t in (x, layer.weight, layer.bias))
    if goes_back or has_hooks(layer) or not _runs_in_one(x, layer.weight, None, dtype):
        return F.relu(layer(x))
    ready = ready or make()  # the same operation where nothing may be kept: as convolve does, and for its reason
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), ready.linear, ready.bias, "none", [], "")
    return out.relu_()  # torch's, which keeps NaN


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, which must see what goes through it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _runs_in_one(x: Tensor, weight: Tensor, residual: Tensor | None, dtype: torch.dtype) -> bool:
    """Return whether oneDNN's operator may replace torch's."""
    if is_captured() or x.device.type != "cpu" or not torch._C._has_mkldnn or not torch._C._get_mkldnn_enabled():
        return False
    return (
        (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
        and x.numel() > 0
        and _is_plain(x)
        and _is_plain(weight)
        and (residual is None or _is_plain(residual))
    )


def _is_queued_plainly(x: Tensor) -> bool:
    """Return whether a tensor is on a device that is not a CPU, and no tracer or ``torch.func`` looks on."""
    return is_queued(x.device) and not is_captured() and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is no fake one, no proxy of a tracer, and no batched one of torch.func."""
    return type(tensor) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    relu: bool,
    packed: PackedWeight | None = None,
) -> Tensor:
    stride, padding, dilation, groups = geometry
    operator = torch.ops.mkldnn._convolution_pointwise
    kernel = (weight if packed is None else packed.of(x.shape), bias, padding, stride, dilation, groups)
    # Without a ReLU nothing can vanish.
    is_sound = not relu or math.isfinite(weight.sum().item() if packed is None else packed.total)
    fused = relu and is_sound and _seem_finite(x, bias, residual)
    out: Tensor
    if residual is None:
        out = operator.default(x, *kernel, "relu" if fused else "none", [], "")
    # The operator adds by itself only here; elsewhere it calls an addition that does not know bfloat16.
    elif groups == 1 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        out = operator.binary(x, residual, *kernel, "add", 1.0, "relu" if fused else None, [], "")
    else:
        out, fused = operator.default(x, *kernel, "none", [], "").add_(residual), False
    if not is_sound:
        out[:, ~weight.flatten(1).isfinite().all(dim=1)] = torch.nan
    return out.relu_() if relu and not fused else out


def _run_tiles(
    x: Tensor, transformed: PackedWeight, bias: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    """Run Winograd's algorithm; every ReLU in it is torch's, so nothing that is not finite vanishes."""
    num_out = len(transformed.weight) // ELEMENT_PRODUCTS.groups

    def product(tiles: Tensor) -> Tensor:
        rows = tiles.view(1, len(tiles), 1, -1).permute(0, 3, 1, 2)  # [1, P * I, T, 1]
        out = _run(rows, transformed.weight, None, None, ELEMENT_PRODUCTS, False, transformed)
        return out.permute(0, 2, 3, 1).view(len(tiles), -1, num_out)

    return convolve_tiles(x, product, num_out, bias=bias, residual=residual, relu=relu)


def _seem_finite(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Return whether a bias and the middle pixel of each map are finite; sums that overflow only cost time."""
    total = _middle(x).sum()
    if bias is not None:
        total = total + bias.sum()
    if residual is not None:
        total = total + _middle(residual).sum()
    return math.isfinite(total.item())


def _middle(x: Tensor) -> Tensor:
    """Return the pixel in the middle of each map of ``[B, C, H, W]``, ``[B, C]``."""
    return x.select(3, x.shape[3] // 2).select(2, x.shape[2] // 2)


def check_finite(images: Tensor) -> None:
    """Raise a UserError that names the images of a batch ``[B, 3, H, W]`` that hold NaN or infinity.

    Only on CPUs, where they would vanish (top of this module); elsewhere looking would wait for the device, and they
    are carried on to what a network returns.
    """
    if is_captured() or images.device.type != "cpu" or not _is_plain(images) or math.isfinite(images.sum().item()):
        return
    finite = images.detach().isfinite().flatten(1).all(dim=1)  # [B]
    if not finite.all():
        where = ", ".join(map(str, torch.where(~finite)[0].tolist()))
        raise UserError(f"images must be finite: NaN or infinity in image {where} (from 0) of a batch of {len(images)}")


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


class _Convolution(torch.autograd.Function):
    """The operator, and the gradients of everything it takes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        dtype: torch.dtype,
        geometry: Geometry,
        relu: bool,
    ) -> Tensor:
        kernel = weight.detach()
        tiled = pays(x, weight, geometry, kept=False)
        if tiled:
            transformed = PackedWeight(transform_weight(kernel, scale, dtype), ELEMENT_PRODUCTS)
            out = _run_tiles(x.detach(), transformed, _cast(bias, dtype), residual, relu)
        else:
            kernel = cast_weight(kernel, scale, dtype)
            out = _run(x.detach(), kernel, _cast(bias, dtype), residual, geometry, relu)
        ctx.save_for_backward(x, kernel, scale, out if relu else None)
        ctx.plan = tiled, weight.dtype, None if bias is None else bias.dtype, geometry
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, scale, out = ctx.saved_tensors  # grad and out: [B, O, H', W']
        tiled, weight_dtype, bias_dtype, geometry = ctx.plan
        to_x, to_weight, to_bias, _, to_residual, *_ = ctx.needs_input_grad
        if out is not None:
            grad = torch.ops.aten.threshold_backward.default(grad, out, 0)
        grad_x = grad_weight = grad_bias = None
        if not tiled:
            grad_x, grad_weight = _direct_gradients(grad, x, kernel, geometry, to_x, to_weight)
        else:
            if to_x:
                turned = PackedWeight(transform_weight(kernel, scale, grad.dtype, turned=True), ELEMENT_PRODUCTS)
                grad_x = _run_tiles(grad, turned, None, None, False)
            if to_weight:
                grad_weight = weight_gradient(x, grad)
        if grad_weight is not None:  # [O, I / groups, kh, kw]
            grad_weight = grad_weight if scale is None else grad_weight * scale.reshape(-1, 1, 1, 1)
            grad_weight = grad_weight.to(weight_dtype)
        if to_bias:
            grad_bias = grad.sum(dim=(0, 2, 3)).to(bias_dtype)  # the sum runs in float32 and is rounded once
        return grad_x, grad_weight, grad_bias, None, grad if to_residual else None, None, None, None


def _direct_gradients(
    grad: Tensor, x: Tensor, folded: Tensor, geometry: Geometry, to_x: bool, to_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients to the input and to the folded weight, as far as they are asked for."""
    is_product = (
        to_weight
        and grad.dtype == torch.bfloat16
        and folded.shape[2:] == (1, 1)
        and set(geometry.stride) == {1}
        and geometry.groups == 1
        and not any(geometry.padding)
        and grad.numel() // grad.shape[1] <= _PRODUCT_PIXELS
    )
    grad_x = grad_weight = None
    if to_x or (to_weight and not is_product):
        outputs = [to_x, to_weight and not is_product, False]  # not the bias, whose sum is rounded once
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
            grad, x, folded, None, *geometry[:3], False, [0, 0], geometry.groups, outputs
        )
    if is_product:
        rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])  # [B * H * W, O]
        grad_weight = (rows.t() @ x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])).reshape(folded.shape)
    return grad_x, grad_weight
