"""What a detector is, as plain settings: reading a configuration imports neither torch nor torchvision."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from resdet.models.archs import ARCHS, VGGArch, find_arch

Fraction = Annotated[float, Field(ge=0, le=1)]
NormName = Literal["frozen", "batch", "group"]
ClassLoss = Literal["cross_entropy", "focal"]
BoxLoss = Literal["smooth_l1", "giou"]

Positive = Annotated[float, Field(gt=0)]


class DetectorSpec(BaseModel):
    """Everything that defines a detector, apart from its weights and its classes.

    A checkpoint carries it, so that the model can be built again from the file alone. Names and defaults of the knobs
    of Faster R-CNN are torchvision's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    arch: str = Field("resnet101", json_schema_extra={"enum": list(ARCHS)})
    """Body of the backbone; the table of architectures is resdet/models/archs.py."""
    layout: Literal["fpn", "c4", "dc5"] = "fpn"
    """Features on which proposals and boxes are found. fpn: a feature pyramid. c4: C4 alone, at stride 16, and conv5
    run on each proposal's 14x14 features, as in the first ResNet detectors. dc5: C5 alone, at stride 16, with conv5
    dilated instead of strided; of a VGG that is conv5_3, as in the first Faster R-CNN."""
    norm: NormName = "frozen"
    """Normalisation in the body: frozen (fixed statistics, for fine-tuning from pretrained weights), batch (needs large
    batches) or group (32 groups)."""
    norm_eps: float = Field(1e-5, ge=0)
    """Added to the variance by every norm of the body; 0 for weights from before 2020."""
    out_channels: PositiveInt = 256
    """Channels of every level of the feature pyramid; no effect without one."""
    fast: bool = True
    """Frozen norms folded into the convolutions, channels-last, RoIAlign on every core, boxes in float32 whatever the
    precision. Off: torchvision's operations bit for bit. Parameters are the same."""
    min_size: PositiveInt | tuple[PositiveInt, ...] = 800
    """Length in pixels to which an image's shorter side is scaled. Of several one is drawn at random for each training
    image, and the last is used otherwise."""
    max_size: PositiveInt = 1333
    """Longest side allowed after scaling, in pixels; it overrides min_size."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from the red, green and blue of images in [0, 1]."""
    image_std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Divisors of red, green and blue after that."""
    anchor_sizes: tuple[PositiveInt, ...] = Field((32, 64, 128, 256, 512), min_length=1)
    """Side of the square anchor of each level P2..P6, in pixels of the scaled image; a pyramid of other strides has 8
    times the stride of each level by default. Without a pyramid, sides of the anchors at every location."""
    aspect_ratios: tuple[Positive, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    """Height over width of the anchors at every location of every level."""
    box_head_channels: PositiveInt = 1024
    """Width of the two fully connected layers of the box head; c4 has conv5 in their place."""
    rpn_pre_nms_top_n_train: PositiveInt = 2000
    """Proposals of each level that enter non-maximum suppression, in training."""
    rpn_pre_nms_top_n_test: PositiveInt = 1000
    """The same, outside training."""
    rpn_post_nms_top_n_train: PositiveInt = 2000
    """Proposals of each image that are kept after non-maximum suppression, in training."""
    rpn_post_nms_top_n_test: PositiveInt = 1000
    """The same, outside training."""
    rpn_nms_thresh: Fraction = 0.7
    """IoU above which the weaker of two proposals of one level is dropped."""
    rpn_fg_iou_thresh: Fraction = 0.7
    """IoU with an object from which an anchor is a positive."""
    rpn_bg_iou_thresh: Fraction = 0.3
    """IoU with every object below which an anchor is a negative."""
    rpn_batch_size_per_image: PositiveInt = 256
    """Anchors of each image that enter the RPN's loss."""
    rpn_positive_fraction: Fraction = 0.5
    """Largest share of positives among them."""
    rpn_score_thresh: Fraction = 0.0
    """Proposals with a lower objectness are dropped."""
    box_score_thresh: Fraction = 0.05
    """Detections with a lower score are dropped."""
    box_nms_thresh: Fraction = 0.5
    """IoU above which the weaker of two detections of one class is dropped."""
    box_detections_per_img: PositiveInt = 100
    """Detections of each image that are kept, best first."""
    box_fg_iou_thresh: Fraction = 0.5
    """IoU with an object from which a proposal is a positive."""
    box_bg_iou_thresh: Fraction = 0.5
    """IoU with every object below which a proposal is a negative."""
    box_batch_size_per_image: PositiveInt = 512
    """Proposals of each image that the box head is trained on."""
    box_positive_fraction: Fraction = 0.25
    """Largest share of positives among them."""
    class_loss: ClassLoss = "cross_entropy"
    """Loss of the box head's scores: cross_entropy, or focal (Lin et al. 2017), which lowers the weight of samples that
    are already right."""
    box_loss: BoxLoss = "smooth_l1"
    """Loss of its boxes: smooth_l1 on the regressed deltas, or giou (Rezatofighi et al. 2019) on the decoded boxes."""
    class_weights: tuple[Positive, ...] | None = None
    """Weights of the background and of each class in the loss of the scores; null weighs all alike. class_balance_beta
    makes them from the training data."""

    # Where libraries differ: weights keep the meaning they were trained with. The defaults are torchvision's
    # conventions, those of others are in CONVENTIONS.
    stride_in_1x1: bool = False
    """Bottlenecks stride in their first 1x1 convolution, as MSRA's ImageNet weights and their descendants need it, and
    not in the 3x3."""
    resize: Literal["torch", "pil"] = "torch"
    """How images are scaled: torch interpolates normalised float pixels without antialiasing; pil is Pillow's
    antialiased bilinear filter on 8-bit pixels, which no whole exported detector can hold."""
    anchor_rounding: bool = True
    """Round the corners of anchors to whole pixels."""
    anchor_stride: Literal["measured", "nominal"] = "measured"
    """Distance between anchors: measured is the padded image's size over the level's, rounded down (61 and not 64
    pixels on P6 of an image 800 pixels high); nominal is 4, 8, 16, 32, 64."""
    rpn_rank_by: Literal["probability", "logit"] = "probability"
    """Rank of proposals in non-maximum suppression. Probabilities near 1 tie in float32."""
    rpn_min_size: float = Field(1e-3, ge=0)
    """Proposals with a side below this, in pixels of the scaled image, are dropped; 0 drops those without extent."""
    roi_sampling_ratio: int = Field(2, ge=0)
    """Samples that RoIAlign takes of a bin along each axis; 0 takes one for each pixel of the level."""
    roi_aligned: bool = False
    """RoIAlign shifts boxes by half a pixel of the level, which centres its samples correctly."""
    box_min_size: float = Field(1e-2, ge=0)
    """Detections with a side below this, in pixels of the scaled image, are dropped before non-maximum suppression; 0
    drops those without extent, after it."""

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
"""How other libraries run a Faster R-CNN with FPN, where they differ from torchvision: fields of ``DetectorSpec``.

Proved on recorded outputs for detectron2, read in the sources for mmdetection (whose cv2 resize, in 8 bits without
antialiasing, is taken for torchvision's). The statistics of pixels and where a bottleneck strides differ from file to
file: ``resdet.weights.facts`` finds them. Left as torchvision's: the losses of box regression (smooth L1 with its
knee at 1/9 where these have L1), and the level of a box whose side is within a millionth of the border between two.

Source: detectron2's ``config/defaults.py`` and ``configs/Base-RCNN-FPN.yaml``; ``modeling/anchor_generator.py``,
``modeling/proposal_generator/proposal_utils.py``, ``modeling/roi_heads/fast_rcnn.py``, ``modeling/postprocessing.py``.
mmdetection's ``configs/_base_/models/faster-rcnn_r50_fpn.py`` and ``models/dense_heads/rpn_head.py``.
"""

