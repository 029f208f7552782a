"""Find the boxes that no anchor of a detector reaches, exactly, for a whole dataset at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable

IOU_REACHED = 0.5
"""IoU from which an anchor reaches a box."""

SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, np.inf)}
"""Areas of boxes in pixels of the stored image, in COCO's classes."""

_STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class AnchorLayout:
    """Where a detector puts its anchors.

    Attributes:
        cell_anchors: For each level P2..P6 float ``[A, 4]``: the anchors of one location, xyxy around 0.
        nominal: Whether anchors of a level are 4, 8, 16, 32, 64 pixels apart, rather than the padded image's size over
            the level's, rounded down.
        min_sizes: Pixels to which the shorter side is scaled; of several, one is drawn for each training image.
        max_size: Maximum of the longer side after that, in pixels.
        sides_rounded: Whether scaled sides are rounded to the nearest pixel, as by Pillow's resize, rather than down.
    """

    cell_anchors: tuple[npt.NDArray[np.float64], ...]
    nominal: bool
    min_sizes: tuple[int, ...]
    max_size: int
    sides_rounded: bool


@dataclass(frozen=True)
class Coverage:
    """How many boxes no anchor reaches.

    Attributes:
        num_boxes: Number of boxes by size, and ``"all"``.
        unreached: Share of them that no anchor overlaps by ``IOU_REACHED``, in [0, 1]; the mean over the sizes to which
            training scales images. NaN where there are no boxes.
    """

    num_boxes: dict[str, int]
    unreached: dict[str, float]


def anchor_coverage(table: AnnotationTable, layout: AnchorLayout) -> Coverage:
    """Count the boxes that no anchor reaches, of those that training uses.

    Each image is considered alone: in a batch it is padded to the largest, which can change torchvision's measured
    strides of the coarsest levels by a few pixels.
    """
    keep = table.trainable(use_difficult=True)
    boxes = table.boxes_in_image()[keep]  # [N, 4]
    sizes = table.sizes[table.image_of_box()[keep]].astype(np.float64)
    unreached = np.zeros(len(boxes))
    for min_size in layout.min_sizes:
        unreached += best_iou(boxes, sizes, layout, min_size) < IOU_REACHED
    unreached /= len(layout.min_sizes)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    groups = {name: (area >= low) & (area < high) for name, (low, high) in SIZES.items()}
    groups["all"] = np.ones(len(boxes), dtype=np.bool_)
    return Coverage(
        num_boxes={name: int(mask.sum()) for name, mask in groups.items()},
        unreached={name: float(unreached[mask].mean()) if mask.any() else np.nan for name, mask in groups.items()},
    )


def best_iou(
    boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], layout: AnchorLayout, min_size: int
) -> npt.NDArray[np.float64]:
    """Return the largest IoU of each box with any anchor of its image.

    Anchors of one shape differ only in their location, and their intersection with a box is the product of what they
    share along each axis: the best one is the nearest along both. So one anchor of each shape and level stands for the
    whole grid.

    Args:
        boxes: ``[N, 4]``, xyxy, pixels of the stored image, within it.
        sizes: ``[N, 2]``, ``(height, width)`` of the stored image of each box.
        layout: The detector's anchors and resize.
        min_size: One of ``layout.min_sizes``.

    Returns:
        float64 ``[N]``, in [0, 1].
    """
    scaled = _scaled_sizes(sizes, layout, min_size)  # [N, 2], like all that follows
    factor = scaled / sizes
    low, high = boxes[:, 1::-1] * factor, boxes[:, 3:1:-1] * factor  # (y, x), as sizes are (height, width)
    area = np.prod(high - low, axis=1)  # [N]
    padded = np.ceil(scaled / 32) * 32
    best = np.zeros(len(boxes))
    for nominal, cells in zip(_STRIDES, layout.cell_anchors, strict=True):
        grid = np.ceil(padded / nominal)
        stride = np.full_like(grid, nominal) if layout.nominal else padded // grid
        for cell in cells:
            anchor_low, anchor_high = cell[1::-1], cell[3:1:-1]
            offset = (low + high - anchor_low - anchor_high) / 2
            shift = np.clip(np.round(offset / stride), 0, grid - 1) * stride
            shared = np.minimum(high, shift + anchor_high) - np.maximum(low, shift + anchor_low)
            both = np.prod(np.maximum(shared, 0), axis=1)  # [N]
            best = np.maximum(best, both / (area + np.prod(anchor_high - anchor_low) - both))
    return best


def _scaled_sizes(sizes: npt.NDArray[np.float64], layout: AnchorLayout, min_size: int) -> npt.NDArray[np.float64]:
    """Return ``(height, width)`` as the detector's transform makes them, float64 ``[N, 2]``."""
    scale = np.minimum(min_size / sizes.min(axis=1), layout.max_size / sizes.max(axis=1))
    scaled = sizes * scale[:, None]
    whole: npt.NDArray[np.float64] = np.floor(scaled + 0.5 if layout.sides_rounded else scaled)
    return np.maximum(whole, 1)
