"""Detectors on the pretend GPU: everything that runs on a device, beside the same on the CPU, in float32.

The CPU takes the device's path, over a padded batch, so that both draw the same samples; that the path computes what
the CPU's usual one does is tested in tests/models/test_padded.py. Results agree to float32's rounding: the CPU has
convolutions and a RoIAlign of its own. Each test has two twins that must fail: one weight is changed, and one tensor is
left on the CPU.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.pretend_gpu import DEVICE, PretendTensor, Record, to_pretend
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import resdet
from resdet.data.loader import Batch
from resdet.errors import UserError
from resdet.evaluation.detect import evaluate
from resdet.evaluation.inference import inference
from resdet.evaluation.settings import InferenceSettings
from resdet.export.detector import export_detector
from resdet.models import padded
from resdet.models.detector import Detector, build_detector
from resdet.models.int8_calibration import quantize_detector
from resdet.models.norm import calibrate_norm
from resdet.models.seeded import image_seeds
from resdet.models.spec import DetectorSpec, Tricks
from resdet.training.average import AveragedModel
from resdet.training.losses import detection_losses
from resdet.training.optim import build_optimizer
from resdet.training.step import accumulate_gradients
from resdet.types import Prediction, Target

pytestmark = pytest.mark.usefixtures("device_record")

# Rounding of float32 grows to 1e-5 of a tensor on its way through ResNet-18, to 1e-3 of a gradient through ResNet-50.
TOLERANCE = 3e-3
LEFT_BEHIND = "at least two devices"
SETTINGS: dict[str, dict[str, Any]] = {
    "fpn": {},
    "c4": {"layout": "c4", "arch": "resnet50", "anchor_sizes": (16, 32, 64)} | {"box_batch_size_per_image": 4},
    "dc5": {"layout": "dc5", "anchor_sizes": (16, 32, 64)},
    "batch norm": {"norm": "batch"},
    "group norm": {"norm": "group"},
    "focal and giou": {"class_loss": "focal", "box_loss": "giou", "class_weights": (1.0, 2.0, 3.0, 0.5, 0.7)},
    "class weights": {"class_weights": (1.0, 2.0, 3.0, 0.5, 0.7)},
    "as detectron2": {"roi_aligned": True, "anchor_stride": "nominal", "rpn_rank_by": "logit", "rpn_min_size": 0.0},
}


@pytest.fixture(autouse=True)
def _one_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded, "is_queued", lambda _device: True)


def detector(**settings: Any) -> Detector:
    torch.manual_seed(0)
    small = {"arch": "resnet18", "min_size": (64,), "max_size": 128, "out_channels": 32, "box_head_channels": 64}
    small |= {"box_batch_size_per_image": 16, "rpn_batch_size_per_image": 64, "rpn_post_nms_top_n_train": 50}
    small |= {"rpn_post_nms_top_n_test": 30, "box_score_thresh": 0.15}
    model = build_detector(DetectorSpec(**small | settings), num_classes=5)
    if model.spec.norm == "frozen":
        for name, scale in model.named_buffers():
            if name.endswith("bn3.weight"):  # branches that add little: deep random networks amplify rounding
                scale.fill_(0.2)
        calibrate_norm(model.whole_body(), [torch.randn(2, 3, 64, 96)])
    return model


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in ((100, 140), (120, 110))]


def targets() -> list[dict[str, Tensor]]:
    return [
        {"boxes": torch.tensor([[10.0, 10, 60, 70], [30, 20, 90, 80]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.tensor([[5.0, 5, 100, 90]]), "labels": torch.tensor([4])},
    ]


def moved(values: list[Any]) -> list[Any]:
    return [value.to(DEVICE) if isinstance(value, Tensor) else _moved(value) for value in values]


def _moved(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in target.items()}


def changed(model: Detector) -> Detector:
    """A copy with one weight changed."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.roi_heads.box_predictor.cls_score.bias[1] += 0.5
    return other


def left_behind(model: Detector) -> Detector:
    """A copy with one weight on the CPU."""
    other = copy.deepcopy(model)
    other.roi_heads.box_predictor.bbox_pred.weight = nn.Parameter(
        other.roi_heads.box_predictor.bbox_pred.weight.detach().cpu()
    )
    return other


