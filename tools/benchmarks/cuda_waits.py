"""Find where the host waits for a CUDA device."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torchvision.models.detection import FasterRCNN

from benchmarks.gpu_model import count
from benchmarks.own_process import in_own_process
from resdet.data.loader import Batch

_WARNING = "called a synchronizing CUDA operation"


def measured_waits(run: Callable[[], object]) -> Counter[str]:
    """Run something and return how often each line of code made the host wait for the CUDA device.

    Source: ``torch.cuda.set_sync_debug_mode``, by which torch warns of each operation that synchronises, wherever it is
        written in Python. It knows those of torch and of packages that copy by torch's functions; ``synchronize`` and
        the waits of events and collectives it does not.
    """
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    lines = [f"{one.filename}:{one.lineno}" for one in caught if _WARNING in str(one.message)]
    return Counter("/".join(line.split("/")[-3:]) for line in lines)


def counted_waits(model: FasterRCNN, name: str, batch: Batch, *, training: bool) -> Counter[str]:
    """Count the same on the pretend GPU, in a process of its own, as torch has one kind of accelerator in each.

    Args:
        model: On the CPU.
        name: Its name; ours begins with "ours".
        batch: In host memory.
        training: Whether to count a training step, not an inference.
    """
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    lines = in_own_process(_counted, model, name, batch, training, environment=environment)
    return Counter({at: int(number) for at, number in lines.items()})


def _counted(model: FasterRCNN, name: str, batch: Batch, training: bool) -> dict[str, float]:
    lines: dict[str, float] = defaultdict(float)
    for (_, at), number in count(model, name, batch, training=training).waits.items():
        lines[at] += number
    return lines
