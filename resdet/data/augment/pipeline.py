"""Augmentation pipelines in which boxes stay exact and everything known of a box stays with it.

Steps are albumentations' transforms by their names, and those of ``augment.steps``, which albumentations lacks.

albumentations' own ``Compose`` sends every box through float32 fractions of the image, also where only colours change,
and raises where a rounded fraction exceeds 1. Here its transforms are called one by one, on float64 fractions, and
boxes are taken from them only if they moved pixels.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_byte
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.sharedctypes import RawValue
from random import Random
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from pydantic import ValidationError

from resdet.data.annotations import MIN_TRAINABLE_SIDE
from resdet.data.augment import library
from resdet.data.augment.sample import Sample, extent
from resdet.data.augment.steps import CopyPaste, LargeScaleJitter, Mosaic, Partner, RandomTile, Step
from resdet.errors import DataError, UserError

logger = logging.getLogger(__name__)

Steps = Sequence[Mapping[str, Mapping[str, Any] | None]]

MIN_VISIBILITY = 0.1
"""Share of a box's area that must be left (a tenth, the least at which people still name objects)."""

OWN_STEPS: dict[str, type[Step]] = {step.__name__: step for step in (CopyPaste, LargeScaleJitter, Mosaic, RandomTile)}
"""Steps that albumentations lacks, or (Mosaic) has only for data in another form."""

_FLIPPED_AXES = {"HorizontalFlip": 0, "VerticalFlip": 1}


def build_augment(steps: Steps, *, min_visibility: float = MIN_VISIBILITY) -> Augment:
    """Build a pipeline from the names and parameters of its steps.

    Args:
        steps: One single-key mapping per step, in order, as YAML gives them:
            ``[{"HorizontalFlip": {"p": 0.5}}, {"OneOf": {"transforms": [{"Blur": {}}, {"CLAHE": {}}], "p": 0.2}}]``.
            Names are those of albumentations' transforms and of ``OWN_STEPS``; the latter stand at the top level, not
            within OneOf and the like.
        min_visibility: Share of a box's area, in [0, 1], below which it is dropped when steps have moved the rest of
            it out of the image or covered it.

    Raises:
        DataError: If a name is unknown, a parameter is unknown or wrong, or a step has another form; the message
            names the step and the parameter.
        UserError: If ``import albumentations`` finds another library.
    """
    builder = _Builder(library.import_albumentations(), min_visibility)
    return Augment(steps, [builder.part(step, f"augment[{i}]") for i, step in enumerate(steps)], min_visibility)