def on_cpu(tree: Any) -> Any:
    """The numbers of what a device computed, which must all be there."""
    if isinstance(tree, Tensor):
        assert isinstance(tree, PretendTensor)
        return tree.detach().cpu()
    if isinstance(tree, Mapping):
        return {name: on_cpu(value) for name, value in tree.items()}
    return [on_cpu(value) for value in tree]


def compare(found: Any, expected: Any) -> None:
    """Compare the norms of differences with those of tensors, and everything else as it is."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            compare(found[name], value)
    elif isinstance(expected, Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        difference = (found.double() - expected.double()).norm()
        assert difference <= (TOLERANCE * expected.double().norm() + 1e-7 if expected.is_floating_point() else 0)
    else:
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            compare(one, other)


def check(run: Callable[[Detector], Any], model: Detector) -> None:
    """Compare what a function of a detector returns on both devices, and try the twins."""
    model.eval()
    expected = run(copy.deepcopy(model))
    there = to_pretend(copy.deepcopy(model))
    compare(on_cpu(run(copy.deepcopy(there))), expected)
    different = on_cpu(run(changed(there)))
    with pytest.raises(AssertionError):
        compare(different, expected)
    with pytest.raises(RuntimeError, match=LEFT_BEHIND):
        run(left_behind(there))


def losses(model: Detector) -> dict[str, Any]:
    device = next(model.parameters()).device
    batch, truth = (images(), targets()) if device.type == "cpu" else (moved(images()), moved(targets()))
    with image_seeds(model.train(), [3, 4]):
        found = model(batch, truth)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(torch.stack(list(found.values())).sum(), trained, materialize_grads=True)
    buffers = dict(model.named_buffers())  # statistics of batch norms
    return {
        "losses": {name: value.detach() for name, value in found.items()},
        "gradients": list(gradients),
        "buffers": buffers,
    }


@pytest.mark.slow
def test_bfloat16_losses_are_near_float32s(device_record: Record) -> None:
    """Under autocast, whose rules are CUDA's: 8 bits of a number, some 50 layers deep."""
    model = to_pretend(detector())
    exact = losses(copy.deepcopy(model))
    device_record.clear()
    with torch.autocast("pgpu", torch.bfloat16):
        rounded = losses(copy.deepcopy(model))
    multiplied = {operator.dtype for operator in device_record.operators if operator.multiply_adds}
    assert multiplied == {torch.bfloat16}
    for name, value in exact["losses"].items():
        assert rounded["losses"][name].item() == pytest.approx(value.item(), rel=0.1)
    assert rounded["losses"] != exact["losses"]
    assert all(gradient.dtype == torch.float32 for gradient in rounded["gradients"])


def most_are_slow(names: Iterable[str], *quick: str) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", most_are_slow(SETTINGS, "fpn"))
def test_losses_and_gradients(name: str) -> None:
    check(losses, detector(**SETTINGS[name]))


@torch.no_grad()
def detections(model: Detector) -> list[Prediction]:
    device = next(model.parameters()).device
    found = model.eval()(images() if device.type == "cpu" else moved(images()))
    assert sum(len(one["scores"]) for one in found) > 5
    return [dict(one) for one in found]  # type: ignore[misc]


@pytest.mark.parametrize("name", most_are_slow(("fpn", "c4", "dc5", "group norm", "as detectron2"), "fpn"))
def test_detections(name: str) -> None:
    check(detections, detector(**SETTINGS[name]))


