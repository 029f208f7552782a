"""Detectors in 8-bit integers, for inference on a CPU: calibrated on images, without training.

Everything with many multiplications is computed in int8: the body, the pyramid, the RPN's head and the two fully
connected layers of the box head. The stem (3 channels), RoIAlign and the last layer stay floating point.

Legend: ``B`` images, ``C`` channels, ``H, W`` pixels, ``O, I`` output and input channels of a layer, ``N`` boxes. A
tensor ``x`` is stored as ``q = round(x / scale) + zero``, its scale one number, ``q`` in 0..255. After a ReLU ``zero``
is 0; where values have both signs it is 128. Weights are int8 in -127..127 with a scale for each output channel.

* Frozen norms are folded into the convolutions first. ReLU, the sum with the shortcut (whose scale is its own) and the
  rounding to the next layer's scale are part of the convolution, so that tensors have 8 bits a value where bfloat16
  has 16. Only the sums of stages 3 and 4 stay bfloat16, and are rounded for the convolutions that read them.
* A scale is that of the least mean square error on the calibration images, clipping and rounding together. The largest
  value seen gives a worse one: a single outlier costs everybody else resolution.
* Rounded weights move the mean of a layer's output by (rounding error) x (mean of its input), a constant for each
  channel, which is taken out of the bias (Nagel et al., arXiv:1906.04721, section 4.2, with means measured and not
  derived).
* A 1x1 convolution is run as a matrix product. oneDNN's convolution is as fast, but packs weights in a layout that
  depends on the size of the map, and packs them anew in every call where that was another: 45 ms for C5's projection.

Measured on 2 cores of an AMD EPYC (Zen 5, AVX512-VNNI), a ResNet-101 FPN fine-tuned on BCCD, 32 training images, AP at
416 px on val and test: float32 0.590, 0.594; bfloat16 0.588, 0.597; this 0.592, 0.597. An image at 800/1333 takes
0.40 s, in turn with bfloat16's 0.65. The pyramid is 5 % of its norm from float32's (bfloat16 2 %). oneDNN's
convolutions run at 1.6 to 2.0 TOP/s, twice bfloat16's rate, in nearly every shape of the network. What else was tried:

* Sums in uint8 in all stages: 0.586 and 0.600, the pyramid 12 % off, about an eighth less time.
* Scales from the largest value: the pyramid 20 % off, where least squares gave 11 (on 4 images, sums in uint8).
* No correction of biases: 5 % more error than with it. Scaling channels between the convolutions of a block so that
  they need the same range (cross-layer equalisation, halves): no change. Clipping weights by least squares: none.
* ``qconv2d_pointwise`` for the first linear layer, boxes as a batch: 64 ms, as a product 14 ms, in bfloat16 29 ms.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.rpn import RPNHead

from resdet.errors import UserError, WeightsError
from resdet.models.archs import ResNetArch, find_arch
from resdet.models.backbone import ResNetFPN, resnet_fpn
from resdet.models.detector import Detector
from resdet.models.norm import FrozenBatchNorm2d, folded_copy, frozen_copy
from resdet.models.resnet import BasicBlock, Bottleneck, ResNet
from resdet.models.shortcuts import Projection
from resdet.models.spec import DetectorSpec
from resdet.types import Category

MIDDLE = 128
"""The zero of a tensor whose values have both signs."""

# The layout that 3x3 weights are packed in depends on the size of the map. At this one oneDNN chooses the layout that
# it then wants at all sizes from 320 to 1,333 pixels (of an exactly equal size it often foresees the wrong one).
_PACKED_FOR = 64
_OPS = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")

# Stages whose sums stay bfloat16, because rounding errors add up over their many blocks and their maps are small.
_WIDE_STAGES = ("layer3", "layer4")

Output = Literal["relu", "signed", "float32", "bfloat16", "bfloat16_relu"]


class _OutputType(NamedTuple):
    dtype: torch.dtype
    zero: int
    after: Literal["relu", "none"]


_OUTPUTS: dict[Output, _OutputType] = {
    "relu": _OutputType(torch.uint8, 0, "relu"),
    "signed": _OutputType(torch.uint8, MIDDLE, "none"),
    "float32": _OutputType(torch.float32, 0, "none"),
    "bfloat16": _OutputType(torch.bfloat16, 0, "none"),
    "bfloat16_relu": _OutputType(torch.bfloat16, 0, "relu"),
}


class Int8Layer(nn.Module):
    """A convolution or linear layer with int8 weights, of uint8 tensors.

    Args:
        layer: The layer it stands for; of it only shapes are taken here, and weights by ``fill``.
        output: What comes out: uint8 after a ReLU (zero 0), uint8 of both signs (zero ``MIDDLE``), float32, or bfloat16
            without or with a ReLU.
        input_zero: The zero of the input, 0 or ``MIDDLE``.

    Attributes:
        weight: int8, of the layer's shape; ``weight_scale`` float32 ``[O]``, ``bias`` float32 ``[O]``.
        input_scale: Scale of the input, float64, a scalar; ``output_scale`` likewise, 1 where the output is floats.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    input_scale: Tensor
    output_scale: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, output: Output, *, input_zero: int = 0) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            assert isinstance(layer.padding, tuple)
            self.stride, self.padding = list(layer.stride), list(layer.padding)
            self.dilation, self.groups = list(layer.dilation), layer.groups
        else:
            self.stride, self.padding, self.dilation, self.groups = [1, 1], [0, 0], [1, 1], 1
        shape = layer.weight.shape
        self.is_product = self.groups == 1 and self.padding == [0, 0] and tuple(shape[2:]) in ((), (1, 1))
        self.output = _OUTPUTS[output]
        self.input_zero = input_zero
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(shape[0]))
        self.register_buffer("bias", torch.zeros(shape[0]))
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("output_scale", torch.ones((), dtype=torch.float64))
        self._packed: tuple[Tensor, Tensor, float, float] | None = None
        self.register_load_state_dict_post_hook(_drop_packed)  # type: ignore[no-untyped-call]

    def fill(self, layer: nn.Conv2d | nn.Linear, mean: Tensor, input_scale: float, output_scale: float | None) -> None:
        """Take a layer's weights, and the scales of what goes in and comes out.

        Args:
            layer: Float layer, norms folded into it.
            mean: Of each channel of its input, ``[I]``.
            input_scale: Scale of its input.
            output_scale: Scale of its output, the sum and the ReLU included; None if that is floats.
        """
        weight = layer.weight.detach().double()
        per_channel = (-1,) + (1,) * (weight.dim() - 1)
        scale = (weight.flatten(1).abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = (weight / scale.view(per_channel)).round()
        error = rounded * scale.view(per_channel) - weight
        if error.dim() == 4:  # zeros beyond the border count as if they were more of the map
            error = error.sum(dim=(2, 3))  # [O, I / groups]
        shift = (error.view(self.groups, -1, error.shape[1]) * mean.double().view(self.groups, 1, -1)).sum(2).flatten()
        self.weight.copy_(rounded)
        self.weight_scale.copy_(scale)
        self.bias.copy_(-shift if layer.bias is None else layer.bias.detach().double() - shift)
        self.input_scale.fill_(input_scale)
        self.output_scale.fill_(1.0 if output_scale is None else output_scale)
        self._packed = None

    def forward(self, x: Tensor, shortcut: Tensor | None = None, scale: float = 1.0, zero: int = 0) -> Tensor:
        """Compute the layer.

        Args:
            x: uint8 ``[B, I, H, W]`` channels-last, or ``[N, I]``.
            shortcut: Of the output's shape and type, added before the ReLU; its memory is used up.
            scale: That of the shortcut; 1 for bfloat16.
            zero: That of the shortcut; 0 for bfloat16.

        Returns:
            ``[B, O, H', W']`` channels-last, or ``[N, O]``.
        """
        if self._packed is None:
            self._packed = self._pack()
        packed, zeros, input_scale, output_scale = self._packed
        operands = (x, input_scale, self.input_zero, packed, self.weight_scale, zeros)
        places: tuple[list[int] | int, ...] = (self.stride, self.padding, self.dilation, self.groups)
        operator = torch.ops.onednn.qconv2d_pointwise
        shape: torch.Size | None = None
        if self.is_product:
            places, operator = (), torch.ops.onednn.qlinear_pointwise
            if x.dim() == 4:
                pixels = x[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
                shape = pixels.shape[:3]
                operands = (pixels.reshape(-1, x.shape[1]), *operands[1:])
                shortcut = None if shortcut is None else shortcut.permute(0, 2, 3, 1).reshape(-1, shortcut.shape[1])
        dtype, output_zero, after = self.output
        result = (*places, output_scale, output_zero, dtype)
        out: Tensor
        if shortcut is None:
            out = operator.default(*operands, self.bias, *result, after, [], "")
        else:
            out = operator.binary(*operands, shortcut, self.bias, *result, scale, zero, "sum", 1.0, after, [], "")
        return out if shape is None else out.view(*shape, -1).permute(0, 3, 1, 2)

    def _pack(self) -> tuple[Tensor, Tensor, float, float]:
        input_scale, output_scale = float(self.input_scale), float(self.output_scale)
        if self.is_product:
            packed = torch.ops.onednn.qlinear_prepack(self.weight.flatten(1), None)
        else:
            shape = [1, self.weight.shape[1] * self.groups, _PACKED_FOR, _PACKED_FOR]
            places = (self.stride, self.padding, self.dilation, self.groups)
            packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.weight_scale, input_scale, self.input_zero, *places, shape
            )
        return packed, torch.zeros(len(self.weight), dtype=torch.int32), input_scale, output_scale

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # packed weights can be neither copied nor pickled


def _drop_packed(layer: nn.Module, _incompatible: object) -> None:
    layer._packed = None  # type: ignore[assignment]


class Int8Block(nn.Module):
    """A residual block; its sum is taken by its last convolution.

    Args:
        block: Float block, norms folded.
        wide: Whether the sum stays bfloat16.
    """

    def __init__(self, block: BasicBlock | Bottleneck, *, wide: bool) -> None:
        super().__init__()
        *first, last = _convs(block)
        layers = [Int8Layer(conv, "relu") for conv in first]
        self.layers = nn.ModuleList([*layers, Int8Layer(last, "bfloat16_relu" if wide else "relu")])
        self.projection = None
        if block.downsample is not None:
            self.projection = Int8Layer(_projection(block), "bfloat16" if wide else "signed")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]``, uint8 or a wide block's bfloat16.

        Without a projection the memory of ``x`` is used up.
        """
        *first, last = self.layers
        input_scale = float(self.layers[0].input_scale)  # type: ignore[arg-type]
        start = x if x.dtype == torch.uint8 else to_uint8(x, input_scale)
        out = start
        for layer in first:
            out = layer(out)
        scale, zero = 1.0, 0
        if self.projection is not None:
            x = self.projection(start)
            if x.dtype == torch.uint8:
                scale, zero = float(self.projection.output_scale), MIDDLE
        elif x.dtype == torch.uint8:
            scale = input_scale
        result: Tensor = last(out, x, scale, zero)
        return result


class Int8Backbone(nn.Module):
    """A body and its pyramid.

    Args:
        backbone: Float backbone, norms folded.
    """

    def __init__(self, backbone: ResNetFPN) -> None:
        super().__init__()
        body, fpn = backbone.body, backbone.fpn
        assert isinstance(body, ResNet)
        stem = nn.Sequential(body.conv1, body.relu, body.maxpool)
        self.stem = copy.deepcopy(stem).to(torch.bfloat16).to(memory_format=torch.channels_last)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Int8Block(block, wide=name in _WIDE_STAGES) for block in blocks))
            for name, blocks in _stages(body).items()
        )
        self.inner_blocks = nn.ModuleList(Int8Layer(_only_conv(block), "signed") for block in fpn.inner_blocks)
        self.layer_blocks = nn.ModuleList(
            Int8Layer(_only_conv(block), "signed", input_zero=MIDDLE) for block in fpn.layer_blocks
        )
        self.out_channels = backbone.out_channels
        self.level_names = list(backbone.level_names)
        self.strides = list(backbone.strides)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the pyramid of images ``[B, 3, H, W]``: uint8 levels, all of one scale, with the zero ``MIDDLE``."""
        with torch.autocast("cpu", enabled=False):
            x = self.stem(images.to(dtype=torch.bfloat16, memory_format=torch.channels_last))
        x = to_uint8(x, float(self.stages[0][0].layers[0].input_scale))  # type: ignore[index]
        maps = []
        for stage, inner in zip(self.stages, self.inner_blocks, strict=True):
            x = stage(x)
            if x.dtype != torch.uint8:
                x = to_uint8(x, float(inner.input_scale))  # type: ignore[arg-type]
            maps.append(x)
        levels = []
        merged: Tensor | None = None
        scale = 1.0
        for x, inner, layer in reversed(list(zip(maps, self.inner_blocks, self.layer_blocks, strict=True))):
            if merged is None:
                merged = inner(x)
            else:
                merged = inner(x, F.interpolate(merged, size=x.shape[-2:], mode="nearest"), scale, MIDDLE)
            scale = float(inner.output_scale)
            levels.append(layer(merged))
        levels.reverse()
        levels.append(levels[-1][:, :, ::2, ::2].contiguous(memory_format=torch.channels_last))
        return OrderedDict(zip(self.level_names, levels, strict=True))


