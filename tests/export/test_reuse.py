"""A fine-tuned body goes into other people's models and computes the same C2-C5 there.

The body's weights and the statistics and affine parameters of its norms are all its own, so nothing passes by being the
identity. Each test ends with a twin: one value of the other model is changed, and the comparison must notice.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from resdet.export.backbone import export_backbone
from resdet.models.bodies import make_body
from resdet.models.resnet import ResNet
from resdet.weights.convert import from_torchvision

ARCHS = ["resnet18", pytest.param("resnet101", marks=pytest.mark.slow)]
STAGES = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}

# BatchNorm in evaluation mode multiplies and adds in another order than a frozen norm, and a ResNet-101 of random
# weights makes 7e-5 of the rounding of float32. So these comparisons are made in float64, where they come to 1e-13 of
# a map's largest value; what a frozen norm computes on both sides is compared in float32, bit for bit.
TOLERANCE = 1e-11
CHANGED = 1e-3

Body = tuple[ResNet, dict[str, Tensor]]


@pytest.fixture(scope="module", params=ARCHS)
def body(
    request: pytest.FixtureRequest,
    randomise_norms: Callable[[nn.Module], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Body:
    """A plain body (torchvision's operations, bit for bit), and what its exported file holds."""
    torch.manual_seed(0)
    body = make_body(request.param, fast=False).eval()
    randomise_norms(body)
    path: Path = tmp_path_factory.mktemp("exported") / "body.safetensors"
    export_backbone(body, path)
    return body, load_file(path)


def images() -> Tensor:
    return torch.randn(1, 3, 97, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(
    body: ResNet, theirs: Callable[[Tensor], Mapping[str, Tensor]], dtype: torch.dtype = torch.float32
) -> float:
    """The largest difference of a map relative to its scale, over all maps that the other model gives."""
    expected = copy.deepcopy(body).to(dtype)(images().to(dtype))
    maps = theirs(images().to(dtype))
    assert set(maps) <= set(expected)
    assert len(maps) >= 3
    worst = 0.0
    for name, features in maps.items():
        assert features.shape == expected[name].shape
        worst = max(worst, float((features - expected[name]).abs().max() / expected[name].abs().max()))
    return worst


def change_one_value(body: nn.Module) -> None:
    """Change one statistic of the last norm, which no weight would show."""
    last = body.get_submodule("layer4.1")
    variance = (last.bn3 if hasattr(last, "bn3") else last.bn2).running_var
    with torch.no_grad():
        variance[0] *= 100


def test_torchvisions_classifier(body: Body) -> None:
    ours, tensors = body
    for norm_layer, dtype, tolerance in (
        (FrozenBatchNorm2d, torch.float32, 0.0),
        (nn.BatchNorm2d, torch.float64, TOLERANCE),
    ):
        network = getattr(torchvision.models, ours.arch)(weights=None, norm_layer=norm_layer).eval()
        result = network.load_state_dict(tensors, strict=False)
        assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], [])
        network.to(dtype)
        stages = IntermediateLayerGetter(network, STAGES)
        assert difference(ours, stages, dtype) <= tolerance
        assert network(images().to(dtype)).shape == (1, 1000)
        change_one_value(network)
        assert difference(ours, stages, dtype) > CHANGED