@dataclass(frozen=True)
class _Builder:
    """A builder of steps. ``place`` is where a step stands in the configuration, for messages."""

    albumentations: ModuleType
    min_visibility: float

    def part(self, step: object, place: str) -> tuple[str, _Part]:
        """Return a step's place with its name, and what applies it."""
        name, parameters, place = self._read(step, place)
        if name not in OWN_STEPS:
            transform = self._transform(name, parameters, place)
            if (axis := _FLIPPED_AXES.get(name)) is not None:
                return place, partial(_flipped, transform, axis)
            return place, partial(_transformed_if_it_fits, transform, place, RawValue("b"))
        try:
            # JSON mode is the one in which strict typing takes a list for a tuple, as in the configuration.
            own = OWN_STEPS[name].model_validate_json(json.dumps(parameters), strict=True)
        except (ValidationError, TypeError) as error:
            raise DataError(f"{place}: {_parameter_problem(error)}") from error
        return place, lambda sample, rng, _, draw: own.apply(sample, rng, draw) if rng.random() < own.p else sample

    def _read(self, step: object, place: str) -> tuple[str, Mapping[str, Any], str]:
        """Check a step's name and parameters; return both, and the place with the name added."""
        if not isinstance(step, Mapping) or len(step) != 1:
            raise DataError(f"{place}: must be one step as {{Name: {{parameter: value}}}}, got {step!r}")
        ((name, parameters),) = step.items()
        place = f"{place} ({name})"
        parameters = {} if parameters is None else parameters
        if not isinstance(parameters, Mapping):
            raise DataError(f"{place}: parameters must be given as {{parameter: value}}, got {parameters!r}")
        known = [*library.transform_names(self.albumentations), *OWN_STEPS]
        if name in library.UNFIT:
            raise DataError(f"{place}: must not be used here: {library.UNFIT[name]}")
        if name not in known:
            raise DataError(
                f"{place}: no such transform in albumentations or among {', '.join(OWN_STEPS)}"
                f"{_did_you_mean(str(name), known)}"
            )
        step_class = OWN_STEPS[name] if name in OWN_STEPS else getattr(self.albumentations, name)
        accepted = [p for p in inspect.signature(step_class).parameters if p not in ("args", "kwargs", "strict")]
        for parameter in parameters:
            # albumentations itself only warns, and goes on with its defaults.
            if parameter not in accepted:
                hint = _did_you_mean(str(parameter), accepted) or f"; it has {', '.join(accepted)}"
                raise DataError(f"{place}: no such parameter {parameter!r}{hint}")
        return name, parameters, place

    def _transform(self, name: str, parameters: Mapping[str, Any], place: str) -> Any:
        """Build one of albumentations' transforms; the library ships no types, hence ``Any``."""
        if name in OWN_STEPS:
            raise DataError(f"{place}: must stand at the top level of augment; its own p says how often it is applied")
        transform_class, arguments = getattr(self.albumentations, name), dict(parameters)
        if name in library.COMPOSITES:
            inner = arguments.get("transforms")
            if not isinstance(inner, Sequence) or isinstance(inner, str) or not inner:
                raise DataError(f"{place}: transforms must be a list of transforms, got {inner!r}")
            arguments["transforms"] = [
                self._transform(*self._read(item, f"{place}.transforms[{i}]")) for i, item in enumerate(inner)
            ]
        else:
            transform_class = library.with_exact_boxes(self.albumentations, transform_class)
        if library.knows_strict(transform_class):
            arguments["strict"] = True
        try:
            with warnings.catch_warnings(record=True) as advice:
                warnings.simplefilter("always")
                transform = transform_class(**arguments)
        except Exception as error:
            raise DataError(f"{place}: {_parameter_problem(error)}") from error
        for warning in advice:
            logger.info("%s: albumentations says: %s", place, warning.message)
        if name not in library.COMPOSITES:
            beyond = sorted(set(transform.targets_as_params) - {"image", "bboxes"})
            if beyond:
                raise DataError(f"{place}: needs {', '.join(beyond)}, and there are only images, boxes and labels")
            # Some transforms (dropouts) leave boxes alone unless they have a processor to ask for thresholds.
            thresholds = self.albumentations.BboxParams(format="albumentations", min_visibility=self.min_visibility)
            transform.set_processors({"bboxes": self.albumentations.core.bbox_utils.BboxProcessor(thresholds)})
        return transform


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f"; did you mean {lower[close[0]]}?" if close else ""


def _parameter_problem(error: Exception) -> str:
    """Return what albumentations or an own step says of its parameters, on one line."""
    cause = error if isinstance(error, ValidationError) else error.__cause__
    if not isinstance(cause, ValidationError):
        return _in_one_line(error)
    details = []
    for item in cause.errors():
        where = ".".join(str(part) for part in item["loc"][:1])
        message = item["msg"].removeprefix("Value error, ")
        got = "" if item["type"] in ("missing", "value_error") else f", got {item['input']!r}"
        details.append(f"{where}: {message}{got}" if where else message)
    return "; ".join(dict.fromkeys(details))


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, eq=False)
class Augment:
    """A pipeline of steps; made by ``build_augment``."""

    steps: Steps  # as they were given
    parts: Sequence[tuple[str, _Part]]  # what each step is called in messages, and what applies it
    min_visibility: float

    def __reduce__(self) -> tuple[Any, ...]:
        # Built again where it is unpickled: classes from with_exact_boxes cannot be pickled.
        return partial(build_augment, min_visibility=self.min_visibility), (self.steps,)

    def __call__(self, sample: Sample, *, seed: int, partner: Callable[[int], Sample] | None = None) -> Sample:
        """Apply every step to an image and its boxes, which are clipped to it first.

        Boxes are bit-identical where no step moved pixels. Horizontal and vertical flips are exact: with boxes of
        float32 numbers, flipping twice gives the same boxes. Other geometry is computed in float64 and rounded once, at
        the end, to the dtype of the given boxes. Labels, flags and ids stay with their boxes.

        A step that mixes images (Mosaic, CopyPaste) draws them with ``partner`` when it is applied. Each has gone
        through the steps that stand before it, with random choices of its own; the steps that follow see the mixture.
        So colours set before Mosaic differ from quarter to quarter, and after it they are one picture's; CopyPaste
        after Mosaic pastes from another mosaic, which reads four images more.

        A step of albumentations leaves an image as it is whose size it cannot take: a crop larger than the image, a
        strip, a few pixels. The first one is logged.

        Args:
            sample: Image and boxes; not changed.
            seed: Decides all random choices, >= 0.
            partner: Returns another image of the dataset for a number in [0, 2**63), always the same for the same
                number. Needed only by steps that mix images.

        Returns:
            The image, uint8 ``[H', W', 3]``, and the boxes that are left, clipped to it.

        Raises:
            DataError: If a step fails or returns anything but a uint8 image of three channels; it names image and step.
        """
        result = self._apply(len(self.parts), sample, seed, partner)
        return replace(result, image=np.ascontiguousarray(result.image), boxes=result.boxes.astype(sample.boxes.dtype))

    def _apply(self, num_parts: int, sample: Sample, seed: int, partner: Callable[[int], Sample] | None) -> Sample:
        """Apply the first steps; the boxes of the result are float64."""
        # One stream for all steps: albumentations' own set_random_seed would give each step the same numbers.
        rng, py_rng = np.random.default_rng(seed), Random(seed)
        sample = replace(sample, boxes=np.clip(sample.boxes.astype(np.float64), 0, extent(sample.image.shape)))

        for position, (place, part) in enumerate(self.parts[:num_parts]):
            try:
                after = part(sample, rng, py_rng, partial(self._draw, position, partner))
            except UserError:
                raise
            except Exception as error:
                raise DataError(f"image {sample.image_id}: {place}: {_in_one_line(error)}") from error
            if after.boxes is not sample.boxes:
                sides = after.boxes[:, 2:] - after.boxes[:, :2]  # [N, 2]
                stay = (after.visible >= self.min_visibility) & (sides >= MIN_TRAINABLE_SIDE).all(axis=1)
                after = after if stay.all() else after.select(stay)
            sample = after
        return sample

    def _draw(self, position: int, partner: Callable[[int], Sample] | None, rng: Generator) -> Sample:
        """Return another image as the steps before ``position`` leave it."""
        if partner is None:
            raise ValueError("mixes several images, and only one is given")
        number = int(rng.integers(2**63))
        return self._apply(position, partner(number), number, partner)


