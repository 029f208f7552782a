"""An image with its boxes and everything known of each box, on its way from the table to the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from resdet.types import Floats


@dataclass(frozen=True)
class Sample:
    """One image and its boxes. All fields but ``image`` and ``image_id`` are columns: one row for each box.

    Crowd regions and difficult objects are boxes like any other here; ``DetectionDataset.target_of`` leaves them out.
    """

    image: npt.NDArray[np.uint8]  # RGB [H, W, 3]
    image_id: int  # the dataset's; that of the first where several images were put together
    boxes: npt.NDArray[Any]  # float32 or float64 [N, 4], (x1, y1, x2, y2) inside the image
    labels: npt.NDArray[np.int64]  # [N], 1..K
    crowd: npt.NDArray[np.bool_]  # [N], COCO's iscrowd
    difficult: npt.NDArray[np.bool_]  # [N], VOC's difficult
    annotation_ids: npt.NDArray[np.int64]  # [N]; an id may occur twice where images were put together
    visible: npt.NDArray[np.float64]  # [N], share of the box's area that augmentation has left, in [0, 1]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Sample:
        """Return the sample with some of its boxes, by row number or mask."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _COLUMNS})

    def moved(self, image: npt.NDArray[np.uint8], boxes: npt.NDArray[np.float64]) -> Sample:
        """Return the sample after a geometric change into another image, with boxes ``[N, 4]`` in pixels of that one.

        Boxes are clipped to it here, and ``visible`` is multiplied by the share of each that is left.
        """
        clipped = np.clip(boxes, 0, extent(image.shape))
        whole, inside = (np.prod(corners[:, 2:] - corners[:, :2], axis=1) for corners in (boxes, clipped))  # [N] each
        share = np.divide(inside, whole, out=np.zeros_like(inside), where=whole > 0)
        return replace(self, image=image, boxes=clipped, visible=self.visible * share)


_NO_THICKNESS = 1e-6  # pixels
_COLUMNS = [field.name for field in fields(Sample) if field.name not in ("image", "image_id")]


def extent(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return what turns fractions of an image ``[H, W, 3]`` into pixels of boxes: ``(W, H, W, H)``."""
    return np.array([shape[1], shape[0], shape[1], shape[0]], dtype=np.float64)


def joined(samples: Sequence[Sample]) -> Sample:
    """Return the first sample's image with the boxes of all samples, in their order."""
    columns: dict[str, Any] = {name: np.concatenate([getattr(sample, name) for sample in samples]) for name in _COLUMNS}
    return replace(samples[0], **columns)


def uncovered(boxes: Floats, covers: Floats) -> tuple[Floats, Floats]:
    """Subtract rectangles ``[R, 4]`` from boxes ``[N, 4]``, each with an area.

    Returns:
        The boxes around what is left of each, ``[N, 4]``, and which share of its area that is, ``[N]``. Boxes that no
        rectangle meets keep their numbers; so do those wholly covered, with share 0.
    """
    left, share = boxes.copy(), np.ones(len(boxes))
    if len(covers) == 0:
        return left, share
    starts, ends = np.maximum(covers[:, None, :2], boxes[:, :2]), np.minimum(covers[:, None, 2:], boxes[:, 2:])
    meets = np.all(starts < ends, axis=2)  # [R, N]
    for i in np.flatnonzero(np.any(meets, axis=0)):
        box, over = boxes[i], covers[meets[:, i]]
        # The rectangles' edges cut the box into a grid of cells, each wholly covered or wholly free.
        x = np.unique(np.clip(np.append(over[:, [0, 2]], box[[0, 2]]), box[0], box[2]))
        y = np.unique(np.clip(np.append(over[:, [1, 3]], box[[1, 3]]), box[1], box[3]))
        by_x = (over[:, None, 0] <= x[:-1]) & (x[1:] <= over[:, None, 2])
        by_y = (over[:, None, 1] <= y[:-1]) & (y[1:] <= over[:, None, 3])
        covered = np.any(by_y[:, :, None] & by_x[:, None, :], axis=0)  # [rows, columns] of the grid
        # Edges that are equal up to round-off leave cells without thickness, in which nothing is seen.
        free = ~covered & (np.diff(y) > _NO_THICKNESS)[:, None] & (np.diff(x) > _NO_THICKNESS)
        columns, rows = np.flatnonzero(free.any(axis=0)), np.flatnonzero(free.any(axis=1))
        share[i] = (np.outer(np.diff(y), np.diff(x)) * free).sum() / ((x[-1] - x[0]) * (y[-1] - y[0]))
        if len(rows):
            left[i] = x[columns[0]], y[rows[0]], x[columns[-1] + 1], y[rows[-1] + 1]
    return left, share