class Int8ProposalHead(nn.Module):
    """The RPN's head, its two outputs computed as one.

    Args:
        head: Float head.
    """

    def __init__(self, head: RPNHead) -> None:
        super().__init__()
        self.conv = Int8Layer(head.conv[0][0], "relu", input_zero=MIDDLE)
        self.outputs = Int8Layer(_joined(head), "float32")
        self.num_anchors = int(head.cls_logits.out_channels)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Give objectness ``[B, A, H, W]`` and deltas ``[B, 4 * A, H, W]``, float32, for each level."""
        outputs = [self.outputs(self.conv(level)) for level in x]
        return [out[:, : self.num_anchors] for out in outputs], [out[:, self.num_anchors :] for out in outputs]


class Int8RoIAlign(nn.Module):
    """RoIAlign of uint8 levels, by another module's; the result has the levels' scale and zero.

    Args:
        pool: Takes bfloat16 levels. What it computes must be means of the levels' values, because the numbers it is
            given lack the scale.
    """

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool boxes ``[N, 4]`` of each image into uint8 ``[sum of N, C, 7, 7]``."""
        # -128..127 are exact in bfloat16, and a mean of them needs no clamping.
        centred = OrderedDict((name, level.to(torch.bfloat16).sub_(MIDDLE)) for name, level in x.items())
        pooled: Tensor = self.pool(centred, boxes, image_shapes)
        return pooled.add_(MIDDLE).round_().to(torch.uint8)


