"""Configurations of classification runs: the shipped ones, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from resdet.classification.config import PretrainConfig, load_pretrain_config
from resdet.config_reading import config_to_plain, config_to_yaml, json_schema, parse_settings
from resdet.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("pretrain_*.yaml"))

SMALL = """\
data:
  train: {format: digits, split: train}
  val: {format: digits, split: val}
train:
  steps: 10
output_dir: runs/x
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_settings(PretrainConfig, text, overrides, source="x.yaml")
    return caught.value.problems


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_loads_survives_a_round_trip_and_satisfies_the_schema(path: Path) -> None:
    config = load_pretrain_config(path)
    assert parse_settings(PretrainConfig, config_to_yaml(config)) == config
    schema = json.loads((ROOT / "configs" / "pretrain_schema.json").read_text())
    tree = json.loads(json.dumps(config_to_plain(config)))
    jsonschema.validate(tree, schema)
    tree["model"]["arhc"] = "resnet18"
    with pytest.raises(jsonschema.ValidationError, match="arhc"):
        jsonschema.validate(tree, schema)


def test_twins_differ_in_their_network_alone() -> None:
    one, other = (
        load_pretrain_config(ROOT / "configs" / f"pretrain_digits_{name}20.yaml") for name in ("resnet", "plain")
    )
    assert one.model.arch == "cifar20"
    assert other.model.arch == "cifar_plain20"
    assert one.model_copy(update={"model": other.model, "output_dir": other.output_dir}) == other


def test_the_papers_numbers() -> None:
    cifar = load_pretrain_config(ROOT / "configs" / "pretrain_cifar10_resnet110.yaml")
    assert (cifar.train.steps, cifar.train.batch_size, cifar.augment.pad) == (64_000, 128, 4)
    assert [milestone * 64_000 for milestone in cifar.optim.milestones] == [32_000, 48_000]
    assert cifar.optim.lr * cifar.optim.warmup_factor == pytest.approx(0.01)
    imagenet = load_pretrain_config(ROOT / "configs" / "pretrain_imagenet_resnet50.yaml")
    assert (imagenet.augment.short_side, imagenet.model.image_size) == ((256, 480), 224)
    for config in (cifar, imagenet):
        optim = config.optim
        assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
        assert optim.lr_batch_size == config.train.batch_size


def test_schema_file_is_the_current_one() -> None:
    written = (ROOT / "configs" / "pretrain_schema.json").read_text()
    current = json_schema(PretrainConfig)
    assert written == current, "run: python -m resdet.classification.config > configs/pretrain_schema.json"


def test_every_knob_is_documented() -> None:
    schema = PretrainConfig.model_json_schema()
    sections = [("PretrainConfig", schema), *schema["$defs"].items()]
    missing = [
        f"{section}.{name}"
        for section, definition in sections
        for name, knob in definition.get("properties", {}).items()
        if not (knob.get("description") or "$ref" in knob)
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=0.1", "command line (optim.lrr=0.1): optim.lrr: unknown key; did you mean lr?"),
        ("augment.flp=1", "augment.flp: unknown key; did you mean flip?"),
        ("data.val.format=coco", 'data.val.format: must be one of folder, cifar10, digits; got "coco" (text)'),
        ("data.train={format: folder}", "data.train.root: missing"),
        ("model.arch=resnet51", "model.arch: arch: there is no 'resnet51'; did you mean"),
        ("train.epochs=3", "train: give exactly one of steps and epochs"),
        ("augment.short_side=[480, 256]", "augment: short_side must rise"),
        ("augment.short_side=[200, 256]", "augment.short_side must be at least the crop's side, 224"),
        ("eval.resize=200", "eval.resize must be at least model.image_size, 224"),
        ("optim.plateau_patience=2", "optim: plateau_patience is for schedule constant, got schedule multistep"),
        ("optim={warmup_until_error: 0.8, warmup_steps: 3}", "optim: give warmup_steps or warmup_until_error"),
        ("eval.views=many", "eval.views: must be 'single', 'ten_crop' or 'dense'"),
        ("train.mixup=-1", "train.mixup: must be greater than or equal to 0; got -1"),
    ],
)
def test_mistake_is_told_with_place_and_rule(override: str, expected: str) -> None:
    (problem,) = problems(SMALL, override)
    assert expected in problem


def test_missing_file_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"no such file or recipe; did you mean .*pretrain_digits_plain20\.yaml or "):
        load_pretrain_config(ROOT / "configs" / "pretrain_digits_plan20.yaml")
