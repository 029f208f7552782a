"""The log of a run: metrics.jsonl, TensorBoard, a progress bar, and lines on the terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from typing_extensions import Never, Self

from resdet.errors import TrainingError, name_some
from resdet.evaluation.report_runs import read_log_lines
from resdet.files import written_whole
from resdet.training.checkpoint import reported_disk_errors
from resdet.training.clock import OPEN_END
from resdet.training.folder import EVENTS, LOG

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class RunLog:
    """Writes a run's log files and shows its progress; does nothing unless ``enabled``, as in ranks other than 0.

    Lines that an interrupted run logged after ``start_step``, or evaluations after the step ``evaluated``, are dropped
    from metrics.jsonl (and hidden in TensorBoard), since they are about to happen again; damaged lines are too.
    A file that cannot be written is a TrainingError.
    """

    def __init__(
        self, output_dir: Path, *, num_steps: int, start_step: int, evaluated: int | None = None, enabled: bool
    ) -> None:
        self._folder, self._path = output_dir, output_dir / LOG
        self._num_steps, self._start_step, self._evaluated = _known(num_steps), start_step, evaluated or 0
        self._enabled = enabled
        self._board: SummaryWriter | None = None
        self._bar: tqdm[Never] | None = None

    def __enter__(self) -> Self:
        """Open the files, and let log lines and the progress bar share the terminal."""
        with ExitStack() as stack:
            stack.enter_context(logging_redirect_tqdm(loggers=[logging.getLogger()]))
            if self._enabled:
                self._open(stack)
            self._opened = stack.pop_all()
        return self

    def _open(self, stack: ExitStack) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        with reported_disk_errors(self._path), written_whole(self._path) as temporary:
            temporary.write_bytes(b"".join(_kept_lines(self._path, self._start_step, self._evaluated)))
        stack.enter_context(_failing_quietly())
        purge_step = self._start_step + 1 if self._start_step else None
        with reported_disk_errors(self._folder / EVENTS) as events:
            self._board = SummaryWriter(str(events), purge_step=purge_step)
        self._bar = tqdm(
            total=self._num_steps, initial=self._start_step, unit="step", dynamic_ncols=True, mininterval=1.0
        )
        stack.push(self._close)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files."""
        self._opened.__exit__(kind, error, traceback)

    def _close(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._bar is not None
        assert self._board is not None
        self._bar.close()
        try:
            with reported_disk_errors(self._folder / EVENTS):
                self._board.close()
        except TrainingError:
            if kind is None:  # it must not hide the error that ended the run
                raise

    def advance(self, num_steps: int) -> None:
        """Count one step on the progress bar; ``num_steps`` is the length of the run as it is known now."""
        if self._bar is not None:
            self._bar.total = _known(num_steps)
            self._bar.update()

    def losses(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Log one interval of training: losses, rate, speed; return the line of metrics.jsonl."""
        line = self._write(step, values, "train")
        if self._bar is not None:
            self._bar.set_postfix(
                loss=f"{values['loss']:.3f}", lr=f"{values['lr']:.2g}", images_per_s=f"{values['images_per_s']:.1f}"
            )
        return line

    def evaluation(self, step: int, metrics: Mapping[str, float], *, shown: Sequence[str]) -> dict[str, Any]:
        """Log one evaluation; the terminal shows some of its metrics. Return the line of metrics.jsonl."""
        line = self._write(step, metrics, "val")
        if self._board is not None:
            logger.info("step %d: %s", step, "  ".join(f"{name} {metrics[name]:.3f}" for name in shown))
        return line

    def picture(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        """Show a drawn image (uint8 ``[H, W, 3]``) in TensorBoard."""
        if self._board is not None:
            with reported_disk_errors(self._folder / EVENTS):
                self._board.add_image(f"detections/{name}", image, step, dataformats="HWC")

    def _write(self, step: int, values: Mapping[str, float], group: str) -> dict[str, Any]:
        # JSON has no infinity (a gradient norm under fp16) and no NaN.
        line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        if self._board is None:
            return line
        with reported_disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        with reported_disk_errors(self._folder / EVENTS):
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)
        return line


def _known(num_steps: int) -> int | None:
    return None if num_steps == OPEN_END else num_steps


@contextmanager
def _failing_quietly() -> Iterator[None]:
    """Leave out the traceback of TensorBoard's thread: the next event to be written raises its error again."""
    before = threading.excepthook

    def failed(failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
            before(failure)

    threading.excepthook = failed
    try:
        yield
    finally:
        threading.excepthook = before


def _kept_lines(path: Path, start_step: int, evaluated: int) -> Iterator[bytes]:
    """Yield the lines of a log up to a step, or an evaluation; say which others of a damaged file are dropped."""
    damaged = []
    for number, (line, entry) in enumerate(read_log_lines(path), start=1):
        # A process that is killed while writing leaves half a line at the end.
        if entry is None and line.endswith(b"\n"):
            damaged.append(str(number))
        elif entry is not None and line.endswith(b"\n"):
            is_training = "lr" in entry  # the other lines are evaluations
            if entry["step"] <= (start_step if is_training else evaluated):
                yield line
    if damaged:
        logger.warning("%s: dropped damaged lines (no JSON object with a step): %s", path, name_some(damaged))


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Return the memory that this process holds: ``memory_mb`` and, on a GPU, ``gpu_memory_mb`` and ``gpu_use``.

    The first two are peaks since the process began. ``gpu_use`` is the share of the last second in which the GPU
    computed, in [0, 1]; it needs the package nvidia-ml-py and is left out without it.
    """
    values: dict[str, float] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        values["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    if device.type == "cuda":
        values["gpu_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        # NVML has errors of its own (not supported, no permission): a number for the log must never end a run.
        with suppress(Exception):
            values["gpu_use"] = torch.cuda.utilization(device) / 100
    return values
