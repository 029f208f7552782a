"""Read weights files: each is opened once, no code in it is run, and its tensors get torchvision's names.

``read_weights`` is the one reading that everything else stands on. ``read_checkpoint`` is its first half, the content
as it is stored, for converting a file without using it.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError
from safetensors import safe_open

from resdet.errors import WeightsError, first_line
from resdet.models.spec import CONVENTIONS, WEIGHTS_FIELDS, DetectorSpec
from resdet.types import Category, categories_from_plain
from resdet.weights.arrays import load_pickle
from resdet.weights.convert import to_torchvision
from resdet.weights.formats import FACTS_ENTRY, OWN_LAYOUTS, body_prefix, carried_facts, kind_of, tensors_in
from resdet.weights.layouts import SCORES, Tensors, modern_names
from resdet.weights.torch_files import ZIP_START, load_torch_file

# What our own files call themselves: an entry "format", of a safetensors file in its metadata.
DETECTOR_FORMAT = "resdet-detector-1"
INT8_FORMAT = "resdet-detector-int8-1"
BACKBONE_FORMAT = "resdet-backbone-1"

CLASS_SCORES = f"{SCORES}weight"  # its rows are a detector's classes, the background first


@dataclass(frozen=True)
class WeightsFile:
    """What one reading of a weights file finds."""

    path: Path
    kind: Literal["detector", "int8", "classifier", "backbone"]  # a backbone has its pyramid or not
    tensors: Tensors  # as torchvision names them; ``resdet.weights.convert.Converted`` says how for each kind
    # Fields of DetectorSpec under which the weights were trained, as far as the file states or implies them: all
    # WEIGHTS_FIELDS for our checkpoints and other libraries' detectors, some of WEIGHTS_FACTS for other backbones, none
    # for torchvision's own files, which state nothing.
    settings: dict[str, Any]
    # The file's dictionary as it is stored, for entries that only their writer understands: "config" and "training" of
    # a run, "moment" of a broken step, "classes" of a classifier.
    content: Mapping[str, Any] = field(repr=False)
    format: str | None = None  # what the file calls itself
    spec: DetectorSpec | None = None  # of a detector's checkpoint of ours, as are the next two
    categories: tuple[Category, ...] = ()  # by rising label; empty if their names are not known
    score_threshold: float | None = None  # None if no threshold was chosen
    facts: dict[str, Any] = field(default_factory=dict)  # of a converted file (``resdet.weights.formats.facts_of``)
    exported: dict[str, Any] = field(default_factory=dict)  # the description that ``export_backbone`` writes
    left_over: tuple[str, ...] = ()  # names in the file that torchvision's layout has no place for

    @property
    def is_detector(self) -> bool:
        """Whether the file holds a whole detector, and not the weights of its backbone alone."""
        return self.kind in ("detector", "int8")


WeightsPath: TypeAlias = str | os.PathLike[str] | WeightsFile  # by its path, or one that has been read


def read_weights(path: WeightsPath) -> WeightsFile:
    """Read a weights file of ours, torchvision's or another library's; one that has been read is returned as it is.

    A WeightsError says if the file is missing or damaged, holds anything but tensors and plain values, no network that
    is known here, or a description that contradicts itself.
    """
    if isinstance(path, WeightsFile):
        return path
    content, metadata = _read(Path(path))
    return weights_in(content, Path(path), metadata)


def weights_in(content: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> WeightsFile:
    """Interpret the content read from ``path`` as ``read_weights`` does; only safetensors files have metadata."""
    metadata = metadata or {}
    tensors = tensors_in(content, str(path))
    name = content.get("format", metadata.get("format"))
    if name in (DETECTOR_FORMAT, INT8_FORMAT):
        return _own_detector(path, content, tensors)
    left_over: tuple[str, ...] = ()
    facts, exported = carried_facts(content), _exported(metadata)
    # Names alone do not decide: mmdetection's bodies have torchvision's, and other channels.
    if facts["format"] in OWN_LAYOUTS if facts else body_prefix(tensors) is not None:
        tensors = modern_names(tensors)
        kind = kind_of(tensors)
    else:
        try:
            converted = to_torchvision(content)
        except WeightsError as error:
            raise WeightsError(f"{path}: holds no ResNet that is known here: {error}") from error
        # Heads without class scores are a detector too, though none that can be built here.
        kind = "detector" if any(tensor.startswith("roi_heads.") for tensor in tensors) else converted.kind
        tensors, facts, left_over = converted.tensors, converted.facts, converted.left_over
    settings = _settings(exported or facts, kind)
    return WeightsFile(
        path, kind, tensors, settings, content, name, facts=facts, exported=exported, left_over=left_over
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


def _own_detector(path: Path, content: Mapping[str, Any], tensors: Tensors) -> WeightsFile:
    """Read the description in a detector's checkpoint of ours."""
    score_threshold = content.get("score_threshold")  # older files have none
    if not (score_threshold is None or (isinstance(score_threshold, (int, float)) and 0 <= score_threshold <= 1)):
        raise WeightsError(f"{path}: its score_threshold must be in [0, 1], got {score_threshold!r}")
    try:
        spec, categories = DetectorSpec.model_validate(content["spec"]), categories_from_plain(content["categories"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WeightsError(f"{path}: its spec is not one of this version: {where}: {first['msg']}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: has no readable spec and categories ({error!r})") from error
    kind: Literal["int8", "detector"] = "int8" if content["format"] == INT8_FORMAT else "detector"
    settings = {name: getattr(spec, name) for name in WEIGHTS_FIELDS}
    return WeightsFile(path, kind, tensors, settings, content, content["format"], spec, categories, score_threshold)


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
    library = stated.get("format", "torchvision")
    if kind != "detector" or library in OWN_LAYOUTS:
        return settings
    usual = CONVENTIONS.get(library, {})
    return {name: usual.get(name, DetectorSpec.model_fields[name].default) for name in WEIGHTS_FIELDS} | settings
