"""Turn a file into a detector of any kind (ours, int8, another library's), and a detector into a checkpoint."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from resdet.errors import UserError, WeightsError, name_some
from resdet.files import save_tensors, written_whole
from resdet.models.archs import ARCHS
from resdet.models.detector import Detector, build_detector
from resdet.models.int8 import Int8Detector
from resdet.models.loading import LoadReport, load_strictly
from resdet.models.spec import CONVENTIONS, DetectorSpec
from resdet.types import Category, categories_to_plain
from resdet.weights.files import CLASS_SCORES, DETECTOR_FORMAT, INT8_FORMAT, WeightsFile, WeightsPath, read_weights
from resdet.weights.formats import OWN_LAYOUTS

logger = logging.getLogger(__name__)

# Parts of other libraries' detectors that change their detections: one that torchvision's Faster R-CNN lacks is fatal.
_ESSENTIAL = re.compile(
    r"(module\.)?(backbone|neck|rpn_head|rpn\.head|proposal_generator\.rpn_head|roi_heads?\.(box|bbox_head))"
)


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
        config: The configuration of the run it comes from, as plain values, by which ``tools/eval.py`` finds data.

    Raises:
        UserError: If the file's directory does not exist.
    """
    payload = checkpoint_payload(model) | {"format": INT8_FORMAT}
    if config is not None:
        payload["config"] = dict(config)
    with written_whole(Path(path)) as temporary:
        save_tensors(payload, temporary)


def load_detector(path: WeightsPath, device: torch.device | str = "cpu") -> Detector:
    """Build the detector that a file holds, in evaluation mode.

    Args:
        path: A file with the entries of ``checkpoint_payload``, or the Faster R-CNN of another library that
            ``resdet.weights.convert`` reads, such as ``model_final_f6e8b1.pkl`` of detectron2's model zoo. Such a model
            is run as its library runs it (``CONVENTIONS``), and stays so when it is saved here. If it has 80 classes
            and no names for them, they are assumed to be COCO's. A file of ``save_int8_detector`` gives an
            ``Int8Detector``.
        device: Where to put the model.

    Raises:
        WeightsError: If the file is missing, damaged, no checkpoint of a detector, or contradicts itself; or holds
            another kind of detector.
    """
    file = read_weights(path)
    if file.kind != "int8":
        file = describe_detector(file)
    if file.spec is None:
        raise WeightsError(
            f"{file.path}: is not a detector checkpoint: its 'format' must be {DETECTOR_FORMAT!r}, got "
            f"{file.format!r} (keys: {name_some(file.content) or 'none'})"
        )
    num_classes = len(class_scores(file))
    build = Int8Detector.empty if file.kind == "int8" else build_detector
    try:
        model: Detector = build(file.spec, num_classes=num_classes, categories=file.categories)
    except UserError as error:
        raise WeightsError(f"{file.path}: {error}") from error
    load_strictly(model, file, what=f"this {file.spec.arch} detector")
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


def describe_detector(file: WeightsFile) -> WeightsFile:
    """Return a detector's file with the spec and the classes that another library's conventions imply.

    Nothing is added to a checkpoint of ours, nor to a bare state dict of torchvision's, which tells nothing. A detector
    in int8, or one that torchvision's Faster R-CNN cannot be, is refused.
    """
    if file.kind == "int8":
        raise WeightsError(
            f"{file.path}: is in int8: resdet.load_detector runs it, but nothing else can be made from it"
        )
    num_classes = len(class_scores(file))
    if file.spec is not None or file.facts.get("format", "torchvision") in OWN_LAYOUTS:
        return file
    essential = [name for name in file.left_over if _ESSENTIAL.match(name) and not name.endswith("num_batches_tracked")]
    if essential:
        raise WeightsError(
            f"{file.path}: is not the Faster R-CNN with FPN that this detector can be: it also has "
            f"{name_some(essential)}"
        )
    spec, categories = _imported_spec(file), _imported_categories(num_classes)
    logger.info(
        "%s: %s of %s, %d classes (%s); left over: %s",
        file.path,
        spec.arch,
        file.facts["format"],
        num_classes - 1,
        "assumed to be COCO's" if categories else "their names are not known",
        name_some(file.left_over) or "none",
    )
    return replace(file, spec=spec, categories=categories)


def class_scores(file: WeightsFile) -> Tensor:
    """Return the weights of a detector's class scores, ``[K + 1, C]``; a file that has none holds no detector."""
    if CLASS_SCORES not in file.tensors:
        raise WeightsError(
            f"{file.path}: is not a detector: it has no {CLASS_SCORES!r}; its tensors are {name_some(file.tensors)}"
        )
    return file.tensors[CLASS_SCORES]


def _imported_spec(file: WeightsFile) -> DetectorSpec:
    """Describe another library's detector, as that library runs it."""
    library, tensors = file.facts["format"], file.tensors
    if file.facts["arch"] is None:
        raise WeightsError(f"{file.path}: its body is none of {', '.join(ARCHS)}")
    if library not in CONVENTIONS:
        logger.warning(
            "%s: detectors of %s measure boxes one pixel larger, and only approximately run as they were trained: "
            "expect to lose some AP, or fine-tune",
            file.path,
            library,
        )
    try:
        return DetectorSpec(
            arch=file.facts["arch"],
            out_channels=len(tensors["backbone.fpn.inner_blocks.0.0.weight"]),
            box_head_channels=len(tensors["roi_heads.box_head.fc6.weight"]),
            **(CONVENTIONS.get(library, {}) | file.settings),
        )
    except KeyError as error:
        raise WeightsError(
            f"{file.path}: is not a Faster R-CNN with FPN and two fully connected layers: it has no {error}"
        ) from error
    except ValidationError as error:
        raise WeightsError(f"{file.path}: {error.errors()[0]['msg']}") from error


def _imported_categories(num_classes: int) -> tuple[Category, ...]:
    """Return COCO's 80 classes by rising id, the order in which every library numbers them; none for another number."""
    by_id = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    known = [(number, name) for number, name in enumerate(by_id) if name not in ("__background__", "N/A")]
    named = tuple(Category(label, number, name) for label, (number, name) in enumerate(known, 1))
    return named if num_classes == len(named) + 1 else ()
