"""Reading weights files: what each kind states, that a file is opened once, formats of older versions."""

from __future__ import annotations

import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d

import resdet.commands.eval
import resdet.commands.quantize
import resdet.weights.files
from resdet import commands
from resdet.build import build_model, config_of_checkpoint
from resdet.classification.config import PretrainConfig
from resdet.classification.task import pretrain
from resdet.config import Config, ModelConfig, config_from_plain
from resdet.config_reading import config_to_plain, parse_settings
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import WeightsError
from resdet.export.backbone import export_backbone, load_backbone
from resdet.models.backbone import resnet_fpn
from resdet.models.checkpoint import checkpoint_payload, load_detector
from resdet.models.detector import build_detector
from resdet.models.fasterrcnn import fasterrcnn_resnet101_fpn
from resdet.models.int8 import Int8Detector
from resdet.models.spec import WEIGHTS_FACTS, WEIGHTS_FIELDS, DetectorSpec
from resdet.training.checkpoint import load_training_state
from resdet.training.detection import train
from resdet.types import Category
from resdet.weights import source
from resdet.weights.convert import write
from resdet.weights.convert_file import convert_file
from resdet.weights.files import read_checkpoint, read_weights

SMALL = {"arch": "resnet18", "out_channels": 8, "box_head_channels": 8, "min_size": 64, "max_size": 96}

# ---- how often a file is opened

_opened: list[Path] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str) and "w" not in str(arguments[1]):
        _opened.append(Path(arguments[0]))


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    sys.addaudithook(_audit)  # for good, so it looks at one name first


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], int]]:
    """How often a file was opened for reading since the last question."""
    global _opened
    _opened = []
    plain = resdet.weights.files.safe_open

    def counted(path: Path, **options: Any) -> Any:  # it opens in Rust, where no audit hook sees it
        assert _opened is not None
        _opened.append(Path(path))
        return plain(path, **options)

    monkeypatch.setattr(resdet.weights.files, "safe_open", counted)

    def count(path: Path) -> int:
        assert _opened is not None
        number = _opened.count(path)
        _opened.clear()
        return number

    yield count
    _opened = None


def detector_file(path: Path, **extra: object) -> Path:
    torch.manual_seed(0)
    categories = tuple(Category(k, k, name) for k, name in enumerate(("circle", "square", "triangle"), 1))
    model = build_detector(DetectorSpec(**SMALL), num_classes=4, categories=categories)
    torch.save(checkpoint_payload(model) | extra, path)
    return path


def zoo_file(path: Path) -> Path:
    """A detectron2 detector as its model zoo has it."""
    torch.manual_seed(0)
    state = build_detector(DetectorSpec(**SMALL | {"arch": "resnet50"}), num_classes=4).state_dict()
    state["backbone.body.bn1.running_mean"] += 1
    arrays = {name: tensor.numpy() for name, tensor in write(state, "detectron2").tensors.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return path


def classifier_file(path: Path) -> Path:
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), path)
    return path


def shapes() -> DetectionDataset:
    return DetectionDataset(shapes_table(4, 64, 0), ShapesImages(64, 0), None, training=True)


def section(**values: object) -> ModelConfig:
    return ModelConfig.model_validate_json(json.dumps(SMALL | values))


def test_a_detector_is_loaded_from_one_opening(tmp_path: Path, opens: Callable[[Path], int]) -> None:
    for path in (detector_file(tmp_path / "best.pt"), zoo_file(tmp_path / "model_final.pkl")):
        opens(path)
        load_detector(path)
        assert opens(path) == 1
    read_checkpoint(path)
    read_checkpoint(path)
    assert opens(path) == 2  # it counts


def test_a_run_begins_from_one_opening(tmp_path: Path, opens: Callable[[Path], int]) -> None:
    """Whatever its first weights are, and when it is resumed."""
    backbone = export_backbone(resnet_fpn("resnet18", out_channels=8), tmp_path / "b.safetensors").path
    whole, zoo = detector_file(tmp_path / "best.pt"), zoo_file(tmp_path / "model_final.pkl")
    for path, arch in (
        (classifier_file(tmp_path / "resnet18.pth"), "resnet18"),
        (backbone, "resnet18"),
        (whole, "resnet18"),
        (zoo, "resnet50"),
    ):
        opens(path)
        build_model(section(arch=arch, weights=str(path), calibration_images=2), shapes(), resume_from=None)
        assert opens(path) == 1, path
    build_model(section(weights=str(zoo)), shapes(), resume_from=whole)
    assert opens(whole) == 1


def run_config(tmp_path: Path) -> Config:
    data = {"format": "shapes", "num_images": 4, "image_size": 64}
    plain = {
        "model": SMALL | {"weights": None, "calibration_images": 2},
        "data": {"train": data, "val": dict(data)},
        "loader": {"num_workers": 0},
        "train": {"steps": 1, "batch_size": 1},
        "eval": {"num_pictures": 0},
        "output_dir": str(tmp_path / "run"),
    }
    return config_from_plain(plain, source="test")


