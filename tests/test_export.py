"""Exported backbones: torchvision's names outside, the same outputs bit for bit inside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from resdet.errors import UserError, WeightsError
from resdet.export import export_backbone, load_backbone
from resdet.models.backbone import ResNetFPN, resnet_fpn
from resdet.models.detector import DetectorSpec, build_detector
from resdet.models.norm import calibrate_norm
from resdet.models.resnet import ResNet


def calibrated(**arguments: object) -> ResNetFPN:
    torch.manual_seed(0)
    backbone = resnet_fpn("resnet18", **arguments)  # type: ignore[arg-type]
    if arguments.get("norm", "frozen") == "frozen":
        calibrate_norm(backbone, [torch.randn(2, 3, 64, 64)])
    return backbone


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("include_fpn", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"norm": "batch", "norm_eps": 1e-3},
        {"norm": "group"},
        {"returned_layers": (2, 3, 4), "extra_blocks": "p6p7", "out_channels": 32},
        {"returned_layers": (1, 3)},
    ],
)
def test_the_loaded_backbone_computes_the_same(
    tmp_path: Path, arguments: dict[str, object], include_fpn: bool, fast: bool
) -> None:
    backbone = calibrated(fast=fast, **arguments).eval()
    path = export_backbone(backbone, tmp_path / "b.safetensors", include_fpn=include_fpn)
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
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]


def test_torchvision_loads_the_body_with_only_fc_missing(tmp_path: Path) -> None:
    spec = DetectorSpec(arch="resnet101")
    detector = build_detector(spec, num_classes=3)
    tensors = load_file(export_backbone(detector, tmp_path / "b.safetensors"))
    network = torchvision.models.resnet101(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    result = network.load_state_dict(tensors, strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"]
    assert result.unexpected_keys == []
    assert torch.equal(network.layer3[22].conv3.weight, detector.backbone.body.layer3[22].conv3.weight)


def test_an_exported_backbone_serves_as_first_weights(tmp_path: Path) -> None:
    backbone = calibrated()
    for include_fpn in (True, False):
        path = export_backbone(backbone, tmp_path / "b.safetensors", include_fpn=include_fpn)
        other = resnet_fpn("resnet18", weights=path)
        assert all(
            torch.equal(a, b)
            for a, b in zip(other.body.state_dict().values(), backbone.body.state_dict().values(), strict=True)
        )


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export_backbone(calibrated(), tmp_path / "b.safetensors")
    before = path.read_bytes()

    def full_disk(source: object, target: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("resdet.export.os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_backbone(ResNet("resnet18"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]


def test_wrong_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes a ResNet, a ResNetFPN or a detector on one, got Linear"):
        export_backbone(nn.Linear(1, 1), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="got a ResNet, which has no pyramid"):
        export_backbone(ResNet("resnet18"), tmp_path / "b.safetensors", include_fpn=True)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = export_backbone(calibrated(), tmp_path / "b.safetensors")
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
