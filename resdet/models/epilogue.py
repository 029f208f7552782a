"""What follows a convolution on a device that is not a CPU: bias, sum with a shortcut and ReLU, as one operator.

On a CPU oneDNN does this inside the convolution (``resdet.models.convolution``).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from resdet.models.kernels import kernels_run


def run_epilogue(out: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """Compute ``relu(out + bias + residual)`` in place of a convolution's output, to which nothing else refers.

    It is differentiable once, with respect to all three.

    Args:
        out: ``[B, C, H, W]``.
        bias: ``[C]`` of any floating type, or None.
        residual: ``[B, C, H, W]`` of ``out``'s type, or None.
        relu: Whether a ReLU comes last.
    """
    if bias is None and residual is None and not relu:
        return out
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, bias, residual)):
        return cast(Tensor, _Epilogue.apply(out, bias, residual, relu))
    return cast(Tensor, _epilogue(out, bias, residual, relu))


class _Epilogue(torch.autograd.Function):
    """The operator, and the gradients of everything it takes."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
        ctx.mark_dirty(_epilogue(out, bias, residual, relu))
        ctx.save_for_backward(out if relu else None)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (result,) = ctx.saved_tensors
        if result is not None:
            grad = torch.ops.aten.threshold_backward.default(grad, result, 0)  # [B, C, H, W]
        _, to_bias, to_residual, _ = ctx.needs_input_grad
        grad_bias = grad.sum(dim=(0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if to_bias else None
        return grad, grad_bias, grad if to_residual else None, None


def _by_operations(out: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    if bias is not None:
        out.add_(bias.to(out.dtype).reshape(-1, 1, 1))
    if residual is not None:
        out.add_(residual)
    return out.relu_() if relu else out


def _by_kernel(out: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    if not out.is_contiguous(memory_format=torch.channels_last) or not kernels_run(out.device):
        return _by_operations(out, bias, residual, relu)
    from resdet.models.epilogue_kernels import run_epilogue_on_cuda

    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device(out.device):
        run_epilogue_on_cuda(out, bias, residual, relu)
    return out


torch.library.define(
    "resdet::epilogue_",
    "(Tensor(a!) out, Tensor? bias, Tensor? residual, bool relu) -> Tensor(a!)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.register_fake("resdet::epilogue_", lambda out, bias, residual, relu: out)
torch.library.impl("resdet::epilogue_", "CompositeExplicitAutograd", _by_operations)
torch.library.impl("resdet::epilogue_", "CUDA", _by_kernel)
_epilogue = torch.ops.resdet.epilogue_.default
