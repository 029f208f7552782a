"""A run's state: how far it has come, and the model with everything that trains it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from resdet.errors import WeightsError, first_line
from resdet.processes import Processes
from resdet.training.average import AveragedModel
from resdet.training.clock import Schedule
from resdet.training.optim import LearningRate, build_optimizer
from resdet.training.settings import RunSettings

logger = logging.getLogger(__name__)

_SAVED = ("step", "best", "num_worse", "evaluated", "metrics", "log_sums", "log_steps", "schedule", "num_images")
_OF_LEARNER = ("optimizer", "scaler", "ema")
_SAVED_BY_ALL = {*_SAVED, *_OF_LEARNER} - {"schedule", "num_images"}  # older files lack these two


@dataclass
class RunState:
    """How far a run has come.

    There is no random state in it: every random number of a run follows from its seed and the step.
    """

    step: int = 0  # optimizer steps done
    best: float | None = None  # eval.best_metric of the best evaluation so far; None before the first
    num_worse: int = 0  # evaluations since then
    evaluated: int | None = None  # step of the last evaluation; None before the first
    metrics: dict[str, float] = field(default_factory=dict)  # of that evaluation
    log_sums: dict[str, Tensor] = field(default_factory=dict)  # since the last line of the log; see step.add_up
    log_steps: int = 0  # they were summed over
    schedule: Schedule = field(default_factory=dict)  # LearningRate's and Clock's; empty if it follows the step alone
    num_images: dict[str, int] = field(default_factory=dict)  # of the splits train and val
    # What follows is not saved.
    num_steps: int = 0  # of the whole run; with ``minutes`` as the clock has decided by now
    saved: int | None = None  # step that last.pt holds; None if it holds none of this run
    num_pieces: int = 1  # in which each micro-batch is computed; more than one after memory ran out
    logged_at: float = field(default_factory=time.perf_counter)  # start of the log's interval, without evaluations
    data_s: float = 0.0  # waited for images since then


@dataclass(frozen=True)
class Learner:
    """A model and everything that trains it."""

    settings: RunSettings
    team: Processes
    model: nn.Module
    parallel: nn.Module  # the model, or its wrapper for several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss for fp16; switched off for other precisions
    rate: LearningRate
    average: AveragedModel | None  # of the weights; None without one

    @property
    def micro_batch_size(self) -> int:
        """The number of images that this process holds at a time."""
        return self.team.micro_batch_size(self.settings.train.batch_size, self.settings.train.accumulate)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and that best.pt holds."""
        return self.model if self.average is None else self.average.module

    def clip_gradient(self, max_norm: float | None) -> Tensor:
        """Return the 2-norm of the whole gradient, clipped to ``max_norm`` afterwards unless that is None."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if max_norm is not None:
            self.scaler.unscale_(self.optimizer)
            return clip_grad_norm_(trained, max_norm)
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        # By a tensor: get_scale() would wait for the device. A scale is a power of two, so the bits are the same.
        return norm / self.scaler.scale(torch.ones_like(norm)) if self.scaler.is_enabled() else norm


def set_up(model: nn.Module, settings: RunSettings, team: Processes, saved: dict[str, Any]) -> tuple[Learner, RunState]:
    """Build a run's optimizer and what goes with it; load ``saved``, the training state that it resumes from.

    Settings are always the configuration's, also those that an optimizer's state carries along. ``saved`` loses its
    tensors to whatever they are loaded into, so that memory does not hold them twice.
    """
    optim, rate = settings.optim, LearningRate(settings)
    if settings.resume_from is not None and not _SAVED_BY_ALL <= saved.keys() <= {*_SAVED, *_OF_LEARNER}:
        raise WeightsError(f"{settings.resume_from}: its training state is another version's: {sorted(saved)}")
    optimizer = build_optimizer(
        model,
        name=optim.name,
        lr=rate.base,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        norm_weight_decay=optim.norm_weight_decay,
        body_lr_factor=settings.body_lr_factor,
    )
    scaler = torch.amp.GradScaler(team.device.type, enabled=settings.train.precision == "fp16")
    average = None if settings.train.ema_decay is None else AveragedModel(model, settings.train.ema_decay)
    state = RunState(schedule=rate.first_schedule())
    if saved:
        try:
            _load_optimizer(optimizer, saved.pop("optimizer"))
            if saved["scaler"]:
                scaler.load_state_dict(saved["scaler"])
            if (ema := saved.pop("ema")) and average is not None:
                average.load_state_dict(ema)
            state = RunState(**{name: saved[name] for name in _SAVED if name in saved}, saved=saved["step"])
            state.schedule = rate.first_schedule() | state.schedule
            state.log_sums = {name: value.to(team.device) for name, value in state.log_sums.items()}
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{settings.resume_from}: its training state does not fit this run: {first_line(error)}"
            ) from error
        if settings.is_rejudged:
            state.best, state.num_worse = None, 0
            logger.info("evaluations are not comparable with earlier ones: the best checkpoint is sought anew")
        logger.info("resumed from %s at step %d", settings.resume_from, state.step)
    state.num_steps = settings.num_steps
    state.num_images = {"train": settings.num_images, "val": settings.num_val_images}
    return Learner(settings, team, model, team.parallel(model), optimizer, scaler, rate, average), state


def training_state(learner: Learner, state: RunState) -> dict[str, Any]:
    """Return what last.pt holds in addition to the model: tensors (not copied) and plain values."""
    return {name: getattr(state, name) for name in _SAVED} | {
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "ema": {} if learner.average is None else learner.average.state_dict(),
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's state and keep its own settings, but for the rate, which is set at each step."""
    own = [{name: group[name] for name in group if name not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group |= settings
