"""What a file does not say of its weights: certain facts are taken, others assumed aloud, stated ones win."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from resdet.build import build_model
from resdet.commands import convert
from resdet.config import ModelConfig, config_from_plain
from resdet.config_reading import config_to_plain
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import UserError, WeightsError
from resdet.models.backbone import resnet_fpn
from resdet.models.checkpoint import checkpoint_payload, load_detector, load_detector_weights
from resdet.models.detector import build_detector
from resdet.models.fasterrcnn import fasterrcnn_resnet101_fpn
from resdet.models.spec import DetectorSpec, WeightsOrigin
from resdet.weights.convert import from_torchvision, to_torchvision
from resdet.weights.convert_file import convert_file
from resdet.weights.files import read_weights

NARROW: dict[str, Any] = {"out_channels": 8, "box_head_channels": 8}
MSRA = {"stride_in_1x1": True, "image_std": [1 / 255] * 3}
TORCHVISION = {"stride_in_1x1": False, "image_std": [0.229, 0.224, 0.225]}


def shapes() -> DetectionDataset:
    return DetectionDataset(shapes_table(2, 64, 0), ShapesImages(64, 0), None, training=True)


def section(path: Path, **changes: object) -> ModelConfig:
    values = {"arch": "resnet50", **NARROW, "min_size": 64, "weights": str(path)}
    return ModelConfig.model_validate_json(json.dumps(values | changes))


def for_bytes(state: Mapping[str, Tensor], stem: str) -> dict[str, Tensor]:
    """A network of which the first filters see BGR images in 0..255."""
    return dict(state) | {stem: state[stem].flip(1) / 57}


# ---- mmcv's caffe-style ResNets, whose names are torchvision's


@pytest.fixture(scope="module")
def resnet50() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = dict(torchvision.models.resnet50().state_dict())
    for name, tensor in state.items():
        if name.endswith("bn3.weight"):
            tensor.fill_(0.25)
        elif name.endswith(("running_mean", "bn1.bias")):
            tensor.normal_(std=0.1)
    return state


@pytest.fixture(scope="module")
def caffe(resnet50: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caffe") / "resnet50_caffe.pth"
    torch.save({"state_dict": for_bytes(resnet50, "conv1.weight")}, path)
    return path


@pytest.fixture(scope="module")
def bare(resnet50: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bare") / "resnet50.pth"
    torch.save(resnet50, path)
    return path


def test_a_bare_caffe_resnet_is_told_by_its_first_filters(
    caffe: Path, resnet50: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "resdet"):
        model = build_model(section(caffe), shapes(), resume_from=None)
    assert model.spec.stride_in_1x1
    assert model.spec.image_std == pytest.approx([1 / 255] * 3)
    assert torch.equal(model.backbone.body.conv1.weight, resnet50["conv1.weight"] / 57)  # RGB
    assert "read as mmdetection-caffe's; the file does not say, and it is assumed: stride_in_1x1=True" in caplog.text
    assert "model.weights_origin" in caplog.text
    with pytest.raises(WeightsError, match="stride in the first 1x1 convolution"):
        resnet_fpn("resnet50", weights=caffe)


def test_torchvisions_bare_resnets_are_torchvisions(
    bare: Path, resnet50: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "resdet"):
        model = build_model(section(bare), shapes(), resume_from=None)
    assert model.spec == DetectorSpec(arch="resnet50", **NARROW, min_size=64)
    assert torch.equal(model.backbone.body.conv1.weight, resnet50["conv1.weight"])
    assert "the file does not say, and it is assumed: stride_in_1x1=False, channel_order=rgb" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("origin", [{"format": "torchvision"}, {"format": "mmdetection-caffe"}])
def test_a_stated_format_decides(
    caffe: Path, bare: Path, origin: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    is_caffe = origin["format"] == "mmdetection-caffe"
    for path in (caffe, bare):
        model = build_model(section(path, weights_origin=origin), shapes(), resume_from=None)
        assert model.spec.stride_in_1x1 == is_caffe
        given = torch.load(path, weights_only=True)
        given = given.get("state_dict", given)["conv1.weight"]
        assert torch.equal(model.backbone.body.conv1.weight, given.flip(1) if is_caffe else given)
    assert not is_caffe or "read as torchvision" not in caplog.text


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_stated_channel_order_decides(bare: Path, resnet50: dict[str, Tensor], order: str) -> None:
    stem = resnet50["conv1.weight"]
    model = build_model(section(bare, weights_origin={"channel_order": order}), shapes(), resume_from=None)
    assert torch.equal(model.backbone.body.conv1.weight, stem if order == "rgb" else stem.flip(1))


def test_settings_that_fit_two_readings_are_refused_with_both_named(bare: Path) -> None:
    message = (
        r"one of MSRA's ResNets.* mmcv's caffe-style file, for BGR .* converted to RGB: state model\.weights_origin"
    )
    with pytest.raises(WeightsError, match=message):
        build_model(section(bare, **MSRA), shapes(), resume_from=None)
    model = build_model(
        section(bare, **MSRA, weights_origin={"channel_order": "bgr", **MSRA}), shapes(), resume_from=None
    )
    assert model.spec.stride_in_1x1


def test_convert_takes_what_is_known(caffe: Path, tmp_path: Path, resnet50: dict[str, Tensor]) -> None:
    out = tmp_path / "out.pth"
    convert.main([str(caffe), "--to", "torchvision", "--output", str(out), "--from", "mmdetection-caffe"])
    file = read_weights(out)
    assert torch.equal(file.tensors["conv1.weight"], resnet50["conv1.weight"] / 57)
    assert file.settings["stride_in_1x1"] is True
    stated = ["--from", "torchvision", "--channel-order", "bgr", "--stride-in", "1x1", "--image-std", "1", "1", "1"]
    convert.main([str(caffe), "--to", "torchvision", "--output", str(out), *stated])
    file = read_weights(out)
    assert torch.equal(file.tensors["conv1.weight"], resnet50["conv1.weight"] / 57)
    assert (file.settings["stride_in_1x1"], file.settings["image_std"]) == (True, (1.0, 1.0, 1.0))


# ---- detectron2 without pixel statistics


def detectron2_state(*, msra: bool, num_classes: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = build_detector(DetectorSpec(arch="resnet50", **NARROW), num_classes=num_classes).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
    written = from_torchvision(state, "detectron2")  # the stem flipped
    stem = "backbone.bottom_up.stem.conv1.weight"
    return written | {stem: written[stem] / 57 if msra else written[stem].flip(1)}


@pytest.fixture(scope="module", params=[True, False], ids=["from MSRA's", "from torchvision's"])
def detectron2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    path = tmp_path_factory.mktemp("d2") / "model_final.pth"
    torch.save({"model": detectron2_state(msra=request.param), "iteration": 3}, path)
    return path, request.param


def test_detectron2s_origin_is_told_by_the_first_filters(
    detectron2: tuple[Path, bool], caplog: pytest.LogCaptureFixture
) -> None:
    path, msra = detectron2
    with caplog.at_level(logging.WARNING, "resdet"):
        model = load_detector(path)
    assert model.spec.stride_in_1x1 is msra
    assert model.spec.image_std == pytest.approx([1 / 255] * 3 if msra else [0.229, 0.224, 0.225], abs=1e-4)
    assert f"it is assumed: stride_in_1x1={msra}, channel_order={'bgr' if msra else 'rgb'}" in caplog.text
    assert "WeightsOrigin" in caplog.text
    stem = torch.load(path, weights_only=True)["model"]["backbone.bottom_up.stem.conv1.weight"]
    assert torch.equal(model.backbone.body.conv1.weight, stem.flip(1) if msra else stem)


@pytest.mark.parametrize("stated", [MSRA, TORCHVISION], ids=["MSRA's", "torchvision's"])
@pytest.mark.parametrize("keys", [("stride_in_1x1",), ("image_std",), ("stride_in_1x1", "image_std")], ids="+".join)
def test_stated_settings_win_even_where_they_equal_the_defaults(
    detectron2: tuple[Path, bool], stated: dict[str, Any], keys: tuple[str, ...]
) -> None:
    path, _ = detectron2
    given = {key: stated[key] for key in keys}
    model = build_model(section(path, **given), shapes(), resume_from=None)
    assert model.spec.stride_in_1x1 == stated["stride_in_1x1"]
    assert model.spec.image_std == pytest.approx(stated["image_std"], abs=1e-4)
    stem = torch.load(path, weights_only=True)["model"]["backbone.bottom_up.stem.conv1.weight"]
    expected = stem.flip(1) if stated is MSRA else stem  # the order of colours goes with them
    assert torch.equal(model.backbone.body.conv1.weight, expected)


def test_an_origin_is_a_statement_too(detectron2: tuple[Path, bool]) -> None:
    path, _ = detectron2
    origin = WeightsOrigin(stride_in_1x1=False, image_std=(0.5, 0.5, 0.5), channel_order="bgr", norm_eps=1e-3)
    spec = load_detector(path, origin=origin).spec
    assert (spec.stride_in_1x1, spec.image_std, spec.norm_eps) == (False, (0.5, 0.5, 0.5), 1e-3)
    with pytest.raises(UserError, match=r"model\.image_std is \(0\.5, 0\.5, 0\.5\), the weights were trained with"):
        build_model(section(path, image_std=[0.5] * 3), shapes(), resume_from=None)


def cell_anchors(sizes: Sequence[Sequence[int]], ratios: Sequence[float] = (0.5, 1, 2)) -> dict[str, Tensor]:
    """What detectron2's ``DefaultAnchorGenerator`` keeps: corners around 0, of each level."""
    sides = [[(size / ratio**0.5, size * ratio**0.5) for size in level for ratio in ratios] for level in sizes]
    name = "proposal_generator.anchor_generator.cell_anchors"
    corners = [[(-width / 2, -height / 2, width / 2, height / 2) for width, height in level] for level in sides]
    return {f"{name}.{number}": torch.tensor(level) for number, level in enumerate(corners)}


