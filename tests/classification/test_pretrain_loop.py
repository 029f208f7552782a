"""Runs of classification training: what they leave, how they go on, what they refuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_classes import ROOT, config_of, different, logged

from resdet.classification.build import measure_mean
from resdet.classification.data import read_folder
from resdet.classification.model import load_classifier, load_first_weights, make_classifier
from resdet.classification.spec import ClassifierSpec
from resdet.classification.task import pretrain
from resdet.errors import DataError, Interrupted, TrainingError, UserError
from resdet.training import loop
from resdet.training.runlog import RunLog

ONE_RATE = (
    "optim.schedule=constant",
    "train.ema_decay=0.5",
    "train.mixup=0.5",
    "train.cutmix=1.0",
    "loader.num_workers=1",
)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    result = pretrain(config_of(folder, run, *ONE_RATE))
    assert result.steps == 4
    assert result.best == max(logged(run, "top1"))
    return run


def test_a_run_leaves_its_tree(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        ".lock", "config.yaml", "metrics.jsonl", "last.pt", "previous.pt", "best.pt", "tensorboard",
    }  # fmt: skip
    assert len(logged(whole, "error")) == 4
    assert len(logged(whole, "top5")) == len(logged(whole, "val_loss")) == 2
    best = torch.load(whole / "best.pt", weights_only=True)
    assert "training" not in best
    assert best["classes"] == ["blue", "green", "red"]
    assert torch.load(whole / "last.pt", weights_only=True)["training"]["step"] == 4


def test_a_part_of_the_images_is_evaluated(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "resdet")
    result = pretrain(config_of(folder, tmp_path, *ONE_RATE, "train.steps=2", "train.eval_images=4"))
    assert "evaluations look at 4 of the" in caplog.text
    assert 4 * result.metrics["top1"] == pytest.approx(round(4 * result.metrics["top1"]))


def test_two_steps_and_two_more_are_four_bit_for_bit(folder: Path, whole: Path, tmp_path: Path) -> None:
    pretrain(config_of(folder, tmp_path, *ONE_RATE, "train.steps=2", "loader.num_workers=0"))
    pretrain(config_of(folder, tmp_path, *ONE_RATE, "resume=auto"))
    assert different(whole / "last.pt", tmp_path / "last.pt") == []
    assert logged(whole, "loss") == logged(tmp_path, "loss")
    assert logged(whole, "val_loss") == logged(tmp_path, "val_loss")


def test_a_signal_ends_a_run_in_good_order(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunLog.advance

    def stop_after_a_step(log: RunLog, num_steps: int) -> None:
        real(log, num_steps)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "advance", stop_after_a_step)
        with pytest.raises(
            Interrupted, match=r"stopped by SIGTERM after step 1 of 4: .*last\.pt holds everything"
        ) as told:
            pretrain(config_of(folder, tmp_path, *ONE_RATE))
    assert told.value.exit_code == 128 + signal.SIGTERM
    pretrain(config_of(folder, tmp_path, *ONE_RATE, "resume=auto"))
    assert different(whole / "last.pt", tmp_path / "last.pt") == []


def test_another_seed_is_another_run(folder: Path, whole: Path, tmp_path: Path) -> None:
    """What must fail where the others pass."""
    pretrain(config_of(folder, tmp_path, *ONE_RATE, "seed=1"))
    assert different(whole / "last.pt", tmp_path / "last.pt") != []


def test_accumulated_gradients_are_those_of_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    """With group norm; batch norms see a micro-batch at a time. Float32 sums in another order, over four steps."""
    group = ("model.norm=group", "model.measured_mean=no", "optim.schedule=constant")
    for name, overrides in (("one", ()), ("two", ("train.accumulate=2",)), ("other", ("optim.lr=0.011",))):
        pretrain(config_of(folder, tmp_path / name, *group, *overrides))
    one, two, other = (torch.tensor(logged(tmp_path / name, "loss")) for name in ("one", "two", "other"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=0)


def test_best_is_the_averaged_network_and_brings_its_mean(folder: Path, whole: Path) -> None:
    classifier = load_classifier(whole / "best.pt")
    mean = measure_mean(read_folder(folder / "train"), num_images=100, resize=8, size=8)
    torch.testing.assert_close(classifier.mean, mean)
    assert classifier.spec.image_mean == pytest.approx(mean.mean((1, 2)).tolist())
    last = torch.load(whole / "last.pt", weights_only=True)
    average = last["training"]["ema"]["module.conv1.weight"]
    assert not torch.equal(average, last["model"]["conv1.weight"])
    if logged(whole, "top1")[-1] > logged(whole, "top1")[0]:
        assert torch.equal(classifier.network.conv1.weight, average)


def test_the_rate_falls_when_nothing_gets_better(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rate of nearly nothing keeps the answers as they are: the first evaluation stays the best."""
    caplog.set_level("INFO")
    settings = ("optim.schedule=constant", "optim.plateau_patience=2", "optim.lr=1e-12", "train.eval_every=1")
    settings += ("optim.lr_batch_size=null", "model.norm=group")
    pretrain(config_of(folder, tmp_path, *settings, "train.steps=4"))
    pretrain(config_of(folder, tmp_path, *settings, "train.steps=7", "resume=auto"))
    rates = [round(rate / 1e-12, 6) for rate in logged(tmp_path, "lr")]
    assert rates == [1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert "step 3: top1 has not risen in 2 evaluations: learning rate 1e-13" in caplog.text


def test_the_rate_is_held_until_something_is_learned(folder: Path, tmp_path: Path) -> None:
    settings = ("optim.schedule=constant", "optim.lr_batch_size=null", "optim.warmup_factor=0.1")
    pretrain(config_of(folder, tmp_path / "easy", *settings, "optim.warmup_until_error=0.999"))
    rates = logged(tmp_path / "easy", "lr")
    first = next(i for i, error in enumerate(logged(tmp_path / "easy", "error")) if error < 0.999)
    assert rates == pytest.approx([0.001] * (first + 1) + [0.01] * (3 - first))
    pretrain(config_of(folder, tmp_path / "hard", *settings, "optim.warmup_until_error=1e-9", "train.steps=2"))
    pretrain(
        config_of(folder, tmp_path / "hard", *settings, "optim.warmup_until_error=1e-9", "train.steps=3", "resume=auto")
    )
    assert logged(tmp_path / "hard", "lr") == pytest.approx([0.001] * 3)


def test_first_weights_are_taken_but_for_other_classes(folder: Path, whole: Path, tmp_path: Path) -> None:
    spec = ClassifierSpec(arch="cifar20", image_size=8)
    stored = torch.load(whole / "best.pt", weights_only=True)["model"]
    same = make_classifier(spec, ["blue", "green", "red"])
    assert load_first_weights(same, str(whole / "best.pt")).reinitialised == ()
    assert torch.equal(same.network.fc.weight, stored["fc.weight"])
    other = make_classifier(spec, ["cyan", "green", "red"])
    before = other.network.fc.weight.clone()
    assert load_first_weights(other, str(whole / "best.pt")).reinitialised == ("fc.weight", "fc.bias")
    assert torch.equal(other.network.fc.weight, before)
    assert torch.equal(other.network.conv1.weight, stored["conv1.weight"])
    with pytest.raises(UserError, match="does not fit this cifar32 classifier"):
        load_first_weights(make_classifier(ClassifierSpec(arch="cifar32"), ["a"]), str(whole / "best.pt"))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_images(folder: Path, tmp_path: Path) -> None:
    settings = ("optim.lr=1e30", "train.steps=10", "train.save_every=1", "optim.schedule=constant")
    with pytest.raises(
        TrainingError, match=r"not finite at step \d+, .*images of the batch: .*train/.*\.png"
    ) as caught:
        pretrain(config_of(folder, tmp_path, *settings))
    assert "holds the step: weights, images and labels" in str(caught.value)
    (path,) = tmp_path.glob("broken_step_*.pt")
    content = torch.load(path, weights_only=True)
    assert content["batches"][0]["images"].shape == (8, 3, 8, 8)
    assert content["moment"]["step"] + 1 == int(path.stem.split("_")[-1])


def test_mistakes_are_told_before_the_first_step(folder: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(config_of(folder, whole, *ONE_RATE))
    (tmp_path / "train" / "cyan").mkdir(parents=True)
    (tmp_path / "train" / "blue").symlink_to(folder / "train" / "blue")
    (tmp_path / "train" / "cyan" / "0.png").symlink_to(folder / "train" / "red" / "0.png")
    (tmp_path / "val").symlink_to(folder / "val")
    with pytest.raises(DataError, match="none of the 2 classes"):
        pretrain(config_of(tmp_path, tmp_path / "run"))
    (tmp_path / "val").unlink()
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match=r"its run has 3 classes, blue, green, red; data\.train has 2, blue, cyan: "):
        pretrain(config_of(tmp_path, tmp_path / "run", f"resume={whole / 'last.pt'}"))


def test_memory_that_does_not_suffice_is_met_by_pieces(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = loop.accumulate_gradients, []

    def scarce(*arguments: object, **options: object) -> dict[str, torch.Tensor]:
        seen.append(arguments[3])
        if arguments[3] == 1:
            raise torch.OutOfMemoryError("no room")
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "accumulate_gradients", scarce)
    with pytest.raises(TrainingError, match=r"lower model\.image_size, train\.batch_size"):
        pretrain(config_of(folder, tmp_path / "no"))
    seen.clear()
    pretrain(config_of(folder, tmp_path / "yes", "train.retry_out_of_memory=true"))
    assert seen == [1, 2, 2, 2, 2]


@pytest.mark.slow
def test_two_processes_train_as_one(folder: Path, tmp_path: Path) -> None:
    """torchrun; group norm, because batch norms see their own process's images only."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'classification')!r}]\n"
        "from pathlib import Path\nfrom small_classes import config_of\n"
        "from resdet.classification.task import pretrain\n"
        f"pretrain(config_of(Path({str(folder)!r}), Path({str(tmp_path / 'two')!r}), *sys.argv[1:]))\n"
    )
    settings = ["model.norm=group", "optim.schedule=constant"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            *settings,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pretrain(config_of(folder, tmp_path / "one", *settings))
    one, two = (torch.tensor(logged(tmp_path / name, "loss")) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
    assert logged(tmp_path / "two", "top1") == logged(tmp_path / "one", "top1")