TRICKS = {
    "flip and scales": Tricks(flip=True, scales=(48, 64)),
    "refine and voting": Tricks(refine=1, voting=0.5),
    "soft": Tricks(nms="soft-linear"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", most_are_slow(TRICKS, "refine and voting"))
def test_tricks(name: str) -> None:
    def run(model: Detector) -> list[Prediction]:
        with inference(model, InferenceSettings(tricks=TRICKS[name])) as detect:
            return as_on_device(model, detect(eight_bits(), "two images"))

    check(run, detector())


def eight_bits() -> list[Tensor]:
    return [(image * 255).byte() for image in images()]


def as_on_device(model: nn.Module, found: list[Any]) -> list[Any]:
    """Move what a function left on the CPU to its model's device, where ``check`` looks for it."""
    assert all(value.device.type == "cpu" for one in found for value in one.values())
    device = next(model.parameters()).device
    return [{name: value.to(device) for name, value in one.items()} for one in found]


def test_prediction() -> None:
    def run(model: Detector) -> list[Any]:
        results = resdet.predict(model, eight_bits())
        return as_on_device(model, [{"boxes": one.boxes, "scores": one.scores} for one in results])

    check(run, detector())


def test_evaluation() -> None:
    """The detections that it measures: metrics are few numbers, which hide a difference."""
    model, dataset = detector(), resdet.wrap_dataset(list(zip(eight_bits(), targets(), strict=True)))

    def run(model: Detector) -> list[Any]:
        found = evaluate(model, dataset).detections
        columns = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
        return as_on_device(model, [{name: torch.from_numpy(value) for name, value in columns.items()}])

    check(run, model)


def step(model: Detector, *, clip: float | None = None) -> dict[str, Any]:
    """Two steps of two micro-batches of one image: accumulation, clipping, fused optimizer, average of the weights."""
    device = next(model.parameters()).device
    average = AveragedModel(model, 0.5)
    optimizer = build_optimizer(model, name="sgd", lr=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    batches = [
        Batch([image], [Target(**target, image_id=torch.tensor(index))], [index], [index])
        for index, (image, target) in enumerate(zip(eight_bits(), targets(), strict=True))
    ]
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        accumulate_gradients(
            lambda parallel, batch: detection_losses(model, parallel, batch, "fp32"), model.train(), batches, 1, scaler
        )
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norms.append(clip_grad_norm_(trained, clip))
        optimizer.step()
        average.update_parameters(model)
    return {"norms": norms, "model": dict(model.state_dict()), "average": dict(average.module.state_dict())}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["frozen", pytest.param("batch", marks=pytest.mark.slow)])
def test_steps_with_accumulation_clipping_and_average(norm: str) -> None:
    check(partial(step, clip=0.5), detector(norm=norm))


def test_a_step_waits_once_in_each_forward_pass(device_record: Record) -> None:
    """For how many regions each level has. Clipping, optimizer and average do not wait; but the copies of a batch."""
    model = to_pretend(detector())
    device_record.clear()
    step(model, clip=0.5)
    waits = Counter({line.partition(":")[0]: 0 for _, line in device_record.waits})
    for (_, line), number in device_record.waits.items():
        waits[line.partition(":")[0]] += number
    assert waits.pop("resdet/models/roi_align.py") == 4
    assert not {"resdet/training/step.py", "resdet/training/average.py", "tests/test_pretend_gpu_detector.py"} & set(
        waits
    )


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs a CPU with AVX512-VNNI")
def test_int8_is_calibrated_on_a_copy_on_the_cpu_and_stays_there() -> None:
    model, smooth = detector(box_score_thresh=0.05).eval(), [F.avg_pool2d(image, 5, 1) for image in images()]
    expected = quantize_detector(model, smooth)
    there = to_pretend(copy.deepcopy(model))
    found = quantize_detector(there, moved(smooth))
    assert next(there.parameters()).device == DEVICE
    state, wanted = found.state_dict(), expected.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in state.items() if isinstance(value, Tensor))
    with pytest.raises(UserError, match="int8 detector runs on the CPU"):
        found.to(DEVICE)


@pytest.mark.slow
def test_an_export_is_of_a_copy_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded, "is_queued", lambda device: device.type != "cpu")
    model = detector().eval()
    there = to_pretend(copy.deepcopy(model))
    outputs = []
    for number, exported in enumerate((model, there, changed(model))):
        export_detector(exported, tmp_path / str(number), format="torchscript")
        outputs.append(list(torch.jit.load(tmp_path / str(number))(eight_bits()[0])))
    assert next(there.parameters()).device == DEVICE
    compare(outputs[1], outputs[0])
    with pytest.raises(AssertionError):
        compare(outputs[2], outputs[0])
    with pytest.raises(RuntimeError, match=LEFT_BEHIND):
        left_behind(there)(moved(images()))
