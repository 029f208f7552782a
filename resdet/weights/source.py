"""Find the file that a weights argument names: a published detector's or torchvision's name for it, a path or a URL."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urldefrag, urlparse

import torch
import torchvision
from torchvision.models import WeightsEnum

from resdet.errors import UserError, WeightsError, name_some
from resdet.files import one_at_a_time, write_text
from resdet.models.spec import WeightsOrigin
from resdet.weights.download import download
from resdet.weights.files import WeightsFile, read_checkpoint, read_weights
from resdet.weights.zoo import PUBLISHED, Published, find_published, sha256_in

logger = logging.getLogger(__name__)

# First weights: torchvision's name or enum, a path, a URL, a file that has been read, or None for random ones.
WeightsSource: TypeAlias = str | os.PathLike[str] | WeightsEnum | WeightsFile | None

_ENUM_NAME = re.compile(r"\w+_Weights\.\w+")  # of one of torchvision's enums, as its builders take it


def locate(source: str | os.PathLike[str] | WeightsEnum, arch: str | None = None, *, progress: bool = True) -> Path:
    """Return the file that a weights argument names; one with an address is downloaded once.

    Args:
        source: A published detector's name (``resdet.weights.zoo``); a torchvision weight name for ``arch``, or a
            member of torchvision's enums; a file; a run's folder, for its best.pt; or an http, https or file URL.
        arch: What the weights must be for, if they say it; None takes any detector.
        progress: Show how a download gets on.

    Raises:
        WeightsError: If there are no such weights, they are for another network, or they cannot be downloaded.
    """
    if isinstance(source, WeightsEnum):
        if arch is None or _member(source, arch) or find_published(source.url):
            return _fetched(source.url, arch, progress)
        own = _torchvisions(arch)
        known = f"whose weights are {name_some(map(str, own.values()))}" if own else "for which torchvision has none"
        raise WeightsError(f"weights: {source} are not for {arch}, {known}")
    text = os.fspath(source)
    if urlparse(text).scheme in ("http", "https", "file"):
        return _fetched(text, arch, progress)
    path = Path(text)
    is_path = not isinstance(source, str) or os.sep in text or (path.suffix and not _ENUM_NAME.fullmatch(text))
    if is_path or path.exists():
        if path.exists() and (entry := find_published(text)):
            _log_licence(entry.name)
        return _best_of(path) if path.is_dir() else path
    if text in PUBLISHED:
        return _fetched(PUBLISHED[text].url, arch, progress)
    if member := _member(text, arch):
        return fetch(member.url, progress=progress)
    names = {name.lower(): name for name in [*_torchvisions(arch), *_published_for(arch)]}
    near = difflib.get_close_matches(text.lower(), names, n=2)
    hint = f"did you mean {' or '.join(repr(names[name]) for name in near)}? " if near else ""
    known = f"known are {', '.join(names.values())}" if names else f"{arch} has none in torchvision"
    whose = "published detector" if arch is None else f"weights of {arch}"
    raise WeightsError(f"weights: {text!r} is no file, no URL and no {whose}; {hint}{known}")


def _best_of(run: Path) -> Path:
    if not (run / "best.pt").is_file():
        raise WeightsError(f"{run}: must be a checkpoint or the folder of a run, but this folder holds no best.pt")
    return run / "best.pt"


def _fetched(url: str, arch: str | None, progress: bool) -> Path:
    """Fetch a URL; for a published detector, check first that it is of ``arch``, and log its licence."""
    entry = find_published(url)
    if entry is None:
        return fetch(url, progress=progress)
    if arch not in (None, entry.arch):
        hint = f", or take {' or '.join(others)}" if (others := _published_for(arch)) else ""
        raise WeightsError(f"weights: {entry.name} is of {entry.arch}, not of {arch}: set arch to {entry.arch}{hint}")
    path = fetch(url, progress=progress)
    _log_licence(entry.name)
    return path


@cache
def _log_licence(name: str) -> None:
    """Log the licence of a published detector, once in a process."""
    logger.info("%s: licence of these weights: %s", name, PUBLISHED[name].licence)


def read_first_weights(
    source: str | os.PathLike[str] | WeightsEnum | WeightsFile,
    arch: str,
    origin: WeightsOrigin | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    progress: bool = True,
) -> WeightsFile:
    """Read what ``locate`` finds as ``read_weights`` does; a name of torchvision's states the origin."""
    if isinstance(source, WeightsFile):
        return read_weights(source, origin)
    path = locate(source, arch, progress=progress)
    if origin in (None, WeightsOrigin()) and _member(source, arch):
        origin = WeightsOrigin(format="torchvision")
    return read_weights(path, origin, settings)


def _torchvisions(arch: str | None) -> dict[str, WeightsEnum]:
    """Return torchvision's weights of an architecture by name; none where it does not have the network."""
    if arch not in torchvision.models.list_models(module=torchvision.models):
        return {}
    return dict(torchvision.models.get_model_weights(arch).__members__)


