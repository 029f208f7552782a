"""The backbone against torchvision's resnet_fpn_backbone, and inside torchvision's detectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from resdet import errors
from resdet.models.backbone import ResNetFPN, check_anchors, resnet_fpn

NORMS = {
    "frozen": torchvision.ops.FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 32),
}
RandomiseNorms = Callable[[nn.Module], None]


def gradients(
    model: nn.Module, images: Tensor, *, autocast: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the levels, and the gradients of a fixed random projection of them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        levels = model(images)
    generator = torch.Generator().manual_seed(2)
    sum((v * torch.randn(v.shape, generator=generator)).sum() for v in levels.values()).backward()
    slopes = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: level.detach() for name, level in levels.items()}, slopes


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ["resnet18", "resnet101"])
def test_trained_tensors_are_torchvisions(arch: str, norm: str) -> None:
    for trainable_layers in range(6):
        with torch.device("meta"):
            ours = resnet_fpn(arch, norm=norm, trainable_layers=trainable_layers)
            theirs = resnet_fpn_backbone(
                backbone_name=arch, weights=None, norm_layer=NORMS[norm], trainable_layers=trainable_layers
            )
        assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
            n: p.requires_grad for n, p in theirs.named_parameters()
        }


def test_trained_stages_count_from_layer4_where_it_is_not_built() -> None:
    ours = resnet_fpn("resnet18", returned_layers=(1, 2), trainable_layers=3)
    theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None, returned_layers=[1, 2], trainable_layers=3)
    trained = [n for n, p in ours.body.named_parameters() if p.requires_grad]
    assert trained == [n for n, p in theirs.body.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in trained} == {"layer2"}


def test_resnet101_state_dicts_are_exchangeable() -> None:
    ours, theirs = resnet_fpn("resnet101"), resnet_fpn_backbone(backbone_name="resnet101", weights=None)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert len(ours.state_dict()) == 536
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arch", "trainable_layers"),
    [
        ("resnet18", 3),
        ("resnet18", 5),
        *(pytest.param("resnet101", layers, marks=pytest.mark.slow) for layers in (3, 5)),
    ],
)
def test_outputs_and_gradients_are_torchvisions(
    arch: str, trainable_layers: int, randomise_norms: RandomiseNorms
) -> None:
    torch.manual_seed(0)
    plain = resnet_fpn(arch, trainable_layers=trainable_layers, fast=False)
    randomise_norms(plain)
    theirs = resnet_fpn_backbone(backbone_name=arch, weights=None, trainable_layers=trainable_layers)
    fast = resnet_fpn(arch, trainable_layers=trainable_layers)
    theirs.load_state_dict(plain.state_dict())
    fast.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 128, 128)
    expected, expected_slopes = gradients(theirs, images)
    levels, slopes = gradients(plain, images)
    assert list(levels) == list(expected) == plain.level_names == ["0", "1", "2", "3", "pool"]
    assert slopes.keys() == expected_slopes.keys() == {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert all(torch.equal(levels[name], expected[name]) for name in levels)
    assert all(torch.equal(slopes[name], expected_slopes[name]) for name in slopes)

    # Folding and channels-last change the order of rounding only, and random weights amplify rounding with depth:
    # the fast form must be about as near to float64 as the plain one is. Measured: 0.9 to 1.9 times its distance, of
    # 1e-5 (ResNet-18's levels) to 0.1 (ResNet-101's gradients, where ReLUs flip).
    levels, slopes = gradients(fast, images)
    exact, exact_slopes = gradients(copy.deepcopy(plain).double(), images.double())
    assert distance(levels, exact) <= 3 * distance(expected, exact)
    assert distance(slopes, exact_slopes) <= 3 * distance(expected_slopes, exact_slopes)
    with torch.no_grad():
        fast.body.layer1[0].bn1.bias[0] += 0.1
        plain.body.layer1[0].bn1.bias[0] += 0.1
        assert distance(fast(images), exact) > 3 * distance(expected, exact)
        assert not torch.equal(plain(images)["0"], expected["0"])


def distance(values: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Root of the sum of squared differences, each tensor relative to its own norm."""
    assert values.keys() == exact.keys()
    errors_ = [
        torch.linalg.vector_norm(values[n].double() - exact[n]) / torch.linalg.vector_norm(exact[n]).clamp(min=1e-30)
        for n in exact
    ]
    return float(torch.linalg.vector_norm(torch.stack(errors_)))


