"""Describe the machine and the versions that a figure was measured with, or that a bug report is about."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision  # a build that does not go with torch fails here

# What decides how fast a CPU multiplies in bfloat16.
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def describe_machine() -> dict[str, Any]:
    """Return the versions of what computes, and the processors, as plain values."""
    machine = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        **_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": version("numpy"),
    }
    if torch.cuda.is_available():
        machine |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cudnn.benchmark": torch.backends.cudnn.benchmark,
            "tf32 in convolutions": torch.backends.cudnn.allow_tf32,
            "float32 matrix products": torch.get_float32_matmul_precision(),
        }
    return machine


def machine_text(machine: dict[str, Any]) -> str:
    """Return the description as lines of text: versions, then each device."""
    capability = ", ".join([torch.backends.cpu.get_cpu_capability(), *machine.get("bf16 instructions", [])])
    lines = [
        ", ".join(f"{name} {machine[name]}" for name in ("torch", "torchvision", "numpy")),
        f"CPU: {machine['cpu']} ({capability}), {machine['cores']} cores, {machine['threads']} threads",
    ]
    gpu = (
        "GPU: {gpu}, CUDA {cuda}, cuDNN {cudnn}".format_map(machine)
        if "gpu" in machine
        else "GPU: none that torch sees"
    )
    return "\n".join([*lines, gpu])


def _processor() -> dict[str, Any]:
    """Return the CPU's name and its instructions for bfloat16, where the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {"cpu": platform.processor()}
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "cpu": facts.get("model name") or platform.machine(),
        "bf16 instructions": [flag for flag in _BF16_FLAGS if flag in flags],
    }
