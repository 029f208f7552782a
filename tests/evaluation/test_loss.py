"""The validation loss is correct, reproducible and without side effects."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import Subset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from resdet.config import load_config
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import DataError, UserError, WeightsError
from resdet.evaluation import validation_loss
from resdet.evaluation.settings import InferenceSettings
from resdet.models.detector import Detector, build_detector
from resdet.models.spec import DetectorSpec
from resdet.processes import Processes
from resdet.training.detection import train
from resdet.types import Category, target_to

NUM_IMAGES, IMAGE_SIZE, SEED = 3, 64, 3
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PARTS = ["val_loss_classifier", "val_loss_box_reg", "val_loss_objectness", "val_loss_rpn_box_reg"]


def shapes() -> DetectionDataset:
    table = shapes_table(NUM_IMAGES, IMAGE_SIZE, SEED)
    return DetectionDataset(table, ShapesImages(image_size=IMAGE_SIZE, seed=SEED), training=False)


def detector(categories: tuple[Category, ...] = ()) -> Detector:
    """Return a small detector in training mode, whose batch norms have other statistics than the initial ones."""
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch="resnet18",
        norm="batch",
        out_channels=32,
        box_head_channels=32,
        min_size=(48, 64),
        max_size=64,
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=16,
    )
    model = build_detector(spec, num_classes=4, trainable_layers=5, categories=categories)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    return model.train()


def torchvision_rcnn() -> FasterRCNN:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    head, predictor = TwoMLPHead(256 * 7 * 7, 32), FastRCNNPredictor(32, 4)
    return FasterRCNN(
        backbone,
        min_size=48,
        max_size=48,
        rpn_post_nms_top_n_train=50,
        box_head=head,
        box_predictor=predictor,
    ).train()


@pytest.fixture(scope="module")
def model() -> Detector:
    return detector()


@pytest.fixture(scope="module")
def alone(model: Detector) -> dict[str, float]:
    return validation_loss(model, shapes())


def test_loss_is_the_sum_of_its_parts(alone: dict[str, float]) -> None:
    assert list(alone) == ["val_loss", *PARTS]
    assert alone["val_loss"] == sum(alone[name] for name in PARTS)
    assert all(type(value) is float and value > 0 for value in alone.values())


@pytest.mark.parametrize("make", [detector, torchvision_rcnn])
def test_losses_are_those_of_the_models_own_forward(make: Callable[[], FasterRCNN]) -> None:
    """When every box is sampled nothing is random: the model's own forward pass with its norms fixed agrees."""
    model, dataset = make(), shapes()
    for sampler in (model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = 10**6, 0.5
    found = validation_loss(model, dataset)
    model.eval()
    model.training = model.rpn.training = model.roi_heads.training = True
    own: dict[str, list[float]] = {}
    with torch.no_grad():
        for index in range(NUM_IMAGES):
            image, target = dataset[index]
            for name, value in model([image.float() / 255], [target]).items():
                own.setdefault(f"val_{name}", []).append(value.item())
    # Float32 sums in the order of sampling differ by about 1e-6.
    expected = {name: np.mean(values) for name, values in own.items()}
    assert {name: found[name] for name in PARTS} == pytest.approx(expected, rel=1e-5)
    with pytest.raises(AssertionError):
        assert {name: found[name] for name in PARTS} == pytest.approx(expected | {PARTS[0]: 1.001 * found[PARTS[0]]})


def random_states() -> list[object]:
    cuda = [torch.cuda.get_rng_state().tolist()] if torch.cuda.is_available() else []
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), *cuda]  # noqa: NPY002


