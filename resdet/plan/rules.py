"""The rules of a plan: each turns facts into values of the configuration, with its reason.

A rule sees what is decided before it, by the user or an earlier rule, in ``Facts.settled``; ``RULES`` is their order.
What single choices have come to is in ``configs/README.md``; for some there is no figure yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from resdet.check.anchor_coverage import IOU_REACHED, AnchorLayout, anchor_layout, best_iou, in_tiles
from resdet.evaluation.tiles import tile_grid
from resdet.models.spec import Tiles
from resdet.plan.fingerprint import Fingerprint
from resdet.plan.machine import Machine
from resdet.training.settings import seconds_beside_detection
from resdet.types import Floats

_DETECTION = 0.5  # share of a training step that detection in an image takes
_LAST = 0.2  # share of a run's time that its last evaluation may take
_FEWEST_EVALUATED = 20  # images, however long they take


@dataclass(frozen=True)
class Facts:
    """What rules may look at.

    Attributes:
        data: Facts of the data.
        machine: Speed of the machine.
        boxes: Objects of the training data, xyxy in pixels of the stored image, ``[N, 4]``.
        sizes: ``(height, width)`` of each object's image, ``[N, 2]``.
        run_seconds: Time for the whole run; None where the number of steps is given.
        seconds: Time for training alone; None where the number of steps is given.
        num_val_images: Validation images.
        num_steps: Number of steps, where that is given in place of the time.
        num_workers: Processors of the machine.
        num_processes: Processes that train together, each on a share of the batch.
        settled: Values by dotted key: those that the user states, those of the rules so far, and defaults.
        stated: Keys that the user states.
    """

    data: Fingerprint
    machine: Machine
    boxes: Floats
    sizes: Floats
    run_seconds: float | None
    seconds: float | None
    num_val_images: int
    num_steps: int | None
    num_workers: int
    num_processes: int
    settled: Mapping[str, Any]
    stated: Set[str] = frozenset()

    def image_seconds(self, side: float) -> float:
        """Return the seconds of a training step for each image whose shorter side is scaled to ``side`` pixels."""
        height, width = self.data.image_size
        scale = side / min(height, width)
        return self.machine.seconds(height * scale, width * scale)

    @property
    def side(self) -> int:
        """Length in pixels to which the shorter side of an image is scaled in evaluation."""
        size = self.settled["model.min_size"]
        return int(size if isinstance(size, int) else size[-1])

    @property
    def megapixels(self) -> float:
        """Size of a typical image as the network sees it, in millions of pixels."""
        height, width = self.data.image_size
        scale = self.side / min(height, width)
        return height * width * scale**2 / 1e6

    @property
    def detection_seconds(self) -> float:
        """Seconds that detection in an image takes."""
        seconds = self.image_seconds(self.side)
        if (tiles := self.settled["eval.tiles"]) is not None:
            count = len(tile_grid(*self.data.image_size, Tiles(*tiles)))
            seconds += count * self.machine.seconds(self.side, self.side)
        return _DETECTION * seconds / self.num_processes

    @property
    def num_evaluated(self) -> int:
        """Validation images that an evaluation looks at: what is stated, or what its share of the time allows."""
        stated, most = self.settled["train.eval_images"], self.num_val_images
        if stated is not None:
            return min(int(stated), most)
        if self.run_seconds is None:
            return most
        return min(most, max(_FEWEST_EVALUATED, int(_LAST * self.run_seconds / self.detection_seconds)))

    @property
    def evaluation_seconds(self) -> float:
        """Seconds of an evaluation of ``num_evaluated`` images."""
        return self.num_evaluated * self.detection_seconds + seconds_beside_detection(self.num_evaluated)

    @property
    def num_visits(self) -> float:
        """Images that a run trains on, repeated ones included."""
        if self.seconds is None:
            return float((self.num_steps or 1) * self.settled["train.batch_size"])
        return self.passes(self.side) * self.data.num_images

    def passes(self, side: float) -> float:
        """Return how often the time allows to train on each image, its shorter side scaled to ``side`` pixels."""
        assert self.seconds is not None
        passes = self.num_processes * self.seconds / self.image_seconds(side) / self.data.num_images
        epochs: float | None = self.settled["train.epochs"]
        return passes if epochs is None else min(passes, epochs)

    @property
    def estimated_steps(self) -> int:
        """Steps of the run."""
        if self.num_steps is not None:
            return self.num_steps
        batch_size: int = self.settled["train.batch_size"]
        steps = max(1, round(self.num_visits / batch_size))
        most: int | None = self.settled["train.steps"]
        return steps if most is None else min(steps, most)


@dataclass(frozen=True)
class Choice:
    """A value that a rule chooses, and why."""

    key: str  # dotted
    value: Any
    because: str


def precision(facts: Facts) -> Iterator[Choice]:
    """Take the precision that is faster here: a step costs least in it, and AP is the same within a point."""
    gain = facts.machine.gain
    because = "this processor does not compute in bfloat16"
    if gain is not None:
        because = f"a step in bfloat16 takes {1 / gain:.2f} of the time of one in float32 here"
    yield Choice("train.precision", facts.machine.precision, because)


_OBJECT_PIXELS = 24
"""Side in pixels that three quarters of all objects should have at least: six cells of the finest level. 32 came to 3
points of AP less on photographs of animals, at 480 pixels for 416 and as many steps."""

_SHORTEST, _FLOOR = 416, 256
"""Sides in pixels with enough time, and with hardly any. On a slow machine, in equal time, 256 in place of 384 came to
14 points of AP in the mean of four datasets (ResNet-18), and 192 in place of 256 to -2 of two."""

_MOST_ENLARGED = 2.0
_FEWEST_VISITS, _THEIR_SECONDS = 1000, 540
"""Images that heads from random weights need to see in so short a time; below it a larger picture costs more AP than it
gains. In equal time 624 pixels and 634 images came to 2 points less than 416 and 1,192, on photographs of tiny objects;
384 and 1,188 to half a point less than 416 and 1,060 on chess pieces. More time is spent on both alike: four times the
time sees twice the images."""


def image_size(facts: Facts) -> Iterator[Choice]:
    """Scale images so that most objects have ``_OBJECT_PIXELS``, if the time allows enough images of that size."""
    data = facts.data
    height, width = data.image_size
    wanted = _OBJECT_PIXELS / data.relative_sides[1]
    native = min(height, width)
    side, because = wanted, f"three quarters of the objects then have {_OBJECT_PIXELS} pixels or more"
    if side < _SHORTEST:
        side = _SHORTEST
        because = f"objects would be large enough at {wanted:.0f}; below {side} their borders and details get lost"
    if side > _MOST_ENLARGED * native:
        side = _MOST_ENLARGED * native
        pixels = data.relative_sides[1] * side
        because = f"{_MOST_ENLARGED:g} times the stored size, more adds nothing to see; a quarter of the objects "
        because += f"then have less than {pixels:.0f} pixels"
    if facts.seconds is not None and (affordable := _affordable_side(facts)) < side:
        side = max(affordable, min(_FLOOR, side))
        because = (
            f"the time allows {facts.seconds / facts.image_seconds(side):.0f} images of this size, and the heads "
            f"need some {_visits_needed(facts.seconds):.0f}"
        )
        because += f"; small objects would want {wanted:.0f}" if wanted > side else ""
    side = _whole(side)
    sizes: int | list[int] = side
    if _are_seen_often(facts, side):
        sizes = [*(_whole(factor * side) for factor in _FACTORS), side]
        because += f"; other sizes in training alone, as there is time to see an image {facts.passes(side):.0f} times"
    yield Choice("model.min_size", sizes, because)
    settled: int | list[int] = facts.settled["model.min_size"]  # these, or what is stated
    largest = settled if isinstance(settled, int) else max(settled)
    aspect = max(height, width) / native
    longest = _whole(largest * max(aspect, 1.0) * 1.25)
    yield Choice("model.max_size", longest, f"images are typically {aspect:.2f} times as long as short")


_MANY_PASSES = 16
_FACTORS = (0.75, 0.875, 1.125, 1.25)


def _are_seen_often(facts: Facts, side: float) -> bool:
    """Return whether images are seen so often that they would be learnt by heart, unless they differ each time.

    After 24 to 50 passes over 74 to 192 images, sizes and brightness that vary came to 3 points of AP in the mean of
    four datasets.
    """
    return facts.seconds is not None and facts.passes(side) > _MANY_PASSES


def _affordable_side(facts: Facts) -> int:
    """Return the shorter side at which the time allows as many images as are needed."""
    assert facts.seconds is not None
    seconds, sides = facts.seconds / _visits_needed(facts.seconds), range(128, 2049, 16)
    return max((side for side in sides if facts.image_seconds(side) <= seconds), default=sides[0])


def _visits_needed(seconds: float) -> float:
    return _FEWEST_VISITS * math.sqrt(seconds / _THEIR_SECONDS)


def _whole(side: float) -> int:
    return max(32, 16 * round(side / 16))


_ANCHOR_SIDES = (8, 11, 16, 23, 32, 45)
_RATIOS: tuple[tuple[float, ...], ...] = (
    (0.5, 1.0, 2.0),
    (0.25, 0.5, 1.0, 2.0, 4.0),
    (0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83),
    (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0),
)
_NUM_LEVELS = 5
_REACHED, _WORTH = 0.99, 0.03  # shares of the objects
_MAX_BOXES = 20_000  # looked at, evenly spread


def anchors(facts: Facts) -> Iterator[Choice]:
    """Take the fewest shapes of anchors that reach ``_REACHED`` of the objects, and of those the nearest in size.

    An RPN learns from anchors that overlap an object; one that none reaches is learned from its best one alone. Where
    nothing reaches so many, because each level has one size, twice that of the level before, the fewest shapes are
    taken that come within ``_WORTH`` of the most: further shapes are more to tell apart for few objects (five in place
    of three cost 2.7 points of AP on photographs where they reached 1.6 % more objects). Where objects are longer than
    the usual shapes, as many that are spread over theirs may be taken instead.
    """
    if facts.settled["model.layout"] != "fpn" or len(facts.settled["model.anchor_sizes"]) != _NUM_LEVELS:
        return  # of other features the usual anchors are taken
    every = max(1, len(facts.boxes) // _MAX_BOXES)
    boxes, sizes = facts.boxes[::every], facts.sizes[::every]
    if (tiles := facts.settled["eval.tiles"]) is not None:
        boxes, sizes = in_tiles(boxes, sizes, tiles[0])
    side, max_size = facts.side, facts.settled["model.max_size"]

    shapes = list(_RATIOS)
    low, _, _, _, high = facts.data.aspects
    if "model.aspect_ratios" in facts.stated:
        shapes = [tuple(facts.settled["model.aspect_ratios"])]
    elif low < _RATIOS[-1][0] or high > _RATIOS[-1][-1]:  # lines of text, ships, poles
        shapes = [some for usual in _RATIOS for some in (usual, _spread(low, high, len(usual)))]

    pyramids = {smallest: [smallest << level for level in range(_NUM_LEVELS)] for smallest in _ANCHOR_SIDES}
    if "model.anchor_sizes" in facts.stated:
        stated = list(facts.settled["model.anchor_sizes"])
        pyramids = {stated[0]: stated}

    def layout(smallest: int, ratios: tuple[float, ...]) -> AnchorLayout:
        return anchor_layout(pyramids[smallest], ratios, min_sizes=(side,), max_size=max_size)

    found = []
    for ratios in shapes:
        ious = {smallest: best_iou(boxes, sizes, layout(smallest, ratios), side) for smallest in pyramids}
        reached = {smallest: float((iou >= IOU_REACHED).mean()) for smallest, iou in ious.items()}
        enough = [smallest for smallest in ious if reached[smallest] >= _REACHED]
        best = max(enough or ious, key=lambda smallest: float(ious[smallest].mean()) if enough else reached[smallest])
        found.append((reached[best], best, ratios))
        if enough:
            break
    most = max(share for share, _, _ in found)
    share, smallest, ratios = next(one for one in found if one[0] >= min(_REACHED, most - _WORTH))
    because = f"{share:.1%} of the objects are reached at IoU {IOU_REACHED:g}"
    yield Choice("model.anchor_sizes", pyramids[smallest], because)
    yield Choice("model.aspect_ratios", list(ratios), "the fewest shapes that reach as many")


def _spread(low: float, high: float, number: int) -> tuple[float, ...]:
    """Return numbers of two digits at equal factors from ``low`` to ``high``, each once."""
    return tuple(sorted({float(f"{value:.2g}") for value in np.geomspace(low, high, number)}))


REGIONS = "model.box_batch_size_per_image"
_FEWEST_REGIONS, _MOST_REGIONS = 128, 512


def num_regions(data: Fingerprint) -> int:
    """Return how many regions of an image the box head trains on: a quarter of them are positives."""
    needed = 4 * data.objects_per_image[4]
    return int(min(max(_FEWEST_REGIONS, 2 ** math.ceil(math.log2(max(needed, 1)))), _MOST_REGIONS))


def regions(facts: Facts) -> Iterator[Choice]:
    """Train the box head on as many regions of an image as its objects need."""
    high = facts.data.objects_per_image[4]
    because = f"images have up to {high:.0f} objects, and a region costs time in the box head"
    yield Choice(REGIONS, num_regions(facts.data), because)


def dense_images(facts: Facts) -> Iterator[Choice]:
    """Keep more detections and proposals of an image than the usual numbers where it holds more objects."""
    most = facts.data.most_objects
    if most <= 100:
        return
    number = 100 * math.ceil(1.25 * most / 100)
    yield Choice("eval.max_detections", number, f"an image holds up to {most} objects, and 100 detections are usual")
    for key, factor in (("rpn_post_nms_top_n_train", 2), ("rpn_post_nms_top_n_test", 2), ("rpn_pre_nms_top_n_test", 3)):
        if factor * number > facts.settled[f"model.{key}"]:
            yield Choice(f"model.{key}", factor * number, "so many objects need as many proposals and more")


_TINY_PIXELS = 12
"""Side in pixels, as the network sees it, below which an object is hardly found."""


def tiles(facts: Facts) -> Iterator[Choice]:
    """Cut pictures into tiles where objects would be too small in whole ones, though the pictures are large."""
    data = facts.data
    side = facts.side
    scale = side / min(data.image_size)
    if scale >= 0.5 or data.object_sides[2] * scale >= _TINY_PIXELS:
        return
    tile = _whole(min(max(side, 20 * data.object_sides[2]), min(data.image_size)))
    middle = data.object_sides[2]
    because = f"half of the objects have {middle:.0f} pixels or less, and {middle * scale:.0f} in whole images"
    yield Choice("eval.tiles", [tile, 0.2], because)


_MOST_PASSES, _FEWEST_OF_ALL = 50, 4000


def length(facts: Facts) -> Iterator[Choice]:
    """End before the time is up where more passes over the images would only be learnt by heart.

    From a third of the passes to 24 to 50 over 74 to 192 images, test AP changed by +6.4, +2.8, +4.3 and -1.3
    (aquarium, chess, tables, cells). A few images are seen more often, as heads need their steps.
    """
    if facts.seconds is None or facts.settled["train.steps"] is not None:
        return
    passes, most = facts.passes(facts.side), round(max(_MOST_PASSES, _FEWEST_OF_ALL / facts.data.num_images))
    if passes > most:
        because = f"there is time to see each image {passes:.0f} times; it would be learnt by heart"
        yield Choice("train.epochs", float(most), because)


_SMALL_BATCH, _FOR_STATISTICS = 2, 8
_ENOUGH_STEPS = 1500


def batch(facts: Facts) -> Iterator[Choice]:
    """Take small batches where there is time for few steps: only norms of a batch's own statistics need larger ones."""
    uses_statistics = facts.settled["model.norm"] == "batch"
    smallest = (_FOR_STATISTICS if uses_statistics else _SMALL_BATCH) * facts.num_processes
    norms = "norms take their statistics from a batch" if uses_statistics else "norms need no larger batch"
    if facts.num_steps is not None:
        yield Choice("train.batch_size", smallest, f"the number of steps is given; {norms}")
        return
    visits, room = facts.num_visits, facts.num_processes * facts.machine.megapixels / facts.megapixels
    largest = min(visits / _ENOUGH_STEPS, room)
    size = max(number for number in (smallest << n for n in range(4)) if number <= max(largest, smallest))
    yield Choice("train.batch_size", size, f"leaves some {visits / size:.0f} steps; {norms}")


