"""Where commands write: told before the work, never over an input, whole or not at all, also on a full disk."""

import errno
import importlib
import io
import json
import os
import resource
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from resdet.build import build_dataset, build_model
from resdet.classification import plots
from resdet.commands import eval as eval_command
from resdet.config import load_config
from resdet.config_reading import config_to_plain
from resdet.errors import InternalError, UserError, WeightsError
from resdet.evaluation.detect import Evaluation
from resdet.models.checkpoint import checkpoint_payload

ROOT = Path(__file__).resolve().parents[2]
HAS_VNNI = torch.cpu._is_vnni_supported()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO dataset of two images, and a run of an untrained detector on it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in (1, 2):
        pixels = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 80, "height": 64} for n in (1, 2)],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [9, 9, 30, 30]} for n in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "instances.json").write_text(json.dumps(document))
    source = f"{{format: coco, images: {folder}/images, annotations: {folder}/instances.json}}"
    small = ["model.min_size=64", "model.max_size=96", "model.out_channels=16", "model.box_head_channels=16"]
    config = load_config(
        ROOT / "configs" / "quickstart.yaml",
        [f"data.train={source}", f"data.val={source}", *small, "loader.num_workers=0"],
    )
    torch.manual_seed(0)
    model = build_model(config.model, build_dataset(config.data.train, training=True), resume_from=None)
    (folder / "run").mkdir()
    torch.save(checkpoint_payload(model) | {"config": config_to_plain(config)}, folder / "run" / "best.pt")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it, and the current folder."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copytree(made / "images", tmp_path / "images")
    shutil.copy(made / "instances.json", tmp_path)
    return tmp_path


