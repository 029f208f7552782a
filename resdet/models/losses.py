"""Losses of the box head that torchvision lacks: focal and class-balanced scores, boxes by GIoU.

Legend: ``N`` sampled proposals of all images, ``K`` foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import generalized_box_iou_loss

from resdet.devices import constant
from resdet.models.spec import BoxLoss, ClassLoss

# How much focal lowers the weight of what is already right (Lin et al. 2017, section 3.2: best of those tried).
FOCAL_GAMMA = 2.0


def box_head_losses(
    class_logits: Tensor,  # [N, K + 1]
    box_regression: Tensor,  # [N, 4 * (K + 1)]
    labels: list[Tensor],  # of each image [M]; 0 is the background
    regression_targets: list[Tensor],  # of each image [M, 4]
    proposals: list[Tensor],  # of each image [M, 4]
    box_coder: BoxCoder,
    *,
    class_loss: ClassLoss,
    box_loss: BoxLoss,
    class_weights: Tensor | None,  # [K + 1]
) -> tuple[Tensor, Tensor]:
    """Compute the losses of the scores and of the boxes, scalars.

    With ``cross_entropy``, ``smooth_l1`` and no weights torchvision's own function runs.

    * ``focal`` multiplies each proposal's cross entropy by ``(1 - p) ** 2``, ``p`` the probability of its own class.
      Source: Lin et al. 2017, equation 4. Deviations: over a softmax of all classes and the background, as the heads of
      Faster R-CNN have it, and a mean over all proposals, as they are sampled (the paper has every anchor, and divides
      by the positives).
    * ``giou`` is ``1 - GIoU`` of decoded boxes (Rezatofighi et al. 2019, section 3.3), summed over the positives and
      divided by all proposals like smooth L1. Source: detectron2's ``box_reg_loss_type="giou"``.
    * ``class_weights`` weigh cross entropy and focal alike; ``class_balanced_weights`` computes them.
    """
    if class_loss == "cross_entropy" and box_loss == "smooth_l1" and class_weights is None:
        scores_loss, boxes_loss = fastrcnn_loss(class_logits, box_regression, labels, regression_targets)
        return scores_loss, boxes_loss

    label = torch.cat(labels)
    return masked_box_losses(
        class_logits,
        box_regression,
        label,
        torch.cat(regression_targets),
        torch.cat(proposals),
        torch.ones_like(label, dtype=torch.bool),
        box_coder,
        class_loss=class_loss,
        box_loss=box_loss,
        class_weights=class_weights,
    )


def masked_box_losses(
    class_logits: Tensor,  # [N, K + 1]
    box_regression: Tensor,  # [N, 4 * (K + 1)]
    labels: Tensor,  # int64 [N]; 0 is the background
    regression_targets: Tensor,  # [N, 4]; those of the background may be anything
    proposals: Tensor,  # [N, 4]
    used: Tensor,  # bool [N]: rows that count
    box_coder: BoxCoder,
    *,
    class_loss: ClassLoss,
    box_loss: BoxLoss,
    class_weights: Tensor | None,  # [K + 1]
) -> tuple[Tensor, Tensor]:
    """Compute ``box_head_losses`` of the rows that count, without looking at which these are."""
    each = F.cross_entropy(class_logits, labels, reduction="none")  # [N]
    if class_loss == "focal":
        each = each * (1 - torch.exp(-each)) ** FOCAL_GAMMA
    weights = used.to(each) if class_weights is None else class_weights.to(each)[labels] * used
    scores_loss = (each * weights).sum() / weights.sum()

    positive = ((labels > 0) & used)[:, None]  # [N, 1]
    # Targets of the background may be infinite, and even times 0 that is NaN.
    regression_targets = torch.where(positive, regression_targets, 0)
    own = labels[:, None, None].expand(-1, 1, 4)
    deltas = box_regression.view(len(labels), -1, 4).gather(1, own)[:, 0]  # [N, K + 1, 4] -> [N, 4]
    if box_loss == "smooth_l1":
        each = F.smooth_l1_loss(deltas, regression_targets, beta=1 / 9, reduction="none")  # [N, 4]
        boxes_loss = (each * positive).sum()
    else:
        # A proposal without extent, as unused rows have, would make a gradient of NaN, and NaN times 0 is NaN.
        anchors = torch.where(positive, proposals, constant((0.0, 0.0, 1.0, 1.0), proposals.dtype, proposals.device))
        found, wanted = (box_coder.decode_single(part, anchors) for part in (deltas, regression_targets))  # [N, 4]
        boxes_loss = (generalized_box_iou_loss(found, wanted, reduction="none") * positive[:, 0]).sum()
    return scores_loss, boxes_loss / used.sum()


def class_balanced_weights(num_boxes: Sequence[int], beta: float) -> list[float]:
    """Weigh each class by its effective number of boxes, ``[K + 1]`` with the background's first.

    The foreground's weights are proportional to ``(1 - beta) / (1 - beta ** n)`` with a mean of 1; the background's is
    1. With a ``beta`` of 0 all classes weigh alike, towards 1 each by the inverse of its boxes. A class without boxes
    is weighed as one that has one.

    Source: Cui et al. 2019, equation 2. Deviation: the background is left out of the balance, as its share is decided
        by the sampling of proposals.
    """
    effective = [(1 - beta) / (1 - beta ** max(n, 1)) for n in num_boxes]
    mean = sum(effective) / len(effective)
    return [1.0, *(value / mean for value in effective)]
