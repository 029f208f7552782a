"""ResNet bodies: a stem, two kinds of blocks, stages; features C2..C5 under torchvision's parameter names.

One class is every residual network of ``resdet.models.archs``; rare stems and shortcuts are in ``shortcuts``.

From ``FastBottleneck.forward`` to oneDNN (``Bottleneck``, with ``fast`` off, runs torchvision's operations instead):

1. ``FastResNet`` brings the images to channels-last once; every operation that follows keeps that layout.
2. Each ``conv_norm(x, conv, norm, residual, relu)`` is one convolution with all that follows it. Norms that are not
   frozen, and modules with hooks, run there as modules.
3. ``FrozenBatchNorm2d.convolve`` folds the norm: ``weight * scale`` and a bias. Of weights that are not trained the
   result is kept, in the order of memory in which oneDNN reads it.
4. ``convolution.convolve`` asks whether oneDNN may run: on a CPU, in float32 or bfloat16, not into a program.
5. If so, ``torch.ops.mkldnn._convolution_pointwise`` adds bias and shortcut and applies the ReLU while a part of the
   output is in the core's cache; ``_Convolution`` is its gradient.
   oneDNN's ReLU would turn NaN into 0; ``convolution`` says what is done against it.
6. If not, ``F.conv2d`` runs with the folded weight, and the sum and the ReLU in place on its output.

Legend: ``B`` images, ``C`` channels, ``H, W`` pixels, ``s`` the stride of a block. Stage ``k`` (``layer{k}``, k = 1..4)
returns C(k+1) at stride ``2 ** (k + 1)``; the three stages of CIFAR's networks have strides 1, 2 and 4.

Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), and the papers named in
``resdet.models.archs``. Layout, names and initialisation are those of ``torchvision/models/resnet.py``, including its
one deviation from the first paper: a bottleneck strides in its 3x3 convolution, not in the first 1x1 (ResNet "v1.5").
``stride_in_1x1`` is the paper's way, that of the weights MSRA published and of the detectors that were trained from
them. The deep stem and the average-pooling shortcut are named and computed as in timm's ``resnet50d``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from resdet.errors import UserError
from resdet.models.archs import Arch, ResNetArch, find_arch
from resdet.models.convolution import check_finite
from resdet.models.feature_info import FeatureInfo
from resdet.models.norm import MakeNorm, conv_norm, folded_together, norm_layer
from resdet.models.shortcuts import BlockShape, DeepStem, fast_stem, make_shortcut
from resdet.models.tracing import is_captured, scripted_as


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ``downsample`` fits the input to the output, and is None where it fits."""

    def __init__(self, shape: BlockShape, norm: MakeNorm, downsample: nn.Module | None) -> None:
        super().__init__()
        width, (first, second) = shape.width, shape.dilation
        self.conv1 = nn.Conv2d(shape.in_channels, width, 3, shape.stride, padding=first, dilation=first, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=second, dilation=second, bias=False)
        self.bn2 = norm(width)
        self.residual = shape.shortcut != "none"
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, width, H / s, W / s]``."""
        out = self.relu(self.bn1(self.conv1(x)))  # [B, width, H / s, W / s]
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            x = self.downsample(x)  # [B, width, H / s, W / s]
        if self.residual:
            out += x
        return self.relu(out)  # type: ignore[no-any-return]


class FastBasicBlock(BasicBlock):
    """The same block from two operations on a CPU; see the top of this module."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, width, H / s, W / s]``."""
        out = conv_norm(x, self.conv1, self.bn1, relu=self.relu)
        return conv_norm(out, self.conv2, self.bn2, residual=_shortcut(self, x), relu=self.relu)

    def __prepare_scriptable__(self) -> BasicBlock:
        return scripted_as(self, BasicBlock)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided, grouped) and 1x1 convolution, and a shortcut; built as a ``BasicBlock`` is."""

    def __init__(self, shape: BlockShape, norm: MakeNorm, downsample: nn.Module | None) -> None:
        super().__init__()
        width, groups = shape.width, shape.groups
        stride_1x1, stride_3x3 = (shape.stride, 1) if shape.stride_in_1x1 else (1, shape.stride)
        spread = shape.dilation[1 if shape.stride_in_1x1 else 0]
        self.conv1 = nn.Conv2d(shape.in_channels, width, 1, stride_1x1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride_3x3, padding=spread, dilation=spread, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, shape.out_channels, 1, bias=False)
        self.bn3 = norm(shape.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.residual = shape.shortcut != "none"
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H / s, W / s]``."""
        out = self.relu(self.bn1(self.conv1(x)))  # [B, width, H, W], or strided already
        out = self.relu(self.bn2(self.conv2(out)))  # [B, width, H / s, W / s]
        out = self.bn3(self.conv3(out))  # [B, out_channels, H / s, W / s]
        if self.downsample is not None:
            x = self.downsample(x)  # [B, out_channels, H / s, W / s]
        if self.residual:
            out += x
        return self.relu(out)  # type: ignore[no-any-return]


