"""Whether processes still run, and waiting for what takes a moment; shared by several folders of tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def runs(pid: int) -> bool:
    """Return whether a process runs (Linux). One that nobody has asked for its exit code is a zombie, and does not."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def soon(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Return whether a condition is met within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return met
