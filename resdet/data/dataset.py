"""One image and its target at a time: table + images + augmentation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from resdet.data.annotations import MIN_TRAINABLE_SIDE, AnnotationTable
from resdet.data.augment import Augment
from resdet.data.images import Images
from resdet.errors import DataError
from resdet.types import Category, Target

logger = logging.getLogger(__name__)


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images and targets of an annotation table.

    Args:
        table: Images and boxes.
        images: Gives image ``index`` of the table as uint8 RGB ``[H, W, 3]``; must pickle where workers are spawned.
        augment: Applied to image and boxes together; only with ``training``.
        training: Whether the images are for training. Targets are the same either way: the boxes of
            ``AnnotationTable.trainable``, which in evaluation serve a validation loss. Evaluation itself reads
            ``table``, where all boxes are.
        use_difficult: Whether VOC's difficult objects are among the targets.

    Raises:
        DataError: If the table has no images, or nothing to train on.
    """

    def __init__(
        self,
        table: AnnotationTable,
        images: Images,
        augment: Augment | None = None,
        *,
        training: bool,
        use_difficult: bool = False,
    ) -> None:
        assert training or augment is None, "evaluation sees images as they are"
        if table.num_images == 0:
            raise DataError(f"{table.name}: has no images")
        self.table = table
        self._images = images
        self._augment = augment
        self._use_difficult = use_difficult
        self._take_boxes()
        for note in table.notes:
            logger.info("%s: %s", table.name, note)
        if training:
            if not self._keep.any():
                raise DataError(f"{table.name}: none of its {table.num_boxes} boxes can be trained on")
            self._say_what_is_left_out()

    def _take_boxes(self) -> None:
        self._keep = self.table.trainable(use_difficult=self._use_difficult)
        self._boxes = self.table.boxes_in_image().astype(np.float32)

    def _say_what_is_left_out(self) -> None:
        crowd = self.table.crowd
        difficult = self.table.difficult & ~crowd & (not self._use_difficult)
        thin = ~self._keep & ~crowd & ~difficult
        reasons = {
            "crowd regions": crowd,
            "difficult": difficult,
            f"not finite or thinner than {MIN_TRAINABLE_SIDE} px inside the image": thin,
        }
        parts = [f"{int(mask.sum())} {reason}" for reason, mask in reasons.items() if mask.any()]
        logger.info(
            "%s: %d images, training on %d of %d boxes%s",
            self.table.name,
            self.table.num_images,
            int(self._keep.sum()),
            self.table.num_boxes,
            f" (left out: {', '.join(parts)})" if parts else "",
        )

    @property
    def categories(self) -> tuple[Category, ...]:
        """The foreground classes in label order."""
        return self.table.categories

    def __len__(self) -> int:
        return self.table.num_images

    def select_images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> DetectionDataset:
        """Give the dataset of the images at ``indices``, in that order; each place is an image of its own.

        Args:
            indices: Rows of the table, any number of times; negative ones count from the end.

        Raises:
            DataError: If there are none, or one is out of range.
        """
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        wrong = rows[(rows < -len(self)) | (rows >= len(self))]
        if wrong.size or not rows.size:
            got = f"got {wrong[0]}" if wrong.size else "got none"
            raise DataError(
                f"{self.table.name}: images must be chosen out of its {len(self)} (0..{len(self) - 1}), {got}"
            )
        rows = rows % len(self)
        chosen = copy.copy(self)
        chosen.table = self.table.select_images(rows)
        chosen._images = _Chosen(self._images, rows)
        chosen._take_boxes()
        return chosen

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """Give image ``index`` as it is stored, uint8 RGB ``[H, W, 3]``.

        Raises:
            DataError: If it cannot be read.
        """
        return self._images(index)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """Give an image and its target.

        Args:
            key: Index of the image, or ``(index, seed)`` as ``TrainBatches`` gives it. The seed alone decides the
                augmentation, so it does not depend on which worker comes to do it; a bare index is its own seed.

        Returns:
            uint8 ``[3, H, W]`` (values 0..255, RGB) and the target, boxes in pixels of that image.

        Raises:
            DataError: If the image cannot be read or augmented; the message names it.
        """
        index, seed = key if isinstance(key, tuple) else (key, key)
        image = self.image(index)
        rows = self.table.rows(index)
        keep = self._keep[rows]
        boxes, labels = self._boxes[rows][keep], self.table.labels[rows][keep]
        if self._augment is not None:
            try:
                image, boxes, kept = self._augment(image, boxes, labels, seed=seed)
            except DataError as error:
                raise DataError(f"image {self.table.image_ids[index]}: {error}") from error
            labels = labels[kept]
        target = Target(
            boxes=torch.from_numpy(boxes),
            labels=torch.from_numpy(labels),
            image_id=torch.tensor(int(self.table.image_ids[index])),
        )
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), target


@dataclass(frozen=True)
class _Chosen:
    """Some of other ``Images``."""

    images: Images
    rows: npt.NDArray[np.int64]

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        return self.images(int(self.rows[index]))


def without_subset(dataset: DetectionDataset | Subset[tuple[Tensor, Target]]) -> DetectionDataset:
    """Give a ``torch.utils.data.Subset`` (of a ``Subset``, ...) as the dataset of its images, any other as it is.

    Raises:
        DataError: If it is no dataset of ours, has no images, or an index is out of range.
    """
    if isinstance(dataset, Subset):
        return without_subset(dataset.dataset).select_images(dataset.indices)  # type: ignore[arg-type]
    if not isinstance(dataset, DetectionDataset):
        raise DataError(f"expected a DetectionDataset or a Subset of one, got {type(dataset).__name__}")
    return dataset
