"""Detectors in 8-bit integers, for inference on a CPU: calibrated on images, without training.

Everything with many multiplications is computed in int8: the body, the pyramid, the RPN's head and the two fully
connected layers of the box head. The stem (3 channels), RoIAlign and the last layer stay floating point.

Legend: ``B`` images, ``C`` channels, ``H, W`` pixels, ``O, I`` output and input channels of a layer, ``N`` boxes. A
tensor ``x`` is stored as ``q = round(x / scale) + zero``, its scale one number, ``q`` in 0..255. After a ReLU ``zero``
is 0; where values have both signs it is 128. Weights are int8 in -127..127 with a scale for each output channel.

* Frozen norms are folded into the convolutions first. ReLU, the sum with the shortcut (whose scale is its own) and the
  rounding to the next layer's scale are part of the convolution. Only the sums of stages 3 and 4 stay bfloat16, and are
  rounded for the convolutions that read them.
* A 1x1 convolution is run as a matrix product. oneDNN's convolution is as fast, but packs weights in a layout that
  depends on the size of the map, and packs them anew in every call where that was another: 45 ms for C5's projection.

Measured on 2 cores of an AMD EPYC (Zen 5, AVX512-VNNI), a ResNet-101 FPN fine-tuned on BCCD, 32 training images, AP at
416 px on val and test: float32 0.590, 0.594; bfloat16 0.588, 0.597; this 0.592, 0.597. An image at 800/1333 takes
0.40 s, in turn with bfloat16's 0.65. The pyramid is 5 % of its norm from float32's (bfloat16 2 %). oneDNN's
convolutions run at 1.6 to 2.0 TOP/s, twice bfloat16's rate, in nearly every shape of the network. With sums in uint8 in
all stages AP is 0.586 and 0.600, and the pyramid 12 % off in about an eighth less time (Zen 4, body and pyramid at
800x1088: 0.47 s for 0.51). ``qconv2d_pointwise`` takes 64
ms for the first linear layer, boxes as a batch, where the product takes 14 and bfloat16 29.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
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
from resdet.models.norm import folded_copy
from resdet.models.resnet import BasicBlock, Bottleneck, ResNet
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

_AT_ONCE = 2**20  # values rounded at a time: the float32 ones stay in the cache, 1.0 ms where a map of C4 took 1.7

_NOT_FINITE = "int8: the model computes NaN or infinity (its {} is not finite)"

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
    """A convolution or linear layer with int8 weights, which reads uint8 tensors.

    It takes the shapes of the layer that it replaces when it is made, and its weights by ``fill``.
    """

    weight: Tensor  # int8, of the layer's shape
    weight_scale: Tensor  # float32 [O]
    bias: Tensor  # float32 [O]
    input_scale: Tensor  # float64, a scalar
    output_scale: Tensor  # float64, a scalar; 1 where the output is floats

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
        self._sound: list[tuple[int, int]] = []  # where and what bias and weight_scale were when found finite
        self.register_load_state_dict_post_hook(_drop_packed)  # type: ignore[no-untyped-call]

    def fill(self, layer: nn.Conv2d | nn.Linear, mean: Tensor, input_scale: float, output_scale: float | None) -> None:
        """Take the weights of a float layer, given the mean of each channel of its input, ``[I]``.

        The scale of its output is that after the sum and the ReLU; None if the output is floats.
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
        """Map uint8 ``[B, I, H, W]`` to ``[B, O, H', W']``, both channels-last, or ``[N, I]`` to ``[N, O]``.

        The shortcut, of the output's shape and type and of the given scale and zero, is added before the ReLU. Its
        memory is used up.
        """
        state = [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in (self.bias, self.weight_scale)]
        # Rounded to integers, NaN would vanish. Looked for in each call, it took 8 of a backbone's 580 ms.
        if state != self._sound or state[0][1] < 0:
            if not math.isfinite((self.bias.sum() + self.weight_scale.sum()).item()):
                raise WeightsError(_NOT_FINITE.format("bias or weight_scale of a layer"))
            self._sound = state
        if self._packed is None:
            self._packed = self._pack()
        packed, zeros, input_scale, output_scale = self._packed
        operands = (x, input_scale, self.input_zero, packed, self.weight_scale, zeros)
        moves: tuple[list[int] | int, ...] = (self.stride, self.padding, self.dilation, self.groups)
        operator = torch.ops.onednn.qconv2d_pointwise
        shape: torch.Size | None = None
        if self.is_product:
            moves, operator = (), torch.ops.onednn.qlinear_pointwise
            if x.dim() == 4:
                pixels = x[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)  # [B, H', W', I]
                shape = pixels.shape[:3]
                operands = (pixels.reshape(-1, x.shape[1]), *operands[1:])  # [B * H' * W', I]
                shortcut = None if shortcut is None else shortcut.permute(0, 2, 3, 1).reshape(-1, shortcut.shape[1])
        dtype, output_zero, after = self.output
        result = (*moves, output_scale, output_zero, dtype)
        out: Tensor
        if shortcut is None:
            out = operator.default(*operands, self.bias, *result, after, [], "")
        else:
            out = operator.binary(*operands, shortcut, self.bias, *result, scale, zero, "sum", 1.0, after, [], "")
        return out if shape is None else out.view(*shape, -1).permute(0, 3, 1, 2)

    def _pack(self) -> tuple[Tensor, Tensor, float, float]:
        input_scale, output_scale = float(self.input_scale), float(self.output_scale)
        if not 0 < input_scale < math.inf or not 0 < output_scale < math.inf:
            raise WeightsError(_NOT_FINITE.format("input_scale or output_scale of a layer"))
        if self.is_product:
            packed = torch.ops.onednn.qlinear_prepack(self.weight.flatten(1), None)
        else:
            shape = [1, self.weight.shape[1] * self.groups, _PACKED_FOR, _PACKED_FOR]
            moves = (self.stride, self.padding, self.dilation, self.groups)
            packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.weight_scale, input_scale, self.input_zero, *moves, shape
            )
        return packed, torch.zeros(len(self.weight), dtype=torch.int32), input_scale, output_scale

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_sound": []}  # packed weights can be neither copied nor pickled


