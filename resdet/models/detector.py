"""The detector: torchvision's FasterRCNN on any body, with its settings in one place (``DetectorSpec``).

Legend: ``B`` images, ``N`` boxes, ``K`` foreground classes, ``C, H, W`` channels and pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import RPNHead

from resdet.errors import UserError, name_some
from resdet.models import padded
from resdet.models.archs import VGGArch, find_arch
from resdet.models.backbone import ResNetFPN, SingleLevel, check_anchors, freeze_stages
from resdet.models.bodies import Body, make_body
from resdet.models.box_heads import BoxHeads, BoxPredictor, Conv5Head, FastBoxHead
from resdet.models.loading import load_backbone_weights
from resdet.models.proposals import Anchors, FastProposalHead, FastProposalNetwork, KeptAnchors, ProposalNetwork
from resdet.models.resnet import ResNet
from resdet.models.roi_align import FastMultiScaleRoIAlign, MultiScaleRoIAlign
from resdet.models.seeded import SeededTransform
from resdet.models.spec import DetectorSpec, WeightsOrigin
from resdet.models.tracing import scripted_as
from resdet.models.transform import PilTransform
from resdet.types import Category, Prediction
from resdet.weights.source import WeightsSource


class Detector(FasterRCNN):  # type: ignore[misc]
    """torchvision's FasterRCNN with the description that rebuilds it; built by ``build_detector``.

    In training mode ``model(images, targets)`` returns a dictionary of four losses, otherwise ``model(images)`` a list
    of ``resdet.types.Prediction``. Images are ``[3, H, W]`` in [0, 1], each of its own size; those in host memory that
    hold NaN or infinity are refused with a UserError.

    With ``spec.fast`` it deviates from torchvision's where the forward runs in reduced precision: anchors and the
    heads' outputs are float32, and so are the boxes made of them. In float32 both compute the same up to rounding, NaN
    and infinity too, but for an overflow inside a network of finite weights, which may vanish on a CPU (top of
    ``resdet.models.convolution``).

    Its arguments are those of ``build_detector``, a backbone as the spec describes it, and ``conv5`` where the layout
    is "c4": stage 4 of the body, which is run on each proposal.

    Attributes:
        score_threshold: The score from which its detections are worth showing, by the last evaluation (its best F1);
            None before any. It changes nothing in what the model returns.

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
        anchors = (KeptAnchors if spec.fast else Anchors)(
            sizes,
            (spec.aspect_ratios,) * len(sizes),
            rounded=spec.anchor_rounding,
            strides=backbone.strides if spec.anchor_stride == "nominal" else (),
            widened=spec.fast,
        )
        check_anchors(backbone, anchors)
        num_anchors = anchors.num_anchors_per_location()[0]
        fast = spec.fast
        rpn_head = (FastProposalHead if fast else RPNHead)(backbone.out_channels, num_anchors)
        rpn = (FastProposalNetwork if fast else ProposalNetwork)(anchors, rpn_head, spec)
        pool = (FastMultiScaleRoIAlign if fast else MultiScaleRoIAlign)(
            # The coarsest level serves proposals only: boxes are assigned to P2..P5 (FPN paper, equation 1).
            featmap_names=backbone.level_names[: len(backbone.body.channels)],
            output_size=7 if conv5 is None else 14,
            sampling_ratio=spec.roi_sampling_ratio,
            aligned=spec.roi_aligned,
            strides=backbone.strides[: len(backbone.body.channels)],
        )
        if conv5 is None:
            two_layers = FastBoxHead if fast else TwoMLPHead
            head: nn.Module = two_layers(backbone.out_channels * 7 * 7, spec.box_head_channels)
            vector_size = spec.box_head_channels
        else:
            head = Conv5Head(conv5)
            vector_size = 2 * backbone.out_channels  # C5 has twice C4's channels
        predictor = (BoxPredictor if fast else FastRCNNPredictor)(vector_size, num_classes)
        roi_heads = BoxHeads(pool, head, predictor, spec)
        transform = (PilTransform if spec.resize == "pil" else SeededTransform)(
            spec.min_size, spec.max_size, list(spec.image_mean), list(spec.image_std)
        )
        # FasterRCNN's own constructor only makes these parts, and has no argument for half of their options.
        GeneralizedRCNN.__init__(self, backbone, rpn, roi_heads, transform)
        self.score_threshold: float | None = None
        self.spec = spec
        self.categories = tuple(categories)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[Prediction]:
        """Compute the losses in training mode, and detections otherwise."""
        device = self.roi_heads.box_predictor.cls_score.weight.device
        if padded.is_padded(self, device):
            if not self.training:
                return padded.detect(self, images, device)
            if targets is not None:
                return padded.compute_losses(self, images, targets, device)
        result: dict[str, Tensor] | list[Prediction] = super().forward(images, targets)
        return result

    def __prepare_scriptable__(self) -> nn.Module:
        plain: nn.Module = scripted_as(self, FasterRCNN)
        return plain

    def whole_body(self) -> nn.Module:
        """Return the body with all stages that the detector runs, conv5 too where it is run on each proposal."""
        head = self.roi_heads.box_head
        if isinstance(head, Conv5Head):
            return _WholeBody(self.backbone.body, head.layer4)
        body: Body = self.backbone.body
        return body

    def training_counts(self) -> dict[str, Tensor]:
        """Return what the last forward pass in training counted, means over its images, scalars on their device.

        ``rpn_positives`` and ``box_positives``: anchors and proposals that the losses took for objects.
        ``num_objects``: objects in the targets. ``num_found``: those of them that a proposal overlaps with an IoU of
        0.5 or more; ``num_found / num_objects`` is the proposals' recall.
        """
        heads: BoxHeads = self.roi_heads
        found = heads.num_found.float()  # [B]
        rpn, box = self.rpn.fg_bg_sampler.num_positives, heads.fg_bg_sampler.num_positives
        return {
            "rpn_positives": _mean(rpn, found.device),
            "box_positives": _mean(box, found.device),
            "num_objects": torch.full((), heads.num_objects / len(found), device=found.device),
            "num_found": found.mean(),
        }


