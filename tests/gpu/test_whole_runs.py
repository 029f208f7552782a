"""Training, evaluation, prediction and export on a GPU; without one the same tests run on the CPU."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_detectors import assert_same_detections, detections, make_batch, make_detector
from small_runs import ROOT, differences, logged, train, train_here
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resdet.config import TrainConfig, load_config
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import TrainingError, UserError
from resdet.evaluation.detect import evaluate
from resdet.evaluation.loss import validation_loss
from resdet.evaluation.settings import InferenceSettings
from resdet.export.backbone import export_backbone
from resdet.export.detector import export_detector
from resdet.models import int8
from resdet.models.checkpoint import checkpoint_payload, load_detector
from resdet.models.detector import Detector
from resdet.precision import Precision
from resdet.prediction import predict
from resdet.training import detection, loop
from resdet.training.losses import detection_losses
from resdet.training.step import accumulate_gradients

SHORT = ("train.steps=4", "train.eval_every=2", "optim.warmup_steps=0")
DATASET = DetectionDataset(shapes_table(4, 96, 3), ShapesImages(image_size=96, seed=3), training=False)


def on(name: str) -> str:
    return f"train.device={name}"


# ---- precisions


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_float32(detector: Detector, device: torch.device, precision: Precision) -> None:
    batch = make_batch()
    losses, gradients = {}, {}
    for kind in ("fp32", precision):
        model = copy.deepcopy(detector).to(device).train()
        values = detection_losses(model, model, batch, kind)  # type: ignore[arg-type]
        # What GradScaler does to keep small gradients from becoming 0; a power of two changes no digits.
        (values["loss"] * 1024).backward()  # type: ignore[no-untyped-call]
        losses[kind] = values["loss"].item()
        assert values["loss"].dtype == torch.float32
        gradients[kind] = model.roi_heads.box_head.fc6.weight.grad
        assert gradients[kind].dtype == model.roi_heads.box_head.fc6.weight.dtype == torch.float32
    # bfloat16 has 8 bits, and other proposals survive; a bug of scale or of a missing term would show.
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses[precision] != losses["fp32"]
    cosine = torch.cosine_similarity(gradients[precision].flatten(), gradients["fp32"].flatten(), dim=0)
    assert 0.9 < cosine.item() < 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision(named: str, tmp_path: Path, precision: str) -> None:
    train_here(tmp_path, *SHORT, on(named), f"train.precision={precision}", "optim.clip_grad_norm=10")
    assert len(logged(tmp_path, "loss")) == 4
    assert all(map(math.isfinite, logged(tmp_path, "loss")))
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(v.dtype != torch.float16 and v.dtype != torch.bfloat16 for v in saved["model"].values())
    assert bool(saved["training"]["scaler"]) == (precision == "fp16")


def test_an_infinite_fp16_gradient_is_not_stepped_on(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step's gradient overflows: the scale falls, the weights stay, and training goes on."""
    calls: list[int] = []

    def overflowing(losses: Any, parallel: Any, batches: Any, num_pieces: int, scaler: Any) -> dict[str, Tensor]:
        values = accumulate_gradients(losses, parallel, batches, num_pieces, scaler)
        calls.append(1)
        if len(calls) == 1:
            next(p for p in parallel.parameters() if p.grad is not None).grad.fill_(math.inf)
        return values

    monkeypatch.setattr(loop, "accumulate_gradients", overflowing)
    train_here(tmp_path, "train.steps=2", on(named), "train.precision=fp16", "optim.warmup_steps=0")
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["training"]
    assert saved["scaler"]["scale"] == 2.0**15  # 2**16 to begin with
    assert {float(state["step"]) for state in saved["optimizer"]["state"].values()} == {1.0}


# ---- runs