# Fields of ``DetectorSpec`` that weights depend on: under other values they compute something else.
WEIGHTS_FACTS = ("norm_eps", "image_mean", "image_std", "stride_in_1x1")
# These, and fields that training can adapt weights to, but under which they work best unchanged.
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

# Anchors belong to an RPN's weights; the rest is how a detector is run. Other libraries' files state some of them.
ANCHOR_FIELDS = ("anchor_sizes", "aspect_ratios")
RUN_FIELDS = (*ANCHOR_FIELDS, "min_size", "max_size", "box_score_thresh")


class WeightsOrigin(BaseModel):
    """What is known of weights whose file does not say it; null leaves it to the file, or to a guess that is logged.

    What a file states itself cannot be overruled: a contradiction is an error.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    format: str | None = None
    """The library that named and trained them: torchvision, detectron2, detectron, mmdetection, mmdetection-caffe,
    maskrcnn-benchmark or timm. mmdetection-caffe is also for mmcv's caffe-style ResNets, whose names are torchvision's,
    with BGR images in 0..255 and the stride in the 1x1."""
    prefix: str | None = None
    """What precedes the names of the network, where a file holds several: "teacher.", "module.encoder_q."."""
    channel_order: Literal["rgb", "bgr"] | None = None
    """Order of the colours of the images that they were trained on."""
    image_mean: tuple[float, float, float] | None = None
    """Mean that was subtracted from the red, green and blue of images in [0, 1]."""
    image_std: tuple[Positive, Positive, Positive] | None = None
    """What red, green and blue were divided by after that; 1/255 where images in 0..255 were not divided."""
    stride_in_1x1: bool | None = None
    """Whether bottlenecks stride in their first 1x1 convolution, and not in the 3x3."""
    norm_eps: float | None = Field(None, ge=0)
    """What every norm added to the variance."""
    classes: tuple[str, ...] | None = None
    """Names of a detector's classes in the order of its rows, without the background."""


