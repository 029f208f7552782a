"""Images of which scaling leaves less than a pixel (3000x2), and images of one pixel, wherever images are scaled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from resdet.classification.views import MOST_OBLONG, centre_views, dense_views, scale_short_side, ten_crop_views
from resdet.config import parse_config
from resdet.data.augment.pipeline import build_augment
from resdet.data.augment.sample import Sample
from resdet.data.coco import read_coco
from resdet.data.dataset import DetectionDataset
from resdet.data.images import FolderImages
from resdet.evaluation import evaluate
from resdet.evaluation.loss import validation_loss
from resdet.evaluation.settings import InferenceSettings
from resdet.export.detector import export_detector
from resdet.export.programs import detection_runner, graph_scaled_size, rounding_losses
from resdet.models.detector import Detector, build_detector
from resdet.models.norm import calibrate_norm
from resdet.models.seeded import SeededTransform
from resdet.models.spec import DetectorSpec, Tricks
from resdet.models.transform import host_resize, scaled_size
from resdet.prediction_files import predict_files
from resdet.training import detection
from resdet.types import Target

SIZES = [(2, 300), (300, 2), (1, 500), (500, 1), (1, 1), (1, 3)]  # (height, width)


def detector(*, fast: bool = True, resize: str = "torch", min_size: Any = (48, 64)) -> Detector:
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch="resnet18",
        min_size=min_size,
        max_size=96,
        out_channels=32,
        box_head_channels=32,
        fast=fast,
        resize=resize,
        box_score_thresh=0.0,
    )
    model = build_detector(spec, num_classes=2)
    calibrate_norm(model.backbone.body, [torch.randn(2, 3, 64, 64)])
    return model


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO dataset of strips among an ordinary image, each with a box over half of it."""
    folder = tmp_path_factory.mktemp("strips")
    sizes = [(40, 60), *SIZES]
    for index, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    document = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
            for i, (height, width) in enumerate(sizes)
        ],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [0, 0, max(1, width / 2), max(1, height / 2)]}
            for i, (height, width) in enumerate(sizes)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "a.json").write_text(json.dumps(document))
    return folder


def dataset(folder: Path) -> DetectionDataset:
    table = read_coco(folder / "a.json")
    return DetectionDataset(table, FolderImages(folder, table), training=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["torch", "pil"])
