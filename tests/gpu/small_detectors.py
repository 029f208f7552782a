"""A small detector, images and targets for it, and comparisons of what two devices make of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from benchmarks.inference import agreement
from torch import Tensor, nn

from resdet.data.loader import Batch
from resdet.models.detector import Detector, build_detector
from resdet.models.norm import calibrate_norm
from resdet.models.spec import DetectorSpec
from resdet.training.losses import detection_losses
from resdet.types import Prediction, Target

NUM_CLASSES = 4
"""As many as the generated shapes have, with the background."""
LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")

# Sums of float32 in another order: 1e-6 of a value, in features. They also decide which of two boxes of nearly the same
# score or overlap remains; one such box among some two hundred moves a loss by about this much.
LOSS_TOLERANCE = 2e-3
# The same for gradients, as a share of a tensor's norm.
GRADIENT_TOLERANCE = 2e-2
# Boxes may come and go at a threshold: detections without counterpart, of all.
UNMATCHED = 0.02


def make_detector(**settings: object) -> Detector:
    """Build a detector of random weights that detects something.

    All anchors and proposals are sampled, so that losses do not depend on how a device draws them.
    """
    spec = DetectorSpec.model_validate(
        {
            "arch": "resnet18",
            "min_size": 96,
            "max_size": 128,
            "out_channels": 32,
            "box_head_channels": 64,
            "rpn_pre_nms_top_n_train": 200,
            "rpn_pre_nms_top_n_test": 200,
            "rpn_post_nms_top_n_train": 100,
            "rpn_post_nms_top_n_test": 100,
            "rpn_batch_size_per_image": 100_000,
            "box_batch_size_per_image": 1_000,
            **settings,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_detector(spec, num_classes=NUM_CLASSES).eval()
        calibrate_norm(model.backbone.body, [torch.randn(2, 3, 96, 128)])
    # Else no score exceeds the threshold, and all boxes are their anchors.
    _spread(model, model.rpn.head.bbox_pred, 0.3)
    _spread(model, model.roi_heads.box_predictor.cls_score, 3.0)
    _spread(model, model.roi_heads.box_predictor.bbox_pred, 1.0)
    return model


@torch.no_grad()
def _spread(model: Detector, layer: nn.Module, deviation: float) -> None:
    """Scale a layer so that its outputs have a standard deviation."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model(float_inputs(make_batch(), torch.device("cpu")))
    handle.remove()
    assert isinstance(layer.weight, Tensor)
    layer.weight *= deviation / torch.cat([output.flatten() for output in outputs]).std()


def make_batch(num_images: int = 2, seed: int = 0) -> Batch:
    """Return images of differing sizes with boxes, as the loader gives them."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for number in range(num_images):
        height, width = 90 + 7 * number, 120 - 5 * number
        images.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator))
        corners = torch.rand(3, 2, 2, generator=generator).sort(dim=1).values.flatten(1)  # [N, 4]
        boxes = corners * torch.tensor([width - 12, height - 12] * 2) + torch.tensor([0, 0, 12, 12])
        labels = torch.randint(1, NUM_CLASSES, (3,), generator=generator)
        targets.append(Target(boxes=boxes, labels=labels, image_id=torch.tensor(number)))
    numbers = list(range(num_images))
    return Batch(images, targets, numbers, numbers)


def float_inputs(batch: Batch, device: torch.device) -> list[Tensor]:
    """Return a batch's images as a detector takes them."""
    return [(image.float() / 255).to(device) for image in batch.images]


def moved(model: Detector, device: torch.device) -> Detector:
    """Return a copy of a detector on a device."""
    return copy.deepcopy(model).to(device)


def losses_and_gradients(model: Detector, batch: Batch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Compute a batch's losses and the gradients of all trained parameters, in float32."""
    model.train()
    values = detection_losses(model, model, batch, "fp32")
    values["loss"].backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: values[name].item() for name in LOSSES}, gradients


def detections(model: Detector, batch: Batch) -> list[Prediction]:
    """Return what a detector finds, on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        found = model.eval()(float_inputs(batch, device))
    return [Prediction(boxes=f["boxes"].cpu(), labels=f["labels"].cpu(), scores=f["scores"].cpu()) for f in found]


def assert_same_losses(found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    """Check losses to ``LOSS_TOLERANCE``."""
    for name in LOSSES:
        assert abs(found[name] - expected[name]) <= LOSS_TOLERANCE * abs(expected[name]), name


def assert_same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check gradients to ``GRADIENT_TOLERANCE``."""
    assert found.keys() == expected.keys()
    assert len(found) > 20
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= GRADIENT_TOLERANCE * gradient.norm(), name


def assert_same_detections(found: Sequence[Prediction], expected: Sequence[Prediction]) -> None:
    """Check that nearly all detections have a counterpart, within 0.02 px and 1e-3 of the score."""
    row = agreement(expected, found)
    assert isinstance(row["detections"], int)
    assert isinstance(row["unmatched"], int)
    assert row["detections"] >= 50, "too few to compare"
    assert row["unmatched"] <= UNMATCHED * row["detections"], row
    assert float(row["largest difference of a corner [px]"]) < 0.02, row
    assert float(row["of a score"]) < 1e-3, row