def _member(source: str | os.PathLike[str] | WeightsEnum, arch: str | None) -> WeightsEnum | None:
    """Return the member of torchvision's enum that is meant, by its name with or without the enum's, or as it is."""
    own = _torchvisions(arch)
    return next((one for name, one in own.items() if source in (one, name, f"{type(one).__name__}.{name}")), None)


def _published_for(arch: str | None) -> list[str]:
    return [name for name, entry in PUBLISHED.items() if arch in (None, entry.arch)]


def fetch(url: str, *, progress: bool = True) -> Path:
    """Return the local file of a URL, which is downloaded into torch.hub's cache if it is not there.

    The cache knows a file by its name if a hash is in it (``-<8 or more hex digits>.``, which is checked), as torch.hub
    does, or if it is a published detector's, and else by its URL. One process downloads, others wait for it. The file
    is read as a whole before it is moved into place: what is something else leaves nothing behind, and what breaks off
    is continued by the next call where the server allows it (``resdet.weights.download``).

    A published detector's file is checked whenever it is asked for: its size and hash as far as they are published,
    and the SHA-256 that it had when it was first there, which is kept beside it (``FILE.sha256``).
    """
    parts = urlparse(url)
    if parts.scheme == "file":
        return Path(urllib.request.url2pathname(parts.path))
    name = os.path.basename(parts.path)
    if not name:
        raise WeightsError(f"{url}: names no file")
    entry = find_published(url)
    hub = Path(torch.hub.get_dir())
    key = hashlib.sha256(urldefrag(url).url.encode()).hexdigest()[:16]
    folder = hub / "checkpoints" if entry or sha256_in(name) else hub / "checkpoints" / key
    path = folder / name
    if not path.exists():
        with one_at_a_time(hub / "locks" / f"{key}.lock", timeout=-1):
            if not path.exists():  # nor has another process brought it meanwhile
                _download(url, path, entry, progress)
                return path
    logger.info("%s: using the file at %s", url, path)
    if entry is not None:
        try:
            _check(path, f"{path}: the file", path, entry)
        except WeightsError as error:
            raise WeightsError(f"{error}; without the file it is downloaded again") from None
    return path


def _download(url: str, path: Path, entry: Published | None, progress: bool) -> None:
    logger.info("downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_partial(path)
        incoming = path.with_name(f".{path.stem[:200]}.partial{path.suffix}")
        download(url, incoming, progress=progress)
        try:
            _check(incoming, f"{url}: the download", path, entry)
            read_checkpoint(incoming)
            os.replace(incoming, path)
        finally:
            incoming.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error.strerror or error})") from error
    except WeightsError as error:
        told = str(error).replace(str(incoming), f"{url}: the download", 1)
        where = f"put the file of that URL at {path}"
        if entry is not None:
            where = f"without a network, put {path.name} from that URL into {path.parent}{os.sep}"
        raise WeightsError(f"{told}; {where}") from error


def _check(file: Path, what: str, path: Path, entry: Published | None) -> None:
    """Compare a file with what is published of it, and with the SHA-256 that was recorded for ``path``.

    Costs one reading of the file, a second for 500 MB.
    """
    expected = sha256_in(path.name)
    if entry is None and not expected:
        return
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            sha256.update(chunk)
            md5.update(chunk)
    found, size = sha256.hexdigest(), file.stat().st_size
    if entry is not None and entry.size not in (None, size):
        raise WeightsError(f"{what} has {size} bytes, and not the published {entry.size}")
    if not found.startswith(expected):
        raise WeightsError(f"{what} has the SHA-256 {found}, and not the published {expected}...")
    if entry is None:
        return
    if not md5.hexdigest().startswith(entry.md5):
        raise WeightsError(f"{what} has the MD5 {md5.hexdigest()}, and not the published {entry.md5}...")
    record = path.with_name(f"{path.name}.sha256")
    recorded = record.read_text(encoding="utf-8").split()[:1] if record.exists() else []
    if recorded not in ([], [found]):
        raise WeightsError(
            f"{what} has the SHA-256 {found}, but the first file of this name had {recorded[0]} (remove {record} if "
            "you trust the new one)"
        )
    if not recorded:
        with suppress(OSError, UserError):  # a folder that others fill
            write_text(record, f"{found}  {path.name}\n")


def _remove_partial(path: Path) -> None:
    """Remove what earlier versions left of downloads to ``path`` when they were killed."""
    left = re.compile(rf"{re.escape(path.stem)}\.[0-9a-f]{{32}}{re.escape(path.suffix)}(\.[0-9a-f]{{32}}\.partial)?")
    for other in path.parent.iterdir():
        if left.fullmatch(other.name):
            other.unlink(missing_ok=True)