@pytest.mark.parametrize("training", [True, False])
def test_a_side_keeps_a_pixel_and_boxes_stay_boxes(size: tuple[int, int], resize: str, training: bool) -> None:
    height, width = size
    transform = detector(resize=resize).transform.train(training)
    boxes = torch.tensor([[0.0, 0, width, height], [0.0, 0, width / 2, height / 2]])
    images, targets = transform([torch.rand(3, *size)], [{"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64)}])
    ((scaled_height, scaled_width),) = images.image_sizes
    assert min(scaled_height, scaled_width) >= 1
    assert max(scaled_height, scaled_width) <= 96
    assert images.tensors.isfinite().all()
    assert targets[0]["boxes"][0].tolist() == pytest.approx([0, 0, scaled_width, scaled_height])
    assert (targets[0]["boxes"][:, 2:] > targets[0]["boxes"][:, :2]).all()
    (found,) = transform.eval().postprocess([{"boxes": targets[0]["boxes"].clone()}], images.image_sizes, [size])
    torch.testing.assert_close(found["boxes"], boxes)


def test_ordinary_images_have_torchvisions_size_and_the_exported_one() -> None:
    transform = SeededTransform(800, 1333, [0.0] * 3, [1.0] * 3).eval()
    limits, losses = torch.tensor([800, 1333]), rounding_losses([800, 1333])
    for size in [*SIZES, (1333, 1), (1334, 1), (2666, 2), (2667, 2), (3999, 3), (4000, 3)]:
        scaled, _ = transform.resize(torch.zeros(3, *size))
        assert graph_scaled_size(torch.tensor(size), limits, losses).tolist() == list(scaled.shape[1:])
        assert scaled_size(*scaled_size(*size, 800, 1333), 800, 1333) == scaled_size(*size, 800, 1333)


def test_a_strip_draws_its_size_so_that_its_neighbours_keep_theirs() -> None:
    transform, strip = detector(min_size=(32, 48, 64)).transform.train(), torch.rand(3, 1, 500)
    sizes = []
    for first in (torch.rand(3, 40, 40), strip):
        torch.manual_seed(3)
        sizes.append(transform([first, torch.rand(3, 40, 40)])[0].image_sizes[1])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("size", SIZES)
def test_data_workers_scale_a_strip_as_the_detector_does(size: tuple[int, int]) -> None:
    model = detector(resize="pil").train()
    resize = host_resize(model)
    assert resize is not None
    boxes = torch.tensor([[0.0, 0, size[1], size[0]]])
    target = Target(boxes=boxes, labels=torch.ones(1, dtype=torch.int64), image_id=torch.tensor(1))
    image, target = resize(torch.zeros(3, *size, dtype=torch.uint8), target, 5)
    images, _ = model.transform([image])
    assert images.image_sizes == [tuple(image.shape[1:])]
    assert target["boxes"][0, 2:].tolist() == [image.shape[2], image.shape[1]]


@pytest.mark.parametrize(
    ("fast", "resize", "batch_size"),
    [
        (True, "pil", 3),
        (False, "torch", 3),
        pytest.param(True, "torch", 1, marks=pytest.mark.slow),
        pytest.param(False, "pil", 1, marks=pytest.mark.slow),
    ],
)
def test_they_are_evaluated_and_predicted_on(
    strips: Path, tmp_path: Path, fast: bool, resize: str, batch_size: int
) -> None:
    model, data = detector(fast=fast, resize=resize), dataset(strips)
    tricks = Tricks(scales=(32, 80), flip=True, refine=1) if batch_size == 1 else None
    settings = InferenceSettings(batch_size=batch_size, tricks=tricks)
    found = evaluate(model, data, settings).detections
    height, width = data.table.sizes[found.image_index].T
    assert set(found.image_index.tolist()) >= {0}
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, 2] <= width + 1e-3).all()
    assert (found.boxes[:, 3] <= height + 1e-3).all()
    assert validation_loss(model, data, InferenceSettings())["val_loss"] > 0
    files = [strips / str(name) for name in data.table.file_names]
    predict_files(model, files, tmp_path / "out", settings)
    assert len(list((tmp_path / "out").glob("*.png"))) == len(files)


@pytest.mark.slow
@pytest.mark.parametrize(("fast", "resize"), [("true", "pil"), ("false", "torch")])
def test_they_are_trained_on(strips: Path, tmp_path: Path, fast: str, resize: str) -> None:
    source = f"{{format: coco, images: {strips}, annotations: {strips / 'a.json'}}}"
    text = f"""
model: {{arch: resnet18, min_size: [48, 64], max_size: 96, calibration_images: 2, weights: null, fast: {fast},
         resize: {resize}}}
data: {{train: {source}, val: {source}}}
augment: [LargeScaleJitter: {{size: [64, 64]}}, HorizontalFlip: {{p: 0.5}}]
loader: {{num_workers: 0}}
optim: {{lr: 1e-6}}
train: {{steps: 4, batch_size: 2}}
eval: {{num_pictures: 7}}
output_dir: {tmp_path / "run"}
"""
    assert detection.train(parse_config(text, ["augment=[]"] if fast == "false" else [])).steps == 4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [(0.1, 0.1), (0.5, 0.5), (2.0, 2.0)])
