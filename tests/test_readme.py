"""What README says is what there is."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torchvision

from resdet.config import load_config
from resdet.data.annotations import AnnotationTable
from resdet.data.dataset import DetectionDataset
from resdet.data.loader import train_loader
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.models.detector import Detector, build_detector
from resdet.models.spec import DetectorSpec
from resdet.training import guards

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block as it stands, with random weights where torch.hub would keep the downloaded ones."""
    code = blocks("python")[0]
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    name = Path(torchvision.models.ResNet101_Weights.IMAGENET1K_V1.url).name
    state = torchvision.models.resnet101(weights=None).state_dict()
    state["bn1.bias"] += 0.1
    torch.save(state, cache / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(1, 256, 120, 160)" in done.stdout
    assert (tmp_path / "r101.safetensors").exists()


def test_python_that_reads_an_evaluation_runs() -> None:
    (code,) = [block for block in blocks("python") if "find_errors" in block]
    names = {"model": small_detector(), "dataset": DetectionDataset(*shapes(3), training=False)}
    exec(code, names)  # no value of it is told here: tests/evaluation proves the numbers
    assert names["evaluation"].metrics["AP"] >= 0  # type: ignore[attr-defined]


def test_python_that_repeats_a_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [textwrap.dedent(block) for block in blocks("python") if "repeat_step" in block]
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    model = small_detector()
    batch = next(train_loader(DetectionDataset(*shapes(2), training=True), batch_size=1))
    moment = guards.Moment(811, random_seed=0, rank=0, lr=0.1, precision="fp32", num_pieces=1)
    guards.not_finite(moment, {"loss": torch.tensor(torch.nan)}, model, [batch], shapes(2)[0], folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert "loss_classifier" in names["losses"]  # type: ignore[operator]


def shapes(num_images: int) -> tuple[AnnotationTable, ShapesImages]:
    return shapes_table(num_images, 64, 0), ShapesImages(64, 0)


def small_detector() -> Detector:
    spec = DetectorSpec(arch="resnet18", norm="group", min_size=64, max_size=64, out_channels=16, box_head_channels=16)
    return build_detector(spec, num_classes=4, categories=shapes(1)[0].categories)


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    parts = [part for line in text.splitlines() for part in re.split(r"&&", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def test_every_training_command_has_a_valid_configuration() -> None:
    found = 0
    for words in commands():
        if "tools/train.py" in words:  # after torchrun's own options too
            config, *overrides = words[words.index("tools/train.py") + 1 :]
            load_config(ROOT / config, overrides)
            found += 1
    assert found >= 5


def test_every_tool_named_is_there() -> None:
    tools = {word for words in commands() for word in words if word.startswith("tools/")}
    assert tools >= {"tools/train.py", "tools/eval.py", "tools/predict.py", "tools/export.py"}
    assert all((ROOT / tool).is_file() for tool in tools)


def test_ci_runs_the_commands_of_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    install, test = next(b for b in blocks("bash") if "pytest" in b).strip().split(" && ")
    assert install in script.replace(" --quiet --disable-pip-version-check", "").replace("python -m pip", "pip")
    assert test in script


def test_every_path_named_exists() -> None:
    named = re.findall(r"`((?:resdet|configs|tools|tests)/[\w./]*)`", README)
    assert len(named) > 5
    assert [path for path in named if not (ROOT / path).exists()] == []
