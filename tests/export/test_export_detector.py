"""Exported detectors: the same boxes and classes as in Python, at any image size, whatever is in the image."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import resdet.export.detector
from resdet.data.images import read_image
from resdet.errors import UserError
from resdet.export.compare import BOX_TOLERANCE, SCORE_TOLERANCE, ExportError, compare_detections
from resdet.export.detector import export_detector
from resdet.export.programs import graph_scaled_size, rounding_losses
from resdet.models.checkpoint import checkpoint_payload
from resdet.models.detector import Detector, build_detector
from resdet.models.norm import calibrate_norm
from resdet.models.spec import DetectorSpec
from resdet.types import Prediction

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ["torchscript", "onnx", "openvino"]
NAMES = {"torchscript": "detector", "onnx": "detector", "openvino": "detector.xml"}
SIZES = [(480, 640), (333, 250), (225, 321), (97, 400)]


@torch.no_grad()
def spread(model: Detector) -> Detector:
    """Give the class scores of random heads a spread, so that which are the best 100 means something."""
    predictor = model.eval().roi_heads.box_predictor
    logits: list[Tensor] = []
    handle = predictor.register_forward_hook(lambda module, inputs, outputs: logits.append(outputs[0]))
    model([torch.rand(3, 120, 160, generator=torch.Generator().manual_seed(0))])
    handle.remove()
    scale = 2 / logits[0].std(dim=0).mean()
    predictor.cls_score.weight.mul_(scale)
    predictor.cls_score.bias.copy_(scale * (predictor.cls_score.bias - logits[0].mean(dim=0)))
    return model


def small_detector(**arguments: Any) -> Detector:
    torch.manual_seed(0)
    spec = DetectorSpec(arch="resnet18", min_size=100, max_size=160, out_channels=32, box_head_channels=64, **arguments)
    model = build_detector(spec, num_classes=4)
    calibrate_norm(model.backbone.body, [torch.randn(2, 3, 128, 128)])
    return spread(model)


def load(path: Path, format: str) -> Any:
    """Load a file as its reader would, with nothing of ours; gives a function from an image to three tensors."""
    if format == "torchscript":
        return torch.jit.load(path)
    if format == "openvino":
        openvino = pytest.importorskip("openvino", reason="needs openvino, which is in the dev extra")
        network = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda image: tuple(torch.from_numpy(array.copy()) for array in network([image.numpy()]).values())
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, which is in the dev extra")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: tuple(map(torch.from_numpy, session.run(None, {"image": image.numpy()})))


def as_tensor(picture: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(picture.transpose(2, 0, 1).copy())


@torch.no_grad()
def check_image(run: Any, model: Detector, image: Tensor, shift: float = 0.0) -> int:
    """Compare on one image; ``shift`` is what to move the file's boxes by, for the twin. Gives the number compared."""
    expected: Prediction = model([image.float() / 255])[0]
    boxes, labels, scores = run(image)
    assert (boxes.dtype, labels.dtype, scores.dtype) == (torch.float32, torch.int64, torch.float32)
    assert bool((scores[:-1] >= scores[1:]).all())
    found = Prediction(boxes=boxes + shift, labels=labels, scores=scores)
    heads = model.roi_heads
    box, score, unmatched = compare_detections(
        found, expected, score_thresh=heads.score_thresh, most=heads.detections_per_img
    )
    assert (unmatched, len(scores)) == (0, len(expected["scores"]))
    assert box <= BOX_TOLERANCE
    assert score <= SCORE_TOLERANCE
    return len(scores)


