"""``train.compile``: what is compiled, that it computes the same, and what a run with it leaves."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import logged, train_here
from torch import Tensor

from resdet.errors import UserError
from resdet.models.backbone import ResNetFPN
from resdet.models.detector import Detector, build_detector
from resdet.models.norm import calibrate_norm
from resdet.models.spec import DetectorSpec
from resdet.precision import Precision, autocast
from resdet.training import compiled
from resdet.training.compiled import compile_detector, compile_network, without_compiled_code

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, g++")


def small_detector(norm: str = "frozen", layout: str = "fpn", arch: str = "resnet18") -> Detector:
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch=arch, norm=norm, layout=layout, min_size=64, max_size=64, out_channels=16, box_head_channels=16
    )
    model = build_detector(spec, num_classes=3, trainable_layers=3)
    if norm == "frozen":
        calibrate_norm(model.backbone.body, [torch.rand(2, 3, 64, 64)])
    return model.train()


def gradients(model: Detector, precision: Precision = "fp32", seed: int = 1) -> dict[str, Tensor]:
    """Compute the losses of two random images, forward and backward; return them with all gradients."""
    torch.manual_seed(seed)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[5.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])} for _ in images]
    with autocast(CPU, precision):
        losses: dict[str, Tensor] = model(images, targets)
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    return losses | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differs(values: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of a value, relative to its norm."""
    assert values.keys() == expected.keys()
    distances = [(values[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-6) for name in expected]
    return max(distance.item() for distance in distances)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
def test_body_and_pyramid_are_one_graph(norm: str) -> None:
    """Whatever would end a graph, a hook or a value that is read, is an error here."""
    backbone = small_detector(norm).backbone
    assert isinstance(backbone, ResNetFPN)
    images = torch.rand(2, 3, 64, 64)
    whole = torch.compile(copy.deepcopy(backbone), backend="eager", fullgraph=True, dynamic=False)
    assert differs(whole(images), backbone(images)) < 1e-4, "float32, norms folded into weights or not"


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "arch"), [("c4", "resnet18"), ("dc5", "resnet50"), ("fpn", "vgg16_bn")])
def test_bodies_of_other_layouts_are_one_graph(layout: str, arch: str) -> None:
    backbone = small_detector("frozen", layout, arch).backbone
    torch.compile(backbone, backend="eager", fullgraph=True, dynamic=False)(torch.rand(2, 3, 64, 64))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("norm", "tolerance"), [("frozen", 1e-4), ("batch", 1e-3)])
def test_losses_and_gradients_are_those_without(norm: str, tolerance: float) -> None:
    """In float32, but for the order of sums, which statistics of a few pixels magnify."""
    model = small_detector(norm)
    expected, other = copy.deepcopy(model), copy.deepcopy(model)
    compile_network(model.backbone, CPU)
    assert list(model.state_dict()) == list(expected.state_dict())
    wanted = gradients(expected)
    assert differs(gradients(model), wanted) < tolerance
    with torch.no_grad():
        model.backbone.body.layer3[0].conv1.weight.mul_(1.5)
        other.backbone.body.layer3[0].conv1.weight.mul_(1.5)
    assert differs(gradients(model), wanted) > 10 * tolerance, "weights are not constants of the program"
    if norm == "frozen":  # the statistics of a trained norm have moved on
        assert differs(gradients(model), gradients(other)) < tolerance


@needs_compiler
@pytest.mark.slow
def test_in_reduced_precision_it_is_as_near_to_float32() -> None:
    """Both round to bfloat16's 8 bits, at other places: neither is right, so float32 judges."""
    model = small_detector()
    plain = copy.deepcopy(model)
    compile_network(model.backbone, CPU)
    exact = gradients(plain)
    with_it, without = (differs(gradients(one, "bf16"), exact) for one in (model, plain))
    assert 1e-3 < with_it < 1.5 * without


@pytest.mark.parametrize(
    ("sizes", "padded"),
    [
        ([(200, 300)], (224, 384)),
        ([(300, 200), (310, 100)], (384, 224)),
        ([(128, 128)], (128, 128)),
        ([(129, 60)], (256, 64)),
    ],
)
def test_the_longer_side_is_a_multiple_of_128_in_training(
    monkeypatch: pytest.MonkeyPatch, sizes: list[tuple[int, int]], padded: tuple[int, int]
) -> None:
    monkeypatch.setattr(compiled, "compile_network", lambda *_: None)
    model = small_detector()
    model.transform.min_size, model.transform.max_size = (min(sizes[0]),), 400
    images = [torch.rand(3, *sizes[0])]
    usual, _ = model.transform(images)
    compile_detector(model, CPU)
    batch, _ = model.transform(images)
    assert model.transform.padded_size(sizes) == padded
    assert batch.tensors.shape[-2:] == model.transform.padded_size(sizes[:1])
    assert batch.image_sizes == usual.image_sizes
    height, width = usual.tensors.shape[-2:]
    assert torch.equal(batch.tensors[..., :height, :width], usual.tensors)
    assert not batch.tensors[..., height:, :].any()
    assert not batch.tensors[..., width:].any()
    on_padded_path, _ = model.transform.pad(images, CPU)
    assert on_padded_path.shape == batch.tensors.shape
    model.eval()
    assert model.transform(images)[0].tensors.shape == usual.tensors.shape


def test_evaluation_and_copies_run_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> object:
        calls.append("compiled")
        return graph.forward

    network = torch.nn.Sequential(torch.nn.Linear(3, 3))
    network.compile(backend=backend, dynamic=False)
    with without_compiled_code(True):
        network(torch.ones(1, 3))
    copy.deepcopy(network)(torch.ones(2, 3))
    assert not calls
    with without_compiled_code(False):
        network(torch.ones(1, 3))
    assert calls == ["compiled"]


def test_what_cannot_compile_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object, **_settings: object) -> object:
        raise RuntimeError(
            "InvalidCxxCompiler: No working C++ compiler found in (None, 'g++')\n\nSet TORCHDYNAMO_VERBOSE"
        )

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"train\.compile: .*for cpu .*No working C\+\+ compiler found"):
        compile_network(torch.nn.Linear(1, 1), CPU)


@needs_compiler
@pytest.mark.slow
def test_a_run_with_it_is_resumed_and_ends_like_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps with an average, two of them before it is resumed. Losses agree to float32's rounding, grown."""
    settings = (
        "optim.warmup_steps=0",
        "optim.schedule=constant",
        "train.ema_decay=0.5",
        "train.steps=3",
        "model.min_size=64",
        "eval.loss=true",
    )
    monkeypatch.setattr(compiled, "SIDE_MULTIPLE", 32)
    train_here(tmp_path / "plain", *settings)
    train_here(tmp_path / "whole", *settings, "train.compile=true")
    train_here(tmp_path / "parts", *settings, "train.compile=true", "train.steps=2")
    train_here(tmp_path / "parts", *settings, "train.compile=true", "resume=auto")
    files = {name: torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("plain", "whole", "parts")}
    assert list(files["plain"]["model"]) == list(files["whole"]["model"]) == list(files["parts"]["model"])
    for name in ("loss", "grad_norm"):
        assert logged(tmp_path / "whole", name) == pytest.approx(logged(tmp_path / "plain", name), rel=1e-2)
        assert logged(tmp_path / "parts", name) == logged(tmp_path / "whole", name), "the same bits"
