"""First weights from files, torchvision's names, and the errors when they do not fit."""

from __future__ import annotations

import logging
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from resdet.errors import WeightsError
from resdet.models.backbone import resnet_fpn
from resdet.models.loading import load_backbone_weights
from resdet.models.norm import FrozenBatchNorm2d, has_fresh_frozen_norm
from resdet.models.resnet import ResNet
from resdet.weights import download
from resdet.weights.convert import from_torchvision
from resdet.weights.convert_file import convert_file
from resdet.weights.files import read_checkpoint
from resdet.weights.formats import tensors_in


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's cache, empty and apart from the user's."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def network(arch: str = "resnet18") -> dict[str, Tensor]:
    """A state dict as torchvision saves it: BatchNorm, fc, num_batches_tracked."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch, weights=None)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.normal_()
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return network()


@pytest.fixture
def file(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "resnet18.pth"
    torch.save(state, path)
    return path


def assert_holds(body: ResNet, state: dict[str, Tensor]) -> None:
    for name, value in body.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_file_of_torchvisions_is_used_and_accounted_for(
    file: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    body = ResNet("resnet18")
    with caplog.at_level(logging.INFO, "resdet"):
        report = load_backbone_weights(body, file, "resnet18")
    assert_holds(body, state)
    assert set(report.loaded) == set(body.state_dict())
    assert set(report.left_over) == {n for n in state if n.startswith("fc.") or n.endswith("num_batches_tracked")}
    assert f"100 tensors from {file}; left over: fc.weight, fc.bias and 20 num_batches_tracked" in caplog.text
    body.bn1.running_mean[3] += 1
    with pytest.raises(AssertionError, match=r"bn1\.running_mean"):
        assert_holds(body, state)


def test_real_weights_are_not_fresh(resnet18_file: Path) -> None:
    """Their norms are fused into the convolutions, so only the biases tell."""
    assert not has_fresh_frozen_norm(resnet_fpn("resnet18", weights=str(resnet18_file)))


def test_none_leaves_the_weights(state: dict[str, Tensor]) -> None:
    body = ResNet("resnet18")
    before = body.conv1.weight.clone()
    assert str(load_backbone_weights(body, None, "resnet18")) == "random weights"
    assert torch.equal(before, body.conv1.weight)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "body.", "backbone.body.", "module.backbone.body."])
def test_wrappers_and_prefixes_are_seen_through(
    tmp_path: Path, state: dict[str, Tensor], wrapper: str | None, prefix: str
) -> None:
    content: dict[str, object] = {prefix + name: value for name, value in state.items()}
    if "body" in prefix:
        content[prefix.replace("body.", "fpn.x")] = torch.zeros(1)
    if wrapper:
        content = {wrapper: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pt")
    body = ResNet("resnet18")
    load_backbone_weights(body, tmp_path / "w.pt", "resnet18")
    assert_holds(body, state)


def test_safetensors_and_batch_norm(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file({n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}, tmp_path / "w.safetensors")
    body = ResNet("resnet18", norm="batch")
    report = load_backbone_weights(body, tmp_path / "w.safetensors", "resnet18")
    assert_holds(body, state)  # num_batches_tracked is absent from the file and stays 0
    assert report.left_over == ("fc.bias", "fc.weight")


def test_a_shorter_body_leaves_stages_over(file: Path) -> None:
    report = load_backbone_weights(ResNet("resnet18", returned_layers=(1, 2)), file, "resnet18")
    assert "layer3.0.conv1.weight" in report.left_over


@pytest.mark.parametrize(
    ("built", "given", "message"),
    [
        ("resnet50", "resnet18", r"does not fit this resnet50.*without layer1.0.conv3.weight.*looks like resnet18"),
        ("resnet18", "resnet34", r"does not fit this resnet18.*with layer1.2.conv1.weight.*looks like resnet34"),
        # A ResNet-101 holds every tensor of a ResNet-50, under the same names and in the same shapes.
        ("resnet50", "resnet101", r"with layer3.6.conv1.weight.*and 251 more; it looks like resnet101"),
        ("resnet50", "wide_resnet50_2", r"layer1.0.conv1.weight is \[128, 64, 1, 1\] and not \[64, 64, 1, 1\]"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(tmp_path: Path, built: str, given: str, message: str) -> None:
    torch.save(network(given), tmp_path / "w.pth")
    body = ResNet(built)
    before = body.conv1.weight.clone()
    with pytest.raises(WeightsError, match=message) as caught:
        load_backbone_weights(body, tmp_path / "w.pth", built)
    assert "\n" not in str(caught.value)
    assert torch.equal(before, body.conv1.weight)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({n: v for n, v in state.items() if not n.startswith("layer3.1.bn2")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"without layer3.1.bn2.weight, .*layer3.1.bn2.running_var$"):
        load_backbone_weights(ResNet("resnet18"), tmp_path / "w.pth", "resnet18")
    torch.save(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"conv1.weight is \[64, 1, 7, 7\] and not \[64, 3, 7, 7\]$"):
        load_backbone_weights(ResNet("resnet18"), tmp_path / "w.pth", "resnet18")


def test_batch_norm_weights_do_not_become_group_norm(file: Path) -> None:
    with pytest.raises(WeightsError, match=r"resnet18 with norm='group': with bn1.running_mean"):
        load_backbone_weights(ResNet("resnet18", norm="group"), file, "resnet18")


def test_unreadable_files_are_one_line(tmp_path: Path, file: Path) -> None:
    (tmp_path / "short.pth").write_bytes(file.read_bytes()[:100_000])
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "empty.pth").touch()
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"lr": 0.1}, tmp_path / "plain.pth")
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"conv1.weight": torch.zeros(1), "optimizer": Path("x").parent}, tmp_path / "code.pth")
    for name, message in [
        ("absent.pth", "there is no such file"),
        ("", "must be a checkpoint or the folder of a run, but this folder holds no best.pt"),
        ("short.pth", "damaged"),
        ("short.safetensors", "damaged"),
        ("text.pth", "damaged"),
        ("empty.pth", "damaged"),
        ("list.pth", "must hold a dictionary of named tensors, got list"),
        ("plain.pth", "holds no tensors; its keys are lr"),
        ("other.pth", "holds no ResNet that is known here: .*: head.weight"),
        ("code.pth", r"would run code of its own \(pathlib\.\w+\), which is refused"),
    ]:
        with pytest.raises(WeightsError, match=message) as caught:
            load_backbone_weights(ResNet("resnet18"), tmp_path / name, "resnet18")
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)


def test_tensors_in_keeps_types_and_read_checkpoint_plain_values(tmp_path: Path) -> None:
    torch.save({"model": {"module.a": torch.ones(2, dtype=torch.int64)}, "step": 3}, tmp_path / "w.pt")
    assert tensors_in(read_checkpoint(tmp_path / "w.pt"), "w.pt")["a"].dtype == torch.int64
    assert read_checkpoint(tmp_path / "w.pt")["step"] == 3


@pytest.mark.parametrize("source", ["IMAGENET1K_V1", "DEFAULT", ResNet18_Weights.IMAGENET1K_V1])
def test_torchvisions_names_find_the_cached_file(hub: Path, state: dict[str, Tensor], source: object) -> None:
    hub.mkdir(parents=True)
    torch.save(state, hub / "resnet18-f37072fd.pth")
    backbone = resnet_fpn("resnet18", weights=source)  # type: ignore[arg-type]
    assert_holds(backbone.body, state)


def test_unknown_names_are_corrected() -> None:
    for source, message in [
        ("IMAGENET1K_V3", "no weights of resnet50; did you mean 'IMAGENET1K_V"),
        ("imagenet1k_v1", "did you mean 'IMAGENET1K_V1'"),
        ("coco", "no weights of resnet50; known are IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, detectron2_r50_fpn_1x, "),
        (ResNet18_Weights.DEFAULT, "are not for resnet50, whose weights are ResNet50_Weights.IMAGENET1K_V1"),
    ]:
        with pytest.raises(WeightsError, match=message):
            resnet_fpn("resnet50", weights=source)  # type: ignore[arg-type]


def test_without_network_the_error_says_what_to_fetch_and_where_to_put_it(
    hub: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError(OSError("Temporary failure in name resolution"))

    monkeypatch.setattr(download._OPENER, "open", no_network)
    with pytest.raises(WeightsError) as caught:
        resnet_fpn("resnet50", weights=ResNet50_Weights.IMAGENET1K_V1)
    message = str(caught.value)
    address = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    assert f"{address}: cannot be downloaded (Temporary failure in name resolution)" in message
    path = message.rpartition(" at ")[2]
    assert path == str(hub / "resnet50-0676ba61.pth")
    torch.save(network("resnet50"), path)
    resnet_fpn("resnet50", weights="IMAGENET1K_V1")


def test_file_urls_are_read_in_place(file: Path, hub: Path, state: dict[str, Tensor]) -> None:
    assert_holds(resnet_fpn("resnet18", weights=file.as_uri()).body, state)
    assert not hub.exists()
    with pytest.raises(WeightsError, match="there is no such file"):
        resnet_fpn("resnet18", weights=file.with_name("gone.pth").as_uri())


def random_body(*, stride_in_1x1: bool) -> ResNet:
    torch.manual_seed(0)
    body = ResNet("resnet50", stride_in_1x1=stride_in_1x1)
    for norm in body.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.bias.normal_()
    return body


def assert_same_levels(body: ResNet, source: ResNet) -> None:
    """Within rounding: a file without norm statistics keeps 1 - eps, which is eps nearly undone."""
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        levels, expected = body(images), source(images)
    for name in expected:
        torch.testing.assert_close(levels[name], expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].max()))


def test_msra_blobs_are_first_weights_where_the_body_strides_as_theirs(tmp_path: Path) -> None:
    source = random_body(stride_in_1x1=True)
    torch.save({"blobs": from_torchvision(source.state_dict(), "detectron")}, tmp_path / "R-50.pth")
    body = ResNet("resnet50", stride_in_1x1=True)
    load_backbone_weights(body, tmp_path / "R-50.pth", "resnet50")
    assert_same_levels(body, source)
    with pytest.raises(WeightsError, match="stride in the first 1x1 convolution"):
        load_backbone_weights(ResNet("resnet50"), tmp_path / "R-50.pth", "resnet50")
    body.conv1.weight.data = body.conv1.weight.data.flip(1)
    with pytest.raises(AssertionError):
        assert_same_levels(body, source)


@pytest.mark.parametrize("library", ["mmdetection-caffe", "timm"])
def test_converted_backbones_are_first_weights(library: str, tmp_path: Path) -> None:
    """mmdetection's caffe style has torchvision's names and BGR stems: what we wrote ourselves says so."""
    source = random_body(stride_in_1x1=False)
    torch.save(source.state_dict(), tmp_path / "source.pth")
    convert_file(tmp_path / "source.pth", library, tmp_path / "converted.pth")
    body = ResNet("resnet50")
    load_backbone_weights(body, tmp_path / "converted.pth", "resnet50")
    assert_same_levels(body, source)
