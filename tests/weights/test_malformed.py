"""Checkpoints of ours whose structure is not what it must be: one line that names the file and what must hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resdet.build import config_of_checkpoint
from resdet.classification.build import eval_config
from resdet.classification.model import classifier_payload, load_classifier, make_classifier
from resdet.classification.spec import ClassifierSpec
from resdet.errors import UserError, WeightsError
from resdet.models.checkpoint import checkpoint_payload, load_detector
from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec
from resdet.training.checkpoint import load_training_state
from resdet.types import Category

SPEC = DetectorSpec(arch="resnet18", out_channels=8, box_head_channels=8, min_size=64, max_size=96)
SCORES = "roi_heads.box_predictor.cls_score.weight"


@pytest.fixture(scope="module")
def payload() -> dict[str, Any]:
    categories = tuple(Category(k, k, name) for k, name in enumerate(("circle", "square"), 1))
    return checkpoint_payload(build_detector(SPEC, num_classes=3, categories=categories))


def refusal(read: Callable[[Path], object], content: Any, path: Path) -> str:
    torch.save(content, path)
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message


def classes(**changed: Any) -> dict[str, Any]:
    first = {"label": 1, "category_id": 1, "name": "circle"} | changed
    return {"categories": [first, {"label": 2, "category_id": 2, "name": "square"}]}


DETECTORS: dict[str, tuple[dict[str, Any], str]] = {
    "an infinite label": (classes(label=math.inf), "class 1 of 2 must be a mapping with 'label': 1"),
    "a fraction as a label": (classes(label=1.0), "class 1 of 2 must be a mapping with 'label': 1"),
    "a label twice": (classes(label=2), "class 1 of 2 must be a mapping with 'label': 1"),
    "an infinite id": (classes(category_id=math.inf), "a whole number 'category_id'"),
    "an id that is a tensor": (classes(category_id=torch.tensor([1, 2])), "a whole number 'category_id'"),
    "a name that is no text": (classes(name=7), "a text 'name'"),
    "classes that are no list": ({"categories": {"a": 1}}, "classes must be a list, got a dict"),
    "a class that is no mapping": ({"categories": [1, 2]}, "class 1 of 2 must be a mapping"),
    "no classes": ({"categories": None}, "classes must be a list, got a NoneType"),
    "a spec that is no mapping": ({"spec": 3}, "its spec is not one of this version"),
    "a spec of another type": ({"spec": {"arch": 7}}, "its spec is not one of this version"),
    "a spec of any width": (
        {"spec": SPEC.model_dump(mode="json") | {"box_head_channels": 10**9}},
        "roi_heads.box_head.fc6.weight must have 1000000000 rows",
    ),
    "a threshold that is a tensor": ({"score_threshold": torch.ones(3)}, "must be in [0, 1], got a Tensor"),
    "a threshold that is no number": ({"score_threshold": math.nan}, "must be in [0, 1], got nan"),
    "no model": ({"model": 3}, "is not a detector: it has no"),
}


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_malformed_detector(kind: str, payload: dict[str, Any], tmp_path: Path) -> None:
    changed, message = DETECTORS[kind]
    assert message in refusal(load_detector, payload | changed, tmp_path / "best.pt")


@pytest.mark.parametrize("name", ["spec", "categories"])
def test_a_detector_without_an_entry(name: str, payload: dict[str, Any], tmp_path: Path) -> None:
    content = {key: value for key, value in payload.items() if key != name}
    assert f"has no readable spec and categories: no '{name}'" in refusal(load_detector, content, tmp_path / "best.pt")


@pytest.mark.parametrize(
    "scores", [torch.tensor(1.0), torch.zeros(3), torch.zeros(1, 8), torch.ones(1).expand(10**9, 8)]
)
def test_scores_of_any_shape(scores: torch.Tensor, payload: dict[str, Any], tmp_path: Path) -> None:
    content = payload | {"model": payload["model"] | {SCORES: scores}}
    told = refusal(load_detector, content, tmp_path / "best.pt")
    assert "cls_score.weight" in told or "contradicts itself" in told


CONFIGS: dict[str, Any] = {"text": "seed: 3", "tensor": {"a": torch.ones(2)}, "bytes": {"a": b"x"}, "list": [1]}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_is_no_mapping(kind: str, payload: dict[str, Any], tmp_path: Path) -> None:
    content = payload | {"config": CONFIGS[kind]}
    assert "its configuration must be a mapping" in refusal(config_of_checkpoint, content, tmp_path / "best.pt")

    content = classifier_payload(make_classifier(ClassifierSpec(arch="resnet18"), ["a", "b"]))
    content["config"] = CONFIGS[kind]

    def for_classifiers(path: Path) -> object:
        return eval_config(path, arch=None, images=None)

    assert "its configuration must be a mapping" in refusal(for_classifiers, content, tmp_path / "best.pt")


STATES: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], "its training state must be a mapping, got list"),
    "a step that is a text": ({"step": "3"}, "'step' of its training state must be a whole number"),
    "a step below zero": ({"step": -3}, "'step' of its training state must be a whole number"),
    "a best that is a tensor": ({"best": torch.ones(1)}, "'best' of its training state must be a number, or None"),
    "an optimizer that is a list": ({"optimizer": []}, "'optimizer' of its training state must be a mapping"),
    "sums that are numbers": (
        {"log_sums": {"loss": 1.0}},
        "'log_sums' of its training state must be a mapping of single",
    ),
    "metrics that are texts": (
        {"metrics": {"AP": "x"}},
        "'metrics' of its training state must be a mapping of numbers",
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_malformed_training_state(kind: str, payload: dict[str, Any], tmp_path: Path) -> None:
    state, message = STATES[kind]
    model = build_detector(SPEC, num_classes=3)
    content = payload | {"training": state}
    assert message in refusal(lambda path: load_training_state(path, model), content, tmp_path / "last.pt")


@pytest.mark.parametrize(
    "changed", [{"classes": 3}, {"classes": [1, 2]}, {"classes": ["a"] * 5}, {"mean": 1.0}, {"spec": []}]
)
def test_a_malformed_classifier(changed: dict[str, Any], tmp_path: Path) -> None:
    content = classifier_payload(make_classifier(ClassifierSpec(arch="resnet18"), ["a", "b"]))
    torch.save(content, tmp_path / "whole.pt")
    load_classifier(tmp_path / "whole.pt")
    content.update(changed)
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(WeightsError, match=r"best\.pt: its description is not one of this version"):
        load_classifier(tmp_path / "best.pt")
