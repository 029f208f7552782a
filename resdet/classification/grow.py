"""Grow a network: start a deeper one from a shallower one's weights, so that it computes the same function.

Blocks are added at the end of the stages that lack some. A block whose last convolution, or the scale of whose last
norm, is zero adds nothing to its shortcut, and what comes in is not negative, so the ReLU after the sum changes nothing
either: the deeper network gives the same bits. The first step of training moves that last layer, the steps after it
everything in the block.

Source: Chen, Goodfellow & Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer" (arXiv:1511.05641), section
2.3. Deviation: its identity layers are layers with an identity matrix; in a residual network the identity is there
already, and only its branch has to be zero.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from resdet.errors import UserError
from resdet.models.archs import ResNetArch, find_arch
from resdet.models.backbone import ResNetFPN, SingleLevel
from resdet.models.bodies import Body, Classifier, make_body
from resdet.models.detector import Detector, build_detector
from resdet.models.norm import FrozenBatchNorm2d
from resdet.models.resnet import BasicBlock, Bottleneck, ResNet, last_layers

logger = logging.getLogger(__name__)

Grown = TypeVar("Grown", ResNet, ResNetFPN, SingleLevel, Classifier, Detector)

_BLOCK = re.compile(r"(?:^|\.)layer(\d)\.(\d+)\.")


def grow(model: Grown, to_arch: str) -> Grown:
    """Build a deeper network that computes what a shallower one computes.

    Args:
        model: A body, a backbone, a classifier or a detector on a ResNet; not changed. To grow from a file, load it
            into one first (``load_detector``, ``load_backbone``).
        to_arch: Name of the deeper architecture: with the same blocks, stem, shortcuts and widths, and in no stage
            fewer blocks. From ``resnet50`` that is ``resnet101`` and ``resnet152``, from ``resnet18`` ``resnet34``,
            from ``cifar20`` ``cifar32`` and on.

    Returns:
        A new model of the same kind and mode, on the same device. Its outputs are equal bit for bit, in training mode
        too as far as nothing is drawn at random. New blocks take gradients where their stage does.

    Raises:
        UserError: If the model is no ResNet, has no shortcut that passes its input on as it is (plain networks, option
            C), or ``to_arch`` is not a deeper one of its kind; the message names what differs.
    """
    body = _body_of(model)
    _check_deeper(body, to_arch)
    old_state = model.state_dict()
    new = _built_like(model, to_arch)
    _zero_branches(new, cast(ResNetArch, find_arch(body.arch)).depths)
    new_state = new.state_dict()
    assert all(name in new_state and new_state[name].shape == value.shape for name, value in old_state.items())
    new.load_state_dict(new_state | old_state)
    _take_over_gradients(model, new)
    new.train(model.training)
    some = next(model.parameters())
    logger.info("%s grown to %s: %d tensors added", body.arch, to_arch, len(new_state) - len(old_state))
    return cast(Grown, new.to(some.device, some.dtype))


def _body_of(model: nn.Module) -> ResNet:
    if isinstance(model, Detector):
        model = model.backbone
    if isinstance(model, ResNetFPN | SingleLevel | Classifier):
        model = model.body
    if not isinstance(model, ResNet):
        kind = model.arch if isinstance(model, Body) else type(model).__name__
        raise UserError(f"grow: takes a ResNet, or a backbone, classifier or detector on one; got {kind}")
    return model


def _check_deeper(body: ResNet, to_arch: str) -> None:
    old, new = find_arch(body.arch), find_arch(to_arch)
    assert isinstance(old, ResNetArch)
    if old.shortcut in ("none", "C"):
        lack = "no shortcuts" if old.shortcut == "none" else "a projection on every shortcut"
        raise UserError(f"grow: {body.arch} has {lack}, so a new block cannot pass its input on as it is")
    if not isinstance(new, ResNetArch):
        raise UserError(f"grow: {to_arch} is not a ResNet, {body.arch} is")
    if replace(old, depths=new.depths) != new:
        names = ("block", "groups", "width_per_group", "stem", "shortcut", "channels")
        pairs = [(name, getattr(old, name), getattr(new, name)) for name in names]
        differing = [f"{name} {one!r} and {other!r}" for name, one, other in pairs if one != other]
        raise UserError(f"grow: {body.arch} and {to_arch} differ in more than depth: {'; '.join(differing)}")
    if old.depths == new.depths or any(more < fewer for fewer, more in zip(old.depths, new.depths, strict=True)):
        blocks = f"blocks of its stages are {list(new.depths)}, and {list(old.depths)}"
        raise UserError(f"grow: {to_arch} is not deeper than {body.arch}: {blocks}")


def _built_like(model: nn.Module, to_arch: str) -> nn.Module:
    if isinstance(model, Detector):
        spec = model.spec.model_copy(update={"arch": to_arch})
        num_classes = model.roi_heads.box_predictor.cls_score.out_features
        return build_detector(spec, num_classes=num_classes, categories=model.categories)
    old = _body_of(model)
    body = make_body(
        to_arch,
        norm=old.norm,
        norm_eps=old.norm_eps,
        returned_layers=old.returned_layers,
        fast=old.fast,
        stride_in_1x1=old.stride_in_1x1,
        dilate_c5=old.dilate_c5,
    )
    if isinstance(model, ResNetFPN):
        return ResNetFPN(body, out_channels=model.out_channels, extra_blocks=model.extra_blocks)
    if isinstance(model, Classifier):
        return Classifier(body, model.num_classes)
    return SingleLevel(body) if isinstance(model, SingleLevel) else body


def _zero_branches(model: nn.Module, depths: Sequence[int]) -> None:
    """Let the blocks beyond these depths add nothing to their shortcuts."""
    for name, block in model.named_modules():
        found = _BLOCK.search(f"{name}.")
        if found is None or not isinstance(block, BasicBlock | Bottleneck) or int(found[2]) < depths[int(found[1]) - 1]:
            continue
        conv, norm = last_layers(block)
        # A frozen norm's scale is not trained, and would keep the branch at zero; a convolution is.
        silent = conv.weight if isinstance(norm, FrozenBatchNorm2d) else norm.weight
        assert isinstance(silent, Tensor)
        with torch.no_grad():
            silent.zero_()


def _take_over_gradients(old: nn.Module, new: nn.Module) -> None:
    """Train what was trained before, and new blocks where their stage was."""
    trained = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    trained_stages = {found[1] for name, on in trained.items() if on and (found := _BLOCK.search(name))}
    for name, parameter in new.named_parameters():
        found = _BLOCK.search(name)
        parameter.requires_grad_(trained.get(name, found is not None and found[1] in trained_stages))
