"""Load weights into modules, strictly: what does not fit is an error, what was used or left over is logged."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from resdet.errors import WeightsError, name_some
from resdet.models.archs import ARCHS, ResNetArch
from resdet.models.bodies import Body, make_body
from resdet.models.spec import WeightsOrigin
from resdet.weights.files import WeightsFile
from resdet.weights.formats import body_prefix
from resdet.weights.layouts import count_blocks
from resdet.weights.source import WeightsSource, read_first_weights
from resdet.weights.tensors import COUNTER

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """How the tensors of a file were used."""

    source: str = ""  # where they came from; empty if weights stayed random
    loaded: tuple[str, ...] = ()  # names in the model that were set
    left_over: tuple[str, ...] = ()  # names in the file that the model has no place for
    reinitialised: tuple[str, ...] = ()  # names in the model that were deliberately not taken from the file

    def __str__(self) -> str:
        """Return one line for the log."""
        if not self.source:
            return "random weights"
        names = [name for name in self.left_over if not name.endswith(COUNTER)]
        counters = len(self.left_over) - len(names)
        left = [name_some(names)] if names else []
        left += [f"{counters} {COUNTER}"] if counters else []
        text = f"{len(self.loaded)} tensors from {self.source}; left over: {' and '.join(left) or 'none'}"
        if self.reinitialised:
            text += f"; freshly initialised: {name_some(self.reinitialised)}"
        return text


def load_strictly(module: nn.Module, file: WeightsFile, *, what: str, keep: tuple[str, ...] = ()) -> LoadReport:
    """Load a module's whole state dict, or raise the one error that names everything that does not fit.

    Only BatchNorm's counters (``num_batches_tracked``) may be missing or in excess. The message calls the module
    ``what`` ("this resnet34 detector"), and names the architecture that the file's convolutions are of, if it is
    another. Names that begin with one of ``keep`` stay as they are in the module, whatever the file holds.
    """
    state = module.state_dict()
    expected = {name: value for name, value in state.items() if not name.startswith(keep)}
    tensors = {name: value for name, value in file.tensors.items() if not name.startswith(keep)}
    missing = [name for name in expected if name not in tensors and not name.endswith(COUNTER)]
    extra = [name for name in tensors if name not in expected and not name.endswith(COUNTER)]
    wrong = [
        f"{name} is {list(tensors[name].shape)} and not {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    # Copied into another type, fractions would be cut off.
    wrong += [
        f"{name} is {tensors[name].dtype} and not {value.dtype}"
        for name, value in expected.items()
        if name in tensors
        and not name.endswith(COUNTER)
        and tensors[name].is_floating_point() != value.is_floating_point()
    ]
    if missing or extra or wrong:
        faults = [f"without {name_some(missing)}"] if missing else []
        faults += [f"with {name_some(extra)}"] if extra else []
        faults += [name_some(wrong)] if wrong else []
        own = fitting_archs(expected)
        others = [arch for arch in fitting_archs(file.tensors) if arch not in own]
        guess = f"; it looks like {' or '.join(others)}" if others else ""
        raise WeightsError(f"{file.path}: does not fit {what}: {'; '.join(faults)}{guess}")
    loaded = {name: tensors[name] for name in expected if name in tensors}
    module.load_state_dict(state | loaded)
    kept = tuple(name for name in state if name.startswith(keep))
    return LoadReport(str(file.path), tuple(loaded), file.left_over, kept)


def load_backbone_weights(
    body: Body, source: WeightsSource, arch: str, origin: WeightsOrigin | None = None
) -> LoadReport:
    """Load a body's weights from wherever they are; what was used and what was left over is logged.

    Every file that ``read_weights`` understands will do: a classifier's (its ``fc`` is left over), a backbone's or a
    detector's, of other libraries too, if the body strides where theirs does. Such weights may require pixels of
    another mean and scale, which ``WeightsFile.settings`` states. None leaves the weights as they are.
    """
    if source is None:
        return LoadReport()
    file = read_first_weights(source, arch, origin)
    prefix = body_prefix(file.tensors)
    if prefix is None:
        raise WeightsError(f"{file.path}: holds no body; its tensors are {name_some(file.tensors)}")
    check_stride(file, body)
    if file.facts:
        mean, std = ([round(value, 4) for value in file.facts[name]] for name in ("image_mean", "image_std"))
        logger.info(
            "%s: from %s, trained on pixels of mean %s and deviation %s", file.path, file.facts["format"], mean, std
        )
    state, given = body.state_dict(), _without_prefix(file.tensors, prefix)
    left_over = [name for name in file.tensors if name.removeprefix(prefix) not in state or not name.startswith(prefix)]
    file = replace(file, tensors=given, left_over=(*left_over, *file.left_over))
    # A file may have stages that the body does not have, but not other blocks in those it has.
    not_built = tuple(f"{stage}." for stage in _stages(given) - _stages(state))
    report = load_strictly(body, file, what=f"this {arch} with norm={body.norm!r}", keep=not_built)
    logger.info("%s: %s", arch, report)
    return report


def check_stride(file: WeightsFile, body: Body) -> None:
    """Raise a WeightsError unless a body strides where the weights of a file were trained to, as far as it tells."""
    in_1x1 = file.settings.get("stride_in_1x1", body.stride_in_1x1)
    if in_1x1 != body.stride_in_1x1:
        raise WeightsError(
            f"{file.path}: its bottlenecks stride in the {'first 1x1' if in_1x1 else '3x3'} convolution: build the "
            f"body with stride_in_1x1={in_1x1}"
        )


def _stages(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def fitting_archs(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the architectures whose convolutions, in the stages that the tensors have, are exactly the tensors'."""
    body = _without_prefix(tensors, body_prefix(tensors) or "")
    stages, depths = _stages(body), count_blocks(body)

    def convolutions(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {name: t.shape for name, t in tensors.items() if t.dim() == 4 and name.split(".")[0] in stages}

    fitting = []
    for arch, shape in ARCHS.items():
        if isinstance(shape, ResNetArch) and (
            not depths or not depths.items() <= dict(enumerate(shape.depths, 1)).items()
        ):
            continue  # building it to find that out takes a second where there are 600 blocks
        with torch.device("meta"):
            if convolutions(make_body(arch).state_dict()) == convolutions(body):
                fitting.append(arch)
    return fitting


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
