"""The fast proposal network: torchvision's proposals, losses and gradients from less work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resdet.models.detector import DetectorSpec, build_detector
from resdet.models.rcnn import FastProposalNetwork, ProposalHead

RandomiseNorms = Callable[[nn.Module], None]
SIZES = {"min_size": 96, "max_size": 128, "rpn_pre_nms_top_n_train": 60, "rpn_pre_nms_top_n_test": 40}


def pair(randomise_norms: RandomiseNorms) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's in float64, where rounding moves no proposal across a threshold."""
    torch.manual_seed(0)
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), num_classes=3, **SIZES)
    randomise_norms(theirs.backbone)
    ours = build_detector(DetectorSpec(arch="resnet18", **SIZES), num_classes=3)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours.rpn, FastProposalNetwork)
    return ours.double(), theirs.double()


def batch(num_boxes: tuple[int, ...]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 90 + 8 * n, 110 - 6 * n, generator=generator, dtype=torch.float64) for n in num_boxes]
    targets = []
    for n in num_boxes:
        corner = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 40
        sides = 10 + torch.rand(n, 2, generator=generator, dtype=torch.float64) * 40
        labels = torch.randint(1, 3, (n,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + sides], dim=1), "labels": labels})
    return images, targets


def losses_and_gradients(model: nn.Module, num_boxes: tuple[int, ...]) -> dict[str, Tensor]:
    images, targets = batch(num_boxes)
    model.train().zero_grad()
    torch.manual_seed(2)  # which anchors and proposals the losses are taken over
    losses = model(images, targets)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {**losses, **gradients}


@pytest.mark.parametrize("num_boxes", [(3, 1), (2, 0), (0,)])
def test_losses_and_gradients_are_torchvisions(num_boxes, randomise_norms: RandomiseNorms) -> None:
    ours, theirs = pair(randomise_norms)
    expected = losses_and_gradients(theirs, num_boxes)
    # float64: 1e-16, amplified by the depth of a network of random weights; entries are compared with their tensor's
    # largest, as many are sums of what cancels.
    for name, value in losses_and_gradients(ours, num_boxes).items():
        scale = float(expected[name].detach().abs().max())
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9 * scale + 1e-15, msg=name)
    with torch.no_grad():
        ours.rpn.head.conv[0][0].weight[0, 0, 0, 0] += 1e-3
    changed = losses_and_gradients(ours, num_boxes)
    assert abs(changed["loss_objectness"] - expected["loss_objectness"]) > 1e-9


def test_detections_are_torchvisions(randomise_norms: RandomiseNorms) -> None:
    ours, theirs = pair(randomise_norms)
    images, _ = batch((1, 2))
    with torch.no_grad():
        expected, found = theirs.eval()(images), ours.eval()(images)
    assert sum(len(e["boxes"]) for e in expected) > 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=0, atol=1e-8)
        torch.testing.assert_close(one["scores"], other["scores"], rtol=0, atol=1e-9)
        assert torch.equal(one["labels"], other["labels"])


def test_head_at_anchors_is_the_head_there() -> None:
    """Every anchor of every level, so corners and borders too; and what flows back from each of them."""
    torch.manual_seed(0)
    head = ProposalHead(8, 3).double()
    nn.init.normal_(head.conv[0][0].weight)
    levels = [torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True) for size in ((5, 4), (3, 2), (1, 1))]
    logits, deltas = head(levels)
    dense_logits = torch.cat([t.permute(0, 2, 3, 1).reshape(2, -1) for t in logits], dim=1).view(-1)
    dense_deltas = torch.cat([t.permute(0, 2, 3, 1).reshape(2, -1, 4) for t in deltas], dim=1).view(-1, 4)
    anchors = torch.randperm(len(dense_logits))
    found_logits, found_deltas = head.at(levels, anchors)
    # float64 sums of 72 products.
    torch.testing.assert_close(found_logits, dense_logits[anchors], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_deltas, dense_deltas[anchors], rtol=1e-12, atol=1e-12)
    weights = torch.randn(len(anchors), 5, dtype=torch.float64)
    inputs = [*levels, *head.parameters()]

    def slopes(logits: Tensor, deltas: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logits * weights[:, 0]).sum() + (deltas * weights[:, 1:]).sum(), inputs)

    ours = slopes(found_logits, found_deltas, weights)
    theirs = slopes(dense_logits, dense_deltas, weights[anchors.argsort()])
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(head.at(levels, anchors.roll(1))[0], dense_logits[anchors], rtol=1e-12, atol=1e-12)


def test_head_at_no_anchor_gives_nothing() -> None:
    head = ProposalHead(4, 3)
    feature = torch.randn(1, 4, 3, 3, requires_grad=True)
    logits, deltas = head.at([feature], torch.zeros(0, dtype=torch.int64))
    assert logits.shape == (0,)
    assert deltas.shape == (0, 4)
    (logits.sum() + deltas.sum()).backward()
    assert not feature.grad.any()
