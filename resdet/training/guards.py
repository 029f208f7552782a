"""What can go wrong between two steps, told so that a reader knows what to do, with nothing lost by it."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resdet.data.annotations import AnnotationTable
from resdet.data.loader import Batch
from resdet.errors import TrainingError, WeightsError
from resdet.files import save_tensors, written_whole
from resdet.models.checkpoint import checkpoint_payload, load_detector
from resdet.models.detector import Detector
from resdet.precision import Precision
from resdet.training.step import accumulate_gradients
from resdet.weights.files import read_checkpoint, weights_in

logger = logging.getLogger(__name__)

NUM_NAMED_LAYERS = 3


@dataclass(frozen=True)
class Moment:
    """Which step of a run it is.

    Attributes:
        step: Steps done before it.
        random_seed: What torch's generator was seeded with when it began.
        rank: The process.
        lr: Learning rate.
        precision: Of the forward pass.
        num_pieces: Parts in which each micro-batch was computed.
    """

    step: int
    random_seed: int
    rank: int
    lr: float
    precision: Precision
    num_pieces: int


def not_finite(
    moment: Moment,
    values: dict[str, Tensor],
    model: Detector,
    micro_batches: Sequence[Batch],
    table: AnnotationTable,
    folder: Path,
) -> TrainingError:
    """Save a step whose loss or gradient is not finite, and give the error that tells of it.

    What is saved (``broken_step_N.pt``) is enough for ``repeat_step``: the weights before the step, the images as the
    model was given them, the targets, and the seed. It must be called before the step is taken, with the gradients
    still there.

    Args:
        moment: Which step.
        values: Loss, its parts and the gradient's norm, scalars.
        model: The detector.
        micro_batches: The step's images and targets in this process.
        table: Names the images.
        folder: Of the run.
    """
    indices = [index for batch in micro_batches for index in batch.indices]
    return broken_step(
        moment,
        values,
        model,
        images="image ids of the batch: " + ", ".join(f"{table.image_ids[i]} ({table.file_names[i]})" for i in indices),
        content=_broken_step(moment, model, micro_batches),
        use=": resdet.training.guards.repeat_step computes it again",
        folder=folder,
    )


def broken_step(
    moment: Moment,
    values: dict[str, Tensor],
    model: nn.Module,
    *,
    images: str,
    content: dict[str, Any],
    use: str,
    folder: Path,
) -> TrainingError:
    """Save a step of any kind of model whose loss or gradient is not finite, and give the error that tells of it.

    Args:
        moment: Which step.
        values: Loss, its parts and the gradient's norm, scalars.
        model: With the gradients.
        images: Names the images.
        content: What is saved, tensors and plain values.
        use: What can be done with it, said after "holds the step".
        folder: Of the run.
    """
    # The names before the file: writing it must not hide what happened.
    told = ", ".join(f"{name} {value.item():.4g}" for name, value in values.items())
    what = "loss" if not math.isfinite(values["loss"].item()) else "gradient"
    last = folder / "last.pt"
    kept = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint had been written yet"
    path = folder / f"broken_step_{moment.step + 1}{f'_rank_{moment.rank}' if moment.rank else ''}.pt"
    try:
        with written_whole(path) as beside:
            save_tensors(content, beside)
        repeat = f"{path} holds the step{use}"
    except OSError as error:
        repeat = f"the step could not be saved ({error.strerror})"
    return TrainingError(
        f"{what} is not finite at step {moment.step + 1}, learning rate {moment.lr:g}: {told}; largest layers: "
        f"{_largest_layers(model)}; {images}. The step was not taken; {kept}; {repeat}. "
        "A lower optim.lr, a longer optim.warmup_steps or optim.clip_grad_norm is the usual cure"
    )


def _broken_step(moment: Moment, model: Detector, micro_batches: Sequence[Batch]) -> dict[str, Any]:
    return checkpoint_payload(model) | {
        "moment": asdict(moment),
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "batches": [
            {"images": batch.images, "targets": [dict(target) for target in batch.targets], "seeds": batch.seeds}
            for batch in micro_batches
        ],
    }


def _largest_layers(model: nn.Module) -> str:
    """Name the parameters whose gradient is largest, those that are not finite first, with their own size."""
    rows = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            largest = parameter.grad.detach().abs().max().item()
            rows.append((math.inf if math.isnan(largest) else largest, name, largest, parameter))
    rows.sort(key=lambda row: row[0], reverse=True)
    return ", ".join(
        f"{name} (gradient up to {largest:.3g}, weights up to {parameter.detach().abs().max().item():.3g})"
        for _, name, largest, parameter in rows[:NUM_NAMED_LAYERS]
    )


def repeat_step(path: Path, *, device: torch.device | None = None) -> tuple[Detector, dict[str, Tensor]]:
    """Compute a saved step again, forward and backward: the same losses, and in the model the same gradients.

    >>> model, losses = repeat_step(Path("runs/mine/broken_step_812.pt"))  # doctest: +SKIP
    >>> [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]

    Args:
        path: What ``not_finite`` saved.
        device: Where to compute; None: on the CPU. The bits are those of the run on the same kind of device.

    Returns:
        The detector in training mode, with gradients (not clipped), and the losses as the run logged them.

    Raises:
        WeightsError: If the file is not such a step.
    """
    payload = read_checkpoint(path)
    if "moment" not in payload:
        raise WeightsError(f"{path}: must be a broken_step_N.pt that a run left; it holds {sorted(payload)[:8]}")
    moment = Moment(**payload["moment"])
    device = device or torch.device("cpu")
    model = load_detector(weights_in(payload, path)).to(device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in payload["trained"])
    micro_batches = [
        Batch(batch["images"], batch["targets"], [0] * len(batch["images"]), batch["seeds"])
        for batch in payload["batches"]
    ]
    torch.manual_seed(moment.random_seed)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return model, accumulate_gradients(model, model, micro_batches, moment.num_pieces, scaler, moment.precision, device)


def after_out_of_memory(
    error: RuntimeError,
    num_pieces: int,
    *,
    micro_batch_size: int,
    may_retry: bool,
    image_size: str = "model.min_size, model.max_size",
) -> int:
    """Say in how many pieces to try again after a step ran out of memory.

    Args:
        error: What the step raised; anything but a lack of memory is raised again as it is.
        num_pieces: Parts in which micro-batches were computed.
        micro_batch_size: Images of a micro-batch.
        may_retry: Whether the configuration allows it.
        image_size: The settings that make images smaller.

    Raises:
        TrainingError: If it is a lack of memory and may not or cannot be met by smaller pieces; says what to lower.
    """
    if not _is_out_of_memory(error):
        raise error
    if may_retry and num_pieces < micro_batch_size:
        logger.warning(
            "out of memory: from here on micro-batches of %d images are computed in %d pieces (%s)",
            micro_batch_size,
            2 * num_pieces,
            str(error).splitlines()[0],
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return 2 * num_pieces
    lower = image_size + ("" if micro_batch_size == 1 else ", train.batch_size")
    more = "" if micro_batch_size == 1 else "; a larger train.accumulate keeps the batch and takes less at a time"
    raise TrainingError(
        f"out of memory with {micro_batch_size} images at a time ({str(error).splitlines()[0]}): lower {lower} or take "
        f"train.precision=bf16{more}; train.retry_out_of_memory=true does that by itself on one process"
    ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On CPUs there is no type of its own for it.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def full_disk_told() -> Iterator[None]:
    """Write a checkpoint inside; when that fails, say what is left.

    Raises:
        TrainingError: If it cannot be written: a full disk, a folder that became read-only. The file that was there
            before is as it was.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"a checkpoint cannot be written ({error.strerror}): the run stops here; what was written before is whole, "
            "and resume=auto goes on from it once there is room"
        ) from error


@contextmanager
def stall_noticed(what: str, *, seconds: float) -> Iterator[None]:
    """Say in the log when what is done inside takes longer than ``seconds``, and again after each such time."""
    finished = threading.Event()

    def watch() -> None:
        waited = seconds
        while not finished.wait(seconds):
            logger.warning(
                "%s: waiting for images for %.0f s: slow storage, heavy augmentation, or a worker that hangs; "
                "loader.num_workers and the line data_s in metrics.jsonl tell more",
                what,
                waited,
            )
            waited += seconds

    watcher = threading.Thread(target=watch, daemon=True, name="stall watch")
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use only algorithms that give the same bits every time.

    Raises:
        TrainingError: If CUDA's matrix library was started without room to be deterministic.

    Source: torch's notes on reproducibility. Limits: the same GPU model, the same versions of torch, CUDA and cuDNN,
        the same number of processes; some operations have no such algorithm and raise a RuntimeError that names them.
    """
    if device.type == "cuda":
        started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if started and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
            raise TrainingError(
                "train.deterministic: CUBLAS_WORKSPACE_CONFIG=:4096:8 must be in the environment before CUDA starts"
            )
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
