"""Read weights files: each is opened once, no code in it is run, and its tensors get torchvision's names.

``read_weights`` is the one reading that everything else stands on. ``read_checkpoint`` is its first half, the content
as it is stored, for converting a file without using it.
"""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError
from safetensors import safe_open

from resdet.errors import WeightsError, first_line
from resdet.models.archs import ARCHS, ResNetArch
from resdet.models.spec import ANCHOR_FIELDS, CONVENTIONS, WEIGHTS_FIELDS, DetectorSpec, WeightsOrigin
from resdet.types import Category, categories_from_plain
from resdet.weights.arrays import load_pickle
from resdet.weights.convert import check_class_matrix, find_format, log_assumptions, to_torchvision
from resdet.weights.facts import FACTS_ENTRY, OWN_LAYOUTS, carried_facts, facts_of
from resdet.weights.formats import body_prefix, is_caffe_resnet, kind_of
from resdet.weights.layouts import SCORES, Tensors, modern_names
from resdet.weights.networks import Network, find_network, stored_tensors
from resdet.weights.tensors import check_weights
from resdet.weights.torch_files import ZIP_START, load_torch_file

# What our own files call themselves: an entry "format", of a safetensors file in its metadata.
DETECTOR_FORMAT = "resdet-detector-1"
INT8_FORMAT = "resdet-detector-int8-1"
BACKBONE_FORMAT = "resdet-backbone-1"

_OTHER_HEADS = re.compile(r"roi_heads\.(mask|keypoint)_")  # of torchvision's Mask and Keypoint R-CNN

CLASS_SCORES = f"{SCORES}weight"  # its rows are a detector's classes, the background first


@dataclass(frozen=True)
class WeightsFile:
    """What one reading of a weights file finds."""

    path: Path
    kind: Literal["detector", "int8", "classifier", "backbone"]  # a backbone has its pyramid or not
    tensors: Tensors  # as torchvision names them; ``resdet.weights.convert.Converted`` says how for each kind
    # Fields of DetectorSpec under which the weights were trained, stated, implied or assumed: all WEIGHTS_FIELDS of our
    # checkpoints and of other libraries' detectors, of these ANCHOR_FIELDS too if they are stated; some of
    # WEIGHTS_FACTS of other backbones; none of torchvision's own files, which state nothing.
    settings: dict[str, Any]
    # The file's dictionary as it is stored, for entries that only their writer understands: "config" and "training" of
    # a run, "moment" of a broken step, "classes" of a classifier.
    content: Mapping[str, Any] = field(repr=False)
    format: str | None = None  # what the file calls itself
    spec: DetectorSpec | None = None  # of a detector's checkpoint of ours, as are the next two
    categories: tuple[Category, ...] = ()  # by rising label; empty if their names are not known
    score_threshold: float | None = None  # None if no threshold was chosen
    facts: dict[str, Any] = field(default_factory=dict)  # of a converted file (``resdet.weights.facts.facts_of``)
    exported: dict[str, Any] = field(default_factory=dict)  # the description that ``export_backbone`` writes
    left_over: tuple[str, ...] = ()  # names in the file that torchvision's layout has no place for
    origin: WeightsOrigin = field(default_factory=WeightsOrigin)  # what was known of it when it was read

    @property
    def is_detector(self) -> bool:
        """Whether the file holds a whole detector, and not the weights of its backbone alone."""
        return self.kind in ("detector", "int8")


WeightsPath: TypeAlias = str | os.PathLike[str] | WeightsFile  # by its path, or one that has been read


def read_weights(
    path: WeightsPath, origin: WeightsOrigin | None = None, settings: Mapping[str, Any] | None = None
) -> WeightsFile:
    """Read a weights file of ours, torchvision's or another library's; one that has been read is returned as it is.

    Args:
        path: The file.
        origin: What is known of the weights, where the file does not say it.
        settings: Stated settings of the detector to be built (``WEIGHTS_FACTS``): where weights can be meant in several
            ways, they are read in that which fits.

    Raises:
        WeightsError: If the file is missing or damaged, holds anything but tensors and plain values, tensors that
            cannot be weights (NaN, whole numbers, ...), no network that is known here or several, a description that
            contradicts itself or ``origin``.
    """
    if isinstance(path, WeightsFile):
        if origin not in (None, WeightsOrigin(), path.origin):
            raise WeightsError(f"{path.path}: has been read already: give the origin to read_weights")
        return path
    content, metadata = _read(Path(path))
    return weights_in(content, Path(path), metadata, origin=origin, settings=settings)


