"""Check what a tensor of a network must be: of floating point, and finite. That it is dense, its reader has checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resdet.errors import WeightsError, name_some

COUNTER = "num_batches_tracked"
"""BatchNorm's count of steps, the only whole number among weights: frozen norms have none, and it matters to
``momentum=None`` alone."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_weights(tensors: Mapping[str, Tensor], source: str, *, int8: bool = False) -> None:
    """Refuse tensors that cannot be a network's weights; one pass over the values finds what is not finite.

    Args:
        tensors: The tensors by name. BatchNorm's counters may be of any type.
        source: What messages call the file.
        int8: Whether they are a detector's in int8, whose weights are whole numbers.

    Raises:
        WeightsError: If one is of another type than floating point, or holds NaN or infinity. It names some of those
            that share the first fault.
    """
    judged = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    faults = {name: fault for name, tensor in judged.items() if (fault := _fault(tensor, int8))}
    if faults:
        first = next(iter(faults.values()))
        raise WeightsError(f"{source}: {first}: {name_some(name for name in faults if faults[name] == first)}")


def _fault(tensor: Tensor, int8: bool) -> str | None:
    if int8 and tensor.dtype == torch.int8:
        return None
    if tensor.dtype not in _FLOATS:
        return f"weights must be of floating point (16, 32 or 64 bits), got {str(tensor.dtype).removeprefix('torch.')}"
    # The smallest and the largest value are NaN if any is: no copy, and no sum that can overflow.
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.detach().aminmax()):
        return "weights must be finite, got NaN or infinity"
    return None
