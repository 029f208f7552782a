"""What all commands share: one line and exit code 2 for what a user can change, and nothing raw on the terminal."""

import importlib
import io
import logging
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import resdet.commands
from resdet.commands.run import run_tool, show
from resdet.errors import UserError, printable

ESCAPES = "cat\x1b]0;owned\x07\x9b31m\u202egpj.exe\r"


def code_of(main: object) -> object:
    with pytest.raises(SystemExit) as caught:
        run_tool(main)  # type: ignore[arg-type]
    return caught.value.code


@pytest.fixture(autouse=True)
def _logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    level = logging.getLogger("resdet").level
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "argv", ["resdet", "argument"])
    yield
    logging.getLogger("resdet").setLevel(level)


def test_an_error_of_the_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: Sequence[str]) -> None:
        (tmp_path / "no" / "file").write_text("")

    assert code_of(main) == 2
    assert capsys.readouterr().err == f"resdet: {tmp_path / 'no' / 'file'}: No such file or directory\n"


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


COMMANDS = [module.name for module in pkgutil.iter_modules(resdet.commands.__path__) if module.name != "run"]
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
    assert "parser.parse_intermixed_args(arguments)" in source
    assert ".parse_args(" not in source
