"""What a residual network seldom has: ResNet-C's stem, and shortcuts other than the identity.

Options A, B and C are those of the first paper (table 3), D is ResNet-D's; ``ResNetArch.shortcut`` names them.

Legend: ``B`` images, ``I, O`` input and output channels, ``H, W`` pixels, ``s`` the stride of the block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from resdet.models.archs import Shortcut
from resdet.models.norm import MakeNorm, conv_norm
from resdet.models.tracing import scripted_as


class BlockShape(NamedTuple):
    """What distinguishes one residual block from another."""

    in_channels: int
    width: int  # channels inside
    out_channels: int  # of a basic block: its width
    stride: int
    dilation: tuple[int, int]  # before and after the stride, or the place of one that was dilated away
    groups: int  # of a bottleneck's 3x3 convolution
    stride_in_1x1: bool  # whether a bottleneck strides in its first 1x1 convolution and not in the 3x3
    shortcut: Shortcut


class DeepStem(nn.Sequential):
    """ResNet-C's three 3x3 convolutions in place of one 7x7; the norm and ReLU of the last are the body's own."""

    def __init__(self, channels: int, norm: MakeNorm) -> None:
        super().__init__(
            nn.Conv2d(3, channels // 2, 3, stride=2, padding=1, bias=False),
            norm(channels // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 2, channels // 2, 3, padding=1, bias=False),
            norm(channels // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 2, channels, 3, padding=1, bias=False),
        )


def fast_stem(x: Tensor, stem: nn.Conv2d | DeepStem, norm: nn.Module, relu: nn.Module) -> Tensor:
    """Compute ``relu(norm(stem(x)))`` with frozen norms folded."""
    if isinstance(stem, nn.Conv2d):
        return conv_norm(x, stem, norm, relu=relu)
    for first in (0, 3):
        x = conv_norm(x, stem[first], stem[first + 1], relu=stem[first + 2])  # type: ignore[arg-type]
    return conv_norm(x, stem[6], norm, relu=relu)  # type: ignore[arg-type]


class ZeroPadding(nn.Module):
    """Option A: every ``stride``-th pixel, and zeros for the missing channels. It has no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.missing = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, I, H, W]`` to ``[B, O, H / s, W / s]``."""
        # Pooling over single pixels takes every s-th; torch.export cannot follow a slice of odd and even sizes.
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.missing))  # pads dimension 1 at its end


class Smooth2x2(nn.Module):
    """Mean of each pixel and its neighbours to the right and below, at stride 1, the border repeated.

    At the pixels that a 2x2 average pooling of stride 2 keeps, it has the same values.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, I, H, W]`` to the same shape."""
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, stride=1)


class Projection(nn.Sequential):
    """Options B, C and D: in D a 2x2 mean, then the 1x1 convolution and norm that fit a block's input to its output."""


class FastProjection(Projection):
    """A projection with its frozen norm folded."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, I, H, W]`` to ``[B, O, H / s, W / s]``."""
        *mean, conv, norm = self
        for module in mean:
            x = module(x)
        return conv_norm(x, conv, norm)  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> Projection:
        return scripted_as(self, Projection)


def make_shortcut(block: BlockShape, norm: MakeNorm, *, fast: bool) -> nn.Module | None:
    """Build what fits a block's input to its output; None where it fits, and in a plain network without shortcuts."""
    kind, in_channels, out_channels, stride = block.shortcut, block.in_channels, block.out_channels, block.stride
    if kind == "none" or (kind != "C" and stride == 1 and in_channels == out_channels):
        return None
    if kind == "A":
        return ZeroPadding(in_channels, out_channels, stride)
    mean: list[nn.Module] = []
    if kind == "D" and stride == 2:
        mean, stride = [nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False)], 1
    elif kind == "D":  # a stride that was dilated away leaves its mean
        mean = [nn.Identity() if block.dilation[0] == block.dilation[1] else Smooth2x2()]
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return (FastProjection if fast else Projection)(*mean, conv, norm(out_channels))
