"""Names in folders: which are images, which are no part of a dataset, which look alike.

Reading a configuration imports this module, so it imports no NumPy.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
"""What folders are searched for; the decoder goes by a file's content, not its name."""

_CLUTTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def is_hidden(name: str) -> bool:
    """Check whether a name in a folder is an operating system's and no part of a dataset.

    It begins with a dot (``._a.jpg`` holds a Mac's attributes of ``a.jpg``, not pixels) or is a folder such as
    ``__MACOSX``.
    """
    return name.startswith(".") or name in _CLUTTER


def same_form(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), in which names that look identical are equal.

    Macs write the letters of file names decomposed (NFD), most other programs composed.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def list_folder(folder: Path) -> set[str]:
    """Return the names in a folder without hidden ones, none where it cannot be read."""
    try:
        return {name for name in os.listdir(folder) if not is_hidden(name)}
    except (OSError, ValueError):
        return set()


def on_disk(path: Path) -> Path:
    """Return a path as the disk has it if its names differ from the disk's in Unicode's form alone, else as it is."""
    if str(path).isascii() or os.path.exists(path):
        return path
    folder = on_disk(path.parent)
    same = [name for name in list_folder(folder) if same_form(name) == same_form(path.name)]
    return folder / same[0] if len(same) == 1 else path


def similar_path(path: Path) -> str:
    """Return the end of a message on a missing path: what lies beside it under a similar name, or nothing.

    Names are similar that differ in upper and lower case or in Unicode's form alone.
    """
    wanted = same_form(path.name).casefold()
    similar = [name for name in list_folder(path.parent) if same_form(name).casefold() == wanted]
    return f"; did you mean {path.parent / similar[0]}?" if len(similar) == 1 else ""
