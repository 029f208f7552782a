from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from resdet.errors import UserError
from resdet.models.archs import ARCHS, ResNetArch
from resdet.models.backbone import resnet_fpn
from resdet.models.bodies import make_body
from resdet.models.norm import FrozenBatchNorm2d, conv_norm_names, folded_copy
from resdet.models.resnet import ResNet

RandomiseNorms = Callable[[nn.Module], None]

NORMS = {
    "frozen": torchvision.ops.FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 32),
}

TORCHVISION = [
    arch
    for arch, shape in ARCHS.items()
    if isinstance(shape, ResNetArch) and arch in torchvision.models.list_models(module=torchvision.models)
]


def reference(arch: str, norm: str, returned_layers: tuple[int, ...]) -> nn.Module:
    network = torchvision.models.get_model(arch, weights=None, norm_layer=NORMS[norm])
    return IntermediateLayerGetter(network, {f"layer{k}": str(level) for level, k in enumerate(returned_layers)})


@pytest.mark.parametrize("arch", TORCHVISION)
@pytest.mark.parametrize("norm", NORMS)
def test_state_dict_has_torchvisions_names_order_and_shapes(arch: str, norm: str) -> None:
    for returned_layers in [(1, 2), (2, 4)]:
        with torch.device("meta"):
            ours = make_body(arch, norm=norm, returned_layers=returned_layers)
            theirs = reference(arch, norm, returned_layers)
        assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
            (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
        ]


@pytest.mark.parametrize("returned_layers", [(1, 2), (3,), (2, 3, 4)])
def test_state_dicts_are_exchangeable_both_ways(returned_layers: tuple[int, ...]) -> None:
    ours, theirs = (
        make_body("resnet18", returned_layers=returned_layers),
        reference("resnet18", "frozen", returned_layers),
    )
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
    ours, theirs = make_body(arch, norm=norm, fast=False).eval(), reference(arch, norm, (1, 2, 3, 4)).eval()
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
    ours = make_body("resnet50", norm="frozen", fast=fast, stride_in_1x1=True).eval()
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


def test_dilated_c5_is_torchvisions() -> None:
    torch.manual_seed(0)
    ours = make_body("resnet50", norm="batch", dilate_c5=True, fast=False).eval()
    network = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, False, True])
    theirs = IntermediateLayerGetter(network, ours.return_layers).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 65, 47)
    with torch.no_grad():
        assert torch.equal(ours(images)["3"], theirs(images)["3"])
        theirs.layer4[1].conv2.dilation, theirs.layer4[1].conv2.padding = (1, 1), (1, 1)
        assert not torch.equal(ours(images)["3"], theirs(images)["3"])
    assert ours.strides == [4, 8, 16, 16]


@pytest.mark.parametrize(
    ("arch", "stride_in_1x1"),
    [("resnet18", False), ("resnet50", True), ("resnet18d", False)],
)
def test_every_second_pixel_of_dilated_c5_is_that_of_the_strided(arch: str, stride_in_1x1: bool) -> None:
    """Exact in exact arithmetic; in float64 two orders of summation differ by less than 1e-10 of the scale."""
    torch.manual_seed(0)
    strided, dilated = (
        make_body(arch, norm="batch", stride_in_1x1=stride_in_1x1, dilate_c5=dilate, fast=False).double().eval()
        for dilate in (False, True)
    )
    dilated.load_state_dict(strided.state_dict())
    images = torch.randn(1, 3, 100, 80, dtype=torch.float64)  # C4 has an odd number of rows, 7, and of columns, 5
    with torch.no_grad():
        expected, found = strided(images)["3"], dilated(images)["3"]
        assert found.shape[2:] == (7, 5)
        scale = expected.abs().max()
        assert (found[..., ::2, ::2] - expected).abs().max() <= 1e-10 * scale
        assert (found[..., 1::2, ::2] - expected[..., :3, :]).abs().max() > 1e-2 * scale


