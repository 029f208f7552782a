"""What a network needs and no tensor shows: where a bottleneck strides, what is subtracted from an image, class names.

Such a fact is certain where the file states it: in an entry that was written with it, in pixel statistics, in a
configuration that its library stores, or by being of a model zoo whose models are all alike. Otherwise the file can be
read in several ways (``Reading``), and the likeliest is assumed: that which fits the settings of the detector to be
built, then the size of the first convolution's weights, then the library's habits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from resdet.errors import WeightsError
from resdet.models.archs import ARCHS, ResNetArch
from resdet.models.spec import RUN_FIELDS, WeightsOrigin
from resdet.weights.layouts import BACKGROUND_LAST, BODY, FORMATS, MEAN, SCORES, STD, Tensors, count_blocks

# Where a converted file carries its facts: an entry next to the state dict, or an attribute of a bare one.
FACTS_ENTRY = "resdet_facts"
OWN_LAYOUTS = ("torchvision", "timm")  # formats whose names are those of torchvision's models

Kind: TypeAlias = Literal["detector", "backbone", "classifier"]

CLASSIFIERS = ("fc.weight", "classifier.6.weight")
_READ = ("stride_in_1x1", "channel_order", "image_mean", "image_std")  # the facts in which readings differ
_TORCHVISION_MEAN, _TORCHVISION_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# The norm of the first convolution's filters, their norm's scale included, is 0.1 to 1 in networks that see images of
# unit deviation (0.18 in a ResNet-18, 0.47 in a ResNet-50 of ImageNet, 0.3 before training), and 1/57 of that in those
# that see 0..255. What lies outside was not trained on either.
_FILTERS_FOR_BYTES, _FILTERS_FOR_UNITS = 0.04, (0.06, 3.0)


@dataclass(frozen=True)
class Reading:
    """One way in which a file's weights can be meant; mean and deviation are of RGB images in [0, 1]."""

    stride_in_1x1: bool
    channel_order: Literal["rgb", "bgr"]
    image_mean: list[float]
    image_std: list[float]

    @property
    def for_bytes(self) -> bool:
        """Whether images in 0..255 are not divided by their deviation."""
        return self.image_std[0] < 0.02

    def fits(self, settings: Mapping[str, Any]) -> bool:
        """Whether settings of a detector, as far as they are given, are this reading's."""
        return all(name not in settings or _alike(getattr(self, name), settings[name], 5e-3) for name in _READ)


