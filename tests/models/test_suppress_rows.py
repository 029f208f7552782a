"""Suppression in tensors of fixed shapes: the operator and its implementations."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torchvision.ops import batched_nms, nms
from triton_alone import COMPILE_ONLY, needs_triton, run_code

from resdet.models import suppression
from resdet.models.kernels import kernels_run
from resdet.models.suppression import suppress_rows

# A case's arguments are those of suppress_rows.
INTERPRET = """
import sys, torch
from resdet.models import suppression_kernels
suppression_kernels._LARGEST_TILE = int(sys.argv[3])
cases = torch.load(sys.argv[1])
torch.save([suppression_kernels.suppress_on_cuda(*case) for case in cases], sys.argv[2])
"""

COMPILE = """
from resdet.models.suppression_kernels import suppress_on_cuda

programs = []

def compile_only(kernel, *args, warmup, **settings):
    compiled = launch(kernel, *args, warmup=True, **settings)
    fused = None
    if kernel.__name__ == "compare_kernel" and not programs:
        fused = launch(kernel, *args, warmup=True, **{**settings, "enable_fp_fusion": True}).asm["ptx"]
    programs.append((kernel.__name__, compiled.asm["ptx"], len(compiled.asm["cubin"]), fused))

JITFunction.run = compile_only
for Driver.capability in map(int, sys.argv[2].split(",")):
    for size in map(int, sys.argv[3].split(",")):
        groups = torch.zeros(2, size, dtype=torch.int64)
        for arguments in ((0.5, groups), (float("inf"), None)):
            suppress_on_cuda(torch.zeros(2, size, 4), torch.ones(2, size, dtype=torch.bool), *arguments)
torch.save(programs, sys.argv[1])
"""


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


def degenerate_rows(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of one box many times, of boxes without extent, of whole numbers with many equal IoUs, of unused boxes."""
    generator = torch.Generator().manual_seed(size)
    same = torch.tensor([3.0, 4, 9, 11]).expand(size, 4)
    points = torch.randint(3, (size, 2), generator=generator).float().repeat(1, 2)
    corners = torch.randint(6, (size, 2), generator=generator).float()
    ties = torch.cat([corners, corners + torch.randint(1, 5, (size, 2), generator=generator)], dim=1)
    boxes = torch.stack([same, points, ties, ties])
    used = torch.ones(4, size, dtype=torch.bool)
    used[3] = False
    return boxes, used, torch.randint(2, (4, size), generator=generator)


def kernel_cases(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor, float, Tensor | None]]:
    cases = []
    for size in sizes:
        for boxes, used, groups in (random_rows(2, size, 3, seed=size), degenerate_rows(size)):
            thresholds = (0.0, 0.25, 0.5, 0.7, float("inf")) if size in (33, 64) else (0.7,)
            cases += [(boxes, used, threshold, None) for threshold in thresholds]
            cases += [(boxes, used, 0.5, groups)]
    chain = torch.arange(100.0)[:, None] * torch.tensor([3.0, 0, 3, 0]) + torch.tensor([0.0, 0, 9, 9])
    cases += [(chain[None], torch.ones(1, 100, dtype=torch.bool), 0.4, None)]  # each suppresses the next alone
    return cases


def interpreted(
    cases: list[tuple[Tensor, Tensor, float, Tensor | None]], largest_tile: int, folder: Path
) -> list[Tensor]:
    """Run the kernels in Triton's interpreter, with numpy on a CPU."""
    torch.save(cases, folder / "cases.pt")
    files = str(folder / "cases.pt"), str(folder / "kept.pt")
    run_code(INTERPRET, *files, str(largest_tile), TRITON_INTERPRET="1")
    results: list[Tensor] = torch.load(folder / "kept.pt")
    return results


