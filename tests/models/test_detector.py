"""The detector against torchvision's FasterRCNN, and its checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resdet.errors import UserError, WeightsError
from resdet.models.checkpoint import checkpoint_payload, load_detector, load_detector_weights
from resdet.models.detector import Detector, build_detector
from resdet.models.fasterrcnn import fasterrcnn_resnet101_fpn
from resdet.models.spec import WEIGHTS_FIELDS, DetectorSpec
from resdet.types import Category

SMALL = {"arch": "resnet18", "min_size": 128, "max_size": 160, "rpn_pre_nms_top_n_train": 100}
CATEGORIES = (Category(1, 7, "cat"), Category(2, 9, "dog"))
RandomiseNorms = Callable[[nn.Module], None]


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, 120, 150, generator=generator), torch.rand(3, 140, 100, generator=generator)]


def targets() -> list[dict[str, Tensor]]:
    return [
        {"boxes": torch.tensor([[10.0, 12, 60, 70], [60, 20, 140, 110]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]


def losses(model: nn.Module, *, autocast: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(5)  # sampling of anchors and proposals
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result: dict[str, Tensor] = model.train()(images(), targets())
    return result


def detections(model: nn.Module) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        result: list[dict[str, Tensor]] = model.eval()(images())
    return result


@pytest.fixture
def trio(randomise_norms: RandomiseNorms) -> tuple[Detector, Detector, FasterRCNN]:
    """One detector three times: plain, fast, torchvision's."""
    torch.manual_seed(0)
    plain = build_detector(DetectorSpec(**SMALL, fast=False), num_classes=3, categories=CATEGORIES)
    randomise_norms(plain.backbone)
    fast = build_detector(DetectorSpec(**SMALL), num_classes=3, categories=CATEGORIES)
    sizes = {name: value for name, value in SMALL.items() if name != "arch"}
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), num_classes=3, **sizes)
    fast.load_state_dict(plain.state_dict())
    theirs.load_state_dict(plain.state_dict())
    return plain, fast, theirs


def test_resnet101_state_dicts_are_exchangeable_and_tensors_trained_the_same() -> None:
    ours = fasterrcnn_resnet101_fpn(num_classes=91)
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet101", weights=None), num_classes=91)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]


def test_defaults_are_torchvisions() -> None:
    """Everything FasterRCNN is given: its modules tell, attribute by attribute."""
    ours = build_detector(DetectorSpec(arch="resnet18"), num_classes=91)
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), num_classes=91)
    pairs = [
        (ours.transform, theirs.transform, ["min_size", "max_size", "image_mean", "image_std", "size_divisible"]),
        (ours.rpn, theirs.rpn, ["_pre_nms_top_n", "_post_nms_top_n", "nms_thresh", "score_thresh", "min_size"]),
        (ours.rpn.proposal_matcher, theirs.rpn.proposal_matcher, ["high_threshold", "low_threshold"]),
        (ours.rpn.fg_bg_sampler, theirs.rpn.fg_bg_sampler, ["batch_size_per_image", "positive_fraction"]),
        (ours.rpn.anchor_generator, theirs.rpn.anchor_generator, ["sizes", "aspect_ratios"]),
        (ours.roi_heads, theirs.roi_heads, ["score_thresh", "nms_thresh", "detections_per_img"]),
        (ours.roi_heads.proposal_matcher, theirs.roi_heads.proposal_matcher, ["high_threshold", "low_threshold"]),
        (ours.roi_heads.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler, ["batch_size_per_image", "positive_fraction"]),
        (
            ours.roi_heads.box_roi_pool,
            theirs.roi_heads.box_roi_pool,
            ["featmap_names", "output_size", "sampling_ratio"],
        ),
    ]
    for module, reference, names in pairs:
        assert {n: getattr(module, n) for n in names} == {n: getattr(reference, n) for n in names}


