"""Precisions in which a detector computes; parameters and losses are float32 in all of them."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast context of a precision; for ``fp32`` one that switches autocast off."""
    if precision == "fp32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, _DTYPES[precision])


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which boxes are computed: float64 for float64, else float32."""
    if dtype == torch.float64:
        return torch.float64
    return torch.float32
