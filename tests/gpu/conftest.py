"""What is tested on a real GPU (``-m gpu``), and what stands for it without one: the CPU, or the pretend GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from benchmarks.pretend_gpu import DEVICE, pretend_gpu
from cards import ON_A_GPU, exact_float32, require_cuda
from small_detectors import make_detector

from resdet.models.detector import Detector

# Read when CUDA is initialised, which any of these tests may be the first to do; train.deterministic needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def exact() -> Iterator[None]:
    """Compute float32 as float32."""
    with exact_float32():
        yield


@pytest.fixture(params=[pytest.param("pretend", marks=pytest.mark.slow), ON_A_GPU])
def device(request: pytest.FixtureRequest, exact: None) -> Iterator[torch.device]:
    """A device that is not the CPU."""
    yield from _device(request)


@pytest.fixture(params=["pretend", ON_A_GPU])
def device_quickly(request: pytest.FixtureRequest, exact: None) -> Iterator[torch.device]:
    """The same, for what shows in a second or two that these tests run."""
    yield from _device(request)


def _device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda":
        require_cuda(request)
        yield torch.device("cuda", 0)
        return
    with pretend_gpu():
        yield DEVICE


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), ON_A_GPU])
def named(request: pytest.FixtureRequest, exact: None) -> str:
    """The name of a device as a configuration has it; the CPU stands for a GPU in what a whole run does."""
    if request.param == "cuda":
        require_cuda(request)
    return str(request.param)


@pytest.fixture(params=[ON_A_GPU])
def cuda(request: pytest.FixtureRequest, exact: None) -> torch.device:
    """A real GPU: what nothing stands for."""
    require_cuda(request)
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def detector() -> Detector:
    """A small detector on the CPU, in evaluation mode; copy it before changing it."""
    return make_detector()
