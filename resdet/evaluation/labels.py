"""A model's classes and a dataset's, matched by name."""

from __future__ import annotations

import numpy as np
from torch import nn

from resdet.data.annotations import AnnotationTable
from resdet.data.dataset import DetectionDataset
from resdet.data.names import same_forms
from resdet.errors import DataError, name_some
from resdet.types import Category, Ints


def model_categories(model: nn.Module) -> tuple[Category, ...]:
    """Return a detector's classes, or none for a model that does not know them (torchvision's own)."""
    return tuple(getattr(model, "categories", ()))


def label_names(model: nn.Module) -> list[str] | None:
    """Return a name for each of a detector's labels, its number if the model has no names; None if it cannot tell."""
    num_classes = num_model_classes(model)
    numbers = None if num_classes is None else [str(label) for label in range(1, num_classes)]
    return [category.name for category in model_categories(model)] or numbers


def num_model_classes(model: nn.Module) -> int | None:
    """Return a detector's number of classes, background included; None if it is not torchvision's kind of model."""
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    return getattr(getattr(predictor, "cls_score", None), "out_features", None)


def with_model_classes(model: nn.Module, dataset: DetectionDataset) -> DetectionDataset:
    """Return a dataset with all classes of a model that knows them; the AP of those without boxes is undefined.

    Placeholders (``Category.is_placeholder``) are not added: ``match_labels`` drops them.

    A dataset with a class that the model does not have is returned as it is, for ``match_labels`` to report.
    """
    categories = [category for category in model_categories(model) if not category.is_placeholder]
    return dataset.with_classes_of(categories) if categories else dataset


def match_labels(model: nn.Module, table: AnnotationTable) -> Ints | None:
    """Return the dataset's label for each of the model's, int64 ``[K + 1]``, or None where they are the same.

    Classes are matched by name; if the model has no names (torchvision's own), their numbers are compared. A DataError
    is raised unless model and dataset have the same classes; ``with_model_classes`` adds those that a dataset lacks.
    A placeholder that the dataset lacks has label 0: its detections are dropped.
    """
    ours, theirs = model_categories(model), table.categories
    if not ours:
        num_classes = num_model_classes(model)
        if num_classes not in (None, table.num_classes):
            raise DataError(
                f"the model has {num_classes} classes, background included, and {table.name} has {table.num_classes}: "
                "they must agree (a torchvision model of 91 classes is trained on COCO's category ids, not on labels)"
            )
        return None
    own_label, label = (
        dict(zip(same_forms(one.name for one in categories), (one.label for one in categories), strict=True))
        for categories in (ours, theirs)
    )
    missing = [name for name in label if name not in own_label]
    placeholders = {category.name for category in ours if category.is_placeholder} - label.keys()
    own_label = {name: number for name, number in own_label.items() if name not in placeholders}
    unknown = [name for name in own_label if name not in label]
    if missing or unknown:
        only_theirs, only_ours = (name_some(map(repr, names), 10) or "none" for names in (missing, unknown))
        raise DataError(
            f"model and dataset must have the same classes: only {table.name} has {only_theirs}; "
            f"only the model has {only_ours}"
        )
    if own_label == label:
        return None
    labels = np.zeros(len(ours) + 1, dtype=np.int64)
    labels[list(own_label.values())] = [label[name] for name in own_label]
    return labels
