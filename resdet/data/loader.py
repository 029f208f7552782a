"""Which images make a batch, and the worker processes that read them."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from resdet.data.dataset import DetectionDataset
from resdet.errors import UserError
from resdet.types import Target

logger = logging.getLogger(__name__)

PREFETCHED_BATCHES = 2
"""Batches that each worker prepares ahead (the DataLoader's own default)."""

_CHUNK = 1 << 17
"""Stream positions laid out at a time; bounds memory for large datasets and Python's overhead for tiny ones."""


class Batch(NamedTuple):
    """What one forward pass takes.

    Attributes:
        images: uint8 ``[3, H, W]`` each, of different sizes.
        targets: One for each image.
        indices: Rows of the images in the annotation table.
        seeds: What is drawn at random for each image is decided by it.
    """

    images: list[Tensor]
    targets: list[Target]
    indices: list[int]
    seeds: list[int]

    def cut(self, num_pieces: int) -> list[Batch]:
        """Give the batch in ``num_pieces`` parts of nearly equal size, or fewer if it has fewer images."""
        bounds = np.linspace(0, len(self.images), min(num_pieces, len(self.images)) + 1).astype(int).tolist()
        return [
            Batch(self.images[start:end], self.targets[start:end], self.indices[start:end], self.seeds[start:end])
            for start, end in itertools.pairwise(bounds)
        ]


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """The endless sequence of training batches, as lists of ``(image index, seed of its augmentation)``.

    The stream is one shuffled epoch after another. Landscape and portrait images are collected apart, so that little
    of a batch is padding; a global batch is emitted when one of the two has enough for it, and what is left over
    waits, over the end of the epoch too. No image is skipped: after any number of epochs' worth of batches each image
    has been drawn once per epoch, except those still waiting, of which there are fewer than ``2 * batch_size``.

    A global batch is cut into ``num_micro_batches * world_size`` equal slices. Images and seeds of a global batch are
    the same however it is cut, so a run on one process and one on eight see the same data.

    Everything is a function of ``seed`` and the number of batches emitted: resuming lays the skipped batches out
    again as plain index arithmetic (90 000 batches of 16 images in a fraction of a second).

    Args:
        sizes: ``(height, width)`` of each image, ``[I, 2]``.
        batch_size: Images of a global batch: of one optimizer step, over all processes and micro-batches.
        rank: This process's number.
        world_size: Number of processes.
        num_micro_batches: Parts in which a process takes its share, one forward and backward pass each.
        seed: Decides order and augmentation.
        start_batch: Global batches to skip: those that an interrupted run has already done.

    Raises:
        UserError: If ``batch_size`` cannot be divided by ``world_size * num_micro_batches``.

    Source: aspect-ratio grouping of torchvision's references/detection/group_by_aspect_ratio.py. Deviations: that
    sampler repeats images to complete the last batches of an epoch; a group of fewer images than a batch is not kept
    apart here, as its batches would hold the same image several times.
    """

    def __init__(
        self,
        sizes: npt.NDArray[np.integer],
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_micro_batches: int = 1,
        seed: int = 0,
        start_batch: int = 0,
    ) -> None:
        assert len(sizes) > 0
        assert 0 <= rank < world_size
        assert start_batch >= 0
        if batch_size < 1 or num_micro_batches < 1 or batch_size % (world_size * num_micro_batches):
            raise UserError(
                "batch_size must be a multiple of the number of processes times the number of micro-batches, "
                f"got {batch_size} for {world_size} x {num_micro_batches}"
            )
        portrait = sizes[:, 0] > sizes[:, 1]
        if min(int(portrait.sum()), int((~portrait).sum())) < batch_size:
            portrait = np.zeros(len(sizes), dtype=np.bool_)
        self._portrait = portrait
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._num_micro_batches = num_micro_batches
        self._seed = seed
        self._start_batch = start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Give this process's micro-batches, ``num_micro_batches`` for each global batch."""
        size = self._batch_size // (self._world_size * self._num_micro_batches)
        for images, seeds in self._global_batches():
            for part in range(self._num_micro_batches):
                start = (self._rank * self._num_micro_batches + part) * size
                rows = slice(start, start + size)
                yield list(zip(images[rows].tolist(), seeds[rows].tolist(), strict=True))

    def _global_batches(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]]:
        num_images = len(self._portrait)
        num_epochs = max(1, _CHUNK // num_images)
        to_skip = self._start_batch
        # Stream positions and images that wait in either group.
        waiting = [(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)) for _ in range(2)]
        position = 0
        while True:
            positions = np.arange(position, position + num_epochs * num_images, dtype=np.uint64)
            position += len(positions)
            # Sorting by a hash of the position shuffles each epoch without a generator's state to carry along.
            keys = _hash(positions, self._seed, stream=0).reshape(num_epochs, num_images)
            images = np.argsort(keys, axis=1, kind="stable").reshape(-1)
            portrait = self._portrait[images]
            batches_of_positions, batches_of_images = [], []
            for group, member in enumerate((~portrait, portrait)):
                all_positions = np.concatenate([waiting[group][0], positions[member]])
                all_images = np.concatenate([waiting[group][1], images[member]])
                full = len(all_images) // self._batch_size * self._batch_size
                waiting[group] = (all_positions[full:], all_images[full:])
                batches_of_positions.append(all_positions[:full].reshape(-1, self._batch_size))
                batches_of_images.append(all_images[:full].reshape(-1, self._batch_size))
            ready_positions = np.concatenate(batches_of_positions)
            ready_images = np.concatenate(batches_of_images)
            if to_skip >= len(ready_positions):
                to_skip -= len(ready_positions)
                continue
            # A batch is ready when its last image comes along.
            for batch in np.argsort(ready_positions[:, -1])[to_skip:]:
                yield ready_images[batch], _hash(ready_positions[batch], self._seed, stream=1) >> np.uint64(1)
            to_skip = 0


