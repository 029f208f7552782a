"""Guards against what can go wrong in a step: errors that say what to do, with nothing lost."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resdet.errors import TrainingError
from resdet.files import save_tensors, written_whole
from resdet.models.finite import broken_tensor
from resdet.precision import Precision
from resdet.training.checkpoint import LAST

logger = logging.getLogger(__name__)

NUM_NAMED_LAYERS = 3


@dataclass(frozen=True)
class Moment:
    """Which step of a run it is, and how it was computed."""

    step: int  # steps done before it
    random_seed: int  # what torch's generator was seeded with when it began
    rank: int
    lr: float
    precision: Precision  # of the forward pass
    num_pieces: int  # parts in which each micro-batch was computed


def broken_step(
    moment: Moment,
    values: dict[str, Tensor],
    model: nn.Module,
    content: dict[str, Any],
    folder: Path,
    *,
    images: str,
    use: str,
) -> TrainingError:
    """Save a step whose loss or gradient is not finite (``broken_step_N.pt``) and return the error that reports it.

    It must be called before the step is taken, with the gradients still there. ``values`` are the loss, its parts and
    the gradient's norm, ``content`` is what the file holds besides ``moment``, ``images`` names the images, and ``use``
    says after "holds the step" what can be done with the file.
    """
    # The text before the file: failing to write it must not hide what happened. This waits for the device.
    numbers = ", ".join(f"{name} {value.item():.4g}" for name, value in values.items())
    what = "gradient" if math.isfinite(values["loss"].item()) else "loss"
    last = folder / LAST
    kept = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint had been written yet"
    path = folder / f"broken_step_{moment.step + 1}{f'_rank_{moment.rank}' if moment.rank else ''}.pt"
    content["moment"] = asdict(moment)
    try:
        with written_whole(path) as temporary:
            save_tensors(content, temporary)
        repeat = f"{path} holds the step{use}"
    except OSError as error:
        repeat = f"the step could not be saved ({error.strerror})"
    cure = "A lower optim.lr, a longer optim.warmup_steps or optim.clip_grad_norm is the usual cure"
    if (broken := broken_tensor(model)) is not None:
        cure = f"{broken} was not finite before the step: start from other weights"
    return TrainingError(
        f"{what} is not finite at step {moment.step + 1}, learning rate {moment.lr:g}: {numbers}; largest layers: "
        f"{_largest_layers(model)}; {images}. The step was not taken; {kept}; {repeat}. {cure}"
    )


def _largest_layers(model: nn.Module) -> str:
    """Name the parameters of largest gradient, those that are not finite first, with their own largest weight."""
    rows = [
        (p.grad.detach().abs().max().item(), name, p.detach().abs().max().item())  # waits for the device
        for name, p in model.named_parameters()
        if p.grad is not None
    ]
    rows.sort(key=lambda row: math.inf if math.isnan(row[0]) else row[0], reverse=True)
    return ", ".join(
        f"{name} (gradient up to {gradient:.3g}, weights up to {weight:.3g})"
        for gradient, name, weight in rows[:NUM_NAMED_LAYERS]
    )


def after_out_of_memory(
    error: RuntimeError, num_pieces: int, *, micro_batch_size: int, may_retry: bool, image_size_keys: str
) -> int:
    """Return in how many pieces to try again after a step ran out of memory.

    Any other ``error`` is raised again as it is. If smaller pieces are not allowed or not possible, a TrainingError
    names what to lower (``image_size_keys``: the configuration's keys that make images smaller).
    """
    # CPUs have no exception type of their own for it.
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error
    reason = str(error).splitlines()[0]
    if may_retry and num_pieces < micro_batch_size:
        message = "out of memory: from here on micro-batches of %d images are computed in %d pieces (%s)"
        logger.warning(message, micro_batch_size, 2 * num_pieces, reason)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return 2 * num_pieces
    lower = image_size_keys + ("" if micro_batch_size == 1 else ", train.batch_size")
    more = "" if micro_batch_size == 1 else "; a larger train.accumulate keeps the batch and takes less at a time"
    raise TrainingError(
        f"out of memory with {micro_batch_size} images at a time ({reason}): lower {lower} or take "
        f"train.precision=bf16{more}; train.retry_out_of_memory=true does that by itself on one process"
    ) from error


@contextmanager
def deterministic(device: Literal["auto", "cpu", "cuda"]) -> Iterator[None]:
    """Use only algorithms that give the same bits every time. Enter it before anything touches CUDA.

    Source: torch's notes on reproducibility. Limits: the same GPU model, the same versions of torch, CUDA and cuDNN,
        the same number of processes; some operations have no such algorithm and raise a RuntimeError that names them.
    """
    if device != "cpu" and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise TrainingError(
                "train.deterministic: CUDA is already initialised in this process; set CUBLAS_WORKSPACE_CONFIG=:4096:8 "
                "in the environment before that"
            )
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it is initialised
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