class FastBottleneck(Bottleneck):
    """The same block from three operations on a CPU; see the top of this module."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H / s, W / s]``."""
        out = conv_norm(x, self.conv1, self.bn1, relu=self.relu)  # [B, width, H, W], or strided already
        out = conv_norm(out, self.conv2, self.bn2, relu=self.relu)  # [B, width, H / s, W / s]
        return conv_norm(out, self.conv3, self.bn3, residual=_shortcut(self, x), relu=self.relu)

    def __prepare_scriptable__(self) -> Bottleneck:
        return scripted_as(self, Bottleneck)


def _shortcut(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor | None:
    """Return what is added to a block's last norm, or None in a plain network."""
    if not block.residual:
        return None
    return x if block.downsample is None else block.downsample(x)


class ResNet(nn.Module):
    """A ResNet without its classifier, which returns the features of chosen stages; torchvision's, bit for bit.

    Stages after the last returned one are not built, so the state dict is that of torchvision's
    ``IntermediateLayerGetter`` around the network of the same name, for any choice of stages.

    Its arguments are those of ``make_body``, whose ``fast`` picks ``FastResNet``.
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["feature_info"]
    fast: ClassVar[bool] = False
    block_kinds: ClassVar[dict[str, type[BasicBlock | Bottleneck]]] = {"basic": BasicBlock, "bottleneck": Bottleneck}

    def __init__(
        self,
        arch: str,
        *,
        norm: str = "frozen",
        norm_eps: float = 1e-5,
        returned_layers: Sequence[int] | None = None,
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
        stages = check_stages(returned_layers, shape)
        self.arch, self.norm, self.norm_eps = arch, norm, norm_eps
        self.stride_in_1x1, self.dilate_c5 = stride_in_1x1, dilate_c5
        self.returned_layers = stages
        self.return_layers = {f"layer{stage}": str(level) for level, stage in enumerate(stages)}
        of_stage = {f"layer{stage}": [f"layer{stage}"] for stage in range(1, len(shape.depths) + 1)}
        # The names of each stage's modules, from the input on; stages that are not built are there too.
        self.stage_modules = {"stem": ["conv1", "bn1", "maxpool"], **of_stage}

        self.conv1 = _make_stem(shape, make_norm)
        self.bn1 = make_norm(shape.channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if shape.stem == "3x3" else nn.MaxPool2d(3, stride=2, padding=1)
        for stage in range(1, stages[-1] + 1):
            self.add_module(f"layer{stage}", self._make_stage(shape, stage, make_norm))
        self.channels = [shape.stage_channels(stage) for stage in stages]  # of each returned feature map, as strides
        self.strides = [16 if dilate_c5 and stage == 4 else shape.strides[stage - 1] for stage in stages]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(last_layers(module)[1].weight)  # type: ignore[arg-type]

    def _make_stage(self, shape: ResNetArch, stage: int, norm: MakeNorm) -> nn.Sequential:
        dilated = self.dilate_c5 and stage == 4
        blocks: list[nn.Module] = []
        for index in range(shape.depths[stage - 1]):
            strides = stage > 1 and index == 0
            block = BlockShape(
                in_channels=shape.stage_channels(stage if index else stage - 1),
                width=shape.stage_width(stage),
                out_channels=shape.stage_channels(stage),
                stride=2 if strides and not dilated else 1,
                dilation=(1 if strides else 2, 2) if dilated else (1, 1),
                groups=shape.groups,
                stride_in_1x1=self.stride_in_1x1,
                shortcut=shape.shortcut,
            )
            blocks.append(self.block_kinds[shape.block](block, norm, make_shortcut(block, norm, fast=self.fast)))
        return nn.Sequential(*blocks)

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels, strides and modules of the feature maps, as timm's ``features_only`` networks state them."""
        shape = find_arch(self.arch)
        assert isinstance(shape, ResNetArch)
        info = [{"num_chs": shape.channels, "reduction": max(shape.strides[0] // 2, 1), "module": "relu"}]
        for stage in range(1, self.returned_layers[-1] + 1):
            stride = 16 if self.dilate_c5 and stage == 4 else shape.strides[stage - 1]
            info.append({"num_chs": shape.stage_channels(stage), "reduction": stride, "module": f"layer{stage}"})
        return FeatureInfo(info, self.returned_layers)

    def stem(self, x: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` to ``[B, C, H / 2, W / 2]``, or to ``[B, C, H, W]`` in CIFAR's networks."""
        return self.relu(self.bn1(self.conv1(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map normalised images ``[B, 3, H, W]`` to features ``[B, C, H / stride, W / stride]``, rounded up.

        The first returned stage is called ``"0"``, the second ``"1"``, and so on.
        """
        x = self.maxpool(self.stem(x))  # [B, 64, H / 4, W / 4]
        features: dict[str, Tensor] = OrderedDict()
        for name, stage in self.named_children():
            if name.startswith("layer"):
                x = stage(x)
                if name in self.return_layers:
                    features[self.return_layers[name]] = x
        return features

    def take_off_stage(self) -> nn.Sequential:
        """Take the last of several returned stages off the body, to be run elsewhere; return it."""
        assert len(self.returned_layers) > 1
        name = f"layer{self.returned_layers[-1]}"
        stage = self.get_submodule(name)
        assert isinstance(stage, nn.Sequential)
        delattr(self, name)
        del self.return_layers[name]
        self.returned_layers = self.returned_layers[:-1]
        self.channels, self.strides = self.channels[:-1], self.strides[:-1]
        return stage


class FastResNet(ResNet):
    """The same network, channels-last, with frozen norms folded into the convolutions."""

    fast = True
    block_kinds: ClassVar = {"basic": FastBasicBlock, "bottleneck": FastBottleneck}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images as ``ResNet.forward`` does."""
        if is_captured():
            return super().forward(x)
        with folded_together(self, x):
            return super().forward(x)

    def stem(self, x: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` as ``ResNet.stem`` does, to channels-last features."""
        check_finite(x)
        return fast_stem(x.contiguous(memory_format=torch.channels_last), self.conv1, self.bn1, self.relu)

    def __prepare_scriptable__(self) -> ResNet:
        return scripted_as(self, ResNet)


def _make_stem(shape: ResNetArch, norm: MakeNorm) -> nn.Conv2d | DeepStem:
    if shape.stem == "deep":
        return DeepStem(shape.channels, norm)
    if shape.stem == "3x3":
        return nn.Conv2d(3, shape.channels, 3, padding=1, bias=False)
    return nn.Conv2d(3, shape.channels, 7, stride=2, padding=3, bias=False)


def check_stages(returned_layers: Sequence[int] | None, shape: Arch) -> tuple[int, ...]:
    """Return the stages that a body returns; raise a UserError if there are none, or not rising ones that it has."""
    stages = shape.pyramid if returned_layers is None else tuple(returned_layers)
    known = range(1, len(shape.strides) + 1)
    if not stages or not set(stages) <= set(known) or list(stages) != sorted(set(stages)):
        numbers = ", ".join(map(str, known))
        raise UserError(f"returned_layers must be stages out of {numbers}, rising, each once; got {list(stages)}")
    return stages


def last_layers(block: BasicBlock | Bottleneck) -> tuple[nn.Conv2d, nn.Module]:
    """Return a block's last convolution, and its norm, whose output is added to the shortcut."""
    return (block.conv2, block.bn2) if isinstance(block, BasicBlock) else (block.conv3, block.bn3)
