"""One image and its target at a time: table + images + augmentation.

A box is converted twice on its way from file to device: the table's float64 ``(x, y, width, height)`` into float32
corners, ``[N, 4]``, in NumPy; and these into a tensor over the same memory. Augmentation alone computes in float64
between the two, and rounds once.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from resdet.data.annotations import MIN_TRAINABLE_SIDE, AnnotationTable
from resdet.data.augment.pipeline import Augment
from resdet.data.augment.sample import Sample
from resdet.data.images import Images
from resdet.errors import DataError, UnreadableImageError, name_some
from resdet.types import Category, Target

logger = logging.getLogger(__name__)

MAX_SUBSTITUTES = 100
"""Unreadable images in a row after which it is the folder that is broken, not the images."""


class Items(Protocol):
    """Anything that returns images together with boxes, which may differ from one reading to the next."""

    def __call__(self, index: int, seed: int) -> Sample:
        """Return image ``index`` with its boxes; the same for the same ``seed``."""
        ...


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images and targets of an annotation table.

    It holds no copy of the table's columns: an image's boxes are computed when it is asked for (some tens of
    microseconds), so worker processes share the table and nothing else grows with it.

    With ``skip_unreadable``, an image that cannot be read is replaced by the first of those drawn from the whole table
    by ``numpy.random.default_rng([seed, index])`` that can. So the substitute depends on the key and the files alone.
    Each unreadable image is logged once over all worker processes, with the number found so far; ``unreadable`` lists
    them.

    Args:
        table: Images and boxes.
        images: Returns image ``index`` of the table as uint8 RGB ``[H, W, 3]``; must pickle where workers are spawned.
        augment: Applied to image and boxes together; only with ``training``.
        training: Whether the images are for training. Targets are the same either way: the boxes of
            ``AnnotationTable.trainable``, which in evaluation serve a validation loss. Evaluation itself reads all
            boxes of ``table``.
        use_difficult: Whether VOC's difficult objects are among the targets.
        skip_unreadable: Whether images that cannot be read are replaced by others; only with ``training``, because a
            metric over other images is another metric.
        items: Returns image and boxes together, in place of ``images`` and the boxes of ``table``, which then hold what
            one reading has returned; evaluation must get the same again.

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
        skip_unreadable: bool = False,
        items: Items | None = None,
    ) -> None:
        assert training or augment is None, "evaluation sees images as they are"
        assert training or not skip_unreadable, "evaluation sees every image"
        if table.num_images == 0:
            raise DataError(f"{table.name}: has no images")
        self.table = table
        self._images = images
        self._items = items
        self._augment = augment
        self._use_difficult = use_difficult
        self._unreadable = _shared_flags(table.num_images) if skip_unreadable else None
        for note in table.notes:
            logger.info("%s: %s", table.name, note)
        if training:
            self._log_left_out()
        elif table.crowd.all():
            logger.warning("%s: %s", table.name, nothing_to_evaluate_on(table))

    def _log_left_out(self) -> None:
        table, trained = self.table, self.trained
        if not trained.any():
            raise DataError(f"{table.name}: {nothing_to_train_on(table)}")
        difficult = table.difficult & ~table.crowd & (not self._use_difficult)
        rest = ~(trained | table.crowd | difficult)
        reasons = {
            "crowd regions": table.crowd,
            "difficult": difficult,
            f"not finite or thinner than {MIN_TRAINABLE_SIDE} px inside the image": rest,
        }
        left_out = ", ".join(f"{mask.sum()} {reason}" for reason, mask in reasons.items() if mask.any())
        what = f"{table.num_images} images, training on {trained.sum()} of {table.num_boxes} boxes"
        logger.info("%s: %s%s", table.name, what, f" (left out: {left_out})" if left_out else "")
        counts = np.bincount(table.labels[trained], minlength=table.num_classes)[1:]  # [K]
        if not counts.all():
            never = name_some((repr(table.categories[row].name) for row in np.flatnonzero(counts == 0)), 8)
            logger.warning("%s: no box to train on for %s: never learned", table.name, never)

    @property
    def categories(self) -> tuple[Category, ...]:
        """The foreground classes in label order."""
        return self.table.categories

    @property
    def unreadable(self) -> npt.NDArray[np.int64]:
        """Rows of the images that this process or its workers could not read so far, int64 ``[U]``, ascending."""
        return np.flatnonzero([] if self._unreadable is None else self._unreadable.numpy())

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """Which boxes of the table are among the targets, bool ``[N]``; computed at each access."""
        return self.table.trainable(use_difficult=self._use_difficult)

    def __len__(self) -> int:
        return self.table.num_images

    def select_images(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> DetectionDataset:
        """Return the dataset of the images at ``indices``, in that order; a repeated index is an image of its own.

        Raises:
            DataError: If there are none, or one is out of range.
        """
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        wrong = rows[(rows < -len(self)) | (rows >= len(self))]
        if wrong.size or not rows.size:
            got, last = wrong[0] if wrong.size else "none", len(self) - 1
            raise DataError(f"{self.table.name}: images must be chosen out of its {len(self)} (0..{last}), got {got}")
        rows = rows % len(self)
        chosen = copy.copy(self)
        chosen.table = self.table.select_images(rows)
        chosen._images = functools.partial(_chosen_image, self._images, rows)
        chosen._items = None if self._items is None else functools.partial(_chosen_item, self._items, rows)
        chosen._unreadable = None if self._unreadable is None else _shared_flags(len(rows))
        return chosen

    def for_training(self, augment: Augment | None) -> DetectionDataset:
        """Return this dataset for training, with ``augment`` unless it has steps of its own.

        Raises:
            DataError: If there is nothing to train on.
        """
        chosen = self.augmented(augment)
        chosen._log_left_out()
        return chosen

    def augmented(self, augment: Augment | None) -> DetectionDataset:
        """Return this dataset with ``augment``, unless it has steps of its own."""
        chosen = copy.copy(self)
        chosen._augment = self._augment or augment
        return chosen

    def with_classes_of(self, categories: Sequence[Category]) -> DetectionDataset:
        """Return this dataset with a model's classes, to evaluate the model (``AnnotationTable.with_classes_of``)."""
        chosen = copy.copy(self)
        chosen.table = self.table.with_classes_of(categories)
        return chosen

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """Return image ``index`` as it is stored, uint8 RGB ``[H, W, 3]``.

        Raises:
            DataError: If it cannot be read, even with ``skip_unreadable``.
        """
        return self._images(index)

    def stored(self, key: int | tuple[int, int]) -> Sample:
        """Return an image, or with ``skip_unreadable`` its substitute, with all its boxes before augmentation.

        Boxes are clipped to the image. Crowd regions and difficult objects are among them; boxes that are not finite
        or thinner than ``MIN_TRAINABLE_SIDE`` inside the image are not. The other columns may be views of the table.

        Raises:
            DataError: If the image cannot be read and must not be replaced, or ``MAX_SUBSTITUTES`` in a row cannot.
        """
        index, seed = key if isinstance(key, tuple) else (key, key)
        if self._unreadable is None:
            return self._read(index, seed)
        candidates, asked = np.random.default_rng([seed, index]), index
        for _ in range(MAX_SUBSTITUTES):
            try:
                return self._read(index, seed)
            except UnreadableImageError as error:
                last = error
            if not self._unreadable[index]:
                # Two workers that meet the same file at the same moment may both log it; it is counted once.
                self._unreadable[index] = True
                so_far = f"{len(self.unreadable)} of the {len(self)} images of {self.table.name}"
                logger.warning("%s; skipped: another image takes its place (%s unreadable so far)", last, so_far)
            index = int(candidates.integers(len(self)))
        raise DataError(
            f"{self.table.name}: no image can be read in place of image {self.table.image_ids[asked]}: "
            f"{MAX_SUBSTITUTES} in a row are unreadable, the last because {last}"
        )

    def sample(self, key: int | tuple[int, int]) -> Sample:
        """Return an image with all its boxes, float32, as training sees it after augmentation.

        Crowd regions and difficult objects go through the same steps and are marked; ``target_of`` leaves them out.

        Args:
            key: Index of the image, or ``(index, seed)`` as from ``TrainBatches``. The seed alone decides the
                augmentation, whichever worker does it; a bare index is its own seed.

        Raises:
            DataError: If the image cannot be read or augmented; the message names it.
        """
        sample = self.stored(key)
        if self._augment is None:
            return sample
        seed = key[1] if isinstance(key, tuple) else key
        # The partner of a number is always the same.
        return self._augment(sample, seed=seed, partner=lambda number: self.stored((number % len(self), number)))

    def is_target(self, sample: Sample) -> npt.NDArray[np.bool_]:
        """Return which boxes of a sample are targets, bool ``[N]``: no crowd regions, difficult ones only if used."""
        return ~(sample.crowd if self._use_difficult else sample.crowd | sample.difficult)

    def target_of(self, sample: Sample) -> Target:
        """Return a sample's target."""
        keep = self.is_target(sample)
        return Target(
            boxes=torch.from_numpy(sample.boxes[keep]),  # float32 [N, 4]
            labels=torch.from_numpy(sample.labels[keep]),
            image_id=torch.tensor(sample.image_id),
        )

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """Return an image and its target; arguments and errors are those of ``sample``.

        Returns:
            uint8 ``[3, H, W]`` (values 0..255, RGB) and the target, boxes in pixels of that image. Where an unreadable
            image was replaced, ``image_id`` is that of its substitute.
        """
        sample = self.sample(key)
        return _planes(sample), self.target_of(sample)

    def _read(self, index: int, seed: int) -> Sample:
        table, rows = self.table, self.table.rows(index)
        if self._items is not None:
            return self._items(index, seed)
        boxes, sound = table.boxes_of(index)
        sample = Sample(
            image=self._images(index),
            image_id=int(table.image_ids[index]),
            boxes=boxes,
            labels=table.labels[rows],
            crowd=table.crowd[rows],
            difficult=table.difficult[rows],
            annotation_ids=table.annotation_ids[rows],
            visible=np.ones(len(boxes)),
        )
        return sample if sound.all() else sample.select(sound)


