"""The pretend GPU itself: CUDA's rules about devices, and exact counts of small cases."""

from __future__ import annotations

import copy
import io
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from benchmarks import pretend_record
from benchmarks.pretend_gpu import DEVICE, Copy, PretendTensor, Record, pretend_gpu, to_pretend
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

DIFFERENT_DEVICES = "at least two devices"


def on_device(*shape: int) -> Tensor:
    return torch.arange(float(np.prod(shape))).view(*shape).to(DEVICE)


# What CUDA allows, and the like of it that it refuses.
RULES: dict[str, tuple[Callable[[], object], Callable[[], object], type[Exception], str]] = {
    "a number of the CPU in arithmetic": (
        lambda: on_device(2, 3) + torch.tensor(1.0),
        lambda: on_device(2, 3) + torch.ones(3),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "where": (
        lambda: torch.where(on_device(3) > 1, on_device(3), torch.tensor(0.0)),
        lambda: torch.where(torch.ones(3) > 1, on_device(3), 0.0),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "numbers of the CPU joined": (
        lambda: torch.stack([on_device(3)[0], on_device(3)[1]]),
        lambda: torch.stack([on_device(3)[0], torch.tensor(1.0)]),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "a matrix product": (
        lambda: on_device(2, 3) @ on_device(3, 2),
        lambda: on_device(2, 3) @ torch.ones(3, 2),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "a convolution's weight": (
        lambda: F.conv2d(on_device(1, 1, 3, 3), on_device(1, 1, 3, 3)),
        lambda: F.conv2d(on_device(1, 1, 3, 3), torch.ones(1, 1, 3, 3)),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "indices of the CPU": (
        lambda: on_device(2, 3)[torch.tensor([0])],
        lambda: torch.ones(2, 3)[on_device(1).long()],
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "indices of the CPU in gather": (
        lambda: on_device(3).gather(0, on_device(1).long()),
        lambda: on_device(3).gather(0, torch.tensor([0])),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "in place": (
        lambda: on_device(3).add_(torch.tensor(1.0)),
        lambda: torch.tensor(1.0).add_(on_device(3)[0]),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "out": (
        lambda: torch.mul(on_device(3), 2, out=on_device(3)),
        lambda: torch.mul(on_device(3), 2, out=torch.ones(3)),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "a list of tensors": (
        lambda: torch._foreach_add([on_device(3), on_device(2)], 1),
        lambda: torch._foreach_add([on_device(3), on_device(2)], [torch.ones(3), torch.ones(2)]),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "suppression": (
        lambda: torchvision.ops.nms(on_device(2, 4), on_device(2), 0.5),
        lambda: torchvision.ops.nms(on_device(2, 4), torch.ones(2), 0.5),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
    "numpy": (lambda: on_device(3).cpu().numpy(), lambda: on_device(3).numpy(), TypeError, "to numpy"),
    "numpy.asarray": (lambda: np.asarray(torch.ones(3)), lambda: np.asarray(on_device(3)), TypeError, "to numpy"),
    "dlpack": (
        lambda: np.from_dlpack(torch.ones(3)),
        lambda: np.from_dlpack(on_device(3)),
        BufferError,
        "cannot be shared",
    ),
    "a generator": (
        lambda: torch.rand(3, device=DEVICE, generator=torch.Generator(DEVICE)),
        lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
        RuntimeError,
        "generator must be on pgpu:0",
    ),
    "pinned memory": (
        lambda: torch.ones(3).pin_memory(),
        lambda: on_device(3).pin_memory(),
        RuntimeError,
        "only dense CPU",
    ),
    "a module": (
        lambda: to_pretend(nn.Linear(3, 2))(on_device(2, 3)),
        lambda: to_pretend(nn.Linear(3, 2))(torch.ones(2, 3)),
        RuntimeError,
        DIFFERENT_DEVICES,
    ),
}


@pytest.mark.usefixtures("device_record")
@pytest.mark.parametrize("rule", RULES)
def test_devices_mix_where_cuda_lets_them_and_nowhere_else(rule: str) -> None:
    allowed, refused, error, message = RULES[rule]
    allowed()
    with pytest.raises(error, match=message):
        refused()


# What the host waits for in each, and how many kernels it launches.
WAITS: dict[str, tuple[Callable[[Tensor], object], dict[str, int], int]] = {
    "item": (lambda x: x[0, 0].item(), {"item": 1}, 0),
    "a truth value": (lambda x: bool(x[0, 0] > 0), {"item": 1}, 1),
    "tolist": (lambda x: x.tolist(), {"copy to the host": 1}, 0),
    "cpu": (lambda x: x.cpu(), {"copy to the host": 1}, 0),
    "cpu without waiting": (lambda x: x.to("cpu", non_blocking=True), {}, 0),
    "into the CPU's memory": (lambda x: torch.ones(2, 3).copy_(x), {"copy to the host": 1}, 0),
    "into pinned memory": (lambda x: torch.ones(2, 3).pin_memory().copy_(x, non_blocking=True), {}, 0),
    "nonzero": (lambda x: x.nonzero(), {"nonzero": 1}, 1),
    "where": (lambda x: torch.where(x > 0), {"nonzero": 1}, 2),
    "a mask": (lambda x: x[x > 2], {"mask as an index": 1}, 2),
    "an assignment by a mask": (lambda x: x.__setitem__(x > 2, 0), {}, 2),
    "of a tensor": (lambda x: x.__setitem__(x > 2, x[0, 0]), {"mask as an index": 1}, 2),
    "of a number to an element": (lambda x: x.__setitem__((0, 0), 5), {"copy to the device": 1}, 1),
    "of a number to a row": (lambda x: x.__setitem__(0, 5), {}, 1),
    "where with a number": (lambda x: torch.where(x > 2, x, 0), {}, 3),
    "where with a number of the CPU": (
        lambda x: torch.where(x > 2, x, torch.tensor(0.0)),
        {"copy to the device": 1},
        2,
    ),
    "indices of the CPU": (lambda x: x[torch.tensor([0, 1])], {"copy to the device": 1}, 1),
    "indices of the device": (lambda x: x[(x[0] * 0).long()], {}, 3),
    "a slice": (lambda x: x[1:, 2], {}, 0),
    "unique": (lambda x: x.unique(), {"unique": 1}, 1),
    "masked_select": (lambda x: x.masked_select(x > 2), {"masked_select": 1}, 2),
    "bincount": (lambda x: x[0].long().bincount(), {"bincount": 1}, 2),
    "equal": (lambda x: torch.equal(x, x), {"equal": 1}, 1),
    "suppression": (lambda x: torchvision.ops.nms(x.new_ones(2, 4), x[:, 0], 0.5), {"nms": 1}, 2),
    "torch.tensor": (lambda x: torch.tensor([1, 2], device=DEVICE), {"copy to the device": 1}, 0),
    "new_tensor": (lambda x: x.new_tensor([1, 2]), {"copy to the device": 1}, 0),
    "to the device": (lambda x: torch.ones(2).to(DEVICE), {"copy to the device": 1}, 0),
    "not pinned": (lambda x: torch.ones(2).to(DEVICE, non_blocking=True), {"copy to the device": 1}, 0),
    "pinned": (lambda x: torch.ones(2).pin_memory().to(DEVICE), {"copy to the device": 1}, 0),
    "pinned, without waiting": (lambda x: torch.ones(2).pin_memory().to(DEVICE, non_blocking=True), {}, 0),
    "a row of pinned memory": (lambda x: torch.ones(2, 2).pin_memory()[1].to(DEVICE, non_blocking=True), {}, 0),
    "full": (lambda x: torch.full((), 2.0, device=DEVICE), {}, 1),
    "arange": (lambda x: torch.arange(3, device=DEVICE), {}, 1),
    "empty": (lambda x: torch.empty(3, device=DEVICE), {}, 0),
    "random numbers": (lambda x: torch.rand(3, device=DEVICE), {}, 1),
    "nothing": (lambda x: x[:0] + 1, {}, 0),
    "repeat_interleave": (lambda x: x[0].repeat_interleave(x[0].long()), {"repeat_interleave": 1}, 3),
    "synchronize": (lambda x: torch.pgpu.synchronize(), {"synchronize": 1}, 0),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("case", WAITS)
@pytest.mark.parametrize("inference", [False, True])
def test_what_the_host_waits_for(case: str, inference: bool, device_record: Record) -> None:
    run, waits, num_kernels = WAITS[case]
    x = on_device(2, 3)
    device_record.clear()
    with torch.inference_mode(inference):
        run(x)
    found = Counter(what for what, _ in device_record.waits.elements())
    assert found == waits
    assert {line.rpartition(":")[0] for _, line in device_record.waits} <= {
        "tests/test_pretend_gpu.py",
        "torchvision/ops/boxes.py",
    }
    assert len(device_record.operators) == num_kernels, device_record.operators


# Bytes read and written and multiply-adds of the last operator; by hand, in float32: 4 bytes a number, indices 8.
TRAFFIC: dict[str, tuple[Callable[[Tensor], object], int, int, int]] = {
    "a sum of two": (lambda x: x + x.clone(), 48, 24, 0),
    "in place": (lambda x: x.add_(1), 24, 24, 0),
    "filled": (lambda x: x.fill_(1), 0, 24, 0),
    "copied": (lambda x: x.copy_(x.clone()), 24, 24, 0),
    "an expanded row": (lambda x: x[:1].expand(100, 3) * 1, 12, 1200, 0),
    "a broadcast": (lambda x: x[:, None] * x[None], 48, 48, 0),
    "into another": (lambda x: torch.mul(x, 2, out=torch.empty_like(x)), 24, 24, 0),
    "cast": (lambda x: x.bfloat16(), 24, 12, 0),
    "gathered": (lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)), 8 + 16, 8, 0),
    "a row of a large matrix": (
        lambda x: torch.empty(1000, 3, device=DEVICE).index_select(0, torch.zeros(1, dtype=torch.int64, device=DEVICE)),
        12 + 8,
        12,
        0,
    ),
    "a row written into a large matrix": (
        lambda x: torch.empty(1000, 3, device=DEVICE).index_put_(
            (torch.zeros(1, dtype=torch.int64, device=DEVICE),), x[:1]
        ),
        12 + 8 + 12,
        12,
        0,
    ),
    "a bag": (
        lambda x: F.embedding_bag(
            torch.zeros(2, dtype=torch.int64, device=DEVICE),
            torch.empty(1000, 3, device=DEVICE),
            torch.zeros(2, dtype=torch.int64, device=DEVICE),
            mode="sum",
        ),
        2 * 12 + 16 + 16,
        2 * 12,
        0,
    ),
    "a product": (lambda x: x @ x.T, 48, 16, 2 * 3 * 2),
    "products": (lambda x: torch.bmm(x[None].expand(5, 2, 3), x.T[None].expand(5, 3, 2)), 48, 80, 5 * 12),
    "with a bias": (lambda x: F.linear(x, x, x[:, 0]), 48 + 8, 16, 12),
    "lists": (lambda x: torch._foreach_add([x, x[0]], 1), 36, 36, 0),
    "lists in place": (lambda x: torch._foreach_mul_([x, x[0].clone()], 2), 36, 36, 0),
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_bytes_and_multiply_adds(case: str, device_record: Record) -> None:
    run, read, written, multiply_adds = TRAFFIC[case]
    run(on_device(2, 3))
    last = device_record.operators[-1]
    if case == "a bag":  # torch's operator also returns a few indices that only its backward reads
        assert last.written >= written
        last = last._replace(written=written)
    assert (last.read, last.written, last.multiply_adds) == (read, written, multiply_adds), last


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_and_its_backward(groups: int, device_record: Record) -> None:
    """By hand: 2 images of 5x5 pixels and 4 channels to 3x3 and 6, with a kernel of 3x3."""
    x, weight = torch.ones(2, 4, 5, 5).to(DEVICE), torch.ones(6, 4 // groups, 3, 3).to(DEVICE).requires_grad_()
    device_record.clear()
    out = F.conv2d(x.requires_grad_(), weight, groups=groups)
    out.backward(torch.ones(2, 6, 3, 3).to(DEVICE))
    forward, backward = (o for o in device_record.operators if "convolution" in o.name)
    products = 2 * 9 * 6 * 4 // groups * 9
    numbers = 2 * 4 * 25 + 6 * 4 // groups * 9  # of input and weight, and of their gradients
    assert forward[2:] == (4 * numbers, 4 * 2 * 6 * 9, products, torch.float32)
    assert backward[2:] == (4 * (numbers + 2 * 6 * 9), 4 * numbers, 2 * products, torch.float32)
    assert backward.line == "backward of ConvolutionBackward0"
    assert device_record.num_waits() == 1, "the gradient that was given was copied"


def test_custom_operators_launch_what_the_table_says(device_record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pretend_record.NUM_KERNELS, "aten.neg", 3)
    x = on_device(2, 3)
    device_record.clear()
    torch.neg(x)
    assert [(o.name, o.read, o.written) for o in device_record.operators] == [
        ("aten.neg.default", 24, 24),
        ("aten.neg.default", 0, 0),
        ("aten.neg.default", 0, 0),
    ]


def test_copies_are_noted_with_their_bytes(device_record: Record) -> None:
    x = torch.ones(2, 3).pin_memory().to(DEVICE, non_blocking=True)
    x.bfloat16().cpu()
    (there, back) = device_record.copies
    assert there == Copy(there.line, True, False, 24)
    assert back == Copy(back.line, False, True, 12)
    assert device_record.text().startswith("1 kernels, 1 waits, 2 copies\n1 x copy to the host at tests/")


@pytest.mark.usefixtures("device_record")
def test_writes_in_place_are_counted_and_addresses_known() -> None:
    """Kept weights are recognised by them; CUDA's foreach operators count up, its fused optimizers do not."""
    x = nn.Parameter(on_device(2, 3))
    row = x.detach()[0]
    address = x.data_ptr()
    for number, write in enumerate(
        (
            lambda: x.add_(1),
            lambda: row.mul_(2),
            lambda: torch._foreach_add_([x], 1),
            lambda: x.copy_(torch.ones(2, 3)),
            lambda: torch.mul(x, 2, out=x),
            lambda: x.__setitem__(0, 5),
        )
    ):
        with torch.no_grad():
            write()
        assert (x._version, x.data_ptr()) == (number + 1, address)
    x.grad = torch.ones_like(x)
    torch.optim.SGD([x], lr=1.0, fused=True).step()
    assert x._version == 6
    assert x.tolist() == [[4, 4, 4], [1, 1, 1]]
    with torch.inference_mode():
        made = x * 2
    with pytest.raises(RuntimeError, match="version"):
        _ = made._version


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_take_lists(optimizer: type[torch.optim.Optimizer], fused: bool, device_record: Record) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    model = to_pretend(copy.deepcopy(plain))
    images = torch.rand(2, 3, 6, 6)
    for part, x in ((plain, images), (model, images.to(DEVICE))):
        steps = optimizer(part.parameters(), lr=0.1, fused=fused or None)  # type: ignore[call-arg]
        for _ in range(2):
            steps.zero_grad()
            part(x).square().mean().backward()
            clip_grad_norm_(part.parameters(), 0.1)
            device_record.clear()
            steps.step()
    names = {operator.name for operator in device_record.operators}
    assert len(device_record.operators) <= 8, "one for each tensor"
    assert any("_fused" in name for name in names) == fused
    assert device_record.num_waits() == 0
    for mine, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.usefixtures("device_record")
def test_modules_move_and_are_copied_and_saved() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    weight = model[0].weight
    assert to_pretend(model)[0].weight is weight
    assert isinstance(weight, PretendTensor)
    assert isinstance(weight, nn.Parameter)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        weight.zero_()
    assert isinstance(copied[0].weight, nn.Parameter)
    assert copied[0].weight.device == DEVICE
    assert copied[0].weight.cpu().abs().sum() > 0
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    assert all(value.device.type == "cpu" for value in loaded.values())
    copied.load_state_dict(loaded)
    assert copied[0].weight.cpu().abs().sum() == 0
    assert model.to(torch.float64)[0].weight.dtype == torch.float64
    assert model.cpu()[0].weight.device.type == "cpu"


@pytest.mark.usefixtures("device_record")
def test_generators_draw_the_cpus_numbers() -> None:
    drawn = torch.rand(5, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3))
    assert torch.equal(drawn.cpu(), torch.rand(5, generator=torch.Generator().manual_seed(3)))
    assert torch.Generator(DEVICE).device == DEVICE
    assert torch.Generator().device.type == "cpu"
    assert isinstance(torch.Generator(), torch.Generator)


def test_other_threads_are_on_the_device_too(device_record: Record) -> None:
    thread = threading.Thread(target=lambda: torch.ones(3, device=DEVICE).sum().item())
    thread.start()
    thread.join()
    assert (len(device_record.operators), device_record.num_waits()) == (2, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_cudas_rules(dtype: torch.dtype, device_record: Record) -> None:
    conv, linear = to_pretend(nn.Conv2d(3, 4, 3)), to_pretend(nn.Linear(4, 2))
    x, labels = torch.rand(2, 3, 5, 5).to(DEVICE), torch.tensor([0, 1], device=DEVICE)
    assert not torch.is_autocast_enabled("pgpu")
    for inference in (False, True):
        with torch.autocast("pgpu", dtype), torch.inference_mode(inference):
            assert torch.is_autocast_enabled("pgpu")
            hidden = conv(x)
            out = linear(hidden.flatten(2).mean(2))
            assert (hidden.dtype, out.dtype) == (dtype, dtype)
            assert (hidden.transpose(2, 3) @ hidden).dtype == dtype
            assert (hidden + x[:, :1, :3, :3]).dtype == torch.float32, "arithmetic is left to promotion"
            for widened in (F.cross_entropy(out, labels), out.sum(), out.softmax(1), out.exp(), F.mse_loss(out, out)):
                assert widened.dtype == torch.float32
            assert torch.cat([out, out.float()]).dtype == torch.float32
            assert torch.cat([out, out]).dtype == dtype
            assert (x.double().flatten(1) @ x.double().flatten(1).T).dtype == torch.float64
            boxes = torch.tensor([[0.0, 0, 4, 4]]).to(DEVICE)
            assert torchvision.ops.roi_align(hidden, [boxes, boxes], 2).dtype == dtype
            assert torchvision.ops.nms(boxes.to(dtype), boxes[:, 0].to(dtype), 0.5).tolist() == [0]
    assert conv(x).dtype == torch.float32


def test_autocast_keeps_the_weights_that_it_cast(device_record: Record) -> None:
    linear, x = to_pretend(nn.Linear(4, 2)), torch.rand(2, 4).to(DEVICE)

    def casts() -> int:
        device_record.clear()
        linear(x).sum().backward()
        return sum(
            operator.name == "aten._to_copy.default" and "backward" not in operator.line
            for operator in device_record.operators
        )

    with torch.autocast("pgpu", torch.bfloat16):
        assert casts() == 3
    with torch.autocast("pgpu", torch.bfloat16):
        linear(x)
        assert casts() == 1, "weight and bias are cast again"
    with torch.autocast("pgpu", torch.bfloat16, cache_enabled=False):
        linear(x)
        assert casts() == 3
    with torch.autocast("pgpu", torch.bfloat16):
        before = linear(x)
    with torch.no_grad():
        linear.weight.mul_(2)
    with torch.autocast("pgpu", torch.bfloat16):
        assert not torch.equal(linear(x), before), "a weight outlived the block"


@pytest.mark.usefixtures("device_record")
def test_bfloat16_is_near_float32() -> None:
    """bfloat16 has 8 bits: its results differ, by less than a hundredth of the largest."""
    torch.manual_seed(0)
    conv, x = to_pretend(nn.Conv2d(8, 8, 3)), torch.rand(2, 8, 9, 9).to(DEVICE)
    exact = conv(x).cpu()
    with torch.autocast("pgpu", torch.bfloat16):
        rounded = conv(x).cpu().float()
    difference = (rounded - exact).abs().max() / exact.abs().max()
    assert 0 < difference < 0.01


@pytest.mark.slow
def test_torchvisions_detector_trains_bit_for_bit(device_record: Record) -> None:
    """The device's random numbers are the CPU's; what it waits for, torchvision's sources say."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model = FasterRCNN(backbone, 5, min_size=64, max_size=96, rpn_post_nms_top_n_train=100)
    images = [torch.rand(3, 60, 90), torch.rand(3, 70, 66)]
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 55]]), "labels": torch.tensor([1])} for _ in images]
    expected = torch.stack(train_once(model, images, targets))
    there = to_pretend(copy.deepcopy(model))
    batch = [image.to(DEVICE) for image in images]
    truth = [{name: value.to(DEVICE) for name, value in target.items()} for target in targets]
    device_record.clear()
    found = torch.stack(train_once(there, batch, truth))
    waits = Counter(what for what, _ in device_record.waits.elements())
    # Of each image: its size checked, objects and background of two samplers, proposals above a size and a score, ...
    assert waits["nonzero"] == 23
    assert waits["item"] == 2, "whether boxes have an extent"
    assert waits["nms"] == 2
    assert waits["copy to the device"] > 20, "sizes, means, anchors of a cell, numbers assigned to indices"
    assert not {"?"} & {operator.line for operator in device_record.operators}
    assert torch.equal(found.cpu(), expected)
    for mine, theirs in zip(there.parameters(), model.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad.cpu(), theirs.grad)
    with torch.no_grad():
        there.roi_heads.box_predictor.cls_score.bias[1] += 0.1
    assert not torch.equal(torch.stack(train_once(there, batch, truth)).cpu(), expected)
    there.rpn.head.cls_logits.bias = nn.Parameter(there.rpn.head.cls_logits.bias.detach().cpu())
    with pytest.raises(RuntimeError, match=DIFFERENT_DEVICES):
        train_once(there, batch, truth)


def train_once(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> list[Tensor]:
    torch.manual_seed(1)
    losses = list(model.train()(images, targets).values())
    torch.stack(losses).sum().backward()
    return [loss.detach() for loss in losses]


@pytest.mark.usefixtures("device_record")
def test_one_block_at_a_time() -> None:
    with pytest.raises(RuntimeError, match="one block at a time"), pretend_gpu():
        pass


def test_outside_a_block_torch_is_as_before() -> None:
    def changed() -> tuple[object, ...]:
        return torch.Generator, torch.Tensor.pin_memory, torch.Tensor.is_pinned, torch.clear_autocast_cache

    before = changed()
    with pretend_gpu() as record:
        assert torch.accelerator.is_available()
        assert not set(before) & set(changed())
    assert not torch.accelerator.is_available()
    assert changed() == before
    torch.ones(3, device=DEVICE).tolist()
    assert (record.operators, record.num_waits()) == ([], 0)
