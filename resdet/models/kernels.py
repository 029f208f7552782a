"""Whether kernels of Triton run on a device."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

logger = logging.getLogger(__name__)


@functools.cache
def kernels_run(device: torch.device) -> bool:
    """Return whether Triton's kernels run on a device; say once why not: Triton needs a C compiler, for one."""
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    else:
        from resdet.models.epilogue_kernels import run_epilogue_on_cuda

        try:
            with torch.cuda.device(device):
                run_epilogue_on_cuda(torch.zeros(1, 1, 1, 1, device=device), None, None, True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compilers, the driver, the file system: Triton has no class for them
            reason = f"{type(error).__name__}: {error}"
        else:
            return True
    logger.warning(
        "%s is slower than it could be, and waited for in each suppression of boxes: kernels cannot be compiled (%s)",
        device,
        reason,
    )
    return False
