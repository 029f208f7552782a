"""Test-time tricks: more computation for each image, for better detections from the same weights.

Each view of the images (a size, mirrored or not) passes through the network, its boxes pass through the box head as
often as is asked for, and the detections of all views are merged before non-maximum suppression.

Measured on BCCD (blood cells, 640x480; 87 images of val, 72 of test) with a ResNet-101 trained at 416 pixels alone. AP
is COCO's, in percent; a difference of half a point is within chance. Time is the processor's, in float32 on two cores;
1.0 is 1.1 core-seconds for an image::

                                               AP val   AP test   time
    no tricks                                    59.0      59.4    1.0
    voting=0.9                                   59.7      60.1    1.0
    refine=1                                     59.5      59.4    1.3
    refine=1 voting=0.9                          59.8      59.9    1.3
    refine=1 voting=0.8                          59.0      60.0    1.3
    refine=1 voting=0.5 nms_threshold=0.3        58.4      59.0    1.3
    nms=soft-linear                              59.9      60.5    1.0
    nms=soft-gaussian                            60.0      60.5    1.0
    nms=soft-linear voting=0.9                   60.5      61.0    1.0
    flip=true                                    59.4      59.9    2.0
    flip=true nms=soft-linear voting=0.9         60.5      61.2    2.0
    scales=[384, 416]                            58.3              1.9
    scales=[416, 512]                            58.2
    class_agnostic=true                          59.0      59.4    1.0

The settings of the ResNet paper (sixth line) were used with 300 proposals, not 1000. With 300 they gain, from 58.9 to
59.0 and from 59.3 to 59.7. The more proposals, the more loose boxes vote: those of an IoU of 0.5 to 0.8 with a
detection have a seventh of the votes, and an IoU with the object of 0.67 where those above 0.9 have 0.85. More sizes
help models that were trained at several: this one has an AP of 57.4 at 384 pixels and 53.6 at 512.

Legend: ``N`` boxes, ``K`` foreground classes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image

from resdet.devices import send
from resdet.errors import UserError
from resdet.models.spec import Tricks
from resdet.models.suppression import soft_nms, vote
from resdet.types import Prediction

# Soft-NMS keeps boxes whose score has decayed below the model's own threshold: they are the recall it is for. This is
# where the authors' code stops.
_SOFT_SCORE_THRESHOLD = 0.001


def detect_with_tricks(model: nn.Module, images: Sequence[Tensor], tricks: Tricks) -> list[Prediction]:
    """Detect objects as ``model(images)`` does, with tricks; without any the model itself is called.

    The model is a ``Detector`` or any torchvision ``FasterRCNN`` in evaluation mode, images are as it takes them
    (``model_images``). Its thresholds of score and size, and its limit of detections for an image, hold here too. With
    tricks, boxes and scores are float32.

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), appendix B, for box refinement
        and multi-scale testing. Deviations: there features of two adjacent scales are merged by maxout for each box,
        proposals being those of one scale; here, as in detectron2's ``GeneralizedRCNNWithTTA``, each size is a
        detection of its own and their boxes are merged. Unlike there, they are so before non-maximum suppression and
        not after it, because boxes vote.
    """
    if tricks == Tricks():
        predictions: list[Prediction] = model(list(images))
        return predictions
    if not isinstance(model, GeneralizedRCNN) or not isinstance(model.roi_heads, RoIHeads):
        raise UserError(
            "test-time tricks need the parts of a two-stage detector of torchvision's (FasterRCNN or a subclass), got "
            f"{type(model).__name__}"
        )
    fixed = model.transform.fixed_size
    if tricks.scales and fixed is not None:
        raise UserError(f"tricks.scales has no meaning for a model that scales every image to one size, {fixed}")
    found: list[list[Prediction]] = [[] for _ in images]
    for scale in tricks.scales or (None,):
        for mirrored in (False, True) if tricks.flip else (False,):
            view = [image.flip(-1) for image in images] if mirrored else list(images)
            with _unsuppressed(model, scale):
                rounds = _candidates(model, view, tricks.refine)
            for predictions in rounds:
                for image, candidates, prediction in zip(images, found, predictions, strict=True):
                    if mirrored:
                        prediction["boxes"] = mirror_boxes(prediction["boxes"], image.shape[-1])
                    candidates.append(prediction)
    heads = model.roi_heads
    threshold = heads.nms_thresh if tricks.nms_threshold is None else tricks.nms_threshold
    # On the CPU: soft-NMS is a hundred short steps that each ask for a result.
    merged = [
        merge(
            [_moved(part, torch.device("cpu")) for part in candidates],
            tricks,
            nms_threshold=threshold,
            limit=heads.detections_per_img,
        )
        for candidates in found
    ]
    return [_moved(one, image.device) for one, image in zip(merged, images, strict=True)]


def merge(candidates: Sequence[Prediction], tricks: Tricks, *, nms_threshold: float, limit: int) -> Prediction:
    """Choose the detections of one image, by falling score, among candidates of all views and rounds.

    Source: the order of steps is that of He et al. (arXiv:1512.03385), appendix B: suppression, then box voting.
    """
    boxes = torch.cat([part["boxes"] for part in candidates])
    scores = torch.cat([part["scores"] for part in candidates])
    labels = torch.cat([part["labels"] for part in candidates])
    groups = torch.zeros_like(labels) if tricks.class_agnostic else labels
    if tricks.nms == "hard":
        keep = batched_nms(boxes, scores, groups, nms_threshold)[:limit]
        kept_scores = scores[keep]
    else:
        keep, kept_scores = soft_nms(
            boxes,
            scores,
            groups,
            decay="linear" if tricks.nms == "soft-linear" else "gaussian",
            iou_threshold=nms_threshold,
            sigma=tricks.nms_sigma,
            score_threshold=_SOFT_SCORE_THRESHOLD,
            limit=limit,
        )
    kept_boxes, kept_labels = boxes[keep], labels[keep]
    if tricks.voting is not None:
        kept_boxes = vote(kept_boxes, kept_labels, boxes, scores, labels, iou_threshold=tricks.voting)
    return Prediction(boxes=kept_boxes, labels=kept_labels, scores=kept_scores)


def _moved(prediction: Prediction, device: torch.device) -> Prediction:
    boxes, scores, labels = (send(prediction[key], device) for key in ("boxes", "scores", "labels"))
    return Prediction(boxes=boxes, scores=scores, labels=labels)


def mirror_boxes(boxes: Tensor, width: int) -> Tensor:
    """Return boxes ``[N, 4]`` as they lie after an image of this width is mirrored: ``x`` becomes ``width - x``."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