def test_option_a_has_no_parameters_and_is_the_padded_subsampled_input() -> None:
    torch.manual_seed(0)
    body = make_body("cifar20", norm="batch", fast=False).eval()
    assert not any("downsample" in name for name in body.state_dict())
    block = body.layer2[0]
    x = torch.randn(2, 16, 9, 8)
    with torch.no_grad():
        shortcut = torch.zeros(2, 32, 5, 4)
        shortcut[:, :16] = x[:, :, ::2, ::2]
        branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
        assert torch.equal(block(x), torch.relu(branch + shortcut))
        assert not torch.equal(block(x), torch.relu(branch))


def test_option_c_projects_every_shortcut_and_b_only_where_shapes_change() -> None:
    projected = {
        arch: [f"{n}" for n, m in make_body(arch).named_modules() if n.endswith("downsample")]
        for arch in ("resnet34", "resnet34_option_c")
    }
    assert projected["resnet34"] == ["layer2.0.downsample", "layer3.0.downsample", "layer4.0.downsample"]
    assert len(projected["resnet34_option_c"]) == 3 + 4 + 6 + 3


@pytest.mark.parametrize("fast", [False, True])
def test_plain_network_adds_nothing(fast: bool) -> None:
    torch.manual_seed(0)
    plain = make_body("plain18", norm="frozen", fast=fast).double().eval()
    residual = make_body("resnet18_option_a", norm="frozen", fast=fast).double().eval()
    assert plain.state_dict().keys() == residual.state_dict().keys(), "they differ in what is computed alone"
    residual.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        x = plain.maxpool(torch.relu(plain.bn1(plain.conv1(images))))
        for block in [*plain.layer1, *plain.layer2]:
            x = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))))
        found = plain(images)["1"]
        assert (found - x).abs().max() <= 1e-12 * x.abs().max()
        assert (residual(images)["1"] - x).abs().max() > 1e-2 * x.abs().max()


