"""``resdet``, ``python -m resdet``, and the subcommands recipes and config."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import resdet.machine
from resdet.classification.config import PretrainConfig
from resdet.commands import COMMANDS
from resdet.commands.main import main, start
from resdet.commands.run import AS_MODULE
from resdet.config import Config, load_config, parse_config
from resdet.recipes import find_recipes
from resdet.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ("resdet train quickstart", "resdet recipes", "resdet check FOLDER")


def shown(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) in (0, None)
    return capsys.readouterr().out


def code_of(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/resdet", *arguments])
    with pytest.raises(SystemExit) as end:
        start()
    return end.value.code


def test_help_leads_in_and_lists_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of("--help", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert all(example in text for example in EXAMPLES)
    rows = [line.split(maxsplit=1) for line in text.split("documents each):\n")[1].split("\n\n")[0].splitlines()]
    assert tuple(name for name, _ in rows) == COMMANDS
    assert all(story.endswith(".") and len(story) < 120 for _, story in rows)


def test_without_a_command_the_help_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(monkeypatch=monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: resdet ")


@pytest.mark.parametrize(
    ("given", "hint"),
    [("trian", "did you mean train? "), ("eval_classifier", "did you mean eval-classifier? "), ("xyz", "")],
)
def test_an_unknown_command_names_the_nearest(
    given: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(given, "quickstart", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == f"resdet: no such command: '{given}'; {hint}`resdet --help` lists them\n"


def test_version_says_what_a_bug_report_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = resdet.machine.describe_machine()
    lines = shown("--version", capsys=capsys).splitlines()
    assert lines[0] == f"resdet {VERSION} ({ROOT / 'resdet'})"
    assert lines[1] == f"Python {facts['python']} on {facts['platform']}"
    assert lines[2] == f"torch {facts['torch']}, torchvision {facts['torchvision']}, numpy {facts['numpy']}"
    assert lines[3].startswith(f"CPU: {facts['cpu']} (")
    assert lines[3].endswith(f"{facts['cores']} cores, {facts['threads']} threads")
    facts |= {"gpu": "NVIDIA H100", "cuda": "12.8", "cudnn": 91000}
    monkeypatch.setattr(resdet.machine, "describe_machine", lambda: facts)
    assert shown("--version", capsys=capsys).splitlines()[4] == "GPU: NVIDIA H100, CUDA 12.8, cuDNN 91000"


def test_version_without_torch_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(resdet.machine, "describe_machine", broken)
    *_, last = shown("--version", capsys=capsys).splitlines()
    assert last == ("torch or torchvision cannot be imported: RuntimeError: operator torchvision::nms does not exist")


def test_recipes_are_listed_with_their_stories(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("recipes", capsys=capsys)
    detection, classification = text.split("classification (resdet pretrain NAME")
    assert detection.startswith("detection (resdet train NAME")
    for name, recipe in find_recipes().items():
        (line,) = [line for line in text.splitlines() if line.split()[0] == name]
        assert line.split(maxsplit=1)[1] == recipe.story
        assert line in (detection if recipe.command == "train" else classification)
    assert shown("recipes", "quickstart", capsys=capsys) == find_recipes()["quickstart"].text()


def test_config_prints_what_a_run_would_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown("config", "frcnn_r101", "optim.lr=0.5", "output_dir=here", capsys=capsys)
    assert parse_config(text) == load_config("frcnn_r101", ["optim.lr=0.5", "output_dir=here"])
    assert "box_nms_thresh: 0.5" in text, "a default"
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(shown("config", "pretrain_digits_resnet20", capsys=capsys))
    assert "measured_mean: pixel" in shown("config", "mine.yaml", "seed=3", capsys=capsys)


def test_config_tells_mistakes_by_the_kind_that_a_file_comes_nearer_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, key in (("quickstart", "data.train.num_image"), ("pretrain_digits_resnet20", "augment.flipp")):
        file = tmp_path / f"{name}.copy.yaml"
        file.write_text(find_recipes()[name].text())
        assert code_of("config", str(file), f"{key}=1", monkeypatch=monkeypatch) == 2
        text = capsys.readouterr().err
        assert f"command line ({key}=1): {key}: unknown key; did you mean {key.split('.')[-1]}"[:-1] in text
        assert len(text.splitlines()) == 2


def test_keys_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("config", "--keys", "optim.lr", "data.train", "eval.precision", capsys=capsys)
    blocks = text.split("\n\n")
    assert "optim.lr: number > 0, default 0.02\n    Learning rate for `lr_batch_size` images per step." in text
    assert "data.train.images: path, required\n" in text
    assert "[data.train] format shapes: " in text
    assert "eval.precision: fp32 | bf16 | fp16 or null, default null\n" in text
    assert {block.split("]")[0] for block in blocks} == {"[data.train", "[eval", "[optim"}
    assert "data.train: section" not in text
    both = shown("config", "--keys", "data", capsys=capsys)
    assert "[data.val] format coco: Images with one COCO json.\n    The keys are those of data.train." in both
    assert "top1 | top5, default top1" in shown("config", "--keys", "--pretrain", capsys=capsys)
    everything = shown("config", "--keys", capsys=capsys)
    assert all(f"\n{name}: " in everything for name in ("augment", "train.steps", "model.weights_origin.prefix"))


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_help_names_the_sections_and_where_their_keys_are_documented(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(command, "--help", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    names = (Config if command == "train" else PretrainConfig).model_fields
    assert all(re.search(rf"^  {name} +[A-Z`].*\w$", text, re.MULTILINE) for name in names)
    (example,) = re.findall(r"\(resdet (config .*) SECTION documents their keys\)", text)
    assert shown(*example.split(), "optim", capsys=capsys).startswith(
        "[optim] Optimizer and learning rate.\noptim.name: "
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--keys", "optimm"], "optimm: no such section or key of the configuration; did you mean optim?"),
        (["--keys", "model.lr"], "model.lr: no such section or key of the configuration; did you mean model."),
        (["--pretrain", "quickstart"], "--pretrain goes with --keys"),
        ([], "give a CONFIG: a YAML file or the name of a recipe (or --keys)"),
    ],
)
def test_what_config_cannot_show_is_told(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of("config", *arguments, monkeypatch=monkeypatch) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "imported"),
    [
        (["--help"], ["torch", "numpy", "pydantic", "yaml"]),
        (["config", "quickstart"], ["torch", "torchvision", "numpy"]),
    ],
)
def test_light_commands_import_nothing_heavy(arguments: list[str], imported: list[str], tmp_path: Path) -> None:
    script = (
        "import atexit, json, runpy, sys\n"
        f"atexit.register(lambda: print(json.dumps([n for n in {imported} if n in sys.modules]), file=sys.stderr))\n"
        f"sys.argv = ['-m', *{arguments}]\n"
        "runpy.run_module('resdet', run_name='__main__', alter_sys=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert json.loads(done.stderr) == []
    assert done.stdout


def test_messages_name_the_module_where_it_was_started(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "resdet", "recipes", "quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{AS_MODULE}: quick: 1 problem\n")


def test_benchmark_runs_in_a_checkout_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert code_of("benchmark", "work=nothing", monkeypatch=monkeypatch) == 2
    assert "nothing" in capsys.readouterr().err
    monkeypatch.setattr("resdet.commands.benchmark._SOURCE", tmp_path)
    assert code_of("benchmark", "work=inference", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == (
        "resdet: benchmarks are not installed with the package: run tools/benchmark.py in a checkout or in the "
        f"unpacked source distribution of resdet {VERSION}\n"
    )
