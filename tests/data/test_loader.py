import itertools
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from resdet.data import loader
from resdet.data.augment import build_augment
from resdet.data.dataset import DetectionDataset
from resdet.data.loader import TrainBatches, eval_loader, train_loader
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import DataError, UserError

# A third portrait, sizes as in COCO.
SIZES = np.array([(640, 480) if i % 3 == 0 else (480, 640) for i in range(100)])
PINNED = [(79, 4967302838313901235), (43, 2779043681976988642), (31, 4677062646242300233), (50, 6036632939799842505)]


def take(batches, count):
    return list(itertools.islice(batches, count))


def global_batches(count, *, batch_size=8, world_size=1, num_micro_batches=1, **options):
    """Global batches put together again from the shares of all processes, in the order of the slices."""
    cut = {"world_size": world_size, "num_micro_batches": num_micro_batches}
    shares = [
        take(iter(TrainBatches(SIZES, batch_size, rank=rank, **cut, **options)), count * num_micro_batches)
        for rank in range(world_size)
    ]
    return [
        [
            item
            for share in shares
            for part in share[i * num_micro_batches : (i + 1) * num_micro_batches]
            for item in part
        ]
        for i in range(count)
    ]


@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(2, 1), (1, 2), (2, 2), (8, 1), (1, 8), (2, 4)])
def test_images_and_seeds_do_not_depend_on_how_a_batch_is_cut(world_size, num_micro_batches):
    cut = global_batches(60, world_size=world_size, num_micro_batches=num_micro_batches)
    assert cut == global_batches(60)


def test_another_seed_gives_another_order():
    assert global_batches(10, seed=1) != global_batches(10, seed=0)


@pytest.mark.parametrize("start", [1, 11, 12, 13, 200, 2000])
@pytest.mark.parametrize("chunk", [1, 250, 1 << 17])
def test_resuming_gives_the_tail(monkeypatch, start, chunk):
    whole = global_batches(start + 20)
    monkeypatch.setattr(loader, "_CHUNK", chunk)
    assert global_batches(20, start_batch=start) == whole[start:]


def test_every_image_is_drawn_once_per_epoch():
    batch_size, epochs = 8, 10
    batches = global_batches(epochs * len(SIZES) // batch_size, batch_size=batch_size)
    counts = Counter(index for batch in batches for index, _ in batch)
    assert set(counts) == set(range(len(SIZES)))
    # Images that wait for their batch may be behind, those of the epoch begun to make up for them ahead.
    assert set(counts.values()) <= {epochs - 1, epochs, epochs + 1}
    assert sum(abs(count - epochs) for count in counts.values()) <= 2 * 2 * batch_size
    seeds = [seed for batch in batches for _, seed in batch]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) <= max(seeds) < 2**63


def test_epochs_are_shuffled_differently():
    first, second = global_batches(12)[:12], global_batches(24)[12:]
    assert [index for batch in first for index, _ in batch] != [index for batch in second for index, _ in batch]


def test_portrait_and_landscape_do_not_mix():
    for batch in global_batches(100):
        portrait = {bool(SIZES[index, 0] > SIZES[index, 1]) for index, _ in batch}
        assert len(portrait) == 1


def test_a_group_smaller_than_a_batch_is_not_kept_apart():
    sizes = np.array([(640, 480)] * 3 + [(480, 640)] * 50)
    batches = take(iter(TrainBatches(sizes, 8)), 7)
    counts = Counter(index for batch in batches for index, _ in batch)
    assert max(counts.values()) <= 2
    assert {0, 1, 2} <= set(counts)


def test_fewer_images_than_a_batch():
    batches = take(iter(TrainBatches(SIZES[:3], 8)), 30)
    counts = Counter(index for batch in batches for index, _ in batch)
    assert sorted(counts.values()) == [80, 80, 80]


@pytest.mark.parametrize(("num_images", "limit_s"), [(117_266, 5.0), (10, 5.0)])
def test_resuming_late_is_quick(num_images, limit_s):
    """0.15 s and 0.02 s on one core; the limits are for a loaded machine."""
    sizes = np.tile(SIZES, (num_images // len(SIZES) + 1, 1))[:num_images]
    start = time.perf_counter()
    next(iter(TrainBatches(sizes, 16, start_batch=90_000)))
    assert time.perf_counter() - start < limit_s


def test_the_order_is_pinned():
    """A run must resume into the same data with later versions of this package, NumPy and torch."""
    assert take(iter(TrainBatches(SIZES, 4, seed=0)), 1)[0] == PINNED


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(UserError, match=r"batch_size must be a multiple of .* got 6 for 2 x 2"):
        TrainBatches(SIZES, 6, world_size=2, num_micro_batches=2)


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
    ("num_images", "world_size", "batch_size"), [(7, 1, 3), (7, 2, 2), (7, 3, 1), (2, 3, 4), (1, 1, 1)]
)
def test_every_image_is_evaluated_once_over_all_processes(num_images, world_size, batch_size):
    dataset = shapes_dataset(num_images, training=False)
    seen = []
    for rank in range(world_size):
        batches = list(eval_loader(dataset, batch_size=batch_size, rank=rank, world_size=world_size))
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
    monkeypatch.setattr(loader, "_fits_in_shared_memory", lambda num_bytes: False)
    assert [as_plain(batch) for batch in take(train_loader(dataset, batch_size=4, num_workers=1), 3)] == expected
    monkeypatch.undo()
    assert not loader._fits_in_shared_memory(1 << 60) or sys.platform != "linux"


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
