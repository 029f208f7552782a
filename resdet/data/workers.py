"""The worker processes that make batches, for detection and classification: torch's DataLoader with readable failures.

A batch is a NamedTuple whose fields are tensors, lists of tensors and plain values. From a worker it comes through
shared memory; for a CUDA device, torch's pinning thread then copies each of its tensors into page-locked memory, from
which the device fetches them while the host goes on. So a batch should hold few, large tensors: each takes a file
descriptor on its way, and one transfer to the device.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resdet.errors import DataError, UserError

logger = logging.getLogger(__name__)

STALL_SECONDS = 60.0
"""After this long without a batch, and again after each such time, a warning is logged."""

_MAX_TEMPORARY_FOLDER = 107 - len("/pymp-12345678/listener-12345678")  # bytes; a socket's path has 107 at most

Keys = Sequence[tuple[int, int]]
"""The images of a batch: ``(image index, seed)`` each."""

_Batch = TypeVar("_Batch", bound="tuple[Any, ...]")


class WorkerError(DataError, RuntimeError):
    """A worker process has died. Also a RuntimeError, which is what torch raises then."""


def load_batches(
    make: Callable[[Keys], _Batch],
    keys: Iterable[Keys],
    *,
    num_workers: int,
    device: torch.device,
    stall_seconds: float = STALL_SECONDS,
) -> Generator[_Batch, None, None]:
    """Start workers that make batches, and yield the batches in the order of their keys.

    The workers start at once, not with the first batch, and end when the iterator is closed or dropped: an error that
    is kept keeps it. ``num_workers=0`` makes batches in this process, when they are asked for, and never reports a
    stall. ``make`` must pickle where workers are spawned; a list of keys takes no more workers than it has entries.
    Batches stay on the CPU, pinned for CUDA devices.

    Raises:
        UserError: While iterating, as ``make`` raised it.
        WorkerError: While iterating, or in whatever the main thread does meanwhile, if a worker dies.
    """
    if isinstance(keys, list):
        num_workers = min(num_workers, len(keys))
    loader: DataLoader[Any] = DataLoader(
        _Batches(make, num_workers),
        batch_sampler=keys,  # type: ignore[arg-type]  # torch's types know lists of indices only
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        timeout=stall_seconds if num_workers else 0,
        worker_init_fn=_start_worker if num_workers else None,
        multiprocessing_context=_start_method() if num_workers else None,
        # Starting an iterator draws a number, which must not come from the stream that training depends on.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    if num_workers:
        _explain_dead_workers()
    return _received(batches, num_workers, stall_seconds)


@dataclass(frozen=True, eq=False)
class _Batches(Dataset[Any]):
    """What workers make: a batch, or its pickle where only a pipe has room for it (then it is not pinned).

    A user's error is returned instead of raised: torch would bury it in a traceback.
    """

    make: Callable[[Keys], Any]
    num_workers: int

    def __getitems__(self, keys: Keys) -> Any:
        try:
            batch = self.make(keys)
        except UserError as error:
            return error
        return batch if _fits_in_shared_memory(_num_bytes(batch), self.num_workers) else pickle.dumps(batch)


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_num_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _fits_in_shared_memory(num_bytes: int, num_workers: int) -> bool:
    """Return whether /dev/shm has room for a batch: containers often have 64 MB, and exceeding it kills a worker.

    Other workers, also of other processes, may be about to write as much at this moment, hence the factor. There is no
    way to pass shared memory on where the folder for temporary files has a long path: torch does it by a socket there.
    """
    if num_workers == 0 or not os.path.isdir("/dev/shm"):
        return True
    if len(os.fsencode(tempfile.gettempdir())) > _MAX_TEMPORARY_FOLDER:
        return False
    return 4 * num_workers * num_bytes <= shutil.disk_usage("/dev/shm").free


def _received(batches: Iterator[Any], num_workers: int, stall_seconds: float) -> Generator[Any, None, None]:
    try:
        yield from _in_time(batches, num_workers, stall_seconds)
    except BaseException:  # an error, a signal, or the caller needs no more
        if num_workers:
            _end_workers(batches)
        raise


def _end_workers(batches: Any) -> None:
    """Kill the workers of a DataLoader's iterator, which have nothing to lose.

    torch would wait for each of them for seconds, and Python, at its exit, for ever for one that hangs in a file system
    or is stopped.
    """
    pinning = getattr(batches, "_pin_memory_thread", None)
    if pinning is not None:  # it ends first, as torch does it: it fails where a worker dies that it reads from
        batches._pin_memory_thread_done_event.set()
        batches._worker_result_queue.put((None, None))
        pinning.join(1)
    handler = signal.getsignal(signal.SIGCHLD) if sys.platform != "win32" else None
    if isinstance(handler, _DeadWorkerHandler):
        handler.is_silenced = True
    for worker in batches._workers:
        worker.kill()
    for worker in batches._workers:
        worker.join(1)  # not for ever: a file system that hangs keeps even a killed process


def _in_time(batches: Iterator[Any], num_workers: int, stall_seconds: float) -> Iterator[Any]:
    waited, warned = 0.0, False
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out after"):
                raise _explained(error)  # noqa: B904 - it has its cause
            # A DataLoader that timed out has lost nothing and can be asked again. It looks after its pinning thread
            # only where it has no timeout.
            if not getattr(batches, "_pin_memory_thread", threading.current_thread()).is_alive():
                raise RuntimeError("the thread that pins batches died; its traceback is above") from error
            waited += stall_seconds
            logger.warning(
                "waiting for images for %g s: slow storage, heavy augmentation, or a worker that hangs; "
                "loader.num_workers and data_s in metrics.jsonl tell more",
                waited,
            )
            continue
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
        waited = 0.0
        if isinstance(batch, UserError):
            raise batch
        if isinstance(batch, bytes):
            if not warned:
                logger.warning(
                    "/dev/shm has %d MB free, too few for %d workers: images come through pipes, which is slower "
                    "(docker run --shm-size, or fewer workers)",
                    shutil.disk_usage("/dev/shm").free >> 20,
                    num_workers,
                )
            warned = True
            batch = pickle.loads(batch)
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_method() -> str | None:
    """Return how workers start; None is Python's default.

    Forked workers are there at once and share what this process has imported; spawned ones import torch and
    albumentations for seconds each and hold them in memory of their own. Workers never touch CUDA, which a fork would
    break. Where forking is unsafe (macOS) or unknown (Windows), Python's default is taken; the annotation table is
    shared either way.
    """
    return "fork" if sys.platform == "linux" else None


def _start_worker(worker_id: int) -> None:
    # torch does the same for itself. num_workers decides how many cores are used, not OpenCV's thread pool.
    cv2.setNumThreads(0)
    # Ctrl-C, a terminal that closes and torchrun signal a whole process group: the training process answers them and
    # ends its workers, which must not die before.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    sys.excepthook = _tell_of_failure
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _tell_of_failure(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print a traceback unless the training process was interrupted while it took a batch from this worker's thread."""
    if not isinstance(error, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, traceback)


