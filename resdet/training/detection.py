"""Training of detectors: from a configuration to a detector, and what a detector's step and evaluation are."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from resdet.build import (
    build_given_dataset,
    build_model,
    build_train_set,
    build_val_set,
    config_augment,
    detector_limits,
    inference_settings,
    missing_data,
)
from resdet.config import Config, EvalConfig, HeldOut, LoaderConfig, PythonSource
from resdet.config_reading import config_to_plain
from resdet.data.annotations import AnnotationTable
from resdet.data.dataset import DetectionDataset
from resdet.data.loader import Batch, train_loader
from resdet.data.order import evenly_spread
from resdet.data.split import check_lists, write_lists
from resdet.drawing import draw, legible_scale, picture_names, save_picture, shown_from
from resdet.errors import TrainingError, UserError, WeightsError, printable
from resdet.evaluation.detect import Evaluation, evaluate
from resdet.evaluation.inference import inference as run_inference
from resdet.evaluation.labels import match_labels, with_model_classes
from resdet.evaluation.loss import validation_loss
from resdet.evaluation.report import write_run_report
from resdet.evaluation.settings import InferenceSettings
from resdet.evaluation.state import placed
from resdet.evaluation.write import write_metrics
from resdet.models.checkpoint import checkpoint_payload, load_detector
from resdet.models.detector import Detector
from resdet.models.transform import host_resize
from resdet.plan.plan import Plan, make_plan, resumed_plan
from resdet.processes import Processes, processes
from resdet.random_states import random_states_kept
from resdet.training import guards
from resdet.training.checkpoint import load_training_state
from resdet.training.clock import knows_evaluation
from resdet.training.compiled import compile_detector, without_compiled_code
from resdet.training.folder import CONFIG, METRICS, PICTURES
from resdet.training.launch import launched
from resdet.training.loop import TrainResult, run
from resdet.training.losses import detection_losses
from resdet.training.resume import check_configuration, check_data, configuration_of
from resdet.training.runlog import RunLog
from resdet.training.settings import Callback, RunSettings, evaluated_part, seconds_beside_detection
from resdet.training.step import accumulate_gradients
from resdet.weights.files import WeightsFile, read_checkpoint, read_weights, weights_in

logger = logging.getLogger(__name__)

_TIMED_IMAGES = 4


def train(
    config: Config,
    *,
    train_set: Dataset[Any] | None = None,
    val_set: Dataset[Any] | None = None,
    classes: Sequence[str] | None = None,
    on_log: Callback | None = None,
    on_evaluation: Callback | None = None,
    begun: float | None = None,
) -> TrainResult:
    """Train a detector as the configuration says, evaluate it, and leave everything in ``config.output_dir``.

    Under torchrun each process calls this, and together they compute what one process would.

    A run that ends early, for whatever reason, continues with ``resume=auto`` as if nothing had happened: the rest is
    equal bit for bit on CPUs (with the same number of threads), and on GPUs with ``train.deterministic``.

    Args:
        config: The run; ``resdet.load_config`` and ``resdet.Config`` make one.
        train_set: A dataset of ``(image, target)`` as ``resdet.wrap_dataset`` takes it, to train on in place of
            ``config.data.train``. ``config.augment`` is applied to its items.
        val_set: The same in place of ``config.data.val``. It must return the same each time.
        classes: Names of the labels 1, 2, ... of these datasets; by default their own, and for a ``val_set`` without
            names those of the training data.
        on_log: Called in the main process with each line on losses that metrics.jsonl gets, ``step`` included.
        on_evaluation: The same for the lines on evaluations. What either raises reaches the caller unchanged, when
            last.pt is written; ``resume=auto`` continues such a run too.
        begun: ``time.perf_counter()`` from which ``config.minutes`` count, as of the program's start; None: now.

    Raises:
        UserError: If data, weights or settings do not allow it (each subclass says which), and ``TrainingError`` if a
            loss or gradient is not finite, or memory does not suffice; last.pt is then the last good checkpoint.
        InternalError: If the numbers of the last evaluation are not pycocotools' (``eval.reference``).
        Interrupted: After SIGTERM or SIGINT, when everything is on the disk.
    """
    begun = time.perf_counter() if begun is None else begun
    config = stated(config, {"train": train_set, "val": val_set}, classes)
    with launched(config.output_dir, config.train, config.resume) as (team, resume_from):
        resumed = None if resume_from is None else read_weights(resume_from)  # once: it can be large
        if resumed is not None and config.plan:
            config = resumed_plan(config, configuration_of(resumed, Config))
        is_rejudged = resumed is not None and check_configuration(resumed, config)
        train_data, val_data = read_data(config, train_set, val_set, classes, team)
        num_images = {"train": train_data.table.num_images, "val": val_data.table.num_images}
        if resumed is not None:
            before, now = ([c.name for c in categories] for categories in (resumed.categories, train_data.categories))
            is_rejudged |= check_data(resumed, before, now, num_images)
        if config.plan:
            config, train_data = planned(config, train_data, val_data, team, begun)
        if isinstance(config.data.val, HeldOut):
            if resumed is not None:
                check_lists(resumed.path.parent, train_data.table, val_data.table)
            team.on_main(lambda: write_lists(config.output_dir, train_data.table, val_data.table))
        if team.is_main:
            warn_of_dense_images(config, {"train": train_data.table, "val": val_data.table})
        model = first_model(config, train_data, resumed, team.device)
        val_data = evaluated_part(with_model_classes(model, val_data), config.train.eval_images)
        match_labels(model, val_data.table)  # other classes in data.val are reported now, not at the first evaluation
        saved = {} if resumed is None else load_training_state(resumed, model)
        del resumed  # the model has copies of its tensors
        settings = run_settings(config, resume_from, num_images, is_rejudged, on_log, on_evaluation)
        inference = inference_settings(config)
        if config.minutes is not None and not knows_evaluation(saved.get("schedule", {})):
            seconds = team.mean_of(evaluation_seconds(model, val_data, inference, team.world_size))
            settings = replace(settings, evaluation_s=seconds)
        task = DetectionTask(model, train_data, val_data, settings, config.loader, config.eval, inference, team)
        return run(task, settings, team, begun=begun, saved=saved)


def run_settings(
    config: Config,
    resume_from: Path | None,
    num_images: Mapping[str, int],
    is_rejudged: bool,
    on_log: Callback | None,
    on_evaluation: Callback | None,
) -> RunSettings:
    """Return what the training loop is told of a run; ``num_images`` are by split."""
    return RunSettings(
        config=config_to_plain(config),
        output_dir=config.output_dir,
        resume_from=resume_from,
        seed=config.seed,
        train=config.train,
        optim=config.optim,
        best_metric=config.eval.best_metric,
        num_images=num_images["train"],
        num_val_images=num_images["val"],
        minutes=config.minutes,
        body_lr_factor=config.optim.body_lr_factor,
        is_rejudged=is_rejudged,
        on_log=on_log,
        on_evaluation=on_evaluation,
    )


def plan_alone(config: Config) -> Plan:
    """Plan a run as ``train`` would, and leave it at that; nothing is written.

    Raises:
        UserError: If the configuration chooses nothing (``plan`` is false), or its data do not allow it.
    """
    if not config.plan:
        raise UserError("plan: must be true, as in the recipe finetune: this configuration leaves nothing to choose")
    begun = time.perf_counter()
    with processes(config.train.device) as team:
        train_data, val_data = read_data(stated(config, {"train": None, "val": None}, None), None, None, None, team)
        return make_plan(config, train_data, val_data, team, begun=begun)


def read_data(
    config: Config,
    train_set: Dataset[Any] | None,
    val_set: Dataset[Any] | None,
    classes: Sequence[str] | None,
    team: Processes,
) -> tuple[DetectionDataset, DetectionDataset]:
    """Return the training and validation data of a run: those given, or those of its configuration."""
    if train_set is None:
        train_data = build_train_set(config, augmented=not config.plan)
    else:
        train_data = build_given_dataset(train_set, config, team, classes, None)
    if val_set is None:
        return train_data, build_val_set(config)
    return train_data, build_given_dataset(val_set, config, team, classes, train_data)


def planned(
    config: Config, train_set: DetectionDataset, val_set: DetectionDataset, team: Processes, begun: float
) -> tuple[Config, DetectionDataset]:
    """Plan a run in the main process, and return its configuration and its training data in all of them."""

    def made() -> Config:
        plan = make_plan(config, train_set, val_set, team, begun=begun)
        for line in plan.text().splitlines():
            logger.info("%s", line)
        logger.info("planned in %.0f s: %s", plan.seconds, config.output_dir / CONFIG)
        plan.write(config.output_dir)
        return plan.config

    chosen: Config = team.on_main(made)
    team.micro_batch_size(chosen.train.batch_size, chosen.train.accumulate)
    return chosen, train_set.augmented(config_augment(chosen))


def first_model(
    config: Config, train_set: DetectionDataset, resumed: WeightsFile | None, device: torch.device
) -> Detector:
    """Return the detector that a run begins or goes on with, on its device."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, train_set, resume_from=resumed)
    model.to(device)
    if config.train.compile:
        compile_detector(model, device)
    return model


