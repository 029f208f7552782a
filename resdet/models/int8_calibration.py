"""Calibration of int8 detectors: what values a float detector's tensors have on images, and the scales made of them.

* A scale is that of the least mean square error on the calibration images, clipping and rounding together. The largest
  value seen gives a worse one: a single outlier costs all other values resolution.
* Rounded weights move the mean of a layer's output by (rounding error) x (mean of its input), a constant for each
  channel, which is taken out of the bias (Nagel et al., arXiv:1906.04721, section 4.2, with means measured and not
  derived).

What else was tried: scales from the largest value, the pyramid 20 % off its norm, where least squares gave 11 (on 4
images, sums in uint8); no correction of biases, 5 % more error; scaling channels between the convolutions of a block so
that they need the same range (cross-layer equalisation, halves), no change; clipping weights by least squares, none.

Legend: ``B`` images, ``C`` channels, ``N`` boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resdet.errors import UserError, WeightsError
from resdet.models.detector import Detector
from resdet.models.finite import check_weights
from resdet.models.int8 import (
    MIDDLE,
    Int8Block,
    Int8Detector,
    Int8Layer,
    blocks_of,
    check_engine,
    check_spec,
    convs_of,
    joined_outputs,
    only_conv,
)
from resdet.models.norm import FrozenBatchNorm2d, folded_copy, frozen_copy
from resdet.models.shortcuts import Projection


class Range:
    """The values of one tensor of a network over all images: how large they are, and the mean of each channel."""

    NUM_BINS = 2048

    def __init__(self) -> None:
        self.histogram = torch.zeros(self.NUM_BINS, dtype=torch.float64)  # of absolute values in 0..top, without zeros
        self.top = 2.0**-40
        self.largest = 0.0  # of absolute values
        self.total: Tensor | None = None  # float64 [C]
        self.count = 0  # values of each channel

    def add(self, x: Tensor) -> None:
        """Add the values of a tensor ``[B, C, H, W]`` or ``[N, C]``; raise WeightsError if one is not finite."""
        if x.numel() == 0:
            return
        values = x.detach().float().abs()
        largest = float(values.max())
        if not math.isfinite(largest):
            raise WeightsError("quantize: the model computes NaN or infinity on a calibration image")
        while largest > self.top:
            halves = self.histogram.view(-1, 2).sum(1)
            self.histogram = torch.cat([halves, torch.zeros_like(halves)])
            self.top *= 2
        self.histogram += torch.histc(values, self.NUM_BINS, 0, self.top).double()
        self.histogram[0] -= int((values == 0).sum())
        self.largest = max(self.largest, largest)
        total = x.detach().sum(dim=(0, 2, 3) if x.dim() == 4 else 0, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.count += x.numel() // x.shape[1]

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float64 ``[C]``."""
        assert self.total is not None
        return self.total / self.count

    def scale(self, *, signed: bool) -> float:
        """Return the scale of the least mean square error, of 127 steps from zero if ``signed``, else of 255."""
        steps = 127 if signed else 255
        if self.largest == 0:
            return 1.0
        width = self.top / self.NUM_BINS
        values = (torch.arange(self.NUM_BINS, dtype=torch.float64) + 0.5) * width
        limits = torch.linspace(0.1, 1, 91, dtype=torch.float64)[:, None] * self.largest
        step = limits / steps
        # What is below half a step becomes zero; what is above the limit becomes the limit.
        error = torch.where(values < step / 2, values.square(), step.square() / 12)  # [91 limits, bins]
        error = torch.where(values > limits, (values - limits).square(), error)
        return float(step[(error @ self.histogram).argmin()])


