"""Which images training draws, and which of them make a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from resdet.data.annotations import AnnotationTable
from resdet.errors import UserError

logger = logging.getLogger(__name__)

Sampling = Literal["uniform", "repeat_factor", "class_balanced"]

REPEAT_THRESHOLD = 0.001
"""Share of images below which a class's images are repeated; LVIS's own value (Gupta et al. 2019)."""

_CHUNK = 1 << 17
"""Draws laid out at a time; bounds memory for large datasets and Python's overhead for tiny ones."""

_ORDER, _AUGMENTATION, _ROUNDING, _FIRST_CLASS = range(4)
"""What hashed numbers are for. Each class has a number of its own, from ``_FIRST_CLASS`` on."""


@dataclass(frozen=True)
class ImageOrder:
    """In which order images are drawn, without end.

    Attributes:
        drawn: bool ``[I]``: the images that are drawn at all.
        draws: Gives, for a seed, the indices of the images as int64 arrays of any length, one after another.
    """

    drawn: npt.NDArray[np.bool_]
    draws: Callable[[int], Iterator[npt.NDArray[np.int64]]]


def uniform_order(num_images: int) -> ImageOrder:
    """Draw every image once per epoch, each epoch in an order of its own."""

    def draws(seed: int) -> Iterator[npt.NDArray[np.int64]]:
        length = max(1, _CHUNK // num_images) * num_images
        start = 0
        while True:
            yield _passes(num_images, start, start + length, seed, stream=_ORDER)
            start += length

    return ImageOrder(np.ones(num_images, dtype=np.bool_), draws)


def repeat_factor_order(factors: npt.NDArray[np.float64]) -> ImageOrder:
    """Draw image ``i`` ``factors[i]`` times per epoch.

    The whole part of a factor is drawn in every epoch, once more in that share of the epochs which its fraction
    says: epochs differ a little in length.

    Args:
        factors: float64 ``[I]``, >= 0; ``repeat_factors`` gives them.

    Source: detectron2, data/samplers/distributed_sampler.py, RepeatFactorTrainingSampler. Deviation: the random
    numbers are a hash of epoch and image, so that an interrupted run resumes where it was.
    """
    assert factors.min() >= 0
    assert factors.max() > 0
    num_images = len(factors)
    whole = np.floor(factors)

    def draws(seed: int) -> Iterator[npt.NDArray[np.int64]]:
        num_epochs = max(1, int(_CHUNK / max(factors.sum(), num_images)))
        epoch, position = 0, 0
        while True:
            places = np.arange(epoch * num_images, (epoch + num_epochs) * num_images, dtype=np.uint64)
            chance = (_hash(places, seed, stream=_ROUNDING) >> np.uint64(11)) * 2.0**-53
            times = (whole + (chance.reshape(num_epochs, num_images) < factors - whole)).astype(np.int64)
            images = np.repeat(np.tile(np.arange(num_images), num_epochs), times.reshape(-1))
            epoch_of_draw = np.repeat(np.arange(num_epochs), times.sum(axis=1))
            positions = np.arange(position, position + len(images), dtype=np.uint64)
            yield images[np.lexsort((_hash(positions, seed, stream=_ORDER), epoch_of_draw))]
            epoch, position = epoch + num_epochs, position + len(images)

    return ImageOrder(factors > 0, draws)


def class_balanced_order(images: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], num_images: int) -> ImageOrder:
    """Draw every class equally often, and for each an image that has it.

    Each round draws every class once, in an order of its own; a class goes through its images in shuffled passes.
    Classes without images are left out, images without a class are not drawn.

    Args:
        images: int64 ``[P]``, an image index for each (image, class) pair; pairs must differ.
        labels: int64 ``[P]``, the class of each pair.
        num_images: All images, those without a class included.

    Source: Shen, Lin, Huang 2016, "Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks"
    (class-aware sampling).
    """
    assert len(images) == len(labels) > 0
    members = [images[labels == label] for label in np.unique(labels)]

    def draws(seed: int) -> Iterator[npt.NDArray[np.int64]]:
        num_classes = len(members)
        # Long enough that laying out whole passes of the largest classes is not wasted on a few draws.
        num_rounds = max(1, max(_CHUNK, len(images)) // num_classes)
        start = 0
        while True:
            stop = start + num_rounds
            turns = _passes(num_classes, start * num_classes, stop * num_classes, seed, stream=_ORDER)
            picks = [
                member[_passes(len(member), start, stop, seed, stream=_FIRST_CLASS + i)]
                for i, member in enumerate(members)
            ]
            in_rounds = turns.reshape(num_rounds, num_classes)
            yield np.take_along_axis(np.stack(picks, axis=1), in_rounds, axis=1).reshape(-1)
            start = stop

    drawn = np.zeros(num_images, dtype=np.bool_)
    drawn[images] = True
    return ImageOrder(drawn, draws)


def repeat_factors(
    images: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], num_images: int, threshold: float
) -> npt.NDArray[np.float64]:
    """Give each image's repeat factor, float64 ``[I]``, >= 1.

    ``r_c = max(1, sqrt(threshold / f_c))`` with ``f_c`` the share of all images that have class ``c``; an image's
    factor is the largest of its classes, and 1 for an image without any.

    Args:
        images: int64 ``[P]``, an image index for each (image, class) pair; pairs must differ.
        labels: int64 ``[P]``, the class of each pair, >= 0.
        num_images: All images, those without a class included.
        threshold: Share of images below which a class counts as rare, in (0, 1].

    Source: Gupta, Dollar, Girshick 2019, "LVIS", appendix B.2; as detectron2's
    ``repeat_factors_from_category_frequency``, in float64.
    """
    share = np.bincount(labels) / num_images
    with np.errstate(divide="ignore"):
        of_class = np.maximum(1.0, np.sqrt(threshold / share))
    factors = np.ones(num_images)
    np.maximum.at(factors, images, of_class[labels])
    return factors


