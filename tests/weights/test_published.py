"""Files as detectron2, mmdetection and torchvision publish them: from a name to detections, commands, fine-tuning."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn

from resdet.commands.main import main
from resdet.data.images import read_image
from resdet.errors import WeightsError
from resdet.models.checkpoint import COCO_NAMES, load_detector
from resdet.models.detector import build_detector
from resdet.models.spec import CONVENTIONS, DetectorSpec
from resdet.weights.convert import from_torchvision
from resdet.weights.files import read_weights
from resdet.weights.zoo import Published

pytestmark = pytest.mark.usefixtures("hub")

Publish = Callable[..., Published]
Array = npt.NDArray[np.float32]
R101, X101 = "detectron2_r101_fpn_3x", "detectron2_x101_32x8d_fpn_3x"
MEAN_BGR = (103.53, 116.28, 123.675)


# ---- detectron2's files: its names and shapes, written from its sources and not by the converter under test


def shapes_of_detectron2(
    depths: tuple[int, ...], groups: int, per_group: int, fpn: int, fc: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the parameters of a Faster R-CNN with FPN as modeling/backbone/{resnet,fpn}.py name them."""

    def convolution(name: str, out: int, into: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, into, kernel, kernel)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.norm.{leaf}", (out,)

    body, into = "backbone.bottom_up", 64
    yield from convolution(f"{body}.stem.conv1", 64, 3, 7)
    for stage, depth in enumerate(depths):
        width, out = groups * per_group * 2**stage, 256 * 2**stage
        for block in range(depth):
            name = f"{body}.res{stage + 2}.{block}"
            if block == 0:
                yield from convolution(f"{name}.shortcut", out, into, 1)
            yield from convolution(f"{name}.conv1", width, into, 1)
            yield from convolution(f"{name}.conv2", width, width // groups, 3)
            yield from convolution(f"{name}.conv3", out, width, 1)
            into = out
        for kind, rows, kernel in (("lateral", out, 1), ("output", fpn, 3)):
            yield f"backbone.fpn_{kind}{stage + 2}.weight", (fpn, rows, kernel, kernel)
            yield f"backbone.fpn_{kind}{stage + 2}.bias", (fpn,)
    rpn = "proposal_generator.rpn_head"
    for name, shape in {
        f"{rpn}.conv": (fpn, fpn, 3, 3),
        f"{rpn}.objectness_logits": (3, fpn, 1, 1),
        f"{rpn}.anchor_deltas": (12, fpn, 1, 1),
        "roi_heads.box_head.fc1": (fc, fpn * 49),
        "roi_heads.box_head.fc2": (fc, fc),
        "roi_heads.box_predictor.cls_score": (81, fc),
        "roi_heads.box_predictor.bbox_pred": (320, fc),
    }.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def value(name: str, shape: tuple[int, ...], generator: np.random.Generator, stem: float) -> Array:
    """Draw a parameter so that activations stay small."""
    drawn = generator.standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return np.abs(drawn) * np.float32(0.2) + np.float32(0.9)
    if name.endswith("norm.weight"):
        return np.float32(0.25 if "conv3" in name else 1) + drawn * np.float32(0.02)
    if len(shape) == 1:
        return drawn * np.float32(0.05)
    gain = stem if "stem" in name else 3 if "cls_score" in name else 1
    return drawn * np.float32(gain / np.sqrt(np.prod(shape[1:])))


def detectron2_file(
    path: Path, depths: tuple[int, ...], *, groups: int = 1, per_group: int = 64, fpn: int = 16, fc: int = 32
) -> dict[str, Array]:
    """Write a file as detectron2's model zoo has them: a pickle of numpy arrays and an author."""
    generator = np.random.default_rng(0)
    stem = 0.02 if groups == 1 else 1  # whose images are in 0..255, or divided by their deviation
    state = {
        name: value(name, shape, generator, stem)
        for name, shape in shapes_of_detectron2(depths, groups, per_group, fpn, fc)
    }
    with path.open("wb") as file:
        pickle.dump({"model": state, "__author__": "Detectron2 Model Zoo"}, file)
    return state


def levels_as_detectron2(
    state: dict[str, Array], pixels: npt.NDArray[np.uint8], depths: tuple[int, ...], *, groups: int, in_1x1: bool
) -> list[Tensor]:
    """Compute P2 to P6 of RGB pixels, the sides multiples of 32, with plain operations under detectron2's names."""
    weights = {name: torch.from_numpy(array) for name, array in state.items()}

    def conv(name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        x = F.conv2d(x, kernel, weights.get(f"{name}.bias"), stride, kernel.shape[-1] // 2, 1, groups)
        if f"{name}.norm.weight" in weights:
            leaves = ("running_mean", "running_var", "weight", "bias")
            x = F.batch_norm(x, *(weights[f"{name}.norm.{leaf}"] for leaf in leaves), eps=1e-5)
        return x

    std = (1.0, 1.0, 1.0) if in_1x1 else (57.375, 57.120, 58.395)
    bgr = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    x = (bgr - torch.tensor(MEAN_BGR).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    x = F.max_pool2d(conv("backbone.bottom_up.stem.conv1", x, 2).relu(), 3, 2, 1)
    stages = []
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name, stride = f"backbone.bottom_up.res{stage + 2}.{block}", 2 if stage and not block else 1
            inside = conv(f"{name}.conv1", x, stride if in_1x1 else 1).relu()
            inside = conv(f"{name}.conv2", inside, 1 if in_1x1 else stride, groups).relu()
            shortcut = x if block else conv(f"{name}.shortcut", x, stride)
            x = (conv(f"{name}.conv3", inside) + shortcut).relu()
        stages.append(x)
    top, levels = None, []
    for number, stage_output in reversed(list(enumerate(stages, 2))):
        lateral = conv(f"backbone.fpn_lateral{number}", stage_output)
        top = lateral if top is None else lateral + F.interpolate(top, scale_factor=2.0, mode="nearest")
        levels.insert(0, conv(f"backbone.fpn_output{number}", top))
    return [*levels, F.max_pool2d(levels[-1], 1, 2)]


def pixels() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def levels_of(model: Any, image: npt.NDArray[np.uint8]) -> list[Tensor]:
    with torch.no_grad():
        batch = model.transform([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]
        return list(model.backbone(batch.tensors).values())


@pytest.mark.parametrize(
    ("name", "arch", "depths", "groups", "per_group"),
    [
        pytest.param("detectron2_r50_fpn_3x", "resnet50", (3, 4, 6, 3), 1, 64, marks=pytest.mark.slow),
        (X101, "resnext50_32x4d", (3, 4, 6, 3), 32, 4),
        pytest.param(X101, "resnext101_32x8d", (3, 4, 23, 3), 32, 8, marks=pytest.mark.slow),
    ],
)
def test_detectron2s_features_are_computed_from_its_file(
    name: str, arch: str, depths: tuple[int, ...], groups: int, per_group: int, publish: Publish, tmp_path: Path
) -> None:
    """Order of colours, deviation of pixels, and where a bottleneck strides: no tensor shows them."""
    real = arch == "resnext101_32x8d"  # then with the real heads, too
    state = detectron2_file(
        tmp_path / "model.pkl", depths, groups=groups, per_group=per_group, **({"fpn": 256, "fc": 1024} if real else {})
    )
    publish(name, tmp_path / "model.pkl", arch=arch)
    model = load_detector(name, settings={"min_size": 64})
    assert model.spec.arch == arch
    assert model.spec.stride_in_1x1 == (groups == 1)
    assert all(getattr(model.spec, field) == value for field, value in CONVENTIONS["detectron2"].items())
    image = pixels()
    expected = levels_as_detectron2(state, image, depths, groups=groups, in_1x1=groups == 1)
    for ours, theirs in zip(levels_of(model, image), expected, strict=True):
        assert theirs.std() > 0.05
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * float(theirs.abs().max()))
    perturbed = levels_as_detectron2(state, image[..., ::-1], depths, groups=groups, in_1x1=groups == 1)
    assert (perturbed[0] - expected[0]).abs().max() > 0.01 * expected[0].abs().max()
    assert tuple(category.name for category in model.categories) == COCO_NAMES
    assert (model.categories[0].name, model.categories[79].category_id) == ("person", 90)


@pytest.mark.slow
def test_detectron2s_recorded_detections_by_name(publish: Publish, assets: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("parameters", assets / "d2_golden" / "parameters.py")
    assert spec is not None
    assert spec.loader is not None
    parameters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parameters)
    with (tmp_path / "model_final_f6e8b1.pkl").open("wb") as file:
        pickle.dump({"model": parameters.state_dict(), "__author__": "Detectron2 Model Zoo"}, file)
    publish(R101, tmp_path / "model_final_f6e8b1.pkl")
    image = assets / "tiny_coco" / "val2017" / "000000397133.jpg"
    expected = np.load(assets / "d2_golden" / "expected.npz")
    model = load_detector(R101)
    with torch.no_grad():
        found = model([torch.from_numpy(read_image(image)).permute(2, 0, 1).float() / 255])[0]
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=0, atol=1e-3)
    near = np.abs(found["boxes"].numpy() - expected["boxes"]).max(axis=1) < 0.05
    assert near.mean() >= 0.99
    # The command writes the same, under COCO's ids and names.
    assert main(["predict", R101, str(image), "--output", str(tmp_path / "out"), "--device", "cpu"]) is None
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["category_name"] for entry in entries] == [COCO_NAMES[label] for label in expected["classes"]]
    np.testing.assert_allclose([entry["score"] for entry in entries], expected["scores"], rtol=0, atol=1e-3)


# ---- the other libraries'


@pytest.mark.slow
def test_torchvisions_detections_are_reproduced(publish: Publish, hub: Path, tmp_path: Path) -> None:
    """Its own builder reads the file: frozen norms with eps 0, and names from before 2022, as the published one has."""
    torch.manual_seed(0)
    state = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    old = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("bn3.weight"):
            tensor.fill_(0.25)
        elif name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        for new, before in ((".0.weight", ".weight"), (".0.bias", ".bias")):
            if "fpn" in name and "blocks" in name:
                name = name.replace(new, before)
        old[name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = tensor
    assert "backbone.fpn.inner_blocks.0.weight" in old
    hub.mkdir(parents=True)
    theirs = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    torch.save(old, hub / theirs.url.rpartition("/")[2])
    sizes: dict[str, Any] = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.0}
    reference = fasterrcnn_resnet50_fpn(weights=theirs, **sizes).eval()
    publish("torchvision_r50_fpn", hub / theirs.url.rpartition("/")[2], url="http://127.0.0.1:1/torchvisions.pth")
    (hub / "torchvisions.pth").hardlink_to(hub / theirs.url.rpartition("/")[2])

    image = torch.from_numpy(pixels()).permute(2, 0, 1).float() / 255
    with torch.no_grad():
        expected = reference([image])[0]
        model = load_detector("torchvision_r50_fpn", settings=sizes)
        ours = model([image])[0]
        plain = build_detector(model.spec.model_copy(update={"fast": False}), num_classes=91).eval()
        plain.load_state_dict(model.state_dict())
        same = plain([image])[0]
    assert len(expected["boxes"]) == 100
    assert all(torch.equal(same[key], expected[key]) for key in expected)
    # The same boxes in float32, whose sums are in another order.
    torch.testing.assert_close(ours["scores"], expected["scores"], rtol=0, atol=1e-4)
    assert model.spec.norm_eps == 0
    assert [model.categories[number - 1].name for number in (1, 90)] == ["person", "toothbrush"]


def test_mmdetections_file_states_what_it_needs(publish: Publish, tmp_path: Path) -> None:
    """PyTorch's format before 1.6, with classes and the configuration as text, as its publish_model.py leaves it."""
    config = (
        "model = dict(backbone=dict(type='ResNet', depth=18, style='pytorch'), rpn_head=dict(anchor_generator=dict(\n"
        "    type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])))\n"
        "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)\n"
        "train_pipeline = [dict(type='Resize', img_scale=[(1333, 640), (1333, 800)])]\n"
        "test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(1333, 800))]\n"
    )
    source = small(tmp_path).state_dict()
    meta = {"config": config, "CLASSES": COCO_NAMES, "epoch": 12, "iter": 87_960, "mmdet_version": "2.12.0"}
    content = {"meta": meta, "state_dict": from_torchvision(source, "mmdetection")}
    torch.save(content, tmp_path / "mm.pth", _use_new_zipfile_serialization=False)
    publish("mmdetection_r101_fpn_3x", tmp_path / "mm.pth", arch="resnet18")
    model = load_detector("mmdetection_r101_fpn_3x")
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())
    assert all(getattr(model.spec, field) == value for field, value in CONVENTIONS["mmdetection"].items())
    assert (model.spec.min_size, model.spec.max_size) == (800, 1333)
    assert model.spec.image_mean == pytest.approx((0.485, 0.456, 0.406), abs=1e-6)
    assert tuple(category.name for category in model.categories) == COCO_NAMES


# ---- commands and fine-tuning, on a small one


def small(folder: Path) -> nn.Module:
    """Write a detectron2-style ResNet-18, and return the detector that it holds."""
    torch.manual_seed(0)
    source = build_detector(DetectorSpec(arch="resnet18", out_channels=16, box_head_channels=32), num_classes=81)
    for name, tensor in source.state_dict().items():
        if name.endswith("bn2.weight"):
            tensor.fill_(0.25)
        elif "bbox_pred" in name and "roi_heads" in name:
            tensor[:4] = 0  # of the background, for which the other libraries have no rows
    arrays = {name: tensor.numpy() for name, tensor in from_torchvision(source.state_dict(), "detectron2").items()}
    with (folder / "small.pkl").open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file)
    return source


