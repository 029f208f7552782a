"""Batches of images and targets, and the worker processes that read them.

Where a worker's time goes is told by ``tools/benchmark.py work=loading``; of a COCO image's 2.3 ms, decoding is 1.3 ms.
What did not pay:

* Writing pixels into shared memory at once: a fifth fewer images per second and worker (350 against 430), though one
  copy is saved. New pages of shared memory are dear, and torch's thread that sends batches fills them meanwhile.
* Flat batches without a tensor for each image first: 2%.
* Telling malloc to keep freed memory (``mallopt``): within the noise.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from resdet.data.dataset import DetectionDataset
from resdet.data.order import REPEAT_THRESHOLD, Sampling, TrainBatches, image_order
from resdet.errors import DataError, UserError
from resdet.types import Target

logger = logging.getLogger(__name__)

PREFETCHED_BATCHES = 2
"""Batches that each worker prepares ahead (the DataLoader's own default)."""


class WorkerError(DataError, RuntimeError):
    """A process that reads images has died. Also a RuntimeError, which is what torch raises then."""


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


def train_loader(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    num_micro_batches: int = 1,
    num_workers: int = 0,
    sampling: Sampling = "uniform",
    repeat_threshold: float = REPEAT_THRESHOLD,
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
        sampling: Which images are drawn how often, as ``image_order`` takes it.
        repeat_threshold: Share of images below which ``repeat_factor`` repeats a class's images.
        seed: Decides order and augmentation.
        rank: This process's number.
        world_size: Number of processes.
        start_batch: Optimizer steps already done by an interrupted run.

    Raises:
        UserError: If ``batch_size`` cannot be cut evenly.
        DataError: While iterating, if an image cannot be read or augmented.
        WorkerError: While iterating, or in whatever the main thread does meanwhile, if a worker dies.
    """
    keys = TrainBatches(
        dataset.table.sizes,
        batch_size,
        order=image_order(sampling, dataset.table, dataset.trained, repeat_threshold=repeat_threshold),
        rank=rank,
        world_size=world_size,
        num_micro_batches=num_micro_batches,
        seed=seed,
        start_batch=start_batch,
    )
    return _load(dataset, keys, num_workers=num_workers)


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
        WorkerError: While iterating, or in whatever the main thread does meanwhile, if a worker dies.
    """
    assert batch_size > 0
    assert 0 <= rank < world_size
    share = range(rank, len(dataset), world_size)
    keys = [[(index, 0) for index in share[i : i + batch_size]] for i in range(0, len(share), batch_size)]
    return _load(dataset, keys, num_workers=min(num_workers, len(keys)))


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

    def __init__(self, dataset: DetectionDataset, *, num_workers: int) -> None:
        self._dataset = dataset
        self._num_workers = num_workers

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> _Packed | UserError:
        try:
            items = [self._item(key) for key in keys]
        except UserError as error:
            return error
        num_bytes = sum(image.numel() for image, _ in items)
        pixels = torch.cat([image.reshape(-1) for image, _ in items])
        return _Packed(
            pixels=pixels if _fits_in_shared_memory(num_bytes, self._num_workers) else pixels.numpy(),
            shapes=[tuple(image.shape) for image, _ in items],
            boxes=[target["boxes"].numpy() for _, target in items],
            labels=[target["labels"].numpy() for _, target in items],
            image_ids=[int(target["image_id"]) for _, target in items],
            indices=[index for index, _ in keys],
            seeds=[seed for _, seed in keys],
        )

    def _item(self, key: tuple[int, int]) -> tuple[Tensor, Target]:
        try:
            return self._dataset[key]
        except UserError:
            raise
        except Exception as error:
            table, (index, seed) = self._dataset.table, key
            raise RuntimeError(
                f"image {table.image_ids[index]} ({table.file_names[index]}) of {table.name}, augmentation seed "
                f"{seed}: {type(error).__name__}: {error}"
            ) from error


def _load(
    dataset: DetectionDataset,
    keys: Sampler[list[tuple[int, int]]] | list[list[tuple[int, int]]],
    *,
    num_workers: int,
) -> Iterator[Batch]:
    loader = DataLoader(
        _PackedBatches(dataset, num_workers=num_workers),
        batch_sampler=keys,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
        worker_init_fn=_start_worker if num_workers else None,
        multiprocessing_context=_start_method() if num_workers else None,
        # Starting an iterator draws a number, which must not come from the stream that training depends on.
        generator=torch.Generator(),
    )
    batches = iter(loader)  # workers start now, not at the first batch
    if num_workers:
        _explain_dead_workers()
    return _unpacked(batches, num_workers)


def _unpacked(packed_batches: Iterator[_Packed | UserError], num_workers: int) -> Iterator[Batch]:
    """Give batches as they come; when this iterator is dropped, the workers go with it."""
    warned = False
    while True:
        try:
            packed = next(packed_batches)
        except StopIteration:
            return
        except RuntimeError as error:
            # torch wraps what its own handler has raised into a vaguer error.
            known = error.__cause__ if isinstance(error.__cause__, WorkerError) else error
            raise _explained(known) from known.__cause__
        except (EOFError, OSError) as error:
            if num_workers == 0:
                raise
            # A worker died while handing a batch over. Its signal arrives any moment, with the reason, and raises here;
            # unless it came while Python was in a destructor, from which nothing is raised.
            time.sleep(1)
            handler = signal.getsignal(signal.SIGCHLD) if sys.platform != "win32" else None
            if isinstance(handler, _DeadWorkerHandler) and handler.found is not None:
                raise handler.found from error
            raise WorkerError(f"a process that reads images died while handing over a batch: {error!r}") from error
        if isinstance(packed, UserError):
            raise packed
        if num_workers and not warned and not isinstance(packed.pixels, Tensor):
            warned = True
            logger.warning(
                "/dev/shm has %d MB free, too few for %d workers: images come through pipes, which is slower "
                "(docker run --shm-size, or fewer workers)",
                shutil.disk_usage("/dev/shm").free >> 20,
                num_workers,
            )
        yield _unpack(packed)


def _start_method() -> str | None:
    """Say how workers start.

    Forked, they are there at once and share what this process has imported; started anew, each imports torch and
    albumentations for seconds and holds them in memory of its own. They never touch CUDA, which a fork would break.
    Where forking is unsafe (macOS) or unknown (Windows), Python's own default is taken; the annotation table is shared
    either way.
    """
    return "fork" if sys.platform == "linux" else None


def _as_it_is(packed: Any) -> Any:
    return packed


def _start_worker(worker_id: int) -> None:
    import cv2

    # torch does the same for itself. The number of workers says how many cores are used, not OpenCV's thread pool.
    cv2.setNumThreads(0)
    # Ctrl-C reaches the whole terminal; the training process answers it and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this worker when its parent has died, however it died.

    torch's own watch is over once a worker writes into a pipe that nobody empties any more: siblings keep it open.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _fits_in_shared_memory(num_bytes: int, num_workers: int) -> bool:
    """Say whether to send a batch through /dev/shm, of which containers often have 64 MB: exceeding it kills a worker.

    Other workers, of other processes too, may be about to write as much at this moment, hence the factor.
    """
    if num_workers == 0 or not os.path.isdir("/dev/shm"):
        return True
    return 4 * num_workers * num_bytes <= shutil.disk_usage("/dev/shm").free


class _DeadWorkerHandler:
    """Says in our words what torch's handler of SIGCHLD finds out, which it raises wherever the main thread is.

    Attributes:
        found: What was raised last.
    """

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self.found: RuntimeError | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            self.found = _explained(error)
            raise self.found from error.__cause__


def _explain_dead_workers() -> None:
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, _DeadWorkerHandler):
        handler.found = None  # what befell the workers of an earlier loader
    elif callable(handler):
        signal.signal(signal.SIGCHLD, _DeadWorkerHandler(handler))


def _explained(error: RuntimeError) -> RuntimeError:
    """Give a dead worker's error with its likely cause; any other as it is."""
    what = " ".join(str(error).split())
    if isinstance(error, WorkerError) or not what.startswith("DataLoader worker"):
        return error
    if "Bus error" in what:
        why = "shared memory (/dev/shm) is full: docker run --shm-size, or fewer loader.num_workers"
    elif "Killed" in what or "pid(s)" in what:
        why = (
            "most often the kernel ends a process so when memory runs out (dmesg or the container's events tell): "
            "fewer loader.num_workers or a smaller train.batch_size need less"
        )
    else:
        why = "loader.num_workers=0 reads images in the training process and shows where it happens"
    return WorkerError(f"a process that reads images died: {what.rstrip('. ')}; {why}")


def _unpack(packed: _Packed) -> Batch:
    pixels = packed.pixels if isinstance(packed.pixels, Tensor) else torch.from_numpy(packed.pixels)
    lengths = [int(np.prod(shape)) for shape in packed.shapes]
    parts = torch.split(pixels, lengths)
    images = [part.view(shape) for part, shape in zip(parts, packed.shapes, strict=True)]
    targets = [
        Target(boxes=torch.from_numpy(boxes), labels=torch.from_numpy(labels), image_id=torch.tensor(image_id))
        for boxes, labels, image_id in zip(packed.boxes, packed.labels, packed.image_ids, strict=True)
    ]
    return Batch(images, targets, packed.indices, packed.seeds)
