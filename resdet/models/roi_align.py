"""RoIAlign that uses every CPU core; torchvision's own kernel everywhere else.

It is our own because torchvision's kernel took half of a training step on a CPU, and no library has another.

Legend: ``B`` images, ``C`` channels, ``H, W`` pixels of a feature map, ``R = B * H * W`` its rows, ``K`` boxes,
``P, Q`` bins of a box (height, width), ``S`` pixels a bin reads along one axis.

torchvision's runs on one core, channel by channel. But RoIAlign is linear in the features, and its weights
are the same for all channels: ``output[K * P * Q, C] = M @ features[R, C]``, where the sparse ``M`` has at most 16
weights a bin (2 x 2 samples, 4 corners each). ``embedding_bag`` computes such products over whole rows and on all
cores; the backward is the same product with ``M`` transposed, for which its entries are sorted once.

* Features in channels-last layout *are* the ``[R, C]`` matrix and are not copied; others are converted once.
* Positions and weights are computed in float32 (float64 for float64 features), whatever the features' type. For
  bfloat16 and float16 features the finished weights are rounded to that type, as ``embedding_bag`` wants one type;
  sums run in float32 and are rounded once. torchvision's kernel has no bfloat16 and runs float16 in float16.
* The result is contiguous ``[K, C, P, Q]``, as torchvision's; the features' gradient comes in channels-last layout.
* The same bits in every run and for any number of threads, forward and backward: every sum is taken by one thread in
  an order that depends on the boxes alone.

Measured on 2 cores, 629 boxes on P2 of an 800 x 1216 image, 256 channels, float32, of which the sparse product takes
12 ms forward and 14 ms backward (sort included). What did not pay:

* ``torch.sparse`` CSR (MKL): 44 ms forward, 42 ms backward, and no bfloat16; multiplying with ``M.t()``: 106 ms.
* ``embedding_bag``'s own backward: 102 ms. ``index_add_`` of weighted rows: 160 ms.
* Gathering 16 rows a bin and a batched product: 180 ms. Crops of the boxes, padded to the largest, and two small
  matrices a box, since bins are separable: 540 ms (boxes differ too much in size).
* bfloat16 features turned into float32 rows, to keep float32 weights: 20 ms forward where bfloat16 takes 2. Rounded
  weights raise the root mean square error from 0.0017 (the rounding of the result alone) to 0.0023.
* Dropping the 4 in 10 weights that are zero in the forward: what the product saves, the compaction costs.
* One product for all levels: their rows would have to be copied into one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.jit.annotations import BroadcastingList2
from torch.nn import functional as F
from torchvision import ops
from torchvision.ops._utils import check_roi_boxes_shape, convert_boxes_to_roi_format
from torchvision.ops.poolers import (
    LevelMapper,
    _filter_input,
    _multiscale_roi_align,
    _onnx_merge_levels,
    _setup_scales,
    initLevelMapper,
)

from resdet.errors import UserError
from resdet.models.tracing import is_captured, is_scripting, scripted_as

# Entries of M held at a time, about 100 MB with what is made of them on the way. All boxes of a usual batch fit; only
# adaptive sampling of large boxes needs several rounds (each round of the backward passes over the whole gradient).
_ENTRIES = 4 * 1024 * 1024
# Boxes whose rows are pooled, then transposed while a core's cache still holds them.
_BLOCK = 64


def roi_align(
    input: Tensor,
    boxes: Union[Tensor, list[Tensor]],  # noqa: UP007 - TorchScript reads this signature
    output_size: BroadcastingList2[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pool each box into a grid of bins: the mean of bilinear samples, as ``torchvision.ops.roi_align``.

    On a CPU this is the sparse product described at the top of this module; on other devices and under scripting,
    tracing, ``torch.compile`` and ``torch.export`` it is torchvision's own operator. Differentiable once, with
    respect to ``input``. The arguments are torchvision's, and so is the result ``[K, C, P, Q]``, contiguous, in the
    type of ``input`` also under ``torch.autocast``. A box that names an image that ``input`` does not have raises a
    UserError (torchvision's kernel reads beyond the end).

    Source: Mask R-CNN, section 3; torchvision's ``csrc/ops/cpu/roi_align_kernel.cpp``. Deviation: boxes may have
    another floating type than ``input``, so bfloat16 features go with float32 boxes.
    """
    if not is_scripting():  # noqa: SIM102 - TorchScript drops this block only if the condition stands alone
        if _runs_here([input]):
            check_roi_boxes_shape(boxes)
            rois = boxes if isinstance(boxes, Tensor) else convert_boxes_to_roi_format(boxes)  # [K, 5]
            bins = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
            plan = _Plan(bins, (float(spatial_scale),), sampling_ratio, aligned)
            pooled: Tensor = _SparseRoIAlign.apply(rois, None, plan, input)
            return pooled
    result: Tensor = ops.roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)
    return result


