"""NaN and infinity end in an error wherever a model runs, with the fast operations as with torchvision's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from resdet.classification.data import LabelledImages, StoredPictures
from resdet.classification.evaluate import evaluate_classifier
from resdet.classification.model import make_classifier
from resdet.classification.spec import ClassifierSpec
from resdet.config import parse_config
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import TrainingError, UserError, WeightsError
from resdet.evaluation import evaluate
from resdet.evaluation.loss import validation_loss
from resdet.evaluation.settings import InferenceSettings
from resdet.export.backbone import BACKBONE_FORMATS, export_backbone
from resdet.export.detector import DETECTOR_FORMATS, export_detector
from resdet.models.backbone import resnet_fpn
from resdet.models.bodies import build_classifier
from resdet.models.convolution import convolve
from resdet.models.detector import Detector, build_detector
from resdet.models.int8 import Int8Detector
from resdet.models.int8_calibration import quantize_detector
from resdet.models.norm import calibrate_norm
from resdet.models.ready_weights import Geometry, ReadyWeight
from resdet.models.spec import DetectorSpec, Tricks
from resdet.prediction import predict
from resdet.training import detection

NAN, INF = float("nan"), float("inf")
needs_int8 = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs a CPU with AVX512-VNNI")
# One in each kind of place: a convolution whose ReLU is fused, statistics, a shortcut, the pyramid, the heads.
PARTS = [
    "backbone.body.conv1.weight",
    "backbone.body.layer3.0.conv1.weight",
    "backbone.body.layer3.0.bn1.running_var",
    "backbone.body.layer3.1.bn2.bias",
    "backbone.body.layer4.0.downsample.0.weight",
    "backbone.fpn.inner_blocks.0.0.weight",
    "backbone.fpn.layer_blocks.3.0.bias",
    "rpn.head.conv.0.0.weight",
    "rpn.head.conv.0.0.bias",
    "rpn.head.bbox_pred.weight",
    "roi_heads.box_head.fc6.weight",
    "roi_heads.box_predictor.cls_score.bias",
]
REPORTED = [PARTS[1], PARTS[7]]


def detector(*, fast: bool, arch: str = "resnet18", resize: str = "torch") -> Detector:
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch=arch, min_size=64, max_size=96, out_channels=32, box_head_channels=32, fast=fast, resize=resize
    )
    model = build_detector(spec, num_classes=4, trainable_layers=3, categories=shapes().categories)
    if arch != "vgg16":
        calibrate_norm(model.backbone.body, [torch.randn(2, 3, 64, 64)])
    return model


def shapes() -> DetectionDataset:
    return DetectionDataset(shapes_table(2, 64, 0), ShapesImages(64, 0), training=False)


def plant(model: nn.Module, name: str, value: float = NAN) -> None:
    with torch.no_grad():
        (dict(model.named_parameters()) | dict(model.named_buffers()))[name].fill_(value)


def as_evaluated(model: Detector) -> None:
    evaluate(model, shapes())


def as_refined(model: Detector) -> None:
    evaluate(model, shapes(), InferenceSettings(tricks=Tricks(refine=1, flip=True)))


def in_bfloat16(model: Detector) -> None:
    evaluate(model, shapes(), InferenceSettings(precision="bf16"))


def as_predicted(model: Detector) -> None:
    list(predict(model, [ShapesImages(64, 0)(0)]))


def as_validated(model: Detector) -> None:
    validation_loss(model, shapes())


RUNS: list[Callable[[Detector], None]] = [as_evaluated, as_refined, in_bfloat16, as_predicted, as_validated]
CASES = [(as_evaluated, part) for part in PARTS] + [(run, part) for run in RUNS[1:] for part in REPORTED]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize(("run", "part"), CASES)
def test_a_model_with_nan_in_its_weights_never_passes_for_one_that_finds_nothing(
    run: Callable[[Detector], None], part: str, fast: bool
) -> None:
    model = detector(fast=fast)
    if part == PARTS[1]:
        run(model)
    plant(model, part)
    with pytest.raises(
        WeightsError, match=rf"NaN or infinit.*\(its {part.replace('.', '[.]')} is not finite: training"
    ):
        run(model)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("run", [as_evaluated, as_validated])
def test_one_value_of_a_layer_is_enough(run: Callable[[Detector], None], value: float) -> None:
    model = detector(fast=True)
    with torch.no_grad():
        model.backbone.body.layer3[0].conv1.weight[5, 3, 2, 2] = value
    with pytest.raises(WeightsError, match=r"its backbone\.body\.layer3\.0\.conv1\.weight is not finite"):
        run(model)


@pytest.mark.parametrize("arch", ["resnet50", "vgg16", pytest.param("resnet34", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
def test_fast_and_plain_bodies_agree_on_which_channels_are_nan(arch: str, training: bool) -> None:
    fast, plain = detector(fast=True, arch=arch).backbone, detector(fast=False, arch=arch).backbone
    plain.load_state_dict(fast.state_dict())
    name = "features.21.weight" if arch == "vgg16" else "layer3.0.conv2.weight"
    for backbone in (fast, plain):
        dict(backbone.body.named_parameters())[name].requires_grad_(training)
        with torch.no_grad():
            dict(backbone.body.named_parameters())[name][3, 2, 0, 1] = NAN
    images = torch.randn(2, 3, 96, 64)
    with torch.set_grad_enabled(training):
        ours, theirs = fast(images), plain(images)
    assert any(level.isnan().any() for level in theirs.values())
    for level, expected in zip(ours.values(), theirs.values(), strict=True):
        assert torch.equal(level.isnan(), expected.isnan())


def test_an_overflow_inside_is_carried_on() -> None:
    """Weights are finite, and the second layer's are large enough to leave float32's range."""
    model = detector(fast=True)
    plant(model, "backbone.body.layer3.0.conv1.weight", 3e38)
    with pytest.raises(
        WeightsError, match=r"computes NaN or infinity on image_id=\[1\] of shapes.*its weights are fin"
    ):
        evaluate(model, shapes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("place", ["x", "weight", "bias", "residual"])
def test_a_convolution_keeps_nan_through_its_relu(place: str, kept: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    shapes_of = {"x": (2, 8, 5, 6), "weight": (8, 8, 3, 3), "bias": (8,), "residual": (2, 8, 5, 6)}
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes_of.items()}
    tensors[place][..., -1 if place == "weight" else 3] = NAN  # of a map one column of pixels, through the middle
    maps = (tensors[name].contiguous(memory_format=torch.channels_last) for name in ("x", "weight", "residual"))
    x, weight, residual = maps
    ready = ReadyWeight(weight, tensors["bias"], geometry, dtype) if kept else None
    with torch.no_grad():
        out = convolve(x, weight, tensors["bias"], geometry, ready=ready, residual=residual, relu=True)
        expected = torch.relu(torch.conv2d(x, weight, tensors["bias"], padding=1) + residual)
    assert expected.isnan().any()
    if place == "weight":  # at the border the zeros beyond it may hide a part of the kernel; here they do not
        assert out.isnan().all()
    else:
        assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("part", [*REPORTED, "backbone.body.layer1.0.conv1.weight"])
def test_training_ends_at_its_first_step_and_names_the_tensor(
    part: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the tensor is in a stage that is not trained and has no gradient."""

    def build(*_arguments: object, **_options: object) -> Detector:
        model = detector(fast=fast)
        plant(model, part)
        return model

    monkeypatch.setattr(detection, "build_model", build)
    text = f"""
model: {{arch: resnet18, min_size: 64, max_size: 96, calibration_images: 2, weights: null}}
data:
  train: {{format: shapes, num_images: 4, image_size: 64}}
  val: {{format: shapes, num_images: 1, image_size: 64}}
loader: {{num_workers: 0}}
train: {{steps: 3, batch_size: 2}}
output_dir: {tmp_path / "run"}
"""
    with pytest.raises(
        TrainingError, match=rf"^(loss|gradient) is not finite at step 1, .*\. {part} was not finite bef"
    ):
        detection.train(parse_config(text))


