import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from running import runs, soon

from resdet.data import workers
from resdet.data.augment.pipeline import build_augment
from resdet.data.dataset import DetectionDataset
from resdet.data.loader import eval_loader, train_loader
from resdet.data.order import TrainBatches, image_order
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.data.workers import WorkerError
from resdet.errors import DataError
from resdet.processes import Processes

CPU = torch.device("cpu")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def take(batches, count):
    return list(itertools.islice(batches, count))


def shapes_dataset(num_images=12, *, images=None, augment=None, training=True):
    table = shapes_table(num_images, 64, seed=0)
    return DetectionDataset(table, images or ShapesImages(64, seed=0), augment, training=training)


def as_plain(batch):
    images = [image.numpy().tobytes() for image in batch.images]
    targets = [(t["boxes"].tolist(), t["labels"].tolist(), int(t["image_id"])) for t in batch.targets]
    return images, targets, batch.indices


def test_batches_do_not_depend_on_workers():
    steps = [{"HorizontalFlip": {"p": 0.5}}, {"ColorJitter": {"p": 1}}, {"RandomCrop": {"height": 40, "width": 48}}]
    dataset = shapes_dataset(augment=build_augment(steps))
    expected = None
    for num_workers in (0, 1, 2):
        batches = train_loader(dataset, batch_size=4, num_micro_batches=2, num_workers=num_workers, seed=3)
        plain = [as_plain(batch) for batch in take(batches, 9)]
        expected = expected or plain
        assert plain == expected
    resumed = train_loader(dataset, batch_size=4, num_micro_batches=2, seed=3, start_batch=2)
    assert [as_plain(batch) for batch in take(resumed, 5)] == expected[4:]
    other = train_loader(dataset, batch_size=4, num_micro_batches=2, seed=4)
    assert [as_plain(batch) for batch in take(other, 5)] != expected[:5]


@pytest.mark.parametrize("name", ["repeat_factor", "class_balanced"])
def test_images_are_drawn_as_the_sampling_says(name):
    dataset = shapes_dataset()
    batches = train_loader(dataset, batch_size=4, sampling=name, repeat_threshold=1.0, seed=2, start_batch=3)
    order = image_order(name, dataset.table, dataset.trained, repeat_threshold=1.0)
    expected = take(iter(TrainBatches(dataset.table.sizes, 4, order=order, seed=2, start_batch=3)), 5)
    assert [batch.indices for batch in take(batches, 5)] == [[index for index, _ in batch] for batch in expected]
    uniform = take(train_loader(dataset, batch_size=4, seed=2, start_batch=3), 5)
    assert [batch.indices for batch in uniform] != [[index for index, _ in batch] for batch in expected]


def test_a_batch_holds_uint8_images_and_targets_of_the_table():
    dataset = shapes_dataset()
    batch = next(train_loader(dataset, batch_size=4, num_workers=1))
    assert len(batch.images) == len(batch.targets) == len(batch.indices) == 4
    for image, target, index in zip(batch.images, batch.targets, batch.indices, strict=True):
        expected_image, expected = dataset[index]
        assert torch.equal(image, expected_image)
        assert set(target) == set(expected)
        assert all(torch.equal(target[key], expected[key]) for key in expected)


def test_reading_does_not_disturb_the_random_stream_of_training():
    before = torch.random.get_rng_state()
    take(train_loader(shapes_dataset(), batch_size=2, num_workers=1), 2)
    list(eval_loader(shapes_dataset(training=False), batch_size=2))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("num_images", "world_size", "batch_size"),
    [(7, 1, 3), (7, 2, 2), (7, 3, 1), (13, 4, 2), (2, 3, 4), (3, 8, 2), (1, 1, 1)],
)
def test_every_image_is_evaluated_once_over_all_processes(num_images, world_size, batch_size):
    dataset = shapes_dataset(num_images, training=False)
    seen = []
    for rank in range(world_size):
        batches = list(eval_loader(dataset, Processes(rank, world_size, CPU), batch_size=batch_size))
        share = [index for batch in batches for index in batch.indices]
        assert share == list(range(rank, num_images, world_size))
        assert all(len(batch.images) <= batch_size for batch in batches)
        seen += share
    assert sorted(seen) == list(range(num_images))


def test_evaluation_is_the_same_with_workers():
    dataset = shapes_dataset(7, training=False)
    in_process, in_workers = (list(eval_loader(dataset, batch_size=2, num_workers=n)) for n in (0, 2))
    assert [as_plain(batch) for batch in in_process] == [as_plain(batch) for batch in in_workers]