class MultiScaleRoIAlign(ops.MultiScaleRoIAlign):  # type: ignore[misc]
    """``torchvision.ops.MultiScaleRoIAlign``, by its own kernel and functions, with the choice of aligned boxes.

    The levels' strides may be given. torchvision guesses them in the first call and keeps the guess: a level's height
    over the image's, rounded to a power of two. As images are padded to 32 pixels, it is wrong in all images if the
    first is up to 22 pixels high after scaling, or from 33 to 45.
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | tuple[int, int] | list[int],
        sampling_ratio: int,
        *,
        aligned: bool = False,
        strides: Sequence[int] = (),  # of the levels named, finest first; empty to guess them
    ) -> None:
        super().__init__(featmap_names, output_size, sampling_ratio)
        if strides:
            self.scales = [1 / stride for stride in strides]
            finest, coarsest = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
            self.map_levels = initLevelMapper(finest, coarsest, self.canonical_scale, self.canonical_level)
        self.aligned = aligned

    def forward(
        self,
        x: dict[str, Tensor],  # [B, C, H_i, W_i] of each level
        boxes: list[Tensor],  # [N, 4] of each image, in pixels of the network's input
        image_shapes: list[tuple[int, int]],  # heights and widths, from which unknown strides are guessed
    ) -> Tensor:
        """Pool each box, ``[C, P, Q]``, from the level that its area picks (Feature Pyramid Networks, equation 1)."""
        features = _filter_input(x, self.featmap_names)
        if self.scales is None or self.map_levels is None:
            self.scales, self.map_levels = _setup_scales(
                features, image_shapes, self.canonical_scale, self.canonical_level
            )
        return self._pool(features, boxes)

    def _pool(self, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
        if self.aligned:
            return _pool_aligned(features, boxes, self.output_size, self.sampling_ratio, self.scales, self.map_levels)
        result: Tensor = _multiscale_roi_align(
            features, boxes, self.output_size, self.sampling_ratio, self.scales, self.map_levels
        )
        return result


class FastMultiScaleRoIAlign(MultiScaleRoIAlign):
    """The same on every CPU core, each level one sparse product."""

    def _pool(self, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
        if not _runs_here(features):
            return super()._pool(features, boxes)
        rois = convert_boxes_to_roi_format(boxes)  # [K, 5]
        levels = self.map_levels(boxes) if len(features) > 1 else None  # int64 [K]
        plan = _Plan(self.output_size, tuple(self.scales), self.sampling_ratio, self.aligned)
        pooled: Tensor = _SparseRoIAlign.apply(rois, levels, plan, *features)
        return pooled

    def __prepare_scriptable__(self) -> MultiScaleRoIAlign:
        return scripted_as(self, MultiScaleRoIAlign)


def pool_by_level(
    pool: MultiScaleRoIAlign, features: dict[str, Tensor], boxes: Tensor, image_shapes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Pool boxes ``[B, P, 4]`` of a batch as ``pool`` does, sorted by the level that they are pooled from.

    How many are on each level is the one thing that is looked at; torchvision looks at each level's, and at each
    writes its part of the result to scattered rows.

    Returns what was pooled, ``[B * P, C, 7, 7]``, and which box each row is of, int64 ``[B * P]``.
    """
    levels = _filter_input(features, pool.featmap_names)  # [B, C, H_i, W_i] each
    num_images, num_boxes = boxes.shape[:2]
    image = torch.arange(num_images, device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(-1, num_boxes, 1)
    rois = torch.cat([image, boxes], dim=2).flatten(0, 1)  # [B * P, 5]
    if pool.scales is None or pool.map_levels is None:
        pool.scales, pool.map_levels = _setup_scales(levels, image_shapes, pool.canonical_scale, pool.canonical_level)
    counts = [len(rois)]
    order = torch.arange(len(rois), device=rois.device)
    if len(levels) > 1:
        level = pool.map_levels([rois[:, 1:]])  # [B * P]
        order = level.argsort(stable=True)
        rois = rois[order]
        numbers = torch.arange(len(levels), device=rois.device)
        counts = (level[:, None] == numbers).sum(dim=0).tolist()  # waits for the device
    parts = zip(levels, torch.split(rois, counts), pool.scales, strict=True)
    return torch.cat(
        [
            roi_align(feature, part, pool.output_size, scale, pool.sampling_ratio, pool.aligned)
            for feature, part, scale in parts
        ]
    ), order


def _pool_aligned(
    features: list[Tensor],
    boxes: list[Tensor],
    output_size: tuple[int, int],
    sampling_ratio: int,
    scales: Optional[list[float]],  # noqa: UP045 - TorchScript reads this signature
    mapper: Optional[LevelMapper],  # noqa: UP045
) -> Tensor:
    """Compute what torchvision's ``_multiscale_roi_align`` does, followed line by line, with aligned boxes."""
    if scales is None or mapper is None:
        raise ValueError("scales and mapper should not be None")
    rois: Tensor = convert_boxes_to_roi_format(boxes)
    levels: Tensor = mapper(boxes) if len(features) > 1 else torch.zeros_like(rois[:, 0], dtype=torch.int64)
    output = features[0].new_zeros([len(rois), features[0].shape[1], output_size[0], output_size[1]])
    per_level: list[Tensor] = []
    for level, (feature, scale) in enumerate(zip(features, scales)):  # noqa: B905 - TorchScript knows no strict
        on_level = torch.where(levels == level)[0]  # waits for the device, as torchvision's does
        pooled = ops.roi_align(feature, rois[on_level], output_size, scale, sampling_ratio, True)
        if torchvision._is_tracing():
            per_level.append(pooled.to(output.dtype))
        else:
            output[on_level] = pooled.to(output.dtype)
    if torchvision._is_tracing():
        output = _onnx_merge_levels(levels, per_level)
    return output


def _runs_here(features: list[Tensor]) -> bool:
    """Return whether the sparse product may replace torchvision's operator."""
    if is_captured():
        return False
    return all(
        type(feature) in (Tensor, torch.nn.Parameter)  # no fake tensors, no proxies of a tracer
        and feature.device.type == "cpu"
        and feature.layout == torch.strided
        and feature.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        for feature in features
    )


class _Plan(NamedTuple):
    bins: tuple[int, int]
    scales: tuple[float, ...]  # of each level
    sampling_ratio: int
    aligned: bool


class _SparseRoIAlign(torch.autograd.Function):
    """The product ``M @ features`` and its adjoint; each box is pooled from the level that ``levels`` names."""

    @staticmethod
    def forward(ctx: Any, rois: Tensor, levels: Tensor | None, plan: _Plan, *features: Tensor) -> Tensor:
        num_images, channels = features[0].shape[:2]
        if len(rois):
            first, last = (int(index) for index in rois[:, 0].aminmax())
            if first < 0 or last >= num_images:
                raise UserError(f"boxes: the image index must lie in [0, {num_images}), got {first} to {last}")
        ctx.save_for_backward(rois, levels)
        ctx.plan = plan
        ctx.features = [(feature.shape, feature.dtype) for feature in features]

        num_bins = plan.bins[0] * plan.bins[1]
        output = features[0].new_empty(len(rois), channels, *plan.bins)
        if output.numel() == 0:
            return output
        for level, feature in enumerate(features):
            on_level = _on_level(levels, level, len(rois))
            if len(on_level) == 0:
                continue
            grids = _grids_on(rois[on_level], feature.shape, feature.dtype, level, plan)
            # Of all ways to turn NCHW into rows this was the fastest; it is free where the layout is right already.
            rows = feature.detach().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
            rows = rows.reshape(-1, channels).contiguous()  # [R, C]
            for chunk in _chunks(grids):
                pixels, weights = _entries(grids, chunk)  # [k * P * Q, 16] each, where a bin takes 2 x 2 samples
                weights = weights.to(rows.dtype)
                for start in range(0, len(chunk), _BLOCK):
                    block = slice(start * num_bins, (start + _BLOCK) * num_bins)
                    pooled = F.embedding_bag(pixels[block], rows, mode="sum", per_sample_weights=weights[block])
                    # [64 * P * Q, C] -> [64, C, P, Q]
                    swapped = _swap_last(pooled.view(-1, num_bins, channels)).view(-1, channels, *plan.bins)
                    boxes = on_level[chunk[start : start + _BLOCK]]
                    output.index_copy_(0, boxes, swapped.to(output.dtype))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rois, levels = ctx.saved_tensors
        grads: list[Tensor | None] = []
        for level, (shape, dtype) in enumerate(ctx.features):
            if not ctx.needs_input_grad[3 + level]:
                grads.append(None)
                continue
            num_images, channels, height, width = shape
            num_rows = num_images * height * width
            total: Tensor | None = None
            if grad.numel():
                on_level = _on_level(levels, level, len(rois))
                grids = _grids_on(rois[on_level], shape, dtype, level, ctx.plan)
                for chunk in _chunks(grids):
                    grad_rows = _gather_rows(grad, on_level[chunk], dtype)  # [k * P * Q, C]
                    part = multiply_transposed(*_entries(grids, chunk), grad_rows, num_rows)
                    total = part if total is None else total.add_(part)
            if total is None:
                total = grad.new_zeros(num_rows, channels, dtype=dtype)
            grads.append(total.view(num_images, height, width, channels).permute(0, 3, 1, 2))  # [B, C, H, W]
        return None, None, None, *grads


def _gather_rows(grad: Tensor, boxes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``grad[boxes]``, ``[K, C, P, Q]``, as rows ``[len(boxes) * P * Q, C]``."""
    channels, num_bins = grad.shape[1], grad.shape[2] * grad.shape[3]
    rows = grad.new_empty(len(boxes), num_bins, channels, dtype=dtype)
    flat_grad = grad.flatten(2)  # [K, C, P * Q]
    for start in range(0, len(boxes), _BLOCK):
        block = flat_grad.index_select(0, boxes[start : start + _BLOCK])
        rows[start : start + _BLOCK] = _swap_last(block)
    return rows.view(-1, channels)


def multiply_transposed(pixels: Tensor, weights: Tensor, grad_rows: Tensor, num_rows: int) -> Tensor:
    """Multiply a sparse matrix, transposed, with rows ``[N, C]``: the adjoint of reading weighted rows.

    The matrix has ``S`` entries in each of its ``N`` rows: their columns are ``pixels``, their values ``weights``, both
    ``[N, S]``. Each sum of the result ``[num_rows, C]`` is taken in float32 at least and rounded once, by one thread,
    in an order that the entries alone decide.
    """
    # About 4 in 10 weights are zero. Dropping them pays here, ahead of the sort.
    used = weights.view(-1).nonzero().view(-1)
    row, order = pixels.view(-1).index_select(0, used).sort(stable=True)
    used = used.index_select(0, order)
    offsets = F.pad(torch.bincount(row, minlength=num_rows).cumsum(0), (1, 0))
    return F.embedding_bag(
        used.div(pixels.shape[1], rounding_mode="floor").to(pixels.dtype),
        grad_rows,
        offsets.to(pixels.dtype),
        mode="sum",
        per_sample_weights=weights.view(-1).index_select(0, used).to(grad_rows.dtype),
        include_last_offset=True,
    )


def _swap_last(matrices: Tensor) -> Tensor:
    """Transpose contiguous matrices ``[N, I, J]`` into contiguous ``[N, J, I]``.

    A channel shuffle with ``I`` groups is this transposition of every pixel, and its channels-last kernel is blocked
    and parallel: in float32 3 times faster than ``transpose(1, 2).contiguous()`` or a product with the identity, twice
    as fast as a loop of 2-d transpositions; in bfloat16 as fast as the first.
    """
    count, rows, columns = matrices.shape
    size = rows * columns
    pixels = matrices.as_strided((1, size, count, 1), (count * size, 1, size, size))
    return F.channel_shuffle(pixels, rows).permute(0, 2, 3, 1).view(count, columns, rows)


def _on_level(levels: Tensor | None, level: int, num_boxes: int) -> Tensor:
    """Return the indices of the boxes to pool from ``level``."""
    return torch.arange(num_boxes) if levels is None else (levels == level).nonzero().view(-1)


class _Axis(NamedTuple):
    """Boxes along one axis of a feature map."""

    start: Tensor  # [K], where each box begins, in pixels of the feature map
    bin_size: Tensor  # [K], the extent of its bins; negative for a reversed box
    num_samples: Tensor  # [K], samples a bin, whole numbers
    num_bins: int  # bins a box
    size: int  # pixels of the feature map


class _Grids(NamedTuple):
    """The sampling grids of boxes on a feature map."""

    image: Tensor  # int64 [K]
    y: _Axis
    x: _Axis


def _grids_on(rois: Tensor, shape: torch.Size, dtype: torch.dtype, level: int, plan: _Plan) -> _Grids:
    """Lay the boxes' grids on a level; every operation in torchvision's order, for equal rounding."""
    corners = rois[:, 1:].detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    corners = corners * plan.scales[level] - (0.5 if plan.aligned else 0.0)  # [K, 4]
    axes = []
    for axis, (num_bins, size) in enumerate(zip(plan.bins, shape[2:], strict=True)):
        start, length = corners[:, 1 - axis], corners[:, 3 - axis] - corners[:, 1 - axis]
        bin_size = (length if plan.aligned else length.clamp(min=1.0)) / num_bins
        num_samples = bin_size.ceil() if plan.sampling_ratio <= 0 else torch.full_like(start, plan.sampling_ratio)
        axes.append(_Axis(start, bin_size, num_samples.clamp(min=0.0).nan_to_num(0.0, posinf=0.0), num_bins, size))
    return _Grids(rois[:, 0].long(), axes[0], axes[1])


def _chunks(grids: _Grids) -> Iterator[Tensor]:
    """Split the boxes so that each part has at most ``_ENTRIES`` entries of ``M``, or is a single box."""
    num_boxes = len(grids.image)
    if num_boxes == 0:
        return
    y_slots, x_slots = 2 * grids.y.num_samples, 2 * grids.x.num_samples  # each sample reads two pixels an axis
    num_bins = grids.y.num_bins * grids.x.num_bins
    if num_boxes * num_bins * float(y_slots.amax() * x_slots.amax()) <= _ENTRIES:
        yield torch.arange(num_boxes)
        return
    order = (y_slots * x_slots).argsort(stable=True)  # like with like: a part is as wide as its widest box
    part: list[int] = []
    y_most = x_most = 0.0
    for box, y_slot, x_slot in zip(order.tolist(), y_slots[order].tolist(), x_slots[order].tolist(), strict=True):
        y_most, x_most = max(y_most, y_slot), max(x_most, x_slot)
        if part and (len(part) + 1) * num_bins * y_most * x_most > _ENTRIES:
            yield torch.tensor(part)
            part, y_most, x_most = [], y_slot, x_slot
        part.append(box)
    yield torch.tensor(part)


def _entries(grids: _Grids, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Build the rows of ``M`` for ``boxes``: their pixels and weights, each ``[len(boxes) * P * Q, S_y * S_x]``."""
    y, y_weight = _axis_entries(grids.y, boxes)
    x, x_weight = _axis_entries(grids.x, boxes)
    y = (y + (grids.image[boxes] * grids.y.size)[:, None, None]) * grids.x.size
    shape = (y.shape[0] * y.shape[1] * x.shape[1], y.shape[2] * x.shape[2])
    # embedding_bag reads half as much from int32, and sorting it takes half as long.
    index_type = torch.int32 if (grids.image.amax() + 1) * grids.y.size * grids.x.size < 2**31 else torch.int64
    y, x = y.to(index_type), x.to(index_type)
    pixels = y[:, :, None, :, None] + x[:, None, :, None, :]  # [k, P, Q, S_y, S_x]
    weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    return pixels.view(shape), weights.view(shape)


def _axis_entries(axis: _Axis, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolate along one axis: which pixels each bin reads, and their share in the mean of its samples.

    Pixels that several samples of a bin read are merged into one slot. Unused slots have weight 0. Returns pixels,
    int64, and weights, each ``[len(boxes), num_bins, S]``.
    """
    start, bin_size, num_samples = (tensor[boxes, None, None] for tensor in axis[:3])  # [k, 1, 1] each
    most = max(int(num_samples.amax()), 1)
    sample = torch.arange(most, dtype=start.dtype)
    bin_index = torch.arange(axis.num_bins, dtype=start.dtype)[:, None]
    position = start + bin_index * bin_size + (sample + 0.5) * bin_size / num_samples  # [k, num_bins, most]
    used = (position >= -1.0) & (position <= axis.size) & (sample < num_samples)
    share = used / num_samples.clamp(min=1.0)

    position = position.clamp(0.0, axis.size - 1.0).nan_to_num(0.0)
    low = position.floor()
    to_high = (position - low) * share
    to_low = share - to_high
    low = low.long()

    # Each sample reads the two pixels of the one before it, or one of them and a new one, or two new ones.
    step = low.diff(dim=-1)
    slot = F.pad(torch.where(step < 0, 2, step.clamp(max=2)).cumsum(-1), (1, 0))
    num_slots = int(slot.max()) + 2
    weight = share.new_zeros(*low.shape[:2], num_slots)
    weight.scatter_add_(-1, slot, to_low).scatter_add_(-1, slot + 1, to_high)
    pixel = low.new_zeros(*low.shape[:2], num_slots)
    pixel.scatter_(-1, slot + 1, (low + 1).clamp(max=axis.size - 1)).scatter_(-1, slot, low)
    return pixel, weight
