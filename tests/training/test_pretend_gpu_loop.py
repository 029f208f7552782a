"""The training loop on the pretend GPU: the run of the CPU, and one that goes on as if it had not been interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.pretend_gpu import DEVICE, Record
from small_runs import ROOT, SMALL, differences, logged, train_here

import resdet
from resdet import processes
from resdet.config import load_config
from resdet.models import padded
from resdet.models.detector import Detector
from resdet.training import detection

# Few steps at a low rate, and every proposal is sampled: where two proposals of nearly the same score change places,
# others would be drawn.
SHORT = (
    "optim.name=sgd",
    "optim.lr=0.0002",
    "optim.warmup_steps=0",
    "optim.schedule=constant",
    "train.steps=3",
    "model.rpn_post_nms_top_n_train=40",
    "model.box_batch_size_per_image=64",
    "model.box_positive_fraction=1.0",
    "train.save_every=1",
    "train.ema_decay=0.5",
    "optim.clip_grad_norm=1.0",
    "data.val.num_images=2",
    "loader.num_workers=0",
)


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded, "is_queued", lambda _device: True)
    monkeypatch.setattr(
        processes, "choose_device", lambda name, _rank=0: torch.device("cpu") if name == "cpu" else DEVICE
    )


def weights(folder: Path) -> torch.Tensor:
    model = torch.load(folder / "last.pt", weights_only=True)["model"]
    return torch.cat([value.flatten() for value in model.values() if value.is_floating_point()])


def assert_same_run(one: Path, other: Path) -> None:
    for key in ("loss", "grad_norm", "loss_objectness"):
        assert logged(one, key) == pytest.approx(logged(other, key), rel=1e-4)
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_three_steps_are_the_cpus(tmp_path: Path, device_record: Record) -> None:
    train_here(tmp_path / "cpu", *SHORT, "train.device=cpu")
    assert device_record.operators == []
    train_here(tmp_path / "there", *SHORT)
    assert len(device_record.operators) > 1000
    assert_same_run(tmp_path / "there", tmp_path / "cpu")
    train_here(tmp_path / "other", *SHORT, "train.device=cpu", "seed=1")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "there", tmp_path / "other")
    detector = resdet.load_detector(tmp_path / "there" / "last.pt")
    assert {parameter.device.type for parameter in detector.parameters()} == {"cpu"}


@pytest.mark.usefixtures("device_record")
def test_a_weight_left_on_the_cpu_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = Detector.to

    def forgetful(model: Detector, *args: Any) -> Detector:
        bias = model.rpn.head.bbox_pred.bias
        move(model, *args)
        model.rpn.head.bbox_pred.bias = torch.nn.Parameter(bias.detach().cpu())
        return model

    monkeypatch.setattr(Detector, "to", forgetful)
    with pytest.raises(RuntimeError, match="at least two devices"):
        train_here(tmp_path, *SHORT)


class _StopError(Exception):
    pass


def _stop_after(step: int) -> Callable[[Mapping[str, float]], None]:
    def stop(line: Mapping[str, float]) -> None:
        if line["step"] == step:
            raise _StopError

    return stop


@pytest.mark.slow
@pytest.mark.usefixtures("device_record")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_is_the_same_bit_for_bit(precision: str, tmp_path: Path) -> None:
    settings = (*SHORT, f"train.precision={precision}", "train.accumulate=2")
    train_here(tmp_path / "whole", *settings)
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [*SMALL, *settings, f"output_dir={tmp_path / 'parts'}", "resume=auto"]
    )
    with pytest.raises(_StopError):
        detection.train(config, on_log=_stop_after(2))
    detection.train(config)
    assert differences(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt") == []
    train_here(tmp_path / "other", *settings, "seed=1")
    assert differences(tmp_path / "whole" / "last.pt", tmp_path / "other" / "last.pt") != []
