"""Modules that keep weights in the forms that inference reads compute what their plain bases do, and follow writes."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from resdet.models.backbone import FastFeaturePyramid
from resdet.models.box_heads import FastBoxHead
from resdet.models.proposals import FastProposalHead, ProposalHead
from resdet.models.ready_weights import KeepsReadyWeights

# float32 sums of a few hundred products near 1, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def channels_last(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def pyramid(sizes: list[tuple[int, int]]) -> tuple[nn.Module, Callable[[nn.Module], list[Tensor]], type[nn.Module]]:
    features = OrderedDict((str(index), channels_last(2, 8 << index, *size)) for index, size in enumerate(sizes))
    module = FastFeaturePyramid([8 << index for index in range(len(sizes))], 16, extra_blocks=LastLevelMaxPool())
    return module, lambda module: list(module(features).values()), FeaturePyramidNetwork


def proposal_head() -> tuple[nn.Module, Callable[[nn.Module], list[Tensor]], type[nn.Module]]:
    levels = [channels_last(2, 16, 9, 7), channels_last(2, 16, 5, 4)]
    module = FastProposalHead(16, 3)
    nn.init.normal_(module.cls_logits.bias)
    return module, lambda module: [out for outputs in module(levels) for out in outputs], ProposalHead


def box_head() -> tuple[nn.Module, Callable[[nn.Module], list[Tensor]], type[nn.Module]]:
    pooled = torch.randn(11, 4, 7, 7)
    return FastBoxHead(4 * 49, 32), lambda module: [module(pooled)], TwoMLPHead


MODULES = {
    "pyramid, levels double": lambda: pyramid([(20, 16), (10, 8), (5, 4)]),
    "pyramid, levels rounded up": lambda: pyramid([(19, 15), (10, 8), (5, 4)]),
    "proposal head": proposal_head,
    "box head": box_head,
}


@pytest.fixture(params=MODULES)
def built(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    return MODULES[request.param]()


def plain(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """Return a copy that computes as the base class does."""
    copied = copy.deepcopy(module)
    copied.__class__ = base
    return copied


def test_values_are_the_plain_modules_and_follow_writes(built) -> None:
    module, run, base = built
    assert isinstance(module.eval(), KeepsReadyWeights)
    with torch.no_grad():
        for _ in range(2):
            for one, other in zip(run(module), run(plain(module, base)), strict=True):
                torch.testing.assert_close(one, other, **CLOSE)
        before = [out.clone() for out in run(module)]
        for parameter in module.parameters():
            parameter.mul_(1.5)
        after = run(module)
        assert not any(torch.allclose(one, other, **CLOSE) for one, other in zip(before, after, strict=True))
        for one, other in zip(after, run(plain(module, base)), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_nothing_kept_is_copied_or_outlives_a_change_of_mode(built) -> None:
    module, run, _ = built
    size = len(pickle.dumps(module.eval()))
    with torch.no_grad():
        run(module)
    assert module._kept
    assert len(pickle.dumps(module)) == size
    assert copy.deepcopy(module)._kept is None
    with torch.no_grad():
        parameter = next(module.parameters())
        parameter.data.mul_(2)  # which no version tells of
        run(module.eval())
    assert module._kept
    assert module.double()._kept is None


def test_gradients_are_the_plain_modules(built) -> None:
    module, run, base = built
    gradients = []
    for one in (module, plain(module, base)):
        outputs = run(one)
        gradients.append(torch.autograd.grad(sum(out.square().sum() for out in outputs), list(one.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert not module._kept, "a weight that is trained may be written to without a trace"
    with torch.no_grad():
        run(module)
    assert not module._kept


def test_autocast_keeps_weights_of_its_own_type(built) -> None:
    module, run, base = built
    module.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs, expected = run(module), run(plain(module, base))
    for one, other in zip(outputs, expected, strict=True):
        assert one.dtype == other.dtype
        # 8 bits, rounded once or twice more on the way.
        assert float((one.float() - other.float()).norm() / other.float().norm()) < 2e-2
    assert {kept.ready.bias.dtype for kept in module._kept.values()} == {torch.bfloat16}


def test_weights_in_training_are_not_kept_even_where_nothing_is_recorded(built) -> None:
    """The RPN's head runs so in training, and fused optimizers write without counting up a version."""
    module, run, base = built
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            for one, other in zip(run(module), run(plain(module, base)), strict=True):
                torch.testing.assert_close(one, other, **CLOSE)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def test_what_a_hook_on_a_lateral_convolution_was_given_stays_as_it_was() -> None:
    torch.manual_seed(0)
    module, run, _ = pyramid([(20, 16), (10, 8)])
    kept: list[Tensor] = []
    copies: list[Tensor] = []
    module.inner_blocks[0][0].register_forward_hook(
        lambda _module, _inputs, output: (kept.append(output), copies.append(output.clone()))[:0] or None
    )
    with torch.no_grad():
        run(module.eval())
    assert torch.equal(kept[0], copies[0])
