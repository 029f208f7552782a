"""How other libraries name and lay out torchvision's tensors: a table of formats, and rules that change tensors.

A format is a way of naming the same tensors (``Format``), a few differences of layout (``Rule``, a function and its
inverse), and the conventions of its models (channel order, stride, mean). ``resdet.weights.convert`` applies them.
The libraries' own converters each need that library installed and know one direction, so this table is our own.

Sources, each read in its own repository:

- detectron2: ``detectron2/checkpoint/c2_model_loading.py`` and ``detection_checkpoint.py``, ``layers/batch_norm.py``,
  ``tools/convert-torchvision-to-d2.py``, ``configs/COCO-Detection/``.
- detectron (Caffe2 blobs: MSRA's ``R-50.pkl``, ``R-101.pkl``, and Detectron's model zoo): the first file of
  detectron2, ``maskrcnn_benchmark/utils/c2_model_loading.py``, and mmdetection's
  ``tools/model_converters/detectron2pytorch.py``.
- mmdetection, 2.0 and later: ``mmdet/models/necks/fpn.py``, ``dense_heads/rpn_head.py``,
  ``roi_heads/bbox_heads/bbox_head.py``, ``configs/faster_rcnn/faster_rcnn_r50_caffe_fpn_1x_coco.py``; before that,
  ``tools/model_converters/upgrade_model_version.py``.
- maskrcnn-benchmark: ``modeling/backbone/{resnet,fpn}.py``, ``modeling/roi_heads/box_head/roi_box_*.py``,
  ``layers/batch_norm.py``.
- timm: its ResNets have torchvision's names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = dict[str, Tensor]
# A whole detector; a backbone with its FPN; a body alone, or a classifier.
Form: TypeAlias = Literal["detector", "pyramid", "body"]

BODY = "backbone.body."
FPN = "backbone.fpn."
STEM = f"{BODY}conv1.weight"
SCORES = "roi_heads.box_predictor.cls_score."
DELTAS = "roi_heads.box_predictor.bbox_pred."

# RGB on 0..255. The first is torchvision's and detectron2's, the second Detectron's (its config.py, PIXEL_MEANS).
MEAN = (123.675, 116.28, 103.53)
MEAN_DETECTRON = (122.7717, 115.9465, 102.9801)
STD = (58.395, 57.12, 57.375)
_FROZEN_EPS = 1e-5


@dataclass(frozen=True)
class Rule:
    """One difference of layout: functions that return a new dictionary and leave the tensors unchanged."""

    name: str  # for reports
    inward: Callable[[Tensors], Tensors]  # from the source's layout to torchvision's
    outward: Callable[[Tensors], Tensors]  # the inverse


def flip_stem_channels(tensors: Tensors) -> Tensors:
    """Reverse the input channels of the first convolution: a stem for BGR images becomes one for RGB, or back."""
    stem = tensors.get(STEM)  # [64, 3, 7, 7]
    if stem is None or stem.dim() != 4 or stem.shape[1] != 3:
        return tensors
    return tensors | {STEM: stem.flip(1).contiguous()}


def background_to_first(tensors: Tensors, shift: int = 1) -> Tensors:
    """Move the background's row of the class scores from last to first, or back with a shift of -1."""
    return tensors | {name: rows.roll(shift, 0) for name, rows in tensors.items() if name.startswith(SCORES)}


def add_background_deltas(tensors: Tensors) -> Tensors:
    """Prepend four rows of zeros to the class-wise box regression: torchvision has rows for the background too.

    No result depends on them: they are neither decoded nor trained.
    """
    return tensors | {
        name: torch.cat([rows.new_zeros((4, *rows.shape[1:])), rows])  # [4K, C] -> [4 + 4K, C]
        for name, rows in tensors.items()
        if name.startswith(DELTAS)
    }


def drop_background_deltas(tensors: Tensors) -> Tensors:
    """Drop the four rows of the background from the class-wise box regression."""
    return tensors | {name: rows[4:].clone() for name, rows in tensors.items() if name.startswith(DELTAS)}