class Int8BoxHead(nn.Module):
    """The two fully connected layers of the box head.

    Args:
        head: Float head.
    """

    def __init__(self, head: TwoMLPHead) -> None:
        super().__init__()
        self.fc6 = Int8Layer(head.fc6, "relu", input_zero=MIDDLE)
        self.fc7 = Int8Layer(head.fc7, "float32")

    def forward(self, x: Tensor) -> Tensor:
        """Turn uint8 ``[N, C, 7, 7]`` into float32 vectors ``[N, O]``."""
        if len(x) == 0:
            return torch.zeros(0, len(self.fc7.weight))
        return F.relu(self.fc7(self.fc6(x.flatten(1))))


class Int8Detector(Detector):
    """A detector in int8; made by ``quantize_detector`` or ``load_detector``.

    It is used as any other in evaluation mode, on the CPU alone. Precisions and autocast touch its last layer only.

    Args:
        folded: Float detector with folded norms; shapes are taken from it, and the weights of what stays float.
    """

    def __init__(self, folded: Detector) -> None:
        super().__init__(
            folded.spec, folded.backbone, folded.roi_heads.box_predictor.cls_score.out_features, folded.categories
        )
        self.backbone = Int8Backbone(folded.backbone)
        self.rpn.head = Int8ProposalHead(folded.rpn.head)
        self.roi_heads.box_roi_pool = Int8RoIAlign(self.roi_heads.box_roi_pool)
        self.roi_heads.box_head = Int8BoxHead(folded.roi_heads.box_head)
        self.roi_heads.box_predictor.load_state_dict(folded.roi_heads.box_predictor.state_dict())
        self.score_threshold = folded.score_threshold
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def empty(cls, spec: DetectorSpec, num_classes: int, categories: Sequence[Category] = ()) -> Int8Detector:
        """Make a detector without weights, for ``load_state_dict``.

        Raises:
            UserError: If there is no int8 for such detectors, or on this computer.
        """
        _check_engine()
        _check_spec(spec)
        backbone = resnet_fpn(
            spec.arch, norm="frozen", out_channels=spec.out_channels, stride_in_1x1=spec.stride_in_1x1
        )
        return cls(folded_copy(Detector(spec, backbone, num_classes, categories)))

    def train(self, mode: bool = True) -> Int8Detector:
        """Accept evaluation mode.

        Raises:
            UserError: For training mode.
        """
        if mode:
            raise UserError("an int8 detector cannot be trained: train the float one and quantize it again")
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Detector:
        moved = fn(torch.empty(0, dtype=torch.bfloat16))
        if moved.device.type != "cpu" or moved.dtype != torch.bfloat16:
            what = moved.device.type if moved.device.type != "cpu" else moved.dtype
            raise UserError(
                f"an int8 detector runs on the CPU in its own types, and cannot be brought to {what} (in the tools: "
                "train.device=cpu or --device cpu)"
            )
        super()._apply(fn, recurse)
        return self


