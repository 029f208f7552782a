"""What all commands share: one line and exit code 2 for what a user can change, and nothing raw on the terminal."""

import importlib
import io
import logging
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import resdet.commands
from resdet.commands.run import checkpoint_in, command_parser, run_tool, show
from resdet.errors import InternalError, UserError, printable

ROOT = Path(__file__).resolve().parents[2]
ESCAPES = "cat\x1b]0;owned\x07\x9b31m\u202egpj.exe\r"


def code_of(main: object) -> object:
    with pytest.raises(SystemExit) as caught:
        run_tool(main)  # type: ignore[arg-type]
    return caught.value.code


@pytest.fixture(autouse=True)
def _as_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "argv", ["resdet", "argument"])


def test_an_error_of_the_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: Sequence[str]) -> None:
        (tmp_path / "no" / "file").write_text("")

    assert code_of(main) == 2
    assert capsys.readouterr().err == f"resdet: {tmp_path / 'no' / 'file'}: No such file or directory\n"


def test_a_fault_of_ours_that_a_check_found_is_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: Sequence[str]) -> None:
        raise InternalError("m.json: the numbers differ")

    assert code_of(main) == 1
    assert capsys.readouterr().err.endswith(": m.json: the numbers differ\n")


def test_no_name_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: Sequence[str]) -> None:
        show(ESCAPES)
        logging.getLogger("resdet.test").warning("class %s", ESCAPES)
        raise UserError(f"class {ESCAPES}")

    assert code_of(main) == 2
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "cat\\x1b]0;owned\\x07\\x9b31m\\u202egpj.exe\\r" in text
        assert not set("\x1b\x07\x9b\u202e\r") & set(text)


def test_ordinary_text_is_shown_as_it_is() -> None:
    text = "Straße\tcafé 猫 🐈\nsecond line"
    assert printable(text) == text


def test_an_encoding_that_lacks_a_letter_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert code_of(lambda _: show("猫")) == 0
    assert written.getvalue() == b"\\u732b\n"


COMMANDS = [
    module.name for module in pkgutil.iter_modules(resdet.commands.__path__) if module.name not in ("run", "main")
]
AFTER_OPTIONS = {
    "check": ["{config}", "--examples", "0", "nothing.known=1"],
    "describe": ["resnet18", "--image-size", "32", "32", "unheard_of"],
    "eval": ["{folder}/run", "--output", "{folder}", "{folder}/run"],
    "eval_classifier": ["{folder}/best.pt", "--arch", "resnet18", "nothing.known=1"],
    "predict": ["{folder}/best.pt", "{config}", "--output", "{folder}", "{folder}/photo.jpg"],
    "quantize": ["{folder}/best.pt", "--images", "2", "nothing.known=1"],
}
"""Arguments that end after the options' values, in which something else is wrong."""


@pytest.mark.parametrize("name", AFTER_OPTIONS)
def test_arguments_may_stand_after_options(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"resdet.commands.{name}").main
    (tmp_path / "recipe.yaml").write_text("{}")
    words = [word.format(config=tmp_path / "recipe.yaml", folder=tmp_path) for word in AFTER_OPTIONS[name]]
    assert code_of(lambda _: main(words)) == 2
    assert "unrecognized arguments" not in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_parses_in_one_way(name: str) -> None:
    source = Path(importlib.import_module(f"resdet.commands.{name}").__file__ or "").read_text(encoding="utf-8")
    if name == "benchmark":  # whose arguments are for a script of the checkout
        source = (ROOT / "tools" / "benchmark.py").read_text(encoding="utf-8")
    assert "parser.parse_intermixed_args(arguments)" in source
    assert ".parse_args(" not in source


def run_with_output(redirection: str, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``main``, of which ``code`` is the body, in a shell whose files may not grow, with its output elsewhere."""
    script = f"from resdet.commands.run import *\nimport sys\ndef main(arguments):\n    {code}\nrun_tool(main)"
    command = f'ulimit -f 0; "$0" -c "$1" {redirection}'
    arguments = ["bash", "-c", command, sys.executable, script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=60, check=False, cwd=folder, env=environment
    )


@pytest.mark.parametrize("code", ["show('text')", "show('text ' * 10_000)", "print('text')"])
def test_a_full_disk_under_stdout_is_one_line(code: str, tmp_path: Path) -> None:
    done = run_with_output("> log", code, tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("-c: standard output: " if "show" in code else "-c: ")
    assert line.endswith("File too large")


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "2> log", "| head -c 1"])
def test_streams_that_are_closed_or_full_do_not_change_the_exit_code(redirection: str, tmp_path: Path) -> None:
    piped = "; exit ${PIPESTATUS[0]}" if "|" in redirection else ""
    done = run_with_output(redirection + piped, "show('text ' * 100_000)", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_with_output(redirection + piped, "raise UserError('what to change')", tmp_path)
    assert done.returncode == 2
    assert done.stderr == ("" if "2>" in redirection else "-c: what to change\n")


def test_usage_errors_quote_no_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_parser("x", "y").parse_args([ESCAPES])
    assert caught.value.code == 2
    assert "unrecognized arguments: cat\\x1b]0;owned" in capsys.readouterr().err


def test_a_folder_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    assert checkpoint_in(file) == file
    with pytest.raises(
        UserError, match=r"must be a checkpoint or the folder of a run, but this folder holds no best\.pt"
    ):
        checkpoint_in(tmp_path)
    (tmp_path / "best.pt").touch()
    assert checkpoint_in(tmp_path) == tmp_path / "best.pt"
