"""Tensors with a shape and a type and no values: a network of true size is counted without being computed.

A step of 16 images at 800x1333 takes minutes and some 80 GB. What it launches depends on shapes, and on the values of
few tensors: the outputs of the heads, by which proposals and detections are chosen. Those are random here, all that is
made of them is computed, and feature maps, weights and their gradients are only shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

LEAST = 2049
"""Elements from which a tensor can be without values. Smaller ones (losses, biases, statistics) always have them.

Where they are not known they are 1, and False where it is asked whether any value is something."""

_CHANNELS_LAST = torch.channels_last
_aten = torch.ops.aten
_PRODUCTS = {_aten.convolution.default: (0, 1), _aten.mm.default: (0, 1), _aten.addmm.default: (1, 2)}
"""Where the input and the weight are in the arguments of a layer."""
_NEED_VALUES = ("nonzero", "_local_scalar_dense", "nms", "unique", "masked_select", "equal", "sort", "topk", "bincount")


class ShapeOnly(torch.Tensor):
    """A tensor on the CPU that has no values; see ``shape_only``."""

    shape_of: Tensor  # the same on the device "meta", where torch computes shapes

    @staticmethod
    def __new__(cls, shape_of: Tensor) -> ShapeOnly:
        """Make one with the shape, strides and type of a tensor on the device "meta"."""
        made: ShapeOnly = torch.Tensor._make_wrapper_subclass(
            cls,
            shape_of.size(),
            strides=shape_of.stride(),
            storage_offset=shape_of.storage_offset(),
            dtype=shape_of.dtype,
            device=torch.device("cpu"),
        )
        made.shape_of = shape_of
        return made

    def data_ptr(self) -> int:
        """Return a number that no other tensor without values has."""
        return id(self.shape_of)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShapeOnly({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute the shape of what an operator returns, and give it values where it must have some."""
        name = func._schema.name.rpartition("::")[2]
        if name.strip("_") in _NEED_VALUES or name in _NEED_VALUES:
            raise RuntimeError(f"{func} asks for values of a tensor that is only a shape: {args[0]!r}")
        if not func._schema.returns:  # it only writes
            return None
        given = {id(tensor): tensor for tensor in tree_flatten((args, kwargs))[0] if isinstance(tensor, Tensor)}
        shapes = {number: _shape_of(tensor) for number, tensor in given.items()}
        owners = {id(shape): given[number] for number, shape in shapes.items()}

        def without_values(value: Any) -> Any:
            if isinstance(value, Tensor):
                return shapes[id(value)]
            return torch.device("meta") if isinstance(value, torch.device) else value

        result = func(*tree_map(without_values, args), **tree_map(without_values, kwargs or {}))
        if name.startswith("convolution"):
            result = _laid_out(list(shapes.values()), result)
        fill = _fill_of(func, name, args)
        # What an operator writes to and returns is the tensor that it was given.
        return tree_map(lambda one: owners.get(id(one), fill(one)) if isinstance(one, Tensor) else one, result)


def shape_only(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape, strides and type without values, or the tensor itself if it is small.

    Operators on it return further ones, but for these:

    * a tensor of fewer than ``LEAST`` elements, which gets values;
    * a layer with such an input and a weight that has values returns normal random values, of the deviation that inputs
      of mean square 1 would give. So the weight tells which outputs, those of heads, are to have values.

    Operators that write to a tensor that has values leave them as they are.

    Raises:
        RuntimeError: By an operator whose result's shape depends on values that are not there.
    """
    return tensor if tensor.numel() < LEAST else ShapeOnly(_shape_of(tensor.detach()))


def _shape_of(tensor: Tensor) -> Tensor:
    if isinstance(tensor, ShapeOnly):
        return tensor.shape_of
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _laid_out(given: Sequence[Tensor], result: Any) -> Any:
    """Return a convolution's results in the layout that cuDNN gives them: channels last if any operand has it.

    On the device "meta" they are contiguous.
    """
    if not any(_is_channels_last(tensor) for tensor in given):
        return result
    return tree_map(lambda one: one.contiguous(memory_format=_CHANNELS_LAST) if _is_map(one) else one, result)


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _is_channels_last(tensor: Tensor) -> bool:
    return _is_map(tensor) and tensor.is_contiguous(memory_format=_CHANNELS_LAST) and not tensor.is_contiguous()


def _fill_of(func: Any, name: str, args: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Return what makes a result of a shape."""
    if func in _PRODUCTS:
        source, weight = (args[position] for position in _PRODUCTS[func])
        if isinstance(source, ShapeOnly) and not isinstance(weight, ShapeOnly):
            fan_in = weight[0].numel() if name == "convolution" else weight.shape[0]
            deviation = weight.detach().float().square().mean().mul(fan_in).sqrt().item()
            return lambda shape: torch.empty_like(shape, device="cpu").normal_(0, deviation)

    def fill(shape: Tensor) -> Tensor:
        if shape.numel() >= LEAST:
            return ShapeOnly(shape)
        value = not name.startswith("any") if shape.dtype == torch.bool else 1
        return torch.full(shape.shape, value, dtype=shape.dtype)

    return fill
