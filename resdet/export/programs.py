"""Write networks as programs that run without Python (TorchScript, ``torch.export``, ONNX), and load them again.

The size that an image is scaled to is computed in float64, as in Python. torchvision's own scripted and traced
transforms compute the scale in float32: a side that should come out whole is often a pixel smaller, which moves the
boxes (of 40,000 random sizes at min_size 800 or 416, 48 % differ from Python when scripted, 13 % when traced).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from resdet.errors import UserError
from resdet.models.backbone import ResNetFPN
from resdet.models.bodies import Body
from resdet.models.detector import Detector
from resdet.models.tracing import is_scripting
from resdet.types import Prediction

BackboneGraph = Literal["torchscript", "export", "onnx"]
DetectorFormat = Literal["torchscript", "onnx"]

_Module = TypeVar("_Module", bound=nn.Module)

_ONNX_OPSET = 20  # the highest that the TorchScript-based exporter writes, and the default of the other one
_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def _as_sizes(height_width: Tensor) -> tuple[int, int]:
    """Return int64 ``[2]`` as two sizes; under a tracer these are tensors."""
    if is_scripting():
        return int(height_width[0]), int(height_width[1])
    return _traced_sizes(height_width)


@torch.jit.unused
def _traced_sizes(height_width: Tensor) -> tuple[int, int]:
    height, width = height_width
    return cast(int, height), cast(int, width)


def graph_scaled_size(image_hw: Tensor, min_size: float, max_size: float) -> Tensor:
    """Return the size that ``SeededTransform`` scales an image to, equal to Python's to the last pixel.

    Both sizes are int64 ``[2]``, height and width.
    """
    sides = image_hw.to(torch.float64)
    # TorchScript computes number / tensor as number * reciprocal, which rounds twice; tensor / tensor rounds once.
    limits = torch.tensor([min_size, max_size], dtype=torch.float64)
    scale = (limits / torch.stack([sides.min(), sides.max()])).min()
    return torch.floor(sides * scale).clamp(min=1).to(torch.int64)


class OneImage(nn.Module):
    """A detector as a function of one uint8 image, in operations that TorchScript and ONNX have.

    Source: ``GeneralizedRCNN.forward`` and ``GeneralizedRCNNTransform`` of torchvision. Deviations: the scaled size is
    computed in float64, as Python computes it there, and is one pixel at least. torchvision's scripted detectors take
    floats in [0, 1]; divided by 255 once more they would give other boxes, so anything but uint8 is refused.
    """

    def __init__(self, model: Detector) -> None:
        super().__init__()
        transform = model.transform
        self.backbone = model.backbone
        self.rpn = model.rpn
        self.roi_heads = model.roi_heads
        self.min_size = float(transform.min_size[-1])
        self.max_size = float(transform.max_size)
        self.size_divisible = int(transform.size_divisible)
        self.image_mean = list(transform.image_mean)
        self.image_std = list(transform.image_std)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect objects in one image, uint8 ``[3, H, W]``."""
        if image.dtype != torch.uint8 or image.dim() != 3 or image.size(0) != 3 or image.numel() == 0:
            kind = "uint8" if image.dtype == torch.uint8 else "floats" if image.is_floating_point() else "integers"
            raise ValueError(
                "image: must be one RGB image as it was read, uint8 [3, H, W] in 0..255, got "
                f"{kind} {list(image.shape)}"
            )
        image_hw = torch._shape_as_tensor(image)[1:]  # [2]; a tensor, so that a tracer records what follows from it
        scaled_hw = graph_scaled_size(image_hw, self.min_size, self.max_size)
        padded_hw = scaled_hw + torch.remainder(-scaled_hw, self.size_divisible)
        height, width = _as_sizes(scaled_hw)
        padded_height, padded_width = _as_sizes(padded_hw)
        mean, std = torch.tensor(self.image_mean).view(3, 1, 1), torch.tensor(self.image_std).view(3, 1, 1)
        pixels = (image.to(torch.float32) / 255 - mean) / std  # [3, H, W]
        pixels = F.interpolate(pixels[None], size=[height, width], mode="bilinear", align_corners=False)
        images = ImageList(F.pad(pixels, [0, padded_width - width, 0, padded_height - height]), [(height, width)])

        features = self.backbone(images.tensors)
        proposals, _ = self.rpn(images, features)
        detections, _ = self.roi_heads(features, proposals, images.image_sizes)
        ratio = image_hw.to(torch.float32) / scaled_hw.to(torch.float32)
        boxes = detections[0]["boxes"] * torch.stack([ratio[1], ratio[0], ratio[1], ratio[0]])
        return boxes, detections[0]["labels"], detections[0]["scores"]