USUAL = [[32], [64], [128], [256], [512]]
SMALL = [[16], [32], [64], [128], [256]]


@pytest.mark.parametrize("author", ["Detectron2 Model Zoo", "torchvision"])
def test_what_a_file_says_is_certain(tmp_path: Path, author: str, caplog: pytest.LogCaptureFixture) -> None:
    zoo = author != "torchvision"
    path = tmp_path / "model.pth"
    state = detectron2_state(msra=not zoo) | cell_anchors(USUAL)  # whatever its filters are
    torch.save({"model": state, "__author__": author}, path)
    with caplog.at_level(logging.WARNING, "resdet"):
        assert load_detector(path).spec.stride_in_1x1 is zoo
    assert not caplog.records
    with pytest.raises(WeightsError, match=r"origin was given as stride_in_1x1=\w+, but the file itself says"):
        load_detector(path, origin=WeightsOrigin(stride_in_1x1=not zoo))
    with pytest.raises(UserError, match=rf"model\.stride_in_1x1 is {not zoo}, the weights were trained with {zoo}"):
        build_model(section(path, stride_in_1x1=not zoo), shapes(), resume_from=None)
    stated = {"image_std": [1 / 255] * 3 if zoo else [0.229, 0.224, 0.225]}  # what it says itself
    build_model(section(path, **stated), shapes(), resume_from=None)