def image_order(
    sampling: Sampling, table: AnnotationTable, trained: npt.NDArray[np.bool_], *, repeat_threshold: float
) -> ImageOrder:
    """Lay out how the images of a table are drawn; what comes of it is logged.

    An image has a class if it has a box of it that is trained on. (detectron2 counts crowd regions too.)

    Args:
        sampling: ``uniform``, ``repeat_factor`` or ``class_balanced``.
        table: Images and boxes.
        trained: bool ``[N]``, the boxes that are trained on, at least one.
        repeat_threshold: As for ``repeat_factors``; only for ``repeat_factor``.
    """
    num_images = table.num_images
    if sampling == "uniform":
        return uniform_order(num_images)
    stride = len(table.categories) + 1
    images, labels = np.divmod(np.unique(table.image_of_box()[trained] * stride + table.labels[trained]), stride)
    if sampling == "repeat_factor":
        factors = repeat_factors(images, labels, num_images, repeat_threshold)
        logger.info(
            "%s: repeat-factor sampling at %g: %d of %d images repeated, at most %.2f times; an epoch is %.0f draws",
            table.name,
            repeat_threshold,
            int((factors > 1).sum()),
            num_images,
            factors.max(),
            factors.sum(),
        )
        return repeat_factor_order(factors)
    order = class_balanced_order(images, labels, num_images)
    counts = np.bincount(labels, minlength=stride)[1:]
    rarest = int(np.where(counts > 0, counts, num_images + 1).argmin())
    logger.info(
        "%s: class-balanced sampling: each of %d classes in 1 of %d draws, %r from %d images; "
        "%d images without a box to train on are never drawn",
        table.name,
        int((counts > 0).sum()),
        int((counts > 0).sum()),
        table.categories[rarest].name,
        int(counts[rarest]),
        int((~order.drawn).sum()),
    )
    return order


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """The endless sequence of training batches, as lists of ``(image index, seed of its augmentation)``.

    Images come in the given order. Landscape and portrait images are collected apart, so that little of a batch is
    padding; a global batch is emitted when one of the two has enough for it, and what is left over waits, over the end
    of an epoch too. No draw is skipped: after any number of batches each image has come as often as it was drawn,
    except for the draws still waiting, of which there are fewer than ``2 * batch_size``.

    A global batch is cut into ``num_micro_batches * world_size`` equal slices. Images and seeds of a global batch are
    the same however it is cut, so a run on one process and one on eight see the same data.

    Everything is a function of ``seed`` and the number of batches emitted: resuming lays the skipped batches out
    again as plain index arithmetic (90 000 batches of 16 images in a fraction of a second).

    Args:
        sizes: ``(height, width)`` of each image, ``[I, 2]``.
        batch_size: Images of a global batch: of one optimizer step, over all processes and micro-batches.
        order: How images are drawn; None draws each once per epoch.
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
        order: ImageOrder | None = None,
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
        self._order = order or uniform_order(len(sizes))
        portrait = sizes[:, 0] > sizes[:, 1]
        groups = (portrait & self._order.drawn, ~portrait & self._order.drawn)
        if min(int(group.sum()) for group in groups) < batch_size:
            portrait = np.zeros(len(sizes), dtype=np.bool_)
        self._portrait = portrait
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._num_micro_batches = num_micro_batches
        self._seed = seed
        self._start_batch = start_batch

    @property
    def micro_batch_size(self) -> int:
        """Images that a process gets at a time."""
        return self._batch_size // (self._world_size * self._num_micro_batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Give this process's micro-batches, ``num_micro_batches`` for each global batch."""
        size = self.micro_batch_size
        for images, seeds in self._global_batches():
            for part in range(self._num_micro_batches):
                start = (self._rank * self._num_micro_batches + part) * size
                rows = slice(start, start + size)
                yield list(zip(images[rows].tolist(), seeds[rows].tolist(), strict=True))

    def _global_batches(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]]:
        to_skip = self._start_batch
        # Positions of the draws, and their images, that wait in either group.
        waiting = [(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)) for _ in range(2)]
        position = 0
        for images in self._order.draws(self._seed):
            positions = np.arange(position, position + len(images), dtype=np.uint64)
            position += len(positions)
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
                seeds = _hash(ready_positions[batch], self._seed, stream=_AUGMENTATION) >> np.uint64(1)
                yield ready_images[batch], seeds
            to_skip = 0


def _passes(num_items: int, start: int, stop: int, seed: int, *, stream: int) -> npt.NDArray[np.int64]:
    """Give elements ``start`` to ``stop`` of the endless sequence of shuffled passes over ``range(num_items)``.

    Sorting by a hash of the position shuffles each pass without a generator's state to carry along.
    """
    first, last = start // num_items, -(-stop // num_items)
    positions = np.arange(first * num_items, last * num_items, dtype=np.uint64)
    keys = _hash(positions, seed, stream=stream).reshape(last - first, num_items)
    shuffled = np.argsort(keys, axis=1, kind="stable").reshape(-1)
    return shuffled[start - first * num_items : stop - first * num_items]


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
