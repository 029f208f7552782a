"""Run measurements in separate processes, and read the peak of a process's memory."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from resdet.errors import UserError

_CHILD = """
import json, pickle, sys
from benchmarks.own_process import end_with_parent
end_with_parent()
function, arguments = pickle.load(sys.stdin.buffer)
print(json.dumps(function(*arguments)))
"""
_PR_SET_PDEATHSIG = 1  # Linux's prctl.h


def in_own_process(
    function: Callable[..., dict[str, float]], *arguments: Any, environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Call a function in a new interpreter, so that nothing done before affects it.

    Args:
        function: A module's function; figures by name.
        arguments: Its arguments; they must pickle.
        environment: Variables to set for that process, in addition to those of this one.

    Raises:
        CalledProcessError: If that process fails; its stderr goes to this one's.
    """
    run = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=pickle.dumps((function, arguments)),
        # The command puts this package's folder on its own path only.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
        stdout=subprocess.PIPE,
        check=True,
    )
    figures: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return figures


def end_with_parent() -> None:
    """Have this process sent SIGTERM when the one that started it ends, however it does; Linux alone can.

    Otherwise a training would go on after its benchmark is killed, and spoil whatever is measured next.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def check_linux(file: str) -> None:
    """Check that a file of Linux's ``/proc`` exists.

    Raises:
        UserError: If it does not.
    """
    if not Path("/proc/self", file).exists():
        raise UserError(f"memory is read from /proc/self/{file}, which is Linux's alone")


def forget_peak() -> float:
    """Start measuring this process's peak of memory; return what it has now, in MB.

    Freed memory is returned to the system first: memory kept by the allocator would be reused without showing.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """Return this process's peak of memory since ``forget_peak``, in MB."""
    return _status_mb("VmHWM")


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1000
    raise AssertionError(f"/proc/self/status has no {key}")
