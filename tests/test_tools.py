"""The tools as a user runs them: subprocesses, exit codes, output trees."""

import ast
import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import resdet
from resdet.build import config_of_checkpoint
from resdet.commands import COMMANDS
from resdet.commands.run import AS_MODULE, run_tool

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "pydantic", "yaml")

# A few steps of a small model: what is tested is the path, not the result.
TINY = [
    "data.train.num_images=24",
    "data.val.num_images=5",
    "data.train.image_size=64",
    "data.val.image_size=64",
    "model.min_size=64",
    "model.out_channels=32",
    "model.box_head_channels=32",
    "train.batch_size=4",
    "train.log_every=1",
    "eval.num_pictures=2",
    "eval.tricks={}",
    "plan=false",
]


def run(tool: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )


def succeeds(tool: str, *arguments: object) -> str:
    done = run(tool, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def train_tiny(output_dir: Path, *overrides: str) -> str:
    return succeeds("train.py", "configs/quickstart.yaml", *TINY, f"output_dir={output_dir}", *overrides)


def tree(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name
    }


def logged(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    text = train_tiny(folder, "train.steps=4", "train.eval_every=2")
    assert "learning rate" in text
    return folder


def test_train_leaves_its_tree(finished: Path) -> None:
    assert tree(finished) == {
        "config.yaml",
        "metrics.jsonl",
        "metrics.json",
        "last.pt",
        "previous.pt",
        "best.pt",
        ".lock",
        "report.html",
        "pictures/shapes_1_000000.png",
        "pictures/shapes_1_000001.png",
    }
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert len(logged(finished, "loss_rpn_box_reg")) == 4
    assert len(logged(finished, "AP50")) == 2
    payload = torch.load(finished / "best.pt", weights_only=True)
    assert "training" not in payload
    assert torch.load(finished / "last.pt", weights_only=True)["training"]["step"] == 4
    assert_agrees(finished / "metrics.json", finished / "report.html")
    assert json.loads((finished / "metrics.json").read_text())["metrics"]["AP"] == logged(finished, "AP")[-1]


def assert_agrees(metrics: Path, report: Path) -> None:
    """The numbers of a final evaluation are pycocotools' too, and the page says so."""
    document = json.loads(metrics.read_text())
    numbers = document["reference"]
    version = numbers.pop("pycocotools")
    assert {name: document["metrics"][name] for name in numbers} == pytest.approx(numbers, rel=0, abs=1e-9)
    assert len(numbers) == 12
    assert f"COCO's twelve numbers equal those of pycocotools {version} to 1e-9." in report.read_text()


@pytest.mark.slow
def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    done = run(
        "train.py",
        "configs/quickstart.yaml",
        *TINY,
        f"output_dir={tmp_path}",
        "train.steps=20",
        "train.save_every=1",
        "optim.lr=1e30",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "optim.clip_grad_norm=null",
    )
    assert done.returncode == 2, done.stderr
    told = done.stderr[done.stderr.index("loss is not finite at step ") :]
    step = int(told.split()[6].rstrip(","))
    assert "learning rate 1e+30" in told
    assert told.count("shapes_0_") == 4, "the images of the batch"
    assert "largest layers: " in told
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["training"]["step"] == step - 1
    assert (tmp_path / f"broken_step_{step}.pt").exists()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param("train.precision=fp16", marks=pytest.mark.slow),
        pytest.param("train.accumulate=2", marks=pytest.mark.slow),
        pytest.param("loader.num_workers=2", marks=pytest.mark.slow),
    ],
)
def test_other_ways_to_compute_train_too(setting: str, tmp_path: Path) -> None:
    train_tiny(tmp_path, "train.steps=2", setting)
    losses = logged(tmp_path, "loss")
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs a CPU with AVX512-VNNI")
def test_quantize_writes_a_checkpoint_like_others(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "int8.pt"
    text = succeeds("quantize.py", finished, "--images", 2, "--output", file, "data.train.num_images=4")
    assert "calibrated on 2 images" in text
    assert f"written: {file}" in text
    assert type(resdet.load_detector(file)).__name__ == "Int8Detector"
    config = config_of_checkpoint(file)  # by which eval.py finds its data
    assert config.data.val == config_of_checkpoint(finished / "best.pt").data.val


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = ["configs/quickstart.yaml", *TINY, "train.steps=3", f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*torchrun, "tools/train.py", *settings],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3 steps of 4 images (2 at a time in each process)" in done.stderr
    assert len(logged(tmp_path / "run", "loss")) == 3
    # Five images over two processes: what both found together is what one process finds with the same weights.
    done = run("eval.py", tmp_path / "run" / "last.pt", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())["metrics"]
    assert logged(tmp_path / "run", "AP")[-1] == pytest.approx(alone["AP"], abs=1e-6)


def test_eval_writes_its_numbers(finished: Path, tmp_path: Path) -> None:
    text = succeeds("eval.py", finished / "best.pt", "data.val.num_images=7", "--output", tmp_path / "eval")
    assert "circle" in text
    assert "AP50" in text
    document = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert document["num_images"] == 7
    assert document["score_threshold"] is None or 0 <= document["score_threshold"] <= 1
    assert "score of best F1" in text
    assert set(document["per_class"]) >= {"circle", "square", "triangle"}
    assert -1 <= document["metrics"]["AP"] <= 1
    assert isinstance(json.loads((tmp_path / "eval" / "detections.json").read_text()), list)
    assert tree(tmp_path / "eval") == {"metrics.json", "detections.json", "report.html"}
    assert_agrees(tmp_path / "eval" / "metrics.json", tmp_path / "eval" / "report.html")


def test_eval_puts_runs_side_by_side(finished: Path, tmp_path: Path) -> None:
    """A folder stands for its best.pt, an override is one wherever it stands, and a folder may have = in its name."""
    other = tmp_path / "lr=0.1"
    shutil.copytree(finished, other)
    command = ("eval.py", finished, "data.val.num_images=3", other, "--output", tmp_path / "eval")
    succeeds(*command, finished / "last.pt", "eval.max_detections=300")
    runs = ["whole_best", "lr=0.1", "whole_last"]
    expected = {f"{name}/{file}.json" for name in runs for file in ("metrics", "detections")}
    assert tree(tmp_path / "eval") == {"report.html", *expected}
    assert f"<h1>{' / '.join(runs)}</h1>" in (tmp_path / "eval" / "report.html").read_text()
    assert json.loads((tmp_path / "eval" / "lr=0.1" / "metrics.json").read_text())["num_images"] == 3
    for name in runs:
        assert_agrees(tmp_path / "eval" / name / "metrics.json", tmp_path / "eval" / "report.html")


def test_predict_draws_and_lists(finished: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, size in (("7.png", (64, 48)), ("b.jpg", (50, 80))):
        Image.new("RGB", size, (200, 30, 30)).save(images / name)
    text = succeeds("predict.py", finished / "best.pt", images, "--output", tmp_path / "out", "--score", "0.0")
    assert "drawn those of score >= 0 (--score)" in text
    assert tree(tmp_path / "out") == {"detections.json", "7.png", "b.png"}
    assert Image.open(tmp_path / "out" / "b.png").size == (7 * 50, 7 * 80)
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    for detection in found:
        assert set(detection) >= {"image_id", "category_id", "bbox", "score", "file_name"}


def test_export_gives_a_backbone_torchvision_loads(finished: Path, tmp_path: Path) -> None:
    import torchvision
    from safetensors.torch import load_file

    succeeds(
        "export.py",
        finished / "best.pt",
        "--what",
        "backbone",
        "--format",
        "safetensors",
        "--output",
        tmp_path / "b.safetensors",
    )
    body = torchvision.models.resnet18(weights=None)
    missing, unexpected = body.load_state_dict(load_file(tmp_path / "b.safetensors"), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])


TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
WITHOUT_TOOL = ("recipes", "weights", "config")


def module(command: str) -> ModuleType:
    return importlib.import_module(f"resdet.commands.{command.replace('-', '_')}")


def tool_of(command: str) -> str:
    return "check_data.py" if command == "check" else f"{command.replace('-', '_')}.py"


@pytest.mark.parametrize("tool", ["train.py", "eval.py", "predict.py", "export.py"])
def test_help_is_complete_and_quick(tool: str) -> None:
    text = succeeds(tool, "--help")
    assert "usage:" in text
    assert "python tools/" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_command_as_it_was_started(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = {"/usr/bin/resdet": f"resdet {command} ", AS_MODULE: f"python -m resdet {command} "}
    if command not in WITHOUT_TOOL:
        started[f"tools/{tool_of(command)}"] = f"python tools/{tool_of(command)} "
    for program, shown in started.items():
        monkeypatch.setattr(sys, "argv", [program])
        with pytest.raises(SystemExit) as end:
            module(command).main(["--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0
        assert shown in text.split("\n\n", 1)[1]
        bare = re.findall(rf"(?<!-m )\bresdet (?:{'|'.join(COMMANDS)})\b", text)
        assert bool(bare) == (program == "/usr/bin/resdet")
        assert ("tools/" in text) == ("tools" in program)


def test_importing_commands_is_quick() -> None:
    names = ", ".join(["resdet.commands.main", *(module(command).__name__ for command in COMMANDS)])
    script = f"import json, sys, {names}; print(json.dumps([n for n in {HEAVY} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_no_text_sends_the_user_of_a_wheel_to_a_script() -> None:
    """Wheels hold no ``tools/``: messages and documentation of keys name commands."""
    scripts = re.compile("|".join(rf"\btools/{tool}" for tool in TOOLS))
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in (ROOT / "resdet").rglob("*.py")
        if path.parts[-2:] != ("commands", "benchmark.py")  # that is what it is about
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and scripts.search(node.value)
    ]
    assert places == []


def test_every_command_has_its_tool() -> None:
    assert sorted(tool_of(command) for command in COMMANDS if command not in WITHOUT_TOOL) == TOOLS


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "not.json").write_text("{oops")
    empty = {"images": [], "annotations": [], "categories": []}
    one = {
        "images": [{"id": 5, "file_name": "gone.jpg", "width": 10, "height": 10}],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 1, "bbox": [0, 0, 5, 5]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "empty.json").write_text(json.dumps(empty))
    (folder / "one.json").write_text(json.dumps(one))
    whole = (finished / "best.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    import torchvision

    torch.save(torchvision.models.resnet34(weights=None).state_dict(), folder / "resnet34.pth")
    return folder


MISTAKES = {
    "missing config": (["train.py", "configs/nothing.yaml"], "configs/nothing.yaml: 1 problem\n  no such file"),
    "unknown key": (["train.py", "configs/quickstart.yaml", "optim.lrate=1"], "optim.lrate: unknown key"),
    "wrong type": (["train.py", "configs/quickstart.yaml", "train.steps=many"], "train.steps: must be"),
    "missing COCO": (
        ["train.py", "configs/frcnn_r101.yaml", "model.weights=null", "model.norm=batch"],
        "cocodataset.org",
    ),
    "missing VOC": (
        ["train.py", "configs/frcnn_r101_voc.yaml", "model.weights=null", "model.norm=batch"],
        "VOCtrainval_06-Nov-2007.tar",
    ),
    "not json": (
        [
            "train.py",
            "configs/quickstart.yaml",
            "data.train={format: coco, images: DAMAGED, annotations: DAMAGED/not.json}",
        ],
        "not.json",
    ),
    "image missing": (
        [
            "train.py",
            "configs/quickstart.yaml",
            "data.train={format: coco, images: DAMAGED, annotations: DAMAGED/one.json}",
        ],
        "gone.jpg",
    ),
    "misspelt class": (["eval.py", "FINISHED/best.pt", "data.val.classes=[Circle, square]"], "['Circle']"),
    "no run": (["eval.py", "eval.batch_size=1"], "at least one RUN"),
    "run given twice": (["eval.py", "FINISHED", "FINISHED/best.pt"], "given twice"),
    "corrupted checkpoint": (["eval.py", "DAMAGED/cut.pt"], "cut.pt"),
    "corrupted checkpoint to predict": (["predict.py", "DAMAGED/cut.pt", "FINISHED/pictures"], "cut.pt"),
    "weights of another architecture": (
        ["train.py", "configs/quickstart.yaml", "model.weights=DAMAGED/resnet34.pth"],
        "resnet34",
    ),
    "run in the way": (["train.py", "configs/quickstart.yaml", "output_dir=FINISHED"], "already holds a run"),
    "nothing to predict on": (["predict.py", "FINISHED/best.pt", "no_such_folder"], "no_such_folder"),
    "no arguments": (["train.py"], "usage:"),
}


OF_THEIR_OWN = ("missing config", "misspelt class", "corrupted checkpoint to predict")
"""One mistake with each tool is made in a process of its own, the others in this one, which has imported torch."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_with_exit_code_2_and_readable_lines(
    mistake: str,
    finished: Path,
    damaged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tool, *arguments), expected = MISTAKES[mistake]
    arguments = [a.replace("FINISHED", str(finished)).replace("DAMAGED", str(damaged)) for a in arguments]
    if tool == "train.py" and mistake not in ("run in the way", "no arguments", "missing config"):
        arguments.append(f"output_dir={tmp_path / 'run'}")
    if mistake in OF_THEIR_OWN:
        done = run(tool, *arguments)
        code, told = done.returncode, done.stderr
    else:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        with pytest.raises(SystemExit) as caught:
            run_tool(importlib.import_module(f"resdet.commands.{Path(tool).stem}").main)
        code, told = caught.value.code, capsys.readouterr().err
    assert code == 2, told
    assert expected in told
    assert "Traceback" not in told
    assert len(told.splitlines()) <= 12
    assert not (tmp_path / "run" / "last.pt").exists()