_RATE, _LOWEST_RATE = 4e-4, 1e-4
_FEW_STEPS = 500


def optimizer(facts: Facts) -> Iterator[Choice]:
    """Take AdamW with a cosine: few steps suffice it, and the rate has fallen to 0 when the time is up.

    Heads begin at random and have few steps to learn in, so the rate is high. The body is trained at the same one: a
    quarter of it cost 2 points of AP on five datasets in ten minutes.
    """
    steps = facts.estimated_steps
    yield Choice("optim.name", "adamw", f"needs fewer steps than SGD, and there are some {steps}")
    rate = min(max(_RATE * math.sqrt(_FEW_STEPS / steps), _LOWEST_RATE), _RATE)
    yield Choice("optim.lr", float(f"{rate:.1e}"), f"the fewer steps, the larger: {_RATE:g} up to {_FEW_STEPS}")
    yield Choice("optim.lr_batch_size", None, "the rate is that of this batch")
    yield Choice("optim.schedule", "cosine", "ends at 0 when the time is up")
    warmup = max(10, min(500, round(0.08 * steps)))
    yield Choice("optim.warmup_steps", warmup, "a twelfth of the steps")
    yield Choice("optim.clip_grad_norm", 10.0, "a rare large gradient cannot undo the steps before it")


def augmentation(facts: Facts) -> Iterator[Choice]:
    """Flip images left to right; tiles are cut before. Vary the brightness of what is seen often.

    Turning images too, of cells that lie in all directions, cost 0.4 to 5 points of AP, of 24 training images as of
    192: so short a run sees too few images to need more of them.
    """
    steps: list[dict[str, Any]] = [{"HorizontalFlip": {"p": 0.5}}]
    because = "a mirrored object is one of its class; turning images too has cost AP in short runs"
    # Whether images vary is decided once, with their sizes; where those are stated, here.
    is_varied = not isinstance(facts.settled["model.min_size"], int)
    if "model.min_size" in facts.stated:
        is_varied = _are_seen_often(facts, facts.side)
    if is_varied:
        steps.append({"RandomBrightnessContrast": {"p": 0.5}})
        because += f"; brightness and contrast vary, as images are seen {facts.passes(facts.side):.0f} times"
    if (tiles := facts.settled["eval.tiles"]) is not None:
        steps.insert(0, {"RandomTile": {"side": tiles[0]}})
        because += "; trained on tiles as evaluated"
    yield Choice("augment", steps, because)


