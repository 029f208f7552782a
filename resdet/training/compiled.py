"""``train.compile``: a network compiled by torch's inductor, for training alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from resdet.errors import UserError, first_line
from resdet.models.detector import Detector

SIDE_MULTIPLE = 128
"""Of it is the longer side of padded training images: each size is compiled by itself, for about a minute."""

_MOST_SIZES = 64
"""Sizes that are compiled; further ones run as they do without ``train.compile``, after a warning of torch's."""


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Compile a module in place: names in its state dict stay as they are, and a copy of it is not compiled.

    Compilation takes place at the first call with inputs of each size.

    Raises:
        UserError: If inductor cannot compile for this device, for want of a C++ compiler say.
    """
    try:
        torch.compile(_trial, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of whatever kind: inductor's, Triton's, a compiler's
        raise UserError(
            f"train.compile: must find what inductor needs to compile for {device.type} (a C++ compiler, g++ or "
            f"the environment's CXX; on GPUs Triton too), got {type(error).__name__}: {first_line(error)}"
        ) from error
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_SIZES)
    network.compile(dynamic=False)


def compile_detector(model: Detector, device: torch.device) -> None:
    """Compile a detector's body and pyramid, and let it pad training images to few sizes.

    Where more is padded, features near the edge of an image change, as they do where it shares a batch with a larger
    one, and anchors in the padding are drawn as background a little more often.

    Raises:
        UserError: As ``compile_network``.
    """
    compile_network(model.backbone, device)
    model.transform.longer_multiple = SIDE_MULTIPLE


def without_compiled_code(is_compiled: bool) -> AbstractContextManager[object]:
    """Return a context in which compiled modules run as they are written.

    Evaluation takes it, so that its numbers are those of ``resdet eval``, and its own image sizes are not compiled.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def _trial(values: Tensor) -> Tensor:
    return values * 1.5 + 0.5