class Range:
    """What passes one place of a network: how large values are, and the mean of each channel."""

    NUM_BINS = 2048

    def __init__(self) -> None:
        self.histogram = torch.zeros(self.NUM_BINS, dtype=torch.float64)  # of absolute values in 0..top, without zeros
        self.top = 2.0**-40
        self.largest = 0.0
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Look at a tensor ``[B, C, H, W]`` or ``[N, C]``.

        Raises:
            WeightsError: If there is NaN or infinity in it.
        """
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
        """Give the scale of the least mean square error, of 127 steps from zero if ``signed``, else of 255."""
        steps = 127 if signed else 255
        if self.largest == 0:
            return 1.0
        width = self.top / self.NUM_BINS
        values = (torch.arange(self.NUM_BINS, dtype=torch.float64) + 0.5) * width
        limits = torch.linspace(0.1, 1, 91, dtype=torch.float64)[:, None] * self.largest
        step = limits / steps
        # What is below half a step becomes zero; what is above the limit becomes the limit.
        error = torch.where(values < step / 2, values.square(), step.square() / 12)
        error = torch.where(values > limits, (values - limits).square(), error)
        return float(step[(error @ self.histogram).argmin()])


@torch.no_grad()
def quantize_detector(model: Detector, images: Iterable[Tensor]) -> Int8Detector:
    """Turn a trained detector into one that computes in int8 on the CPU.

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
        WeightsError: If the model computes NaN or infinity on one.
    """
    _check_engine()
    if isinstance(model, Int8Detector):
        raise UserError("quantize: the detector is in int8 already")
    _check_spec(model.spec)
    if model.training:
        raise UserError("quantize: the model is in training mode; call eval() first")
    folded = folded_copy(_with_frozen_norms(model))
    ranges = _observe(folded, images)
    int8 = Int8Detector(folded)

    def fill(
        layer: nn.Module, source: nn.Conv2d | nn.Linear, inputs: Range, outputs: Range | None, scaled_by: Range
    ) -> None:
        assert isinstance(layer, Int8Layer)
        output_scale = None
        if layer.output.dtype == torch.uint8:
            assert outputs is not None
            output_scale = outputs.scale(signed=layer.output.zero == MIDDLE)
        layer.fill(source, inputs.mean, scaled_by.scale(signed=layer.input_zero == MIDDLE), output_scale)

    # A tensor that several layers read has the same range at each of them.
    for level, (stage, blocks) in enumerate(_stages(folded.backbone.body).items()):
        for index, block in enumerate(blocks):
            name = f"backbone.body.{stage}.{index}"
            inputs = [ranges[f"{name}.conv{number}"] for number in range(1, len(_convs(block)) + 1)]
            after = f"backbone.body.{stage}.{index + 1}.conv1"
            outputs = [*inputs[1:], ranges[after if after in ranges else f"backbone.fpn.inner_blocks.{level}.0"]]
            quantized = int8.backbone.get_submodule(f"stages.{level}.{index}")
            assert isinstance(quantized, Int8Block)
            for layer, conv, read, put in zip(quantized.layers, _convs(block), inputs, outputs, strict=True):
                fill(layer, conv, read, put, read)
            if quantized.projection is not None:
                fill(quantized.projection, _projection(block), inputs[0], ranges[f"{name}.downsample"], inputs[0])
    pyramid = ranges["rpn.head.conv.0.0"]
    for level, (inner, layer) in enumerate(zip(int8.backbone.inner_blocks, int8.backbone.layer_blocks, strict=True)):
        read, merged = (ranges[f"backbone.fpn.{kind}_blocks.{level}.0"] for kind in ("inner", "layer"))
        fill(inner, _only_conv(folded.backbone.fpn.inner_blocks[level]), read, merged, read)
        fill(layer, _only_conv(folded.backbone.fpn.layer_blocks[level]), merged, pyramid, merged)
    hidden = ranges["rpn.head.cls_logits"]
    fill(int8.rpn.head.conv, _only_conv(folded.rpn.head.conv), pyramid, hidden, pyramid)
    fill(int8.rpn.head.outputs, _joined(folded.rpn.head), hidden, None, hidden)
    int8_head, head = int8.roi_heads.box_head, folded.roi_heads.box_head
    pooled, vectors = ranges["roi_heads.box_head.fc6"], ranges["roi_heads.box_head.fc7"]
    fill(int8_head.fc6, head.fc6, pooled, vectors, pyramid)  # pooled values keep the scale of the levels
    fill(int8_head.fc7, head.fc7, vectors, None, vectors)
    return int8


def _check_engine() -> None:
    missing = [name for name in _OPS if not hasattr(torch.ops.onednn, name)]
    if missing or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise UserError(
            f"int8: this build of torch ({torch.__version__}) lacks oneDNN's int8 operators "
            f"({', '.join(missing) or 'oneDNN is not available'})"
        )
    if not torch.cpu._is_vnni_supported():
        raise UserError(
            "int8: this CPU has no AVX512-VNNI; without it sums of int8 products overflow their 16 bits, and nothing "
            "is gained: use bf16 or fp32"
        )


def _check_spec(spec: DetectorSpec) -> None:
    arch = find_arch(spec.arch)
    if spec.layout != "fpn" or not isinstance(arch, ResNetArch) or arch.shortcut not in ("B", "C"):
        raise UserError(
            "int8 is for ResNets with a feature pyramid and projection or identity shortcuts (resnet18 to resnet152, "
            f"ResNeXt, wide ones), got {spec.arch} with layout {spec.layout}"
        )
    if spec.norm == "group":
        raise UserError("int8 needs norms that fold into convolutions (frozen, batch), this model has norm group")
    if not spec.fast:
        raise UserError("int8 computes boxes in float32 whatever the features' type, which needs fast=True")


def _with_frozen_norms(model: Detector) -> Detector:
    """Give a copy whose BatchNorms are frozen ones of the same statistics."""
    model = frozen_copy(model)
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
            state = norm.state_dict()
            state.pop("num_batches_tracked")
            frozen.load_state_dict(state)
            model.set_submodule(name, frozen)
    return model


def _observe(folded: Detector, images: Iterable[Tensor]) -> dict[str, Range]:
    """Run a detector on images; give the ranges of its convolutions' and linear layers' inputs by their names.

    What a projection puts out is there under the projection's own name.
    """
    ranges: dict[str, Range] = {}
    handles = []

    def watch_input(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: ranges[name].add(inputs[0])

    def watch_output(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, _inputs, output: ranges[name].add(output)

    for name, module in folded.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            ranges[name] = Range()
            handles.append(module.register_forward_pre_hook(watch_input(name)))
        elif isinstance(module, Projection):
            ranges[name] = Range()
            handles.append(module.register_forward_hook(watch_output(name)))
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


def _stages(body: ResNet) -> dict[str, list[BasicBlock | Bottleneck]]:
    return {name: list(body.get_submodule(name).children()) for name in body.return_layers}  # type: ignore[arg-type]


def _convs(block: BasicBlock | Bottleneck) -> list[nn.Conv2d]:
    convs = [block.conv1, block.conv2]
    return [*convs, block.conv3] if isinstance(block, Bottleneck) else convs


def _projection(block: BasicBlock | Bottleneck) -> nn.Conv2d:
    assert isinstance(block.downsample, Projection)
    conv = block.downsample[0]
    assert isinstance(conv, nn.Conv2d)
    return conv


def _only_conv(block: nn.Module) -> nn.Conv2d:
    (conv,) = (module for module in block.modules() if isinstance(module, nn.Conv2d))
    return conv


def _joined(head: RPNHead) -> nn.Conv2d:
    """Give objectness and deltas as one convolution, objectness first."""
    parts = [head.cls_logits, head.bbox_pred]
    joined = nn.Conv2d(parts[0].in_channels, sum(part.out_channels for part in parts), 1)
    joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return joined


def to_uint8(x: Tensor, scale: float) -> Tensor:
    """Round a tensor after a ReLU to uint8 of zero 0."""
    # By way of int8, to which torch converts 4 times as fast as to uint8. Halves are rounded to even either way.
    steps = x.to(torch.float32, copy=True).mul_(1 / scale).sub_(MIDDLE).round_().clamp_max_(MIDDLE - 1)
    return steps.to(torch.int8).view(torch.uint8).bitwise_xor_(MIDDLE)
