"""Faster R-CNN on a ResNet-101 with FPN for torchvision: build, fine-tune, evaluate, export.

The names below are the public ones. Each is imported when it is first used, so that ``import resdet`` costs nothing.
Detections on image files, and drawing them, are in ``resdet.prediction``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from resdet.version import VERSION

if TYPE_CHECKING:
    from resdet.classification.grow import grow
    from resdet.config import Config, load_config
    from resdet.data.coco import read_coco
    from resdet.data.dataset import DetectionDataset
    from resdet.data.voc import read_voc
    from resdet.errors import ConfigError, DataError, TrainingError, UserError, WeightsError
    from resdet.evaluation.detect import evaluate
    from resdet.evaluation.settings import InferenceSettings
    from resdet.export.backbone import export_backbone, load_backbone
    from resdet.export.detector import export_detector
    from resdet.malloc import keep_freed_memory
    from resdet.models.backbone import ResNetFPN, resnet_fpn
    from resdet.models.checkpoint import load_detector, save_int8_detector
    from resdet.models.detector import Detector, build_detector
    from resdet.models.fasterrcnn import fasterrcnn_resnet101_fpn
    from resdet.models.int8 import quantize_detector
    from resdet.models.spec import DetectorSpec, Tricks
    from resdet.training.loop import train
    from resdet.types import Category, Detections, Prediction, Target

__version__ = VERSION

_HOMES = {
    "Category": "resdet.types",
    "Config": "resdet.config",
    "ConfigError": "resdet.errors",
    "DataError": "resdet.errors",
    "DetectionDataset": "resdet.data.dataset",
    "Detections": "resdet.types",
    "Detector": "resdet.models.detector",
    "DetectorSpec": "resdet.models.spec",
    "InferenceSettings": "resdet.evaluation.settings",
    "Prediction": "resdet.types",
    "ResNetFPN": "resdet.models.backbone",
    "Target": "resdet.types",
    "TrainingError": "resdet.errors",
    "Tricks": "resdet.models.spec",
    "UserError": "resdet.errors",
    "WeightsError": "resdet.errors",
    "build_detector": "resdet.models.detector",
    "evaluate": "resdet.evaluation.detect",
    "export_backbone": "resdet.export.backbone",
    "export_detector": "resdet.export.detector",
    "fasterrcnn_resnet101_fpn": "resdet.models.fasterrcnn",
    "grow": "resdet.classification.grow",
    "keep_freed_memory": "resdet.malloc",
    "load_backbone": "resdet.export.backbone",
    "load_config": "resdet.config",
    "load_detector": "resdet.models.checkpoint",
    "quantize_detector": "resdet.models.int8",
    "read_coco": "resdet.data.coco",
    "read_voc": "resdet.data.voc",
    "resnet_fpn": "resdet.models.backbone",
    "save_int8_detector": "resdet.models.checkpoint",
    "train": "resdet.training.loop",
}

__all__ = [
    "Category",
    "Config",
    "ConfigError",
    "DataError",
    "DetectionDataset",
    "Detections",
    "Detector",
    "DetectorSpec",
    "InferenceSettings",
    "Prediction",
    "ResNetFPN",
    "Target",
    "TrainingError",
    "Tricks",
    "UserError",
    "WeightsError",
    "build_detector",
    "evaluate",
    "export_backbone",
    "export_detector",
    "fasterrcnn_resnet101_fpn",
    "grow",
    "keep_freed_memory",
    "load_backbone",
    "load_config",
    "load_detector",
    "quantize_detector",
    "read_coco",
    "read_voc",
    "resnet_fpn",
    "save_int8_detector",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'resdet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
