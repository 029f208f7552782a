from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resdet.classification.summary import response_deviations, summarise, summary_table
from resdet.errors import UserError
from resdet.models.bodies import make_body
from resdet.models.norm import calibrate_norm


def footprint(body: nn.Module, level: str, side: int) -> int:
    """Measure a receptive field: how wide the gradient of one pixel in the middle of a map is."""
    images = torch.zeros(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    features = body(images)[level]
    middle = features.shape[-1] // 2
    features[0, :, middle, middle].sum().backward()
    assert images.grad is not None
    touched = images.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    assert int(touched[0]) > 0
    assert int(touched[-1]) < side - 1, "the field must lie inside the image to be measured"
    return int(touched[-1] - touched[0]) + 1


def linear(body: nn.Module) -> nn.Module:
    """Make every path count: positive weights, and nothing that stops a gradient or chooses one of several."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    for name, module in list(body.named_modules()):
        if isinstance(module, nn.ReLU):
            body.set_submodule(name, nn.Identity())
        elif isinstance(module, nn.MaxPool2d):
            body.set_submodule(name, nn.AvgPool2d(module.kernel_size, module.stride, module.padding))
    return body.double().eval()


@pytest.mark.parametrize(
    ("arch", "stages", "side"),
    [
        ("cifar20", (1, 2, 3), 120),
        ("resnet18d", (1, 2), 160),
        ("resnet50", (1, 2), 144),
        ("vgg16", (2, 3), 64),
    ],
)
def test_receptive_fields_are_the_footprints_of_gradients(arch: str, stages: tuple[int, ...], side: int) -> None:
    body = linear(make_body(arch, norm="batch", returned_layers=stages, fast=False))
    summary = {stage.name: stage for stage in summarise(arch)}
    names = [name for name in summary if name not in ("stem", "classifier", "total")]
    declared = [summary[names[stage - 1]] for stage in stages]
    measured = [footprint(body, str(level), side) for level in range(len(stages))]
    assert measured == [stage.receptive_field for stage in declared]
    assert body.strides == [stage.stride for stage in declared]
    # A convolution that is dilated is seen by both ways of measuring, or the comparison could not fail.
    conv = next(m for m in body.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    conv.dilation, conv.padding = (2, 2), (2, 2)
    assert footprint(body, "0", side) > measured[0]


def test_summary_of_a_network_by_hand() -> None:
    stem, layer1, *_, classifier, total = summarise("resnet18", (64, 32))
    assert (stem.output, stem.num_blocks, stem.stride, stem.receptive_field) == ((64, 16, 8), 0, 4, 11)
    assert stem.num_parameters == 3 * 64 * 49 + 2 * 64
    assert stem.num_multiply_adds == 3 * 64 * 49 * 32 * 16
    assert (layer1.output, layer1.num_blocks) == ((64, 16, 8), 2)
    assert layer1.num_multiply_adds == 4 * 64 * 64 * 9 * 16 * 8
    assert layer1.receptive_field == 11 + 4 * 2 * 4
    assert classifier.num_parameters == 512 * 1000 + 1000
    assert (total.num_blocks, total.num_parameters) == (8, 11_689_512)
    lines = summary_table(summarise("resnet18")).splitlines()
    assert len(lines) == 1 + 7
    assert lines[-1].split() == ["total", "1000x1x1", "8", "11,689,512", "1,814,073,344", "435", "32"]
    assert len({len(line) for line in lines}) == 1


def test_image_that_is_too_small_is_named() -> None:
    with pytest.raises(UserError, match="vgg16 cannot take an image of 8x8 pixels"):
        summarise("vgg16", (8, 8))


@pytest.mark.parametrize("fast", [False, True])
def test_responses_are_those_of_every_3x3_layer_after_its_norm(fast: bool) -> None:
    """Of norms that were calibrated on these very images the deviation is the norm's scale."""
    torch.manual_seed(0)
    body = make_body("cifar20", norm="frozen", fast=fast).eval()
    batches = [torch.randn(2, 3, 16, 16), torch.randn(3, 3, 16, 16)]
    calibrate_norm(body, [torch.cat(batches)])
    body.layer2[1].bn1.weight.fill_(0.25)
    found = response_deviations(body, batches)
    names = [name for name, module in body.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(found) == names
    assert len(found) == 19
    deviations = torch.tensor(list(found.values()))
    expected = torch.ones(19)
    expected[names.index("layer2.1.conv1")] = 0.25
    # eps is added to variances of order 1, and the block's second layer sees a weaker input than it was calibrated on.
    changed = names.index("layer2.1.conv2")
    torch.testing.assert_close(deviations[:changed], expected[:changed], atol=1e-3, rtol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(deviations, torch.ones(19), atol=1e-3, rtol=0)
    assert not any(module._forward_hooks for module in body.modules())


def test_responses_of_bottlenecks_and_of_networks_without_norms() -> None:
    torch.manual_seed(0)
    images = [torch.randn(1, 3, 32, 32)]
    assert list(response_deviations(make_body("resnet50", norm="batch", returned_layers=(1,)).eval(), images)) == [
        f"layer1.{index}.conv2" for index in range(3)
    ]
    vgg = make_body("vgg16", returned_layers=(1,), fast=False).eval()
    found = response_deviations(vgg, images)
    seen: list[Tensor] = []
    vgg.features[2].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        vgg(images[0])
    assert found["features.2"] == pytest.approx(float(seen[0].std(correction=0)), rel=1e-5)
    with pytest.raises(UserError, match="no batch of images"):
        response_deviations(vgg, [])
