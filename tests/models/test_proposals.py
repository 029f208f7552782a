"""The fast proposal network: torchvision's proposals, losses and gradients from less work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks.inference import agreement
from torch import Tensor, nn
from torchvision.io import decode_image
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resdet.config import load_config
from resdet.models import proposals
from resdet.models.checkpoint import load_detector
from resdet.models.detector import build_detector
from resdet.models.proposals import FastProposalHead, FastProposalNetwork, _patches, _ReadRows, sum_by_row
from resdet.models.spec import DetectorSpec
from resdet.training.detection import train

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


@pytest.mark.parametrize("num_boxes", [(3, 1), pytest.param((2, 0), marks=pytest.mark.slow), (0,)])
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
    head = FastProposalHead(8, 3).double()
    nn.init.normal_(head.conv[0][0].weight)
    levels = [torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True) for size in ((5, 4), (3, 2), (1, 1))]
    logits, deltas = head(levels)
    dense_logits = torch.cat([t.permute(0, 2, 3, 1).reshape(2, -1) for t in logits], dim=1).view(-1)
    dense_deltas = torch.cat([t.permute(0, 2, 3, 1).reshape(2, -1, 4) for t in deltas], dim=1).view(-1, 4)
    anchors = torch.randperm(len(dense_logits))
    found_logits, found_deltas = head.forward_at(levels, anchors)
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
        torch.testing.assert_close(
            head.forward_at(levels, anchors.roll(1))[0], dense_logits[anchors], rtol=1e-12, atol=1e-12
        )


def test_head_at_no_anchor_gives_nothing() -> None:
    head = FastProposalHead(4, 3)
    feature = torch.randn(1, 4, 3, 3, requires_grad=True)
    logits, deltas = head.forward_at([feature], torch.zeros(0, dtype=torch.int64))
    assert logits.shape == (0,)
    assert deltas.shape == (0, 4)
    (logits.sum() + deltas.sum()).backward()
    assert not feature.grad.any()


@pytest.mark.parametrize("num_used", [0, 1, 40])
def test_rows_are_read_and_given_back_as_by_indexing(num_used: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    index, used = torch.randint(12, (num_used,)), torch.rand(num_used) < 0.7
    upstream = torch.randn(num_used, 5, dtype=torch.float64)
    others = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    matrix = torch.randint(2, (num_used,))
    joined = torch.cat([rows, others])
    theirs = joined.index_select(0, index + 12 * matrix) * used[:, None]
    for is_device in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proposals, "is_queued", lambda _, answer=is_device: answer)
            ours = _ReadRows.apply(index, used, matrix, rows, others)
            assert torch.equal(ours, theirs)
            slopes = torch.autograd.grad(ours, (rows, others), upstream)
        expected = torch.autograd.grad(theirs, (rows, others), upstream, retain_graph=True)
        torch.testing.assert_close(slopes, expected, rtol=1e-14, atol=1e-14)  # float64 sums of some terms in any order


def test_rows_read_on_other_devices_are_summed_in_float32_and_in_one_order() -> None:
    """Without a device at hand: which gradient runs there (on meta tensors), and what it computes (on CPU tensors)."""
    feature = torch.zeros(1, 4, 5, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    places = torch.zeros(3, dtype=torch.int64, device="meta")
    read = _patches([feature], places, places)
    assert read.grad_fn.next_functions[0][0].name() == "_ReadRowsBackward"
    assert torch.autograd.grad(read.sum(), feature)[0].shape == feature.shape

    torch.manual_seed(0)
    index, rows = torch.randint(7, (6000,)), torch.rand(6000, 5).bfloat16()
    exact = torch.zeros(9, 5, dtype=torch.float64).index_add_(0, index, rows.double())
    found = sum_by_row(index, rows, 9)
    assert found.dtype == torch.bfloat16
    # Sums in float32, rounded once: half a unit in the last of 8 bits. Row by row in bfloat16 they are far worse.
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()
    one_by_one = torch.zeros(9, 5, dtype=torch.bfloat16)
    for place, row in zip(index.tolist(), rows, strict=True):
        one_by_one[place] += row
    assert (one_by_one - exact).abs().max() > 2**-8 * exact.abs().max()
    assert not found[7:].any()
    assert sum_by_row(index[:0], rows[:0], 9).shape == (9, 5)


@pytest.mark.slow
def test_detections_after_a_fine_tune_are_torchvisions(assets: Path, resnet18_file: Path, tmp_path: Path) -> None:
    """On 50 photographs, float32: the same objects, corners within 0.01 px, scores within 1e-4.

    A corner of 500 pixels has a float32 rounding of 3e-5, and the pyramid agrees to some 1e-5 of its scale.
    """
    settings = [
        "model.arch=resnet18",
        f"model.weights={resnet18_file}",
        f"data.train.root={assets / 'bccd'}",
        f"data.val.root={assets / 'bccd'}",
        "data.train.split=train",
        "data.val.split=val",
        "model.min_size=192",
        "model.max_size=288",
        "train.batch_size=4",
        "train.steps=60",
        "train.eval_every=null",
        "train.precision=fp32",
        "optim.name=adamw",
        "optim.lr=3e-4",
        "optim.lr_batch_size=null",
        "optim.warmup_steps=5",
        "optim.schedule=cosine",
        "loader.num_workers=0",
        f"output_dir={tmp_path}",
    ]
    root = Path(__file__).parents[2]
    result = train(load_config(root / "configs" / "frcnn_r101_voc.yaml", settings))
    assert result.metrics["AP50"] > 0.2  # scores that mean something
    fast = load_detector(tmp_path / "best.pt")
    theirs = FasterRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None), num_classes=4, min_size=192, max_size=288
    ).eval()
    theirs.load_state_dict(fast.state_dict())
    photographs = sorted((assets / "bccd" / "JPEGImages").glob("*.jpg"))[:50]
    images = [decode_image(str(path)).float() / 255 for path in photographs]
    with torch.no_grad():
        expected, found = [theirs([image])[0] for image in images], [fast([image])[0] for image in images]
    same = agreement(expected, found)
    assert same["detections"] > 200
    assert same["unmatched"] == 0
    assert float(same["largest difference of a corner [px]"]) < 0.01
    assert float(same["of a score"]) < 1e-4
    with torch.no_grad():
        fast.backbone.fpn.layer_blocks[0][0].bias += 0.05
        changed = agreement(expected, [fast([image])[0] for image in images])
    assert changed["unmatched"] > 0 or float(changed["of a score"]) > 1e-4
