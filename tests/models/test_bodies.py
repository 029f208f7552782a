"""Classifiers against torchvision and the papers' numbers; ResNeXt's three forms; every architecture as a detector."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from resdet.classification.summary import summarise
from resdet.errors import UserError, WeightsError
from resdet.models.archs import ARCHS
from resdet.models.bodies import Classifier, build_classifier, make_body
from resdet.models.checkpoint import checkpoint_payload, load_detector
from resdet.models.detector import Detector, build_detector
from resdet.models.norm import calibrate_norm, has_fresh_frozen_norm
from resdet.models.resnet import Bottleneck
from resdet.models.spec import DetectorSpec
from resdet.weights.facts import FACTS_ENTRY
from resdet.weights.files import read_weights

TORCHVISION = [arch for arch in ARCHS if arch in torchvision.models.list_models(module=torchvision.models)]


# ---- against torchvision and the papers


@pytest.mark.parametrize("arch", TORCHVISION)
def test_classifiers_state_dict_has_torchvisions_names_order_and_shapes(arch: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_classifier(arch, num_classes=7), torchvision.models.get_model(arch, num_classes=7)
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
    ]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


QUICK = {"resnet18", "resnet50"}


@pytest.mark.parametrize("arch", [a if a in QUICK else pytest.param(a, marks=pytest.mark.slow) for a in TORCHVISION])
def test_classifiers_are_exchanged_with_torchvision_and_give_equal_scores(arch: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(arch, weights=None, num_classes=7).eval()
    with torch.device("meta"):
        ours = build_classifier(arch, num_classes=7, fast=False)
    ours.to_empty(device="cpu").eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
        next(theirs.parameters())[0] *= 1.01
        assert not torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("arch", TORCHVISION)
def test_parameters_and_multiply_adds_are_torchvisions(arch: str) -> None:
    """Those that it states beside its weights, in GFLOPS that are multiply-adds, to its three digits."""
    meta = next(iter(torchvision.models.get_model_weights(arch))).meta
    total = summarise(arch)[-1]
    assert total.num_parameters == meta["num_params"]
    assert total.num_multiply_adds / 1e9 == pytest.approx(meta["_ops"], abs=5.1e-4)


@pytest.mark.parametrize(
    ("arch", "millions", "digits"),
    [
        ("resnet18", 11.69, 2),
        ("resnet34", 21.80, 2),
        ("resnet50", 25.56, 2),
        ("resnet101", 44.55, 2),
        ("resnet152", 60.19, 2),
        ("resnext50_32x4d", 25.03, 2),
        ("wide_resnet50_2", 68.88, 2),
        ("cifar20", 0.27, 2),
        ("cifar32", 0.46, 2),
        ("cifar44", 0.66, 2),
        ("cifar56", 0.85, 2),
        ("cifar110", 1.7, 1),
        pytest.param("cifar1202", 19.4, 1, marks=pytest.mark.slow),
    ],
)
def test_parameters_are_those_of_the_papers(arch: str, millions: float, digits: int) -> None:
    with torch.device("meta"):
        model = build_classifier(arch, num_classes=10 if arch.startswith("cifar") else 1000)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, digits) == millions


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.startswith("cifar") and arch != "cifar1202"])
def test_cifar_networks_have_the_layers_in_their_names(arch: str) -> None:
    with torch.device("meta"):
        model = build_classifier(arch, num_classes=10)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(arch.removeprefix("cifar").removeprefix("_plain"))
    with torch.device("meta"):
        maps = make_body(arch)(torch.empty(1, 3, 32, 32))
    assert [tuple(level.shape[1:]) for level in maps.values()] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_multiply_adds_of_the_first_paper() -> None:
    """Its table 1, at 224 pixels, strides in the first 1x1; it counts convolutions and the classifier."""
    stated = {"resnet18": 1.8, "resnet34": 3.6, "resnet50": 3.8, "resnet101": 7.6, "resnet152": 11.3, "plain34": 3.6}
    for arch, billions in stated.items():
        in_1x1 = ARCHS[arch].block == "bottleneck"  # type: ignore[union-attr]
        # Some are rounded down there: 3.66 is its 3.6, 3.86 its 3.8.
        counted = summarise(arch, stride_in_1x1=in_1x1)[-1].num_multiply_adds / 1e9
        assert counted == pytest.approx(billions, abs=0.07), arch


def test_bottleneck_at_256_channels_has_fewer_weights_than_two_3x3() -> None:
    def weights(module: nn.Module) -> int:
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))

    with torch.device("meta"):
        assert weights(make_body("resnet50").layer1[1]) == 69_632
        assert weights(make_body("resnet34").layer3[1]) == 1_179_648


# ---- ResNeXt: Xie et al. 2017, figure 3


class SplitTransformSum(nn.Module):
    """Form (a): each path has its own 1x1, 3x3 and 1x1; their outputs are summed."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        groups = block.conv2.groups
        d = block.conv2.out_channels // groups
        paths = []
        for i in range(groups):
            part = slice(i * d, (i + 1) * d)
            inner = torch.relu(affine(block.bn1, nn.functional.conv2d(x, block.conv1.weight[part]), part))
            inner = nn.functional.conv2d(inner, block.conv2.weight[part], stride=block.conv2.stride, padding=1)
            inner = torch.relu(affine(block.bn2, inner, part))
            paths.append(nn.functional.conv2d(inner, block.conv3.weight[:, part]))
        assert block.downsample is not None
        summed = torch.stack(paths).sum(dim=0)
        return torch.relu(block.bn3(summed) + block.downsample(x))


