"""The detector: torchvision's FasterRCNN on any body, its knobs in one typed place, its checkpoint self-sufficient.

Legend: ``B`` images, ``N`` boxes, ``K`` foreground classes, ``C, H, W`` channels and pixels.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import RPNHead

from resdet.errors import UserError, WeightsError
from resdet.models import roi_align
from resdet.models.archs import ARCHS, VGGArch, find_arch
from resdet.models.backbone import ResNetFPN, SingleLevel, check_anchors, freeze_stages, resnet_fpn
from resdet.models.bodies import Body, make_body
from resdet.models.convert import FACTS_ENTRY, Converted, to_torchvision
from resdet.models.losses import BoxLoss, ClassLoss
from resdet.models.norm import NormName
from resdet.models.rcnn import (
    Anchors,
    BoxHeads,
    BoxPredictor,
    Conv5Head,
    FastProposalNetwork,
    ProposalHead,
    ProposalNetwork,
)
from resdet.models.resnet import ResNet
from resdet.models.sampling import SeededTransform
from resdet.models.transform import PilTransform
from resdet.models.weights import (
    LoadReport,
    WeightsSource,
    fetch,
    load_backbone_weights,
    name_some,
    read_checkpoint,
    tensors_in,
)
from resdet.types import Category, categories_from_plain, categories_to_plain

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "resdet-detector-1"
INT8_FORMAT = "resdet-detector-int8-1"

_PREDICTOR = "roi_heads.box_predictor."
_CLASS_SCORES = f"{_PREDICTOR}cls_score.weight"
_STEM = "backbone.body.conv1.weight"
# What convert calls files whose names are those of torchvision's models.
_OWN_LAYOUT = ("torchvision", "timm")

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class DetectorSpec(BaseModel):
    """Everything that makes a detector what it is, apart from its weights and its classes.

    A checkpoint carries it, so that the model can be built again from the file alone. Names and defaults of the knobs
    of Faster R-CNN are torchvision's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: str = Field(
        default="resnet101",
        description="Body of the backbone; the table of architectures is resdet/models/archs.py.",
        json_schema_extra={"enum": list(ARCHS)},
    )
    layout: Literal["fpn", "c4", "dc5"] = Field(
        default="fpn",
        description="What proposals and boxes are found on. fpn: a feature pyramid. c4: C4 alone, at stride 16, and "
        "conv5 run on each proposal's 14x14 features, as the first ResNet detectors did. dc5: C5 alone, at stride 16, "
        "conv5 dilated and not strided; of a VGG that is conv5_3, as the first Faster R-CNN had it.",
    )
    norm: NormName = Field(
        default="frozen",
        description="Normalisation in the body: frozen (fixed statistics, for fine-tuning from pretrained weights), "
        "batch (needs large batches) or group (32 groups).",
    )
    norm_eps: float = Field(
        default=1e-5,
        ge=0,
        description="Added to the variance by every norm of the body; 0 for weights from before 2020.",
    )
    out_channels: PositiveInt = Field(
        default=256, description="Channels of every level of the feature pyramid; without one, of no effect."
    )
    fast: bool = Field(
        default=True,
        description="Frozen norms folded into the convolutions, channels-last, RoIAlign on every core, boxes in "
        "float32 whatever the precision. Off: torchvision's operations bit for bit. Parameters are the same.",
    )
    min_size: PositiveInt | tuple[PositiveInt, ...] = Field(
        default=800,
        description="Length in pixels to which an image's shorter side is scaled. Of several one is drawn at random "
        "for each training image, and the last is used otherwise.",
    )
    max_size: PositiveInt = Field(
        default=1333, description="Longest side allowed after scaling, in pixels; it overrides min_size."
    )
    image_mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="Subtracted from the red, green and blue of images in [0, 1]."
    )
    image_std: tuple[Positive, Positive, Positive] = Field(
        default=(0.229, 0.224, 0.225), description="What red, green and blue are divided by after that."
    )
    anchor_sizes: tuple[PositiveInt, ...] = Field(
        default=(32, 64, 128, 256, 512),
        min_length=1,
        description="Side of the square anchor of each level P2..P6, in pixels of the scaled image; a pyramid of other "
        "strides has 8 times the stride of each level by default. Without a pyramid, sides of the anchors at every "
        "place.",
    )
    aspect_ratios: tuple[Positive, ...] = Field(
        default=(0.5, 1.0, 2.0),
        min_length=1,
        description="Height over width of the anchors at every place of every level.",
    )
    box_head_channels: PositiveInt = Field(
        default=1024,
        description="Width of the two fully connected layers of the box head; c4 has conv5 in their place.",
    )
    rpn_pre_nms_top_n_train: PositiveInt = Field(
        default=2000, description="Proposals of each level that enter non-maximum suppression, in training."
    )
    rpn_pre_nms_top_n_test: PositiveInt = Field(default=1000, description="The same, outside training.")
    rpn_post_nms_top_n_train: PositiveInt = Field(
        default=2000, description="Proposals of each image that are kept after non-maximum suppression, in training."
    )
    rpn_post_nms_top_n_test: PositiveInt = Field(default=1000, description="The same, outside training.")
    rpn_nms_thresh: Fraction = Field(
        default=0.7, description="IoU above which the weaker of two proposals of one level is dropped."
    )
    rpn_fg_iou_thresh: Fraction = Field(
        default=0.7, description="IoU with an object from which an anchor is a positive."
    )
    rpn_bg_iou_thresh: Fraction = Field(
        default=0.3, description="IoU with every object below which an anchor is a negative."
    )
    rpn_batch_size_per_image: PositiveInt = Field(
        default=256, description="Anchors of each image that the RPN's loss is taken over."
    )
    rpn_positive_fraction: Fraction = Field(default=0.5, description="Share of positives among them, at most.")
    rpn_score_thresh: Fraction = Field(default=0.0, description="Proposals with a lower objectness are dropped.")
    box_score_thresh: Fraction = Field(default=0.05, description="Detections with a lower score are dropped.")
    box_nms_thresh: Fraction = Field(
        default=0.5, description="IoU above which the weaker of two detections of one class is dropped."
    )
    box_detections_per_img: PositiveInt = Field(
        default=100, description="Detections of each image that are kept, best first."
    )
    box_fg_iou_thresh: Fraction = Field(
        default=0.5, description="IoU with an object from which a proposal is a positive."
    )
    box_bg_iou_thresh: Fraction = Field(
        default=0.5, description="IoU with every object below which a proposal is a negative."
    )
    box_batch_size_per_image: PositiveInt = Field(
        default=512, description="Proposals of each image that the box head is trained on."
    )
    box_positive_fraction: Fraction = Field(default=0.25, description="Share of positives among them, at most.")
    class_loss: ClassLoss = Field(
        default="cross_entropy",
        description="How the box head's scores are judged in training: cross_entropy, or focal (Lin et al. 2017), "
        "which lowers the weight of what is already right.",
    )
    box_loss: BoxLoss = Field(
        default="smooth_l1",
        description="How its boxes are judged: smooth_l1 on the regressed deltas, or giou (Rezatofighi et al. 2019) on "
        "the boxes they make.",
    )
    class_weights: tuple[Positive, ...] | None = Field(
        default=None,
        description="Weights of the background and of each class in the loss of the scores; null weighs all alike. "
        "class_balance_beta makes them from the training data.",
    )

    # Where libraries differ, so that weights keep the meaning they were trained to have. torchvision's way by default;
    # that of others is CONVENTIONS.
    stride_in_1x1: bool = Field(
        default=False,
        description="Bottlenecks stride in their first 1x1 convolution, as MSRA's ImageNet weights and what was "
        "trained from them need it, and not in the 3x3.",
    )
    resize: Literal["torch", "pil"] = Field(
        default="torch",
        description="How images are scaled: torch interpolates normalised float pixels without antialiasing; pil is "
        "Pillow's antialiased bilinear filter on 8-bit pixels, which no whole exported detector can hold.",
    )
    anchor_rounding: bool = Field(default=True, description="Round the corners of anchors to whole pixels.")
    anchor_stride: Literal["measured", "nominal"] = Field(
        default="measured",
        description="Distance between anchors: measured is the padded image's size over the level's, rounded down (61 "
        "and not 64 pixels on P6 of an image 800 pixels high); nominal is 4, 8, 16, 32, 64.",
    )
    rpn_rank_by: Literal["probability", "logit"] = Field(
        default="probability",
        description="What proposals are ranked by in non-maximum suppression. Probabilities near 1 tie in float32.",
    )
    rpn_min_size: float = Field(
        default=1e-3,
        ge=0,
        description="Proposals with a side below this, in pixels of the scaled image, are dropped; 0 drops those "
        "without extent.",
    )
    roi_sampling_ratio: int = Field(
        default=2,
        ge=0,
        description="Samples that RoIAlign takes of a bin along each axis; 0 takes one for each pixel of the level.",
    )
    roi_aligned: bool = Field(
        default=False, description="RoIAlign shifts boxes by half a pixel of the level, which puts bins where they are."
    )
    box_min_size: float = Field(
        default=1e-2,
        ge=0,
        description="Detections with a side below this, in pixels of the scaled image, are dropped before non-maximum "
        "suppression; 0 drops those without extent, after it.",
    )

    @field_validator("arch")
    @classmethod
    def _arch_is_known(cls, arch: str) -> str:
        find_arch(arch)
        return arch

    @field_validator("min_size")
    @classmethod
    def _min_size_is_given(cls, min_size: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if min_size == ():
            raise ValueError("must hold at least one size")
        return min_size

    @model_validator(mode="after")
    def _layout_fits_the_arch(self) -> DetectorSpec:
        arch = find_arch(self.arch)
        if self.layout == "c4" and isinstance(arch, VGGArch):
            raise ValueError(
                f"layout c4 runs conv5 on each proposal, which is for ResNets; {self.arch} can be dc5 or fpn"
            )
        if self.layout != "fpn" and len(arch.strides) < 4:
            raise ValueError(f"layout {self.layout} needs a network with a C5; {self.arch} can be fpn")
        if self.stride_in_1x1 and (isinstance(arch, VGGArch) or arch.block == "basic"):
            raise ValueError(f"stride_in_1x1 is for bottlenecks; {self.arch} has no 1x1 convolution to stride in")
        return self

    @model_validator(mode="after")
    def _one_anchor_size_per_level(self) -> DetectorSpec:
        if self.layout != "fpn":
            return self
        arch = find_arch(self.arch)
        strides = [arch.strides[stage - 1] for stage in arch.pyramid]
        strides.append(2 * strides[-1])
        if "anchor_sizes" not in self.model_fields_set:
            # 8 times the strides 4 to 64 is the default; pyramids of other strides have anchors in the same proportion.
            self.__dict__["anchor_sizes"] = tuple(8 * stride for stride in strides)
        elif len(self.anchor_sizes) != len(strides):
            names = [f"P{stride.bit_length() - 1}" for stride in strides]
            raise ValueError(
                f"anchor_sizes must hold one size for each of the {len(strides)} levels {names[0]}..{names[-1]}, got "
                f"{len(self.anchor_sizes)}: {list(self.anchor_sizes)} (the strides of {self.arch}'s pyramid are "
                f"{', '.join(map(str, strides))})"
            )
        return self

    @model_validator(mode="after")
    def _thresholds_are_ordered(self) -> DetectorSpec:
        for part in ("rpn", "box"):
            low, high = getattr(self, f"{part}_bg_iou_thresh"), getattr(self, f"{part}_fg_iou_thresh")
            if low > high:
                raise ValueError(f"{part}_bg_iou_thresh ({low}) must not be above {part}_fg_iou_thresh ({high})")
        return self


_MMDETECTION: dict[str, Any] = {
    "anchor_rounding": False,
    "anchor_stride": "nominal",
    "rpn_post_nms_top_n_train": 1000,
    "rpn_min_size": 0.0,
    "roi_sampling_ratio": 0,
    "roi_aligned": True,
    "box_min_size": 0.0,
}

CONVENTIONS: dict[str, dict[str, Any]] = {
    "detectron2": _MMDETECTION | {"resize": "pil", "rpn_rank_by": "logit"},
    "mmdetection": _MMDETECTION,
    "mmdetection-caffe": _MMDETECTION,
}
"""How other libraries run a Faster R-CNN with FPN, where that is not torchvision's way: fields of ``DetectorSpec``.

Proved on recorded outputs for detectron2, read in the sources for mmdetection (whose cv2 resize, in 8 bits without
antialiasing, is taken for torchvision's). The statistics of pixels and where a bottleneck strides are not here: they
differ from file to file, and ``resdet.models.convert`` tells them. Left as torchvision's: the losses of box regression
(smooth L1 with its knee at 1/9 where these have L1), and the level of a box whose side is within a millionth of the
border between two.

Source: detectron2's ``config/defaults.py`` and ``configs/Base-RCNN-FPN.yaml``; ``modeling/anchor_generator.py``,
``modeling/proposal_generator/proposal_utils.py``, ``modeling/roi_heads/fast_rcnn.py``, ``modeling/postprocessing.py``.
mmdetection's ``configs/_base_/models/faster-rcnn_r50_fpn.py`` and ``models/dense_heads/rpn_head.py``.
"""

WEIGHTS_FACTS = ("norm_eps", "image_mean", "image_std", "stride_in_1x1")
"""Fields of ``DetectorSpec`` without which weights mean nothing."""

WEIGHTS_FIELDS = (
    *WEIGHTS_FACTS,
    "resize",
    "anchor_rounding",
    "anchor_stride",
    "rpn_rank_by",
    "rpn_min_size",
    "roi_sampling_ratio",
    "roi_aligned",
    "box_min_size",
)
"""These, and fields to which weights can be trained anew, but with which they are best as they are."""

# Parts of other libraries' detectors that change what they answer: one that torchvision's Faster R-CNN lacks is fatal.
_ESSENTIAL = re.compile(
    r"(module\.)?(backbone|neck|rpn_head|rpn\.head|proposal_generator\.rpn_head|roi_heads?\.(box|bbox_head))"
)


class Detector(FasterRCNN):  # type: ignore[misc]
    """torchvision's FasterRCNN with the description that rebuilds it; made by ``build_detector``.

    In training mode ``model(images, targets)`` gives a dictionary of four losses, otherwise ``model(images)`` a list of
    ``resdet.types.Prediction``. Images are ``[3, H, W]`` in [0, 1], each of its own size.

    With ``spec.fast`` it deviates from torchvision's where the forward runs in reduced precision: anchors, and what the
    heads put out, are float32, and so are the boxes made of them. In float32 both compute the same.

    Args:
        spec: What the detector is.
        backbone: A backbone as the spec describes it.
        num_classes: ``K + 1``: the background counts.
        categories: The ``K`` classes by rising label, or none if their names are not known.
        conv5: Stage 4 of the body, run on each proposal, where the layout is "c4".

    Attributes:
        score_threshold: The score from which its detections are worth showing, by the last evaluation (its best F1);
            None before any. It changes nothing in what the model gives.

    Raises:
        UserError: If the categories do not fit ``num_classes``, or the anchors do not fit the backbone's levels.

    Source: the layout "c4" is He et al. (arXiv:1512.03385), appendix A, with RoIAlign of 14x14 and conv5 striding as in
        detectron2's ``Res5ROIHeads``. "dc5" is detectron2's ``DilatedC5`` with the dilation of ``ResNet.dilate_c5``.
    """

    def __init__(
        self,
        spec: DetectorSpec,
        backbone: ResNetFPN | SingleLevel,
        num_classes: int,
        categories: Sequence[Category] = (),
        conv5: nn.Sequential | None = None,
    ) -> None:
        _check_categories(categories, num_classes)
        if spec.class_weights is not None and len(spec.class_weights) != num_classes:
            raise UserError(
                f"class_weights: must be one for each of the {num_classes} classes, background included, got "
                f"{len(spec.class_weights)}"
            )
        sizes = tuple((size,) for size in spec.anchor_sizes) if spec.layout == "fpn" else (spec.anchor_sizes,)
        anchors = Anchors(
            sizes,
            (spec.aspect_ratios,) * len(sizes),
            rounded=spec.anchor_rounding,
            strides=backbone.strides if spec.anchor_stride == "nominal" else (),
            widened=spec.fast,
        )
        check_anchors(backbone, anchors)
        num_anchors = anchors.num_anchors_per_location()[0]
        rpn = (FastProposalNetwork if spec.fast else ProposalNetwork)(
            anchors,
            (ProposalHead if spec.fast else RPNHead)(backbone.out_channels, num_anchors),
            fg_iou_thresh=spec.rpn_fg_iou_thresh,
            bg_iou_thresh=spec.rpn_bg_iou_thresh,
            batch_size_per_image=spec.rpn_batch_size_per_image,
            positive_fraction=spec.rpn_positive_fraction,
            pre_nms_top_n={"training": spec.rpn_pre_nms_top_n_train, "testing": spec.rpn_pre_nms_top_n_test},
            post_nms_top_n={"training": spec.rpn_post_nms_top_n_train, "testing": spec.rpn_post_nms_top_n_test},
            nms_thresh=spec.rpn_nms_thresh,
            score_thresh=spec.rpn_score_thresh,
            min_size=spec.rpn_min_size,
            rank_by_logit=spec.rpn_rank_by == "logit",
        )
        pool = roi_align.MultiScaleRoIAlign(
            # The coarsest level serves proposals only: boxes are assigned to P2..P5 (FPN paper, equation 1).
            featmap_names=backbone.level_names[: len(backbone.body.channels)],
            output_size=7 if conv5 is None else 14,
            sampling_ratio=spec.roi_sampling_ratio,
            aligned=spec.roi_aligned,
            fast=spec.fast,
        )
        if conv5 is None:
            head: nn.Module = TwoMLPHead(backbone.out_channels * 7 * 7, spec.box_head_channels)
            vector_size = spec.box_head_channels
        else:
            head = Conv5Head(conv5)
            vector_size = 2 * backbone.out_channels  # C5 has twice C4's channels
        roi_heads = BoxHeads(
            pool,
            head,
            (BoxPredictor if spec.fast else FastRCNNPredictor)(vector_size, num_classes),
            fg_iou_thresh=spec.box_fg_iou_thresh,
            bg_iou_thresh=spec.box_bg_iou_thresh,
            batch_size_per_image=spec.box_batch_size_per_image,
            positive_fraction=spec.box_positive_fraction,
            score_thresh=spec.box_score_thresh,
            nms_thresh=spec.box_nms_thresh,
            detections_per_img=spec.box_detections_per_img,
            min_size=spec.box_min_size,
            class_loss=spec.class_loss,
            box_loss=spec.box_loss,
            class_weights=spec.class_weights,
        )
        transform = (PilTransform if spec.resize == "pil" else SeededTransform)(
            spec.min_size, spec.max_size, list(spec.image_mean), list(spec.image_std)
        )
        # FasterRCNN's own constructor only makes these parts, and has no argument for half of what they are told.
        GeneralizedRCNN.__init__(self, backbone, rpn, roi_heads, transform)
        self.score_threshold: float | None = None
        self.spec = spec
        self.categories = tuple(categories)

    def whole_body(self) -> nn.Module:
        """Give the body with all stages that the detector runs, conv5 too where it is run on each proposal.

        Returns:
            A module of the detector's own parameters that takes images ``[B, 3, H, W]``.
        """
        head = self.roi_heads.box_head
        if isinstance(head, Conv5Head):
            return _WholeBody(self.backbone.body, head.layer4)
        body: Body = self.backbone.body
        return body

    def training_counts(self) -> dict[str, Tensor]:
        """Give what the last forward pass in training counted, means over its images, scalars on their device.

        Returns:
            ``rpn_positives`` and ``box_positives``: anchors and proposals that the losses took for objects.
            ``num_objects``: objects in the targets. ``num_found``: those of them that a proposal overlaps with an IoU
            of 0.5 or more; ``num_found / num_objects`` is the proposals' recall.
        """
        found = torch.stack(self.roi_heads.num_found).float()
        rpn, box = self.rpn.fg_bg_sampler.num_positives, self.roi_heads.fg_bg_sampler.num_positives
        return {
            "rpn_positives": found.new_tensor(sum(rpn) / len(rpn)),
            "box_positives": found.new_tensor(sum(box) / len(box)),
            "num_objects": found.new_tensor(self.roi_heads.num_objects / len(box)),
            "num_found": found.mean(),
        }


class _WholeBody(nn.Module):
    def __init__(self, body: Body, conv5: nn.Module) -> None:
        super().__init__()
        self.body, self.conv5 = body, conv5

    def forward(self, images: Tensor) -> Tensor:
        (c4,) = self.body(images).values()
        c5: Tensor = self.conv5(c4)
        return c5


def build_detector(
    spec: DetectorSpec,
    *,
    num_classes: int,
    weights_backbone: WeightsSource = None,
    trainable_layers: int = 3,
    categories: Sequence[Category] = (),
) -> Detector:
    """Build a detector, its heads random.

    Args:
        spec: What the detector is.
        num_classes: ``K + 1``: the background counts.
        weights_backbone: First weights of the body: None (random), a torchvision weight name or enum, a file or a URL.
        trainable_layers: How many stages of the body take gradients, 0 to 5; see ``resnet_fpn``.
        categories: The ``K`` classes by rising label, or none if their names are not known.

    Raises:
        UserError: If an argument is out of its range.
        WeightsError: If the weights cannot be had or are not those of this body.
    """
    _check_categories(categories, num_classes)
    if spec.layout == "fpn":
        backbone = resnet_fpn(
            spec.arch,
            weights=weights_backbone,
            norm=spec.norm,
            norm_eps=spec.norm_eps,
            trainable_layers=trainable_layers,
            out_channels=spec.out_channels,
            fast=spec.fast,
            stride_in_1x1=spec.stride_in_1x1,
        )
        return Detector(spec, backbone, num_classes, categories)
    is_vgg = isinstance(find_arch(spec.arch), VGGArch)
    body = make_body(
        spec.arch,
        norm=spec.norm,
        norm_eps=spec.norm_eps,
        returned_layers=(3, 4) if spec.layout == "c4" else (5,) if is_vgg else (4,),
        fast=spec.fast,
        stride_in_1x1=spec.stride_in_1x1,
        dilate_c5=spec.layout == "dc5" and not is_vgg,
    )
    freeze_stages(body, trainable_layers)
    load_backbone_weights(body, weights_backbone, spec.arch)
    conv5 = None
    if spec.layout == "c4":
        assert isinstance(body, ResNet)
        conv5 = body.take_off_stage()
    return Detector(spec, SingleLevel(body), num_classes, categories, conv5)


def fasterrcnn_resnet101_fpn(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: WeightsSource = None,
    trainable_backbone_layers: int = 3,
    spec: DetectorSpec | None = None,
) -> Detector:
    """Build Faster R-CNN on a ResNet-101 with FPN, by torchvision's convention for its builders.

    Args:
        weights: A whole detector's weights: a file or URL of a checkpoint of ours, of a state dict of torchvision's
            FasterRCNN of this shape, or of another library's Faster R-CNN (see ``load_detector``).
            ``weights_backbone`` is ignored then.
        num_classes: The background counts. By default what ``weights`` has, or else 91 (COCO).
        weights_backbone: First weights of the body: None (random), a torchvision weight name or enum, a file or a URL.
        trainable_backbone_layers: How many stages of the body take gradients, 0 to 5; see ``resnet_fpn``.
        spec: Everything else; by default that of the checkpoint, or else ``DetectorSpec()``.

    Raises:
        UserError: If an argument is out of its range.
        WeightsError: If the weights cannot be had, or are for another model or number of classes.
    """
    if spec is not None and spec.arch != "resnet101":
        raise UserError(f"spec.arch must be 'resnet101' here, got {spec.arch!r}; build_detector takes any")
    if spec is not None and spec.layout != "fpn":
        raise UserError(f"spec.layout must be 'fpn' here, got {spec.layout!r}; build_detector takes any")
    if weights is None:
        return build_detector(
            DetectorSpec() if spec is None else spec,
            num_classes=91 if num_classes is None else num_classes,
            weights_backbone=weights_backbone,
            trainable_layers=trainable_backbone_layers,
        )
    path = fetch(os.fspath(weights)) if "://" in os.fspath(weights) else Path(weights)
    described, tensors = _read_detector(path)
    found = len(tensors[_CLASS_SCORES])
    if num_classes not in (None, found):
        raise WeightsError(f"{path}: was made for {found} classes (background included), num_classes is {num_classes}")
    if spec is None:
        spec = described.spec or DetectorSpec()
    model = build_detector(
        spec, num_classes=found, trainable_layers=trainable_backbone_layers, categories=described.categories
    )
    _load_whole(model, tensors, path)
    model.score_threshold = described.score_threshold
    return model


def checkpoint_payload(model: Detector) -> dict[str, Any]:
    """Give a detector as plain values and tensors, from which ``load_detector`` builds it again.

    Returns:
        ``format``, ``spec``, ``categories`` and ``score_threshold`` (plain values) and ``model`` (the state dict, not
        copied). Training may add entries of its own beside them.
    """
    return {
        "format": CHECKPOINT_FORMAT,
        "spec": model.spec.model_dump(mode="json"),
        "categories": categories_to_plain(model.categories),
        "score_threshold": model.score_threshold,
        "model": model.state_dict(),
    }


def load_detector(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Detector:
    """Build the detector that a file holds, in evaluation mode.

    Args:
        path: A file with the entries of ``checkpoint_payload``, or the Faster R-CNN of another library that
            ``resdet.models.convert`` reads, such as ``model_final_f6e8b1.pkl`` of detectron2's model zoo. Such a model
            is run as its library runs it (``CONVENTIONS``), and saved by us it stays so. If it has 80 classes and
            names none, they are taken to be COCO's. A file of ``save_int8_detector`` gives an ``Int8Detector``.
        device: Where to put the model.

    Raises:
        WeightsError: If the file is missing, damaged, no checkpoint of a detector, or contradicts itself; or holds
            another kind of detector.
    """
    content = read_checkpoint(path)
    if content.get("format") == INT8_FORMAT:
        return _load_int8(content, path).to(device)  # type: ignore[no-any-return]
    (spec, categories, score_threshold), tensors = _read_detector(path)
    if spec is None:
        raise WeightsError(
            f"{os.fspath(path)}: is not a detector checkpoint: its 'format' must be {CHECKPOINT_FORMAT!r}, got "
            f"{content.get('format')!r} (keys: {name_some(content) or 'none'})"
        )
    try:
        model = build_detector(spec, num_classes=len(tensors[_CLASS_SCORES]), categories=categories)
    except UserError as error:
        raise WeightsError(f"{os.fspath(path)}: {error}") from error
    _load_whole(model, tensors, path)
    model.score_threshold = score_threshold
    return model.to(device).eval()  # type: ignore[no-any-return]


def _load_int8(content: dict[str, Any], path: str | os.PathLike[str]) -> Detector:
    from resdet.models.int8 import Int8Detector  # which is made of what is here

    (spec, categories, score_threshold), tensors = _description(content, path), tensors_in(content, os.fspath(path))
    assert spec is not None
    try:
        model = Int8Detector.empty(spec, len(_detector_tensors(tensors, path)[_CLASS_SCORES]), categories)
    except UserError as error:
        raise WeightsError(f"{os.fspath(path)}: {error}") from error
    _load_whole(model, tensors, path)
    model.score_threshold = score_threshold
    return model


def load_detector_weights(model: Detector, path: str | os.PathLike[str]) -> LoadReport:
    """Continue from another detector's weights: all of them, or all but the class-specific ones.

    The last layers (``roi_heads.box_predictor``) keep what ``model`` has if the classes differ: in number, or in name
    or order where both sides know their names.

    Args:
        model: Changed in place.
        path: A checkpoint of ours, a state dict of torchvision's FasterRCNN of this shape, or another library's
            Faster R-CNN, as for ``load_detector``. Its spec is not taken over: ``weights_settings`` gives what of it
            ``model`` should have been built with.

    Returns:
        What was loaded and what was not; it is also logged.

    Raises:
        WeightsError: If the file cannot be read, or anything else in it does not fit the model.
    """
    (_, categories, _), tensors = _read_detector(path)
    own = model.state_dict()
    names, own_names = [c.name for c in categories], [c.name for c in model.categories]
    same_classes = len(tensors[_CLASS_SCORES]) == len(own[_CLASS_SCORES]) and (
        not names or not own_names or names == own_names
    )
    kept = () if same_classes else tuple(name for name in own if name.startswith(_PREDICTOR))
    _load_whole(model, tensors | {name: own[name] for name in kept}, path)
    report = LoadReport(os.fspath(path), tuple(name for name in own if name not in kept), (), kept)
    logger.info("%s detector: %s", model.spec.arch, report)
    return report


def holds_detector(path: str | os.PathLike[str]) -> bool:
    """Tell a whole detector's file, of ours, torchvision's or another library's, from a backbone's.

    Raises:
        WeightsError: If the file cannot be read.
    """
    content = read_checkpoint(path)
    if any(name.startswith("roi_heads.") for name in tensors_in(content, os.fspath(path))):
        return True
    try:
        return to_torchvision(content).kind == "detector"
    except WeightsError:  # nothing that is known: whoever loads it says what is wrong with it
        return False


def weights_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Give the fields of a ``DetectorSpec`` under which a file's weights were trained, as far as it tells.

    Args:
        path: A checkpoint of ours or another library's Faster R-CNN (all ``WEIGHTS_FIELDS``), another library's or an
            exported backbone (some of ``norm_eps``, ``image_mean``, ``image_std``, ``stride_in_1x1``), or torchvision's
            weights of any kind, which tell nothing.

    Raises:
        WeightsError: If the file cannot be read.
    """
    if Path(path).suffix == ".safetensors":
        description = _exported_description(path)
        settings = {name: description[name] for name in WEIGHTS_FIELDS if name in description}
        if settings:
            return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    content = read_checkpoint(path)
    if content.get("format") == CHECKPOINT_FORMAT:
        spec = _description(content, path).spec
        return {name: getattr(spec, name) for name in WEIGHTS_FIELDS}
    try:
        converted = to_torchvision(content)
    except WeightsError:  # an exported backbone, a stranger's network: whoever loads it says what is wrong with it
        return {}
    own_layout = converted.facts["format"] in _OWN_LAYOUT
    if own_layout and not hasattr(content, FACTS_ENTRY):  # which resdet.convert wrote
        return {}
    if converted.kind == "detector" and not own_layout:
        spec = _imported_spec(converted, path)
        return {name: getattr(spec, name) for name in WEIGHTS_FIELDS}
    settings = _facts_as_fields(converted)
    return {name: settings[name] for name in WEIGHTS_FIELDS if name in settings}


def _check_categories(categories: Sequence[Category], num_classes: int) -> None:
    if num_classes < 2:
        raise UserError(f"num_classes counts the background, so it must be at least 2; got {num_classes}")
    if categories and [c.label for c in categories] != list(range(1, num_classes)):
        raise UserError(
            f"categories must have the labels 1..{num_classes - 1} in this order for num_classes={num_classes}, got "
            f"{len(categories)} with labels {name_some(str(c.label) for c in categories)}"
        )


class _Description(NamedTuple):
    """What a detector's file says beside its tensors; that of a bare state dict is empty."""

    spec: DetectorSpec | None = None
    categories: tuple[Category, ...] = ()
    score_threshold: float | None = None


def _read_detector(path: str | os.PathLike[str]) -> tuple[_Description, dict[str, Tensor]]:
    """Read a whole detector under torchvision's names, and what describes it."""
    content = read_checkpoint(path)
    if content.get("format") == INT8_FORMAT:
        raise WeightsError(
            f"{os.fspath(path)}: is in int8: resdet.load_detector runs it, but nothing else can be made from it"
        )
    if content.get("format") == CHECKPOINT_FORMAT:
        return _description(content, path), _detector_tensors(tensors_in(content, os.fspath(path)), path)
    tensors = tensors_in(content, os.fspath(path))
    if _CLASS_SCORES in tensors and _STEM in tensors:
        return _Description(), tensors
    try:
        converted = to_torchvision(content)
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)}: is not a detector that can be read: {error}") from error
    tensors = _detector_tensors(converted.tensors, path)
    essential = [
        name for name in converted.left_over if _ESSENTIAL.match(name) and not name.endswith("num_batches_tracked")
    ]
    if essential:
        raise WeightsError(
            f"{os.fspath(path)}: is not the Faster R-CNN with FPN that this detector can be: it also has "
            f"{name_some(essential)}"
        )
    spec = _imported_spec(converted, path)
    categories = _imported_categories(len(tensors[_CLASS_SCORES]))
    logger.info(
        "%s: %s of %s, %d classes (%s); left over: %s",
        os.fspath(path),
        spec.arch,
        converted.facts["format"],
        len(tensors[_CLASS_SCORES]) - 1,
        "taken to be COCO's" if categories else "their names are not known",
        name_some(converted.left_over) or "none",
    )
    return _Description(spec, categories), tensors


