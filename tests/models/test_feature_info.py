"""``feature_info`` of a body is timm's, where timm has the network, and states what the maps are for all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resdet.models.archs import ARCHS
from resdet.models.bodies import make_body
from resdet.models.detector import build_detector
from resdet.models.feature_info import FeatureInfo
from resdet.models.spec import DetectorSpec


def without_stem(info: Any) -> list[dict[str, Any]]:
    return [dict(one) for one in info.info[1:]]


@pytest.mark.parametrize("arch", ["resnet50", "resnet101", "resnet18d"])
def test_it_is_timms(arch: str) -> None:
    """But for the name of the stem's last module."""
    timm = pytest.importorskip("timm", reason="needs timm, which is in the dev extra")
    with torch.device("meta"):
        theirs = timm.create_model(arch, pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)).feature_info
        ours = make_body(arch).feature_info
    assert without_stem(ours) == without_stem(theirs)
    assert (len(ours), ours.out_indices) == (len(theirs), tuple(theirs.out_indices)) == (5, (1, 2, 3, 4))
    for index in (None, 0, 3, [0, 2]):
        assert ours.channels(index) == theirs.channels(index)
        assert ours.reduction(index) == theirs.reduction(index)
    for index in (None, 3, [1, 2]):
        assert ours.module_name(index) == theirs.module_name(index)
        assert ours.get_dicts(idx=index) == theirs.get_dicts(idx=index)
        assert ours.get_dicts(["reduction"], index) == theirs.get_dicts(["reduction"], index)
    assert ours[4]["num_chs"] == theirs[4]["num_chs"] == ours.get("num_chs", 4)


def test_it_is_timms_of_a_vgg() -> None:
    timm = pytest.importorskip("timm", reason="needs timm, which is in the dev extra")
    with torch.device("meta"):
        theirs = timm.create_model("vgg16", pretrained=False, features_only=True, out_indices=(2, 3, 4, 5)).feature_info
        ours = make_body("vgg16").feature_info
    for method in ("channels", "reduction", "module_name"):
        assert getattr(ours, method)() == getattr(theirs, method)()


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "cifar1202"])
def test_it_is_what_the_maps_are(arch: str) -> None:
    with torch.device("meta"):
        body = make_body(arch, norm="batch", fast=False)
        assert not isinstance(body.feature_info, dict)
        maps = list(body(torch.zeros(1, 3, 64, 64)).values())
    info: FeatureInfo = body.feature_info
    assert info.channels() == [features.shape[1] for features in maps] == body.channels
    assert info.reduction() == [64 // features.shape[2] for features in maps]
    modules = dict(body.named_modules())
    assert all(name in modules for name in info.module_name())


def test_it_follows_the_stages_and_the_dilation() -> None:
    assert make_body("resnet18", returned_layers=(2, 3)).feature_info.channels() == [128, 256]
    assert len(make_body("resnet18", returned_layers=(2, 3)).feature_info) == 4
    assert make_body("resnet18", dilate_c5=True).feature_info.reduction() == [4, 8, 16, 16]
    with torch.device("meta"):
        c4 = build_detector(DetectorSpec(arch="resnet50", layout="c4", anchor_sizes=(32, 64)), num_classes=3)
    assert (c4.backbone.body.feature_info.channels(), c4.backbone.body.feature_info.reduction()) == ([1024], [16])
