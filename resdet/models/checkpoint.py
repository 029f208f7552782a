"""Turn a file into a detector of any kind (ours, int8, another library's), and a detector into a checkpoint."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.models import WeightsEnum
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
)

from resdet.errors import UserError, WeightsError, name_some
from resdet.files import save_tensors, written_whole
from resdet.models.archs import ARCHS
from resdet.models.detector import Detector, build_detector
from resdet.models.int8 import Int8Detector
from resdet.models.loading import LoadReport, fitting_archs, load_strictly
from resdet.models.spec import (
    ANCHOR_FIELDS,
    CONVENTIONS,
    RUN_FIELDS,
    WEIGHTS_FACTS,
    DetectorSpec,
    WeightsOrigin,
)
from resdet.types import Category, categories_to_plain
from resdet.weights.facts import OWN_LAYOUTS, class_names, sees_bytes
from resdet.weights.files import CLASS_SCORES, DETECTOR_FORMAT, INT8_FORMAT, WeightsFile, WeightsPath, read_weights
from resdet.weights.layouts import BODY, FPN
from resdet.weights.source import locate
from resdet.weights.tensors import COUNTER
from resdet.weights.zoo import find_published

logger = logging.getLogger(__name__)

# Parts of other libraries' detectors that change their detections: one that torchvision's Faster R-CNN lacks is fatal.
_ESSENTIAL = re.compile(
    r"(module\.)?(backbone|neck|rpn_head|rpn\.head|proposal_generator\.rpn_head|roi_heads?\.(box|bbox_head))"
)

# COCO's ids and names in torchvision's numbering: rows 12, 26, ... of its heads are for ids that COCO does not use.
_COCO = [
    (number, f"N/A ({number})" if name == "N/A" else name)
    for number, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if number
]
COCO_NAMES = tuple(name for _, name in _COCO if not name.startswith("N/A"))
"""COCO's 80 classes in the order of their ids."""

# torchvision's files of detectors with other heads too, whose conventions are as certain as those of published ones.
_TORCHVISIONS = {
    entry.url.rpartition("/")[2]
    for weights in (MaskRCNN_ResNet50_FPN_Weights, KeypointRCNN_ResNet50_FPN_Weights)
    for entry in weights
}


def checkpoint_payload(model: Detector) -> dict[str, Any]:
    """Return a detector as plain values and tensors (not copied), from which ``load_detector`` builds it again.

    Training may add entries of its own.
    """
    return {
        "format": DETECTOR_FORMAT,
        "spec": model.spec.model_dump(mode="json"),
        "categories": categories_to_plain(model.categories),
        "score_threshold": model.score_threshold,
        "model": model.state_dict(),
    }