_VOTING = 0.75
_MOST_SOFT = 500


def suppression(facts: Facts) -> Iterator[Choice]:
    """Lower the scores of overlapping boxes instead of dropping them, and take the mean of the boxes around each.

    Of detectors after ten minutes, on five datasets, this came to 2.0 points of mean AP on val and 1.3 on test; voting
    at an IoU of 0.5, where loose boxes of large objects vote too, to -0.5 and 0.2.
    """
    number = facts.settled["eval.max_detections"]
    if number <= _MOST_SOFT:
        because = (
            "what overlaps may be an object of its own, or the better box: its score is lowered, it is not dropped"
        )
        yield Choice("eval.tricks.nms", "soft-gaussian", because)
    else:
        yield Choice("eval.tricks.nms", "hard", f"soft suppression goes through {number} detections one by one")
    because = "the mean of the boxes close to a detection is nearer to the object than the best of them, at no cost"
    yield Choice("eval.tricks.voting", _VOTING, because)


_INTERIM = 0.05  # share of a run's time for all evaluations before the last
_FEWEST_INTERIM, _MOST_INTERIM = 3, 9
_SAVED_S = 300.0


def evaluation(facts: Facts) -> Iterator[Choice]:
    """Evaluate at the end, where the cosine has its best model, and before it where that is cheap.

    Evaluations are to show how it goes; they look at a part of the validation images where all would take too long.
    """
    number, every = facts.num_evaluated, None
    because = "the rate ends at 0: the last model is the best, and evaluations take time"
    if facts.settled["train.eval_images"] is None and number < facts.num_val_images:
        part = f"all {facts.num_val_images} would take more than {_LAST:.0%} of the time; resdet eval looks at all"
        yield Choice("train.eval_images", number, part)
    if facts.seconds is not None:
        interim = int(_INTERIM * facts.seconds / facts.evaluation_seconds)
        if interim >= _FEWEST_INTERIM:
            every = math.ceil(facts.estimated_steps / (min(interim, _MOST_INTERIM) + 1))
            because = f"to show how it goes, in at most {_INTERIM:.0%} of the time"
        if every is None and facts.seconds > 2 * _SAVED_S:
            steps = max(1, round(_SAVED_S / facts.seconds * facts.estimated_steps))
            yield Choice("train.save_every", steps, f"no more than {_SAVED_S / 60:.0f} minutes are lost to a power cut")
    yield Choice("train.eval_every", every, because)


def workers(facts: Facts) -> Iterator[Choice]:
    """Read images in as many processes as the computation does not need."""
    if facts.machine.device == "cpu":
        number = min(max(1, facts.num_workers // 8), 4)
        yield Choice("loader.num_workers", number, f"the {facts.num_workers} processors compute")
    else:
        yield Choice("loader.num_workers", max(1, min(facts.num_workers - 1, 8)), "the GPU must not wait for images")


Rule = Callable[[Facts], Iterator[Choice]]

RULES: tuple[Rule, ...] = (
    precision,
    image_size,
    tiles,
    anchors,
    regions,
    dense_images,
    length,
    batch,
    optimizer,
    augmentation,
    suppression,
    evaluation,
    workers,
)
"""In this order: each may look at what those before it have chosen."""
