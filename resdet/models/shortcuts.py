"""What a residual network seldom has: ResNet-C's stem, and shortcuts other than the identity.

Options A, B and C are those of the first paper (table 3), D is ResNet-D's; ``ResNetArch.shortcut`` names them.

Legend: ``B`` images, ``I, O`` input and output channels, ``H, W`` pixels, ``s`` the stride of the block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from resdet.models.archs import Shortcut
from resdet.models.norm import conv_norm
from resdet.models.tracing import scripted_as

MakeNorm = Callable[[int], nn.Module]
"""Makes the norm for a number of channels."""


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


class Projection(nn.Sequential):
    """Options B and C: the 1x1 convolution (``"0"``) and norm (``"1"``) that fit a block's input to its output."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: MakeNorm) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


class FastProjection(Projection):
    """A projection with its frozen norm folded."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, I, H, W]`` to ``[B, O, H / s, W / s]``."""
        return conv_norm(x, self[0], self[1])  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> Projection:
        return scripted_as(self, Projection)


class Smooth2x2(nn.Module):
    """Mean of each pixel and its neighbours to the right and below, at stride 1, the border repeated.

    At the pixels that a 2x2 average pooling of stride 2 keeps, it has the same values.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, I, H, W]`` to the same shape."""
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, stride=1)


class PooledProjection(nn.Sequential):
    """Option D: 2x2 mean (``"0"``), 1x1 convolution of stride 1 and norm (``"1"``, ``"2"``)."""

    def __init__(self, in_channels: int, out_channels: int, pool: nn.Module, norm: MakeNorm) -> None:
        super().__init__(pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), norm(out_channels))


class FastPooledProjection(PooledProjection):
    """ResNet-D's projection with its frozen norm folded."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, I, H, W]`` to ``[B, O, H / s, W / s]``."""
        return conv_norm(self[0](x), self[1], self[2])  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> PooledProjection:
        return scripted_as(self, PooledProjection)


def make_shortcut(
    kind: Shortcut,
    in_channels: int,
    out_channels: int,
    *,
    stride: int,
    dilation: tuple[int, int],
    norm: MakeNorm,
    fast: bool,
) -> nn.Module | None:
    """Build what fits a block's input to its output.

    Args:
        kind: See ``ResNetArch``.
        in_channels: ``I``.
        out_channels: ``O``.
        stride: ``s``, 1 or 2.
        dilation: Of the block, before and after the stride that it would have had.
        norm: Makes the norm for a number of channels.
        fast: Whether to fold frozen norms.

    Returns:
        None where the input fits as it is, and in a plain network, which has no shortcuts.
    """
    if kind == "none" or (kind != "C" and stride == 1 and in_channels == out_channels):
        return None
    if kind == "A":
        return ZeroPadding(in_channels, out_channels, stride)
    if kind == "D":
        pool: nn.Module = nn.Identity()
        if stride == 2:
            pool = nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False)
        elif dilation[0] != dilation[1]:
            pool = Smooth2x2()
        return (FastPooledProjection if fast else PooledProjection)(in_channels, out_channels, pool, norm)
    return (FastProjection if fast else Projection)(in_channels, out_channels, stride, norm)