def test_large_scale_jitter_of_a_strip_keeps_a_pixel_and_sound_boxes(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    augment = build_augment([{"LargeScaleJitter": {"size": [64, 80], "scale_range": list(scale)}}])
    height, width = size
    sample = Sample(
        image=np.full((height, width, 3), 200, dtype=np.uint8),
        image_id=1,
        boxes=np.array([[0, 0, width, height]], dtype=np.float32),
        labels=np.array([1]),
        crowd=np.array([False]),
        difficult=np.array([False]),
        annotation_ids=np.array([1]),
        visible=np.array([1.0]),
    )
    for seed in range(8):
        out = augment(sample, seed=seed)
        assert min(out.image.shape[:2]) >= 1
        assert (out.boxes[:, 2:] > out.boxes[:, :2]).all()
        assert (out.boxes[:, 2] <= out.image.shape[1]).all()
        assert (out.boxes[:, 3] <= out.image.shape[0]).all()


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("first", [(1, 500), (2, 5), (30, 60)])  # 1, 38 and 48 pixels high after scaling
def test_a_strip_seen_first_changes_nothing_in_later_images(first: tuple[int, int], fast: bool) -> None:
    """torchvision guesses the pyramid's strides from the first image, and would pool at the wrong places ever after."""
    image, found = torch.rand(3, 40, 60), []
    for before in ([], [torch.rand(3, *first)]):
        model = detector(fast=fast).eval()
        with torch.no_grad():
            for other in before:
                model([other])
            found.append(model([image])[0])
    assert torch.equal(found[0]["boxes"], found[1]["boxes"])
    assert torch.equal(found[0]["scores"], found[1]["scores"])


@pytest.fixture(scope="module", params=["torchscript", "onnx"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Any]:
    model = detector().eval()
    path = tmp_path_factory.mktemp("exported") / "detector"
    export_detector(model, path, format=request.param)
    return model, detection_runner(path, request.param)


@pytest.mark.parametrize("size", SIZES)
def test_exported_files_detect_in_them_what_the_model_detects(
    exported: tuple[Detector, Any], size: tuple[int, int]
) -> None:
    model, run = exported
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model([image.float() / 255])[0]
    found = run(image)
    assert len(found["scores"]) == len(expected["scores"])
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(2, 3000), (30000, 1), (1, 1)])
def test_a_classifier_sees_the_middle_of_a_strip(size: tuple[int, int]) -> None:
    """Scaled as a whole, its shorter side to 256, a strip of 30000x1 would have 2 gigapixels."""
    picture = Image.fromarray(np.full((*size, 3), 77, dtype=np.uint8))
    for view in [*centre_views(picture, resize=256, size=224), *ten_crop_views(picture, resize=256, size=224)]:
        assert view.shape == (3, 224, 224)
        assert (view == 77).all()
    for view in dense_views(picture, scales=[32]):
        assert max(view.shape[1:]) <= 32 * MOST_OBLONG


def test_ordinary_pictures_are_scaled_whole() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (10, 10 * MOST_OBLONG, 3), dtype=np.uint8)
    assert scale_short_side(Image.fromarray(noise), 20).size == (20 * MOST_OBLONG, 20)
    middle = scale_short_side(Image.fromarray(np.concatenate([noise, noise], axis=1)), 10)
    assert np.array_equal(
        np.asarray(middle), np.concatenate([noise, noise], axis=1)[:, 5 * MOST_OBLONG : 15 * MOST_OBLONG]
    )


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(3, 40, 60),
        torch.zeros(3, 40, 60, dtype=torch.int64),
        torch.zeros(1, 3, 40, 60, dtype=torch.uint8),
        torch.zeros(40, 60, 3, dtype=torch.uint8),
        torch.zeros(1, 40, 60, dtype=torch.uint8),
        torch.zeros(3, 0, 60, dtype=torch.uint8),
    ],
    ids=lambda image: f"{image.dtype}{list(image.shape)}".replace("torch.", ""),
)
def test_an_exported_file_refuses_what_is_no_8_bit_image(exported: tuple[Detector, Any], image: Tensor) -> None:
    """torchvision's scripted detectors are fed floats in [0, 1]: divided by 255 again, they gave other boxes."""
    _, run = exported
    with pytest.raises(Exception) as error:  # noqa: PT011 - of torch's interpreter or of ONNX Runtime
        run(image)
    if "onnx" in type(error.value).__module__:  # the file states type and sizes
        assert re.search(r"Unexpected input data type|invalid dimensions|Invalid rank|non-zero|zero", str(error.value))
        return
    kind = "uint8" if image.dtype == torch.uint8 else "floats" if image.is_floating_point() else "integers"
    expected = f"image: must be one RGB image as it was read, uint8 [3, H, W] in 0..255, got {kind} {list(image.shape)}"
    assert expected in str(error.value)
