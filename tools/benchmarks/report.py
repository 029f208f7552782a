"""Report what a benchmark measured: tables for people, json for programs."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from resdet.files import write_text

# What decides how fast a CPU multiplies in bfloat16.
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def _machine() -> dict[str, Any]:
    machine = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        **_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "torchvision", "numpy")},
    }
    if torch.cuda.is_available():
        machine |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cudnn.benchmark": torch.backends.cudnn.benchmark,
            "tf32 in convolutions": torch.backends.cudnn.allow_tf32,
            "float32 matrix products": torch.get_float32_matmul_precision(),
        }
    return machine


def _processor() -> dict[str, Any]:
    """Return the CPU's name and its instructions for bfloat16, where the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {"cpu": platform.processor()}
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "cpu": facts.get("model name") or platform.machine(),
        "bf16 instructions": [flag for flag in _BF16_FLAGS if flag in flags],
    }


@dataclass(frozen=True)
class Report:
    """Figures, the settings they hold for, and the machine they were taken on.

    Attributes:
        work: What was measured.
        settings: All that was set or left at its default.
        tables: Rows by the title of their table; the rows of a table have the same keys, with units in them.
        machine: Versions, cores, threads, and what the processors are.
    """

    work: str
    settings: Mapping[str, Any]
    tables: Mapping[str, Sequence[Mapping[str, str | float]]]
    machine: Mapping[str, Any] = field(default_factory=_machine)

    def write(self, path: Path) -> None:
        """Write everything as json.

        Raises:
            UserError: If the folder does not exist.
        """
        write_text(path, json.dumps(asdict(self), indent=2, default=str) + "\n")

    def __str__(self) -> str:
        tables = [f"{title}\n{_lay_out(rows)}" for title, rows in self.tables.items()]
        return "\n\n".join([*tables, self._where()])

    def _where(self) -> str:
        machine = self.machine
        bf16 = ", ".join(machine.get("bf16 instructions", []))
        processor = f"{machine['cpu']} ({bf16})" if bf16 else machine["cpu"]
        parts = [machine["gpu"]] if "gpu" in machine else []
        parts += [f"{processor}, {machine['cores']} cores, threads={machine['threads']}"]
        parts += [f"{name} {machine[name]}" for name in ("torch", "torchvision", "numpy")]
        return f"Measured on {'; '.join(parts)}"


def _lay_out(rows: Sequence[Mapping[str, str | float]]) -> str:
    header = list(rows[0])
    columns = [[row[name] for row in rows] for name in header]
    texts = [[name, *_as_text(column)] for name, column in zip(header, columns, strict=True)]
    widths = [max(map(len, column)) for column in texts]
    is_text = [isinstance(column[0], str) for column in columns]
    return "\n".join(
        "  "
        + "  ".join(
            t.ljust(w) if left else t.rjust(w) for t, w, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in zip(*texts, strict=True)
    )


def _as_text(values: Sequence[str | float]) -> list[str]:
    """Write a column with as many decimals as give its smallest number three digits, four at most."""
    least = min((abs(value) for value in values if not isinstance(value, (str, int)) and value), default=1.0)
    decimals = min(max(2 - math.floor(math.log10(least)), 0), 4)
    return [
        value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.{decimals}f}"
        for value in values
    ]
