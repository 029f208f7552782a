"""VGG bodies, the backbones before ResNets, under torchvision's parameter names.

Legend: ``B`` images, ``C`` channels, ``H, W`` pixels. Stage ``k`` (1..5) is the output of ``conv{k}_n`` after its ReLU,
at stride ``2 ** (k - 1)``; stage 6 is ``pool5``, at stride 32. Faster R-CNN runs on stage 5 alone, at stride 16; a
feature pyramid is built on stages 3 to 6, which have the strides of a ResNet's C2..C5.

Source: Simonyan & Zisserman (arXiv:1409.1556), configuration D; layout, names and initialisation of
``torchvision/models/vgg.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from resdet.errors import UserError
from resdet.models.archs import VGGArch, find_arch
from resdet.models.convolution import check_finite, conv
from resdet.models.feature_info import FeatureInfo
from resdet.models.norm import conv_norm, norm_layer
from resdet.models.resnet import check_stages
from resdet.models.tracing import scripted_as

_CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """A VGG without its classifier; used as a ``ResNet`` is, with the first three arguments of ``make_body``."""

    __jit_unused_properties__: ClassVar[list[str]] = ["feature_info"]
    fast: ClassVar[bool] = False
    stride_in_1x1 = False
    dilate_c5 = False

    def __init__(
        self, arch: str, *, norm: str = "frozen", norm_eps: float = 1e-5, returned_layers: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        shape = find_arch(arch)
        if not isinstance(shape, VGGArch):
            raise UserError(f"arch: {arch} is not a VGG")
        make_norm = norm_layer(norm, norm_eps)
        stages = check_stages(returned_layers, shape)
        self.arch, self.norm, self.norm_eps = arch, norm, norm_eps
        self.returned_layers = stages
        self.with_norm = shape.norm

        layers: list[nn.Module] = []
        ends: list[int] = []  # number of layers up to each stage's output
        in_channels = 3
        # Names of all stages are needed, so all are laid out; what comes after the last returned one is dropped.
        for depth, channels in zip(shape.depths, _CHANNELS, strict=True):
            layers += [nn.MaxPool2d(2, stride=2)] if layers else []
            for _ in range(depth):
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                layers += [make_norm(channels)] if shape.norm else []
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
            ends.append(len(layers))
        self.stage_modules = {
            f"conv{stage}": [f"features.{index}" for index in range(first, end)]
            for stage, (first, end) in enumerate(pairwise([0, *ends]), 1)
        }
        layers.append(nn.MaxPool2d(2, stride=2))
        ends.append(len(layers))
        self.features = nn.Sequential(*layers[: ends[stages[-1] - 1]])
        self._level_at = {ends[stage - 1] - 1: str(level) for level, stage in enumerate(stages)}
        self.return_layers = {f"features.{index}": level for index, level in self._level_at.items()}
        self.channels = [_CHANNELS[min(stage, 5) - 1] for stage in stages]
        self.strides = [shape.strides[stage - 1] for stage in stages]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels, strides and modules of the feature maps, as ``ResNet`` states them; the first is conv1's."""
        info = [
            {"num_chs": channels, "reduction": stride, "module": module}
            for channels, stride, module in zip(self.channels, self.strides, self.return_layers, strict=True)
        ]
        return FeatureInfo(info, range(len(info)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute features as a ``ResNet`` does, their sizes rounded down."""
        features: dict[str, Tensor] = OrderedDict()
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._level_at:
                features[self._level_at[index]] = x
        return features


class FastVGG(VGG):
    """The same network, channels-last, each convolution one operation with its bias, frozen norm and ReLU."""

    fast = True

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the same features."""
        check_finite(x)
        features: dict[str, Tensor] = OrderedDict()
        x = x.contiguous(memory_format=torch.channels_last)
        layers = list(self.features)
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d) and self.with_norm:
                x = conv_norm(x, layer, layers[index + 1], relu=layers[index + 2])
            elif isinstance(layer, nn.Conv2d):
                x = conv(x, layer, relu=layers[index + 1])
            elif isinstance(layer, nn.MaxPool2d):
                x = layer(x)
            if index in self._level_at:
                features[self._level_at[index]] = x
        return features

    def __prepare_scriptable__(self) -> VGG:
        return scripted_as(self, VGG)
