"""detectron2's recorded answers, reproduced from the same parameters; and how its conventions reach a model."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from benchmarks.pretend_gpu import DEVICE, pretend_gpu
from cards import exact_float32, require_cuda
from PIL import Image
from torch import Tensor, nn
from torchvision import ops

from resdet.build import build_model
from resdet.config import EvalConfig, LoaderConfig, ModelConfig, OptimConfig, TrainConfig
from resdet.data.coco import read_coco
from resdet.data.dataset import DetectionDataset
from resdet.data.images import read_image
from resdet.data.loader import Batch, train_loader
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import UserError, WeightsError
from resdet.evaluation.inference import inference
from resdet.evaluation.labels import match_labels
from resdet.evaluation.loss import validation_loss
from resdet.evaluation.settings import InferenceSettings
from resdet.models.box_heads import BoxHeads
from resdet.models.checkpoint import checkpoint_payload, load_detector, load_detector_weights
from resdet.models.detector import Detector, build_detector
from resdet.models.fasterrcnn import fasterrcnn_resnet101_fpn
from resdet.models.proposals import Anchors, ProposalNetwork
from resdet.models.roi_align import FastMultiScaleRoIAlign, MultiScaleRoIAlign
from resdet.models.seeded import image_seeds
from resdet.models.spec import CONVENTIONS, WEIGHTS_FIELDS, DetectorSpec, Tricks
from resdet.models.test_time import detect_with_tricks
from resdet.models.transform import PilTransform, host_resize, scaled_size
from resdet.processes import Processes
from resdet.training import guards
from resdet.training.detection import DetectionTask, not_finite, repeat_step
from resdet.training.losses import detection_losses
from resdet.training.settings import RunSettings
from resdet.training.step import accumulate_gradients
from resdet.types import Category, Prediction
from resdet.weights.convert import from_torchvision
from resdet.weights.convert_file import convert_file
from resdet.weights.files import read_weights

MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
MSRA: dict[str, Any] = {
    "stride_in_1x1": True,
    "image_mean": MEAN,
    "image_std": (1 / 255, 1 / 255, 1 / 255),
}


# ---- the proof


@pytest.fixture(scope="module")
def golden(assets: Path) -> dict[str, npt.NDArray[Any]]:
    with np.load(assets / "d2_golden" / "expected.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def zoo_file(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parameters that detectron2 held, as its model zoo wraps them: a pickle of numpy arrays."""
    spec = importlib.util.spec_from_file_location("parameters", assets / "d2_golden" / "parameters.py")
    assert spec is not None
    assert spec.loader is not None
    parameters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parameters)
    path = tmp_path_factory.mktemp("zoo") / "model_final_f6e8b1.pkl"
    with path.open("wb") as file:
        pickle.dump({"model": parameters.state_dict(), "__author__": "Detectron2 Model Zoo"}, file)
    return path


@pytest.fixture(scope="module")
def model(zoo_file: Path) -> Detector:
    return load_detector(zoo_file)


@pytest.fixture(scope="module")
def image(assets: Path) -> Tensor:
    pixels = read_image(assets / "tiny_coco" / "val2017" / "000000397133.jpg")
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def with_spec(model: Detector, **changes: object) -> Detector:
    spec = DetectorSpec.model_validate(model.spec.model_dump() | changes)
    other = build_detector(spec, num_classes=81, categories=model.categories)
    other.eval()
    other.load_state_dict(model.state_dict())
    return other


def run(model: Detector, image: Tensor) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    handles = [
        model.backbone.register_forward_hook(lambda module, inputs, output: seen.update(levels=output)),
        model.rpn.register_forward_hook(
            lambda module, inputs, output: seen.update(size=inputs[0].image_sizes[0], proposals=output[0][0])
        ),
    ]
    with torch.no_grad():
        seen["detections"] = model([image])[0]
    for handle in handles:
        handle.remove()
    return seen


def assert_near(ours: Tensor, theirs: npt.NDArray[Any], what: str) -> None:
    """Boxes within 0.05 px of the recorded ones, 99 in 100 of them, whatever their order."""
    assert tuple(ours.shape) == theirs.shape, what
    distance = torch.cdist(torch.from_numpy(theirs), ours, p=math.inf).amin(dim=1)
    assert (distance < 0.05).double().mean() >= 0.99, f"{what}: {distance.quantile(0.99)}"