def test_deterministic_runs_have_the_same_bits(named: str, tmp_path: Path) -> None:
    settings = [*SHORT, on(named), "train.deterministic=true"]
    train_here(tmp_path / "one", *settings)
    train_here(tmp_path / "two", *settings)
    assert differences(tmp_path / "one" / "last.pt", tmp_path / "two" / "last.pt") == []
    train_here(tmp_path / "other", *settings, "seed=1")
    assert differences(tmp_path / "one" / "last.pt", tmp_path / "other" / "last.pt")


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(named: str, tmp_path: Path) -> None:
    settings = [*SHORT, on(named), "train.deterministic=true", "train.ema_decay=0.9"]
    train_here(tmp_path / "whole", *settings)

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train_here(tmp_path / "parts", *settings, on_log=stop)
    assert logged(tmp_path / "parts", "loss") == logged(tmp_path / "whole", "loss")[:2]
    train_here(tmp_path / "parts", *settings, "resume=auto")
    assert differences(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt") == []
    assert logged(tmp_path / "parts", "loss") == logged(tmp_path / "whole", "loss")


def test_the_average_is_what_is_kept_as_best(named: str, tmp_path: Path) -> None:
    train_here(tmp_path, *SHORT, on(named), "train.ema_decay=0.5")
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    name = "roi_heads.box_head.fc6.weight"
    averaged = {key.removeprefix("module."): value for key, value in last["training"]["ema"].items()}
    assert not torch.equal(averaged[name], last["model"][name])
    assert best["model"][name].shape == averaged[name].shape
    assert all(torch.isfinite(value).all() for value in best["model"].values())


def test_accumulated_steps(named: str, tmp_path: Path) -> None:
    """Small boxes fill every sample, so that a batch in two parts trains the same."""
    train_here(tmp_path / "whole", "train.steps=2", on(named), "optim.warmup_steps=0")
    train_here(tmp_path / "parts", "train.steps=2", on(named), "optim.warmup_steps=0", "train.accumulate=2")
    # A float32 sum in another order; the second step may meet other proposals. A GPU computes smaller batches by other
    # algorithms, and scores of random weights, which are nearly equal, then rank proposals otherwise: the box head
    # draws others of them. Weights of the scores that differ by 1e-6 to 1e-4 move the loss by up to 1e-3 so (pretend
    # GPU), and the RPN's parts by less than 1e-6: its anchors are drawn whatever their scores.
    for key in ("loss_objectness", "loss_rpn_box_reg"):
        parts, whole = (logged(tmp_path / name, key)[0] for name in ("parts", "whole"))
        assert parts == pytest.approx(whole, rel=1e-3), key
    tolerance = 1e-3 if named == "cpu" else 1e-2
    assert logged(tmp_path / "parts", "loss")[0] == pytest.approx(logged(tmp_path / "whole", "loss")[0], rel=tolerance)


def test_memory_that_runs_out_is_met_by_smaller_pieces(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []

    def tight(losses: Any, parallel: Any, batches: Any, num_pieces: int, scaler: Any) -> dict[str, Tensor]:
        pieces.append(num_pieces)
        if num_pieces == 1:
            accumulate_gradients(losses, parallel, batches, num_pieces, scaler)  # leaves gradients behind
            raise torch.OutOfMemoryError("out of memory")
        return accumulate_gradients(losses, parallel, batches, num_pieces, scaler)

    monkeypatch.setattr(loop, "accumulate_gradients", tight)
    with pytest.raises(TrainingError, match="out of memory with 4 images at a time"):
        train_here(tmp_path / "no", "train.steps=2", on(named))
    assert train_here(tmp_path / "yes", "train.steps=2", on(named), "train.retry_out_of_memory=true").steps == 2
    assert pieces == [1, 1, 2, 2]


def test_memory_that_truly_runs_out(cuda: torch.device, tmp_path: Path) -> None:
    """A process that may use 3 % of the card (2.4 GB of 80) meets steps of 16 large images."""
    settings = [
        "model.min_size=640",
        "model.max_size=640",
        "data.train.image_size=640",
        "train.steps=2",
        "train.batch_size=16",
        "train.retry_out_of_memory=true",
    ]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(cuda)
    wanted = before + 1_500_000_000
    torch.cuda.set_per_process_memory_fraction(wanted / torch.cuda.get_device_properties(cuda).total_memory, cuda)
    try:
        assert train_here(tmp_path, *settings, on("cuda")).steps == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    assert all(map(math.isfinite, logged(tmp_path, "loss")))


def test_data_parallel_with_one_process(detector: Detector, named: str, tmp_path: Path) -> None:
    """DistributedDataParallel over NCCL (gloo on CPUs) in a group of one: the gradients are those without it."""
    device = torch.device(named, 0) if named == "cuda" else torch.device(named)
    model = copy.deepcopy(detector).to(device).train()
    batch = make_batch()
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def gradient(parallel: nn.Module) -> Tensor:
        model.zero_grad()
        accumulate_gradients(lambda p, b: detection_losses(model, p, b, "fp32"), parallel, [batch], 2, scaler)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradient(model)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if named == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        found = gradient(DistributedDataParallel(model))
    finally:
        dist.destroy_process_group()
    assert expected.norm() > 0
    # Atomic additions in the backward pass come in any order on a GPU; a gradient that was not passed on would be 0.
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_torchrun_with_one_process(named: str, tmp_path: Path) -> None:
    # Both in processes of their own: this one computes float32 without TF32.
    train(tmp_path / "launched", *SHORT, on(named), "train.deterministic=true", torchrun=("--standalone",))
    train(tmp_path / "alone", *SHORT, on(named), "train.deterministic=true")
    assert differences(tmp_path / "launched" / "last.pt", tmp_path / "alone" / "last.pt") == []


@pytest.mark.skipif("compile" not in TrainConfig.model_fields, reason="no train.compile here")
def test_a_compiled_network_trains_the_same(named: str, tmp_path: Path) -> None:
    # Of a size that is padded the same with and without compilation; batch norms would see more zeros otherwise.
    settings = ["train.steps=2", on(named), "optim.warmup_steps=0", "model.min_size=128", "model.max_size=128"]
    train_here(tmp_path / "plain", *settings)
    train_here(tmp_path / "compiled", *settings, "train.compile=true")
    # Fused kernels round elsewhere; a proposal that changes moves the loss of a step.
    np.testing.assert_allclose(logged(tmp_path / "compiled", "loss"), logged(tmp_path / "plain", "loss"), rtol=1e-2)


def test_it_learns(cuda: torch.device, tmp_path: Path) -> None:
    """A run of a minute: 160 steps of the quickstart reach an AP that chance does not."""
    overrides = ["train.steps=160", "train.eval_every=160", "train.precision=bf16", on("cuda"), "eval.num_pictures=0"]
    overrides += ["train.batch_size=16", "plan=false"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*overrides, f"output_dir={tmp_path}"])
    assert detection.train(config).metrics["AP50"] > 0.2


# ---- what a trained detector is used for


def test_a_checkpoint_of_a_device_is_the_cpus(detector: Detector, device: torch.device, tmp_path: Path) -> None:
    torch.save(checkpoint_payload(copy.deepcopy(detector).to(device)), tmp_path / "detector.pt")
    loaded = load_detector(tmp_path / "detector.pt")
    assert next(loaded.parameters()).device.type == "cpu"
    assert_same_detections(detections(loaded, make_batch()), detections(detector, make_batch()))


def test_evaluation(detector: Detector, device: torch.device) -> None:
    expected = evaluate(copy.deepcopy(detector), DATASET, InferenceSettings(batch_size=2))
    model = copy.deepcopy(detector)
    found = evaluate(model, DATASET, InferenceSettings(batch_size=2, device=device))
    assert next(model.parameters()).device.type == device.type
    assert len(found.detections.scores) == pytest.approx(len(expected.detections.scores), rel=0.02)
    # A detection at a threshold of IoU moves an AP of random weights, which is near 0, by some thousandths.
    for name in ("AP", "AP50", "AR_100"):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], abs=0.01), name