def test_a_resumed_run_reads_its_checkpoint_once(tmp_path: Path, opens: Callable[[Path], int]) -> None:
    config = run_config(tmp_path)
    train(config)
    last = tmp_path / "run" / "last.pt"
    opens(last)
    longer = ["train.steps=2", f"output_dir={tmp_path / 'longer'}", f"resume={last}"]
    train(config_from_plain(config_to_plain(config), longer, source="test"))
    assert opens(last) == 1


def test_a_resumed_classifier_reads_its_checkpoint_once(tmp_path: Path, opens: Callable[[Path], int]) -> None:
    classes = tmp_path / "images" / "a", tmp_path / "images" / "b"
    for folder in classes:
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40), (90, 0, 0)).save(folder / "0.png")
    data = {"format": "folder", "root": str(tmp_path / "images")}
    tree = {
        "model": {"arch": "resnet18", "image_size": 32, "measured_images": 2},
        "data": {"train": data, "val": data},
        "loader": {"num_workers": 0},
        "train": {"steps": 1, "batch_size": 2},
        "output_dir": str(tmp_path / "run"),
    }
    pretrain(parse_settings(PretrainConfig, json.dumps(tree)))
    last = tmp_path / "run" / "last.pt"
    opens(last)
    longer = ["train.steps=2", f"output_dir={tmp_path / 'longer'}", f"resume={last}"]
    pretrain(parse_settings(PretrainConfig, json.dumps(tree), longer))
    assert opens(last) == 1


def test_commands_read_a_checkpoint_once(tmp_path: Path, opens: Callable[[Path], int]) -> None:
    path = detector_file(tmp_path / "best.pt", config=config_to_plain(run_config(tmp_path)))
    opens(path)
    commands.eval.main([str(path), "--output", str(tmp_path / "eval")])
    assert opens(path) == 1
    if torch.cpu._is_vnni_supported():
        commands.quantize.main([str(path), "--images", "2"])
        assert opens(path) == 1


def test_builders_open_a_file_once(tmp_path: Path, opens: Callable[[Path], int]) -> None:
    path = classifier_file(tmp_path / "resnet18.pth")
    resnet_fpn("resnet18", weights=path)
    assert opens(path) == 1
    path = export_backbone(resnet_fpn("resnet18", out_channels=8), tmp_path / "b.safetensors").path
    opens(path)
    load_backbone(path)
    assert opens(path) == 1
    path = tmp_path / "r101.pt"
    spec = DetectorSpec(arch="resnet101", out_channels=8, box_head_channels=8)
    torch.save(checkpoint_payload(build_detector(spec, num_classes=3)), path)
    fasterrcnn_resnet101_fpn(weights=path)
    assert opens(path) == 1


