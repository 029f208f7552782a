"""A fine-tune from a checkpoint that has been in other libraries' formats equals one from the checkpoint itself."""

import json
from pathlib import Path

import pytest
import torch

from resdet.config import load_config
from resdet.models.checkpoint import checkpoint_payload
from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec
from resdet.training.detection import train
from resdet.weights.convert_file import convert_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.arch=resnet18", "model.out_channels=64", "model.box_head_channels=64"]


def fine_tune(weights: Path, bccd: Path, output_dir: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    overrides = [
        *SMALL,
        f"model.weights={weights}",
        *(f"data.{part}.{key}" for part in ("train", "val") for key in (f"root={bccd}", f"split={part}")),
        *("model.min_size=96", "model.max_size=128", "loader.num_workers=0", "eval.num_pictures=0"),
        *("train.precision=fp32", "train.batch_size=2", "train.steps=3", "train.log_every=1"),
        f"output_dir={output_dir}",
    ]
    train(load_config(ROOT / "configs" / "frcnn_r101_voc.yaml", overrides))
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(output_dir / "last.pt", weights_only=True)["model"]
    return [line["loss"] for line in lines if "loss" in line], state


@pytest.mark.parametrize(
    "there",
    [
        pytest.param("detectron2", marks=pytest.mark.slow),
        pytest.param("mmdetection", marks=pytest.mark.slow),
        pytest.param("maskrcnn-benchmark", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_as_if_it_had_never_left(
    there: str, assets: Path, resnet18_file: Path, tmp_path: Path
) -> None:
    """Bit for bit: every loss and, at the end, every tensor."""
    torch.manual_seed(0)
    spec = DetectorSpec(arch="resnet18", out_channels=64, box_head_channels=64)
    model = build_detector(spec, num_classes=4, weights_backbone=resnet18_file)
    start, abroad, back = tmp_path / "start.pt", tmp_path / "abroad.pth", tmp_path / "back.pth"
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.weight[:4] = 0  # the background's boxes: nobody else keeps them
        model.roi_heads.box_predictor.bbox_pred.bias[:4] = 0
    torch.save(checkpoint_payload(model), start)
    convert_file(start, there, abroad)
    convert_file(abroad, "torchvision", back)

    losses, state = fine_tune(start, assets / "bccd", tmp_path / "never left")
    losses_back, state_back = fine_tune(back, assets / "bccd", tmp_path / "came back")
    assert len(losses) == 3
    assert losses_back == losses
    assert all(torch.equal(state_back[name], tensor) for name, tensor in state.items())

    changed = torch.load(back, weights_only=True)
    changed["rpn.head.conv.0.0.weight"][0, 0, 0, 0] += 0.1
    torch.save(changed, back)
    assert fine_tune(back, assets / "bccd", tmp_path / "changed")[0] != losses
