"""Forward and backward of one optimizer step, in pieces that fit into memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class AnyBatch(Protocol):
    """A NamedTuple whose every field has one entry for each image: what one forward pass takes."""

    @property
    def indices(self) -> list[int]:
        """Rows of the images in their dataset."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


BatchT = TypeVar("BatchT", bound=AnyBatch)

Losses = Callable[[nn.Module, BatchT], dict[str, Tensor]]
"""Takes the model (or its wrapper for several processes) and a batch; returns scalars, means over the batch's images:
``loss``, which is differentiated, and whatever else is logged."""


def cut(batch: BatchT, num_pieces: int) -> list[BatchT]:
    """Cut a batch into ``num_pieces`` parts of nearly equal size, or fewer if it has fewer images."""
    num_images = len(batch.indices)
    bounds = np.linspace(0, num_images, min(num_pieces, num_images) + 1).astype(int).tolist()
    kind = type(batch)
    return [kind(*(field[start:end] for field in batch)) for start, end in itertools.pairwise(bounds)]


def accumulate_gradients(
    losses: Losses[BatchT],
    parallel: nn.Module,
    micro_batches: Sequence[BatchT],
    num_pieces: int,
    scaler: torch.amp.GradScaler,
) -> dict[str, Tensor]:
    """Add up the gradients of this process's share of a step, each micro-batch in ``num_pieces`` parts.

    Returns what ``losses`` returns, as means over the images of the step, scalars on the device.
    """
    pieces = [piece for batch in micro_batches for piece in cut(batch, num_pieces)]
    num_images = sum(len(piece.indices) for piece in pieces)
    means: dict[str, Tensor] = {}
    for piece in pieces:
        share = len(piece.indices) / num_images
        # Gradients travel between processes once per step, with the last piece.
        is_last = piece is pieces[-1]
        with parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not is_last else nullcontext():
            values = losses(parallel, piece)
            scaler.scale(values["loss"] * share).backward()  # type: ignore[no-untyped-call]
        parts = torch.stack([value.detach() for value in values.values()]) * share
        means = add_up(means, dict(zip(values, parts.unbind(), strict=True)))
    return means


def add_up(sums: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of each value, a scalar, and of what ``sums`` has by its name.

    All are computed at once, as parts of one tensor: an operation for each name would be one launch for each.
    """
    total = torch.stack(list(values.values()))
    if sums:
        zero = torch.zeros_like(total[0]) if values.keys() - sums.keys() else total[0]
        total += torch.stack([sums.get(name, zero) for name in values])
    return dict(zip(values, total.unbind(), strict=True))