def weights_in(
    content: Mapping[str, Any],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    origin: WeightsOrigin | None = None,
    settings: Mapping[str, Any] | None = None,
) -> WeightsFile:
    """Interpret the content read from ``path`` as ``read_weights`` does; only safetensors files have metadata."""
    metadata, origin = metadata or {}, origin or WeightsOrigin()
    name = content.get("format", metadata.get("format"))
    if name in (DETECTOR_FORMAT, INT8_FORMAT):
        tensors = stored_tensors(content)
        if "moment" not in content:  # a broken step is kept to be computed again, NaN and all
            check_weights(tensors, str(path), int8=name == INT8_FORMAT)
        return _own_detector(path, content, tensors, origin)
    network = find_network(content, str(path), origin.prefix)
    try:
        file = _interpreted(content, path, network, _exported(metadata), origin, settings or {})
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    check_weights(file.tensors, str(path))
    return replace(file, format=name)


def _interpreted(
    content: Mapping[str, Any],
    path: Path,
    network: Network,
    exported: dict[str, Any],
    origin: WeightsOrigin,
    settings: Mapping[str, Any],
) -> WeightsFile:
    """Rename a network as torchvision names it, and collect what else is known of it."""
    tensors, facts = network.tensors, carried_facts(content)
    if origin.format is not None:
        find_format(origin.format)
    stated = origin.model_dump(exclude_none=True, exclude={"prefix", "classes"})
    if set(stated) - {"format"} or origin.format not in (None, *OWN_LAYOUTS):
        is_plain = False
    elif facts:
        # Names alone do not decide: mmdetection's bodies have torchvision's, and other channels.
        is_plain = facts["format"] in OWN_LAYOUTS
    else:
        is_plain = body_prefix(tensors) is not None and bool(exported or stated or not is_caffe_resnet(tensors))
    if not is_plain:
        try:
            converted = to_torchvision(content, origin=origin, settings=settings, network=network)
        except WeightsError as error:
            raise WeightsError(f"holds no ResNet that is known here: {error}") from error
        # Heads without class scores are a detector too, though none that can be built here.
        kind = "detector" if any(tensor.startswith("roi_heads.") for tensor in tensors) else converted.kind
        facts = converted.facts
        log_assumptions(str(path), facts, [name for name in converted.assumed if name not in settings])
        given = _settings(exported or facts, kind)
        return WeightsFile(
            path, kind, converted.tensors, given, content, facts=facts, left_over=converted.left_over, origin=origin
        )
    left_over = [*(name for name in tensors if _OTHER_HEADS.match(name)), *network.outside]
    tensors = {name: tensor for name, tensor in modern_names(tensors).items() if not _OTHER_HEADS.match(name)}
    kind = kind_of(tensors)
    if kind == "detector":
        check_class_matrix(tensors)
    elif not facts and not exported and not stated:
        assumed_facts, assumed = facts_of(content, "torchvision", tensors, tensors)
        log_assumptions(str(path), assumed_facts, [name for name in assumed if name not in settings])
        _check_is_not_msras(settings)
    return WeightsFile(
        path,
        kind,
        tensors,
        _settings(exported or facts, kind),
        content,
        facts=facts,
        exported=exported,
        left_over=tuple(left_over),
        origin=origin,
    )


