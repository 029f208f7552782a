"""A classifier: its network, how images are normalised for it, and the names of its classes.

Legend: ``B`` images, ``K`` classes, ``S`` side of the square images it was trained on, ``H, W`` pixels.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torchvision.models import ResNet50_Weights

from resdet.classification.imagenet import WORDNET_IDS
from resdet.classification.spec import ClassifierSpec
from resdet.errors import DataError, WeightsError, name_some
from resdet.models.archs import find_arch
from resdet.models.bodies import Classifier, build_classifier
from resdet.models.loading import LoadReport, check_stride, load_strictly
from resdet.weights.facts import FACTS_ENTRY
from resdet.weights.files import WeightsPath, read_weights
from resdet.weights.source import read_first_weights

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "resdet-classifier-1"

_HEADS = ("fc.", "classifier.6.")


@dataclass(frozen=True)
class ImageClassifier:
    """A network, its classes, and how images are normalised for it."""

    spec: ClassifierSpec
    classes: tuple[str, ...]  # K names by label
    network: Classifier  # takes normalised images, returns scores [B, K]
    mean: Tensor  # subtracted from images in [0, 1]: float32 [3, 1, 1], or [3, S, S] for a mean of each pixel

    def normalise(self, pixels: Tensor, shifts: Tensor | None = None) -> Tensor:
        """Turn 8-bit images ``[B, 3, H, W]`` on the network's device into its input, float32 of the same shape.

        Where they are not ``S`` x ``S``, a mean of each pixel is replaced by its mean over all pixels. ``shifts``
        ``[B, 3]`` are added to the colours of each image in [0, 1].
        """
        mean = self.mean.to(pixels.device, non_blocking=True)
        if mean.shape[1:] not in ((1, 1), pixels.shape[2:]):
            mean = mean.mean((1, 2), keepdim=True)  # [3, 1, 1]
        images = pixels.float().div_(255)
        if shifts is not None:
            images += shifts[:, :, None, None]
        return images.sub_(mean).div_(images.new_tensor(self.spec.image_std)[:, None, None])

    def dense_scores(self, images: Tensor) -> Tensor:
        """Compute the scores ``[B, K]`` of normalised images ``[B, 3, H, W]`` of any size, averaged over windows.

        The network is made fully convolutional: its last pooling and its classifier are applied, at stride 1, to every
        window of the last feature map whose size is that of ``S`` x ``S`` images. Smaller features are pooled whole.

        Source: Simonyan & Zisserman (arXiv:1409.1556), section 3.2.
        """
        *_, features = self.network.body(images).values()
        window = max(1, self.spec.image_size // find_arch(self.spec.arch).strides[-1])
        if min(features.shape[2:]) < window:
            return self.network(images)  # type: ignore[no-any-return]
        if hasattr(self.network, "classifier"):
            windows = F.unfold(features, window).transpose(1, 2)  # [B, places, C * window * window]
            scores: Tensor = self.network.classifier(windows)
            return scores.mean(1)
        # The classifier is linear: the mean of its scores over windows is its score of the mean window.
        vectors = F.avg_pool2d(features, window, stride=1).mean((2, 3))
        return self.network.fc(vectors)  # type: ignore[no-any-return]


def make_classifier(spec: ClassifierSpec, classes: Sequence[str]) -> ImageClassifier:
    """Build a classifier with random weights: He et al. 2015 for convolutions."""
    network = build_classifier(
        spec.arch, num_classes=len(classes), norm=spec.norm, norm_eps=spec.norm_eps, stride_in_1x1=spec.stride_in_1x1
    )
    return ImageClassifier(spec, tuple(classes), network, torch.tensor(spec.image_mean)[:, None, None])


def classifier_payload(classifier: ImageClassifier) -> dict[str, Any]:
    """Return a classifier as plain values and tensors, from which ``load_classifier`` rebuilds it.

    A detector can take it as first weights: it holds the state dict (not copied) under torchvision's names, and the
    facts that belong to it (mean and deviation of images, eps of the norms, where it strides).
    """
    settings = classifier.spec.model_dump(mode="json")
    payload: OrderedDict[str, Any] = OrderedDict(
        format=CHECKPOINT_FORMAT,
        spec=settings,
        classes=list(classifier.classes),
        mean=classifier.mean.cpu(),
        model=classifier.network.state_dict(),
    )
    facts: dict[str, Any] = {"format": "torchvision", "channel_order": "rgb", "background": "first"}
    facts |= {name: settings[name] for name in ("arch", "stride_in_1x1", "image_mean", "image_std", "norm_eps")}
    facts["num_classes"] = len(classifier.classes)
    setattr(payload, FACTS_ENTRY, facts)  # where resdet.weights.convert_file puts them in torchvision's files
    return payload


def load_classifier(path: WeightsPath, *, arch: str | None = None) -> ImageClassifier:
    """Build the classifier that a file holds, in evaluation mode, on the CPU.

    The file is a checkpoint of resdet pretrain, or with ``arch`` weights in torchvision's layout. Those are tensors
    alone: images are normalised as for torchvision's ImageNet weights, and 1,000 classes are ImageNet's.
    """
    file = read_weights(path)
    content = file.content
    if file.format == CHECKPOINT_FORMAT:
        try:
            spec, classes, mean = ClassifierSpec.model_validate(content["spec"]), content["classes"], content["mean"]
            if not isinstance(mean, Tensor) or mean.dim() != 3:
                raise TypeError("mean")
            if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
                raise TypeError("classes")
            if len(classes) != _num_classes(file.tensors):
                raise TypeError(f"{len(classes)} classes")
            classifier = make_classifier(spec, classes)
        except (KeyError, TypeError, ValidationError) as error:
            raise WeightsError(f"{file.path}: its description is not one of this version ({error!r})") from error
        classifier = replace(classifier, mean=mean)
    elif arch is None:
        raise WeightsError(
            f"{file.path}: is not a checkpoint of `resdet pretrain` and states no architecture: name it (--arch)"
        )
    else:
        num_classes = _num_classes(file.tensors)
        if file.kind != "classifier" or num_classes is None:
            raise WeightsError(f"{file.path}: holds no classifier; its tensors are {name_some(file.tensors)}")
        classifier = make_classifier(ClassifierSpec(arch=arch, **file.settings), _class_names(num_classes))
    load_strictly(classifier.network, file, what=f"this {classifier.spec.arch} classifier")
    classifier.network.eval()
    return classifier


def load_first_weights(classifier: ImageClassifier, source: str) -> LoadReport:
    """Load another classifier's weights: all of them, or all but the last layer if its classes are others.

    ``source`` is a torchvision name, a file or a URL. What was loaded and what was not is returned, and also logged.
    """
    arch = classifier.spec.arch
    file = read_first_weights(source, arch)
    check_stride(file, classifier.network.body)
    names = file.content.get("classes")
    same = _num_classes(file.tensors) == len(classifier.classes) and names in (None, list(classifier.classes))
    report = load_strictly(classifier.network, file, what=f"this {arch} classifier", keep=() if same else _HEADS)
    logger.info("%s: %s", arch, report)
    return report


def match_classes(classes: Sequence[str], known: Sequence[str], *, where: str) -> npt.NDArray[np.int64]:
    """Find a dataset's classes among those that a classifier knows, by name.

    Names are compared without regard to case, and underscores are spaces. ImageNet's 1,000 classes, under torchvision's
    names for them or as numbers, are known by their WordNet ids too (``n01440764``), which are never ambiguous. Returns
    the classifier's label of each class; a DataError, which calls the dataset ``where``, is raised if one is unknown,
    or its name is that of two.
    """
    if list(classes) == list(known):
        return np.arange(len(classes))
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(known):
        labels.setdefault(_plain(name), []).append(label)
    is_imagenet = list(known) in (_imagenet_names(), list(map(str, range(len(WORDNET_IDS)))))
    if is_imagenet:
        labels |= {wordnet_id: [label] for label, wordnet_id in enumerate(WORDNET_IDS)}
    unknown = [name for name in classes if _plain(name) not in labels]
    if unknown:
        raise DataError(
            f"{where}: {len(unknown)} of its {len(classes)} classes are none of the model's {len(known)}: "
            f"{name_some(unknown, 3)}; the model has {name_some(known, 3)}"
        )
    double = [name for name in classes if len(labels[_plain(name)]) > 1]
    if double:
        ids = " and ".join(WORDNET_IDS[label] for label in labels[_plain(double[0])]) if is_imagenet else ""
        how = f"; name folders by WordNet ids, which are {ids} for {double[0]}" if ids else "; rename the folder's"
        raise DataError(f"{where}: the model has two classes called {name_some(double, 3)}{how}")
    return np.array([labels[_plain(name)][0] for name in classes], dtype=np.int64)


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def _num_classes(tensors: dict[str, Tensor]) -> int | None:
    weight = next((tensors[f"{head}weight"] for head in _HEADS if f"{head}weight" in tensors), None)
    return None if weight is None or weight.dim() != 2 else len(weight)


def _class_names(num_classes: int) -> tuple[str, ...]:
    names = _imagenet_names()
    return tuple(names) if len(names) == num_classes else tuple(map(str, range(num_classes)))


def _imagenet_names() -> list[str]:
    names: list[str] = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return names