def nothing_to_train_on(table: AnnotationTable) -> str:
    """Return why no box of a table can be trained on, and what can be done about it."""
    if table.num_boxes == 0:
        return "it has no boxes, or none that can be read"
    if table.crowd.all():
        return (
            f"all of its {table.num_boxes} objects are crowd regions (iscrowd 1), which are not trained on; if they "
            "are single objects (some labelling tools write 1 for every mask), set iscrowd to 0, or export polygons"
        )
    if table.trainable(use_difficult=True).any():
        return f"all boxes that can be trained on, of {table.num_boxes}, are difficult; use_difficult: true uses them"
    return f"none of its {table.num_boxes} boxes can be trained on"


def nothing_to_evaluate_on(table: AnnotationTable) -> str:
    """Return why no object of a table counts in an evaluation."""
    crowds = f"all of its {table.num_boxes} objects are crowd regions (iscrowd 1)"
    return f"{crowds if table.num_boxes else 'it has no boxes'}: every AP is undefined, and shown as -1"


def _planes(sample: Sample) -> Tensor:
    """Return an image ``[H, W, 3]`` with its channels one after the other: uint8 ``[3, H, W]``, contiguous.

    OpenCV takes 0.04 ms for 640x480 pixels, a copy of the transposed array 0.2 ms in NumPy and in torch. So nothing is
    gained by leaving pixels as they lie and sending a view.
    """
    image = sample.image
    # For any other, OpenCV would allocate its own output.
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"image {sample.image_id}: must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    planes = np.empty((3, *image.shape[:2]), dtype=np.uint8)
    cv2.split(np.ascontiguousarray(image), list(planes))
    return torch.from_numpy(planes)


def _shared_flags(num_images: int) -> Tensor:
    """Return a flag for each image, for workers to set: they write into the memory of this process."""
    flags = torch.zeros(num_images, dtype=torch.bool)
    flags.share_memory_()  # type: ignore[no-untyped-call]
    return flags


def _chosen_image(images: Images, rows: npt.NDArray[np.int64], index: int) -> npt.NDArray[np.uint8]:
    return images(int(rows[index]))


def _chosen_item(items: Items, rows: npt.NDArray[np.int64], index: int, seed: int) -> Sample:
    return items(int(rows[index]), seed)


def without_subset(dataset: DetectionDataset | Subset[tuple[Tensor, Target]]) -> DetectionDataset:
    """Return a ``torch.utils.data.Subset`` (of a ``Subset``, ...) as the dataset of its images, any other as it is."""
    if isinstance(dataset, Subset):
        return without_subset(dataset.dataset).select_images(dataset.indices)  # type: ignore[arg-type]
    if not isinstance(dataset, DetectionDataset):
        raise DataError(
            f"expected a DetectionDataset or a Subset of one, got {type(dataset).__name__}; resdet.wrap_dataset makes "
            "one of any dataset of (image, target)"
        )
    return dataset
