"""What the benchmarks of detectors are run on here: small, and quick on one core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import bound

from resdet.models.checkpoint import checkpoint_payload
from resdet.models.detector import build_detector
from resdet.models.norm import calibrate_norm
from resdet.models.spec import DetectorSpec


@pytest.fixture(autouse=True)
def small_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "MATMUL_SIDES", (128,))
    monkeypatch.setattr(bound, "CONV_SIZE", (8, 8))


@pytest.fixture(scope="session")
def small_detector(session_folder: Path) -> Path:
    """A detector's checkpoint with random weights, few proposals and a knob of its own, for four classes."""
    spec = DetectorSpec(
        arch="resnet18",
        min_size=64,
        max_size=96,
        rpn_post_nms_top_n_train=40,
        rpn_post_nms_top_n_test=40,
        box_batch_size_per_image=16,
        box_head_channels=64,
        roi_sampling_ratio=1,
        box_score_thresh=0.1,
        box_loss="giou",
    )
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = build_detector(spec, num_classes=5)
    calibrate_norm(model.backbone.body, [torch.randn(2, 3, 64, 96, generator=generator)])
    path = session_folder / "small.pt"
    torch.save(checkpoint_payload(model), path)
    return path
