"""The table of architectures: the properties that distinguish one network from another, and nothing else.

Networks that torchvision has carry its names and its parameter names; ``resnet*c`` and ``resnet*d`` carry timm's. All
others are named after their papers.

Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385): table 1 (ImageNet), section 4.2
(CIFAR), table 3 (options A, B, C of the shortcut). He et al., "Bag of Tricks for Image Classification" (arXiv:
1812.01187): ResNet-C and ResNet-D. Xie et al., "Aggregated Residual Transformations" (arXiv:1611.05431). Zagoruyko &
Komodakis, "Wide Residual Networks" (arXiv:1605.07146). Simonyan & Zisserman, "Very Deep Convolutional Networks" (arXiv:
1409.1556), configuration D.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, TypeAlias

from resdet.errors import UserError

Shortcut: TypeAlias = Literal["none", "A", "B", "C", "D"]


@dataclass(frozen=True)
class ResNetArch:
    """The properties that distinguish one ResNet from another."""

    block: Literal["basic", "bottleneck"]  # two 3x3; or 1x1, 3x3, 1x1 with four times the channels
    depths: tuple[int, ...]  # number of blocks in each stage
    groups: int = 1  # of a bottleneck's 3x3 convolution
    width_per_group: int = 64  # channels of each group in the first stage
    # Stride 2, then max pooling; ResNet-C's three 3x3 of 32, 32 and 64 channels instead (PSPNet's have 64, 64 and 128);
    # or CIFAR's, without stride and pooling.
    stem: Literal["7x7", "deep", "3x3"] = "7x7"
    # How a block's input bypasses it. B: the identity, a 1x1 projection where shapes change. A: there a subsampled map
    # filled up with zero channels, so that no shortcut has parameters. C: a projection around every block. D: as B, but
    # ResNet-D's, which averages 2x2 pixels before a projection that does not stride. none: the plain network.
    shortcut: Shortcut = "B"
    channels: int = 64  # of the stem's output; each stage after the first has twice the width

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each stage's output, in input pixels."""
        first = 1 if self.stem == "3x3" else 4
        return tuple(first * 2**stage for stage in range(len(self.depths)))

    @property
    def pyramid(self) -> tuple[int, ...]:
        """Stages that a feature pyramid is built on."""
        return tuple(range(1, len(self.depths) + 1))

    def stage_width(self, stage: int) -> int:
        """Return the channels inside the blocks of stage ``stage``, counted from 1."""
        width: int = self.channels * 2 ** (stage - 1)
        return width * self.width_per_group // 64 * self.groups

    def stage_channels(self, stage: int) -> int:
        """Return the channels of a stage's output, of the stem's for stage 0."""
        width: int = self.channels * 2 ** max(stage - 1, 0)
        return 4 * width if self.block == "bottleneck" and stage else width


@dataclass(frozen=True)
class VGGArch:
    """The properties that distinguish one VGG from another."""

    depths: tuple[int, int, int, int, int]  # 3x3 convolutions in each stage, of 64, 128, 256, 512 and 512 channels
    norm: bool  # whether each is followed by a norm

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each stage's output, in input pixels: conv1 to conv5, and pool5."""
        return (1, 2, 4, 8, 16, 32)

    @property
    def pyramid(self) -> tuple[int, ...]:
        """Stages that a feature pyramid is built on: those with a ResNet's strides."""
        return (3, 4, 5, 6)


Arch: TypeAlias = ResNetArch | VGGArch

_18, _34, _50, _101, _152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)


def _cifar(num_layers: int, shortcut: Shortcut = "A") -> ResNetArch:
    """Describe the ``6n + 2`` layers of section 4.2: a convolution, three stages of ``n`` blocks, the classifier."""
    return ResNetArch("basic", ((num_layers - 2) // 6,) * 3, stem="3x3", shortcut=shortcut, channels=16)


ARCHS: dict[str, Arch] = {
    # ImageNet, as torchvision has them.
    "resnet18": ResNetArch("basic", _18),
    "resnet34": ResNetArch("basic", _34),
    "resnet50": ResNetArch("bottleneck", _50),
    "resnet101": ResNetArch("bottleneck", _101),
    "resnet152": ResNetArch("bottleneck", _152),
    "resnext50_32x4d": ResNetArch("bottleneck", _50, groups=32, width_per_group=4),
    "resnext101_32x8d": ResNetArch("bottleneck", _101, groups=32, width_per_group=8),
    "resnext101_64x4d": ResNetArch("bottleneck", _101, groups=64, width_per_group=4),
    "wide_resnet50_2": ResNetArch("bottleneck", _50, width_per_group=128),
    "wide_resnet101_2": ResNetArch("bottleneck", _101, width_per_group=128),
    "vgg16": VGGArch((2, 2, 3, 3, 3), norm=False),
    "vgg16_bn": VGGArch((2, 2, 3, 3, 3), norm=True),
    # Deep stem (C), and with it the average-pooling shortcut (D), as timm has them.
    "resnet50c": ResNetArch("bottleneck", _50, stem="deep"),
    "resnet101c": ResNetArch("bottleneck", _101, stem="deep"),
    "resnet18d": ResNetArch("basic", _18, stem="deep", shortcut="D"),
    "resnet34d": ResNetArch("basic", _34, stem="deep", shortcut="D"),
    "resnet50d": ResNetArch("bottleneck", _50, stem="deep", shortcut="D"),
    "resnet101d": ResNetArch("bottleneck", _101, stem="deep", shortcut="D"),
    "resnet152d": ResNetArch("bottleneck", _152, stem="deep", shortcut="D"),
    # The first paper's plain networks, and its other two options of the shortcut (those above have B).
    "plain18": ResNetArch("basic", _18, shortcut="none"),
    "plain34": ResNetArch("basic", _34, shortcut="none"),
    "resnet18_option_a": ResNetArch("basic", _18, shortcut="A"),
    "resnet34_option_a": ResNetArch("basic", _34, shortcut="A"),
    "resnet34_option_c": ResNetArch("basic", _34, shortcut="C"),
    # CIFAR.
    **{f"cifar{num_layers}": _cifar(num_layers) for num_layers in (20, 32, 44, 56, 110, 1202)},
    **{f"cifar_plain{num_layers}": _cifar(num_layers, "none") for num_layers in (20, 32, 44, 56)},
}
"""Every architecture by name."""


def find_arch(name: str) -> Arch:
    """Look up an architecture by name, or raise a UserError that offers the nearest one."""
    if name not in ARCHS:
        near = difflib.get_close_matches(name, ARCHS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(ARCHS)}"
        raise UserError(f"arch: there is no {name!r}; {hint}")
    return ARCHS[name]
