"""Every README is true: its code runs, its paths, names and keys exist, its links lead somewhere.

Python blocks are executed. Bash blocks are run by bash with every program replaced by a recorder, so that quoting,
loops and variables are bash's own. Each command that was recorded is then run in a small world (a trained detector,
photographs, another library's weights) or, where it takes long or needs several hosts, its options are parsed and its
configuration is loaded. A block that needs anything unknown to this file fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import benchmarks
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from pydantic import BaseModel
from torch.distributed.run import get_args_parser

import resdet
from resdet.check.kinds import KINDS
from resdet.classification.config import PretrainConfig, load_pretrain_config
from resdet.commands.main import main
from resdet.config import Config, load_config
from resdet.data.annotations import AnnotationTable
from resdet.data.augment.pipeline import build_augment
from resdet.data.dataset import DetectionDataset
from resdet.data.loader import train_loader
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.data.video import write_video
from resdet.models.detector import Detector, build_detector
from resdet.models.spec import DetectorSpec
from resdet.training.detection import not_finite
from resdet.training.guards import Moment
from resdet.weights.convert_file import convert_file
from resdet.weights.zoo import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "resdet", "tests", "tools")
READMES = [ROOT / "README.md", *sorted(path for top in FOLDERS for path in (ROOT / top).rglob("README.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in READMES}
MAX_LINES = 120  # of the first page
MAX_PICTURE_BYTES = 300_000


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    readme: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.readme}:{self.line}"


def find_blocks() -> Iterator[Block]:
    for readme, text in TEXTS.items():
        assert len(re.findall(r"^ *```", text, re.MULTILINE)) % 2 == 0, readme
        for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            yield Block(readme, line, match[2], textwrap.dedent(match[3]))


BLOCKS = list(find_blocks())


def blocks(language: str, readme: str | None = None) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and readme in (None, block.readme)]


def test_every_block_is_of_a_language_that_is_tested() -> None:
    assert [str(block) for block in BLOCKS if block.language not in ("python", "bash", "yaml")] == []
    assert min(len(blocks(language)) for language in ("python", "bash", "yaml")) > 0


# ---- the world


def shapes(num_images: int) -> tuple[AnnotationTable, ShapesImages]:
    return shapes_table(num_images, 64, 0), ShapesImages(64, 0)


def small_detector() -> Detector:
    spec = DetectorSpec(arch="resnet18", norm="group", min_size=64, max_size=64, out_channels=16, box_head_channels=16)
    return build_detector(spec, num_classes=4, categories=shapes(1)[0].categories)


# What makes a recipe that needs no data finish in seconds.
SMALL_DETECTION = (
    *(f"data.{part}.{size}" for part in ("train", "val") for size in ("num_images=8", "image_size=64")),
    *("model.min_size=64", "model.max_size=64", "model.out_channels=16", "model.box_head_channels=16"),
    *("train.steps=2", "train.batch_size=4", "train.eval_every=null", "eval.num_pictures=1", "resume=auto"),
    "plan=false",
)
SMALL_CLASSIFICATION = ("train.epochs=null", "train.steps=2", "train.log_every=1", "train.batch_size=8", "resume=auto")
WITHOUT_DATA = {"quickstart": SMALL_DETECTION, "pretrain_digits": SMALL_CLASSIFICATION}


def write_coco(folder: Path, names: dict[str, str]) -> None:
    """A folder of pictures of shapes, with one COCO json for each of ``names``, which differ in their seeds."""
    for seed, (json_name, images_name) in enumerate(names.items()):
        dataset = DetectionDataset(shapes_table(4, 96, seed), ShapesImages(96, seed), training=False)
        (folder / images_name).mkdir(parents=True, exist_ok=True)
        data: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
        for index in range(4):
            name = f"{seed}_{index}.jpg"
            Image.fromarray(dataset.image(index)).save(folder / images_name / name)
            data["images"].append({"id": index + 1, "file_name": name, "height": 96, "width": 96})
        table = dataset.table
        data["categories"] = [{"id": c.category_id, "name": c.name} for c in table.categories]
        ids = {category.label: category.category_id for category in table.categories}
        for row, image in enumerate(table.image_of_box().tolist()):
            box = table.boxes_xywh[row].tolist()
            data["annotations"].append(
                {"id": row + 1, "image_id": image + 1, "category_id": ids[int(table.labels[row])], "bbox": box}
                | {"area": float(table.area[row]), "iscrowd": 0}
            )
        (folder / json_name).parent.mkdir(parents=True, exist_ok=True)
        (folder / json_name).write_text(json.dumps(data))


def write_photograph(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ShapesImages(96, seed)(0)).save(path)


def write_broken_step(folder: Path) -> None:
    model = small_detector()
    batch = next(train_loader(DetectionDataset(*shapes(2), training=True), batch_size=1))
    moment = Moment(811, random_seed=0, rank=0, lr=0.1, precision="fp32", num_pieces=1)
    not_finite(moment, {"loss": torch.tensor(torch.nan)}, model, [batch], shapes(2)[0], folder)


def link_weights(source: str, destination: str) -> None:
    """Copy a small file, and give a large one another name: the library replaces such files and never changes them."""
    if os.path.getsize(source) > 1_000_000:
        os.link(source, destination)
    else:
        shutil.copy2(source, destination)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the READMEs take for granted: a finished run, data, photographs, weights of others."""
    world = tmp_path_factory.mktemp("readme") / "prepared"
    shutil.copytree(ROOT / "configs", world / "configs")
    for name in ("resdet", "tests", "tools"):
        (world / name).symlink_to(ROOT / name)
    run = world / "runs" / "mine"
    with in_folder(world):
        run_script(ROOT / "tools" / "train.py", "configs/quickstart.yaml", *SMALL_DETECTION, f"output_dir={run}")
    for name in ("last.pt", "previous.pt"):  # without what resuming needs, which is three times as large
        (run / name).unlink(missing_ok=True)
    os.link(run / "best.pt", run / "last.pt")
    write_broken_step(run)
    shutil.copytree(run, world / "runs" / "other", copy_function=link_weights)
    os.link(run / "best.pt", world / "best.pt")
    convert_file(run / "best.pt", "detectron2", world / "model_final_f6e8b1.pkl")
    write_coco(world / "my", {"train.json": "images", "val.json": "images"})
    names = {f"annotations/instances_{part}2017.json": f"{part}2017" for part in ("train", "val")}
    write_coco(world / "data" / "coco", names)
    for seed, path in enumerate(("photo.jpg", "folder/a.jpg", "folder/b.jpg", "bccd/JPEGImages/a.jpg")):
        write_photograph(world / path, seed)
    write_video(world / "video.mp4", (ShapesImages(96, seed)(0) for seed in range(6)), rate=10)
    (world / ".venv" / "bin").mkdir(parents=True)
    (world / ".venv" / "bin" / "activate").touch()
    return world


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights where torch.hub would keep the downloaded ones."""
    folder = tmp_path_factory.mktemp("torch")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    state = torchvision.models.resnet101(weights=None).state_dict()
    state["bn1.bias"] += 0.1
    name = Path(torchvision.models.ResNet101_Weights.IMAGENET1K_V1.url).name
    torch.save(state, folder / "hub" / "checkpoints" / name)
    return folder


@pytest.fixture
def world(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    world = tmp_path / "world"
    shutil.copytree(prepared, world, symlinks=True, copy_function=link_weights)
    published = PUBLISHED["detectron2_r101_fpn_3x"]
    monkeypatch.setitem(PUBLISHED, published.name, replace(published, url=(world / "best.pt").as_uri()))
    monkeypatch.chdir(world)
    return world


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# ---- python


class Tracker(ModuleType):
    """Stands in for wandb, mlflow and optuna: notes what it is given, and prunes the second trial."""

    TrialPruned = type("TrialPruned", (Exception,), {})

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.lines: list[dict[str, Any]] = []
        self.pruned: list[int] = []
        self.pruners = SimpleNamespace(MedianPruner=lambda: None)

    def init(self, *, project: str) -> Any:  # wandb
        return contextlib.nullcontext(SimpleNamespace(log=self.lines.append))

    def start_run(self) -> Any:  # mlflow
        return contextlib.nullcontext()

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        assert all(isinstance(value, (int, float)) for value in metrics.values())
        self.lines.append({**metrics, "step": step})

    def create_study(self, *, direction: str, pruner: None) -> Any:  # optuna
        return SimpleNamespace(optimize=self.optimize)

    def optimize(self, objective: Callable[[Any], float], *, n_trials: int) -> None:
        for number in range(n_trials):
            trial = SimpleNamespace(number=number, should_prune=lambda number=number: number == 1)
            trial.suggest_float = lambda name, low, high, log: low
            trial.report = lambda value, step: self.lines.append({"AP": value, "step": step})
            try:
                assert isinstance(objective(trial), float)
            except self.TrialPruned:
                self.pruned.append(number)


def with_small_runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tracker]:
    """Make recipes that need no data finish in seconds, and give trackers to import."""
    plain = resdet.load_config
    small = [setting for setting in SMALL_DETECTION if setting != "resume=auto"] + ["train.log_every=1"]

    def load(config: str, settings: dict[str, Any]) -> Config:
        loaded: Config = plain(config, [*small, *(f"{key}={value}" for key, value in settings.items())])
        return loaded

    monkeypatch.setattr(resdet, "load_config", load)
    trackers = {name: Tracker(name) for name in ("wandb", "mlflow", "optuna")}
    for name, tracker in trackers.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    return trackers


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(
    block: Block, world: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each block as it stands, with ``model`` and ``dataset`` as a reader of it would have them."""
    if "import sahi" in block.code or "from sahi" in block.code:
        pytest.importorskip("sahi", reason="needs sahi")
    monkeypatch.setenv("TORCH_HOME", str(hub))
    names = {"model": small_detector(), "dataset": DetectionDataset(*shapes(3), training=False)}
    monkeypatch.setattr(Image.Image, "show", lambda image: image.load())
    trackers = with_small_runs(monkeypatch)
    exec(compile(block.code, str(block), "exec"), names)
    used = [name for name in trackers if f"import {name}" in block.code]
    for name in used:
        assert len(trackers[name].lines) >= 2, "losses and an evaluation, or evaluations of three trials"
        assert any("AP" in line for line in trackers[name].lines)
    assert trackers["optuna"].pruned == ([1] if "optuna" in used else [])
    if "export_backbone" in block.code:
        assert "(1, 256, 120, 160)" in capsys.readouterr().out
        assert (world / "r101.safetensors").exists()
    if "find_errors" in block.code:
        # No value of it is stated there: tests/evaluation proves the numbers.
        assert names["evaluation"].metrics["AP"] >= 0  # type: ignore[attr-defined]
    if "repeat_step" in block.code:
        assert "loss_classifier" in names["losses"]  # type: ignore[operator]