def output_names(exported: Body | ResNetFPN) -> list[str]:
    """Return names of the maps by their strides: ``C2`` or ``P2`` for 4, and so on."""
    letter = "P" if isinstance(exported, ResNetFPN) else "C"
    return [f"{letter}{stride.bit_length() - 1}" for stride in exported.strides]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence TorchScript's deprecation and the exporters' warnings; the file is compared with the model afterwards."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


@_quiet()
def write_torchscript(module: nn.Module, path: Path) -> None:
    """Write a module as TorchScript."""
    buffer = io.BytesIO()  # written to a full disk, the archive would abort the whole process
    torch.jit.save(torch.jit.script(module), buffer)
    path.write_bytes(buffer.getbuffer())


def _example(module: Body | ResNetFPN) -> tuple[Tensor, tuple[dict[int, Any]]]:
    """Return images whose last map is 2 by 3 pixels, and which of their sizes vary: batch, height and width.

    ``torch.export`` would specialise on a size of 1.
    """
    stride, auto = module.strides[-1], torch.export.Dim.AUTO
    return torch.zeros(2, 3, 2 * stride, 3 * stride), ({0: auto, 2: auto, 3: auto},)


@_quiet()  # it takes channels-last weights for parts of larger tensors
@torch.no_grad()
def write_exported_program(module: Body | ResNetFPN, path: Path) -> None:
    """Write a backbone as a ``torch.export`` program for any batch, height and width."""
    images, dynamic_shapes = _example(module)
    buffer = io.BytesIO()  # as in write_torchscript
    torch.export.save(torch.export.export(module, (images,), dynamic_shapes=dynamic_shapes, strict=False), buffer)
    path.write_bytes(buffer.getbuffer())


def backbone_to_onnx(module: Body | ResNetFPN, path: Path, output_names: Sequence[str]) -> None:
    """Write a backbone as ONNX for any batch, height and width."""
    _require("onnx", "onnxscript", "onnxruntime")
    images, dynamic_shapes = _example(module)
    with _quiet():
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=["images"],
            output_names=list(output_names),
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)


def detector_to_onnx(module: nn.Module, path: Path, image: Tensor) -> None:
    """Write a detector (``OneImage``) as ONNX for images of any size; ``image``, uint8 ``[3, H, W]``, is traced."""
    _require("onnx", "onnxruntime")
    with _quiet(), torch.no_grad():
        # torch.export, and the exporter built on it, fail at suppression: the number of boxes depends on the data.
        torch.onnx.export(
            module,
            (image,),
            str(path),
            dynamo=False,
            opset_version=_ONNX_OPSET,
            input_names=["image"],
            output_names=["boxes", "labels", "scores"],
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                "boxes": {0: "detections"},
                "labels": {0: "detections"},
                "scores": {0: "detections"},
            },
        )


def _require(*packages: str) -> None:
    """Raise a UserError if one of the packages is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"the onnx format needs {', '.join(_ONNX_PACKAGES)}, and {package} is not installed: "
                f"pip install {' '.join(_ONNX_PACKAGES)}"
            ) from error


def _load_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as the model it is compared with
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    return lambda tensor: [torch.from_numpy(array) for array in session.run(None, {source.name: tensor.numpy()})]


@_quiet()
def _load_script(path: Path) -> Any:
    return torch.jit.load(str(path))  # type: ignore[no-untyped-call]


def feature_runner(path: Path, format: BackboneGraph) -> Callable[[Tensor], list[Tensor]]:
    """Load an exported backbone as a function from images to its maps."""
    if format == "onnx":
        return _load_onnx(path)
    module = _load_script(path) if format == "torchscript" else torch.export.load(path).module()
    return lambda images: list(module(images).values())


def detection_runner(path: Path, format: DetectorFormat) -> Callable[[Tensor], Prediction]:
    """Load an exported detector as a function from one uint8 image ``[3, H, W]`` to its detections."""
    run = _load_onnx(path) if format == "onnx" else _load_script(path)

    def detect(image: Tensor) -> Prediction:
        boxes, labels, scores = run(image)
        return Prediction(boxes=boxes, labels=labels, scores=scores)

    return detect
