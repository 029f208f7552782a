"""What an evaluation leaves unchanged of a model: training flags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def placed(model: nn.Module, device: torch.device | None) -> torch.device:
    """Move a model to a device, unless it is None; return the model's device."""
    if device is None:
        return next(model.parameters()).device
    model.to(device)
    return device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; at the end each of its modules has its training flag back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # train() first, for modules that do more in it than set the flag; then the flags a user set one by one.
        model.train(training[model])
        for module, flag in training.items():
            module.training = flag
