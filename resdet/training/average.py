"""The exponential moving average of a model's weights: a few launches a step, and nothing to wait for.

torch's ``AveragedModel`` computes the same, but copies its count to the device at each update, which waits, and every
buffer by itself: ResNet-101 with frozen norms has 416.
"""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import Tensor, nn


class AveragedModel(nn.Module):
    """A copy of a model, whose weights are a moving average of the model's.

    After the first update they are the model's own, after each later one ``decay * average + (1 - decay) * model``. If
    a norm keeps running statistics, buffers are averaged too: the statistics of the last weights are not those of the
    averaged ones. Otherwise buffers do not change in training and are copied.

    Its state dict has the names of ``torch.optim.swa_utils.AveragedModel``: ``n_averaged`` and ``module.*``.

    Source: that class with ``get_ema_multi_avg_fn(decay)``, bit for bit. A whole number is averaged as a float and cut
        off, as there.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)
        self.register_buffer("n_averaged", torch.tensor(0))  # stays in host memory: it is read at each update
        self._decay = decay
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
        self._averages_buffers = any(norm.track_running_stats for norm in norms)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of the model after another step into the average."""
        own: list[Tensor] = [*self.module.parameters(), *self.module.buffers()]
        new: list[Tensor] = [*model.parameters(), *model.buffers()]
        num_averaged = len(own) if self._averages_buffers else len(list(model.parameters()))
        if self.n_averaged == 0:
            num_averaged = 0
        if own[num_averaged:]:
            torch._foreach_copy_(own[num_averaged:], new[num_averaged:])
        self._move(own[:num_averaged], new[:num_averaged])
        self.n_averaged += 1

    def _move(self, own: list[Tensor], new: list[Tensor]) -> None:
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for mine, its in zip(own, new, strict=True):
            by_type[mine.dtype][0].append(mine)
            by_type[mine.dtype][1].append(its)
        for dtype, (mine_of_type, its_of_type) in by_type.items():
            if dtype.is_floating_point:
                torch._foreach_lerp_(mine_of_type, its_of_type, 1 - self._decay)
                continue
            # Counters of batch norms: one number each, so they are computed side by side.
            before, after = (torch.cat([part.flatten() for part in parts]) for parts in (mine_of_type, its_of_type))
            moved = (before * self._decay + after * (1 - self._decay)).to(dtype)
            parts = torch.split(moved, [part.numel() for part in mine_of_type])
            torch._foreach_copy_(mine_of_type, [p.view_as(m) for p, m in zip(parts, mine_of_type, strict=True)])
