"""Odd environments: a run needs no home, no folder of its own for temporary files, few open files and no assertions."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest
from small_runs import ROOT, command, environment

FEW_FILES = ["sh", "-c", 'ulimit -n 40; exec "$@"', "sh"]


@pytest.mark.parametrize("kind", ["blanks and letters, python -O", "missing or read-only folders, 40 open files"])
def test_a_run_ends_well(kind: str) -> None:
    with tempfile.TemporaryDirectory(
        prefix="Übung 1 日本 "
    ) as folder:  # pytest's is too long for the sockets of workers
        run = Path(folder, "run")
        arguments = command(run, "train.steps=1", "loader.num_workers=1")
        if "python -O" in kind:
            variables = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), folder)
            arguments.insert(1, "-O")
        else:
            variables = {"HOME": f"{folder}/none", "TMPDIR": f"{folder}/none", "XDG_CACHE_HOME": "/proc"}
            arguments = [*FEW_FILES, *arguments]
        done = subprocess.run(
            arguments, cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert (run / "best.pt").is_file()
