"""ResNet bodies: stem, blocks, stages; features C2..C5 under torchvision's parameter names.

One body is every residual network of ``resdet.models.archs``: plain, basic and bottleneck, grouped and wide, with any
stem and any shortcut.

Legend: ``B`` images, ``C`` channels, ``H, W`` pixels. Stage ``k`` (``layer{k}``, k = 1..4) gives C(k+1) at stride
``2 ** (k + 1)``; the three stages of CIFAR's networks have strides 1, 2 and 4.

Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), and the papers named in
``resdet.models.archs``. Layout, names and initialisation are those of ``torchvision/models/resnet.py``, including its
one deviation from the first paper: a bottleneck strides in its 3x3 convolution, not in the first 1x1 (ResNet "v1.5").
``stride_in_1x1`` is the paper's way, that of the weights MSRA published and of the detectors that were trained from
them. The deep stem and the average-pooling shortcut are named and computed as in timm's ``resnet50d``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resdet.errors import UserError
from resdet.models.archs import ResNetArch, Shortcut, find_arch
from resdet.models.norm import conv_norm, norm_layer
from resdet.models.tracing import is_scripting

MakeNorm = Callable[[int], nn.Module]


class DeepStem(nn.Sequential):
    """Three 3x3 convolutions in the place of one 7x7; the norm and ReLU of the last are the body's own.

    Args:
        channels: Of the output; half as many inside.
        norm: Makes the norm for a number of channels.
    """

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


def _stem_norm(x: Tensor, stem: nn.Conv2d | DeepStem, norm: nn.Module, relu: nn.Module) -> Tensor:
    """Compute ``relu(norm(stem(x)))`` with frozen norms folded."""
    if isinstance(stem, nn.Conv2d):
        return conv_norm(x, stem, norm, relu=relu)
    for first in (0, 3):
        x = conv_norm(x, stem[first], stem[first + 1], relu=stem[first + 2])  # type: ignore[arg-type]
    return conv_norm(x, stem[6], norm, relu=relu)  # type: ignore[arg-type]


class ZeroPadding(nn.Module):
    """Option A: every ``stride``-th pixel, and zeros for the channels that are wanting. It has no parameters.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.missing = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        # Pooling over single pixels takes every stride-th; torch.export cannot follow a slice of odd and even sizes.
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.missing))


class Projection(nn.Sequential):
    """The 1x1 convolution and norm (``"0"``, ``"1"``) that fit a block's input to its output."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: MakeNorm, fast: bool) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))
        self.fast = fast

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        # TorchScript takes the plain form, here and below: it cannot hand modules to a function.
        if is_scripting() or not self.fast:
            return self[1](self[0](x))  # type: ignore[no-any-return]
        return conv_norm(x, self[0], self[1])  # type: ignore[arg-type]


class Smooth2x2(nn.Module):
    """Mean of each pixel and its neighbours to the right and below, at stride 1, the border repeated.

    Of the pixels that a 2x2 average pooling of stride 2 keeps, it gives the same values.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, stride=1)


class PooledProjection(nn.Sequential):
    """ResNet-D's projection: 2x2 mean (``"0"``), 1x1 convolution of stride 1 and norm (``"1"``, ``"2"``)."""

    def __init__(self, in_channels: int, out_channels: int, pool: nn.Module, norm: MakeNorm, fast: bool) -> None:
        super().__init__(pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), norm(out_channels))
        self.fast = fast

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        x = self[0](x)
        if is_scripting() or not self.fast:
            return self[2](self[1](x))  # type: ignore[no-any-return]
        return conv_norm(x, self[1], self[2])  # type: ignore[arg-type]