def _exit_with_parent() -> None:
    """End this worker when its parent has died, however it died.

    torch's own watch cannot: a worker blocks once it writes into a pipe that nobody empties any more, which its
    siblings keep open.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _DeadWorkerHandler:
    """A handler of SIGCHLD that explains what torch's finds, which raises wherever the main thread is."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self.found: RuntimeError | None = None  # what was raised last
        self.is_silenced = False  # since workers were killed, until others are started

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.is_silenced:
            return
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            self.found = _explained(error)
            raise self.found  # noqa: B904 - it has its cause


def _explain_dead_workers() -> None:
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, _DeadWorkerHandler):
        handler.found, handler.is_silenced = None, False  # of an earlier loader's workers
    elif callable(handler):
        signal.signal(signal.SIGCHLD, _DeadWorkerHandler(handler))


def _explained(error: RuntimeError) -> RuntimeError:
    """Return a dead worker's error with the likely reason; any other as it is."""
    if isinstance(error.__cause__, WorkerError):  # torch wraps what its own handler has raised into a vaguer error
        return error.__cause__
    what = " ".join(str(error).split())
    if isinstance(error, WorkerError) or not what.startswith("DataLoader worker"):
        return error
    if "Bus error" in what:
        why = "shared memory (/dev/shm) is full: docker run --shm-size, or fewer loader.num_workers"
    elif "Killed" in what or "pid(s)" in what:
        why = (
            "most often the kernel ends a process so when memory runs out (see dmesg or the container's events): "
            "fewer loader.num_workers or a smaller train.batch_size need less"
        )
    else:
        why = "loader.num_workers=0 reads images in the training process and shows where it happens"
    explained = WorkerError(f"a process that reads images died: {what.rstrip('. ')}; {why}")
    explained.__cause__ = error.__cause__
    return explained
