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
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resdet.errors import UserError
from resdet.models.tracing import is_captured

# A 1x1 convolution's weight gradient is a matrix product, and oneDNN's product is faster than its convolution (in
# bfloat16, 512 -> 2048 channels of 600 pixels 1.4 ms for 2.1) up to some number of pixels to sum over: of 27,200
# 5.8 ms for 6.1, of 38,400 the same, of 108,800 23 ms for 21.
_PRODUCT_PIXELS = 32_768


class Geometry(NamedTuple):
    """How a convolution's kernel moves, as ``torch.nn.Conv2d`` names it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """Return that of a module."""
        assert not isinstance(conv.padding, str)
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)


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
    packed: PackedWeight | None = None,
    residual: Tensor | None = None,  # [B, O, H', W']
    relu: bool = False,
) -> Tensor:
    """Compute ``relu(conv(x, weight * scale) + bias + residual)``.

    On a CPU with oneDNN it is one operation; elsewhere, and under tracing and compilation, the usual ones. It is
    differentiable once, with respect to ``x``, ``weight``, ``bias`` and ``residual``, but not ``scale``. ``packed`` is
    the weight in oneDNN's orders, which is used where oneDNN runs and nothing goes backward. The result,
    ``[B, O, H', W']``, has the type ``compute_dtype(x, weight)`` and is channels-last where ``x`` is.
    """
    dtype = compute_dtype(x, weight)
    # Asked first, so that programs do not hold conversions that do nothing.
    x, residual = x if x.dtype == dtype else x.to(dtype), _cast(residual, dtype)
    if not _runs_in_one(x, weight, residual, dtype):
        if scale is not None:
            weight = (weight * scale.reshape(-1, 1, 1, 1)).to(dtype=dtype, memory_format=torch.channels_last)
            bias = _cast(bias, dtype)
        out: Tensor = F.conv2d(x, weight, bias, *geometry)
        if residual is not None:
            out += residual  # the output is ours alone, and a convolution's gradient does not need it
        return F.relu(out, inplace=True) if relu else out
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        return cast(Tensor, _Convolution.apply(x, weight, bias, scale, residual, dtype, geometry, relu))
    bias = _cast(bias, dtype)
    ready = _cast_weight(weight, scale, dtype) if packed is None else packed.weight
    return _run(x, ready, bias, residual, geometry, relu, packed)


def conv(x: Tensor, module: nn.Conv2d, *, residual: Tensor | None = None, relu: nn.Module | None = None) -> Tensor:
    """Compute ``relu(module(x) + residual)``; modules with hooks are called as modules, so that the hooks see it."""
    if has_hooks(module):
        out: Tensor = module(x) if residual is None else module(x) + residual
        return out if relu is None else relu(out)
    fused = relu is not None and not has_hooks(relu)
    out = convolve(x, module.weight, module.bias, Geometry.of(module), residual=residual, relu=fused)
    return out if relu is None or fused else relu(out)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, which must see what goes through it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class PackedWeight:
    """A weight in the orders in which oneDNN reads it, for ``convolve``.

    The best order depends on the shape of the input, and a weight in another is reordered in every call, which takes
    many times as long as the convolution. So each shape is looked up once; in bfloat16 nearly all have the same order,
    in float32 one of two or three. The weight must not be written to any more.
    """

    _MOST_ORDERS = 3
    _MOST_SHAPES = 512

    def __init__(self, weight: Tensor, geometry: Geometry) -> None:
        self.weight = weight
        self.total = weight.detach().sum().item()  # finite if all weights are
        self._geometry = geometry
        self._orders: dict[bytes, Tensor] = {}  # by oneDNN's description
        self._by_shape: dict[torch.Size, Tensor] = {}

    def of(self, shape: torch.Size) -> Tensor:
        """Return the weight in the order for inputs of a shape ``[B, I, H, W]``."""
        found = self._by_shape.get(shape)
        if found is not None:
            return found
        stride, padding, dilation, groups = self._geometry
        reorder = torch.ops.mkldnn._reorder_convolution_weight.default
        # Not inference tensors, even where they are made at inference: training may come to use them.
        with torch.inference_mode(False), torch.no_grad():
            fresh: Tensor = reorder(self.weight, padding, stride, dilation, groups, shape)
        order = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(fresh).numpy())
        full = order not in self._orders and len(self._orders) == self._MOST_ORDERS
        if full or len(self._by_shape) == self._MOST_SHAPES:
            self._orders, self._by_shape = {}, {}
        self._by_shape[shape] = self._orders.setdefault(order, fresh)
        return self._by_shape[shape]


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


def _cast_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``weight * scale`` in ``dtype``, channels-last, rounded once."""
    if scale is None:
        return weight.to(dtype=dtype, memory_format=torch.channels_last)
    folded = torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last)
    return torch.mul(weight, scale.reshape(-1, 1, 1, 1), out=folded)


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
        folded = _cast_weight(weight.detach(), scale, dtype)
        out = _run(x.detach(), folded, _cast(bias, dtype), residual, geometry, relu)
        ctx.save_for_backward(x, folded, scale, out if relu else None)
        ctx.plan = weight.dtype, None if bias is None else bias.dtype, geometry
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, folded, scale, out = ctx.saved_tensors  # grad and out: [B, O, H', W']
        weight_dtype, bias_dtype, geometry = ctx.plan
        to_x, to_weight, to_bias, _, to_residual, *_ = ctx.needs_input_grad
        if out is not None:
            grad = torch.ops.aten.threshold_backward.default(grad, out, 0)
        is_product = (
            to_weight
            and grad.dtype == torch.bfloat16
            and folded.shape[2:] == (1, 1)
            and set(geometry.stride) == {1}
            and geometry.groups == 1
            and not any(geometry.padding)
            and grad.numel() // grad.shape[1] <= _PRODUCT_PIXELS
        )
        grad_x = grad_weight = grad_bias = None
        if to_x or (to_weight and not is_product):
            outputs = [to_x, to_weight and not is_product, False]  # not the bias, whose sum below is rounded once
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
                grad, x, folded, None, *geometry[:3], False, [0, 0], geometry.groups, outputs
            )
        if is_product:
            rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])  # [B * H * W, O]
            grad_weight = (rows.t() @ x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])).reshape(folded.shape)
        if grad_weight is not None:  # [O, I / groups, kh, kw]
            grad_weight = grad_weight if scale is None else grad_weight * scale.reshape(-1, 1, 1, 1)
            grad_weight = grad_weight.to(weight_dtype)
        if to_bias:
            grad_bias = grad.sum(dim=(0, 2, 3)).to(bias_dtype)  # the sum runs in float32 and is rounded once
        return grad_x, grad_weight, grad_bias, None, grad if to_residual else None, None, None, None
