"""What all commands share: one line and exit code 2 for what a user can change, and nothing raw on the terminal."""

import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from resdet.commands.run import run_tool, show
from resdet.errors import UserError, printable

ESCAPES = "cat\x1b]0;owned\x07\x9b31m\u202egpj.exe\r"


def code_of(main: object) -> object:
    with pytest.raises(SystemExit) as caught:
        run_tool(main)  # type: ignore[arg-type]
    return caught.value.code


@pytest.fixture(autouse=True)
def _logging_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "argv", ["resdet", "argument"])


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