@pytest.mark.parametrize("format", ["torchscript", "onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_the_file_detects_what_the_model_detects(tmp_path: Path, format: Any) -> None:
    """At sizes that the export did not compare, too."""
    model = small_detector()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    report = export_detector(model, tmp_path / NAMES[format], format=format)
    assert all(module.training for module in model.modules())
    model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert report.num_detections is not None
    assert report.num_detections > 50
    assert report.differences["unmatched"] == 0
    assert report.speed_ratio is not None

    run = load(report.path, format)
    generator = torch.Generator().manual_seed(0)
    for size in [*SIZES, (40, 30)]:
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        assert check_image(run, model, image) > 20
        with pytest.raises(AssertionError):
            check_image(run, model, image, shift=2 * BOX_TOLERANCE)

    about = json.loads((tmp_path / f"{report.path.name}.json").read_text())
    pair = ["detector.bin"] if format == "openvino" else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("README.md", *pair[:0], *sorted([NAMES[format], *pair])),
        f"{NAMES[format]}.json",
    ]
    assert DetectorSpec.model_validate(about["spec"]) == model.spec
    assert about["outputs"] == ["boxes", "labels", "scores"]
    assert about["checked"]["num_detections"] == report.num_detections


# In a process that had used a DataLoader's workers before, OpenVINO 2026.4 left something behind here of which the next
# subprocess died (SIGSEGV in poll): .ci/run has a process of its own for this test. TorchScript's takes long.
@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_images_with_and_without_detections(tmp_path: Path, format: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A tracer sees one image: neither of the two may be built into the file."""
    generator = torch.Generator().manual_seed(0)
    busy = torch.randint(0, 256, (90, 130, 3), dtype=torch.uint8, generator=generator).numpy()
    plain = np.full((90, 130, 3), 124, dtype=np.uint8)
    model = small_detector()
    with torch.no_grad():
        best = [float(model([as_tensor(image).float() / 255])[0]["scores"][0]) for image in (plain, busy)]
    quiet, loud = (plain, busy) if best[0] < best[1] else (busy, plain)
    model.roi_heads.score_thresh = sum(best) / 2
    for name, image in (("quiet", quiet), ("loud", loud)):
        report = export_detector(model, tmp_path / f"{name}.xml", format=format, images=[image])
        run = load(report.path, format)
        assert check_image(run, model, as_tensor(loud)) > 0
        assert check_image(run, model, as_tensor(quiet)) == 0
        warned = "detects nothing in the images compared on" in caplog.text
        assert warned == (name == "quiet")
        caplog.clear()


def test_scaled_size_is_pythons_to_the_pixel() -> None:
    """Unlike that of torchvision's own transform in TorchScript."""
    generator = np.random.default_rng(0)
    transform = GeneralizedRCNNTransform(800, 1333, [0.0], [1.0]).eval()
    scripted = torch.jit.script(transform)
    differ = 0
    for least, most in ((800, 1333), (128, 128), (416, 800), (600, 1000)):
        limits = torch.tensor([least, most])
        losses = rounding_losses([least, most])
        sizes = [[20_001, 17_000], *generator.integers(1, 3000, (300, 2)).tolist()]
        sizes += [[side, side] for side in range(1, 1000, 3)]  # one side or the other comes out whole here
        sizes += [[side, 3 * side] for side in range(1, 1000, 3)]
        for height, width in sizes:
            scale = min(least / min(height, width), most / max(height, width))
            expected = [max(math.floor(height * scale), 1), max(math.floor(width * scale), 1)]
            assert graph_scaled_size(torch.tensor([height, width]), limits, losses).tolist() == expected
    limits, losses = torch.tensor([800, 1333]), rounding_losses([800, 1333])
    for height, width in ((224, 320), (29, 50), (58, 31), (333, 250), (111, 93), (97, 400)):
        image = torch.zeros(1, height, width)
        size = list(transform.resize(image)[0].shape[1:])
        assert graph_scaled_size(torch.tensor([height, width]), limits, losses).tolist() == size
        differ += list(scripted.resize(image)[0].shape[1:]) != size
    assert differ > 0


def test_scaled_size_is_the_same_without_float64(tmp_path: Path) -> None:
    """OpenVINO has none: it computed another size for 7 to 18 % of all images, where ONNX's program had float64."""
    openvino = pytest.importorskip("openvino", reason="needs openvino, which is in the dev extra")

    class Scaled(nn.Module):
        def forward(self, image_hw: Tensor) -> Tensor:
            return graph_scaled_size(image_hw, torch.tensor([128, 128]), rounding_losses([128, 128]))

    path = tmp_path / "scaled.onnx"
    torch.onnx.export(Scaled(), (torch.tensor([3, 4]),), str(path), dynamo=False, opset_version=18)
    run = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for height, width in np.random.default_rng(0).integers(20, 3000, (1000, 2)).tolist():
        scale = 128 / max(height, width)
        assert run([np.array([height, width])])[0].tolist() == [math.floor(height * scale), math.floor(width * scale)]


@pytest.mark.slow
def test_a_detector_in_onnx_runs_in_openvino(tmp_path: Path) -> None:
    model = small_detector()
    run = load(export_detector(model, tmp_path / "d.onnx").path, "openvino")
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        assert check_image(run, model, torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)) > 20


@pytest.fixture(scope="module")
def real_detector(resnet18_file: Path) -> Detector:
    """Real features under random heads."""
    torch.manual_seed(0)
    spec = DetectorSpec(arch="resnet18", min_size=240, max_size=400, box_head_channels=256)
    return spread(build_detector(spec, num_classes=5, weights_backbone=resnet18_file))


def real_images(assets: Path, count: int, size: tuple[int, int]) -> list[Tensor]:
    files = sorted((assets / "tiny_coco" / "val2017").glob("*.jpg"))[:count]
    assert len(files) == count
    height, width = size
    pictures = [Image.fromarray(read_image(file)).resize((width, height), Image.Resampling.BILINEAR) for file in files]
    return [as_tensor(np.asarray(picture)) for picture in pictures]


def compare_on_real_images(folder: Path, model: Detector, assets: Path, format: Any, count: int) -> None:
    pictures = [image.permute(1, 2, 0).numpy() for image in real_images(assets, 2, SIZES[0])]
    report = export_detector(model, folder / NAMES[format], format=format, images=pictures)
    run = load(report.path, format)
    for size in SIZES:
        images = real_images(assets, count, size)
        found = sum(check_image(run, model, image) for image in images)
        assert found > 10 * count
        seconds = []
        for call in (lambda image: model([image.float() / 255]), run):
            start = time.perf_counter()
            with torch.no_grad():
                for image in images:
                    call(image)
            seconds.append(time.perf_counter() - start)
        print(f"{format} {size}: {found} detections, {seconds[0] / seconds[1]:.2f} times the speed")  # noqa: T201


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_real_images(tmp_path: Path, real_detector: Detector, assets: Path, format: str) -> None:
    compare_on_real_images(tmp_path, real_detector, assets, format, count=1)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_twenty_real_images_at_four_sizes(tmp_path: Path, real_detector: Detector, assets: Path, format: str) -> None:
    compare_on_real_images(tmp_path, real_detector, assets, format, count=20)


def test_compare_detections() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20], [30, 30, 40, 40]])
    expected = Prediction(boxes=boxes, labels=torch.tensor([1, 2, 1]), scores=torch.tensor([0.9, 0.5, 0.5]))
    swapped = [0, 2, 1]  # equal scores, another order

    def compare(**changes: Tensor) -> tuple[float, float, int]:
        found = Prediction(**{key: value[swapped] for key, value in {**expected, **changes}.items()})  # type: ignore[index, typeddict-item]
        return compare_detections(found, expected, score_thresh=0.05, most=100)

    assert compare() == (0, 0, 0)
    assert compare(boxes=boxes + 0.05)[0] == pytest.approx(0.05, abs=1e-5)
    assert compare(boxes=boxes + 0.2)[2] == 6  # three of each side
    assert compare(labels=torch.tensor([1, 1, 1]))[2] == 2
    assert compare(scores=torch.tensor([0.9, 0.5, 0.51]))[2] == 2
    one = Prediction(boxes=boxes[:1], labels=torch.tensor([1]), scores=torch.tensor([0.9]))
    assert compare_detections(one, expected, score_thresh=0.05, most=100)[2] == 2
    assert compare_detections(one, expected, score_thresh=0.4996, most=100)[2] == 0  # at the threshold
    assert compare_detections(one, expected, score_thresh=0.05, most=3)[2] == 0  # at the end of a full list
    six = Prediction(**{key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in expected.items()})  # type: ignore[typeddict-item, attr-defined]
    six["scores"][:] = 0.5
    none = Prediction(boxes=boxes[:0], labels=torch.tensor([], dtype=torch.int64), scores=torch.tensor([]))
    assert compare_detections(none, six, score_thresh=0.5, most=100)[2] == 2  # four of them are forgiven, no more