def test_a_download_is_read_once_when_it_arrives_and_once_when_it_is_used(
    tmp_path: Path, opens: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    served = classifier_file(tmp_path / "resnet18.pth")
    arrived: list[Path] = []

    def download(url: str, path: Path, *, progress: bool) -> None:
        arrived.append(path)
        path.write_bytes(served.read_bytes())

    monkeypatch.setattr(source, "download", download)
    file = source.fetch("http://localhost/resnet18.pth")
    assert _opened is not None
    assert (_opened.count(arrived[0]), _opened.count(file)) == (1, 0)
    _opened.clear()
    resnet_fpn("resnet18", weights="http://localhost/resnet18.pth")
    assert opens(file) == 1
    assert len(arrived) == 1


# ---- what is found


def test_our_checkpoints(tmp_path: Path) -> None:
    config = {"seed": 3}
    file = read_weights(detector_file(tmp_path / "best.pt", score_threshold=0.25, config=config, training={"step": 7}))
    assert (file.kind, file.is_detector, file.format) == ("detector", True, "resdet-detector-1")
    assert file.spec == DetectorSpec(**SMALL)
    assert [c.name for c in file.categories] == ["circle", "square", "triangle"]
    assert file.score_threshold == 0.25
    assert file.settings == {name: getattr(file.spec, name) for name in WEIGHTS_FIELDS}
    assert file.content["config"] == config
    assert file.content["training"] == {"step": 7}
    assert file.left_over == ()
    assert read_weights(file) is file
    with pytest.raises(WeightsError, match=r"best\.pt: carries no configuration"):
        config_of_checkpoint(detector_file(tmp_path / "best.pt"))


def test_torchvisions_files_state_nothing(tmp_path: Path) -> None:
    file = read_weights(classifier_file(tmp_path / "w.pth"))
    assert (file.kind, file.is_detector, file.settings, file.spec) == ("classifier", False, {}, None)
    body = {n: t for n, t in file.tensors.items() if not n.startswith("fc.")}
    save_file(body, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").kind == "backbone"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in body.items()}}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").tensors.keys() == body.keys()


def test_other_libraries_files_have_torchvisions_names(tmp_path: Path) -> None:
    file = read_weights(zoo_file(tmp_path / "model_final.pkl"))
    assert (file.kind, file.facts["format"], file.facts["arch"]) == ("detector", "detectron2", "resnet50")
    assert set(file.settings) == set(WEIGHTS_FIELDS)
    assert (file.settings["resize"], file.settings["stride_in_1x1"]) == ("pil", True)
    assert "backbone.body.layer1.0.conv1.weight" in file.tensors
    convert_file(tmp_path / "model_final.pkl", "timm", tmp_path / "body.safetensors")
    body = read_weights(tmp_path / "body.safetensors")
    assert (body.kind, set(body.settings)) == ("backbone", set(WEIGHTS_FACTS))


def test_exported_backbones_are_known_whatever_the_suffix(tmp_path: Path) -> None:
    backbone = resnet_fpn("resnet50", norm_eps=1e-3, stride_in_1x1=True, out_channels=8)
    for name in ("b.safetensors", "b.weights"):
        file = read_weights(export_backbone(backbone, tmp_path / name, include_fpn=True).path)
        assert (file.kind, file.exported["out_channels"]) == ("backbone", 8)
        assert file.settings == {"norm_eps": 1e-3, "stride_in_1x1": True}
        assert torch.equal(
            load_backbone(file.path).fpn.inner_blocks[0][0].weight, backbone.fpn.inner_blocks[0][0].weight
        )
        with pytest.raises(
            WeightsError, match=r"stride in the first 1x1 convolution: build the body with stride_in_1x1"
        ):
            resnet_fpn("resnet50", weights=file.path)


def test_a_detectors_heads_are_missed_by_name(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is not a detector: it has no 'roi_heads\.box_predictor\.cls_score"):
        load_detector(classifier_file(tmp_path / "w.pth"))


# ---- files as they were written before there was this reading: formats stay readable

SPEC: dict[str, Any] = {
    "arch": "resnet18",
    "layout": "fpn",
    "norm": "frozen",
    "norm_eps": 1e-05,
    "out_channels": 16,
    "fast": False,
    "min_size": 96,
    "max_size": 128,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "anchor_sizes": [16, 24, 32, 48, 64],
    "aspect_ratios": [0.5, 1.0, 2.0],
    "box_head_channels": 32,
    "rpn_pre_nms_top_n_train": 2000,
    "rpn_pre_nms_top_n_test": 1000,
    "rpn_post_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_test": 1000,
    "rpn_nms_thresh": 0.7,
    "rpn_fg_iou_thresh": 0.7,
    "rpn_bg_iou_thresh": 0.3,
    "rpn_batch_size_per_image": 256,
    "rpn_positive_fraction": 0.5,
    "rpn_score_thresh": 0.0,
    "box_score_thresh": 0.05,
    "box_nms_thresh": 0.5,
    "box_detections_per_img": 100,
    "box_fg_iou_thresh": 0.5,
    "box_bg_iou_thresh": 0.5,
    "box_batch_size_per_image": 512,
    "box_positive_fraction": 0.25,
    "class_loss": "cross_entropy",
    "box_loss": "smooth_l1",
    "class_weights": None,
    "stride_in_1x1": False,
    "resize": "torch",
    "anchor_rounding": True,
    "anchor_stride": "measured",
    "rpn_rank_by": "probability",
    "rpn_min_size": 0.001,
    "roi_sampling_ratio": 2,
    "roi_aligned": False,
    "box_min_size": 0.01,
}
CATEGORIES = [{"label": 1, "category_id": 3, "name": "cat"}, {"label": 2, "category_id": 7, "name": "dog"}]
TRAINING: dict[str, Any] = {
    "step": 300,
    "best": 0.653,
    "num_worse": 0,
    "evaluated": 300,
    "metrics": {"AP": 0.653},
    "log_sums": {},
    "log_steps": 0,
    "optimizer": {"state": {}, "param_groups": []},
    "scaler": {},
    "ema": {},
    "schedule": {},
}


def random(*shape: int, scale: float = 0.05) -> Tensor:
    return torch.randn(shape) * scale


def torchvisions() -> FasterRCNN:
    """The detector of ``SPEC`` made of torchvision's parts, with random statistics."""
    torch.manual_seed(0)
    body = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    layers = {f"layer{stage}": str(stage - 1) for stage in range(1, 5)}
    backbone = BackboneWithFPN(body, layers, [64, 128, 256, 512], 16)
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=torchvision.models.detection.anchor_utils.AnchorGenerator(
            tuple((size,) for size in SPEC["anchor_sizes"]), (tuple(SPEC["aspect_ratios"]),) * 5
        ),
        box_head=TwoMLPHead(16 * 49, 32),
        box_predictor=FastRCNNPredictor(32, 3),
        min_size=96,
        max_size=128,
    )
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(std=0.1)
    return model.eval()


def test_a_detectors_checkpoint_from_before(tmp_path: Path) -> None:
    theirs = torchvisions()
    payload = {
        "format": "resdet-detector-1",
        "spec": SPEC,
        "categories": CATEGORIES,
        "score_threshold": 0.62,
        "model": theirs.state_dict(),
        "config": {"seed": 0},
        "training": TRAINING,
    }
    torch.save(payload, tmp_path / "last.pt")
    model = load_detector(tmp_path / "last.pt")
    assert model.spec.model_dump(mode="json") == SPEC
    assert model.categories == (Category(1, 3, "cat"), Category(2, 7, "dog"))
    assert model.score_threshold == 0.62
    image = torch.rand(3, 80, 110)
    with torch.no_grad():
        ours, expected = model([image])[0], theirs([image])[0]
    assert len(expected["boxes"]) > 10
    assert all(torch.equal(ours[name], expected[name]) for name in ("boxes", "labels", "scores"))
    assert load_training_state(tmp_path / "last.pt", model) == TRAINING
    assert model.score_threshold == 0.62
    again = checkpoint_payload(model)
    assert list(again) == ["format", "spec", "categories", "score_threshold", "model"]
    assert {name: again[name] for name in ("format", "spec", "categories")} == {
        name: payload[name] for name in ("format", "spec", "categories")
    }


def int8_state() -> dict[str, Tensor]:
    """The state dict of an int8 ResNet-18 with the sizes of ``SPEC``, name by name."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = OrderedDict()

    def layer(name: str, *shape: int, in_float: bool = False) -> None:
        state[f"{name}.weight"] = torch.randint(-127, 128, shape, dtype=torch.int8)
        state[f"{name}.weight_scale"] = torch.rand(shape[0]) * 1e-3
        state[f"{name}.bias"] = random(shape[0])
        state[f"{name}.input_scale"] = torch.tensor(0.02, dtype=torch.float64)
        state[f"{name}.output_scale"] = torch.tensor(1.0 if in_float else 0.03, dtype=torch.float64)

    state["backbone.stem.0.weight"] = random(64, 3, 7, 7).bfloat16()
    state["backbone.stem.0.bias"] = random(64).bfloat16()
    channels = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            layer(f"backbone.stages.{stage}.{block}.layers.0", width, channels, 3, 3)
            layer(f"backbone.stages.{stage}.{block}.layers.1", width, width, 3, 3, in_float=stage > 1)
            if channels != width:
                layer(f"backbone.stages.{stage}.{block}.projection", width, channels, 1, 1, in_float=stage > 1)
            channels = width
    for level, width in enumerate((64, 128, 256, 512)):
        layer(f"backbone.inner_blocks.{level}", 16, width, 1, 1)
    for level in range(4):
        layer(f"backbone.layer_blocks.{level}", 16, 16, 3, 3)
    layer("rpn.head.conv", 16, 16, 3, 3)
    layer("rpn.head.outputs", 15, 16, 1, 1, in_float=True)
    layer("roi_heads.box_head.fc6", 32, 784)
    layer("roi_heads.box_head.fc7", 32, 32, in_float=True)
    for name, rows in (("cls_score", 3), ("bbox_pred", 12)):
        state[f"roi_heads.box_predictor.{name}.weight"] = random(rows, 32, scale=1.0)
        state[f"roi_heads.box_predictor.{name}.bias"] = random(rows)
    return state


@pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="int8 needs a CPU with AVX512-VNNI, which this one lacks"
)
def test_an_int8_file_from_before(tmp_path: Path, opens: Callable[[Path], int]) -> None:
    state, spec = int8_state(), SPEC | {"fast": True}
    payload = {
        "format": "resdet-detector-int8-1",
        "spec": spec,
        "categories": CATEGORIES,
        "score_threshold": None,
        "model": state,
        "config": {"seed": 0},
    }
    path = tmp_path / "int8.pt"
    torch.save(payload, path)
    model = load_detector(path)
    assert opens(path) == 1
    assert isinstance(model, Int8Detector)
    assert model.spec.model_dump(mode="json") == spec
    loaded = model.state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].dtype == state[name].dtype for name in state)
    direct = Int8Detector.empty(DetectorSpec.model_validate(spec), 3)
    direct.load_state_dict(state)
    image = torch.rand(3, 80, 110)
    with torch.no_grad():
        ours, expected = model([image])[0], direct([image])[0]
    assert len(expected["boxes"]) > 10
    assert all(torch.equal(ours[name], expected[name]) for name in ("boxes", "labels", "scores"))