@torch.no_grad()
def quantize_detector(model: Detector, images: Iterable[Tensor]) -> Int8Detector:
    """Convert a trained detector into one that computes in int8 on the CPU.

    The model is run in float32 on each image once. 32 images of the kind it was trained on are enough; their boxes are
    not needed. They should have the size of those to come.

    Args:
        model: A ResNet with an FPN (``layout="fpn"``), norm frozen or batch; it stays as it is.
        images: ``[3, H, W]`` in [0, 1], as the model takes them.

    Returns:
        A detector in evaluation mode, built by the model's ``spec``.

    Raises:
        UserError: If there is no int8 for such detectors or on this computer, the model is in training mode, or there
            are no images to calibrate on.
        WeightsError: If the model computes NaN or infinity on one, or its weights are not finite.
    """
    check_engine()
    if isinstance(model, Int8Detector):
        raise UserError("quantize: the detector is in int8 already")
    check_spec(model.spec)
    if model.training:
        raise UserError("quantize: the model is in training mode; call eval() first")
    check_weights(model, "quantize")
    folded = folded_copy(_with_frozen_norms(model))
    ranges = _observe(folded, images)
    int8 = Int8Detector(folded)

    def fill(
        layer: nn.Module,
        source: nn.Conv2d | nn.Linear,
        inputs: Range,
        outputs: Range | None,
        scaled_as: Range | None = None,
    ) -> None:
        assert isinstance(layer, Int8Layer)
        input_scale = (scaled_as or inputs).scale(signed=layer.input_zero == MIDDLE)
        output_scale = None
        if layer.output.dtype == torch.uint8:
            assert outputs is not None
            output_scale = outputs.scale(signed=layer.output.zero == MIDDLE)
        layer.fill(source, inputs.mean, input_scale, output_scale)

    # A tensor that several layers read has the same range at each of them.
    for level, (stage, blocks) in enumerate(blocks_of(folded.backbone.body).items()):
        for index, block in enumerate(blocks):
            name = f"backbone.body.{stage}.{index}"
            inputs = [ranges[f"{name}.conv{number}"] for number in range(1, len(convs_of(block)) + 1)]
            after = f"backbone.body.{stage}.{index + 1}.conv1"
            outputs = [*inputs[1:], ranges[after if after in ranges else f"backbone.fpn.inner_blocks.{level}.0"]]
            quantized = int8.backbone.get_submodule(f"stages.{level}.{index}")
            assert isinstance(quantized, Int8Block)
            for layer, conv, read, put in zip(quantized.layers, convs_of(block), inputs, outputs, strict=True):
                fill(layer, conv, read, put)
            if quantized.projection is not None:
                projection = only_conv(block.get_submodule("downsample"))
                fill(quantized.projection, projection, inputs[0], ranges[f"{name}.downsample"])
    pyramid = ranges["rpn.head.conv.0.0"]
    for level, (inner, layer) in enumerate(zip(int8.backbone.inner_blocks, int8.backbone.layer_blocks, strict=True)):
        read, merged = (ranges[f"backbone.fpn.{kind}_blocks.{level}.0"] for kind in ("inner", "layer"))
        fill(inner, only_conv(folded.backbone.fpn.inner_blocks[level]), read, merged)
        fill(layer, only_conv(folded.backbone.fpn.layer_blocks[level]), merged, pyramid)
    hidden = ranges["rpn.head.cls_logits"]
    fill(int8.rpn.head.conv, only_conv(folded.rpn.head.conv), pyramid, hidden)
    fill(int8.rpn.head.outputs, joined_outputs(folded.rpn.head), hidden, None)
    int8_head, head = int8.roi_heads.box_head, folded.roi_heads.box_head
    pooled, vectors = ranges["roi_heads.box_head.fc6"], ranges["roi_heads.box_head.fc7"]
    fill(int8_head.fc6, head.fc6, pooled, vectors, pyramid)  # pooled values keep the scale of the levels
    fill(int8_head.fc7, head.fc7, vectors, None)
    return int8


def _with_frozen_norms(model: Detector) -> Detector:
    """Return a copy whose BatchNorms are frozen ones of the same statistics."""
    model = frozen_copy(model)
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
            frozen.load_state_dict(norm.state_dict())  # it drops num_batches_tracked
            model.set_submodule(name, frozen)
    return model


def _observe(folded: Detector, images: Iterable[Tensor]) -> dict[str, Range]:
    """Run a detector on images; return the ranges of its convolutions' and linear layers' inputs by their names.

    The range of a projection's output is there under the projection's own name.
    """
    ranges: dict[str, Range] = {}
    handles = []

    def watch(name: str, module: nn.Module, *, output: bool) -> None:
        seen = ranges[name] = Range()
        handles.append(module.register_forward_hook(lambda _, inputs, out: seen.add(out if output else inputs[0])))

    for name, module in folded.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | Projection):
            watch(name, module, output=isinstance(module, Projection))
    count = 0
    try:
        with torch.autocast("cpu", enabled=False):
            for count, image in enumerate(images, start=1):
                if not image.is_floating_point() or image.dim() != 3 or image.shape[0] != 3:
                    raise UserError(
                        "quantize: images must be floating point [3, H, W] in [0, 1], got "
                        f"{image.dtype} {list(image.shape)} (image {count})"
                    )
                folded([image.cpu().float()])
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise UserError("quantize: got no image to calibrate on; 32 of the training images are enough")
    if ranges["roi_heads.box_head.fc6"].total is None:
        raise UserError(f"quantize: the model proposes no box on any of the {count} images; is it trained?")
    return ranges