class Concatenated(SplitTransformSum):
    """Form (b): the paths' 3x3 outputs are concatenated, and one 1x1 goes over all of them."""

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        groups = block.conv2.groups
        d = block.conv2.out_channels // groups
        parts = [slice(i * d, (i + 1) * d) for i in range(groups)]
        paths = []
        for part in parts:
            inner = torch.relu(affine(block.bn1, nn.functional.conv2d(x, block.conv1.weight[part]), part))
            paths.append(nn.functional.conv2d(inner, block.conv2.weight[part], stride=block.conv2.stride, padding=1))
        joined = torch.relu(block.bn2(torch.cat(paths, dim=1)))
        assert block.downsample is not None
        return torch.relu(block.bn3(block.conv3(joined)) + block.downsample(x))


def affine(norm: nn.Module, x: Tensor, part: slice) -> Tensor:
    """Apply some channels of a frozen norm."""
    scale = norm.weight[part] * (norm.running_var[part] + norm.eps).rsqrt()
    shift = norm.bias[part] - norm.running_mean[part] * scale
    return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


@pytest.mark.parametrize("form", [SplitTransformSum, Concatenated])
@pytest.mark.parametrize("fast", [False, True])
def test_three_forms_of_resnext_are_one(form: type[SplitTransformSum], fast: bool) -> None:
    """The grouped convolution is form (c). In float64 the orders of summation agree to 1e-12 of the scale."""
    torch.manual_seed(0)
    body = make_body("resnext50_32x4d", fast=fast, returned_layers=(2,)).double().eval()
    block = body.layer2[0]
    assert (block.conv2.groups, block.conv2.out_channels) == (32, 256)
    generator = torch.Generator().manual_seed(1)
    for norm in (block.bn1, block.bn2, block.bn3):
        for tensor in (norm.weight, norm.running_var):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
    x = torch.randn(2, 256, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        grouped, other = block(x), form(block)(x)
        assert (grouped - other).abs().max() <= 1e-12 * grouped.abs().max()
        block.conv2.weight.copy_(block.conv2.weight.roll(1, dims=0))
        assert (block(x) - other).abs().max() > 1e-2 * grouped.abs().max()


# ---- a classifier is its body and a head


def test_classifier_shares_its_bodys_modules() -> None:
    body = make_body("cifar20", norm="batch")
    model = Classifier(body, 10)
    assert model.body is body
    assert {id(p) for p in body.parameters()} < {id(p) for p in model.parameters()}
    assert model.layer1 is body.layer1
    copy = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.double()
    assert next(body.parameters()).dtype == torch.float64
    assert len(copy) == 269_722


def test_wrong_classifiers_are_named() -> None:
    with pytest.raises(UserError, match=r"last stage of a body, 4 of resnet18; this one returns \[1, 2\]"):
        Classifier(make_body("resnet18", returned_layers=(1, 2)), 10)
    with pytest.raises(UserError, match="num_classes must be at least 1, got 0"):
        build_classifier("cifar20", num_classes=0)


# ---- as detectors

IMAGES = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0))]
TARGETS = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}]


