"""The detector: torchvision's FasterRCNN on a ResNet-FPN, its knobs in one typed place, its checkpoint self-sufficient.

Legend: ``B`` images, ``N`` boxes, ``K`` foreground classes, ``C, H, W`` channels and pixels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from resdet.errors import UserError, WeightsError
from resdet.models import roi_align
from resdet.models.backbone import ResNetFPN, check_anchors, resnet_fpn
from resdet.models.norm import NormName
from resdet.models.resnet import ARCHS, find_arch
from resdet.models.weights import LoadReport, WeightsSource, fetch, name_some, read_checkpoint, tensors_in
from resdet.types import Category, categories_from_plain, categories_to_plain

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "resdet-detector-1"

_PREDICTOR = "roi_heads.box_predictor."
_CLASS_SCORES = f"{_PREDICTOR}cls_score.weight"

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
        description="Body of the backbone, by torchvision's name.",
        json_schema_extra={"enum": list(ARCHS)},
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
    out_channels: PositiveInt = Field(default=256, description="Channels of every level of the feature pyramid.")
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
        description="Side of the square anchor of each level P2..P6, in pixels of the scaled image.",
    )
    aspect_ratios: tuple[Positive, ...] = Field(
        default=(0.5, 1.0, 2.0),
        min_length=1,
        description="Height over width of the anchors at every place of every level.",
    )
    box_head_channels: PositiveInt = Field(
        default=1024, description="Width of the two fully connected layers of the box head."
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

    @field_validator("anchor_sizes")
    @classmethod
    def _one_anchor_size_per_level(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if len(sizes) != 5:
            raise ValueError(f"must hold one size for each of the 5 levels P2..P6, got {len(sizes)}: {list(sizes)}")
        return sizes

    @model_validator(mode="after")
    def _thresholds_are_ordered(self) -> DetectorSpec:
        for part in ("rpn", "box"):
            low, high = getattr(self, f"{part}_bg_iou_thresh"), getattr(self, f"{part}_fg_iou_thresh")
            if low > high:
                raise ValueError(f"{part}_bg_iou_thresh ({low}) must not be above {part}_fg_iou_thresh ({high})")
        return self


class _Anchors(AnchorGenerator):  # type: ignore[misc]  # torchvision ships no types, here and below
    """Anchors in float32 at least.

    torchvision makes them in the features' type. In bfloat16 a coordinate of 800 is then known to 4 pixels, and
    proposals and ground truth, which are brought to the anchors' type, with it.
    """

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        self.cell_anchors = [anchors.to(device, _widened(dtype)) for anchors in self.cell_anchors]  # type: ignore[has-type]


class _RPNHead(RPNHead):  # type: ignore[misc]
    """torchvision's head, its outputs in float32 at least, so that boxes are decoded in it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits: list[Tensor] = []
        deltas: list[Tensor] = []
        for feature in x:
            hidden = self.conv(feature)
            logit, delta = self.cls_logits(hidden), self.bbox_pred(hidden)
            logits.append(logit.to(_widened(logit.dtype)))
            deltas.append(delta.to(_widened(delta.dtype)))
        return logits, deltas


class _Predictor(FastRCNNPredictor):  # type: ignore[misc]
    """torchvision's predictor, its outputs in float32 at least, so that boxes are decoded in it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(start_dim=1)
        scores, deltas = self.cls_score(x), self.bbox_pred(x)
        return scores.to(_widened(scores.dtype)), deltas.to(_widened(deltas.dtype))


def _widened(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.float64:
        return torch.float64
    return torch.float32


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

    Raises:
        UserError: If the categories do not fit ``num_classes``, or the anchors do not fit the backbone's levels.
    """

    def __init__(
        self, spec: DetectorSpec, backbone: ResNetFPN, num_classes: int, categories: Sequence[Category] = ()
    ) -> None:
        _check_categories(categories, num_classes)
        sizes = tuple((size,) for size in spec.anchor_sizes)
        anchors = (_Anchors if spec.fast else AnchorGenerator)(sizes, (spec.aspect_ratios,) * len(sizes))
        check_anchors(backbone, anchors)
        num_anchors = anchors.num_anchors_per_location()[0]
        # The coarsest level serves proposals only: boxes are assigned to P2..P5 (FPN paper, equation 1).
        pooled_levels = backbone.level_names[: len(backbone.body.channels)]
        pool = roi_align.MultiScaleRoIAlign if spec.fast else MultiScaleRoIAlign
        predictor = _Predictor if spec.fast else FastRCNNPredictor
        super().__init__(
            backbone,
            rpn_anchor_generator=anchors,
            rpn_head=(_RPNHead if spec.fast else RPNHead)(backbone.out_channels, num_anchors),
            box_roi_pool=pool(featmap_names=pooled_levels, output_size=7, sampling_ratio=2),
            box_head=TwoMLPHead(backbone.out_channels * 7 * 7, spec.box_head_channels),
            box_predictor=predictor(spec.box_head_channels, num_classes),
            min_size=spec.min_size,
            max_size=spec.max_size,
            image_mean=list(spec.image_mean),
            image_std=list(spec.image_std),
            rpn_pre_nms_top_n_train=spec.rpn_pre_nms_top_n_train,
            rpn_pre_nms_top_n_test=spec.rpn_pre_nms_top_n_test,
            rpn_post_nms_top_n_train=spec.rpn_post_nms_top_n_train,
            rpn_post_nms_top_n_test=spec.rpn_post_nms_top_n_test,
            rpn_nms_thresh=spec.rpn_nms_thresh,
            rpn_fg_iou_thresh=spec.rpn_fg_iou_thresh,
            rpn_bg_iou_thresh=spec.rpn_bg_iou_thresh,
            rpn_batch_size_per_image=spec.rpn_batch_size_per_image,
            rpn_positive_fraction=spec.rpn_positive_fraction,
            rpn_score_thresh=spec.rpn_score_thresh,
            box_score_thresh=spec.box_score_thresh,
            box_nms_thresh=spec.box_nms_thresh,
            box_detections_per_img=spec.box_detections_per_img,
            box_fg_iou_thresh=spec.box_fg_iou_thresh,
            box_bg_iou_thresh=spec.box_bg_iou_thresh,
            box_batch_size_per_image=spec.box_batch_size_per_image,
            box_positive_fraction=spec.box_positive_fraction,
        )
        self.spec = spec
        self.categories = tuple(categories)


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
    backbone = resnet_fpn(
        spec.arch,
        weights=weights_backbone,
        norm=spec.norm,
        norm_eps=spec.norm_eps,
        trainable_layers=trainable_layers,
        out_channels=spec.out_channels,
        fast=spec.fast,
    )
    return Detector(spec, backbone, num_classes, categories)


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
        weights: A whole detector's weights: a file or URL of a checkpoint of ours, or of a state dict of torchvision's
            FasterRCNN of this shape. ``weights_backbone`` is ignored then.
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
    if weights is None:
        return build_detector(
            DetectorSpec() if spec is None else spec,
            num_classes=91 if num_classes is None else num_classes,
            weights_backbone=weights_backbone,
            trainable_layers=trainable_backbone_layers,
        )
    path = fetch(os.fspath(weights)) if "://" in os.fspath(weights) else os.fspath(weights)
    content = read_checkpoint(path)
    tensors = _detector_tensors(content, path)
    found = len(tensors[_CLASS_SCORES])
    if num_classes not in (None, found):
        raise WeightsError(f"{path}: was made for {found} classes (background included), num_classes is {num_classes}")
    carried, categories = _description(content, path)
    if spec is None:
        spec = carried or DetectorSpec()
    model = build_detector(spec, num_classes=found, trainable_layers=trainable_backbone_layers, categories=categories)
    _load_whole(model, tensors, path)
    return model


