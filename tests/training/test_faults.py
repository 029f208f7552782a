"""Things that go wrong around a run: each ends as it is stated, with nothing lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import coco_folder
from small_runs import ROOT, command, differences, environment, train, train_here
from torch import Tensor, nn

from resdet.data.loader import Batch
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import TrainingError, UserError, WeightsError
from resdet.models.detector import Detector, build_detector
from resdet.models.spec import DetectorSpec
from resdet.training import guards
from resdet.training.checkpoint import newest_whole
from resdet.training.detection import not_finite, repeat_step
from resdet.training.folder import claimed
from resdet.training.losses import detection_losses
from resdet.training.step import accumulate_gradients
from resdet.types import Target
from resdet.weights.files import read_checkpoint
from resdet.weights.torch_files import damage

SHORT = ("train.steps=6", "train.save_every=1", "train.eval_every=3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(folder, *SHORT)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_leaves_the_last_good_checkpoint(finished: Path, small_disk: Path) -> None:
    size = (finished / "last.pt").stat().st_size
    subprocess.run(["mount", "-o", f"remount,size={int(1.5 * size)}", str(small_disk)], check=True)
    done = train(small_disk / "run", *SHORT, expected=2)
    assert "a checkpoint cannot be written (" in done.stderr
    assert "what was written before is whole" in done.stderr
    assert "Traceback" not in done.stderr
    assert newest_whole(small_disk / "run") is not None
    assert [path.name for path in (small_disk / "run").glob(".*.pt")] == [], "what did not fit is gone"
    subprocess.run(["mount", "-o", "remount,size=1g", str(small_disk)], check=True)
    train(small_disk / "run", *SHORT, "resume=auto")
    assert differences(finished / "last.pt", small_disk / "run" / "last.pt") == []


@pytest.mark.slow
def test_read_only_folder_is_told_before_anything_is_computed(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = train(small_disk / "run", *SHORT, expected=2)
    assert f"{small_disk / 'run'}: cannot be created: Read-only file system" in done.stderr


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_the_checkpoint_before_it_used(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, *SHORT)
    content = bytearray((run / "last.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (run / "last.pt").write_bytes(content)
    torch.load(run / "last.pt", weights_only=True)  # torch itself does not notice
    done = train(run, *SHORT, "resume=auto")
    assert f"{run / 'last.pt'} is damaged: the checksum of data/" in done.stderr
    assert f"resuming from {run / 'previous.pt'}" in done.stderr
    assert differences(finished / "last.pt", run / "last.pt") == []


def test_a_damaged_checkpoint_given_by_its_path_is_refused(finished: Path, tmp_path: Path) -> None:
    content = bytearray((finished / "last.pt").read_bytes())
    content[len(content) // 2] ^= 4
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(f"{damaged}: is damaged: the checksum of data/")):
        train_here(tmp_path / "run", *SHORT, f"resume={damaged}")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_checkpoints_that_are_all_damaged_are_refused(finished: Path, tmp_path: Path) -> None:
    whole = (finished / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[:-100])
    (tmp_path / "previous.pt").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"last\.pt is damaged, .*previous\.pt is damaged, .*nothing to resume from"):
        newest_whole(tmp_path)
    assert newest_whole(tmp_path / "nowhere") is None


def test_every_single_bit_counts(tmp_path: Path) -> None:
    """A flipped bit is either found, or does not change what is loaded (padding, time stamps)."""
    torch.save({"weights": torch.arange(50.0), "training": {"step": 3}}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    flipped = tmp_path / "flipped.pt"
    found = 0
    for position in range(0, len(whole), 3):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        flipped.write_bytes(content)
        if damage(flipped) is not None:
            found += 1
            continue
        loaded = read_checkpoint(flipped)
        assert torch.equal(loaded["weights"], torch.arange(50.0))
        assert loaded["training"] == {"step": 3}
    assert found > len(whole) / 3 / 4, "the records themselves are a good part of the file"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    import sys

    code = f"""
