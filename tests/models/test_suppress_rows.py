"""Suppression in tensors of fixed shapes: the operator and its implementations."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torchvision.ops import batched_nms, nms

from resdet.models.suppression import suppress_rows


def random_rows(num_rows: int, size: int, num_groups: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes in clusters, so that many overlap, of which every fifth is unused."""
    generator = torch.Generator().manual_seed(seed)
    centers = 400 * torch.rand(num_rows, size // 8 + 1, 1, 2, generator=generator)
    corners = (centers + 30 * torch.rand(num_rows, size // 8 + 1, 8, 2, generator=generator)).flatten(1, 2)
    corners = corners[:, torch.randperm(corners.shape[1], generator=generator)[:size]]
    sizes = 20 + 40 * torch.rand(num_rows, size, 2, generator=generator)
    used = torch.rand(num_rows, size, generator=generator) > 0.2
    groups = torch.randint(num_groups, (num_rows, size), generator=generator) * 3 - 1
    return torch.cat([corners, corners + sizes], dim=2), used, groups


def by_torchvision(boxes: Tensor, used: Tensor, iou_threshold: float, groups: Tensor | None = None) -> Tensor:
    """Suppress by torchvision's operator for each group of each row, with scores that fall."""
    kept = torch.zeros_like(used)
    groups = torch.zeros_like(used, dtype=torch.int64) if groups is None else groups
    for row in range(len(boxes)):
        for group in groups[row].unique():
            members = torch.where(used[row] & (groups[row] == group))[0]
            kept[row, members[nms(boxes[row, members], -members.to(boxes.dtype), iou_threshold)]] = True
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_rows", "size", "num_groups"), [(3, 700, 1), (2, 700, 7), (2, 200, 40), (1, 1, 1)])
def test_each_group_of_each_row_is_torchvisions_suppression(num_rows, size, num_groups, dtype):
    for iou_threshold in (0.0, 0.5, 0.7, float("inf")):
        boxes, used, groups = random_rows(num_rows, size, num_groups)
        boxes = boxes.to(dtype)
        kept = suppress_rows(boxes, used, iou_threshold, groups)
        assert torch.equal(kept, by_torchvision(boxes, used, iou_threshold, groups))
        if iou_threshold in (0.0, float("inf")):
            assert torch.equal(kept, used) == (iou_threshold > 0 or size == 1)
        if num_groups == 1:
            assert torch.equal(suppress_rows(boxes, used, iou_threshold), kept)


@pytest.mark.parametrize("changed", ["box", "used", "group", "threshold"])
def test_the_comparison_notices_one_other_value(changed):
    boxes, used, groups = random_rows(2, 64, 2)
    boxes[0, 1], used[0, :2], groups[0, :2] = boxes[0, 0], True, -1
    expected = by_torchvision(boxes, used, 0.5, groups)
    assert torch.equal(suppress_rows(boxes, used, 0.5, groups), expected)
    assert not expected[0, 1], "the second box is the first"
    if changed == "box":
        boxes[0, 1] += 1000
    elif changed == "used":
        used[0, 0] = False
    elif changed == "group":
        groups[0, 1] = 100
    assert not torch.equal(suppress_rows(boxes, used, 0.5 if changed != "threshold" else 1.0, groups), expected)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.integers(0, 40), iou_threshold=st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_rows_are_torchvisions_groups(data, size, iou_threshold):
    """Corners are small whole numbers, so that the offsets that torchvision adds change nothing."""
    numbers = st.lists(st.integers(0, 8), min_size=2 * 4 * size, max_size=2 * 4 * size)
    sides = torch.tensor(data.draw(numbers), dtype=torch.float32).view(2, size, 4)
    boxes = torch.cat([sides[..., :2], sides[..., :2] + sides[..., 2:]], dim=2)
    flags = st.lists(st.booleans(), min_size=2 * size, max_size=2 * size)
    used = torch.tensor(data.draw(flags), dtype=torch.bool).view(2, size)
    labels = st.lists(st.integers(-2, 3), min_size=2 * size, max_size=2 * size)
    groups = torch.tensor(data.draw(labels), dtype=torch.int64).view(2, size)
    kept = suppress_rows(boxes, used, iou_threshold, groups)
    both = groups + torch.tensor([[2], [8]])  # the groups of the second row are others
    places = used.flatten().nonzero()[:, 0]
    scores = -places.float()
    left = batched_nms(boxes.view(-1, 4)[places], scores, both.flatten()[places], iou_threshold)
    assert torch.equal(kept.flatten().nonzero()[:, 0], places[left].sort()[0])


def test_nothing_to_suppress():
    for shape in ((0, 5), (3, 0), (0, 0), (2, 5)):
        boxes, used = torch.zeros(*shape, 4), torch.zeros(shape, dtype=torch.bool)
        kept = suppress_rows(boxes, used, 0.5)
        assert kept.dtype == torch.bool
        assert kept.shape == shape
        assert not kept.any()
    # A box without extent has an IoU of nothing with its like, which is above no threshold.
    assert suppress_rows(torch.full((1, 3, 4), 7.0), torch.ones(1, 3, dtype=torch.bool), 0.0).all()


def test_the_result_is_no_view_and_needs_no_contiguous_input():
    boxes, used, groups = random_rows(4, 100, 3)
    expected = by_torchvision(boxes, used, 0.5, groups)
    turned = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in (boxes, used, groups)]
    assert not any(part.is_contiguous() for part in turned)
    assert torch.equal(suppress_rows(turned[0], turned[1], 0.5, turned[2]), expected)
    before = used.clone()
    suppress_rows(boxes.requires_grad_(), used, float("inf")).zero_()
    assert torch.equal(used, before)


def test_one_operator_to_torch_and_its_compilers():
    boxes, used, groups = random_rows(2, 50, 3)
    expected = suppress_rows(boxes, used, 0.5, groups)
    checks = torch.library.opcheck(torch.ops.resdet.suppress_rows.default, (boxes, used, 0.5, groups))
    assert set(checks.values()) == {"SUCCESS"}
    with torch.device("meta"):
        kept = suppress_rows(torch.empty(2, 50, 4), torch.empty(2, 50, dtype=torch.bool), 0.5)
    assert (kept.shape, kept.dtype, kept.device.type) == ((2, 50), torch.bool, "meta")

    def double(boxes: Tensor, used: Tensor, groups: Tensor) -> Tensor:
        return suppress_rows(boxes * 2, used, 0.5, groups)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(boxes, used, groups), expected)  # times 2 rounds nothing

    class Rows(torch.nn.Module):
        def forward(self, boxes: Tensor, used: Tensor) -> Tensor:
            return suppress_rows(boxes, used, 0.5)

    size = torch.export.Dim("size", min=2)
    program = torch.export.export(Rows(), (boxes, used), dynamic_shapes=({1: size}, {1: size}))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.resdet.suppress_rows.default) == 1
    boxes, used, _ = random_rows(2, 70)
    assert torch.equal(program.module()(boxes, used), suppress_rows(boxes, used, 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(5, 4), torch.zeros(5) > 0), r"\[R, N, 4\], got float32 \[5, 4\]"),
        ((torch.zeros(1, 5, 5), torch.zeros(1, 5) > 0), r"got float32 \[1, 5, 5\]"),
        ((torch.zeros(1, 5, 4).half(), torch.zeros(1, 5) > 0), "float32 or float64.*got float16"),
        ((torch.zeros(1, 5, 4), torch.zeros(1, 5)), r"used must be bool of the boxes' shape \[1, 5\], got float32"),
        ((torch.zeros(1, 5, 4), torch.zeros(1, 6) > 0), r"used .*got bool \[1, 6\]"),
        ((torch.zeros(1, 5, 4), torch.zeros(1, 5) > 0, 0.5, torch.zeros(1, 5)), "groups must be int64.*got float32"),
        ((torch.zeros(1, 5, 4), torch.zeros(1, 5) > 0, 0.5, torch.zeros(5).long()), r"groups .*got int64 \[5\]"),
    ],
)
def test_other_shapes_and_types_are_refused(arguments, message):
    boxes, used, *rest = arguments
    with pytest.raises(ValueError, match=message):
        suppress_rows(boxes, used, *(rest or [0.5]))
