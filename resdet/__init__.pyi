# The public names and their modules: resdet/__init__.py imports each when it is first used.
from .classification.grow import grow as grow
from .config import Config as Config, load_config as load_config
from .data.coco import read_coco as read_coco
from .data.dataset import DetectionDataset as DetectionDataset
from .data.torch_datasets import wrap_dataset as wrap_dataset
from .data.voc import read_voc as read_voc
from .errors import (
    ConfigError as ConfigError,
    DataError as DataError,
    InternalError as InternalError,
    TrainingError as TrainingError,
    UserError as UserError,
    WeightsError as WeightsError,
)
from .evaluation.detect import evaluate as evaluate
from .evaluation.settings import InferenceSettings as InferenceSettings
from .export.backbone import export_backbone as export_backbone, load_backbone as load_backbone
from .export.detector import export_detector as export_detector
from .malloc import keep_freed_memory as keep_freed_memory
from .models.backbone import ResNetFPN as ResNetFPN, resnet_fpn as resnet_fpn
from .models.checkpoint import load_detector as load_detector, save_int8_detector as save_int8_detector
from .models.detector import Detector as Detector, build_detector as build_detector
from .models.fasterrcnn import (
    FasterRCNN_ResNet101_FPN_Weights as FasterRCNN_ResNet101_FPN_Weights,
    fasterrcnn_resnet101_fpn as fasterrcnn_resnet101_fpn,
)
from .models.int8_calibration import quantize_detector as quantize_detector
from .models.spec import DetectorSpec as DetectorSpec, Tricks as Tricks, WeightsOrigin as WeightsOrigin
from .prediction import predict as predict, predict_each as predict_each
from .prediction_files import predict_files as predict_files
from .result import Result as Result
from .training.detection import train as train
from .types import Category as Category, Detections as Detections, Prediction as Prediction, Target as Target

__version__: str
