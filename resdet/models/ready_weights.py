"""Weights made ready for inference (folded, cast, ordered, transformed), and kept until what they come from changes.

Legend: ``I, O`` input and output channels, ``H, W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from resdet.models.tracing import is_captured
from resdet.models.winograd import ELEMENTS, transform_weight

_Ready = TypeVar("_Ready")


class Geometry(NamedTuple):
    """How a convolution's kernel moves, as ``torch.nn.Conv2d`` names it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """Return that of a module."""
        assert not isinstance(conv.padding, str)
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)


POINT = Geometry((1, 1), (0, 0), (1, 1), 1)
"""Of a 1x1 convolution or a fully connected layer."""

ELEMENT_PRODUCTS = Geometry((1, 1), (0, 0), (1, 1), ELEMENTS)
"""Winograd's matrix products as a grouped 1x1 convolution over tiles."""


class PackedWeight:
    """A weight in the orders in which oneDNN reads it, for ``convolve``.

    The best order depends on the shape of the input, and a weight in another is reordered in every call, which takes
    many times as long as the convolution. So each shape is looked up once; in bfloat16 nearly all have the same order,
    in float32 one of two or three. The weight must not be written to any more.
    """

    _MOST_ORDERS = 3
    _MOST_SHAPES = 512

    def __init__(self, weight: Tensor, geometry: Geometry) -> None:
        self.weight = weight
        self._geometry = geometry
        self._orders: dict[bytes, Tensor] = {}  # by oneDNN's description
        self._by_shape: dict[torch.Size, Tensor] = {}

    @cached_property
    def total(self) -> float:
        """The sum of the weights, finite if all are."""
        return self.weight.detach().sum().item()

    def of(self, shape: torch.Size) -> Tensor:
        """Return the weight in the order for inputs of a shape ``[B, I, H, W]``."""
        found = self._by_shape.get(shape)
        if found is not None:
            return found
        stride, padding, dilation, groups = self._geometry
        reorder = torch.ops.mkldnn._reorder_convolution_weight.default
        with _plainly():
            fresh: Tensor = reorder(self.weight, padding, stride, dilation, groups, shape)
        order = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(fresh).numpy())
        full = order not in self._orders and len(self._orders) == self._MOST_ORDERS
        if full or len(self._by_shape) == self._MOST_SHAPES:
            self._orders, self._by_shape = {}, {}
        self._by_shape[shape] = self._orders.setdefault(order, fresh)
        return self._by_shape[shape]


class ReadyWeight:
    """The weight ``[O, I / groups, kh, kw]`` and bias ``[O]`` of a convolution, in every form that is read.

    Each form is made when it is first asked for. The tensors it is made of must not be written to any more.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype, scale: Tensor | None = None
    ) -> None:
        self._source, self._scale = weight.detach(), scale
        self._geometry = geometry
        self._dtype = dtype
        self.bias = None if bias is None else bias.detach().to(dtype)

    @cached_property
    def weight(self) -> Tensor:
        """``weight * scale``, channels-last, rounded once."""
        with _plainly():
            return cast_weight(self._source, self._scale, self._dtype)

    @cached_property
    def packed(self) -> PackedWeight:
        """The same for oneDNN."""
        return PackedWeight(self.weight, self._geometry)

    @cached_property
    def linear(self) -> Tensor:
        """The weight ``[O, I]`` of a fully connected layer, in the order that oneDNN has for any number of rows."""
        with _plainly():
            ordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(self._source.to(self._dtype))
        return ordered

    @cached_property
    def transformed(self) -> PackedWeight:
        """The weights of Winograd's products."""
        with _plainly():
            return PackedWeight(transform_weight(self._source, self._scale, self._dtype), ELEMENT_PRODUCTS)


class _Kept(NamedTuple):
    key: tuple[object, ...]
    # Holding the tensors that it was made of keeps their memory from being reused. Without it a new weight could land
    # on the address of a freed one and be taken for it.
    sources: tuple[Tensor, ...]
    ready: Any


class KeepsReadyWeights:
    """A base, beside ``nn.Module``'s, of modules that keep the ready weights of their convolutions, by name.

    They are made anew as soon as one of the tensors they come from is another tensor, has been written to, or changed
    dtype or device; ``train()``, ``eval()`` and any ``.to()`` drop them in any case. A write that autograd cannot see
    (``weight.data.mul_(2)``, a numpy view) is followed only from the next ``train()``, ``eval()`` or
    ``load_state_dict`` on.
    """

    if TYPE_CHECKING:  # TorchScript would read these annotations, and knows no such types
        _kept: dict[str, _Kept] | None
        _trained: frozenset[str]
        training: bool
    else:
        _kept, _trained = None, frozenset()

    def ready_weight(
        self,
        name: str,
        conv: nn.Conv2d | nn.Linear,
        others: tuple[Tensor, ...],
        settings: tuple[object, ...],
        make: Callable[[], ReadyWeight],
    ) -> ReadyWeight | None:
        """Return the kept weight of a name; None where it may not be kept.

        Args:
            name: One for each convolution.
            conv: The convolution or fully connected layer.
            others: The other tensors that the weight is made of.
            settings: What else it depends on.
            make: Makes it.
        """
        # A graph that is being captured must hold the arithmetic, not today's result of it.
        if is_captured():
            return None
        # Fused optimizers write without counting up the version, so the weight of a layer that was ever trained through
        # is never kept. In training that is any that takes gradients: the RPN's head runs without recording there, and
        # is trained through some of its anchors beside. Detectors that only predict keep their weights, though these
        # may take gradients.
        sources = (conv.weight, *others) if conv.bias is None else (conv.weight, conv.bias, *others)
        if (torch.is_grad_enabled() or self.training) and any(tensor.requires_grad for tensor in sources):
            self._trained |= {name}
        if name in self._trained:
            return None
        return self.keep(name, sources, settings, make)

    def keep(
        self, name: str, sources: tuple[Tensor, ...], settings: tuple[object, ...], make: Callable[[], _Ready]
    ) -> _Ready | None:
        """Return what was made of some tensors, kept under a name; None where it may not be kept."""
        if is_captured():
            return None
        key = settings
        try:
            for tensor in sources:
                key += (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device)
        except RuntimeError:
            # Tensors made under inference_mode have no version, those of torch.func transforms no address.
            return None
        if self._kept is None:
            self._kept = {}
        kept = self._kept.get(name)
        if kept is None or kept.key != key:
            with _plainly():
                kept = _Kept(key, tuple(tensor.detach() for tensor in sources), make())
            self._kept[name] = kept
        ready: _Ready = kept.ready
        return ready

    def train(self, mode: bool = True) -> Any:
        """Set the mode and drop what is kept."""
        self._kept = None
        return super().train(mode)  # type: ignore[misc]  # nn.Module's, here and below

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._kept = None
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles have other tensors, so what is kept of these is dead weight in them.
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_trained")}


def cast_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``weight * scale``, ``[O, I / groups, kh, kw]``, in ``dtype``, channels-last, rounded once."""
    if scale is None:
        return weight.to(dtype=dtype, memory_format=torch.channels_last)
    folded = torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last)
    return torch.mul(weight, scale.reshape(-1, 1, 1, 1), out=folded)


@contextmanager
def _plainly() -> Iterator[None]:
    """Make no inference tensors, even at inference: training may come to use them."""
    with torch.inference_mode(False), torch.no_grad():
        yield
