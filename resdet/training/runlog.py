"""The log of a run: metrics.jsonl, TensorBoard, a progress bar, and lines on the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from typing_extensions import Never, Self

from resdet.files import written_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class RunLog:
    """Writes a run's log files and shows its progress; does nothing unless ``enabled``, as in ranks other than 0.

    Lines that an interrupted run logged after ``start_step``, or evaluations after the step ``evaluated``, are dropped
    from metrics.jsonl (and hidden in TensorBoard), since they are about to happen again.
    """

    def __init__(
        self, output_dir: Path, *, num_steps: int, start_step: int, evaluated: int | None = None, enabled: bool
    ) -> None:
        self._path = output_dir / "metrics.jsonl"
        self._board: SummaryWriter | None = None
        self._bar: tqdm[Never] | None = None
        self._redirect = logging_redirect_tqdm(loggers=[logging.getLogger()])
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        output_dir.mkdir(parents=True, exist_ok=True)
        text, kept = self._path.read_text(encoding="utf-8") if self._path.exists() else "", []
        for line in text.splitlines(keepends=True):
            if line.endswith("}\n"):  # a process killed while writing leaves half a line at the end
                values = json.loads(line)
                is_training = "lr" in values  # the other lines are evaluations
                if values["step"] <= (start_step if is_training else evaluated or 0):
                    kept.append(line)
        with written_whole(self._path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        purge_step = start_step + 1 if start_step else None
        self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step)
        self._bar = tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=1.0)

    def __enter__(self) -> Self:
        """Let log lines and the progress bar share the terminal."""
        self._redirect.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        self._redirect.__exit__(None, None, None)

    def advance(self) -> None:
        """Count one step on the progress bar."""
        if self._bar is not None:
            self._bar.update()

    def losses(self, step: int, values: Mapping[str, float]) -> None:
        """Log one interval of training: losses, rate, speed."""
        self._write(step, values, "train")
        if self._bar is not None:
            self._bar.set_postfix(
                loss=f"{values['loss']:.3f}", lr=f"{values['lr']:.2g}", images_per_s=f"{values['images_per_s']:.1f}"
            )

    def evaluation(self, step: int, metrics: Mapping[str, float], *, shown: Sequence[str]) -> None:
        """Log one evaluation; the terminal shows some of its metrics."""
        self._write(step, metrics, "val")
        if self._board is not None:
            logger.info("step %d: %s", step, "  ".join(f"{name} {metrics[name]:.3f}" for name in shown))

    def picture(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        """Show a drawn image (uint8 ``[H, W, 3]``) in TensorBoard."""
        if self._board is not None:
            self._board.add_image(f"detections/{name}", image, step, dataformats="HWC")

    def _write(self, step: int, values: Mapping[str, float], group: str) -> None:
        if self._board is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            # JSON has no infinity (a gradient norm under fp16) and no NaN.
            plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({"step": step, **plain}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, step)


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
        with contextlib.suppress(Exception):
            values["gpu_use"] = torch.cuda.utilization(device) / 100
    return values
