"""Bias, sum and ReLU after a convolution: the operator, its kernel and its gradients."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_alone import COMPILE_ONLY, needs_triton, run_code

from resdet.models.epilogue import run_epilogue

Case = tuple[Tensor, Tensor | None, Tensor | None, bool]

INTERPRET = """
import sys, torch
from resdet.models.epilogue_kernels import run_epilogue_on_cuda
cases = torch.load(sys.argv[1])
for case in cases:
    run_epilogue_on_cuda(*case)
torch.save([case[0] for case in cases], sys.argv[2])
"""

COMPILE = """
from resdet.models.epilogue_kernels import run_epilogue_on_cuda
programs = []

def compile_only(kernel, *args, warmup, **settings):
    compiled = launch(kernel, *args, warmup=True, **settings)
    programs.append((compiled.asm["ptx"], len(compiled.asm["cubin"])))

JITFunction.run = compile_only
for Driver.capability in (80, 90):
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.zeros(2, 64, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
        run_epilogue_on_cuda(out, torch.zeros(64), out.clone(), True)
torch.save(programs, sys.argv[1])
"""


def make_case(channels: int, dtype: torch.dtype, parts: tuple[bool, bool, bool], side: int = 7) -> Case:
    has_bias, has_residual, relu = parts
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    out, residual = (
        draw(2, channels, side, side + 2).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    out[0, 0, 0, 0] = torch.nan
    return out, draw(channels) if has_bias else None, residual if has_residual else None, relu


def by_operations(out: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """Compute in float32 what is expected, and round it once."""
    result = out.float()
    if bias is not None:
        result = result + bias.reshape(-1, 1, 1)
    if residual is not None:
        result = result + residual.float()
    return (result.relu() if relu else result).to(out.dtype)


def same(one: Tensor, other: Tensor, tolerance: float = 0.0) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=0, equal_nan=True)


PARTS = [parts for parts in product((False, True), repeat=3) if any(parts)]


@needs_triton
def test_the_kernel_as_interpreted(tmp_path: Path) -> None:
    """In float32 and float16 to the bit; the interpreter cuts bfloat16 off where a device rounds it."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    cases = [make_case(channels, dtype, parts) for channels in (3, 64) for dtype in types for parts in PARTS]
    cases.append(make_case(96, torch.float32, (True, True, True), side=40))  # several programs
    changed = list(make_case(64, torch.float32, (True, True, True)))  # the twin
    changed[1][5] += 0.01  # type: ignore[index,call-overload]
    torch.save([*cases, changed], tmp_path / "cases.pt")
    run_code(INTERPRET, str(tmp_path / "cases.pt"), str(tmp_path / "results.pt"), TRITON_INTERPRET="1")
    *results, other = torch.load(tmp_path / "results.pt")
    for case, result in zip(cases, results, strict=True):
        assert same(result, by_operations(*case), 2**-7 if result.dtype == torch.bfloat16 else 0.0), case[1:]
        assert torch.isnan(result[0, 0, 0, 0]), "NaN vanished"
    assert not same(other, by_operations(*make_case(64, torch.float32, (True, True, True))))


@needs_triton
@pytest.mark.slow
def test_the_kernel_compiles_and_reads_sixteen_bytes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "programs.pt"
    run_code(COMPILE_ONLY + COMPILE, str(path), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    programs = torch.load(path)
    assert len(programs) == 4
    for ptx, binary_size in programs:
        assert binary_size > 1000
        assert "ld.global.v4" in ptx
        assert "st.global.v4" in ptx


@pytest.mark.parametrize("parts", PARTS)
def test_gradients(parts: tuple[bool, bool, bool]) -> None:
    _, bias, residual, relu = make_case(6, torch.float32, parts)
    x, weight = torch.randn(2, 3, 7, 9), torch.randn(6, 3, 1, 1)
    given = [x, weight, *(part for part in (bias, residual) if part is not None)]
    gradients = []
    for ours in (True, False):
        leaves = [part.detach().clone().requires_grad_() for part in given]
        rest = iter(leaves[2:])
        own_bias = None if bias is None else next(rest)
        own_residual = None if residual is None else next(rest)
        out = F.conv2d(leaves[0], leaves[1])
        if ours:
            out = run_epilogue(out, own_bias, own_residual, relu)
        else:
            out = by_operations(out, own_bias, own_residual, relu)
        (out * torch.arange(out.numel()).reshape(out.shape)).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([leaf.grad for leaf in leaves])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0])


def test_nothing_to_do_is_nothing_done() -> None:
    out = torch.randn(1, 2, 3, 4)
    assert run_epilogue(out, None, None, False) is out


def test_it_is_in_place_without_gradients() -> None:
    out, bias, residual, _ = make_case(6, torch.float32, (True, True, True))
    expected = by_operations(out, bias, residual, True)
    assert run_epilogue(out, bias, residual, True) is out
    assert same(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_computes_the_same_bits() -> None:
    """Float32 sums in one order, and bfloat16 is rounded once."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    cases = [make_case(channels, dtype, parts) for channels in (3, 64) for dtype in types for parts in PARTS]
    cases += [make_case(96, dtype, (True, True, True), side=200) for dtype in types]
    for case in cases:
        out, bias, residual, relu = copy.deepcopy(case)
        parts = [None if part is None else part.cuda() for part in (out, bias, residual)]
        assert parts[0] is not None
        assert same(run_epilogue(parts[0], parts[1], parts[2], relu).cpu(), by_operations(*case)), case[1:]
    plain = make_case(8, torch.float32, (True, True, True))
    not_channels_last = plain[0].contiguous().cuda()
    found = run_epilogue(not_channels_last, plain[1].cuda(), plain[2].cuda(), True)  # type: ignore[union-attr]
    assert same(found.cpu(), by_operations(*plain))
