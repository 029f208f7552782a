"""Run a detector on images: in evaluation mode, without gradients, and never silently on NaN."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from resdet.errors import WeightsError
from resdet.evaluation.settings import InferenceSettings
from resdet.evaluation.state import evaluation_mode, placed
from resdet.evaluation.tiles import Detect, TiledDetection, checked_tiles
from resdet.malloc import keep_freed_memory
from resdet.models.finite import broken_tensor
from resdet.models.inputs import model_images, transform_images
from resdet.models.int8 import Int8Detector
from resdet.models.spec import Tiles, Tricks
from resdet.models.test_time import detect_with_tricks, detections_limited
from resdet.precision import Precision, autocast
from resdet.processes import choose_device
from resdet.types import Prediction

logger = logging.getLogger(__name__)


def device_for(model: nn.Module, name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device of that name, or the CPU for an int8 detector, which runs nowhere else."""
    if not isinstance(model, Int8Detector):
        return choose_device(name)
    if name == "cuda" or (name == "auto" and torch.cuda.device_count() > 0):
        logger.info("the detector is int8 and runs on the CPU (device %s is ignored)", name)
    return torch.device("cpu")


@contextmanager
def inference(model: nn.Module, settings: InferenceSettings = InferenceSettings()) -> Iterator[Detect]:
    """Put a model into evaluation mode and yield a function that runs it on uint8 images, or on their tiles.

    Every module's training flag is restored at the end. Gradients are off inside that function only, and by
    ``no_grad``: tensors that a model caches in ``inference_mode`` could not take part in training afterwards.

    The function raises a WeightsError if the model computes NaN or infinity. Thresholds drop such boxes, so unless the
    heads' raw outputs are checked, a diverged model would pass for one that finds nothing.
    """
    tiles = checked_tiles(settings.tiles)
    device = placed(model, settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    # With tricks the detector's parts are called one by one.
    prepare = model_images if settings.tricks in (None, Tricks()) else transform_images
    largest: list[Tensor] = []  # magnitudes, scalars on the device; NaN where there is one

    def watch(_module: nn.Module, _inputs: Any, outputs: Sequence[Tensor | Sequence[Tensor]]) -> None:
        for output in outputs:
            largest.extend(_largest([output] if isinstance(output, Tensor) else output))

    @torch.no_grad()
    def run(images: Sequence[Tensor], where: str) -> list[Prediction]:
        largest.clear()
        batch = prepare(model, images, device)
        with autocast(device, settings.precision):
            outputs = model(batch) if settings.tricks is None else detect_with_tricks(model, batch, settings.tricks)
        found, are_finite = _to_cpu(outputs, largest)
        if not are_finite:
            raise WeightsError(f"the model computes NaN or infinity on {where} ({suspect(model, settings.precision)})")
        return found

    watched = [name for name, _ in model.named_modules() if name in ("rpn.head", "roi_heads.box_predictor")]
    handles = [model.get_submodule(name).register_forward_hook(watch) for name in watched]
    try:
        with evaluation_mode(model), detections_limited(model, settings.max_detections):
            yield run if tiles is None else _by_tiles(model, run, tiles, settings)
    finally:
        for handle in handles:
            handle.remove()


def _by_tiles(model: nn.Module, run: Detect, tiles: Tiles, settings: InferenceSettings) -> TiledDetection:
    tricks = settings.tricks or Tricks()
    own: float = getattr(getattr(model, "roi_heads", None), "nms_thresh", 0.5)
    return TiledDetection(
        run,
        tiles,
        settings.batch_size,
        iou_threshold=own if tricks.nms_threshold is None else tricks.nms_threshold,
        class_agnostic=tricks.class_agnostic,
        limit=settings.max_detections,
    )


def _largest(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest magnitude in tensors of one device, a scalar, in a launch or two; nothing if all are empty."""
    filled = [part for part in parts if part.numel()]
    return [get_total_norm(filled, math.inf)] if filled else []


def _to_cpu(outputs: Sequence[Prediction], largest: Sequence[Tensor]) -> tuple[list[Prediction], bool]:
    """Copy a model's outputs to the CPU, all in one piece: each copy waits for the device.

    Also returns whether all boxes and scores are finite, and the scalars ``largest`` too.
    """
    counts = [len(output["scores"]) for output in outputs]
    boxes = torch.cat([output["boxes"] for output in outputs]).float()  # [D, 4]
    scores = torch.cat([output["scores"] for output in outputs]).float()  # [D]
    labels = torch.cat([output["labels"] for output in outputs])  # [D], exact as float32 up to 16 million classes
    checked = torch.stack([value.float() for value in (*largest, *_largest([boxes, scores]))] or [scores.new_zeros(())])
    whole = torch.cat([boxes.flatten(), scores, labels.float(), checked]).cpu()  # waits for the device
    parts = torch.split(whole, [boxes.numel(), len(scores), len(labels), len(checked)])
    columns = (parts[0].view(-1, 4), parts[1], parts[2].long())
    rows = zip(*(torch.split(column, counts) for column in columns), strict=True)
    found = [Prediction(boxes=boxes, labels=labels, scores=scores) for boxes, scores, labels in rows]
    return found, bool(parts[3].isfinite().all())


def suspect(model: nn.Module, precision: Precision) -> str:
    """Return a guess, in words, at where NaN or infinity comes from."""
    if (name := broken_tensor(model)) is not None:
        return f"its {name} is not finite: training diverged"
    hint = ": fp16 ends at 65504, try bf16 or fp32" if precision == "fp16" else ""
    return f"its weights are finite{hint}"
