"""Training of classifiers: from a configuration to weights, and what a classifier's step and evaluation are.

What a run's folder holds, how it resumes, logs and stops is the same as for detectors (``resdet.training``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from resdet.build import inference_settings
from resdet.classification.build import build_images, build_pretrained, build_train_view
from resdet.classification.config import ClassifierEvalConfig, ClassifierTrainConfig, PretrainConfig
from resdet.classification.data import LabelledImages
from resdet.classification.evaluate import evaluate_classifier
from resdet.classification.loader import TrainBatch, train_batch
from resdet.classification.model import ImageClassifier, classifier_payload, load_classifier, match_classes
from resdet.classification.views import TrainView
from resdet.config import LoaderConfig
from resdet.config_reading import config_to_plain
from resdet.data.order import TrainBatches
from resdet.data.workers import load_batches
from resdet.errors import TrainingError, name_some
from resdet.evaluation.settings import InferenceSettings
from resdet.models.bodies import Classifier
from resdet.precision import autocast
from resdet.processes import Processes
from resdet.training import guards
from resdet.training.checkpoint import load_training_state
from resdet.training.compiled import compile_network, without_compiled_code
from resdet.training.launch import launched
from resdet.training.loop import TrainResult, run
from resdet.training.resume import check_configuration, check_data
from resdet.training.runlog import RunLog
from resdet.training.settings import RunSettings, evaluated_part
from resdet.weights.files import read_weights

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes images and their labels; returns mixed images and the share of each class in them, ``[B, K]``."""