def tiny(arch: str, **fields: object) -> Detector:
    spec = DetectorSpec.model_validate(
        {
            "arch": arch,
            "min_size": 64,
            "max_size": 96,
            "out_channels": 16,
            "box_head_channels": 16,
            "rpn_pre_nms_top_n_train": 20,
            "rpn_post_nms_top_n_train": 8,
            "rpn_pre_nms_top_n_test": 20,
            "rpn_post_nms_top_n_test": 8,
            **fields,
        }
    )
    return build_detector(spec, num_classes=3)


SLOW_FAMILIES = [
    ("resnet18_option_a", {}),
    ("resnet50d", {"layout": "dc5"}),
    ("resnet50", {"layout": "c4", "stride_in_1x1": True}),
    ("resnext50_32x4d", {}),
    ("wide_resnet50_2", {}),
    ("vgg16_bn", {}),
    ("cifar_plain56", {}),
]


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("plain18", {}),
        ("resnet18d", {}),
        ("resnet18", {"layout": "c4"}),
        ("resnet18", {"layout": "dc5"}),
        ("cifar20", {}),
        ("cifar20", {"norm": "group"}),
        ("vgg16", {"layout": "dc5"}),
        *(pytest.param(*family, marks=pytest.mark.slow) for family in SLOW_FAMILIES),
    ],
)
def test_every_family_fine_tunes_as_a_detector(arch: str, fields: dict[str, object], tmp_path: Path) -> None:
    """A step of training moves what is trained, and the checkpoint comes back as the same detector."""
    torch.manual_seed(0)
    model = tiny(arch, **fields)
    if has_fresh_frozen_norm(model):
        calibrate_norm(model.whole_body(), [torch.randn(1, 3, 64, 64)])
        assert not any(
            bool((norm.running_var == 1).all()) for norm in model.modules() if hasattr(norm, "running_var")
        ), "a norm was left out"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = model(IMAGES, TARGETS)
    sum(losses.values()).backward()
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
    torch.optim.SGD(trained, lr=1e-4).step()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"backbone", "rpn", "roi_heads"}
    torch.save(checkpoint_payload(model), tmp_path / "model.pt")
    again = load_detector(tmp_path / "model.pt")
    assert again.spec == model.spec
    with torch.no_grad():
        found, expected = again(IMAGES)[0], model.eval()(IMAGES)[0]
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_c4_takes_conv5_from_the_bodys_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = build_classifier("resnet18", num_classes=5)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    spec = DetectorSpec(arch="resnet18", layout="c4")
    model = build_detector(spec, num_classes=3, weights_backbone=tmp_path / "classifier.pth", trainable_layers=1)
    state = classifier.state_dict()
    for name, value in model.roi_heads.box_head.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not any(name.startswith("layer4") for name in model.backbone.body.state_dict())
    assert all(p.requires_grad for p in model.roi_heads.parameters())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert model.backbone.strides == [16]
    assert model.rpn.anchor_generator.num_anchors_per_location() == [15]
    # What conv5 gives for features of 14x14 is 7x7, averaged.
    c4 = torch.rand(2, 256, 14, 14)
    with torch.no_grad():
        expected = model.roi_heads.box_head.layer4(c4)
        assert expected.shape == (2, 512, 7, 7)
        torch.testing.assert_close(model.roi_heads.box_head(c4), expected.mean(dim=(2, 3)))