def _mean(counts: list[int] | Tensor, device: torch.device) -> Tensor:
    if isinstance(counts, Tensor):
        return counts.float().mean()
    return torch.full((), sum(counts) / len(counts), device=device)


class _WholeBody(nn.Module):
    def __init__(self, body: Body, conv5: nn.Module) -> None:
        super().__init__()
        self.body, self.conv5 = body, conv5

    def forward(self, images: Tensor) -> Tensor:
        (c4,) = self.body(images).values()  # [B, C, H / 16, W / 16]
        c5: Tensor = self.conv5(c4)  # [B, 2 * C, H / 32, W / 32]
        return c5


def build_detector(
    spec: DetectorSpec,
    *,
    num_classes: int,
    weights_backbone: WeightsSource = None,
    trainable_layers: int = 3,
    categories: Sequence[Category] = (),
    origin: WeightsOrigin | None = None,
) -> Detector:
    """Build a detector, its heads random.

    Args:
        spec: What the detector is.
        num_classes: ``K + 1``: the background counts.
        weights_backbone: First weights of the body: None (random), a torchvision weight name or enum, a file or a URL.
        trainable_layers: Number of the body's stages that take gradients, 0 to 5; see ``resnet_fpn``.
        categories: The ``K`` classes by rising label, or none if their names are not known.
        origin: What is known of ``weights_backbone``, where the file does not say it.

    Raises:
        UserError: If an argument is out of its range.
        WeightsError: If the weights cannot be read or are not those of this body.
    """
    _check_categories(categories, num_classes)
    is_vgg = isinstance(find_arch(spec.arch), VGGArch)
    stages: dict[str, tuple[int, ...] | None] = {"fpn": None, "c4": (3, 4), "dc5": (5,) if is_vgg else (4,)}
    body = make_body(
        spec.arch,
        norm=spec.norm,
        norm_eps=spec.norm_eps,
        returned_layers=stages[spec.layout],
        fast=spec.fast,
        stride_in_1x1=spec.stride_in_1x1,
        dilate_c5=spec.layout == "dc5" and not is_vgg,
    )
    freeze_stages(body, trainable_layers)
    load_backbone_weights(body, weights_backbone, spec.arch, origin)
    if spec.layout == "fpn":
        return Detector(spec, ResNetFPN(body, out_channels=spec.out_channels), num_classes, categories)
    conv5 = None
    if spec.layout == "c4":
        assert isinstance(body, ResNet)
        conv5 = body.take_off_stage()
    return Detector(spec, SingleLevel(body), num_classes, categories, conv5)


def _check_categories(categories: Sequence[Category], num_classes: int) -> None:
    if num_classes < 2:
        raise UserError(f"num_classes counts the background, so it must be at least 2; got {num_classes}")
    if categories and [c.label for c in categories] != list(range(1, num_classes)):
        raise UserError(
            f"categories must have the labels 1..{num_classes - 1} in this order for num_classes={num_classes}, got "
            f"{len(categories)} with labels {name_some(str(c.label) for c in categories)}"
        )
