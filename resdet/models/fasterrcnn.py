"""Build Faster R-CNN by torchvision's convention for its builders, from published weights or others.

``FasterRCNN_ResNet101_FPN_Weights`` is what torchvision calls a weights enum, with ``weights.meta`` and
``weights.transforms()``; after ``import resdet.hub``, ``torchvision.models.get_weight`` knows its members.

Annotations are evaluated here, where other modules postpone it: ``torchvision.models.get_model_weights`` finds the enum
in that of the builder's ``weights``.
"""

import os
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from torch import Tensor
from torchvision.models import Weights, WeightsEnum
from torchvision.transforms._presets import ObjectDetection

from resdet.errors import UserError, WeightsError
from resdet.models.checkpoint import COCO_NAMES, class_scores, describe_detector, log_assumed_settings
from resdet.models.detector import Detector, build_detector
from resdet.models.loading import load_strictly
from resdet.models.spec import DetectorSpec, WeightsOrigin
from resdet.weights.files import WeightsFile, read_weights
from resdet.weights.source import WeightsSource, locate, read_first_weights
from resdet.weights.zoo import PUBLISHED, find_published

_ARCH = "resnet101"


def _entry(name: str, recipe: str) -> Weights:
    published = PUBLISHED[name]
    return Weights(
        url=published.url,
        transforms=ObjectDetection,  # pixels in [0, 1]; the model itself resizes and normalises
        meta={
            "categories": ["__background__", *COCO_NAMES],  # by label: 81, without the gaps of torchvision's 91
            "min_size": (1, 1),
            "num_params": 60_643_940,
            "recipe": recipe,
            "license": published.licence,
            "_metrics": {"COCO-val2017": {"box_map": published.box_ap}},
            "_docs": f"Trained by {published.library}. The metric is a reference from {published.source}.",
        },
    )


class FasterRCNN_ResNet101_FPN_Weights(WeightsEnum):  # type: ignore[misc]  # noqa: N801 - torchvision's convention
    """Published weights of this detector, none of them trained here; torchvision itself has none."""

    DETECTRON2_COCO_3X = _entry(
        "detectron2_r101_fpn_3x",
        "https://github.com/facebookresearch/detectron2/blob/main/configs/COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
    )
    MMDETECTION_COCO_3X = _entry(
        "mmdetection_r101_fpn_3x",
        "https://github.com/open-mmlab/mmdetection/blob/main/configs/faster_rcnn/faster-rcnn_r101_fpn_ms-3x_coco.py",
    )
    DEFAULT = DETECTRON2_COCO_3X

    def get_state_dict(self, progress: bool = True) -> dict[str, Tensor]:
        """Return the tensors under torchvision's names; the file itself has its library's."""
        return read_weights(locate(self, progress=progress)).tensors


