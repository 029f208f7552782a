"""The box head's losses beside torchvision's, by formulas written out."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import fastrcnn_loss

from resdet.build import build_model
from resdet.config import ModelConfig
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import UserError
from resdet.models.detector import build_detector
from resdet.models.losses import box_head_losses, class_balanced_weights
from resdet.models.spec import DetectorSpec

CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


def case() -> dict[str, object]:
    """Two images with 6 and 4 sampled proposals, 3 classes and the background."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(10, 2, generator=generator) * 50
    proposals = torch.cat([corners, corners + 10 + 40 * torch.rand(10, 2, generator=generator)], dim=1)
    objects = proposals + torch.randn(10, 4, generator=generator)
    labels = torch.tensor([1, 0, 3, 0, 2, 0, 1, 1, 0, 0])
    return {
        "class_logits": torch.randn(10, 4, generator=generator).requires_grad_(),
        "box_regression": (0.3 * torch.randn(10, 16, generator=generator)).requires_grad_(),
        "labels": list(labels.split([6, 4])),
        "regression_targets": list(CODER.encode_single(objects, proposals).split([6, 4])),
        "proposals": list(proposals.split([6, 4])),
        "box_coder": CODER,
    }


def losses(given: dict[str, object], **options: object) -> tuple[Tensor, Tensor]:
    defaults: dict[str, object] = {"class_loss": "cross_entropy", "box_loss": "smooth_l1", "class_weights": None}
    return box_head_losses(**given, **(defaults | options))  # type: ignore[arg-type]


def test_defaults_are_torchvisions() -> None:
    given = case()
    names = ("class_logits", "box_regression", "labels", "regression_targets")
    assert losses(given) == fastrcnn_loss(*(given[name] for name in names))


def test_weights_of_one_change_nothing() -> None:
    """What stands beside torchvision's function computes the same when told to; to float32's rounding of a mean."""
    given = case()
    torch.testing.assert_close(losses(given, class_weights=torch.ones(4)), losses(given), rtol=1e-6, atol=0)
    other = losses(given, class_weights=torch.tensor([1.0, 2.0, 1.0, 1.0]))
    assert not torch.isclose(other[0], losses(given)[0], rtol=1e-3)


def test_weights_are_those_of_cross_entropy() -> None:
    given, weights = case(), torch.tensor([1.0, 0.5, 2.0, 4.0])
    expected = F.cross_entropy(given["class_logits"], torch.cat(given["labels"]), weight=weights)  # type: ignore[arg-type]
    torch.testing.assert_close(losses(given, class_weights=weights)[0], expected)


def test_focal_is_the_papers_formula() -> None:
    given = case()
    probabilities = given["class_logits"].softmax(1)[torch.arange(10), torch.cat(given["labels"])]  # type: ignore[attr-defined,arg-type]
    expected = -((1 - probabilities) ** 2 * probabilities.log()).mean()
    torch.testing.assert_close(losses(given, class_loss="focal")[0], expected)
    assert not torch.isclose(losses(given)[0], expected, rtol=1e-3)


def giou(a: list[float], b: list[float]) -> float:
    """Rezatofighi et al. 2019, algorithm 1."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union - (hull - union) / hull


def test_giou_is_that_of_the_decoded_boxes() -> None:
    given = case()
    label, anchors = torch.cat(given["labels"]), torch.cat(given["proposals"])  # type: ignore[arg-type]
    found = CODER.decode_single(given["box_regression"], anchors).reshape(10, 4, 4)
    objects = CODER.decode_single(torch.cat(given["regression_targets"]), anchors)  # type: ignore[arg-type]
    rows = torch.where(label > 0)[0].tolist()
    expected = sum(1 - giou(found[i, label[i]].tolist(), objects[i].tolist()) for i in rows) / 10
    got = losses(given, box_loss="giou")[1]
    assert got.item() == pytest.approx(expected, rel=1e-5)
    got.backward()
    gradient = given["box_regression"].grad.reshape(10, 4, 4)  # type: ignore[attr-defined]
    assert gradient.isfinite().all()
    touched = {(i, k) for i, k in gradient.abs().sum(-1).nonzero().tolist()}
    assert touched == {(i, int(label[i])) for i in rows}, "of each positive the row of its class, and nothing else"


def test_a_batch_without_objects_has_finite_losses() -> None:
    given = case() | {"labels": [torch.zeros(6, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)]}
    scores, boxes = losses(given, class_loss="focal", box_loss="giou", class_weights=torch.ones(4))
    (scores + boxes).backward()
    assert boxes.item() == 0
    assert scores.isfinite()


def test_rare_classes_weigh_more() -> None:
    weights = class_balanced_weights([1000, 10, 0], 0.999)
    assert weights[0] == 1
    assert sum(weights[1:]) / 3 == pytest.approx(1)
    ratio = (1 - 0.999**1000) / (1 - 0.999**10)
    assert weights[2] / weights[1] == pytest.approx(ratio)
    assert weights[3] / weights[1] == pytest.approx((1 - 0.999**1000) / (1 - 0.999))
    assert class_balanced_weights([5, 50], 0.0) == [1, 1, 1]
    assert math.isclose(
        class_balanced_weights([1, 100], 0.999999)[1] / class_balanced_weights([1, 100], 0.999999)[2], 100, rel_tol=1e-3
    )


@pytest.mark.parametrize("fast", [True, False])
def test_a_detector_trains_with_them(fast: bool) -> None:
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch="resnet18",
        norm="group",
        fast=fast,
        min_size=64,
        max_size=64,
        out_channels=16,
        box_head_channels=16,
        class_loss="focal",
        box_loss="giou",
        class_weights=(1.0, 0.5, 2.0),
    )
    model = build_detector(spec, num_classes=3, trainable_layers=5).train()
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 20.0, 60.0, 60.0]])
    found = model([torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": torch.tensor([1, 2])}])
    sum(found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_class_weights_must_fit_the_classes() -> None:
    spec = DetectorSpec(arch="resnet18", class_weights=(1.0, 2.0))
    with pytest.raises(UserError, match="class_weights: must be one for each of the 4 classes"):
        build_detector(spec, num_classes=4)


def test_weights_count_the_boxes_that_are_trained_on() -> None:
    """Difficult objects count where they are trained on, and nowhere else."""
    table = shapes_table(6, 64, 0)
    table = replace(table, difficult=table.labels == 1)
    config = ModelConfig(arch="resnet18", weights=None, norm="group", class_balance_beta=0.9)
    found = {}
    for use_difficult in (False, True):
        dataset = DetectionDataset(table, ShapesImages(64, 0), training=True, use_difficult=use_difficult)
        found[use_difficult] = build_model(config, dataset, resume_from=None).spec.class_weights
    counts = [int((table.labels == label).sum()) for label in (1, 2, 3)]
    assert found[True] == pytest.approx(class_balanced_weights(counts, 0.9))
    assert found[False] == pytest.approx(class_balanced_weights([0, *counts[1:]], 0.9))
    assert found[True] != pytest.approx(found[False])
