"""Where a model's first weights come from: a torchvision name, a file, a URL. Nothing is left out without a word."""

from __future__ import annotations

import difflib
import json
import logging
import os
import pickle
import re
import sys
import urllib.request
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlparse

import torch
import torchvision
from safetensors import safe_open
from torch import Tensor
from torchvision.models import WeightsEnum

from resdet.errors import WeightsError
from resdet.models.archs import ARCHS, ResNetArch
from resdet.models.bodies import Body, make_body
from resdet.models.layouts import count_blocks
from resdet.models.pickles import read_pickle

logger = logging.getLogger(__name__)

WeightsSource: TypeAlias = str | os.PathLike[str] | WeightsEnum | None

# A file name that ends so carries the first digits of its SHA-256; torch.hub's convention.
_HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,})\.")
_WRAPPERS = ("state_dict", "model", "blobs")
_BODY_PREFIXES = ("backbone.body.", "body.", "")
_STEMS = ("conv1.weight", "conv1.0.weight", "features.0.weight")


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
    """Read a ``.pth``, ``.pt``, ``.safetensors`` or ``.pkl`` file onto the CPU, without running any code it may hold.

    Returns:
        The file's dictionary as it is, with string keys. The numpy arrays of a ``.pkl`` (detectron2's model zoo, MSRA's
        networks) become tensors. What ``resdet.convert`` wrote into the metadata of a ``.safetensors`` file is an
        attribute of the dictionary.

    Raises:
        WeightsError: If the file is missing, damaged, holds anything but tensors and plain values, or no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: {'is a directory, not a file' if path.is_dir() else 'there is no such file'}")
    try:
        if path.suffix == ".safetensors":
            content: Any = _load_safetensors(path)
        elif path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            content = read_pickle(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)|unrecognized (?:class|function) (.+)", str(error))
        if refused is None:
            raise WeightsError(f"{path}: is damaged or not a PyTorch file ({_first_line(error)})") from error
        name = refused[1] or refused[2]
        raise WeightsError(
            f"{path}: loading it would run code of its own ({name}), which is refused; "
            + (
                "mmdetection's tools/model_converters/publish_model.py takes it away"
                if name.startswith(("mmengine.", "mmcv."))
                else "save its state_dict() alone where the file comes from"
            )
        ) from error
    except Exception as error:  # a damaged file fails in the unzipping, the unpickling or anything they call
        raise WeightsError(
            f"{path}: is damaged, cut short or not a {path.suffix or 'PyTorch'} file ({_first_line(error)})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise WeightsError(f"{path}: must hold a dictionary of named tensors, got {type(content).__name__}")
    return content


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        tensors = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118  # not a mapping
    if "resdet_facts" in about:
        setattr(tensors, "resdet_facts", json.loads(about["resdet_facts"]))  # noqa: B010  # torch.save's files too
    return tensors


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
        own = _published(arch)
        if source not in own.values():
            known = (
                f"whose weights are {name_some(map(str, own.values()))}" if own else "for which torchvision has none"
            )
            raise WeightsError(f"weights: {source} are not for {arch}, {known}")
        return fetch(source.url)
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
    """Give torchvision's weights of an architecture by name; none where it does not have the network."""
    if arch not in torchvision.models.list_models(module=torchvision.models):
        return {}
    return dict(torchvision.models.get_model_weights(arch).__members__)


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


def load_backbone_weights(body: Body, source: WeightsSource, arch: str) -> LoadReport:
    """Load a body's weights from wherever they are, and say in the log what was used and what was left over.

    Accepted are a ResNet's state dict as torchvision saves it (its ``fc`` and ``num_batches_tracked`` are left over), a
    detector's or backbone's (``backbone.body.``, ``body.``), each also inside ``"state_dict"`` or ``"model"`` and with
    ``"module."`` before its names; and those of other libraries (MSRA's ``R-101.pkl``) that ``resdet.models.convert``
    reads, if the body strides where theirs does. Such weights may want pixels of another mean and scale: the log says
    which, and ``weights_settings`` gives them to whoever builds a detector.

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
    content = read_checkpoint(path)
    tensors = tensors_in(content, str(path))
    prefix = body_prefix(tensors)
    if prefix is None or _carries_facts(content):
        tensors = _converted(content, path, body)
        prefix = body_prefix(tensors)
        assert prefix is not None, "conversion gives torchvision's names"
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


def body_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """Give what stands before the names of a body in torchvision's layout; None if there is no body."""
    return next((prefix for prefix in _BODY_PREFIXES for stem in _STEMS if f"{prefix}{stem}" in tensors), None)


def _carries_facts(content: Mapping[str, Any]) -> bool:
    """Whether the file was converted by us: then names alone may not show what the tensors are (BGR stems)."""
    from resdet.models.convert import FACTS_ENTRY

    return FACTS_ENTRY in content or hasattr(content, FACTS_ENTRY)


def _converted(content: Mapping[str, Any], path: Path, body: Body) -> dict[str, Tensor]:
    """Give another library's tensors under torchvision's names, if the body computes what they were trained for."""
    from resdet.models.convert import to_torchvision

    try:
        converted = to_torchvision(content)
    except WeightsError as error:
        raise WeightsError(f"{path}: holds no ResNet that is known here: {error}") from error
    facts = converted.facts
    if facts["stride_in_1x1"] != body.stride_in_1x1:
        where = "first 1x1" if facts["stride_in_1x1"] else "3x3"
        raise WeightsError(
            f"{path}: its bottlenecks stride in the {where} convolution: build the body with "
            f"stride_in_1x1={facts['stride_in_1x1']}"
        )
    logger.info(
        "%s: converted from %s; made for pixels of mean %s and standard deviation %s",
        path,
        facts["format"],
        [round(value, 4) for value in facts["image_mean"]],
        [round(value, 4) for value in facts["image_std"]],
    )
    return converted.tensors


def _fitting_archs(given: Mapping[str, Tensor]) -> list[str]:
    """Name the architectures whose convolutions are exactly those given."""

    def convolutions(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in tensors.items() if value.dim() == 4}

    depths = count_blocks(given)
    fitting = []
    for arch, shape in ARCHS.items():
        if isinstance(shape, ResNetArch) and depths != dict(enumerate(shape.depths, 1)):
            continue  # building it to find that out takes a second where there are 600 blocks
        with torch.device("meta"):
            if convolutions(make_body(arch).state_dict()) == convolutions(given):
                fitting.append(arch)
    return fitting


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
