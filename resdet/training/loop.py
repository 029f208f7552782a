"""The training loop, for detection and for classification: ``run`` reads from top to bottom.

What is trained is a ``Task``; the two are in ``resdet/training/detection.py`` and ``resdet/classification/task.py``.
Set-up is in ``launch.py`` (processes, folder, signals) and ``state.py`` (optimizer, average, resume).
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor, nn

from resdet.errors import Interrupted, TrainingError
from resdet.files import write_text
from resdet.processes import Processes
from resdet.training import guards
from resdet.training.checkpoint import BEST, LAST, reported_disk_errors, save_checkpoint, save_last
from resdet.training.clock import OPEN_END, Clock, check_minutes, knows_evaluation
from resdet.training.folder import CONFIG
from resdet.training.guards import Moment
from resdet.training.interrupt import StopNow, StopSignals
from resdet.training.runlog import RunLog, memory_in_use
from resdet.training.settings import Callback, RunSettings
from resdet.training.state import Learner, RunState, set_up, training_state
from resdet.training.step import BatchT, accumulate_gradients, add_up

logger = logging.getLogger(__name__)


class Task(Protocol[BatchT]):
    """What is trained, on what, and how it is evaluated."""

    image_size_keys: str  # the configuration's keys that make images smaller, for the message when memory runs out
    shown_metrics: Sequence[str]  # those that the terminal shows

    @property
    def model(self) -> nn.Module:
        """The model that is trained, on its device."""

    def describe(self) -> Sequence[str]:
        """Return lines for the log on model and data."""

    def batches(self, start_step: int) -> Generator[BatchT, None, None]:
        """Return this process's micro-batches after ``start_step`` steps, without end, until it is closed."""

    def losses(self, parallel: nn.Module, batch: BatchT) -> dict[str, Tensor]:
        """Compute the losses of a batch, as ``resdet.training.step.Losses`` says."""

    def not_finite(self, moment: Moment, values: dict[str, Tensor], batches: Sequence[BatchT]) -> TrainingError:
        """Save a step whose loss or gradient is not finite and return the error that reports it."""

    def logged(self, means: dict[str, float]) -> dict[str, float]:
        """Return what the log says of an interval, from the means of ``losses`` and ``grad_norm``."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of ``self.model`` or its average; every process calls this."""

    def report(self, log: RunLog, step: int, *, is_final: bool) -> None:
        """Write files on the last evaluation, in the main process; ``is_final`` says whether it ends the run."""

    def payload(self, model: nn.Module) -> dict[str, Any]:
        """Return the model, or its average, as checkpoints hold it; its state dict is ``model``."""


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run."""

    output_dir: Path
    steps: int  # optimizer steps done in total; fewer than asked for if it stopped early
    metrics: dict[str, float]  # of the last evaluation: AP, AP50, ...; or top1, top5, val_loss
    best: float  # value of eval.best_metric in all evaluations; best.pt is that model
    seconds: float  # wall-clock time of this call, evaluations included


def run(
    task: Task[BatchT],
    settings: RunSettings,
    team: Processes,
    *,
    begun: float,
    saved: dict[str, Any],
) -> TrainResult:
    """Train until the last step, an early stop or a signal; leave checkpoints and logs in the run's folder.

    Outside the forward pass the host waits for a GPU once in each step, to see whether loss and gradient are finite,
    and once more for a line of the log.

    Every process of ``team`` calls this. ``begun`` is when the run began (``time.perf_counter``), ``saved`` the
    training state to resume from, empty for a new run. Errors are as ``resdet.train`` documents them.
    """
    train = settings.train
    learner, state = set_up(task.model, settings, team, saved)
    clock = begin_clock(settings, team, state, begun)
    batches = task.batches(state.step)
    start, evaluated, folder = state.step, state.evaluated, settings.output_dir
    run_log = RunLog(folder, num_steps=state.num_steps, start_step=start, evaluated=evaluated, enabled=team.is_main)
    # Closed here: what ends a run may be kept by its caller, with all variables of this function.
    with closing(batches), run_log as log, StopSignals(team.world_size) as stop:
        if team.is_main:
            write_plan(task, learner, state)
        learner.model.train()
        state.logged_at = time.perf_counter()
        while True:
            # Evaluate if it is time to; the clock of the training log stands still meanwhile.
            if evaluation_is_due(state, settings, clock):
                if state.saved != state.step:
                    save(task, learner, state)  # evaluation can take long: keep what was trained
                paused = time.perf_counter()
                with stoppable(task, learner, state, stop):
                    line = evaluate(task, learner, state, log)
                save(task, learner, state)
                if clock is not None:
                    clock.after_evaluation(seconds_since(paused, team), elapsed=seconds_since(begun, team))
                tell(settings.on_evaluation, line, task, learner, state)
                state.logged_at += time.perf_counter() - paused
            if is_over(state, settings):
                break

            # Every random number of a step follows from (seed, step, rank), or from its image's seed: a resumed run
            # repeats it without saved random states, and random numbers drawn between steps cannot change it.
            random_seed = team.step_seed(settings.seed, state.step)
            torch.manual_seed(random_seed)
            lr = learner.rate.at(state.step, state.schedule)
            for group in learner.optimizer.param_groups:
                group["lr"] = lr * group["lr_factor"]

            # Draw this process's share of the step: `accumulate` micro-batches of uint8 images in host memory.
            waiting = time.perf_counter()
            with stoppable(task, learner, state, stop):  # a worker that hangs would keep it waiting for ever
                micro_batches = [next(batches) for _ in range(train.accumulate)]
            state.data_s += time.perf_counter() - waiting

            # Forward and backward: nearly all of a step's time. DDP averages gradients over processes meanwhile.
            values = compute_gradients(task, learner, state, micro_batches)
            values["grad_norm"] = learner.clip_gradient(settings.optim.clip_grad_norm)

            # Never step on a broken gradient, and stop at the same step everywhere: this waits for the device to finish
            # the backward pass, and (with several processes) for the slowest process.
            wish = torch.full((), float(stop.received != 0), device=team.device)
            own = torch.stack([values["loss"], values["grad_norm"].detach(), wish])  # [3]
            loss, grad_norm, stop_wish = team.mean(own).tolist()
            # fp16 meets infinite gradients by design: the scaler skips the step and lowers its scale.
            if not math.isfinite(loss) or not (math.isfinite(grad_norm) or learner.scaler.is_enabled()):
                moment = Moment(state.step, random_seed, team.rank, lr, train.precision, state.num_pieces)
                raise task.not_finite(moment, values, micro_batches)

            learner.scaler.step(learner.optimizer)  # fp16: the fused kernel itself looks whether a gradient is infinite
            learner.scaler.update()
            learner.optimizer.zero_grad(set_to_none=True)
            if learner.average is not None:
                learner.average.update_parameters(learner.model)

            state.step += 1
            if clock is not None:
                state.num_steps = clock.after_step(state.step, seconds_since(begun, team))
            log.advance(state.num_steps)
            state.log_steps += 1
            state.log_sums = add_up(state.log_sums, values)
            if state.step % train.log_every == 0 or state.step == state.num_steps:
                line = log_interval(task, learner, state, log, lr)
                tell(settings.on_log, line, task, learner, state)

            if stop_wish > 0:
                save(task, learner, state)
                raise interrupted(stop, state, settings)
            if train.save_every is not None and state.step % train.save_every == 0:
                save(task, learner, state)

    if state.step < state.num_steps:
        logger.info("stopped early: %s has not risen in %d evaluations", settings.best_metric, state.num_worse)
    assert state.best is not None
    return TrainResult(settings.output_dir, state.step, state.metrics, state.best, time.perf_counter() - begun)


def seconds_since(begun: float, team: Processes) -> float:
    """Return the seconds since ``begun``, the same in all processes, which wait for each other to agree on it."""
    return team.mean_of(time.perf_counter() - begun)


def evaluation_is_due(state: RunState, settings: RunSettings, clock: Clock | None) -> bool:
    """Return whether to evaluate before the next step: every ``eval_every`` steps and after the last."""
    every = settings.train.eval_every
    is_due = state.step > 0 and every is not None and state.step % every == 0
    is_due = is_due and (clock is None or clock.allows_evaluation)
    return (is_due or state.step >= state.num_steps) and (state.evaluated != state.step or state.best is None)


def is_over(state: RunState, settings: RunSettings) -> bool:
    """Return whether the run has done its steps, or ``patience`` evaluations in a row brought nothing."""
    patience = settings.train.patience
    is_stuck = patience is not None and state.num_worse >= patience and state.evaluated == state.step
    return state.step >= state.num_steps or is_stuck


def begin_clock(settings: RunSettings, team: Processes, state: RunState, begun: float) -> Clock | None:
    """Return the clock of a run that has minutes, with the number of steps as far as it is known."""
    if settings.minutes is None:
        return None
    clock = Clock(settings.minutes, settings.train.eval_every, state.schedule, most_steps=settings.num_steps)
    if not knows_evaluation(state.schedule):
        check_minutes(settings.minutes, settings.evaluation_s, seconds_since(begun, team))
        clock.expect_evaluation(settings.evaluation_s)
    state.num_steps = clock.resumed_steps(state.step)
    return clock


def evaluate(task: Task[BatchT], learner: Learner, state: RunState, log: RunLog) -> dict[str, Any]:
    """Evaluate, log the metrics, keep the model as best.pt if it is the best, and write the task's report.

    Returns the line of metrics.jsonl.
    """
    settings, is_main = learner.settings, learner.team.is_main
    learner.team.share_buffers(learner.evaluated)
    state.metrics, state.evaluated = task.evaluate(learner.evaluated), state.step
    line = log.evaluation(state.step, state.metrics, shown=task.shown_metrics)
    metric = state.metrics[settings.best_metric]
    if state.best is None or metric > state.best:
        state.best, state.num_worse = metric, 0
        if is_main:
            payload = task.payload(learner.evaluated)
            payload["config"] = settings.config
            payload["evaluation"] = {"step": state.step, "metrics": state.metrics, "num_images": state.num_images}
            save_checkpoint(settings.output_dir / BEST, payload)
    else:
        state.num_worse += 1
        learner.rate.after_evaluation(state.step, state.num_worse, state.schedule)
    if is_main:
        with reported_disk_errors(settings.output_dir, f"the report in {settings.output_dir}"):
            task.report(log, state.step, is_final=is_over(state, settings))
    return line


def tell(
    callback: Callback | None, line: dict[str, Any], task: Task[BatchT], learner: Learner, state: RunState
) -> None:
    """Call a callback in the main process; what it raises ends the run in all of them, when last.pt is written."""
    if callback is None:
        return
    raised: BaseException | None = None
    if learner.team.is_main:
        try:
            callback(line)
        except BaseException as error:  # a program's own reason to stop, whatever it is
            raised = error
    if not any(learner.team.gather(raised is not None)):
        return
    if state.saved != state.step:
        save(task, learner, state)
    raise raised or TrainingError(f"process {learner.team.rank}: a callback in process 0 has ended the run")


def save(task: Task[BatchT], learner: Learner, state: RunState) -> None:
    """Write last.pt, in the main process."""
    state.saved = state.step
    if learner.team.is_main:
        payload = task.payload(learner.model)
        payload["config"] = learner.settings.config
        payload["training"] = training_state(learner, state)
        save_last(learner.settings.output_dir, payload)


def compute_gradients(
    task: Task[BatchT], learner: Learner, state: RunState, micro_batches: Sequence[BatchT]
) -> dict[str, Tensor]:
    """Accumulate the gradients of a step, in smaller pieces from then on if memory runs out and that is allowed."""
    while True:
        try:
            return accumulate_gradients(task.losses, learner.parallel, micro_batches, state.num_pieces, learner.scaler)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            state.num_pieces = guards.after_out_of_memory(
                error,
                state.num_pieces,
                micro_batch_size=learner.micro_batch_size,
                may_retry=learner.settings.train.retry_out_of_memory and learner.team.world_size == 1,
                image_size_keys=task.image_size_keys,
            )
            learner.optimizer.zero_grad(set_to_none=True)


def log_interval(task: Task[BatchT], learner: Learner, state: RunState, log: RunLog, lr: float) -> dict[str, Any]:
    """Log the means since the last line of metrics.jsonl and begin a new interval; return the line."""
    elapsed, batch_size = time.perf_counter() - state.logged_at, learner.settings.train.batch_size
    sums = torch.stack(list(state.log_sums.values()))  # one number for each name
    means = learner.team.mean(sums / state.log_steps).tolist()  # waits for the device
    values = task.logged(dict(zip(state.log_sums, means, strict=True)))
    measured = {
        "lr": lr,
        "epoch": state.step * batch_size / learner.settings.num_images,
        "images_per_s": state.log_steps * batch_size / elapsed,
        "data_s": state.data_s / state.log_steps,
        "step_s": elapsed / state.log_steps,
    }
    line = log.losses(state.step, values | measured | memory_in_use(learner.team.device))
    state.log_sums, state.log_steps, state.logged_at, state.data_s = {}, 0, time.perf_counter(), 0.0
    learner.rate.after_interval(state.step, values, state.schedule)
    return line


@contextmanager
def stoppable(task: Task[BatchT], learner: Learner, state: RunState, stop: StopSignals) -> Iterator[None]:
    """Let a signal end the run in the middle of the block, of which last.pt needs nothing.

    Several processes stop at the same step, between blocks; where one hangs, all end with what was saved before.
    """
    try:
        with stop.at_once():
            yield
    except StopNow:
        if learner.team.world_size > 1:
            logger.warning("process %d: ended while it waited for images or evaluated", learner.team.rank)
            raise
        if state.saved != state.step:
            save(task, learner, state)
        raise interrupted(stop, state, learner.settings) from None


def interrupted(stop: StopSignals, state: RunState, settings: RunSettings) -> Interrupted:
    """Return the error that ends a run after a signal; another process may have received it."""
    number = stop.received or signal.SIGTERM
    return Interrupted(
        f"stopped by {signal.Signals(number).name} after step {state.step} of {length_text(state)}: "
        f"{settings.output_dir / LAST} holds everything, and the same command with resume=auto continues the run",
        number,
    )


def length_text(state: RunState) -> str:
    """Return the number of steps of a run in words."""
    return "as many as its time allows" if state.num_steps == OPEN_END else str(state.num_steps)


def write_plan(task: Task[BatchT], learner: Learner, state: RunState) -> None:
    """Write config.yaml and log what is about to happen."""
    settings, team = learner.settings, learner.team
    text = yaml.safe_dump(settings.config, sort_keys=False, default_flow_style=None, width=120)
    with reported_disk_errors(settings.output_dir / CONFIG) as path:
        write_text(path, text)
    for line in task.describe():
        logger.info("%s", line)
    train, optim = settings.train, settings.optim
    batch = f"steps of {train.batch_size} images ({learner.micro_batch_size} at a time in each process)"
    if settings.minutes is None:
        epochs = settings.num_steps * train.batch_size / settings.num_images
        length = f"{settings.num_steps} {batch}, {epochs:.1f} epochs"
    else:
        most = "" if settings.num_steps == OPEN_END else f"at most {settings.num_steps} "
        length = f"{settings.minutes:g} minutes, evaluations included, of {most}{batch}"
    logger.info("%s; %s on %d x %s", length, train.precision, team.world_size, team.device.type)
    scaled = f": {optim.lr:g} for {optim.lr_batch_size} images, scaled linearly (optim.lr_batch_size)"
    is_scaled = optim.lr_batch_size not in (None, train.batch_size)
    logger.info("learning rate %g%s", learner.rate.base, scaled if is_scaled else "")