def fasterrcnn_resnet101_fpn(  # noqa: D417 - the rest is documented by DetectorSpec
    *,
    weights: FasterRCNN_ResNet101_FPN_Weights | str | os.PathLike[str] | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: WeightsSource = None,
    trainable_backbone_layers: int | None = None,
    spec: DetectorSpec | None = None,
    origin: WeightsOrigin | None = None,
    min_size: int | Sequence[int] | None = None,
    max_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    rpn_pre_nms_top_n_train: int | None = None,
    rpn_pre_nms_top_n_test: int | None = None,
    rpn_post_nms_top_n_train: int | None = None,
    rpn_post_nms_top_n_test: int | None = None,
    rpn_nms_thresh: float | None = None,
    rpn_fg_iou_thresh: float | None = None,
    rpn_bg_iou_thresh: float | None = None,
    rpn_batch_size_per_image: int | None = None,
    rpn_positive_fraction: float | None = None,
    rpn_score_thresh: float | None = None,
    box_score_thresh: float | None = None,
    box_nms_thresh: float | None = None,
    box_detections_per_img: int | None = None,
    box_fg_iou_thresh: float | None = None,
    box_bg_iou_thresh: float | None = None,
    box_batch_size_per_image: int | None = None,
    box_positive_fraction: float | None = None,
) -> Detector:
    """Build Faster R-CNN on a ResNet-101 with FPN, by torchvision's convention for its builders.

    It deviates from torchvision's in what happens without weights: ``weights_backbone`` is None by default, so that
    nothing is downloaded unasked, and norms are frozen all the same (``spec.norm``). Arguments of ``FasterRCNN`` that
    are modules (``rpn_head``, ``box_predictor``, ...) are not taken: a checkpoint could not describe them. The others
    (``min_size`` and all that follow) are fields of ``spec``, which they override; None leaves what ``spec`` or the
    weights say, or else torchvision's default.

    Args:
        weights: A whole detector's weights: a member of ``FasterRCNN_ResNet101_FPN_Weights`` or its name
            (``"DEFAULT"``); the name of a published detector; or a file or URL of a checkpoint of ours, of a state dict
            of torchvision's FasterRCNN of this shape, or of another library's Faster R-CNN (see ``load_detector``).
            ``weights_backbone`` is ignored then.
        progress: Show a bar while weights are downloaded.
        num_classes: The background counts. By default what ``weights`` has, or else 91 (COCO).
        weights_backbone: First weights of the body: None (random), a torchvision weight name or enum, a published
            detector's name, a file or a URL.
        trainable_backbone_layers: How many stages of the body take gradients, 0 to 5, by default 3; see ``resnet_fpn``.
        spec: Everything else; by default that of the checkpoint, or else ``DetectorSpec()``.
        origin: What is known of ``weights`` or ``weights_backbone``, where the file does not say it.

    Raises:
        TypeError: If ``weights`` is a member of another builder's enum.
        UserError: If an argument is out of its range.
        WeightsError: If the weights cannot be had, or are for another model or number of classes.
    """
    arguments = dict(locals())
    given = {name: arguments[name] for name in DetectorSpec.model_fields if arguments.get(name) is not None}
    layers = 3 if trainable_backbone_layers is None else trainable_backbone_layers
    if weights is None:
        first = weights_backbone and read_first_weights(weights_backbone, _ARCH, origin, progress=progress)
        return build_detector(
            _with(spec or DetectorSpec(), given),
            num_classes=91 if num_classes is None else num_classes,
            weights_backbone=first,
            trainable_layers=layers,
        )
    if spec is not None:
        _with(spec, given)  # wrong arguments are told before anything is downloaded
    file = _read_detector(weights, num_classes, origin, progress)
    built = _with(spec or file.spec or DetectorSpec(**file.settings), given)
    if spec is None:
        log_assumed_settings(file, built, given)
    num_rows = len(class_scores(file))
    model = build_detector(built, num_classes=num_rows, trainable_layers=layers, categories=file.categories)
    load_strictly(model, file, what=f"this {_ARCH} detector")
    model.score_threshold = file.score_threshold
    return model


def _with(spec: DetectorSpec, given: dict[str, Any]) -> DetectorSpec:
    """Return a spec with the arguments that are given, if it is one that the builder may build."""
    for name, required in (("arch", _ARCH), ("layout", "fpn")):
        if (own := getattr(spec, name)) != required:
            raise UserError(f"spec.{name} must be {required!r} here, got {own!r}; build_detector takes any")
    if not given:
        return spec
    try:
        return DetectorSpec.model_validate(spec.model_dump() | given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][:1])) or "its arguments"
        raise UserError(f"fasterrcnn_resnet101_fpn: {where}: {first['msg']}, got {first['input']!r}") from error


def _read_detector(
    weights: WeightsEnum | str | os.PathLike[str], num_classes: int | None, origin: WeightsOrigin | None, progress: bool
) -> WeightsFile:
    """Read a whole detector of this architecture; what its name tells is checked before it is downloaded."""
    enum, source = FasterRCNN_ResNet101_FPN_Weights, weights
    if isinstance(weights, str):
        source = enum.__members__.get(weights.removeprefix(f"{enum.__name__}."), weights)
    if isinstance(source, WeightsEnum):
        source = enum.verify(source)
    text = source.url if isinstance(source, WeightsEnum) else os.fspath(source)
    if published := find_published(text):
        _check_num_classes(published.name, published.num_classes, num_classes)
        if published.arch != _ARCH:
            raise WeightsError(f"weights: {published.name} is of {published.arch}; load_detector builds it")
    file = describe_detector(read_weights(locate(source, progress=progress), origin))
    _check_num_classes(str(file.path), len(class_scores(file)), num_classes)
    if file.spec is not None and file.spec.arch != _ARCH:
        raise WeightsError(f"{file.path}: is of {file.spec.arch}; load_detector builds it")
    return file


def _check_num_classes(source: str, expected: int, given: int | None) -> None:
    if given not in (None, expected):  # the words are those of torchvision's builders
        raise WeightsError(
            f"{source}: The parameter 'num_classes' expected value {expected} but got {given} instead (the background "
            "counts)"
        )
