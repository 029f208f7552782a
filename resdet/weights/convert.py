"""Convert state dicts between libraries' names and layouts, both ways, without any of the libraries.

torchvision's layout is the hub: every format is read into it and written out of it. Converting renames tensors and
changes a few of them, each by a ``Rule`` of ``resdet.weights.layouts`` that has an inverse. Nothing is computed, so
converting there and back is the identity bit for bit; what a format has no place for is listed, never dropped silently.

Facts that no tensor shows travel as ``Converted.facts`` (``resdet.weights.formats``); ``settings_for`` translates them
into the target library's settings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from resdet.errors import WeightsError, name_some
from resdet.models.spec import WeightsOrigin
from resdet.weights.facts import OWN_LAYOUTS, Kind, carried_facts, facts_of
from resdet.weights.formats import body_prefix, detect_format, kind_of
from resdet.weights.layouts import (
    BACKGROUND_LAST,
    BGR_STEM,
    BODY,
    DELTAS,
    FORMATS,
    FPN,
    NO_BACKGROUND_DELTAS,
    SCORES,
    STEM,
    Form,
    Format,
    Rule,
    Tensors,
    count_blocks,
    modern_names,
    tensor_names,
)
from resdet.weights.networks import Network, find_network

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """A state dict under torchvision's names, and what a builder must also know.

    The names are those of a ``FasterRCNN`` (``backbone.body.``, ``backbone.fpn.``, ``rpn.``, ``roi_heads.``) for a
    detector; of ``BackboneWithFPN`` (``body.``, ``fpn.``) or of a bare ResNet (``conv1.``, ``layer1.``) for a backbone;
    of a ResNet with ``fc`` for a classifier.
    """

    tensors: Tensors  # those that no rule changes are the given ones, not copies
    kind: Kind
    facts: dict[str, Any]  # see ``resdet.weights.facts.facts_of``
    rules: tuple[str, ...]  # names of the rules that changed something
    left_over: tuple[str, ...]  # names in the source that torchvision's layout has no place for
    assumed: tuple[str, ...] = ()  # names of the facts that the source does not say


@dataclass(frozen=True)
class Written:
    """A state dict as another library names it and lays it out."""

    tensors: Tensors
    rules: tuple[str, ...]  # names of the rules that changed something
    left_over: tuple[str, ...]  # names that the format has no place for; or a part of one, as ``name[:4]``


def to_torchvision(
    content: Mapping[str, Any],
    source_format: str | None = None,
    *,
    origin: WeightsOrigin | None = None,
    settings: Mapping[str, Any] | None = None,
    network: Network | None = None,
) -> Converted:
    """Convert a state dict to torchvision's names and layout.

    ``content`` may also be all of a file (``read_checkpoint``), whose other entries are then used too. The format is a
    key of ``FORMATS``; by default the one that its names show. ``origin`` and ``settings`` are those of ``facts_of``,
    ``network`` is that in the file, if it was found before.
    """
    origin = origin or WeightsOrigin()
    network = network or find_network(content, "the file", origin.prefix)
    given = network.tensors
    source_format = source_format or origin.format
    if source_format is None:
        source_format = detect_format(content, given)
    else:
        carried = carried_facts(content).get("format", source_format)
        if carried != source_format and not {carried, source_format} <= set(OWN_LAYOUTS):
            raise WeightsError(f"its format was given as {source_format}, but the file itself says {carried}")
        origin = origin.model_copy(update={"format": source_format})
    source = find_format(source_format)
    rules: list[str] = []
    if source_format == "torchvision" and (newer := modern_names(given)).keys() != given.keys():
        given = newer
        rules.append("torchvision's older names")
    prefix = body_prefix(given)
    if source_format in OWN_LAYOUTS and prefix is not None and f"{prefix}conv1.weight" not in given:
        # Other libraries lay out a deep stem's ResNet or a VGG in ways of their own: no rule applies.
        if origin.channel_order == "bgr":
            raise WeightsError("only the 7x7 stem of a ResNet can be turned from BGR to RGB")
        facts, assumed = facts_of(content, source_format, given, given, origin, settings)
        return Converted(given, kind_of(given), facts, tuple(rules), network.outside, assumed)
    names = _find_names(source, source_format, given)
    tensors = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    kind = kind_of(tensors)
    if kind == "detector":
        _check_class_wise(tensors, source)

    facts, assumed = facts_of(content, source_format, tensors, given, origin, settings)
    if any(names[ours] != short for short, ours in zip(_short_names(tensors, kind), tensors, strict=True)):
        rules.append("names")
    tensors, applied = _apply([(rule.name, rule.inward) for rule in _rules(source_format, facts)], tensors)
    rules += applied
    if facts["stride_in_1x1"]:
        rules.append("stride in 1x1 (no tensor changes)")

    used = set(names.values())
    left_over = (*(name for name in given if name not in used), *network.outside)
    return Converted(_short_names(tensors, kind), kind, facts, tuple(rules), left_over, assumed)


def log_assumptions(source: str, facts: Mapping[str, Any], assumed: Iterable[str]) -> None:
    """Log what was assumed of a file, and how to state it: a warning where the library's models differ in it."""
    if not assumed:
        return
    values = ", ".join(f"{name}={_shown(facts[name])}" for name in assumed)
    logger.log(
        logging.INFO if facts["format"] in OWN_LAYOUTS else logging.WARNING,
        "%s: read as %s's; the file does not say, and it is assumed: %s (model.weights_origin in a configuration, "
        "origin=WeightsOrigin(...), or options of convert state it otherwise)",
        source,
        facts["format"],
        values,
    )