class Broken:
    def __call__(self, index):
        if index == 2:
            raise DataError("image 3: gone.jpg: no such image file")
        return np.zeros((64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mistake_found_by_a_worker_arrives_as_it_was_said(num_workers):
    dataset = shapes_dataset(5, images=Broken(), training=False)
    with pytest.raises(DataError) as caught:
        list(eval_loader(dataset, batch_size=2, num_workers=num_workers))
    assert type(caught.value) is DataError
    assert str(caught.value) == "image 3: gone.jpg: no such image file"


class WorkerState:
    """Tells through its pixels how many threads the worker uses."""

    def __call__(self, index):
        import cv2

        return np.full((64, 64, 3), [torch.get_num_threads(), cv2.getNumThreads(), 0], dtype=np.uint8)


def test_a_worker_uses_one_core():
    image = next(train_loader(shapes_dataset(images=WorkerState()), batch_size=1, num_workers=1)).images[0]
    assert image[:, 0, 0].tolist() == [1, 1, 0]


def test_small_shared_memory_is_worked_around(monkeypatch, caplog):
    dataset = shapes_dataset()
    expected = [as_plain(batch) for batch in take(train_loader(dataset, batch_size=4, num_workers=1), 3)]
    monkeypatch.setattr(workers, "_start_method", lambda: "fork")  # workers are to see the next line
    monkeypatch.setattr(workers, "_fits_in_shared_memory", lambda num_bytes, num_workers: False)
    assert [as_plain(batch) for batch in take(train_loader(dataset, batch_size=4, num_workers=1), 3)] == expected
    assert len([message for message in caplog.messages if "images come through pipes" in message]) == 1
    monkeypatch.undo()
    assert workers._fits_in_shared_memory(1 << 60, num_workers=0)
    assert not workers._fits_in_shared_memory(1 << 60, num_workers=1) or sys.platform != "linux"


def test_many_prefetched_images_take_few_file_descriptors():
    """64 images of 3 tensors each would break a limit of 100 several times over."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "import itertools\n"
        "from resdet.data.dataset import DetectionDataset\n"
        "from resdet.data.loader import train_loader\n"
        "from resdet.data.shapes import ShapesImages, shapes_table\n"
        "dataset = DetectionDataset(shapes_table(8, 32, 0), ShapesImages(32, 0), training=True)\n"
        "held = list(itertools.islice(train_loader(dataset, batch_size=64, num_workers=2), 4))\n"
        "assert sum(len(batch.images) for batch in held) == 256\n"
    )
    if sys.platform != "linux":
        pytest.skip("file descriptors carry shared memory on Linux only")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "method",
    ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)],
)
def test_workers_may_start_in_any_way(monkeypatch, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this platform")
    dataset = shapes_dataset(augment=build_augment([{"HorizontalFlip": {"p": 0.5}}]))
    expected = [as_plain(batch) for batch in take(train_loader(dataset, batch_size=4), 3)]
    monkeypatch.setattr(workers, "_start_method", lambda: method)
    assert [as_plain(batch) for batch in take(train_loader(dataset, batch_size=4, num_workers=1), 3)] == expected


class Signals:
    """Its worker dies over image 2; over others it is quick."""

    def __init__(self, number):
        self.number = number

    def __call__(self, index):
        if index == 2:
            os.kill(os.getpid(), self.number)
        return np.zeros((64, 64, 3), dtype=np.uint8)


@linux_only
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"killed by signal: Killed; .*when memory runs out .* fewer loader\.num_workers"),
        (signal.SIGBUS, r"killed by signal: Bus error.*; shared memory \(/dev/shm\) is full: docker run --shm-size"),
        (signal.SIGSEGV, r"killed by signal: Segmentation fault; loader\.num_workers=0 "),
    ],
)
def test_a_killed_worker_is_explained(number, message):
    dataset = shapes_dataset(5, images=Signals(number), training=False)
    with pytest.raises(WorkerError, match="^a process that reads images died: .*" + message) as caught:
        list(eval_loader(dataset, batch_size=1, num_workers=1))
    assert "\n" not in str(caught.value)


@linux_only
def test_a_worker_killed_while_the_model_computes_is_explained():
    batches = train_loader(shapes_dataset(), batch_size=2, num_workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    with pytest.raises(WorkerError, match="killed by signal: Killed"):  # noqa: PT012 - the signal takes a moment
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(30)
    del batches
    assert multiprocessing.active_children() == []


class Faulty:
    def __call__(self, index):
        raise KeyError("a fault of ours")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_of_ours_names_the_image(num_workers):
    dataset = shapes_dataset(5, images=Faulty(), training=False)
    with pytest.raises(RuntimeError, match=r"image 1 \(shapes_0_000000\.png\) .* seed 0: KeyError: 'a fault of ours'"):
        list(eval_loader(dataset, batch_size=1, num_workers=num_workers))


@linux_only
@pytest.mark.parametrize("fits", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pipes", "shared-memory"])
def test_workers_end_with_their_parent(fits):
    """Through pipes, a worker whose parent is gone would wait for ever for somebody to take its batch."""
    code = (
        "import multiprocessing, os, signal, time\n"
        "from resdet.data import loader, workers\n"
        "from resdet.data.dataset import DetectionDataset\n"
        "from resdet.data.shapes import ShapesImages, shapes_table\n"
        f"workers._fits_in_shared_memory = lambda num_bytes, num_workers: {fits}\n"
        "dataset = DetectionDataset(shapes_table(8, 256, 0), ShapesImages(256, 0), training=True)\n"
        "batches = loader.train_loader(dataset, batch_size=8, num_workers=2)\n"
        "next(batches)\n"
        "time.sleep(1)\n"
        "print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    assert soon(lambda: not any(runs(pid) for pid in workers))


@linux_only
def test_nothing_is_left_when_an_iterator_is_dropped():
    dataset = shapes_dataset()
    next(train_loader(dataset, batch_size=2, num_workers=2))  # what is opened once and for all
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        batches = train_loader(dataset, batch_size=2, num_workers=2)
        next(batches)
        del batches
        list(eval_loader(shapes_dataset(3, training=False), batch_size=1, num_workers=1))
    # A process takes a moment to be gone; what leaks is still there afterwards.
    deadline = time.monotonic() + 20
    while (multiprocessing.active_children() or len(os.listdir("/proc/self/fd")) > before) and (
        time.monotonic() < deadline
    ):
        gc.collect()
        time.sleep(0.1)
    assert multiprocessing.active_children() == []
    assert len(os.listdir("/proc/self/fd")) <= before
