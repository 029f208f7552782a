"""How much a GPU is asked to do for a ResNet-101 with FPN and two images, counted on the pretend one."""

from __future__ import annotations

import pytest
import torch
from benchmarks.pretend_gpu import Record, to_pretend
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec

IMAGES = [torch.rand(3, 50, 70), torch.rand(3, 60, 55)]
TARGETS = [
    {"boxes": torch.tensor([[5.0, 5, 30, 35], [15, 10, 45, 40]]), "labels": torch.tensor([1, 2])},
    {"boxes": torch.tensor([[2.0, 2, 50, 45]]), "labels": torch.tensor([3])},
]


def count(model: FasterRCNN, record: Record, *, training: bool) -> tuple[int, int]:
    """Return the operators and waits of the second forward pass (and backward pass), float32."""
    model.train(training)
    with torch.set_grad_enabled(training):
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            record.clear()
            outputs = model(IMAGES, TARGETS) if training else model(IMAGES)
            if training:
                sum(outputs.values()).backward()
    return len(record.operators), record.waits.total()


@pytest.mark.slow
def test_a_gpu_is_asked_for_little_and_seldom_waited_for(device_record: Record) -> None:
    """The counts of the documentation as bounds; the first pass keeps anchors and folded weights for the next."""
    spec = DetectorSpec(arch="resnet101", min_size=(64,), max_size=100)
    model = to_pretend(build_detector(spec, num_classes=91))
    operators, waits = count(model, device_record, training=False)
    assert operators <= 450
    assert waits == 2  # how many regions each level has, and how many detections each image
    operators, waits = count(model, device_record, training=True)
    assert operators <= 1000
    assert waits == 1  # how many regions each level has


@pytest.mark.slow
def test_torchvision_is_asked_for_more(device_record: Record) -> None:
    body = resnet_fpn_backbone(backbone_name="resnet101", weights=None)
    model = to_pretend(FasterRCNN(body, num_classes=91, min_size=64, max_size=100))
    images, targets = (
        [to_pretend(image) for image in IMAGES],
        [{k: to_pretend(v) for k, v in t.items()} for t in TARGETS],
    )
    model.train()
    device_record.clear()
    sum(model(images, targets).values()).backward()
    assert len(device_record.operators) > 1500
    assert device_record.waits.total() > 30
