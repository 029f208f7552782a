"""What a tensor must be to be a weight: refused by name in every place where weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from resdet.build import build_model
from resdet.classification.model import load_classifier, load_first_weights, make_classifier
from resdet.classification.spec import ClassifierSpec
from resdet.config import ModelConfig
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import WeightsError
from resdet.export.backbone import export_backbone, load_backbone
from resdet.models.backbone import resnet_fpn
from resdet.models.checkpoint import checkpoint_payload, load_detector
from resdet.models.detector import build_detector
from resdet.models.fasterrcnn import fasterrcnn_resnet101_fpn
from resdet.models.spec import DetectorSpec
from resdet.training.checkpoint import load_training_state
from resdet.weights.convert_file import convert_file

SMALL: dict[str, Any] = {"arch": "resnet18", "out_channels": 8, "box_head_channels": 8, "min_size": 64, "max_size": 96}
NAME = "layer1.0.conv1.weight"


@pytest.fixture(scope="module")
def classifier() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(torchvision.models.resnet18(num_classes=3).state_dict())


@pytest.fixture(scope="module")
def detector() -> dict[str, Any]:
    torch.manual_seed(0)
    return checkpoint_payload(build_detector(DetectorSpec(**SMALL), num_classes=4))


def changed(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[5] = value
    return tensor


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda t: changed(t, float("nan")), "weights must be finite, got NaN or infinity"),
    "infinity": (lambda t: changed(t, float("inf")), "weights must be finite, got NaN or infinity"),
    "minus infinity in half": (lambda t: changed(t, -float("inf")).half(), "weights must be finite"),
    "NaN in bfloat16": (lambda t: changed(t, float("nan")).bfloat16(), "weights must be finite"),
    "complex": (
        lambda t: t.to(torch.complex64),
        "weights must be of floating point (16, 32 or 64 bits), got complex64",
    ),
    "integer": (lambda t: t.long(), "weights must be of floating point (16, 32 or 64 bits), got int64"),
    "bool": (lambda t: t > 0, "weights must be of floating point (16, 32 or 64 bits), got bool"),
    "8-bit float": (lambda t: t.to(torch.float8_e4m3fn), "weights must be of floating point (16, 32 or 64 bits), got"),
    "meta": (lambda t: t.to("meta"), "weights must be dense tensors with data"),
    "sparse": (lambda t: t.to_sparse(), "weights must be dense tensors with data"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_weight_is_refused_by_name(tmp_path: Path, classifier: dict[str, Tensor], fault: str) -> None:
    make, message = FAULTS[fault]
    path = tmp_path / "w.pth"
    torch.save(classifier | {NAME: make(classifier[NAME])}, path)
    with pytest.raises(WeightsError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)) as caught:
        resnet_fpn("resnet18", weights=path)
    assert "\n" not in str(caught.value)
    assert NAME in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_size_load(tmp_path: Path, classifier: dict[str, Tensor], dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in classifier.items()}
    torch.save(state, tmp_path / "w.pth")
    body = resnet_fpn("resnet18", weights=tmp_path / "w.pth").body
    assert torch.equal(body.state_dict()[NAME], state[NAME].float())


def test_counters_and_what_is_left_over_may_be_anything(tmp_path: Path, classifier: dict[str, Tensor]) -> None:
    """BatchNorm counts in whole numbers; MoCo's files hold a queue and a whole number beside the network."""
    state = {f"module.encoder_q.{name}": value for name, value in classifier.items()}
    state |= {"module.queue": torch.full((3,), float("nan")), "module.queue_ptr": torch.tensor([3])}
    torch.save({"state_dict": state, "optimizer": {"state": {0: torch.tensor(float("inf"))}}}, tmp_path / "w.pth")
    body = resnet_fpn("resnet18", weights=tmp_path / "w.pth").body
    assert torch.equal(body.state_dict()[NAME], classifier[NAME])


def read_as_first_weights(path: Path) -> None:
    config = ModelConfig.model_validate_json(json.dumps(SMALL | {"weights": str(path)}))
    dataset = DetectionDataset(shapes_table(2, 64, 0), ShapesImages(64, 0), None, training=True)
    build_model(config, dataset, resume_from=None)


def resumed(path: Path) -> None:
    load_training_state(path, build_detector(DetectorSpec(**SMALL), num_classes=4))


