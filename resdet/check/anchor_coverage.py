"""Find the boxes that no anchor of a detector reaches, exactly, for a whole dataset at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resdet.data.annotations import AnnotationTable
from resdet.models.proposals import Anchors
from resdet.types import Floats

IOU_REACHED = 0.5
"""IoU from which an anchor reaches a box."""

SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, np.inf)}
"""Areas of boxes in pixels of the stored image, in COCO's classes."""

_STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class AnchorLayout:
    """Where a detector puts its anchors."""

    cell_anchors: tuple[Floats, ...]  # [A, 4] for each level P2..P6: the anchors of one location, xyxy around 0
    nominal: bool  # whether a level's stride is 4, 8, 16, 32 or 64, not the padded image's size over the level's
    min_sizes: tuple[int, ...]  # pixels of the scaled shorter side; of several, one is drawn for each training image
    max_size: int  # maximum of the longer side after that, in pixels
    sides_rounded: bool  # whether scaled sides are rounded to the nearest pixel, as by Pillow's resize, or down
    tile: int | None = None  # side in pixels of the tiles that images are seen by; None: images are seen whole


def anchor_layout(
    anchor_sizes: Sequence[int],
    aspect_ratios: Sequence[float],
    *,
    min_sizes: tuple[int, ...],
    max_size: int,
    rounded: bool = True,
    nominal: bool = False,
    sides_rounded: bool = False,
    tile: int | None = None,
) -> AnchorLayout:
    """Return where a detector puts its anchors: one size for each level, every ratio at each location."""
    sizes = tuple((size,) for size in anchor_sizes)
    anchors = Anchors(sizes, (tuple(aspect_ratios),) * len(sizes), rounded=rounded, strides=(), widened=True)
    cells = tuple(cell.double().numpy() for cell in anchors.cell_anchors)
    return AnchorLayout(cells, nominal, min_sizes, max_size, sides_rounded, tile)


@dataclass(frozen=True)
class Coverage:
    """How many boxes no anchor reaches, for each of ``SIZES`` and for ``"all"``."""

    num_boxes: dict[str, int]
    unreached: dict[str, float]  # share in [0, 1], the mean over ``min_sizes``; NaN where there are no boxes


def anchor_coverage(table: AnnotationTable, layout: AnchorLayout) -> Coverage:
    """Count the boxes that no anchor overlaps by ``IOU_REACHED``, of those that training uses.

    Each image is considered alone: in a batch it is padded to the largest, which can change torchvision's measured
    strides of the coarsest levels by a few pixels.
    """
    keep = table.trainable(use_difficult=True)
    boxes = table.boxes_in_image()[keep]  # [N, 4]
    sizes = table.sizes[table.image_of_box()[keep]].astype(np.float64)  # [N, 2]
    if layout.tile is not None:
        boxes, sizes = in_tiles(boxes, sizes, layout.tile)
    missed = [best_iou(boxes, sizes, layout, min_size) < IOU_REACHED for min_size in layout.min_sizes]
    unreached = np.mean(missed, axis=0)  # [N]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    groups = {name: (area >= low) & (area < high) for name, (low, high) in SIZES.items()}
    groups["all"] = np.ones(len(boxes), dtype=np.bool_)
    return Coverage(
        num_boxes={name: int(mask.sum()) for name, mask in groups.items()},
        unreached={name: float(unreached[mask].mean()) if mask.any() else np.nan for name, mask in groups.items()},
    )


def in_tiles(boxes: Floats, sizes: Floats, side: int) -> tuple[Floats, Floats]:
    """Return each box as the tile around it holds it, ``[N, 4]``, and the tile's ``(height, width)``, ``[N, 2]``."""
    tiles = np.minimum(sizes, side)
    corners = np.clip(np.round((boxes[:, :2] + boxes[:, 2:] - tiles[:, ::-1]) / 2), 0, (sizes - tiles)[:, ::-1])
    return np.clip(boxes - np.tile(corners, 2), 0, np.tile(tiles[:, ::-1], 2)), tiles


def best_iou(boxes: Floats, sizes: Floats, layout: AnchorLayout, min_size: int) -> Floats:
    """Return the largest IoU of each box with any anchor of its image, ``[N]``.

    Anchors of one shape differ only in their location, and their intersection with a box is the product of what they
    share along each axis: the best one is the nearest along both. So one anchor of each shape and level stands for the
    whole grid.

    ``boxes``, ``[N, 4]``, are xyxy in pixels of the stored image and within it; ``sizes``, ``[N, 2]``, are the
    ``(height, width)`` of each box's image; ``min_size`` is one of ``layout.min_sizes``.
    """
    limits = min_size / sizes.min(axis=1), layout.max_size / sizes.max(axis=1)
    scaled = sizes * np.minimum(*limits)[:, None]  # [N, 2], like all that follows
    scaled = np.maximum(np.floor(scaled + 0.5 if layout.sides_rounded else scaled), 1)
    factor = scaled / sizes
    low, high = boxes[:, 1::-1] * factor, boxes[:, 3:1:-1] * factor  # (y, x), as sizes are (height, width)
    area = np.prod(high - low, axis=1)  # [N]
    padded = np.ceil(scaled / 32) * 32
    best = np.zeros(len(boxes))
    for nominal, cells in zip(_STRIDES, layout.cell_anchors, strict=True):
        grid = np.ceil(padded / nominal)
        stride = np.full_like(grid, nominal) if layout.nominal else padded // grid
        for cell in cells:
            anchor_low, anchor_high = cell[1::-1], cell[3:1:-1]  # [2] each
            offset = (low + high - anchor_low - anchor_high) / 2
            shift = np.clip(np.round(offset / stride), 0, grid - 1) * stride
            shared = np.minimum(high, shift + anchor_high) - np.maximum(low, shift + anchor_low)
            both = np.prod(np.maximum(shared, 0), axis=1)  # [N]
            best = np.maximum(best, both / (area + np.prod(anchor_high - anchor_low) - both))
    return best
