"""Choose the images that training draws, and group them into batches.

Why not the samplers of torch, torchvision's references and torchdata: their order depends on the number of processes
and on a generator's state, so that a run can be resumed only by replaying it or with as many processes and workers as
before; and they pad, repeat or drop images where an epoch does not divide evenly. Here the n-th batch is a function of
the seed and n alone, computed by array arithmetic.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable
from resdet.errors import UserError
from resdet.types import Bools, Floats, Ints

logger = logging.getLogger(__name__)

Sampling = Literal["uniform", "repeat_factor", "class_balanced"]
Hashes = npt.NDArray[np.uint64]

REPEAT_THRESHOLD = 0.001
"""Share of images below which a class's images are repeated; LVIS's own value (Gupta et al. 2019)."""

_CHUNK = 1 << 17
"""Draws computed at a time; bounds memory for large datasets and Python's overhead for tiny ones."""

_ORDER, _AUGMENTATION, _ROUNDING, _FIRST_CLASS = range(4)
"""Streams of hashed numbers. Each class has one of its own, from ``_FIRST_CLASS`` on."""


def evenly_spread(num_images: int, number: int) -> Ints:
    """Return the indices of ``number`` of the images, or of all if there are fewer, ascending from first to last."""
    return np.linspace(0, num_images - 1, min(number, num_images)).round().astype(np.int64)


@dataclass(frozen=True)
class ImageOrder:
    """An endless order of images."""

    drawn: Bools  # [I], the images that are drawn at all
    draws: Callable[[int], Iterator[Ints]]  # yields, for a seed, image indices in arrays of any length