def pretrain(config: PretrainConfig) -> TrainResult:
    """Train a classifier as the configuration says, evaluate it, and leave everything in ``config.output_dir``.

    Under torchrun each process calls this, and together they compute what one process would, but for batch norms, each
    of which sees its own process's images. Resuming and errors are as for ``resdet.train``.
    """
    begun = time.perf_counter()
    with launched(config.output_dir, config.train, config.resume) as (team, resume_from):
        resumed = None if resume_from is None else read_weights(resume_from)  # once: it can be large
        is_rejudged = resumed is not None and check_configuration(resumed, config)
        train_set = build_images(config.data.train)
        val_set = build_images(config.data.val, classes=train_set.classes)
        # Other classes in data.val are reported now, not at the first evaluation.
        match_classes(val_set.classes, train_set.classes, where=val_set.name)
        num_images = {"train": len(train_set), "val": len(val_set)}
        val_set = evaluated_part(val_set, config.train.eval_images)
        before = None if resumed is None else load_classifier(resumed)
        if resumed is not None and before is not None:
            is_rejudged |= check_data(resumed, before.classes, train_set.classes, num_images)
        torch.manual_seed(config.seed)
        resize = config.eval.resize or config.model.image_size
        classifier = build_pretrained(config.model, train_set, resize=resize, resume_from=before)
        classifier.network.to(team.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.train.compile:
            compile_network(classifier.network, team.device)
        saved = {} if resumed is None else load_training_state(resumed, classifier.network)
        del resumed, before  # the network has copies of their tensors
        settings = RunSettings(
            config=config_to_plain(config),
            output_dir=config.output_dir,
            resume_from=resume_from,
            seed=config.seed,
            train=config.train,
            optim=config.optim,
            best_metric=config.eval.best_metric,
            num_images=num_images["train"],
            num_val_images=num_images["val"],
            is_rejudged=is_rejudged,
            plateau_patience=config.optim.plateau_patience,
            warmup_until_error=config.optim.warmup_until_error,
        )
        view = build_train_view(config.augment, classifier)
        mix = _mixing(config.train, len(classifier.classes))
        train, loader, inference = config.train, config.loader, inference_settings(config)
        task = ClassificationTask(
            classifier, train_set, val_set, view, mix, settings, train, loader, config.eval, inference, team
        )
        return run(task, settings, team, begun=begun, saved=saved)


@dataclass
class ClassificationTask:
    """A classifier in training: implements ``resdet.training.loop.Task``, which documents the methods."""

    classifier: ImageClassifier
    train_set: LabelledImages
    val_set: LabelledImages
    view: TrainView
    mix: Mix | None
    settings: RunSettings
    train: ClassifierTrainConfig
    loader: LoaderConfig
    eval: ClassifierEvalConfig
    inference: InferenceSettings  # for evaluations
    team: Processes
    image_size_keys: str = "model.image_size"
    shown_metrics: Sequence[str] = ("top1", "top5", "val_loss")

    @property
    def model(self) -> Classifier:
        """The network."""
        return self.classifier.network

    def describe(self) -> list[str]:
        """Return lines for the log on model and data."""
        spec, train_set, val_set = self.classifier.spec, self.train_set, self.val_set
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        return [
            f"{spec.arch}, {spec.norm} norm: {millions:.2f} M parameters",
            f"train: {len(train_set)} images, {len(train_set.classes)} classes ({train_set.name}); "
            f"val: {len(val_set)} images ({val_set.name})",
        ]

    def batches(self, start_step: int) -> Generator[TrainBatch, None, None]:
        """Return micro-batches without end."""
        keys = TrainBatches(
            np.ones((len(self.train_set), 2), dtype=np.int64),  # all views have one size: no grouping by size
            self.train.batch_size,
            rank=self.team.rank,
            world_size=self.team.world_size,
            num_micro_batches=self.train.accumulate,
            seed=self.settings.seed,
            start_batch=start_step,
        )
        make, loader = partial(train_batch, self.train_set, self.view), self.loader
        workers, stall = loader.num_workers, loader.stall_seconds
        return load_batches(make, keys, num_workers=workers, device=self.team.device, stall_seconds=stall)

    def losses(self, parallel: nn.Module, batch: TrainBatch) -> dict[str, Tensor]:
        """Compute the cross entropy, of smoothed labels and mixed images if wanted, and the share of wrong answers."""
        device = self.team.device
        pixels, shifts = batch.images.to(device, non_blocking=True), batch.shifts.to(device, non_blocking=True)
        images = self.classifier.normalise(pixels, shifts)  # float32 [B, 3, S, S]
        targets = labels = batch.labels.to(device, non_blocking=True)  # [B]
        if self.mix is not None:
            images, targets = self.mix(images, labels)  # targets: [B, K]
        with autocast(device, self.train.precision):
            scores = parallel(images)  # [B, K]
        loss = F.cross_entropy(scores.float(), targets, label_smoothing=self.train.label_smoothing)
        return {"loss": loss, "error": (scores.detach().argmax(1) != labels).float().mean()}

    def not_finite(
        self, moment: guards.Moment, values: dict[str, Tensor], batches: Sequence[TrainBatch]
    ) -> TrainingError:
        """Save a broken step, with its images and labels, and return the error that reports it."""
        names = [self.train_set.pictures.name(index) for batch in batches for index in batch.indices]
        images, use = f"images of the batch: {name_some(names, 8)}", ": weights, images and labels"
        content = classifier_payload(self.classifier)
        content["batches"] = [batch._asdict() for batch in batches]
        return guards.broken_step(moment, values, self.model, content, self.settings.output_dir, images=images, use=use)

    def logged(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means as they are."""
        return means

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Compute ``top1``, ``top5`` and ``val_loss``."""
        classifier, section = self._with_network(model), self.eval
        views, resize, scales = section.views, section.resize, section.scales
        with without_compiled_code(self.train.compile):
            metrics = evaluate_classifier(
                classifier, self.val_set, self.inference, self.team, views=views, resize=resize, scales=scales
            )
        return metrics.as_dict()

    def report(self, log: RunLog, step: int, *, is_final: bool) -> None:
        """Write nothing: the metrics say all there is."""

    def payload(self, model: nn.Module) -> dict[str, Any]:
        """Return a classifier with this network as checkpoints hold it."""
        return classifier_payload(self._with_network(model))

    def _with_network(self, network: nn.Module) -> ImageClassifier:
        assert isinstance(network, Classifier)
        return replace(self.classifier, network=network)


def _mixing(train: ClassifierTrainConfig, num_classes: int) -> Mix | None:
    """Return what mixes the images of a batch, by torch's own random numbers, or None."""
    alphas = ((v2.MixUp, train.mixup), (v2.CutMix, train.cutmix))
    kinds: list[Any] = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in alphas if alpha]
    return v2.RandomChoice(kinds) if len(kinds) > 1 else kinds[0] if kinds else None