def evaluation_seconds(
    model: nn.Module, dataset: DetectionDataset, inference: InferenceSettings, num_processes: int
) -> float:
    """Estimate from a few images how long an evaluation takes, with checkpoints, pictures and report."""
    num_images = dataset.table.num_images
    chosen = evenly_spread(num_images, _TIMED_IMAGES)
    images = [torch.from_numpy(dataset.image(index)).permute(2, 0, 1) for index in chosen.tolist()]  # [3, H, W] each
    with random_states_kept(placed(model, inference.device)), run_inference(model, inference) as run:
        run(images[:1], "")  # sets up kernels
        begun = time.perf_counter()
        for image in images:
            run([image], "")
        seconds = (time.perf_counter() - begun) / len(images)
    return seconds * math.ceil(num_images / num_processes) + seconds_beside_detection(num_images)


def stated(config: Config, given: Mapping[str, Dataset[Any] | None], classes: Sequence[str] | None) -> Config:
    """Return the configuration with the datasets that a program gives, by split, stated in its data section.

    Raises:
        UserError: If a dataset is neither given nor in the configuration.
    """
    sources = {}
    for split, dataset in given.items():
        source = getattr(config.data, split)
        if dataset is not None:
            size = len(dataset) if isinstance(dataset, Sized) and len(dataset) else None
            names = None if classes is None else list(classes)
            sources[split] = PythonSource(dataset=type(dataset).__name__, num_images=size, classes=names)
        elif isinstance(source, PythonSource):
            raise missing_data(source, f"data.{split}")
        elif isinstance(source, HeldOut) and given["train"] is not None:
            raise UserError("data.val.fraction: divides a dataset of files, not train_set: give val_set too")
    return config.model_copy(update={"data": config.data.model_copy(update=sources)})