def uniform_order(num_images: int) -> ImageOrder:
    """Draw every image once per epoch, each epoch in an order of its own."""

    def draws(seed: int) -> Iterator[Ints]:
        length = max(1, _CHUNK // num_images) * num_images
        for start in itertools.count(0, length):
            yield _passes(num_images, start, start + length, seed, stream=_ORDER)

    return ImageOrder(np.ones(num_images, dtype=np.bool_), draws)


def repeat_factor_order(factors: Floats) -> ImageOrder:
    """Draw image ``i`` ``factors[i]`` times per epoch, ``factors`` float64 ``[I]``, >= 0 (see ``repeat_factors``).

    A factor's whole part is drawn in every epoch, and once more in a share of the epochs that is its fraction, so that
    epochs differ a little in length.

    Source: detectron2, data/samplers/distributed_sampler.py, RepeatFactorTrainingSampler. Deviation: the random
    numbers are a hash of epoch and image, so that an interrupted run resumes where it was.
    """
    assert factors.min() >= 0
    assert factors.max() > 0
    num_images = len(factors)
    whole = np.floor(factors)

    def draws(seed: int) -> Iterator[Ints]:
        num_epochs = max(1, int(_CHUNK / max(factors.sum(), num_images)))
        position = 0
        for epoch in itertools.count(0, num_epochs):
            places = np.arange(epoch * num_images, (epoch + num_epochs) * num_images, dtype=np.uint64)
            chance = (_hash(places, seed, stream=_ROUNDING) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
            times = (whole + (chance.reshape(num_epochs, num_images) < factors - whole)).astype(np.int64)  # [epochs, I]
            images = np.repeat(np.tile(np.arange(num_images), num_epochs), times.reshape(-1))  # [draws]
            epoch_of_draw = np.repeat(np.arange(num_epochs), times.sum(axis=1))  # [draws]
            positions = np.arange(position, position + len(images), dtype=np.uint64)
            # Shuffled within each epoch.
            yield images[np.lexsort((_hash(positions, seed, stream=_ORDER), epoch_of_draw))]
            position += len(images)

    return ImageOrder(factors > 0, draws)


def class_balanced_order(images: Ints, labels: Ints, num_images: int) -> ImageOrder:
    """Draw every class equally often, and for each draw an image that has it.

    Each round draws every class once, in an order of its own; a class goes through its images in shuffled passes.
    Classes without images are left out, images without a class are not drawn. Arguments are as for
    ``repeat_factors``.

    Source: Shen, Lin, Huang 2016, "Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks"
    (class-aware sampling).
    """
    assert len(images) == len(labels) > 0
    members = [images[labels == label] for label in np.unique(labels)]
    num_classes = len(members)

    def draws(seed: int) -> Iterator[Ints]:
        # Long enough that laying out whole passes of the largest classes is not wasted on a few draws.
        num_rounds = max(1, max(_CHUNK, len(images)) // num_classes)
        for start in itertools.count(0, num_rounds):
            stop = start + num_rounds
            turns = _passes(num_classes, start * num_classes, stop * num_classes, seed, stream=_ORDER)
            picks = [
                member[_passes(len(member), start, stop, seed, stream=_FIRST_CLASS + i)]  # [rounds]
                for i, member in enumerate(members)
            ]
            in_rounds = turns.reshape(num_rounds, num_classes)
            yield np.take_along_axis(np.stack(picks, axis=1), in_rounds, axis=1).reshape(-1)  # [rounds * classes]

    drawn = np.zeros(num_images, dtype=np.bool_)
    drawn[images] = True
    return ImageOrder(drawn, draws)


def repeat_factors(images: Ints, labels: Ints, num_images: int, threshold: float) -> Floats:
    """Return each image's repeat factor, float64 ``[I]``, >= 1.

    ``r_c = max(1, sqrt(threshold / f_c))`` with ``f_c`` the share of all images that have class ``c``; an image's
    factor is the largest of its classes', and 1 without any. ``images`` and ``labels``, int64 ``[P]``, are the
    different pairs of an image index and a class that it has; ``num_images`` counts images without a class too.

    Source: Gupta, Dollar, Girshick 2019, "LVIS", appendix B.2; detectron2's
    ``repeat_factors_from_category_frequency``, in float64.
    """
    share = np.bincount(labels) / num_images  # [K + 1]
    with np.errstate(divide="ignore"):
        of_class = np.maximum(1.0, np.sqrt(threshold / share))
    factors = np.ones(num_images)
    np.maximum.at(factors, images, of_class[labels])
    return factors


def image_order(sampling: Sampling, table: AnnotationTable, trained: Bools, *, repeat_threshold: float) -> ImageOrder:
    """Return and log the order in which the images of a table are drawn.

    An image has a class if it has a box of it that is trained on (detectron2 counts crowd regions too): ``trained``,
    bool ``[N]``, says which boxes are, at least one. ``repeat_threshold`` is for ``repeat_factor`` alone.
    """
    num_images = table.num_images
    if sampling == "uniform":
        return uniform_order(num_images)
    stride = len(table.categories) + 1
    pairs = np.unique(table.image_of_box()[trained] * stride + table.labels[trained])
    images, labels = np.divmod(pairs, stride)  # [P] each
    if sampling == "repeat_factor":
        factors = repeat_factors(images, labels, num_images, repeat_threshold)  # [I]
        order = repeat_factor_order(factors)
        what = (
            f"repeat-factor sampling at {repeat_threshold:g}: {(factors > 1).sum()} of {num_images} images repeated, "
            f"at most {factors.max():.2f} times; an epoch is {factors.sum():.0f} draws"
        )
    else:
        order = class_balanced_order(images, labels, num_images)
        found, counts = np.unique(labels, return_counts=True)
        rarest = table.categories[found[counts.argmin()] - 1].name
        what = (
            f"class-balanced sampling: each of {len(found)} classes in 1 of {len(found)} draws, {rarest!r} from "
            f"{counts.min()} images; {(~order.drawn).sum()} images without a box to train on are never drawn"
        )
    logger.info("%s: %s", table.name, what)
    return order


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """The endless sequence of training batches, as lists of ``(image index, seed of its augmentation)``.

    Images come in the given order. Landscape and portrait images are collected separately, so that little of a batch
    is padding; a global batch is emitted when either group has enough for it, and what is left over waits, across
    epochs too. No draw is skipped: after any number of batches each image has come as often as it was drawn, except for
    the draws still waiting, fewer than ``2 * batch_size``.

    A global batch is cut into ``num_micro_batches * world_size`` equal slices. Its images and seeds do not depend on
    how it is cut, so a run on one process and one on eight see the same data. Everything is a function of ``seed`` and
    the number of batches emitted: resuming recomputes the skipped batches by index arithmetic (90 000 batches of 16
    images in a fraction of a second).

    Raises:
        UserError: If ``batch_size`` cannot be divided by ``world_size * num_micro_batches``.

    Source: aspect-ratio grouping of torchvision's references/detection/group_by_aspect_ratio.py. Deviations: that
    sampler repeats images to complete the last batches of an epoch; a group of fewer images than a batch is not kept
    separate here, as its batches would hold the same image several times.
    """

    sizes: npt.NDArray[np.integer]  # (height, width) of each image, [I, 2]
    batch_size: int  # images of a global batch: of one optimizer step, over all processes and micro-batches
    _: KW_ONLY
    order: ImageOrder | None = None  # None draws each image once per epoch
    rank: int = 0
    world_size: int = 1
    num_micro_batches: int = 1  # parts of a process's share, one forward and backward pass each
    seed: int = 0  # decides order and augmentation
    start_batch: int = 0  # global batches to skip: those that an interrupted run has already done

    def __post_init__(self) -> None:
        assert len(self.sizes) > 0
        assert 0 <= self.rank < self.world_size
        assert self.start_batch >= 0
        num_parts = self.world_size * self.num_micro_batches
        if self.batch_size < 1 or self.num_micro_batches < 1 or self.batch_size % num_parts:
            raise UserError(
                "batch_size must be a multiple of the number of processes times the number of micro-batches, "
                f"got {self.batch_size} for {self.world_size} x {self.num_micro_batches}"
            )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this process's micro-batches, ``num_micro_batches`` for each global batch."""
        cut = (self.world_size, self.num_micro_batches, -1)
        for batch in self._global_batches():
            images, seeds = (column.reshape(cut)[self.rank].tolist() for column in batch)  # [micro-batches, size] each
            for micro_batch in zip(images, seeds, strict=True):
                yield list(zip(*micro_batch, strict=True))

    def _global_batches(self) -> Iterator[tuple[Ints, Hashes]]:
        order = self.order or uniform_order(len(self.sizes))
        is_portrait = self.sizes[:, 0] > self.sizes[:, 1]  # [I]
        if min((group & order.drawn).sum() for group in (is_portrait, ~is_portrait)) < self.batch_size:
            is_portrait = np.zeros_like(is_portrait)
        to_skip, position = self.start_batch, 0
        # Positions of the draws, and their images, that wait in either group.
        waiting = [np.zeros((2, 0), dtype=np.int64)] * 2
        for drawn in order.draws(self.seed):
            draws = np.stack([np.arange(position, position + len(drawn), dtype=np.int64), drawn])  # [2, draws]
            position += len(drawn)
            ready = []
            for group, members in enumerate((~is_portrait[drawn], is_portrait[drawn])):
                own = np.concatenate([waiting[group], draws[:, members]], axis=1)
                full = own.shape[1] // self.batch_size * self.batch_size
                ready.append(own[:, :full].reshape(2, -1, self.batch_size))
                waiting[group] = own[:, full:]
            positions, images = np.concatenate(ready, axis=1)  # [n, B] each
            seeds = _hash(positions.astype(np.uint64), self.seed, stream=_AUGMENTATION) >> np.uint64(1)
            # A batch is ready when its last image comes along.
            for batch in np.argsort(positions[:, -1])[to_skip:]:
                yield images[batch], seeds[batch]
            to_skip = max(0, to_skip - len(positions))


def _passes(num_items: int, start: int, stop: int, seed: int, *, stream: int) -> Ints:
    """Return elements ``start`` to ``stop`` of the endless sequence of shuffled passes over ``range(num_items)``.

    Sorting by a hash of the position shuffles each pass without a generator's state to carry along.
    """
    first, last = start // num_items, -(-stop // num_items)
    positions = np.arange(first * num_items, last * num_items, dtype=np.uint64)
    keys = _hash(positions, seed, stream=stream).reshape(last - first, num_items)
    shuffled = np.argsort(keys, axis=1, kind="stable").reshape(-1)
    return shuffled[start - first * num_items : stop - first * num_items]


def _hash(values: Hashes, seed: int, *, stream: int) -> Hashes:
    """Return uniform 64-bit numbers, a fixed function of ``(seed, stream, value)``, the same in every NumPy version.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014, figure 16), over the value and over the seed.
    """

    def mix(x: Hashes) -> Hashes:
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    key = mix(mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(stream))
    return mix(mix(values) ^ key)