_Part = Callable[[Sample, Generator, Random, Partner], Sample]
"""Applies a step at random; returns the given boxes themselves if it moved no pixels."""


def _transformed_if_it_fits(
    transform: Any, place: str, warned: c_byte, sample: Sample, rng: Generator, py_rng: Random, draw: Partner
) -> Sample:
    """Apply a transform of albumentations; an image of a size that it cannot take stays as it is.

    The first such image is logged. ``warned`` is shared with worker processes that are forked, so it is the first of
    all of them.
    """
    try:
        return _transformed(transform, sample, rng, py_rng, draw)
    except Exception as error:
        height, width = sample.image.shape[:2]
        if not library.is_about_size(error, height, width):
            raise
        if not warned.value:
            warned.value = 1
            where, why = f"image {sample.image_id} of {width}x{height} pixels", _in_one_line(error)
            logger.warning("%s: cannot be applied to %s: %s; it and others like it stay as they are", place, where, why)
        return sample


def _transformed(transform: Any, sample: Sample, rng: Generator, py_rng: Random, draw: Partner) -> Sample:
    """Apply a transform of albumentations."""
    transform.set_random_state(rng, py_rng)
    rows = np.arange(len(sample), dtype=np.float64)
    # Labels are for transforms that ask for them (ConstrainedCoarseDropout).
    fractions = np.column_stack([sample.boxes / extent(sample.image.shape), sample.labels, rows, sample.visible])
    result = transform(image=sample.image, bboxes=fractions)  # boxes [N, 7]
    image = result["image"]
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"must give a uint8 image [H, W, 3], gave {got}")
    # A transform that only resizes leaves fractions alone, but not pixels.
    if result["bboxes"] is fractions and image.shape == sample.image.shape:
        return replace(sample, image=image)
    after = np.asarray(result["bboxes"], dtype=np.float64).reshape(-1, fractions.shape[1])
    left = replace(sample.select(after[:, 5].astype(np.int64)), visible=after[:, 6])
    return left.moved(image, after[:, :4] * extent(image.shape))


def _flipped(transform: Any, axis: int, sample: Sample, rng: Generator, py_rng: Random, draw: Partner) -> Sample:
    """Flip x (``axis`` 0) or y (1) where albumentations' ``transform`` says so: its fractions of the image are inexact.

    OpenCV turns 640x480 pixels in 0.05 ms. A view of reversed columns costs nothing here and 0.4 ms where channels are
    separated; NumPy takes 1.1 ms to copy one.
    """
    transform.set_random_state(rng, py_rng)
    if not transform.should_apply():
        return sample
    boxes, length = sample.boxes.copy(), sample.image.shape[1 - axis]
    boxes[:, [axis, axis + 2]] = length - boxes[:, [axis + 2, axis]]
    return sample.moved(np.asarray(cv2.flip(sample.image, 1 - axis), dtype=np.uint8), boxes)