@pytest.fixture
def published(publish: Publish, tmp_path: Path) -> str:
    small(tmp_path)
    publish(R101, tmp_path / "small.pkl", arch="resnet18")
    return R101


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Long and flat: the detector resizes it to 31 x 1333, which takes no time."""
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (14, 600, 3), dtype=np.uint8)).save(path)
    return path


def test_predict_takes_a_name(
    published: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["predict", published, str(photo), "--device", "cpu", "--score", "0.01"]) is None
    entries = json.loads(Path("predictions/detections.json").read_text())
    ids = {category.name: category.category_id for category in load_detector(published).categories}
    assert all(entry["category_id"] == ids[entry["category_name"]] for entry in entries)
    assert Path("predictions/photo.png").is_file()


def test_eval_takes_a_name_and_data(
    published: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        WeightsError,
        match=r"small\.pkl: carries no configuration \(it is not a checkpoint of `resdet train`\): say on which data, "
        r"as in data\.val\.format=coco data\.val\.images=FOLDER data\.val\.annotations=FILE",
    ):
        main(["eval", published])
    box = {"id": 1, "image_id": 1, "category_id": 18, "bbox": [10, 2, 40, 10], "area": 400, "iscrowd": 0}
    image = {"id": 1, "file_name": photo.name, "width": 600, "height": 14}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 18, "name": "dog"}]}
    (tmp_path / "dogs.json").write_text(json.dumps(content))
    data = ["data.val.format=coco", f"data.val.images={tmp_path}", "data.val.annotations=dogs.json"]
    assert main(["eval", published, *data, "loader.num_workers=0", "train.device=cpu"]) is None
    assert re.search(r"^dog +1 +0\.\d", capsys.readouterr().out, flags=re.MULTILINE)  # by name: its label is 17
    assert (tmp_path / "eval" / "metrics.json").is_file()
    assert (tmp_path / "eval" / "report.html").is_file()


def test_convert_takes_a_name(published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "converted.pth"
    assert main(["convert", published, "--to", "torchvision", "--output", str(output)]) is None
    model = load_detector(published)
    assert torch.equal(read_weights(output).tensors["backbone.body.conv1.weight"], model.backbone.body.conv1.weight)


@pytest.mark.slow
def test_export_takes_a_name(published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", published, "--output", str(tmp_path / "body.safetensors")]) is None
    body = read_weights(tmp_path / "body.safetensors")
    assert torch.equal(body.tensors["conv1.weight"], load_detector(published).backbone.body.conv1.weight)


def test_a_name_is_fine_tuned_on_other_classes(
    published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    overrides = {
        "model.weights": published,
        "model.arch": "resnet18",
        "model.norm": "frozen",
        "model.out_channels": 16,
        "model.box_head_channels": 32,
        "model.min_size": 64,
        "model.trainable_layers": 0,
        "data.train.num_images": 4,
        "data.val.num_images": 2,
        "train.steps": 1,
        "train.batch_size": 2,
        "train.device": "cpu",
        "loader.num_workers": 0,
        "eval.num_pictures": 0,
        "plan": "false",
        "output_dir": run,
    }
    assert main(["train", "quickstart", *(f"{key}={value}" for key, value in overrides.items())]) is None
    first, tuned = load_detector(published), load_detector(str(run))
    assert [category.name for category in tuned.categories] == ["circle", "square", "triangle"]
    assert tuned.spec.resize == "pil"
    assert tuned.spec.image_std == first.spec.image_std
    given = first.state_dict()
    for name, tensor in tuned.state_dict().items():
        if name.startswith("backbone.body."):
            assert torch.equal(tensor, given[name]), name
        elif "box_predictor" not in name:
            assert (tensor - given[name]).abs().max() < 0.1, name
    assert tuned.roi_heads.box_predictor.cls_score.out_features == 4
