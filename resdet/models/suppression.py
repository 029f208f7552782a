"""What to do with detections that overlap, beyond dropping them: soft-NMS, box voting.

Legend: ``N`` candidates of one image, all classes together; ``M`` of them kept; ``G`` groups of ``S`` places.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    *,
    decay: Literal["linear", "gaussian"],
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """Lower the scores of boxes that overlap better ones, where non-maximum suppression would drop them.

    The best box of a group is taken, the scores of the others decay by their IoU with it, and so on. The groups are
    independent and are gone through side by side, so that the cost is that of the largest: at most ``limit`` steps on
    ``[G, S]``.

    Args:
        boxes: ``[N, 4]``.
        scores: ``[N]``, in [0, 1].
        groups: int64 ``[N]``: only boxes of one group lower each other's scores.
        decay: ``"linear"`` multiplies by ``1 - IoU`` from ``iou_threshold`` on, ``"gaussian"`` by
            ``exp(-IoU ** 2 / sigma)`` always.
        iou_threshold: Of the linear decay, in [0, 1].
        sigma: Of the Gaussian decay.
        score_threshold: Boxes whose score falls below it are dropped; above 0.
        limit: Boxes to keep, over all groups.

    Returns:
        Which candidates are kept, int64 ``[M]``, and their scores ``[M]``, falling.

    Source: Bodla et al., "Soft-NMS - Improving Object Detection With One Line of Code" (arXiv:1704.04503), equations 1
    and 3 and figure 2.
    """
    rows, valid = _by_group(groups)
    left = torch.where(valid, scores[rows], -1)
    candidates = boxes[rows]
    areas = _area(candidates)
    group = torch.arange(len(rows), device=rows.device)
    kept: list[Tensor] = []
    kept_scores: list[Tensor] = []
    # Scores never rise, so a group's first picks are its best, and none has more than `limit` among the best overall.
    for _ in range(min(rows.shape[1], limit) if len(rows) else 0):
        best_scores, places = left.max(dim=1)
        going_on = best_scores >= score_threshold
        if not going_on.any():
            break
        kept.append(rows[group, places][going_on])
        kept_scores.append(best_scores[going_on])
        best, best_areas = candidates[group, places][:, None], areas[group, places][:, None]
        sides = torch.minimum(best[..., 2:], candidates[..., 2:]) - torch.maximum(best[..., :2], candidates[..., :2])
        shared = sides.clamp(min=0).prod(dim=2)
        # A box without extent has a union of 0 with its like.
        iou = shared / (best_areas + areas - shared).clamp(min=torch.finfo(shared.dtype).tiny)
        if decay == "linear":
            left = torch.where(iou >= iou_threshold, left * (1 - iou), left)
        else:
            left = left * torch.exp(-iou.square() / sigma)
        left[group, places] = -1
    if not kept:
        return groups.new_empty(0), scores.new_empty(0)
    final, order = torch.cat(kept_scores).sort(descending=True, stable=True)
    return torch.cat(kept)[order[:limit]], final[:limit]


def vote(
    kept_boxes: Tensor,
    kept_labels: Tensor,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    iou_threshold: float,
) -> Tensor:
    """Replace each kept box by the mean of the candidates of its class around it, weighted by their scores.

    Args:
        kept_boxes: ``[M, 4]``.
        kept_labels: int64 ``[M]``.
        boxes: ``[N, 4]``: the candidates, kept ones among them.
        scores: ``[N]``, in [0, 1].
        labels: int64 ``[N]``.
        iou_threshold: A candidate votes if its IoU with the kept box is at least this.

    Returns:
        ``[M, 4]``; a box for which nothing votes stays what it is.

    Source: Gidaris and Komodakis, "Object detection via a multi-region & semantic segmentation-aware CNN model"
        (arXiv:1505.01749), section 4. As there, scores stay what they are.
    """
    votes = (box_iou(kept_boxes, boxes) >= iou_threshold) & (kept_labels[:, None] == labels)
    # In float64, which autocast leaves alone: in bfloat16 the mean of a corner at 800 would be known to 4 pixels.
    weights = votes * scores.double()
    total = weights.sum(dim=1, keepdim=True)
    means = weights @ boxes.double() / total
    return torch.where(total > 0, means, kept_boxes.double()).to(kept_boxes.dtype)


def _by_group(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Give the members of each group as rows ``[G, S]`` of candidates, and which of the places are taken."""
    order = torch.argsort(groups, stable=True)
    _, counts = torch.unique(groups, return_counts=True)
    size = int(counts.max()) if len(counts) else 0
    place = torch.arange(size, device=groups.device)
    valid = place < counts[:, None]
    rows = groups.new_zeros(len(counts), size)
    rows[valid] = order
    return rows, valid


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
