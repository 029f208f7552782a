"""albumentations pipelines in which boxes stay exact and labels stay with their boxes.

albumentations' own ``Compose`` sends every box through float32 fractions of the image, also where only colours change,
and raises where a rounded fraction exceeds 1. Here its transforms are called one by one, on float64 fractions, and only
if they move pixels.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import MIN_TRAINABLE_SIDE
from resdet.errors import DataError

logger = logging.getLogger(__name__)

Steps = Sequence[Mapping[str, Mapping[str, Any] | None]]

MIN_VISIBILITY = 0.1
"""Share of a box's area that must stay inside the image (a tenth, the least at which people still name objects)."""

_COMPOSITES = ("OneOf", "SomeOf", "RandomOrder", "Sequential")
_NOT_FOR_DETECTORS = ("Normalize", "ToFloat", "FromFloat", "ToTensorV2", "ToTensor3D")


def build_augment(steps: Steps, *, min_visibility: float = MIN_VISIBILITY) -> Augment:
    """Build a pipeline from the names and parameters of albumentations transforms.

    Args:
        steps: One single-key mapping per transform, in order, as YAML gives them:
            ``[{"HorizontalFlip": {"p": 0.5}}, {"OneOf": {"transforms": [{"Blur": {}}, {"CLAHE": {}}], "p": 0.2}}]``.
        min_visibility: Share of a box's area, in [0, 1], below which it is dropped when a transform has moved the
            rest of it out of the image.

    Raises:
        DataError: If a name is unknown, a parameter is unknown or wrong, or a step has another form; the message
            says which step and which parameter.
    """
    albumentations = _import_albumentations()
    transforms = [_build_step(albumentations, step, f"augment[{i}]") for i, step in enumerate(steps)]
    return Augment(steps, [name for step in steps for name in step], transforms, min_visibility)


def _import_albumentations() -> ModuleType:
    # Unless told not to, it asks the network for a newer version of itself while being imported.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import albumentations
    module: ModuleType = albumentations
    return module


def _build_step(albumentations: ModuleType, step: object, place: str) -> Any:
    """Build one transform; the library ships no types, hence ``Any``."""
    if not isinstance(step, Mapping) or len(step) != 1:
        raise DataError(f"{place}: must be one transform as {{Name: {{parameter: value}}}}, got {step!r}")
    ((name, parameters),) = step.items()
    place = f"{place} ({name})"
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise DataError(f"{place}: parameters must be given as {{parameter: value}}, got {parameters!r}")
    known = _transform_names(albumentations)
    if name in _NOT_FOR_DETECTORS:
        raise DataError(f"{place}: must not be used here: the detector takes uint8 images and normalises them itself")
    if name not in known:
        raise DataError(f"{place}: no such albumentations transform{_did_you_mean(str(name), known)}")

    transform_class = getattr(albumentations, name)
    accepted = [p for p in inspect.signature(transform_class).parameters if p not in ("args", "kwargs", "strict")]
    for parameter in parameters:
        # albumentations itself only warns, and goes on with its defaults.
        if parameter not in accepted:
            hint = _did_you_mean(str(parameter), accepted) or f"; it has {', '.join(accepted)}"
            raise DataError(f"{place}: no such parameter {parameter!r}{hint}")
    arguments = dict(parameters)
    if name in _COMPOSITES:
        inner = arguments.get("transforms")
        if not isinstance(inner, Sequence) or isinstance(inner, str) or not inner:
            raise DataError(f"{place}: transforms must be a list of transforms, got {inner!r}")
        arguments["transforms"] = [
            _build_step(albumentations, item, f"{place}.transforms[{i}]") for i, item in enumerate(inner)
        ]
    try:
        with warnings.catch_warnings(record=True) as advice:
            warnings.simplefilter("always")
            transform = transform_class(**arguments, **({"strict": True} if _knows_strict(transform_class) else {}))
    except Exception as error:
        raise DataError(f"{place}: {_parameter_problem(error)}") from error
    for warning in advice:
        logger.info("%s: albumentations says: %s", place, warning.message)
    if name not in _COMPOSITES:
        beyond = sorted(set(transform.targets_as_params) - {"image", "bboxes"})
        if beyond:
            raise DataError(f"{place}: needs {', '.join(beyond)}, and there are only images, boxes and labels")
        # Some transforms (dropouts) leave boxes alone unless a processor is there to ask for thresholds.
        processor = albumentations.core.bbox_utils.BboxProcessor(albumentations.BboxParams(format="albumentations"))
        transform.set_processors({"bboxes": processor})
    return transform


def _knows_strict(transform_class: type[Any]) -> bool:
    """Say whether a class checks its parameters against a schema.

    Those that do replace parameters which they cannot read by defaults, unless strict; the others refuse the word.
    """
    owner = next(base for base in transform_class.__mro__ if "__init__" in vars(base))
    return "InitSchema" in vars(owner)


def _transform_names(albumentations: ModuleType) -> list[str]:
    leaf = (albumentations.ImageOnlyTransform, albumentations.DualTransform)
    other_inputs = (
        albumentations.Transform3D,
        albumentations.Lambda,
        albumentations.Mosaic,
        albumentations.CropNonEmptyMaskIfExists,
    )
    names = [
        name
        for name, value in vars(albumentations).items()
        if inspect.isclass(value)
        and issubclass(value, leaf)
        and value not in leaf
        and not issubclass(value, other_inputs)
        and name not in _NOT_FOR_DETECTORS
    ]
    return [*names, *_COMPOSITES]


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f"; did you mean {lower[close[0]]}?" if close else ""


