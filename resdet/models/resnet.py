"""ResNet bodies: stem, blocks, four stages; features C2..C5 under torchvision's parameter names.

Legend: ``B`` images, ``C`` channels, ``H, W`` pixels. Stage ``k`` (``layer{k}``, k = 1..4) gives C(k+1) at stride
``2 ** (k + 1)``.

Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1; Xie et al., "Aggregated
Residual Transformations" (arXiv:1611.05431); Zagoruyko & Komodakis, "Wide Residual Networks" (arXiv:1605.07146).
Layout, names and initialisation are those of ``torchvision/models/resnet.py``, including its one deviation from the
first paper: a bottleneck strides in its 3x3 convolution, not in the first 1x1 (ResNet "v1.5"). ``stride_in_1x1`` is the
paper's way, that of the weights MSRA published and of the detectors that were trained from them.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from resdet.errors import UserError
from resdet.models.norm import conv_norm, is_scripting, norm_layer


@dataclass(frozen=True)
class ResNetArch:
    """What tells one ResNet from another.

    Attributes:
        block: ``"basic"`` (two 3x3) or ``"bottleneck"`` (1x1, 3x3, 1x1 with four times the channels).
        depths: Number of blocks in each of the four stages.
        groups: Groups of a bottleneck's 3x3 convolution.
        width_per_group: Channels of each group in the first stage.
    """

    block: Literal["basic", "bottleneck"]
    depths: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64


ARCHS: dict[str, ResNetArch] = {
    "resnet18": ResNetArch("basic", (2, 2, 2, 2)),
    "resnet34": ResNetArch("basic", (3, 4, 6, 3)),
    "resnet50": ResNetArch("bottleneck", (3, 4, 6, 3)),
    "resnet101": ResNetArch("bottleneck", (3, 4, 23, 3)),
    "resnet152": ResNetArch("bottleneck", (3, 8, 36, 3)),
    "resnext50_32x4d": ResNetArch("bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": ResNetArch("bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": ResNetArch("bottleneck", (3, 4, 23, 3), groups=64, width_per_group=4),
    "wide_resnet50_2": ResNetArch("bottleneck", (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": ResNetArch("bottleneck", (3, 4, 23, 3), width_per_group=128),
}


def find_arch(name: str) -> ResNetArch:
    """Look up an architecture by torchvision's name for it.

    Raises:
        UserError: If there is none of this name; the message offers the nearest one.
    """
    if name not in ARCHS:
        near = difflib.get_close_matches(name, ARCHS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(ARCHS)}"
        raise UserError(f"arch: there is no {name!r}; {hint}")
    return ARCHS[name]


class Projection(nn.Sequential):
    """The 1x1 convolution and norm (``"0"``, ``"1"``) that fit a block's input to its output."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module], fast: bool
    ) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))
        self.fast = fast

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        # TorchScript takes the plain form, here and below: it cannot hand modules to a function.
        if is_scripting() or not self.fast:
            return self[1](self[0](x))  # type: ignore[no-any-return]
        return conv_norm(x, self[0], self[1])  # type: ignore[arg-type]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_channels: Channels of the input.
        width: Channels inside, and of the output.
        stride: Of the first convolution.
        norm: Makes the norm for a number of channels.
        fast: Whether to fold frozen norms into the convolutions.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, width: int, stride: int, norm: Callable[[int], nn.Module], fast: bool) -> None:
        super().__init__()
        self.fast = fast
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.downsample: Projection | None = None
        if stride != 1 or in_channels != width:
            self.downsample = Projection(in_channels, width, stride, norm, fast)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, width, H / stride, W / stride]``."""
        if is_scripting() or not self.fast:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
        else:
            out = self.relu(conv_norm(x, self.conv1, self.bn1))
            out = conv_norm(out, self.conv2, self.bn2)
        if self.downsample is not None:
            x = self.downsample(x)
        out += x
        return self.relu(out)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided, grouped) and 1x1 convolution, and a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: A quarter of the output's channels.
        stride: Of the 3x3 convolution, or of the first 1x1.
        groups: Of the 3x3 convolution.
        width: Channels of the 3x3 convolution.
        norm: Makes the norm for a number of channels.
        fast: Whether to fold frozen norms into the convolutions.
        stride_in_1x1: Whether the first 1x1 convolution strides.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        groups: int,
        width: int,
        norm: Callable[[int], nn.Module],
        fast: bool,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        self.fast = fast
        out_channels = channels * self.expansion
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride_1x1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride_3x3, padding=1, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: Projection | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = Projection(in_channels, out_channels, stride, norm, fast)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, 4 * channels, H / stride, W / stride]``."""
        if is_scripting() or not self.fast:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.relu(self.bn2(self.conv2(out)))
            out = self.bn3(self.conv3(out))
        else:
            out = self.relu(conv_norm(x, self.conv1, self.bn1))
            out = self.relu(conv_norm(out, self.conv2, self.bn2))
            out = conv_norm(out, self.conv3, self.bn3)
        if self.downsample is not None:
            x = self.downsample(x)
        out += x
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A ResNet without its classifier, giving the features of chosen stages.

    Stages after the last returned one are not built, so the state dict is that of torchvision's
    ``IntermediateLayerGetter`` around the network of the same name, for any choice of stages.

    Args:
        arch: torchvision's name, a key of ``ARCHS``.
        norm: ``"frozen"``, ``"batch"`` or ``"group"``. Frozen norms start as the identity: load weights or call
            ``calibrate_norm`` before training.
        norm_eps: Added to the variance by every norm.
        returned_layers: Stages to return, rising, each in 1..4.
        fast: Run channels-last with frozen norms folded into the convolutions. Off, every operation and its order is
            torchvision's, bit for bit.
        stride_in_1x1: Whether bottlenecks stride in their first 1x1 convolution and not in the 3x3. Parameters are the
            same, but each is trained for one of the two; basic blocks know no such choice.

    Attributes:
        channels: Channels of each returned feature map.
        strides: Stride of each returned feature map, in input pixels.

    Raises:
        UserError: If there is no such arch or norm, ``returned_layers`` is empty, repeats a stage, or is not rising
            in 1..4, or ``stride_in_1x1`` is asked of basic blocks.
    """

    def __init__(
        self,
        arch: str,
        *,
        norm: str = "frozen",
        norm_eps: float = 1e-5,
        returned_layers: Sequence[int] = (1, 2, 3, 4),
        fast: bool = True,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        shape = find_arch(arch)
        if stride_in_1x1 and shape.block == "basic":
            raise UserError(
                f"stride_in_1x1 is for bottlenecks; the blocks of {arch} have no 1x1 convolution to stride in"
            )
        make_norm = norm_layer(norm, norm_eps)
        stages = tuple(returned_layers)
        if not stages or not set(stages) <= {1, 2, 3, 4} or list(stages) != sorted(set(stages)):
            raise UserError(f"returned_layers must be stages out of 1, 2, 3, 4, rising, each once; got {list(stages)}")
        self.arch = arch
        self.norm = norm
        self.norm_eps = norm_eps
        self.returned_layers = stages
        self.fast = fast
        self.stride_in_1x1 = stride_in_1x1
        self.return_layers = {f"layer{stage}": str(level) for level, stage in enumerate(stages)}

        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = 64
        channels_of: dict[int, int] = {}
        for stage in range(1, stages[-1] + 1):
            blocks: list[nn.Module] = []
            for index in range(shape.depths[stage - 1]):
                stride = 2 if stage > 1 and index == 0 else 1
                block = _make_block(shape, in_channels, 32 * 2**stage, stride, make_norm, fast, stride_in_1x1)
                in_channels = 32 * 2**stage * block.expansion
                blocks.append(block)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            channels_of[stage] = in_channels
        self.channels = [channels_of[stage] for stage in stages]
        self.strides = [2 ** (stage + 1) for stage in stages]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features of the returned stages.

        Args:
            x: Images ``[B, 3, H, W]``, normalised by mean and standard deviation.

        Returns:
            An OrderedDict, ``"0"`` for the first returned stage, ``"1"`` for the second, ...: ``[B, C, H / stride,
            W / stride]`` (rounded up), with ``C`` from ``channels`` and ``stride`` from ``strides``.
        """
        if is_scripting() or not self.fast:
            x = self.bn1(self.conv1(x))
        else:
            x = conv_norm(x.contiguous(memory_format=torch.channels_last), self.conv1, self.bn1)
        x = self.maxpool(self.relu(x))
        features: dict[str, Tensor] = OrderedDict()
        for name, stage in self.named_children():
            if name.startswith("layer"):
                x = stage(x)
                if name in self.return_layers:
                    features[self.return_layers[name]] = x
        return features


def _make_block(
    shape: ResNetArch,
    in_channels: int,
    channels: int,
    stride: int,
    norm: Callable[[int], nn.Module],
    fast: bool,
    stride_in_1x1: bool,
) -> BasicBlock | Bottleneck:
    if shape.block == "basic":
        return BasicBlock(in_channels, channels, stride, norm, fast)
    width = channels * shape.width_per_group // 64 * shape.groups
    return Bottleneck(in_channels, channels, stride, shape.groups, width, norm, fast, stride_in_1x1)
