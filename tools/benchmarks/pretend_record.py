"""What a program asks of a GPU: kernels with what they read, write and multiply, copies, and waits of the host.

Counts are close to a GPU's, not equal: an operator of aten is one kernel, also a foreach or fused one, the backward of
a convolution, a sort, or an index by a mask; the table ``NUM_KERNELS`` says where it is otherwise. Views, memory that
is only allocated, and operators on empty tensors are none. Bytes are those of the tensors: what a cache saves, and what
a kernel reads twice, is not in them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NUM_KERNELS = {"resdet.suppress_rows": 2}
"""Kernels of the operators that are not one; those of other packages' custom operators are given here."""

INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
"""Operators whose second argument is a list of indices and masks."""

# Operators whose result the host needs, or of whose result it must know the size.
_WAITS = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "equal": "equal",
    "masked_select": "masked_select",
    "_unique": "unique",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "unique_dim_consecutive": "unique",
    "bincount": "bincount",
    "nms": "nms",
}
_NO_KERNELS = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift",
    "detach_",
}
_TAKING = {"index", "gather", "index_select", "take", "embedding"}  # a part of their first argument
_BAGS = {"_embedding_bag", "_embedding_bag_forward_only"}
# Writing a part of their first argument: that as large as the argument with this number.
_PUTTING = {"index_put_": 2, "_index_put_impl_": 2, "scatter_": 3, "scatter_add_": 3, "index_add_": 3, "index_copy_": 3}
_OVERWRITING = {"fill_", "zero_", "copy_"}


class Operator(NamedTuple):
    """One kernel that was launched."""

    name: str  # of its operator, as in "aten.add.Tensor"
    line: str  # that asked for it, as in "resdet/models/losses.py:40"; or "backward of" a node of autograd
    read: int  # bytes
    written: int  # bytes
    multiply_adds: int  # of convolutions and matrix products
    dtype: torch.dtype  # of its first tensor


class Copy(NamedTuple):
    """One copy between host and device."""

    line: str  # that asked for it
    to_device: bool
    waits: bool  # whether the host waits for its end
    size: int  # bytes


class Record:
    """What was asked of the device, by any thread."""

    def __init__(self) -> None:
        self.operators: list[Operator] = []  # in order; one that launches two kernels twice, first with all its bytes
        self.waits: Counter[tuple[str, str]] = Counter()  # of the host, by what it waits for and the line
        self.copies: list[Copy] = []
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget all of it."""
        with self._lock:
            self.operators.clear()
            self.waits.clear()
            self.copies.clear()

    def num_waits(self) -> int:
        """Return how often the host waited."""
        return sum(self.waits.values())

    def text(self) -> str:
        """Return the counts, and every wait with its line."""
        lines = [f"{len(self.operators)} kernels, {self.num_waits()} waits, {len(self.copies)} copies"]
        return "\n".join(lines + [f"{number} x {what} at {line}" for (what, line), number in self.waits.most_common()])

    def add_wait(self, what: str) -> None:
        """Note that the host waits."""
        with self._lock:
            self.waits[what, calling_line()] += 1

    def add_copy(self, tensor: Tensor, *, to_device: bool, waits: bool) -> None:
        """Note a copy between host and device."""
        copied = Copy(calling_line(), to_device, waits, _size(tensor))
        with self._lock:
            self.copies.append(copied)
        if waits:
            self.add_wait("copy to the device" if to_device else "copy to the host")

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note what an operator launches and waits for; copies between devices, and indices, are not looked at."""
        schema = schema_of(func)
        if schema.name in _WAITS:
            self.add_wait(_WAITS[schema.name])
        elif schema.name == "repeat_interleave" and len(args) == 1:  # without the size of the result
            self.add_wait("repeat_interleave")
        if schema.is_view or schema.name in _NO_KERNELS or schema.name == "_local_scalar_dense":
            return
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        read, written = _traffic(schema, args, kwargs, results)
        if read + written == 0:
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] or results
        name, multiply_adds = str(func), _multiply_adds(func, args, kwargs, result)
        operator = Operator(name, calling_line(), read, written, multiply_adds, tensors[0].dtype)
        further = operator._replace(read=0, written=0, multiply_adds=0)
        num_further = NUM_KERNELS.get(name.rpartition(".")[0], 1) - 1
        with self._lock:
            self.operators.extend([operator, *[further] * num_further])


