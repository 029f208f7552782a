"""Faster R-CNN on a ResNet-101 with FPN for torchvision: build, fine-tune, evaluate, predict, export.

The names below are the public ones. Each is imported when it is first used, so that ``import resdet`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from resdet.version import VERSION

if TYPE_CHECKING:  # what type checkers and editors read; the table below is what Python does
    from resdet.classification.grow import grow as grow
    from resdet.config import Config as Config, load_config as load_config
    from resdet.data.coco import read_coco as read_coco
    from resdet.data.dataset import DetectionDataset as DetectionDataset
    from resdet.data.voc import read_voc as read_voc
    from resdet.errors import (
        ConfigError as ConfigError,
        DataError as DataError,
        TrainingError as TrainingError,
        UserError as UserError,
        WeightsError as WeightsError,
    )
    from resdet.evaluation.detect import evaluate as evaluate
    from resdet.evaluation.settings import InferenceSettings as InferenceSettings
    from resdet.export.backbone import export_backbone as export_backbone, load_backbone as load_backbone
    from resdet.export.detector import export_detector as export_detector
    from resdet.malloc import keep_freed_memory as keep_freed_memory
    from resdet.models.backbone import ResNetFPN as ResNetFPN, resnet_fpn as resnet_fpn
    from resdet.models.checkpoint import load_detector as load_detector, save_int8_detector as save_int8_detector
    from resdet.models.detector import Detector as Detector, build_detector as build_detector
    from resdet.models.fasterrcnn import fasterrcnn_resnet101_fpn as fasterrcnn_resnet101_fpn
    from resdet.models.int8_calibration import quantize_detector as quantize_detector
    from resdet.models.spec import DetectorSpec as DetectorSpec, Tricks as Tricks
    from resdet.prediction import predict as predict
    from resdet.training.detection import train as train
    from resdet.types import (
        Category as Category,
        Detections as Detections,
        Prediction as Prediction,
        Target as Target,
    )

__version__ = VERSION

_PUBLIC = {
    "classification.grow": ("grow",),
    "config": ("Config", "load_config"),
    "data.coco": ("read_coco",),
    "data.dataset": ("DetectionDataset",),
    "data.voc": ("read_voc",),
    "errors": ("ConfigError", "DataError", "TrainingError", "UserError", "WeightsError"),
    "evaluation.detect": ("evaluate",),
    "evaluation.settings": ("InferenceSettings",),
    "export.backbone": ("export_backbone", "load_backbone"),
    "export.detector": ("export_detector",),
    "malloc": ("keep_freed_memory",),
    "models.backbone": ("ResNetFPN", "resnet_fpn"),
    "models.checkpoint": ("load_detector", "save_int8_detector"),
    "models.detector": ("Detector", "build_detector"),
    "models.fasterrcnn": ("fasterrcnn_resnet101_fpn",),
    "models.int8_calibration": ("quantize_detector",),
    "models.spec": ("DetectorSpec", "Tricks"),
    "prediction": ("predict",),
    "training.detection": ("train",),
    "types": ("Category", "Detections", "Prediction", "Target"),
}
_HOMES = {name: f"resdet.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'resdet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
