"""Where a model's first weights come from: a torchvision name, a file, a URL. Nothing is left out without a word."""

from __future__ import annotations

import difflib
import logging
import os
import pickle
import re
import sys
import urllib.request
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlparse

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum

from resdet.errors import WeightsError
from resdet.models.resnet import ARCHS, ResNet

logger = logging.getLogger(__name__)

WeightsSource: TypeAlias = str | os.PathLike[str] | WeightsEnum | None

# A file name that ends so carries the first digits of its SHA-256; torch.hub's convention.
_HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,})\.")
_WRAPPERS = ("state_dict", "model")
_BODY_PREFIXES = ("backbone.body.", "body.", "")


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file.

    Attributes:
        source: Where they came from; empty if weights stayed random.
        loaded: Names in the model that were set.
        left_over: Names in the file that the model has no place for.
        reinitialised: Names in the model that were deliberately not taken from the file.
    """

    source: str = ""
    loaded: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    reinitialised: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        if not self.source:
            return "random weights"
        counters = sum(name.endswith("num_batches_tracked") for name in self.left_over)
        names = [name for name in self.left_over if not name.endswith("num_batches_tracked")]
        left = [name_some(names)] if names else []
        left += [f"{counters} num_batches_tracked"] if counters else []
        text = f"{len(self.loaded)} tensors from {self.source}; left over: {' and '.join(left) or 'none'}"
        if self.reinitialised:
            text += f"; freshly initialised: {name_some(self.reinitialised)}"
        return text


def name_some(names: Iterable[str], limit: int = 4) -> str:
    """List the first names and count the others."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``.pth``, ``.pt`` or ``.safetensors`` file onto the CPU, without running any code it may hold.

    Returns:
        The file's dictionary as it is, with string keys.

    Raises:
        WeightsError: If the file is missing, damaged, holds anything but tensors and plain values, or no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: {'is a directory, not a file' if path.is_dir() else 'there is no such file'}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)|unrecognized (?:class|function) (.+)", str(error))
        if refused is None:
            raise WeightsError(f"{path}: is damaged or not a PyTorch file ({_first_line(error)})") from error
        name = refused[1] or refused[2]
        raise WeightsError(
            f"{path}: loading it would run code of its own ({name}), which is refused; "
            "save its state_dict() alone where the file comes from"
        ) from error
    except Exception as error:  # a damaged file fails in the unzipping, the unpickling or anything they call
        raise WeightsError(
            f"{path}: is damaged, cut short or not a {path.suffix or 'PyTorch'} file ({_first_line(error)})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise WeightsError(f"{path}: must hold a dictionary of named tensors, got {type(content).__name__}")
    return content


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the named tensors of a file.

    They may lie inside a ``"state_dict"`` or ``"model"`` entry, and ``"module."`` before their names is taken away.

    Raises:
        WeightsError: As ``read_checkpoint``; and if there are no tensors in the file.
    """
    return tensors_in(read_checkpoint(path), os.fspath(path))


def tensors_in(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Find the state dict in what ``read_checkpoint`` gave.

    Raises:
        WeightsError: If there is none.
    """
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{source}: holds no tensors; its keys are {name_some(map(str, content)) or 'none'}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def locate(source: str | os.PathLike[str] | WeightsEnum, arch: str) -> Path:
    """Find the file behind a weights argument, downloading it if it is a URL or torchvision's.

    Args:
        source: A torchvision weight name for ``arch``, the enum itself, a file, or an http, https or file URL.
        arch: torchvision's name of the network.

    Raises:
        WeightsError: If there is no such name or file, or the download fails.
    """
    if isinstance(source, WeightsEnum):
        own = torchvision.models.get_model_weights(arch)
        if not isinstance(source, own):
            raise WeightsError(f"weights: {source} are not for {arch}, whose weights are {name_some(map(str, own))}")
        return fetch(source.url)
    text = os.fspath(source)
    if urlparse(text).scheme in ("http", "https", "file"):
        return fetch(text)
    if not isinstance(source, str) or Path(text).exists() or Path(text).suffix or os.sep in text:
        return Path(text)
    names = list(torchvision.models.get_model_weights(arch).__members__)
    if text in names:
        return fetch(torchvision.models.get_model_weights(arch)[text].url)
    near = difflib.get_close_matches(text.upper(), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"{arch} has {', '.join(names)}"
    raise WeightsError(f"weights: {text!r} is no file, no URL and no weights of {arch}; {hint}")


def fetch(url: str) -> Path:
    """Give the local file of a URL, downloading it into torch.hub's cache if it is not there.

    A hash in the file name (``-<8 or more hex digits>.``) is checked on downloading. A file counts as downloaded only
    once it can be read as a whole, so that a broken connection leaves nothing behind.

    Raises:
        WeightsError: If the file cannot be downloaded or is not what its name or format says; the message names the URL
            and the path at which the file would have been found.
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
        hash_prefix = in_name[1] if in_name else None
        torch.hub.download_url_to_file(url, str(incoming), hash_prefix, progress=sys.stderr.isatty())
        # A connection that ends early raises nothing: only reading the file tells.
        read_checkpoint(incoming)
        os.replace(incoming, path)
    except OSError as error:  # URLError and HTTPError among them
        raise WeightsError(f"{url}: cannot be downloaded ({_first_line(error)}); {by_hand}") from error
    except RuntimeError as error:
        raise WeightsError(
            f"{url}: the download does not have the hash in its name ({_first_line(error)}); {by_hand}"
        ) from error
    except WeightsError as error:
        raise WeightsError(f"{url}: the download is damaged or no weights file; {by_hand}") from error
    finally:
        incoming.unlink(missing_ok=True)
    return path


def load_backbone_weights(body: ResNet, source: WeightsSource, arch: str) -> LoadReport:
    """Load a body's weights from wherever they are, and say in the log what was used and what was left over.

    Accepted are a ResNet's state dict as torchvision saves it (its ``fc`` and ``num_batches_tracked`` are left over), a
    detector's or backbone's (``backbone.body.``, ``body.``), each also inside ``"state_dict"`` or ``"model"`` and with
    ``"module."`` before its names.

    Args:
        body: Changed in place, unless an error is raised.
        source: None (weights stay as they are), a torchvision weight name, the enum itself, a file or a URL.
        arch: The body's architecture.

    Raises:
        WeightsError: If the weights cannot be had, a tensor of the body is missing or has another shape, or the file
            has tensors for a stage of the body that the body does not have; if they fit another architecture, it is
            named.
    """
    if source is None:
        return LoadReport()
    path = locate(source, arch)
    tensors = read_tensors(path)
    prefix = next((p for p in _BODY_PREFIXES if f"{p}conv1.weight" in tensors), None)
    if prefix is None:
        raise WeightsError(
            f"{path}: has no 'conv1.weight', so it holds no ResNet; its tensors are {name_some(tensors)}"
        )
    given = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    expected = body.state_dict()
    # BatchNorm's count of steps is absent from weights of frozen norms, and only matters to momentum=None.
    missing = [name for name in expected if name not in given and not name.endswith("num_batches_tracked")]
    wrong = [
        f"{name} is {_shape(given[name])} and not {_shape(value)}"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    built = {name.split(".")[0] for name in expected}
    extra = [
        name
        for name in given
        if name not in expected and name.split(".")[0] in built and not name.endswith("num_batches_tracked")
    ]
    if missing or wrong or extra:
        faults = [f"without {name_some(missing)}"] if missing else []
        faults += [name_some(wrong)] if wrong else []
        faults += [f"with {name_some(extra)}"] if extra else []
        others = [name for name in _fitting_archs(given) if name != arch]
        guess = f"; it looks like {' or '.join(others)}" if others else ""
        raise WeightsError(f"{path}: does not hold a {arch} with norm={body.norm!r}: {'; '.join(faults)}{guess}")

    loaded = tuple(name for name in expected if name in given)
    body.load_state_dict(expected | {name: given[name] for name in loaded})
    left_over = tuple(
        name for name in tensors if name.removeprefix(prefix) not in expected or not name.startswith(prefix)
    )
    report = LoadReport(str(path), loaded, left_over)
    logger.info("%s: %s", arch, report)
    return report


def _fitting_archs(given: Mapping[str, Tensor]) -> list[str]:
    """Name the architectures whose convolutions are exactly those given."""

    def convolutions(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in tensors.items() if value.dim() == 4}

    fitting = []
    for arch in ARCHS:
        with torch.device("meta"):
            if convolutions(ResNet(arch).state_dict()) == convolutions(given):
                fitting.append(arch)
    return fitting


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