def _candidates(model: GeneralizedRCNN, images: list[Tensor], num_refinements: int) -> list[list[Prediction]]:
    """Run the model; return the detections of each round in each image, in pixels of the image as it was passed."""
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    batch, _ = model.transform(images)
    features = model.backbone(batch.tensors)
    if isinstance(features, Tensor):
        features = {"0": features}
    proposals, _ = model.rpn(batch, features)
    heads = model.roi_heads
    rounds: list[list[Prediction]] = []
    while True:
        pooled = heads.box_roi_pool(features, proposals, batch.image_sizes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        columns = heads.postprocess_detections(logits, deltas, proposals, batch.image_sizes)
        found = [
            {"boxes": boxes.float(), "scores": scores.float(), "labels": labels}
            for boxes, scores, labels in zip(*columns, strict=True)
        ]
        rounds.append(model.transform.postprocess(found, batch.image_sizes, sizes))
        if len(rounds) > num_refinements:
            return rounds
        # RoIAlign would read beyond its maps for boxes that are NaN; whoever runs the model sees the outputs above.
        if not (logits.isfinite().all() & deltas.isfinite().all()):  # waits for the device
            return rounds
        proposals = _best_boxes(heads, logits, deltas, proposals, batch.image_sizes)


def _best_boxes(
    heads: RoIHeads, logits: Tensor, deltas: Tensor, proposals: list[Tensor], image_sizes: list[tuple[int, int]]
) -> list[Tensor]:
    """Return for each proposal the box that it becomes as an object of its likeliest class, background aside.

    One box for each proposal, as in the paper, where 300 predictions give 300 new ones.
    """
    likeliest = logits[:, 1:].argmax(dim=1) + 1  # [N]
    decoded = heads.box_coder.decode(deltas, proposals).reshape(len(logits), logits.shape[1], 4)  # [N, K + 1, 4]
    boxes = decoded[torch.arange(len(logits), device=logits.device), likeliest]
    parts = boxes.split([len(part) for part in proposals])
    return [clip_boxes_to_image(part, size) for part, size in zip(parts, image_sizes, strict=True)]


@contextmanager
def detections_limited(model: nn.Module, limit: int | None) -> Iterator[None]:
    """Let a ``FasterRCNN`` return up to ``limit`` detections of an image, from no fewer proposals.

    None leaves it as it was built, and other models return what they return.
    """
    if limit is not None and limit < 1:
        raise UserError(f"max_detections must be at least 1, got {limit}")
    if limit is None or not isinstance(model, GeneralizedRCNN) or not isinstance(model.roi_heads, RoIHeads):
        yield
        return
    rpn, heads = model.rpn, model.roi_heads
    own = heads.detections_per_img, rpn._pre_nms_top_n, rpn._post_nms_top_n
    heads.detections_per_img = limit
    rpn._pre_nms_top_n, rpn._post_nms_top_n = (
        {**numbers, "testing": max(numbers["testing"], limit)} for numbers in own[1:]
    )
    try:
        yield
    finally:
        heads.detections_per_img, rpn._pre_nms_top_n, rpn._post_nms_top_n = own


@contextmanager
def _unsuppressed(model: GeneralizedRCNN, scale: int | None) -> Iterator[None]:
    """Let a model return everything that passes its thresholds, and scale the shorter side to another length."""
    transform, heads = model.transform, model.roi_heads
    own = transform.min_size, transform.max_size, heads.nms_thresh, heads.detections_per_img
    if scale is not None:
        transform.max_size = transform.max_size * scale / transform.min_size[-1]
        transform.min_size = (scale,)
    heads.nms_thresh, heads.detections_per_img = float("inf"), sys.maxsize
    try:
        yield
    finally:
        transform.min_size, transform.max_size, heads.nms_thresh, heads.detections_per_img = own
