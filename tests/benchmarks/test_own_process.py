"""Processes in which benchmarks measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from running import runs, soon

TOOLS = Path(__file__).resolve().parents[2] / "tools"

CHILD = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
PARENT = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
from benchmarks.own_process import in_own_process
in_own_process(exec, {CHILD!r})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_measurement_ends_with_its_benchmark(tmp_path: Path) -> None:
    """Even with one that is killed and can pass nothing on."""

    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path) as parent:
        written = tmp_path / "pid"
        assert soon(lambda: written.exists() and written.read_text() != "")
        pid = int(written.read_text())
        assert runs(pid)
        parent.kill()
    assert soon(lambda: not runs(pid))