class OperatorSchema(NamedTuple):
    """What the schema of an operator says."""

    name: str  # without namespace and overload
    arguments: tuple[str, ...]
    written: frozenset[str]  # arguments
    is_view: bool
    is_pointwise: bool
    is_random: bool
    decomposes: bool  # into others, where autograd has not done it


@cache
def schema_of(func: Any) -> OperatorSchema:
    """Return what is known of an overload of an operator."""
    schema = func._schema
    return OperatorSchema(
        schema.name.partition("::")[2],
        tuple(argument.name for argument in schema.arguments),
        frozenset(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write),
        any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns),
        torch.Tag.pointwise in func.tags,
        torch.Tag.nondeterministic_seeded in func.tags,
        func.namespace != "prim" and func._can_decompose(),
    )


def _multiply_adds(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if func is torch.ops.aten.convolution_backward.default:  # torch's formula overlooks groups
        (grad, x, weight), is_transposed, (to_x, to_weight, _) = args[:3], args[7], args[10]
        return (x if is_transposed else grad).numel() * weight[0].numel() * (to_x + to_weight)  # type: ignore[no-any-return]
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result) // 2


def _traffic(
    schema: OperatorSchema, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]
) -> tuple[int, int]:
    """Return the bytes that are read and written; where a part of a tensor is taken or put, that part's."""
    given = [*zip(schema.arguments, args, strict=False), *kwargs.items()]
    changed = {id(leaf) for name, value in given if name in schema.written for leaf in tree_leaves(value)}
    read, written = 0, sum(_size(tensor) for tensor in results if id(tensor) not in changed)
    for place, (name, value) in enumerate(given):
        size = sum(_size(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        if place == 0 and schema.name in _TAKING:
            size = min(size, written)
        elif place == 0 and schema.name in _BAGS:
            size = args[1].numel() * args[0].shape[1] * args[0].element_size()
        elif place == 0 and schema.name in _PUTTING:
            put = args[_PUTTING[schema.name]]
            size = min(size, _size(put)) if isinstance(put, Tensor) and put.dim() else size
        if name not in schema.written:
            read += size
            continue
        written += size
        is_read = name != "out" and schema.name not in _OVERWRITING and not (schema.is_random and place == 0)
        read += size if is_read else 0
    return read, written


def _size(tensor: Tensor) -> int:
    """Return a tensor's bytes, those of expanded dimensions once."""
    number = 1
    for length, step in zip(tensor.shape, tensor.stride(), strict=True):
        number *= length if step else min(length, 1)
    return number * tensor.element_size()


_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.__file__) + os.sep, "<")
_OWN = {str(Path(__file__).with_name(f"pretend_{name}.py")) for name in ("record", "gpu", "autocast")}


@cache
def _file(path: str) -> str | None:
    """Return how a file is named in a record; None for torch's, Python's and the pretend GPU's own."""
    if path in _OWN or (path.startswith(_SKIPPED) and ("site-packages" not in path or path.startswith(_SKIPPED[0]))):
        return None
    parts = path.split(os.sep)
    for package in ("resdet", "torchvision"):
        if package in parts[:-1]:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return "/".join(parts[-2:])


def calling_line() -> str:
    """Return the innermost line outside torch, or the node of autograd whose backward runs."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        name = _file(path)
        if name is not None:
            return f"{name}:{frame.f_lineno}"
        if path.endswith("torch/autograd/graph.py"):
            break
        frame = frame.f_back  # type: ignore[assignment]
    node = torch._C._current_autograd_node()
    return "?" if node is None else f"backward of {node.name()}"
