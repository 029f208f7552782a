"""The network in a file is found by its own names, whatever dictionaries and modules it was wrapped in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from resdet.errors import WeightsError
from resdet.models.backbone import resnet_fpn
from resdet.models.checkpoint import load_detector
from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec, WeightsOrigin
from resdet.weights.convert import from_torchvision
from resdet.weights.convert_file import convert_file
from resdet.weights.files import read_weights
from resdet.weights.networks import find_network

PREFIXES = [
    "_orig_mod.",
    "model.",
    "net.",
    "encoder.",
    "module.module.",
    "module.encoder_q.",
    "backbone.0.body.",
    "backbone.body.",
    "model.backbone.",
    "module._orig_mod.backbone.",
    "visual.trunk.",
    "0.",
]
WRAPPERS: list[tuple[str, ...]] = [
    (),
    ("state_dict",),
    ("student",),
    ("teacher",),
    ("model", "teacher"),
    ("checkpoint", "state_dict", "model"),
    ("ema",),
]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(torchvision.models.resnet18(num_classes=3).state_dict())


def wrapped(tensors: dict[str, Tensor], prefix: str, keys: tuple[str, ...], **beside: Any) -> dict[str, Any]:
    content: dict[str, Any] = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    for key in reversed(keys):
        content = {key: content}
    return content | beside


@pytest.mark.parametrize("keys", WRAPPERS, ids=lambda keys: ".".join(keys) or "bare")
@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_one_network_under_any_prefix(state: dict[str, Tensor], prefix: str, keys: tuple[str, ...]) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(1)}}, "named": dict(state)}
    content = wrapped(state, prefix, keys, optimizer=optimizer, epoch=3)
    tensors = find_network(content, "file").tensors
    found = {name.removeprefix("body.").removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    assert {name.removeprefix("body."): tensor for name, tensor in found.items()} == state


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixed_checkpoints_are_first_weights(
    tmp_path: Path, state: dict[str, Tensor], prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = {f"{prefix}{name}": tensor for name, tensor in state.items()} | {"head.weight": torch.zeros(2)}
    torch.save({"state_dict": content}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "resdet"):
        backbone = resnet_fpn("resnet18", weights=tmp_path / "w.pth")
    assert all(torch.equal(value, state[name]) for name, value in backbone.body.state_dict().items())
    if prefix not in ("backbone.body.",):
        assert "taking the network under the prefix 'state_dict." in caplog.text
    assert "head.weight" in caplog.text  # left over


@pytest.mark.parametrize("library", ["detectron2", "mmdetection", "maskrcnn-benchmark", "torchvision"])
@pytest.mark.parametrize("prefix", ["model.", "student.module.", "net._orig_mod."])
def test_whole_detectors_under_a_prefix(tmp_path: Path, library: str, prefix: str) -> None:
    torch.manual_seed(0)
    source = build_detector(DetectorSpec(arch="resnet18", out_channels=8, box_head_channels=8), num_classes=4)
    tensors = from_torchvision(source.state_dict(), library)
    torch.save({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, tmp_path / "w.pth")
    file = read_weights(tmp_path / "w.pth", WeightsOrigin(format=library))
    assert file.kind == "detector"
    model = load_detector(file)
    for name, tensor in model.state_dict().items():
        if name != "backbone.body.conv1.weight" and "box_predictor" not in name:
            assert torch.equal(tensor, source.state_dict()[name]), name


def test_several_networks_are_listed_and_chosen_by_prefix(tmp_path: Path, state: dict[str, Tensor]) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    cases = {
        "dictionaries": {"student": state, "teacher": {f"module.backbone.{n}": t for n, t in other.items()}},
        "modules": {
            "state_dict": {
                f"module.encoder_{key}.{name}": t for key, s in (("q", state), ("k", other)) for name, t in s.items()
            }
        },
    }
    for (name, content), chosen in zip(cases.items(), ("teacher", "encoder_k"), strict=True):
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        with pytest.raises(
            WeightsError, match=r"holds 2 networks, under the prefixes .*weights_origin\.prefix"
        ) as caught:
            resnet_fpn("resnet18", weights=path)
        assert chosen in str(caught.value)
        file = read_weights(path, WeightsOrigin(prefix=chosen))
        body = resnet_fpn("resnet18", weights=file).body
        assert torch.equal(body.conv1.weight, other["conv1.weight"])
        with pytest.raises(
            WeightsError, match=r"no network under the prefix 'decoder'; the prefixes of those it has: '"
        ):
            read_weights(path, WeightsOrigin(prefix="decoder"))
        convert_file(path, "torchvision", tmp_path / "out.pth", origin=WeightsOrigin(prefix=chosen))
        assert torch.equal(read_weights(tmp_path / "out.pth").tensors["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("average", ["ema_state_dict", "state_dict_ema", "model_ema"])
def test_the_state_dict_goes_before_its_average(
    tmp_path: Path, state: dict[str, Tensor], average: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": state, average: other}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "resdet"):
        body = resnet_fpn("resnet18", weights=tmp_path / "w.pth").body
    assert torch.equal(body.conv1.weight, state["conv1.weight"])
    assert f"not taking the networks under '{average}.'" in caplog.text
    body = resnet_fpn("resnet18", weights=read_weights(tmp_path / "w.pth", WeightsOrigin(prefix=average))).body
    assert torch.equal(body.conv1.weight, other["conv1.weight"])


def test_a_dictionary_in_itself_ends(state: dict[str, Tensor]) -> None:
    content: dict[str, Any] = {"student": dict(state)}
    content["self"] = content["student"]["self"] = content
    assert find_network(content, "file").prefix == "student."


def test_a_network_that_is_not_known_is_returned_as_it_is() -> None:
    content = {"state_dict": {"module.a": torch.zeros(1), "module.b": torch.zeros(1)}}
    assert list(find_network(content, "file").tensors) == ["a", "b"]
