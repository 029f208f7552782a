"""Batches of images of one size, made as ``resdet.data.loader`` makes those of detection."""

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
from resdet.data.loader import eval_keys
from resdet.data.order import TrainBatches
from resdet.data.workers import STALL_SECONDS, Keys, load_batches
from resdet.processes import Processes


class TrainBatch(NamedTuple):
    """The input of one forward pass of training.

    Attributes:
        images: uint8 ``[B, 3, S, S]``.
        shifts: Added to the colours of each image in [0, 1], float32 ``[B, 3]``.
        labels: int64 ``[B]``.
        indices: Rows of the images in the dataset.
    """

    images: Tensor
    shifts: Tensor
    labels: Tensor
    indices: list[int]


class EvalBatch(NamedTuple):
    """The input of one evaluation step.

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
    team: Processes,
    *,
    batch_size: int,
    num_micro_batches: int = 1,
    num_workers: int = 0,
    stall_seconds: float = STALL_SECONDS,
    seed: int = 0,
    start_batch: int = 0,
) -> Iterator[TrainBatch]:
    """Return this process's micro-batches without end, as ``resdet.data.loader.train_loader`` does."""
    keys = TrainBatches(
        np.ones((len(images), 2), dtype=np.int64),  # all views have one size, so images are not grouped by size
        batch_size,
        rank=team.rank,
        world_size=team.world_size,
        num_micro_batches=num_micro_batches,
        seed=seed,
        start_batch=start_batch,
    )
    return load_batches(
        partial(_train_batch, images, view),
        keys,
        num_workers=num_workers,
        device=team.device,
        stall_seconds=stall_seconds,
    )


def eval_loader(
    images: LabelledImages,
    team: Processes,
    *,
    views: str,
    resize: int,
    size: int,
    scales: Sequence[int] = (),
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[EvalBatch]:
    """Return this process's share of the images, as ``eval_keys`` divides them.

    Views are made as for ``evaluate_classifier``, crops of side ``size``. With dense views a batch is one image, since
    whole images differ in size.
    """
    look: Callable[[Image.Image], list[Tensor]]
    if views == "dense":
        look = partial(dense_views, scales=scales)
    else:
        look = partial(ten_crop_views if views == "ten_crop" else centre_views, resize=resize, size=size)
    size_of_batch = 1 if views == "dense" else batch_size
    keys = eval_keys(len(images), size_of_batch, rank=team.rank, world_size=team.world_size)
    return load_batches(partial(_eval_batch, images, look), keys, num_workers=num_workers, device=team.device)


def _train_batch(images: LabelledImages, view: TrainView, keys: Keys) -> TrainBatch:
    views, shifts = zip(*(view(images.image(index), seed) for index, seed in keys), strict=True)
    rows = [index for index, _ in keys]
    return TrainBatch(torch.stack(views), torch.stack(shifts), torch.from_numpy(images.labels[rows]), rows)


def _eval_batch(images: LabelledImages, look: Callable[[Image.Image], list[Tensor]], keys: Keys) -> EvalBatch:
    rows = [index for index, _ in keys]
    views = [torch.stack(same) for same in zip(*(look(images.image(row)) for row in rows), strict=True)]
    return EvalBatch(views, torch.from_numpy(images.labels[rows]), rows)