import time
from pathlib import Path
from resdet.training.folder import claimed
with claimed(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another run is writing here \(process {holder.pid} on "), claimed(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with claimed(tmp_path):  # a lock does not outlive its process
        pass


@pytest.mark.slow
def test_an_image_that_vanishes_mid_run_is_named_and_the_run_goes_on_with_it_back(tmp_path: Path) -> None:
    data = coco_folder(tmp_path / "data", 12)
    source = f"data.train={{format: coco, images: {data}, annotations: {data / 'a.json'}}}"
    run = tmp_path / "run"
    picture = (data / "7.png").read_bytes()
    process = subprocess.Popen(
        command(run, source, "train.steps=600", "train.save_every=1"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "learning rate" in line:
            break
    (data / "7.png").unlink()
    told = process.stderr.read()
    assert process.wait() == 2, told
    assert f"image 7: {data / '7.png'}: no such image file" in told
    assert "Traceback" not in told
    assert newest_whole(run) is not None
    (data / "7.png").write_bytes(picture)
    step = torch.load(run / "last.pt", weights_only=True)["training"]["step"]
    done = train(run, source, "resume=auto", f"train.steps={step + 1}")
    assert f"at step {step}" in done.stderr


def test_a_worker_killed_by_the_kernel_ends_the_run_with_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(run, "train.steps=2000", "train.save_every=1", "loader.num_workers=1"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2, told
    assert "worker" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert newest_whole(run) is not None


def small_detector() -> Detector:
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch="resnet18",
        norm="group",
        min_size=64,
        max_size=64,
        out_channels=32,
        box_head_channels=32,
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=16,
    )
    return build_detector(spec, num_classes=4, trainable_layers=5).train()


def batch(num_images: int) -> Batch:
    table, images = shapes_table(num_images, 64, 0), ShapesImages(64, 0)
    boxes = table.boxes_in_image().astype(np.float32)
    targets = [
        Target(
            boxes=torch.from_numpy(boxes[table.rows(i)]),
            labels=torch.from_numpy(table.labels[table.rows(i)]),
            image_id=torch.tensor(i),
        )
        for i in range(num_images)
    ]
    pixels = [torch.from_numpy(images(i).transpose(2, 0, 1).copy()) for i in range(num_images)]
    return Batch(pixels, targets, list(range(num_images)), list(range(num_images)))


def gradients(model: Detector, one: Batch, num_pieces: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def losses(parallel: nn.Module, piece: Batch) -> dict[str, Tensor]:
        return detection_losses(model, parallel, piece, "fp32")

    return accumulate_gradients(losses, model, [one], num_pieces, scaler)


@pytest.mark.parametrize("place", ["layer", "batch"])
def test_a_broken_step_can_be_repeated(place: str, tmp_path: Path) -> None:
    """NaN planted: the step is told, saved, and gives the same numbers again in a model built from the file."""
    model, one = small_detector(), batch(2)
    if place == "layer":
        with torch.no_grad():
            model.roi_heads.box_head.fc7.weight[0, 0] = float("nan")
    else:
        one.targets[1]["boxes"][0] = float("nan")
    torch.manual_seed(11)
    values = gradients(model, one)
    moment = guards.Moment(7, random_seed=11, rank=0, lr=0.1, precision="fp32", num_pieces=1)
    error = not_finite(moment, values, model, [one], shapes_table(2, 64, 0), tmp_path)
    assert isinstance(error, TrainingError)
    told = str(error)
    assert told.startswith("loss is not finite at step 8, learning rate 0.1: loss nan, ")
    assert "largest layers: " in told
    assert "(gradient up to nan, weights up to " in told or place == "batch"
    assert "image ids of the batch: 1 (shapes_0_000000.png), 2 (shapes_0_000001.png)" in told
    again, losses = repeat_step(tmp_path / "broken_step_8.pt")
    assert losses.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(losses[name], value, rtol=0, atol=0, equal_nan=True)
    theirs = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=0, atol=0, equal_nan=True)
    torch.save({"format": "resdet-detector-1"}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"must be a broken_step_N\.pt that a run left"):
        repeat_step(tmp_path / "other.pt")


def test_pieces_add_up_to_the_whole() -> None:
    """Out of memory: three images at once, or two and then one, give the same gradients to float32's rounding."""
    model, one = small_detector(), batch(3)
    whole = gradients(model, one)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    pieces = gradients(model, one, num_pieces=2)
    for name in ("loss", "loss_classifier", "rpn_positives", "num_objects"):
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
    other = gradients(model, one._replace(seeds=[5, 6, 7]), num_pieces=2)
    assert not torch.allclose(other["loss"], whole["loss"], rtol=1e-5)


def test_out_of_memory_is_met_by_smaller_pieces_or_told() -> None:
    lack = RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried")
    assert guards.after_out_of_memory(lack, 1, micro_batch_size=4, may_retry=True, image_size_keys="k") == 2
    with pytest.raises(TrainingError, match=r"out of memory with 4 images at a time .*train\.batch_size"):
        guards.after_out_of_memory(lack, 1, micro_batch_size=4, may_retry=False, image_size_keys="k")
    with pytest.raises(TrainingError, match="out of memory with 4 images"):
        guards.after_out_of_memory(lack, 4, micro_batch_size=4, may_retry=True, image_size_keys="k")
    with pytest.raises(RuntimeError, match="something else"):
        guards.after_out_of_memory(
            RuntimeError("something else"), 1, micro_batch_size=4, may_retry=True, image_size_keys="k"
        )


def test_memory_that_does_not_suffice_ends_the_run_in_a_line_or_goes_on_in_pieces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from resdet.config import load_config
    from resdet.training import loop, step
    from resdet.training.detection import train as train_here

    real = step.accumulate_gradients

    def tight(*arguments):  # type: ignore[no-untyped-def]
        if arguments[3] == 1:  # more than one image at a time does not fit
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(*arguments)

    monkeypatch.setattr(loop, "accumulate_gradients", tight)
    overrides = [*command(tmp_path)[3:], "train.steps=2"]
    with pytest.raises(TrainingError, match="out of memory with 4 images at a time"):
        train_here(load_config(ROOT / "configs" / "quickstart.yaml", [*overrides, f"output_dir={tmp_path / 'a'}"]))
    settings = [*overrides, f"output_dir={tmp_path / 'b'}", "train.retry_out_of_memory=true"]
    result = train_here(load_config(ROOT / "configs" / "quickstart.yaml", settings))
    assert result.steps == 2


def test_deterministic_training_prepares_cublas_before_cuda_is_initialised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a host with a GPU, as far as it can be pretended: choosing the device initialises CUDA."""
    from resdet.config import TrainConfig
    from resdet.training.launch import launched

    seen: list[str | None] = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(seen))
    settings = TrainConfig(steps=1, device="cuda", deterministic=True)
    with launched(tmp_path, settings, None) as (team, _):
        assert team.device == torch.device("cuda", 0)
        assert torch.are_deterministic_algorithms_enabled()
    assert seen == [":4096:8"]
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with (
        pytest.raises(TrainingError, match="CUDA is already initialised in this process; set CUBLAS_WORKSPACE_CONFIG"),
        launched(tmp_path, settings, None),
    ):
        pass


def test_pictures_are_drawn_from_the_evaluated_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the score of the best F1, unless the user states one."""
    from resdet.config import load_config
    from resdet.training import detection

    thresholds: list[float] = []
    real = detection.evaluate

    def evaluate(*arguments):  # type: ignore[no-untyped-def]
        return replace(real(*arguments), score_threshold=0.64)

    def draw(image, found, categories, *, score_threshold, scale):  # type: ignore[no-untyped-def]
        thresholds.append(score_threshold)
        return image

    monkeypatch.setattr(detection, "evaluate", evaluate)
    monkeypatch.setattr(detection, "draw", draw)
    overrides = [*command(tmp_path)[3:], "train.steps=1", "eval.num_pictures=2"]
    for number, stated in enumerate(([], ["eval.picture_score=0.3"])):
        folder = f"output_dir={tmp_path / str(number)}"
        detection.train(load_config(ROOT / "configs" / "quickstart.yaml", [*overrides, *stated, folder]))
    assert thresholds == [0.64, 0.64, 0.3, 0.3]


def test_a_broken_step_is_told_on_a_full_disk_too(small_disk: Path) -> None:
    model, one = small_detector(), batch(2)
    values = gradients(model, one) | {"loss": torch.tensor(torch.nan)}
    moment = guards.Moment(7, random_seed=0, rank=0, lr=0.1, precision="fp32", num_pieces=1)
    told = str(not_finite(moment, values, model, [one], shapes_table(2, 64, 0), small_disk))
    assert told.startswith("loss is not finite at step 8")
    assert "the step could not be saved (" in told
    assert list(small_disk.iterdir()) == []
