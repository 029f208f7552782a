"""How fast a machine trains a detector: a few steps at two sizes and in two precisions, seconds in all."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from resdet.data.dataset import DetectionDataset
from resdet.data.loader import Batch
from resdet.data.order import evenly_spread
from resdet.malloc import keep_freed_memory
from resdet.models.detector import Detector
from resdet.precision import Precision
from resdet.random_states import random_states_kept
from resdet.training.losses import detection_losses
from resdet.training.optim import build_optimizer

_SMALL, _LARGE = 256, 512  # shorter sides that are timed, pixels
_MAX_ASPECT = 2.0  # of an image that is timed: the longer side is cut down to this many shorter ones
_PAYS = 0.9  # a lower precision is taken if a step takes less than this share of the time
_BYTES = 2.5e9  # of a training step on a CPU for each million pixels, ResNet-101 in float32
_REPEATS, _ENOUGH_S = 3, 12.0  # of steps of one size, which are no more than two once they have taken so many seconds
_BATCH_SIZES = {"cpu": 2, "cuda": 4}  # images, evenly spread


@dataclass(frozen=True)
class Machine:
    """What a step costs here.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: The faster of float32 and bfloat16; float32 unless the other one pays.
        gain: How many times as fast as float32 bfloat16 is; None if this CPU only emulates it, half a minute a step.
        per_image: Seconds of a training step for each image, whatever its size.
        per_megapixel: Seconds for each million pixels in addition.
        megapixels: How many a step may have at once in this memory, half of which is left free.
    """

    device: str
    precision: Precision
    gain: float | None
    per_image: float
    per_megapixel: float
    megapixels: float

    def seconds(self, height: float, width: float) -> float:
        """Return the seconds of a training step for each image that is scaled to this size."""
        return self.per_image + self.per_megapixel * height * width / 1e6


def measure_machine(model: Detector, train_set: DetectionDataset, device: torch.device) -> Machine:
    """Time training steps of a detector on images of the dataset; the detector is as before afterwards.

    A step is a whole one, with that of an optimizer at a rate of 0, on a batch as small as a plan's. Of several runs of
    each size and precision the fastest counts: the first sets up kernels, and other programs of the machine make one
    slow now and then. Precisions are compared at the smaller size, on a GPU at the larger one: in a small step it only
    waits for the host. On a CPU this process keeps freed memory from then on (``resdet.keep_freed_memory``).
    """
    transform, training = model.transform, model.training
    before = transform.min_size, transform.max_size
    batch = _batch(train_set, _BATCH_SIZES[device.type])

    def step_seconds(precision: Precision, side: int) -> float:
        transform.min_size, transform.max_size = (side,), int(_MAX_ASPECT * side)
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) < _REPEATS and sum(seconds) < _ENOUGH_S):
            begun = time.perf_counter()
            detection_losses(model, model, batch, precision)["loss"].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begun)
        return min(seconds) / len(batch.images)

    if device.type == "cpu":
        keep_freed_memory()  # as training does: --plan-only times the same steps
    model.to(device).train()
    optimizer = build_optimizer(model, name="adamw", lr=0.0, weight_decay=0.0)
    try:
        with random_states_kept(device):
            compared, other = (_SMALL, _LARGE) if device.type == "cpu" else (_LARGE, _SMALL)
            full = step_seconds("fp32", compared)
            half = step_seconds("bf16", compared) if _has_bf16(device) else math.inf
            precision: Precision = "bf16" if half < _PAYS * full else "fp32"
            seconds = {compared: half if precision == "bf16" else full, other: step_seconds(precision, other)}
    finally:
        transform.min_size, transform.max_size = before
        model.train(training)
        model.zero_grad(set_to_none=True)
    small, large = seconds[_SMALL], seconds[_LARGE]
    pixels = [_megapixels(batch, side, int(_MAX_ASPECT * side)) for side in (_SMALL, _LARGE)]
    slope = max(large - small, 0.0) / max(pixels[1] - pixels[0], 1e-6)
    used = _BYTES
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device) / (pixels[1] * len(batch.images))
    room = _memory(device) / 2 / used
    gain = full / half if half < math.inf else None
    return Machine(device.type, precision, gain, max(small - slope * pixels[0], 0.0), slope, room)


def _has_bf16(device: torch.device) -> bool:
    """Return whether a device is not known to lack arithmetic in bfloat16."""
    return device.type != "cpu" or (torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _memory(device: torch.device) -> float:
    """Return the bytes of the device's memory that are free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        facts = Path("/proc/meminfo").read_text(encoding="ascii")
        return 1024 * float(facts.partition("MemAvailable:")[2].split()[0])
    except (OSError, IndexError):  # not Linux
        return 8e9


def _batch(dataset: DetectionDataset, num_images: int) -> Batch:
    indices = evenly_spread(len(dataset), num_images).tolist()
    images, targets = zip(*(dataset[index, 0] for index in indices), strict=True)
    return Batch(list(images), list(targets), indices, list(range(len(indices))))


def _megapixels(batch: Batch, min_size: int, max_size: int) -> float:
    sizes = np.array([image.shape[-2:] for image in batch.images], dtype=np.float64)  # [B, 2]
    scale = np.minimum(min_size / sizes.min(axis=1), max_size / sizes.max(axis=1))
    return float((sizes.prod(axis=1) * scale**2).mean()) / 1e6