def _drop_packed(layer: nn.Module, _incompatible: object) -> None:
    layer._packed = None  # type: ignore[assignment]


class Int8Block(nn.Module):
    """A residual block; its sum is taken by its last convolution, and is bfloat16 if ``wide``."""

    def __init__(self, block: BasicBlock | Bottleneck, *, wide: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Int8Layer(conv, "relu") for conv in convs_of(block)[:-1])
        self.layers.append(Int8Layer(convs_of(block)[-1], "bfloat16_relu" if wide else "relu"))
        self.projection = None
        if block.downsample is not None:
            self.projection = Int8Layer(only_conv(block.downsample), "bfloat16" if wide else "signed")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]``, uint8 or a wide block's bfloat16; without a projection its memory is used up."""
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
    """A body and its pyramid."""

    def __init__(self, backbone: ResNetFPN) -> None:
        super().__init__()
        body, fpn = backbone.body, backbone.fpn
        assert isinstance(body, ResNet)
        stem = nn.Sequential(body.conv1, body.relu, body.maxpool)
        self.stem = copy.deepcopy(stem).to(torch.bfloat16).to(memory_format=torch.channels_last)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Int8Block(block, wide=name in _WIDE_STAGES) for block in blocks))
            for name, blocks in blocks_of(body).items()
        )
        self.inner_blocks = nn.ModuleList(Int8Layer(only_conv(block), "signed") for block in fpn.inner_blocks)
        self.layer_blocks = nn.ModuleList(
            Int8Layer(only_conv(block), "signed", input_zero=MIDDLE) for block in fpn.layer_blocks
        )
        self.out_channels = backbone.out_channels
        self.level_names = list(backbone.level_names)
        self.strides = list(backbone.strides)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the pyramid of images ``[B, 3, H, W]``: uint8 levels, all of one scale, with the zero ``MIDDLE``."""
        with torch.autocast("cpu", enabled=False):
            x = self.stem(images.to(dtype=torch.bfloat16, memory_format=torch.channels_last))  # [B, C, H / 4, W / 4]
        if not math.isfinite(x[:, :, x.shape[2] // 2, x.shape[3] // 2].sum().item()):  # images are refused before
            raise WeightsError(_NOT_FINITE.format("stem"))
        x = to_uint8(x, float(self.stages[0][0].layers[0].input_scale))  # type: ignore[index]
        maps = []
        for stage, inner in zip(self.stages, self.inner_blocks, strict=True):
            x = stage(x)
            if x.dtype != torch.uint8:
                x = to_uint8(x, float(inner.input_scale))  # type: ignore[arg-type]
            maps.append(x)
        levels = []
        merged: Tensor | None = None  # [B, out_channels, H, W] of the level above
        scale = 1.0
        for x, inner, layer in reversed(list(zip(maps, self.inner_blocks, self.layer_blocks, strict=True))):
            above = None if merged is None else F.interpolate(merged, size=x.shape[-2:], mode="nearest")
            merged = inner(x) if above is None else inner(x, above, scale, MIDDLE)
            scale = float(inner.output_scale)
            levels.append(layer(merged))
        levels.reverse()
        levels.append(levels[-1][:, :, ::2, ::2].contiguous(memory_format=torch.channels_last))
        return OrderedDict(zip(self.level_names, levels, strict=True))


class Int8ProposalHead(nn.Module):
    """The RPN's head, its two outputs computed as one."""

    def __init__(self, head: RPNHead) -> None:
        super().__init__()
        self.conv = Int8Layer(head.conv[0][0], "relu", input_zero=MIDDLE)
        self.outputs = Int8Layer(joined_outputs(head), "float32")
        self.num_anchors = int(head.cls_logits.out_channels)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute objectness ``[B, A, H, W]`` and deltas ``[B, 4 * A, H, W]``, float32, of each level."""
        outputs = [self.outputs(self.conv(level)) for level in x]
        return [out[:, : self.num_anchors] for out in outputs], [out[:, self.num_anchors :] for out in outputs]


class Int8RoIAlign(nn.Module):
    """RoIAlign of uint8 levels by a module for bfloat16 ones; the result has the levels' scale and zero.

    The module must compute means of the levels' values, because the numbers it is given lack the scale.
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
    """The two fully connected layers of the box head."""

    def __init__(self, head: TwoMLPHead) -> None:
        super().__init__()
        self.fc6 = Int8Layer(head.fc6, "relu", input_zero=MIDDLE)
        self.fc7 = Int8Layer(head.fc7, "float32")

    def forward(self, x: Tensor) -> Tensor:
        """Turn uint8 ``[N, C, 7, 7]`` into float32 vectors ``[N, O]``."""
        if len(x) == 0:
            return torch.zeros(0, len(self.fc7.weight))
        return F.relu(self.fc7(self.fc6(x.flatten(1))))  # [N, C * 7 * 7] -> [N, O]


