"""Five steps of training, ours beside torchvision's."""

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resdet.models.detector import Detector, build_detector
from resdet.models.norm import calibrate_norm
from resdet.models.spec import DetectorSpec
from resdet.training.optim import build_optimizer

SETTINGS = {
    "min_size": 96,
    "max_size": 128,
    "rpn_post_nms_top_n_train": 100,
    "box_batch_size_per_image": 64,
}


def detector(arch: str, *, fast: bool) -> Detector:
    """A random network that trains without exploding: residual branches that add little, calibrated norms."""
    torch.manual_seed(0)
    model = build_detector(DetectorSpec(arch=arch, fast=fast, **SETTINGS), num_classes=3)
    for name, scale in model.backbone.body.named_buffers():
        if name.endswith("bn3.weight"):
            scale.fill_(0.2)
    calibrate_norm(model.backbone.body, [torch.rand(2, 3, 96, 128)])
    return model


def five_steps(model: FasterRCNN) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    optimizer = build_optimizer(model, name="sgd", lr=2e-4)
    model.train()
    history = []
    for step in range(5):
        images = [torch.rand(3, 90, 120, generator=generator), torch.rand(3, 110, 80, generator=generator)]
        boxes = [torch.tensor([[5.0, 8.0, 60.0, 70.0], [40.0, 20.0, 79.0, 80.0]]), torch.zeros(0, 4)]
        labels = [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64)]
        torch.manual_seed(step)
        losses = model(images, [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)])
        history.append({name: value.detach() for name, value in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return history


@pytest.mark.parametrize("arch", ["resnet18", pytest.param("resnet101", marks=pytest.mark.slow)])
def test_losses_equal_torchvisions_step_by_step(arch: str) -> None:
    """Bit-equal: with ``fast=False`` both run the same operations in the same order."""
    ours = detector(arch, fast=False)
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name=arch, weights=None), num_classes=3, **SETTINGS)
    theirs.load_state_dict(ours.state_dict())
    perturbed = FasterRCNN(resnet_fpn_backbone(backbone_name=arch, weights=None), num_classes=3, **SETTINGS)
    perturbed.load_state_dict(ours.state_dict())
    with torch.no_grad():
        perturbed.backbone.body.layer4[0].conv1.weight[0, 0, 0, 0] += 0.01

    expected = five_steps(theirs)
    found = five_steps(ours)
    for step in range(5):
        assert found[step].keys() == expected[step].keys()
        for name, value in expected[step].items():
            assert torch.equal(found[step][name], value), f"step {step}, {name}"
            assert torch.isfinite(value)
    assert expected[0] != expected[4], "nothing was trained"
    assert any(
        not torch.equal(a[name], b[name]) for a, b in zip(five_steps(perturbed), expected, strict=True) for name in a
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18"])
def test_fast_losses_stay_close(arch: str) -> None:
    """Folding changes the order of multiplications: float32 rounding, which five steps of training amplify a little."""
    exact, fast = detector(arch, fast=False), detector(arch, fast=True)
    fast.load_state_dict(exact.state_dict())
    for ours, reference in zip(five_steps(fast), five_steps(exact), strict=True):
        for name, value in reference.items():
            torch.testing.assert_close(ours[name], value, rtol=2e-3, atol=2e-4)
