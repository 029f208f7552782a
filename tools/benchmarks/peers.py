"""Run our exports in ONNX Runtime and OpenVINO, in the precision and with the threads of ours."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from resdet.data.loader import Batch
from resdet.errors import UserError
from resdet.export.programs import (
    OneImage,
    backbone_to_onnx,
    detection_runner,
    detector_to_onnx,
    feature_runner,
    output_names,
)
from resdet.models.backbone import ResNetFPN
from resdet.models.detector import Detector
from resdet.models.norm import folded_copy
from resdet.precision import Precision, autocast
from resdet.types import Prediction

Detect = Callable[[int], list[Prediction]]
"""Detects on a batch by its number."""

PRECISIONS_OF: dict[str, tuple[Precision, ...]] = {"onnxruntime": ("fp32",), "openvino": ("fp32", "bf16")}
"""What each of the peers computes in on a CPU."""


def parse_peers(text: str) -> list[str]:
    """Read the names of peers, separated by commas.

    Raises:
        UserError: If one is unknown or not installed.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PRECISIONS_OF:
            raise UserError(f"peers must be of {', '.join(PRECISIONS_OF)}, separated by commas; got {name!r}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"peers={name}: it is not installed: pip install {name}") from error
    return names


def detection_peers(names: Sequence[str], ours: Detector, batches: Sequence[Batch]) -> dict[str, Detect]:
    """Export our detector, and return the peers that run it, by name and precision; each takes images one by one."""
    runs: dict[str, Detect] = {}
    if not names:  # nothing to export for, and no package that an export needs
        return runs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        detector_to_onnx(OneImage(folded_copy(ours)).eval(), path, batches[0].images[0])
        for name in names:
            for precision in PRECISIONS_OF[name]:
                runs[f"{name} {precision}"] = _over_batches(_runner(path, name, precision), batches)
    return runs


def _runner(path: Path, name: str, precision: Precision) -> Callable[[Tensor], Prediction]:
    return detection_runner(path, "onnx" if name == "onnxruntime" else "openvino", precision)


def _over_batches(detect: Callable[[Tensor], Prediction], batches: Sequence[Batch]) -> Detect:
    return lambda number: [detect(image) for image in batches[number % len(batches)].images]


def feature_runs(
    ours: Detector, int8: FasterRCNN | None, inputs: Sequence[Tensor]
) -> dict[str, Callable[[int], object]]:
    """Return what computes body and pyramid of inputs ``[1, 3, H, W]``: ours, and OpenVINO on our export of them.

    OpenVINO's int8 is what NNCF makes of the export, calibrated on the same inputs; left out where NNCF is missing.
    """
    backbone = ours.eval().backbone
    assert isinstance(backbone, ResNetFPN)
    host = torch.device("cpu")

    def by_ours(module: torch.nn.Module, precision: Precision) -> Callable[[int], object]:
        @torch.no_grad()
        def run(number: int) -> object:
            with autocast(host, precision):
                return module(inputs[number % len(inputs)])

        return run

    runs: dict[str, Callable[[int], object]] = {f"ours {name}": by_ours(backbone, name) for name in ("fp32", "bf16")}
    if int8 is not None:
        runs["ours int8"] = by_ours(int8.backbone, "fp32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.onnx"
        plain = folded_copy(backbone)
        backbone_to_onnx(plain, path, output_names(plain))
        for precision in PRECISIONS_OF["openvino"]:
            runs[f"openvino {precision}"] = _over_inputs(feature_runner(path, "openvino", precision), inputs)
        if int8 is not None and importlib.util.find_spec("nncf") is not None:
            quantized = Path(folder) / "int8.xml"
            _quantize(path, quantized, inputs)
            runs["openvino int8"] = _over_inputs(feature_runner(quantized, "openvino", "fp32"), inputs)
    return runs


def _over_inputs(features: Callable[[Tensor], list[Tensor]], inputs: Sequence[Tensor]) -> Callable[[int], list[Tensor]]:
    return lambda number: features(inputs[number % len(inputs)])


def _quantize(path: Path, quantized: Path, inputs: Sequence[Tensor]) -> None:
    import nncf
    import openvino

    dataset = nncf.Dataset([image.numpy() for image in inputs])
    # For convolutional networks NNCF's default: activations in unsigned 8 bits after a ReLU, weights by channel.
    model = nncf.quantize(openvino.Core().read_model(path), dataset, subset_size=len(inputs))
    openvino.save_model(model, str(quantized), compress_to_fp16=False)
