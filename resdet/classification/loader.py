"""Batches of images of one size, and the worker processes that read them."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resdet.classification.data import LabelledImages
from resdet.classification.views import TrainView, centre_views, dense_views, ten_crop_views
from resdet.data.loader import PREFETCHED_BATCHES
from resdet.data.order import TrainBatches
from resdet.errors import UserError

Keys = Sequence[tuple[int, int]]
_Batch = TypeVar("_Batch")


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
        num_images = len(self.images)
        bounds = np.linspace(0, num_images, min(num_pieces, num_images) + 1).astype(int).tolist()
        return [
            TrainBatch(self.images[a:b], self.shifts[a:b], self.labels[a:b], self.indices[a:b])
            for a, b in itertools.pairwise(bounds)
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
        num_workers: Processes that read images; 0 does it in this one. Batches do not depend on it.
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
    return _load(partial(_train_batch, images, view), keys, num_workers=num_workers)


def eval_loader(
    images: LabelledImages,
    *,
    views: str,
    resize: int,
    size: int,
    scales: Sequence[int] = (),
    batch_size: int,
    num_workers: int = 0,
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
        num_workers: Processes that read images; 0 does it in this one.
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
    share = range(rank, len(images), world_size)
    step = 1 if views == "dense" else batch_size
    keys = [[(index, 0) for index in share[start : start + step]] for start in range(0, len(share), step)]
    return _load(partial(_eval_batch, images, look), keys, num_workers=min(num_workers, len(keys)))


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


class _Batches(Dataset[_Batch | UserError], Generic[_Batch]):
    """Makes a batch in a worker, mistakes of the user included: torch would bury their message in a traceback."""

    def __init__(self, make: Callable[[Keys], _Batch]) -> None:
        self._make = make

    def __getitems__(self, keys: Keys) -> _Batch | UserError:
        try:
            return self._make(keys)
        except UserError as error:
            return error


def _load(make: Callable[[Keys], _Batch], keys: Iterable[Keys], *, num_workers: int) -> Iterator[_Batch]:
    loader: DataLoader[_Batch | UserError] = DataLoader(
        _Batches(make),
        batch_sampler=keys,  # type: ignore[arg-type]  # torch's types know lists of indices only
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
        # Forked workers share the lists of files; other ways of starting would copy them to each.
        multiprocessing_context=multiprocessing.get_context("fork")
        if num_workers and sys.platform == "linux"
        else None,
        # Starting an iterator draws a number, which must not come from the stream that training depends on.
        generator=torch.Generator(),
    )
    return (_raised(batch) for batch in loader)


def _raised(batch: _Batch | UserError) -> _Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _as_it_is(batch: _Batch) -> _Batch:
    return batch
