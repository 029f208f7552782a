"""Find the file that a weights argument names: torchvision's name for it, a path or a URL."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urldefrag, urlparse

import torch
import torchvision
from torchvision.models import WeightsEnum

from resdet.errors import WeightsError, name_some
from resdet.files import one_at_a_time
from resdet.models.spec import WeightsOrigin
from resdet.weights.download import download
from resdet.weights.files import WeightsFile, read_checkpoint, read_weights

logger = logging.getLogger(__name__)

# First weights: torchvision's name or enum, a path, a URL, a file that has been read, or None for random ones.
WeightsSource: TypeAlias = str | os.PathLike[str] | WeightsEnum | WeightsFile | None

# torch.hub's convention: such a file name holds the first digits of the file's SHA-256.
_HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,})\.")


def locate(source: str | os.PathLike[str] | WeightsEnum, arch: str) -> Path:
    """Return the file that a weights argument names; a URL, or torchvision's, is downloaded once.

    ``source`` is a torchvision weight name for ``arch``, the enum itself, a file, or an http, https or file URL.
    """
    if isinstance(source, WeightsEnum):
        own = _published(arch)
        if source in own.values():
            return fetch(source.url)
        known = f"whose weights are {name_some(map(str, own.values()))}" if own else "for which torchvision has none"
        raise WeightsError(f"weights: {source} are not for {arch}, {known}")
    text = os.fspath(source)
    if urlparse(text).scheme in ("http", "https", "file"):
        return fetch(text)
    if not isinstance(source, str) or Path(text).exists() or Path(text).suffix or os.sep in text:
        return Path(text)
    own = _published(arch)
    if text in own:
        return fetch(own[text].url)
    near = difflib.get_close_matches(text.upper(), own, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"{arch} has {', '.join(own) or 'none in torchvision'}"
    raise WeightsError(f"weights: {text!r} is no file, no URL and no weights of {arch}; {hint}")


def read_first_weights(
    source: str | os.PathLike[str] | WeightsEnum | WeightsFile,
    arch: str,
    origin: WeightsOrigin | None = None,
    settings: Mapping[str, Any] | None = None,
) -> WeightsFile:
    """Read what ``locate`` finds as ``read_weights`` does; a name of torchvision's states the origin."""
    if isinstance(source, WeightsFile):
        return read_weights(source, origin)
    path = locate(source, arch)
    if origin in (None, WeightsOrigin()) and (isinstance(source, WeightsEnum) or source in _published(arch)):
        origin = WeightsOrigin(format="torchvision")
    return read_weights(path, origin, settings)


def _published(arch: str) -> dict[str, WeightsEnum]:
    """Return torchvision's weights of an architecture by name; none where it does not have the network."""
    if arch not in torchvision.models.list_models(module=torchvision.models):
        return {}
    return dict(torchvision.models.get_model_weights(arch).__members__)


def fetch(url: str) -> Path:
    """Return the local file of a URL, which is downloaded into torch.hub's cache if it is not there.

    The cache knows a file by its name if a hash is in it (``-<8 or more hex digits>.``, which is checked), as torch.hub
    does, and else by its URL. One process downloads, others wait for it. The file is read as a whole before it is moved
    into place: what breaks off or is something else leaves nothing behind, and the next download removes what a process
    that was killed has left.
    """
    parts = urlparse(url)
    if parts.scheme == "file":
        return Path(urllib.request.url2pathname(parts.path))
    name = os.path.basename(parts.path)
    if not name:
        raise WeightsError(f"{url}: names no file")
    hub, in_name = Path(torch.hub.get_dir()), _HASH_IN_NAME.search(name)
    key = hashlib.sha256(urldefrag(url).url.encode()).hexdigest()[:16]
    folder = hub / "checkpoints" if in_name else hub / "checkpoints" / key
    path = folder / name
    if not path.exists():
        with one_at_a_time(hub / "locks" / f"{key}.lock", timeout=-1):
            if not path.exists():  # nor has another process brought it meanwhile
                _download(url, path, in_name and in_name[1])
                return path
    logger.info("%s: using the file at %s", url, path)
    return path


def _download(url: str, path: Path, digits: str | None) -> None:
    logger.info("downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_partial(path)
        incoming = path.with_name(f".{path.stem[:200]}.partial{path.suffix}")
        try:
            download(url, incoming, digits)
            read_checkpoint(incoming)
            os.replace(incoming, path)
        finally:
            incoming.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error.strerror or error})") from error
    except WeightsError as error:
        told = str(error).replace(str(incoming), f"{url}: the download", 1)
        raise WeightsError(f"{told}; put the file of that URL at {path}") from error


def _remove_partial(path: Path) -> None:
    """Remove what earlier versions left of downloads to ``path`` when they were killed."""
    left = re.compile(rf"{re.escape(path.stem)}\.[0-9a-f]{{32}}{re.escape(path.suffix)}(\.[0-9a-f]{{32}}\.partial)?")
    for other in path.parent.iterdir():
        if left.fullmatch(other.name):
            other.unlink(missing_ok=True)