def _hash(values: npt.NDArray[np.uint64], seed: int, *, stream: int) -> npt.NDArray[np.uint64]:
    """Give uniform 64-bit numbers, a fixed function of ``(seed, stream, value)``, the same in every version of NumPy.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014, figure 16), over the value and over the seed.
    """

    def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    key = mix(mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(stream))
    return mix(mix(values) ^ key)


def train_loader(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    num_micro_batches: int = 1,
    num_workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
) -> Iterator[Batch]:
    """Give this process's micro-batches without end, in the order of ``TrainBatches``.

    Args:
        dataset: Where images and targets come from.
        batch_size: Images of an optimizer step, over all processes and micro-batches.
        num_micro_batches: Batches in which this process takes its share of a step.
        num_workers: Processes that read and augment images; 0 does it in this one. Batches do not depend on it.
        seed: Decides order and augmentation.
        rank: This process's number.
        world_size: Number of processes.
        start_batch: Optimizer steps already done by an interrupted run.

    Raises:
        UserError: If ``batch_size`` cannot be cut evenly.
        DataError: While iterating, if an image cannot be read or augmented.
    """
    keys = TrainBatches(
        dataset.table.sizes,
        batch_size,
        rank=rank,
        world_size=world_size,
        num_micro_batches=num_micro_batches,
        seed=seed,
        start_batch=start_batch,
    )
    size = batch_size // (world_size * num_micro_batches)
    return _load(dataset, keys, num_workers=num_workers, micro_batch_size=size)


