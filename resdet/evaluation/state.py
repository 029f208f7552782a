"""What an evaluation leaves unchanged: training flags and random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
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


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Restore the states of the global random generators: torch's (of CPU and ``device``), NumPy's and Python's."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - others use the global one
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of ``device``; ``torch.manual_seed`` would seed those of all GPUs."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