@pytest.mark.parametrize("name", ["backbone.body.layer1.0.conv1.weight", "rpn.head.bbox_pred.bias"])
@pytest.mark.parametrize(
    "read",
    [
        load_detector,
        resumed,
        read_as_first_weights,
        lambda path: fasterrcnn_resnet101_fpn(weights=path),
        lambda path: convert_file(path, "detectron2", path.with_name("out.pth")),
    ],
    ids=["load_detector", "resume", "first weights", "builder", "convert"],
)
def test_a_detectors_weights_are_finite_wherever_they_are_read(
    tmp_path: Path, detector: dict[str, Any], read: Callable[[Path], object], name: str
) -> None:
    path = tmp_path / "last.pt"
    broken = {**detector["model"], name: changed(detector["model"][name], float("nan"))}
    torch.save(detector | {"model": broken, "training": {}}, path)
    with pytest.raises(WeightsError, match=r"last\.pt: weights must be finite, got NaN or infinity: "):
        read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    "read",
    [
        lambda path: load_classifier(path, arch="resnet18"),
        lambda path: load_first_weights(make_classifier(ClassifierSpec(arch="resnet18"), "abc"), str(path)),
    ],
    ids=["load_classifier", "first weights"],
)
def test_a_classifiers_weights_are_finite(
    tmp_path: Path, classifier: dict[str, Tensor], read: Callable[[Path], object]
) -> None:
    torch.save(classifier | {"fc.bias": torch.tensor([0.0, float("inf"), 0.0])}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth: weights must be finite, got NaN or infinity: fc\.bias$"):
        read(tmp_path / "w.pth")


def test_an_exported_backbone_is_finite(tmp_path: Path) -> None:
    path = export_backbone(resnet_fpn("resnet18", out_channels=8), tmp_path / "b.safetensors").path
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {"bn1.bias": changed(tensors["bn1.bias"], float("nan"))}, path, metadata)
    with pytest.raises(WeightsError, match=r"weights must be finite, got NaN or infinity: bn1\.bias"):
        load_backbone(path)


def test_int8_weights_are_whole_numbers_and_their_scales_finite(tmp_path: Path, detector: dict[str, Any]) -> None:
    int8 = {"format": "resdet-detector-int8-1"}
    weight = torch.ones(8, 8, dtype=torch.int8)
    for scale, message in ((float("nan"), r"finite.*: rpn\.head\.conv\.input_scale"), (0.1, "is not a detector")):
        tensors = {"rpn.head.conv.weight": weight, "rpn.head.conv.input_scale": torch.tensor(scale)}
        torch.save(detector | int8 | {"model": tensors}, tmp_path / "int8.pt")
        with pytest.raises(WeightsError, match=message):
            load_detector(tmp_path / "int8.pt")


SCORES = "roi_heads.box_predictor.cls_score.weight"
DELTAS = "roi_heads.box_predictor.bbox_pred.weight"


@pytest.mark.parametrize("own", [True, False], ids=["checkpoint", "state dict"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({SCORES: torch.tensor(1.0)}, r"must have 2 dimensions, one row for each class, got \[\]"),
        ({SCORES: torch.zeros(4)}, r"must have 2 dimensions, one row for each class, got \[4\]"),
        ({SCORES: torch.zeros(10**6, 1)}, r"bbox_pred\.weight must have 4000000 rows, got the shape \[16, 8\]"),
        ({DELTAS: torch.zeros(8, 8)}, r"bbox_pred\.weight must have 16 rows, got the shape \[8, 8\]"),
        ({SCORES: torch.zeros(1, 1).expand(10**9, 8)}, "claim more memory than the file has"),
    ],
    ids=["0-d", "1-d", "many classes", "few boxes", "claimed classes"],
)
def test_class_rows_that_contradict_each_other(
    tmp_path: Path, detector: dict[str, Any], own: bool, change: dict[str, Tensor], message: str
) -> None:
    state = {**detector["model"], **change}
    torch.save(detector | {"model": state} if own else state, tmp_path / "best.pt")
    with pytest.raises(WeightsError, match=message):
        load_detector(tmp_path / "best.pt")


def test_widths_that_a_checkpoint_claims_are_not_allocated(tmp_path: Path, detector: dict[str, Any]) -> None:
    for name in ("out_channels", "box_head_channels"):
        torch.save(detector | {"spec": detector["spec"] | {name: 10**9}}, tmp_path / "best.pt")
        with pytest.raises(WeightsError, match=r"contradicts itself: .* must have 1000000000 rows"):
            load_detector(tmp_path / "best.pt")
