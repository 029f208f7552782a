"""The distributions: what they hold, and that the wheel alone is all that a user needs, in a folder of their own."""

from __future__ import annotations

import email.message
import email.parser
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from resdet.recipes import find_recipes
from resdet.version import VERSION

ROOT = Path(__file__).resolve().parents[1]

TINY = [
    *(f"data.{part}.{size}" for part in ("train", "val") for size in ("num_images=8", "image_size=64")),
    *("model.min_size=64", "model.out_channels=16", "model.box_head_channels=16", "model.rpn_batch_size_per_image=16"),
    *("train.steps=3", "train.batch_size=4", "train.eval_every=null", "eval.num_pictures=1"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel, which is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built / f"resdet-{VERSION}-py3-none-any.whl")


@dataclass(frozen=True)
class Installed:
    """An environment that has the wheel and its dependencies, and an empty folder to work in."""

    environment: Path
    folder: Path

    def start(self, *command: str) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
        variables |= {"PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        program = str(self.environment / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, check=False, cwd=self.folder, env=variables
        )

    def run(self, *command: str) -> str:
        done = self.start(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    venv.create(environment, with_pip=False, symlinks=True)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    # Folders named here are searched, and their own .pth files not read: an editable installation there has no effect.
    present = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(present))
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, *options, str(built / f"resdet-{VERSION}-py3-none-any.whl")], check=True)
    return Installed(environment, folder)


def below(folder: str, *without: str) -> set[str]:
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in without}


def test_the_wheel_holds_the_package_and_the_recipes(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == below("resdet", ".md", ".pyc") | {f"resdet/{name}" for name in below("configs", ".md")}
    assert {"resdet/py.typed", "resdet/__init__.pyi", "resdet/configs/quickstart.yaml"} <= names
    assert {"resdet/evaluation/report.html.jinja", "resdet/evaluation/report.js", "resdet/configs/schema.json"} <= names


def test_the_source_distribution_holds_every_file_of_the_project(built: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs git to list the project's files")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {name for name in tracked.stdout.split("\0") if name and (ROOT / name).exists()}
    with tarfile.open(built / f"resdet-{VERSION}.tar.gz") as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames()}
    assert held >= files
    assert not [name for name in held - files if "__pycache__" in name or name.endswith((".pt", ".pth"))]


def test_the_metadata_is_complete(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"resdet-{VERSION}.dist-info/METADATA").decode()
    metadata: email.message.Message = email.parser.Parser().parsestr(text)
    assert metadata["Version"] == VERSION
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Author"] == "resdet maintainers"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_all("Project-URL")
    assert set(metadata.get_all("Provides-Extra", [])) >= {"onnx", "plots", "digits", "dev"}
    kinds = {classifier.split(" :: ")[0] for classifier in metadata.get_all("Classifier", [])}
    assert kinds >= {"Development Status", "Operating System", "Programming Language", "Topic", "Typing"}
    scripts = wheel.read(f"resdet-{VERSION}.dist-info/entry_points.txt").decode()
    assert scripts.split() == ["[console_scripts]", "resdet", "=", "resdet.commands.main:start"]


def test_the_package_is_that_of_the_wheel(installed: Installed) -> None:
    file = installed.run("python", "-c", "import resdet; print(resdet.__file__)").strip()
    assert Path(file).is_relative_to(installed.environment)
    done = installed.start("resdet", "benchmark", "work=inference")
    assert (done.returncode, "not installed with the package" in done.stderr) == (2, True)


def test_recipes_and_configurations_need_no_checkout(installed: Installed) -> None:
    listed = installed.run("resdet", "recipes")
    assert all(f"  {name} " in listed for name in find_recipes())
    (installed.folder / "copy.yaml").write_text(installed.run("resdet", "recipes", "quickstart"))
    resolved = installed.run("resdet", "config", "copy.yaml", "output_dir=there")
    assert yaml.safe_load(resolved) == yaml.safe_load(
        installed.run("resdet", "config", "quickstart", "output_dir=there")
    )
    schema = (installed.folder / "copy.yaml").read_text().split("\n")[0].split("$schema=file://")[1]
    assert json.loads(Path(schema).read_text())["title"] == "Config"


@pytest.mark.parametrize(("arguments", "seconds"), [(["--help"], 0.3), (["config", "quickstart"], 1.5)])
def test_starting_is_quick(arguments: list[str], seconds: float, installed: Installed) -> None:
    """Measured in seconds of processor time, which other work on the machine does not change much."""
    took = []
    for _ in range(3):  # the first compiles to bytecode
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        installed.run("resdet", *arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < seconds


@pytest.mark.slow
def test_from_the_quickstart_to_an_exported_backbone(installed: Installed) -> None:
    """The steps of a new user, with a file of their own."""
    version = installed.run("resdet", "--version")
    assert f"resdet {VERSION} ({installed.environment}" in version
    folder = installed.folder
    (folder / "mine.yaml").write_text(installed.run("resdet", "recipes", "quickstart"))
    assert yaml.safe_load(installed.run("resdet", "config", "mine.yaml"))["data"]["train"]["format"] == "shapes"
    installed.run("resdet", "train", "mine.yaml", *TINY, "output_dir=run")
    assert "AP50" in installed.run("resdet", "eval", "run")
    picture = next((folder / "run" / "pictures").iterdir())
    shutil.copy(picture, folder / "photo.png")
    installed.run("resdet", "predict", "run", "photo.png", "--output", "found")
    installed.run("resdet", "export", "run", "--output", "body.safetensors")
    assert load_file(folder / "body.safetensors")["layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert {path.name for path in folder.iterdir()} >= {"run", "found", "photo.png", "body.safetensors"}
    assert (folder / "run" / "eval" / "report.html").is_file()
    assert (folder / "found" / "photo.png").is_file()


@pytest.mark.slow
def test_torchrun_starts_the_command(installed: Installed) -> None:
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    installed.run(*torchrun, "resdet", "train", "quickstart", *TINY, "output_dir=two")
    assert (installed.folder / "two" / "best.pt").is_file()
