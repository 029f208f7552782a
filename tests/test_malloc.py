"""Memory kept for the next step: the kernel is asked for pages once, and not at every step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from resdet.malloc import keep_freed_memory

TOOLS = Path(__file__).resolve().parents[1] / "tools"

_SCRIPT = """
import resource, sys
import torch
from benchmarks.timing import return_freed_memory
from resdet.malloc import keep_freed_memory
if sys.argv[1] != "leave":
    assert keep_freed_memory()
if sys.argv[1] == "return":
    assert return_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(20_000_000)
before = faults()
for _ in range(10):
    torch.ones(20_000_000)
print(faults() - before)
"""


def page_faults(what: str) -> int:
    run = subprocess.run([sys.executable, "-c", _SCRIPT, what], cwd=TOOLS, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.slow
def test_freed_memory_is_used_again() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library cannot be told to keep memory")
    # 80 MB are 19,531 pages of 4 kB, or 39 of 2 MB where the kernel gives huge ones; ten times that if unmapped.
    assert page_faults("keep") < 30 < page_faults("leave")


@pytest.mark.slow
def test_what_was_kept_can_be_returned() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library cannot be told to keep memory")
    assert page_faults("return") > 300
