"""Exported backbones: torchvision's names outside, the same outputs inside, in every format."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import resdet.export.backbone
from resdet.errors import UserError, WeightsError
from resdet.export.backbone import export_backbone, load_backbone
from resdet.export.compare import FEATURE_TOLERANCE, ExportError
from resdet.models.backbone import ResNetFPN, resnet_fpn
from resdet.models.detector import build_detector
from resdet.models.norm import calibrate_norm
from resdet.models.resnet import ResNet
from resdet.models.spec import DetectorSpec


def calibrated(**arguments: object) -> ResNetFPN:
    torch.manual_seed(0)
    backbone = resnet_fpn(**{"arch": "resnet18", **arguments})  # type: ignore[arg-type]
    if arguments.get("norm", "frozen") == "frozen":
        calibrate_norm(backbone, [torch.randn(2, 3, 64, 64)])
    return backbone


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("include_fpn", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"norm": "batch", "norm_eps": 1e-3},
        {"norm": "group"},
        {"returned_layers": (2, 3, 4), "extra_blocks": "p6p7", "out_channels": 32},
        {"returned_layers": (1, 3)},
        {"arch": "resnet50", "stride_in_1x1": True},
    ],
)
def test_the_loaded_backbone_computes_the_same(
    tmp_path: Path, arguments: dict[str, object], include_fpn: bool, fast: bool
) -> None:
    backbone = calibrated(fast=fast, **arguments).eval()
    path = export_backbone(backbone, tmp_path / "b.safetensors", include_fpn=include_fpn).path
    loaded = load_backbone(path, fast=fast).eval()
    exported = backbone if include_fpn else backbone.body
    assert type(loaded) is type(exported)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, levels = exported(images), loaded(images)
        assert list(levels) == list(expected)
        assert all(torch.equal(levels[name], expected[name]) for name in levels)
        next(loaded.parameters()).mul_(1.01)
        assert not torch.equal(loaded(images)["0"], expected["0"])
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in exported.parameters()]
    assert names_in(tmp_path) == ["README.md", "b.safetensors", "b.safetensors.json"]


def test_torchvision_loads_the_body_with_only_fc_missing(tmp_path: Path) -> None:
    spec = DetectorSpec(arch="resnet101")
    detector = build_detector(spec, num_classes=3)
    tensors = load_file(export_backbone(detector, tmp_path / "b.safetensors").path)
    network = torchvision.models.resnet101(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    result = network.load_state_dict(tensors, strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"]
    assert result.unexpected_keys == []
    assert torch.equal(network.layer3[22].conv3.weight, detector.backbone.body.layer3[22].conv3.weight)


def test_an_exported_backbone_serves_as_first_weights(tmp_path: Path) -> None:
    backbone = calibrated()
    for include_fpn in (True, False):
        path = export_backbone(backbone, tmp_path / "b.safetensors", include_fpn=include_fpn).path
        other = resnet_fpn("resnet18", weights=path)
        assert all(
            torch.equal(a, b)
            for a, b in zip(other.body.state_dict().values(), backbone.body.state_dict().values(), strict=True)
        )


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export_backbone(calibrated(), tmp_path / "b.safetensors").path
    before = path.read_bytes()

    def full_disk(source: object, target: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("resdet.export.backbone.os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_backbone(ResNet("resnet18"), path)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["README.md", "b.safetensors", "b.safetensors.json"]


def test_wrong_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes a ResNet, a ResNetFPN or a detector on one, got Linear"):
        export_backbone(nn.Linear(1, 1), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="got a ResNet, which has no pyramid"):
        export_backbone(ResNet("resnet18"), tmp_path / "b.safetensors", include_fpn=True)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = export_backbone(calibrated(), tmp_path / "b.safetensors").path
    with pytest.raises(WeightsError, match="there is no such file"):
        load_backbone(tmp_path / "absent.safetensors")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="is damaged"):
        load_backbone(tmp_path / "short.safetensors")
    tensors = load_file(path)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match=r"was not written by export_backbone.*resnet_fpn\(arch, weights=path\)"):
        load_backbone(tmp_path / "plain.safetensors")
    about = {"format": "resdet-backbone-1", "backbone": '{"arch": "resnet34"}'}
    save_file(tensors, tmp_path / "odd.safetensors", about)
    with pytest.raises(WeightsError, match="do not fit together"):
        load_backbone(tmp_path / "odd.safetensors")


Run = Callable[[Tensor], dict[str, Tensor]]


def load(path: Path, format: str) -> Run:
    """Load a file as its reader would, with nothing of ours."""
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, which is in the dev extra")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda images: dict(
            zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True)
        )
    if format == "openvino":
        openvino = pytest.importorskip("openvino", reason="needs openvino, which is in the dev extra")
        network = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = [output.any_name for output in network.outputs]
        return lambda images: {
            name: torch.from_numpy(network({"images": images.numpy()})[name].copy()) for name in names
        }
    module: Run = torch.jit.load(path) if format == "torchscript" else torch.export.load(path).module()
    return module


SUFFIXES = {"torchscript": ".pt", "export": ".pt2", "onnx": ".onnx", "openvino": ".xml"}


@pytest.mark.parametrize(
    ("format", "include_fpn"),
    [
        ("torchscript", False),
        pytest.param("torchscript", True, marks=pytest.mark.slow),
        ("export", False),
        pytest.param("export", True, marks=pytest.mark.slow),
        pytest.param("onnx", True, marks=pytest.mark.slow),
        pytest.param("openvino", False, marks=pytest.mark.slow),
        pytest.param("openvino", True, marks=pytest.mark.slow),
    ],
)
def test_exported_networks_take_any_batch_and_size(tmp_path: Path, format: Any, include_fpn: bool) -> None:
    """Odd sizes too, and not only those that the export itself compares."""
    if format in ("onnx", "openvino"):
        package = {"onnx": "onnxscript", "openvino": "openvino"}[format]
        pytest.importorskip(package, reason=f"needs {package}, which is in the dev extra")
    backbone = calibrated().eval()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    path = tmp_path / f"b{SUFFIXES[format]}"
    report = export_backbone(backbone, path, include_fpn=include_fpn, format=format)
    assert report.differences["features"] <= report.tolerances["features"] == FEATURE_TOLERANCE
    assert report.speed_ratio is not None
    assert names_in(tmp_path) == sorted(
        ["README.md", path.name, *(["b.bin"] if format == "openvino" else []), f"{path.name}.json"]
    )
    assert sorted(file.name for file in (path, *report.beside)) == names_in(tmp_path)

    run = load(path, format)
    exported = backbone if include_fpn else backbone.body
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 3, 96, 128), (3, 3, 65, 97), (2, 3, 160, 70)):
        images = torch.randn(shape, generator=generator)
        with torch.no_grad():
            maps, expected = run(images), exported(images)
        if format in ("onnx", "openvino"):
            letter = "P" if include_fpn else "C"
            assert list(maps) == [f"{letter}{int(math.log2(stride))}" for stride in exported.strides]
        else:
            assert list(maps) == list(expected)
        for one, other in zip(maps.values(), expected.values(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=FEATURE_TOLERANCE * float(other.abs().max()))
            with pytest.raises(AssertionError):
                torch.testing.assert_close(1.01 * one, other, rtol=0, atol=FEATURE_TOLERANCE * float(other.abs().max()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert [p.requires_grad for p in backbone.parameters()] == [p.requires_grad for p in calibrated().parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torchscript", "export", "onnx", "openvino"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"norm": "batch", "trainable_layers": 3},
        {"norm": "group"},
        {"returned_layers": (2, 3, 4), "extra_blocks": "p6p7", "out_channels": 32},
        {"fast": False},
        {"arch": "resnet50", "stride_in_1x1": True},
        {"arch": "resnext50_32x4d"},
        {"arch": "resnet101"},
    ],
)
def test_every_kind_of_backbone_exports(tmp_path: Path, format: str, arguments: dict[str, object]) -> None:
    for include_fpn in (False, True):
        folder = tmp_path / str(include_fpn)
        folder.mkdir()
        backbone = calibrated(**arguments)
        report = export_backbone(backbone, folder / f"b{SUFFIXES[format]}", include_fpn=include_fpn, format=format)
        assert report.differences["features"] <= FEATURE_TOLERANCE


def test_norms_are_folded_and_the_report_is_kept(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx, which is in the dev extra")
    spec = DetectorSpec(arch="resnet18", image_mean=(0.1, 0.2, 0.3))
    detector = build_detector(spec, num_classes=3)
    calibrate_norm(detector.backbone, [torch.randn(2, 3, 64, 64)])
    report = export_backbone(detector, tmp_path / "b.onnx", format="onnx")
    graph = onnx.load(report.path).graph
    assert {node.op_type for node in graph.node} == {"Conv", "Relu", "MaxPool", "Add"}
    assert [dimension.dim_param != "" for dimension in graph.input[0].type.tensor_type.shape.dim] == [1, 0, 1, 1]
    about = json.loads((tmp_path / "b.onnx.json").read_text())
    assert about["arch"] == "resnet18"
    assert about["outputs"] == ["C2", "C3", "C4", "C5"]
    assert about["image_mean"] == [0.1, 0.2, 0.3]
    assert about["checked"]["differences"] == report.differences
    assert about["checked"]["speed_ratio"] == report.speed_ratio
    assert about["checked"]["sizes"] == [list(size) for size in report.sizes] == [[224, 320], [321, 225]]
    assert str(report).startswith("body as onnx, compared at 224x320 and 321x225: features ")


def shift_a_bias(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have exports written of a body that computes something else than the one they are compared with."""
    folded_copy = resdet.export.backbone.folded_copy

    def wrong(module: nn.Module) -> nn.Module:
        folded = folded_copy(module)
        with torch.no_grad():
            folded.get_submodule(block).conv2.bias.add_(0.1)  # type: ignore[operator, union-attr]
        return folded

    monkeypatch.setattr("resdet.export.backbone.folded_copy", wrong)


