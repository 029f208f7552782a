"""Folding: the same outputs and gradients, and folded weights that follow every way a tensor can change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from resdet.errors import UserError
from resdet.models.bodies import make_body
from resdet.models.norm import FrozenBatchNorm2d, calibrate_norm, conv_norm, has_fresh_frozen_norm, norm_layer


class Pair(nn.Module):
    """A convolution and its frozen norm, folded or one after the other."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups, bias=False)
        self.norm = FrozenBatchNorm2d(16)
        for name, buffer in self.norm.named_buffers():
            buffer.copy_(torch.rand(16) + 0.5 if name in ("weight", "running_var") else torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x, self.conv, self.norm)

    def plain(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.fixture
def pair() -> Pair:
    torch.manual_seed(0)
    return Pair()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(1))


def assert_follows(pair: Pair, x: Tensor, tolerance: float = 1e-5) -> None:
    """Folded and plain differ by float32 rounding of sums of 72 products: some 1e-6 of values near 1."""
    with torch.no_grad():
        torch.testing.assert_close(pair(x), pair.plain(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 4])
def test_outputs_and_gradients_are_those_of_the_pair(groups: int) -> None:
    torch.manual_seed(0)
    pair = Pair(groups).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    folded = torch.autograd.grad(pair(x), (x, pair.conv.weight), upstream)
    plain = torch.autograd.grad(pair.plain(x), (x, pair.conv.weight), upstream)
    torch.testing.assert_close(pair(x), pair.plain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)
    pair.norm.running_var[3] *= 1.001
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.autograd.grad(pair(x), (x, pair.conv.weight), upstream), plain)


def test_norm_is_torchvisions(x: Tensor) -> None:
    ours, theirs = FrozenBatchNorm2d(8, eps=1e-3), torchvision.ops.FrozenBatchNorm2d(8, eps=1e-3)
    batch = nn.BatchNorm2d(8)
    batch(x)
    ours.load_state_dict(batch.state_dict())  # drops num_batches_tracked
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert torch.equal(ours(x), theirs(x))


