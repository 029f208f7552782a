"""The builder behaves as torchvision's: arguments, weights enum, registry."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models import ResNet101_Weights
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn

import resdet.hub
from resdet.data.coco import read_coco
from resdet.errors import UserError, WeightsError
from resdet.models.checkpoint import checkpoint_payload
from resdet.models.detector import build_detector
from resdet.models.fasterrcnn import FasterRCNN_ResNet101_FPN_Weights, fasterrcnn_resnet101_fpn
from resdet.models.spec import DetectorSpec
from resdet.weights.source import locate
from resdet.weights.zoo import PUBLISHED

ENUM = FasterRCNN_ResNet101_FPN_Weights
MODULES = {"rpn_anchor_generator", "rpn_head", "box_roi_pool", "box_head", "box_predictor", "bbox_reg_weights"}


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_the_arguments_are_torchvisions() -> None:
    ours, theirs = parameters(fasterrcnn_resnet101_fpn), parameters(inspect.unwrap(fasterrcnn_resnet50_fpn))
    named = [name for name, one in theirs.items() if one.kind == inspect.Parameter.KEYWORD_ONLY]
    assert list(ours)[: len(named)] == named
    assert all(one.kind == inspect.Parameter.KEYWORD_ONLY for one in ours.values())
    deviating = {name for name in named if ours[name].default != theirs[name].default}
    assert deviating == {"weights_backbone"}  # whose default downloads
    # Its **kwargs are FasterRCNN's arguments.
    rest = set(parameters(FasterRCNN.__init__)) - {"self", "backbone", "num_classes", "kwargs"} - MODULES
    assert set(ours) - set(named) == rest | {"spec", "origin"}
    defaults = {name: one.default for name, one in parameters(FasterRCNN.__init__).items() if name in rest}
    spec = DetectorSpec().model_dump()
    assert {name: spec[name] for name in rest if defaults[name] is not None} == {
        name: value for name, value in defaults.items() if value is not None
    }


def built(**arguments: Any) -> Any:
    with torch.device("meta"):
        return fasterrcnn_resnet101_fpn(**arguments)


def test_arguments_reach_the_detector() -> None:
    arguments: dict[str, Any] = {
        "min_size": [480, 512],
        "max_size": 640,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": (0.1, 0.2, 0.3),
        "rpn_pre_nms_top_n_train": 101,
        "rpn_pre_nms_top_n_test": 102,
        "rpn_post_nms_top_n_train": 103,
        "rpn_post_nms_top_n_test": 104,
        "rpn_nms_thresh": 0.61,
        "rpn_fg_iou_thresh": 0.62,
        "rpn_bg_iou_thresh": 0.21,
        "rpn_batch_size_per_image": 105,
        "rpn_positive_fraction": 0.22,
        "rpn_score_thresh": 0.01,
        "box_score_thresh": 0.3,
        "box_nms_thresh": 0.31,
        "box_detections_per_img": 106,
        "box_fg_iou_thresh": 0.51,
        "box_bg_iou_thresh": 0.41,
        "box_batch_size_per_image": 107,
        "box_positive_fraction": 0.23,
    }
    taken = set(parameters(fasterrcnn_resnet101_fpn)) & set(DetectorSpec.model_fields)
    assert set(arguments) == taken
    with torch.device("meta"):
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, **arguments)
    ours = built(**arguments)
    for part in ("transform", "rpn", "roi_heads"):
        for name, value in vars(getattr(theirs, part)).items():
            if isinstance(value, int | float | dict | list | tuple) and not name.startswith("_"):
                mine = vars(getattr(ours, part))[name]
                assert (list(mine) == list(value)) if isinstance(value, list | tuple) else (mine == value), name
    assert ours.spec.box_score_thresh == 0.3  # so that a checkpoint builds the same again
    combined = built(spec=DetectorSpec(box_nms_thresh=0.4, max_size=900), max_size=640)
    assert (combined.spec.box_nms_thresh, combined.spec.max_size) == (0.4, 640)


def test_what_torchvision_refuses_is_refused() -> None:
    # torchvision's own takes any word, and does nothing with it.
    with pytest.raises(TypeError, match="unexpected keyword argument 'box_score_tresh'"):
        fasterrcnn_resnet101_fpn(box_score_tresh=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'rpn_head'"):
        fasterrcnn_resnet101_fpn(rpn_head=torch.nn.Identity())  # type: ignore[call-arg]
    with pytest.raises(
        UserError, match=r"fasterrcnn_resnet101_fpn: box_nms_thresh: Input should be less than .* got 1\.5"
    ):
        fasterrcnn_resnet101_fpn(box_nms_thresh=1.5)
    # Before anything is downloaded: neither has a network here.
    expected = r"The parameter 'num_classes' expected value {} but got 5 instead"
    with pytest.raises(ValueError, match=expected.format(91)):
        fasterrcnn_resnet50_fpn(weights="DEFAULT", num_classes=5)
    with pytest.raises(ValueError, match=f"detectron2_r101_fpn_3x: {expected.format(81)}"):
        fasterrcnn_resnet101_fpn(weights="DEFAULT", num_classes=5)
    for builder, other in (
        (fasterrcnn_resnet50_fpn, ENUM.DEFAULT),
        (fasterrcnn_resnet101_fpn, FasterRCNN_ResNet50_FPN_Weights.DEFAULT),
    ):
        with pytest.raises(TypeError, match="Invalid Weight class provided; expected FasterRCNN_ResNet"):
            builder(weights=other)
    with pytest.raises(WeightsError, match="detectron2_r50_fpn_3x is of resnet50; load_detector builds it"):
        fasterrcnn_resnet101_fpn(weights="detectron2_r50_fpn_3x")


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    small = build_detector(DetectorSpec(arch="resnet18", out_channels=16, box_head_channels=32), num_classes=3)
    torch.save(checkpoint_payload(small), tmp_path / "small.pt")
    with pytest.raises(WeightsError, match=r"small\.pt: is of resnet18; load_detector builds it"):
        fasterrcnn_resnet101_fpn(weights=tmp_path / "small.pt")


def test_the_enum_is_one_of_torchvisions(assets: Path) -> None:
    weights = ENUM.DEFAULT
    assert weights is ENUM.DETECTRON2_COCO_3X
    theirs = FasterRCNN_ResNet50_FPN_Weights.DEFAULT
    missing = set(theirs.meta) - set(weights.meta)
    assert missing == {"_ops", "_file_size"}  # nobody states them
    assert weights.meta["num_params"] == sum(one.numel() for one in built(num_classes=81).parameters())
    data = read_coco(assets / "tiny_coco" / "annotations" / "instances_val2017.json")
    assert weights.meta["categories"] == ["__background__", *(one.name for one in data.categories)]  # by label
    assert {name for name in theirs.meta["categories"] if name != "N/A"} == set(weights.meta["categories"])
    assert weights.meta["_metrics"] == {"COCO-val2017": {"box_map": 42.0}}
    assert "reference from https://github.com/facebookresearch/detectron2" in weights.meta["_docs"]
    assert weights.meta["license"].startswith("CC BY-SA 3.0")
    pixels = weights.transforms()(Image.new("RGB", (4, 3), (255, 0, 51)))
    assert pixels[:, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert copy.deepcopy(weights) is weights
    assert pickle.loads(pickle.dumps(weights)) is weights
    assert {one.url for one in ENUM} == {one.url for one in PUBLISHED.values() if one.arch == "resnet101"}


def test_torchvision_finds_the_enum() -> None:
    models = torchvision.models
    assert models.get_model_weights(fasterrcnn_resnet101_fpn) is ENUM
    assert models.get_model_weights(resdet.hub.HUB_NAME) is ENUM
    assert models.get_weight("FasterRCNN_ResNet101_FPN_Weights.DEFAULT") is ENUM.DEFAULT
    assert models.get_weight("ResNet101_Weights.DEFAULT") is ResNet101_Weights.DEFAULT
    assert models.list_models(module=resdet.models) == [resdet.hub.HUB_NAME]
    assert resdet.hub.HUB_NAME not in models.list_models(module=models.detection)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights",
    ["DEFAULT", "FasterRCNN_ResNet101_FPN_Weights.DETECTRON2_COCO_3X", ENUM.DEFAULT, "detectron2_r101_fpn_3x"],
)
def test_published_weights_are_built(weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    source = build_detector(DetectorSpec(), num_classes=81)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    url = (tmp_path / "w.pth").as_uri()
    monkeypatch.setattr(ENUM.DEFAULT.value, "url", url)
    entry = PUBLISHED["detectron2_r101_fpn_3x"]
    monkeypatch.setitem(PUBLISHED, entry.name, type(entry)(**vars(entry) | {"url": url}))
    model = fasterrcnn_resnet101_fpn(weights=weights, box_score_thresh=0.4, trainable_backbone_layers=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    assert model.training  # as torchvision's builders leave it
    assert model.roi_heads.score_thresh == 0.4
    assert not any(one.requires_grad for one in model.backbone.body.layer3.parameters())
    assert ENUM.DEFAULT.get_state_dict().keys() == source.state_dict().keys()
    assert locate(ENUM.DEFAULT, "resnet101") == tmp_path / "w.pth"