PIXELS = torch.full((3, 64, 80), 0.5)


@pytest.mark.parametrize("resize", ["torch", "pil"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_pixels_that_are_no_numbers_are_refused_with_the_image(
    value: float, training: bool, fast: bool, resize: str
) -> None:
    model = detector(fast=fast, resize=resize).train(training)
    images = [PIXELS.clone(), PIXELS.clone()]
    images[1][2, 0, 79] = value
    images[1][0, 0, 0] = value
    targets = [{"boxes": torch.tensor([[1.0, 2, 30, 40]]), "labels": torch.tensor([1])}] * 2
    with pytest.raises(UserError) as error:
        model(images, targets if training else None)
    assert str(error.value) == "images[1]: pixels must be finite, got NaN or infinity in 2 of 15360 values"
    model([PIXELS] * 2, copy.deepcopy(targets) if training else None)


def test_bright_pixels_of_a_half_are_finite_though_their_sum_is_not() -> None:
    model = detector(fast=True).eval()
    for image in (torch.full((3, 300, 300), 1.0, dtype=torch.float16), torch.full((3, 64, 64), 1e36)):
        assert image.sum().isinf()
        assert model.transform([image])[0].tensors.isfinite().all()


@pytest.mark.parametrize("arch", ["resnet18", "vgg16"])
def test_a_body_alone_refuses_them_as_torchvisions_detector_does_with_our_backbone(arch: str) -> None:
    backbone = resnet_fpn(arch, norm="frozen")
    images = torch.zeros(3, 3, 64, 64)
    images[1, 0, 5, 60] = NAN
    message = r"^images must be finite: NaN or infinity in image 1 \(from 0\) of a batch of 3$"
    for module in (backbone.body, backbone):
        with pytest.raises(UserError, match=message):
            module(images)
    torchvisions = FasterRCNN(backbone, num_classes=2, min_size=64, max_size=64).eval()
    with pytest.raises(UserError, match=message):
        torchvisions(list(images))


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_statistics_are_not_calibrated_from_nan(norm: str) -> None:
    body = detector(fast=True).backbone.body
    before = copy.deepcopy(body.state_dict())
    if norm == "frozen":
        with pytest.raises(UserError, match="images must be finite"):
            calibrate_norm(body, [torch.full((1, 3, 64, 64), NAN)])
    plant(body, "layer2.0.conv1.weight")
    with pytest.raises(WeightsError, match=r"calibrate_norm: the model computes NaN .*the input of layer2\.0\.bn1\)$"):
        calibrate_norm(body, [torch.randn(1, 3, 64, 64)])
    for name, tensor in body.state_dict().items():
        assert name == "layer2.0.conv1.weight" or torch.equal(tensor, before[name])


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_exported_that_computes_nan(part: str, tmp_path: Path) -> None:
    model = detector(fast=True).eval()
    plant(model, part)
    refused = r"^export: the model computes NaN or infinity \(its .*{} is not finite: training diverged\)$"
    for format in DETECTOR_FORMATS:
        with pytest.raises(WeightsError, match=refused.format(part)):
            export_detector(model, tmp_path / "file.xml", format=format)
    for format in BACKBONE_FORMATS if part.startswith("backbone") else ():
        with pytest.raises(WeightsError, match=refused.format(part.removeprefix("backbone.").removeprefix("body."))):
            export_backbone(model, tmp_path / "file.xml", format=format, include_fpn="fpn" in part)
    assert list(tmp_path.iterdir()) == []


@needs_int8
@pytest.mark.parametrize("part", PARTS)
def test_a_model_with_nan_is_not_quantized(part: str) -> None:
    model = detector(fast=True).eval()
    plant(model, part)
    with pytest.raises(
        WeightsError, match=rf"^quantize: the model computes NaN or infinity \(its {part} is not finite"
    ):
        quantize_detector(model, [PIXELS])


@needs_int8
def test_pixels_that_are_no_numbers_are_not_calibrated_on() -> None:
    image = PIXELS.clone()
    image[0, 3, 3] = NAN
    with pytest.raises(UserError, match=r"^images\[0\]: pixels must be finite"):
        quantize_detector(detector(fast=True).eval(), [PIXELS, image])


@pytest.fixture(scope="module")
def int8_detector() -> Int8Detector:
    model = detector(fast=True).eval()
    return quantize_detector(model, [image.float() / 255 for image, _ in (shapes()[0], shapes()[1])])


@needs_int8
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("backbone.stem.0.weight", "stem"),
        ("backbone.stages.2.0.layers.0.bias", "bias or weight_scale of a layer"),
        ("backbone.stages.1.1.layers.0.weight_scale", "bias or weight_scale of a layer"),
        ("rpn.head.conv.bias", "bias or weight_scale of a layer"),
        ("roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.cls_score.weight"),
    ],
)
def test_nan_does_not_vanish_in_eight_bits(int8_detector: Int8Detector, part: str, what: str, warm: bool) -> None:
    model = copy.deepcopy(int8_detector)
    if warm:
        as_evaluated(model)
    plant(model, part)
    with pytest.raises(WeightsError, match=rf"computes NaN or infinity.*\(its {what} is not finite"):
        as_evaluated(model)
    with pytest.raises(UserError, match=r"^images\[0\]: pixels must be finite"):
        model([torch.full((3, 64, 64), NAN)])


@pytest.mark.parametrize(("arch", "place"), [("resnet18", "weights"), ("resnet18", "mean"), ("vgg16", "weights")])
def test_a_classifier_that_computes_nan_has_no_share_of_right_answers(place: str, arch: str) -> None:
    torch.manual_seed(0)
    made = make_classifier(ClassifierSpec(arch=arch, image_size=32), ("a", "b"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    images = LabelledImages("noise", ("a", "b"), np.array([0, 1]), StoredPictures(pixels, "noise"))
    evaluate_classifier(made, images)
    if place == "mean":
        made = dataclasses.replace(made, mean=torch.full((3, 1, 1), NAN))
    else:
        plant(made.network, "conv1.weight" if arch == "resnet18" else "features.0.weight")
    with pytest.raises(UserError, match=r"NaN or infinity"):
        evaluate_classifier(made, images)


def test_a_classifier_with_frozen_norms_keeps_nan() -> None:
    network = build_classifier("resnet18", num_classes=3, norm="frozen").eval()
    calibrate_norm(network, [torch.randn(2, 3, 64, 64)])
    plant(network, "layer3.0.conv1.weight")
    scores: Tensor = network(torch.randn(1, 3, 64, 64))
    assert scores.isnan().all()
