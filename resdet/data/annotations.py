"""One flat table for all images and boxes of a dataset: NumPy arrays, no Python object per box."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from resdet.errors import DataError
from resdet.types import Category

MIN_TRAINABLE_SIDE = 0.1
"""Pixels. A box thinner than this inside its image teaches nothing and can vanish when the image is resized in
float32, where torchvision refuses it ("positive height and width"); training leaves it out, and says so."""


@dataclass(frozen=True)
class AnnotationTable:
    """Images and ground-truth boxes; the boxes of image ``i`` are rows ``offsets[i]:offsets[i + 1]``.

    Boxes stand as their source gave them (crowd, difficult and degenerate ones too): evaluation must see what the
    reference evaluators see. ``trainable`` says which of them training uses.

    Attributes:
        name: Where the table came from, for messages (a file or folder).
        categories: Foreground classes in label order: ``categories[k].label == k + 1``.
        image_ids: int64 ``[I]``, the dataset's ids (VOC has none: 1..I in the order of the split).
        file_names: unicode ``[I]``, relative to the image folder.
        sizes: int32 ``[I, 2]``, ``(height, width)``.
        offsets: int64 ``[I + 1]``.
        boxes_xywh: float64 ``[N, 4]``, ``(x, y, width, height)``: COCO's own numbers, so that evaluation is exact.
        labels: int64 ``[N]``, 1..K.
        area: float64 ``[N]``, pixels; COCO's segment area where given, else width * height.
        crowd: bool ``[N]``, COCO's ``iscrowd``.
        difficult: bool ``[N]``, VOC's ``difficult``.
        annotation_ids: int64 ``[N]``.
        notes: What the reader left out or mended, with counts, one line each.
    """

    name: str
    categories: tuple[Category, ...]
    image_ids: npt.NDArray[np.int64]
    file_names: npt.NDArray[np.str_]
    sizes: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    boxes_xywh: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    area: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]
    difficult: npt.NDArray[np.bool_]
    annotation_ids: npt.NDArray[np.int64]
    notes: tuple[str, ...] = ()

    @property
    def num_images(self) -> int:
        """Number of images, those without boxes included."""
        return len(self.image_ids)

    @property
    def num_boxes(self) -> int:
        """Number of boxes, crowd, difficult and degenerate ones included."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Foreground classes plus the background, as torchvision's detectors count."""
        return len(self.categories) + 1

    def rows(self, index: int) -> slice:
        """Give the rows of the box arrays that belong to image ``index``."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def image_of_box(self) -> npt.NDArray[np.int64]:
        """Give each box's image index, int64 ``[N]``."""
        return np.repeat(np.arange(self.num_images, dtype=np.int64), np.diff(self.offsets))

    def boxes_in_image(self) -> npt.NDArray[np.float64]:
        """Give all boxes as ``(x1, y1, x2, y2)`` clipped to their images, float64 ``[N, 4]``."""
        x, y, w, h = self.boxes_xywh.T
        height, width = self.sizes[self.image_of_box()].T
        x1, x2 = np.clip(x, 0, width), np.clip(x + w, 0, width)
        y1, y2 = np.clip(y, 0, height), np.clip(y + h, 0, height)
        return np.stack([x1, y1, x2, y2], axis=1)

    def trainable(self, *, use_difficult: bool = False) -> npt.NDArray[np.bool_]:
        """Say which boxes training uses, bool ``[N]``.

        Left out are crowd regions (as in every reference implementation), difficult objects unless asked for
        (Ren et al. 2015 train without them), and boxes that are not finite or thinner than
        ``MIN_TRAINABLE_SIDE`` inside their image.
        """
        boxes = self.boxes_in_image()
        with np.errstate(invalid="ignore"):
            sides = boxes[:, 2:] - boxes[:, :2]
            sound = np.isfinite(self.boxes_xywh).all(axis=1) & (sides >= MIN_TRAINABLE_SIDE).all(axis=1)
        keep = sound & ~self.crowd
        return keep if use_difficult else keep & ~self.difficult

    def select_images(self, indices: npt.NDArray[np.int64]) -> AnnotationTable:
        """Give a table of the images at ``indices``, in that order, with their boxes."""
        counts = np.diff(self.offsets)[indices]
        starts = self.offsets[:-1][indices]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
        return replace(
            self,
            image_ids=self.image_ids[indices],
            file_names=self.file_names[indices],
            sizes=self.sizes[indices],
            offsets=offsets,
            boxes_xywh=self.boxes_xywh[rows],
            labels=self.labels[rows],
            area=self.area[rows],
            crowd=self.crowd[rows],
            difficult=self.difficult[rows],
            annotation_ids=self.annotation_ids[rows],
        )

    def select_classes(self, names: list[str]) -> AnnotationTable:
        """Give a table of the named classes only, labelled 1..len(names) in that order; every image stays.

        Raises:
            DataError: If a name is not a class of this table or is named twice.
        """
        known = {category.name: category for category in self.categories}
        unknown = [name for name in names if name not in known]
        if unknown or len(set(names)) != len(names):
            what = f"unknown classes {unknown}" if unknown else "a class named twice"
            raise DataError(f"{self.name}: classes must name each class once, out of {sorted(known)}; got {what}")
        new_label = np.zeros(len(self.categories) + 1, dtype=np.int64)
        for label, name in enumerate(names, start=1):
            new_label[known[name].label] = label
        keep = new_label[self.labels] > 0
        kept_before = np.concatenate([[0], np.cumsum(keep)])
        return replace(
            self,
            categories=tuple(
                Category(label, known[name].category_id, name) for label, name in enumerate(names, start=1)
            ),
            offsets=kept_before[self.offsets].astype(np.int64),
            boxes_xywh=self.boxes_xywh[keep],
            labels=new_label[self.labels[keep]],
            area=self.area[keep],
            crowd=self.crowd[keep],
            difficult=self.difficult[keep],
            annotation_ids=self.annotation_ids[keep],
        )
