"""Where a model's first weights come from: a torchvision name, a file, a URL. Nothing is left out without a word."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from resdet.errors import WeightsError, first_line, name_some
from resdet.weights.pickles import read_pickle

logger = logging.getLogger(__name__)
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


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``.pth``, ``.pt``, ``.safetensors`` or ``.pkl`` file onto the CPU, without running any code it may hold.

    Returns:
        The file's dictionary as it is, with string keys. The numpy arrays of a ``.pkl`` (detectron2's model zoo, MSRA's
        networks) become tensors. What ``convert_file`` wrote into the metadata of a
        ``.safetensors`` file is an attribute of the dictionary.

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
            raise WeightsError(f"{path}: is damaged or not a PyTorch file ({first_line(error)})") from error
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
            f"{path}: is damaged, cut short or not a {path.suffix or 'PyTorch'} file ({first_line(error)})"
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


def body_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """Give what stands before the names of a body in torchvision's layout; None if there is no body."""
    return next((prefix for prefix in _BODY_PREFIXES for stem in _STEMS if f"{prefix}{stem}" in tensors), None)
