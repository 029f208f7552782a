"""Other libraries' names and layouts: every rule by itself, every pair of formats there and back, real names."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from resdet.errors import WeightsError
from resdet.models.backbone import resnet_fpn
from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec
from resdet.weights.convert import (
    Converted,
    facts_to_carry,
    from_torchvision,
    settings_for,
    to_torchvision,
    write,
)
from resdet.weights.facts import FACTS_ENTRY
from resdet.weights.formats import detect_format
from resdet.weights.layouts import (
    AFFINE_NORMS,
    BACKGROUND_LAST,
    BGR_STEM,
    FORMATS,
    MISSING_STATISTICS,
    NO_BACKGROUND_DELTAS,
    SCORES,
    STEM,
    Form,
    add_background_deltas,
    add_norm_statistics,
    background_to_first,
    drop_norm_statistics,
    flip_stem_channels,
    modern_names,
    tensor_names,
)

K = 4
DETECTOR_FORMATS = [name for name, naming in FORMATS.items() if naming.heads]


def randomised(shapes: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, like in shapes.items():
        if like.dtype == torch.int64:
            tensors[name] = torch.tensor(7)
        else:
            tensors[name] = torch.randn(like.shape, generator=generator)
        if name.endswith("running_var"):
            tensors[name].abs_().add_(0.1)
    return tensors


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """A small network of each kind in torchvision's layout; the background's regression is zero as it is elsewhere."""
    spec = DetectorSpec(arch="resnet18", out_channels=8, box_head_channels=8)
    with torch.device("meta"):
        detector = build_detector(spec, num_classes=K + 1).state_dict()
        pyramid = resnet_fpn("resnet18", out_channels=8).state_dict()
        classifier = torchvision.models.resnet18(num_classes=5).state_dict()
        deep = torchvision.models.resnet50(num_classes=5).state_dict()
    kinds = {
        "detector": randomised(detector),
        "pyramid": randomised(pyramid),
        "classifier": randomised(classifier),
        # Its channels do not matter to names.
        "body": randomised(
            {n: t[tuple(slice(8) for _ in t.shape)] for n, t in deep.items() if not n.startswith("fc.")}
        ),
    }
    for leaf in ("weight", "bias"):
        kinds["detector"][f"roi_heads.box_predictor.bbox_pred.{leaf}"][:4] = 0
    return kinds


def without_counters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- rules


def test_bgr_stem() -> None:
    torch.manual_seed(0)
    images, weight = torch.rand(2, 3, 16, 16), torch.randn(4, 3, 7, 7)
    flipped = flip_stem_channels({STEM: weight})[STEM]
    # Sums of 147 products in another order: a few float32 roundings.
    torch.testing.assert_close(F.conv2d(images.flip(1), weight), F.conv2d(images, flipped), atol=1e-4, rtol=0)
    assert not torch.allclose(F.conv2d(images, weight), F.conv2d(images, flipped), atol=1e-2)
    assert_same(BGR_STEM.outward(BGR_STEM.inward({STEM: weight})), {STEM: weight})
    grey = {STEM: torch.randn(4, 1, 7, 7)}
    assert flip_stem_channels(grey) is grey


def test_background_last() -> None:
    rows = {f"{SCORES}weight": torch.randn(K + 1, 6), f"{SCORES}bias": torch.randn(K + 1)}
    moved = background_to_first(rows)
    features = torch.randn(3, 6)
    theirs = F.linear(features, rows[f"{SCORES}weight"], rows[f"{SCORES}bias"]).softmax(1)
    ours = F.linear(features, moved[f"{SCORES}weight"], moved[f"{SCORES}bias"]).softmax(1)
    # Class k of theirs is label k + 1 of ours; softmax sums in another order.
    torch.testing.assert_close(ours[:, 1:], theirs[:, :K])
    torch.testing.assert_close(ours[:, 0], theirs[:, K])
    assert_same(BACKGROUND_LAST.outward(moved), rows)
    assert not torch.equal(BACKGROUND_LAST.inward(moved)[f"{SCORES}bias"], rows[f"{SCORES}bias"])


def test_no_background_deltas() -> None:
    names = [f"roi_heads.box_predictor.bbox_pred.{leaf}" for leaf in ("weight", "bias")]
    rows = dict(zip(names, (torch.randn(4 * K, 6), torch.randn(4 * K)), strict=True))
    added = add_background_deltas(rows)
    for name in names:
        assert len(added[name]) == 4 * (K + 1)
        assert not added[name][:4].any()
        assert torch.equal(added[name][4 * 2 : 4 * 3], rows[name][4 * 1 : 4 * 2])  # label 2 is class 1
    assert_same(NO_BACKGROUND_DELTAS.outward(added), rows)


def test_norms_without_statistics() -> None:
    names = [f"backbone.body.bn1.{leaf}" for leaf in ("weight", "bias")]
    affine = dict(zip(names, (torch.randn(8), torch.randn(8)), strict=True)) | {STEM: torch.randn(8, 3, 7, 7)}
    filled = add_norm_statistics(affine)
    norm = FrozenBatchNorm2d(8, eps=1e-5)
    norm.load_state_dict({n.rpartition(".")[2]: t for n, t in filled.items() if ".bn1." in n})
    x = torch.randn(2, 8, 5, 5)
    exact = x * affine[names[0]].view(-1, 1, 1) + affine[names[1]].view(-1, 1, 1)
    # 1 - 1e-5 + 1e-5 is 1 within half a rounding of float32; a variance of 1 would be off by 5e-6 of the value.
    torch.testing.assert_close(norm(x), exact, rtol=3e-7, atol=3e-7)
    norm.running_var.fill_(1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(norm(x), exact, rtol=3e-7, atol=3e-7)
    assert_same(AFFINE_NORMS.outward(filled), affine)
    assert MISSING_STATISTICS.outward(filled) is filled
    own = filled | {"backbone.body.bn1.running_mean": torch.full((8,), 1e-30)}
    assert_same(drop_norm_statistics(own), own)


def test_names_of_an_older_torchvision(states: dict[str, dict[str, Tensor]]) -> None:
    def older(name: str) -> str:
        return name.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "blocks." in name else name

    state = {older(n).replace("conv.0.0.", "conv."): t for n, t in states["detector"].items()}
    assert "rpn.head.conv.weight" in state
    assert "backbone.fpn.inner_blocks.0.weight" in state
    assert_same(modern_names(state), states["detector"])
    converted = to_torchvision(state)
    assert_same(converted.tensors, states["detector"])
    assert converted.rules == ("torchvision's older names",)


# ---- names


def test_names_are_one_to_one() -> None:
    forms: tuple[Form, ...] = ("detector", "pyramid", "body")
    for naming, form in itertools.product(FORMATS.values(), forms):
        names = tensor_names(naming, form, {1: 3, 2: 4, 3: 23, 4: 3})
        assert len(set(names.values())) == len(names)


def test_names_are_those_of_the_libraries() -> None:
    """Names quoted from their sources and model zoos; see resdet/weights/layouts.py."""
    depths = {1: 3, 2: 4, 3: 23, 4: 3}
    ours = {
        "stem": "backbone.body.conv1.weight",
        "stem norm": "backbone.body.bn1.bias",
        "block": "backbone.body.layer3.22.conv2.weight",
        "norm": "backbone.body.layer3.22.bn3.weight",
        "shortcut": "backbone.body.layer1.0.downsample.0.weight",
        "shortcut norm": "backbone.body.layer1.0.downsample.1.running_var",
        "lateral": "backbone.fpn.inner_blocks.2.0.weight",
        "top": "backbone.fpn.inner_blocks.3.0.weight",
        "output": "backbone.fpn.layer_blocks.2.0.bias",
        "rpn": "rpn.head.conv.0.0.weight",
        "objectness": "rpn.head.cls_logits.weight",
        "deltas": "rpn.head.bbox_pred.bias",
        "fc6": "roi_heads.box_head.fc6.weight",
        "scores": "roi_heads.box_predictor.cls_score.weight",
        "boxes": "roi_heads.box_predictor.bbox_pred.weight",
    }
    theirs = {
        "detectron2": [
            "backbone.bottom_up.stem.conv1.weight",
            "backbone.bottom_up.stem.conv1.norm.bias",
            "backbone.bottom_up.res4.22.conv2.weight",
            "backbone.bottom_up.res4.22.conv3.norm.weight",
            "backbone.bottom_up.res2.0.shortcut.weight",
            "backbone.bottom_up.res2.0.shortcut.norm.running_var",
            "backbone.fpn_lateral4.weight",
            "backbone.fpn_lateral5.weight",
            "backbone.fpn_output4.bias",
            "proposal_generator.rpn_head.conv.weight",
            "proposal_generator.rpn_head.objectness_logits.weight",
            "proposal_generator.rpn_head.anchor_deltas.bias",
            "roi_heads.box_head.fc1.weight",
            "roi_heads.box_predictor.cls_score.weight",
            "roi_heads.box_predictor.bbox_pred.weight",
        ],
        "detectron": [
            "conv1_w",
            "res_conv1_bn_b",
            "res4_22_branch2b_w",
            "res4_22_branch2c_bn_s",
            "res2_0_branch1_w",
            "res2_0_branch1_bn_riv",
            "fpn_inner_res4_22_sum_lateral_w",
            "fpn_inner_res5_2_sum_w",
            "fpn_res4_22_sum_b",
            "conv_rpn_fpn2_w",
            "rpn_cls_logits_fpn2_w",
            "rpn_bbox_pred_fpn2_b",
            "fc6_w",
            "cls_score_w",
            "bbox_pred_w",
        ],
        "mmdetection": [
            "backbone.conv1.weight",
            "backbone.bn1.bias",
            "backbone.layer3.22.conv2.weight",
            "backbone.layer3.22.bn3.weight",
            "backbone.layer1.0.downsample.0.weight",
            "backbone.layer1.0.downsample.1.running_var",
            "neck.lateral_convs.2.conv.weight",
            "neck.lateral_convs.3.conv.weight",
            "neck.fpn_convs.2.conv.bias",
            "rpn_head.rpn_conv.weight",
            "rpn_head.rpn_cls.weight",
            "rpn_head.rpn_reg.bias",
            "roi_head.bbox_head.shared_fcs.0.weight",
            "roi_head.bbox_head.fc_cls.weight",
            "roi_head.bbox_head.fc_reg.weight",
        ],
        "maskrcnn-benchmark": [
            "backbone.body.stem.conv1.weight",
            "backbone.body.stem.bn1.bias",
            "backbone.body.layer3.22.conv2.weight",
            "backbone.body.layer3.22.bn3.weight",
            "backbone.body.layer1.0.downsample.0.weight",
            "backbone.body.layer1.0.downsample.1.running_var",
            "backbone.fpn.fpn_inner3.weight",
            "backbone.fpn.fpn_inner4.weight",
            "backbone.fpn.fpn_layer3.bias",
            "rpn.head.conv.weight",
            "rpn.head.cls_logits.weight",
            "rpn.head.bbox_pred.bias",
            "roi_heads.box.feature_extractor.fc6.weight",
            "roi_heads.box.predictor.cls_score.weight",
            "roi_heads.box.predictor.bbox_pred.weight",
        ],
    }
    for format_name, expected in theirs.items():
        names = tensor_names(FORMATS[format_name], "detector", depths)
        assert [names[name] for name in ours.values()] == expected


def test_the_real_names_and_shapes_of_detectron2(assets: Path) -> None:
    shapes = json.loads((assets / "d2_golden" / "parameters.json").read_text())
    theirs = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    converted = to_torchvision({"model": theirs, "__author__": "Detectron2 Model Zoo"})
    with torch.device("meta"):
        ours = build_detector(DetectorSpec(arch="resnet101"), num_classes=81).state_dict()
    assert {name: t.shape for name, t in converted.tensors.items()} == {name: t.shape for name, t in ours.items()}
    assert converted.left_over == ()
    assert converted.kind == "detector"
    assert converted.rules == (
        "names",
        "BGR stem",
        "background row last",
        "no box regression of the background",
        "stride in 1x1 (no tensor changes)",
    )
    assert converted.facts == {
        "format": "detectron2",
        "arch": "resnet101",
        "stride_in_1x1": True,
        "channel_order": "bgr",
        "image_mean": pytest.approx([0.485, 0.456, 0.406]),
        "image_std": [1 / 255] * 3,
        "norm_eps": 1e-5,
        "background": "last",
        "num_classes": 81,
    }


def test_torchvision_and_timm_themselves(states: dict[str, dict[str, Tensor]]) -> None:
    timm = pytest.importorskip("timm", reason="needs timm, a development dependency")
    state = without_counters(states["classifier"])
    network = torchvision.models.resnet18(num_classes=5).eval()
    network.load_state_dict(state, strict=False)
    features = timm.create_model("resnet18", features_only=True, pretrained=False).eval()
    body = {n: t for n, t in state.items() if not n.startswith("fc.")}
    detector = {f"backbone.body.{n}": t for n, t in body.items()} | {"rpn.head.cls_logits.bias": torch.zeros(3)}
    written = write(detector, "timm")
    assert written.left_over == ("rpn.head.cls_logits.bias",)
    problems = features.load_state_dict(written.tensors, strict=False)
    assert not problems.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in problems.missing_keys)
    classifier = timm.create_model("resnet18", pretrained=False, num_classes=5)
    classifier.load_state_dict(from_torchvision(states["classifier"], "timm"))
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        c2 = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(x)))))
        maps = features(x)
        expected = [c2]
        for stage in (network.layer2, network.layer3, network.layer4):
            expected.append(stage(expected[-1]))
        for found, wanted in zip(maps[1:], expected, strict=True):
            assert torch.equal(found, wanted)


# ---- there and back


@pytest.mark.parametrize("kind", ["detector", "pyramid", "classifier", "body"])
def test_every_pair_there_and_back(states: dict[str, dict[str, Tensor]], kind: str) -> None:
    hub = without_counters(states[kind])
    formats = list(FORMATS) if kind in ("classifier", "body") else DETECTOR_FORMATS
    for first, second in itertools.product(formats, formats):
        original = write(hub, first).tensors
        here = to_torchvision(original, first)
        assert here.left_over == ()
        there = write(here.tensors, second, here.facts)
        assert there.left_over == ()
        back = to_torchvision(there.tensors, second)
        assert_same(back.tensors, hub)
        assert_same(write(back.tensors, first).tensors, original)


def test_a_changed_value_is_seen_after_there_and_back(states: dict[str, dict[str, Tensor]]) -> None:
    hub = without_counters(states["detector"])
    for name in ("backbone.body.conv1.weight", "rpn.head.bbox_pred.bias", f"{SCORES}weight"):
        changed = hub | {name: hub[name].clone()}
        changed[name].view(-1)[-1] += 1e-3
        back = to_torchvision(write(changed, "detectron2").tensors).tensors
        with pytest.raises(AssertionError, match=name):
            assert_same(back, hub)


def test_affine_norms_there_and_back(states: dict[str, dict[str, Tensor]]) -> None:
    """MSRA's blobs have no statistics, and get none on their way through the others."""
    hub = {n: t for n, t in states["body"].items() if not n.endswith(("running_mean", "running_var", "tracked"))}
    blobs = write(hub, "detectron").tensors
    assert not any(name.endswith(("_rm", "_riv")) for name in blobs)
    for other in FORMATS:
        converted = to_torchvision(write(to_torchvision(blobs).tensors, other).tensors, other)
        assert "bn1.running_var" in converted.tensors
        assert_same(write(converted.tensors, "detectron").tensors, blobs)
    assert "norms without statistics" in to_torchvision(blobs).rules