def assert_reproduced(seen: dict[str, Any], golden: dict[str, npt.NDArray[Any]]) -> None:
    assert seen["size"] == tuple(golden["input_hw"])
    for name, level in zip(("p2", "p3", "p4", "p5", "p6"), seen["levels"].values(), strict=True):
        assert tuple(level.shape) == tuple(golden[f"{name}_shape"])
        scale = float(golden[f"{name}_std"])
        # Measured: 5e-6, the rounding of sums over thousands of products in another order.
        assert abs(level.mean().item() - golden[f"{name}_mean"]) < 1e-3 * scale, name
        assert abs(level.std().item() - scale) < 1e-3 * scale, name
        patch = torch.from_numpy(golden[f"{name}_patch"])
        assert (level[0, :8, 2:6, 3:9] - patch).abs().max() < 1e-3 * scale, name
    assert_near(seen["proposals"], golden["proposals"], "proposals")
    found = seen["detections"]
    assert_near(found["boxes"], golden["boxes"], "boxes")
    # Detections are matched by their order: no two recorded scores are nearer than what rounding moves them by.
    torch.testing.assert_close(found["scores"], torch.from_numpy(golden["scores"]), rtol=0, atol=1e-3)
    assert (found["labels"] - 1).tolist() == golden["classes"].tolist()
    assert ((found["boxes"] - torch.from_numpy(golden["boxes"])).abs().amax(dim=1) < 0.05).double().mean() >= 0.99


def test_recorded_answers_are_reproduced(
    model: Detector, image: Tensor, golden: dict[str, npt.NDArray[Any]], zoo_file: Path
) -> None:
    assert not model.training
    assert model.spec == DetectorSpec(**MSRA, **CONVENTIONS["detectron2"])
    assert_reproduced(run(model, image), golden)


@pytest.mark.gpu
def test_a_gpu_reproduces_them(
    zoo_file: Path, image: Tensor, golden: dict[str, npt.NDArray[Any]], request: pytest.FixtureRequest
) -> None:
    require_cuda(request)
    assert_detections_reproduced(load_detector(zoo_file).cuda(), image, golden)


def assert_detections_reproduced(model: Detector, image: Tensor, golden: dict[str, npt.NDArray[Any]]) -> None:
    device = next(model.parameters()).device
    with torch.no_grad(), exact_float32():
        (found,) = model([image.to(device)])
    assert found["boxes"].device == device
    assert_near(found["boxes"].cpu(), golden["boxes"], "boxes")
    torch.testing.assert_close(found["scores"].cpu(), torch.from_numpy(golden["scores"]), rtol=0, atol=1e-3)
    assert (found["labels"].cpu() - 1).tolist() == golden["classes"].tolist()


@pytest.mark.slow
def test_a_pretend_gpu_reproduces_them(zoo_file: Path, image: Tensor, golden: dict[str, npt.NDArray[Any]]) -> None:
    with pretend_gpu():
        assert_detections_reproduced(load_detector(zoo_file).to(DEVICE), image, golden)