def _shown(value: Any) -> Any:
    return [round(number, 4) for number in value] if isinstance(value, list | tuple) else value


def write(tensors: Mapping[str, Tensor], target_format: str, facts: Mapping[str, Any] | None = None) -> Written:
    """Convert a state dict from torchvision's layout to the format ``target_format``.

    With the ``facts`` of ``Converted``, a file whose channel order is not its library's usual one is written back with
    the order it came with.
    """
    target = find_format(target_format)
    full = _full_names(tensors)
    depths = count_blocks(full)
    names = tensor_names(target, _form(full, target), depths)
    levels = sum(name.startswith(f"{FPN}inner_blocks.") and name.endswith(".weight") for name in full)
    if levels not in (0, len(depths)):
        raise WeightsError(
            f"an FPN on {levels} of the body's {len(depths)} stages has no counterpart in the other formats, whose "
            "levels are named by their stage"
        )
    left_over = [name for name, full_name in zip(tensors, full, strict=True) if full_name not in names]
    if NO_BACKGROUND_DELTAS in target.rules:
        left_over += [f"{name}[:4]" for name, rows in full.items() if name.startswith(DELTAS) and rows[:4].any()]
    order = {} if target_format in OWN_LAYOUTS else facts or {}  # torchvision's are for RGB, whatever they came from
    inverses = [(rule.name, rule.outward) for rule in reversed(_rules(target_format, order))]
    own, rules = _apply(inverses, full)
    if any(names.get(full_name, name) != name for name, full_name in zip(tensors, full, strict=True)):
        rules.append("names")
    written = {names[name]: tensor for name, tensor in own.items() if name in names}
    return Written(written, tuple(reversed(rules)), tuple(left_over))


def from_torchvision(tensors: Mapping[str, Tensor], target_format: str) -> Tensors:
    """Return the state dict of ``write`` alone; what the format has no place for is logged."""
    written = write(tensors, target_format)
    if written.left_over:
        logger.info("%s has no place for %s", target_format, name_some(written.left_over))
    return written.tensors