def test_validation_loss(detector: Detector, device: torch.device) -> None:
    expected = validation_loss(copy.deepcopy(detector), DATASET, InferenceSettings())
    found = validation_loss(copy.deepcopy(detector), DATASET, InferenceSettings(device=device))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=5e-3), name


def test_prediction(detector: Detector, device: torch.device) -> None:
    images = [np.array(ShapesImages(image_size=96, seed=3)(index)) for index in range(2)]
    expected = predict(copy.deepcopy(detector), images, InferenceSettings(batch_size=2))
    found = predict(copy.deepcopy(detector), images, InferenceSettings(batch_size=2, device=device))
    for one, other in zip(found, expected, strict=True):
        assert len(one.scores) == pytest.approx(len(other.scores), abs=2)
        np.testing.assert_allclose(one.scores[:5], other.scores[:5], atol=1e-4)
        np.testing.assert_allclose(one.boxes[:5], other.boxes[:5], atol=0.02)


def test_exports(detector: Detector, device: torch.device, tmp_path: Path) -> None:
    """Each compares its file with the model itself, and raises if they differ; the model stays where it is."""
    model = copy.deepcopy(detector).to(device)
    export_backbone(model, tmp_path / "body.safetensors")
    export_detector(model, tmp_path / "detector.torchscript", format="torchscript")
    assert next(model.parameters()).device.type == device.type
    assert (tmp_path / "body.safetensors").stat().st_size > 40_000_000
    assert (tmp_path / "detector.torchscript").exists()


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs a CPU with AVX512-VNNI")
def test_an_int8_detector_refuses_the_device(device: torch.device) -> None:
    model = int8.Int8Detector.empty(make_detector().spec, num_classes=4)
    with pytest.raises(UserError, match="runs on the CPU in its own types"):
        model.to(device)
