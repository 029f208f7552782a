"""Build Faster R-CNN by torchvision's convention for its builders."""

from __future__ import annotations

import os

from resdet.errors import UserError, WeightsError
from resdet.models.checkpoint import class_scores, describe_detector, log_assumed_settings
from resdet.models.detector import Detector, build_detector
from resdet.models.loading import load_strictly
from resdet.models.spec import DetectorSpec, WeightsOrigin
from resdet.weights.files import read_weights
from resdet.weights.source import WeightsSource, fetch


def fasterrcnn_resnet101_fpn(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: WeightsSource = None,
    trainable_backbone_layers: int = 3,
    spec: DetectorSpec | None = None,
    origin: WeightsOrigin | None = None,
) -> Detector:
    """Build Faster R-CNN on a ResNet-101 with FPN, by torchvision's convention for its builders.

    Args:
        weights: A whole detector's weights: a file or URL of a checkpoint of ours, of a state dict of torchvision's
            FasterRCNN of this shape, or of another library's Faster R-CNN (see ``load_detector``).
            ``weights_backbone`` is ignored then.
        num_classes: The background counts. By default what ``weights`` has, or else 91 (COCO).
        weights_backbone: First weights of the body: None (random), a torchvision weight name or enum, a file or a URL.
        trainable_backbone_layers: How many stages of the body take gradients, 0 to 5; see ``resnet_fpn``.
        spec: Everything else; by default that of the checkpoint, or else ``DetectorSpec()``.
        origin: What is known of ``weights`` or ``weights_backbone``, where the file does not say it.

    Raises:
        UserError: If an argument is out of its range.
        WeightsError: If the weights cannot be had, or are for another model or number of classes.
    """
    for name, required in (("arch", "resnet101"), ("layout", "fpn")):
        if spec is not None and (given := getattr(spec, name)) != required:
            raise UserError(f"spec.{name} must be {required!r} here, got {given!r}; build_detector takes any")
    if weights is None:
        return build_detector(
            spec or DetectorSpec(),
            num_classes=91 if num_classes is None else num_classes,
            weights_backbone=weights_backbone,
            trainable_layers=trainable_backbone_layers,
            origin=origin,
        )
    path = fetch(os.fspath(weights)) if "://" in os.fspath(weights) else weights
    file = describe_detector(read_weights(path, origin))
    found = len(class_scores(file))
    if num_classes not in (None, found):
        raise WeightsError(
            f"{file.path}: was made for {found} classes (background included), num_classes is {num_classes}"
        )
    if spec is None:
        spec = file.spec or DetectorSpec(**file.settings)
        log_assumed_settings(file, spec)
    model = build_detector(
        spec, num_classes=found, trainable_layers=trainable_backbone_layers, categories=file.categories
    )
    load_strictly(model, file, what=f"this {spec.arch} detector")
    model.score_threshold = file.score_threshold
    return model
