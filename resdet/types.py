"""The conventions of this package for boxes, labels and sizes, and the types that carry them.

Legend: ``B`` images, ``N`` boxes, ``K`` foreground classes, ``H, W`` pixels.

* A box is ``(x1, y1, x2, y2)`` in absolute pixels of its image and continuous coordinates: the pixel in column ``c``
  covers ``[c, c + 1]``, and a box's width is ``x2 - x1`` (no "+ 1"). Tensors are float32 ``[N, 4]``. Any other form
  says so in its name (``boxes_xywh``).
* A label is an int64 in ``1..K``; 0 is the background and never appears in a target or a prediction.
  ``category_id`` is a dataset's own id and is used only when files are read or written.
* Sizes are ``(height, width)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Category:
    """One foreground class.

    Attributes:
        label: The model's label, 1..K.
        category_id: The id in the dataset's files (COCO's 1..90 with gaps; equal to ``label`` for VOC).
        name: The class name, unique in its dataset.
    """

    label: int
    category_id: int
    name: str

    @property
    def is_placeholder(self) -> bool:
        """Whether it fills one of the gaps in COCO's ids, as torchvision's detectors of COCO have them."""
        return self.name == f"N/A ({self.category_id})"


class Target(TypedDict):
    """Ground truth of one training image, in the form that torchvision's detectors take.

    Attributes:
        boxes: float32 ``[N, 4]``; ``[0, 4]`` for an image without objects.
        labels: int64 ``[N]``, 1..K.
        image_id: int64 ``[]``, the dataset's id of the image (for messages; models ignore it).
    """

    boxes: Tensor
    labels: Tensor
    image_id: Tensor


class Prediction(TypedDict):
    """Detections in one image, sorted by falling score, in pixels of the image that was passed in.

    Attributes:
        boxes: float32 ``[N, 4]``.
        labels: int64 ``[N]``, 1..K.
        scores: float32 ``[N]``, in [0, 1].
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Detections:
    """Detections of a whole dataset, one row each, images in any order.

    Attributes:
        image_index: int64 ``[D]``: row of the image in the dataset's annotation table.
        boxes: float64 ``[D, 4]``, ``(x1, y1, x2, y2)``.
        labels: int64 ``[D]``, 1..K.
        scores: float64 ``[D]``.
    """

    image_index: Ints
    boxes: Floats
    labels: Ints
    scores: Floats

    def __len__(self) -> int:
        return len(self.scores)

    def of_image(self, index: int) -> Prediction:
        """Return the detections in image ``index``, sorted by falling score."""
        rows = np.flatnonzero(self.image_index == index)
        rows = rows[np.argsort(-self.scores[rows], kind="stable")]
        return Prediction(
            boxes=torch.from_numpy(self.boxes[rows].astype(np.float32)),
            labels=torch.from_numpy(self.labels[rows]),
            scores=torch.from_numpy(self.scores[rows].astype(np.float32)),
        )


HostResize = Callable[[Tensor, Target, int], tuple[Tensor, Target]]
"""Takes a training image, uint8 ``[3, H, W]`` on the CPU, its target and its seed; returns both, resized."""


def target_to(target: Target, device: torch.device) -> Target:
    """Return a target whose tensors are on ``device``."""
    return Target(
        boxes=target["boxes"].to(device, non_blocking=True),
        labels=target["labels"].to(device, non_blocking=True),
        image_id=target["image_id"].to(device, non_blocking=True),
    )


def categories_to_plain(categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Return categories as plain values, as checkpoints and exports store them."""
    return [{"label": c.label, "category_id": c.category_id, "name": c.name} for c in categories]


def categories_from_plain(plain: Sequence[dict[str, Any]]) -> tuple[Category, ...]:
    """Return categories from the values that ``categories_to_plain`` returned; a ValueError says what they must be."""
    if not isinstance(plain, list | tuple):
        raise ValueError(f"classes must be a list, got a {type(plain).__name__}")
    for label, entry in enumerate(plain, 1):
        if not isinstance(entry, dict) or type(entry.get("label")) is not int or entry["label"] != label:
            raise ValueError(f"class {label} of {len(plain)} must be a mapping with 'label': {label}")
        if type(entry.get("category_id")) is not int or not isinstance(entry.get("name"), str):
            raise ValueError(f"class {label} of {len(plain)} must have a whole number 'category_id' and a text 'name'")
    return tuple(Category(c["label"], c["category_id"], c["name"]) for c in plain)