@pytest.mark.parametrize("arch", ["resnet18", pytest.param("resnet101", marks=pytest.mark.slow)])
def test_folded_real_weights_are_torchvisions(arch: str, request: pytest.FixtureRequest) -> None:
    """Levels within 1e-4 of their scale in float32; levels and gradients to rounding in float64.

    Gradients are compared in float64 because float32's rounding, folded or not, moves activations across a ReLU's
    threshold now and then, and a gradient entry with them by its whole size.
    """
    torch.manual_seed(0)
    file = request.getfixturevalue(f"{arch}_file")
    theirs = resnet_fpn_backbone(backbone_name=arch, weights=None)
    fast = resnet_fpn(arch, weights=file)
    theirs.load_state_dict(fast.state_dict())
    images = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        expected, levels = theirs(images), fast(images)
    for name in levels:
        assert (levels[name] - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max()

    levels, slopes = gradients(fast.double(), images.double())
    expected, expected_slopes = gradients(theirs.double(), images.double())
    assert distance(levels, expected) < 1e-12
    assert distance(slopes, expected_slopes) < 1e-11
    with torch.no_grad():
        fast.body.layer2[0].bn1.weight[0] *= 1.001
    levels, slopes = gradients(fast, images.double())
    assert distance(levels, expected) > 1e-9
    assert distance(slopes, expected_slopes) > 1e-9


def test_autocast_is_as_exact_as_torchvisions_and_stays_channels_last(randomise_norms: RandomiseNorms) -> None:
    torch.manual_seed(0)
    plain = resnet_fpn("resnet18", fast=False)
    randomise_norms(plain)
    fast = resnet_fpn("resnet18")
    fast.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 128, 128)
    exact, exact_slopes = gradients(copy.deepcopy(plain).double(), images.double())
    expected, expected_slopes = gradients(plain, images, autocast=True)
    levels, slopes = gradients(fast, images, autocast=True)
    for name, level in levels.items():
        assert level.dtype == torch.bfloat16
        assert level.is_contiguous(memory_format=torch.channels_last), name
    assert all(slope.dtype == torch.float32 for slope in slopes.values())
    # torchvision's norms give float32 under autocast, ours bfloat16 at once, the type the next convolution reads;
    # only the shortcuts' sums are rounded more often. Measured: 0.9 (levels) and 1.0 (gradients) times torchvision's.
    assert distance(levels, exact) <= 1.5 * distance(expected, exact)
    assert distance(slopes, exact_slopes) <= 1.5 * distance(expected_slopes, exact_slopes)


def test_p6p7_is_torchvisions() -> None:
    torch.manual_seed(0)
    ours = resnet_fpn("resnet18", returned_layers=(2, 3, 4), extra_blocks="p6p7", fast=False)
    theirs = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 96)
    expected = theirs(images)
    levels = ours(images)
    assert list(levels) == list(expected) == ours.level_names
    assert all(torch.equal(levels[name], expected[name]) for name in levels)
    assert ours.strides == [8, 16, 32, 64, 128]


@pytest.mark.parametrize(
    ("returned_layers", "extra_blocks"), [((1, 2, 3, 4), "pool"), ((2, 3), "pool"), ((3,), "p6p7")]
)
def test_levels_have_the_declared_names_strides_and_channels(
    returned_layers: tuple[int, ...], extra_blocks: str
) -> None:
    backbone = resnet_fpn("resnet18", returned_layers=returned_layers, extra_blocks=extra_blocks, out_channels=32)
    height, width = 130, 75
    with torch.no_grad():
        levels = backbone(torch.zeros(1, 3, height, width))
    assert list(levels) == backbone.level_names
    for level, stride in zip(levels.values(), backbone.strides, strict=True):
        assert tuple(level.shape[1:]) == (32, math.ceil(height / stride), math.ceil(width / stride))


def small(backbone: ResNetFPN, name: str) -> nn.Module:
    sizes = {"min_size": 64, "max_size": 96}
    if name == "faster_rcnn":
        return FasterRCNN(backbone, num_classes=3, rpn_pre_nms_top_n_train=50, **sizes)
    if name == "mask_rcnn":
        return MaskRCNN(backbone, num_classes=3, rpn_pre_nms_top_n_train=50, **sizes)
    if name == "retinanet":
        return RetinaNet(backbone, num_classes=3, **sizes)
    return FCOS(backbone, num_classes=3, **sizes)


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"])
def test_it_plugs_into_torchvisions_detectors(name: str, randomise_norms: RandomiseNorms) -> None:
    torch.manual_seed(0)
    if name in ("retinanet", "fcos"):
        backbone = resnet_fpn("resnet18", returned_layers=(2, 3, 4), extra_blocks="p6p7")
    else:
        backbone = resnet_fpn("resnet18")
    randomise_norms(backbone)
    model = small(backbone, name)
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 80, dtype=torch.uint8),
    }
    losses = model([torch.rand(3, 64, 80)], [target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    trained = [p for p in backbone.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert all(p.grad is None for p in backbone.parameters() if not p.requires_grad)
    with torch.no_grad():
        assert model.eval()([torch.rand(3, 64, 80)])[0].keys() >= {"boxes", "labels", "scores"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainable_layers": 6}, r"trainable_layers must be in 0..5.*got 6"),
        ({"trainable_layers": -1}, "got -1"),
        ({"returned_layers": ()}, "returned_layers must be"),
        ({"norm": "sync"}, "norm must be one of"),
        ({"out_channels": 0}, "out_channels must be at least 1, got 0"),
        ({"extra_blocks": "p6"}, "extra_blocks must be 'pool' or 'p6p7', got 'p6'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(errors.UserError, match=message):
        resnet_fpn("resnet18", **arguments)  # type: ignore[arg-type]


def test_anchors_must_fit_the_levels() -> None:
    backbone = resnet_fpn("resnet18")
    ratios = (0.5, 1.0, 2.0)
    check_anchors(backbone, AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), (ratios,) * 5))
    with pytest.raises(
        errors.UserError, match=r"5 feature levels \(0, 1, 2, 3, pool\), got 3: \(\(32,\), \(64,\), \(128,\)\)"
    ):
        check_anchors(backbone, AnchorGenerator(((32,), (64,), (128,)), (ratios,) * 3))
    with pytest.raises(errors.UserError, match="aspect_ratios must have one entry"):
        check_anchors(backbone, AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), (ratios,) * 4))
    with pytest.raises(errors.UserError, match=r"same number of anchors per location, got \[3, 6\]"):
        check_anchors(nn.Identity(), AnchorGenerator(((32,), (64, 90)), (ratios,) * 2), level_names=("0", "1"))