@pytest.mark.parametrize("autocast", [False, True])
def test_plain_losses_are_bit_equal(trio: tuple[Detector, Detector, FasterRCNN], autocast: bool) -> None:
    plain, _, theirs = trio
    expected = losses(theirs, autocast=autocast)
    assert losses(plain, autocast=autocast) == expected
    with torch.no_grad():
        plain.roi_heads.box_predictor.cls_score.bias[1] += 1e-3
    assert losses(plain, autocast=autocast) != expected


def test_plain_detections_are_bit_equal(trio: tuple[Detector, Detector, FasterRCNN]) -> None:
    plain, _, theirs = trio
    expected = detections(theirs)
    assert sum(len(d["boxes"]) for d in expected) > 10
    for ours, reference in zip(detections(plain), expected, strict=True):
        assert all(torch.equal(ours[name], reference[name]) for name in ("boxes", "labels", "scores"))
    with torch.no_grad():
        plain.backbone.fpn.inner_blocks[0][0].bias[0] += 1e-2
    assert not torch.equal(detections(plain)[0]["boxes"], expected[0]["boxes"])


def test_fast_losses_agree(trio: tuple[Detector, Detector, FasterRCNN]) -> None:
    _, fast, theirs = trio
    expected = losses(theirs)
    # Features agree to some 1e-5 of their scale; the losses are means over hundreds of samples of functions with slopes
    # below 1, unless a proposal at a threshold changes sides.
    for name, value in losses(fast).items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-3), name
    with torch.no_grad():
        fast.roi_heads.box_predictor.cls_score.bias[1] += 0.1
    assert losses(fast)["loss_classifier"].item() != pytest.approx(expected["loss_classifier"].item(), rel=1e-3)


