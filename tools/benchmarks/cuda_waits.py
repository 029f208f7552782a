"""Find where the host waits for a CUDA device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import torch

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
