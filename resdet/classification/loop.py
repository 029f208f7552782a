"""Classification training, from a configuration to weights, in one function that reads from top to bottom.

The parts are those of detection (``resdet.training``): what a run's folder holds, how it resumes, logs and stops.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resdet.classification.build import build_images, build_pretrained, build_train_view
from resdet.classification.config import ClassifierTrainConfig, PretrainConfig
from resdet.classification.data import LabelledImages
from resdet.classification.evaluate import evaluate_classifier
from resdet.classification.loader import TrainBatch, train_loader
from resdet.classification.model import ImageClassifier, classifier_payload, match_classes
from resdet.config_reading import config_to_plain, config_to_yaml
from resdet.errors import Interrupted, TrainingError, name_some
from resdet.malloc import keep_freed_memory
from resdet.models.bodies import Classifier
from resdet.precision import Precision, autocast
from resdet.processes import Processes, processes
from resdet.training import guards
from resdet.training.checkpoint import BEST, TrainingState, load_training_state, save_checkpoint, save_last
from resdet.training.folder import checkpoint_to_resume, claimed
from resdet.training.interrupt import StopSignals
from resdet.training.optim import build_optimizer, lr_factor, scale_lr, set_lr
from resdet.training.runlog import RunLog, memory_in_use

logger = logging.getLogger(__name__)

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes images and their labels; gives images and their classes' shares."""