def _imported_spec(converted: Converted, path: str | os.PathLike[str]) -> DetectorSpec:
    """Describe another library's detector, as that library runs it."""
    library, tensors = converted.facts["format"], converted.tensors
    if converted.facts["arch"] is None:
        raise WeightsError(f"{os.fspath(path)}: its body is none of {', '.join(ARCHS)}")
    if library not in CONVENTIONS:
        logger.warning(
            "%s: detectors of %s measure boxes one pixel larger and are run only nearly as they were trained: expect "
            "to lose some AP, or fine-tune",
            os.fspath(path),
            library,
        )
    try:
        return DetectorSpec(
            arch=converted.facts["arch"],
            out_channels=len(tensors["backbone.fpn.inner_blocks.0.0.weight"]),
            box_head_channels=len(tensors["roi_heads.box_head.fc6.weight"]),
            **_facts_as_fields(converted),
            **CONVENTIONS.get(library, {}),
        )
    except KeyError as error:
        raise WeightsError(
            f"{os.fspath(path)}: is not a Faster R-CNN with FPN and two fully connected layers: it has no {error}"
        ) from error


def _exported_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``resdet.export`` wrote beside a backbone's tensors; nothing from another safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("backbone", "{}"))
    except (SafetensorError, OSError, ValueError):  # whoever loads the file says what is wrong with it
        return {}
    return description if isinstance(description, dict) else {}


