"""What precedes a run: its processes, its folder, and the checkpoint that it resumes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from resdet.config import TrainConfig
from resdet.malloc import keep_freed_memory
from resdet.processes import Processes, processes
from resdet.training import guards
from resdet.training.folder import checkpoint_to_resume, claimed


@contextmanager
def launched(output_dir: Path, train: TrainConfig, resume: str | None) -> Iterator[tuple[Processes, Path | None]]:
    """Join the run's processes and claim its folder, until the block ends.

    Yields the processes and the checkpoint to resume from (None: a new run).
    """
    with ExitStack() as stack:
        if train.deterministic:
            stack.enter_context(guards.deterministic(train.device))  # before anything touches CUDA
        team = stack.enter_context(processes(train.device))
        if team.device.type == "cpu":
            keep_freed_memory()
        team.on_main(lambda: stack.enter_context(claimed(output_dir)))
        resume_from = team.on_main(lambda: checkpoint_to_resume(output_dir, resume))
        team.micro_batch_size(train.batch_size, train.accumulate)  # fails now, not after minutes of reading data
        yield team, resume_from
