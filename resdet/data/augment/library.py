"""Select albumentations' transforms that suit detectors, and correct the boxes of those that get them wrong.

Findings in 2.0.8, its last release under the MIT license:

* Dropouts compute boxes in whole pixels: a box that meets a hole comes back up to a pixel shorter on the right and at
  the bottom, even where the hole lies in its middle. PixelDropout's boxes can shrink though nothing moved.
* Distortions draw each box as a mask and take the last painted pixel for the box's end, a pixel too short; where no
  pixel is left, ThinPlateSpline and similar transforms return the old box. GridElasticDeform is a pixel short too.
* Morphological swaps the axes of its boxes' masks.
* Many transforms fail on strips and on a few pixels: Erasing (TypeError: an argument is missing where no rectangle
  fits), GridDropout and GridDistortion (ZeroDivisionError: fewer pixels than cells), RandomScale, Downscale and
  Superpixels (a side rounds to 0), GlassBlur, ToGray (it loses an axis); and crops on images smaller than they are.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from resdet.data.augment.sample import extent, uncovered
from resdet.errors import UserError

COMPOSITES = ("OneOf", "SomeOf", "RandomOrder", "Sequential")
"""Transforms made of transforms."""

UNFIT = {
    **dict.fromkeys(
        ("Normalize", "ToFloat", "FromFloat", "ToTensorV2", "ToTensor3D"),
        "the detector takes uint8 images and normalises them itself",
    ),
    "Morphological": "albumentations gives wrong boxes with it",
    "RandomGridShuffle": "it tears objects apart, and each piece would be labelled as a whole one",
}
"""Transforms that must not be used, and why."""

_SMALL_SIDE, _LONG_ASPECT = 64, 20.0
"""Pixels of the shorter side below which, and ratio of the sides above which, transforms fail for an image's size."""

Rows = npt.NDArray[np.float64]
"""Boxes as transforms take them, ``[N, 7]``: four fractions of the image, label, row in the sample, visible share."""


def import_albumentations() -> ModuleType:
    """Import albumentations, without its greeting and without access to the network.

    A UserError is raised for AlbumentationsX before it is imported: it has the same name, is under the AGPL and reports
    what it is used for.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else the import asks for a newer version
    os.environ["ALBUMENTATIONS_NO_TELEMETRY"] = "1"
    try:
        found = f"albumentationsx {importlib.metadata.version('albumentationsx')}"
    except importlib.metadata.PackageNotFoundError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import albumentations
        if str(albumentations.__version__).startswith("2.0."):
            module: ModuleType = albumentations
            return module
        found = f"version {albumentations.__version__} ({albumentations.__file__})"
    raise UserError(
        f"augmentation needs albumentations>=2.0.8,<2.1 (MIT license), but `import albumentations` finds {found}: "
        "pip uninstall albumentationsx, then pip install --force-reinstall 'albumentations>=2.0.8,<2.1'"
    )


def transform_names(albumentations: ModuleType) -> list[str]:
    """Return the names of the transforms that take images and boxes."""
    leaf = (albumentations.ImageOnlyTransform, albumentations.DualTransform)
    others = ("Transform3D", "Lambda", "Mosaic", "CropNonEmptyMaskIfExists")
    other_inputs = tuple(getattr(albumentations, name) for name in others)
    classes = {name: value for name, value in vars(albumentations).items() if inspect.isclass(value)}
    found = [name for name, value in classes.items() if issubclass(value, leaf) and not issubclass(value, other_inputs)]
    return [name for name in found if classes[name] not in leaf and name not in UNFIT] + list(COMPOSITES)


def with_exact_boxes(albumentations: ModuleType, transform_class: Any) -> Any:
    """Return the class itself, or one derived from it where its own boxes do not fit its pixels."""
    corrected: dict[type[Any], Callable[..., Rows]] = {
        albumentations.augmentations.dropout.transforms.BaseDropout: _under_holes,
        albumentations.augmentations.geometric.distortion.BaseDistortion: _distorted,
        albumentations.PixelDropout: lambda transform, bboxes, **params: bboxes,
        albumentations.GridElasticDeform: _longer_by_a_pixel,
    }
    for base, apply_to_bboxes in corrected.items():
        if issubclass(transform_class, base):
            methods = {"apply_to_bboxes": apply_to_bboxes}
            return type(transform_class)(transform_class.__name__, (transform_class,), methods)
    return transform_class


def knows_strict(transform_class: type[Any]) -> bool:
    """Return whether a class checks its parameters against a schema, and so takes ``strict``.

    Unless it is strict, such a class replaces parameters that it cannot read by its defaults.
    """
    owner = next(base for base in transform_class.__mro__ if "__init__" in vars(base))
    return "InitSchema" in vars(owner)


def is_about_size(error: Exception, height: int, width: int) -> bool:
    """Return whether a transform failed because of the image's size: a crop larger than it, a strip, a few pixels.

    Few transforms check sizes themselves, so on an image of unusual size every error counts.
    """
    shorter, longer = sorted((height, width))
    return type(error).__name__ == "CropSizeError" or shorter < _SMALL_SIDE or longer > _LONG_ASPECT * shorter


def _under_holes(transform: Any, bboxes: Rows, holes: npt.NDArray[Any], shape: tuple[int, ...], **params: Any) -> Rows:
    scale = extent(shape)
    boxes, shares = uncovered(bboxes[:, :4] * scale, np.asarray(holes, dtype=np.float64).reshape(-1, 4))
    met = shares < 1
    if not met.any():
        return bboxes
    result = bboxes.copy()
    result[met, :4] = boxes[met] / scale
    result[:, -1] *= shares
    return result


def _distorted(
    transform: Any,
    bboxes: Rows,
    map_x: npt.NDArray[Any],
    map_y: npt.NDArray[Any],
    shape: tuple[int, ...],
    **params: Any,
) -> Rows:
    """Return the boxes around the pixels that the maps take from each box; without such pixels, a box has no area."""
    scale = extent(shape)
    result = bboxes.copy()
    # Maps hold the origins as pixel indices; a pixel's centre lies half a pixel on.
    x, y = map_x + 0.5, map_y + 0.5  # [H, W]
    for row, (x1, y1, x2, y2) in zip(result, bboxes[:, :4] * scale, strict=True):
        inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
        columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
        row[:4] = 0
        if len(rows):
            row[:4] = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / scale
    return result


def _longer_by_a_pixel(transform: Any, bboxes: Rows, shape: tuple[int, ...], **params: Any) -> Rows:
    own = super(type(transform), transform).apply_to_bboxes(bboxes, shape=shape, **params)
    result = np.array(own, dtype=np.float64)
    if len(result):
        result[:, 2:4] += 1 / extent(shape)[:2]
    return result