def test_counters_of_batch_norm_have_a_place_except_in_blobs(states: dict[str, dict[str, Tensor]]) -> None:
    for name in FORMATS:
        written = write(states["classifier"], name)
        counters = {n for n in states["classifier"] if n.endswith("num_batches_tracked")}
        assert set(written.left_over) == (counters if name == "detectron" else set())
        if name != "detectron":
            assert_same(to_torchvision(written.tensors, name).tensors, states["classifier"])


# ---- formats and facts


def test_formats_are_told_by_their_names(states: dict[str, dict[str, Tensor]]) -> None:
    alike = {"timm": "torchvision", "mmdetection-caffe": "mmdetection"}
    for kind, name in itertools.product(("detector", "pyramid"), DETECTOR_FORMATS):
        assert detect_format(write(states[kind], name).tensors) == alike.get(name, name)
    for name in ("torchvision", "detectron2", "detectron", "maskrcnn-benchmark"):
        tensors = write(states["body"], name).tensors
        assert detect_format(tensors) == name
        assert detect_format({"model": {f"module.{n}": t for n, t in tensors.items()}}) == name


def test_mmdetection_caffe_is_told_by_its_configuration_or_its_norms(states: dict[str, dict[str, Tensor]]) -> None:
    config = (
        "model = dict(backbone=dict(type='ResNet', norm_cfg=dict(requires_grad=False), style='caffe'))\n"
        "img_norm_cfg = dict(\n    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)\n"
        "bbox_coder=dict(target_means=[0., 0., 0., 0.], target_stds=[0.1, 0.1, 0.2, 0.2])"
    )
    tensors = write(states["detector"], "mmdetection-caffe").tensors
    content = {"state_dict": tensors, "meta": {"config": config, "CLASSES": ("a", "b", "c", "d"), "epoch": 12}}
    converted = to_torchvision(content)
    assert converted.facts["format"] == "mmdetection-caffe"
    assert converted.facts["stride_in_1x1"] is True
    assert converted.facts["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert converted.facts["image_std"] == [1 / 255] * 3
    assert_same(converted.tensors, states["detector"])

    rgb = (
        config.replace("to_rgb=False", "to_rgb=True").replace("caffe", "pytorch").replace("[1.0, 1.0, 1.0]", "[9,8,7]")
    )
    facts = to_torchvision({"state_dict": tensors, "meta": {"config": rgb}}).facts
    assert (facts["format"], facts["stride_in_1x1"]) == ("mmdetection", False)
    assert facts["image_std"] == pytest.approx([9 / 255, 8 / 255, 7 / 255])

    affine = {n: torch.zeros_like(t) if n.endswith("running_mean") else t for n, t in tensors.items()}
    assert detect_format({"state_dict": affine, "meta": {}}) == "mmdetection-caffe"
    assert detect_format({"state_dict": tensors, "meta": {}}) == "mmdetection"


def test_facts_of_each_format(states: dict[str, dict[str, Tensor]]) -> None:
    imagenet = pytest.approx([0.485, 0.456, 0.406])
    detectron = pytest.approx([122.7717 / 255, 115.9465 / 255, 102.9801 / 255])
    unit_std, torch_std = [1 / 255] * 3, pytest.approx([0.229, 0.224, 0.225])
    expected = {
        "torchvision": (False, "rgb", imagenet, torch_std, 1e-5, "first"),
        "detectron2": (True, "bgr", imagenet, unit_std, 1e-5, "last"),
        "detectron": (True, "bgr", detectron, unit_std, 1e-5, "first"),
        "mmdetection": (False, "rgb", imagenet, torch_std, 1e-5, "last"),
        "mmdetection-caffe": (True, "bgr", imagenet, unit_std, 1e-5, "last"),
        "maskrcnn-benchmark": (True, "bgr", detectron, unit_std, 0.0, "first"),
    }
    keys = ("stride_in_1x1", "channel_order", "image_mean", "image_std", "norm_eps", "background")
    for name, facts in expected.items():
        converted = to_torchvision(write(states["detector"], name).tensors, name)
        assert tuple(converted.facts[key] for key in keys) == facts
        assert (converted.facts["arch"], converted.facts["num_classes"]) == ("resnet18", K + 1)


@pytest.mark.parametrize("arch", ["resnet34", "resnet50", "resnet101", "resnext101_32x8d", "wide_resnet50_2"])
def test_the_architecture_is_told_by_the_tensors(arch: str) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(arch, weights=None).state_dict()
    converted = to_torchvision(state)
    assert (converted.facts["arch"], converted.kind, converted.facts["num_classes"]) == (arch, "classifier", 1000)
    cut = {name: tensor for name, tensor in state.items() if not name.startswith("layer4.2.")}
    assert to_torchvision(cut).facts["arch"] is None or arch == "resnet34"


def test_detectron2_models_that_are_not_msras() -> None:
    with torch.device("meta"):
        resnext = torchvision.models.resnext101_32x8d().state_dict()
        plain = torchvision.models.resnet50().state_dict()
    # configs/COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml: BGR, unit variance, stride in the 3x3
    facts = to_torchvision(write(resnext, "detectron2").tensors).facts
    assert (facts["stride_in_1x1"], facts["channel_order"]) == (False, "bgr")
    assert facts["image_std"] == pytest.approx([0.229, 0.224, 0.225], abs=1e-6)
    # tools/convert-torchvision-to-d2.py
    theirs = {"model": write(plain, "detectron2", {"format": "detectron2", "channel_order": "rgb"}).tensors}
    converted = to_torchvision({**theirs, "__author__": "torchvision", "matching_heuristics": True})
    assert (converted.facts["stride_in_1x1"], converted.facts["channel_order"]) == (False, "rgb")
    assert converted.rules == ("names",)


def test_detectron2s_own_pixel_statistics_count(states: dict[str, dict[str, Tensor]]) -> None:
    tensors = write(states["detector"], "detectron2").tensors
    mean, std = torch.tensor([100.0, 110.0, 120.0]).view(3, 1, 1), torch.tensor([5.0, 6.0, 7.0]).view(3, 1, 1)
    converted = to_torchvision(tensors | {"pixel_mean": mean, "pixel_std": std})
    assert converted.facts["image_mean"] == pytest.approx([120 / 255, 110 / 255, 100 / 255])
    assert converted.facts["image_std"] == pytest.approx([7 / 255, 6 / 255, 5 / 255])
    assert converted.left_over == ("pixel_mean", "pixel_std")
    rgb = to_torchvision(tensors | {"pixel_mean": mean.flip(0), "pixel_std": std.flip(0)})
    assert rgb.facts["channel_order"] == "rgb"
    assert rgb.facts["image_mean"] == converted.facts["image_mean"]
    assert torch.equal(rgb.tensors[STEM], converted.tensors[STEM].flip(1))
    assert_same(write(rgb.tensors, "detectron2", rgb.facts).tensors, tensors)


def test_a_checkpoint_of_ours_says_its_own_facts(states: dict[str, dict[str, Tensor]]) -> None:
    spec = DetectorSpec(arch="resnet18", image_mean=(0.1, 0.2, 0.3), norm_eps=0.0)
    content = {"format": "resdet-detector-1", "spec": spec.model_dump(mode="json"), "model": states["detector"]}
    facts = to_torchvision(content).facts
    assert (facts["image_mean"], facts["norm_eps"]) == ([0.1, 0.2, 0.3], 0.0)


def test_facts_travel_with_a_file(states: dict[str, dict[str, Tensor]]) -> None:
    first = to_torchvision(write(states["detector"], "detectron2").tensors)
    content = {"model": first.tensors, FACTS_ENTRY: facts_to_carry("torchvision", first.facts)}
    again = to_torchvision(content)
    for key in ("stride_in_1x1", "image_mean", "image_std", "norm_eps"):
        assert again.facts[key] == first.facts[key]
    caffe = {
        "state_dict": write(again.tensors, "mmdetection-caffe", again.facts).tensors,
        FACTS_ENTRY: facts_to_carry("mmdetection-caffe", again.facts),
    }
    assert detect_format(caffe) == "mmdetection-caffe"
    assert_same(to_torchvision(caffe).tensors, states["detector"])
    for nonsense in ({"format": "x"}, {"format": "timm"}, [], {**content[FACTS_ENTRY], "image_mean": ["0", 1, 2]}):
        facts = to_torchvision({**content, FACTS_ENTRY: nonsense}).facts
        assert facts["stride_in_1x1"] is False


def test_settings_in_the_targets_own_words(states: dict[str, dict[str, Tensor]]) -> None:
    converted = to_torchvision(states["detector"])
    assert settings_for("detectron2", converted) == {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.ROI_HEADS.NUM_CLASSES": K,
    }
    assert settings_for("maskrcnn-benchmark", converted)["MODEL.ROI_BOX_HEAD.NUM_CLASSES"] == K + 1
    assert settings_for("maskrcnn-benchmark", converted)["eps of the norms"] == 1e-5
    caffe = to_torchvision(write(states["detector"], "mmdetection-caffe").tensors, "mmdetection-caffe")
    assert settings_for("mmdetection-caffe", caffe)["data_preprocessor.bgr_to_rgb"] is False
    assert settings_for("mmdetection", caffe)["backbone.style"] == "caffe"
    assert settings_for("torchvision", caffe)["stride_in_1x1"] is True


# ---- what has no place


def test_what_is_left_over_is_named(states: dict[str, dict[str, Tensor]], caplog: pytest.LogCaptureFixture) -> None:
    blobs: dict[str, Any] = write(without_counters(states["classifier"]), "detectron").tensors
    extra = ["conv1_b", "conv1_w_momentum", "mask_fcn_logits_w"]
    converted = to_torchvision({"blobs": blobs | dict.fromkeys(extra, torch.zeros(1))})
    assert sorted(converted.left_over) == extra
    anchors = "proposal_generator.anchor_generator.cell_anchors.0"
    theirs = write(states["detector"], "detectron2").tensors | {anchors: torch.zeros(3, 4)}
    assert to_torchvision(theirs).left_over == (anchors,)
    ours = states["detector"] | {"roi_heads.mask_head.mask_fcn1.weight": torch.zeros(1)}
    ours["roi_heads.box_predictor.bbox_pred.weight"] = torch.ones_like(ours["roi_heads.box_predictor.bbox_pred.weight"])
    written = write(ours, "mmdetection")
    assert written.left_over == (
        "roi_heads.mask_head.mask_fcn1.weight",
        "roi_heads.box_predictor.bbox_pred.weight[:4]",
    )
    with caplog.at_level("INFO", "resdet"):
        from_torchvision(ours, "mmdetection")
    assert "mmdetection has no place for roi_heads.mask_head.mask_fcn1.weight" in caplog.text


def test_errors_say_what_was_found(states: dict[str, dict[str, Tensor]]) -> None:
    with pytest.raises(WeightsError, match=r"no known library \(torchvision, .*\): encoder\.weight"):
        detect_format({"encoder.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="upgrade_model_version"):
        detect_format({"backbone.conv1.weight": torch.zeros(1), "bbox_head.fc_cls.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="no format 'caffe'; known are torchvision"):
        to_torchvision(states["body"], "caffe")
    with pytest.raises(WeightsError, match=r"as detectron2 names it: there is no stem\.conv1\.weight"):
        to_torchvision(states["body"], "detectron2")
    with pytest.raises(WeightsError, match="holds no ResNet in torchvision's layout"):
        write({"stem.weight": torch.zeros(1)}, "detectron2")
    with pytest.raises(WeightsError, match="holds no tensors"):
        to_torchvision({"meta": {}})
    tensors = write(states["detector"], "detectron2").tensors
    agnostic = {n: t[:4] if ".bbox_pred." in n else t for n, t in tensors.items()}
    with pytest.raises(WeightsError, match=r"of 5 classes.* must have 16 rows, got 4 \(class-agnostic"):
        to_torchvision(agnostic)
    three = resnet_fpn("resnet18", out_channels=8, returned_layers=(2, 3, 4)).state_dict()
    with pytest.raises(WeightsError, match="FPN on 3 of the body's 4 stages"):
        write(three, "detectron2")


def test_torchvisions_own_models_load_what_was_converted(states: dict[str, dict[str, Tensor]]) -> None:
    """The hub's names are torchvision's: strict loading into its own modules, BatchNorm's counters aside."""
    converted: Converted = to_torchvision(write(states["pyramid"], "detectron2").tensors)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    backbone.fpn = torchvision.ops.FeaturePyramidNetwork([64, 128, 256, 512], 8)
    backbone.load_state_dict(converted.tensors)
    assert isinstance(backbone.body.conv1, nn.Conv2d)
    assert torch.equal(backbone.body.conv1.weight, states["pyramid"]["body.conv1.weight"])