def save_int8_detector(
    model: Int8Detector, path: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> None:
    """Write a detector in int8, which ``load_detector`` reads.

    Args:
        model: What ``quantize_detector`` returns.
        path: The file.
        config: The configuration of the run it comes from, as plain values, by which ``resdet eval`` finds data.

    Raises:
        UserError: If the file's directory does not exist.
    """
    payload = checkpoint_payload(model) | {"format": INT8_FORMAT}
    if config is not None:
        payload["config"] = dict(config)
    with written_whole(Path(path)) as temporary:
        save_tensors(payload, temporary)


def load_detector(
    source: WeightsPath | WeightsEnum,
    device: torch.device | str = "cpu",
    *,
    origin: WeightsOrigin | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Detector:
    """Build the detector that a file holds, in evaluation mode.

    Args:
        source: The name of a published detector (``"detectron2_r101_fpn_3x"``; ``resdet.weights.zoo`` lists them) or a
            member of a weights enum, which is downloaded once; or a path or URL of a file. That may have the entries of
            ``checkpoint_payload``; be a state dict of torchvision's Faster R-CNN on a ResNet with FPN (the boxes of its
            Mask and Keypoint R-CNN, too); or the Faster R-CNN of another library that ``resdet.weights.convert`` reads,
            such as ``model_final_f6e8b1.pkl`` of detectron2's model zoo. Such a model is run as its library runs it
            (``CONVENTIONS``), and stays so when it is saved here. What its file does not say is assumed, and logged: 80
            classes without names (91 of torchvision) to be COCO's, for instance. A file of ``save_int8_detector`` gives
            an ``Int8Detector``.
        device: Where to put the model.
        origin: What is known of the weights, where the file does not say it.
        settings: Of torchvision's or another library's detector, fields of its spec (``RUN_FIELDS``) that are not the
            library's defaults: ``{"anchor_sizes": (16, 32, 64, 128, 256), "min_size": 512}``.

    Raises:
        UserError: If a field of ``settings`` is none of ``RUN_FIELDS``.
        WeightsError: If the file is missing, damaged, no checkpoint of a detector, or contradicts itself, ``origin`` or
            the anchors in ``settings``; or holds another kind of detector; or a name is unknown, or cannot be had.
    """
    path = source if isinstance(source, WeightsFile) else locate(source)
    file, settings = read_weights(path, origin), settings or {}
    if unknown := settings.keys() - set(RUN_FIELDS):
        raise UserError(f"settings: must be among {', '.join(RUN_FIELDS)}, got {name_some(sorted(unknown))}")
    if settings and file.spec is not None:
        raise WeightsError(f"{file.path}: is a checkpoint of this library, whose settings are its own")
    if file.kind != "int8":
        file = describe_detector(file, settings)
    spec = file.spec or _foreign_spec(file, settings)
    log_assumed_settings(file, spec, settings)
    num_classes = len(class_scores(file))
    _check_sizes(file, spec)
    build = Int8Detector.empty if file.kind == "int8" else build_detector
    try:
        model: Detector = build(spec, num_classes=num_classes, categories=file.categories)
    except UserError as error:
        raise WeightsError(f"{file.path}: {error}") from error
    load_strictly(model, file, what=f"this {spec.arch} detector")
    model.score_threshold = file.score_threshold
    return model.to(device).eval()  # type: ignore[no-any-return]


def load_detector_weights(model: Detector, path: WeightsPath) -> LoadReport:
    """Start from another detector's weights: all of them, or all but the class-specific ones; what was used is logged.

    The last layers (``roi_heads.box_predictor``) keep what ``model`` has if the classes differ: in number, or in name
    or order where both sides know their names. The file may be a checkpoint of ours, a state dict of torchvision's
    FasterRCNN of this shape, or another library's Faster R-CNN. Its spec is not taken over: ``WeightsFile.settings`` is
    the part of it with which ``model`` should have been built.
    """
    file = describe_detector(read_weights(path))
    names, own_names = [c.name for c in file.categories], [c.name for c in model.categories]
    same_names = not names or not own_names or names == own_names
    same_number = len(class_scores(file)) == model.roi_heads.box_predictor.cls_score.out_features
    keep = () if same_names and same_number else ("roi_heads.box_predictor.",)
    report = load_strictly(model, file, what=f"this {model.spec.arch} detector", keep=keep)
    logger.info("%s detector: %s", model.spec.arch, report)
    return report


def describe_detector(file: WeightsFile, settings: Mapping[str, Any] | None = None) -> WeightsFile:
    """Return a detector's file with the classes, and of another library the spec, that its conventions imply.

    Nothing but classes given by ``WeightsFile.origin`` is added to a checkpoint of ours. ``settings`` are those of
    ``load_detector``. A detector in int8, or one that torchvision's Faster R-CNN cannot be, is refused.
    """
    if file.kind == "int8":
        raise WeightsError(
            f"{file.path}: is in int8: resdet.load_detector runs it, but nothing else can be made from it"
        )
    num_classes = len(class_scores(file))
    if file.spec is not None:
        own = tuple(category.name for category in file.categories)
        if file.origin.classes in (None, own):
            return file
        if own:
            raise WeightsError(f"{file.path}: names its classes itself ({name_some(own)}): leave origin.classes out")
        return replace(file, categories=_named(file, file.origin.classes, num_classes))
    categories, known_as = _categories(file, num_classes)
    library = _library(file)
    if library in OWN_LAYOUTS:
        _check_torchvisions_heads(file)
    else:
        _check_other_heads(file)
        file = replace(file, spec=_foreign_spec(file, settings or {}))
    left_over = name_some(file.left_over) or "none"
    logger.info(
        "%s: detector of %s, %d classes (%s); left over: %s", file.path, library, num_classes - 1, known_as, left_over
    )
    return replace(file, categories=categories)


def class_scores(file: WeightsFile) -> Tensor:
    """Return the weights of a detector's class scores, ``[K + 1, C]``; a file that has none holds no detector."""
    if CLASS_SCORES not in file.tensors:
        raise WeightsError(
            f"{file.path}: is not a detector: it has no {CLASS_SCORES!r}; its tensors are {name_some(file.tensors)}"
        )
    scores = file.tensors[CLASS_SCORES]
    if scores.dim() != 2:
        raise WeightsError(
            f"{file.path}: {CLASS_SCORES} must have 2 dimensions, one row for each class, got {list(scores.shape)}"
        )
    return scores


def _check_sizes(file: WeightsFile, spec: DetectorSpec) -> None:
    """Compare the widths that a file states with its tensors', before a module of that size is made."""
    scores = class_scores(file)
    is_int8, is_fpn = file.kind == "int8", spec.layout == "fpn"
    expected = {"roi_heads.box_predictor.bbox_pred.weight": 4 * len(scores)}
    if is_fpn:
        expected["backbone.inner_blocks.0.weight" if is_int8 else f"{FPN}inner_blocks.0.0.weight"] = spec.out_channels
    if spec.layout != "c4":
        expected["roi_heads.box_head.fc6.weight"] = spec.box_head_channels
    for name, rows in expected.items():
        shape = list(file.tensors[name].shape) if name in file.tensors else []
        if name in file.tensors and shape[:1] != [rows]:
            raise WeightsError(f"{file.path}: contradicts itself: {name} must have {rows} rows, got the shape {shape}")


def _check_other_heads(file: WeightsFile) -> None:
    essential = [name for name in file.left_over if _ESSENTIAL.match(name) and not name.endswith(COUNTER)]
    if essential:
        raise WeightsError(
            f"{file.path}: is not the Faster R-CNN with FPN that this detector can be: it also has "
            f"{name_some(essential)}"
        )


def _check_torchvisions_heads(file: WeightsFile) -> None:
    """Refuse torchvision's detectors of version 2 by what they have more."""
    newer = [
        name
        for name in file.tensors
        if re.match(rf"{re.escape(FPN)}(inner|layer)_blocks\.\d\.1\.|roi_heads\.box_head\.\d|rpn\.head\.conv\.1", name)
    ]
    if newer:
        raise WeightsError(
            f"{file.path}: is torchvision's Faster R-CNN of version 2 (convolutions in the box head, norms in the "
            f"FPN), which this detector cannot be: it has {name_some(newer)}; version 1 loads"
        )


def _foreign_spec(file: WeightsFile, settings: Mapping[str, Any]) -> DetectorSpec:
    """Describe torchvision's or another library's detector, as that library runs it."""
    tensors, library = file.tensors, _library(file)
    archs = fitting_archs(tensors) if library in OWN_LAYOUTS else [file.facts["arch"]]
    if archs in ([], [None]):
        raise WeightsError(f"{file.path}: its body is none of {', '.join(ARCHS)}")
    if len(archs) > 1:
        raise WeightsError(
            f"{file.path}: its body is {' or '.join(archs)}: build it with build_detector and load_state_dict"
        )
    if library not in (*OWN_LAYOUTS, *CONVENTIONS):
        logger.warning(
            "%s: detectors of %s measure boxes one pixel larger, and only approximately run as they were trained: "
            "expect to lose some AP, or fine-tune",
            file.path,
            library,
        )
    stated = {name: file.facts[name] for name in RUN_FIELDS if name in file.facts}
    for name in ANCHOR_FIELDS:
        if name in stated and name in settings and list(settings[name]) != stated[name]:
            raise WeightsError(f"{file.path}: {name} was given as {settings[name]}, but the file says {stated[name]}")
    if any(isinstance(value, list) for name in ANCHOR_FIELDS for value in stated.get(name, ())):
        raise WeightsError(
            f"{file.path}: each level must have anchors of one size, and all levels the same aspect ratios, got "
            f"{', '.join(f'{name}={stated[name]}' for name in ANCHOR_FIELDS)}"
        )
    # torchvision sets eps to 0 for its published weights: overwrite_eps in its faster_rcnn.py.
    published = {"norm_eps": 0.0} if _is_published(file) and library in OWN_LAYOUTS else {}
    origin = file.origin.model_dump(include=set(WEIGHTS_FACTS), exclude_none=True)
    known = published | CONVENTIONS.get(library, {}) | origin | file.settings | stated | dict(settings)
    try:
        return DetectorSpec(
            arch=archs[0],
            out_channels=len(tensors[f"{FPN}inner_blocks.0.0.weight"]),
            box_head_channels=len(tensors["roi_heads.box_head.fc6.weight"]),
            **known,
        )
    except KeyError as error:
        raise WeightsError(
            f"{file.path}: is not a Faster R-CNN with FPN and two fully connected layers: it has no {error}"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"][:1])
        raise WeightsError(f"{file.path}: {where}{first['msg']}, got {first['input']!r}") from error


def log_assumed_settings(file: WeightsFile, spec: DetectorSpec, settings: Mapping[str, Any] | None = None) -> None:
    """Log the fields of a detector's spec that another library's file does not state, nor the user in ``settings``."""
    if file.format in (DETECTOR_FORMAT, INT8_FORMAT) or _is_published(file):
        return
    known = {*file.settings, *file.facts, *(settings or ()), *file.origin.model_dump(exclude_none=True)}
    assumed = [name for name in (*WEIGHTS_FACTS, *RUN_FIELDS) if name not in known]
    if not assumed:
        return
    hints = ["; torchvision's COCO_V1 was trained with norm_eps=0"] if "norm_eps" in assumed else []
    if "image_std" in assumed and sees_bytes(file.tensors, BODY):
        hints.append("; its first filters are for images in 0..255, which torchvision's are not")
    logger.log(
        logging.WARNING if "anchor_sizes" in assumed else logging.INFO,
        "%s: read as %s's Faster R-CNN; the file does not say, and it is assumed: %s (origin or settings of "
        "load_detector, or model.KEY in a configuration, state it otherwise)%s",
        file.path,
        _library(file),
        ", ".join(f"{name}={getattr(spec, name)}" for name in assumed),
        "".join(hints),
    )


def _library(file: WeightsFile) -> str:
    return str(file.facts.get("format", "torchvision"))


def _is_published(file: WeightsFile) -> bool:
    """Whether a file is of torchvision's or detectron2's model zoo, where what it does not say is known."""
    named = file.path.name in _TORCHVISIONS or find_published(file.path.name) is not None
    return named or file.content.get("__author__") == "Detectron2 Model Zoo"


def _categories(file: WeightsFile, num_classes: int) -> tuple[tuple[Category, ...], str]:
    """Return a detector's classes, or none, and how they are known."""
    hint = "origin=WeightsOrigin(classes=...) or model.weights_origin.classes names them"
    if file.origin.classes is not None:
        return _named(file, file.origin.classes, num_classes), "as they were given"
    if names := class_names(file.content):
        if len(names) == num_classes - 1 and len(set(names)) == len(names):
            return _named(file, names, num_classes), "as the file names them"
        logger.warning(
            "%s: names %d classes (%s), which its scores of %d contradict or which repeat: they are not used; %s",
            file.path,
            len(names),
            name_some(names),
            num_classes - 1,
            hint,
        )
        return (), "their names are not known"
    table = _COCO
    if any("keypoint" in name for name in file.left_over):
        table = _COCO[:1]  # Keypoint R-CNN's only class is the person
    elif _library(file) not in OWN_LAYOUTS:
        table = [(number, name) for number, name in _COCO if not name.startswith("N/A")]
    if num_classes != len(table) + 1:
        return (), "their names are not known"
    categories = tuple(Category(label, number, name) for label, (number, name) in enumerate(table, 1))
    if _is_published(file):
        return categories, "COCO's"
    logger.warning(
        "%s: the names of its %d classes are not in the file, and are assumed to be COCO's (%s otherwise)",
        file.path,
        num_classes - 1,
        hint,
    )
    return categories, "assumed to be COCO's"


def _named(file: WeightsFile, names: Sequence[str], num_classes: int) -> tuple[Category, ...]:
    """Return classes of these names; those of COCO have its ids."""
    if len(names) != num_classes - 1 or len(set(names)) != len(names):
        raise WeightsError(
            f"{file.path}: has {num_classes - 1} classes, for which as many different names must be given, got "
            f"{len(names)}: {name_some(names)}"
        )
    ids = {name: number for number, name in _COCO}
    are_cocos = tuple(names) == COCO_NAMES
    return tuple(Category(label, ids[name] if are_cocos else label, name) for label, name in enumerate(names, 1))
