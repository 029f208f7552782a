"""State dicts of torchvision's own detectors: what loads, what is assumed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resdet.build import build_model
from resdet.config import ModelConfig
from resdet.data.coco import read_coco
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import WeightsError
from resdet.evaluation.labels import match_labels
from resdet.models.checkpoint import load_detector
from resdet.models.spec import WeightsOrigin
from resdet.types import Category

SIZES: dict[str, Any] = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.0}


def theirs(arch: str = "resnet18", num_classes: int = 4) -> detection.FasterRCNN:
    torch.manual_seed(0)
    model = detection.FasterRCNN(resnet_fpn_backbone(backbone_name=arch, weights=None), num_classes, **SIZES).eval()
    tame(model.state_dict())
    return model


def tame(state: dict[str, Tensor]) -> None:
    """Keep activations of a random network small, and let its frozen norms look trained."""
    for name, tensor in state.items():
        if ".body." in name and name.endswith(("bn2.weight", "bn3.weight")):
            tensor.fill_(0.25)
        elif name.endswith("running_mean"):
            tensor.normal_(std=0.1)


@pytest.mark.parametrize(
    ("arch", "num_classes"), [("resnet18", 4), ("resnet50", 91), pytest.param("resnet101", 2, marks=pytest.mark.slow)]
)
def test_torchvisions_faster_rcnn_loads_as_it_is(
    tmp_path: Path, arch: str, num_classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    reference = theirs(arch, num_classes)
    torch.save(reference.state_dict(), tmp_path / "model.pth")
    model = load_detector(tmp_path / "model.pth")
    assert model.spec.arch == arch
    assert "read as torchvision's Faster R-CNN; the file does not say, and it is assumed: norm_eps=1e-05" in caplog.text
    assert len(model.categories) == (90 if num_classes == 91 else 0)
    model.transform.min_size, model.transform.max_size = (64,), 96
    model.roi_heads.score_thresh = 0.0
    image = torch.rand(3, 60, 80)
    with torch.no_grad():
        ours, expected = model([image])[0], reference([image])[0]
    assert len(expected["boxes"]) > 10
    # The same boxes in float32, whose sums are in another order.
    torch.testing.assert_close(ours["scores"], expected["scores"], rtol=0, atol=1e-4)


def test_ninety_one_classes_are_cocos_with_its_gaps(
    tmp_path: Path, assets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = theirs(num_classes=91).state_dict()
    torch.save(state, tmp_path / "model.pth")
    categories = load_detector(tmp_path / "model.pth").categories
    assert [category.label for category in categories] == [category.category_id for category in categories]
    assert (categories[0].name, categories[89].name) == ("person", "toothbrush")
    assert [c.label for c in categories if c.name.startswith("N/A")] == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert len({category.name for category in categories}) == 90
    assert "names of its 90 classes are not in the file, and are assumed to be COCO's" in caplog.text
    # Data of COCO's 80 classes: the placeholders are none of them.
    data = read_coco(assets / "tiny_coco" / "annotations" / "instances_val2017.json")
    model = load_detector(tmp_path / "model.pth")
    labels = match_labels(model, data)
    assert labels is not None
    ids = {category.label: category.category_id for category in data.categories}
    assert [ids.get(label) for label in labels[1:]] == [
        None if category.is_placeholder else category.category_id for category in model.categories
    ]
    own = tuple(f"part {number}" for number in range(90))
    assert load_detector(tmp_path / "model.pth", origin=WeightsOrigin(classes=own)).categories[0].name == "part 0"


def test_torchvisions_own_file_is_certain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    torch.save(theirs("resnet50", 91).state_dict(), path)
    assert load_detector(path).spec.norm_eps == 0.0  # as torchvision builds it for these weights
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_what_is_stated_is_taken(tmp_path: Path) -> None:
    reference = theirs("resnet50")
    torch.save({"model": reference.state_dict(), "epoch": 3}, tmp_path / "model.pth")
    origin = WeightsOrigin(image_std=(0.5, 0.5, 0.5), stride_in_1x1=True, channel_order="bgr", norm_eps=0.0)
    model = load_detector(tmp_path / "model.pth", origin=origin)
    assert (model.spec.image_std, model.spec.stride_in_1x1, model.spec.norm_eps) == ((0.5, 0.5, 0.5), True, 0.0)
    assert torch.equal(model.backbone.body.conv1.weight, reference.backbone.body.conv1.weight.flip(1))


def mask_rcnn() -> dict[str, Tensor]:
    model = detection.MaskRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 91, **SIZES)
    return dict(model.state_dict())


def keypoint_rcnn() -> dict[str, Tensor]:
    model = detection.KeypointRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 2, **SIZES)
    return dict(model.state_dict())


@pytest.mark.parametrize(
    "name", ["keypointrcnn_resnet50_fpn_coco-fc266e95.pth", "keypointrcnn_resnet50_fpn_coco-9f466800.pth", "mine.pth"]
)
def test_keypoint_rcnn_finds_persons(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(keypoint_rcnn(), tmp_path / name)
    model = load_detector(tmp_path / name)
    assert model.categories == (Category(1, 1, "person"),)
    assumed = "names of its 1 classes are not in the file, and are assumed to be COCO's" in caplog.text
    assert assumed == (name == "mine.pth")
    assert model.spec.norm_eps == (1e-5 if assumed else 0.0)


@pytest.mark.parametrize("make", [mask_rcnn, keypoint_rcnn])
def test_mask_and_keypoint_rcnn_are_first_weights_without_their_heads(
    tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    state = make()
    tame(state)
    torch.save(state, tmp_path / "model.pth")
    config = ModelConfig.model_validate_json(
        json.dumps({"arch": "resnet18", "min_size": 64, "weights": str(tmp_path / "model.pth")})
    )
    dataset = DetectionDataset(shapes_table(2, 64, 0), ShapesImages(64, 0), None, training=True)
    with caplog.at_level("INFO", "resdet"):
        model = build_model(config, dataset, resume_from=None)
    assert "left over: roi_heads.mask_" in caplog.text or "left over: roi_heads.keypoint_" in caplog.text
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) != name.startswith("roi_heads.box_predictor."), name
    loaded = load_detector(tmp_path / "model.pth")
    assert torch.equal(
        loaded.roi_heads.box_predictor.cls_score.weight, state["roi_heads.box_predictor.cls_score.weight"]
    )


def test_version_2_is_refused_by_what_it_has_more(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    torch.save(
        {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in state.items()}, tmp_path / "v2.pth"
    )
    with pytest.raises(
        WeightsError, match=r"v2\.pth: is torchvision's Faster R-CNN of version 2 .* it has backbone\.fpn"
    ):
        load_detector(tmp_path / "v2.pth")


def test_other_detectors_are_refused_by_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in state.items()}, tmp_path / "retina.pth")
    with pytest.raises(WeightsError, match=r"retina\.pth: is not a detector: it has no 'roi_heads\.box_predictor"):
        load_detector(tmp_path / "retina.pth")


def test_other_anchors_are_refused(tmp_path: Path) -> None:
    """Their sizes are in no tensor."""
    state = theirs().state_dict()
    state["rpn.head.cls_logits.weight"] = torch.zeros(5, 256, 1, 1)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(
        WeightsError, match=r"rpn\.head\.cls_logits\.weight is \[5, 256, 1, 1\] and not \[3, 256, 1, 1\]"
    ):
        load_detector(tmp_path / "model.pth")