def test_timms_features(body: Body) -> None:
    timm = pytest.importorskip("timm", reason="needs timm, which is in the dev extra")
    ours, tensors = body
    network = timm.create_model(ours.arch, pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    network.load_state_dict(tensors)  # every name of it, none missing

    def stages(batch: Tensor) -> dict[str, Tensor]:
        return dict(zip("0123", network(batch), strict=True))

    network.double()
    assert difference(ours, stages, torch.float64) <= TOLERANCE
    change_one_value(network)
    assert difference(ours, stages, torch.float64) > CHANGED


DETECTORS: dict[str, tuple[type[nn.Module], list[int]]] = {
    "MaskRCNN": (torchvision.models.detection.MaskRCNN, [1, 2, 3, 4]),
    "RetinaNet": (torchvision.models.detection.RetinaNet, [2, 3, 4]),
    "FCOS": (torchvision.models.detection.FCOS, [2, 3, 4]),
}


def detectron2_stages(tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """detectron2's ResNet, written down again by its parameters' names: ``modeling/backbone/resnet.py``, BGR images."""

    def conv(x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        x = F.conv2d(x, tensors[f"{name}.weight"], stride=stride, padding=padding)
        statistics = [tensors[f"{name}.norm.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *statistics, eps=1e-5)

    def run(rgb: Tensor) -> Mapping[str, Tensor]:
        x = F.max_pool2d(F.relu(conv(rgb.flip(1), "stem.conv1", 2, 3)), 3, 2, 1)
        maps = OrderedDict()
        for stage in (2, 3, 4, 5):
            for block in range(sum(1 for name in tensors if re.fullmatch(rf"res{stage}\.\d+\.conv1\.weight", name))):
                name, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
                if f"{name}.conv3.weight" in tensors:
                    y = F.relu(conv(F.relu(conv(x, f"{name}.conv1")), f"{name}.conv2", stride, 1))
                    y = conv(y, f"{name}.conv3")
                else:
                    y = conv(F.relu(conv(x, f"{name}.conv1", stride, 1)), f"{name}.conv2", 1, 1)
                if f"{name}.shortcut.weight" in tensors:
                    x = conv(x, f"{name}.shortcut", stride)
                x = F.relu(x + y)
            maps[str(stage - 2)] = x
        return maps

    return run


def test_detectron2s_names(body: Body) -> None:
    """Under detectron2's names and in its channel order the tensors compute the same C2-C5 (stride in the 3x3)."""
    ours, tensors = body
    theirs = {
        name.removeprefix("backbone.bottom_up."): tensor.double()
        for name, tensor in from_torchvision(tensors, "detectron2").items()
    }
    assert difference(ours, detectron2_stages(theirs), torch.float64) <= TOLERANCE
    change = next(name for name in theirs if name.startswith("res5.1.conv2.norm.running_var"))
    theirs[change][0] *= 100
    assert difference(ours, detectron2_stages(theirs), torch.float64) > 1e-6


@pytest.mark.parametrize("name", DETECTORS)
def test_torchvisions_detectors(body: Body, name: str) -> None:
    ours, tensors = body
    make, layers = DETECTORS[name]
    extra = None if name == "MaskRCNN" else LastLevelP6P7(256, 256)
    backbone = resnet_fpn_backbone(
        backbone_name=ours.arch, weights=None, norm_layer=FrozenBatchNorm2d, returned_layers=layers, extra_blocks=extra
    )
    model = make(backbone, num_classes=3, min_size=64, max_size=97).eval()
    model.backbone.body.load_state_dict(tensors)  # strict: not a name more or less

    def stages(batch: Tensor) -> dict[str, Tensor]:
        first = 4 - len(layers)  # RetinaNet and FCOS count from C3
        return OrderedDict((str(int(key) + first), x) for key, x in model.backbone.body(batch).items())

    assert difference(ours, stages) == 0.0
    with torch.no_grad():
        assert set(model([images()[0].sigmoid()])[0]) >= {"boxes", "labels", "scores"}
    change_one_value(model.backbone.body)
    assert difference(ours, stages) > CHANGED


def test_torchvisions_registry_builds_the_detector() -> None:
    import importlib

    import resdet.hub

    importlib.reload(resdet.hub)  # a second registration is no error
    name = "resdet_fasterrcnn_resnet101_fpn"
    assert name in torchvision.models.list_models(include="resdet_*")
    model = torchvision.models.get_model(name, num_classes=3)
    assert isinstance(model, resdet.Detector)
    assert len(model.roi_heads.box_predictor.cls_score.bias) == 3
    with pytest.raises(ValueError, match="Unknown model"):
        torchvision.models.get_model("resdet_fasterrcnn")