class Int8Detector(Detector):
    """A detector in int8; built by ``quantize_detector`` or ``load_detector``.

    It is used as any other in evaluation mode, on the CPU alone. Precisions and autocast affect its last layer only.
    From a float detector with folded norms it takes shapes, and the weights of what stays float.
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
        """Build a detector without weights, for ``load_state_dict``."""
        check_engine()
        check_spec(spec)
        backbone = resnet_fpn(spec.arch, out_channels=spec.out_channels, stride_in_1x1=spec.stride_in_1x1)
        return cls(folded_copy(Detector(spec, backbone, num_classes, categories)))

    def train(self, mode: bool = True) -> Int8Detector:
        """Refuse training mode with a UserError."""
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


def check_engine() -> None:
    """Raise UserError if this build of torch or this CPU cannot run int8."""
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


def check_spec(spec: DetectorSpec) -> None:
    """Raise UserError if there is no int8 for such detectors."""
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


def blocks_of(body: ResNet) -> dict[str, list[BasicBlock | Bottleneck]]:
    """Return the blocks of each returned stage, by its name."""
    return {name: list(body.get_submodule(name).children()) for name in body.return_layers}  # type: ignore[arg-type]


def convs_of(block: BasicBlock | Bottleneck) -> list[nn.Conv2d]:
    """Return the convolutions of a block's branch, in the order they run in."""
    return [part for part in block.children() if isinstance(part, nn.Conv2d)]


def only_conv(block: nn.Module) -> nn.Conv2d:
    """Return the one convolution of a module."""
    (conv,) = (module for module in block.modules() if isinstance(module, nn.Conv2d))
    return conv


def joined_outputs(head: RPNHead) -> nn.Conv2d:
    """Return objectness and deltas as one convolution, objectness first."""
    first, second = head.cls_logits, head.bbox_pred
    joined = nn.Conv2d(first.in_channels, first.out_channels + second.out_channels, 1)
    joined.weight = nn.Parameter(torch.cat([first.weight, second.weight]), requires_grad=False)
    joined.bias = nn.Parameter(torch.cat([first.bias, second.bias]), requires_grad=False)
    return joined


def to_uint8(x: Tensor, scale: float) -> Tensor:
    """Round a tensor after a ReLU, ``[B, C, H, W]`` and channels-last, to uint8 of zero 0."""
    values = x.permute(0, 2, 3, 1).reshape(-1)
    steps = torch.empty_like(values, dtype=torch.int8)
    for part, out in zip(torch.split(values, _AT_ONCE), torch.split(steps, _AT_ONCE), strict=True):
        # By way of int8, to which torch converts 4 times as fast as to uint8. Halves are rounded to even either way.
        rounded = part.to(torch.float32, copy=True).mul_(1 / scale).sub_(MIDDLE).round_().clamp_max_(MIDDLE - 1)
        out.copy_(rounded)
    batch, channels, height, width = x.shape
    return steps.view(torch.uint8).bitwise_xor_(MIDDLE).view(batch, height, width, channels).permute(0, 3, 1, 2)
