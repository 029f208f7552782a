"""Check what a tensor of a network must be: dense, stored, of floating point, and finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resdet.errors import WeightsError, name_some

COUNTER = "num_batches_tracked"
"""BatchNorm's count of steps, the only whole number among weights: frozen norms have none, and it matters to
``momentum=None`` alone."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_stored(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that are sparse, quantised, without values or larger than what is stored of them, by name."""
    _refuse({name: _not_stored(tensor) for name, tensor in tensors.items()}, source)


def check_weights(tensors: Mapping[str, Tensor], source: str, *, int8: bool = False) -> None:
    """Refuse stored tensors that cannot be a network's weights; one pass over the values finds what is not finite.

    Args:
        tensors: The tensors by name. BatchNorm's counters may be of any type.
        source: What messages call the file.
        int8: Whether they are a detector's in int8, whose weights are whole numbers.

    Raises:
        WeightsError: If one is of another type than floating point, or holds NaN or infinity. It names some of those
            that share the first fault.
    """
    _refuse(
        {name: _no_weight(tensor, int8) for name, tensor in tensors.items() if not name.endswith(COUNTER)},
        source,
    )


def _refuse(faults: Mapping[str, str | None], source: str) -> None:
    first = next(filter(None, faults.values()), None)
    if first is not None:
        raise WeightsError(f"{source}: {first}: {name_some(name for name, fault in faults.items() if fault == first)}")


def _not_stored(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "tensors must have values, got names and shapes alone (device meta)"
    if tensor.layout != torch.strided:
        return "tensors must be dense, got sparse ones"
    if tensor.is_quantized:
        return "tensors must be plain numbers, got torch's quantised ones"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "tensors must not have more values than are stored of them"
    return None


def _no_weight(tensor: Tensor, int8: bool) -> str | None:
    if int8 and tensor.dtype == torch.int8:
        return None
    if tensor.dtype not in _FLOATS:
        return f"weights must be of floating point (16, 32 or 64 bits), got {str(tensor.dtype).removeprefix('torch.')}"
    # The smallest and the largest value are NaN if any is: no copy, and no sum that can overflow.
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.detach().aminmax()):
        return "weights must be finite, got NaN or infinity"
    return None
