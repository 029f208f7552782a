"""Training, from a configuration to a detector, in one function that reads from top to bottom."""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from resdet.build import build_dataset, build_model
from resdet.config import Config, config_to_plain, config_to_yaml
from resdet.data.dataset import DetectionDataset
from resdet.data.loader import train_loader
from resdet.errors import TrainingError, UserError
from resdet.evaluation.detect import Evaluation, evaluate, match_labels
from resdet.models.detector import Detector
from resdet.precision import autocast
from resdet.predict import draw, legible_scale
from resdet.training.checkpoint import TrainingState, load_training_state, save_checkpoint
from resdet.training.distributed import Processes, processes
from resdet.training.optim import build_optimizer, lr_factor, scale_lr, set_lr
from resdet.training.runlog import RunLog
from resdet.types import target_to

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        output_dir: Folder of the run.
        steps: Optimizer steps done in total.
        metrics: The last evaluation's numbers (``AP``, ``AP50``, ...).
        best_ap: The highest AP of all evaluations; ``best.pt`` is that detector.
        seconds: Wall-clock time of this call, evaluations included.
    """

    output_dir: Path
    steps: int
    metrics: dict[str, float]
    best_ap: float
    seconds: float


def train(config: Config) -> TrainResult:
    """Train a detector as the configuration says, judge it, and leave everything in ``config.output_dir``.

    Under torchrun each process calls this; together they do what one would.

    Raises:
        UserError: If data, weights or settings do not allow it (each subclass says which), and ``TrainingError`` if a
            loss stops being finite; last.pt is then the last good checkpoint.
    """
    begun = time.perf_counter()
    with ExitStack() as stack:
        team = stack.enter_context(processes(config.train.device))
        resume_from = _checkpoint_to_resume(config, team)
        micro_batch_size = _micro_batch_size(config, team.world_size)

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

        start_step, best_ap = 0, -1.0
        if resume_from is not None:
            state = load_training_state(resume_from, model)
            optimizer.load_state_dict(state.optimizer)
            if state.scaler:
                scaler.load_state_dict(state.scaler)
            start_step, best_ap = state.step, state.best_ap
            logger.info("resumed from %s at step %d", resume_from, start_step)

        batches = train_loader(
            train_set,
            batch_size=batch_size,
            num_micro_batches=config.train.accumulate,
            num_workers=config.loader.num_workers,
            sampling=config.loader.sampling,
            repeat_threshold=config.loader.repeat_threshold,
            seed=config.seed,
            rank=team.rank,
            world_size=team.world_size,
            start_batch=start_step,
        )
        parallel = DistributedDataParallel(model, broadcast_buffers=False) if team.world_size > 1 else model
        trained_parameters = [p for group in optimizer.param_groups for p in group["params"]]

        log = stack.enter_context(
            RunLog(config.output_dir, num_steps=num_steps, start_step=start_step, enabled=team.is_main)
        )
        if team.is_main:
            (config.output_dir / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
            _say_plan(config, model, train_set, val_set, num_steps, lr, micro_batch_size, team)

        def save(step: int, *, best: bool) -> None:
            if not team.is_main:
                return
            plain = config_to_plain(config)
            training = TrainingState(step, best_ap, optimizer.state_dict(), scaler.state_dict(), plain)
            if best:
                save_checkpoint(config.output_dir / "best.pt", model, config=plain, training=None)
            save_checkpoint(config.output_dir / "last.pt", model, config=plain, training=training)

        evaluation: Evaluation | None = None
        sums: dict[str, Tensor] = {}
        interval_begun, interval_steps, data_s = time.perf_counter(), 0, 0.0
        model.train()
        for step in range(start_step, num_steps):
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
            # Every random number of a step follows from (seed, step, rank): a resumed run repeats it without saved
            # random states, and nothing drawn between steps (evaluation, pictures) can change it.
            torch.manual_seed(_step_seed(config.seed, step, team.rank))

            step_losses: dict[str, Tensor] = {}
            image_indices: list[int] = []
            for micro in range(config.train.accumulate):
                waiting = time.perf_counter()
                images, targets, indices = next(batches)
                data_s += time.perf_counter() - waiting
                image_indices += indices
                images = [image.to(team.device, non_blocking=True).float().div_(255) for image in images]
                targets = [target_to(target, team.device) for target in targets]

                is_last = micro == config.train.accumulate - 1
                # Gradients travel between processes once per step, with the last micro-batch.
                local = nullcontext() if is_last or parallel is model else parallel.no_sync()
                with local:
                    with autocast(team.device, config.train.precision):
                        losses: dict[str, Tensor] = parallel(images, targets)
                    loss = torch.stack(list(losses.values())).sum() / config.train.accumulate
                    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                for name, value in {"loss": loss * config.train.accumulate, **losses}.items():
                    step_losses[name] = step_losses.get(name, 0.0) + value.detach() / config.train.accumulate

            # One synchronisation with the device per step: the price of never stepping on a broken gradient.
            mean_loss = team.mean(step_losses["loss"])
            if not math.isfinite(mean_loss.item()):
                raise TrainingError(_non_finite(step, lr * factor, step_losses, train_set, image_indices, config))

            if config.optim.clip_grad_norm is not None:
                scaler.unscale_(optimizer)
                clip_grad_norm_(trained_parameters, config.optim.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            is_end = done == num_steps
            log.advance()
            interval_steps += 1
            for name, value in step_losses.items():
                sums[name] = sums[name] + value if name in sums else value
            if done % config.train.log_every == 0 or is_end:
                elapsed = time.perf_counter() - interval_begun
                means = team.mean(torch.stack(list(sums.values())) / interval_steps).tolist()
                log.losses(
                    done,
                    {
                        **dict(zip(sums, means, strict=True)),
                        "lr": lr * factor,
                        "epoch": done * batch_size / num_images,
                        "images_per_s": interval_steps * batch_size / elapsed,
                        "data_s": data_s / interval_steps,
                        "step_s": elapsed / interval_steps,
                    },
                )
                sums, interval_begun, interval_steps, data_s = {}, time.perf_counter(), 0, 0.0

            is_due = config.train.eval_every is not None and done % config.train.eval_every == 0
            if is_due or is_end:
                paused = time.perf_counter()
                team.share_buffers(model)
                evaluation = evaluate(
                    model,
                    val_set,
                    batch_size=config.eval.batch_size,
                    num_workers=config.loader.num_workers,
                    precision=config.eval.precision or config.train.precision,
                    rank=team.rank,
                    world_size=team.world_size,
                )
                log.evaluation(done, evaluation.metrics)
                is_best = evaluation.metrics["AP"] > best_ap or best_ap < 0
                best_ap = max(best_ap, evaluation.metrics["AP"])
                save(done, best=is_best)
                if team.is_main and config.eval.num_pictures:
                    _draw_pictures(config, evaluation, val_set, log, done)
                interval_begun += time.perf_counter() - paused
            elif config.train.save_every is not None and done % config.train.save_every == 0:
                save(done, best=False)

        if evaluation is None:
            raise UserError(
                f"{resume_from}: is at step {start_step}, and the run is {num_steps} steps long: nothing is left to do"
            )
    return TrainResult(config.output_dir, num_steps, evaluation.metrics, best_ap, time.perf_counter() - begun)


def _checkpoint_to_resume(config: Config, team: Processes) -> Path | None:
    """Find the checkpoint to go on from; None for a new run, whose folder must not hold another."""
    last = config.output_dir / "last.pt"
    metrics = config.output_dir / "metrics.jsonl"
    chosen: Path | None = None
    if config.resume == "auto":
        chosen = last if last.exists() else None
    elif config.resume is not None:
        chosen = Path(config.resume)
    elif last.exists() or metrics.exists():
        raise UserError(
            f"{config.output_dir}: already holds a run; resume=auto goes on with it, output_dir=... begins another"
        )
    team.barrier()  # nobody writes into the folder before everybody has looked
    return chosen


def _micro_batch_size(config: Config, world_size: int) -> int:
    """Give the number of images a process holds at a time."""
    size, rest = divmod(config.train.batch_size, world_size * config.train.accumulate)
    if rest:
        raise UserError(
            f"train.batch_size: must be a multiple of processes x accumulate = {world_size} x "
            f"{config.train.accumulate}, got {config.train.batch_size}"
        )
    return size


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


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


def _non_finite(
    step: int, lr: float, losses: dict[str, Tensor], dataset: DetectionDataset, indices: list[int], config: Config
) -> str:
    """Say which step broke, on which images, and what was kept."""
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
    images = ", ".join(f"{dataset.table.image_ids[i]} ({dataset.table.file_names[i]})" for i in indices)
    last = config.output_dir / "last.pt"
    kept = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint had been written yet"
    return (
        f"loss is not finite at step {step + 1}, learning rate {lr:g}: {values}; image ids of the batch: {images}. "
        f"The step was not taken; {kept}. A lower optim.lr or a longer optim.warmup_steps is the usual cure"
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
