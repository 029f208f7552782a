"""Batches of images of one size, and the worker processes that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resdet.classification.data import LabelledImages
from resdet.classification.views import TrainView, centre_views, dense_views, ten_crop_views
from resdet.data.loader import eval_keys, piece_slices
from resdet.data.order import TrainBatches
from resdet.data.workers import STALL_SECONDS, Keys, load_batches


class TrainBatch(NamedTuple):
    """What one forward pass of training takes.

    Attributes:
        images: uint8 ``[B, 3, S, S]``.
        shifts: To be added to the colours of each image in [0, 1], float32 ``[B, 3]``.
        labels: int64 ``[B]``.
        indices: Rows of the images in the dataset.
    """

    images: Tensor
    shifts: Tensor
    labels: Tensor
    indices: list[int]

    def cut(self, num_pieces: int) -> list[TrainBatch]:
        """Give the batch in ``num_pieces`` parts of nearly equal size, or fewer if it has fewer images."""
        return [
            TrainBatch(self.images[rows], self.shifts[rows], self.labels[rows], self.indices[rows])
            for rows in piece_slices(len(self.images), num_pieces)
        ]


class EvalBatch(NamedTuple):
    """What is looked at of some images.

    Attributes:
        views: uint8 ``[B, 3, H, W]`` each, the same view of all images.
        labels: int64 ``[B]``.
        indices: Rows of the images in the dataset.
    """

    views: list[Tensor]
    labels: Tensor
    indices: list[int]


def train_loader(
    images: LabelledImages,
    view: TrainView,
    *,
    batch_size: int,
    num_micro_batches: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    stall_seconds: float = STALL_SECONDS,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
) -> Iterator[TrainBatch]:
    """Give this process's micro-batches without end, in the order of ``resdet.data.order.TrainBatches``.

    Args:
        images: What is trained on.
        view: Makes what is seen of them.
        batch_size: Images of an optimizer step, over all processes and micro-batches.
        num_micro_batches: Batches in which this process takes its share of a step.
        num_workers: As for ``load_batches``, like ``pin_memory`` and ``stall_seconds``. Batches do not depend on it.
        pin_memory: Whether the run is on a CUDA device.
        stall_seconds: Waiting time after which a warning is logged.
        seed: Decides order and augmentation.
        rank: This process's number.
        world_size: Number of processes.
        start_batch: Optimizer steps already done by an interrupted run.

    Raises:
        UserError: If ``batch_size`` cannot be cut evenly.
        DataError: While iterating, if an image cannot be read.
    """
    keys = TrainBatches(
        np.ones((len(images), 2), dtype=np.int64),  # views have one size, so that images need no grouping by theirs
        batch_size,
        rank=rank,
        world_size=world_size,
        num_micro_batches=num_micro_batches,
        seed=seed,
        start_batch=start_batch,
    )
    return load_batches(
        partial(_train_batch, images, view),
        keys,
        num_workers=num_workers,
        pin_memory=pin_memory,
        stall_seconds=stall_seconds,
    )


def eval_loader(
    images: LabelledImages,
    *,
    views: str,
    resize: int,
    size: int,
    scales: Sequence[int] = (),
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvalBatch]:
    """Give every image once over all processes: of each ``world_size`` images in a row, process ``rank`` gets its one.

    Args:
        images: What is judged on.
        views: ``single``, ``ten_crop`` or ``dense``.
        resize: Length of the short side from which crops are taken.
        size: Side of the crops.
        scales: dense: lengths of the short side.
        batch_size: Images of a batch; whole images (dense) are of different sizes and come one by one.
        num_workers: As for ``load_batches``, like ``pin_memory``.
        pin_memory: Whether the model is on a CUDA device.
        rank: This process's number.
        world_size: Number of processes.

    Raises:
        DataError: While iterating, if an image cannot be read.
    """
    look: Callable[[Image.Image], list[Tensor]]
    if views == "dense":
        look = partial(dense_views, scales=scales)
    else:
        look = partial(ten_crop_views if views == "ten_crop" else centre_views, resize=resize, size=size)
    keys = eval_keys(len(images), 1 if views == "dense" else batch_size, rank=rank, world_size=world_size)
    return load_batches(partial(_eval_batch, images, look), keys, num_workers=num_workers, pin_memory=pin_memory)


def _train_batch(images: LabelledImages, view: TrainView, keys: Keys) -> TrainBatch:
    views = [view(images.image(index), seed) for index, seed in keys]
    return TrainBatch(
        torch.stack([pixels for pixels, _ in views]),
        torch.stack([shift for _, shift in views]),
        _labels_of(images, keys),
        [index for index, _ in keys],
    )


def _eval_batch(images: LabelledImages, look: Callable[[Image.Image], list[Tensor]], keys: Keys) -> EvalBatch:
    seen = [look(images.image(index)) for index, _ in keys]
    views = [torch.stack(same) for same in zip(*seen, strict=True)]
    return EvalBatch(views, _labels_of(images, keys), [index for index, _ in keys])


def _labels_of(images: LabelledImages, keys: Keys) -> Tensor:
    return torch.from_numpy(images.labels[[index for index, _ in keys]])
