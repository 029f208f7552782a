"""Pretend to have a GPU: tensors that say they are on another device, and are computed on the CPU.

A GPU runs beside the host, which only queues work for it. How fast a detector is there depends on what cannot be seen
on a CPU: how often the host waits for a result, how many kernels it launches, and what these read and write. Here
every operator on the device passes through Python, which checks that CUDA would run it (no tensors of two devices but
0-dimensional ones of the CPU, no ``numpy()``), and notes all that in a ``Record``, by the line that asked for it.

torch lets Python stand for its device "privateuse1", here ``pgpu``. It works in every thread, without a mode: creating
a tensor and copying one are kernels registered for that device; every other operator finds a ``PretendTensor`` among
its arguments. Results are the CPU's, bit for bit. Under ``torch.autocast("pgpu")`` CUDA's rules hold. Times are not
measured; the module ``gpu_model`` computes them from what is counted.

torch has one kind of accelerator in a process, and knows it before the first backward pass: importing this module
makes it this one, unless the process sees a CUDA device. Such a process cannot count, and has another do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _foreach_supported_types as _optimizer_types
from torch.utils import _foreach_utils, backend_registration
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import pretend_autocast
from benchmarks.pretend_record import INDEXING, Copy, Operator, OperatorSchema, Record, calling_line, schema_of

__all__ = ["DEVICE", "Copy", "Operator", "PretendTensor", "Record", "pretend_gpu", "to_pretend"]

NAME = "pgpu"
_Moved = TypeVar("_Moved", nn.Module, Tensor)


def to_pretend(moved: _Moved) -> _Moved:
    """Return a tensor on the device, or a module after moving it there in place.

    Raises:
        RuntimeError: If this process sees a CUDA device.
    """
    _check_registered()
    return moved.to(DEVICE)


@contextmanager
def pretend_gpu() -> Iterator[Record]:
    """Note what is asked of the device in the block, by all threads; pinned memory and generators are pretended too.

    Raises:
        RuntimeError: In the block of another, or if this process sees a CUDA device.
    """
    global _active
    _check_registered()
    if _active is not None:
        raise RuntimeError("pretend_gpu: one block at a time, got one inside another")
    # torch decides by a tensor's type whether its foreach operators take it.
    types: list[list[Any]] = [_optimizer_types, _foreach_utils._foreach_supported_types]
    replaced: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "pin_memory", _pin),
        (torch.Tensor, "is_pinned", _is_pinned),
        (torch, "Generator", _AnyGenerator),
        (torch, "clear_autocast_cache", _clear_autocast_cache),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    _active = Record()
    try:
        for owner, name, replacement in replaced:
            setattr(owner, name, replacement)
        for known in types:
            known.append(PretendTensor)
        yield _active
    finally:
        _active = None
        for owner, name, original in originals:
            setattr(owner, name, original)
        for known in types:
            known.remove(PretendTensor)
        _pinned.clear()


class PretendTensor(Tensor):
    """A tensor of the device; ``plain`` is a tensor of the CPU with its numbers."""

    plain: Tensor
    is_number = False  # made of a number by torch; in an assignment to an index CUDA's is a tensor of the CPU

    @staticmethod
    def __new__(cls, plain: Tensor) -> PretendTensor:
        """Put a tensor of the CPU, to which nobody else may write, on the device."""
        # A view of a tensor that takes gradients is one that could, also if it is made at inference.
        with torch.inference_mode(plain.is_inference()):
            made: PretendTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                plain.size(),
                strides=plain.stride(),
                storage_offset=plain.storage_offset(),
                dtype=plain.dtype,
                layout=plain.layout,
                device=DEVICE,
            )
        made.plain = plain
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operator with a tensor of the device among its arguments."""
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.plain!r})"

    def data_ptr(self) -> int:
        """Return the address of the numbers."""
        return self.plain.data_ptr()

    def tolist(self) -> Any:
        """Return the numbers as plain values, for which the host waits."""
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return an array of a copy on the CPU if ``force``, else raise CUDA's TypeError."""
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy, use Tensor.cpu() first; at {calling_line()}"
        )

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy()

    def __dlpack__(self, **_: Any) -> NoReturn:
        raise BufferError(f"a tensor on {DEVICE} cannot be shared with other libraries, at {calling_line()}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone(memory_format=torch.preserve_format)
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = (
                nn.Parameter(copied, self.requires_grad) if is_parameter else copied.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a tensor of the CPU."""
        copied = self.detach().cpu()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        return copied.requires_grad_(self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    # With these two, modules exchange a parameter when they are moved, so that it stays the same object.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["plain"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> PretendTensor:
        return PretendTensor(tensors["plain"])


class _DeviceModule(backend_registration._DummyBackendModule):
    """``torch.pgpu``."""

    def is_available(self) -> bool:
        # Otherwise torch's other parts, as a DataLoader that pins memory, would choose it.
        return _active is not None

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        if _active is not None:
            _active.add_wait("synchronize")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hooks(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _active is not None


_sees_cuda = torch.cuda.is_available()
if not _sees_cuda:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _DeviceModule(), _Hooks())
DEVICE = torch.device("privateuseone", 0)
"""The device, which torch calls ``pgpu:0`` where it is registered."""

_active: Record | None = None
_CpuGenerator = torch.Generator
_clear_torchs_cache = torch.clear_autocast_cache

# Addresses of the device's generators: torch hands other objects for them to operators.
_generators: set[int] = set()
# Storages in pinned memory by address; held, so that no other comes to lie there.
_pinned: dict[int, torch.UntypedStorage] = {}


class _PretendGenerator(torch.Generator):
    """A generator of the device, which draws the CPU's numbers."""

    def __new__(cls) -> _PretendGenerator:
        """Build it and note its address."""
        made = super().__new__(cls)
        _generators.add(made._cdata)  # type: ignore[attr-defined]
        return made

    def __del__(self) -> None:
        _generators.discard(self._cdata)  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device."""
        return DEVICE


class _GeneratorOfAny(type):
    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _PretendGenerator() if _is_pretend(device) else _CpuGenerator(device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _CpuGenerator)


class _AnyGenerator(metaclass=_GeneratorOfAny):
    """Stands for ``torch.Generator``, which cannot be built for the device."""


def _pin(tensor: Tensor, device: Any = None) -> Tensor:
    """Stand for ``Tensor.pin_memory``."""
    if isinstance(tensor, PretendTensor):
        raise RuntimeError(f"only dense CPU tensors can be pinned, got one on {DEVICE} at {calling_line()}")
    if _is_pinned(tensor):
        return tensor
    copied = tensor.clone()
    _pinned[copied.untyped_storage().data_ptr()] = copied.untyped_storage()
    return copied


def _is_pinned(tensor: Tensor, device: Any = None) -> bool:
    """Stand for ``Tensor.is_pinned``."""
    return not isinstance(tensor, PretendTensor) and tensor.untyped_storage().data_ptr() in _pinned


def _clear_autocast_cache() -> None:
    """Stand for ``torch.clear_autocast_cache``, which the end of autocast calls."""
    pretend_autocast.clear()
    _clear_torchs_cache()


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator with at least one argument on the device."""
    if func is torch.ops.prim.device.default:
        return DEVICE
    schema = schema_of(func)
    if schema.decomposes:  # at inference, where autograd has not done it; autocast looks at the parts
        with torch._C._RestorePythonTLSSnapshot():  # type: ignore[attr-defined]
            return func.decompose(*args, **kwargs)
    if schema.name == "is_pinned":
        return False
    if schema.name == "_to_copy":
        return _to_copy(func, args[0], kwargs)
    if schema.name == "copy_" and not (isinstance(args[0], PretendTensor) and isinstance(args[1], PretendTensor)):
        return _copy(*args, **kwargs)
    _check_devices(schema, func, args, kwargs)
    plain_args, plain_kwargs = tree_map(_to_plain, args), _to_plain_options(kwargs)
    result = func(*plain_args, **plain_kwargs)
    if _active is not None:
        _note_numbers(_active, schema, args)
        _active.add(func, plain_args, plain_kwargs, result)
    if schema.name.startswith("_foreach") and schema.written:
        torch.autograd.graph.increment_version(args[0])  # as CUDA's kernels do themselves
    known = {id(leaf.plain): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PretendTensor)}
    for tensor in known.values():
        if tensor.shape != tensor.plain.shape:
            raise NotImplementedError(f"pretend GPU: {func} changes a tensor's shape in place, at {calling_line()}")

    def to_device(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else PretendTensor(value)

    return tree_map(to_device, result)


def _to_copy(func: Any, tensor: PretendTensor, kwargs: dict[str, Any]) -> Tensor:
    """Copy to another dtype, layout or device."""
    options = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
    result: Tensor = func(tensor.plain, **options)
    if kwargs.get("device") is None or _is_pretend(kwargs["device"]):
        if _active is not None:
            _active.add(func, (tensor.plain,), {}, result)
        return PretendTensor(result)
    if _active is not None:  # torch pins the memory of a copy to the host that is not waited for
        _active.add_copy(tensor, to_device=False, waits=not kwargs.get("non_blocking", False))
    return result


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between host and device."""
    to_device = isinstance(target, PretendTensor)
    if _active is not None:
        host = source if to_device else target
        _active.add_copy(host, to_device=to_device, waits=not (non_blocking and _is_pinned(host)))
    _to_plain(target).copy_(_to_plain(source))
    return target


def _check_devices(schema: OperatorSchema, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise CUDA's error for tensors of two devices, or a generator of the other."""
    given = [*zip(schema.arguments, args, strict=False), *kwargs.items()]
    # 0-dimensional tensors are handed to kernels as numbers.
    takes_numbers = schema.is_pointwise or schema.name in INDEXING or schema.name.startswith(("_foreach", "fill"))
    for name, value in given:
        for leaf in tree_leaves(value):
            if isinstance(leaf, _CpuGenerator) and leaf._cdata not in _generators:  # type: ignore[attr-defined]
                raise RuntimeError(f"the generator must be on {DEVICE}, got one on the CPU: {func}, {calling_line()}")
            if not isinstance(leaf, Tensor) or isinstance(leaf, PretendTensor):
                continue
            is_index = schema.name in INDEXING and name == "indices" and isinstance(args[0], PretendTensor)
            is_number = takes_numbers and leaf.dim() == 0 and name not in schema.written
            if not (is_index or is_number):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and "
                    f"{leaf.device}: {func} got {name} {list(leaf.shape)} on the latter, at {calling_line()}"
                )


def _note_numbers(record: Record, schema: OperatorSchema, args: tuple[Any, ...]) -> None:
    """Note what numbers, masks and indices cost, which depends on how they reach an operator.

    Source: ``where_self_out``, ``canDispatchToMaskedFill`` and ``_index_put_impl_`` in torch's aten/src/ATen/native.
    """
    if schema.name == "copy_" and args[1].is_number and args[0].dim() == 0:
        record.add_copy(args[1], to_device=True, waits=True)  # to more elements it is a fill
    if schema.name == "where":
        for value in args:
            if not isinstance(value, PretendTensor):
                record.add_copy(value, to_device=True, waits=True)
            elif value.is_number:
                record.add(torch.ops.aten.fill_.Scalar, (value.plain, 0), {}, value.plain)
    if schema.name not in INDEXING:
        return
    indices = [index for index in args[1] if index is not None]
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    for index in indices:
        if not isinstance(index, PretendTensor):
            record.add_copy(index, to_device=True, waits=True)
    is_number = schema.name != "index" and (not isinstance(args[2], PretendTensor) or args[2].is_number)
    if is_number and len(masks) == len(indices) == 1:
        return  # masked_fill_
    if is_number:
        record.add_copy(args[2], to_device=True, waits=True)
    for _ in masks:
        record.add_wait("mask as an index")


def _is_pretend(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _to_plain(value: Any) -> Any:
    return value.plain if isinstance(value, PretendTensor) else value


def _to_plain_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {name: tree_map(_to_plain, value) for name, value in kwargs.items()}
    if _is_pretend(options.get("device")):
        options["device"] = torch.device("cpu")
    options.pop("pin_memory", None)
    return options


def _check_registered() -> None:
    if not _registered:
        raise RuntimeError(
            "pretend_gpu: torch has one kind of accelerator in a process, and this one sees a CUDA device; hide it by "
            "CUDA_VISIBLE_DEVICES='' before CUDA is used"
        )


def _register() -> torch.library.Library:
    """Register what creates tensors on the device, and what copies while torch keeps Python out."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    aten = torch.ops.aten

    def creating(func: Any) -> Callable[..., Tensor]:
        def create(*args: Any, **kwargs: Any) -> Tensor:
            options = _to_plain_options(kwargs)
            result: Tensor = func(*args, **options)
            if _active is not None:
                _active.add(func, args, options, result)
            return PretendTensor(result)

        return create

    def number(value: float, **kwargs: Any) -> Tensor:
        made = PretendTensor(aten.scalar_tensor.default(value, **_to_plain_options(kwargs)))
        made.is_number = True
        return made

    kernels = {aten.copy_.default: _copy, aten.scalar_tensor.default: number}
    # Of torch's own for any device, these would be given an empty tensor and change its shape.
    ranges = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m)
    for func in (aten.empty.memory_format, aten.empty_strided.default, *ranges):
        kernels[func] = creating(func)
    for func, kernel in kernels.items():
        library.impl(func, kernel, "PrivateUse1")  # type: ignore[no-untyped-call]
    return library


# What they register lasts as long as they do.
_registered = [] if _sees_cuda else [_register(), *pretend_autocast.register(NAME)]
