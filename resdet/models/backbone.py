"""The plug-in: a body and torchvision's feature pyramid, or its last stage alone, as torchvision's detectors take them.

Legend: ``B`` images, ``C`` channels, ``H, W`` pixels. The body's C2..C5 are named ``"0".."3"``, and so are the
pyramid's P2..P5, because torchvision's ``MultiScaleRoIAlign`` looks for these names; P6 is ``"pool"`` (or ``"p6"``,
then ``"p7"``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from resdet.devices import is_queued
from resdet.errors import UserError
from resdet.models.bodies import Body, make_body
from resdet.models.convolution import conv, has_hooks
from resdet.models.loading import load_backbone_weights
from resdet.models.ready_weights import KeepsReadyWeights
from resdet.models.spec import WeightsOrigin
from resdet.models.tracing import is_captured, scripted_as
from resdet.weights.source import WeightsSource

ExtraBlocks = Literal["pool", "p6p7"]


class FastFeaturePyramid(KeepsReadyWeights, FeaturePyramidNetwork):  # type: ignore[misc]  # torchvision has no types
    """torchvision's FeaturePyramidNetwork, whose levels are not enlarged on the way down, with kept weights."""

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the levels from features ``[B, C, H, W]`` by name, finest first."""
        if is_captured():
            plain: dict[str, Tensor] = super().forward(x)
            return plain
        features = list(x.values())
        levels: list[Tensor] = []
        inner: Tensor | None = None
        parts = list(zip(features, self.inner_blocks, self.layer_blocks, strict=True))
        for index, (feature, lateral, output) in reversed(list(enumerate(parts))):
            above = inner
            inner = conv(feature, lateral[0], keeper=self, name=f"inner{index}")  # [B, out_channels, H, W], as above
            if above is not None:
                inner = inner.clone() if has_hooks(lateral[0]) else inner  # what a hook was given stays as it was
                _add_enlarged(inner, above)
            levels.insert(0, conv(inner, output[0], keeper=self, name=f"layer{index}"))
        levels, names = self.extra_blocks(levels, features, list(x))
        return OrderedDict(zip(names, levels, strict=True))

    def __prepare_scriptable__(self) -> FeaturePyramidNetwork:
        return scripted_as(self, FeaturePyramidNetwork)


def _add_enlarged(level: Tensor, above: Tensor) -> None:
    """Add ``above`` to a level, ``[B, C, H, W]``, enlarged to its size by repeating pixels, in place.

    Where a size is just double, as in padded images, the enlarged map is not made: for P2 of an image at 800x1216 it
    would take 62 MB, 17 ms, and as long again to be read.
    """
    height, width = above.shape[-2:]
    if level.shape[-2:] != (2 * height, 2 * width):
        level += F.interpolate(above, size=level.shape[-2:], mode="nearest")
        return
    if torch.is_grad_enabled() and is_queued(level.device):
        # On a GPU the enlarged map costs less than the four copies that the gradient of a sum in a view is made of.
        pixels = above.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)  # [B, H, 2, W, 2, C]
        level += pixels.reshape(len(above), 2 * height, 2 * width, -1).permute(0, 3, 1, 2)
        return
    blocks = level.permute(0, 2, 3, 1).unflatten(2, (width, 2)).unflatten(1, (height, 2))  # type: ignore[no-untyped-call]
    blocks += above.permute(0, 2, 3, 1)[:, :, None, :, None]  # [B, H, 2, W, 2, C]


class ResNetFPN(nn.Module):
    """A body and its feature pyramid; built by ``resnet_fpn``, which documents the arguments.

    Attributes:
        body: Computes the features that the pyramid is built on.
        fpn: torchvision's FeaturePyramidNetwork.
        out_channels: Channels of every level, where torchvision's detectors look for it.
        level_names: Keys of the output, finest level first.
        strides: Stride of each level, in input pixels.

    Source: Lin et al., "Feature Pyramid Networks for Object Detection" (arXiv:1612.03144); attribute names of
    ``torchvision.models.detection.backbone_utils.BackboneWithFPN``, whose state dicts are exchangeable with ours.
    """

    def __init__(self, body: Body, *, out_channels: int = 256, extra_blocks: ExtraBlocks = "pool") -> None:
        super().__init__()
        if out_channels < 1:
            raise UserError(f"out_channels must be at least 1, got {out_channels}")
        if extra_blocks == "pool":
            top, top_names = LastLevelMaxPool(), ["pool"]
        elif extra_blocks == "p6p7":
            top, top_names = LastLevelP6P7(out_channels, out_channels), ["p6", "p7"]
        else:
            raise UserError(f"extra_blocks must be 'pool' or 'p6p7', got {extra_blocks!r}")
        self.body = body
        pyramid = FastFeaturePyramid if body.fast else FeaturePyramidNetwork
        self.fpn = pyramid(body.channels, out_channels, extra_blocks=top)
        self.out_channels = out_channels
        self.extra_blocks = extra_blocks
        self.level_names = [*body.return_layers.values(), *top_names]
        self.strides = [*body.strides, *(body.strides[-1] * 2**step for step in range(1, len(top_names) + 1))]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the pyramid.

        Args:
            x: Images ``[B, 3, H, W]``, normalised by mean and standard deviation.

        Returns:
            An OrderedDict over ``level_names``: ``[B, out_channels, H / stride, W / stride]``, rounded up. With a fast
            body the levels are channels-last, and of the autocast type under autocast.
        """
        # The body's memory format carries through: every operation of the pyramid and of the heads on it keeps it.
        levels: dict[str, Tensor] = self.fpn(self.body(x))
        return levels

    def __prepare_scriptable__(self) -> ResNetFPN:
        return scripted_as(self, ResNetFPN)


