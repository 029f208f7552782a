"""Write networks as programs that run without Python, and load them again: TorchScript, torch.export, ONNX, OpenVINO.

The size that an image is scaled to is the one that Python computes in float64, found by whole numbers, because OpenVINO
turns float64 into float32. There a side that should come out whole is often a pixel smaller, which moves the boxes: of
40,000 random sizes at min_size 800 or 416, torchvision's own transform differs from Python in 48 % when it is scripted,
in 13 % when it is traced.

OpenVINO's format is a pair of files: an ``.xml`` that describes the network, and a ``.bin`` of the same name with its
weights, float32 here (``openvino.save_model`` makes float16 of them by default). A backbone is converted from its
``torch.export`` program, a detector from its ONNX program: OpenVINO's reader of TorchScript fails at its inputs.
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
from resdet.files import stream_errors
from resdet.models.backbone import ResNetFPN
from resdet.models.bodies import Body
from resdet.models.detector import Detector
from resdet.models.tracing import is_scripting
from resdet.precision import Precision
from resdet.types import Prediction

BackboneGraph = Literal["torchscript", "export", "onnx", "openvino"]
DetectorFormat = Literal["torchscript", "onnx", "openvino"]

_Module = TypeVar("_Module", bound=nn.Module)

_OPENVINO_WEIGHTS = ".bin"
_LONGEST_SIDE = 16_384  # of an image, in pixels, up to which its scaled size is exact

_ONNX_OPSET = 20  # the highest that the TorchScript-based exporter writes, and the default of the other one
# What each of the package's extras installs.
_PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "openvino": ("openvino", "onnx")}


def _as_sizes(height_width: Tensor) -> tuple[int, int]:
    """Return int64 ``[2]`` as two sizes; under a tracer these are tensors."""
    if is_scripting():
        return int(height_width[0]), int(height_width[1])
    return _traced_sizes(height_width)


@torch.jit.unused
def _traced_sizes(height_width: Tensor) -> tuple[int, int]:
    height, width = height_width
    return cast(int, height), cast(int, width)


def rounding_losses(limits: Sequence[int]) -> Tensor:
    """Return by how much ``limit / side`` comes out too small in float64, relative, in units of ``2 ** -53``.

    The result is ``[2, S + 1]``, a row for each limit and a column for each side; negative where it comes out too
    large. The last column is 0, for all sides that are longer: there a size may be a pixel too large.
    """
    rows = []
    for limit in limits:
        ratios = [(limit / side).as_integer_ratio() for side in range(1, _LONGEST_SIDE)]
        losses = [(limit * d - n * side) * 2**53 / (limit * d) for side, (n, d) in enumerate(ratios, 1)]
        rows.append([0.0, *losses, 0.0])
    return torch.tensor(rows)


def graph_scaled_size(image_hw: Tensor, limits: Tensor, losses: Tensor) -> Tensor:
    """Return the size that ``SeededTransform`` scales an image to, equal to Python's to the last pixel.

    Sizes are int64 ``[2]``, height and width; ``limits`` is int64 ``[2]``, min_size and max_size, and ``losses`` their
    ``rounding_losses``. No number exceeds 32 bits for sides of up to a million pixels.
    """
    ends = torch.stack([image_hw.min(), image_hw.max()])
    row = (limits[0] * ends[1] > limits[1] * ends[0]).to(torch.int64)  # which limit decides: []
    limit, end = limits[row], ends[row]
    product = image_hw * limit  # [2]
    size = torch.div(product, end, rounding_mode="floor")
    # OpenVINO may divide in float32.
    size = size - (size * end > product).to(torch.int64) + ((size + 1) * end <= product).to(torch.int64)
    # Python's product of a side and the rounded ratio is below a whole number if it is nearer to the next float64 below
    # it. These are 2 ** -52 of the power of two in it apart, half of that below a power of two itself.
    powers = 2 ** torch.arange(24)
    power = torch.where(powers <= size[:, None], powers, torch.ones_like(powers)).amax(dim=1)  # [2]
    nearest = torch.where(power == size, 0.5, 1.0) * power
    loss = losses[row, end.clamp(max=losses.shape[1] - 1)]
    is_below = (size * end == product) & (loss * size > nearest)
    return (size - is_below.to(torch.int64)).clamp(min=1)


class OneImage(nn.Module):
    """A detector as a function of one uint8 image, in operations that TorchScript and ONNX have.

    Source: ``GeneralizedRCNN.forward`` and ``GeneralizedRCNNTransform`` of torchvision. Deviations: the scaled size is
    Python's (``graph_scaled_size``), and one pixel at least. torchvision's scripted detectors take
    floats in [0, 1]; divided by 255 once more they would give other boxes, so anything but uint8 is refused.
    """

    def __init__(self, model: Detector) -> None:
        super().__init__()
        transform = model.transform
        self.backbone = model.backbone
        self.rpn = model.rpn
        self.roi_heads = model.roi_heads
        limits = [int(transform.min_size[-1]), int(transform.max_size)]
        self.limits = nn.Buffer(torch.tensor(limits))  # [2]
        self.losses = nn.Buffer(rounding_losses(limits))  # [2, S + 1]
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
        scaled_hw = graph_scaled_size(image_hw, self.limits, self.losses)
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


@torch.no_grad()
def _captured(module: Body | ResNetFPN) -> torch.export.ExportedProgram:
    """Return a backbone as a ``torch.export`` program for any batch, height and width."""
    images, dynamic_shapes = _example(module)
    return torch.export.export(module, (images,), dynamic_shapes=dynamic_shapes, strict=False)


@_quiet()  # it takes channels-last weights for parts of larger tensors
def write_exported_program(module: Body | ResNetFPN, path: Path) -> None:
    """Write a backbone as a ``torch.export`` program for any batch, height and width."""
    buffer = io.BytesIO()  # as in write_torchscript
    torch.export.save(_captured(module), buffer)
    path.write_bytes(buffer.getbuffer())


def backbone_to_onnx(module: Body | ResNetFPN, path: Path, output_names: Sequence[str]) -> None:
    """Write a backbone as ONNX for any batch, height and width."""
    _require("onnx", "onnx", "onnxscript", "onnxruntime")
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
    _require("onnx", "onnx", "onnxruntime")
    path.write_bytes(_detector_onnx(module, image))


@_quiet()
@torch.no_grad()
def _detector_onnx(module: nn.Module, image: Tensor) -> bytes:
    """Return a detector (``OneImage``) as an ONNX program."""
    buffer = io.BytesIO()
    # torch.export, and the exporter built on it, fail at suppression: the number of boxes depends on the data.
    torch.onnx.export(
        module,
        (image,),
        buffer,  # type: ignore[arg-type]  # which this exporter has always taken
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
    return _with_computed_empties(buffer.getvalue())


def _with_computed_empties(program: bytes) -> bytes:
    """Replace empty constants in the branches of an ONNX program, for images without boxes, by nodes that compute them.

    OpenVINO reads an empty constant as one element: it would find a box in uninitialised memory.
    """
    import onnx

    model = onnx.load_model_from_string(program)
    for branch in (part.g for node in model.graph.node if node.op_type == "If" for part in node.attribute):
        nodes = []
        for node in branch.node:
            if node.op_type == "Constant" and 0 in node.attribute[0].t.dims:
                empty, name = node.attribute[0].t, f"{node.output[0]}_dims"
                dims = onnx.helper.make_tensor("dims", onnx.TensorProto.INT64, [len(empty.dims)], empty.dims)
                zero = onnx.helper.make_tensor("zero", empty.data_type, [1], [0])
                nodes.append(onnx.helper.make_node("Constant", [], [name], value=dims))
                node = onnx.helper.make_node("ConstantOfShape", [name], node.output, value=zero)
            nodes.append(node)
        del branch.node[:]
        branch.node.extend(nodes)
    return bytes(model.SerializeToString())


def companion(format: str) -> str | None:
    """Return the suffix of the second file of a format that is a pair of files."""
    return _OPENVINO_WEIGHTS if format == "openvino" else None


def check_openvino(path: Path) -> None:
    """Raise a UserError if ``path`` cannot be OpenVINO's file, or the package is missing."""
    if path.suffix != ".xml":
        raise UserError(f"{path}: the openvino format is a pair of files, NAME.xml and NAME.bin: give NAME.xml")
    _require("openvino", "openvino")