def test_boxes_stay_float32_under_autocast(trio: tuple[Detector, Detector, FasterRCNN]) -> None:
    """torchvision makes anchors in the features' type: in bfloat16 they are multiples of 4 beyond 512 pixels."""
    _, fast, theirs = trio
    grid = torch.zeros(1, 256, 25, 25, dtype=torch.bfloat16)
    canvas = type("Canvas", (), {"tensors": torch.zeros(1, 3, 800, 800), "image_sizes": [(800, 800)]})()
    levels = [grid] * 5
    ours = fast.rpn.anchor_generator(canvas, levels)[0]
    rounded = theirs.rpn.anchor_generator(canvas, levels)[0]
    exact = copy.deepcopy(theirs.rpn.anchor_generator)(canvas, [grid.float()] * 5)[0]
    assert torch.equal(ours, exact)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() >= 2

    seen: list[torch.dtype] = []
    fast.roi_heads.box_roi_pool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1][0].dtype))
    assert all(torch.isfinite(value) and value.dtype == torch.float32 for value in losses(fast, autocast=True).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert {d["boxes"].dtype for d in detections(fast)} == {torch.float32}
    assert seen == [torch.float32] * 2


def test_every_trained_tensor_gets_a_gradient_under_autocast(trio: tuple[Detector, Detector, FasterRCNN]) -> None:
    _, fast, _ = trio
    torch.stack(list(losses(fast, autocast=True).values())).sum().backward()
    for name, parameter in fast.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_min_size_of_several_takes_the_last_outside_training() -> None:
    model = build_detector(DetectorSpec(arch="resnet18", min_size=(96, 128), max_size=500), num_classes=3).eval()
    assert model.transform(images())[0].image_sizes[0] == (128, 160)


def test_checkpoint_rebuilds_the_detector(trio: tuple[Detector, Detector, FasterRCNN], tmp_path: Path) -> None:
    _, fast, _ = trio
    torch.save(checkpoint_payload(fast), tmp_path / "best.pt")
    model = load_detector(tmp_path / "best.pt")
    assert model.spec == fast.spec
    assert model.categories == CATEGORIES
    assert not model.training
    for ours, reference in zip(detections(model), detections(fast), strict=True):
        assert all(torch.equal(ours[name], reference[name]) for name in ("boxes", "labels", "scores"))
    payload = checkpoint_payload(fast)
    json.dumps({name: value for name, value in payload.items() if name != "model"})  # plain values


def test_checkpoint_carries_the_score_threshold(trio: tuple[Detector, Detector, FasterRCNN], tmp_path: Path) -> None:
    payload = checkpoint_payload(trio[1])
    path = tmp_path / "best.pt"

    def loaded(**changes: object) -> float | None:
        torch.save(payload | changes, path)
        return load_detector(path).score_threshold

    assert payload["score_threshold"] is None
    assert loaded() is None
    assert loaded(score_threshold=0.625) == 0.625
    again = checkpoint_payload(load_detector(path))
    assert again["score_threshold"] == 0.625
    del payload["score_threshold"]  # files from before there was one
    assert loaded() is None
    for wrong in (-0.1, 1.5, float("nan"), "0.5"):
        with pytest.raises(WeightsError, match=r"score_threshold must be in \[0, 1\], got"):
            loaded(score_threshold=wrong)


def test_checkpoint_from_before_the_conventions_loads(
    trio: tuple[Detector, Detector, FasterRCNN], tmp_path: Path
) -> None:
    """Fields that a checkpoint's spec does not name have torchvision's values, which is how it was trained."""
    payload = checkpoint_payload(trio[1])
    young = [name for name in WEIGHTS_FIELDS if name not in ("norm_eps", "image_mean", "image_std")]
    payload["spec"] = {name: value for name, value in payload["spec"].items() if name not in young}
    torch.save(payload, tmp_path / "old.pt")
    assert load_detector(tmp_path / "old.pt").spec == trio[1].spec


def test_unfit_checkpoints_are_refused(trio: tuple[Detector, Detector, FasterRCNN], tmp_path: Path) -> None:
    plain, _, _ = trio
    payload = checkpoint_payload(plain)
    path = tmp_path / "x.pt"

    def refused(content: object, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(WeightsError, match=message) as caught:
            load_detector(path)
        assert str(path) in str(caught.value)

    refused(payload | {"spec": payload["spec"] | {"archh": 1}}, "its spec is not one of this version: archh")
    refused({n: v for n, v in payload.items() if n != "categories"}, "has no readable spec and categories")
    refused(payload | {"categories": payload["categories"][:1]}, r"categories must have the labels 1..2 .* got 1")
    refused(payload | {"spec": payload["spec"] | {"arch": "resnet34"}}, "does not fit this resnet34 detector: without")
    refused(payload | {"model": {"a": torch.zeros(1)}}, "is not a detector: it has no 'roi_heads.box_predictor")
    torch.save(payload, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="is damaged"):
        load_detector(path)


def other(num_classes: int = 3, categories: tuple[Category, ...] = ()) -> Detector:
    torch.manual_seed(9)
    return build_detector(DetectorSpec(**SMALL), num_classes=num_classes, categories=categories)


@pytest.mark.parametrize(
    ("num_classes", "categories", "kept"),
    [
        (3, CATEGORIES, False),
        (3, (), False),
        (3, (CATEGORIES[0], Category(2, 9, "owl")), True),
        (3, (Category(1, 9, "dog"), Category(2, 7, "cat")), True),
        (5, (), True),
    ],
)
def test_class_rows_are_taken_only_for_the_same_classes(
    trio: tuple[Detector, Detector, FasterRCNN],
    tmp_path: Path,
    num_classes: int,
    categories: tuple[Category, ...],
    kept: bool,
) -> None:
    _, fast, _ = trio
    torch.save(checkpoint_payload(fast), tmp_path / "best.pt")
    model, before = other(num_classes, categories), other(num_classes, categories)
    report = load_detector_weights(model, tmp_path / "best.pt")
    given = fast.state_dict()
    for name, value in model.state_dict().items():
        is_class_row = name.startswith("roi_heads.box_predictor.")
        source = before.state_dict() if kept and is_class_row else given
        assert torch.equal(value, source[name]), name
        assert (name in report.reinitialised) == (kept and is_class_row)
    assert ("freshly initialised: roi_heads.box_predictor.cls_score.weight" in str(report)) == kept


def test_weights_of_another_body_are_refused(trio: tuple[Detector, Detector, FasterRCNN], tmp_path: Path) -> None:
    torch.save(trio[0].state_dict(), tmp_path / "w.pth")
    model = build_detector(DetectorSpec(arch="resnet34"), num_classes=3)
    with pytest.raises(WeightsError, match=r"without backbone.body.layer1.2.conv1.weight"):
        load_detector_weights(model, tmp_path / "w.pth")


def test_builder_takes_whole_detectors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet101", weights=None), num_classes=4)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    model = fasterrcnn_resnet101_fpn(
        weights=tmp_path / "w.pth", weights_backbone="ignored", trainable_backbone_layers=2
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))
    assert not any(p.requires_grad for p in model.backbone.body.layer2.parameters())
    assert fasterrcnn_resnet101_fpn(weights=(tmp_path / "w.pth").as_uri(), num_classes=4).categories == ()
    with pytest.raises(WeightsError, match=r"w\.pth: The parameter 'num_classes' expected value 4 but got 91 instead"):
        fasterrcnn_resnet101_fpn(weights=tmp_path / "w.pth", num_classes=91)
    with pytest.raises(WeightsError, match="'COCO_V1' is no file, no URL and no published detector; known are det"):
        fasterrcnn_resnet101_fpn(weights="COCO_V1")
    with pytest.raises(UserError, match=r"spec.arch must be 'resnet101' here, got 'resnet50'"):
        fasterrcnn_resnet101_fpn(spec=DetectorSpec(arch="resnet50"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("arch", "resnet1001", "did you mean 'resnet101'"),
        ("norm", "sync", "'frozen', 'batch' or 'group'"),
        ("anchor_sizes", [32, 64], r"one size for each of the 5 levels P2..P6, got 2: \[32, 64\]"),
        ("min_size", [], "at least one size"),
        ("box_nms_thresh", 1.5, "less than or equal to 1"),
        ("image_std", [0.2, 0, 0.2], "greater than 0"),
        ("rpn_bg_iou_thresh", 0.8, r"rpn_bg_iou_thresh \(0.8\) must not be above rpn_fg_iou_thresh \(0.7\)"),
        ("num_classes", 91, "Extra inputs are not permitted"),
    ],
)
def test_spec_refuses_what_cannot_be(field: str, value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DetectorSpec.model_validate({field: value})


def test_spec_is_documented_and_round_trips() -> None:
    assert all(field.description for field in DetectorSpec.model_fields.values())
    spec = DetectorSpec(min_size=(640, 800), norm="group")
    assert DetectorSpec.model_validate(json.loads(spec.model_dump_json())) == spec


@pytest.mark.parametrize(
    ("num_classes", "categories", "message"),
    [
        (1, (), "at least 2; got 1"),
        (4, CATEGORIES, r"labels 1..3 .* got 2 with labels 1, 2"),
        (3, CATEGORIES[::-1], "with labels 2, 1"),
    ],
)
def test_classes_must_fit(num_classes: int, categories: tuple[Category, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_detector(DetectorSpec(arch="resnet18"), num_classes=num_classes, categories=categories)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("which", [0, 1])
def test_detector_scripts_as_torchvisions(trio: tuple[Detector, Detector, FasterRCNN], which: int) -> None:
    """TorchScript takes the plain form, so the script of the fast detector equals the plain one's."""
    scripted = torch.jit.script(trio[which].eval())
    with torch.no_grad():
        result = scripted(images())[1]
    for ours, reference in zip(result, detections(trio[0]), strict=True):
        torch.testing.assert_close(ours["boxes"], reference["boxes"], rtol=0, atol=1e-3)