@dataclass(frozen=True)
class PretrainResult:
    """What a run came to.

    Attributes:
        output_dir: Folder of the run.
        steps: Optimizer steps done in total; fewer than asked for if it stopped early.
        metrics: The last evaluation's numbers (``top1``, ``top5``, ``val_loss``).
        best: The best value of ``eval.best_metric`` in all evaluations; ``best.pt`` is that classifier.
        seconds: Wall-clock time of this call, evaluations included.
    """

    output_dir: Path
    steps: int
    metrics: dict[str, float]
    best: float
    seconds: float


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Train a classifier as the configuration says, judge it, and leave everything in ``config.output_dir``.

    Under torchrun each process calls this; together they do what one would, but for batch norms, each of which sees
    its own process's images.

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

        train_set = build_images(config.data.train)
        val_set = build_images(config.data.val, classes=train_set.classes)
        match_classes(val_set.classes, train_set.classes, where=val_set.name)  # told now, not at the first evaluation
        torch.manual_seed(config.seed)
        resize = config.eval.resize or config.model.image_size
        classifier = build_pretrained(config.model, train_set, resize=resize, resume_from=resume_from)
        network = classifier.network.to(team.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        mix = _mixing(config.train, len(train_set.classes))

        batch_size, num_images = config.train.batch_size, len(train_set)
        num_steps = config.train.steps or math.ceil((config.train.epochs or 0) * num_images / batch_size)
        lr = scale_lr(config.optim.lr, batch_size=batch_size, lr_batch_size=config.optim.lr_batch_size)
        optimizer = build_optimizer(
            network,
            name=config.optim.name,
            lr=lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            norm_weight_decay=config.optim.norm_weight_decay,
        )
        scaler = torch.amp.GradScaler(team.device.type, enabled=config.train.precision == "fp16")
        state = TrainingState.begin()
        if resume_from is not None:
            state = load_training_state(resume_from, network)
            optimizer.load_state_dict(state.optimizer)
            if state.scaler:
                scaler.load_state_dict(state.scaler)
            logger.info("resumed from %s at step %d", resume_from, state.step)
        ema: AveragedModel | None = None
        if config.train.ema_decay is not None:
            average = get_ema_multi_avg_fn(config.train.ema_decay)  # type: ignore[no-untyped-call]
            # The norms' statistics too: those of the last weights are not those of the averaged ones.
            ema = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
            if state.ema:
                ema.load_state_dict(state.ema)
        # What is evaluated, and what best.pt holds.
        judged = classifier if ema is None else replace(classifier, network=cast(Classifier, ema.module))

        def payload_of(saved: Classifier) -> dict[str, Any]:
            return classifier_payload(replace(classifier, network=saved))

        batches = train_loader(
            train_set,
            build_train_view(config.augment, classifier),
            batch_size=batch_size,
            num_micro_batches=config.train.accumulate,
            num_workers=config.loader.num_workers,
            pin_memory=team.device.type == "cuda",
            stall_seconds=config.loader.stall_seconds,
            seed=config.seed,
            rank=team.rank,
            world_size=team.world_size,
            start_batch=state.step,
        )
        parallel = team.parallel(network)
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
            _say_plan(config, classifier, train_set, val_set, num_steps, lr, micro_batch_size, team)

        step, best, num_worse, evaluated = state.step, state.best, state.num_worse, state.evaluated
        num_drops = state.schedule.get("num_drops", 0)
        is_held = bool(state.schedule.get("is_held", config.optim.warmup_until_error is not None))
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
                    schedule={"num_drops": num_drops, "is_held": int(is_held)},
                )
                with guards.full_disk_told():
                    plain = config_to_plain(config)
                    save_last(config.output_dir, network, config=plain, training=now, payload_of=payload_of)

        num_pieces = 1
        network.train()
        while True:
            is_over = step >= num_steps or (
                config.train.patience is not None and num_worse >= config.train.patience and evaluated == step
            )
            is_due = step > 0 and config.train.eval_every is not None and step % config.train.eval_every == 0
            if (is_due or step >= num_steps) and evaluated != step:
                if saved != step:
                    save()  # an evaluation can take long; what was trained must not hang on it
                paused = time.perf_counter()
                team.share_buffers(judged.network)
                metrics = evaluate_classifier(
                    judged,
                    val_set,
                    views=config.eval.views,
                    resize=resize,
                    scales=config.eval.scales,
                    batch_size=config.eval.batch_size,
                    num_workers=config.loader.num_workers,
                    precision=config.eval.precision or config.train.precision,
                    rank=team.rank,
                    world_size=team.world_size,
                ).as_dict()
                evaluated = step
                log.evaluation(step, metrics, shown=("top1", "top5", "val_loss"))
                if best is None or metrics[config.eval.best_metric] > best:
                    best, num_worse = metrics[config.eval.best_metric], 0
                    if team.is_main:
                        with guards.full_disk_told():
                            plain = config_to_plain(config)
                            path = config.output_dir / BEST
                            save_checkpoint(path, judged.network, config=plain, training=None, payload_of=payload_of)
                else:
                    num_worse += 1
                    if config.optim.plateau_patience and num_worse % config.optim.plateau_patience == 0:
                        num_drops += 1
                        logger.info(
                            "step %d: %s has not risen in %d evaluations: learning rate %g",
                            step,
                            config.eval.best_metric,
                            num_worse,
                            lr * config.optim.gamma**num_drops,
                        )
                save()
                logged_at += time.perf_counter() - paused
                continue
            if is_over:
                break

            factor = (
                config.optim.warmup_factor
                if is_held
                else config.optim.gamma**num_drops
                * lr_factor(
                    step,
                    num_steps=num_steps,
                    warmup_steps=config.optim.warmup_steps,
                    warmup_factor=config.optim.warmup_factor,
                    schedule=config.optim.schedule,
                    milestones=config.optim.milestones,
                    gamma=config.optim.gamma,
                )
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
                        classifier,
                        parallel,
                        micro_batches,
                        num_pieces,
                        scaler,
                        config.train.precision,
                        team.device,
                        label_smoothing=config.train.label_smoothing,
                        mix=mix,
                    )
                    break
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    num_pieces = guards.after_out_of_memory(
                        error,
                        num_pieces,
                        micro_batch_size=micro_batch_size,
                        may_retry=config.train.retry_out_of_memory and team.world_size == 1,
                        image_size="model.image_size",
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
                raise _not_finite(moment, values, classifier, micro_batches, train_set, config.output_dir)

            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update_parameters(network)

            step += 1
            log.advance()
            log_steps += 1
            for name, value in values.items():
                sums[name] = sums[name] + value if name in sums else value
            if step % config.train.log_every == 0 or step == num_steps:
                elapsed = time.perf_counter() - logged_at
                means = team.mean(torch.stack(list(sums.values())) / log_steps).tolist()
                train_values = dict(zip(sums, means, strict=True))
                log.losses(
                    step,
                    {
                        **train_values,
                        "lr": lr * factor,
                        "epoch": step * batch_size / num_images,
                        "images_per_s": log_steps * batch_size / elapsed,
                        "data_s": data_s / log_steps,
                        "step_s": elapsed / log_steps,
                        **memory_in_use(team.device),
                    },
                )
                sums, log_steps, logged_at, data_s = {}, 0, time.perf_counter(), 0.0
                if is_held and train_values["error"] < (config.optim.warmup_until_error or 0):
                    is_held = False
                    logger.info("step %d: training error %.3f, learning rate %g", step, train_values["error"], lr)

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
    return PretrainResult(config.output_dir, step, metrics, best, time.perf_counter() - begun)


def accumulate_gradients(
    classifier: ImageClassifier,
    parallel: nn.Module,
    micro_batches: Sequence[TrainBatch],
    num_pieces: int,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    device: torch.device,
    *,
    label_smoothing: float = 0.0,
    mix: Mix | None = None,
) -> dict[str, Tensor]:
    """Add up a step's gradients.

    Args:
        classifier: Says how images reach its network.
        parallel: Its network, or that network's wrapper for several processes.
        micro_batches: What this process has to do for the step.
        num_pieces: Parts in which each micro-batch is computed, one after the other.
        scaler: Scales the loss for fp16.
        precision: Of the forward pass.
        device: Where to compute.
        label_smoothing: Share of the target that is spread over all classes.
        mix: Mixes images of a piece.

    Returns:
        ``loss`` and ``error`` (share of images whose own class did not get the highest score), means over the images
        of the step.
    """
    pieces = [piece for batch in micro_batches for piece in batch.cut(num_pieces)]
    num_images = sum(len(piece.images) for piece in pieces)
    values: dict[str, Tensor] = {}
    for number, piece in enumerate(pieces):
        shifts = piece.shifts.to(device, non_blocking=True)
        images = classifier.normalise(piece.images.to(device, non_blocking=True), shifts)
        labels = piece.labels.to(device, non_blocking=True)
        targets = labels
        if mix is not None:
            images, targets = mix(images, labels)
        share = len(labels) / num_images
        # Gradients travel between processes once per step, with the last piece.
        is_last = number == len(pieces) - 1
        with parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not is_last else nullcontext():
            with autocast(device, precision):
                scores = parallel(images)
            loss = F.cross_entropy(scores.float(), targets, label_smoothing=label_smoothing)
            scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
        error = (scores.detach().argmax(1) != labels).float().mean()
        for name, value in {"loss": loss.detach(), "error": error}.items():
            values[name] = values.get(name, torch.zeros((), device=device)) + value * share
    return values


def _mixing(config: ClassifierTrainConfig, num_classes: int) -> Mix | None:
    """Give what mixes the images of a batch, by torch's own random numbers, or None."""
    from torchvision.transforms import v2

    kinds: list[Any] = []
    if config.mixup:
        kinds.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
    if config.cutmix:
        kinds.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
    if not kinds:
        return None
    mix: Mix = kinds[0] if len(kinds) == 1 else v2.RandomChoice(kinds)
    return mix


def _not_finite(
    moment: guards.Moment,
    values: dict[str, Tensor],
    classifier: ImageClassifier,
    micro_batches: Sequence[TrainBatch],
    train_set: LabelledImages,
    folder: Path,
) -> TrainingError:
    names = [train_set.pictures.name(index) for batch in micro_batches for index in batch.indices]
    content = classifier_payload(classifier) | {
        "moment": asdict(moment),
        "batches": [batch._asdict() for batch in micro_batches],
    }
    return guards.broken_step(
        moment,
        values,
        classifier.network,
        images=f"images of the batch: {name_some(names, 8)}",
        content=content,
        use=": weights, images and labels",
        folder=folder,
    )


def _say_plan(
    config: PretrainConfig,
    classifier: ImageClassifier,
    train_set: LabelledImages,
    val_set: LabelledImages,
    num_steps: int,
    lr: float,
    micro_batch_size: int,
    team: Processes,
) -> None:
    """Say what is about to happen, the learning rate's scaling above all."""
    logger.info(
        "%s, %s norm: %.2f M parameters; %s on %d x %s",
        config.model.arch,
        config.model.norm,
        sum(p.numel() for p in classifier.network.parameters()) / 1e6,
        config.train.precision,
        team.world_size,
        team.device.type,
    )
    logger.info(
        "train: %d images, %d classes (%s); val: %d images (%s)",
        len(train_set),
        len(train_set.classes),
        train_set.name,
        len(val_set),
        val_set.name,
    )
    batch_size, stated_for = config.train.batch_size, config.optim.lr_batch_size
    logger.info(
        "%d steps of %d images (%d at a time in each process), %.1f epochs",
        num_steps,
        batch_size,
        micro_batch_size,
        num_steps * batch_size / len(train_set),
    )
    scaled = (
        "" if stated_for in (None, batch_size) else f": {config.optim.lr:g} for {stated_for} images, scaled linearly"
    )
    logger.info("learning rate %g%s", lr, scaled)
