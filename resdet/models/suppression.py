"""Boxes that overlap: suppression of many groups at once, soft-NMS, box voting.

Legend: ``N`` candidates of one image, all classes together; ``M`` of them kept; ``G`` groups of up to ``S`` members.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, nms

from resdet.models.tracing import is_captured

# From this many numbers in an image's boxes on torchvision goes through the groups one by one, on a CPU.
_MANY = 4000


def suppress(boxes: list[Tensor], scores: list[Tensor], groups: list[Tensor], iou_threshold: float) -> list[Tensor]:
    """Suppress boxes that overlap better ones of their group, in several images.

    The result is that of torchvision's ``batched_nms`` for each image, which runs on one core of a CPU; here the groups
    of all images are shared out to as many threads as torch has. Measured on 2 cores, the proposals of two images in
    training, 2,000 of each level: 28 ms, clipping and sorting out included, where the operator alone had taken 48.

    Boxes are ``[N, 4]`` of each image. Returns the indices of what is left in each, int64, by falling score.
    """
    many = [not is_captured() and part.device.type == "cpu" and part.numel() > _MANY for part in boxes]
    tasks = [(image, group) for image in range(len(boxes)) if many[image] for group in torch.unique(groups[image])]

    def run(task: tuple[int, Tensor]) -> Tensor:
        image, group = task
        members = torch.where(groups[image] == group)[0]  # [members of the group]
        return members[nms(boxes[image][members], scores[image][members], iou_threshold)]

    kept: list[Tensor] = []
    if tasks:  # the operator releases Python's lock
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            kept = list(threads.map(run, tasks))
    results = []
    for image, image_scores in enumerate(scores):
        if many[image]:
            left = torch.cat([part for (owner, _), part in zip(tasks, kept, strict=True) if owner == image])
            left = left.sort()[0]  # among equal scores the first stays first
            results.append(left[image_scores[left].sort(descending=True)[1]])
        else:
            results.append(batched_nms(boxes[image], image_scores, groups[image], iou_threshold))
    return results


def soft_nms(
    boxes: Tensor,  # [N, 4]
    scores: Tensor,  # [N], in [0, 1]
    groups: Tensor,  # int64 [N]: only boxes of one group lower each other's scores
    *,
    decay: Literal["linear", "gaussian"],  # times 1 - IoU from the threshold on; times exp(-IoU ** 2 / sigma) always
    iou_threshold: float,  # of the linear decay, in [0, 1]
    sigma: float,  # of the Gaussian decay
    score_threshold: float,  # boxes whose score falls below it are dropped; above 0
    limit: int,  # boxes to keep, over all groups
) -> tuple[Tensor, Tensor]:
    """Lower the scores of boxes that overlap better ones, where non-maximum suppression would drop them.

    The best box of a group is taken, the scores of the others decay by their IoU with it, and so on. The groups are
    independent and are gone through side by side, so that the cost is that of the largest: at most ``limit`` steps on
    ``[G, S]``. Returns which candidates are kept, int64 ``[M]``, and their scores ``[M]``, falling.

    Source: Bodla et al., "Soft-NMS - Improving Object Detection With One Line of Code" (arXiv:1704.04503), equations 1
    and 3 and figure 2.
    """
    rows, valid = _by_group(groups)  # [G, S]
    left = torch.where(valid, scores[rows], -1)  # [G, S]
    candidates = boxes[rows]  # [G, S, 4]
    areas = (candidates[..., 2:] - candidates[..., :2]).prod(dim=2)  # [G, S]
    group = torch.arange(len(rows), device=rows.device)
    kept: list[Tensor] = []
    kept_scores: list[Tensor] = []
    # Scores never rise, so a group's first picks are its best, and none has more than `limit` among the best overall.
    for _ in range(min(rows.shape[1], limit) if len(rows) else 0):
        best_scores, members = left.max(dim=1)  # [G]
        going_on = best_scores >= score_threshold
        if not going_on.any():  # waits for the device, as the two masks below do
            break
        kept.append(rows[group, members][going_on])
        kept_scores.append(best_scores[going_on])
        best, best_areas = candidates[group, members][:, None], areas[group, members][:, None]  # [G, 1, 4], [G, 1]
        sides = torch.minimum(best[..., 2:], candidates[..., 2:]) - torch.maximum(best[..., :2], candidates[..., :2])
        shared = sides.clamp(min=0).prod(dim=2)  # [G, S]
        # A box without extent has a union of 0 with its like.
        iou = shared / (best_areas + areas - shared).clamp(min=torch.finfo(shared.dtype).tiny)
        if decay == "linear":
            left = torch.where(iou >= iou_threshold, left * (1 - iou), left)
        else:
            left = left * torch.exp(-iou.square() / sigma)
        left[group, members] = -1
    if not kept:
        return groups.new_empty(0), scores.new_empty(0)
    final, order = torch.cat(kept_scores).sort(descending=True, stable=True)
    return torch.cat(kept)[order[:limit]], final[:limit]


def vote(
    kept_boxes: Tensor,  # [M, 4]
    kept_labels: Tensor,  # [M]
    boxes: Tensor,  # [N, 4]: the candidates, kept ones among them
    scores: Tensor,  # [N], in [0, 1]
    labels: Tensor,  # [N]
    *,
    iou_threshold: float,  # from which a candidate votes
) -> Tensor:
    """Replace each kept box by the mean of the candidates of its class around it, weighted by their scores.

    A box for which nothing votes stays what it is.

    Source: Gidaris and Komodakis, "Object detection via a multi-region & semantic segmentation-aware CNN model"
        (arXiv:1505.01749), section 4. As there, scores stay what they are.
    """
    votes = (box_iou(kept_boxes, boxes) >= iou_threshold) & (kept_labels[:, None] == labels)  # [M, N]
    # In float64, which autocast leaves alone: in bfloat16 the mean of a corner at 800 would be known to 4 pixels.
    weights = votes * scores.double()
    total = weights.sum(dim=1, keepdim=True)
    means = weights @ boxes.double() / total  # [M, 4]
    return torch.where(total > 0, means, kept_boxes.double()).to(kept_boxes.dtype)


def _by_group(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the members of each group as rows ``[G, S]`` of candidates, and a mask ``[G, S]`` of the used ones."""
    order = torch.argsort(groups, stable=True)
    _, counts = torch.unique(groups, return_counts=True)  # [G]; waits for the device, as the next line does
    size = int(counts.max()) if len(counts) else 0
    place = torch.arange(size, device=groups.device)
    valid = place < counts[:, None]
    rows = groups.new_zeros(len(counts), size)
    rows[valid] = order
    return rows, valid