def add_norm_statistics(tensors: Tensors) -> Tensors:
    """Add the statistics with which a frozen BatchNorm computes a given affine map (scale and bias alone).

    They are mean 0 and variance ``1 - eps``, so that adding ``eps`` gives 1.

    Source: ``FrozenBatchNorm2d.__init__`` in detectron2's ``layers/batch_norm.py``, which keeps these when a Caffe2
    file is loaded. (mmdetection's ``detectron2pytorch.py`` writes a variance of 1 and is off by 5e-6.)
    """
    added = {name: value for statistics in _affine_statistics(tensors) for name, value in statistics.items()}
    return tensors | {name: value for name, value in added.items() if name not in tensors}


def drop_norm_statistics(tensors: Tensors) -> Tensors:
    """Drop the statistics of every norm for which ``add_norm_statistics`` would add the very same ones."""
    kept = dict(tensors)
    for statistics in _affine_statistics(tensors):
        if all(name in tensors and torch.equal(tensors[name], value) for name, value in statistics.items()):
            for name in statistics:
                del kept[name]
    return kept


def _affine_statistics(tensors: Tensors) -> Iterator[Tensors]:
    """Yield, for each norm of the body, the two statistics that make it the affine map of its scale and bias."""
    for name, scale in tensors.items():
        if scale.dim() == 1 and name.startswith(BODY) and re.search(r"\.(bn\d|downsample\.1)\.weight$", name):
            module = name.removesuffix(".weight")
            zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
            yield {f"{module}.running_mean": zeros, f"{module}.running_var": ones - _FROZEN_EPS}


