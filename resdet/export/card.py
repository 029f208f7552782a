"""Write the model card of an exported file: ``README.md`` beside it, in the form that Hugging Face's hub reads.

It states what is recorded and no more: the configuration and the evaluation that a checkpoint carries, what the export
compared, and code that loads the file. The text is in ``card.md.jinja``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torchvision
import yaml
from jinja2 import Environment, StrictUndefined
from torch import nn

from resdet.errors import UserError, printable_name, shortened
from resdet.export.compare import ExportReport, report_file
from resdet.export.programs import companion
from resdet.files import write_text
from resdet.models.detector import Detector
from resdet.models.spec import DetectorSpec
from resdet.version import VERSION
from resdet.weights.files import WeightsFile
from resdet.weights.zoo import LICENCES, find_published

# Hugging Face's names of libraries and metrics, where they are not ours.
_LIBRARIES = {"export": "pytorch", "torchscript": "pytorch", "safetensors": "resdet"}
_METRICS = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}
_PACKAGES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",), "safetensors": ("safetensors",)}
_TRAINING = (
    *("train.steps", "train.epochs", "train.batch_size", "train.precision", "train.ema_decay"),
    *("optim.name", "optim.lr", "optim.lr_batch_size", "optim.schedule", "model.trainable_layers", "augment", "seed"),
)
"""Keys of a run's configuration that the card shows."""


def card_file(path: Path) -> Path:
    """Return where the card of an export goes: ``README.md``, or ``<file>.README.md`` where that is another's.

    Raises:
        UserError: If both exist, and neither is the card of an earlier export of this name.
    """
    card = path.with_name("README.md")
    if card != path and (not card.exists() or _is_card_of(card, path)):
        return card
    card = path.with_name(f"{path.name}.README.md")
    if card.exists() and not _is_card_of(card, path):
        raise UserError(
            f"{card}: would be replaced by the model card of this export, but is none of an earlier one; give another "
            "--output"
        )
    return card


def files_beside(path: Path, format: str) -> list[Path]:
    """Return what an export writes beside its file in any case: the other half of a pair, its report, its card."""
    pair = [] if (suffix := companion(format)) is None else [path.with_suffix(suffix)]
    return [*pair, report_file(path), card_file(path)]


def _marker(path: Path) -> str:
    name = quote(os.fsencode(path.name))
    return f"<!-- The next export of {name} by resdet replaces this file; without this line it is kept. -->"


def _is_card_of(card: Path, path: Path) -> bool:
    try:
        return _marker(path) in card.read_text(encoding="utf-8")
    except (OSError, ValueError):  # a folder, or no text
        return False


def write_card(
    card: Path,
    report: ExportReport,
    model: nn.Module,
    *,
    maps: Sequence[tuple[str, int, int]] = (),
    source: WeightsFile | None = None,
    timm_problem: str | None = None,
) -> None:
    """Write the card of an export.

    Args:
        card: The file, ``card_file`` of the exported one.
        report: How that compared with the model.
        model: What was exported, or the detector that it is a part of.
        maps: Name, channels and stride of each feature map; empty for a whole detector.
        source: The file that the model is from, if that is known.
        timm_problem: Why timm's loader does not take the exported file; None if it does.
    """
    detector = model if isinstance(model, Detector) else None
    spec = DetectorSpec(arch=_arch(model)) if detector is None else detector.spec
    content: Mapping[str, Any] = {} if source is None else source.content
    config, evaluation = _mapping(content.get("config")), _mapping(content.get("evaluation"))
    metrics = {key: value for key, value in _mapping(evaluation.get("metrics")).items() if "loss" not in key}
    licence, weights = _first_weights(config, source)
    values = {
        "front_matter": _front_matter(report, spec.arch, config, metrics, licence, timm_problem),
        "marker": _marker(report.path),
        "title": _escaped(report.path.name),
        "file": json.dumps(report.path.name, ensure_ascii=False),
        "report": report,
        "detector": detector,
        "spec": spec,
        "min_size": spec.min_size if isinstance(spec.min_size, int) else spec.min_size[-1],
        "metrics": metrics,
        "evaluation": evaluation,
        "source": source,
        "data": list(_data(config, _mapping(evaluation.get("num_images")))),
        "classes": [] if detector is None else [(c.label, _escaped(c.name)) for c in detector.categories],
        "first_weights": weights,
        "training": [(key, _plain(value)) for key in _TRAINING if (value := _value(config, key)) is not None],
        "maps": maps,
        "in_torchvision": report.what == "body" and timm_problem is None and hasattr(torchvision.models, spec.arch),
        "timm_problem": timm_problem,
        "versions": _versions(report.format),
    }
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = files("resdet.export").joinpath("card.md.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(values)
    write_text(card, re.sub(r"\n{3,}", "\n\n", text))


def _arch(model: nn.Module) -> str:
    return str(getattr(model, "body", model).arch)


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return an entry of a checkpoint, which another program may have written; {} for anything but a mapping."""
    return value if isinstance(value, Mapping) else {}


def _value(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = _mapping(value).get(part)
    return value


def _escaped(text: object) -> str:
    """Return a text of a file as one line of Markdown that shows its characters."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", printable_name(str(text)))


