"""Summaries of networks, counted and not looked up: stages, parameters, multiply-adds, receptive fields, responses.

Legend: ``B`` images, ``C`` channels, ``H, W`` pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resdet.errors import UserError
from resdet.models.archs import ResNetArch, VGGArch, find_arch
from resdet.models.bodies import Body, Classifier, build_classifier
from resdet.models.norm import conv_norm_names
from resdet.models.resnet import BasicBlock, Bottleneck
from resdet.models.shortcuts import Projection

_LAYERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class StageSummary:
    """A stage of a classification network, or the whole of it."""

    name: str  # "stem", "layer1", ...; "conv1", ... of a VGG; "classifier"; "total"
    output: tuple[int, int, int]  # channels, height, width; of a classifier the number of classes, 1 and 1
    num_blocks: int  # residual (or plain) blocks; of a VGG, convolutions
    num_parameters: int  # weights, biases, and the affine parameters of norms
    num_multiply_adds: int  # of its convolutions and fully connected layers, for one image
    receptive_field: int  # side of the square of input pixels that one pixel of its output can depend on
    stride: int  # distance of neighbouring pixels of its output, in input pixels


def default_image_size(arch: str) -> tuple[int, int]:
    """Return the ``(height, width)`` that a network was published for: 224, or CIFAR's 32."""
    shape = find_arch(arch)
    return (32, 32) if isinstance(shape, ResNetArch) and shape.stem == "3x3" else (224, 224)