def carried_facts(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that were written with the tensors; {} if there are none or they make no sense."""
    carried = content.get(FACTS_ENTRY, getattr(content, FACTS_ENTRY, None))
    if not isinstance(carried, dict) or carried.get("format") not in FORMATS:
        return {}
    statistics = [carried.get(name) for name in ("image_mean", "image_std")]
    sensible = (
        isinstance(carried.get("stride_in_1x1"), bool)
        and carried.get("channel_order") in ("rgb", "bgr")
        and isinstance(carried.get("norm_eps"), float)
        and all(isinstance(values, list) and list(map(type, values)) == [float] * 3 for values in statistics)
    )
    return carried if sensible else {}


def facts_of(
    content: Mapping[str, Any],
    source_format: str,
    tensors: Tensors,
    given: Tensors,
    origin: WeightsOrigin | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Collect a file's facts as plain values, and the names of those that are assumed.

    Args:
        content: All of the file.
        source_format: Its format, a key of ``FORMATS``.
        tensors: Its tensors under torchvision's names of a detector, or ``fc``.
        given: Its tensors under their own names.
        origin: What the user knows of the weights.
        settings: Settings of the detector to be built that were stated; they choose between readings.

    Raises:
        WeightsError: If ``origin`` contradicts what the file states.
    """
    origin = origin or WeightsOrigin()
    source = FORMATS[source_format]
    arch, groups = _guess_arch(tensors)
    readings = _readings(source_format, groups)
    certain = _certain(content, source_format, given)
    if source_format == "detectron" or content.get("__author__") == "Detectron2 Model Zoo":
        certain = {name: getattr(readings[0], name) for name in _READ} | certain  # all files of these zoos are alike
    if origin.format is None and (for_bytes := sees_bytes(tensors, BODY)) is not None:
        readings.sort(key=lambda reading: reading.for_bytes != for_bytes)
    stated = _stated(origin)
    fitting = [reading for reading in readings if reading.fits({**(settings or {}), **certain, **stated})]
    reading = (fitting or readings)[0]
    guess = {name: getattr(reading, name) for name in _READ} | {"norm_eps": source.norm_eps}
    for name, value in stated.items():
        if name in certain and not _alike(certain[name], value, 1e-3):
            raise WeightsError(f"its origin was given as {name}={value}, but the file itself says {certain[name]}")
    known = {**stated, **certain}
    assumed = tuple(name for name in _READ if name not in known)
    counted = next((tensors[name] for name in (f"{SCORES}weight", *CLASSIFIERS) if name in tensors), None)
    collected = {
        "format": source_format,
        "arch": arch,  # torchvision's name; None if it is none of ours
        # stride_in_1x1, channel_order (of the source's images; converted tensors always take RGB), image_mean and
        # image_std (of RGB images in [0, 1]), norm_eps: as in WeightsOrigin.
        **guess,
        **known,
        "background": "last" if BACKGROUND_LAST in source.rules else "first",  # its row in the source; converted: first
        # A detector's with the background, a classifier's without; None for a backbone.
        "num_classes": None if counted is None or counted.dim() == 0 else len(counted),
    }
    if classes := class_names(content):
        collected["classes"] = list(classes)
    # Those of RUN_FIELDS that it states; the sizes of a level's anchors are a list where it has several.
    return collected | _run_fields(content, source_format, given), assumed


def class_names(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names that mmdetection stores in ``meta``, or that were carried; none if there are none."""
    meta = content.get("meta")
    places: list[Any] = [carried_facts(content)]
    if isinstance(meta, dict):
        places += [meta, meta.get("dataset_meta")]
    for place in places:
        for key in ("classes", "CLASSES"):
            names = place.get(key) if isinstance(place, dict) else None
            names = (names,) if isinstance(names, str) else names  # a forgotten comma: CLASSES = ('cat')
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return ()


def mmdetection_style(content: Mapping[str, Any]) -> dict[str, Any]:
    """Read channel order, stride, mean and deviation from the configuration that mmdetection stores as text.

    Mean and deviation are of RGB images in [0, 1].
    """
    config = _mmdetection_config(content)
    style: dict[str, Any] = {}
    if found := re.search(r"to_rgb\s*=\s*(True|False)", config):
        style["channel_order"] = "bgr" if found[1] == "False" else "rgb"
    if found := re.search(r"style\s*=\s*['\"](caffe|pytorch)['\"]", config):
        style["stride_in_1x1"] = found[1] == "caffe"
    if "channel_order" in style:
        for key in ("mean", "std"):
            values = [value / 255 for value in _numbers(config, key)]
            if len(values) == 3:
                style[f"image_{key}"] = values[:: -1 if style["channel_order"] == "bgr" else 1]
    return style


def _mmdetection_config(content: Mapping[str, Any]) -> str:
    meta = content.get("meta")
    config = (meta.get("config") or meta.get("cfg")) if isinstance(meta, dict) else None
    return config if isinstance(config, str) else ""


def _numbers(config: str, key: str) -> list[float]:
    """Return the number or the flat list of numbers that is first assigned to ``key``; none if there is no such."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    found = re.search(rf"\b{key}\s*=\s*(?:[\[(]([^][()]*)[])]|({number}))", config)
    return [float(value) for value in re.findall(number, found[1] or found[2])] if found else []


def _run_fields(content: Mapping[str, Any], source_format: str, given: Tensors) -> dict[str, Any]:
    """Return the fields of ``RUN_FIELDS`` that a detector's file states."""
    carried = carried_facts(content)
    fields = {name: carried[name] for name in RUN_FIELDS if name in carried}
    if source_format == "detectron2":
        fields |= _cell_anchors(given)
    elif source_format.startswith("mmdetection") and (config := _mmdetection_config(content)):
        found = re.search(r"anchor_generator\s*=\s*dict\(([^()]*)\)", config)
        anchors = {key: _numbers(found[1], key) for key in ("scales", "strides", "ratios")} if found else {}
        if anchors and all(anchors.values()):
            sizes = [[scale * stride for scale in anchors["scales"]] for stride in anchors["strides"]]
            fields |= {"anchor_sizes": _one_per_level(sizes), "aspect_ratios": anchors["ratios"]}
        resized = _numbers(config.partition("test_pipeline")[2], "(?:img_)?scale")
        if len(resized) == 2:
            fields |= {"min_size": _whole(min(resized)), "max_size": _whole(max(resized))}
        if threshold := _numbers(config, "score_thr"):
            fields["box_score_thresh"] = threshold[0]
    return fields


def _cell_anchors(given: Tensors) -> dict[str, Any]:
    """Read the anchors at one location of each level, which detectron2 stores as corners around 0."""
    found = {name: corners for name, corners in given.items() if ".anchor_generator.cell_anchors." in name}
    levels = [found[name] for name in sorted(found, key=lambda name: (len(name), name))]  # [A, 4] each
    if not levels or any(level.is_meta or level.dim() != 2 or level.shape[1] != 4 for level in levels):
        return {}
    sides = [(level[:, 2:] - level[:, :2]).double() for level in levels]  # [A, 2], width and height
    sizes = [[round(size, 2) for size in level.prod(1).sqrt().tolist()] for level in sides]
    ratios = [[round(ratio, 4) for ratio in (level[:, 1] / level[:, 0]).tolist()] for level in sides]
    distinct = [list(dict.fromkeys(level)) for level in ratios]
    return {
        "anchor_sizes": _one_per_level([list(dict.fromkeys(level)) for level in sizes]),
        "aspect_ratios": distinct[0] if all(level == distinct[0] for level in distinct) else distinct,
    }


def _one_per_level(sizes: Sequence[Sequence[float]]) -> list[Any]:
    """Return the size of each level's anchors, or the sizes where there are several."""
    levels = [[_whole(size) for size in level] for level in sizes]
    return [level[0] if len(level) == 1 else level for level in levels]


def _whole(number: float) -> float:
    return int(number) if number.is_integer() else number


def sees_bytes(tensors: Mapping[str, Tensor], prefix: str) -> bool | None:
    """Return whether a network sees images in 0..255, not divided, by the size of its first filters; None if unclear.

    ``prefix`` precedes the names of its body, which are torchvision's.
    """
    weight, scale, variance = (
        tensors.get(f"{prefix}{name}") for name in ("conv1.weight", "bn1.weight", "bn1.running_var")
    )
    if weight is None or weight.dim() != 4 or weight.shape[1] != 3 or not weight.numel():
        return None
    if weight.is_meta or not weight.is_floating_point():
        return None
    filters = weight.detach().float().flatten(1).norm(dim=1)  # [64]
    if scale is not None and scale.shape == filters.shape:
        filters = filters * scale.detach().float().abs()
    if variance is not None and variance.shape == filters.shape:
        filters = filters / (variance.detach().float() + 1e-5).sqrt()
    size = float(filters.median())
    if size <= _FILTERS_FOR_BYTES:
        return True
    return False if _FILTERS_FOR_UNITS[0] <= size <= _FILTERS_FOR_UNITS[1] else None


def _alike(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, bool | str):
        return bool(a == b)
    ours, theirs = (list(value) if isinstance(value, Sequence) else [value] for value in (a, b))
    return all(abs(x - y) <= tolerance for x, y in zip(ours, theirs, strict=True))


def _stated(origin: WeightsOrigin) -> dict[str, Any]:
    given = origin.model_dump(include={*_READ, "norm_eps"}, exclude_none=True)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _readings(source_format: str, groups: int) -> list[Reading]:
    """Return the ways in which a format's weights can be meant, the likeliest first."""
    source = FORMATS[source_format]
    mean = [value / 255 for value in source.mean]
    torchvisions = Reading(False, "rgb", [value / 255 for value in MEAN], [value / 255 for value in STD])
    if source_format in OWN_LAYOUTS:
        return [Reading(False, "rgb", _TORCHVISION_MEAN, _TORCHVISION_STD)]
    msras = Reading(True, "bgr", mean, [1 / 255] * 3)
    if not source.stride_in_1x1:
        return [torchvisions, msras]
    # The ResNeXts of Facebook's libraries stride in the 3x3 and were trained on images of unit variance:
    # configs/COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml.
    resnexts = Reading(False, "bgr", mean, [value / 255 for value in STD])
    return [msras, torchvisions] if groups == 1 else [resnexts, torchvisions]


def _certain(content: Mapping[str, Any], source_format: str, given: Tensors) -> dict[str, Any]:
    """Return the facts that a file states."""
    certain: dict[str, Any] = {}
    if source_format == "detectron2":
        if content.get("__author__") == "torchvision":
            # tools/convert-torchvision-to-d2.py writes this name, and documents these settings.
            certain = {name: getattr(_readings("detectron2", 1)[1], name) for name in _READ}
        certain |= _pixel_statistics(given)
    elif source_format.startswith("mmdetection"):
        certain = mmdetection_style(content)
    if isinstance(spec := content.get("spec"), dict):
        names = ("image_mean", "image_std", "stride_in_1x1", "norm_eps")
        own = {name: spec[name] for name in names if name in spec}
        certain |= {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        certain["channel_order"] = "rgb"
    carried = carried_facts(content)
    if carried.get("format") == source_format:
        certain |= {name: carried[name] for name in (*_READ, "norm_eps")}
    return certain


def _guess_arch(tensors: Tensors) -> tuple[str | None, int]:
    """Return the architecture with these blocks, if it is one of ours, and the groups of its 3x3 convolutions."""
    depths = count_blocks(tensors)
    second = tensors.get(f"{BODY}layer1.0.conv2.weight")  # [width, width / groups, 3, 3]
    if second is None or second.dim() != 4 or not second.shape[1]:
        return None, 1
    bottleneck = f"{BODY}layer1.0.conv3.weight" in tensors
    width, per_group = second.shape[:2]
    groups = width // per_group
    for name, arch in ARCHS.items():
        if isinstance(arch, ResNetArch) and depths == dict(enumerate(arch.depths, 1)):
            shape = (arch.block == "bottleneck", arch.groups, arch.groups * arch.width_per_group)
            if shape == (bottleneck, groups, width):
                return name, groups
    return None, groups


def _pixel_statistics(given: Tensors) -> dict[str, Any]:
    """Read the mean and deviation that a detectron2 checkpoint holds: BGR where the mean rises as ImageNet's does."""
    found = [given[name] for name in ("pixel_mean", "pixel_std") if name in given]  # [3, 1, 1] each
    if len(found) != 2 or any(tensor.is_meta or tensor.numel() != 3 for tensor in found):
        return {}
    mean, std = (tensor.flatten().tolist() for tensor in found)
    order = -1 if mean[0] <= mean[2] else 1
    statistics = {"image_mean": [value / 255 for value in mean], "image_std": [value / 255 for value in std]}
    return {"channel_order": "bgr" if order < 0 else "rgb"} | {name: v[::order] for name, v in statistics.items()}