class SingleLevel(nn.Module):
    """The last features of a body alone, as the first Faster R-CNN had them; its attributes are a ``ResNetFPN``'s."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        assert len(body.channels) == 1
        self.body = body
        self.out_channels = body.channels[0]
        self.level_names = list(body.return_layers.values())
        self.strides = list(body.strides)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the level, an OrderedDict of one, from images ``[B, 3, H, W]``."""
        levels: dict[str, Tensor] = self.body(x)
        return levels

    def __prepare_scriptable__(self) -> SingleLevel:
        return scripted_as(self, SingleLevel)


def resnet_fpn(
    arch: str,
    *,
    weights: WeightsSource = None,
    norm: str = "frozen",
    norm_eps: float = 1e-5,
    trainable_layers: int = 3,
    returned_layers: Sequence[int] | None = None,
    out_channels: int = 256,
    extra_blocks: ExtraBlocks = "pool",
    fast: bool = True,
    stride_in_1x1: bool = False,
    origin: WeightsOrigin | None = None,
) -> ResNetFPN:
    """Build a backbone that plugs into torchvision's FasterRCNN, MaskRCNN, RetinaNet and FCOS.

    Args:
        arch: Its name, e.g. ``"resnet101"``; ``resdet.models.archs.ARCHS`` is the table.
        weights: First weights of the body: None (random), a torchvision weight name or enum, a file or a URL.
        norm: ``"frozen"``, ``"batch"`` or ``"group"``, in networks with norms. Frozen norms start as the identity: give
            weights or call ``calibrate_norm`` before training.
        norm_eps: Added to the variance by every norm.
        trainable_layers: Number of stages that take gradients, 0 to 5, counted from the last: layer4, layer3, layer2,
            layer1, and the stem. 3 trains C3..C5.
        returned_layers: Stages the pyramid is built on, rising; by default the four with strides 4 to 32 (1 to 4 of a
            ResNet, 3 to 6 of a VGG's 1 to 6), all three of CIFAR's networks. Later stages are not built.
        out_channels: Channels of every pyramid level.
        extra_blocks: The levels above the last stage: ``"pool"`` subsamples P5 to P6 (Faster and Mask R-CNN),
            ``"p6p7"`` computes P6 and P7 from P5 by strided convolutions (RetinaNet, FCOS).
        fast: Run channels-last with frozen norms folded into the convolutions; off, exactly torchvision's operations.
        stride_in_1x1: Whether bottlenecks stride in their first 1x1 convolution, as MSRA's weights need it, and not in
            the 3x3, as torchvision's do; weights are trained for one of the two. Other blocks have no such choice.
        origin: What is known of ``weights``, where the file does not say it.

    Raises:
        UserError: If an argument is out of its range.
        WeightsError: If the weights cannot be read or are not those of this body.

    Source: ``torchvision.models.detection.backbone_utils.resnet_fpn_backbone``, the same counting of trainable layers.
    """
    body = make_body(
        arch, norm=norm, norm_eps=norm_eps, returned_layers=returned_layers, fast=fast, stride_in_1x1=stride_in_1x1
    )
    freeze_stages(body, trainable_layers)
    backbone = ResNetFPN(body, out_channels=out_channels, extra_blocks=extra_blocks)
    load_backbone_weights(body, weights, arch, origin)
    return backbone


def freeze_stages(body: Body, trainable_layers: int) -> None:
    """Stop gradients in every stage but the last ``trainable_layers``, 0 (all frozen) to 5 (all trained).

    Stages count from the architecture's last even where it is not built: layer4 to layer1 and the stem of a ResNet,
    conv5 to conv1 of a VGG. A frozen stage's BatchNorm (``norm="batch"``) keeps its affine parameters but goes on
    updating its running statistics in training mode, as in torchvision.

    Source: ``_resnet_fpn_extractor`` in ``torchvision/models/detection/backbone_utils.py``.
    """
    if trainable_layers not in range(6):
        raise UserError(
            f"trainable_layers must be in 0..5 (layer4, layer3, layer2, layer1, conv1), got {trainable_layers}"
        )
    stages = list(reversed(body.stage_modules.values()))[:trainable_layers]
    trained = tuple(f"{module}." for stage in stages for module in stage)
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.startswith(trained))


def check_anchors(
    backbone: nn.Module, anchor_generator: AnchorGenerator, level_names: Sequence[str] | None = None
) -> None:
    """Raise a UserError unless an anchor generator fits the feature levels that a backbone declares, or those given.

    The one RPN head shared by all levels also needs the same number of anchors per location on each. torchvision finds
    this out in the first forward, by an assertion that names no numbers.
    """
    names = list(getattr(backbone, "level_names", []) if level_names is None else level_names)
    for what in ("sizes", "aspect_ratios"):
        entries = getattr(anchor_generator, what)
        if len(entries) != len(names):
            raise UserError(
                f"anchors: {what} must have one entry for each of the backbone's {len(names)} feature levels "
                f"({', '.join(names)}), got {len(entries)}: {entries}"
            )
    counts = anchor_generator.num_anchors_per_location()
    if len(set(counts)) > 1:
        raise UserError(f"anchors: every level must have the same number of anchors per location, got {counts}")
