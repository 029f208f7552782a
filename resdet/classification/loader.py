"""Batches of images of one size, which ``resdet.data.workers.load_batches`` makes as those of detection."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from resdet.classification.data import LabelledImages
from resdet.classification.views import TrainView
from resdet.data.workers import Keys


class TrainBatch(NamedTuple):
    """The input of one forward pass of training."""

    images: Tensor  # uint8 [B, 3, S, S]
    shifts: Tensor  # added to the colours of each image in [0, 1], float32 [B, 3]
    labels: Tensor  # int64 [B]
    indices: list[int]  # rows of the images in the dataset


class EvalBatch(NamedTuple):
    """The input of one evaluation step."""

    views: list[Tensor]  # uint8 [B, 3, H, W] each, the same view of all images
    labels: Tensor  # int64 [B]
    indices: list[int]  # rows of the images in the dataset


def train_batch(images: LabelledImages, view: TrainView, keys: Keys) -> TrainBatch:
    """Make the random views that follow from the seeds of ``keys``."""
    views, shifts = zip(*(view(images.image(index), seed) for index, seed in keys), strict=True)
    rows = [index for index, _ in keys]
    return TrainBatch(torch.stack(views), torch.stack(shifts), torch.from_numpy(images.labels[rows]), rows)


def eval_batch(images: LabelledImages, look: Callable[[Image.Image], list[Tensor]], keys: Keys) -> EvalBatch:
    """Make the views of images that ``look`` returns."""
    rows = [index for index, _ in keys]
    views = [torch.stack(same) for same in zip(*(look(images.image(row)) for row in rows), strict=True)]
    return EvalBatch(views, torch.from_numpy(images.labels[rows]), rows)
