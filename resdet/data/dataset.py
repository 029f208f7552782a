"""One image and its target at a time: table + images + augmentation."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

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
        self._keep = table.trainable(use_difficult=use_difficult)
        self._boxes = table.boxes_in_image().astype(np.float32)
        for note in table.notes:
            logger.info("%s: %s", table.name, note)
        if training:
            if not self._keep.any():
                raise DataError(f"{table.name}: none of its {table.num_boxes} boxes can be trained on")
            self._say_what_is_left_out(use_difficult)

    def _say_what_is_left_out(self, use_difficult: bool) -> None:
        crowd = self.table.crowd
        difficult = self.table.difficult & ~crowd & (not use_difficult)
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
