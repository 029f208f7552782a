"""Images and targets on their way to a device: few copies, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmarks.pretend_gpu import DEVICE, Record, pretend_gpu, to_pretend
from torch import Tensor

from resdet.models.detector import Detector, build_detector
from resdet.models.inputs import model_images, model_targets, send_whole, transform_images
from resdet.models.spec import DetectorSpec
from resdet.types import Target

SHAPES = [(3, 20, 30), (3, 25, 16), (3, 8, 8)]


@pytest.fixture
def record() -> Iterator[Record]:
    with pretend_gpu() as made:
        yield made


def packed_images() -> list[Tensor]:
    """Return images as the loader makes them: parts of one tensor of bytes."""
    sizes = [3 * height * width for _, height, width in SHAPES]
    pixels = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8)
    return [part.view(shape) for part, shape in zip(torch.split(pixels, sizes), SHAPES, strict=True)]


def detector(resize: str = "torch", *, fast: bool = True) -> Detector:
    spec = DetectorSpec(
        arch="resnet18", min_size=32, max_size=48, out_channels=16, box_head_channels=16, resize=resize, fast=fast
    )
    return build_detector(spec, num_classes=3)


def to_host(images: list[Tensor]) -> list[Tensor]:
    return [image.cpu() for image in images]


@pytest.mark.parametrize(("kept", "num_copies"), [([0, 1, 2], 1), ([1, 2], 1), ([2, 1, 0], 1), ([0, 2], 2), ([1], 1)])
def test_images_that_lie_side_by_side_travel_in_one_copy(record: Record, kept: list[int], num_copies: int) -> None:
    """A batch, and a piece of one; images with something between them travel one by one."""
    images = [packed[index] for packed in [packed_images()] for index in kept]
    record.clear()
    sent = send_whole(images, DEVICE)
    assert [copy.waits for copy in record.copies] == [False] * num_copies
    assert sum(copy.size for copy in record.copies) == sum(image.numel() for image in images)
    assert all(image.device == DEVICE for image in sent)
    for image, original in zip(to_host(sent), images, strict=True):
        assert torch.equal(image, original)


def test_images_of_other_kinds_travel_one_by_one(record: Record) -> None:
    first, second = packed_images()[:2]
    tiles = [second[:, :8, :8], second[:, 8:16, :8]]
    for images in ([first, packed_images()[0]], tiles, [first, first]):
        record.clear()
        sent = send_whole(images, DEVICE)
        assert len(record.copies) == len(images)
        assert all(torch.equal(image, original) for image, original in zip(to_host(sent), images, strict=True))


def test_a_padded_detector_takes_bytes_and_others_floats(record: Record) -> None:
    images = packed_images()
    fast, plain = to_pretend(detector()), to_pretend(detector(fast=False))
    record.clear()
    assert {image.dtype for image in model_images(fast, images, DEVICE)} == {torch.uint8}
    assert len(record.copies) == 1
    for floats in (model_images(plain, images, DEVICE), transform_images(fast, images, DEVICE)):
        for image, original in zip(to_host(floats), images, strict=True):
            assert torch.equal(image, original.float() / 255)
    assert record.num_waits() == len(images) * 2, "none but this test's own"


def test_targets_stay_in_host_memory_where_the_detector_pads_them(record: Record) -> None:
    target = Target(boxes=torch.rand(2, 4), labels=torch.ones(2, dtype=torch.int64), image_id=torch.tensor(7))
    assert model_targets(to_pretend(detector()), [target], DEVICE)[0]["boxes"] is target["boxes"]
    (sent,) = model_targets(to_pretend(detector(fast=False)), [target], DEVICE)
    assert all(value.device == DEVICE for value in (sent["boxes"], sent["labels"], sent["image_id"]))


def test_images_for_pillow_stay_in_host_memory_but_in_training(record: Record) -> None:
    """Workers have resized those of training."""
    model, images = to_pretend(detector("pil")), packed_images()
    assert all(taken is given for taken, given in zip(model_images(model.eval(), images, DEVICE), images, strict=True))
    sent = model_images(model.train(), images, DEVICE)
    assert {(image.device, image.dtype) for image in sent} == {(DEVICE, torch.uint8)}


@pytest.mark.parametrize("resize", ["torch", "pil"])
def test_on_a_cpu_nothing_is_copied(resize: str) -> None:
    images, model = packed_images(), detector(resize)
    for taken, given in zip(model_images(model, images, torch.device("cpu")), images, strict=True):
        if resize == "pil":
            assert taken is given
        else:
            assert torch.equal(taken, given.float() / 255)
