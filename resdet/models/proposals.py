"""The parts of torchvision's Faster R-CNN, told what torchvision's cannot be told: anchors, proposals, box heads.

With the arguments at torchvision's values each computes what its base class computes, by the same operations in the
same order. All of them can be scripted where the base class can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from resdet.models.convolution import conv
from resdet.models.roi_align import multiply_transposed
from resdet.models.seeded import Sampler
from resdet.models.suppression import suppress
from resdet.models.tracing import is_captured, is_scripting, scripted_as
from resdet.precision import widened

# remove_small_boxes keeps a side that equals its threshold, so 0 would keep boxes without extent.
_LEAST_SIDE = torch.finfo(torch.float32).tiny


class Anchors(AnchorGenerator):  # type: ignore[misc]  # torchvision ships no types, here and below
    """torchvision's anchors, with a choice of rounding, of their distances and of their type.

    Args:
        sizes: For each level the sides of its square anchors, in pixels.
        aspect_ratios: For each level the ratios of height to width.
        rounded: Whether corners are rounded to whole pixels.
        strides: Distance of the anchors of each level, in pixels; empty to measure it as torchvision does: the padded
            image's size over the level's, rounded down. The two differ where the level's size was rounded up: an image
            800 pixels high has 13 rows of P6, which are 64 pixels apart, and 800 // 13 is 61.
        widened: Whether anchors are in float32 at least. torchvision makes them in the features' type. In bfloat16 a
            coordinate of 800 is then known to 4 pixels, and proposals and ground truth, which are brought to the
            anchors' type, with it.
    """

    def __init__(
        self,
        sizes: tuple[tuple[int, ...], ...],
        aspect_ratios: tuple[tuple[float, ...], ...],
        *,
        rounded: bool,
        strides: Sequence[int],
        widened: bool,
    ) -> None:
        super().__init__(sizes, aspect_ratios)
        self.strides = list(strides) or [0] * len(sizes)  # TorchScript cannot type an empty list
        self.widened = widened
        if not rounded:
            levels = zip(sizes, aspect_ratios, strict=True)
            self.cell_anchors = [_exact_anchors(level_sizes, ratios) for level_sizes, ratios in levels]

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Bring the anchors of one place to a device and type."""
        if self.widened:
            dtype = widened(dtype)
        self.cell_anchors = [anchors.to(device, dtype) for anchors in self.cell_anchors]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Give the anchors of each image, ``[N, 4]``, the finest level's first."""
        grid_sizes = [feature.shape[-2:] for feature in feature_maps]
        image_size = image_list.tensors.shape[-2:]
        dtype, device = feature_maps[0].dtype, feature_maps[0].device
        strides: list[list[Tensor]] = []
        for grid, stride in zip(grid_sizes, self.strides):  # noqa: B905 - TorchScript knows no strict
            steps: list[Tensor] = []
            for axis in range(2):
                step = torch.empty((), dtype=torch.int64, device=device)
                steps.append(step.fill_(stride if stride > 0 else image_size[axis] // grid[axis]))
            strides.append(steps)
        self.set_cell_anchors(dtype, device)
        anchors = torch.cat(self.grid_anchors(grid_sizes, strides))
        return [anchors for _ in image_list.image_sizes]


def _exact_anchors(sizes: Sequence[int], aspect_ratios: Sequence[float]) -> Tensor:
    """Give float32 ``[len(sizes) * len(aspect_ratios), 4]`` around 0, in torchvision's order, computed in float64."""
    ratios = torch.tensor(aspect_ratios, dtype=torch.float64)[:, None]
    widths = (torch.tensor(sizes, dtype=torch.float64).square() / ratios).sqrt()
    heights = ratios * widths
    corners = torch.stack([-widths.flatten(), -heights.flatten(), widths.flatten(), heights.flatten()], dim=1)
    return (corners / 2).float()


class ProposalHead(RPNHead):  # type: ignore[misc]
    """torchvision's head, its outputs in float32 at least, so that boxes are decoded in it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Give objectness ``[B, A, H, W]`` and deltas ``[B, 4 * A, H, W]`` for each level."""
        logits: list[Tensor] = []
        deltas: list[Tensor] = []
        for feature in x:
            hidden = self._hidden(feature)
            logit, delta = self.cls_logits(hidden), self.bbox_pred(hidden)
            logits.append(logit.to(widened(logit.dtype)))
            deltas.append(delta.to(widened(delta.dtype)))
        return logits, deltas

    def _hidden(self, feature: Tensor) -> Tensor:
        if not is_scripting():
            return conv(feature, self.conv[0][0], relu=self.conv[0][1])
        hidden: Tensor = self.conv(feature)
        return hidden

    @torch.jit.unused
    def at(self, x: list[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what ``forward`` does at a few anchors alone.

        A loss over a sample of the anchors has a gradient at their places and nowhere else. Through ``forward`` its
        backward is two convolutions over every place of every level, the most expensive ones of the detector but for
        the body; through this it is a matrix product of some hundred rows.

        Args:
            x: Levels ``[B, C, H, W]``.
            anchors: int64 ``[N]``, counting over images, levels, rows, columns and the anchors of a place, in this
                order.

        Returns:
            Logits ``[N]`` and deltas ``[N, 4]``.
        """
        num_at_place = self.cls_logits.out_channels
        num_of_image = sum(feature.shape[2] * feature.shape[3] for feature in x) * num_at_place
        image = anchors.div(num_of_image, rounding_mode="floor")
        rest = anchors % num_of_image
        order, patches = [], []
        first = 0
        for feature in x:
            height, width = feature.shape[2:]
            after = first + height * width * num_at_place
            on_level = ((rest >= first) & (rest < after)).nonzero().view(-1)
            place = (rest[on_level] - first).div(num_at_place, rounding_mode="floor")
            y, column = place.div(width, rounding_mode="floor"), place % width
            order.append(on_level)
            patches.append(_patches(feature, image[on_level], y, column))
            first = after
        rows = torch.cat(patches)  # [N, 9 * C], by level
        weight, bias = self.conv[0][0].weight, self.conv[0][0].bias
        hidden = F.relu(F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias))
        logits = F.linear(hidden, self.cls_logits.weight.flatten(1), self.cls_logits.bias)
        deltas = F.linear(hidden, self.bbox_pred.weight.flatten(1), self.bbox_pred.bias)
        back = torch.cat(order).argsort()
        which = (rest % num_at_place)[:, None]
        logits = logits[back].gather(1, which).view(-1)
        deltas = deltas[back].view(-1, num_at_place, 4).gather(1, which[..., None].expand(-1, 1, 4)).view(-1, 4)
        return logits.to(widened(logits.dtype)), deltas.to(widened(deltas.dtype))


@contextmanager
def _nothing_kept_by_autocast() -> Iterator[None]:
    """Keep weights that autocast casts without gradients from being taken again, in the same forward pass, for those.

    torch up to 2.6 at least keeps them.
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def _patches(feature: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Give the 3x3 surroundings of places of ``[B, C, H, W]``, ``[N, 9 * C]``, with zeros beyond the border."""
    channels, height, width = feature.shape[1:]
    steps = torch.arange(-1, 2, device=y.device)
    ys, xs = (y[:, None] + steps)[:, :, None], (x[:, None] + steps)[:, None, :]
    inside = (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)  # [N, 3, 3]
    pixels = (image[:, None, None] * height + ys.clamp(0, height - 1)) * width + xs.clamp(0, width - 1)
    rows = feature.permute(0, 2, 3, 1).reshape(-1, channels)
    return _read_rows(rows, pixels.flatten(), inside.flatten()).view(len(y), 9 * channels)


def _read_rows(rows: Tensor, index: Tensor, used: Tensor) -> Tensor:
    """Give ``rows[index]``, ``[N, C]``, with zeros where ``used`` is false."""
    if rows.device.type == "cpu":
        read: Tensor = _ReadRows.apply(rows, index, used)
        return read
    return rows.index_select(0, index) * used[:, None]


class _ReadRows(torch.autograd.Function):
    """``_read_rows`` on a CPU, where ``index_select`` would go backward row by row, in the rows' own type."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, used: Tensor) -> Tensor:
        ctx.save_for_backward(index, used)
        ctx.num_rows = len(rows)
        return rows.index_select(0, index).mul_(used[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, used = ctx.saved_tensors
        return multiply_transposed(index[:, None], used[:, None], grad, ctx.num_rows), None, None


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's region proposal network, with a choice of the least side and of the ranking.

    Args:
        anchors: As for torchvision's, like all that follow but the last two.
        head: Its head.
        fg_iou_thresh: IoU from which an anchor is a positive.
        bg_iou_thresh: IoU below which it is a negative.
        batch_size_per_image: Anchors the loss is taken over.
        positive_fraction: Share of positives among them.
        pre_nms_top_n: Proposals of a level that enter non-maximum suppression, "training" and "testing".
        post_nms_top_n: Proposals of an image that are kept.
        nms_thresh: IoU above which the weaker of two is dropped.
        score_thresh: Probability below which a proposal is dropped.
        min_size: Proposals with a side below it are dropped, in pixels; 0 drops those without extent.
        rank_by_logit: Rank proposals by their logits. Probabilities, by which torchvision does, tie near 1: in float32
            two logits of 10 are the same up to a difference of 0.001.
    """

    def __init__(
        self,
        anchors: AnchorGenerator,
        head: RPNHead,
        *,
        fg_iou_thresh: float,
        bg_iou_thresh: float,
        batch_size_per_image: int,
        positive_fraction: float,
        pre_nms_top_n: dict[str, int],
        post_nms_top_n: dict[str, int],
        nms_thresh: float,
        score_thresh: float,
        min_size: float,
        rank_by_logit: bool,
    ) -> None:
        super().__init__(
            anchors,
            head,
            fg_iou_thresh,
            bg_iou_thresh,
            batch_size_per_image,
            positive_fraction,
            pre_nms_top_n,
            post_nms_top_n,
            nms_thresh,
            score_thresh,
        )
        self.fg_bg_sampler = Sampler(batch_size_per_image, positive_fraction)
        self.min_size = max(min_size, _LEAST_SIDE)
        self.rank_by_logit = rank_by_logit

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Choose the proposals of each image.

        Args:
            proposals: ``[B, N, 4]``, of all levels.
            objectness: Their logits, in any shape.
            image_shapes: ``(height, width)`` of each image, to which its proposals are clipped.
            num_anchors_per_level: How ``N`` divides.

        Returns:
            For each image boxes ``[M, 4]`` and probabilities ``[M]``, best first.
        """
        num_images = proposals.shape[0]
        objectness = objectness.detach().reshape(num_images, -1)
        levels = torch.cat(
            [
                torch.full((count,), level, dtype=torch.int64, device=proposals.device)
                for level, count in enumerate(num_anchors_per_level)
            ]
        )
        levels = levels.reshape(1, -1).expand_as(objectness)
        best = self._get_top_n_idx(objectness, num_anchors_per_level)
        image = torch.arange(num_images, device=proposals.device)[:, None]
        return self._choose(proposals[image, best], objectness[image, best], levels[image, best], image_shapes)

    def _choose(
        self, proposals: Tensor, objectness: Tensor, levels: Tensor, image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Choose among the best of each level: boxes ``[B, N, 4]``, their logits and levels ``[B, N]``."""
        probabilities = torch.sigmoid(objectness)
        ranks = objectness if self.rank_by_logit else probabilities
        final_boxes: list[Tensor] = []
        final_scores: list[Tensor] = []
        final_ranks: list[Tensor] = []
        final_levels: list[Tensor] = []
        for boxes, scores, rank, level, shape in zip(proposals, probabilities, ranks, levels, image_shapes):  # noqa: B905
            boxes = clip_boxes_to_image(boxes, shape)
            keep = remove_small_boxes(boxes, self.min_size)
            boxes, scores, rank, level = boxes[keep], scores[keep], rank[keep], level[keep]
            keep = torch.where(scores >= self.score_thresh)[0]
            final_boxes.append(boxes[keep])
            final_scores.append(scores[keep])
            final_ranks.append(rank[keep])
            final_levels.append(level[keep])
        kept = suppress(final_boxes, final_ranks, final_levels, self.nms_thresh)
        for image, keep in enumerate(kept):
            keep = keep[: self.post_nms_top_n()]
            final_boxes[image], final_scores[image] = final_boxes[image][keep], final_scores[image][keep]
        return final_boxes, final_scores


class FastProposalNetwork(ProposalNetwork):
    """The same proposals and losses from less work; its head must be a ``ProposalHead``.

    Boxes are decoded of the best anchors alone, overlaps are suppressed on every core, and the losses go backward
    through the anchors that they are taken over (``ProposalHead.at``).
    """

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Find proposals, and in training judge the head.

        Args:
            images: The padded batch.
            features: Levels of the pyramid by name.
            targets: Boxes of each image, in training.

        Returns:
            For each image boxes ``[M, 4]``, best first; and ``loss_objectness`` and ``loss_rpn_box_reg`` (in training
            only).
        """
        if is_captured():
            captured: tuple[list[Tensor], dict[str, Tensor]] = super().forward(images, features, targets)
            return captured
        levels = list(features.values())
        with torch.no_grad(), _nothing_kept_by_autocast():
            logits, deltas = self.head(levels)
            anchors = self.anchor_generator(images, levels)
            counts = [logit[0].numel() for logit in logits]
            objectness, rows = concat_box_prediction_layers(logits, deltas)
            best = self._get_top_n_idx(objectness.view(len(anchors), -1), counts)
            # Of 200,000 anchors some thousands are looked at again.
            num_images, num_best = best.shape
            rows = rows.view(num_images, -1, 4).gather(1, best[..., None].expand(-1, -1, 4)).view(-1, 4)
            boxes = self.box_coder.decode(
                rows, [of_image[chosen] for of_image, chosen in zip(anchors, best, strict=True)]
            )
            level = torch.bucketize(best, torch.tensor(counts, device=best.device).cumsum(0), right=True)
            chosen = objectness.view(num_images, -1).gather(1, best)
            proposals, _ = self._choose(boxes.view(num_images, num_best, 4), chosen, level, images.image_sizes)
        if not self.training:
            return proposals, {}
        if targets is None:
            raise ValueError("targets should not be None")
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        positives, negatives = (torch.where(torch.cat(drawn))[0] for drawn in self.fg_bg_sampler(labels))
        sampled = torch.cat([positives, negatives])
        logit, delta = self.head.at(levels, sampled)
        wanted = self.box_coder.encode_single(torch.cat(matched)[positives], torch.cat(anchors)[positives])
        losses = {
            "loss_objectness": F.binary_cross_entropy_with_logits(logit, torch.cat(labels)[sampled]),
            "loss_rpn_box_reg": F.smooth_l1_loss(delta[: len(positives)], wanted, beta=1 / 9, reduction="sum")
            / sampled.numel(),
        }
        return proposals, losses

    def __prepare_scriptable__(self) -> ProposalNetwork:
        return scripted_as(self, ProposalNetwork)