def test_a_runs_own_configuration_begins_the_same_run_again(detectron2: tuple[Path, bool]) -> None:
    """What was not stated is not written as a statement; what was, is."""
    path, msra = detectron2
    data = {"format": "shapes", "num_images": 2, "image_size": 64}
    plain = {
        "model": {"arch": "resnet50", **NARROW, "weights": str(path), "roi_aligned": False},
        "data": {"train": data, "val": dict(data)},
        "train": {"steps": 1},
        "output_dir": "run",
    }
    config = config_from_plain(plain, source="test")
    written = config_to_plain(config)
    assert written["model"]["roi_aligned"] is False
    assert "stride_in_1x1" not in written["model"]
    again = config_from_plain(written, source="test")
    assert again == config
    model = build_model(again.model, shapes(), resume_from=None)
    assert (model.spec.stride_in_1x1, model.spec.roi_aligned) == (msra, False)


def test_a_checkpoint_of_ours_is_not_overruled(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save(checkpoint_payload(build_detector(DetectorSpec(arch="resnet18", **NARROW), num_classes=3)), path)
    for origin in ({"format": "detectron2"}, {"prefix": "a."}, {"channel_order": "bgr"}, {"norm_eps": 0.1}):
        with pytest.raises(WeightsError, match=f"says itself what origin.{next(iter(origin))} states"):
            load_detector(path, origin=WeightsOrigin.model_validate(origin))
    assert load_detector(path, origin=WeightsOrigin(norm_eps=1e-5)).categories == ()
    named = load_detector(path, origin=WeightsOrigin(classes=("cat", "dog")))
    assert [category.name for category in named.categories] == ["cat", "dog"]
    torch.save(checkpoint_payload(named), path)
    with pytest.raises(WeightsError, match=r"names its classes itself \(cat, dog\)"):
        load_detector(path, origin=WeightsOrigin(classes=("dog", "cat")))


# ---- class names


def mmdetection_file(path: Path, meta: dict[str, Any], num_classes: int = 4) -> Path:
    torch.manual_seed(0)
    model = build_detector(DetectorSpec(arch="resnet18", **NARROW), num_classes=num_classes)
    torch.save({"meta": meta, "state_dict": from_torchvision(model.state_dict(), "mmdetection")}, path)
    return path


NAMES = ("cat", "dog", "owl")


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": NAMES},
        {"CLASSES": list(NAMES)},
        {"classes": NAMES},
        {"dataset_meta": {"classes": NAMES, "palette": []}},
        {"dataset_meta": {"CLASSES": NAMES}},
    ],
    ids=["2.x", "list", "lower case", "3.x", "3.0"],
)
def test_mmdetections_class_names_are_read(tmp_path: Path, meta: dict[str, Any]) -> None:
    path = mmdetection_file(tmp_path / "epoch_12.pth", meta)
    model = load_detector(path)
    assert [(c.label, c.category_id, c.name) for c in model.categories] == [(1, 1, "cat"), (2, 2, "dog"), (3, 3, "owl")]
    convert_file(path, "torchvision", tmp_path / "out.pth")
    assert [c.name for c in load_detector(tmp_path / "out.pth").categories] == list(NAMES)
    with pytest.raises(WeightsError, match="as many different names must be given, got 2: a, b"):
        load_detector(path, origin=WeightsOrigin(classes=("a", "b")))


