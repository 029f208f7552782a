"""The device that a detector runs on, and how its detections leave it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from resdet.commands import predict
from resdet.errors import UserError, WeightsError
from resdet.evaluation.inference import device_for, inference
from resdet.models.checkpoint import checkpoint_payload, save_int8_detector
from resdet.models.detector import build_detector
from resdet.models.int8 import Int8Detector
from resdet.models.int8_calibration import quantize_detector
from resdet.models.norm import calibrate_norm
from resdet.models.spec import DetectorSpec
from resdet.types import Prediction


@pytest.fixture
def host_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture
def int8_detector() -> Int8Detector:
    detector = Int8Detector.__new__(Int8Detector)  # building a real one needs a CPU with AVX512-VNNI
    nn.Module.__init__(detector)
    return detector


@pytest.mark.usefixtures("host_with_a_gpu")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_an_int8_detector_runs_on_the_cpu_of_a_host_with_a_gpu_and_says_so(int8_detector, name, caplog):
    with caplog.at_level("INFO"):
        assert device_for(int8_detector, name) == torch.device("cpu")
    assert "int8 and runs on the CPU" in caplog.text
    assert device_for(nn.Linear(1, 1), name) == torch.device("cuda", 0)


def test_nothing_is_logged_if_the_cpu_was_chosen_or_is_all_there_is(int8_detector, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with caplog.at_level("INFO"):
        assert device_for(int8_detector, "cpu") == device_for(int8_detector, "auto") == torch.device("cpu")
    assert not caplog.text
    with pytest.raises(UserError, match="needs a GPU"):
        device_for(nn.Linear(1, 1), "cuda")


class Boxes(nn.Module):
    """Returns as many boxes for each image as its first pixel says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: list[torch.Tensor]) -> list[Prediction]:
        counts = [round(float(image[0, 0, 0]) * 255) for image in images]
        return [
            Prediction(
                boxes=torch.arange(4 * n, dtype=torch.float64).view(n, 4),
                labels=torch.arange(n) + 1,
                scores=torch.linspace(1, 0, n),
            )
            for n in counts
        ]


def test_detections_leave_the_device_in_one_copy_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[torch.Size] = []
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or to_cpu(tensor))
    counts = [2, 0, 3]
    with inference(Boxes()) as run:
        found = run([torch.full((3, 2, 2), n, dtype=torch.uint8) for n in counts], "three images")
        assert copies == [(5 * 6 + 1,)]
        (nothing,) = run([torch.zeros(3, 2, 2, dtype=torch.uint8)], "an image")
    assert [tuple(nothing[key].shape) for key in ("boxes", "labels", "scores")] == [(0, 4), (0,), (0,)]
    assert [tuple(one[key].dtype for key in ("boxes", "labels", "scores")) for one in found] == [
        (torch.float32, torch.int64, torch.float32)
    ] * 3
    for one, n in zip(found, counts, strict=True):
        assert one["boxes"].tolist() == torch.arange(4 * n).view(n, 4).tolist()
        assert one["labels"].tolist() == list(range(1, n + 1))
        assert one["scores"].tolist() == torch.linspace(1, 0, n).tolist()


class Raw(Boxes):
    """Has a network of proposals whose raw outputs hold one value somewhere; no box shows it."""

    def __init__(self, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.rpn = nn.Module()
        self.rpn.head = Head(value, dtype)

    def forward(self, images: list[torch.Tensor]) -> list[Prediction]:
        self.rpn.head()
        return super().forward(images)


class Head(nn.Module):
    def __init__(self, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.value, self.dtype = value, dtype

    def forward(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        of_level = torch.zeros(2, 3, 5, 7, dtype=self.dtype)
        of_level[1, 2, 3, 4] = self.value
        return [torch.zeros(0), of_level, of_level[:1]], torch.full((4, 9), -3.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_raw_output_that_is_not_finite_is_an_error(value: float, dtype: torch.dtype) -> None:
    image = torch.full((3, 2, 2), 3, dtype=torch.uint8)
    with inference(Raw(value, dtype)) as run, pytest.raises(WeightsError, match=r"NaN or infinity on the image \("):
        run([image], "the image")
    with inference(Raw(-torch.finfo(dtype).max, dtype)) as run:  # the largest number is one
        assert len(run([image], "the image")[0]["scores"]) == 3


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs a CPU with AVX512-VNNI")
@pytest.mark.usefixtures("host_with_a_gpu")
def test_the_tool_runs_an_int8_file_on_a_host_with_a_gpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = build_detector(DetectorSpec(arch="resnet18", min_size=64, max_size=96, out_channels=32), num_classes=2)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    calibrate_norm(detector.backbone.body, [torch.stack(images)])
    save_int8_detector(quantize_detector(detector.eval(), images), tmp_path / "int8.pt")
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "black.png")
    predict.main([str(tmp_path / "int8.pt"), str(tmp_path / "black.png"), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "detections.json").is_file()


def test_the_tool_returns_as_many_detections_as_are_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch="resnet18",
        norm="group",
        min_size=64,
        max_size=96,
        out_channels=32,
        box_detections_per_img=5,
        box_score_thresh=0.0,
    )
    detector = build_detector(spec, num_classes=2).eval()
    torch.save(checkpoint_payload(detector), tmp_path / "model.pt")
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "black.png")

    def count(*options: str) -> int:
        predict.main(
            [str(tmp_path / "model.pt"), str(tmp_path / "black.png"), "--output", str(tmp_path / "out"), *options]
        )
        return len(json.loads((tmp_path / "out" / "detections.json").read_text()))

    assert count() == 5
    assert count("--max-detections", "9") == 9
