"""What follows a convolution on a CUDA device, in one kernel of Triton: bias, sum with a shortcut, ReLU.

cuDNN's convolution leaves each of them to a kernel of its own, which reads and writes the whole feature map, and the
bias even goes through one that is far from the memory's rate, as its stride is not the map's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # numbers of a program


def run_epilogue_on_cuda(out: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> None:
    """Run as ``resdet.models.epilogue.run_epilogue`` does, in place, on the device that is current.

    ``out`` and ``residual`` are channels-last ``[B, C, H, W]`` of one type, bias is ``[C]``. The sum is float32's and
    rounded once.
    """
    if not out.numel():
        return
    epilogue_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
        out,
        out if bias is None else bias,
        out if residual is None else residual,
        out.numel(),
        out.shape[1],
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
        BLOCK=_BLOCK,
        num_warps=8,
    )


@triton.jit
def epilogue_kernel(
    out: tl.tensor,  # [B * H * W, C]
    bias: tl.tensor,  # [C] if HAS_BIAS
    residual: tl.tensor,  # [B * H * W, C] if HAS_RESIDUAL
    size: tl.tensor,  # B * H * W * C
    channels: tl.tensor,  # C
    HAS_BIAS: tl.constexpr,  # noqa: N803
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803
    RELU: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Change a block of a feature map."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    places = tl.arange(0, BLOCK)
    used = places < size - start
    value = tl.load(out + start + places, mask=used, other=0).to(tl.float32)
    if HAS_BIAS:
        channel = ((start % channels).to(tl.int32) + places) % channels
        value += tl.load(bias + channel, mask=used, other=0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + start + places, mask=used, other=0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN remains, as it does in torch's
    tl.store(out + start + places, value.to(out.dtype.element_ty), mask=used)
