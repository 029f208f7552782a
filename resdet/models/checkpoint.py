"""Checkpoints of detectors: a file to a detector of any kind (ours, int8, another library's), and back."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from resdet.errors import UserError, WeightsError, name_some
from resdet.files import save_tensors, written_whole
from resdet.models.archs import ARCHS
from resdet.models.detector import Detector, build_detector
from resdet.models.int8 import Int8Detector
from resdet.models.spec import CONVENTIONS, WEIGHTS_FIELDS, DetectorSpec
from resdet.types import Category, categories_from_plain, categories_to_plain
from resdet.weights.convert import FACTS_ENTRY, Converted, to_torchvision
from resdet.weights.files import LoadReport, read_checkpoint, tensors_in

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "resdet-detector-1"
INT8_FORMAT = "resdet-detector-int8-1"

_PREDICTOR = "roi_heads.box_predictor."
_CLASS_SCORES = f"{_PREDICTOR}cls_score.weight"
_STEM = "backbone.body.conv1.weight"
# What convert calls files whose names are those of torchvision's models.
_OWN_LAYOUT = ("torchvision", "timm")

# Parts of other libraries' detectors that change what they answer: one that torchvision's Faster R-CNN lacks is fatal.
_ESSENTIAL = re.compile(
    r"(module\.)?(backbone|neck|rpn_head|rpn\.head|proposal_generator\.rpn_head|roi_heads?\.(box|bbox_head))"
)


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


def save_int8_detector(
    model: Int8Detector, path: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> None:
    """Write a detector in int8, which ``load_detector`` reads.

    Args:
        model: What ``quantize_detector`` gave.
        path: The file.
        config: The configuration of the run it comes from, as plain values, by which ``tools/eval.py`` finds data.

    Raises:
        UserError: If the file's directory does not exist.
    """
    payload: dict[str, Any] = {**checkpoint_payload(model), "format": INT8_FORMAT}
    if config is not None:
        payload["config"] = dict(config)
    with written_whole(Path(path)) as beside:
        save_tensors(payload, beside)


def load_detector(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Detector:
    """Build the detector that a file holds, in evaluation mode.

    Args:
        path: A file with the entries of ``checkpoint_payload``, or the Faster R-CNN of another library that
            ``resdet.weights.convert`` reads, such as ``model_final_f6e8b1.pkl`` of detectron2's model zoo. Such a model
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
    if own_layout and not hasattr(content, FACTS_ENTRY):  # which resdet.weights.convert_file wrote
        return {}
    if converted.kind == "detector" and not own_layout:
        spec = _imported_spec(converted, path)
        return {name: getattr(spec, name) for name in WEIGHTS_FIELDS}
    settings = _facts_as_fields(converted)
    return {name: settings[name] for name in WEIGHTS_FIELDS if name in settings}


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
    """Read what ``resdet.export.backbone`` wrote beside a backbone's tensors; nothing from another safetensors file."""
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
