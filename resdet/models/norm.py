"""The three norms of a body, and the folding that makes the frozen one free.

A frozen BatchNorm is an affine map of each channel, ``x * scale + shift``. After a convolution without bias it is
the same convolution with ``weight * scale`` and the bias ``shift``: the same outputs and the same gradients, without
a pass over the activations, which costs more than the convolution's own arithmetic in bfloat16.

Legend: ``B`` images, ``C`` channels, ``H, W`` pixels, ``O, I`` output and input channels of a convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resdet.devices import is_queued
from resdet.errors import UserError, WeightsError
from resdet.models.convolution import compute_dtype, convolve, has_hooks
from resdet.models.ready_weights import Geometry, KeepsReadyWeights, ReadyWeight
from resdet.models.spec import NormName

NORM_NAMES: tuple[NormName, ...] = ("frozen", "batch", "group")

_Module = TypeVar("_Module", bound=nn.Module)
MakeNorm: TypeAlias = Callable[[int], nn.Module]  # makes the norm for a number of channels

GROUP_NORM_GROUPS = 32  # Wu & He, "Group Normalization" (arXiv:1803.08494), table 3


class FrozenBatchNorm2d(KeepsReadyWeights, torchvision.ops.FrozenBatchNorm2d):  # type: ignore[misc]  # no types
    """torchvision's class of this name, which can also run the convolution before it in folded form (``convolve``).

    Statistics and affine parameters are fixed, all four of them buffers. Models from before 2020 (torchvision 0.5,
    detectron) were trained with an ``eps`` of 0.

    Folded weights that are not being trained are kept (``KeepsReadyWeights``).
    """

    # The convolution's weight and bias during one forward pass (``folded_together``).
    _folded: tuple[Tensor, Tensor] | None = None

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)

    def fold(self, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fold this norm into the weight and bias (VGG's have one) of the convolution before it, in float32 at least.

        Returns the weight, channels-last, and the bias, both of ``dtype``.
        """
        scale, shift = self._affine(weight, bias)  # [O] each
        folded = weight * scale.reshape(-1, 1, 1, 1)  # [O, I / groups, kh, kw]
        return folded.to(dtype=dtype, memory_format=torch.channels_last), shift.to(dtype)

    def convolve(self, x: Tensor, conv: nn.Conv2d, *, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Compute ``relu(norm(conv(x)) + residual)`` by the folded convolution; see ``conv_norm``."""
        geometry, dtype = Geometry.of(conv), compute_dtype(x, conv.weight)

        def make() -> ReadyWeight:
            scale, shift = self._affine(conv.weight, conv.bias)
            return ReadyWeight(conv.weight, shift, geometry, dtype, scale)

        statistics = (self.weight, self.bias, self.running_mean, self.running_var)
        ready = self.ready_weight("", conv, statistics, (dtype, self.eps), make)
        if ready is not None:
            return convolve(x, conv.weight, ready.bias, geometry, ready=ready, residual=residual, relu=relu)
        if self._folded is not None:
            weight, shift = self._folded
            return convolve(x, weight, shift, geometry, residual=residual, relu=relu)
        scale, shift = self._kept_affine(conv)
        return convolve(x, conv.weight, shift, geometry, scale=scale, residual=residual, relu=relu)

    def _kept_affine(self, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Return what ``_affine`` computes, kept unless the convolution has a bias that is trained."""
        bias, make = conv.bias, partial(self._affine, conv.weight, conv.bias)
        statistics = (self.weight, self.bias, self.running_mean, self.running_var)
        kept = None
        if bias is None or not bias.requires_grad:
            sources = statistics if bias is None else (*statistics, bias)
            kept = self.keep("affine", sources, (conv.weight.dtype, self.eps), make)
        return make() if kept is None else kept

    def factors(self, conv: nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the factor of each weight of a convolution, laid out as the weight is, and the bias in a type."""
        scale, shift = self._kept_affine(conv)

        def make() -> tuple[Tensor, Tensor]:
            return torch.empty_like(conv.weight).copy_(scale.view(-1, 1, 1, 1)), shift.to(dtype)

        statistics = (self.weight, self.bias, self.running_mean, self.running_var)
        settings = (conv.weight.stride(), conv.weight.dtype, dtype, self.eps)
        kept = self.keep("factors", statistics, settings, make) if conv.bias is None else None
        return make() if kept is None else kept

    def _affine(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the factor of the weight and the bias that goes with it, ``[O]`` each, in float32 at least."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = self.weight.to(wide) * (self.running_var.to(wide) + self.eps).rsqrt()
        shift = self.bias.to(wide) - self.running_mean.to(wide) * scale
        return scale, shift if bias is None else shift + bias.to(wide) * scale


@contextmanager
def folded_together(body: nn.Module, x: Tensor) -> Iterator[None]:
    """Fold the weights of all convolutions that are being trained at once, for one forward pass of ``x``.

    One by one it takes three operations for each convolution, some three hundred in a step of a ResNet-101, where here
    it is a handful. On a GPU each is a launch; on a CPU folding just before the weight is read is as fast.
    """
    pairs = []
    if torch.is_grad_enabled() and is_queued(x.device):
        for conv_name, norm_name in conv_norm_names(body):
            conv, norm = body.get_submodule(conv_name), body.get_submodule(norm_name)
            assert isinstance(conv, nn.Conv2d)
            if isinstance(norm, FrozenBatchNorm2d) and conv.weight.requires_grad and not has_hooks(conv):
                pairs.append((conv, norm))
    if pairs:
        dtype = compute_dtype(x, pairs[0][0].weight)
        factors, shifts = zip(*(norm.factors(conv, dtype) for conv, norm in pairs), strict=True)
        folded = _FoldTogether.apply(dtype, factors, *(conv.weight for conv, _ in pairs))
        for (_, norm), weight, shift in zip(pairs, folded, shifts, strict=True):
            norm._folded = weight, shift
    try:
        yield
    finally:
        for _, norm in pairs:
            norm._folded = None


class _FoldTogether(torch.autograd.Function):
    """Products of weights ``[O, I, kh, kw]`` with factors of the same shape, in another type."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, factors: tuple[Tensor, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.factors = factors
        return _cast_together(torch._foreach_mul(weights, factors), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        wide = _cast_together(grads, ctx.factors[0].dtype)
        factors: tuple[Tensor, ...] = ctx.factors
        return None, None, *torch._foreach_mul(wide, factors)


def _cast_together(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    if tensors[0].dtype == dtype:
        return tensors
    cast = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(cast, tensors)
    return cast


def conv_norm(
    x: Tensor, conv: nn.Conv2d, norm: nn.Module, *, residual: Tensor | None = None, relu: nn.Module | None = None
) -> Tensor:
    """Compute ``relu(norm(conv(x)) + residual)``, as one convolution where the norm is frozen.

    Under autocast the folding is done in float32 and its result cast once. Modules with hooks of their own are called
    as modules, so that the hooks see what passes. The output is channels-last if the norm is frozen and ``x`` is.
    """
    if isinstance(norm, FrozenBatchNorm2d) and not has_hooks(conv) and not has_hooks(norm):
        if relu is None or not has_hooks(relu):
            return norm.convolve(x, conv, residual=residual, relu=relu is not None)
        out = norm.convolve(x, conv, residual=residual)
    else:
        out = norm(conv(x))
        if residual is not None:
            out += residual
    return out if relu is None else relu(out)


def norm_layer(norm: str, eps: float = 1e-5) -> MakeNorm:
    """Return what makes the norm of a name, or raise a UserError."""
    if norm == "frozen":
        return partial(FrozenBatchNorm2d, eps=eps)
    if norm == "batch":
        return partial(nn.BatchNorm2d, eps=eps)
    if norm == "group":  # with fewer groups where there are fewer channels
        return lambda channels: nn.GroupNorm(min(GROUP_NORM_GROUPS, channels), channels, eps=eps)
    raise UserError(f"norm must be one of {', '.join(NORM_NAMES)}, got {norm!r}")


def conv_norm_names(model: nn.Module) -> list[tuple[str, str]]:
    """Return the dotted names of convolutions that are followed by a norm, with those of the norms.

    Every network here registers a norm next to the convolution before it, whichever module either lies in.
    """
    pairs = []
    conv_name = ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            conv_name = name
        elif conv_name and isinstance(module, torchvision.ops.FrozenBatchNorm2d | nn.BatchNorm2d | nn.GroupNorm):
            pairs.append((conv_name, name))
            conv_name = ""
    return pairs


def frozen_copy(module: _Module) -> _Module:
    """Return a copy in evaluation mode and float32 on the CPU, without gradients."""
    return copy.deepcopy(module).to("cpu", torch.float32).eval().requires_grad_(False)


def folded_copy(module: _Module) -> _Module:
    """Return such a copy with its frozen norms folded into the convolutions before them."""
    module = frozen_copy(module)
    for conv_name, norm_name in conv_norm_names(module):
        conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
        if isinstance(norm, FrozenBatchNorm2d):
            assert isinstance(conv, nn.Conv2d)
            weight, bias = norm.fold(conv.weight, torch.float32, conv.bias)
            conv.weight = nn.Parameter(weight, requires_grad=False)
            conv.bias = nn.Parameter(bias, requires_grad=False)
            module.set_submodule(norm_name, nn.Identity())
    return module


def has_fresh_frozen_norm(model: nn.Module) -> bool:
    """Return whether all of the model's frozen norms are still the identity, as they were built.

    Around random weights such norms leave the network without any normalisation (activations grow by orders of
    magnitude from stage to stage), and training diverges. Loading real weights or ``calibrate_norm`` changes the
    answer, because it is read from the tensors; weights with the norm fused into the convolutions count as real by
    their biases. A model without frozen norms has no fresh one.
    """
    norms = _frozen_norms(model)
    return bool(norms) and all(
        bool((norm.weight == 1).all() & (norm.bias == 0).all())  # waits for the device
        and bool((norm.running_mean == 0).all() & (norm.running_var == 1).all())  # waits for the device
        for norm in norms
    )


def _frozen_norms(model: nn.Module) -> list[torchvision.ops.FrozenBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, torchvision.ops.FrozenBatchNorm2d)]


@torch.no_grad()
def calibrate_norm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set the statistics of frozen norms from data, so that a network of random weights is a normalised one.

    Each batch is run forward once with every frozen norm normalising by the statistics of that batch, as BatchNorm does
    in training; mean and variance of each norm's inputs over all batches become its ``running_mean`` and
    ``running_var``. After one batch the network's activations on it are normalised up to rounding; after several they
    are so up to the difference between the batches. The result depends on the weights and the batches alone.

    Args:
        model: A body or backbone; changed in place. Weights, biases and its training mode stay.
        batches: Images as the model takes them, ``[B, 3, H, W]``, already normalised by mean and standard deviation.

    Returns:
        The number of norms that were set.

    Raises:
        UserError: If the model has no frozen norm or there are no batches.
        WeightsError: If the model computes NaN or infinity; it is then unchanged.
    """
    norms = _frozen_norms(model)
    if not norms:
        raise UserError("calibrate_norm: the model has no frozen norm whose statistics could be set")
    moments: dict[nn.Module, tuple[int, Tensor]] = {}  # values per channel, their sum and the sum of squares [2, C]

    def normalise_by_batch(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0]  # [B, C, H, W]
        wide = x.double()
        sums = torch.stack([wide.sum(dim=(0, 2, 3)), wide.square().sum(dim=(0, 2, 3))])
        count, total = moments.get(norm, (0, torch.zeros_like(sums)))
        moments[norm] = count + x.numel() // x.shape[1], total + sums
        return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)  # type: ignore[arg-type]

    # conv_norm calls a norm with hooks as a module, so this sees the input of every norm of a fast body too.
    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_hook(normalise_by_batch))
        for images in batches:
            with torch.autocast(images.device.type, enabled=False):
                model(images)
    if not moments:
        raise UserError("calibrate_norm: got no batch of images")
    names = {module: name for name, module in model.named_modules()}
    for norm, (_, total) in moments.items():  # the first in the order they run in is where it begins
        if not total.isfinite().all():  # waits for the device
            raise WeightsError(
                f"calibrate_norm: the model computes NaN or infinity (first in the input of {names[norm]})"
            )
    for norm, (count, total) in moments.items():
        mean, mean_square = total / count
        norm.running_mean.copy_(mean)  # type: ignore[operator]
        norm.running_var.copy_((mean_square - mean.square()).clamp(min=0))  # type: ignore[operator]
    return len(moments)