@pytest.mark.parametrize("arch", ["cifar20", "resnet18d", "vgg16_bn"])
def test_weights_bring_their_facts_whatever_the_stem(arch: str, tmp_path: Path) -> None:
    """As tools/pretrain.py writes them: the state dict and, beside it, what the network was trained on."""
    torch.manual_seed(0)
    body = make_body(arch, norm="batch", norm_eps=1e-3)
    facts = {
        "format": "torchvision",
        "stride_in_1x1": False,
        "channel_order": "rgb",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "norm_eps": 1e-3,
    }
    payload = OrderedDict(model=body.state_dict())
    setattr(payload, FACTS_ENTRY, facts)
    torch.save(payload, tmp_path / "w.pt")
    settings = read_weights(tmp_path / "w.pt").settings
    assert settings == {
        "norm_eps": 1e-3,
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.4, 0.5, 0.6),
        "stride_in_1x1": False,
    }
    spec = DetectorSpec(arch=arch, **settings)
    model = build_detector(spec, num_classes=2, weights_backbone=tmp_path / "w.pt")
    for name, value in model.backbone.body.state_dict().items():
        assert torch.equal(value, body.state_dict()[name]), name


def test_weights_of_another_network_are_told(tmp_path: Path) -> None:
    torch.save(build_classifier("resnet18", num_classes=2).state_dict(), tmp_path / "w.pth")
    for arch, norm in (("plain18", "frozen"), ("resnet18d", "frozen"), ("cifar20", "batch")):
        with pytest.raises(WeightsError, match=rf"does not fit this {arch} .*looks like resnet18"):
            build_detector(DetectorSpec(arch=arch, norm=norm), num_classes=2, weights_backbone=tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no weights of cifar20; cifar20 has none in torchvision"):
        build_detector(DetectorSpec(arch="cifar20"), num_classes=2, weights_backbone="IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "vgg16", "layout": "c4"}, "conv5 on each proposal, which is for ResNets; vgg16 can be dc5 or fpn"),
        ({"arch": "cifar20", "layout": "dc5"}, "needs a network with a C5; cifar20 can be fpn"),
        ({"arch": "vgg16", "stride_in_1x1": True}, "vgg16 has no 1x1 convolution"),
        (
            {"arch": "cifar20", "anchor_sizes": (8, 16)},
            r"4 levels P0..P3, got 2: \[8, 16\] \(the strides of cifar20's pyramid are 1, 2, 4, 8\)",
        ),
        ({"anchor_sizes": (8, 16)}, "5 levels P2..P6, got 2"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectorSpec.model_validate(fields)


def test_anchors_follow_the_strides_of_the_pyramid() -> None:
    assert DetectorSpec(arch="cifar20").anchor_sizes == (8, 16, 32, 64)
    assert DetectorSpec(arch="vgg16").anchor_sizes == (32, 64, 128, 256, 512)
    assert DetectorSpec(layout="c4", anchor_sizes=(128, 256, 512)).anchor_sizes == (128, 256, 512)
    again = DetectorSpec.model_validate(DetectorSpec(arch="cifar20").model_dump(mode="json"))
    assert again == DetectorSpec(arch="cifar20")


@pytest.mark.parametrize("arch", [a if len(a) < 9 else pytest.param(a, marks=pytest.mark.slow) for a in ARCHS])
def test_every_architecture_has_the_strides_and_channels_it_declares(arch: str) -> None:
    """On the meta device, where nothing is computed."""
    with torch.device("meta"):
        body = make_body(arch, norm="batch", fast=False)
        levels = body(torch.empty(1, 3, 64, 96))
    assert [level.shape[1] for level in levels.values()] == body.channels
    assert [tuple(level.shape[2:]) for level in levels.values()] == [(64 // s, 96 // s) for s in body.strides]
    assert body.strides == [ARCHS[arch].strides[stage - 1] for stage in ARCHS[arch].pyramid]