def _facts_as_fields(converted: Converted) -> dict[str, Any]:
    facts = converted.facts
    return {
        "norm_eps": facts["norm_eps"],
        "image_mean": tuple(facts["image_mean"]),
        "image_std": tuple(facts["image_std"]),
        "stride_in_1x1": facts["stride_in_1x1"],
    }


def _imported_categories(num_classes: int) -> tuple[Category, ...]:
    """Give COCO's 80 classes by rising id, the order in which every library numbers them; none for another number."""
    by_id = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    known = [(number, name) for number, name in enumerate(by_id) if name not in ("__background__", "N/A")]
    if num_classes != len(known) + 1:
        return ()
    return tuple(Category(label, number, name) for label, (number, name) in enumerate(known, 1))


def _description(content: dict[str, Any], path: str | os.PathLike[str]) -> _Description:
    """Read what a checkpoint of ours says beside its tensors."""
    score_threshold = content.get("score_threshold")  # older files have none
    if not (score_threshold is None or (isinstance(score_threshold, (int, float)) and 0 <= score_threshold <= 1)):
        raise WeightsError(f"{os.fspath(path)}: its score_threshold must be in [0, 1], got {score_threshold!r}")
    try:
        spec, categories = DetectorSpec.model_validate(content["spec"]), categories_from_plain(content["categories"])
        return _Description(spec, categories, score_threshold)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WeightsError(
            f"{os.fspath(path)}: its spec is not one of this version: {where}: {first['msg']}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{os.fspath(path)}: has no readable spec and categories ({error!r})") from error


def _detector_tensors(tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    if _CLASS_SCORES not in tensors:
        raise WeightsError(
            f"{os.fspath(path)}: is not a detector: it has no {_CLASS_SCORES!r}; its tensors are {name_some(tensors)}"
        )
    return tensors


def _load_whole(model: Detector, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    expected = model.state_dict()
    # Saved with BatchNorm, a file also counts its steps; frozen norms have no use for them.
    tensors = {n: t for n, t in tensors.items() if n in expected or not n.endswith("num_batches_tracked")}
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    wrong = [
        f"{name} is {list(tensors[name].shape)} and not {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    faults = [f"without {name_some(missing)}"] if missing else []
    faults += [f"with {name_some(extra)}"] if extra else []
    faults += [name_some(wrong)] if wrong else []
    if faults:
        raise WeightsError(f"{os.fspath(path)}: does not fit this {model.spec.arch} detector: {'; '.join(faults)}")
    model.load_state_dict(tensors)