# ---- yaml


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_part_of_a_valid_configuration(block: Block) -> None:
    sections = yaml.safe_load(block.code)
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in sections.items()]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    build_augment(config.augment)


# ---- bash

RECORDER = """#!/bin/sh
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >> "$RECORDED"
"""
PROGRAMS = {
    "python": RECORDER,
    "python3": RECORDER,
    "pip": RECORDER,
    "torchrun": RECORDER,
    # What these two print is what later commands read, where it goes to one or to a file.
    "resdet": RECORDER
    + f'[ -c /dev/stdout ] || case "$1" in recipes|config) exec {sys.executable} -m resdet "$@";; esac\n',
    "srun": RECORDER + 'exec "$@"\n',
    "scontrol": "#!/bin/sh\nprintf 'host1\\nhost2\\n'\n",
    "head": f'#!/bin/sh\nexec {shutil.which("head")} "$@"\n',
}


def record(block: Block, world: Path) -> list[list[str]]:
    """Run a block by bash; give the command lines of the programs that it started."""
    programs, recorded = world / "programs", world / "recorded"
    programs.mkdir(exist_ok=True)
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    recorded.write_text("")
    environment = {"PATH": str(programs), "RECORDED": str(recorded), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "host"}
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", block.code],
        cwd=world,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}: {done.stderr}"
    lines = recorded.read_text().split("\n\0")[:-1]
    commands = [line.removesuffix("\0").split("\0") for line in lines]
    assert commands, f"{block}: starts no program"
    return commands


