"""Build torchvision's Faster R-CNN and ours with the same weights."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision import ops
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from benchmarks.bound import PRECISIONS
from resdet.data.loader import Batch
from resdet.errors import UserError
from resdet.models.archs import find_arch
from resdet.models.checkpoint import load_detector
from resdet.models.detector import Detector, build_detector
from resdet.models.norm import calibrate_norm, has_fresh_frozen_norm
from resdet.models.spec import DetectorSpec
from resdet.precision import Precision
from resdet.weights.files import read_weights

TRAINABLE_LAYERS = 3
NUM_CLASSES = 91
"""Classes of random heads, background included: as many as torchvision's COCO models have."""

_CALIBRATION_BATCHES = 2
# What torchvision's constructor takes under the names of a DetectorSpec's fields, and what is passed to it below.
_SHARED = [name for name in inspect.signature(FasterRCNN.__init__).parameters if name in DetectorSpec.model_fields]
_TOLD = ("arch", "norm_eps", "anchor_sizes", "aspect_ratios", "box_head_channels", "roi_sampling_ratio", "fast")


class Variant(NamedTuple):
    """One of the four that are measured.

    Attributes:
        model: Its own copy. What ours keeps between calls, folded weights, is kept for one precision at a time.
        precision: What it computes in.
        is_ours: Whether it is this package's.
        device: Where it computes, and its images must be.
    """

    model: FasterRCNN
    precision: Precision
    is_ours: bool
    device: torch.device


def build_ours(
    *, arch: str, weights: str, batches: Sequence[Batch], min_size: int, max_size: int, num_classes: int, seed: int
) -> Detector:
    """Build our detector for a comparison.

    Args:
        arch: Its body, unless ``weights`` holds a whole detector.
        weights: A detector's file (its classes and knobs are taken over, apart from its sizes and losses), that of a
            body (the heads are random), or empty. Random bodies have their frozen norms calibrated on ``batches``, so
            that activations are a normalised network's. Random class scores are scaled to a standard deviation of 1
            on the first batch: as they are made, no score exceeds the threshold and there would be nothing to detect.
        batches: The pictures.
        min_size: Shorter side that pictures are scaled to.
        max_size: Longest side allowed.
        num_classes: Classes of the pictures' boxes, the background included; 0 where they have none.
        seed: Of random weights.

    Raises:
        UserError: If torchvision has no such network, or the detector knows too few classes.
        WeightsError: If the weights cannot be used.
    """
    measured: dict[str, Any] = {"min_size": min_size, "max_size": max_size}
    file = read_weights(weights) if weights else None
    if file is not None and file.is_detector:
        loaded = load_detector(file)
        # Losses that torchvision does not have would be compared with others; speed is of the fast path.
        measured |= {"class_loss": "cross_entropy", "box_loss": "smooth_l1", "class_weights": None, "fast": True}
        known = loaded.roi_heads.box_predictor.cls_score.out_features
        if known < num_classes:
            raise UserError(f"{weights}: knows {known - 1} classes, but the pictures' boxes are of {num_classes - 1}")
        spec = loaded.spec.model_copy(update=measured)
        _check_spec(spec)
        model = build_detector(spec, num_classes=known, trainable_layers=TRAINABLE_LAYERS)
        model.load_state_dict(loaded.state_dict())
        return model
    find_arch(arch)
    spec = DetectorSpec(arch=arch, **measured, **(file.settings if file else {}))
    _check_spec(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_detector(
            spec,
            num_classes=max(NUM_CLASSES, num_classes),
            weights_backbone=file,
            trainable_layers=TRAINABLE_LAYERS,
        )
    model.eval()
    inputs = [float_images(batch, torch.device("cpu")) for batch in batches[:_CALIBRATION_BATCHES]]
    if has_fresh_frozen_norm(model.backbone.body):
        with torch.no_grad():
            calibrate_norm(model.backbone.body, [model.transform(images)[0].tensors for images in inputs])
    _spread_scores(model, inputs[0])
    return model


def build_torchvision(ours: Detector) -> FasterRCNN:
    """Build torchvision's detector with a detector's knobs and weights."""
    spec = ours.spec
    backbone = resnet_fpn_backbone(
        backbone_name=spec.arch,
        weights=None,
        norm_layer=partial(ops.FrozenBatchNorm2d, eps=spec.norm_eps),
        trainable_layers=TRAINABLE_LAYERS,
    )
    num_classes = ours.roi_heads.box_predictor.cls_score.out_features
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in spec.anchor_sizes), (spec.aspect_ratios,) * len(spec.anchor_sizes)
        ),
        box_roi_pool=ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, spec.roi_sampling_ratio),
        box_head=TwoMLPHead(backbone.out_channels * 7 * 7, spec.box_head_channels),
        box_predictor=FastRCNNPredictor(spec.box_head_channels, num_classes),
        **{name: getattr(spec, name) for name in _SHARED},
    )
    model.load_state_dict(ours.state_dict())
    return model