def summarise(
    arch: str, image_size: tuple[int, int] | None = None, *, num_classes: int | None = None, stride_in_1x1: bool = False
) -> list[StageSummary]:
    """Summarise a classification network stage by stage, without computing anything: it runs on the meta device.

    The receptive field is that of the longest path, by the recursion ``r += (k - 1) * d * j; j *= s`` over its
    convolutions and poolings of kernel ``k``, dilation ``d``, stride ``s``, the field ``r`` and the distance ``j`` of
    neighbouring pixels starting at 1 (Araujo et al., "Computing Receptive Fields", Distill 2019).

    Images have the ``default_image_size`` unless ``image_size`` is given, and there are 1000 classes, or CIFAR's 10.
    Returns the stages from the input on, the classifier, and ``"total"``, whose output, receptive field and stride are
    the classifier's and the last stage's.
    """
    height, width = image_size or default_image_size(arch)
    if num_classes is None:
        num_classes = 10 if default_image_size(arch) == (32, 32) else 1000
    with torch.device("meta"):
        model = build_classifier(arch, num_classes=num_classes, fast=False, stride_in_1x1=stride_in_1x1).eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter, _traced(model) as calls:
            try:
                model(torch.empty(1, 3, height, width))
            except RuntimeError as error:
                raise UserError(f"{arch} cannot take an image of {height}x{width} pixels ({error})") from error
    block = nn.Conv2d if isinstance(find_arch(arch), VGGArch) else (BasicBlock, Bottleneck)
    # Two operations are one multiply-add; modules are named by the root's class and their path.
    flops = {name.partition(".")[2]: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    stages: list[StageSummary] = []
    field = jump = 1
    for stage in (*model.body.stage_modules, "classifier"):
        own = [call for call in calls if _stage_of(call.name, model) == stage]
        for call in own:
            if call.on_path:
                field += (call.kernel - 1) * call.dilation * jump
                jump *= call.stride
        modules = {name: part for name, part in model.named_modules() if _stage_of(name, model) == stage}
        num_blocks = sum(isinstance(part, block) for part in modules.values())
        num_parameters = sum(p.numel() for name, p in model.named_parameters() if _stage_of(name, model) == stage)
        num_flops = sum(flops.get(name, 0) for name, part in modules.items() if isinstance(part, _LAYERS))
        channels, height, width, *_ = *own[-1].output, 1, 1
        output = (channels, height, width)
        stages.append(StageSummary(stage, output, num_blocks, num_parameters, num_flops // 2, field, jump))
    num_blocks, num_parameters = sum(s.num_blocks for s in stages), sum(s.num_parameters for s in stages)
    num_multiply_adds = sum(s.num_multiply_adds for s in stages)
    return [*stages, StageSummary("total", output, num_blocks, num_parameters, num_multiply_adds, field, jump)]


def summary_table(stages: Iterable[StageSummary]) -> str:
    """Format a summary as lines of text."""
    rows = [["stage", "output", "blocks", "parameters", "multiply-adds", "field", "stride"]]
    for stage in stages:
        counts = [str(stage.num_blocks or ""), f"{stage.num_parameters:,}", f"{stage.num_multiply_adds:,}"]
        output = "x".join(map(str, stage.output))
        rows.append([stage.name, output, *counts, str(stage.receptive_field), str(stage.stride)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = ["<", "<", *">>>>>"]
    return "\n".join(
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, aligns, widths, strict=True))
        for row in rows
    )


@torch.no_grad()
def response_deviations(body: Body, batches: Iterable[Tensor]) -> dict[str, float]:
    """Measure how strongly the 3x3 layers of a network respond: figure 7 of the first ResNet paper.

    The body is in evaluation mode, with trained weights: right after calibration every deviation is that of its norm.
    Batches are images as it takes them, ``[B, 3, H, W]``. Returns, for each 3x3 convolution, by its name and in the
    order they run in, the standard deviation over all images, channels and pixels of its output after its norm (where
    it has one), before the nonlinearity and the addition.
    """
    norm_of = dict(conv_norm_names(body))
    moments: dict[str, tuple[int, float, float]] = {}  # number of values, their sum, the sum of their squares

    def measure(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        count, total, squares = moments.get(name, (0, 0.0, 0.0))
        wide = output.double()
        # Waits for the device.
        moments[name] = count + wide.numel(), total + float(wide.sum()), squares + float(wide.square().sum())

    with contextlib.ExitStack() as stack:
        for name, conv in body.named_modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                watched = body.get_submodule(norm_of.get(name, name))
                stack.callback(watched.register_forward_hook(partial(measure, name)).remove)
        for images in batches:
            body(images)
    if not moments:
        raise UserError("responses: got no batch of images")
    return {
        name: max(squares / count - (total / count) ** 2, 0.0) ** 0.5
        for name, (count, total, squares) in moments.items()
    }


@dataclass(frozen=True)
class _Call:
    name: str
    output: tuple[int, ...]
    on_path: bool  # of the receptive field: not on a shortcut
    kernel: int
    stride: int
    dilation: int


@contextlib.contextmanager
def _traced(model: nn.Module) -> Iterator[list[_Call]]:
    """Record the calls of convolutions, poolings and fully connected layers, in the order they are made in."""
    calls: list[_Call] = []
    shortcuts = [module for module in model.modules() if isinstance(module, Projection)]
    off_path = {part for shortcut in shortcuts for part in shortcut.modules()}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        kernel = stride = dilation = 1
        if isinstance(module, nn.Conv2d):
            kernel, stride, dilation = module.kernel_size[0], module.stride[0], module.dilation[0]
        elif isinstance(module, nn.MaxPool2d):
            assert isinstance(module.kernel_size, int)
            assert isinstance(module.stride, int)
            kernel, stride = module.kernel_size, module.stride
        calls.append(_Call(name, tuple(output.shape[1:]), module not in off_path, kernel, stride, dilation))

    # Blocks are recorded for their outputs alone: a shortcut runs after the convolutions it goes around.
    kinds = (*_LAYERS, nn.MaxPool2d, BasicBlock, Bottleneck)
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                stack.callback(module.register_forward_hook(partial(record, name)).remove)
        yield calls


def _stage_of(name: str, model: Classifier) -> str:
    for stage, modules in model.body.stage_modules.items():
        if any(name == module or name.startswith(f"{module}.") for module in modules):
            return stage
    return "classifier"
