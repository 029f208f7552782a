"""Names and texts on the disk: which names are images' or no part of a dataset, which are alike, how texts are encoded.

Reading a configuration imports this module, so it imports no NumPy.
"""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from resdet.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
"""What folders are searched for; the decoder goes by a file's content, not its name."""

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval"),
    "test": ("test", "testing"),
}
"""The splits of a dataset by the names that they have in files and folders, usual ones first."""

_CLUTTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")

# What XML writers declare, by the names of Python's codecs. Others are left out because decoding them can be costly.
_ENCODINGS = ("utf-8", "ascii", "iso8859", "cp", "mac-", "koi8", "gb", "big5", "shift_jis", "euc_")


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


def same_forms(names: Iterable[str]) -> list[str]:
    """Return class names in composed Unicode, or as they are if two of them would become one."""
    names = list(names)
    composed = [same_form(name) for name in names]
    return composed if len(set(composed)) == len(set(names)) else names


def is_file(path: Path | str) -> bool:
    """Check that a file exists; a name that no file can have (too long, with a NUL) is that of none."""
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):
        return False


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


def decode_text(data: bytes) -> str:
    """Decode a file by the byte order mark, else by XML's declaration, else as UTF-8.

    The text that is checked for entities is thus the one that the parser sees.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    declared = re.match(rb"""\s*<\?xml[^>]{,200}?encoding\s*=\s*["']([A-Za-z0-9._-]{1,40})["']""", data)
    encoding = "utf-8-sig"
    # A declaration that can be read byte by byte is not UTF-16: some writers declare that and save as UTF-8.
    if declared and not declared[1].lower().startswith((b"utf-16", b"utf16")):
        encoding = declared[1].decode()
        name = codecs.lookup(encoding).name
        if not name.startswith(_ENCODINGS):
            raise LookupError(f"encoding {encoding} is not among those read; save it as UTF-8")
    return data.decode(encoding)


def read_text(path: Path) -> str:
    """Return the contents of a text file, decoded by ``decode_text``; a DataError reports what cannot be read."""
    try:
        return decode_text(path.read_bytes())
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