def warn_of_dense_images(config: Config, tables: Mapping[str, AnnotationTable]) -> None:
    """Log which splits have images with more objects than an evaluation of this configuration can find."""
    limits = detector_limits(config)
    for split, table in tables.items():
        counts = table.objects_per_image()  # [I]
        if num_dense := int((counts > limits.num_detections).sum()):
            logger.warning(
                "data.%s: %d of %d images hold more objects, up to %d, than the %d detections that are kept of an "
                "image; the rest cannot be found: %s raises the number",
                *(split, num_dense, table.num_images, counts.max(), limits.num_detections, limits.detections_key),
            )


@dataclass
class DetectionTask:
    """A detector in training: implements ``resdet.training.loop.Task``, which documents the methods."""

    model: Detector
    train_set: DetectionDataset
    val_set: DetectionDataset
    settings: RunSettings
    loader: LoaderConfig
    eval: EvalConfig
    inference: InferenceSettings  # for evaluations
    team: Processes
    last: Evaluation | None = None
    image_size_keys: str = "model.min_size, model.max_size"
    shown_metrics: Sequence[str] = ("AP", "AP50", "AP75")

    def describe(self) -> list[str]:
        """Return lines for the log on model and data."""
        parameters = list(self.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total, spec = sum(p.numel() for p in parameters), self.model.spec
        return [
            f"{spec.arch}, {spec.norm} norm: {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained",
            f"train: {self.train_set.table.num_images} images, {len(self.train_set.categories)} classes; "
            f"val: {self.val_set.table.num_images} images",
        ]

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Return micro-batches without end."""
        return train_loader(
            self.train_set,
            self.team,
            batch_size=self.settings.train.batch_size,
            num_micro_batches=self.settings.train.accumulate,
            num_workers=self.loader.num_workers,
            stall_seconds=self.loader.stall_seconds,
            sampling=self.loader.sampling,
            repeat_threshold=self.loader.repeat_threshold,
            seed=self.settings.seed,
            start_batch=start_step,
            resize=host_resize(self.model),
        )

    def losses(self, parallel: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of a batch (``detection_losses``)."""
        return detection_losses(self.model, parallel, batch, self.settings.train.precision)

    def not_finite(self, moment: guards.Moment, values: dict[str, Tensor], batches: Sequence[Batch]) -> TrainingError:
        """Save a broken step and return the error that reports it (``not_finite``)."""
        return not_finite(moment, values, self.model, batches, self.train_set.table, self.settings.output_dir)

    def logged(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means with the recall of the proposals in place of the two counts that it is made of."""
        num_objects, num_found = means.pop("num_objects"), means.pop("num_found")
        # Of no objects none is missed.
        return means | {"proposal_recall": num_found / num_objects if num_objects else 1.0}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Compute COCO's and VOC's metrics, and the losses if they are wanted; set the model's score threshold."""
        assert isinstance(model, Detector)
        with without_compiled_code(self.settings.train.compile):
            self.last = evaluate(model, self.val_set, self.inference, self.team)
            metrics = self.last.metrics
            if self.eval.loss:
                metrics |= validation_loss(model, self.val_set, self.inference, self.team)
        self.model.score_threshold = model.score_threshold = self.last.score_threshold
        return metrics

    def report(self, log: RunLog, step: int, *, is_final: bool) -> None:
        """Draw the last evaluation's detections on the first images; write metrics.json and report.html.

        The numbers of the run's end are compared with pycocotools' (``eval.reference``) when all is written.
        """
        assert self.last is not None
        path, table = self.settings.output_dir / METRICS, self.val_set.table
        if is_final and self.eval.reference:
            self.last = self.last.with_reference(table)
        write_metrics(path, self.last, table)
        if self.eval.num_pictures:
            self._draw_pictures(self.last, log, step)
        write_run_report(self.settings.output_dir, self.val_set, self.last, self.settings.config)
        if self.last.reference is not None:
            self.last.reference.check(str(path))

    def payload(self, model: nn.Module) -> dict[str, Any]:
        """Return a detector as checkpoints hold it."""
        assert isinstance(model, Detector)
        return checkpoint_payload(model)

    def _draw_pictures(self, evaluation: Evaluation, log: RunLog, step: int) -> None:
        folder, dataset = self.settings.output_dir / PICTURES, self.val_set
        folder.mkdir(exist_ok=True)
        stated = self.eval.picture_score
        threshold = shown_from(evaluation)[0] if stated is None else stated
        for index, name in enumerate(picture_names(dataset.table.file_names[: self.eval.num_pictures].tolist())):
            image, found = dataset.image(index), evaluation.detections.of_image(index)
            scale = legible_scale(image)
            picture = draw(image, found, dataset.categories, score_threshold=threshold, scale=scale)
            save_picture(folder / f"{name}.png", picture)
            log.picture(step, printable(name), picture)


def not_finite(
    moment: guards.Moment,
    values: dict[str, Tensor],
    model: Detector,
    micro_batches: Sequence[Batch],
    table: AnnotationTable,
    folder: Path,
) -> TrainingError:
    """Save a step of a detector whose loss or gradient is not finite and return the error that reports it.

    The file holds enough for ``repeat_step``: the weights before the step, the images as the model was given them, the
    targets, and the seeds.
    """
    indices = [index for batch in micro_batches for index in batch.indices]
    content = checkpoint_payload(model)
    content["trained"] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    content["batches"] = [
        {"images": batch.images, "targets": [dict(target) for target in batch.targets], "seeds": batch.seeds}
        for batch in micro_batches
    ]
    images = "image ids of the batch: " + ", ".join(f"{table.image_ids[i]} ({table.file_names[i]})" for i in indices)
    use = ": resdet.training.detection.repeat_step computes it again"
    return guards.broken_step(moment, values, model, content, folder, images=images, use=use)


def repeat_step(path: Path, *, device: torch.device | None = None) -> tuple[Detector, dict[str, Tensor]]:
    """Compute a saved step again, forward and backward: the same losses, and in the model the same gradients.

    >>> model, losses = repeat_step(Path("runs/mine/broken_step_812.pt"))  # doctest: +SKIP
    >>> [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]

    Args:
        path: What ``not_finite`` saved.
        device: Where to compute; None: on the CPU. The bits are those of the run on the same kind of device, but
            with ``train.compile``.

    Returns:
        The detector in training mode, with gradients (not clipped), and the losses as the run logged them.

    Raises:
        WeightsError: If the file is not such a step.
    """
    payload = read_checkpoint(path)
    if "moment" not in payload:
        raise WeightsError(f"{path}: must be a broken_step_N.pt that a run left; it holds {sorted(payload)[:8]}")
    moment = guards.Moment(**payload["moment"])
    device = device or torch.device("cpu")
    model = load_detector(weights_in(payload, path)).to(device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in payload["trained"])
    micro_batches = [
        Batch(batch["images"], batch["targets"], [0] * len(batch["images"]), batch["seeds"])
        for batch in payload["batches"]
    ]
    torch.manual_seed(moment.random_seed)
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def losses(parallel: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return detection_losses(model, parallel, batch, moment.precision)

    return model, accumulate_gradients(losses, model, micro_batches, moment.num_pieces, scaler)
