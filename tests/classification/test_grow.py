"""A grown network computes what the one it was grown from computes, and learns from there on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resdet
from resdet.errors import UserError
from resdet.models.backbone import resnet_fpn
from resdet.models.bodies import build_classifier, make_body
from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec

RandomiseNorms = Callable[[nn.Module], None]


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = model(images)
    return list(found.values()) if isinstance(found, dict) else [found]


def added_blocks(old: nn.Module, new: nn.Module) -> dict[str, nn.Parameter]:
    known = dict(old.named_parameters())
    return {name: parameter for name, parameter in new.named_parameters() if name not in known}


@pytest.mark.parametrize(
    ("arch", "to_arch", "norm"),
    [
        ("cifar20", "cifar56", "batch"),
        ("cifar20", "cifar32", "group"),
        ("resnet18", "resnet34", "frozen"),
        pytest.param("resnet50", "resnet101", "frozen", marks=pytest.mark.slow),
        pytest.param("resnet50d", "resnet101d", "batch", marks=pytest.mark.slow),
    ],
)
def test_outputs_are_equal_bit_for_bit(arch: str, to_arch: str, norm: str, randomise_norms: RandomiseNorms) -> None:
    torch.manual_seed(0)
    body = make_body(arch, norm=norm)
    if norm == "frozen":
        randomise_norms(body)
    images = torch.randn(2, 3, 64, 48)
    if norm == "batch":
        body(images)  # statistics that are not the identity
    grown = resdet.grow(body.eval(), to_arch)
    assert type(grown) is type(body)
    assert (grown.arch, grown.training) == (to_arch, False)
    assert all(torch.equal(a, b) for a, b in zip(outputs(body, images), outputs(grown, images), strict=True))
    if norm == "batch":
        for one, other in zip(outputs(body.train(), images), outputs(grown.train(), images), strict=True):
            assert torch.equal(one, other), "statistics of the batch normalise a zero branch to zero too"
    # A new block that is not silent is heard.
    with torch.no_grad():
        for parameter in added_blocks(body, grown).values():
            parameter.add_(0.1)
    assert not torch.equal(outputs(body, images)[-1], outputs(grown, images)[-1])


@pytest.mark.parametrize(
    ("arch", "to_arch", "norm"), [("cifar20", "cifar32", "batch"), ("resnet18", "resnet34", "frozen")]
)
def test_training_moves_the_new_blocks(arch: str, to_arch: str, norm: str, randomise_norms: RandomiseNorms) -> None:
    """The first step moves the layer that was zero; from the second on everything in the block has gradients."""
    torch.manual_seed(0)
    body = make_body(arch, norm=norm)
    if norm == "frozen":
        randomise_norms(body)
    grown = resdet.grow(body.train(), to_arch)
    new = added_blocks(body, grown)
    silent = "conv2.weight" if norm == "frozen" else "bn2.weight"
    optimizer = torch.optim.SGD(grown.parameters(), lr=1e-3)
    images = torch.randn(2, 3, 64, 64)
    for step in range(2):
        optimizer.zero_grad()
        (top,) = list(grown(images).values())[-1:]
        (top * torch.randn(top.shape, generator=torch.Generator().manual_seed(1))).mean().backward()
        moving = {name for name, p in new.items() if p.grad is not None and bool(p.grad.any())}
        assert {name for name in new if name.endswith(silent)} <= moving
        if step == 1:
            assert moving == set(new)
        optimizer.step()


def test_a_grown_detector_detects_the_same(randomise_norms: RandomiseNorms) -> None:
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch="resnet18", layout="c4", min_size=64, max_size=96, rpn_post_nms_top_n_test=8, box_score_thresh=0.0
    )
    model = build_detector(spec, num_classes=3, trainable_layers=1)
    randomise_norms(model.whole_body())
    grown = resdet.grow(model.eval(), "resnet34")
    assert grown.spec.arch == "resnet34"
    images = [torch.rand(3, 64, 80)]
    with torch.no_grad():
        found, expected = grown(images)[0], model(images)[0]
    assert len(expected["boxes"]) > 0
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # The new block of conv5, in the box head, is trained as conv5 is; those of frozen stages are frozen.
    trained = {name for name, p in added_blocks(model, grown).items() if p.requires_grad}
    assert trained == {f"roi_heads.box_head.layer4.2.conv{i}.weight" for i in (1, 2)}


def test_a_grown_classifier_and_backbone_keep_their_heads() -> None:
    torch.manual_seed(0)
    classifier = build_classifier("cifar20", num_classes=10).eval()
    grown = resdet.grow(classifier, "cifar44")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(outputs(classifier, images)[0], outputs(grown, images)[0])
    assert grown.body.arch == "cifar44"
    backbone = resnet_fpn("cifar20", norm="batch", out_channels=16, trainable_layers=2).eval().double()
    deeper = resdet.grow(backbone, "cifar32")
    assert next(deeper.parameters()).dtype == torch.float64
    for one, other in zip(outputs(backbone, images.double()), outputs(deeper, images.double()), strict=True):
        assert torch.equal(one, other)
    trained = {name.split(".")[1] for name, p in deeper.body.named_parameters() if p.requires_grad and "layer" in name}
    assert {n.split(".")[0] for n, p in deeper.body.named_parameters() if p.requires_grad} == {"layer2", "layer3"}
    assert trained == {str(i) for i in range(5)}


@pytest.mark.parametrize(
    ("arch", "to_arch", "message"),
    [
        ("resnet34", "resnet50", "differ in more than depth: block 'basic' and 'bottleneck'"),
        ("resnet50", "wide_resnet101_2", "differ in more than depth: width_per_group 64 and 128"),
        ("resnet50", "resnet101d", "stem '7x7' and 'deep'; shortcut 'B' and 'D'"),
        ("resnet34", "resnet18", r"resnet18 is not deeper than resnet34: .*\[2, 2, 2, 2\], and \[3, 4, 6, 3\]"),
        ("resnet18", "resnet18", "is not deeper"),
        ("cifar_plain20", "cifar_plain32", "cifar_plain20 has no shortcuts"),
        ("resnet34_option_c", "resnet34", "a projection on every shortcut"),
        ("resnet18", "vgg16", "vgg16 is not a ResNet, resnet18 is"),
        ("resnet18", "resnet43", "did you mean"),
        ("vgg16", "resnet18", "takes a ResNet, or a backbone, classifier or detector on one; got vgg16"),
    ],
)
def test_what_cannot_grow_is_named(arch: str, to_arch: str, message: str) -> None:
    with torch.device("meta"):
        body = make_body(arch)
    with pytest.raises(UserError, match=message):
        resdet.grow(body, to_arch)  # type: ignore[type-var]
