"""Convert weights files, by the library function and by tools/convert.py as a user runs it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resdet.errors import UserError, WeightsError
from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec
from resdet.weights.convert import to_torchvision, write
from resdet.weights.convert_file import convert_file
from resdet.weights.facts import FACTS_ENTRY
from resdet.weights.files import read_checkpoint, read_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def detectron2_state() -> dict[str, Tensor]:
    """A small detector as detectron2 names it."""
    torch.manual_seed(0)
    model = build_detector(DetectorSpec(arch="resnet18", out_channels=8, box_head_channels=8), num_classes=5)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_()  # means of zero would show MSRA's networks
    return write(state, "detectron2").tensors


@pytest.fixture
def model_zoo(tmp_path: Path, detectron2_state: dict[str, Tensor]) -> Path:
    """A file as detectron2's model zoo has it."""
    path = tmp_path / "model_final.pkl"
    arrays = {name: tensor.numpy() for name, tensor in detectron2_state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ,
        check=False,
    )


def test_the_tool_says_what_it_did(model_zoo: Path, tmp_path: Path) -> None:
    done = run(model_zoo, "--to", "torchvision", "--output", tmp_path / "out.pth")
    assert done.returncode == 0, done.stderr
    for line in (
        f"{model_zoo}: detectron2 detector, resnet18",
        "names, BGR stem, background row last, no box regression of the background, stride in 1x1",
        f"-> {tmp_path / 'out.pth'} (torchvision)",
        "not converted: __author__",
        "stride_in_1x1: True",
        "num_classes: 5",
    ):
        assert line in done.stdout
    assert read_weights(tmp_path / "out.pth").tensors["roi_heads.box_predictor.bbox_pred.bias"].shape == (20,)


def test_a_malicious_file_is_a_users_mistake_in_one_line(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'victim'}",)

    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": Attack()}))
    done = run(path, "--to", "torchvision", "--output", tmp_path / "out.pth")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{path}: loading it would run code of its own (posix.system), which is refused" in done.stderr
    assert not (tmp_path / "victim").exists()
    assert not (tmp_path / "out.pth").exists()


def test_files_there_and_back(model_zoo: Path, tmp_path: Path, detectron2_state: dict[str, Tensor]) -> None:
    """Along every library, and what no tensor shows arrives with the tensors."""
    path = model_zoo
    for number, (target, suffix) in enumerate(
        [
            ("torchvision", ".pth"),
            ("detectron", ".pkl"),
            ("mmdetection", ".pth"),
            ("mmdetection-caffe", ".pth"),
            ("torchvision", ".safetensors"),
            ("maskrcnn-benchmark", ".pth"),
            ("detectron2", ".pkl"),
        ]
    ):
        output = tmp_path / f"{number}{suffix}"
        report = convert_file(path, target, output)
        assert report.read.left_over == report.written.left_over == ()
        assert report.read.facts["stride_in_1x1"] is True
        assert report.read.facts["image_std"] == [1 / 255] * 3
        path = output
    content = read_checkpoint(path)
    assert content["__author__"] == "resdet"
    assert content["matching_heuristics"] is False
    assert content["model"].keys() == detectron2_state.keys()
    assert all(torch.equal(content["model"][name], tensor) for name, tensor in detectron2_state.items())


def test_files_are_wrapped_as_their_libraries_read_them(model_zoo: Path, tmp_path: Path) -> None:
    def converted(target: str, suffix: str = ".pth") -> Any:
        output = tmp_path / f"{target}{suffix}"
        convert_file(model_zoo, target, output)
        if suffix == ".pkl":
            return pickle.loads(output.read_bytes())
        return torch.load(output, weights_only=True)

    assert isinstance(converted("detectron2", ".pkl")["model"]["backbone.bottom_up.stem.conv1.weight"], np.ndarray)
    assert "conv1_w" in converted("detectron", ".pkl")["blobs"]
    assert "backbone.fpn.fpn_inner1.weight" in converted("maskrcnn-benchmark")["model"]
    assert "neck.lateral_convs.0.conv.weight" in converted("mmdetection")["state_dict"]
    bare = converted("torchvision")
    assert all(isinstance(value, Tensor) for value in bare.values())
    assert getattr(bare, FACTS_ENTRY)["stride_in_1x1"] is True
    model = build_detector(DetectorSpec(arch="resnet18", out_channels=8, box_head_channels=8), num_classes=5)
    model.load_state_dict(bare)

    body = convert_file(model_zoo, "timm", tmp_path / "body.safetensors")
    assert len(body.written.left_over) == 30
    convert_file(tmp_path / "body.safetensors", "detectron2", tmp_path / "body.pkl")
    content = pickle.loads((tmp_path / "body.pkl").read_bytes())
    assert content["matching_heuristics"] is True
    assert "stem.conv1.weight" in content["model"]


def test_mmdetections_files(tmp_path: Path, detectron2_state: dict[str, Tensor]) -> None:
    tensors = OrderedDict(write(to_torchvision(detectron2_state).tensors, "mmdetection").tensors)
    meta = {"env_info": "sys.platform: linux", "CLASSES": ("a", "b", "c", "d"), "epoch": 12, "time": "Sun", "seed": 0}
    torch.save({"meta": meta, "state_dict": tensors, "optimizer": {"state": {}}}, tmp_path / "published.pth")
    report = convert_file(tmp_path / "published.pth", "torchvision", tmp_path / "out.pth")
    assert report.read.facts["format"] == "mmdetection"
    assert report.not_copied == ("meta", "optimizer")

    class HistoryBuffer:
        pass

    module = ModuleType("mmengine.logging.history_buffer")
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    sys.modules |= dict.fromkeys(("mmengine", "mmengine.logging", module.__name__), module)
    try:
        torch.save({"state_dict": tensors, "message_hub": HistoryBuffer()}, tmp_path / "training.pth")
    finally:
        for name in ("mmengine", "mmengine.logging", module.__name__):
            del sys.modules[name]
    with pytest.raises(WeightsError, match=r"HistoryBuffer\), which is refused; mmdetection's .*publish_model\.py"):
        convert_file(tmp_path / "training.pth", "torchvision", tmp_path / "out.pth")


def test_mistakes(model_zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no format 'd2'; known are torchvision, detectron2"):
        convert_file(model_zoo, "d2", tmp_path / "out.pkl")
    with pytest.raises(WeightsError, match="no format 'd2'"):
        convert_file(model_zoo, "torchvision", tmp_path / "out.pth", source_format="d2")
    with pytest.raises(UserError, match=r"out\.bin: must end in \.pth"):
        convert_file(model_zoo, "torchvision", tmp_path / "out.bin")
    with pytest.raises(UserError, match="timm reads no pickles"):
        convert_file(model_zoo, "timm", tmp_path / "out.pkl")
    with pytest.raises(UserError, match="its directory does not exist"):
        convert_file(model_zoo, "timm", tmp_path / "no" / "out.pth")
    with pytest.raises(WeightsError, match=r"model_final\.pkl: holds no ResNet as mmdetection names it"):
        convert_file(model_zoo, "timm", tmp_path / "out.pth", source_format="mmdetection")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_final.pkl"]
