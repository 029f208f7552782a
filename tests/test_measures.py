"""The source code keeps its measures, and a measure that is broken is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from measures import PACKAGE_LINES, ROOT, measures, source_measures


def broken(folder: Path, files: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the measures that a package of these files breaks, and where."""
    for name, text in {"resdet/__init__.py": "", "tools/train.py": "", **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {measure.what: measure.places for measure in source_measures(folder) if not measure.is_kept}


def function(name: str, lines: int, docstring: str = "Return nothing.") -> str:
    return "\n".join([f"def {name}():", f'    """{docstring}"""', *["    pass"] * (lines - 2), ""])


def test_sizes_at_their_limits_are_kept(tmp_path: Path) -> None:
    files = {
        "resdet/training/__init__.py": "",
        "resdet/training/loop.py": function("run", 150) + function("other", 80),
        "resdet/long.py": "a = 1\n" * 500,
        "tools/train.py": function("main", 80),
    }
    assert broken(tmp_path, files) == {}


def test_sizes_above_their_limits_are_found(tmp_path: Path) -> None:
    files = {
        "resdet/training/__init__.py": "",
        "resdet/training/loop.py": function("run", 151),
        "resdet/long.py": "a = 1\n" * 501,
        "tools/train.py": function("main", 81),
        **{f"resdet/part{number}.py": "a = 1\n" * 500 for number in range(PACKAGE_LINES // 500)},
    }
    assert broken(tmp_path, files) == {
        "lines of the package": (),
        "lines of a file": ("resdet/long.py: 501",),
        "lines of a function": ("tools/train.py:1:main: 81",),
        "lines of the loop": ("resdet/training/loop.py:1:run: 151",),
    }


def test_docstrings_start_with_an_imperative(tmp_path: Path) -> None:
    text = function("a", 3, "Returns nothing.") + function("b", 3, "Give nothing.") + function("c", 3, "Load nothing.")
    (places,) = broken(tmp_path, {"resdet/odd.py": text}).values()
    assert [place.split(": ")[0] for place in places] == ["resdet/odd.py:2", "resdet/odd.py:4"]


def test_import_rules_are_among_them(tmp_path: Path) -> None:
    assert broken(tmp_path, {"resdet/a.py": "def late():\n    import torch\n"}) == {
        "broken import rules": ("import inside a function: resdet/a.py:2: torch",)
    }


def test_the_command_prints_every_measure() -> None:
    run = subprocess.run([sys.executable, "tests/measures.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    taken = measures()
    assert run.returncode == (0 if all(measure.is_kept for measure in taken) else 1)
    assert all(measure.what in run.stdout for measure in taken)


def test_every_measure_is_kept() -> None:
    assert [str(measure) for measure in measures() if not measure.is_kept] == []