def _check_is_not_msras(settings: Mapping[str, Any]) -> None:
    """Refuse a bare ResNet whose order of colours decides, where nothing says which of two it is."""
    if settings.get("stride_in_1x1") and max(settings.get("image_std", (1.0,))) < 0.02:
        raise WeightsError(
            "with these settings (stride_in_1x1, image_std) it is one of MSRA's ResNets, and its names do not say "
            "whether it is mmcv's caffe-style file, for BGR images, or has been converted to RGB: state "
            "model.weights_origin.channel_order=bgr or rgb"
        )


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``.pth``, ``.pt``, ``.safetensors`` or ``.pkl`` file onto the CPU, without running any code it may hold.

    Return the file's dictionary as it is stored, with string keys. The numpy arrays of a ``.pkl`` (detectron2's model
    zoo, MSRA's networks) become tensors. Facts that ``convert_file`` wrote into the metadata of a ``.safetensors`` file
    are an attribute of the dictionary.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a file's content, and the metadata of a safetensors file."""
    if not path.is_file():
        raise WeightsError(f"{path}: {'is a directory, not a file' if path.is_dir() else 'there is no such file'}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb") as file:
        head = file.read(9)
        file.seek(0)
        is_zip = head.startswith(ZIP_START)  # PyTorch's format, whatever the suffix; before 1.6, a pickle
        if not is_zip and head[:1] != b"\x80" and head[8:] == b"{":
            return _read_safetensors(path)  # under another suffix
        content = load_pickle(file, path) if path.suffix == ".pkl" and not is_zip else load_torch_file(file, path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise WeightsError(f"{path}: must hold a dictionary of named tensors, got {type(content).__name__}")
    return content, {}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    # The library bounds the header's size and depth, and tensors may neither overlap nor leave the file.
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118  # no mapping
        if FACTS_ENTRY in metadata:
            setattr(tensors, FACTS_ENTRY, json.loads(metadata[FACTS_ENTRY]))
    except OSError:
        raise
    except Exception as error:  # SafetensorError, or whatever damaged facts raise
        raise WeightsError(f"{path}: is damaged, cut short or not a safetensors file ({first_line(error)})") from error
    return tensors, metadata


def _own_detector(path: Path, content: Mapping[str, Any], tensors: Tensors, origin: WeightsOrigin) -> WeightsFile:
    """Read the description in a detector's checkpoint of ours."""
    score_threshold = content.get("score_threshold")  # older files have none
    if not (score_threshold is None or (isinstance(score_threshold, (int, float)) and 0 <= score_threshold <= 1)):
        got = score_threshold if isinstance(score_threshold, (int, float)) else f"a {type(score_threshold).__name__}"
        raise WeightsError(f"{path}: its score_threshold must be in [0, 1], got {got}")
    try:
        spec, categories = DetectorSpec.model_validate(content["spec"]), categories_from_plain(content["categories"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WeightsError(f"{path}: its spec is not one of this version: {where}: {first['msg']}") from error
    except (KeyError, TypeError, ValueError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise WeightsError(f"{path}: has no readable spec and categories: {why}") from error
    kind: Literal["int8", "detector"] = "int8" if content["format"] == INT8_FORMAT else "detector"
    settings = {name: getattr(spec, name) for name in WEIGHTS_FIELDS}
    for name, value in origin.model_dump(exclude_none=True, exclude={"classes"}).items():
        if settings.get(name) != value:
            raise WeightsError(f"{path}: is a checkpoint of this library, which says itself what origin.{name} states")
    return WeightsFile(
        path,
        kind,
        tensors,
        settings,
        content,
        content["format"],
        spec,
        categories,
        score_threshold,
        origin=origin,
    )


def _exported(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the description that ``export_backbone`` wrote; {} if there is none or it is unreadable."""
    if metadata.get("format") != BACKBONE_FORMAT:
        return {}
    try:
        description = json.loads(metadata.get("backbone", ""))
    except (ValueError, RecursionError):
        return {}
    return description if isinstance(description, dict) else {}


def _settings(stated: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the settings that a file states; for another library's detector, all of that library's conventions too."""
    given = {name: stated[name] for name in WEIGHTS_FIELDS if name in stated}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    arch = ARCHS.get(str(stated.get("arch")))
    if isinstance(arch, ResNetArch) and arch.block == "basic":
        settings |= {"stride_in_1x1": False} if settings else {}  # whatever its library's other networks do
    library = stated.get("format", "torchvision")
    if kind != "detector":
        return settings
    anchors = {name: stated.get(name) for name in ANCHOR_FIELDS}
    settings |= {
        name: tuple(values)
        for name, values in anchors.items()
        if isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    }
    if library in OWN_LAYOUTS:
        return settings
    usual = CONVENTIONS.get(library, {})
    return {name: usual.get(name, DetectorSpec.model_fields[name].default) for name in WEIGHTS_FIELDS} | settings
