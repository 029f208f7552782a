from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from resdet.errors import UserError
from resdet.export.backbone import export_backbone, load_backbone
from resdet.models.backbone import freeze_stages, resnet_fpn
from resdet.models.bodies import make_body
from resdet.models.norm import FrozenBatchNorm2d, conv_norm_names, folded_copy
from resdet.models.vgg import VGG


def test_features_are_torchvisions_after_each_block() -> None:
    torch.manual_seed(0)
    ours = make_body("vgg16", returned_layers=(1, 2, 3, 4, 5, 6), fast=False).eval()
    with torch.device("meta"):
        theirs = torchvision.models.vgg16(weights=None).features
    theirs.to_empty(device="cpu")
    theirs.load_state_dict({name.removeprefix("features."): value for name, value in ours.state_dict().items()})
    images = torch.randn(1, 3, 65, 50)
    with torch.no_grad():
        found = ours(images)
        # The last ReLU before each pooling, and the last pooling.
        for level, last in zip(found.values(), (3, 8, 15, 22, 29, 30), strict=True):
            assert torch.equal(level, theirs[: last + 1](images))
        theirs[28].bias[0] += 1
        assert not torch.equal(found["5"], theirs(images))
    assert ours.strides == [1, 2, 4, 8, 16, 32]
    assert ours.channels == [64, 128, 256, 512, 512, 512]
    assert [tuple(level.shape[2:]) for level in found.values()] == [(65 // s, 50 // s) for s in ours.strides]


def test_stages_after_the_last_returned_one_are_not_built() -> None:
    assert list(make_body("vgg16_bn", returned_layers=(2,)).state_dict())[-1].startswith(
        "features.11."
    )  # conv2_2's norm is 8
    with torch.device("meta"):
        body = make_body("vgg16", returned_layers=(5,))
    assert len(body.features) == 30
    assert body.strides == [16]


def test_folding_changes_rounding_only(randomise_norms: Callable[[nn.Module], None]) -> None:
    """VGG's convolutions have biases of their own, which fold too."""
    torch.manual_seed(0)
    fast = make_body("vgg16_bn", returned_layers=(3, 4)).eval()
    randomise_norms(fast)
    fast = fast.double()
    for conv in fast.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.bias, std=0.3)  # type: ignore[arg-type]
    plain = make_body("vgg16_bn", returned_layers=(3, 4), fast=False).double().eval()
    plain.load_state_dict(fast.state_dict())
    assert len(conv_norm_names(fast)) == 10
    images = torch.randn(1, 3, 48, 33, dtype=torch.float64)
    with torch.no_grad():
        expected, found = plain(images), fast(images)
        copy = folded_copy(fast)
        assert not any(isinstance(m, FrozenBatchNorm2d) for m in copy.modules())
        folded = copy.double()(images)
        for name, level in expected.items():
            scale = level.abs().max()
            assert (found[name] - level).abs().max() <= 1e-10 * scale
            assert (folded[name] - level).abs().max() <= 1e-4 * scale
        # A kept fold follows the bias as it follows the weight.
        fast.features[0].bias[0] += 1
        plain.features[0].bias[0] += 1
        assert (fast(images)["0"] - expected["0"]).abs().max() > 1e-3 * expected["0"].abs().max()
        assert (fast(images)["0"] - plain(images)["0"]).abs().max() <= 1e-10 * expected["0"].abs().max()


def test_trained_stages_are_faster_rcnns() -> None:
    """Three of them: conv3_1 and up, as Girshick's Fast R-CNN fine-tunes a VGG-16."""
    body = make_body("vgg16")
    freeze_stages(body, 3)
    trained = [name for name, parameter in body.named_parameters() if parameter.requires_grad]
    assert trained[0] == "features.10.weight"
    assert len(trained) == 2 * 9
    freeze_stages(body, 5)
    assert all(parameter.requires_grad for parameter in body.parameters())


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_body_scripts_as_the_plain_one() -> None:
    torch.manual_seed(0)
    body = make_body("vgg16_bn", returned_layers=(2, 3)).eval()
    plain = make_body("vgg16_bn", returned_layers=(2, 3), fast=False).eval()
    plain.load_state_dict(body.state_dict())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(body)(images)["1"], plain(images)["1"])


def test_exported_pyramid_comes_back(tmp_path: Path) -> None:
    backbone = resnet_fpn("vgg16", returned_layers=(2, 3), out_channels=16)
    export_backbone(backbone, tmp_path / "vgg.safetensors", include_fpn=True)
    again = load_backbone(tmp_path / "vgg.safetensors")
    assert again.state_dict().keys() == backbone.state_dict().keys()
    assert again.strides == [2, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "resnet18"}, "resnet18 is not a VGG"),
        ({"arch": "vgg16", "returned_layers": (6, 7)}, r"out of 1, 2, 3, 4, 5, 6, rising.*got \[6, 7\]"),
        ({"arch": "vgg16", "norm": "sync"}, "norm must be one of"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VGG(**arguments)  # type: ignore[arg-type]


def test_options_of_resnets_are_refused() -> None:
    with pytest.raises(UserError, match="stride_in_1x1, dilate_c5: is for ResNets, vgg16 is a VGG"):
        make_body("vgg16", stride_in_1x1=True, dilate_c5=True)
