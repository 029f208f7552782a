"""Recognise whose weights a file holds: the state dict in it, the library that named it, and what else the file states.

Some of what a network needs shows in no tensor: where a bottleneck strides, what is subtracted from an image. These
facts come from other entries of the file, from the tensors' values, or else from the library's habits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor

from resdet.errors import WeightsError, name_some
from resdet.models.archs import ARCHS, ResNetArch
from resdet.weights.layouts import BACKGROUND_LAST, BODY, FORMATS, MEAN, SCORES, STD, Tensors, count_blocks

# Where a converted file carries its facts: an entry next to the state dict, or an attribute of a bare one.
FACTS_ENTRY = "resdet_facts"
OWN_LAYOUTS = ("torchvision", "timm")  # formats whose names are those of torchvision's models

Kind: TypeAlias = Literal["detector", "backbone", "classifier"]

WRAPPERS = ("state_dict", "model", "blobs")
_BODY_PREFIXES = ("backbone.body.", "body.", "")
_STEMS = ("conv1.weight", "conv1.0.weight", "features.0.weight")  # a ResNet's, a deep stem's, a VGG's
_CLASSIFIERS = ("fc.weight", "classifier.6.weight")


def tensors_in(content: Mapping[str, Any], source: str) -> Tensors:
    """Return the state dict that a file's content is or has as an entry; drop a "module." before all of its names."""
    content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{source}: holds no tensors; its keys are {name_some(map(str, content)) or 'none'}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def body_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what precedes the names of a body in torchvision's layout; None if there is no such body."""
    return next((prefix for prefix in _BODY_PREFIXES for stem in _STEMS if f"{prefix}{stem}" in tensors), None)


def kind_of(tensors: Mapping[str, Tensor]) -> Kind:
    """Return what tensors of torchvision's names are: a detector, a classifier or a backbone."""
    if f"{SCORES}weight" in tensors:
        return "detector"
    return "classifier" if any(name in tensors for name in _CLASSIFIERS) else "backbone"


def detect_format(content: Mapping[str, Any]) -> str:
    """Return the format of a file's content or of a state dict, a key of ``FORMATS``, by its names.

    A file that was converted here states its format. timm's ResNets have torchvision's names. The format is
    "mmdetection-caffe" if the configuration in ``meta`` says so, or, without one, if no norm of the body has
    statistics: then they come from MSRA's files.
    """
    if stated := carried_facts(content):
        return str(stated["format"])
    tensors = tensors_in(content, "the file")

    def some(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in tensors)

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
        means = [tensor for name, tensor in tensors.items() if name.endswith("running_mean")]
        are_affine = bool(means) and not any(tensor.any() for tensor in means)
        return "mmdetection-caffe" if _mmdetection_style(content).get("bgr", are_affine) else "mmdetection"
    if some(r"(^|^body\.|^backbone\.body\.)layer1\.0\.conv1\."):
        return "torchvision"
    raise WeightsError(
        f"the names are those of no known library ({', '.join(FORMATS)}): {name_some(tensors) or 'there are none'}"
    )


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


def facts_of(content: Mapping[str, Any], source_format: str, tensors: Tensors) -> dict[str, Any]:
    """Collect a file's facts as plain values; ``tensors`` have torchvision's names of a detector, or ``fc``."""
    source = FORMATS[source_format]
    arch, groups = _guess_arch(tensors)
    # The ResNeXts of Facebook's libraries stride in the 3x3 and were trained on images of unit variance:
    # configs/COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml.
    msra = source.stride_in_1x1 and groups == 1
    bgr, mean, std, stride = source.bgr, source.mean, (1.0, 1.0, 1.0) if msra else STD, msra
    eps = source.norm_eps
    if source_format == "detectron2":
        if content.get("__author__") == "torchvision":
            # tools/convert-torchvision-to-d2.py writes this name, and documents these settings.
            bgr, mean, std, stride = False, MEAN, STD, False
        stated = _pixel_statistics(tensors_in(content, "the file"))
        bgr = stated.get("bgr", bgr)
    else:
        stated = _mmdetection_style(content)
        stride = stated.get("stride_in_1x1", stride)
    mean, std = stated.get("mean", mean), stated.get("std", std)
    image_mean, image_std = [value / 255 for value in mean], [value / 255 for value in std]
    if isinstance(spec := content.get("spec"), dict):
        image_mean, image_std = list(spec.get("image_mean", image_mean)), list(spec.get("image_std", image_std))
        stride, eps = bool(spec.get("stride_in_1x1", stride)), float(spec.get("norm_eps", eps))
    elif source_format in OWN_LAYOUTS:
        image_mean, image_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    carried = carried_facts(content)
    if carried.get("format") == source_format:
        stride, bgr = carried["stride_in_1x1"], carried["channel_order"] == "bgr"
        image_mean, image_std, eps = carried["image_mean"], carried["image_std"], carried["norm_eps"]
    counted = next((tensors[name] for name in (f"{SCORES}weight", *_CLASSIFIERS) if name in tensors), None)
    return {
        "format": source_format,
        "arch": arch,  # torchvision's name; None if it is none of ours
        "stride_in_1x1": stride,  # a bottleneck strides in its first 1x1 convolution (MSRA's), and not in its 3x3
        "channel_order": "bgr" if bgr else "rgb",  # of the source's images; converted tensors always take RGB
        "image_mean": image_mean,  # of RGB images in [0, 1], as torchvision's FasterRCNN takes them; so is the next
        "image_std": image_std,
        "norm_eps": eps,  # added to the variance by every norm
        "background": "last" if BACKGROUND_LAST in source.rules else "first",  # its row in the source; converted: first
        # A detector's with the background, a classifier's without; None for a backbone.
        "num_classes": None if counted is None else len(counted),
    }


def _guess_arch(tensors: Tensors) -> tuple[str | None, int]:
    """Return the architecture with these blocks, if it is one of ours, and the groups of its 3x3 convolutions."""
    depths = count_blocks(tensors)
    second = tensors.get(f"{BODY}layer1.0.conv2.weight")  # [width, width / groups, 3, 3]
    if second is None:
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
    if "pixel_mean" not in given or "pixel_std" not in given:
        return {}
    mean, std = given["pixel_mean"].flatten().tolist(), given["pixel_std"].flatten().tolist()  # [3, 1, 1] each
    if len(mean) != 3 or len(std) != 3:
        return {}
    bgr = mean[0] <= mean[2]
    return {"bgr": bgr, "mean": mean[:: -1 if bgr else 1], "std": std[:: -1 if bgr else 1]}


def _mmdetection_style(content: Mapping[str, Any]) -> dict[str, Any]:
    """Read channel order, stride, mean and deviation from the configuration that mmdetection stores as text."""
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