def call(command: str, place: Path) -> None:
    """Call a command in this process; {} is the folder."""
    name, *arguments = shlex.split(command.replace("{}", str(place)))
    importlib.import_module(f"resdet.commands.{name}").main(arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


DATA = "'data.{}={{format: coco, images: {{}}/images, annotations: {{}}/{}}}'"
DESCRIBE = "describe resnet18 --weights {}/run/best.pt --responses {}/images"
DETECTOR = "export {}/run --what detector"
OVER_INPUTS = {
    "predict, its images": ("predict {}/run {}/images --output {}/images", "images/1.png"),
    "predict, its images through a link": ("predict {}/run {}/images --output {}/link", "link/1.png"),
    "predict, images that are links": ("predict {}/run {}/links --output {}/images", "images/1.png"),
    "predict, one image": ("predict {}/run {}/images/2.png --output {}/images", "images/2.png"),
    "predict, its checkpoint": ("predict {}/detections.json {}/images --output {}", "detections.json"),
    "export, its checkpoint": ("export {}/run --output {}/run/best.pt", "run/best.pt"),
    "export, its checkpoint by the report": ("export {}/detections.json --output {}/detections", "detections.json"),
    "export, an image": (f"{DETECTOR} --images {{}}/images --output {{}}/images/1.png", "images/1.png"),
    "export, its checkpoint by the pair": ("export {}/run/x.bin --format openvino --output {}/run/x.xml", "run/x.bin"),
    "convert": ("convert {}/run/best.pt --to torchvision --output {}/run/best.pt", "run/best.pt"),
    "quantize, its checkpoint": ("quantize {}/run --output {}/run/best.pt", "run/best.pt"),
    "quantize, annotations": (
        f"quantize {{}}/run {DATA.format('train', 'a/metrics.json')} --output {{}}/a/metrics.json",
        "a/metrics.json",
    ),
    "describe, weights": (
        "describe resnet18 --weights {}/weights.png --responses {}/images --output {}/weights.png",
        "weights.png",
    ),
    "describe, an image": (f"{DESCRIBE} --output {{}}/images/2.png", "images/2.png"),
    "eval, annotations": (
        f"eval {{}}/run {DATA.format('val', 'a/metrics.json')} --output {{}}/a",
        "a/metrics.json",
    ),
    "eval, annotations of the other split": (
        f"eval {{}}/run {DATA.format('train', 'a/detections.json')} --output {{}}/a",
        "a/detections.json",
    ),
    "eval of two runs, annotations": (
        f"eval {{}}/run {{}}/other {DATA.format('val', 'run/metrics.json')} --output {{}}",
        "run/metrics.json",
    ),
}


@pytest.mark.parametrize("case", OVER_INPUTS)
def test_no_output_replaces_an_input(case: str, place: Path) -> None:
    command, told = OVER_INPUTS[case]
    (place / "link").symlink_to(place / "images", target_is_directory=True)
    (place / "links").mkdir()
    (place / "links" / "1.png").symlink_to(place / "images" / "1.png")
    shutil.copy(place / "run" / "best.pt", place / "detections.json")
    shutil.copy(place / "run" / "best.pt", place / "weights.png")
    shutil.copy(place / "run" / "best.pt", place / "run" / "x.bin")
    (place / "a").mkdir()
    for name in ("a/metrics.json", "a/detections.json", "run/metrics.json"):
        shutil.copy(place / "instances.json", place / name)
    shutil.copytree(place / "run", place / "other")
    before = contents(place)
    with pytest.raises(UserError, match=f"{place / told}: the output would overwrite an input of this command"):
        call(command, place)
    assert contents(place) == before


IN_THE_WAY = {
    "predict": "predict {}/run {}/images --output",
    "eval": "eval {}/run --output",
    "export": "export {}/run --output",
    "convert": "convert {}/run/best.pt --to timm --output",
    "quantize": "quantize {}/run --output",
    "describe": f"{DESCRIBE} --output",
}


@pytest.mark.parametrize("command", IN_THE_WAY)
@pytest.mark.parametrize("kind", ["below a file", "a long name", "the other kind"])
def test_an_output_that_cannot_be_is_told_before_the_work(
    command: str, kind: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("torch.nn.Module.__call__", work)
    suffix = ".png" if command == "describe" else ".pth"
    (place / "file").touch()
    (place / f"folder{suffix}").mkdir()
    other = "file" if command in ("predict", "eval") else f"folder{suffix}"
    name = {"below a file": f"file/x{suffix}", "a long name": f"{'n' * 300}{suffix}", "the other kind": other}[kind]
    with pytest.raises(UserError, match=r"must be a (file|folder), but a|File name too long|Not a directory"):
        call(f"{IN_THE_WAY[command]} {{}}/{name}", place)


@pytest.mark.parametrize("name", ["metrics.json", "detections.json", "report.html"])
def test_a_folder_in_the_place_of_an_evaluations_file_is_told_before_the_work(name: str, place: Path) -> None:
    (place / "out" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name}: the output must be a file, but a folder has this name"):
        call("eval {}/run --output {}/out", place)


def test_a_plots_ending_is_told_before_the_work(place: Path) -> None:
    with pytest.raises(UserError, match=r"x\.txt: its ending must be one of .*png"):
        call("describe resnet18 --weights no --responses {}/images --output {}/x.txt", place)


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond ``num_bytes``; Python ignores the signal, so that writing raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


ON_A_FULL_DISK = {
    "predict": "predict {}/run {}/images --output {}/out",
    "eval": "eval {}/run --output {}/out",
    "export safetensors": "export {}/run --output {}/out/x",
    "export torchscript": "export {}/run --format torchscript --output {}/out/x",
    "export export": "export {}/run --format export --output {}/out/x",
    "export detector": f"{DETECTOR} --format torchscript --output {{}}/out/x",
    "export onnx": f"{DETECTOR} --format onnx --output {{}}/out/x",
    "export openvino": "export {}/run --format openvino --output {}/out/x.xml",
    "convert pth": "convert {}/run/best.pt --to torchvision --output {}/out/x.pth",
    "convert pkl": "convert {}/run/best.pt --to detectron2 --output {}/out/x.pkl",
    "convert safetensors": "convert {}/run/best.pt --to timm --output {}/out/x.safetensors",
    "quantize": "quantize {}/run --output {}/out/x",
    "describe png": f"{DESCRIBE} --output {{}}/out/x.png",
    "describe pdf": f"{DESCRIBE} --output {{}}/out/x.pdf",
}
SLOW_TO_EXPORT = ("export export", "export onnx", "export openvino")


@pytest.mark.usefixtures("capsys")  # progress bars are written to memory, not to pytest's file
@pytest.mark.parametrize("num_bytes", [pytest.param(0, marks=pytest.mark.slow), 300])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW_TO_EXPORT)) for case in ON_A_FULL_DISK]
)
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(case: str, num_bytes: int, place: Path) -> None:
    if case == "quantize" and not HAS_VNNI:
        pytest.skip("int8 needs a CPU with AVX512-VNNI")
    if case in ("export onnx", "export openvino"):
        pytest.importorskip({"export onnx": "onnxruntime", "export openvino": "openvino"}[case])
    out = place / "out"
    out.mkdir()
    with pytest.raises(OSError) as caught, full_disk(num_bytes):  # noqa: PT011 - its attributes are checked below
        call(ON_A_FULL_DISK[case], place)
    assert Path(caught.value.filename).parent == out
    assert not list(out.iterdir())