def backbone_to_openvino(module: Body | ResNetFPN, path: Path, output_names: Sequence[str]) -> None:
    """Write a backbone as OpenVINO's pair of files for any batch, height and width."""
    import openvino

    with _quiet():
        model = openvino.convert_model(_captured(module))
    model.inputs[0].get_tensor().set_names({"images"})
    for output, name in zip(model.outputs, output_names, strict=True):
        output.get_tensor().set_names({name})
    with stream_errors(path):
        openvino.save_model(model, str(path), compress_to_fp16=False)


def detector_to_openvino(module: nn.Module, path: Path, image: Tensor) -> None:
    """Write a detector (``OneImage``) as OpenVINO's pair of files, traced as for ``detector_to_onnx``."""
    _require("openvino", "onnx")
    import openvino

    model = openvino.Core().read_model(_detector_onnx(module, image))
    with stream_errors(path):
        openvino.save_model(model, str(path), compress_to_fp16=False)


def _require(extra: str, *packages: str) -> None:
    """Raise a UserError if one of the packages, which an extra of this package installs, is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            wanted = _PACKAGES[extra]
            raise UserError(
                f"the {extra} format needs {', '.join(wanted)}, and {package} is not installed: pip install "
                f"{' '.join(wanted)} (this package's extra [{extra}])"
            ) from error


def _load_onnx(path: Path, precision: Precision) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    assert precision == "fp32"  # its CPU provider computes in what the program says
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as the model it is compared with
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    return lambda tensor: [torch.from_numpy(array) for array in session.run(None, {source.name: tensor.numpy()})]


def _load_openvino(path: Path, precision: Precision) -> Callable[[Tensor], list[Tensor]]:
    import openvino

    # Without the first it computes in bfloat16 on every processor that has it.
    hint = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[precision]
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    core = openvino.Core()
    # From memory: files that are mapped can be neither renamed nor removed on Windows.
    weights = path.with_suffix(_OPENVINO_WEIGHTS)
    network = core.read_model(path.read_bytes(), *([weights.read_bytes()] if weights.exists() else []))
    model = core.compile_model(network, "CPU", settings)
    return lambda tensor: [torch.from_numpy(array.copy()) for array in model([tensor.numpy()]).values()]


@_quiet()
def _load_script(path: Path) -> Any:
    return torch.jit.load(str(path))  # type: ignore[no-untyped-call]


def feature_runner(
    path: Path, format: BackboneGraph, precision: Precision = "fp32"
) -> Callable[[Tensor], list[Tensor]]:
    """Load an exported backbone as a function from images to its maps; OpenVINO reads ONNX programs too."""
    if format == "onnx":
        return _load_onnx(path, precision)
    if format == "openvino":
        return _load_openvino(path, precision)
    module = torch.export.load(path).module() if format == "export" else _load_script(path)
    return lambda images: list(module(images).values())


def detection_runner(
    path: Path, format: DetectorFormat, precision: Precision = "fp32"
) -> Callable[[Tensor], Prediction]:
    """Load an exported detector as a function from one uint8 image ``[3, H, W]`` to its detections."""
    if format == "onnx":
        run = _load_onnx(path, precision)
    else:
        run = _load_openvino(path, precision) if format == "openvino" else _load_script(path)

    def detect(image: Tensor) -> Prediction:
        boxes, labels, scores = run(image)
        return Prediction(boxes=boxes, labels=labels, scores=scores)

    return detect