def test_autocast_folds_in_float32_and_keeps_bfloat16(pair: Pair, x: Tensor) -> None:
    pair.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        out = pair(x)
    folded = pair.norm._kept[""].ready
    assert out.dtype == torch.bfloat16
    assert folded.weight.dtype == folded.bias.dtype == torch.bfloat16
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    scale = pair.norm.weight * (pair.norm.running_var + 1e-5).rsqrt()
    assert torch.equal(folded.weight, (pair.conv.weight * scale.view(-1, 1, 1, 1)).bfloat16())
    # bfloat16 has 8 bits; sums of 72 products of such numbers near 1 are off by a few times 2 ** -8.
    torch.testing.assert_close(out.float(), pair.plain(x), rtol=0.03, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        pair(x)
    assert pair.norm._kept[""].ready is folded, "the folded weight was not kept"


def double_in_place(pair: Pair) -> Pair:
    with torch.no_grad():
        pair.conv.weight.mul_(2)
    return pair


def write_statistics(pair: Pair) -> Pair:
    pair.norm.running_mean.add_(1)
    return pair


def average_in(pair: Pair) -> Pair:
    other = Pair()
    with torch.no_grad():
        torch._foreach_lerp_(list(pair.parameters()), list(other.parameters()), 0.5)
    return pair


def load(pair: Pair) -> Pair:
    pair.load_state_dict(Pair().state_dict())
    return pair


def load_assigning(pair: Pair) -> Pair:
    pair.load_state_dict(Pair().state_dict(), assign=True)
    return pair


def set_data(pair: Pair) -> Pair:
    pair.conv.weight.data = torch.randn_like(pair.conv.weight)
    return pair


def set_parameter(pair: Pair) -> Pair:
    pair.conv.weight = nn.Parameter(torch.randn_like(pair.conv.weight))
    return pair


def write_unseen_then_eval(pair: Pair) -> Pair:
    pair.conv.weight.data.mul_(3)
    return pair.eval()


def write_unseen_then_train(pair: Pair) -> Pair:
    pair.conv.weight.data.mul_(3)
    return pair.train()


def write_in_inference_mode(pair: Pair) -> Pair:
    with torch.inference_mode():
        pair.conv.weight.mul_(2)
    return pair


def to_double_and_back_changed(pair: Pair) -> Pair:
    pair.double()
    double_in_place(pair)
    return pair.float()


def deepcopied(pair: Pair) -> Pair:
    return double_in_place(copy.deepcopy(pair))


def pickled(pair: Pair) -> Pair:
    return double_in_place(pickle.loads(pickle.dumps(pair)))


def other_eps(pair: Pair) -> Pair:
    pair.norm.eps = 0.1
    return pair


@pytest.mark.parametrize(
    "change",
    [
        double_in_place,
        write_statistics,
        average_in,
        load,
        load_assigning,
        set_data,
        set_parameter,
        write_unseen_then_eval,
        write_unseen_then_train,
        write_in_inference_mode,
        to_double_and_back_changed,
        deepcopied,
        pickled,
        other_eps,
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_kept_weights_follow(pair: Pair, x: Tensor, change: Callable[[Pair], Pair], frozen: bool) -> None:
    pair.requires_grad_(not frozen).eval()
    assert_follows(pair, x)
    assert pair.norm._kept is not None
    with torch.no_grad():
        before = pair(x)
    pair = change(pair)
    assert_follows(pair, x)
    with torch.no_grad():
        assert not torch.allclose(before, pair(x)), "the change must show, or following it proves nothing"


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=["loop", "foreach", "fused"]
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("training", [True, False])
def test_kept_weights_follow_optimizer_steps(
    pair: Pair, x: Tensor, optimizer: type[torch.optim.Optimizer], options: dict[str, bool], training: bool
) -> None:
    """Fused steps do not count up a tensor's version; nothing here relies on a change of mode."""
    pair.train(training)
    assert_follows(pair, x)
    optim = optimizer(pair.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    for _ in range(2):
        loss = pair(x).square().mean()
        assert_follows(pair, x)
        before = pair.conv.weight.detach().clone()
        loss.backward()
        optim.step()
        optim.zero_grad()
        assert not torch.equal(before, pair.conv.weight)
        assert_follows(pair, x)


def test_weight_at_the_address_of_a_freed_one_is_not_taken_for_it(pair: Pair, x: Tensor) -> None:
    pair.requires_grad_(False)
    for _ in range(20):
        assert_follows(pair, x)
        pair.conv.weight.data = torch.empty(0)
        pair.conv.weight.data = torch.randn(16, 8, 3, 3)


def test_weights_kept_at_inference_can_be_trained_through(pair: Pair, x: Tensor) -> None:
    pair.requires_grad_(False)
    with torch.inference_mode():
        pair(x)
    x.requires_grad_()
    pair(x).sum().backward()
    assert x.grad is not None


def test_inference_tensors_are_folded_every_time(x: Tensor) -> None:
    with torch.inference_mode():
        pair = Pair().eval()
        assert_follows(pair, x)
        pair.conv.weight.mul_(2)
        assert_follows(pair, x)


def test_functional_call_sees_its_own_weights(pair: Pair, x: Tensor) -> None:
    assert_follows(pair, x)
    doubled = {"conv.weight": 2 * pair.conv.weight.detach()}
    with torch.no_grad():
        out = torch.func.functional_call(pair, doubled, (x,))
        assert not torch.allclose(out, pair(x))
    assert_follows(pair, x)

    def energy(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(pair, weights, (x,)).square().sum()

    slopes = torch.func.grad(energy)({"conv.weight": pair.conv.weight.detach()})
    (expected,) = torch.autograd.grad(pair.plain(x).square().sum(), pair.conv.weight)
    torch.testing.assert_close(slopes["conv.weight"], expected, rtol=1e-4, atol=1e-3)


def test_copies_do_not_carry_folded_weights(pair: Pair, x: Tensor) -> None:
    pair.requires_grad_(False)
    size = len(pickle.dumps(pair))
    assert_follows(pair, x)
    assert len(pickle.dumps(pair)) == size
    assert copy.deepcopy(pair).norm._kept is None


def test_weights_in_onednns_order_follow_the_size_of_the_input(pair: Pair, x: Tensor) -> None:
    pair.requires_grad_(False).eval()
    for size in ((9, 7), (20, 33), (9, 7), (1, 1)):
        assert_follows(pair, torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last))
        assert pair.norm._kept[""].ready.packed.of(torch.Size((2, 8, *size))).is_mkldnn
    with torch.no_grad():
        pair.conv.weight.mul_(2)
    assert_follows(pair, x)
    pair(x.requires_grad_()).sum().backward()  # nothing goes backward through such a weight
    (expected,) = torch.autograd.grad(pair.plain(x).sum(), x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    assert copy.deepcopy(pair).norm._kept is None
    assert pair.train().norm._kept is None


def test_hooks_on_convolution_and_norm_are_called(pair: Pair, x: Tensor) -> None:
    seen: list[Tensor] = []
    pair.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_follows(pair, x)
    torch.testing.assert_close(seen[0], pair.conv(x))


@pytest.mark.slow
def test_compiled_body_follows_writes() -> None:
    """A compiled graph holds the folding itself, not its result."""
    torch.manual_seed(0)
    body = make_body("resnet18", returned_layers=(1,)).eval()
    calibrate_norm(body, [torch.randn(2, 3, 64, 64)])
    images = torch.randn(1, 3, 32, 32)
    compiled = torch.compile(body, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), body(images), rtol=1e-5, atol=1e-5)
        body.layer1[0].conv1.weight.mul_(2)
        torch.testing.assert_close(compiled(images), body(images), rtol=1e-5, atol=1e-5)


def test_exported_body_holds_the_folding() -> None:
    torch.manual_seed(0)
    body = make_body("resnet18", returned_layers=(1,)).eval()
    images = torch.randn(1, 3, 32, 32)
    program = torch.export.export(body, (images,))
    torch.testing.assert_close(program.module()(images)["0"], body(images)["0"], rtol=1e-5, atol=1e-5)


def test_norms_by_name() -> None:
    assert isinstance(norm_layer("batch", 1e-3)(32), nn.BatchNorm2d)
    assert norm_layer("frozen", 1e-3)(32).eps == norm_layer("group", 1e-3)(32).eps == 1e-3
    with pytest.raises(UserError, match="norm must be one of frozen, batch, group, got 'layer'"):
        norm_layer("layer")


@pytest.mark.parametrize("fast", [True, False])
def test_calibrated_activations_are_normalised(fast: bool) -> None:
    torch.manual_seed(0)
    body = make_body("resnet18", fast=fast)
    images = torch.randn(4, 3, 96, 96)
    assert calibrate_norm(body, [images]) == 20
    outputs: list[Tensor] = []
    norms = [m for m in body.modules() if isinstance(m, FrozenBatchNorm2d)]
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: outputs.append(output.clone()))
    with torch.no_grad():
        body(images)
    assert len(outputs) == 20
    for output in outputs:
        variance, mean = torch.var_mean(output, dim=(0, 2, 3), correction=0)
        # One batch: exact up to float32 rounding through 20 layers and eps beside the variance.
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-3)
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-3)


def test_calibration_pools_batches_and_is_deterministic() -> None:
    torch.manual_seed(0)
    body = make_body("resnet18", returned_layers=(1,)).eval()
    twin = copy.deepcopy(body)
    batches = [torch.randn(2, 3, 64, 64), 2 * torch.randn(3, 3, 64, 32) + 1]
    calibrate_norm(body, batches)
    calibrate_norm(twin, iter(batches))
    assert all(torch.equal(a, b) for a, b in zip(body.buffers(), twin.buffers(), strict=True))
    assert not body.training
    assert not any(m._forward_hooks for m in body.modules())
    with torch.no_grad():
        pixels = torch.cat([body.conv1(b).transpose(0, 1).flatten(1) for b in batches], dim=1)  # [64, B * H * W]
    torch.testing.assert_close(body.bn1.running_mean, pixels.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(body.bn1.running_var, pixels.var(1, correction=0), rtol=1e-4, atol=1e-5)


def test_calibration_needs_norms_and_batches() -> None:
    with pytest.raises(UserError, match="no frozen norm"):
        calibrate_norm(nn.Conv2d(3, 8, 1), [torch.zeros(1, 3, 8, 8)])
    body = make_body("resnet18", returned_layers=(1,))
    with pytest.raises(UserError, match="no batch"):
        calibrate_norm(body, [])
    assert not any(m._forward_hooks for m in body.modules())


def test_fresh_frozen_norms_are_known_by_their_tensors() -> None:
    body = make_body("resnet18", returned_layers=(1,))
    state = copy.deepcopy(body.state_dict())
    assert has_fresh_frozen_norm(body)
    calibrate_norm(body, [torch.randn(1, 3, 32, 32)])
    assert not has_fresh_frozen_norm(body)
    body.load_state_dict(state)
    assert has_fresh_frozen_norm(body)
    # Fused into the convolutions, a norm leaves nothing but its bias.
    body.load_state_dict(state | {"bn1.bias": torch.full((64,), 0.1)})
    assert not has_fresh_frozen_norm(body)
    assert not has_fresh_frozen_norm(make_body("resnet18", norm="batch", returned_layers=(1,)))
    assert has_fresh_frozen_norm(torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d))
