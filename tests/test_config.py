"""Configuration: what is accepted, what is refused, and what the refusal says."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from resdet.build import inference_settings
from resdet.config import (
    Config,
    ModelConfig,
    ShapesSource,
    TrainConfig,
    config_from_plain,
    load_config,
    parse_config,
)
from resdet.config_reading import config_to_plain, config_to_yaml, json_schema
from resdet.errors import ConfigError
from resdet.models.spec import Tricks

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if not path.name.startswith("pretrain_"))

SMALL = """\
data:
  train: {format: shapes}
  val: {format: shapes, seed: 1}
train:
  steps: 10
output_dir: runs/x
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, source="x.yaml")
    return caught.value.problems


def test_there_are_configs() -> None:
    assert {path.name for path in CONFIGS} >= {
        "quickstart.yaml",
        "frcnn_r101.yaml",
        "frcnn_r101_3x.yaml",
        "frcnn_r101_voc.yaml",
        "frcnn_r101_lsj.yaml",
        "frcnn_r101_adamw.yaml",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_loads_and_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert parse_config(config_to_yaml(config)) == config
    assert config_from_plain(config_to_plain(config), source="checkpoint") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_satisfies_the_schema(path: Path) -> None:
    schema = json.loads((ROOT / "configs" / "schema.json").read_text())
    tree = json.loads(json.dumps(config_to_plain(load_config(path))))
    jsonschema.validate(tree, schema)
    tree["model"]["arhc"] = "resnet18"
    with pytest.raises(jsonschema.ValidationError, match="arhc"):
        jsonschema.validate(tree, schema)


def test_schema_file_is_the_current_one() -> None:
    written = (ROOT / "configs" / "schema.json").read_text()
    assert written == json_schema(Config), "run: python -m resdet.config > configs/schema.json"


def test_reading_a_configuration_imports_nothing_heavy() -> None:
    """A mistyped key is reported at once, not after the seconds that torch takes to import."""
    script = (
        "import json, sys; from resdet.config import load_config; load_config('configs/quickstart.yaml'); "
        "print(json.dumps([name for name in ('torch', 'torchvision', 'numpy') if name in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []


def test_every_knob_is_documented() -> None:
    def undocumented(schema: dict, where: str) -> list[str]:
        return [
            f"{where}.{name}"
            for name, field in schema.get("properties", {}).items()
            if not (field.get("description") or "$ref" in field)
        ]

    schema = Config.model_json_schema()
    missing = undocumented(schema, "Config")
    for name, definition in schema["$defs"].items():
        missing += undocumented(definition, name)
    assert missing == []


def test_numbers_are_read_by_yaml_1_2() -> None:
    assert yaml.safe_load("1e-4") == "1e-4"  # the trap this closes
    config = parse_config(SMALL, ["optim.lr=1e-4", "optim.weight_decay=0", "seed=0x10"])
    assert config.optim.lr == 1e-4
    assert config.optim.weight_decay == 0.0
    assert config.seed == 16


def test_off_is_text_and_true_is_no_number() -> None:
    assert parse_config(SMALL, ["resume=off"]).resume == "off"
    (problem,) = problems(SMALL, "train.steps=true")
    assert "train.steps: must be" in problem
    assert "true (true/false)" in problem


def test_key_written_twice_is_refused() -> None:
    (problem,) = problems(SMALL + "seed: 1\nseed: 2\n")
    assert problem == "x.yaml:8: seed: written twice; keep one"


def test_aliases_are_refused() -> None:
    (problem,) = problems("a: &a [1]\nb: *a\n")
    assert "line 2: anchors and aliases (*a) are not read" in problem


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=0.1", "command line (optim.lrr=0.1): optim.lrr: unknown key; did you mean lr?"),
        ("trian.steps=3", "command line (trian.steps=3): trian: unknown key; did you mean train?"),
        ("data.train.rooot=x", "data.train.rooot: unknown key"),
        ("optim.lr=fast", 'optim.lr: must be number; got "fast" (text)'),
        ("optim.lr=-1", "optim.lr: must be greater than 0; got -1 (whole number)"),
        ("train.precision=fp8", "train.precision: must be 'fp32', 'bf16' or 'fp16'; got \"fp8\" (text)"),
        (
            "data.val.format=tfrecord",
            'data.val.format: must be one of coco, voc, yolo, shapes, python, held_out; got "tfrecord" (text)',
        ),
        ("data.val={format: coco, images: a}", "data.val.annotations: missing"),
        (
            "train.epochs=3",
            "train.steps or train.epochs, not both, got train.steps 10 and train.epochs 3 (train.st",
        ),
        ("train.steps=null", "give train.steps, train.epochs or minutes, got none"),
        ("minutes=0", "minutes: must be greater than 0"),
        ("train.accumulate=3", "train: batch_size (16) must be a multiple of accumulate (3)"),
        ("optim.milestones=[0.9, 0.5]", "optim: milestones must rise, got [0.9, 0.5]"),
        ("model.weights=null", "model: norm frozen on random weights"),
        ("optim.lr", "command line (optim.lr): must be key=value"),
        ("optim.lr=[1", "not YAML"),
        ("model.trainable_layers=6", "model.trainable_layers: must be less than or equal to 5; got 6"),
        ("model.norm=froozen", "model.norm: must be 'frozen', 'batch' or 'group'"),
        ("optim.lr=.inf", "optim.lr: must be"),
    ],
)
def test_mistake_is_told_with_place_and_rule(override: str, expected: str) -> None:
    (problem,) = problems(SMALL, override)
    assert expected in problem