def test_class_rows_follow_mmdetections_names(tmp_path: Path) -> None:
    table = shapes_table(2, 64, 0)
    names = tuple(category.name for category in table.categories)
    for order, kept in ((names, True), (names[::-1], False)):
        path = mmdetection_file(tmp_path / "epoch_12.pth", {"CLASSES": order})
        model = build_detector(DetectorSpec(arch="resnet18", **NARROW), num_classes=4, categories=table.categories)
        assert (load_detector_weights(model, path).reinitialised == ()) == kept


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "b")], ids=["another number", "repeated"])
def test_class_names_that_contradict_the_scores_are_not_used(
    tmp_path: Path, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    path = mmdetection_file(tmp_path / "w.pth", {"CLASSES": names})
    assert load_detector(path).categories == ()
    assert f"names {len(names)} classes (a, b" in caplog.text
    assert len(load_detector(path, origin=WeightsOrigin(classes=NAMES)).categories) == 3


def test_eighty_classes_without_names_are_assumed_to_be_cocos_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = mmdetection_file(tmp_path / "w.pth", {}, num_classes=81)
    model = load_detector(path)
    assert (model.categories[79].category_id, model.categories[79].name) == (90, "toothbrush")
    assert "names of its 80 classes are not in the file, and are assumed to be COCO's" in caplog.text
    own = tuple(f"part {number}" for number in range(80))
    assert load_detector(path, origin=WeightsOrigin(classes=own)).categories[0].name == "part 0"
    named = mmdetection_file(tmp_path / "w.pth", {"CLASSES": own}, num_classes=81)
    assert load_detector(named).categories[0].name == "part 0"


def test_only_facts_that_are_missing_are_assumed() -> None:
    config = "data_preprocessor=dict(bgr_to_rgb=False, mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0])"
    torch.manual_seed(0)
    state = build_detector(DetectorSpec(arch="resnet18", **NARROW), num_classes=4).state_dict()
    tensors = from_torchvision(state, "mmdetection-caffe")
    assert to_torchvision({"state_dict": tensors, "meta": {"cfg": config}}).assumed == ("stride_in_1x1",)
    assert to_torchvision({"state_dict": tensors, "meta": {"cfg": f"{config} style='caffe'"}}).assumed == ()


# ---- how a detector is run


def test_detectron2s_anchors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model_final.pth"
    torch.save({"model": detectron2_state(msra=True) | cell_anchors(SMALL, (1 / 3, 1, 3))}, path)
    model = load_detector(path)
    assert model.spec.anchor_sizes == (16, 32, 64, 128, 256)
    assert model.spec.aspect_ratios == pytest.approx((1 / 3, 1, 3), abs=1e-4)
    theirs = cell_anchors(SMALL, (1 / 3, 1, 3)).values()
    for ours, level in zip(model.rpn.anchor_generator.cell_anchors, theirs, strict=True):
        torch.testing.assert_close(ours, level, rtol=1e-4, atol=0)
    built = build_model(section(path), shapes(), resume_from=None)
    assert built.spec.anchor_sizes == (16, 32, 64, 128, 256)
    own = build_model(section(path, anchor_sizes=[8, 16, 32, 64, 128]), shapes(), resume_from=None)
    assert own.spec.anchor_sizes == (8, 16, 32, 64, 128)
    convert_file(path, "torchvision", tmp_path / "out.pth")
    assert load_detector(tmp_path / "out.pth").spec.anchor_sizes == (16, 32, 64, 128, 256)
    with pytest.raises(
        WeightsError, match=r"anchor_sizes was given as \(8,\), but the file says \[16, 32, 64, 128, 256\]"
    ):
        load_detector(path, settings={"anchor_sizes": (8,)})


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        (cell_anchors([[32, 40, 50]] * 5, (1,)), r"anchors of one size.* got anchor_sizes=\[\[32, 40, 50\], "),
        (cell_anchors([[32.5]] * 5), r"anchor_sizes: .*integer.*, got 32\.5"),
        (cell_anchors([[32]] * 4), "anchor_sizes must hold one size for each of the 5 levels"),
        (cell_anchors(USUAL[:4]) | {"proposal_generator.anchor_generator.cell_anchors.4": torch.zeros(3, 4)}, "got"),
    ],
    ids=["several of a level", "fractions", "four levels", "no boxes"],
)
def test_anchors_that_this_detector_cannot_have_are_refused(
    tmp_path: Path, anchors: dict[str, Tensor], message: str
) -> None:
    path = tmp_path / "model_final.pth"
    torch.save({"model": detectron2_state(msra=True) | anchors}, path)
    with pytest.raises(WeightsError, match=rf"model_final\.pth: .*{message}"):
        load_detector(path)


