"""From classification to detection, by the tools as a user runs them."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet50_Weights, resnet50

from resdet.classification.data import read_folder
from resdet.errors import WeightsError
from resdet.models.checkpoint import load_detector
from resdet.models.norm import FrozenBatchNorm2d

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"

TINY_DETECTOR = [
    "model.arch=cifar20",
    "model.norm=frozen",
    "model.trainable_layers=0",
    "model.anchor_sizes=[8, 16, 24, 32]",
    "model.min_size=64",
    "model.out_channels=16",
    "model.box_head_channels=16",
    "data.train.num_images=12",
    "data.val.num_images=3",
    "data.train.image_size=64",
    "data.val.image_size=64",
    "train.batch_size=4",
    "train.steps=2",
    "eval.num_pictures=0",
]


def run(tool: str, *arguments: object) -> None:
    """Call a tool's ``main``, here, as its command line would; tests/test_tools.py proves what lies around it."""
    runpy.run_path(str(ROOT / "tools" / tool))["main"]([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the digits configuration, at the digits' own size."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("runs") / "digits"
    short = ["model.image_size=8", "train.epochs=null", "train.steps=3", "optim.warmup_steps=0"]
    run("pretrain.py", CONFIGS / "pretrain_digits_resnet20.yaml", *short, f"output_dir={folder}")
    return folder


def test_a_classifiers_weights_and_statistics_become_a_detectors(
    digits_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "resdet")
    weights = f"model.weights={digits_run / 'best.pt'}"
    folder = tmp_path / "run"
    run("train.py", CONFIGS / "quickstart.yaml", *TINY_DETECTOR, weights, f"output_dir={folder}")
    assert "taken over from" in caplog.text
    given = torch.load(digits_run / "best.pt", weights_only=True)
    detector = load_detector(folder / "best.pt")
    assert detector.spec.image_mean == tuple(given["spec"]["image_mean"])
    assert detector.spec.image_mean != (0.485, 0.456, 0.406)
    assert detector.transform.image_std == given["spec"]["image_std"]
    norms = [module for module in detector.backbone.body.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(norms) == 19
    body = detector.backbone.body.state_dict()
    assert all(torch.equal(body[name], given["model"][name]) for name in body)
    assert not torch.equal(body["bn1.running_mean"], torch.zeros(16))
    other = [*TINY_DETECTOR, weights, "model.arch=cifar32", f"output_dir={tmp_path / 'other'}"]
    with pytest.raises(WeightsError, match=r"does not fit this cifar32 .*it looks like cifar20"):
        run("train.py", CONFIGS / "quickstart.yaml", *other)


def test_a_run_is_judged_by_its_own_configuration(digits_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("eval_classifier.py", digits_run / "best.pt", "data.val.split=val", "eval.views=ten_crop")
    told = capsys.readouterr().out
    assert "177 images of digits val, ten_crop" in told
    assert "top1 0." in told
    bare = torch.load(digits_run / "best.pt", weights_only=True)["model"]
    torch.save(bare, digits_run / "bare.pth")
    with pytest.raises(WeightsError, match=r"carries no configuration .*\(--arch, --images\)"):
        run("eval_classifier.py", digits_run / "bare.pth")


def test_mistakes_are_lines_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "tools/pretrain.py", "configs/pretrain_digits_resnet20.yaml", "optim.lrr=1", "train.epochs=0"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert "pretrain.py: configs/pretrain_digits_resnet20.yaml: 2 problems" in done.stderr
    assert "unknown key; did you mean lr?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_real_weights_are_judged_on_any_folder(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ResNet-50's ImageNet weights on objects cut out of photographs, with ten crops against crops cut by hand."""
    weights = tmp_path / "resnet50.pth"
    subprocess.run([sys.executable, str(assets / "make_weights.py"), "resnet50", str(weights)], check=True)
    known = [name.lower() for name in ResNet50_Weights.IMAGENET1K_V1.meta["categories"]]
    folder = tmp_path / "objects"
    for split in ("train", "val"):
        content = json.loads((assets / "tiny_coco" / "annotations" / f"instances_{split}2017.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for found in content["annotations"]:
            name = names[found["category_id"]]
            x, y, width, height = found["bbox"]
            if name not in known or found["iscrowd"] or min(width, height) < 80:
                continue
            with Image.open(assets / "tiny_coco" / f"{split}2017" / files[found["image_id"]]) as photograph:
                margin = 0.1 * max(width, height)
                box = (x - margin, y - margin, x + width + margin, y + height + margin)
                inside = (max(0, box[0]), max(0, box[1]), min(photograph.width, box[2]), min(photograph.height, box[3]))
                (folder / name.replace(" ", "_")).mkdir(parents=True, exist_ok=True)
                cut = photograph.convert("RGB").crop(tuple(map(int, inside)))
                cut.save(folder / name.replace(" ", "_") / f"{found['id']}.png")
    ten_crops = ["eval.views=ten_crop", "eval.batch_size=4", "loader.num_workers=0"]
    run("eval_classifier.py", weights, "--arch", "resnet50", "--images", folder, *ten_crops)
    told = capsys.readouterr().out

    model = resnet50()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    images = read_folder(folder)
    right = five = 0
    for index in range(len(images)):
        with Image.open(images.pictures.name(index)) as stored:
            width, height = stored.size
            size = (256 * width // height, 256) if height < width else (256, 256 * height // width)
            pixels = np.array(stored.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        tall, wide = pixels.shape[:2]
        crops = []
        for view in (pixels, pixels[:, ::-1]):
            for top, left in ((0, 0), (0, wide - 224), (tall - 224, 0), (tall - 224, wide - 224)):
                crops.append(view[top : top + 224, left : left + 224])
            top, left = round((tall - 224) / 2), round((wide - 224) / 2)
            crops.append(view[top : top + 224, left : left + 224])
        batch = (np.stack(crops) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            answer = model(torch.from_numpy(batch.transpose(0, 3, 1, 2)).float()).softmax(1).mean(0)
        best = [known[label] for label in answer.topk(5).indices.tolist()]
        name = images.classes[images.labels[index]].replace("_", " ")
        right += best[0] == name
        five += name in best
    num_images = len(images)
    assert f"top1 {right / num_images:.4f}  top5 {five / num_images:.4f}" in told
    # One of a thousand classes would be guessed right once in a thousand times.
    assert right >= num_images // 4
