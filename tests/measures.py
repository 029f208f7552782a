"""Print every measure that the source code is held to, and exit with 1 if one is broken: ``python tests/measures.py``.

Sizes of files, functions and the package; import rules (``import_rules.py``); what reading a configuration imports;
docstrings that do not start with a verb in the imperative.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from import_rules import PACKAGE, broken_rules

ROOT = Path(__file__).resolve().parents[1]

PACKAGE_LINES = 33_000
"""19,500 when the package took its present form; each feature added since has moved it by what it needs."""
FILE_LINES = 500
FUNCTION_LINES = 80
LOOP_LINES = 150
LOOPS = {"resdet/training/loop.py:run"}
"""Functions that may have ``LOOP_LINES``."""

HEAVY = ("torch", "torchvision", "numpy")
"""What reading a configuration does not import."""

_NOT_A_START = re.compile(r"(Give|Say|Tell|Find out|Do as|Say it) ")
_READ_A_CONFIG = f"""
import json, sys
from resdet.config import load_config
load_config("configs/quickstart.yaml")
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""


@dataclass(frozen=True)
class Measure:
    """One number and its limit.

    Attributes:
        what: What is measured.
        value: The number.
        limit: The largest allowed.
        places: Where it is exceeded, one line each.
    """

    what: str
    value: int
    limit: int
    places: tuple[str, ...] = ()

    @property
    def is_kept(self) -> bool:
        """Whether the number is within its limit."""
        return self.value <= self.limit

    def __str__(self) -> str:
        head = f"{'ok    ' if self.is_kept else 'BROKEN'}  {self.what}: {self.value:,} (at most {self.limit:,})"
        return "\n".join([head, *(f"          {place}" for place in self.places)])


def measures(root: Path = ROOT) -> list[Measure]:
    """Take every measure."""
    return [
        *source_measures(root),
        _none("heavy modules that reading a configuration imports", _imported_by_config(root)),
    ]


def source_measures(root: Path) -> list[Measure]:
    """Measure the source code below ``root``, which is read and not run."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    tools = sorted((root / "tools").rglob("*.py"))
    lines = {str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    functions = {place: length for path in [*files, *tools] for place, length in _functions(path, root)}
    loops = {place: length for place, length in functions.items() if _name(place) in LOOPS}
    others = {place: length for place, length in functions.items() if place not in loops}
    return [
        Measure("lines of the package", sum(lines.values()), PACKAGE_LINES),
        _longest("lines of a file", lines, FILE_LINES),
        _longest("lines of a function", others, FUNCTION_LINES),
        _longest("lines of the loop", loops, LOOP_LINES),
        _none("broken import rules", broken_rules(root)),
        _none("docstrings that do not start with an imperative", [*_d401(root), *_odd_starts(files, root)]),
    ]


def _longest(what: str, lengths: dict[str, int], limit: int) -> Measure:
    places = tuple(f"{place}: {length}" for place, length in lengths.items() if length > limit)
    return Measure(what, max(lengths.values(), default=0), limit, places)


def _none(what: str, places: list[str]) -> Measure:
    return Measure(what, len(places), 0, tuple(places))


def _name(place: str) -> str:
    return re.sub(r":\d+:", ":", place)


def _functions(path: Path, root: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (f"{path.relative_to(root)}:{node.lineno}:{node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def _imported_by_config(root: Path) -> list[str]:
    run = subprocess.run([sys.executable, "-c", _READ_A_CONFIG], cwd=root, capture_output=True, text=True, check=True)
    names: list[str] = json.loads(run.stdout)
    return names


def _d401(root: Path) -> list[str]:
    """Return what pydocstyle's rule D401 finds, by ruff."""
    command = [sys.executable, "-m", "ruff", "check", "--select", "D401", "--output-format", "json", PACKAGE, "tools"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    found = json.loads(run.stdout)
    return [f"{Path(one['filename']).relative_to(root)}:{one['location']['row']}: {one['message']}" for one in found]


def _odd_starts(files: list[Path], root: Path) -> list[str]:
    """Return docstrings that start with verbs which pydocstyle allows and engineers do not write there."""
    places = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and _NOT_A_START.match(ast.get_docstring(node) or ""):
                places.append(
                    f"{path.relative_to(root)}:{node.lineno}: {(ast.get_docstring(node) or '').split('.')[0]}"
                )
    return places


if __name__ == "__main__":
    taken = measures()
    print("\n".join(map(str, taken)))  # noqa: T201 - what this command is for
    sys.exit(0 if all(measure.is_kept for measure in taken) else 1)
