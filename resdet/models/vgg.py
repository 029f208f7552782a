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
from typing import ClassVar

import torch
from torch import Tensor, nn

from resdet.errors import UserError
from resdet.models.archs import VGGArch, find_arch
from resdet.models.convolution import conv
from resdet.models.norm import conv_norm, norm_layer
from resdet.models.resnet import check_stages
from resdet.models.tracing import scripted_as

_CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """A VGG without its classifier, which returns the features of chosen stages; used as a ``ResNet`` is.

    Args:
        arch: Its name, a key of ``resdet.models.archs.ARCHS``.
        norm: ``"frozen"``, ``"batch"`` or ``"group"``, where the network has norms.
        norm_eps: Added to the variance by every norm.
        returned_layers: Stages to return, rising, each in 1..6; by default 3 to 6. Later stages are not built.

    Attributes:
        channels: Channels of each returned feature map.
        strides: Stride of each returned feature map, in input pixels.
        stage_modules: As a ``ResNet``'s.

    Raises:
        UserError: If there is no such VGG or norm, or ``returned_layers`` is empty, repeats a stage, or is not rising
            in 1..6.
    """

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
        stages = check_stages(returned_layers, shape.pyramid, len(shape.strides))
        self.arch = arch
        self.norm = norm
        self.norm_eps = norm_eps
        self.returned_layers = stages
        self.with_norm = shape.norm

        layers: list[nn.Module] = []
        modules_of: dict[str, list[str]] = {}
        last_of: dict[int, int] = {}  # index of the layer whose output is the stage's
        in_channels = 3
        # Names of all stages are needed, so all are laid out; what comes after the last returned one is dropped.
        for stage, (depth, channels) in enumerate(zip(shape.depths, _CHANNELS, strict=True), 1):
            first = len(layers)
            if stage > 1:
                layers.append(nn.MaxPool2d(2, stride=2))
            for _ in range(depth):
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                layers += [make_norm(channels)] if shape.norm else []
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
            last_of[stage] = len(layers) - 1
            modules_of[f"conv{stage}"] = [f"features.{index}" for index in range(first, len(layers))]
        layers.append(nn.MaxPool2d(2, stride=2))
        last_of[6] = len(layers) - 1
        self.stage_modules = modules_of
        self.features = nn.Sequential(*layers[: last_of[stages[-1]] + 1])
        self.return_layers = {f"features.{last_of[stage]}": str(level) for level, stage in enumerate(stages)}
        self._level_at = {last_of[stage]: str(level) for level, stage in enumerate(stages)}
        self.channels = [_CHANNELS[min(stage, 5) - 1] for stage in stages]
        self.strides = [shape.strides[stage - 1] for stage in stages]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features of the returned stages.

        Args:
            x: Images ``[B, 3, H, W]``, normalised by mean and standard deviation.

        Returns:
            An OrderedDict, ``"0"`` for the first returned stage, ``"1"`` for the second, ...: ``[B, C, H / stride,
            W / stride]`` (rounded down), with ``C`` from ``channels`` and ``stride`` from ``strides``.
        """
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
        """Compute the features of the returned stages, as ``VGG`` does."""
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
