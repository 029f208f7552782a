"""Runs that plan themselves: what they choose, what they leave, and how they go on after an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from resdet.config import load_config
from resdet.errors import UserError
from resdet.models.detector import Detector
from resdet.plan import plan as planning
from resdet.plan.machine import Machine
from resdet.training.detection import plan_alone, train

ROOT = Path(__file__).resolve().parents[2]

MACHINE = Machine("cpu", "fp32", gain=0.5, per_image=0.01, per_megapixel=1.0, megapixels=20.0)

SMALL = (
    "data.train={format: shapes, num_images: 24, image_size: 64}",
    "data.val={format: shapes, num_images: 4, image_size: 64}",
    "model={arch: resnet18, weights: null, norm: group, trainable_layers: 5, out_channels: 32, box_head_channels: 32}",
    "eval.num_pictures=0",
    "loader.num_workers=0",
    "train.log_every=2",
)


def small(folder: Path, *overrides: str) -> Any:
    """Return the configuration of a small run that plans itself."""
    return load_config("finetune", [*SMALL, f"output_dir={folder}", *overrides])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the machine as measured, so that plans are the same in each run of the tests."""
    monkeypatch.setattr(planning, "measure_machine", lambda *_: MACHINE)


def test_a_plan_states_everything_and_is_an_ordinary_configuration(tmp_path: Path, measured: None) -> None:
    config = small(tmp_path, "minutes=null", "train.steps=4")
    result = train(config)
    assert result.steps == 4
    text = (tmp_path / "config.yaml").read_text()
    written = yaml.safe_load(text)
    assert written["plan"] is False
    assert written["model"]["min_size"] != config.model.min_size
    plan = json.loads((tmp_path / "plan.json").read_text())
    for row in plan["rows"]:
        node = written
        for name in row["key"].split("."):
            node = node[name]
        assert node == row["value"], row
    again = load_config(tmp_path / "config.yaml", {"output_dir": str(tmp_path / "again")})
    repeated = train(again)
    assert repeated.metrics == result.metrics
    assert not (tmp_path / "again" / "plan.json").exists()
    page = (tmp_path / "report.html").read_text()
    assert '<section id="plan"' in page
    assert plan["rows"][0]["because"].split(" ")[0] in page
    assert '<section id="plan"' not in (tmp_path / "again" / "report.html").read_text()


@pytest.mark.parametrize(("overrides", "regions"), [((), 128), (("model.box_batch_size_per_image=64",), 64)])
def test_steps_are_timed_with_the_regions_that_they_will_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], regions: int
) -> None:
    """The recipe's own 512 would make a step look half as long again."""

    def measured(model: Detector, *_: object) -> Machine:
        assert model.roi_heads.fg_bg_sampler.batch_size_per_image == regions
        return MACHINE

    monkeypatch.setattr(planning, "measure_machine", measured)
    plan = plan_alone(small(tmp_path, *overrides))
    assert plan.config.model.box_batch_size_per_image == regions


def test_what_is_stated_wins(tmp_path: Path, measured: None) -> None:
    free = plan_alone(small(tmp_path))
    assert free.config.optim.lr != 0.0123
    plan = plan_alone(small(tmp_path, "optim.lr=0.0123", "model.min_size=96", "augment=[]"))
    assert (plan.config.optim.lr, plan.config.model.min_size, plan.config.augment) == (0.0123, 96, [])
    stated = {row.key for row in plan.rows if row.is_stated}
    assert stated == {"optim.lr", "model.min_size", "augment", "loader.num_workers"}
    assert "you state it" in plan.text()
    assert not any(tmp_path.iterdir())


def test_a_resumed_run_keeps_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: None) -> None:
    train(small(tmp_path, "minutes=null", "train.steps=2"))
    before = yaml.safe_load((tmp_path / "config.yaml").read_text())
    monkeypatch.setattr(planning, "measure_machine", lambda *_: pytest.fail("planned again"))
    result = train(small(tmp_path, "minutes=null", "train.steps=4", "resume=auto"))
    after = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert result.steps == 4
    assert after["train"].pop("steps") == 4
    assert before["train"].pop("steps") == 2
    assert {**after, "resume": None} == {**before, "resume": None}


def test_a_configuration_that_leaves_nothing_open_has_no_plan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plan: must be true, as in the recipe finetune"):
        plan_alone(small(tmp_path, "plan=false"))


@pytest.mark.slow
def test_a_run_ends_within_its_minutes(tmp_path: Path) -> None:
    begun = time.perf_counter()
    result = train(small(tmp_path, "minutes=0.7", "model.min_size=64", "model.max_size=64"))
    assert time.perf_counter() - begun < 0.7 * 60 * 1.05 + 1
    assert result.seconds > 0.5 * 60
    rates = [line["lr"] for line in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "lr" in line]
    assert rates[-1] < 0.02 * max(rates)


def test_minutes_count_from_the_programs_start(tmp_path: Path) -> None:
    settings = [*SMALL, "minutes=10", "plan=false", "train.batch_size=2", f"output_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"this run needs about 60\.\d"):
        train(load_config("finetune", settings), begun=time.perf_counter() - 3600)


def test_plan_only_shows_a_plan_and_trains_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "resdet",
        "train",
        "finetune",
        *SMALL,
        f"output_dir={tmp_path / 'run'}",
        "--plan-only",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.min_size" in done.stderr
    assert "because" in done.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine.yaml").write_text(done.stdout)
    config = load_config(tmp_path / "mine.yaml")
    assert not config.plan
    assert config.minutes == 30


def test_too_little_time_is_refused_before_training(tmp_path: Path, measured: None) -> None:
    with pytest.raises(UserError, match=r"minutes: 0.01 do not suffice"):
        train(small(tmp_path, "minutes=0.01"))
