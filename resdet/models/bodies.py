"""Build any body by its name, and classifiers on bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor, nn

from resdet.errors import UserError
from resdet.models.archs import VGGArch, find_arch
from resdet.models.resnet import FastResNet, ResNet
from resdet.models.vgg import VGG, FastVGG

Body: TypeAlias = ResNet | VGG


def make_body(
    arch: str,
    *,
    norm: str = "frozen",
    norm_eps: float = 1e-5,
    returned_layers: Sequence[int] | None = None,
    fast: bool = True,
    stride_in_1x1: bool = False,
    dilate_c5: bool = False,
    zero_init_residual: bool = False,
) -> Body:
    """Build the body of any architecture, with random weights.

    ``resnet_fpn`` documents the arguments but the last two, which are for ResNets alone.

    With ``dilate_c5`` stage 4 is dilated instead of strided (DC5), so that C5 has stride 16. Every second pixel of it
    is that of the strided stage, for the same weights: what comes after the stride that was taken away has dilation 2.
    With a stride in the 3x3 this is torchvision's ``replace_stride_with_dilation``; detectron2 dilates the whole stage,
    which differs by the first 3x3.

    With ``zero_init_residual`` the last norm of each block starts with scale 0, so that blocks start as the identity
    (Goyal et al., arXiv:1706.02677, section 5.1), as in torchvision.
    """
    options = {"stride_in_1x1": stride_in_1x1, "dilate_c5": dilate_c5, "zero_init_residual": zero_init_residual}
    if not isinstance(find_arch(arch), VGGArch):
        resnet = FastResNet if fast else ResNet
        return resnet(arch, norm=norm, norm_eps=norm_eps, returned_layers=returned_layers, **options)
    if wanted := ", ".join(name for name, on in options.items() if on):
        raise UserError(f"{wanted}: is for ResNets, {arch} is a VGG")
    return (FastVGG if fast else VGG)(arch, norm=norm, norm_eps=norm_eps, returned_layers=returned_layers)


class Classifier(nn.Module):
    """A body that returns its last stage, and the layers that classify it, under torchvision's parameter names.

    The body is shared, not copied. Its modules are this module's children, so that the state dict is that of
    torchvision's network of the same name (``conv1.weight``, ..., ``fc.bias``): ``load_state_dict`` is strict both
    ways, and the body of a detector takes a classifier's file as it is.

    Source: ``torchvision/models/resnet.py`` and ``vgg.py``.
    """

    def __init__(self, body: Body, num_classes: int) -> None:
        super().__init__()
        arch = find_arch(body.arch)
        if body.returned_layers[-1] != len(arch.strides):
            raise UserError(
                f"a classifier is on the last stage of a body, {len(arch.strides)} of {body.arch}; this one returns "
                f"{list(body.returned_layers)}"
            )
        if num_classes < 1:
            raise UserError(f"num_classes must be at least 1, got {num_classes}")
        for name, child in body.named_children():
            self.add_module(name, child)
        self._body = (body,)  # in a tuple, because a second way to the same modules would name them twice
        self.num_classes = num_classes
        if isinstance(arch, VGGArch):
            self.avgpool = nn.AdaptiveAvgPool2d(7)
            self.classifier = nn.Sequential(
                nn.Linear(512 * 7 * 7, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(4096, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(4096, num_classes),
            )
            for index in (0, 3, 6):
                nn.init.normal_(self.classifier[index].weight, 0, 0.01)  # type: ignore[arg-type]
                nn.init.zeros_(self.classifier[index].bias)  # type: ignore[arg-type]
        else:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(body.channels[-1], num_classes)

    @property
    def body(self) -> Body:
        """The body that the modules belong to."""
        return self._body[0]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the scores ``[B, num_classes]`` of images ``[B, 3, H, W]``, normalised by mean and deviation.

        Images may have any size that the stages do not shrink to nothing.
        """
        *_, features = self.body(x).values()  # [B, C, H / 32, W / 32]
        vectors = self.avgpool(features).flatten(1)  # [B, C] of a ResNet, [B, C * 7 * 7] of a VGG
        scores: Tensor = self.classifier(vectors) if hasattr(self, "classifier") else self.fc(vectors)
        return scores


def build_classifier(
    arch: str,
    *,
    num_classes: int,
    norm: str = "batch",
    norm_eps: float = 1e-5,
    fast: bool = True,
    stride_in_1x1: bool = False,
    zero_init_residual: bool = False,
) -> Classifier:
    """Build a classification network of ``num_classes`` classes (no background) on the body of ``make_body``."""
    body = make_body(
        arch,
        norm=norm,
        norm_eps=norm_eps,
        returned_layers=(len(find_arch(arch).strides),),
        fast=fast,
        stride_in_1x1=stride_in_1x1,
        zero_init_residual=zero_init_residual,
    )
    return Classifier(body, num_classes)