def test_a_file_that_detects_something_else_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folded_copy = resdet.export.detector.folded_copy

    def wrong(module: nn.Module) -> nn.Module:
        folded = folded_copy(module)
        folded.transform.image_mean[0] += 0.05  # type: ignore[union-attr, operator, index]
        return folded

    monkeypatch.setattr("resdet.export.detector.folded_copy", wrong)
    with pytest.raises(ExportError, match=r"not written, because .* unmatched .* \(at most 0.01\)"):
        export_detector(small_detector(), tmp_path / "d", format="torchscript")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_named(tmp_path: Path) -> None:
    model = small_detector()
    path = tmp_path / "d"
    with pytest.raises(UserError, match=r"takes a Detector .* got ResNetFPN"):
        export_detector(model.backbone, path)
    with pytest.raises(
        UserError, match="one of torchscript, onnx, openvino, got 'export'; its backbone can be any of safetens"
    ):
        export_detector(model, path, format="export")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"images\[0\]: expected uint8 RGB \[H, W, 3\], got float32 \[4, 4, 3\]"):
        export_detector(model, path, images=[np.zeros((4, 4, 3), dtype=np.float32)])  # type: ignore[list-item]
    with pytest.raises(UserError, match="at least one is needed"):
        export_detector(model, path, images=[])
    with pytest.raises(UserError, match="its directory does not exist"):
        export_detector(model, tmp_path / "absent" / "d")
    assert list(tmp_path.iterdir()) == []


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "export.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=dict(os.environ),
        check=False,
    )


@pytest.mark.slow
def test_the_tool(tmp_path: Path) -> None:
    checkpoint = tmp_path / "best.pt"
    torch.save(checkpoint_payload(small_detector()), checkpoint)
    done = run_tool(checkpoint, "--what", "detector", "--format", "torchscript", "--output", tmp_path / "d.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("detector as torchscript, compared at 224x320 and 321x225, ")
    assert (tmp_path / "d.pt").is_file()
    assert (tmp_path / "d.pt.json").is_file()
    done = run_tool(checkpoint, "--what", "detector", "--format", "safetensors", "--output", tmp_path / "no")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "must be one of torchscript, onnx, openvino, got 'safetensors'" in done.stderr
    main = runpy.run_path(str(ROOT / "tools" / "export.py"))["main"]
    for arguments, expected in (
        (["--what", "detector", "--fpn"], "--fpn and --names are for a backbone"),
        (["--names", "timm", "--format", "onnx"], "timm's names are for the body as safetensors"),
        (["--images", "photo.jpg"], "--images is for a detector"),
    ):
        with pytest.raises(UserError, match=expected):
            main([str(checkpoint), *arguments, "--output", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()
