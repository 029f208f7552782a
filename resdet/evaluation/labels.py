"""A model's classes and a dataset's, matched by name."""

from __future__ import annotations

import numpy as np
from torch import nn

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError, name_some
from resdet.types import Category, Ints


def model_categories(model: nn.Module) -> tuple[Category, ...]:
    """Return a detector's classes, or none for a model that does not know them (torchvision's own)."""
    return tuple(getattr(model, "categories", ()))


def match_labels(model: nn.Module, table: AnnotationTable) -> Ints | None:
    """Return the dataset's label for each of the model's, int64 ``[K + 1]``, or None where they are the same.

    Classes are matched by name; if the model has no names (torchvision's own), their numbers are compared.

    Raises:
        DataError: If model and dataset do not have the same classes.
    """
    ours, theirs = model_categories(model), table.categories
    if not ours:
        predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
        num_classes = getattr(getattr(predictor, "cls_score", None), "out_features", table.num_classes)
        if num_classes != table.num_classes:
            raise DataError(
                f"the model has {num_classes} classes, background included, and {table.name} has {table.num_classes}: "
                "they must agree (a torchvision model of 91 classes is trained on COCO's category ids, not on labels)"
            )
        return None
    label_of = {category.name: category.label for category in theirs}
    missing = [name for name in label_of if name not in {category.name for category in ours}]
    unknown = [category.name for category in ours if category.name not in label_of]
    if missing or unknown:
        only_theirs, only_ours = (name_some(map(repr, names), 10) or "none" for names in (missing, unknown))
        raise DataError(
            f"model and dataset must have the same classes: only {table.name} has {only_theirs}; "
            f"only the model has {only_ours}"
        )
    if all(label_of[category.name] == category.label for category in ours):
        return None
    labels = np.zeros(len(ours) + 1, dtype=np.int64)
    for category in ours:
        labels[category.label] = label_of[category.name]
    return labels
