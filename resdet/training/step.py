"""Forward and backward of one optimizer step, in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resdet.data.loader import Batch
from resdet.models.detector import Detector
from resdet.models.seeded import image_seeds
from resdet.precision import Precision, autocast
from resdet.types import target_to


def accumulate_gradients(
    model: Detector,
    parallel: nn.Module,
    micro_batches: Sequence[Batch],
    num_pieces: int,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    device: torch.device,
) -> dict[str, Tensor]:
    """Add up a step's gradients.

    Args:
        model: The detector.
        parallel: The same, or its wrapper for several processes.
        micro_batches: What this process has to do for the step.
        num_pieces: Parts in which each micro-batch is computed, one after the other.
        scaler: Scales the loss for fp16.
        precision: Of the forward pass.
        device: Where to compute.

    Returns:
        ``loss``, the losses it is made of, and what the detector counted, means over the images of the step.
    """
    pieces = [piece for batch in micro_batches for piece in batch.cut(num_pieces)]
    num_images = sum(len(piece.images) for piece in pieces)
    values: dict[str, Tensor] = {}
    for number, piece in enumerate(pieces):
        images = [image.to(device, non_blocking=True).float().div_(255) for image in piece.images]
        targets = [target_to(target, device) for target in piece.targets]
        share = len(images) / num_images
        # Gradients travel between processes once per step, with the last piece.
        is_last = number == len(pieces) - 1
        with parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not is_last else nullcontext():
            with autocast(device, precision), image_seeds(model, piece.seeds):
                losses: dict[str, Tensor] = parallel(images, targets)
            loss = torch.stack(list(losses.values())).sum()
            scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
        for name, value in {"loss": loss, **losses, **model.training_counts()}.items():
            part = value.detach() * share
            values[name] = values[name] + part if name in values else part
    return values