@pytest.mark.parametrize(
    "arch",
    [pytest.param("resnet50d", marks=pytest.mark.slow), pytest.param("resnet50c", marks=pytest.mark.slow), "resnet18d"],
)
def test_deep_stem_and_pooled_shortcut_are_timms(arch: str) -> None:
    """An odd size: the 2x2 mean at the border is over the pixels there are."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    ours = make_body(arch, norm="batch", fast=False).eval()
    theirs = timm.create_model(arch, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 65, 47)
    with torch.no_grad():
        for level, expected in zip(ours(images).values(), theirs(images), strict=True):
            assert torch.equal(level, expected)
        theirs.layer2[0].downsample[1].weight *= 1.001
        assert not torch.equal(ours(images)["1"], theirs(images)[1])


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet18d", {}),
        ("resnet50d", {"dilate_c5": True}),
        ("cifar20", {}),
        pytest.param("resnet50c", {"stride_in_1x1": True, "dilate_c5": True}, marks=pytest.mark.slow),
        pytest.param("resnext50_32x4d", {"dilate_c5": True}, marks=pytest.mark.slow),
        pytest.param("resnet34_option_c", {}, marks=pytest.mark.slow),
        pytest.param("resnet18_option_a", {}, marks=pytest.mark.slow),
    ],
)
def test_folding_changes_rounding_only(arch: str, options: dict[str, bool], randomise_norms: RandomiseNorms) -> None:
    """At run time and in the copy that is exported, in float64, whose rounding is far below 1e-10."""
    torch.manual_seed(0)
    fast = make_body(arch, **options).eval()  # type: ignore[arg-type]
    randomise_norms(fast)
    fast = fast.double()
    plain = make_body(arch, fast=False, **options).double().eval()  # type: ignore[arg-type]
    plain.load_state_dict(fast.state_dict())
    assert len(conv_norm_names(fast)) == sum(isinstance(m, nn.Conv2d) for m in fast.modules())
    images = torch.randn(1, 3, 65, 48, dtype=torch.float64)
    with torch.no_grad():
        expected, found = plain(images), fast(images)
        # The copy's tensors are float32; made float64 again it computes with weights rounded once.
        folded = folded_copy(fast).double()(images)
        assert not any(isinstance(m, FrozenBatchNorm2d) for m in folded_copy(fast).modules())
        for name, level in expected.items():
            scale = level.abs().max()
            assert (found[name] - level).abs().max() <= 1e-10 * scale
            assert (folded[name] - level).abs().max() <= 1e-4 * scale
        fast.layer1[0].bn2.weight[0] *= 1.01
        assert (fast(images)["0"] - expected["0"]).abs().max() > 1e-6 * expected["0"].abs().max()


def test_zero_init_residual_starts_blocks_as_the_identity() -> None:
    torch.manual_seed(0)
    ours = make_body("resnet50", norm="batch", zero_init_residual=True)
    theirs = torchvision.models.resnet50(weights=None, zero_init_residual=True)
    for name, parameter in ours.named_parameters():
        assert name.endswith("bn3.weight") == bool((parameter == 0).all() and name.endswith("weight")), name
        assert bool((parameter == 0).all()) == bool((theirs.get_parameter(name) == 0).all()), name
    x = torch.rand(2, 256, 8, 8)
    assert torch.equal(ours.layer1[1](x), x)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_channels_and_strides_are_those_of_the_features(arch: str) -> None:
    body = make_body(arch, returned_layers=(2, 4))
    features = body(torch.zeros(1, 3, 96, 64))
    assert list(features) == ["0", "1"]
    assert [f.shape[1] for f in features.values()] == body.channels
    assert body.strides == [8, 32]
    assert [tuple(f.shape[2:]) for f in features.values()] == [(96 // s, 64 // s) for s in body.strides]


def test_convolutions_start_as_in_torchvision() -> None:
    torch.manual_seed(0)
    weight = make_body("resnet18", norm="batch").get_parameter("layer4.1.conv2.weight")
    # Kaiming, fan out, ReLU. 2.4 million draws know their deviation to 0.05 %; 0.5 % is ten of those.
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "resnet110"}, "did you mean 'resnet101'"),
        ({"arch": "vit_b_16"}, "known are resnet18"),
        ({"arch": "vgg16"}, "vgg16 is not a ResNet"),
        ({"arch": "resnet18", "stride_in_1x1": True}, "blocks of resnet18 have no 1x1 convolution"),
        ({"arch": "resnet18", "norm": "sync"}, "norm must be one of frozen, batch, group, got 'sync'"),
        ({"arch": "resnet18", "returned_layers": ()}, r"got \[\]"),
        ({"arch": "resnet18", "returned_layers": (1, 1)}, r"got \[1, 1\]"),
        ({"arch": "resnet18", "returned_layers": (2, 1)}, r"got \[2, 1\]"),
        ({"arch": "resnet18", "returned_layers": (0, 1)}, r"stages out of 1, 2, 3, 4.*got \[0, 1\]"),
        ({"arch": "resnet18", "returned_layers": (4, 5)}, r"got \[4, 5\]"),
        ({"arch": "cifar20", "returned_layers": (3, 4)}, r"out of 1, 2, 3, rising.*got \[3, 4\]"),
        ({"arch": "cifar20", "dilate_c5": True}, "networks of four stages, cifar20 has 3"),
        ({"arch": "resnet18", "zero_init_residual": True}, "norm batch or group; got resnet18 with norm frozen"),
        ({"arch": "plain18", "norm": "batch", "zero_init_residual": True}, "needs shortcuts"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResNet(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arch", "fast"), [("resnet18", False), ("resnet18", True), ("resnet18d", True), ("cifar20", True)]
)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_body_scripts_as_the_plain_one(arch: str, fast: bool) -> None:
    """TorchScript takes the plain form even of a fast body."""
    torch.manual_seed(0)
    body = make_body(arch, fast=fast).eval()
    plain = make_body(arch, fast=False).eval()
    plain.load_state_dict(body.state_dict())
    images = torch.randn(1, 3, 64, 64)
    scripted = torch.jit.script(body)
    with torch.no_grad():
        top = list(body.return_layers.values())[-1]
        assert torch.equal(scripted(images)[top], plain(images)[top])


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_scripting_leaves_the_model_as_it_was() -> None:
    """TorchScript puts what it takes for a module into the module that holds it; that must not be the model's own."""
    backbone = resnet_fpn("resnet18", out_channels=8).eval()
    kinds = {name: type(module) for name, module in backbone.named_modules()}
    torch.jit.script(backbone)
    assert {name: type(module) for name, module in backbone.named_modules()} == kinds
