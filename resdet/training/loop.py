"""Training, from a configuration to a detector, in one function that reads from top to bottom."""

from __future__ import annotations

import logging
import math
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resdet.build import build_dataset, build_model
from resdet.config import Config
from resdet.config_reading import config_to_plain, config_to_yaml
from resdet.data.dataset import DetectionDataset
from resdet.data.loader import train_loader
from resdet.drawing import draw, legible_scale
from resdet.errors import Interrupted
from resdet.evaluation.detect import Evaluation, evaluate
from resdet.evaluation.labels import match_labels
from resdet.evaluation.loss import validation_loss
from resdet.evaluation.report import write_run_report
from resdet.evaluation.settings import InferenceSettings
from resdet.malloc import keep_freed_memory
from resdet.models.detector import Detector
from resdet.processes import Processes, processes
from resdet.training import guards
from resdet.training.checkpoint import BEST, TrainingState, load_training_state, save_checkpoint, save_last
from resdet.training.folder import checkpoint_to_resume, claimed
from resdet.training.interrupt import StopSignals
from resdet.training.optim import build_optimizer, lr_factor, scale_lr, set_lr
from resdet.training.runlog import RunLog, memory_in_use
from resdet.training.step import accumulate_gradients

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        output_dir: Folder of the run.
        steps: Optimizer steps done in total; fewer than asked for if it stopped early.
        metrics: The last evaluation's numbers (``AP``, ``AP50``, ...).
        best: The best value of ``eval.best_metric`` in all evaluations; ``best.pt`` is that detector.
        seconds: Wall-clock time of this call, evaluations included.
    """

    output_dir: Path
    steps: int
    metrics: dict[str, float]
    best: float
    seconds: float


def train(config: Config) -> TrainResult:
    """Train a detector as the configuration says, judge it, and leave everything in ``config.output_dir``.

    Under torchrun each process calls this; together they do what one would.

    A run that ends before its time, in whatever way, goes on with ``resume=auto`` as if nothing had been: what follows
    is equal bit for bit on CPUs (with the same number of threads), and on GPUs with ``train.deterministic``.

    Raises:
        UserError: If data, weights or settings do not allow it (each subclass says which), and ``TrainingError`` if a
            loss or gradient stops being finite, or memory does not suffice; last.pt is then the last good checkpoint.
        Interrupted: After SIGTERM or SIGINT, when everything is on the disk.
    """
    begun = time.perf_counter()
    with ExitStack() as stack:
        team = stack.enter_context(processes(config.train.device))
        stop = stack.enter_context(StopSignals())
        if team.device.type == "cpu":
            keep_freed_memory()
        team.on_main(lambda: stack.enter_context(claimed(config.output_dir)))
        resume_from = team.on_main(lambda: checkpoint_to_resume(config.output_dir, config.resume))
        micro_batch_size = team.micro_batch_size(config.train.batch_size, config.train.accumulate)
        if config.train.deterministic:
            stack.enter_context(guards.deterministic(team.device))

        train_set = build_dataset(
            config.data.train, training=True, augment=config.augment, min_visibility=config.min_visibility
        )
        val_set = build_dataset(config.data.val, training=False)
        torch.manual_seed(config.seed)
        model = build_model(config.model, train_set, resume_from=resume_from).to(team.device)
        match_labels(model, val_set.table)  # other classes in data.val are told now, not at the first evaluation

        batch_size, num_images = config.train.batch_size, train_set.table.num_images
        num_steps = config.train.steps or math.ceil((config.train.epochs or 0) * num_images / batch_size)
        lr = scale_lr(config.optim.lr, batch_size=batch_size, lr_batch_size=config.optim.lr_batch_size)
        optimizer = build_optimizer(
            model,
            name=config.optim.name,
            lr=lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            norm_weight_decay=config.optim.norm_weight_decay,
        )
        scaler = torch.amp.GradScaler(team.device.type, enabled=config.train.precision == "fp16")
        state = TrainingState.begin()
        if resume_from is not None:
            state = load_training_state(resume_from, model)
            optimizer.load_state_dict(state.optimizer)
            if state.scaler:
                scaler.load_state_dict(state.scaler)
            logger.info("resumed from %s at step %d", resume_from, state.step)
        ema: AveragedModel | None = None
        if config.train.ema_decay is not None:
            average = get_ema_multi_avg_fn(config.train.ema_decay)  # type: ignore[no-untyped-call]
            ema = AveragedModel(model, multi_avg_fn=average)
            if state.ema:
                ema.load_state_dict(state.ema)
        # What is evaluated, and what best.pt holds.
        judged = model if ema is None else cast(Detector, ema.module)

        batches = train_loader(
            train_set,
            team,
            batch_size=batch_size,
            num_micro_batches=config.train.accumulate,
            num_workers=config.loader.num_workers,
            stall_seconds=config.loader.stall_seconds,
            sampling=config.loader.sampling,
            repeat_threshold=config.loader.repeat_threshold,
            seed=config.seed,
            start_batch=state.step,
        )
        parallel = team.parallel(model)
        trained = [p for group in optimizer.param_groups for p in group["params"]]

        log = stack.enter_context(
            RunLog(
                config.output_dir,
                num_steps=num_steps,
                start_step=state.step,
                evaluated=state.evaluated,
                enabled=team.is_main,
            )
        )
        if team.is_main:
            (config.output_dir / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
            _say_plan(config, model, train_set, val_set, num_steps, lr, micro_batch_size, team)

        step, best, num_worse, evaluated = state.step, state.best, state.num_worse, state.evaluated
        metrics = state.metrics
        sums = {name: value.to(team.device) for name, value in state.log_sums.items()}
        log_steps, logged_at, data_s = state.log_steps, time.perf_counter(), 0.0
        saved = step if resume_from is not None else None

        def save() -> None:
            nonlocal saved
            saved = step
            if team.is_main:
                now = TrainingState(
                    step=step,
                    best=best,
                    num_worse=num_worse,
                    evaluated=evaluated,
                    metrics=metrics,
                    log_sums=sums,
                    log_steps=log_steps,
                    optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict(),
                    ema={} if ema is None else ema.state_dict(),
                )
                with guards.full_disk_told():
                    save_last(config.output_dir, model, config=config_to_plain(config), training=now)

        inference_settings = InferenceSettings(
            batch_size=config.eval.batch_size,
            num_workers=config.loader.num_workers,
            precision=config.eval.precision or config.train.precision,
            tricks=config.eval.tricks,
        )
        num_pieces = 1
        model.train()
        while True:
            is_over = step >= num_steps or (
                config.train.patience is not None and num_worse >= config.train.patience and evaluated == step
            )
            is_due = step > 0 and config.train.eval_every is not None and step % config.train.eval_every == 0
            if (is_due or step >= num_steps) and evaluated != step:
                if saved != step:
                    save()  # an evaluation can take long; what was trained must not hang on it
                paused = time.perf_counter()
                team.share_buffers(judged)
                evaluation = evaluate(judged, val_set, inference_settings, team)
                metrics, evaluated = evaluation.metrics, step
                model.score_threshold = judged.score_threshold = evaluation.score_threshold
                if config.eval.loss:
                    metrics |= validation_loss(judged, val_set, inference_settings, team)
                log.evaluation(step, metrics)
                if best is None or metrics[config.eval.best_metric] > best:
                    best, num_worse = metrics[config.eval.best_metric], 0
                    if team.is_main:
                        with guards.full_disk_told():
                            plain = config_to_plain(config)
                            save_checkpoint(config.output_dir / BEST, judged, config=plain, training=None)
                else:
                    num_worse += 1
                if team.is_main and config.eval.num_pictures:
                    _draw_pictures(config, evaluation, val_set, log, step)
                if team.is_main:
                    write_run_report(config.output_dir, val_set, evaluation, config_to_plain(config))
                save()
                logged_at += time.perf_counter() - paused
                continue
            if is_over:
                break

            factor = lr_factor(
                step,
                num_steps=num_steps,
                warmup_steps=config.optim.warmup_steps,
                warmup_factor=config.optim.warmup_factor,
                schedule=config.optim.schedule,
                milestones=config.optim.milestones,
                gamma=config.optim.gamma,
            )
            set_lr(optimizer, lr * factor)
            # Every random number of a step follows from (seed, step, rank), or from its image's seed: a resumed run
            # repeats it without saved random states, and nothing drawn between steps (evaluation) can change it.
            random_seed = team.step_seed(config.seed, step)
            torch.manual_seed(random_seed)

            waiting = time.perf_counter()
            micro_batches = [next(batches) for _ in range(config.train.accumulate)]
            data_s += time.perf_counter() - waiting
            while True:
                try:
                    values = accumulate_gradients(
                        model, parallel, micro_batches, num_pieces, scaler, config.train.precision, team.device
                    )
                    break
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    num_pieces = guards.after_out_of_memory(
                        error,
                        num_pieces,
                        micro_batch_size=micro_batch_size,
                        may_retry=config.train.retry_out_of_memory and team.world_size == 1,
                    )
                    optimizer.zero_grad(set_to_none=True)
            if config.optim.clip_grad_norm is None:
                grad_norm = get_total_norm([p.grad for p in trained if p.grad is not None])
                grad_norm = grad_norm / scaler.get_scale() if scaler.is_enabled() else grad_norm
            else:
                scaler.unscale_(optimizer)
                grad_norm = clip_grad_norm_(trained, config.optim.clip_grad_norm)
            values["grad_norm"] = grad_norm

            # One synchronisation with the device per step: the price of never stepping on a broken gradient, and of
            # stopping at the same step everywhere.
            wish = torch.tensor(float(stop.received != 0), device=team.device)
            mean_loss, norm, stop_wish = team.mean(torch.stack([values["loss"], grad_norm.detach(), wish])).tolist()
            # fp16 meets infinite gradients by design: the scaler skips the step and lowers its scale.
            if not math.isfinite(mean_loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                moment = guards.Moment(step, random_seed, team.rank, lr * factor, config.train.precision, num_pieces)
                raise guards.not_finite(moment, values, model, micro_batches, train_set.table, config.output_dir)

            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update_parameters(model)

            step += 1
            log.advance()
            log_steps += 1
            for name, value in values.items():
                sums[name] = sums[name] + value if name in sums else value
            if step % config.train.log_every == 0 or step == num_steps:
                elapsed = time.perf_counter() - logged_at
                means = team.mean(torch.stack(list(sums.values())) / log_steps).tolist()
                train_values = dict(zip(sums, means, strict=True))
                num_objects, num_found = train_values.pop("num_objects"), train_values.pop("num_found")
                log.losses(
                    step,
                    {
                        **train_values,
                        # Of no objects none is missed.
                        "proposal_recall": num_found / num_objects if num_objects else 1.0,
                        "lr": lr * factor,
                        "epoch": step * batch_size / num_images,
                        "images_per_s": log_steps * batch_size / elapsed,
                        "data_s": data_s / log_steps,
                        "step_s": elapsed / log_steps,
                        **memory_in_use(team.device),
                    },
                )
                sums, log_steps, logged_at, data_s = {}, 0, time.perf_counter(), 0.0

            if stop_wish > 0:
                save()
                name = signal.Signals(stop.received or signal.SIGTERM).name
                raise Interrupted(
                    f"stopped by {name} after step {step} of {num_steps}: {config.output_dir / 'last.pt'} holds "
                    "everything, and the same command with resume=auto goes on",
                    stop.received or signal.SIGTERM,
                )
            if config.train.save_every is not None and step % config.train.save_every == 0:
                save()

        if step < num_steps:
            logger.info("stopped early: %s has not risen in %d evaluations", config.eval.best_metric, num_worse)
    assert best is not None
    return TrainResult(config.output_dir, step, metrics, best, time.perf_counter() - begun)


def _say_plan(
    config: Config,
    model: Detector,
    train_set: DetectionDataset,
    val_set: DetectionDataset,
    num_steps: int,
    lr: float,
    micro_batch_size: int,
    team: Processes,
) -> None:
    """Say what is about to happen, the learning rate's scaling above all."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info(
        "%s, %s norm: %.1f M parameters, %.1f M trained; %s on %d x %s",
        config.model.arch,
        config.model.norm,
        total / 1e6,
        trained / 1e6,
        config.train.precision,
        team.world_size,
        team.device.type,
    )
    logger.info(
        "train: %d images, %d classes; val: %d images",
        train_set.table.num_images,
        len(train_set.categories),
        val_set.table.num_images,
    )
    batch_size, stated_for = config.train.batch_size, config.optim.lr_batch_size
    logger.info(
        "%d steps of %d images (%d at a time in each process), %.1f epochs",
        num_steps,
        batch_size,
        micro_batch_size,
        num_steps * batch_size / train_set.table.num_images,
    )
    if stated_for is None or stated_for == batch_size:
        logger.info("learning rate %g", lr)
    else:
        logger.info(
            "learning rate %g: %g for %d images, scaled linearly to %d (optim.lr_batch_size)",
            lr,
            config.optim.lr,
            stated_for,
            batch_size,
        )


def _draw_pictures(config: Config, evaluation: Evaluation, dataset: DetectionDataset, log: RunLog, step: int) -> None:
    """Draw the evaluation's detections on the first images, for the folder and for TensorBoard."""
    folder = config.output_dir / "pictures"
    folder.mkdir(exist_ok=True)
    names, pictures = [], []
    for index in range(min(config.eval.num_pictures, dataset.table.num_images)):
        found = evaluation.detections.of_image(index)
        image = dataset.image(index)
        picture = draw(
            image,
            found,
            dataset.categories,
            score_threshold=config.eval.picture_score,
            scale=legible_scale(image),
        )
        names.append(Path(str(dataset.table.file_names[index])).stem)
        pictures.append(picture)
        Image.fromarray(picture).save(folder / f"{names[-1]}.png")
    log.pictures(step, names, pictures)