def everything(model: nn.Module) -> dict[str, object]:
    """Return everything that can be observed of a model, bit for bit."""
    found: dict[str, object] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found[name] = tensor.detach().cpu().numpy().tobytes()
        found[f"{name} takes gradients"] = tensor.requires_grad
        found[f"{name} gradient"] = None if tensor.grad is None else tensor.grad.cpu().numpy().tobytes()
    for name, module in model.named_modules():
        found[f"{name} trains"] = module.training
        found[f"{name} hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("make", [detector, torchvision_rcnn])
def test_nothing_is_changed(make: Callable[[], FasterRCNN], device: str) -> None:
    model = make().to(device)
    image, target = shapes()[0]
    batch = [image.to(device).float() / 255] * 2, [target_to(target, torch.device(device))] * 2
    sum(model(*batch).values()).backward()
    model.backbone.fpn.eval()  # a flag that a user set
    before, states = everything(model), random_states()
    assert any(isinstance(value, bytes) for name, value in before.items() if name.endswith("gradient"))
    first = validation_loss(model, shapes(), InferenceSettings(batch_size=2))
    assert everything(model) == before
    assert random_states() == states
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    assert random_states() != states
    again = validation_loss(model, shapes(), InferenceSettings(batch_size=2))  # the same draws
    # A GPU may choose another algorithm the second time.
    assert again == (first if device == "cpu" else pytest.approx(first, rel=1e-3))
    # A forward pass in training would change this.
    model(*batch)
    changed = [name for name, value in everything(model).items() if value != before[name]]
    assert any(name.endswith("running_mean") for name in changed)


def test_flags_and_random_states_are_restored_after_an_error(model: Detector) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.roi_heads.box_predictor.cls_score.bias[0] = torch.nan
    before, states = everything(broken), random_states()
    expected = r"loss is NaN or infinite on image_id=\[\d+, .*cls_score.bias is not finite"
    with pytest.raises(WeightsError, match=expected):
        validation_loss(broken, shapes())
    assert everything(broken) == before
    assert random_states() == states


def test_an_image_has_the_same_loss_whatever_else_is_in_the_batch(model: Detector, alone: dict[str, float]) -> None:
    dataset = shapes()
    each = [validation_loss(model, Subset(dataset, [index])) for index in range(NUM_IMAGES)]
    for name, value in alone.items():
        assert np.mean([one[name] for one in each]) == pytest.approx(value, rel=1e-12)
    assert len({one["val_loss"] for one in each}) == NUM_IMAGES
    # Images of equal size are not padded: convolutions of several differ by float32 rounding alone.
    together = validation_loss(model, dataset, InferenceSettings(batch_size=2, num_workers=1))
    assert together == pytest.approx(alone, rel=1e-4)
    again = validation_loss(model, Subset(Subset(dataset, [2, 1, 0]), [2, 2, 0]))
    expected = (2 * each[0]["val_loss"] + each[2]["val_loss"]) / 3
    assert again["val_loss"] == pytest.approx(expected, rel=1e-12)


def test_classes_are_matched_by_name() -> None:
    dataset = shapes()
    model = detector(dataset.categories)
    names = [category.name for category in dataset.categories]
    images = ShapesImages(image_size=IMAGE_SIZE, seed=SEED)
    turned = DetectionDataset(dataset.table.select_classes([names[1], names[2], names[0]]), images, training=False)
    expected = validation_loss(model, dataset)
    assert validation_loss(model, turned) == expected
    unnamed = detector()
    assert validation_loss(unnamed, turned)["val_loss_classifier"] != expected["val_loss_classifier"]
    fewer = DetectionDataset(dataset.table.select_classes(names[:2]), images, training=False)
    assert validation_loss(model, fewer)["val_loss"] > 0
    with pytest.raises(DataError, match="must have the same classes"):
        validation_loss(detector((replace(dataset.categories[0], name="pentagon"), *dataset.categories[1:])), dataset)


def test_a_placeholder_of_the_models_has_no_ground_truth() -> None:
    dataset = shapes()
    names = [category.name for category in dataset.categories]
    fewer = DetectionDataset(
        dataset.table.select_classes([names[2], names[0]]), ShapesImages(IMAGE_SIZE, SEED), training=False
    )
    first, _, third = dataset.categories
    model = detector((first, Category(2, 12, "N/A (12)"), third))
    assert validation_loss(model, fewer) == validation_loss(detector(dataset.categories), fewer)


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="FasterRCNN or a subclass, got Linear"):
        validation_loss(nn.Linear(1, 1), shapes())


def test_bf16_is_close_to_fp32(model: Detector, alone: dict[str, float]) -> None:
    rough = validation_loss(model, shapes(), InferenceSettings(precision="bf16"))
    # bf16 keeps 8 bits, and proposals that move are sampled differently.
    assert rough == pytest.approx(alone, rel=0.2)
    assert rough != alone


def compute_as_one_of(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)  # a forked process has no OpenMP threads to wait for
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    losses = validation_loss(detector(), shapes(), team=Processes(rank, world_size, torch.device("cpu")))
    Path(folder, f"{rank}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_two_processes_with_unequal_shares_give_the_bits_of_one(tmp_path: Path) -> None:
    mp.start_processes(compute_as_one_of, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = validation_loss(detector(), shapes())
    finally:
        torch.set_num_threads(threads)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


RUN = (
    "data.train.num_images=8",
    "data.val.num_images=3",
    "data.train.image_size=64",
    "data.val.image_size=64",
    "model.norm=batch",
    "model.min_size=[48, 64]",
    "model.max_size=64",
    "model.out_channels=32",
    "model.box_head_channels=32",
    "train.steps=4",
    "train.batch_size=2",
    "train.eval_every=2",
    "train.log_every=1",
    "train.device=cpu",
    "loader.num_workers=0",
    "eval.num_pictures=1",
    "plan=false",
)


@pytest.mark.slow
def test_a_run_with_and_without_it_ends_bit_equal(tmp_path: Path) -> None:
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    payloads, lines = [], []
    for loss in ("false", "true"):
        folder = tmp_path / loss
        train(load_config(quickstart, [*RUN, f"eval.loss={loss}", f"output_dir={folder}"]))
        payloads.append(torch.load(folder / "last.pt", weights_only=True))
        lines.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    without_loss, with_loss = payloads
    assert without_loss["model"].keys() == with_loss["model"].keys()
    for name, value in without_loss["model"].items():
        assert torch.equal(value, with_loss["model"][name]), name
    for number, buffers in without_loss["training"]["optimizer"]["state"].items():
        for name, value in buffers.items():
            assert np.array_equal(value, with_loss["training"]["optimizer"]["state"][number][name])
    logged, expected = ([line["loss"] for line in run if "loss" in line] for run in lines)
    assert logged == expected
    assert not any("val_loss" in line for line in lines[0])
    evaluations = [line for line in lines[1] if "AP" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    for line in evaluations:
        assert line["val_loss"] == pytest.approx(sum(line[name] for name in PARTS))