def checkpoint_payload(model: Detector) -> dict[str, Any]:
    """Give a detector as plain values and tensors, from which ``load_detector`` builds it again.

    Returns:
        ``format``, ``spec`` and ``categories`` (plain values) and ``model`` (the state dict, not copied). Training may
        add entries of its own beside them.
    """
    return {
        "format": CHECKPOINT_FORMAT,
        "spec": model.spec.model_dump(mode="json"),
        "categories": categories_to_plain(model.categories),
        "model": model.state_dict(),
    }


def load_detector(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Detector:
    """Build the detector that a checkpoint holds, in evaluation mode.

    Args:
        path: A file with the entries of ``checkpoint_payload``.
        device: Where to put the model.

    Raises:
        WeightsError: If the file is missing, damaged, no checkpoint of a detector, or contradicts itself.
    """
    content = read_checkpoint(path)
    spec, categories = _description(content, path)
    if spec is None:
        raise WeightsError(
            f"{os.fspath(path)}: is not a detector checkpoint: its 'format' must be {CHECKPOINT_FORMAT!r}, got "
            f"{content.get('format')!r} (keys: {name_some(content) or 'none'})"
        )
    tensors = _detector_tensors(content, path)
    try:
        model = build_detector(spec, num_classes=len(tensors[_CLASS_SCORES]), categories=categories)
    except UserError as error:
        raise WeightsError(f"{os.fspath(path)}: {error}") from error
    _load_whole(model, tensors, path)
    return model.to(device).eval()  # type: ignore[no-any-return]


def load_detector_weights(model: Detector, path: str | os.PathLike[str]) -> LoadReport:
    """Continue from another detector's weights: all of them, or all but the class-specific ones.

    The last layers (``roi_heads.box_predictor``) keep what ``model`` has if the classes differ: in number, or in name
    or order where both sides know their names.

    Args:
        model: Changed in place.
        path: A checkpoint of ours, or a state dict of torchvision's FasterRCNN of this shape.

    Returns:
        What was loaded and what was not; it is also logged.

    Raises:
        WeightsError: If the file cannot be read, or anything else in it does not fit the model.
    """
    content = read_checkpoint(path)
    tensors = _detector_tensors(content, path)
    _, categories = _description(content, path)
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


def _check_categories(categories: Sequence[Category], num_classes: int) -> None:
    if num_classes < 2:
        raise UserError(f"num_classes counts the background, so it must be at least 2; got {num_classes}")
    if categories and [c.label for c in categories] != list(range(1, num_classes)):
        raise UserError(
            f"categories must have the labels 1..{num_classes - 1} in this order for num_classes={num_classes}, got "
            f"{len(categories)} with labels {name_some(str(c.label) for c in categories)}"
        )


def _description(
    content: dict[str, Any], path: str | os.PathLike[str]
) -> tuple[DetectorSpec | None, tuple[Category, ...]]:
    """Read spec and categories; (None, ()) from a file that is no checkpoint of ours."""
    if content.get("format") != CHECKPOINT_FORMAT:
        return None, ()
    try:
        return DetectorSpec.model_validate(content["spec"]), categories_from_plain(content["categories"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WeightsError(
            f"{os.fspath(path)}: its spec is not one of this version: {where}: {first['msg']}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{os.fspath(path)}: has no readable spec and categories ({error!r})") from error


def _detector_tensors(content: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    tensors = tensors_in(content, os.fspath(path))
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
