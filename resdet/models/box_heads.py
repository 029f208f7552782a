"""The box heads of Faster R-CNN: torchvision's, with options that torchvision does not expose.

Legend: ``N`` proposals of all images, ``M`` of one, ``K`` foreground classes, ``C`` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from resdet.models.convolution import linear_relu
from resdet.models.losses import box_head_losses
from resdet.models.proposals import LEAST_SIDE
from resdet.models.ready_weights import KeepsReadyWeights
from resdet.models.seeded import Sampler, plain_sampler
from resdet.models.spec import DetectorSpec
from resdet.models.tracing import scripted_as
from resdet.precision import widened

FOUND_IOU = 0.5  # from which a proposal has found an object, where training counts that


class Conv5Head(nn.Module):
    """Stage 4 of a ResNet on each proposal, averaged over its pixels. Source: detectron2's ``Res5ROIHeads``."""

    def __init__(self, layer4: nn.Sequential) -> None:
        super().__init__()
        self.layer4 = layer4  # named as in the body it was taken from

    def forward(self, x: Tensor) -> Tensor:
        """Turn C4 features of proposals, ``[N, C, 14, 14]``, into vectors ``[N, 2 * C]``."""
        vectors: Tensor = self.layer4(x).mean(dim=[2, 3])  # [N, 2 * C, 7, 7] -> [N, 2 * C]
        return vectors


class FastBoxHead(KeepsReadyWeights, TwoMLPHead):  # type: ignore[misc]
    """torchvision's two fully connected layers, with kept weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Turn what was pooled for the proposals, ``[N, C, 7, 7]``, into vectors ``[N, box_head_channels]``."""
        vectors = linear_relu(x.flatten(start_dim=1), self.fc6, self, "fc6")
        return linear_relu(vectors, self.fc7, self, "fc7")

    def __prepare_scriptable__(self) -> TwoMLPHead:
        return scripted_as(self, TwoMLPHead)


class BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """torchvision's predictor, its outputs in float32 at least, so that boxes are decoded in it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute class scores ``[N, K + 1]`` and deltas ``[N, 4 * (K + 1)]`` for vectors ``[N, C]``."""
        x = x.flatten(start_dim=1)
        scores, deltas = self.cls_score(x), self.bbox_pred(x)
        return scores.to(widened(scores.dtype)), deltas.to(widened(deltas.dtype))


class InferenceBoxHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's box heads outside training, with a choice of the least side; what TorchScript takes.

    ``box_min_size=0`` drops boxes without extent at the end, where they have taken the places of others, as in
    detectron2.
    """

    def __init__(self, pool: nn.Module, head: nn.Module, predictor: nn.Module, spec: DetectorSpec) -> None:
        super().__init__(
            pool,
            head,
            predictor,
            spec.box_fg_iou_thresh,
            spec.box_bg_iou_thresh,
            spec.box_batch_size_per_image,
            spec.box_positive_fraction,
            None,
            spec.box_score_thresh,
            spec.box_nms_thresh,
            spec.box_detections_per_img,
        )
        self.min_size = spec.box_min_size
        self.least_side = LEAST_SIDE

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detect objects around the proposals ``[M, 4]`` of each image, best first."""
        pooled = self.box_roi_pool(features, proposals, image_shapes)  # [N, C, 7, 7], N proposals of all images
        class_logits, box_regression = self.box_predictor(self.box_head(pooled))
        boxes, scores, labels = self.postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        detections: list[dict[str, Tensor]] = []
        for image in range(len(boxes)):
            detections.append({"boxes": boxes[image], "labels": labels[image], "scores": scores[image]})
        losses: dict[str, Tensor] = {}
        return detections, losses

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Choose the detections of each image: boxes ``[D, 4]``, scores ``[D]`` and labels ``[D]``, best first."""
        counts = [boxes.shape[0] for boxes in proposals]
        decoded = torch.split(self.box_coder.decode(box_regression, proposals), counts)  # [M, K + 1, 4]
        probabilities = torch.split(torch.softmax(class_logits, -1), counts)  # [M, K + 1]

        all_boxes: list[Tensor] = []
        all_scores: list[Tensor] = []
        all_labels: list[Tensor] = []
        for boxes, scores, shape in zip(decoded, probabilities, image_shapes):  # noqa: B905
            labels = torch.arange(scores.shape[1], device=scores.device).view(1, -1).expand_as(scores)
            boxes = clip_boxes_to_image(boxes, shape)[:, 1:].reshape(-1, 4)  # [M, K + 1, 4] -> [M * K, 4]
            scores, labels = scores[:, 1:].reshape(-1), labels[:, 1:].reshape(-1)  # [M * K]
            keep = torch.where(scores > self.score_thresh)[0]  # waits for the device, as the two choices below do
            keep = keep[remove_small_boxes(boxes[keep], self.min_size)]
            boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
            keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            if self.min_size == 0:
                keep = keep[remove_small_boxes(boxes[keep], self.least_side)]
            all_boxes.append(boxes[keep])
            all_scores.append(scores[keep])
            all_labels.append(labels[keep])
        return all_boxes, all_scores, all_labels


class BoxHeads(InferenceBoxHeads):
    """The same heads, which are also trained, with a choice of losses and counts of what proposals found."""

    def __init__(self, pool: nn.Module, head: nn.Module, predictor: nn.Module, spec: DetectorSpec) -> None:
        super().__init__(pool, head, predictor, spec)
        self.fg_bg_sampler = Sampler(spec.box_batch_size_per_image, spec.box_positive_fraction)
        self.num_found = torch.zeros(0, dtype=torch.int64)  # of each image of the last training batch, objects found
        self.num_objects = 0  # of that batch
        self.class_loss, self.box_loss = spec.class_loss, spec.box_loss
        self.class_weights = None if spec.class_weights is None else torch.tensor(spec.class_weights)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detect objects, or in training compute the two losses."""
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, _, labels, regression_targets = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)  # [N, C, 7, 7], 512 of each image
        class_logits, box_regression = self.box_predictor(self.box_head(pooled))  # [N, K + 1], [N, 4 * (K + 1)]
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
        """Append the objects themselves to the proposals; before that, count what the proposals found."""
        with torch.no_grad():
            self.num_objects = sum(len(objects) for objects in gt_boxes)
            ious = [box_iou(objects, boxes) for boxes, objects in zip(proposals, gt_boxes, strict=True)]
            found = [  # of [objects, M]
                (iou.max(dim=1).values >= FOUND_IOU).sum() if iou.numel() else iou.new_zeros((), dtype=torch.int64)
                for iou in ious
            ]
            self.num_found = torch.stack(found)
        return [torch.cat((boxes, objects)) for boxes, objects in zip(proposals, gt_boxes, strict=True)]

    def __prepare_scriptable__(self) -> InferenceBoxHeads:
        plain = scripted_as(self, InferenceBoxHeads)
        plain.fg_bg_sampler = plain_sampler(self.fg_bg_sampler)
        return plain
