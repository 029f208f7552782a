"""Parameter names and layouts of other libraries, both ways, from state dict to state dict, without any of them.

torchvision's layout is the hub: every format is read into it and written out of it. Converting is renaming, and a few
changes of tensors, each a ``Rule`` of ``resdet.weights.layouts`` with its inverse. Nothing is computed, so there and
back is the identity bit for bit; what a format has no place for is named, never dropped in silence.

What no tensor shows (where a bottleneck strides, what is subtracted from an image) differs between libraries all the
same. It travels as ``Converted.facts``, and ``settings_for`` says it in the words of the library written for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from resdet.errors import WeightsError, name_some
from resdet.models.archs import ARCHS, ResNetArch
from resdet.weights.files import body_prefix, tensors_in
from resdet.weights.layouts import (
    BACKGROUND_LAST,
    BGR_STEM,
    BODY,
    DELTAS,
    FORMATS,
    FPN,
    MEAN,
    NO_BACKGROUND_DELTAS,
    SCORES,
    STD,
    STEM,
    Form,
    Format,
    Rule,
    Tensors,
    count_blocks,
    modern_names,
    tensor_names,
)

logger = logging.getLogger(__name__)

FACTS_ENTRY = "resdet_facts"
"""Where a written file carries the facts: an entry beside its state dict, or an attribute of a bare one."""

Kind: TypeAlias = Literal["detector", "backbone", "classifier"]


@dataclass(frozen=True)
class Converted:
    """A state dict under torchvision's names, and what a builder must know besides.

    Attributes:
        tensors: Names as torchvision has them: of a ``FasterRCNN`` (``backbone.body.``, ``backbone.fpn.``, ``rpn.``,
            ``roi_heads.``) for a detector; of ``BackboneWithFPN`` (``body.``, ``fpn.``) or of a bare ResNet
            (``conv1.``, ``layer1.``) for a backbone; of a ResNet with ``fc`` for a classifier. Tensors that no rule
            changes are those given, not copies.
        kind: What they are.
        facts: Plain values. ``format``: where they come from. ``arch``: torchvision's name, or None if it is none of
            ours. ``stride_in_1x1``: whether a bottleneck strides in its first 1x1 convolution (as MSRA's networks do)
            and not in its 3x3. ``channel_order``: of the images the source takes, "rgb" or "bgr"; the tensors here
            always take RGB. ``image_mean``, ``image_std``: of RGB images in [0, 1], as torchvision's FasterRCNN takes
            them. ``norm_eps``: added to the variance by every norm. ``background``: the source's row of the
            background, "first" or "last"; here it is always first. ``num_classes``: the background counts; a
            classifier has none and counts its classes; None for a backbone.
        rules: Names of the rules that changed something.
        left_over: Names in the source that torchvision's layout has no place for.
    """

    tensors: Tensors
    kind: Kind
    facts: dict[str, Any]
    rules: tuple[str, ...]
    left_over: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """A state dict under another library's names.

    Attributes:
        tensors: As that library names and lays them out.
        rules: Names of the rules that changed something.
        left_over: Names in torchvision's layout that the format has no place for; or a part of one, as ``name[:4]``.
    """

    tensors: Tensors
    rules: tuple[str, ...]
    left_over: tuple[str, ...]


def detect_format(content: Mapping[str, Any]) -> str:
    """Tell by its names which library a file comes from.

    Args:
        content: What ``read_checkpoint`` gives, or a state dict.

    Returns:
        A key of ``FORMATS``: what the file says if it was written here. "torchvision" for a timm ResNet too, whose
        names are the same. "mmdetection-caffe" if the configuration in ``meta`` says so, or, without one, if no norm of
        the body has statistics: then they came from MSRA's files.

    Raises:
        WeightsError: If the names are none of these libraries', or those of mmdetection 1.x.
    """
    carried = _carried_facts(content)
    if "format" in carried:
        return str(carried["format"])
    names = _tensors_of(content)

    def some(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    if some(r"^bbox_head\.(fc_cls|shared_fcs)"):
        raise WeightsError(
            "the names are those of mmdetection 1.x, whose background comes first: bring the file to 2.x with its "
            "tools/model_converters/upgrade_model_version.py"
        )
    if some(r"^conv1_w$|^res\d_\d+_branch"):
        return "detectron"
    if some(r"(^|\.)(stem\.conv1\.norm|res\d\.\d+\.conv\d(\.norm)?)\."):
        return "detectron2"
    if some(r"(^|\.)stem\.bn1\.|^roi_heads\.box\.feature_extractor\."):
        return "maskrcnn-benchmark"
    if some(r"^neck\.|^rpn_head\.|^roi_head\.|^backbone\.(conv1|layer1)\."):
        style = _mmdetection_style(content)
        bgr = style["bgr"] if "bgr" in style else _norms_are_affine(names)
        return "mmdetection-caffe" if bgr else "mmdetection"
    if some(r"(^|^body\.|^backbone\.body\.)layer1\.0\.conv1\."):
        return "torchvision"
    raise WeightsError(
        f"the names are those of no known library ({', '.join(FORMATS)}): {name_some(names) or 'there are none'}"
    )


def to_torchvision(content: Mapping[str, Any], source_format: str | None = None) -> Converted:
    """Bring a state dict into torchvision's names and layout.

    Args:
        content: What ``read_checkpoint`` gives (state dicts inside "model", "state_dict" or "blobs" are found, and
            what lies beside them is used), or a state dict.
        source_format: A key of ``FORMATS``; by default the one its names show.

    Raises:
        WeightsError: If there is no such format, or the state dict is none of it, holds no ResNet, or has
            class-agnostic box regression, which torchvision's FasterRCNN lacks.
    """
    source_format = detect_format(content) if source_format is None else source_format
    source = _format(source_format)
    given = _tensors_of(content)
    newer = modern_names(given) if source_format == "torchvision" else given
    older = newer.keys() != given.keys()
    given = newer
    if source_format in ("torchvision", "timm") and _has_another_stem(given):
        return _as_it_is(content, given, source_format)
    names = _find_names(source, source_format, given)
    tensors = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    kind: Kind = "detector" if f"{SCORES}weight" in tensors else "classifier" if "fc.weight" in tensors else "backbone"
    if kind == "detector":
        _check_class_wise(tensors, source)

    facts = _facts(content, given, source_format, tensors, kind)
    rules = ["torchvision's older names"] if older else []
    if any(names[ours] != short for short, ours in zip(_short_names(tensors, kind), tensors, strict=True)):
        rules.append("names")
    for rule in _rules(source_format, facts):
        changed = rule.inward(tensors)
        if _differ(changed, tensors):
            rules.append(rule.name)
        tensors = changed
    if facts["stride_in_1x1"]:
        rules.append("stride in 1x1 (no tensor changes)")

    used = set(names.values())
    left_over = tuple(name for name in given if name not in used)
    return Converted(_short_names(tensors, kind), kind, facts, tuple(rules), left_over)


def write(tensors: Mapping[str, Tensor], target_format: str, facts: Mapping[str, Any] | None = None) -> Written:
    """Bring a state dict of torchvision's layout into another format.

    Args:
        tensors: As in ``Converted``.
        target_format: A key of ``FORMATS``.
        facts: Those of ``Converted``, if there are any: a file whose channel order is not its library's usual one goes
            back as it came.

    Raises:
        WeightsError: If there is no such format, or the state dict holds no ResNet.
    """
    target = _format(target_format)
    full = _full_names(tensors)
    depths = count_blocks(full)
    names = tensor_names(target, _form(full, target), depths)
    _check_levels(full, depths)
    own = dict(full)
    left_over = []
    rules = []
    for rule in reversed(_rules(target_format, facts or {})):
        changed = rule.outward(own)
        if _differ(changed, own):
            rules.append(rule.name)
            if rule is NO_BACKGROUND_DELTAS:
                left_over += [f"{n}[:4]" for n, rows in own.items() if n.startswith(DELTAS) and rows[:4].any()]
        own = changed
    if any(names.get(full_name, name) != name for name, full_name in zip(tensors, full, strict=True)):
        rules.append("names")
    dropped = [name for name, full_name in zip(tensors, full, strict=True) if full_name not in names]
    written = {names[name]: tensor for name, tensor in own.items() if name in names}
    return Written(written, tuple(reversed(rules)), tuple(dropped + left_over))


def from_torchvision(
    tensors: Mapping[str, Tensor], target_format: str, facts: Mapping[str, Any] | None = None
) -> Tensors:
    """As ``write``, giving the state dict alone; what the format has no place for is said in the log."""
    written = write(tensors, target_format, facts)
    if written.left_over:
        logger.info("%s has no place for %s", target_format, name_some(written.left_over))
    return written.tensors


def facts_to_carry(target_format: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Give the facts of what was written, to be kept in the file under ``FACTS_ENTRY`` and found there on reading.

    Args:
        target_format: What it was written as.
        facts: Those of what was written.
    """
    target = _format(target_format)
    return {
        **facts,
        "format": target_format,
        "channel_order": "bgr" if _is_bgr(target_format, facts) else "rgb",
        "background": "last" if BACKGROUND_LAST in target.rules else "first",
    }


def settings_for(target_format: str, converted: Converted) -> dict[str, Any]:
    """Say what the target library must be told beside the tensors, in its own words.

    Args:
        target_format: A key of ``FORMATS``.
        converted: What was written in that format.
    """
    facts = converted.facts
    target = _format(target_format)
    flipped = _is_bgr(target_format, facts)
    order = -1 if flipped else 1
    mean = [round(255 * value, 4) for value in facts["image_mean"]][::order]
    std = [round(255 * value, 4) for value in facts["image_std"]][::order]
    num_classes, in_1x1 = facts["num_classes"], facts["stride_in_1x1"]
    settings: dict[str, Any]
    if target_format == "detectron2":
        settings = {
            "INPUT.FORMAT": "BGR" if flipped else "RGB",
            "MODEL.PIXEL_MEAN": mean,
            "MODEL.PIXEL_STD": std,
            "MODEL.RESNETS.STRIDE_IN_1X1": in_1x1,
        }
        if converted.kind == "detector":
            settings["MODEL.ROI_HEADS.NUM_CLASSES"] = num_classes - 1
    elif target_format == "maskrcnn-benchmark":
        settings = {
            "INPUT.TO_BGR255": flipped,
            "INPUT.PIXEL_MEAN": mean,
            "INPUT.PIXEL_STD": std,
            "MODEL.RESNETS.STRIDE_IN_1X1": in_1x1,
        }
        if converted.kind == "detector":
            settings["MODEL.ROI_BOX_HEAD.NUM_CLASSES"] = num_classes
    elif target_format in ("mmdetection", "mmdetection-caffe"):
        settings = {
            "data_preprocessor.mean": mean,
            "data_preprocessor.std": std,
            "data_preprocessor.bgr_to_rgb": not flipped,
            "backbone.style": "caffe" if in_1x1 else "pytorch",
        }
        if converted.kind == "detector":
            settings["roi_head.bbox_head.num_classes"] = num_classes - 1
    elif target_format == "detectron":
        settings = {"PIXEL_MEANS": mean, "pixel std": std, "RESNETS.STRIDE_1X1": in_1x1}
        if converted.kind == "detector":
            settings["MODEL.NUM_CLASSES"] = num_classes
    else:
        settings = {key: facts[key] for key in ("image_mean", "image_std", "stride_in_1x1")}
        if converted.kind == "detector" and target.heads:
            settings["num_classes"] = num_classes
    if facts["norm_eps"] != target.norm_eps:
        settings["eps of the norms"] = facts["norm_eps"]
    return settings


# ---- what the above is made of


def _is_bgr(name: str, facts: Mapping[str, Any]) -> bool:
    if facts.get("format") == name:
        return bool(facts.get("channel_order") == "bgr")
    return FORMATS[name].bgr


def _rules(name: str, facts: Mapping[str, Any]) -> tuple[Rule, ...]:
    return (*((BGR_STEM,) if _is_bgr(name, facts) else ()), *FORMATS[name].rules)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise WeightsError(f"there is no format {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def _tensors_of(content: Mapping[str, Any]) -> Tensors:
    blobs = content.get("blobs")
    return tensors_in(blobs if isinstance(blobs, dict) else content, "the file")


def _carried_facts(content: Mapping[str, Any]) -> dict[str, Any]:
    """Find the facts that were written with the tensors; {} if there are none or they make no sense."""
    carried = content.get(FACTS_ENTRY, getattr(content, FACTS_ENTRY, None))
    if not isinstance(carried, dict) or carried.get("format") not in FORMATS:
        return {}

    def three(values: Any) -> bool:
        return isinstance(values, list) and [type(value) for value in values] == [float] * 3

    sensible = (
        isinstance(carried.get("stride_in_1x1"), bool)
        and carried.get("channel_order") in ("rgb", "bgr")
        and isinstance(carried.get("norm_eps"), float)
        and three(carried.get("image_mean"))
        and three(carried.get("image_std"))
    )
    return carried if sensible else {}


def _has_another_stem(given: Tensors) -> bool:
    """Whether these are a deep stem's ResNet or a VGG, which other libraries lay out in ways of their own."""
    prefix = body_prefix(given)
    return prefix is not None and f"{prefix}conv1.weight" not in given


def _as_it_is(content: Mapping[str, Any], given: Tensors, source_format: str) -> Converted:
    """Give a network whose names need no change, with its facts."""
    kind: Kind = "detector" if f"{SCORES}weight" in given else "classifier" if "fc.weight" in given else "backbone"
    counters = tuple(name for name in given if name.endswith("num_batches_tracked"))
    tensors = {name: tensor for name, tensor in given.items() if name not in counters}
    facts = _facts(content, given, source_format, tensors, kind)
    return Converted(tensors, kind, facts, (), counters)


def _find_names(source: Format, source_format: str, given: Tensors) -> dict[str, str]:
    """Give torchvision's names, and the source's, for the form in which most of the file has a place."""
    depths = {stage: depth for stage, depth in count_blocks(given).items() if 1 <= stage <= 4}
    all_forms: tuple[Form, ...] = ("detector", "pyramid", "body")
    forms = [tensor_names(source, form, depths) for form in all_forms]
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


def _differ(a: Tensors, b: Tensors) -> bool:
    return a.keys() != b.keys() or any(a[name] is not b[name] for name in a)


def _check_class_wise(tensors: Tensors, source: Format) -> None:
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


def _check_levels(full: Tensors, depths: Mapping[int, int]) -> None:
    levels = sum(name.startswith(f"{FPN}inner_blocks.") and name.endswith(".weight") for name in full)
    if levels not in (0, len(depths)):
        raise WeightsError(
            f"an FPN on {levels} of the body's {len(depths)} stages has no counterpart in the other formats, whose "
            "levels are named by their stage"
        )


def _facts(
    content: Mapping[str, Any], given: Tensors, source_format: str, tensors: Tensors, kind: Kind
) -> dict[str, Any]:
    source = FORMATS[source_format]
    arch, groups = _guess_arch(tensors)
    # The ResNeXts of Facebook's libraries stride in the 3x3 and were trained on images of unit variance:
    # configs/COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml.
    msra = source.stride_in_1x1 and groups == 1
    bgr, mean, std, stride = source.bgr, source.mean, (1.0, 1.0, 1.0) if msra else STD, msra
    eps = source.norm_eps
    if source_format == "detectron2" and content.get("__author__") == "torchvision":
        # tools/convert-torchvision-to-d2.py writes this name, and says these settings.
        bgr, mean, std, stride = False, MEAN, STD, False
    if source_format == "detectron2":
        said = _pixel_statistics(given)
        bgr = said.get("bgr", bgr)
    else:
        said = _mmdetection_style(content)
        stride = said.get("stride_in_1x1", stride)
    mean, std = said.get("mean", mean), said.get("std", std)
    image_mean, image_std = [value / 255 for value in mean], [value / 255 for value in std]
    if isinstance(spec := content.get("spec"), dict):
        image_mean, image_std = list(spec.get("image_mean", image_mean)), list(spec.get("image_std", image_std))
        stride, eps = bool(spec.get("stride_in_1x1", stride)), float(spec.get("norm_eps", eps))
    elif source_format in ("torchvision", "timm"):
        image_mean, image_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    carried = _carried_facts(content)
    if carried.get("format") == source_format:
        stride, bgr = carried["stride_in_1x1"], carried["channel_order"] == "bgr"
        image_mean, image_std, eps = carried["image_mean"], carried["image_std"], carried["norm_eps"]
    counted = {"detector": f"{SCORES}weight", "classifier": "fc.weight"}.get(kind)
    return {
        "format": source_format,
        "arch": arch,
        "stride_in_1x1": stride,
        "channel_order": "bgr" if bgr else "rgb",
        "image_mean": image_mean,
        "image_std": image_std,
        "norm_eps": eps,
        "background": "last" if BACKGROUND_LAST in source.rules else "first",
        "num_classes": len(tensors[counted]) if counted else None,
    }


def _guess_arch(tensors: Tensors) -> tuple[str | None, int]:
    """Name the architecture with these blocks, if it is one of ours, and count the groups of its 3x3 convolutions."""
    depths = count_blocks(tensors)
    second = tensors.get(f"{BODY}layer1.0.conv2.weight")
    if second is None:
        return None, 1
    bottleneck = f"{BODY}layer1.0.conv3.weight" in tensors
    width, per_group = second.shape[:2]
    groups = width // per_group
    for name, arch in ARCHS.items():
        if not isinstance(arch, ResNetArch):
            continue
        shape = (arch.block == "bottleneck", arch.groups, arch.groups * arch.width_per_group)
        if depths == dict(enumerate(arch.depths, 1)) and shape == (bottleneck, groups, width):
            return name, groups
    return None, groups


def _pixel_statistics(given: Tensors) -> dict[str, Any]:
    """Read what a detectron2 checkpoint says it subtracts and divides by: BGR where the mean rises as ImageNet's."""
    if "pixel_mean" not in given or "pixel_std" not in given:
        return {}
    mean, std = given["pixel_mean"].flatten().tolist(), given["pixel_std"].flatten().tolist()
    if len(mean) != 3 or len(std) != 3:
        return {}
    bgr = mean[0] <= mean[2]
    return {"bgr": bgr, "mean": mean[:: -1 if bgr else 1], "std": std[:: -1 if bgr else 1]}


def _mmdetection_style(content: Mapping[str, Any]) -> dict[str, Any]:
    """Read channel order, stride, mean and deviation out of the configuration that mmdetection stores as text."""
    meta = content.get("meta")
    config = (meta.get("config") or meta.get("cfg")) if isinstance(meta, dict) else None
    if not isinstance(config, str):
        return {}
    style: dict[str, Any] = {}
    if found := re.search(r"to_rgb\s*=\s*(True|False)", config):
        style["bgr"] = found[1] == "False"
    if found := re.search(r"style\s*=\s*['\"](caffe|pytorch)['\"]", config):
        style["stride_in_1x1"] = found[1] == "caffe"
    if "bgr" in style:
        for key in ("mean", "std"):
            if found := re.search(rf"\b{key}\s*=\s*\[([-+.e\d,\s]*)\]", config):
                values = [float(value) for value in found[1].split(",") if value.strip()]
                if len(values) == 3:
                    style[key] = values[:: -1 if style["bgr"] else 1]
    return style


def _norms_are_affine(names: Tensors) -> bool:
    means = [tensor for name, tensor in names.items() if name.endswith("running_mean")]
    return bool(means) and not any(tensor.any() for tensor in means)