def _make_shortcut(
    kind: Shortcut,
    in_channels: int,
    out_channels: int,
    stride: int,
    dilation: tuple[int, int],
    norm: MakeNorm,
    fast: bool,
) -> nn.Module | None:
    """Give what fits a block's input to its output, or None where it fits (or, in a plain network, is not used)."""
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
        return PooledProjection(in_channels, out_channels, pool, norm, fast)
    return Projection(in_channels, out_channels, stride, norm, fast)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_channels: Channels of the input.
        width: Channels inside, and of the output.
        stride: Of the first convolution.
        dilation: Of the first and of the second convolution.
        shortcut: Its kind; see ``ResNetArch``.
        norm: Makes the norm for a number of channels.
        fast: Whether to fold frozen norms into the convolutions.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilation: tuple[int, int],
        shortcut: Shortcut,
        norm: MakeNorm,
        fast: bool,
    ) -> None:
        super().__init__()
        self.fast = fast
        first, second = dilation
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=first, dilation=first, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=second, dilation=second, bias=False)
        self.bn2 = norm(width)
        self.residual = shortcut != "none"
        self.downsample = _make_shortcut(shortcut, in_channels, width, stride, dilation, norm, fast)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, width, H / stride, W / stride]``."""
        if not is_scripting():  # noqa: SIM102 - TorchScript drops this block only if the condition stands alone
            if self.fast:
                return self._fast_forward(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            x = self.downsample(x)
        if self.residual:
            out += x
        return self.relu(out)  # type: ignore[no-any-return]

    @torch.jit.unused
    def _fast_forward(self, x: Tensor) -> Tensor:
        out = conv_norm(x, self.conv1, self.bn1, relu=self.relu)
        return conv_norm(out, self.conv2, self.bn2, residual=_shortcut(self, x), relu=self.relu)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided, grouped) and 1x1 convolution, and a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: A quarter of the output's channels.
        stride: Of the 3x3 convolution, or of the first 1x1.
        dilation: Before and after the stride; the 3x3 convolution has the one or the other.
        groups: Of the 3x3 convolution.
        width: Channels of the 3x3 convolution.
        shortcut: Its kind; see ``ResNetArch``.
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
        dilation: tuple[int, int],
        groups: int,
        width: int,
        shortcut: Shortcut,
        norm: MakeNorm,
        fast: bool,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        self.fast = fast
        out_channels = channels * self.expansion
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        spread = dilation[1] if stride_in_1x1 else dilation[0]
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride_1x1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride_3x3, padding=spread, dilation=spread, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.residual = shortcut != "none"
        self.downsample = _make_shortcut(shortcut, in_channels, out_channels, stride, dilation, norm, fast)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, 4 * channels, H / stride, W / stride]``."""
        if not is_scripting():  # noqa: SIM102 - TorchScript drops this block only if the condition stands alone
            if self.fast:
                return self._fast_forward(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            x = self.downsample(x)
        if self.residual:
            out += x
        return self.relu(out)  # type: ignore[no-any-return]

    @torch.jit.unused
    def _fast_forward(self, x: Tensor) -> Tensor:
        out = conv_norm(x, self.conv1, self.bn1, relu=self.relu)
        out = conv_norm(out, self.conv2, self.bn2, relu=self.relu)
        return conv_norm(out, self.conv3, self.bn3, residual=_shortcut(self, x), relu=self.relu)


def _shortcut(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor | None:
    """Give what is added to a block's last norm, or None in a plain network."""
    if not block.residual:
        return None
    shortcut: Tensor = x if block.downsample is None else block.downsample(x)
    return shortcut


class ResNet(nn.Module):
    """A ResNet without its classifier, giving the features of chosen stages.

    Stages after the last returned one are not built, so the state dict is that of torchvision's
    ``IntermediateLayerGetter`` around the network of the same name, for any choice of stages.

    Args:
        arch: Its name, a key of ``resdet.models.archs.ARCHS``.
        norm: ``"frozen"``, ``"batch"`` or ``"group"``. Frozen norms start as the identity: load weights or call
            ``calibrate_norm`` before training.
        norm_eps: Added to the variance by every norm.
        returned_layers: Stages to return, rising, each in 1..4 (1..3 for CIFAR's); by default all.
        fast: Run channels-last with frozen norms folded into the convolutions. Off, every operation and its order is
            torchvision's, bit for bit.
        stride_in_1x1: Whether bottlenecks stride in their first 1x1 convolution and not in the 3x3. Parameters are the
            same, but each is trained for one of the two; basic blocks know no such choice.
        dilate_c5: Whether stage 4 is dilated instead of strided (DC5), so that C5 has stride 16. Every second pixel of
            it is that of the strided stage, for the same weights: what comes after the stride that was taken away has
            dilation 2. With a stride in the 3x3 this is torchvision's ``replace_stride_with_dilation``; detectron2
            dilates the whole stage, which differs by the first 3x3.
        zero_init_residual: Whether the last norm of each block starts with scale 0, so that blocks start as the
            identity (Goyal et al., arXiv:1706.02677, section 5.1), as in torchvision.

    Attributes:
        channels: Channels of each returned feature map.
        strides: Stride of each returned feature map, in input pixels.
        stage_modules: The stages of this architecture from the input on, and the names of their modules; stages that
            are not built are there too.

    Raises:
        UserError: If there is no such ResNet or norm, ``returned_layers`` is empty, repeats a stage, or is not rising
            in its range, or an option does not fit the architecture or the norm.
    """

    def __init__(
        self,
        arch: str,
        *,
        norm: str = "frozen",
        norm_eps: float = 1e-5,
        returned_layers: Sequence[int] | None = None,
        fast: bool = True,
        stride_in_1x1: bool = False,
        dilate_c5: bool = False,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        shape = find_arch(arch)
        if not isinstance(shape, ResNetArch):
            raise UserError(f"arch: {arch} is not a ResNet")
        if stride_in_1x1 and shape.block == "basic":
            raise UserError(
                f"stride_in_1x1 is for bottlenecks; the blocks of {arch} have no 1x1 convolution to stride in"
            )
        if dilate_c5 and len(shape.depths) < 4:
            raise UserError(f"dilate_c5 is for networks of four stages, {arch} has {len(shape.depths)}")
        if zero_init_residual and (norm == "frozen" or shape.shortcut == "none"):
            raise UserError(
                "zero_init_residual starts blocks as the identity by the scale of a norm that is trained: it needs "
                f"shortcuts, and norm batch or group; got {arch} with norm {norm}"
            )
        make_norm = norm_layer(norm, norm_eps)
        stages = check_stages(returned_layers, shape.pyramid, len(shape.depths))
        self.arch = arch
        self.norm = norm
        self.norm_eps = norm_eps
        self.returned_layers = stages
        self.fast = fast
        self.stride_in_1x1 = stride_in_1x1
        self.dilate_c5 = dilate_c5
        self.return_layers = {f"layer{stage}": str(level) for level, stage in enumerate(stages)}
        of_stage = {f"layer{stage}": [f"layer{stage}"] for stage in range(1, len(shape.depths) + 1)}
        self.stage_modules = {"stem": ["conv1", "bn1", "maxpool"], **of_stage}

        in_channels = shape.channels
        stem: nn.Conv2d | DeepStem
        if shape.stem == "deep":
            stem = DeepStem(in_channels, make_norm)
        elif shape.stem == "3x3":
            stem = nn.Conv2d(3, in_channels, 3, padding=1, bias=False)
        else:
            stem = nn.Conv2d(3, in_channels, 7, stride=2, padding=3, bias=False)
        self.conv1 = stem
        self.bn1 = make_norm(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if shape.stem == "3x3" else nn.MaxPool2d(3, stride=2, padding=1)
        channels_of: dict[int, int] = {}
        for stage in range(1, stages[-1] + 1):
            dilated = dilate_c5 and stage == 4
            blocks: list[nn.Module] = []
            for index in range(shape.depths[stage - 1]):
                starts = stage > 1 and index == 0
                channels = shape.channels * 2 ** (stage - 1)
                stride = 2 if starts and not dilated else 1
                dilation = ((1 if starts else 2), 2) if dilated else (1, 1)
                block: BasicBlock | Bottleneck
                if shape.block == "basic":
                    block = BasicBlock(in_channels, channels, stride, dilation, shape.shortcut, make_norm, fast)
                else:
                    block = Bottleneck(
                        in_channels,
                        channels,
                        stride,
                        dilation,
                        shape.groups,
                        channels * shape.width_per_group // 64 * shape.groups,
                        shape.shortcut,
                        make_norm,
                        fast,
                        stride_in_1x1,
                    )
                in_channels = channels * block.expansion
                blocks.append(block)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            channels_of[stage] = in_channels
        self.channels = [channels_of[stage] for stage in stages]
        self.strides = [16 if dilate_c5 and stage == 4 else shape.strides[stage - 1] for stage in stages]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(last_norm(module).weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features of the returned stages.

        Args:
            x: Images ``[B, 3, H, W]``, normalised by mean and standard deviation.

        Returns:
            An OrderedDict, ``"0"`` for the first returned stage, ``"1"`` for the second, ...: ``[B, C, H / stride,
            W / stride]`` (rounded up), with ``C`` from ``channels`` and ``stride`` from ``strides``.
        """
        if is_scripting() or not self.fast:
            x = self.relu(self.bn1(self.conv1(x)))
        else:
            x = _stem_norm(x.contiguous(memory_format=torch.channels_last), self.conv1, self.bn1, self.relu)
        x = self.maxpool(x)
        features: dict[str, Tensor] = OrderedDict()
        for name, stage in self.named_children():
            if name.startswith("layer"):
                x = stage(x)
                if name in self.return_layers:
                    features[self.return_layers[name]] = x
        return features

    def take_off_stage(self) -> nn.Sequential:
        """Take the last of several returned stages off the body, to be run elsewhere.

        Returns:
            The stage; the body now ends with the one before.
        """
        assert len(self.returned_layers) > 1
        name = f"layer{self.returned_layers[-1]}"
        stage = self.get_submodule(name)
        assert isinstance(stage, nn.Sequential)
        delattr(self, name)
        del self.return_layers[name]
        self.returned_layers = self.returned_layers[:-1]
        self.channels, self.strides = self.channels[:-1], self.strides[:-1]
        return stage


def check_stages(returned_layers: Sequence[int] | None, default: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """Give the stages that a body returns.

    Raises:
        UserError: If they are none, repeat, or are not rising in 1..num_stages.
    """
    stages = default if returned_layers is None else tuple(returned_layers)
    if not stages or not set(stages) <= set(range(1, num_stages + 1)) or list(stages) != sorted(set(stages)):
        known = ", ".join(map(str, range(1, num_stages + 1)))
        raise UserError(f"returned_layers must be stages out of {known}, rising, each once; got {list(stages)}")
    return stages


def last_norm(block: BasicBlock | Bottleneck) -> nn.Module:
    """Give the norm whose output is added to the shortcut."""
    return block.bn2 if isinstance(block, BasicBlock) else block.bn3


def last_conv(block: BasicBlock | Bottleneck) -> nn.Conv2d:
    """Give the convolution before that norm."""
    return block.conv2 if isinstance(block, BasicBlock) else block.conv3
