"""Report what a benchmark measured: tables for people, json for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resdet.files import write_text
from resdet.machine import describe_machine


@dataclass(frozen=True)
class Report:
    """Figures, the settings they hold for, and the machine they were taken on.

    Attributes:
        work: What was measured.
        settings: All that was set or left at its default.
        tables: Rows by the title of their table; the rows of a table have the same keys, with units in them.
        machine: Versions, cores, threads, and what the processors are.
        taken: What was done on that machine.
    """

    work: str
    settings: Mapping[str, Any]
    tables: Mapping[str, Sequence[Mapping[str, str | float]]]
    machine: Mapping[str, Any] = field(default_factory=describe_machine)
    taken: str = "Measured"

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
        return f"{self.taken} on {'; '.join(parts)}"


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
