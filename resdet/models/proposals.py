"""Anchors and the region proposal network: torchvision's, with options that torchvision does not expose.

With the options at torchvision's values each class computes what its base class computes, by the same operations in
the same order. The ``Fast`` ones compute it from less work and give TorchScript their base class.

Legend: ``B`` images, ``A`` anchors at each pixel of a level, ``N`` anchors of an image, ``M`` proposals of an image.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from resdet.devices import constant, is_queued
from resdet.models.convolution import compute_dtype, conv, convolve, has_hooks
from resdet.models.ready_weights import Geometry, KeepsReadyWeights, ReadyWeight
from resdet.models.roi_align import multiply_transposed
from resdet.models.seeded import Sampler, plain_sampler
from resdet.models.spec import DetectorSpec
from resdet.models.suppression import suppress
from resdet.models.tracing import is_captured, scripted_as
from resdet.precision import widened

# remove_small_boxes keeps a side that equals its threshold, so 0 would keep boxes without extent.
LEAST_SIDE = torch.finfo(torch.float32).tiny


class Anchors(AnchorGenerator):  # type: ignore[misc]  # torchvision ships no types, here and below
    """torchvision's anchors, with a choice of rounding, of their distances and of their type.

    torchvision measures distances: the padded image's size over the level's, rounded down. Where the level's size was
    rounded up, that is not its stride: an image 800 pixels high has 13 rows of P6, 64 pixels apart, and 800 // 13 is
    61. It makes anchors in the features' type. In bfloat16 a coordinate of 800 is then known to 4 pixels, and proposals
    and ground truth, which are brought to the anchors' type, with it.
    """

    def __init__(
        self,
        sizes: tuple[tuple[int, ...], ...],  # of each level, sides of its square anchors in pixels
        aspect_ratios: tuple[tuple[float, ...], ...],  # of each level, height over width
        *,
        rounded: bool,  # corners to whole pixels
        strides: Sequence[int],  # distance of the anchors of each level in pixels; empty to measure it
        widened: bool,  # float32 at least
    ) -> None:
        super().__init__(sizes, aspect_ratios)
        self.strides = list(strides) or [0] * len(sizes)  # TorchScript cannot type an empty list
        self.widened = widened
        if not rounded:
            levels = zip(sizes, aspect_ratios, strict=True)
            self.cell_anchors = [_exact_anchors(level_sizes, ratios) for level_sizes, ratios in levels]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Lay the anchors of each image, ``[N, 4]``, the finest level's first."""
        grid_sizes = [feature.shape[-2:] for feature in feature_maps]
        image_size = image_list.tensors.shape[-2:]
        dtype, device = feature_maps[0].dtype, feature_maps[0].device
        strides: list[list[Tensor]] = []
        for grid, stride in zip(grid_sizes, self.strides):  # noqa: B905 - TorchScript knows no strict
            steps = [stride if stride > 0 else image_size[axis] // grid[axis] for axis in range(2)]
            strides.append([torch.empty((), dtype=torch.int64, device=device).fill_(step) for step in steps])
        self.set_cell_anchors(widened(dtype) if self.widened else dtype, device)
        anchors = torch.cat(self.grid_anchors(grid_sizes, strides))  # [N, 4]
        return [anchors for _ in image_list.image_sizes]


class KeptAnchors(Anchors):
    """The same anchors, laid once for each size of image: on a GPU some sixty operations for each batch."""

    _MOST = 8  # sizes, of 4 MB each at 800x1333

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image, ``[N, 4]``, the same tensor for all; it must not be written to."""
        if is_captured():
            laid: list[Tensor] = super().forward(image_list, feature_maps)
            return laid
        first = feature_maps[0]
        key = (*(part.shape[-2:] for part in (image_list.tensors, *feature_maps)), first.dtype, first.device)
        kept: OrderedDict[tuple[object, ...], Tensor] = self.__dict__.setdefault("_kept", OrderedDict())
        if key not in kept:
            with torch.inference_mode(False), torch.no_grad():
                kept[key] = super().forward(image_list, feature_maps)[0]
            if len(kept) > self._MOST:
                kept.popitem(last=False)
        return [kept[key] for _ in image_list.image_sizes]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __prepare_scriptable__(self) -> Anchors:
        return scripted_as(self, Anchors)


def _exact_anchors(sizes: Sequence[int], aspect_ratios: Sequence[float]) -> Tensor:
    """Return float32 ``[len(sizes) * len(aspect_ratios), 4]`` around 0, in torchvision's order, computed in float64."""
    ratios = torch.tensor(aspect_ratios, dtype=torch.float64)[:, None]
    widths = (torch.tensor(sizes, dtype=torch.float64).square() / ratios).sqrt()
    heights = ratios * widths
    corners = torch.stack([-widths.flatten(), -heights.flatten(), widths.flatten(), heights.flatten()], dim=1)
    return (corners / 2).float()


class ProposalHead(RPNHead):  # type: ignore[misc]
    """torchvision's head, its outputs in float32 at least, so that boxes are decoded in it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute objectness ``[B, A, H, W]`` and deltas ``[B, 4 * A, H, W]`` of each level ``[B, C, H, W]``."""
        logits: list[Tensor] = []
        deltas: list[Tensor] = []
        for feature in x:
            hidden = self._hidden(feature)  # [B, C, H, W]
            logit, delta = self.cls_logits(hidden), self.bbox_pred(hidden)
            logits.append(logit.to(widened(logit.dtype)))
            deltas.append(delta.to(widened(delta.dtype)))
        return logits, deltas

    def _hidden(self, feature: Tensor) -> Tensor:
        hidden: Tensor = self.conv(feature)
        return hidden


class FastProposalHead(KeepsReadyWeights, ProposalHead):
    """The same head, which can also be run at some anchors alone, its outputs computed as one."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute objectness ``[B, A, H, W]`` and deltas ``[B, 4 * A, H, W]`` of each level ``[B, C, H, W]``."""
        first, second = self.cls_logits, self.bbox_pred
        dtype, geometry = compute_dtype(x[0], first.weight), Geometry.of(first)

        def make() -> ReadyWeight:
            weight, bias = torch.cat([first.weight, second.weight]), torch.cat([first.bias, second.bias])
            return ReadyWeight(weight, bias, geometry, dtype)

        # Asked in training too, so that it knows what is trained.
        ready = self.ready_weight("outputs", first, (second.weight, second.bias), (dtype,), make)
        if torch.is_grad_enabled() or is_captured() or has_hooks(first) or has_hooks(second):
            return super().forward(x)
        ready = ready or make()
        # Cast and transformed once for all levels, also where it may not be kept.
        conv3, relu = self.conv[0]
        moves = Geometry.of(conv3)
        make_hidden = partial(ReadyWeight, conv3.weight, conv3.bias, moves, dtype)
        of_hidden = self.ready_weight("conv", conv3, (), (dtype,), make_hidden) or make_hidden()
        is_hooked = has_hooks(conv3) or has_hooks(relu)
        logits, deltas = [], []
        for feature in x:
            if is_hooked:
                hidden = self._hidden(feature)
            else:
                hidden = convolve(feature, conv3.weight, conv3.bias, moves, ready=of_hidden, relu=True)  # [B, C, H, W]
            outputs = convolve(hidden, ready.weight, None, geometry, ready=ready)  # [B, 5 * A, H, W]
            outputs = outputs.to(widened(outputs.dtype))
            logits.append(outputs[:, : first.out_channels])
            deltas.append(outputs[:, first.out_channels :])
        return logits, deltas

    def _hidden(self, feature: Tensor) -> Tensor:
        return conv(feature, self.conv[0][0], relu=self.conv[0][1], keeper=self, name="conv")

    def forward_at(self, x: list[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what ``forward`` does at a few anchors alone.

        A loss over a sample of the anchors has a gradient at their pixels and nowhere else. Through ``forward`` its
        backward is two convolutions over every pixel of every level, the most expensive ones of the detector but for
        the body; through this it is a matrix product of some hundred rows.

        Anchors, int64 ``[S]``, are counted over images, levels, rows, columns and the anchors of a pixel, in this
        order. Returns logits ``[S]`` and deltas ``[S, 4]``.
        """
        num_at_pixel = self.cls_logits.out_channels  # A
        num_of_image = sum(feature.shape[2] * feature.shape[3] for feature in x) * num_at_pixel  # N
        image = anchors.div(num_of_image, rounding_mode="floor")  # [S]
        pixel = (anchors % num_of_image).div(num_at_pixel, rounding_mode="floor")  # of its image, over all levels
        rows = _patches(x, image, pixel)  # [S, 9 * C]
        weight, bias = self.conv[0][0].weight, self.conv[0][0].bias
        hidden = F.relu(F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias))  # [S, C]
        logits = F.linear(hidden, self.cls_logits.weight.flatten(1), self.cls_logits.bias)  # [S, A]
        deltas = F.linear(hidden, self.bbox_pred.weight.flatten(1), self.bbox_pred.bias)  # [S, 4 * A]
        which = (anchors % num_at_pixel)[:, None]  # [S, 1]; N is a multiple of A
        logits = logits.gather(1, which).view(-1)
        deltas = deltas.view(-1, num_at_pixel, 4).gather(1, which[..., None].expand(-1, 1, 4)).view(-1, 4)
        return logits.to(widened(logits.dtype)), deltas.to(widened(deltas.dtype))

    def __prepare_scriptable__(self) -> ProposalHead:
        return scripted_as(self, ProposalHead)


def _patches(levels: list[Tensor], image: Tensor, pixel: Tensor) -> Tensor:
    """Read the 3x3 surroundings of pixels into ``[S, 9 * C]``, with zeros beyond the border.

    Levels are ``[B, C, H, W]`` each, pixels, ``[S]``, are counted over an image's levels, rows and columns.
    """
    channels, device = levels[0].shape[1], pixel.device
    shapes = [level.shape[2:] for level in levels]
    ends = tuple(accumulate(height * width for height, width in shapes))
    level = torch.bucketize(pixel, constant(ends, torch.int64, device), right=True)  # [S]
    place = level[:, None, None]
    height, width = (constant(tuple(side), torch.int64, device)[place] for side in zip(*shapes, strict=True))
    of_level = pixel[:, None, None] - constant((0, *ends), torch.int64, device)[place]
    steps = torch.arange(-1, 2, device=device)
    y = of_level.div(width, rounding_mode="floor") + steps[:, None]  # [S, 3, 1]
    x = of_level % width + steps  # [S, 1, 3]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)  # [S, 3, 3]
    of_map = y.clamp(min=0).minimum(height - 1) * width + x.clamp(min=0).minimum(width - 1)
    row = image[:, None, None] * (height * width) + of_map  # [S, 3, 3], of its level
    rows = [part.permute(0, 2, 3, 1).reshape(-1, channels) for part in levels]
    read: Tensor = _ReadRows.apply(row.flatten(), inside.flatten(), place.expand_as(row).flatten(), *rows)  # [S * 9, C]
    return read.view(len(pixel), 9 * channels)


class _ReadRows(torch.autograd.Function):
    """Rows ``[S, C]`` of several matrices ``[R, C]`` by index, zeros where ``used`` is false.

    The gradient of torch's ``index_select`` is added up row by row in the rows' own type, and on a GPU in no fixed
    order. Here each sum is taken in float32 at least, in the order of the indices, and rounded once. On a CPU the rows
    of each matrix are found by looking, and only the used entries are sorted. Elsewhere that would wait for the device:
    every row is read from every matrix and kept of one, and all entries are sorted (9 of 256 anchors an image), in the
    order of the matrices as if they were joined.
    """

    @staticmethod
    def forward(ctx: Any, index: Tensor, used: Tensor, matrix: Tensor, *matrices: Tensor) -> Tensor:
        ctx.num_rows = [len(rows) for rows in matrices]
        firsts = constant((0, *accumulate(ctx.num_rows[:-1])), torch.int64, index.device)
        ctx.save_for_backward(index, used, matrix, firsts)
        read = matrices[0].new_zeros(len(index), matrices[0].shape[1])
        matrix = torch.where(used, matrix, -1)
        for number, rows in enumerate(matrices):
            of_this = matrix == number
            if is_queued(index.device):
                read = torch.where(of_this[:, None], rows.index_select(0, index * of_this), read)
                continue
            taken = of_this.nonzero().view(-1)
            read.index_copy_(0, taken, rows.index_select(0, index.index_select(0, taken)))
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, used, matrix, firsts = ctx.saved_tensors
        if not is_queued(grad.device):
            grads = []
            for number, num_rows in enumerate(ctx.num_rows):
                of_this = used & (matrix == number)
                grads.append(multiply_transposed(index[:, None], of_this[:, None], grad, num_rows))
            return None, None, None, *grads
        joined = sum_by_row(index + firsts[matrix], grad * used[:, None], sum(ctx.num_rows))
        return None, None, None, *torch.split(joined, ctx.num_rows)


def sum_by_row(index: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Add ``rows``, ``[S, C]``, into the rows ``index``, ``[S]``, of zeros ``[num_rows, C]``, each sum in one order."""
    row, order = index.sort(stable=True)
    offsets = torch.searchsorted(row, torch.arange(num_rows + 1, device=index.device))  # [num_rows + 1]
    return F.embedding_bag(order, rows, offsets, mode="sum", include_last_offset=True)


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's region proposal network, with a choice of the least side and of the ranking.

    ``rpn_rank_by="logit"`` ranks proposals by their logits. Probabilities, by which torchvision does, tie near 1: in
    float32 two logits of 10 are the same up to a difference of 0.001.
    """

    def __init__(self, anchors: AnchorGenerator, head: nn.Module, spec: DetectorSpec) -> None:
        super().__init__(
            anchors,
            head,
            spec.rpn_fg_iou_thresh,
            spec.rpn_bg_iou_thresh,
            spec.rpn_batch_size_per_image,
            spec.rpn_positive_fraction,
            {"training": spec.rpn_pre_nms_top_n_train, "testing": spec.rpn_pre_nms_top_n_test},
            {"training": spec.rpn_post_nms_top_n_train, "testing": spec.rpn_post_nms_top_n_test},
            spec.rpn_nms_thresh,
            spec.rpn_score_thresh,
        )
        self.fg_bg_sampler = Sampler(spec.rpn_batch_size_per_image, spec.rpn_positive_fraction)
        self.min_size = max(spec.rpn_min_size, LEAST_SIDE)
        self.rank_by_logit = spec.rpn_rank_by == "logit"

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Choose among boxes ``[B, N, 4]`` of all levels; return ``[M, 4]`` and ``[M]`` of each image, best first."""
        num_images, device, counts = proposals.shape[0], proposals.device, num_anchors_per_level
        objectness = objectness.detach().reshape(num_images, -1)  # [B, N]
        levels = [torch.full((n,), level, dtype=torch.int64, device=device) for level, n in enumerate(counts)]
        level = torch.cat(levels).reshape(1, -1).expand_as(objectness)  # [B, N]
        best = self._get_top_n_idx(objectness, counts)  # [B, best of all levels]
        image = torch.arange(num_images, device=device)[:, None]  # [B, 1]
        return self._choose(proposals[image, best], objectness[image, best], level[image, best], image_shapes)

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
            keep = remove_small_boxes(boxes, self.min_size)  # waits for the device, as the next line and _suppress do
            keep = keep[torch.where(scores[keep] >= self.score_thresh)[0]]
            final_boxes.append(boxes[keep])
            final_scores.append(scores[keep])
            final_ranks.append(rank[keep])
            final_levels.append(level[keep])
        for image, keep in enumerate(self._suppress(final_boxes, final_ranks, final_levels)):
            keep = keep[: self.post_nms_top_n()]
            final_boxes[image], final_scores[image] = final_boxes[image][keep], final_scores[image][keep]
        return final_boxes, final_scores

    def _suppress(self, boxes: list[Tensor], ranks: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
        kept: list[Tensor] = []
        for image in range(len(boxes)):
            kept.append(batched_nms(boxes[image], ranks[image], levels[image], self.nms_thresh))
        return kept

    def __prepare_scriptable__(self) -> ProposalNetwork:
        plain = scripted_as(self, ProposalNetwork)
        plain.fg_bg_sampler = plain_sampler(self.fg_bg_sampler)
        return plain


class FastProposalNetwork(ProposalNetwork):
    """The same proposals and losses from less work; its head must be a ``FastProposalHead``.

    Only the best anchors are decoded, overlaps are suppressed on every core, and the losses go backward through the
    anchors that they are taken over (``FastProposalHead.forward_at``).
    """

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Find proposals ``[M, 4]`` in each image, best first; in training also compute the two losses."""
        if is_captured():
            captured: tuple[list[Tensor], dict[str, Tensor]] = super().forward(images, features, targets)
            return captured
        levels = list(features.values())
        kind = levels[0].device.type
        # torch (up to 2.6 at least) would keep weights cast by autocast here, without gradients, for forward_at below.
        uncached = torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
        with torch.no_grad(), uncached:
            logits, deltas = self.head(levels)
            anchors = self.anchor_generator(images, levels)
            counts = [logit[0].numel() for logit in logits]
            objectness, rows = concat_box_prediction_layers(logits, deltas)  # [B * N, 1], [B * N, 4]
            best = self._get_top_n_idx(objectness.view(len(anchors), -1), counts)  # [B, best of all levels]
            # Of 200,000 anchors some thousands are looked at again.
            rows = rows.view(len(anchors), -1, 4).gather(1, best[..., None].expand(-1, -1, 4)).view(-1, 4)
            best_anchors = [of_image[chosen] for of_image, chosen in zip(anchors, best, strict=True)]
            boxes = self.box_coder.decode(rows, best_anchors).view(*best.shape, 4)  # [B * best, 1, 4] -> [B, best, 4]
            level = torch.bucketize(best, torch.tensor(counts, device=best.device).cumsum(0), right=True)
            chosen = objectness.view(len(anchors), -1).gather(1, best)
            proposals, _ = self._choose(boxes, chosen, level, images.image_sizes)
        if not self.training:
            return proposals, {}
        if targets is None:
            raise ValueError("targets should not be None")
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        # Indices over all images, [P] and [Q]; finding them waits for the device.
        positives, negatives = (torch.where(torch.cat(drawn))[0] for drawn in self.fg_bg_sampler(labels))
        sampled = torch.cat([positives, negatives])
        logit, delta = self.head.forward_at(levels, sampled)
        wanted = self.box_coder.encode_single(torch.cat(matched)[positives], torch.cat(anchors)[positives])
        scores_loss = F.binary_cross_entropy_with_logits(logit, torch.cat(labels)[sampled])
        boxes_loss = F.smooth_l1_loss(delta[: len(positives)], wanted, beta=1 / 9, reduction="sum")
        return proposals, {"loss_objectness": scores_loss, "loss_rpn_box_reg": boxes_loss / sampled.numel()}

    def _suppress(self, boxes: list[Tensor], ranks: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
        return suppress(boxes, ranks, levels, self.nms_thresh)