def test_a_file_that_computes_something_else_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift_a_bias("layer4.1", monkeypatch)
    (tmp_path / "b.pt").write_text("what was there before")
    with pytest.raises(ExportError, match=r"b\.pt: not written, .* features .* \(at most 0.0005\)"):
        export_backbone(calibrated(), tmp_path / "b.pt", format="torchscript")
    assert names_in(tmp_path) == ["b.pt"]
    assert (tmp_path / "b.pt").read_text() == "what was there before"


@pytest.mark.slow
def test_openvinos_pair_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the second half fails, and between the two renames no file stands beside a half of another pair."""
    pytest.importorskip("openvino", reason="needs openvino, which is in the dev extra")
    backbone = calibrated(returned_layers=(1,))
    path = export_backbone(backbone, tmp_path / "b.xml", format="openvino").path
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    run, images = load(path, "openvino"), torch.randn(1, 3, 64, 64)
    expected = run(images)["C2"]
    shift_a_bias("layer1.1", monkeypatch)
    with pytest.raises(ExportError, match=r"b\.xml: not written, because"):
        export_backbone(backbone, path, format="openvino")
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old
    assert torch.equal(load(path, "openvino")(images)["C2"], expected)

    states: list[tuple[bool, bool]] = []
    real = os.replace

    def watched(source: Any, target: Any) -> None:
        if str(target).startswith(str(tmp_path / "b.")) and Path(target).suffix in (".xml", ".bin"):
            states.append((path.exists(), path.with_suffix(".bin").read_bytes() == old["b.bin"]))
        real(source, target)

    monkeypatch.setattr("resdet.files.os.replace", watched)
    export_backbone(resnet_fpn("resnet18", returned_layers=(1,)), path, format="openvino")
    assert states == [(False, True), (False, False)]


@pytest.mark.slow
def test_a_backbone_in_onnx_runs_in_openvino(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript, which is in the dev extra")
    pytest.importorskip("openvino", reason="needs openvino, which is in the dev extra")
    backbone = calibrated().eval()
    run = load(export_backbone(backbone, tmp_path / "b.onnx", format="onnx", include_fpn=True).path, "openvino")
    for shape in ((1, 3, 96, 128), (2, 3, 65, 97)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = list(backbone(images).values())
        for one, other in zip(run(images).values(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=FEATURE_TOLERANCE * float(other.abs().max()))


def test_timm_has_torchvisions_names_and_no_pyramid(tmp_path: Path) -> None:
    backbone = calibrated()
    ours = load_file(export_backbone(backbone, tmp_path / "a").path)
    theirs = load_file(export_backbone(backbone, tmp_path / "b", names="timm").path)
    assert ours.keys() == theirs.keys()
    with pytest.raises(UserError, match="timm has no pyramid"):
        export_backbone(backbone, tmp_path / "c", names="timm", include_fpn=True)
    with pytest.raises(UserError, match="names must be torchvision or timm, got 'keras'"):
        export_backbone(backbone, tmp_path / "c", names="keras")  # type: ignore[arg-type]


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = ResNet("resnet18")
    with pytest.raises(
        UserError, match="must be one of safetensors, torchscript, export, onnx, openvino, got 'tflite'"
    ):
        export_backbone(body, tmp_path / "b", format="tflite")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"absent/b: its directory does not exist"):
        export_backbone(body, tmp_path / "absent" / "b")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnxruntime is not installed: pip install onnx onnxruntime onnxscript"):
        export_backbone(body, tmp_path / "b", format="onnx")
    with pytest.raises(UserError) as caught:
        export_backbone(body, tmp_path / "b.onnx", format="openvino")
    assert str(caught.value) == (
        f"{tmp_path}/b.onnx: the openvino format is a pair of files, NAME.xml and NAME.bin: give NAME.xml"
    )
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError) as caught:
        export_backbone(body, tmp_path / "b.xml", format="openvino")
    assert str(caught.value) == (
        "the openvino format needs openvino, onnx, and openvino is not installed: pip install openvino onnx (this "
        "package's extra [openvino])"
    )
    assert names_in(tmp_path) == []