class Parsed(BaseException):
    """The options of a command were accepted."""


def run_script(script: Path, *arguments: str) -> None:
    """Run a script in this process as a user would start it; what it logs is decided anew by the next test."""
    logger = logging.getLogger("resdet")
    before, level = sys.argv, logger.level
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
        logger.setLevel(level)
    assert code == 0, f"{script.name} {' '.join(arguments)}: exit code {code}"


def parse_only(script: Path, *arguments: str) -> None:
    """Run a script up to the point where its options have been accepted."""

    def parsed(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_and_stop(*args: Any, **kwargs: Any) -> Any:
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, parsed(getattr(argparse.ArgumentParser, name)))
        with pytest.raises(Parsed):
            run_script(script, *arguments)


def check_training(script: Path, *arguments: str, load: Callable[..., Any]) -> None:
    """Load the configuration with its overrides; and train some steps where that needs no data."""
    parse_only(script, *arguments)
    config, *overrides = (word for word in arguments if not word.startswith("--"))  # parse_only has seen the options
    load(config, overrides)
    for name, small in WITHOUT_DATA.items():
        if Path(config).name.startswith(name):
            run_script(script, *arguments, *small)


def check_benchmark(script: Path, *arguments: str) -> None:
    """Have the settings read by their names and types, and nothing measured."""
    seen = []

    def measured(work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def note(**settings: Any) -> str:
            inspect.signature(work).bind(**settings)
            seen.append(settings)
            return ""

        return note

    with pytest.MonkeyPatch.context() as patch:
        for name, work in benchmarks.WORK.items():
            patch.setitem(benchmarks.WORK, name, measured(work))
        run_script(script, *arguments)
    assert len(seen) == 1


def check_pytest(*arguments: str) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-m", choices=["slow", "gpu"])
    parser.add_argument("-k", default="")
    parser.add_argument("-n", type=int)
    parser.add_argument("paths", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    for path in options.paths:
        assert path.exists()
        assert options.k in path.read_text(), path


def run_or_parse(script: Path, *arguments: str) -> None:
    """Run it, but for int8 where the processor has no instructions for it."""
    needs_vnni = script.stem == "quantize" or any(Path(argument).name == "int8.pt" for argument in arguments)
    if needs_vnni and not torch.cpu._is_vnni_supported():
        parse_only(script, *arguments)
    else:
        run_script(script, *arguments)


TREATMENTS: dict[str, Callable[..., None]] = {
    "tools/train.py": functools.partial(check_training, load=load_config),
    "tools/pretrain.py": functools.partial(check_training, load=load_pretrain_config),
    "tools/benchmark.py": check_benchmark,
    # Whether the limits are kept is not this file's to say.
    "tests/measures.py": run_script,
    **dict.fromkeys(
        [
            f"tools/{name}.py"
            for name in ("check_data", "convert", "convert_data", "describe", "eval", "eval_classifier")
        ],
        run_or_parse,
    ),
    **dict.fromkeys([f"tools/{name}.py" for name in ("export", "predict", "quantize")], run_or_parse),
}
"""What is done with each script."""


def treat(program: str, *arguments: str) -> None:
    """Run or check one command."""
    if program == "pip":
        install, editable, what = arguments
        assert (install, editable) == ("install", "-e")
        extra = re.fullmatch(r"\.(?:\[(\w+)\])?", what)
        assert extra
        assert extra[1] is None or re.search(rf"^{extra[1]} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    elif program == "srun":
        assert arguments[0] == "torchrun"  # which srun starts
    elif program == "torchrun":
        options = get_args_parser().parse_args(arguments)
        words = [options.training_script, *options.training_script_args]
        command = ["resdet", "train"] if options.no_python else ["tools/train.py"]
        assert words[: len(command)] == command
        load_config(words[len(command)], words[len(command) + 1 :])
    elif program == "resdet" and arguments[0] in ("recipes", "config", "--version", "--help"):
        main(arguments)
    elif program == "resdet":
        script = {"check": "check_data"}.get(arguments[0], arguments[0].replace("-", "_"))
        treat("python", f"tools/{script}.py", *arguments[1:])
    elif arguments[:2] == ("-m", "pytest"):
        check_pytest(*arguments[2:])
    elif arguments[:2] == ("-m", "venv"):
        assert arguments[2:] == (".venv",)
    elif arguments[0] == "-m":
        run_script(Path(str(importlib.util.find_spec(arguments[1]).origin)), *arguments[2:])  # type: ignore[union-attr]
    else:
        assert arguments[0] in TREATMENTS, f"{arguments[0]}: no known treatment"
        script = ROOT / arguments[0]
        assert script.is_file()
        TREATMENTS[arguments[0]](script, *arguments[1:])


@pytest.mark.parametrize("readme", [readme for readme in TEXTS if blocks("bash", readme)])
def test_bash_runs(readme: str, world: Path) -> None:
    """The blocks of a README in their order: later ones use what earlier ones wrote."""
    for block in blocks("bash", readme):
        for command in record(block, world):
            try:
                treat(*command)
            except BaseException as error:
                error.add_note(f"{block}: {' '.join(command)}") if hasattr(error, "add_note") else None
                raise


def test_ci_runs_the_commands_of_the_first_page() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    install, test = next(b for b in blocks("bash", "README.md") if "pytest" in b.code).code.strip().split(" && ")
    assert install in script.replace(" --quiet --disable-pip-version-check", "").replace("python -m pip", "pip")
    assert test in script


# ---- text


def prose(readme: str) -> str:
    """A README without its blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", TEXTS[readme], flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("readme", TEXTS)
def test_every_path_named_exists(readme: str) -> None:
    named = re.findall(r"`((?:resdet|configs|tools|tests)/[\w./]*)`", TEXTS[readme])
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("readme", TEXTS)
def test_every_file_of_code_named_exists(readme: str) -> None:
    """Written from the README's own folder, from a part of the package or from the commands."""
    folders = {(ROOT / readme).parent, ROOT, ROOT / "tools", *(path.parent for path in (ROOT / "resdet").rglob("*.py"))}
    kinds = r"\.py|/" if readme.startswith("resdet/") else r"\.py"
    named = [name for name in re.findall(rf"`([a-z][\w./]*(?:{kinds}))[` ]", prose(readme)) if name != "folder/"]
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []


def test_enough_paths_are_named() -> None:
    assert len(re.findall(r"`((?:resdet|configs|tools|tests)/[\w./]*)`", "".join(TEXTS.values()))) > 40


@pytest.mark.parametrize("readme", TEXTS)
def test_every_module_and_name_of_the_package_exists(readme: str) -> None:
    for dotted in re.findall(r"`(resdet(?:\.\w+)+)", prose(readme)):
        parts = dotted.split(".")
        depth = len(parts)
        while depth > 1 and importlib.util.find_spec(".".join(parts[:depth])) is None:
            depth -= 1
        functools.reduce(getattr, parts[depth:], importlib.import_module(".".join(parts[:depth])))


def test_counts_are_current() -> None:
    assert f" {len(KINDS)} kinds (`resdet/check/kinds.py`)" in TEXTS["tools/README.md"]


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        annotation = field.annotation
        for kind in (annotation, *get_args(annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_of(kind, f"{prefix}{name}.")


@pytest.mark.parametrize("readme", TEXTS)
def test_every_key_of_a_configuration_exists(readme: str) -> None:
    known = {*keys_of(Config), *keys_of(PretrainConfig)}
    sections = "|".join(sorted({key.split(".")[0] for key in known}))
    named = re.findall(rf"`((?:{sections})\.[a-z_][\w.]*\w)[`=]", prose(readme))
    assert [key for key in named if key not in known and not key.endswith((".py", ".yaml", ".txt", ".json"))] == []


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("readme", TEXTS)
def test_every_link_leads_somewhere(readme: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", prose(readme)):
        name, _, anchor = target.partition("#")
        path = (ROOT / readme).parent / name if name else ROOT / readme
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_the_first_page_is_short_and_leads_to_all_others() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= MAX_LINES
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", TEXTS["README.md"])}
    assert {readme for readme in TEXTS if readme not in linked} == {"README.md"}


def test_pictures_are_small_and_used() -> None:
    for picture in (ROOT / ".github" / "pictures").iterdir():
        assert picture.stat().st_size <= MAX_PICTURE_BYTES, picture.name
        assert any(f"pictures/{picture.name})" in text for text in TEXTS.values()), picture.name
