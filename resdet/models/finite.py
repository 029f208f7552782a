"""Whether the weights of a model are numbers: NaN and infinity in them pass through to all that it computes."""

from __future__ import annotations

import torch
from torch import nn

from resdet.errors import WeightsError


def broken_tensor(module: nn.Module) -> str | None:
    """Return the name of the first parameter or buffer that holds NaN or infinity; None if all are finite."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():  # waits for the device
            return name
    return None


def check_weights(module: nn.Module, what: str) -> None:
    """Raise a WeightsError that begins with ``what`` if a parameter or buffer holds NaN or infinity."""
    if (name := broken_tensor(module)) is not None:
        raise WeightsError(f"{what}: the model computes NaN or infinity (its {name} is not finite: training diverged)")
