"""Whether a program is being made of the model right now: by TorchScript, a tracer, torch.compile or torch.export.

Such a program shall show torch's usual operations, and none of ours that work on tensors' addresses or threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Plain = TypeVar("Plain", bound=nn.Module)

# torch.jit documents this one without declaring it exported. TorchScript knows it by identity: it may be renamed, but
# not wrapped.
is_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]


def is_captured() -> bool:
    """Tell whether the operations that run now are being recorded into a program."""
    # In this order: older compilers cannot follow the second question.
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def scripted_as(module: nn.Module, kind: type[Plain]) -> Plain:
    """Give what TorchScript takes for a module whose forward it cannot read: its base class with the same parts.

    Args:
        module: An instance of a subclass of ``kind``.
        kind: The class whose forward computes the same.
    """
    assert isinstance(module, kind)
    plain = copy.copy(module)
    plain.__class__ = kind
    return plain
