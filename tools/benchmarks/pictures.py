"""Read or generate the pictures that benchmarks run on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from resdet.data.coco import read_coco
from resdet.data.dataset import DetectionDataset
from resdet.data.image_files import check_files, find_images
from resdet.data.images import FolderImages, read_image
from resdet.data.loader import Batch
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import DataError, UserError
from resdet.types import Target

GENERATED_SIZE = (480, 640)
"""Height and width of generated pictures: the size that most of COCO's have."""


@dataclass(frozen=True)
class Pictures:
    """Batches of pictures.

    Attributes:
        batches: As training takes them; of pictures without annotations, targets are empty.
        num_classes: Classes that the targets tell apart, the background included; 0 of pictures without annotations.
        origin: Where they come from, in words.
    """

    batches: list[Batch]
    num_classes: int
    origin: str


def photographs(folder: str, *, num_images: int, batch_size: int) -> Pictures:
    """Read the first pictures of a folder, by name.

    Args:
        folder: Where they lie; empty for generated ones.
        num_images: How many at most; those that fill no batch are left out.
        batch_size: Pictures in a batch.

    Raises:
        DataError: If the folder is missing or holds no images, or one cannot be read.
        UserError: If there are too few for one batch.
    """
    if not folder:
        return annotated_pictures("", "", num_images=num_images, batch_size=batch_size)
    files = find_images([folder])[:num_images]
    samples = [(torch.from_numpy(read_image(file)).permute(2, 0, 1).contiguous(), _no_boxes()) for file in files]
    where = f"the first {len(files)} images of {Path(folder).name}"
    return Pictures(_batches(samples, batch_size, folder), 0, where)


def annotated_pictures(folder: str, annotations: str, *, num_images: int, batch_size: int) -> Pictures:
    """Read pictures with their boxes, those nearest to 3:4 first, so that a batch has little padding.

    Both libraries' training puts pictures of like shape into a batch.

    Args:
        folder: Where they lie; empty for generated ones, which bring their own boxes.
        annotations: COCO json of that folder; images without a box to train on are left out.
        num_images: How many at most; those that fill no batch are left out.
        batch_size: Pictures in a batch.

    Raises:
        DataError: If the file or an image cannot be read, or there is nothing to train on.
        UserError: If one of ``folder`` and ``annotations`` is given without the other, or there are too few pictures
            for one batch.
    """
    if bool(folder) != bool(annotations):
        missing = "annotations=FILE, their boxes as a COCO json" if folder else "images=FOLDER, the annotated pictures"
        raise UserError(f"images= and annotations= belong together: give {missing}")
    if folder:
        table = read_coco(Path(annotations))
        has_boxes = np.zeros(table.num_images, dtype=np.bool_)
        has_boxes[table.image_of_box()[table.trainable()]] = True
        usable = np.flatnonzero(has_boxes)
        if not len(usable):
            raise DataError(f"{annotations}: none of its {table.num_images} images has a box to train on")
        height, width = table.sizes[usable].T
        nearest = np.argsort(np.abs(height / width - 3 / 4), kind="stable")
        table = table.select_images(usable[nearest][:num_images])
        check_files(Path(folder), table)
        dataset = DetectionDataset(table, FolderImages(Path(folder), table), training=False)
        where = f"{len(dataset)} images of {Path(annotations).name}, nearest to 3:4"
    else:
        dataset = _generated(num_images)
        where = f"{num_images} generated images"
    samples = [dataset[index] for index in range(len(dataset))]
    return Pictures(_batches(samples, batch_size, annotations), dataset.table.num_classes, where)


def _batches(samples: list[tuple[torch.Tensor, Target]], batch_size: int, where: str) -> list[Batch]:
    if len(samples) < batch_size:
        raise UserError(
            f"{where or 'num_images'}: must give at least batch_size={batch_size} images, got {len(samples)}"
        )
    batches = []
    for start in range(0, len(samples) - batch_size + 1, batch_size):
        images, targets = zip(*samples[start : start + batch_size], strict=True)
        indices = list(range(start, start + batch_size))
        batches.append(Batch(list(images), list(targets), indices, indices))
    return batches


def _no_boxes() -> Target:
    return Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), image_id=torch.tensor(0))


@dataclass(frozen=True)
class _Squeezed:
    """Generated pictures, which are square, in ``GENERATED_SIZE``."""

    images: ShapesImages

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        height, width = GENERATED_SIZE
        return np.array(Image.fromarray(self.images(index)).resize((width, height), Image.Resampling.BILINEAR))


def _generated(num_images: int) -> DetectionDataset:
    height, width = GENERATED_SIZE
    squares = shapes_table(num_images, width, seed=0)
    scale = np.array([1, height / width] * 2)
    table = replace(
        squares,
        sizes=np.tile(np.array(GENERATED_SIZE, dtype=np.int32), (num_images, 1)),
        boxes_xywh=squares.boxes_xywh * scale,
        area=squares.area * height / width,
    )
    return DetectionDataset(table, _Squeezed(ShapesImages(width, seed=0)), training=False)
