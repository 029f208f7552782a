from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from resdet.errors import UserError
from resdet.models.resnet import ARCHS, ResNet

NORMS = {
    "frozen": torchvision.ops.FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 32),
}


def reference(arch: str, norm: str, returned_layers: tuple[int, ...]) -> nn.Module:
    network = torchvision.models.get_model(arch, weights=None, norm_layer=NORMS[norm])
    return IntermediateLayerGetter(network, {f"layer{k}": str(level) for level, k in enumerate(returned_layers)})


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("norm", NORMS)
def test_state_dict_has_torchvisions_names_order_and_shapes(arch: str, norm: str) -> None:
    for returned_layers in [(1, 2), (2, 4)]:
        with torch.device("meta"):
            ours = ResNet(arch, norm=norm, returned_layers=returned_layers)
            theirs = reference(arch, norm, returned_layers)
        assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
            (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
        ]


@pytest.mark.parametrize("returned_layers", [(1, 2), (3,), (2, 3, 4)])
def test_state_dicts_are_exchangeable_both_ways(returned_layers: tuple[int, ...]) -> None:
    ours, theirs = ResNet("resnet18", returned_layers=returned_layers), reference("resnet18", "frozen", returned_layers)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    longer = reference("resnet18", "frozen", (1, 2, 3, 4)).state_dict() | {"layer9.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict(longer)


@pytest.mark.parametrize(
    ("arch", "norm"),
    [("resnet34", "frozen"), ("resnext50_32x4d", "batch"), ("resnet50", "group"), ("wide_resnet50_2", "frozen")],
)
def test_plain_body_is_bit_equal_to_torchvision(arch: str, norm: str) -> None:
    torch.manual_seed(0)
    ours, theirs = ResNet(arch, norm=norm, fast=False).eval(), reference(arch, norm, (1, 2, 3, 4)).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 65, 47)
    with torch.no_grad():
        for ours_level, theirs_level in zip(ours(images).items(), theirs(images).items(), strict=True):
            assert ours_level[0] == theirs_level[0]
            assert torch.equal(ours_level[1], theirs_level[1])
        theirs.layer2[0].conv2.weight *= 1.001
        assert not torch.equal(ours(images)["1"], theirs(images)["1"])


@pytest.mark.parametrize("fast", [False, True])
def test_stride_in_1x1_is_torchvisions_with_the_strides_moved(fast: bool) -> None:
    """The parameters are those of the other way, so only running it tells the two apart."""
    torch.manual_seed(0)
    ours = ResNet("resnet50", norm="frozen", fast=fast, stride_in_1x1=True).eval()
    theirs = reference("resnet50", "frozen", (1, 2, 3, 4)).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 65, 47)
    with torch.no_grad():
        unmoved = theirs(images)
        for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        for (name, level), expected in zip(ours(images).items(), theirs(images).values(), strict=True):
            scale = expected.std()
            assert level.shape == expected.shape == unmoved[name].shape
            # Plain, the operations are the same; folded, sums round otherwise.
            assert (level - expected).abs().max() <= (1e-4 * scale if fast else 0)
            assert name == "0" or (level - unmoved[name]).abs().max() > 0.1 * scale


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_channels_and_strides_are_those_of_the_features(arch: str) -> None:
    body = ResNet(arch, returned_layers=(2, 4))
    features = body(torch.zeros(1, 3, 96, 64))
    assert list(features) == ["0", "1"]
    assert [f.shape[1] for f in features.values()] == body.channels
    assert body.strides == [8, 32]
    assert [tuple(f.shape[2:]) for f in features.values()] == [(96 // s, 64 // s) for s in body.strides]


def test_convolutions_start_as_in_torchvision() -> None:
    torch.manual_seed(0)
    weight = ResNet("resnet18", norm="batch").get_parameter("layer4.1.conv2.weight")
    # Kaiming, fan out, ReLU. 2.4 million draws know their deviation to 0.05 %; 0.5 % is ten of those.
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "resnet110"}, "did you mean 'resnet101'"),
        ({"arch": "vgg"}, "known are resnet18"),
        ({"arch": "resnet18", "stride_in_1x1": True}, "blocks of resnet18 have no 1x1 convolution"),
        ({"arch": "resnet18", "norm": "sync"}, "norm must be one of frozen, batch, group, got 'sync'"),
        ({"arch": "resnet18", "returned_layers": ()}, r"got \[\]"),
        ({"arch": "resnet18", "returned_layers": (1, 1)}, r"got \[1, 1\]"),
        ({"arch": "resnet18", "returned_layers": (2, 1)}, r"got \[2, 1\]"),
        ({"arch": "resnet18", "returned_layers": (0, 1)}, r"stages out of 1, 2, 3, 4.*got \[0, 1\]"),
        ({"arch": "resnet18", "returned_layers": (4, 5)}, r"got \[4, 5\]"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResNet(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_body_scripts_as_the_plain_one(fast: bool) -> None:
    """TorchScript takes the plain form even of a fast body."""
    torch.manual_seed(0)
    body = ResNet("resnet18", fast=fast).eval()
    plain = ResNet("resnet18", fast=False).eval()
    plain.load_state_dict(body.state_dict())
    images = torch.randn(1, 3, 64, 64)
    scripted = torch.jit.script(body)
    with torch.no_grad():
        assert torch.equal(scripted(images)["3"], plain(images)["3"])