MMDETECTION_2 = """model = dict(
    type='FasterRCNN',
    backbone=dict(type='ResNet', depth=18, style='pytorch'),
    rpn_head=dict(
        type='RPNHead',
        anchor_generator=dict(
            type='AnchorGenerator', scales=[4], ratios=[0.25, 1.0, 4.0], strides=[4, 8, 16, 32, 64])),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [dict(type='Resize', img_scale=[(1333, 640), (1333, 800)], keep_ratio=True)]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(1000, 600), flip=False, transforms=[])
]
"""
MMDETECTION_3 = MMDETECTION_2.replace("type='MultiScaleFlipAug', img_scale", "type='Resize', scale")


@pytest.mark.parametrize("meta", [{"config": MMDETECTION_2}, {"cfg": MMDETECTION_3}], ids=["2.x", "3.x"])
def test_mmdetections_configuration_is_read(
    tmp_path: Path, meta: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    path = mmdetection_file(tmp_path / "epoch_12.pth", meta | {"CLASSES": NAMES})
    with caplog.at_level(logging.INFO, "resdet"):
        spec = load_detector(path).spec
    assert (spec.anchor_sizes, spec.aspect_ratios) == ((16, 32, 64, 128, 256), (0.25, 1.0, 4.0))
    assert (spec.min_size, spec.max_size, spec.box_score_thresh) == (600, 1000, 0.01)
    assert "assumed" not in caplog.text
    assert load_detector(path, settings={"min_size": 320}).spec.min_size == 320
    built = build_model(section(path, arch="resnet18", calibration_images=1), shapes(), resume_from=None).spec
    assert (built.anchor_sizes, built.min_size) == ((16, 32, 64, 128, 256), 64)


def test_what_a_file_does_not_say_of_its_settings_is_assumed_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = mmdetection_file(tmp_path / "w.pth", {"cfg": MMDETECTION_3.partition("rpn_head")[0] + "to_rgb=True"})
    load_detector(path)
    lines = [record.message for record in caplog.records if "anchor" in record.message]
    assert len(lines) == 1
    assert (
        "read as mmdetection's Faster R-CNN; the file does not say, and it is assumed: anchor_sizes=(32, 64, 128, 256, "
        "512), aspect_ratios=(0.5, 1.0, 2.0), min_size=800, max_size=1333, box_score_thresh=0.05 (origin or settings"
    ) in lines[0]
    caplog.clear()
    chosen = {"anchor_sizes": (8, 16, 32, 64, 128), "aspect_ratios": (1.0, 2.0, 3.0), "min_size": 320, "max_size": 480}
    spec = load_detector(path, settings=chosen).spec
    assert spec.model_dump(include=set(chosen)) == chosen
    assert "anchor" not in caplog.text


def test_settings_are_for_other_libraries_detectors(tmp_path: Path) -> None:
    path = mmdetection_file(tmp_path / "w.pth", {})
    with pytest.raises(UserError, match=r"settings: must be among anchor_sizes, .*, got norm_eps"):
        load_detector(path, settings={"norm_eps": 0.1})
    torch.save(checkpoint_payload(load_detector(path)), tmp_path / "best.pt")
    with pytest.raises(WeightsError, match=r"best\.pt: is a checkpoint of this library, whose settings are its own"):
        load_detector(tmp_path / "best.pt", settings={"min_size": 320})


# ---- where the log's argument exists


def test_builders_take_the_origin_that_the_log_names(bare: Path, resnet50: dict[str, Tensor]) -> None:
    origin, stem = WeightsOrigin(channel_order="bgr"), resnet50["conv1.weight"].flip(1)
    built = build_detector(DetectorSpec(arch="resnet50", **NARROW), num_classes=3, weights_backbone=bare, origin=origin)
    for backbone in (built.backbone, resnet_fpn("resnet50", weights=bare, origin=origin)):
        assert torch.equal(backbone.body.conv1.weight, stem)


def test_the_builder_of_a_resnet_101_takes_it_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = DetectorSpec(**NARROW)
    state = build_detector(spec, num_classes=3).state_dict()
    path, stem = tmp_path / "weights.pth", state["backbone.body.conv1.weight"]
    torch.save(state, path)
    origin = WeightsOrigin(channel_order="bgr")
    for given in ({"weights": path}, {"weights_backbone": path, "num_classes": 3}):
        model = fasterrcnn_resnet101_fpn(**given, spec=spec, origin=origin)
        assert torch.equal(model.backbone.body.conv1.weight, stem.flip(1))
    assert "anchor_sizes" not in caplog.text  # they are in the spec