def variants(ours: Detector, device: torch.device, *, training: bool) -> dict[str, Variant]:
    """Return torchvision's detector and ours in float32 and under bfloat16 autocast, each a copy of its own."""
    reference = build_torchvision(ours)
    return {
        f"{name} {precision}": Variant(
            copy.deepcopy(model).to(device).train(training), precision, model is ours, device
        )
        for precision in PRECISIONS
        for name, model in (("torchvision", reference), ("ours", ours))
    }


def float_images(batch: Batch, device: torch.device) -> list[Tensor]:
    """Return a batch's images as torchvision's models take them: float32 in [0, 1]."""
    return [image.to(device).float().div_(255) for image in batch.images]


def input_shape(model: FasterRCNN, batch: Batch) -> tuple[int, int]:
    """Return the ``(height, width)`` to which a batch is scaled and padded."""
    device = next(model.parameters()).device
    height, width = model.transform(float_images(batch, device))[0].tensors.shape[-2:]
    return int(height), int(width)


def shape_text(shapes: Sequence[tuple[int, int]]) -> str:
    """Return the sizes of network inputs as text: the only one, or the smallest and the largest."""
    texts = [f"{height}x{width}" for height, width in sorted(set(shapes), key=lambda shape: (math.prod(shape), shape))]
    return texts[0] if len(texts) == 1 else f"{len(texts)} sizes from {texts[0]} to {texts[-1]}"


def weights_text(ours: Detector, weights: str) -> str:
    """Return in words what a detector's weights are."""
    if not weights:
        return f"{ours.spec.arch} of random weights, norms calibrated"
    return f"{ours.spec.arch} of {weights}"


def _check_spec(spec: DetectorSpec) -> None:
    """Raise a ``UserError`` if torchvision has no Faster R-CNN like this one."""
    if not hasattr(torchvision.models.resnet, spec.arch):
        raise UserError(f"arch must be a ResNet of torchvision's, which it is compared with, got {spec.arch!r}")
    default = DetectorSpec(arch=spec.arch)
    differing = [
        f"{name}={getattr(spec, name)!r}"
        for name in DetectorSpec.model_fields
        if name not in (*_SHARED, *_TOLD) and getattr(spec, name) != getattr(default, name)
    ]
    if differing:
        raise UserError(f"the detector cannot be compared: torchvision's has nothing like {', '.join(differing)}")


@torch.no_grad()
def _spread_scores(model: Detector, images: list[Tensor]) -> None:
    """Scale the class scores of random heads."""
    scores: list[Tensor] = []
    layer = model.roi_heads.box_predictor.cls_score
    assert isinstance(layer, nn.Linear)
    handle = layer.register_forward_hook(lambda _module, _inputs, output: scores.append(output))
    try:
        model(images)
    finally:
        handle.remove()
    scale = 1 / scores[0].std()
    layer.weight.mul_(scale)
    layer.bias.mul_(scale)