@needs_triton
@pytest.mark.parametrize(
    ("sizes", "largest_tile"),
    [
        ((1, 31, 33, 70), 16384),
        pytest.param((32, 64, 65, 257, 520), 16384, marks=pytest.mark.slow),
        pytest.param((1, 70, 257), 16, marks=pytest.mark.slow),  # as rows of more than 16,384 boxes are gone through
    ],
)
def test_the_kernels_as_interpreted_are_torchvisions_suppression(sizes, largest_tile, tmp_path):
    cases = kernel_cases(sizes)
    # The same with one box moved, one box not used and one group changed: the twins.
    boxes, used, groups = random_rows(1, 70, 2)
    boxes[0, 40], used[0, :41], groups[0, :41] = boxes[0, 0], True, 1
    twins = [(boxes.clone(), used.clone(), 0.9, groups.clone()) for _ in range(4)]
    twins[1][0][0, 0] += 1000
    twins[2][1][0, 0] = False
    twins[3][3][0, 40] = 0
    results = interpreted(cases + twins, largest_tile, tmp_path)
    for (boxes, used, *arguments), kept in zip(cases, results, strict=False):
        assert kept.dtype == torch.bool
        assert torch.equal(kept, by_torchvision(boxes, used, *arguments)), (tuple(used.shape), arguments)
    assert any(0 < kept.sum() < case[1].sum() for case, kept in zip(cases, results, strict=False))
    expected = by_torchvision(*twins[0])
    assert [torch.equal(kept, expected) for kept in results[len(cases) :]] == [True, False, False, False]


@needs_triton
def test_thresholds_are_compared_as_in_float64():
    """An IoU of 3/10 is above 0.3 when both are rounded to their types, as torchvision has it on a CPU."""
    from resdet.models.suppression_kernels import rounded_down

    for value in (0.0, 0.1, 0.3, 0.5, 0.7, 1.0):
        as_float32 = torch.tensor(value, dtype=torch.float32)
        assert (as_float32 > rounded_down(value)) == (as_float32.double() > value)
        above = torch.nextafter(as_float32, torch.tensor(2.0))
        assert above > rounded_down(value)
    assert torch.tensor(0.3).item() > 0.3, "to the nearest would not do"
    assert rounded_down(float("inf")) == float("inf")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("capabilities", "sizes"), [("90", "2000"), ("80,90", "1,33,1000,4096,40000")])
def test_the_kernels_compile_and_round_each_operation(capabilities, sizes, tmp_path):
    path = tmp_path / "programs.pt"
    run_code(COMPILE_ONLY + COMPILE, str(path), capabilities, sizes, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    programs = torch.load(path)
    calls = 2 * len(capabilities.split(",")) * len(sizes.split(","))
    assert [name for name, *_ in programs] == ["compare_kernel", "keep_kernel"] * calls
    for name, ptx, binary_size, _ in programs:
        assert binary_size > 1000
        if name == "compare_kernel":
            assert "div.rn." in ptx
            assert "fma.rn." not in ptx
    assert "fma.rn." in programs[0][-1], "without the setting, additions are fused with multiplications"


def test_a_device_whose_kernels_do_not_run_waits_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kernels_run.cache_clear()
    boxes, used, groups = random_rows(2, 50, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            kept = suppression._suppress_by_kernels(boxes, used, 0.5, groups)
            assert torch.equal(kept, by_torchvision(boxes, used, 0.5, groups))
    kernels_run.cache_clear()
    assert [record.message for record in caplog.records] == [
        "cpu is slower than it could be, and waited for in each suppression of boxes: kernels cannot be compiled "
        "(triton is not installed)"
    ]


@needs_triton
def test_a_compiler_that_fails_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        assert not kernels_run(torch.device("cpu"))  # no device that Triton compiles for
    kernels_run.cache_clear()
    assert "kernels cannot be compiled (ValueError: " in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_keeps_what_a_cpu_keeps_and_is_not_waited_for():
    cases = [*kernel_cases((1, 31, 32, 33, 70, 2000, 4100)), (*random_rows(80, 2000)[:2], 0.7, None)]
    on_device = [[part.cuda() if isinstance(part, Tensor) else part for part in case] for case in cases]
    first = suppress_rows(*on_device[0])  # compiles, and asks whether kernels run
    assert kernels_run(first.device), "the kernels do not run here"
    results = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [suppress_rows(*case) for case in on_device]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for case, kept in zip(cases, results, strict=True):
        assert torch.equal(kept.cpu(), suppress_rows(*case))
    boxes, used, iou_threshold, _ = on_device[-1]
    moved = boxes.clone()
    moved[0, 0] += 10000
    assert not torch.equal(suppress_rows(moved, used, 0.0), suppress_rows(boxes, used, 0.0))
    double = suppress_rows(boxes[:2].double(), used[:2], iou_threshold)  # waits
    assert torch.equal(double.cpu(), suppress_rows(boxes[:2].double().cpu(), used[:2].cpu(), iou_threshold))
