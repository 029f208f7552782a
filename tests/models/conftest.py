"""What several test files of the models need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from resdet.models.norm import calibrate_norm


@pytest.fixture(scope="session")
def resnet18_file(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real ImageNet weights of a ResNet-18 as torchvision saves them."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    subprocess.run([sys.executable, str(assets / "make_weights.py"), "resnet18", str(path)], check=True)
    return path


def randomise_norms(model: nn.Module, seed: int = 0) -> None:
    """Give frozen norms statistics that normalise, and affine parameters that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    calibrate_norm(model, [torch.randn(2, 3, 64, 64, generator=generator)])
    for name, buffer in model.named_buffers():
        if name.endswith(".weight"):
            buffer.copy_(1 + 0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith(".bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
