"""Find the file that a weights argument names: torchvision's name for it, a path or a URL."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import urllib.request
import uuid
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlparse

import torch
import torchvision
from torchvision.models import WeightsEnum

from resdet.errors import WeightsError, first_line, name_some
from resdet.weights.files import WeightsFile, read_checkpoint

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


def _published(arch: str) -> dict[str, WeightsEnum]:
    """Return torchvision's weights of an architecture by name; none where it does not have the network."""
    if arch not in torchvision.models.list_models(module=torchvision.models):
        return {}
    return dict(torchvision.models.get_model_weights(arch).__members__)


def fetch(url: str) -> Path:
    """Return the local file of a URL, which is downloaded into torch.hub's cache if it is not there.

    A hash in the file name (``-<8 or more hex digits>.``) is checked after the download. The file is read as a whole
    before it is moved into place, so that a broken connection leaves nothing behind.
    """
    parts = urlparse(url)
    if parts.scheme == "file":
        return Path(urllib.request.url2pathname(parts.path))
    name = os.path.basename(parts.path)
    if not name:
        raise WeightsError(f"{url}: names no file")
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        logger.info("%s: using the file at %s", url, path)
        return path
    logger.info("downloading %s to %s", url, path)
    incoming = path.with_name(f"{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    by_hand = f"put the file of that URL at {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        in_name = _HASH_IN_NAME.search(name)
        torch.hub.download_url_to_file(url, str(incoming), in_name and in_name[1], progress=sys.stderr.isatty())
        # A connection that ends early raises nothing: reading the file does.
        read_checkpoint(incoming)
        os.replace(incoming, path)
    except OSError as error:  # URLError and HTTPError among them
        raise WeightsError(f"{url}: cannot be downloaded ({first_line(error)}); {by_hand}") from error
    except RuntimeError as error:
        raise WeightsError(
            f"{url}: the download does not have the hash in its name ({first_line(error)}); {by_hand}"
        ) from error
    except WeightsError as error:
        raise WeightsError(f"{url}: the download is damaged or no weights file; {by_hand}") from error
    finally:
        incoming.unlink(missing_ok=True)
    return path