def eval_loader(
    dataset: DetectionDataset, *, batch_size: int, num_workers: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Give every image once over all processes: of each ``world_size`` images in a row, process ``rank`` gets its one.

    The last batch may be smaller, and the shares of two processes may differ by one image; nothing is padded or
    repeated.

    Args:
        dataset: Where images come from.
        batch_size: Images of a forward pass in this process.
        num_workers: Processes that read images; 0 does it in this one.
        rank: This process's number.
        world_size: Number of processes.

    Raises:
        DataError: While iterating, if an image cannot be read.
    """
    assert batch_size > 0
    assert 0 <= rank < world_size
    share = range(rank, len(dataset), world_size)
    keys = [[(index, 0) for index in share[i : i + batch_size]] for i in range(0, len(share), batch_size)]
    return _load(dataset, keys, num_workers=min(num_workers, len(keys)), micro_batch_size=batch_size)


class _Packed(NamedTuple):
    """A batch on its way between processes: the pixels of all images in one piece.

    A tensor each would take a file descriptor each: 16 images with their targets from 8 workers come to the usual limit
    of 1024.
    """

    pixels: Tensor | npt.NDArray[np.uint8]
    shapes: list[tuple[int, ...]]
    boxes: list[npt.NDArray[np.float32]]
    labels: list[npt.NDArray[np.int64]]
    image_ids: list[int]
    indices: list[int]
    seeds: list[int]


class _PackedBatches(Dataset[_Packed | UserError]):
    """Reads a batch in a worker, mistakes of the user included: torch would bury their message in a traceback."""

    def __init__(self, dataset: DetectionDataset, *, shared: bool) -> None:
        self._dataset = dataset
        self._shared = shared

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> _Packed | UserError:
        try:
            items = [self._dataset[key] for key in keys]
        except UserError as error:
            return error
        pixels = torch.cat([image.reshape(-1) for image, _ in items])
        return _Packed(
            pixels=pixels if self._shared else pixels.numpy(),
            shapes=[tuple(image.shape) for image, _ in items],
            boxes=[target["boxes"].numpy() for _, target in items],
            labels=[target["labels"].numpy() for _, target in items],
            image_ids=[int(target["image_id"]) for _, target in items],
            indices=[index for index, _ in keys],
            seeds=[seed for _, seed in keys],
        )


def _load(
    dataset: DetectionDataset,
    keys: Sampler[list[tuple[int, int]]] | list[list[tuple[int, int]]],
    *,
    num_workers: int,
    micro_batch_size: int,
) -> Iterator[Batch]:
    shared = True
    if num_workers:
        largest = 3 * int(dataset.table.sizes.astype(np.int64).prod(axis=1).max()) * micro_batch_size
        shared = _fits_in_shared_memory(largest * num_workers * (PREFETCHED_BATCHES + 1))
    loader = DataLoader(
        _PackedBatches(dataset, shared=shared),
        batch_sampler=keys,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
        worker_init_fn=_start_worker if num_workers else None,
        # Forked workers share the annotation table's memory; other ways of starting would copy it to each.
        multiprocessing_context=multiprocessing.get_context("fork")
        if num_workers and sys.platform == "linux"
        else None,
        # Starting an iterator draws a number, which must not come from the stream that training depends on.
        generator=torch.Generator(),
    )
    return (_unpack(packed) for packed in loader)


def _as_it_is(packed: Any) -> Any:
    return packed


def _start_worker(worker_id: int) -> None:
    import cv2

    # torch does the same for itself. The number of workers says how many cores are used, not OpenCV's thread pool.
    cv2.setNumThreads(0)


def _fits_in_shared_memory(num_bytes: int) -> bool:
    """Say whether prefetched pixels fit into /dev/shm; containers often have 64 MB, and exceeding it kills a worker."""
    if not os.path.isdir("/dev/shm"):
        return True
    free = shutil.disk_usage("/dev/shm").free
    if num_bytes <= free:
        return True
    logger.warning(
        "/dev/shm has %d MB free, prefetched images may need %d MB: sending them through pipes, which is slower "
        "(docker run --shm-size, or fewer workers)",
        free >> 20,
        num_bytes >> 20,
    )
    return False


def _unpack(packed: _Packed | UserError) -> Batch:
    if isinstance(packed, UserError):
        raise packed
    pixels = packed.pixels if isinstance(packed.pixels, Tensor) else torch.from_numpy(packed.pixels)
    lengths = [int(np.prod(shape)) for shape in packed.shapes]
    parts = torch.split(pixels, lengths)
    images = [part.view(shape) for part, shape in zip(parts, packed.shapes, strict=True)]
    targets = [
        Target(boxes=torch.from_numpy(boxes), labels=torch.from_numpy(labels), image_id=torch.tensor(image_id))
        for boxes, labels, image_id in zip(packed.boxes, packed.labels, packed.image_ids, strict=True)
    ]
    return Batch(images, targets, packed.indices, packed.seeds)