def facts_to_carry(target_format: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts to store with a state dict of the target format, under ``FACTS_ENTRY``."""
    return {
        **facts,
        "format": target_format,
        "channel_order": "bgr" if target_format not in OWN_LAYOUTS and _is_bgr(target_format, facts) else "rgb",
        "background": "last" if BACKGROUND_LAST in find_format(target_format).rules else "first",
    }


def settings_for(target_format: str, converted: Converted) -> dict[str, Any]:
    """Return the settings under which the target library must build what was converted, by that library's names."""
    facts, target = converted.facts, find_format(target_format)
    flipped, in_1x1 = _is_bgr(target_format, facts), facts["stride_in_1x1"]
    mean, std = (
        [round(255 * value, 4) for value in facts[name]][:: -1 if flipped else 1]
        for name in ("image_mean", "image_std")
    )
    settings: dict[str, Any]
    if target_format == "detectron2":
        settings = {
            "INPUT.FORMAT": "BGR" if flipped else "RGB",
            "MODEL.PIXEL_MEAN": mean,
            "MODEL.PIXEL_STD": std,
            "MODEL.RESNETS.STRIDE_IN_1X1": in_1x1,
        }
    elif target_format == "maskrcnn-benchmark":
        settings = {
            "INPUT.TO_BGR255": flipped,
            "INPUT.PIXEL_MEAN": mean,
            "INPUT.PIXEL_STD": std,
            "MODEL.RESNETS.STRIDE_IN_1X1": in_1x1,
        }
    elif target_format in ("mmdetection", "mmdetection-caffe"):
        settings = {
            "data_preprocessor.mean": mean,
            "data_preprocessor.std": std,
            "data_preprocessor.bgr_to_rgb": not flipped,
            "backbone.style": "caffe" if in_1x1 else "pytorch",
        }
    elif target_format == "detectron":
        settings = {"PIXEL_MEANS": mean, "pixel std": std, "RESNETS.STRIDE_1X1": in_1x1}
    else:
        settings = {key: facts[key] for key in ("image_mean", "image_std", "stride_in_1x1")}
    if converted.kind == "detector" and target.heads:
        # The background counts, or does not; where it has the last row, it does not.
        settings[target.num_classes] = facts["num_classes"] - (BACKGROUND_LAST in target.rules)
    if facts["norm_eps"] != target.norm_eps:
        settings["eps of the norms"] = facts["norm_eps"]
    return settings


def find_format(name: str) -> Format:
    """Look up a format by name; a WeightsError says which there are."""
    if name not in FORMATS:
        raise WeightsError(f"there is no format {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def _is_bgr(name: str, facts: Mapping[str, Any]) -> bool:
    return bool(facts.get("channel_order") == "bgr") if facts.get("format") == name else FORMATS[name].bgr


def _rules(name: str, facts: Mapping[str, Any]) -> tuple[Rule, ...]:
    return (*((BGR_STEM,) if _is_bgr(name, facts) else ()), *FORMATS[name].rules)


def _find_names(source: Format, source_format: str, given: Tensors) -> dict[str, str]:
    """Map torchvision's names to the source's, for the form (detector, pyramid, body) that covers most of the file."""
    depths = {stage: depth for stage, depth in count_blocks(given).items() if 1 <= stage <= 4}
    forms = [tensor_names(source, form, depths) for form in get_args(Form)]
    fitting = [names for names in forms if names[STEM] in given]
    if not fitting:
        raise WeightsError(
            f"holds no ResNet as {source_format} names it: there is no "
            f"{forms[-1][STEM]}; its tensors are {name_some(given)}"
        )
    return max(fitting, key=lambda names: sum(theirs in given for theirs in names.values()))


def _form(full: Iterable[str], target: Format) -> Form:
    if not target.heads:
        return "body"
    if any(name.startswith(("rpn.", "roi_heads.")) for name in full):
        return "detector"
    return "pyramid" if any(name.startswith(FPN) for name in full) else "body"


def _full_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """Name the tensors of any kind as a detector's."""
    if STEM in tensors:
        return dict(tensors)
    if "body.conv1.weight" in tensors:
        return {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    if "conv1.weight" in tensors:
        return {name if name.startswith("fc.") else f"{BODY}{name}": tensor for name, tensor in tensors.items()}
    raise WeightsError(
        "holds no ResNet in torchvision's layout: there is no conv1.weight, body.conv1.weight or "
        f"backbone.body.conv1.weight; its tensors are {name_some(tensors)}"
    )


def _short_names(tensors: Tensors, kind: Kind) -> Tensors:
    """Undo ``_full_names``."""
    if kind == "detector":
        return tensors
    prefix = "backbone." if any(name.startswith(FPN) for name in tensors) else BODY
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _apply(changes: Iterable[tuple[str, Callable[[Tensors], Tensors]]], tensors: Tensors) -> tuple[Tensors, list[str]]:
    """Apply named changes one after another; return also the names of those that changed something."""
    effective = []
    for name, change in changes:
        changed = change(tensors)
        if changed.keys() != tensors.keys() or any(changed[key] is not tensors[key] for key in changed):
            effective.append(name)
        tensors = changed
    return tensors, effective


def _check_class_wise(tensors: Tensors, source: Format) -> None:
    check_class_matrix(tensors)
    if f"{DELTAS}weight" not in tensors:
        return
    classes, rows = len(tensors[f"{SCORES}weight"]), len(tensors[f"{DELTAS}weight"])
    expected = 4 * (classes - 1 if NO_BACKGROUND_DELTAS in source.rules else classes)
    if rows != expected:
        agnostic = " (class-agnostic boxes, which torchvision's FasterRCNN does not have)" if rows in (4, 8) else ""
        raise WeightsError(
            f"the box regression of {classes} classes, background included, must have {expected} rows, got "
            f"{rows}{agnostic}"
        )


def check_class_matrix(tensors: Mapping[str, Tensor]) -> None:
    """Raise a WeightsError unless a detector's class-wise weights are matrices, and their biases vectors."""
    for name, tensor in tensors.items():
        if name.startswith((SCORES, DELTAS)):
            wanted = 2 if name.endswith("weight") else 1
            if tensor.dim() != wanted:
                raise WeightsError(
                    f"{name} must have {wanted} dimensions, one row for each class, got {list(tensor.shape)}"
                )