def test_all_mistakes_are_told_at_once_with_their_lines() -> None:
    text = SMALL.replace("steps: 10", "steps: ten\n  batchsize: 4") + "optim:\n  lr: 0\n"
    found = problems(text, "eval.batch_size=0")
    assert sorted(problem.split(": ")[:2] for problem in found) == [
        ["command line (eval.batch_size=0)", "eval.batch_size"],
        ["x.yaml:5", "train.steps"],
        ["x.yaml:6", "train.batchsize"],
        ["x.yaml:9", "optim.lr"],
    ]


def test_the_recall_that_decides_bears_the_number_of_detections() -> None:
    assert parse_config(SMALL, ["eval.best_metric=AR_100"]).eval.max_detections == 100
    assert parse_config(SMALL, ["eval.best_metric=AR_300", "eval.max_detections=300"]).eval.best_metric == "AR_300"
    (problem,) = problems(SMALL, "eval.best_metric=AR_100", "eval.max_detections=300")
    names = "AP, AP50, AP75, AP_small, AP_medium, AP_large, AR_300, voc_AP50"
    assert problem.endswith(f"eval: best_metric must be one of {names}, got 'AR_100'")


def test_an_evaluation_raises_the_models_number_of_detections_only_where_another_is_stated() -> None:
    assert inference_settings(parse_config(SMALL, ["eval.max_detections=100"])).max_detections is None
    assert inference_settings(parse_config(SMALL, ["eval.max_detections=101"])).max_detections == 101


def test_override_replaces_a_section() -> None:
    config = parse_config(SMALL, ["data.val={format: voc, root: here, split: [VOC2007/test, a/b/val]}"])
    assert config.data.val.format == "voc"
    assert config.data.val.root == Path("here")
    assert config.data.val.split == ["VOC2007/test", "a/b/val"]


def test_missing_file_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"no such file or recipe; did you mean .*quickstart\.yaml or quickstart\?"):
        load_config(ROOT / "configs" / "quikstart.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ("a: [", "not YAML"),
        ("a: b: c", "line 1, column 5: not YAML"),
    ],
)
def test_what_is_no_configuration_is_told(text: str, expected: str) -> None:
    assert expected in problems(text)[0]


