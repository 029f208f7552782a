"""Recognise whose weights a file holds, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from resdet.errors import WeightsError, name_some
from resdet.weights.facts import CLASSIFIERS, Kind, carried_facts, mmdetection_style, sees_bytes
from resdet.weights.layouts import FORMATS, SCORES, Tensors
from resdet.weights.networks import find_network

_BODY_PREFIXES = ("backbone.body.", "body.", "")
_STEMS = ("conv1.weight", "conv1.0.weight", "features.0.weight")  # a ResNet's, a deep stem's, a VGG's


def tensors_in(content: Mapping[str, Any], source: str) -> Tensors:
    """Return the tensors of the network in a file's content, under the network's own names (``find_network``)."""
    return find_network(content, source).tensors


def body_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what precedes the names of a body in torchvision's layout; None if there is no such body."""
    return next((prefix for prefix in _BODY_PREFIXES for stem in _STEMS if f"{prefix}{stem}" in tensors), None)


def kind_of(tensors: Mapping[str, Tensor]) -> Kind:
    """Return what tensors of torchvision's names are: a detector, a classifier or a backbone."""
    if f"{SCORES}weight" in tensors:
        return "detector"
    return "classifier" if any(name in tensors for name in CLASSIFIERS) else "backbone"


def detect_format(content: Mapping[str, Any], tensors: Tensors | None = None) -> str:
    """Return the format of a file's content or of a state dict, a key of ``FORMATS``, by its names.

    A file that was converted here states its format. timm's ResNets have torchvision's names. The format is
    "mmdetection-caffe" if the configuration in ``meta`` says so, or, without one, if the first filters are for images
    in 0..255 or no norm of the body has statistics: then they come from MSRA's files. mmcv's bare ResNets of that style
    have torchvision's names, and are told by their first filters. ``tensors`` are the network's, if they were found.
    """
    if stated := carried_facts(content):
        return str(stated["format"])
    tensors = tensors_in(content, "the file") if tensors is None else tensors

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
        if order := mmdetection_style(content).get("channel_order"):
            return "mmdetection-caffe" if order == "bgr" else "mmdetection"
        means = [tensor for name, tensor in tensors.items() if name.endswith("running_mean")]
        for_bytes = sees_bytes(tensors, "backbone.")
        if for_bytes is None:
            for_bytes = bool(means) and not any(tensor.any() for tensor in means)
        return "mmdetection-caffe" if for_bytes else "mmdetection"
    if is_caffe_resnet(tensors):
        return "mmdetection-caffe"
    if some(r"(^|^body\.|^backbone\.body\.)layer1\.0\.conv1\."):
        return "torchvision"
    raise WeightsError(
        f"the names are those of no known library ({', '.join(FORMATS)}): {name_some(tensors) or 'there are none'}"
    )


def is_caffe_resnet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a bare bottleneck ResNet of torchvision's names has first filters for images in 0..255."""
    return "layer1.0.conv3.weight" in tensors and bool(sees_bytes(tensors, ""))
