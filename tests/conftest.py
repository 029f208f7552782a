"""Fixtures shared by several test files."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, and for the tools that tests start: threads of two test processes only wait for each
    # other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torchvision
from torch import nn

from resdet.models.norm import calibrate_norm

if TYPE_CHECKING:
    from benchmarks.pretend_gpu import Record

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU from all tests but those for one (``-m gpu``): they are about the CPU or the pretend GPU.

    torch takes one kind of accelerator in a process, the pretend GPU or a real one.
    """
    if re.search(r"(?<!not )\bgpu\b", str(config.option.markexpr)) is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real data and real outputs of other programs, kept beside the project and not part of it."""
    if not ASSETS.is_dir():
        pytest.skip(f"needs the real data of {ASSETS}, which is not part of the project")
    return ASSETS


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what fixtures make once for all files."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="module", autouse=True)
def _remove_what_a_file_wrote(
    request: pytest.FixtureRequest, session_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Remove the folders of a file's tests and fixtures when all have passed: runs and checkpoints come to 20 GB."""
    base = tmp_path_factory.getbasetemp()
    kept, failed = set(base.iterdir()), request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        for folder in set(base.iterdir()) - kept:
            shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Restore what a command sets for its process: the next test of this process decides anew what is logged."""
    root, package = logging.getLogger(), logging.getLogger("resdet")
    level, handlers, package_level = root.level, root.handlers[:], package.level
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    package.setLevel(package_level)


def make_weights(arch: str, assets: Path, folder: Path) -> Path:
    path = folder / f"{arch}.pth"
    subprocess.run([sys.executable, str(assets / "make_weights.py"), arch, str(path)], check=True)
    return path


@pytest.fixture(scope="session")
def resnet18_file(assets: Path, session_folder: Path) -> Path:
    """Real ImageNet weights of a ResNet-18 as torchvision saves them."""
    return make_weights("resnet18", assets, session_folder)


@pytest.fixture(scope="session")
def resnet101_file(assets: Path, session_folder: Path) -> Path:
    """Real ImageNet features in a ResNet-101's shape, as torchvision saves them."""
    return make_weights("resnet101", assets, session_folder)


@pytest.fixture(scope="session")
def randomise_norms() -> Callable[[nn.Module], None]:
    """Give frozen norms statistics that normalise, and affine parameters that are not the identity."""

    def randomise(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        calibrate_norm(model, [torch.randn(2, 3, 128, 128, generator=generator)])
        for norm in model.modules():
            if isinstance(norm, torchvision.ops.FrozenBatchNorm2d):
                norm.weight.copy_(1 + 0.1 * torch.randn(norm.weight.shape, generator=generator))
                norm.bias.copy_(0.1 * torch.randn(norm.bias.shape, generator=generator))

    return randomise


@pytest.fixture
def device_record() -> Iterator[Record]:
    """What the test asks of the pretend GPU."""
    from benchmarks.pretend_gpu import pretend_gpu  # only then has torch a further device

    with pretend_gpu() as record:
        yield record
