"""tools/describe.py as a user runs it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resdet.classification.describe import measure_responses
from resdet.classification.plots import plot_responses
from resdet.errors import UserError
from resdet.models.bodies import build_classifier

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=False,
    )


# ---- the name


def test_no_tool_hides_a_module_of_the_standard_library() -> None:
    assert not {path.stem for path in TOOLS.glob("*.py")} & sys.stdlib_module_names


@pytest.mark.parametrize("tool", sorted(path.name for path in TOOLS.glob("*.py")))
def test_every_tool_starts_from_within_its_folder(tool: str) -> None:
    done = run(tool, "--help", cwd=TOOLS)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.slow
def test_torchrun_from_within_the_folder() -> None:
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py", "--help", cwd=TOOLS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == 2


# ---- the tool


def call(*arguments: str) -> None:
    """Run the tool's main in this process, which saves an import of torch."""
    runpy.run_path(str(TOOLS / "describe.py"))["main"](arguments)


def test_it_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    call("resnet18", "cifar20", "--image-size", "64", "32")
    printed = capsys.readouterr().out
    assert "resnet18:" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["stem", "64x16x8", "9,536", "4,816,896", "11", "4"] in rows
    assert ["layer3", "64x16x8", "3", "203,520", "25,952,256", "81", "4"] in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "--image-size", "0", "5"], "at least 1"),
        (["resnet18", "--responses", "x.png"], "--weights and --responses go together"),
        (["resnet18", "cifar20", "--responses", "x.png", "--weights", "a.pt"], "one for each of the 2 ARCH, got 1"),
        (["resnet18", "--output", "x.png"], "--output is the plot of --responses"),
    ],
)
def test_mistakes_end_with_exit_code_2_and_a_readable_line(arguments: list[str], message: str) -> None:
    done = run("tools/describe.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_network_and_missing_weights_are_users_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'resnet101'"):
        call("resnet1O1")
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"gone.pth: there is no such file"):
        call("resnet18", "--weights", str(tmp_path / "gone.pth"), "--responses", str(tmp_path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks with statistics of their own, a residual one and its plain twin, and images."""
    folder = tmp_path_factory.mktemp("trained")
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(3):
        Image.fromarray(generator.integers(0, 255, (40, 36, 3), np.uint8)).save(folder / "images" / f"{index}.png")
    for arch in ("cifar20", "cifar_plain20"):
        torch.manual_seed(0)
        model = build_classifier(arch, num_classes=10)
        for _ in range(3):
            model(torch.randn(8, 3, 32, 32))
        torch.save(model.state_dict(), folder / f"{arch}.pth")
    return folder


@pytest.mark.slow
def test_responses_are_measured_and_drawn(trained: Path, tmp_path: Path) -> None:
    weights = [trained / "cifar20.pth", trained / "cifar_plain20.pth"]
    plot = tmp_path / "responses.png"
    done = run(
        "tools/describe.py",
        *("cifar20", "cifar_plain20"),
        *("--weights", *weights),
        *("--responses", trained / "images"),
        *("--output", plot),
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    printed = {row[0]: float(row[1]) for row in rows if len(row) == 2 and row[0].startswith(("conv1", "layer"))}
    measured = measure_responses("cifar_plain20", str(weights[1]), [trained / "images"])
    assert list(printed) == list(measured)
    assert all(printed[name] == pytest.approx(value, abs=6e-5) for name, value in measured.items())
    assert Image.open(plot).size == (1125, 900)


def test_plots_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plot.docx: its ending must be one of .*pdf, .*png"):
        plot_responses({"cifar20": {"conv1": 1.0}}, tmp_path / "plot.docx")
    with pytest.raises(UserError, match="got no responses"):
        plot_responses({}, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