@pytest.mark.slow
def test_plain_operations_reproduce_them_too(
    model: Detector, image: Tensor, golden: dict[str, npt.NDArray[Any]]
) -> None:
    assert_reproduced(run(with_spec(model, fast=False), image), golden)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"stride_in_1x1": False},
        {"image_mean": MEAN[::-1]},
        {"image_std": (0.229, 0.224, 0.225)},
        {"resize": "torch"},
        {"anchor_rounding": True},
        {"roi_sampling_ratio": 2},
        {"roi_aligned": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_convention_is_needed(
    model: Detector, image: Tensor, golden: dict[str, npt.NDArray[Any]], change: dict[str, object]
) -> None:
    """The perturbed twins: any one of these torchvision's way, and the recorded answers are missed.

    The others leave no trace in them: all recorded proposals are of P2 and P4, none is small, no two tie. They have
    tests of their own below.
    """
    with pytest.raises(AssertionError):
        assert_reproduced(run(with_spec(model, **change), image), golden)


def test_its_classes_are_cocos_and_found_by_name(model: Detector, assets: Path) -> None:
    path = assets / "tiny_coco" / "annotations" / "instances_val2017.json"
    listed = json.loads(path.read_text())["categories"]
    assert [(c.category_id, c.name) for c in model.categories] == [(c["id"], c["name"]) for c in listed]
    assert [c.label for c in model.categories] == list(range(1, 81))
    assert match_labels(model, read_coco(path)) is None  # every label means the same in both
    first, second = model.categories[:2]
    swapped = type("Model", (torch.nn.Module,), {})()
    swapped.categories = (Category(1, 2, second.name), Category(2, 1, first.name), *model.categories[2:])
    labels = match_labels(swapped, read_coco(path))
    assert labels is not None
    assert labels[:4].tolist() == [0, 2, 1, 3]


def test_builder_takes_it_with_another_spec(zoo_file: Path, model: Detector) -> None:
    """The way to a detector that can be exported whole."""
    exportable = fasterrcnn_resnet101_fpn(weights=zoo_file, spec=model.spec.model_copy(update={"resize": "torch"}))
    assert exportable.spec.resize == "torch"
    assert exportable.spec.stride_in_1x1
    assert all(torch.equal(a, b) for a, b in zip(exportable.parameters(), model.parameters(), strict=True))


# ---- how a file's conventions reach a model, on a small one


def small_file(path: Path, extra: dict[str, Tensor] | None = None) -> Path:
    """A ResNet-50 of detectron2 with narrow heads."""
    torch.manual_seed(1)
    spec = DetectorSpec(arch="resnet50", out_channels=16, box_head_channels=32)
    source = build_detector(spec, num_classes=6)
    state = source.state_dict()
    state["backbone.body.conv1.weight"] *= 0.02  # it sees pixels in 0..255
    for name, value in state.items():
        if name.endswith("bn3.weight"):
            value.fill_(0.25)
        elif name.endswith("running_mean"):
            value.normal_(std=0.1)
    state = from_torchvision(state, "detectron2") | (extra or {})
    arrays = {name: value.numpy() for name, value in state.items()}
    with path.open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "someone"}, file)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_file(tmp_path_factory.mktemp("small") / "small.pkl")


def shapes() -> DetectionDataset:
    return DetectionDataset(shapes_table(4, 64, 0), ShapesImages(64, 0), None, training=True)


def section(file: Path, **changes: object) -> ModelConfig:
    values = {"arch": "resnet50", "out_channels": 16, "box_head_channels": 32, "min_size": 64, "weights": str(file)}
    return ModelConfig.model_validate_json(json.dumps(values | changes))


def test_a_detector_of_unknown_classes_loads_without_names(small: Path) -> None:
    model = load_detector(small)
    assert model.spec == DetectorSpec(
        arch="resnet50", out_channels=16, box_head_channels=32, **MSRA, **CONVENTIONS["detectron2"]
    )
    assert model.categories == ()
    assert model.roi_heads.box_predictor.cls_score.out_features == 6


def test_saved_by_us_it_stays_faithful(small: Path, tmp_path: Path) -> None:
    model = load_detector(small)
    torch.save(checkpoint_payload(model), tmp_path / "imported.pt")
    again = load_detector(tmp_path / "imported.pt")
    assert (again.spec, again.categories) == (model.spec, model.categories)
    images = [torch.rand(3, 100, 130)]
    for one in (model, again):
        one.transform.min_size = (96,)
        one.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        ours, reference = again(images)[0], model(images)[0]
    assert len(ours["boxes"]) == 100
    assert all(torch.equal(ours[name], reference[name]) for name in ("boxes", "labels", "scores"))
    with torch.no_grad():
        again.roi_heads.box_roi_pool.aligned = False
        assert not torch.equal(again(images)[0]["scores"], reference["scores"])