def _parameter_problem(error: Exception) -> str:
    """Give albumentations' complaint about parameters on one line."""
    cause = error.__cause__
    if cause is not None and hasattr(cause, "errors"):
        details = []
        for item in cause.errors():
            where = ".".join(str(part) for part in item["loc"][:1])
            got = "" if item["type"] == "missing" else f", got {item['input']!r}"
            details.append(f"{where}: {item['msg']}{got}" if where else f"{item['msg']}")
        return "; ".join(dict.fromkeys(details))
    return " ".join(str(error).split())


class Augment:
    """A pipeline of transforms; made by ``build_augment``."""

    def __init__(self, steps: Steps, names: list[str], transforms: list[Any], min_visibility: float) -> None:
        self._steps = steps
        self._names = names
        self._transforms = transforms
        self._min_visibility = min_visibility

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._steps, self._min_visibility)

    def __call__(
        self,
        image: npt.NDArray[np.uint8],
        boxes: npt.NDArray[np.floating[Any]],
        labels: npt.NDArray[np.int64],
        *,
        seed: int,
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Apply every step to an image and its boxes.

        Boxes are bit-identical where no step moved pixels. Horizontal and vertical flips are exact: with boxes of
        float32 numbers, flipping twice gives the same boxes. Other geometry is computed in float64.

        Args:
            image: uint8 RGB ``[H, W, 3]``; not changed.
            boxes: ``[N, 4]``, float32 or float64; clipped to the image first.
            labels: int64 ``[N]``, only for transforms that ask for them (ConstrainedCoarseDropout).
            seed: Decides all random choices, >= 0.

        Returns:
            The image, uint8 ``[H', W', 3]``; the boxes that are left, ``[M, 4]`` in its pixels, clipped to it, of the
            dtype given; and their rows in ``boxes``, int64 ``[M]``.

        Raises:
            DataError: If a step fails or gives something else than a uint8 image of three channels.
        """
        # One stream for all steps: albumentations' own set_random_seed would give each step the same numbers.
        generator, py_random = np.random.default_rng(seed), random.Random(seed)
        moved = _clip(boxes.astype(np.float64), image)
        kept = np.arange(len(boxes), dtype=np.int64)
        visible = np.ones(len(boxes))
        for position, (name, transform) in enumerate(zip(self._names, self._transforms, strict=True)):
            transform.set_random_state(generator, py_random)
            before = image
            fractions = np.concatenate(
                [
                    moved / _scale(before),
                    np.asarray(labels, dtype=np.float64)[kept, None],
                    np.arange(len(kept))[:, None],
                ],
                axis=1,
            )
            try:
                result = transform(image=before, bboxes=fractions)
            except Exception as error:
                message = " ".join(str(error).split()) or type(error).__name__
                raise DataError(f"augment[{position}] ({name}): {message}") from error
            image = _checked(result["image"], f"augment[{position}] ({name})")
            # A transform that only resizes leaves fractions alone, but not pixels.
            if result["bboxes"] is fractions and image.shape == before.shape:
                continue
            after = np.asarray(result["bboxes"], dtype=np.float64).reshape(-1, 6)
            rows = after[:, 5].astype(np.int64)
            if name == "HorizontalFlip":
                whole = np.stack(
                    [before.shape[1] - moved[:, 2], moved[:, 1], before.shape[1] - moved[:, 0], moved[:, 3]], 1
                )
            elif name == "VerticalFlip":
                whole = np.stack(
                    [moved[:, 0], before.shape[0] - moved[:, 3], moved[:, 2], before.shape[0] - moved[:, 1]], 1
                )
            else:
                whole = after[:, :4] * _scale(image)
            clipped = _clip(whole, image)
            with np.errstate(invalid="ignore", divide="ignore"):
                visible = visible[rows] * np.nan_to_num(_area(clipped) / _area(whole))
            sides = clipped[:, 2:] - clipped[:, :2]
            stay = (visible >= self._min_visibility) & (sides >= MIN_TRAINABLE_SIDE).all(axis=1)
            moved, visible, kept = clipped[stay], visible[stay], kept[rows[stay]]
        return np.ascontiguousarray(image), moved.astype(boxes.dtype), kept


def _rebuild(steps: Steps, min_visibility: float) -> Augment:
    return build_augment(steps, min_visibility=min_visibility)


def _scale(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    height, width = image.shape[:2]
    return np.array([width, height, width, height], dtype=np.float64)


def _clip(boxes: npt.NDArray[np.float64], image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    clipped: npt.NDArray[np.float64] = np.clip(boxes, 0, _scale(image))
    return clipped


def _area(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sides = boxes[:, 2:] - boxes[:, :2]
    area: npt.NDArray[np.float64] = sides[:, 0] * sides[:, 1]
    return area


def _checked(image: Any, place: str) -> npt.NDArray[np.uint8]:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"{place}: must give a uint8 image [H, W, 3], gave {got}")
    return image
