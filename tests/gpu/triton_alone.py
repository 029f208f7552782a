"""Kernels of Triton without a GPU: interpreted by numpy on a CPU, or compiled for a device and not launched."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs triton, which comes with torch's CUDA builds for Linux"
)

COMPILE_ONLY = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

class Driver:
    capability = 0
    def get_current_target(self): return GPUTarget("cuda", self.capability, 32)
    def get_current_device(self): return self.capability
    def get_current_stream(self, device): return 0

launch = JITFunction.run
driver.set_active(Driver())
"""
"""What a device's driver would be asked until a kernel is launched: all calls as they are made, on tensors of a CPU.

``Driver.capability`` is 80 for a compute capability of 8.0; ``launch`` is to be called with ``warmup=True``.
"""


def run_code(code: str, *arguments: str, **settings: str) -> None:
    """Run code in a process of its own: Triton reads its settings when it is imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
