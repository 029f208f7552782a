"""Write ``config.json`` beside an exported body, with which timm's hub and folder loaders build and load it.

Source: ``load_model_config_from_path``, ``_parse_model_cfg`` and ``load_state_dict_from_path`` of timm's
``models/_hub.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

from resdet.files import write_text
from resdet.models.archs import ResNetArch, find_arch
from resdet.models.bodies import Body
from resdet.models.spec import DetectorSpec
from resdet.version import VERSION

WEIGHTS_NAME = "model.safetensors"
"""The file that timm and Hugging Face's hub look for; another name gets no ``config.json``."""

_WRITER = "written_by"


def timm_problem(body: Body) -> str | None:
    """Return why timm has no network that computes what a body computes; None if it has."""
    arch = find_arch(body.arch)
    if not isinstance(arch, ResNetArch) or arch.stem == "3x3" or arch.shortcut not in ("B", "D"):
        return f"its {body.arch} has other layers" if body.arch.startswith("vgg") else f"it has no {body.arch}"
    if body.norm == "group":
        return "its ResNets have BatchNorm, not GroupNorm"
    if body.norm_eps != 1e-5:
        return f"its norms add 1e-05 to the variance, not {body.norm_eps:g}"
    if body.stride_in_1x1:
        return "its bottlenecks stride in their 3x3 convolution, not in the 1x1"
    if body.dilate_c5:
        return "its stage 4 strides, and this one is dilated"
    if body.returned_layers[-1] != 4:
        return f"it needs all four stages, and this body ends with stage {body.returned_layers[-1]}"
    return None


def config_file(path: Path) -> Path | None:
    """Return where the ``config.json`` of an exported body goes; None if it has none, or that is another's file."""
    config = path.with_name("config.json")
    if path.name != WEIGHTS_NAME or (config.exists() and not _is_ours(config)):
        return None
    return config


def _is_ours(config: Path) -> bool:
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and str(content.get(_WRITER)).startswith("resdet")


def write_timm_config(config: Path, body: Body, spec: DetectorSpec) -> None:
    """Write timm's description of a body without a classifier that was trained as ``spec`` says."""
    arch = find_arch(body.arch)
    is_deep = isinstance(arch, ResNetArch) and arch.stem == "deep"
    content = {
        "architecture": body.arch,
        "num_classes": 0,
        "num_features": body.channels[-1],
        "pretrained_cfg": {
            "input_size": [3, 224, 224],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(spec.image_mean),
            "std": list(spec.image_std),
            "num_classes": 0,
            "first_conv": "conv1.0" if is_deep else "conv1",
            "classifier": "fc",
        },
        _WRITER: f"resdet {VERSION}",
    }
    write_text(config, json.dumps(content, indent=2) + "\n")
