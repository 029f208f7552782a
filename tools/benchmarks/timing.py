"""Time several things in turn, and lay the times out as rows."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from resdet.malloc import keep_freed_memory

REFERENCES = ("torchvision fp32", "torchvision bf16")
"""What everything is compared with."""


# glibc's malloc.h, and the values that glibc itself adapts to when blocks of up to 32 MB are freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_GLIBC_DEFAULTS = {_M_MMAP_MAX: 65_536, _M_MMAP_THRESHOLD: 32 * 1024 * 1024, _M_TRIM_THRESHOLD: 64 * 1024 * 1024}


def return_freed_memory() -> bool:
    """Undo ``keep_freed_memory``: return kept memory to the kernel, and restore the C library's own behaviour.

    Returns:
        Whether this C library has the setting.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    done = [bool(libc.mallopt(key, value)) for key, value in _GLIBC_DEFAULTS.items()]
    libc.malloc_trim(0)
    return all(done)


def in_turn(
    runs: Mapping[str, Callable[[int], object]], *, repeats: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Time each of several things once, then each of them once more, and so on.

    A machine that slows down for a while (other programs, heat) slows down all of them alike. Ours run with
    freed memory kept, as in our loops; everything else with the C library's default. Each is run once untimed before it
    is timed, so that it finds memory and caches as its own last run left them.

    Args:
        runs: What to time, by name (ours begins with "ours"); each is given the number of the repetition.
        repeats: Repetitions that count.
        warmup: Repetitions before these, which do not.
        device: Waited for before and after each run.

    Returns:
        Seconds of wall clock by name, one for each repetition.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(-warmup, repeats):
        for name, run in runs.items():
            (keep_freed_memory if name.startswith("ours") else return_freed_memory)()
            run(max(repetition, 0))
            _wait_for(device)
            start = time.perf_counter()
            run(max(repetition, 0))
            _wait_for(device)
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def time_rows(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, str | float]]:
    """Return times as rows: medians, extremes, and speed against the references.

    Args:
        seconds: By name, ``REFERENCES`` among them.

    Returns:
        A row for each; speeds are ratios of medians.
    """
    return [
        {
            "what": name,
            "median [s]": median(runs),
            "fastest [s]": min(runs),
            "slowest [s]": max(runs),
            **{f"speed ({reference} = 1)": median(seconds[reference]) / median(runs) for reference in REFERENCES},
        }
        for name, runs in seconds.items()
    ]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
