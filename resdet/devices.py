"""Devices that the host had better not wait for, and copies to them without waiting."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def is_queued(device: torch.device) -> bool:
    """Return whether work on a device is queued, so that reading a result waits for all that was queued before."""
    return device.type != "cpu"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; one in host memory is copied through pinned memory, without waiting.

    Without pinned memory torch would wait for all that is queued on the device.
    """
    if tensor.device.type != "cpu" or device.type in ("cpu", "meta"):
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``[len(values)]`` on a device, copied once. It must not be written to."""
    with torch.inference_mode(False):
        return send(torch.tensor(values, dtype=dtype), device)
