"""The processes of a run, one or many, as torchrun's environment describes them: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from resdet.errors import TrainingError, UserError

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int  # 0..world_size - 1; rank 0 writes
    world_size: int
    device: torch.device  # where this process computes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def on_main(self, work: Callable[[], _Result]) -> _Result:
        """Call ``work`` in the main process; return its result, or raise its ``UserError``, in every process.

        The others wait. The result must pickle.
        """
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = work()
            except UserError as error:
                answer[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(answer, src=0)
        result, refused = answer
        if refused is not None:
            raise refused
        return result  # type: ignore[no-any-return]

    def micro_batch_size(self, batch_size: int, accumulate: int) -> int:
        """Return the number of images that a process holds at a time; a UserError if they cannot be divided evenly."""
        size, rest = divmod(batch_size, self.world_size * accumulate)
        if rest:
            raise UserError(
                f"train.batch_size: must be a multiple of processes x accumulate = {self.world_size} x {accumulate}, "
                f"got {batch_size}"
            )
        return size

    def step_seed(self, seed: int, step: int) -> int:
        """Return the seed of this process's random numbers of a step."""
        return int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)[0] >> 1)

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that its gradients become means over all processes; with one process return it as it is."""
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():
            # torch 2.15 calls broadcast_buffers by a new name, which earlier ones do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False)

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the main process's buffers to all: with ``norm: batch`` each has statistics of its own images."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, share: _Result) -> list[_Result]:
        """Return what each process has, by rank, in all of them. It must pickle."""
        if self.world_size == 1:
            return [share]
        shares: list[Any] = [None] * self.world_size
        dist.all_gather_object(shares, share)
        return shares

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of ``value`` over all processes, in each of them."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def mean_of(self, number: float) -> float:
        """Return the mean of a number that each process has, in each of them."""
        return number if self.world_size == 1 else math.fsum(self.gather(number)) / self.world_size


def choose_device(name: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """Return the device of that name; a UserError if it is ``cuda`` and there is no GPU for this process."""
    num_gpus = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise UserError(f"device cuda: process {local_rank} of this host needs a GPU of its own, found {num_gpus}")
    return torch.device("cuda", local_rank)


@contextmanager
def processes(device: Literal["auto", "cpu", "cuda"]) -> Iterator[Processes]:
    """Join the other processes that torchrun started, if any, and leave them at the end.

    Waiting for one that has died is a TrainingError.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Processes(0, 1, chosen)
        return
    _meet("nccl" if chosen.type == "cuda" else "gloo", rank, world_size)
    try:
        yield Processes(rank, world_size, chosen)
    except RuntimeError as error:
        # gloo has no type of its own for it.
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        why = str(error).splitlines()[0].split(". ")[0]  # what follows gloo's first sentence is advice to programmers
        raise TrainingError(
            f"process {rank}: another process of this run died or cannot be reached any more ({why}); "
            "its own message is above. torchrun --max-restarts 3 restarts all of them, and resume=auto continues it"
        ) from error
    finally:
        dist.destroy_process_group()


def _meet(backend: str, rank: int, world_size: int) -> None:
    """Join the process group.

    torchrun's agent keeps one store over all restarts (torch 2.15). A restarted process could read there the address of
    one that has died, and wait for it for half an hour; so each restart uses a part of the store of its own. Hosts
    count restarts independently, so with several of them the store is used as it is.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend)
        return
    store, _, _ = next(rendezvous("env://", rank, world_size))
    restart = PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=restart, rank=rank, world_size=world_size)