class Tricks(BaseModel):
    """What to do at test time beyond running the model once; all of it is off by default."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    scales: tuple[PositiveInt, ...] = ()
    """Lengths in pixels to which the shorter side is scaled, one after another; empty keeps the model's own. The
    longest side allowed grows and shrinks along. The time is that of all sizes together."""
    flip: bool = False
    """Detect on the mirrored image too, at every scale. Doubles the time."""
    refine: int = Field(0, ge=0)
    """How often boxes are fed back: their features are pooled anew, which gives new scores and boxes besides the old
    ones (He et al. 2016, appendix B, where it is 1). Each round costs one more pass through the box head."""
    voting: Annotated[float, Field(gt=0, le=1)] | None = None
    """Replace each detection by the mean of all boxes of its class that overlap it by at least this IoU, weighted by
    their scores (Gidaris and Komodakis 2015, who take 0.5; Detectron takes 0.8); null does not. Takes no time."""
    nms: Literal["hard", "soft-linear", "soft-gaussian"] = "hard"
    """What happens to a box that overlaps a better one: hard drops it; soft lowers its score (Bodla et al. 2017), down
    to 0.001, whatever the model's own threshold of scores. Takes no time."""
    nms_threshold: Fraction | None = None
    """IoU above which hard drops a box, and from which soft-linear lowers its score; null takes the model's own (0.5
    unless built otherwise; He et al. use 0.3 with refine). soft-gaussian has none."""
    nms_sigma: float = Field(0.5, gt=0)
    """Of soft-gaussian: scores are multiplied by exp(-IoU^2 / sigma)."""
    class_agnostic: bool = False
    """Boxes suppress those of other classes too, so that an object is found once. Where classes overlap this costs
    recall."""

    @field_validator("scales")
    @classmethod
    def _scales_differ(cls, scales: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(scales)) < len(scales):
            raise ValueError(f"must differ from each other, got {list(scales)}")
        return scales


class Tiles(NamedTuple):
    """How a large image is cut into overlapping tiles that are detected in one by one."""

    side: Annotated[int, Field(ge=32)]  # of the square tiles, in pixels of the image
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.2  # of neighbours at least, as a share of the side
