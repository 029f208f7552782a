"""Errors that a user can correct, one type for each kind; commands print them in one line and exit with code 2."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Control characters but for tab and newline, Unicode's line breaks, overrides of the writing direction, surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Something outside the program must change; the message says what must hold, what was found, and where."""


class ConfigError(UserError):
    """A configuration is incomplete, wrong or contradictory.

    Attributes:
        problems: Every problem found, one readable line each, in the order of the file.
    """

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        lines = [f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
        super().__init__("\n".join(lines + [f"  {problem}" for problem in problems]))


class DataError(UserError):
    """A dataset, an annotation file or an image is missing, unreadable or contradicts itself."""


class UnreadableImageError(DataError):
    """An image file is missing, empty, cut short, or holds no pixels that can be read."""


class WeightsError(UserError):
    """Weights or a checkpoint are missing, damaged, or made for another model."""


class TrainingError(UserError):
    """Training cannot continue with these settings (a non-finite loss, too high a learning rate)."""


class InternalError(RuntimeError):
    """A check of our own results has failed: nothing that a user can correct, but something to report."""


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """A run stopped on a signal, with all its work saved.

    Attributes:
        exit_code: 128 + the signal's number, as in shells (143 for SIGTERM, 130 for SIGINT).
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def name_some(names: Iterable[str], limit: int = 4) -> str:
    """Return the first names as a list for a message, with the number of those left out."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def shortened(text: object, limit: int = 500) -> str:
    """Return a text for a message, its beginning and its length where it is longer than ``limit`` characters."""
    text = str(text)
    return text if len(text) <= limit else f"{text[: limit // 5]}... ({len(text)} characters)"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def printable(text: str) -> str:
    r"""Return a text with control characters as escapes (``\x1b``), so that no name from a file steers a terminal.

    Tabs and newlines stay.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_name(text: str) -> str:
    """Return a name as ``printable`` does, on one line: for a row of a table, or a picture."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")