def _plain(value: Any) -> str:
    """Return a value of a configuration for a table; of a path the last part alone, the rest is nobody's business."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(
            _plain(key) if item in ({}, None) else f"{_plain(key)} ({_plain(item)})" for key, item in value.items()
        )
    return _escaped(shortened(value if "://" in str(value) else re.split(r"[\\/]", str(value).rstrip("\\/"))[-1]))


def _data(config: Mapping[str, Any], num_images: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for split, name in (("train", "training data"), ("val", "validation data")):
        settings = _mapping(_value(config, f"data.{split}"))
        count = [f"{num_images[split]} images"] if split in num_images else []
        stated = [
            f"{key} {_plain(value)}"
            for key, value in settings.items()
            if value not in (None, False, [], {}) and not (count and key == "num_images")
        ]
        yield name, "; ".join(count + stated) or "not recorded"


def _first_weights(config: Mapping[str, Any], source: WeightsFile | None) -> tuple[str, str]:
    """Return the licence that first weights impose, as the hub calls it, and a sentence on them."""
    if source is None:
        return "unknown", "Nothing was said of the weights that the model is from"
    name = _value(config, "model.weights") if "model" in config else str(source.path)
    if name is None:
        return "unknown", "Training began with random weights, so nobody else's licence applies to them"
    start = "Training began with" if "model" in config else "These are"
    if published := find_published(name):
        # The others' licences ask for their notice, not for the same licence.
        licence = "cc-by-sa-3.0" if published.library == "detectron2" else "unknown"
        return licence, (
            f"{start} the published detector {_escaped(published.name)}, under {published.licence}; its authors report "
            f"{published.box_ap} box AP on COCO val2017 ({published.source})"
        )
    if re.fullmatch(r"(\w+_Weights\.)?(IMAGENET1K\w*|COCO\w*|DEFAULT)", name):
        return "unknown", (
            f"{start} torchvision's weights {_escaped(name)}, under {LICENCES['torchvision']}, the licence of its "
            "repository; the images behind them have terms of their own"
        )
    return "unknown", f"{start} {_plain(name)}, whose licence is not recorded"


def _front_matter(
    report: ExportReport,
    arch: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    licence: str,
    timm_problem: str | None,
) -> str:
    """Return the metadata that the hub reads, as YAML."""
    is_detector, is_timms = report.what == "detector", report.format == "safetensors" and timm_problem is None
    values: dict[str, Any] = {
        "library_name": "timm" if is_timms else _LIBRARIES.get(report.format, report.format),
        "license": licence,
        "pipeline_tag": "object-detection" if is_detector else "image-feature-extraction",
        "tags": ["resdet", "object-detection", "faster-rcnn", arch, report.format],
    }
    known = {kind: metrics[name] for name, kind in _METRICS.items() if metrics.get(name, -1) >= 0}
    if is_detector and known:
        data = _mapping(_value(config, "data.val"))
        where = next(
            (data[key] for key in ("annotations", "root", "images", "path") if data.get(key)), data.get("format")
        )
        result = {
            "task": {"type": "object-detection"},
            "dataset": {"name": Path(str(where)).name, "type": str(data.get("format")), "split": "val"},
            "metrics": [{"type": kind, "value": value} for kind, value in known.items()],
        }
        values |= {"metrics": list(known), "model-index": [{"name": report.path.name, "results": [result]}]}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120).rstrip()


def _versions(format: str) -> dict[str, str]:
    packages = ("torch", "torchvision", *_PACKAGES.get(format, ()))
    return {"resdet": VERSION} | {package: importlib.metadata.version(package) for package in packages}
