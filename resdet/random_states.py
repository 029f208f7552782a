"""The global random generators: torch's, NumPy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all generators on the CPU for the block; their states are restored."""
    with random_states_kept(torch.device("cpu")):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield
