"""What README says is what there is."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from resdet.config import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block as it stands, with random weights where torch.hub would keep the downloaded ones."""
    (code,) = blocks("python")
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


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    parts = [part for line in text.splitlines() for part in re.split(r"&&", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def test_every_training_command_has_a_valid_configuration() -> None:
    found = 0
    for words in commands():
        if "tools/train.py" in words:
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