def test_a_plot_of_errors_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "error": 0.5}\n{"step": 2, "error": 0.25}\n')
    with pytest.raises(OSError, match=r"x\.svg"), full_disk(300):
        plots.main([str(tmp_path / "run"), "--output", str(tmp_path / "x.svg")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class FullStdout(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", [*IN_THE_WAY, "eval of two runs"])
def test_files_are_written_before_stdout_is_tried(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command == "quantize" and not HAS_VNNI:
        pytest.skip("int8 needs a CPU with AVX512-VNNI")
    shutil.copytree(place / "run", place / "other")
    called = {"eval of two runs": "eval {}/run {}/other --output"}.get(command) or IN_THE_WAY[command]
    files = {"eval": "out/report.html", "eval of two runs": "out/report.html", "predict": "out/detections.json"}
    suffix = {"convert": ".pth", "describe": ".png"}.get(command, "")
    monkeypatch.setattr(sys, "stdout", FullStdout())
    with pytest.raises(OSError, match="No space left on device: 'standard output'"):
        call(f"{called} {{}}/out{suffix}", place)
    assert (place / files.get(command, f"out{suffix}")).is_file()


def test_numbers_that_are_not_pycocotools_own_end_an_evaluation_when_all_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fault of ours, code 1; each of several runs is compared, and eval.reference=false compares none."""
    shutil.copytree(place / "run", place / "other")
    detect = importlib.import_module("resdet.evaluation.detect")
    real = detect.coco_metrics
    monkeypatch.setattr(detect, "coco_metrics", lambda *a, **k: replace(real(*a, **k), AR_10=0.5))
    with pytest.raises(
        InternalError, match=r"out/run/metrics\.json: our numbers and those of pycocotools .* AR_10 0\.5"
    ):
        call("eval {}/run {}/other --output {}/out", place)
    for name in ("run", "other"):
        document = json.loads((place / "out" / name / "metrics.json").read_text())
        assert document["metrics"]["AR_10"] == 0.5 != document["reference"]["AR_10"]
        assert (place / "out" / name / "detections.json").is_file()
    page = (place / "out" / "report.html").read_text()
    assert page.count("computes other values of AR_10: do not cite them.") == 2
    call("eval {}/run --output {}/alone eval.reference=false", place)
    assert "reference" not in json.loads((place / "alone" / "metrics.json").read_text())
    assert "of pycocotools" not in (place / "alone" / "report.html").read_text()


def test_a_table_is_shown_before_the_next_evaluation(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "run", place / "other")
    detect = importlib.import_module("resdet.evaluation.detect")  # the package has a function of this name
    real, calls = detect.evaluate, []

    def evaluate(*arguments: Any) -> Evaluation:
        calls.append(capsys.readouterr().out)
        if len(calls) == 2:
            raise UserError("the second fails")
        result: Evaluation = real(*arguments)
        return result

    monkeypatch.setattr(detect, "evaluate", evaluate)
    with pytest.raises(UserError, match="the second fails"):
        call("eval {}/run {}/other --output {}/out", place)
    assert calls[1].startswith("run\nclass ")
    assert calls[1].endswith(f"written: {place}/out/run/metrics.json, {place}/out/run/detections.json\n")


@pytest.mark.parametrize(
    "text", ['{"what": "my notes"}', *(pytest.param(text, marks=pytest.mark.slow) for text in ("[1]", "no JSON"))]
)
def test_an_exports_report_replaces_no_other_file(text: str, place: Path) -> None:
    (place / "x.json").write_text(text)
    before = contents(place)
    with pytest.raises(UserError) as caught:
        call("export {}/run --output {}/x", place)
    assert str(caught.value) == (
        f"{place}/x.json: would be replaced by the report of this export, but is none of an earlier one; give another "
        "--output"
    )
    assert contents(place) == before
    for _ in range(2):  # the second replaces the report of the first
        call("export {}/run --output {}/y", place)


def test_names_of_runs_differ_by_more_than_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [Path("Run/best.pt"), Path("run/best.pt"), Path("other/last.pt")]
    assert eval_command.name_runs(paths) == ["1_Run_best", "2_run_best", "other"]


def test_an_override_may_be_longer_than_a_files_name(place: Path) -> None:
    call(f"eval {{}}/run output_dir={'x' * 300} --output {{}}/out", place)
    assert (place / "out" / "metrics.json").is_file()


WRONG_CHECKPOINTS = {
    "predict": "predict {0} {0}",
    "eval": "eval {0}",
    "export": "export {0} --output {0}.pt",
    "convert": "convert {0} --to timm --output {0}.pth",
    "quantize": "quantize {0}",
    "describe": "describe resnet18 --weights {0} --responses {0}",
    "eval_classifier": "eval_classifier {0}",
}


@pytest.mark.parametrize("command", WRONG_CHECKPOINTS)
@pytest.mark.parametrize("kind", ["folder", "image", "text", "empty", "missing"])
def test_what_is_no_checkpoint_is_named_in_one_line(command: str, kind: str, place: Path) -> None:
    path = {"folder": place / "images", "image": place / "images" / "1.png"}.get(kind, place / kind)
    if kind in ("text", "empty"):
        path.write_text("notes\n" if kind == "text" else "")
    with pytest.raises(UserError) as caught:
        call(WRONG_CHECKPOINTS[command].format(path), place)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["eval {}/classifier.pt", "quantize {}/classifier.pt", "eval_classifier {}/run"])
def test_a_checkpoint_of_the_other_task_is_named_in_one_line(command: str, place: Path) -> None:
    network = torchvision.models.resnet18(weights=None)
    torch.save({"model": network.state_dict(), "config": {"model": {"arch": "resnet18"}}}, place / "classifier.pt")
    other = "a detector, not a classifier" if "classifier " in command else "a classifier, not a detector"
    with pytest.raises(WeightsError, match=rf"\.pt: holds {other}; `resdet eval[a-z-]*` evaluates it$"):
        call(command, place)