def modern_names(tensors: Tensors) -> Tensors:
    """Rename the FPN and the RPN of an older torchvision as they are named now.

    Source: the version hooks of ``torchvision/ops/feature_pyramid_network.py`` and ``models/detection/rpn.py``.
    """
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"(^|\.)(fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1\2.0.\3", name)
        renamed[re.sub(r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", name)] = tensor
    return renamed


BGR_STEM = Rule("BGR stem", flip_stem_channels, flip_stem_channels)
BACKGROUND_LAST = Rule("background row last", background_to_first, partial(background_to_first, shift=-1))
NO_BACKGROUND_DELTAS = Rule("no box regression of the background", add_background_deltas, drop_background_deltas)
AFFINE_NORMS = Rule("norms without statistics", add_norm_statistics, drop_norm_statistics)
# detectron2 reads norms without statistics, and always writes them.
MISSING_STATISTICS = Rule("norms without statistics", add_norm_statistics, lambda tensors: tensors)


# ---- names

_PARTS = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample.0", "downsample.1")  # of a block
_TORCH_NORM = {leaf: f".{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
_TORCH_LINEAR = {"weight": ".weight", "bias": ".bias"}
_BLOB_NORM = {"weight": "_s", "bias": "_b", "running_mean": "_rm", "running_var": "_riv"}
_BLOB_LINEAR = {"weight": "_w", "bias": "_b"}


def _torchvision_unit(stage: int, block: int, part: str, stem: str = "") -> str:
    return f"{stem}{part}" if stage == 0 else f"layer{stage}.{block}.{part}"


def _detectron2_unit(stage: int, block: int, part: str) -> str:
    unit = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}.get(part, part)
    unit = re.sub(r"^bn(\d)$", r"conv\1.norm", unit)
    return f"stem.{unit}" if stage == 0 else f"res{stage + 1}.{block}.{unit}"


def _detectron_unit(stage: int, block: int, part: str) -> str:
    if stage == 0:
        return {"conv1": "conv1", "bn1": "res_conv1_bn"}[part]
    unit = {"downsample.0": "branch1", "downsample.1": "branch1_bn"}.get(part)
    if unit is None:
        unit = f"branch2{'abc'[int(part[-1]) - 1]}{'_bn' if part.startswith('bn') else ''}"
    return f"res{stage + 1}_{block}_{unit}"


def _prefixes(detector: tuple[str, str], pyramid: tuple[str, str]) -> dict[Form, tuple[str, str]]:
    return {"detector": detector, "pyramid": pyramid, "body": ("", "")}


@dataclass(frozen=True)
class Format:
    """How a library names and lays out torchvision's tensors."""

    # Names a convolution or norm of the body from stage (0: the stem), block, and torchvision's name in it.
    unit: Callable[[int, int, str], str] = _torchvision_unit
    # What precedes the names of body and FPN. No library has a prefix before the names of a body alone.
    prefixes: Mapping[Form, tuple[str, str]] = field(default_factory=lambda: _prefixes((BODY, FPN), ("body.", "fpn.")))
    # The 1x1 and the 3x3 convolution of an FPN level: {level} is 0..3 for C2..C5, {last} the stage's last block.
    lateral: str = "inner_blocks.{level}.0"
    output: str = "layer_blocks.{level}.0"
    heads: Mapping[str, str] = field(default_factory=dict)  # its name for each of torchvision's modules of the heads
    classifier: str = "fc"  # the linear layer of a classifier
    num_classes: str = "num_classes"  # the setting that counts a detector's classes
    norm_leaves: Mapping[str, str] = field(default_factory=lambda: _TORCH_NORM)
    linear_leaves: Mapping[str, str] = field(default_factory=lambda: _TORCH_LINEAR)
    rules: tuple[Rule, ...] = ()  # differences of layout, in the order of reading, besides BGR_STEM
    bgr: bool = False  # its images are BGR
    # Its plain ResNets are MSRA's: stride in the first 1x1 convolution, images on 0..255 not divided by a deviation.
    stride_in_1x1: bool = False
    norm_eps: float = 1e-5  # what its frozen norms add to the variance
    mean: tuple[float, float, float] = MEAN  # RGB, 0..255


_HEADS = (
    "rpn.head.conv.0.0",
    "rpn.head.cls_logits",
    "rpn.head.bbox_pred",
    "roi_heads.box_head.fc6",
    "roi_heads.box_head.fc7",
    "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred",
)


def _heads(*parts: tuple[str, ...]) -> dict[str, str]:
    """Map torchvision's modules of the heads to their names: the prefix of each part with each of its other texts."""
    return dict(zip(_HEADS, (prefix + name for prefix, *names in parts for name in names), strict=True))


_MMDETECTION = Format(
    prefixes=_prefixes(("backbone.", "neck."), ("backbone.", "neck.")),
    lateral="lateral_convs.{level}.conv",
    output="fpn_convs.{level}.conv",
    heads=_heads(
        ("rpn_head.", "rpn_conv", "rpn_cls", "rpn_reg"),
        ("roi_head.bbox_head.", "shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg"),
    ),
    num_classes="roi_head.bbox_head.num_classes",
    rules=(BACKGROUND_LAST, NO_BACKGROUND_DELTAS),
)

FORMATS: dict[str, Format] = {
    "torchvision": Format(heads=_heads(("", *_HEADS))),
    "detectron2": Format(
        unit=_detectron2_unit,
        prefixes=_prefixes(("backbone.bottom_up.", "backbone."), ("bottom_up.", "")),
        lateral="fpn_lateral{stage}",
        output="fpn_output{stage}",
        heads=_heads(
            ("proposal_generator.rpn_head.", "conv", "objectness_logits", "anchor_deltas"),
            ("roi_heads.", "box_head.fc1", "box_head.fc2", "box_predictor.cls_score", "box_predictor.bbox_pred"),
        ),
        classifier="linear",
        num_classes="MODEL.ROI_HEADS.NUM_CLASSES",
        rules=(MISSING_STATISTICS, BACKGROUND_LAST, NO_BACKGROUND_DELTAS),
        bgr=True,
        stride_in_1x1=True,
    ),
    "detectron": Format(
        unit=_detectron_unit,
        prefixes=_prefixes(("", ""), ("", "")),
        lateral="fpn_inner_res{stage}_{last}_sum{lateral}",
        output="fpn_res{stage}_{last}_sum",
        heads=_heads(
            ("", "conv_rpn_fpn2", "rpn_cls_logits_fpn2", "rpn_bbox_pred_fpn2", "fc6", "fc7", "cls_score", "bbox_pred")
        ),
        classifier="fc1000",
        num_classes="MODEL.NUM_CLASSES",
        norm_leaves=_BLOB_NORM,
        linear_leaves=_BLOB_LINEAR,
        rules=(AFFINE_NORMS,),
        bgr=True,
        stride_in_1x1=True,
        mean=MEAN_DETECTRON,
    ),
    "mmdetection": _MMDETECTION,
    # Style "caffe" of mmdetection's configurations: MSRA's networks under the same names.
    "mmdetection-caffe": replace(_MMDETECTION, bgr=True, stride_in_1x1=True),
    "maskrcnn-benchmark": Format(
        unit=partial(_torchvision_unit, stem="stem."),
        lateral="fpn_inner{number}",
        output="fpn_layer{number}",
        heads=_heads(
            ("rpn.head.", "conv", "cls_logits", "bbox_pred"),
            ("roi_heads.box.feature_extractor.", "fc6", "fc7"),
            ("roi_heads.box.predictor.", "cls_score", "bbox_pred"),
        ),
        classifier="fc1000",
        num_classes="MODEL.ROI_BOX_HEAD.NUM_CLASSES",
        bgr=True,
        stride_in_1x1=True,
        norm_eps=0.0,
        mean=MEAN_DETECTRON,
    ),
    "timm": Format(),
}


def count_blocks(names: Iterable[str]) -> dict[int, int]:
    """Count the blocks of each stage (1..4), whichever format the names are of."""
    depths: dict[int, int] = {}
    for name in names:
        found = re.search(r"(?:^|\.|_)(layer|res)(\d)[._](\d+)[._]", name)
        if found:
            stage = int(found[2]) - (found[1] == "res")
            depths[stage] = max(depths.get(stage, 0), int(found[3]) + 1)
    return depths


def tensor_names(naming: Format, form: Form, depths: Mapping[int, int]) -> dict[str, str]:
    """Map torchvision's name of every possible tensor to the format's, given the blocks of each stage 1..4.

    The map is a bijection, with more names than any one network has (a basic block has no third convolution).
    """
    body, fpn = naming.prefixes[form]
    names: dict[str, str] = {}

    def add(ours: str, theirs: str, leaves: Mapping[str, str]) -> None:
        for leaf, suffix in leaves.items():
            names[f"{ours}.{leaf}"] = f"{theirs}{suffix}"

    # Every convolution and norm that a body of these depths may have, by stage and block: the stem is stage 0.
    units = [(0, 0, "conv1"), (0, 0, "bn1")]
    for stage, depth in sorted(depths.items()):
        units += [(stage, block, part) for block in range(depth) for part in _PARTS]
    kernel = {"weight": naming.linear_leaves["weight"]}
    for stage, block, part in units:
        leaves = kernel if part.startswith("conv") or part == "downsample.0" else naming.norm_leaves
        add(BODY + _torchvision_unit(stage, block, part), body + naming.unit(stage, block, part), leaves)
    if form != "body":
        for stage, depth in sorted(depths.items()):
            parts = {
                "level": stage - 1,
                "number": stage,
                "stage": stage + 1,
                "last": depth - 1,
                # Detectron's topmost 1x1 convolution has nothing to be lateral to.
                "lateral": "" if stage == max(depths) else "_lateral",
            }
            add(f"{FPN}inner_blocks.{stage - 1}.0", fpn + naming.lateral.format(**parts), naming.linear_leaves)
            add(f"{FPN}layer_blocks.{stage - 1}.0", fpn + naming.output.format(**parts), naming.linear_leaves)
    if form == "detector":
        for ours, theirs in naming.heads.items():
            add(ours, theirs, naming.linear_leaves)
    add("fc", naming.classifier, naming.linear_leaves)
    return names
