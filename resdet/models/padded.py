"""A detector over one padded batch: the forward pass on devices that the host had better not wait for.

A GPU works through a queue that the host fills. Wherever the host asks for a value (how many boxes passed a threshold),
the queue runs empty, and then the device waits for the host. torchvision asks some twenty times for each image. Here
all images of a batch have the same number of rows, with a mask of those that are used, so that shapes follow from
settings and not from values. What is asked for is how many regions each level of the pyramid has, and at inference how
many detections each image has.

The result is what the usual path computes, up to rounding, with two exceptions. Proposals and detections of equal score
may come in another order. In training, anchors and proposals are drawn by ``seeded.draw``, from other random numbers.
The CPU keeps the usual path, which leaves out what a mask leaves out.

Legend: ``B`` images, ``N`` anchors of an image, ``P`` rows of proposals, ``G`` rows of objects, ``S`` rows sampled,
``L`` levels, ``K`` foreground classes, ``C`` channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from resdet.devices import is_queued, send
from resdet.errors import UserError
from resdet.models.box_heads import FOUND_IOU, BoxHeads
from resdet.models.convolution import has_hooks
from resdet.models.losses import masked_box_losses
from resdet.models.proposals import FastProposalHead, FastProposalNetwork
from resdet.models.roi_align import pool_by_level
from resdet.models.seeded import Drawn, Sampler, SeededTransform, draw, random_keys
from resdet.models.suppression import suppress_rows
from resdet.models.tracing import is_captured
from resdet.types import Prediction


class Batch(NamedTuple):
    """Images as the network takes them."""

    images: Tensor  # [B, 3, H, W]
    sizes: list[tuple[int, int]]  # of each image within the padding
    limits: Tensor  # [B, 1, 4], the largest coordinates in each image: width, height, width, height
    to_network: Tensor  # [B, 1, 4], by which boxes in pixels of the images are multiplied
    to_image: Tensor  # [B, 1, 4], the way back


class Boxes(NamedTuple):
    """Boxes of several images, with as many rows for each. Rows that are not used are zeros."""

    boxes: Tensor  # [B, P, 4], in pixels of the network's input
    used: Tensor  # bool [B, P]


class Objects(NamedTuple):
    """Ground truth of several images."""

    boxes: Tensor  # [B, G, 4], in pixels of the network's input
    labels: Tensor  # int64 [B, G]; 0 in rows that are not used
    counts: list[int]  # of each image


class Regions(NamedTuple):
    """Proposals that are trained on."""

    boxes: Tensor  # [B, S, 4]
    labels: Tensor  # int64 [B, S]; 0 is the background
    wanted: Tensor  # [B, S, 4], the deltas to their objects; meaningless for the background
    used: Tensor  # bool [B, S]


def is_padded(model: GeneralizedRCNN, device: torch.device) -> bool:
    """Return whether a detector on this device runs here: the one place where that is decided."""
    parts = (model.transform, model.rpn, model.roi_heads)
    return (
        is_queued(device)
        and not is_captured()
        and isinstance(model.rpn, FastProposalNetwork)
        and isinstance(model.roi_heads, BoxHeads)
        and not any(has_hooks(part) for part in parts)
    )


def compute_losses(
    model: GeneralizedRCNN, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]], device: torch.device
) -> dict[str, Tensor]:
    """Compute a detector's four losses, scalars, as ``model(images, targets)`` does in training.

    Args:
        model: A ``Detector``.
        images: ``[3, H, W]``, floats in [0, 1] or uint8, on any device.
        targets: Of each image, on any device. Boxes in host memory are checked, and are copied without waiting.
        device: That of the model.

    Raises:
        UserError: If a box in host memory has no extent. One on the device makes a loss that is not finite.
    """
    batch = _batch(model.transform, images, device)
    objects = _pad_objects(targets, batch)
    features = _features(model, batch)
    levels = list(features.values())
    rpn, heads = model.rpn, model.roi_heads
    anchors, proposals = _propose(rpn, levels, batch)
    rpn_losses = _rpn_losses(rpn, levels, anchors, objects)
    regions = _sample(heads, proposals, objects)
    pooled, order = pool_by_level(heads.box_roi_pool, features, regions.boxes, batch.sizes)
    class_logits, box_regression = heads.box_predictor(heads.box_head(pooled))  # [B * S, K + 1], [B * S, 4 * (K + 1)]
    boxes, labels, wanted, used = (column.flatten(0, 1)[order] for column in regions)
    scores_loss, boxes_loss = masked_box_losses(
        class_logits,
        box_regression,
        labels,
        wanted,
        boxes,
        used,
        heads.box_coder,
        class_loss=heads.class_loss,
        box_loss=heads.box_loss,
        class_weights=heads.class_weights,
    )
    return {"loss_classifier": scores_loss, "loss_box_reg": boxes_loss, **rpn_losses}


def detect(model: GeneralizedRCNN, images: Sequence[Tensor], device: torch.device) -> list[Prediction]:
    """Detect objects as ``model(images)`` does in evaluation mode; arguments are those of ``compute_losses``."""
    batch = _batch(model.transform, images, device)
    features = _features(model, batch)
    _, proposals = _propose(model.rpn, list(features.values()), batch)
    heads = model.roi_heads
    pooled, order = pool_by_level(heads.box_roi_pool, features, proposals.boxes, batch.sizes)
    logits, deltas = heads.box_predictor(heads.box_head(pooled))  # by level
    back, shape = order.argsort(), proposals.used.shape
    logits = logits[back].view(*shape, -1)  # [B, P, K + 1]
    deltas = deltas[back].view(*shape, -1, 4)  # [B, P, K + 1, 4]
    found = _choose(heads, proposals, logits, deltas, batch.limits)
    numbers = (found["scores"] >= 0).sum(dim=1).tolist()  # waits for the device
    boxes = found["boxes"] * batch.to_image
    return [
        Prediction(
            boxes=boxes[image, :number], labels=found["labels"][image, :number], scores=found["scores"][image, :number]
        )
        for image, number in enumerate(numbers)
    ]


def _batch(transform: SeededTransform, images: Sequence[Tensor], device: torch.device) -> Batch:
    old = torch.tensor([image.shape[-2:] for image in images], dtype=torch.float32)  # [B, 2], heights and widths
    batch, sizes = transform.pad(images, device)
    new = torch.tensor(sizes, dtype=torch.float32)
    rows = torch.stack([new, new / old, old / new]).flip(2).repeat(1, 1, 2)  # [3, B, 4], widths and heights, twice
    limits, to_network, to_image = send(rows, device).unsqueeze(2)  # [B, 1, 4] each
    return Batch(batch, sizes, limits, to_network, to_image)


def _features(model: GeneralizedRCNN, batch: Batch) -> dict[str, Tensor]:
    features: dict[str, Tensor] | Tensor = model.backbone(batch.images)
    return {"0": features} if isinstance(features, Tensor) else features


def _pad_objects(targets: Sequence[Mapping[str, Tensor]], batch: Batch) -> Objects:
    """Return the objects of all images, scaled as the images are."""
    device = batch.images.device
    counts = [len(target["labels"]) for target in targets]
    for index, target in enumerate(targets):
        boxes = target["boxes"]
        if boxes.dim() != 2 or boxes.shape[1] != 4 or len(boxes) != counts[index]:
            raise UserError(
                f"targets[{index}]: boxes must be [N, 4] and labels [N], got {list(boxes.shape)} and "
                f"{list(target['labels'].shape)}"
            )
        if boxes.device.type == "cpu" and len(bad := boxes[(boxes[:, 2:] <= boxes[:, :2]).any(dim=1)]):
            raise UserError(f"targets[{index}]: boxes must have positive width and height, got {bad[0].tolist()}")
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)  # [B, G, 4]
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)  # [B, G]
    if not any(counts):
        boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1))  # a maximum of nothing is none
    return Objects(send(boxes, device) * batch.to_network, send(labels, device), counts)


@torch.no_grad()
def _propose(rpn: RegionProposalNetwork, levels: list[Tensor], batch: Batch) -> tuple[Tensor, Boxes]:
    """Return the anchors of every image, ``[N, 4]``, and the proposals of each, best first."""
    kind = levels[0].device.type
    # torch (up to 2.6 at least) would keep weights cast by autocast here, without gradients, for forward_at.
    with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
        logits, deltas = rpn.head(levels)
    anchors: Tensor = rpn.anchor_generator(ImageList(batch.images, batch.sizes), levels)[0]
    # [B, A, H, W] -> [B, H * W * A] of each level
    of_levels = [part.permute(0, 2, 3, 1).flatten(1) for part in logits]
    delta = torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part in deltas], dim=1)  # [B, N * 4]
    delta = delta.view(len(delta), -1, 4)
    limit = rpn.pre_nms_top_n()
    most = min(limit, max(part.shape[1] for part in of_levels))
    best_logits, best, first = [], [], 0
    for part in of_levels:
        missing = max(most - part.shape[1], 0)
        value, index = part.topk(most - missing, dim=1)
        best_logits.append(F.pad(value, (0, missing), value=-math.inf) if missing else value)
        best.append(F.pad(index + first, (0, missing)) if missing else index + first)
        first += part.shape[1]
    score, chosen = torch.stack(best_logits, dim=1), torch.cat(best, dim=1)  # [B, L, most], [B, L * most]
    boxes = decode(_take(delta, chosen), anchors[chosen], rpn.box_coder)
    boxes = torch.minimum(boxes.clamp(min=0), batch.limits)  # [B, L * most, 4]
    used = (_least_side(boxes) >= rpn.min_size).view_as(score) & (score > -math.inf)
    if rpn.score_thresh > 0:
        used = used & (score.sigmoid() >= rpn.score_thresh)
    # By logits, also where the ranking is by probability: it rises with them, but for ties.
    rows = boxes.view(-1, most, 4)  # [B * L, most, 4]
    kept = suppress_rows(rows, used.flatten(0, 1), rpn.nms_thresh).view(len(boxes), -1)
    ranked = torch.where(kept, score.flatten(1), -math.inf)
    score, order = ranked.topk(min(rpn.post_nms_top_n(), ranked.shape[1]), dim=1)  # [B, P]
    used = score > -math.inf
    return anchors, Boxes(_take(boxes, order) * used[..., None], used)


def _rpn_losses(
    rpn: RegionProposalNetwork, levels: list[Tensor], anchors: Tensor, objects: Objects
) -> dict[str, Tensor]:
    with torch.no_grad():
        # Image by image: with G rows for each, those of 16 images at 200,000 anchors would take gigabytes.
        each = [_match_anchors(rpn, anchors, objects, image) for image in range(len(objects.counts))]
        status, matched = (torch.stack(column) for column in zip(*each, strict=True))  # [B, N]
        sampled, positive, used = _draw(rpn.fg_bg_sampler, status)  # [B, S]
        own = anchors[sampled]  # [B, S, 4]
        wanted = encode(_take(objects.boxes, matched.gather(1, sampled)), own, rpn.box_coder)
        # Whatever is there in place of an object, not even NaN times 0 may come through.
        wanted = torch.where(positive[..., None], wanted, 0)
        offset = torch.arange(len(sampled), device=sampled.device)[:, None] * len(anchors)
    head = rpn.head
    assert isinstance(head, FastProposalHead)
    logit, delta = head.forward_at(levels, (sampled + offset).flatten())  # [B * S], [B * S, 4]
    count = used.sum()
    each_score = F.binary_cross_entropy_with_logits(logit, positive.flatten().to(logit), reduction="none")
    each_box = F.smooth_l1_loss(delta, wanted.flatten(0, 1).to(delta), beta=1 / 9, reduction="none")
    return {
        "loss_objectness": (each_score * used.flatten()).sum() / count,
        "loss_rpn_box_reg": (each_box * positive.flatten()[:, None]).sum() / count,
    }


def _match_anchors(rpn: RegionProposalNetwork, anchors: Tensor, objects: Objects, image: int) -> tuple[Tensor, Tensor]:
    """Return what the anchors of an image are, 1 object, 0 background, -1 neither, and the object of each, ``[N]``.

    The best anchors of an object are its, however little they overlap it.
    """
    count = objects.counts[image]
    if count == 0:
        nothing = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        return nothing, nothing
    iou = pairwise_iou(objects.boxes[image, :count], anchors)  # [G, N]
    highest, matched = iou.max(dim=0)  # [N]
    is_best = (iou == iou.amax(dim=1, keepdim=True)).any(dim=0)
    matcher = rpn.proposal_matcher
    return _status(matcher, highest).masked_fill_(is_best, 1), matched


def _status(matcher: Matcher, highest: Tensor) -> Tensor:
    """Return 1 where the highest IoU is that of an object, 0 that of the background, -1 neither, int64."""
    status: Tensor = (highest < matcher.low_threshold).long() - 1
    return status.masked_fill_(highest >= matcher.high_threshold, 1)


def _draw(sampler: Sampler, status: Tensor) -> Drawn:
    """Draw as many rows as a sampler does, from the seeds of its images, and leave it the number of positives."""
    keys = random_keys(sampler.seeds, status.shape, status.device)
    drawn = draw(status, keys, sampler.batch_size_per_image, sampler.positive_fraction)
    sampler.num_positives = drawn.positive.sum(dim=1)
    return drawn


@torch.no_grad()
def _sample(heads: BoxHeads, proposals: Boxes, objects: Objects) -> Regions:
    """Draw the proposals of each image that the box head is trained on, the objects themselves among them."""
    exists = objects.labels > 0  # [B, G]
    boxes, used = torch.cat([proposals.boxes, objects.boxes], dim=1), torch.cat([proposals.used, exists], dim=1)
    iou = pairwise_iou(objects.boxes, boxes)  # [B, G, P + G]
    iou = torch.where(exists[..., None], iou, -1)
    found = iou[..., : proposals.boxes.shape[1]].amax(dim=2) >= FOUND_IOU  # [B, G]
    heads.num_objects, heads.num_found = sum(objects.counts), found.sum(dim=1)
    highest, matched = iou.max(dim=1)  # [B, P + G]
    drawn = _draw(heads.fg_bg_sampler, torch.where(used, _status(heads.proposal_matcher, highest), -1))
    of_object = matched.gather(1, drawn.rows)  # [B, S]
    regions = _take(boxes, drawn.rows)
    wanted = encode(_take(objects.boxes, of_object), regions, heads.box_coder)
    labels = objects.labels.gather(1, of_object) * drawn.positive
    return Regions(regions, labels, wanted, drawn.used)


def _choose(heads: BoxHeads, proposals: Boxes, logits: Tensor, deltas: Tensor, limits: Tensor) -> dict[str, Tensor]:
    """Choose the detections of each image, best first: boxes ``[B, D, 4]``, labels and scores ``[B, D]``.

    Rows that are not used come last and have a score of -1. Overlaps are suppressed in rows of a class, so that there
    is room for whatever passes the threshold.
    """
    probabilities = torch.softmax(logits, dim=2)[..., 1:].transpose(1, 2)  # [B, K, P]
    passing = (probabilities > heads.score_thresh) & proposals.used[:, None]
    scores, order = torch.where(passing, probabilities, -1).sort(dim=2, descending=True)
    order = order[..., None].expand(-1, -1, -1, 4)  # [B, K, P, 4]
    own = proposals.boxes[:, None].expand_as(order).gather(2, order)
    boxes = decode(deltas[:, :, 1:].transpose(1, 2).gather(2, order), own, heads.box_coder)
    boxes = torch.minimum(boxes.clamp(min=0), limits[:, None])
    used = (scores >= 0) & (_least_side(boxes) >= heads.min_size)
    kept = suppress_rows(boxes.flatten(0, 1), used.flatten(0, 1), heads.nms_thresh).view_as(used)
    scores = torch.where(kept, scores, -1).flatten(1)  # [B, K * P]
    scores, chosen = scores.topk(min(heads.detections_per_img, scores.shape[1]), dim=1)  # [B, D]
    boxes, labels = _take(boxes.flatten(1, 2), chosen), chosen.div(logits.shape[1], rounding_mode="floor") + 1
    if heads.min_size == 0:
        # As the usual path does: boxes without extent are dropped at the end, and have taken the places of others.
        scores = torch.where(_least_side(boxes) >= heads.least_side, scores, -1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        boxes, labels = _take(boxes, order), labels.gather(1, order)
    return {"boxes": boxes, "labels": labels, "scores": scores}


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Return the rows ``[B, S, 4]`` of ``[B, N, 4]`` that ``[B, S]`` names."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def _least_side(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).amin(dim=-1)


def pairwise_iou(objects: Tensor, boxes: Tensor) -> Tensor:
    """Compute the IoU of each object ``[..., G, 4]`` with each box ``[..., N, 4]``, ``[..., G, N]``.

    It is torchvision's ``box_iou``, operation by operation, for several images too.
    """
    of_object, of_box = objects.unsqueeze(-2), boxes.unsqueeze(-3)
    low, high = torch.maximum(of_object[..., :2], of_box[..., :2]), torch.minimum(of_object[..., 2:], of_box[..., 2:])
    shared = (high - low).clamp_(min=0).prod(dim=-1)
    areas = [(part[..., 2:] - part[..., :2]).prod(dim=-1) for part in (of_object, of_box)]
    return shared / (areas[0] + areas[1] - shared)


def encode(objects: Tensor, boxes: Tensor, coder: BoxCoder) -> Tensor:
    """Compute the deltas from boxes to objects, ``[..., 4]`` each, as ``coder.encode_single`` does, in pairs."""
    sides, wanted = boxes[..., 2:] - boxes[..., :2], objects[..., 2:] - objects[..., :2]
    shift = (objects[..., :2] + 0.5 * wanted - (boxes[..., :2] + 0.5 * sides)) * coder.weights[0]
    return torch.cat([shift / sides, torch.log(wanted / sides) * coder.weights[2]], dim=-1)


def decode(deltas: Tensor, boxes: Tensor, coder: BoxCoder) -> Tensor:
    """Compute the boxes that deltas make of boxes, ``[..., 4]`` each, as ``coder.decode_single`` does, in pairs."""
    sides = boxes[..., 2:] - boxes[..., :2]
    centre = deltas[..., :2] / coder.weights[0] * sides + (boxes[..., :2] + 0.5 * sides)
    half = 0.5 * (torch.exp((deltas[..., 2:] / coder.weights[2]).clamp(max=coder.bbox_xform_clip)) * sides)
    return torch.cat([centre - half, centre + half], dim=-1)
