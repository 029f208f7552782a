"""Capturing: whether a program is being made of the model, and the plain modules that TorchScript is given.

A program (TorchScript's, a tracer's, torch.compile's, torch.export's) holds torch's usual operations, and none of ours,
which work on addresses of tensors and on threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Plain = TypeVar("Plain", bound=nn.Module)
_Module = TypeVar("_Module", bound=nn.Module)

# torch.jit documents this one without declaring it exported. TorchScript knows it by identity: it may be renamed, but
# not wrapped.
is_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]


def is_captured() -> bool:
    """Return whether the operations that run now are being recorded into a program."""
    # In this order: older compilers cannot follow the second question.
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def scripted_as(module: nn.Module, kind: type[Plain]) -> Plain:
    """Return what ``__prepare_scriptable__`` gives to TorchScript: the module's parts under its readable base ``kind``.

    All modules below are copied and made plain too; tensors are shared. TorchScript would put plain modules into the
    module that it was given, so the model itself would be slow afterwards. It also remembers modules by their
    addresses, so nothing that it has seen may be freed: a plain module holds the one it was made of, and is its own
    plain form.
    """
    assert isinstance(module, kind)
    if "scripted_from" in module.__dict__:
        return module
    plain = _copied(module)
    plain.__class__ = kind
    plain.__dict__["scripted_from"] = (module,)  # in a tuple, so that it is no child
    return plain


def _copied(module: _Module) -> _Module:
    copied = copy.copy(module)
    copied._modules = {name: None if child is None else _plain(child) for name, child in module._modules.items()}
    return copied


def _plain(module: nn.Module) -> nn.Module:
    prepare: Callable[[], nn.Module] | None = getattr(module, "__prepare_scriptable__", None)
    return _copied(module) if prepare is None else prepare()
