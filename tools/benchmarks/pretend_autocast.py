"""CUDA's rules of autocast for the pretend GPU: which operators run in half precision, which in float32.

torch has tables of them for each device that it knows (``ATen/autocast_mode.h``), and for devices that it does not know
a key under which to register them. Importing this module does so.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_KEY = "AutocastPrivateUse1"

# Operators by their names in torch's tables; without an overload, the default one.
_LOWER = """_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input conv_transpose3d.input
convolution prelu addmm addmv addr matmul einsum mm mv linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
scaled_dot_product_attention"""
_FLOAT32 = """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm group_norm cosine_similarity poisson_nll_loss
cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss
margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
upsample_bicubic2d _upsample_bicubic2d_aa"""
_FLOAT32_RESULT = "prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm sum sum.dim_IntList"
_WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add cat stack"

_Cast = Callable[[Tensor], Tensor]

# Parameters in half precision, as long as the outermost autocast lasts. By id, with what tells whether it still lives.
_cached: dict[tuple[int, torch.dtype], tuple[weakref.ref[Tensor], Tensor]] = {}


def clear() -> None:
    """Forget the parameters in half precision, as torch does at the end of autocast."""
    _cached.clear()


def _is_eligible(value: object, device: str) -> bool:
    return isinstance(value, Tensor) and value.device.type == device and value.is_floating_point()


def _cast(value: Any, dtype: torch.dtype, device: str) -> Any:
    """Return a tensor of the device in ``dtype``, unless it is float64."""
    if not _is_eligible(value, device) or value.dtype in (dtype, torch.float64):
        return value
    is_kept = dtype != torch.float32 and value.dtype == torch.float32 and value.requires_grad and value.is_leaf
    if not (is_kept and torch.is_autocast_cache_enabled()):
        return value.to(dtype)
    found = _cached.get((id(value), dtype))
    if found is not None and found[0]() is value:
        return found[1]
    made = value.to(dtype)
    _cached[id(value), dtype] = weakref.ref(value), made
    return made


def _register(library: torch.library.Library, func: Any, device: str, rule: str) -> None:
    def run(*args: Any, **kwargs: Any) -> Any:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if _is_eligible(leaf, device)]
            if rule == "float32 result":
                place = [argument.name for argument in func._schema.arguments].index("dtype")
                given = args[place] if place < len(args) else kwargs.get("dtype")
                if leaves and leaves[0] is args[0] and given is None and args[0].dtype != torch.float64:
                    args, kwargs = args[:place], {**kwargs, "dtype": torch.float32}
                return func(*args, **kwargs)
            dtype = torch.float32
            if rule == "lower":
                dtype = torch.get_autocast_dtype(device)
            elif rule == "widest" and not any(leaf.dtype == torch.float32 for leaf in leaves):
                return func(*args, **kwargs)
            args, kwargs = tree_map(lambda value: _cast(value, dtype, device), (args, kwargs))
            result = func(*args, **kwargs)
        # torchvision's operators give back the type that they were given.
        return result.to(leaves[0].dtype) if rule == "as given" and result.is_floating_point() else result

    library.impl(func, run, _KEY)  # type: ignore[no-untyped-call]


def register(device: str) -> list[torch.library.Library]:
    """Register the rules for the device of this name; they hold while what is returned lives."""
    import torchvision  # noqa: F401 - defines the operators

    aten = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for rule, names in (
        ("lower", _LOWER),
        ("float32", _FLOAT32),
        ("float32 result", _FLOAT32_RESULT),
        ("widest", _WIDEST),
    ):
        for name in names.split():
            packet, _, overload = name.partition(".")
            _register(aten, getattr(getattr(torch.ops.aten, packet), overload or "default"), device, rule)
    vision = torch.library.Library("torchvision", "IMPL")  # type: ignore[no-untyped-call]
    for name in ("nms", "roi_align"):
        _register(vision, getattr(torch.ops.torchvision, name).default, device, "as given")
    others = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    others.fallback(torch.library.fallthrough_kernel, _KEY)  # type: ignore[no-untyped-call]
    return [aten, vision, others]
