"""Whether there is a GPU to test on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

ON_A_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def require_cuda(request: pytest.FixtureRequest) -> None:
    """Skip without a GPU; each test has a reason of its own, so that pytest's summary lists what would have run."""
    if not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device, where it would run {request.node.nodeid}")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 as float32, also on GPUs, whose TF32 has 10 bits."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
