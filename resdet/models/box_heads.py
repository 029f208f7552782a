"""The box heads of Faster R-CNN: torchvision's, with options that torchvision does not expose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from resdet.models.losses import box_head_losses
from resdet.models.proposals import _LEAST_SIDE
from resdet.models.seeded import Sampler
from resdet.models.spec import BoxLoss, ClassLoss
from resdet.models.tracing import is_scripting
from resdet.precision import widened

FOUND_IOU = 0.5
"""IoU from which a proposal has found an object, where training counts that."""


class Conv5Head(nn.Module):
    """Stage 4 of a ResNet on each proposal, and the mean over what it gives.

    Args:
        layer4: The stage; named as in the body it was taken from.

    Source: detectron2's ``Res5ROIHeads``.
    """

    def __init__(self, layer4: nn.Sequential) -> None:
        super().__init__()
        self.layer4 = layer4

    def forward(self, x: Tensor) -> Tensor:
        """Turn C4 features of proposals, ``[N, C, 14, 14]``, into vectors ``[N, 2 * C]``."""
        vectors: Tensor = self.layer4(x).mean(dim=[2, 3])
        return vectors


class BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """torchvision's predictor, its outputs in float32 at least, so that boxes are decoded in it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give class scores ``[N, K + 1]`` and deltas ``[N, 4 * (K + 1)]`` for vectors ``[N, C]``."""
        x = x.flatten(start_dim=1)
        scores, deltas = self.cls_score(x), self.bbox_pred(x)
        return scores.to(widened(scores.dtype)), deltas.to(widened(deltas.dtype))


class BoxHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's box heads, with a choice of the losses and of the least side.

    Args:
        pool: As for torchvision's, like all that follow but the last four.
        head: Turns pooled features into vectors.
        predictor: Turns vectors into class scores and boxes.
        fg_iou_thresh: IoU from which a proposal is a positive.
        bg_iou_thresh: IoU below which it is a negative.
        batch_size_per_image: Proposals trained on.
        positive_fraction: Share of positives among them.
        score_thresh: Detections that do not exceed it are dropped.
        nms_thresh: IoU above which the weaker of two detections of a class is dropped.
        detections_per_img: Detections of an image that are kept.
        min_size: Detections with a side below it are dropped before non-maximum suppression, in pixels; with 0 those
            without extent are dropped at the end, where they have taken the places of others, as in detectron2.
        class_loss: How scores are judged in training; see ``resdet.models.losses``.
        box_loss: How boxes are judged.
        class_weights: ``K + 1`` weights of the classes in the loss of the scores, or None for torchvision's.
    """

    def __init__(
        self,
        pool: MultiScaleRoIAlign,
        head: nn.Module,
        predictor: nn.Module,
        *,
        fg_iou_thresh: float,
        bg_iou_thresh: float,
        batch_size_per_image: int,
        positive_fraction: float,
        score_thresh: float,
        nms_thresh: float,
        detections_per_img: int,
        min_size: float,
        class_loss: ClassLoss = "cross_entropy",
        box_loss: BoxLoss = "smooth_l1",
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            pool,
            head,
            predictor,
            fg_iou_thresh,
            bg_iou_thresh,
            batch_size_per_image,
            positive_fraction,
            None,
            score_thresh,
            nms_thresh,
            detections_per_img,
        )
        self.fg_bg_sampler = Sampler(batch_size_per_image, positive_fraction)
        self.min_size = min_size
        self.least_side = _LEAST_SIDE
        self.num_found: list[Tensor] = []
        self.num_objects = 0
        self.class_loss, self.box_loss = class_loss, box_loss
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Give detections, or in training the losses.

        Args:
            features: Levels of the pyramid by name.
            proposals: ``[M, 4]`` for each image.
            image_shapes: ``(height, width)`` of each image.
            targets: Boxes and labels of each image, in training.

        Returns:
            For each image ``boxes``, ``labels`` and ``scores``, best first (none in training); and ``loss_classifier``
            and ``loss_box_reg`` (in training only).
        """
        if is_scripting() or not self.training:
            return self._detect(features, proposals, image_shapes)
        return self._train(features, proposals, image_shapes, targets)

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        vectors = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_regression = self.box_predictor(vectors)
        boxes, scores, labels = self.postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        detections: list[dict[str, Tensor]] = []
        for image in range(len(boxes)):
            detections.append({"boxes": boxes[image], "labels": labels[image], "scores": scores[image]})
        losses: dict[str, Tensor] = {}
        return detections, losses

    @torch.jit.unused
    def _train(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        proposals, _, labels, regression_targets = self.select_training_samples(proposals, targets)
        vectors = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_regression = self.box_predictor(vectors)
        scores_loss, boxes_loss = box_head_losses(
            class_logits,
            box_regression,
            labels,
            regression_targets,
            proposals,
            self.box_coder,
            class_loss=self.class_loss,
            box_loss=self.box_loss,
            class_weights=self.class_weights,
        )
        return [], {"loss_classifier": scores_loss, "loss_box_reg": boxes_loss}

    def add_gt_proposals(self, proposals: list[Tensor], gt_boxes: list[Tensor]) -> list[Tensor]:
        """Give the proposals with the objects themselves behind them; before that, count what they found alone."""
        if not is_scripting():
            self._count_found(proposals, gt_boxes)
        return [torch.cat((boxes, objects)) for boxes, objects in zip(proposals, gt_boxes)]  # noqa: B905

    @torch.jit.unused
    @torch.no_grad()
    def _count_found(self, proposals: list[Tensor], gt_boxes: list[Tensor]) -> None:
        self.num_objects = sum(len(objects) for objects in gt_boxes)
        ious = [box_iou(objects, boxes) for boxes, objects in zip(proposals, gt_boxes, strict=True)]
        self.num_found = [
            (iou.max(dim=1).values >= FOUND_IOU).sum() if iou.numel() else iou.new_zeros((), dtype=torch.int64)
            for iou in ious
        ]

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Choose the detections of each image.

        Args:
            class_logits: ``[N, K + 1]``, proposals of all images.
            box_regression: ``[N, 4 * (K + 1)]``.
            proposals: ``[M, 4]`` of each image.
            image_shapes: ``(height, width)`` of each image, to which its detections are clipped.

        Returns:
            Boxes, scores and labels, each with one tensor an image, best first.
        """
        num_classes = class_logits.shape[-1]
        counts = [boxes.shape[0] for boxes in proposals]
        decoded = torch.split(self.box_coder.decode(box_regression, proposals), counts)
        probabilities = torch.split(torch.softmax(class_logits, -1), counts)

        all_boxes: list[Tensor] = []
        all_scores: list[Tensor] = []
        all_labels: list[Tensor] = []
        for boxes, scores, shape in zip(decoded, probabilities, image_shapes):  # noqa: B905
            labels = torch.arange(num_classes, device=class_logits.device).view(1, -1).expand_as(scores)
            boxes = clip_boxes_to_image(boxes, shape)[:, 1:].reshape(-1, 4)
            scores, labels = scores[:, 1:].reshape(-1), labels[:, 1:].reshape(-1)
            keep = torch.where(scores > self.score_thresh)[0]
            boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
            keep = remove_small_boxes(boxes, self.min_size)
            boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
            keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
            if self.min_size == 0:
                keep = remove_small_boxes(boxes, self.least_side)
                boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
            all_boxes.append(boxes)
            all_scores.append(scores)
            all_labels.append(labels)
        return all_boxes, all_scores, all_labels
