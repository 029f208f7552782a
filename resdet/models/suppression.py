"""Boxes that overlap: suppression of many groups or rows at once, soft-NMS, box voting.

Legend: ``N`` candidates of one image, all classes together; ``M`` of them kept; ``G`` groups of up to ``S`` members;
``R`` rows of ``N`` candidates.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, nms

from resdet.models.kernels import kernels_run
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


def suppress_rows(boxes: Tensor, used: Tensor, iou_threshold: float, groups: Tensor | None = None) -> Tensor:
    """Suppress boxes that overlap better ones of their row and group, in tensors of fixed shapes.

    The result is that of torchvision's ``nms`` for each row and group: a box is dropped where its IoU with an earlier
    one that is kept is above the threshold. No shape follows from a value, so that no GPU need be waited for: to torch
    and its compilers this is one operator, ``resdet::suppress_rows``, and on CUDA devices two kernels of Triton. It
    waits where there is no Triton, in float64, and on other devices.

    Args:
        boxes: ``[R, N, 4]``, float32 or float64; in each row the used ones lie by falling score.
        used: Bool ``[R, N]``; the others are not kept and suppress nothing.
        iou_threshold: IoU above which boxes suppress; ``inf`` keeps all that is used.
        groups: Int64 ``[R, N]``: only boxes of one group suppress each other. By default each row is one group.

    Returns:
        Bool ``[R, N]``, whether a box is kept.

    Raises:
        ValueError: If a shape or a type is another.
    """
    row_shape = boxes.shape[:-1]
    if boxes.dim() != 3 or boxes.shape[-1] != 4 or boxes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"boxes must be float32 or float64 of shape [R, N, 4], got {_described(boxes)}")
    if used.dtype != torch.bool or used.shape != row_shape:
        raise ValueError(f"used must be bool of the boxes' shape {list(row_shape)}, got {_described(used)}")
    if groups is not None and (groups.dtype != torch.int64 or groups.shape != row_shape):
        raise ValueError(f"groups must be int64 of the boxes' shape {list(row_shape)}, got {_described(groups)}")
    kept: Tensor = torch.ops.resdet.suppress_rows(boxes, used, iou_threshold, groups)
    return kept


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


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _kept_shape(boxes: Tensor, used: Tensor, iou_threshold: float, groups: Tensor | None) -> Tensor:
    return torch.empty_like(used, memory_format=torch.contiguous_format)


def _suppress_part_by_part(boxes: Tensor, used: Tensor, iou_threshold: float, groups: Tensor | None) -> Tensor:
    """Suppress by torchvision's operator for each group of each row; on a CPU side by side."""
    flat_boxes, size = boxes.reshape(-1, 4), used.shape[1]
    members = used.reshape(-1).nonzero()[:, 0]  # [used ones]; waits for the device
    kept = torch.zeros_like(used, memory_format=torch.contiguous_format)
    if not len(members):
        return kept
    rows = members // size
    changes = rows.diff() != 0
    if groups is not None:
        members = members[groups.reshape(-1)[members].argsort(stable=True)]
        rows, order = (members // size).sort(stable=True)
        members = members[order]
        changes = (rows.diff() != 0) | (groups.reshape(-1)[members].diff() != 0)
    starts = changes.nonzero()[:, 0] + 1  # of all parts but the first; waits, as the split does
    parts = members.tensor_split(starts.cpu())
    ranks = torch.arange(len(members), 0, -1, device=boxes.device, dtype=boxes.dtype)

    def run(part: Tensor) -> Tensor:
        return part if len(part) == 1 else part[nms(flat_boxes[part], ranks[: len(part)], iou_threshold)]  # waits

    if boxes.device.type == "cpu" and flat_boxes[members].numel() > _MANY:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # the operator releases Python's lock
            left = list(threads.map(run, parts))
    else:
        left = [run(part) for part in parts]
    kept.view(-1)[torch.cat(left)] = True
    return kept


def _suppress_by_kernels(boxes: Tensor, used: Tensor, iou_threshold: float, groups: Tensor | None) -> Tensor:
    if boxes.dtype != torch.float32 or not kernels_run(boxes.device):
        return _suppress_part_by_part(boxes, used, iou_threshold, groups)
    from resdet.models.suppression_kernels import suppress_on_cuda

    with torch.cuda.device(boxes.device):
        return suppress_on_cuda(boxes, used, iou_threshold, groups)


# Not by `torch.library.custom_op`, whose checks add 5 us to each call.
torch.library.define(
    "resdet::suppress_rows",
    "(Tensor boxes, Tensor used, float iou_threshold, Tensor? groups) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.register_fake("resdet::suppress_rows", _kept_shape)
torch.library.impl("resdet::suppress_rows", "CompositeExplicitAutograd", _suppress_part_by_part)
torch.library.impl("resdet::suppress_rows", "CUDA", _suppress_by_kernels)
