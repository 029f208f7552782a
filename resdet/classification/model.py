"""A classifier: its network, how images are normalised for it, and the names of its classes.

Legend: ``B`` images, ``K`` classes, ``S`` side of the square images it was trained on, ``H, W`` pixels.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torchvision.models import ResNet50_Weights

from resdet.classification.spec import ClassifierSpec
from resdet.errors import DataError, WeightsError, name_some
from resdet.models.archs import find_arch
from resdet.models.bodies import Classifier, build_classifier
from resdet.models.loading import LoadReport, check_stride, load_strictly
from resdet.weights.files import WeightsPath, read_weights
from resdet.weights.formats import FACTS_ENTRY
from resdet.weights.source import locate

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "resdet-classifier-1"

_HEADS = ("fc.", "classifier.6.")
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ImageClassifier:
    """A network, its classes, and how images are normalised for it.

    Attributes:
        spec: Its settings.
        classes: Names of its ``K`` classes by label.
        network: Takes normalised images, returns scores ``[B, K]``.
        mean: Subtracted from images in [0, 1]: float32 ``[3, 1, 1]``, or ``[3, S, S]`` for a mean of each pixel.
    """

    spec: ClassifierSpec
    classes: tuple[str, ...]
    network: Classifier
    mean: Tensor

    def normalise(self, pixels: Tensor, shifts: Tensor | None = None) -> Tensor:
        """Turn 8-bit images into the network's input.

        Args:
            pixels: uint8 ``[B, 3, H, W]``, on the network's device. Where they are not ``S`` x ``S``, a mean of each
                pixel is replaced by its mean over all pixels.
            shifts: Added to the colours of each image in [0, 1], ``[B, 3]``.

        Returns:
            float32 ``[B, 3, H, W]``.
        """
        mean = self.mean.to(pixels.device, non_blocking=True)
        if mean.shape[1:] not in ((1, 1), pixels.shape[2:]):
            mean = mean.mean((1, 2), keepdim=True)
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
    """Build a classifier with random weights: He et al. 2015 for convolutions.

    Raises:
        UserError: If a setting does not fit the architecture.
    """
    network = build_classifier(
        spec.arch,
        num_classes=len(classes),
        norm=spec.norm,
        norm_eps=spec.norm_eps,
        stride_in_1x1=spec.stride_in_1x1,
    )
    return ImageClassifier(spec, tuple(classes), network, torch.tensor(spec.image_mean)[:, None, None])


def classifier_payload(classifier: ImageClassifier) -> dict[str, Any]:
    """Return a classifier as plain values and tensors, from which ``load_classifier`` rebuilds it.

    A detector can take it as first weights: it holds the state dict under torchvision's names, and the facts that
    belong to it (mean and deviation of images, eps of the norms, where it strides).

    Returns:
        ``format``, ``spec``, ``classes`` (plain values), ``mean`` and ``model`` (the state dict, not copied).
    """
    spec = classifier.spec
    payload: OrderedDict[str, Any] = OrderedDict(
        format=CHECKPOINT_FORMAT,
        spec=spec.model_dump(mode="json"),
        classes=list(classifier.classes),
        mean=classifier.mean.cpu(),
        model=classifier.network.state_dict(),
    )
    facts = {
        "format": "torchvision",
        "arch": spec.arch,
        "stride_in_1x1": spec.stride_in_1x1,
        "channel_order": "rgb",
        "image_mean": list(spec.image_mean),
        "image_std": list(spec.image_std),
        "norm_eps": spec.norm_eps,
        "background": "first",
        "num_classes": len(classifier.classes),
    }
    setattr(payload, FACTS_ENTRY, facts)  # where resdet.weights.convert_file puts them in torchvision's files
    return payload


def load_classifier(path: WeightsPath, *, arch: str | None = None) -> ImageClassifier:
    """Build the classifier that a file holds, in evaluation mode, on the CPU.

    Args:
        path: A checkpoint of tools/pretrain.py, or with ``arch`` weights in torchvision's layout. Those are tensors
            alone: images are normalised as for torchvision's ImageNet weights, and 1,000 classes are ImageNet's.
        arch: The architecture, for files that do not state it.

    Raises:
        WeightsError: If the file is missing, damaged, or holds no classifier (of this architecture).
        UserError: If there is no such architecture.
    """
    file = read_weights(path)
    content = file.content
    if file.format == CHECKPOINT_FORMAT:
        try:
            spec = ClassifierSpec.model_validate(content["spec"])
            classifier = make_classifier(spec, content["classes"])
            mean = content["mean"]
            if not isinstance(mean, Tensor) or mean.dim() != 3:
                raise TypeError("mean")
        except (KeyError, TypeError, ValidationError) as error:
            raise WeightsError(f"{file.path}: its description is not one of this version ({error!r})") from error
        classifier = ImageClassifier(spec, classifier.classes, classifier.network, mean)
    elif arch is None:
        raise WeightsError(
            f"{file.path}: is not a checkpoint of tools/pretrain.py and states no architecture: name it (--arch)"
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

    Args:
        classifier: Its network is changed in place.
        source: A torchvision name, a file or a URL.

    Returns:
        What was loaded and what was not; it is also logged.

    Raises:
        WeightsError: If the weights cannot be had or are not those of this network.
    """
    arch = classifier.spec.arch
    file = read_weights(locate(source, arch))
    check_stride(file, classifier.network.body)
    names = file.content.get("classes")
    same = _num_classes(file.tensors) == len(classifier.classes) and names in (None, list(classifier.classes))
    report = load_strictly(classifier.network, file, what=f"this {arch} classifier", keep=() if same else _HEADS)
    logger.info("%s: %s", arch, report)
    return report


def match_classes(classes: Sequence[str], known: Sequence[str], *, where: str) -> npt.NDArray[np.int64]:
    """Find a dataset's classes among a classifier's, by name.

    A thousand folders named by WordNet ids (``n01440764``) are ImageNet's classes, which are numbered in that order.
    Otherwise names are compared without regard to case, and underscores are spaces.

    Args:
        classes: The dataset's, in label order.
        known: The classifier's, in label order.
        where: What messages call the dataset.

    Returns:
        The classifier's label of each of the dataset's, int64 ``[len(classes)]``.

    Raises:
        DataError: If a class is unknown, or its name is that of two.
    """

    def plain(name: str) -> str:
        return name.replace("_", " ").strip().lower()

    if list(classes) == list(known):
        return np.arange(len(classes))
    if len(classes) == len(known) == 1000 and all(_WORDNET_ID.fullmatch(name) for name in classes):
        return np.argsort(np.argsort(np.array(classes)))
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(known):
        labels.setdefault(plain(name), []).append(label)
    unknown = [name for name in classes if plain(name) not in labels]
    if unknown:
        raise DataError(
            f"{where}: {len(unknown)} of its {len(classes)} classes are none of the model's {len(known)}: "
            f"{name_some(unknown, 3)}; the model has {name_some(known, 3)}"
        )
    double = [name for name in classes if len(labels[plain(name)]) > 1]
    if double:
        raise DataError(f"{where}: the model has two classes called {name_some(double, 3)}; rename the folder's")
    return np.array([labels[plain(name)][0] for name in classes], dtype=np.int64)


def _num_classes(tensors: dict[str, Tensor]) -> int | None:
    weight = next((tensors[f"{head}weight"] for head in _HEADS if f"{head}weight" in tensors), None)
    return None if weight is None or weight.dim() != 2 else len(weight)


def _class_names(num_classes: int) -> tuple[str, ...]:
    names: list[str] = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return tuple(names) if len(names) == num_classes else tuple(map(str, range(num_classes)))