# From Python


def test_settings_of_python_are_taken_as_a_files() -> None:
    """Paths, tuples, numbers of NumPy and torch, members of an enum, sections; what is text in a file stays text."""
    import numpy as np
    import torch
    from torchvision.models import ResNet101_Weights

    config = Config(
        model=ModelConfig(weights=ResNet101_Weights.IMAGENET1K_V2, image_mean=np.array([0.5, 0.5, 0.25])),
        data={"train": ShapesSource(format="shapes", num_images=np.int64(7)), "val": {"format": "shapes"}},
        train=TrainConfig(steps=10),
        optim={"lr": 1, "milestones": (0.25, np.float32(0.5)), "weight_decay": torch.tensor(0.5)},
        eval={"tricks": Tricks(scales=(400, 500))},
        output_dir="runs/x",
    )
    text = """
model: {weights: IMAGENET1K_V2, image_mean: [0.5, 0.5, 0.25]}
data: {train: {format: shapes, num_images: 7}, val: {format: shapes}}
train: {steps: 10}
optim: {lr: 1.0, milestones: [0.25, 0.5], weight_decay: 0.5}
eval: {tricks: {scales: [400, 500]}}
output_dir: runs/x
"""
    assert config == parse_config(text)
    assert config.output_dir == Path("runs/x")
    assert config.model.model_fields_set == {"weights", "image_mean"}  # the rest may be taken over from weights
    assert config == load_config(yaml.safe_load(text))
    model = ModelConfig(weights=Path("a/b.pth"), min_size=[640, 800])
    assert (model.weights, model.min_size) == ("a/b.pth", (640, 800))


def test_overrides_may_be_a_mapping() -> None:
    path = ROOT / "configs" / "quickstart.yaml"
    by_words = load_config(path, ["train.steps=100", "output_dir=runs/x", "data.val={format: shapes, seed: 9}"])
    mapping = {"train.steps": 100, "output_dir": Path("runs/x"), "data.val": {"format": "shapes", "seed": 9}}
    assert load_config("quickstart", mapping) == by_words
    assert load_config(path, "seed=3").seed == 3
    assert load_config({"train": {"steps": 5}, "output_dir": "x"}, {"train.steps": 6}).train.steps == 6


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"optim.lr": -1}, "settings: optim.lr: must be greater than 0; got -1 (whole number)"),
        ({"trian.steps": 3}, "settings: trian: unknown key; did you mean train?"),
        ({"train.steps": "100"}, 'settings: train.steps: must be integer; got "100" (text)'),
        ({"train.steps": 10.5}, "settings: train.steps: must be integer; got 10.5 (number)"),
        ({"optim.lr": float("nan")}, "settings: optim.lr: must be a finite number; got NaN (number)"),
        ({"train.steps": True}, "settings: train.steps: must be integer; got true (true/false)"),
        (
            {"train.device": Config},
            "settings: train.device: must be text, a number, true/false, None, a path, or a list or mapping of these; "
            "got <class 'resdet.config.Config'> (ModelMetaclass)",
        ),
    ],
)
def test_a_mistake_in_a_mapping_is_told_with_its_key(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs" / "quickstart.yaml", settings)
    assert caught.value.problems == [expected]


def test_mistakes_in_python_are_told_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(train={"steps": "3", "batchsize": 4}, optim={"lr": 0})
    assert str(caught.value) == (
        "Config: 4 problems\n"
        "  Config: optim.lr: must be greater than 0; got 0 (whole number)\n"
        '  Config: train.steps: must be integer; got "3" (text)\n'
        "  Config: train.batchsize: unknown key; did you mean batch_size?\n"
        "  Config: output_dir: missing"
    )
    with pytest.raises(
        ConfigError, match=r"^the given settings: 1 problem\n  the given settings: output_dir: missing$"
    ):
        load_config({"train.steps": 3})
