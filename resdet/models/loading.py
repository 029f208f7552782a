"""Load first weights into a body, strictly: what was used and what was left over is logged."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resdet.errors import WeightsError, name_some
from resdet.models.archs import ARCHS, ResNetArch
from resdet.models.bodies import Body, make_body
from resdet.weights.files import LoadReport, body_prefix, read_checkpoint, tensors_in
from resdet.weights.layouts import count_blocks
from resdet.weights.source import WeightsSource, locate

logger = logging.getLogger(__name__)


def load_backbone_weights(body: Body, source: WeightsSource, arch: str) -> LoadReport:
    """Load a body's weights from wherever they are, and say in the log what was used and what was left over.

    Accepted are a ResNet's state dict as torchvision saves it (its ``fc`` and ``num_batches_tracked`` are left over), a
    detector's or backbone's (``backbone.body.``, ``body.``), each also inside ``"state_dict"`` or ``"model"`` and with
    ``"module."`` before its names; and those of other libraries (MSRA's ``R-101.pkl``) that ``resdet.weights.convert``
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


def _carries_facts(content: Mapping[str, Any]) -> bool:
    """Whether the file was converted by us: then names alone may not show what the tensors are (BGR stems)."""
    from resdet.weights.convert import FACTS_ENTRY

    return FACTS_ENTRY in content or hasattr(content, FACTS_ENTRY)


def _converted(content: Mapping[str, Any], path: Path, body: Body) -> dict[str, Tensor]:
    """Give another library's tensors under torchvision's names, if the body computes what they were trained for."""
    from resdet.weights.convert import to_torchvision

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
