"""The average of the weights, early stopping, and the metric that decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import ROOT, command, logged, train_here
from torch import nn
from torch.optim import swa_utils

from resdet.commands.train import main
from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec
from resdet.training.average import AveragedModel

STILL = ("optim.warmup_steps=0", "optim.schedule=constant")


def run_twice(folder: Path, norm: str) -> Path:
    """Train one step, and two steps with an average of decay 0.75."""
    settings = (*STILL, f"model.norm={norm}", "model.calibration_images=8")
    train_here(folder / "one", *settings, "train.steps=1")
    train_here(folder / "two", *settings, "train.steps=2", "train.ema_decay=0.75")
    return folder


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_twice(tmp_path_factory.mktemp("averaged"), "frozen")


def test_best_pt_holds_the_average(frozen: Path) -> None:
    """After two steps it is ``decay * first + (1 - decay) * second``: the average begins with the first weights."""
    first = torch.load(frozen / "one" / "last.pt", weights_only=True)["model"]
    second = torch.load(frozen / "two" / "last.pt", weights_only=True)
    best = torch.load(frozen / "two" / "best.pt", weights_only=True)["model"]
    assert best.keys() == second["model"].keys() == first.keys()
    for name, value in best.items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second["model"][name], rtol=1e-6, atol=1e-8)
        assert torch.equal(value, second["training"]["ema"][f"module.{name}"])
    assert any(not torch.allclose(best[name], second["model"][name], atol=1e-6) for name in best)


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_an_average_computes_with_its_newest_weights(norm: str) -> None:
    """What is folded or cached for evaluation follows the update, which does not touch gradients."""
    torch.manual_seed(0)
    spec = DetectorSpec(arch="resnet18", norm=norm, min_size=64, max_size=64, out_channels=16, box_head_channels=16)
    model = build_detector(spec, num_classes=3, trainable_layers=5)
    average = AveragedModel(model, 0.5)
    average.update_parameters(model)
    image = torch.rand(1, 3, 64, 64)
    average.eval()
    with torch.no_grad():
        before = average.module.backbone(image)["0"]
        for parameter in model.parameters():
            parameter.mul_(1.3)
        average.update_parameters(model)
        after = average.module.backbone(image)["0"]
    fresh = build_detector(spec, num_classes=3, trainable_layers=5).eval()
    fresh.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        expected = fresh.backbone(image)["0"]
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before, after, rtol=1e-3)


def moved(model: nn.Module) -> nn.Module:
    """Move every parameter and every statistic, as a step of training does."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(
                torch.randint(1, 5, tensor.shape) if not tensor.is_floating_point() else torch.randn_like(tensor)
            )
    return model


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_the_average_is_torchs_bit_for_bit(norm: str) -> None:
    """After each of four steps, buffers too; with another decay it is another."""
    torch.manual_seed(0)
    spec = DetectorSpec(arch="resnet18", norm=norm, out_channels=16, box_head_channels=16)
    model = build_detector(spec, num_classes=3, trainable_layers=5)
    function = swa_utils.get_ema_multi_avg_fn(0.9)
    theirs = swa_utils.AveragedModel(model, multi_avg_fn=function, use_buffers=norm == "batch")
    ours, other = AveragedModel(model, 0.9), AveragedModel(model, 0.91)
    for _ in range(4):
        for average in (theirs, ours, other):
            average.update_parameters(model)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, value in theirs.state_dict().items():
            assert ours.state_dict()[name].dtype == value.dtype
            assert torch.equal(ours.state_dict()[name], value), name
        moved(model)
    ours.load_state_dict(theirs.state_dict())
    assert any(not torch.equal(other.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_statistics_of_trained_norms_are_averaged_too(tmp_path: Path) -> None:
    """The last weights' statistics are not those of the averaged weights."""
    run_twice(tmp_path, "batch")
    first = torch.load(tmp_path / "one" / "last.pt", weights_only=True)["model"]
    second = torch.load(tmp_path / "two" / "last.pt", weights_only=True)["model"]
    best = torch.load(tmp_path / "two" / "best.pt", weights_only=True)["model"]
    statistics = [name for name in best if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) > 10
    for name in statistics:
        torch.testing.assert_close(best[name], 0.75 * first[name] + 0.25 * second[name], rtol=1e-6, atol=1e-8)


def test_frozen_statistics_stay_bit_equal(frozen: Path) -> None:
    best = torch.load(frozen / "two" / "best.pt", weights_only=True)["model"]
    last = torch.load(frozen / "two" / "last.pt", weights_only=True)["model"]
    statistics = [name for name in best if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) > 10
    assert all(torch.equal(best[name].view(torch.int32), last[name].view(torch.int32)) for name in statistics)


def test_patience_ends_a_run_that_no_longer_gains(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a rate that moves nothing every evaluation is as good as the first, and none is better."""
    settings = (*STILL, "optim.lr=1e-12", "train.steps=40", "train.eval_every=1", "train.patience=2", "resume=auto")
    arguments = command(tmp_path, *settings, "eval.best_metric=AP50")[2:]
    monkeypatch.chdir(ROOT)
    caplog.set_level("INFO")
    main(arguments)
    assert any("stopped early: AP50 has not risen in 2 evaluations" in message for message in caplog.messages)
    told = capsys.readouterr().out
    assert "(best AP50 " in told
    assert "after 3 steps" in told
    assert len(logged(tmp_path, "AP")) == 3
    main(arguments)
    assert "after 3 steps" in capsys.readouterr().out, "what has stopped stays so"
    assert len(logged(tmp_path, "AP")) == 3


@pytest.mark.slow
def test_telemetry_is_logged(tmp_path: Path) -> None:
    train_here(tmp_path, "train.steps=1")
    for name in ("grad_norm", "data_s", "step_s", "memory_mb", "rpn_positives", "box_positives", "images_per_s"):
        (value,) = logged(tmp_path, name)
        assert value > 0, name
    (recall,) = logged(tmp_path, "proposal_recall")
    assert 0 <= recall <= 1
