"""Convert weights files: read safely, converted to another library's names and layout, moved into place when whole."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from resdet.errors import UserError, WeightsError
from resdet.files import save_tensors, written_whole
from resdet.models.spec import WeightsOrigin
from resdet.weights.convert import (
    Converted,
    Written,
    facts_to_carry,
    find_format,
    log_assumptions,
    settings_for,
    to_torchvision,
    write,
)
from resdet.weights.facts import FACTS_ENTRY
from resdet.weights.files import read_checkpoint
from resdet.weights.layouts import Tensors
from resdet.weights.networks import WRAPPERS, find_network
from resdet.weights.tensors import check_weights

# Which libraries read pickles: the others' files are PyTorch's.
_PICKLE_FORMATS = ("detectron2", "detectron")
_SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors")


@dataclass(frozen=True)
class ConversionReport:
    """How a file was converted."""

    read: Converted  # the source in torchvision's layout
    written: Written  # the same as it was written
    settings: dict[str, Any]  # those under which the target library must build the model, by that library's names
    not_copied: tuple[str, ...]  # entries of the source file besides its state dict


def convert_file(
    source: str | os.PathLike[str],
    target_format: str,
    output: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    origin: WeightsOrigin | None = None,
) -> ConversionReport:
    """Convert a weights file from one library's format to another's.

    Args:
        source: ``.pth``, ``.pt``, ``.pkl`` or ``.safetensors``; read without running any code it may hold.
        target_format: A key of ``resdet.weights.layouts.FORMATS``.
        output: The file to write, in the wrapping that the target library reads: ``.pth`` or ``.pt``; ``.pkl`` for
            detectron2 and detectron; ``.safetensors``. Each carries the facts that no tensor shows under
            ``FACTS_ENTRY``, so that it can be converted further without losing them.
        source_format: By default the one that the names in the file show.
        origin: What is known of the weights besides, where the file does not say it.
    """
    source, output = Path(source), Path(output)
    for name in filter(None, (target_format, source_format)):
        find_format(name)
    if output.suffix not in _SUFFIXES:
        raise UserError(f"{output}: must end in {', '.join(_SUFFIXES)}")
    if output.suffix == ".pkl" and target_format not in _PICKLE_FORMATS:
        raise UserError(f"{output}: {target_format} reads no pickles; write .pth or .safetensors")
    content = read_checkpoint(source)
    try:
        network = find_network(content, str(source), None if origin is None else origin.prefix)
        read = to_torchvision(content, source_format, origin=origin, network=network)
        written = write(read.tensors, target_format, read.facts)
    except WeightsError as error:
        raise error if str(error).startswith(f"{source}: ") else WeightsError(f"{source}: {error}") from error
    check_weights(written.tensors, str(source))
    log_assumptions(str(source), read.facts, read.assumed)
    facts = facts_to_carry(target_format, read.facts)
    with written_whole(output) as temporary:
        if output.suffix == ".safetensors":
            tensors = {name: tensor.clone() for name, tensor in written.tensors.items()}
            temporary.write_bytes(save(tensors, {FACTS_ENTRY: json.dumps(facts)}))
        elif output.suffix == ".pkl":
            with temporary.open("wb") as file:
                pickle.dump(_as_pickle(written.tensors, target_format, read.kind, facts), file, protocol=4)
        else:
            save_tensors(_wrapped(written.tensors, target_format, facts), temporary)
    copied = (FACTS_ENTRY, *(key for key in WRAPPERS if isinstance(content.get(key), dict)))
    other = tuple(key for key, value in content.items() if not isinstance(value, Tensor) and key not in copied)
    return ConversionReport(read, written, settings_for(target_format, read), other)


def _wrapped(tensors: Tensors, target_format: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Wrap a state dict as the library's own PyTorch files are."""
    if target_format in ("detectron2", "maskrcnn-benchmark"):
        return {"model": tensors, FACTS_ENTRY: facts}
    if target_format in ("mmdetection", "mmdetection-caffe"):
        return {"meta": {}, "state_dict": tensors, FACTS_ENTRY: facts}
    # The other libraries load a bare state dict. They ignore attributes of it, as torch's own _metadata is one.
    bare = OrderedDict(tensors)
    setattr(bare, FACTS_ENTRY, facts)
    return bare


def _as_pickle(tensors: Tensors, target_format: str, kind: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Wrap arrays as detectron2's ``DetectionCheckpointer._load_file`` expects them."""
    arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    if target_format == "detectron":
        return {"blobs": arrays, FACTS_ENTRY: facts}
    # A body alone is named by the endings of its names in a detector, which detectron2 then matches itself.
    return {"model": arrays, "__author__": "resdet", "matching_heuristics": kind != "detector", FACTS_ENTRY: facts}
