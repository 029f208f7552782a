"""Odd environments: a run needs no home, no folder of its own for temporary files, few open files and no assertions."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from small_runs import ROOT, command, environment

FEW_FILES = ["sh", "-c", 'ulimit -n 40; exec "$@"', "sh"]


@pytest.mark.parametrize("kind", ["long names, blanks and letters, python -O", "missing or read-only, 40 open files"])
@pytest.mark.slow
def test_a_run_ends_well(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "Übung 1 日本 with a path that is too long for a socket"
    folder.mkdir()
    arguments = command(folder / "run", "train.steps=1", "loader.num_workers=1")
    if "python -O" in kind:
        variables = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(folder))
        arguments.insert(1, "-O")
    else:
        variables = {"HOME": f"{folder}/none", "TMPDIR": f"{folder}/none", "XDG_CACHE_HOME": "/proc"}
        arguments = [*FEW_FILES, *arguments]
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "best.pt").is_file()
