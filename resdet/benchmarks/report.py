"""What a benchmark measured: tables for people, json for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resdet.files import written_whole


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **{name: version(name) for name in ("torch", "torchvision", "numpy")},
    }


@dataclass(frozen=True)
class Report:
    """Figures, the settings they hold for, and the machine they were taken on.

    Attributes:
        work: What was measured.
        settings: All that was set or left at its default.
        tables: Rows by the title of their table; the rows of a table have the same keys, with units in them.
        machine: Versions and cores.
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
        with written_whole(path) as beside:
            beside.write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")

    def __str__(self) -> str:
        return "\n\n".join(f"{title}\n{_lay_out(rows)}" for title, rows in self.tables.items())


def _lay_out(rows: Sequence[Mapping[str, str | float]]) -> str:
    header = list(rows[0])
    lines = [header] + [[v if isinstance(v, str) else f"{v:,.2f}" for v in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    numeric = [not isinstance(value, str) for value in rows[0].values()]
    return "\n".join(
        "  "
        + "  ".join(t.rjust(w) if n else t.ljust(w) for t, w, n in zip(line, widths, numeric, strict=True)).rstrip()
        for line in lines
    )