def test_other_heads_are_refused(tmp_path: Path) -> None:
    """They would load without a word, and answer something else."""
    cascade = small_file(tmp_path / "cascade.pkl", {"roi_heads.box_head.2.fc1.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"cascade.pkl: is not the Faster R-CNN .* roi_heads.box_head.2.fc1.weight"):
        load_detector(cascade)
    masks = small_file(tmp_path / "masks.pkl", {"roi_heads.mask_head.mask_fcn1.weight": torch.zeros(1)})
    assert load_detector(masks).spec.roi_aligned  # boxes of a Mask R-CNN do not depend on its masks


def test_fine_tuning_takes_the_conventions_along(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "resdet"):
        model = build_model(section(small), shapes(), resume_from=None)
    imported = load_detector(small)
    assert {n: getattr(model.spec, n) for n in WEIGHTS_FIELDS} == {n: getattr(imported.spec, n) for n in WEIGHTS_FIELDS}
    assert model.spec.min_size == 64
    assert model.spec.rpn_post_nms_top_n_train == 2000  # a knob of training stays the configuration's
    assert f"taken over from {small}: image_std=(0.0039" in caplog.text
    assert model.backbone.body.layer2[0].conv1.stride == (2, 2)
    given = imported.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, given[name]) != name.startswith("roi_heads.box_predictor."), name


def test_a_resumed_run_has_them_too(small: Path, tmp_path: Path) -> None:
    begun = build_model(section(small), shapes(), resume_from=None)
    torch.save(checkpoint_payload(begun), tmp_path / "last.pt")
    gone = tmp_path / "gone.pkl"
    assert build_model(section(gone), shapes(), resume_from=tmp_path / "last.pt").spec == begun.spec


def test_a_contradicting_configuration_is_refused_or_wins(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.image_std is \(0.5, 0.5, 0.5\), the weights were trained with \(0.003"):
        build_model(section(small, image_std=[0.5, 0.5, 0.5]), shapes(), resume_from=None)
    assert build_model(section(small, roi_sampling_ratio=4), shapes(), resume_from=None).spec.roi_sampling_ratio == 4
    torchvisions = tmp_path / "own.pth"
    torch.save(load_detector(small).state_dict(), torchvisions)
    assert read_weights(torchvisions).settings == {}
    convert_file(small, "torchvision", tmp_path / "converted.safetensors")
    facts = read_weights(tmp_path / "converted.safetensors").settings
    assert facts == {"norm_eps": 1e-5, **MSRA}


def test_class_rows_follow_the_classes(small: Path) -> None:
    spec = load_detector(small).spec
    same = build_detector(spec, num_classes=6)
    assert load_detector_weights(same, small).reinitialised == ()
    other = build_detector(spec, num_classes=4)
    assert len(load_detector_weights(other, small).reinitialised) == 4


# ---- single conventions, where the recorded answers are silent


def test_anchors_are_detectron2s() -> None:
    """Its formula (anchor_generator.py), on a level whose size was rounded up: 13 rows for 800 pixels."""
    sizes, ratios = ((32,), (512,)), ((0.5, 1.0, 2.0),) * 2
    ours = Anchors(sizes, ratios, rounded=False, strides=[4, 64], widened=True)
    canvas = type("Canvas", (), {"tensors": torch.zeros(1, 3, 800, 1216), "image_sizes": [(800, 1199)]})()
    levels = [torch.zeros(1, 1, 200, 304), torch.zeros(1, 1, 13, 19)]
    expected = []
    for level, (size,), stride in zip(levels, sizes, (4, 64), strict=True):
        corners = []
        for ratio in (0.5, 1.0, 2.0):
            width = math.sqrt(size**2.0 / ratio)
            corners.append([-width / 2, -ratio * width / 2, width / 2, ratio * width / 2])
        y, x = torch.meshgrid(*(torch.arange(n) * float(stride) for n in level.shape[2:]), indexing="ij")
        places = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        expected.append((places + torch.tensor(corners)).reshape(-1, 4))
    assert torch.equal(ours(canvas, levels)[0], torch.cat(expected))
    measured = Anchors(sizes, ratios, rounded=False, strides=(), widened=True)(canvas, levels)[0]
    assert (measured - torch.cat(expected)).abs().max() == 12 * 3  # 12 rows of 61 in place of 64 pixels
    rounded = Anchors(sizes, ratios, rounded=True, strides=[4, 64], widened=True)(canvas, levels)[0]
    assert 0.3 < (rounded - torch.cat(expected)).abs().max() <= 0.5


def proposal_network(*, min_size: float, rank_by_logit: bool) -> ProposalNetwork:
    spec = DetectorSpec(
        rpn_batch_size_per_image=1,
        rpn_pre_nms_top_n_test=10,
        rpn_post_nms_top_n_test=10,
        rpn_min_size=min_size,
        rpn_rank_by="logit" if rank_by_logit else "probability",
    )
    anchors = Anchors(((32,),), ((1.0,),), rounded=True, strides=(), widened=True)
    network = ProposalNetwork(anchors, torch.nn.Identity(), spec)
    network.eval()
    return network


def test_proposals_can_be_ranked_where_probabilities_tie() -> None:
    boxes = torch.tensor([[[0.0, 0, 40, 40], [1, 0, 41, 40], [50, 50, 50, 60], [50, 50, 50.0001, 60]]])
    logits = torch.tensor([[20.0, 20.5, 3, 2]])
    assert torch.sigmoid(logits[0, 0]) == torch.sigmoid(logits[0, 1])

    def kept(*, min_size: float, rank_by_logit: bool) -> list[list[float]]:
        network = proposal_network(min_size=min_size, rank_by_logit=rank_by_logit)
        found, scores = network.filter_proposals(boxes, logits, [(100, 100)], [4])
        assert len(found[0]) == len(scores[0])
        return found[0].tolist()

    best, tied, flat, thin = boxes[0, 1].tolist(), boxes[0, 0].tolist(), boxes[0, 2].tolist(), boxes[0, 3].tolist()
    assert kept(min_size=1e-3, rank_by_logit=True) == [best]
    assert kept(min_size=1e-3, rank_by_logit=False)[0] in (best, tied)
    everything = kept(min_size=0.0, rank_by_logit=True)
    assert everything == [best, thin]
    assert flat not in everything


def test_a_box_without_extent_takes_its_place_and_is_not_given() -> None:
    def found(min_size: float) -> list[list[float]]:
        spec = DetectorSpec(box_batch_size_per_image=1, box_detections_per_img=2, box_min_size=min_size)
        heads = BoxHeads(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity(), spec)
        proposals = torch.tensor([[100.0, 10, 120, 30], [10, 10, 10.005, 30], [40, 40, 60, 60]])
        logits = torch.tensor([[0.0, 4], [0, 3], [0, 2]])
        boxes, scores, labels = heads.postprocess_detections(logits, torch.zeros(3, 8), [proposals], [(90, 90)])
        assert len(boxes[0]) == len(scores[0]) == len(labels[0])
        return [[round(value, 3) for value in box] for box in boxes[0].tolist()]

    # The first lies right of the image: clipped to it, nothing is left of its width.
    assert found(0.0) == [[10, 10, 10.005, 30]]
    assert found(1e-2) == [[40, 40, 60, 60]]


def test_aligned_pooling_is_torchvisions_operator_level_by_level() -> None:
    torch.manual_seed(0)
    features = {str(level): torch.randn(2, 8, 64 >> level, 48 >> level) for level in range(4)}
    corners = torch.rand(40, 2) * torch.tensor([150.0, 200.0])
    boxes = torch.cat([corners, corners + torch.rand(40, 2) * torch.tensor([190.0, 250.0]) ** torch.rand(40, 1)], dim=1)
    per_image = [boxes[:25], boxes[25:]]

    def pooled(*, fast: bool, aligned: bool = True) -> Tensor:
        kind = FastMultiScaleRoIAlign if fast else MultiScaleRoIAlign
        pool = kind(list(features), 7, 0, aligned=aligned)
        result: Tensor = pool(features, per_image, [(256, 192), (250, 190)])
        return result

    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    levels = (4 + torch.log2(area.sqrt() / 224)).floor().clamp(2, 5).long() - 2
    assert set(levels.tolist()) == {0, 1}  # the image is too small for others
    rois = torch.cat([torch.arange(2.0).repeat_interleave(torch.tensor([25, 15]))[:, None], boxes], dim=1)
    expected = torch.stack(
        [
            ops.roi_align(features[str(int(level))], roi[None], 7, 0.25 / 2 ** int(level), 0, True)[0]
            for level, roi in zip(levels, rois, strict=True)
        ]
    )
    assert torch.equal(pooled(fast=False), expected)
    # The sparse product takes the same sums in another order.
    torch.testing.assert_close(pooled(fast=True), expected, rtol=0, atol=1e-5)
    for fast in (False, True):
        assert (pooled(fast=fast, aligned=False) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("size", "expected"),
    [((427, 640), (800, 1199)), ((640, 427), (1199, 800)), ((300, 900), (444, 1333)), ((480, 640), (800, 1067))],
)
def test_sides_are_rounded_to_the_nearest(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert scaled_size(*size, 800, 1333) == expected


def test_pil_resize_scales_boxes_and_normalises_after() -> None:
    model = build_detector(
        DetectorSpec(arch="resnet18", resize="pil", min_size=40, max_size=100, image_mean=(0.1, 0.2, 0.3)),
        num_classes=3,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    target = {"boxes": torch.tensor([[12.0, 8, 60, 40]]), "labels": torch.tensor([1])}
    batch, targets = model.transform([image], [target])
    small = np.asarray(Image.fromarray(pixels).resize((60, 40), Image.Resampling.BILINEAR))
    expected = (
        torch.from_numpy(small.copy()).permute(2, 0, 1) / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    ) / (torch.tensor([0.229, 0.224, 0.225])[:, None, None])
    assert batch.image_sizes == [(40, 60)]
    torch.testing.assert_close(batch.tensors[0, :, :40, :60], expected, rtol=0, atol=1e-6)
    assert not batch.tensors[0, :, 40:].any()  # padded after normalising
    assert targets[0]["boxes"].tolist() == [[6, 4, 30, 20]]
    assert target["boxes"].tolist() == [[12, 8, 60, 40]]
    plain = build_detector(DetectorSpec(arch="resnet18", min_size=40, max_size=100), num_classes=3)
    skipped = plain.transform([image])[0].tensors[0, :, :40, :60]
    assert (skipped - batch.tensors[0, :, :40, :60]).abs().max() > 0.5  # no antialiasing


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_pil_resize_is_refused_by_exports() -> None:
    model = build_detector(DetectorSpec(arch="resnet18", resize="pil", min_size=64), num_classes=3).eval()
    message = r"resizes images with Pillow .* build it with resize='torch' to export it whole"
    with pytest.raises(UserError, match=message):
        torch.jit.script(model)
    with pytest.raises(UserError, match=message):
        torch.jit.trace(lambda image: model.transform.resize(image)[0], torch.rand(3, 64, 64))  # type: ignore[no-untyped-call]
    torch.jit.script(model.backbone)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("fast", [True, False])
def test_other_conventions_can_be_scripted(fast: bool) -> None:
    torch.manual_seed(0)
    conventions = CONVENTIONS["detectron2"] | {"resize": "torch"}
    spec = DetectorSpec(
        arch="resnet50", out_channels=16, box_head_channels=32, min_size=96, norm="batch", fast=fast, **conventions
    )
    model = build_detector(spec, num_classes=3).eval()
    images = [torch.rand(3, 48, 64)]  # scaled by 2 exactly: torchvision's scripted resize counts in float32
    with torch.no_grad():
        expected = model(images)[0]
        scripted = torch.jit.script(model)(images)[1][0]
    assert len(expected["boxes"])
    torch.testing.assert_close(scripted["boxes"], expected["boxes"], rtol=0, atol=1e-2)
    assert scripted["labels"].tolist() == expected["labels"].tolist()


# ---- Pillow's resize on the host


def pil_detector() -> Detector:
    """A small detector that draws its size from four."""
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch="resnet18",
        resize="pil",
        norm="group",
        min_size=(40, 48, 56, 64),
        max_size=72,
        out_channels=16,
        box_head_channels=32,
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=16,
        box_score_thresh=0.0,
    )
    return build_detector(spec, num_classes=4, trainable_layers=5)


def pil_shapes() -> DetectionDataset:
    return DetectionDataset(shapes_table(8, 80, 0), ShapesImages(80, 0), None, training=True)


def host_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        for height, width in ((50, 80), (64, 64), (30, 90))  # the second has its size
    ]


def as_floats(images: list[Tensor]) -> list[Tensor]:
    return [image.float() / 255 for image in images]


@pytest.fixture
def resized_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process of each of Pillow's resizes; what happens in workers is not seen here."""
    processes: list[int] = []
    resize = Image.Image.resize

    def counted(self: Image.Image, *args: Any, **options: Any) -> Image.Image:
        processes.append(os.getpid())
        return resize(self, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    return processes


def losses_and_gradients(model: Detector, batches: list[Batch], num_pieces: int = 1) -> dict[str, Tensor]:
    model.train().zero_grad()

    def losses(parallel: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return detection_losses(model, parallel, batch, "fp32")

    values = accumulate_gradients(losses, model, batches, num_pieces, torch.amp.GradScaler("cpu", enabled=False))
    return values | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(ours[name], value)] == []


def test_a_scaled_size_stays_as_it_is() -> None:
    """So the transform recognises an image that a worker has resized by its size alone."""
    rng = np.random.default_rng(0)
    for min_size, max_size in ((800, 1333), (640, 1333), (416, 693), (600, 1000), (64, 64), (1000, 500), (7, 11)):
        for height, width in np.exp2(rng.uniform(2, 12.5, (2000, 2))).astype(int).tolist():
            size = scaled_size(height, width, min_size, max_size)
            assert 0 in size or scaled_size(*size, min_size, max_size) == size, (height, width, min_size, max_size)


@pytest.mark.parametrize("training", [False, True])
def test_pil_transform_takes_pixels_as_it_takes_floats(training: bool) -> None:
    transform = pil_detector().transform.train(training)
    targets = [{"boxes": torch.tensor([[3.0, 7, 25, 29]])} for _ in range(3)]
    torch.manual_seed(0)
    batch, scaled = transform(host_images(), targets)
    torch.manual_seed(0)
    expected, expected_scaled = transform(as_floats(host_images()), targets)
    assert batch.image_sizes == expected.image_sizes
    assert torch.equal(batch.tensors, expected.tensors)
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(scaled, expected_scaled, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_images_are_resized_by_the_loader(num_workers: int, resized_in: list[int]) -> None:
    """Losses and gradients are those of whole images to the bit, and a worker resizes for the training process."""
    model, dataset = pil_detector(), pil_shapes()
    whole = train_loader(dataset, batch_size=4, num_micro_batches=2, seed=3)
    resized = train_loader(
        dataset, batch_size=4, num_micro_batches=2, seed=3, num_workers=num_workers, resize=host_resize(model)
    )
    sides = set()
    for _ in range(2):
        step = [next(whole), next(whole)]
        expected = losses_and_gradients(model, step)
        resized_in.clear()
        ready = [next(resized), next(resized)]
        assert len(resized_in) == (0 if num_workers else 4)
        resized_in.clear()
        assert_same(losses_and_gradients(model, ready), expected)
        assert resized_in == []
        assert [batch.seeds for batch in ready] == [batch.seeds for batch in step]
        sides |= {min(image.shape[1:]) for batch in ready for image in batch.images}
        with image_seeds(model, step[0].seeds):
            floats, targets = model.transform(as_floats(step[0].images), step[0].targets)
        assert [tuple(image.shape[1:]) for image in ready[0].images] == floats.image_sizes
        for target, one in zip(ready[0].targets, targets, strict=True):
            assert torch.equal(target["boxes"], one["boxes"])
    assert len(sides) > 1
    del resized
    step = [next(whole)]
    with image_seeds(model, step[0].seeds):
        own = model(as_floats(step[0].images), step[0].targets)  # the reference is the model's own forward pass
    found = losses_and_gradients(model, step)
    assert {name: value.item() for name, value in own.items()} == {name: found[name].item() for name in own}


def test_a_run_resizes_in_its_workers(resized_in: list[int], tmp_path: Path) -> None:
    model, dataset = pil_detector().train(), pil_shapes()
    settings = RunSettings(
        config={},
        output_dir=tmp_path,
        resume_from=None,
        seed=3,
        train=TrainConfig(steps=1, batch_size=4, accumulate=2),
        optim=OptimConfig(),
        best_metric="AP",
        num_images=8,
        num_val_images=8,
    )
    team = Processes(0, 1, torch.device("cpu"))
    loader, inference_settings = LoaderConfig(num_workers=1), InferenceSettings()
    task = DetectionTask(model, dataset, dataset, settings, loader, EvalConfig(), inference_settings, team)
    batch = next(task.batches(0))
    assert {min(image.shape[1:]) for image in batch.images} <= {40, 48, 56, 64}
    assert task.losses(model, batch)["loss"].isfinite()
    assert resized_in == []


def test_pieces_of_resized_batches_add_up_as_those_of_whole_images(resized_in: list[int]) -> None:
    model = pil_detector()
    whole = next(train_loader(pil_shapes(), batch_size=3, seed=1))
    resized = next(train_loader(pil_shapes(), batch_size=3, seed=1, resize=host_resize(model)))
    expected = losses_and_gradients(model, [whole], num_pieces=2)
    resized_in.clear()
    assert_same(losses_and_gradients(model, [resized], num_pieces=2), expected)
    assert resized_in == []


@pytest.mark.parametrize("ready", [True, False], ids=["resized", "whole"])
def test_a_broken_step_of_resized_images_can_be_repeated(ready: bool, tmp_path: Path) -> None:
    """Files of earlier versions hold whole images."""
    model, dataset = pil_detector(), pil_shapes()
    whole = next(train_loader(dataset, batch_size=2))
    expected = losses_and_gradients(model, [whole])
    saved = next(train_loader(dataset, batch_size=2, resize=host_resize(model))) if ready else whole
    moment = guards.Moment(7, random_seed=11, rank=0, lr=0.1, precision="fp32", num_pieces=1)
    not_finite(moment, {"loss": torch.tensor(math.nan)}, model, [saved], dataset.table, tmp_path)
    again, losses = repeat_step(tmp_path / "broken_step_8.pt")
    gradients = {n: p.grad for n, p in again.named_parameters() if p.grad is not None}
    assert_same(losses | gradients, expected)


TRICKS = (None, Tricks(flip=True, scales=(40, 72), refine=1, voting=0.8))


@pytest.mark.parametrize("tricks", TRICKS, ids=["plain", "tricks"])
def test_detections_are_those_of_float_images(tricks: Tricks | None) -> None:
    """Their boxes are in pixels of the whole image."""
    model, images = pil_detector().eval(), host_images()
    with inference(model, InferenceSettings(tricks=tricks)) as run_on:
        found = run_on(images, "three images")
    with torch.no_grad():
        expected = detect_with_tricks(model, as_floats(images), tricks or Tricks())
    for ours, theirs, image in zip(found, expected, images, strict=True):
        assert len(theirs["boxes"])
        assert all(torch.equal(ours[name], theirs[name]) for name in ("boxes", "labels", "scores"))  # type: ignore[literal-required]
        assert ours["boxes"][:, 2].max() > 0.9 * image.shape[2]


class OnMeta(nn.Module):
    """Transforms images on torch's device without memory: a copy from there to the host raises."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = pil_detector().transform
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches: list[Tensor] = []
        self.to("meta")

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        self.batches.append(self.transform(images, targets)[0].tensors)
        empty = Prediction(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))
        return {"loss_classifier": torch.zeros(())} if self.training else [empty for _ in images]


def test_nothing_comes_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("evaluation.inference", "training.losses"):
        monkeypatch.setattr(f"resdet.{module}.autocast", lambda *_: nullcontext())  # torch has none for this device
    model = OnMeta()
    with inference(model) as run_on:
        run_on(host_images(), "three images")
    batch = next(train_loader(pil_shapes(), batch_size=2, resize=host_resize(model)))
    for name in ("rpn", "roi_heads"):
        monkeypatch.setattr(model, name, SimpleNamespace(fg_bg_sampler=SimpleNamespace()), raising=False)
    monkeypatch.setattr(model, "training_counts", dict, raising=False)
    detection_losses(cast("Detector", model.train()), model, batch, "fp32")
    assert [(batch.device.type, batch.dtype, len(batch)) for batch in model.batches] == [
        ("meta", torch.float32, 3),
        ("meta", torch.float32, 2),
    ]


def test_validation_loss_hands_pixels_to_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dataset = pil_detector(), pil_shapes()
    resize = PilTransform.resize

    def losses(prepare: Callable[[Tensor], Tensor]) -> dict[str, float]:
        def prepared(self: PilTransform, image: Tensor, target: Any = None) -> Any:
            assert image.dtype == torch.uint8
            return resize(self, prepare(image), target)

        monkeypatch.setattr(PilTransform, "resize", prepared)
        return validation_loss(model, dataset, InferenceSettings(batch_size=2))

    assert losses(lambda image: image) == losses(lambda image: image.float() / 255)


def test_other_detectors_have_their_images_as_ever() -> None:
    model = build_detector(DetectorSpec(arch="resnet18", min_size=64), num_classes=4)
    assert host_resize(model) is None
