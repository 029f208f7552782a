import gc
import multiprocessing
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from resdet.classification.data import LabelledImages, StoredPictures
from resdet.classification.loader import eval_batch
from resdet.classification.views import ten_crop_views
from resdet.data import workers
from resdet.data.dataset import DetectionDataset
from resdet.data.loader import eval_keys, eval_loader, train_loader
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.data.workers import load_batches
from resdet.errors import DataError
from resdet.processes import Processes

ON_CPU, ON_CUDA = (Processes(0, 1, torch.device(name)) for name in ("cpu", "cuda"))


def shapes_dataset(images=None, *, training=True):
    return DetectionDataset(shapes_table(5, 64, seed=0), images or ShapesImages(64, seed=0), training=training)


class Pinning:
    """A stand-in for page-locked memory on a machine without CUDA."""

    def __init__(self, monkeypatch):
        self.copies = []
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *args: self._pin(tensor))
        for module in (torch.cuda, torch.accelerator):
            monkeypatch.setattr(module, "is_available", lambda: True, raising=False)
        for module, name, result in [
            (torch.accelerator, "current_device_index", 0),
            (torch.accelerator, "set_device_index", None),
            (torch.cuda, "current_device", 0),
            (torch.cuda, "set_device", None),
        ]:
            monkeypatch.setattr(module, name, lambda *args, result=result: result, raising=False)

    def _pin(self, tensor):
        self.copies.append(tensor.clone())
        return self.copies[-1]

    def holds(self, tensor):
        return tensor.untyped_storage().data_ptr() in [copy.untyped_storage().data_ptr() for copy in self.copies]


@pytest.fixture
def pinning(monkeypatch):
    return Pinning(monkeypatch)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_on_the_cpu_of_a_host_with_cuda_pins_nothing(pinning, num_workers):
    next(train_loader(shapes_dataset(), ON_CPU, batch_size=2, num_workers=num_workers))
    list(eval_loader(shapes_dataset(training=False), ON_CPU, batch_size=2, num_workers=num_workers))
    assert pinning.copies == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_and_targets_are_pinned_in_few_pieces(pinning, num_workers):
    plain = next(train_loader(shapes_dataset(), batch_size=4))
    assert pinning.copies == []
    loader = train_loader(shapes_dataset(), ON_CUDA, batch_size=4, num_workers=num_workers)
    batch = next(loader)
    del loader  # else a worker's next batches are pinned meanwhile
    for image, target, plain_image, plain_target in zip(
        batch.images, batch.targets, plain.images, plain.targets, strict=True
    ):
        assert pinning.holds(image)
        assert torch.equal(image, plain_image)
        for name, value in target.items():
            assert pinning.holds(value)
            assert torch.equal(value, plain_target[name])
        assert not pinning.holds(plain_image)
    # Pixels, boxes, labels and image ids; of each batch that was ready.
    assert len(pinning.copies) in ([4] if num_workers == 0 else [4, 8, 12])


class Slow:
    """Pictures that take their time, longer than a loader is told to wait."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, index):
        time.sleep(self.seconds)
        return np.full((64, 64, 3), index, dtype=np.uint8)


@pytest.mark.parametrize("team", [ON_CPU, ON_CUDA], ids=["cpu", "cuda"])
def test_a_stall_is_noticed_and_waited_for(pinning, caplog, team):
    expected = [batch.indices for _, batch in zip(range(3), train_loader(shapes_dataset(), batch_size=2), strict=False)]
    dataset = shapes_dataset(Slow(0.4))
    loader = train_loader(dataset, team, batch_size=2, num_workers=1, stall_seconds=0.25)
    batches = [next(loader) for _ in range(3)]
    assert [batch.indices for batch in batches] == expected
    assert all((image == index).all() for b in batches for image, index in zip(b.images, b.indices, strict=True))
    assert caplog.messages[0].startswith("waiting for images for 0.25 s: slow storage")
    # Two images take 0.8 s: three times 0.25 s, for each batch anew.
    assert [message.split(":")[0] for message in caplog.messages[:3]] == [
        f"waiting for images for {seconds} s" for seconds in ("0.25", "0.5", "0.75")
    ]
    assert len([message for message in caplog.messages if "for 0.25 s" in message]) == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_stall_is_noticed_where_none_is(caplog, num_workers):
    loader = train_loader(shapes_dataset(Slow(0.05)), batch_size=2, num_workers=num_workers, stall_seconds=30)
    for _ in range(3):
        next(loader)
    assert caplog.messages == []


def test_a_dead_pinning_thread_is_no_stall(pinning, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils.pin_memory, "_pin_memory_loop", lambda *args: None)
    loader = train_loader(shapes_dataset(), ON_CUDA, batch_size=2, num_workers=1, stall_seconds=0.2)
    with pytest.raises(RuntimeError, match=r"^the thread that pins batches died"):
        next(loader)


def views_of(num_workers, *, team=ON_CPU):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 30, 3), dtype=np.uint8)
    images = LabelledImages("five", ("a", "b"), np.array([0, 1, 1, 0, 1]), StoredPictures(pixels, "five"))
    make = partial(eval_batch, images, partial(ten_crop_views, resize=32, size=24))
    keys = eval_keys(5, 2, rank=0, world_size=1)
    return list(load_batches(make, keys, num_workers=num_workers, device=team.device))


def test_classification_too_works_around_small_shared_memory(monkeypatch, caplog):
    expected = views_of(0)
    monkeypatch.setattr(workers, "_start_method", lambda: "fork")  # workers are to see the next line
    monkeypatch.setattr(workers, "_fits_in_shared_memory", lambda num_bytes, num_workers: num_bytes < 2 * 10 * 24 * 24)
    for batch, plain in zip(views_of(1), expected, strict=True):
        assert type(batch) is type(plain)
        assert batch.indices == plain.indices
        assert torch.equal(batch.labels, plain.labels)
        torch.testing.assert_close(batch.views, plain.views, rtol=0, atol=0)
    assert len([message for message in caplog.messages if "images come through pipes" in message]) == 1


def test_classification_too_pins_what_it_is_told_to(pinning):
    batches = views_of(0)
    assert pinning.copies == []
    for batch, plain in zip(views_of(1, team=ON_CUDA), batches, strict=True):
        assert all(map(pinning.holds, [*batch.views, batch.labels]))
        torch.testing.assert_close(batch.views, plain.views, rtol=0, atol=0)


class Broken:
    def __call__(self, index):
        raise DataError("image 1: gone.jpg: no such image file")


def test_workers_end_with_a_users_error():
    gc.disable()  # nothing must wait for it
    try:
        with pytest.raises(DataError, match=r"gone\.jpg") as caught:
            next(train_loader(shapes_dataset(Broken()), batch_size=2, num_workers=1))
        assert multiprocessing.active_children() == []
        assert caught.tb is not None  # the error, which knows where it was raised, is still here
    finally:
        gc.enable()
