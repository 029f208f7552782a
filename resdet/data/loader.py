"""Batches of images and targets.

``resdet benchmark work=loading`` shows where a worker's time goes; of a COCO image's 2.3 ms, decoding takes 1.3 ms.
What did not pay: writing pixels straight into shared memory saves one copy, but a worker then makes a fifth fewer
images per second (350 against 430), as new pages of shared memory are expensive and otherwise filled by torch's thread
that sends batches; making flat batches without a tensor for each image first gains 2%, keeping freed memory nothing.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resdet.data.dataset import DetectionDataset
from resdet.data.order import REPEAT_THRESHOLD, Sampling, TrainBatches, image_order
from resdet.data.workers import STALL_SECONDS, Keys, load_batches
from resdet.errors import UserError
from resdet.processes import Processes
from resdet.types import HostResize, Target

_ALONE = Processes(0, 1, torch.device("cpu"))


class Batch(NamedTuple):
    """The input of one forward pass: images and a target, a row of the table and a seed for each of them."""

    images: list[Tensor]  # uint8 [3, H, W] each, of different sizes
    targets: list[Target]
    indices: list[int]  # rows of the images in the annotation table
    seeds: list[int]  # decide everything drawn at random for an image


def train_loader(
    dataset: DetectionDataset,
    team: Processes = _ALONE,
    *,
    batch_size: int,
    num_micro_batches: int = 1,
    num_workers: int = 0,
    stall_seconds: float = STALL_SECONDS,
    sampling: Sampling = "uniform",
    repeat_threshold: float = REPEAT_THRESHOLD,
    seed: int = 0,
    start_batch: int = 0,
    resize: HostResize | None = None,
) -> Generator[Batch, None, None]:
    """Yield this process's micro-batches without end, in the order of ``TrainBatches``.

    ``sampling`` and ``repeat_threshold`` are as for ``image_order``, ``num_workers`` and ``stall_seconds`` as for
    ``load_batches``, the rest as for ``TrainBatches``. Batches do not depend on the number of workers.
    ``resize`` is applied to each image after augmentation; it must pickle where workers are spawned. An image that
    cannot be read or augmented raises a DataError while iterating.
    """
    keys = TrainBatches(
        dataset.table.sizes,
        batch_size,
        order=image_order(sampling, dataset.table, dataset.trained, repeat_threshold=repeat_threshold),
        rank=team.rank,
        world_size=team.world_size,
        num_micro_batches=num_micro_batches,
        seed=seed,
        start_batch=start_batch,
    )
    make, device = partial(_pack, dataset, resize), team.device
    packed = load_batches(make, keys, num_workers=num_workers, device=device, stall_seconds=stall_seconds)
    return (_unpacked(batch) for batch in packed)


def eval_loader(
    dataset: DetectionDataset, team: Processes = _ALONE, *, batch_size: int, num_workers: int = 0
) -> Generator[Batch, None, None]:
    """Yield this process's share of the images, as ``eval_keys`` divides them.

    ``batch_size`` is that of this process, ``num_workers`` is as for ``load_batches``. An image that cannot be read
    raises a DataError while iterating.
    """
    keys = eval_keys(len(dataset), batch_size, rank=team.rank, world_size=team.world_size)
    packed = load_batches(partial(_pack, dataset, None), keys, num_workers=num_workers, device=team.device)
    return (_unpacked(batch) for batch in packed)


def eval_keys(num_images: int, batch_size: int, *, rank: int, world_size: int) -> list[list[tuple[int, int]]]:
    """Divide images over processes, each image once: of every ``world_size`` images in a row, each process gets one.

    The last batch may be smaller, and the shares of two processes may differ by one image; nothing is padded or
    repeated. All seeds are 0.
    """
    assert batch_size > 0
    assert 0 <= rank < world_size
    share = range(rank, num_images, world_size)
    return [[(index, 0) for index in share[start : start + batch_size]] for start in range(0, len(share), batch_size)]


class _Packed(NamedTuple):
    """A batch on its way between processes, flat: a tensor for each image and target would be 64 for 16 images."""

    pixels: Tensor  # uint8 [sum of 3 * H * W]
    boxes: Tensor  # float32 [N, 4]
    labels: Tensor  # int64 [N]
    image_ids: Tensor  # int64 [B]
    shapes: list[tuple[int, ...]]
    num_boxes: list[int]
    indices: list[int]
    seeds: list[int]


def _pack(dataset: DetectionDataset, resize: HostResize | None, keys: Keys) -> _Packed:
    images, targets = zip(*(_item(dataset, resize, key) for key in keys), strict=True)
    return _Packed(
        pixels=torch.cat([image.reshape(-1) for image in images]),
        boxes=torch.cat([target["boxes"] for target in targets]),
        labels=torch.cat([target["labels"] for target in targets]),
        image_ids=torch.stack([target["image_id"] for target in targets]),
        shapes=[tuple(image.shape) for image in images],
        num_boxes=[len(target["labels"]) for target in targets],
        indices=[index for index, _ in keys],
        seeds=[seed for _, seed in keys],
    )


def _item(dataset: DetectionDataset, resize: HostResize | None, key: tuple[int, int]) -> tuple[Tensor, Target]:
    try:
        image, target = dataset[key]
        return (image, target) if resize is None else resize(image, target, key[1])
    except UserError:
        raise
    except Exception as error:
        table, (index, seed) = dataset.table, key
        raise RuntimeError(
            f"image {table.image_ids[index]} ({table.file_names[index]}) of {table.name}, augmentation seed "
            f"{seed}: {type(error).__name__}: {error}"
        ) from error


def _unpacked(packed: _Packed) -> Batch:
    """Return the images and targets as views of the packed tensors, pinned if those are."""
    pixels = torch.split(packed.pixels, [math.prod(shape) for shape in packed.shapes])
    images = [part.view(shape) for part, shape in zip(pixels, packed.shapes, strict=True)]  # [3, H, W] each
    boxes, labels = (torch.split(column, packed.num_boxes) for column in (packed.boxes, packed.labels))
    rows = zip(boxes, labels, packed.image_ids, strict=True)
    targets = [Target(boxes=boxes, labels=labels, image_id=image_id) for boxes, labels, image_id in rows]
    return Batch(images, targets, packed.indices, packed.seeds)
