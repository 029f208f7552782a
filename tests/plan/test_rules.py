"""Each rule of a plan chooses by facts, and another fact makes it choose otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from resdet.config import load_config
from resdet.config_reading import config_to_plain, flattened
from resdet.plan import rules
from resdet.plan.fingerprint import Fingerprint
from resdet.plan.machine import Machine
from resdet.plan.rules import Facts

MACHINE = Machine("cpu", "bf16", gain=2.0, per_image=0.05, per_megapixel=2.0, megapixels=20.0)

DATA = Fingerprint(
    num_images=100,
    num_boxes=1000,
    image_size=(480, 640),
    largest_side=640,
    object_sides=np.array([20.0, 30.0, 40.0, 60.0, 90.0]),
    relative_sides=np.array([20.0, 30.0, 40.0, 60.0, 90.0]) / 480,
    aspects=np.array([0.5, 0.8, 1.0, 1.3, 2.0]),
    objects_per_image=np.array([1.0, 4.0, 8.0, 12.0, 20.0]),
    most_objects=30,
    images_of_class={"cat": 60, "dog": 50},
    crowded=0.0,
    gray=False,
    alike=0.0,
)


MANY = 1_000_000  # images, each seen a few times at most


def facts(seconds: float | None = 540.0, *, machine: Machine = MACHINE, **settled: Any) -> Facts:
    """Return facts about which a test changes what it is about."""
    defaults = flattened(config_to_plain(load_config("finetune", {"data": {"train": {"format": "shapes"}}})))
    centres = np.random.default_rng(0).uniform(100, 380, (400, 2))
    sides = np.exp(np.random.default_rng(1).normal(np.log(40), 0.4, (400, 1)))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    return Facts(
        data=DATA,
        machine=machine,
        boxes=boxes,
        sizes=np.full((400, 2), [480.0, 640.0]),
        run_seconds=seconds,
        seconds=seconds,
        num_val_images=40,
        num_steps=None if seconds is not None else 300,
        num_workers=2,
        num_processes=1,
        settled=defaults | settled,
    )


def chosen(rule: rules.Rule, given: Facts) -> dict[str, Any]:
    """Return the values that a rule chooses, each with a reason; as in a plan, what is not stated is settled."""
    given = replace(given, settled=(settled := dict(given.settled)))
    values = {}
    for choice in rule(given):
        assert choice.because
        assert choice.key in settled
        values[choice.key] = choice.value
        if choice.key not in given.stated:
            settled[choice.key] = choice.value
    return values


def with_data(given: Facts, **changes: Any) -> Facts:
    """Return facts with others of the data."""
    return replace(given, data=replace(given.data, **changes))


def test_images_that_are_seen_often_vary() -> None:
    few = with_data(facts(seconds=3_600), num_images=100)
    sizes = chosen(rules.image_size, few)["model.min_size"]
    assert sizes[-1] == facts(**{"model.min_size": sizes}).side
    assert min(sizes) < sizes[-1] < max(sizes)
    settled = {**few.settled, "model.min_size": sizes}
    assert "RandomBrightnessContrast" in str(chosen(rules.augmentation, replace(few, settled=settled)))
    # One decision: images of one size are not varied otherwise, unless that size is stated.
    assert "RandomBrightnessContrast" not in str(chosen(rules.augmentation, few))
    assert "RandomBrightnessContrast" in str(chosen(rules.augmentation, replace(few, stated={"model.min_size"})))
    many = with_data(few, num_images=10_000)
    assert isinstance(chosen(rules.image_size, many)["model.min_size"], int)
    assert "RandomBrightnessContrast" not in str(chosen(rules.augmentation, many))
    assert chosen(rules.image_size, few)["model.max_size"] > chosen(rules.image_size, many)["model.max_size"]


def test_a_run_ends_where_more_passes_would_be_learnt_by_heart() -> None:
    few = with_data(facts(seconds=36_000), num_images=200)
    epochs = chosen(rules.length, few)["train.epochs"]
    assert epochs == 50
    assert few.num_visits > 50 * 200
    capped = replace(few, settled={**few.settled, "train.epochs": epochs})
    assert capped.num_visits == 50 * 200
    assert capped.estimated_steps == round(50 * 200 / capped.settled["train.batch_size"])
    assert chosen(rules.length, with_data(facts(seconds=36_000), num_images=10))["train.epochs"] == 400  # heads need it
    assert chosen(rules.length, with_data(facts(seconds=36_000), num_images=100_000)) == {}
    assert chosen(rules.length, replace(few, seconds=None, num_steps=10)) == {}
    stated = replace(few, settled={**few.settled, "train.steps": 70})
    assert chosen(rules.length, stated) == {}
    assert stated.estimated_steps == 70


def test_precision_is_the_faster_one() -> None:
    assert chosen(rules.precision, facts()) == {"train.precision": "bf16"}
    slow = replace(MACHINE, precision="fp32", gain=0.3)
    assert chosen(rules.precision, facts(machine=slow)) == {"train.precision": "fp32"}
    (choice,) = rules.precision(facts(machine=slow))
    assert "takes 3.33 of the time" in choice.because
    (choice,) = rules.precision(facts(machine=replace(slow, gain=None)))
    assert choice.value == "fp32"
    assert "does not compute in bfloat16" in choice.because


def test_small_objects_get_larger_images_as_far_as_the_time_allows() -> None:
    ample = with_data(facts(seconds=36_000), num_images=MANY, relative_sides=DATA.relative_sides / 1.5)
    side = chosen(rules.image_size, ample)["model.min_size"]
    assert abs(side - 24 / (20 / 480)) <= 8  # three quarters of the objects have 24 pixels
    small = with_data(facts(seconds=36_000), num_images=MANY, relative_sides=DATA.relative_sides / 2)
    tight = replace(small, seconds=540.0)
    side = chosen(rules.image_size, tight)["model.min_size"]
    assert chosen(rules.image_size, small)["model.min_size"] > side > 256
    assert 1000 <= tight.seconds / tight.image_seconds(side) < 1250  # heads see their images before these grow
    assert chosen(rules.image_size, facts(seconds=30))["model.min_size"] == 256
    reason = next(iter(rules.image_size(facts(seconds=30)))).because
    assert "small objects would want 384" in reason
    reason = next(iter(rules.image_size(with_data(facts(seconds=30), relative_sides=DATA.relative_sides * 10)))).because
    assert "the time allows" in reason
    assert "small objects" not in reason  # the few pixels that they need are not what is missing
    large = with_data(facts(seconds=36_000), num_images=MANY, relative_sides=DATA.relative_sides * 10)
    assert chosen(rules.image_size, large)["model.min_size"] == 416
    thumbnails = with_data(large, image_size=(104, 139))
    assert chosen(rules.image_size, thumbnails)["model.min_size"] == 208  # twice the stored size
    reason = next(iter(rules.image_size(thumbnails))).because
    assert "2 times the stored size" in reason
    assert "416" not in reason
    assert chosen(rules.image_size, replace(thumbnails, seconds=7.0))["model.min_size"] == 208  # not 256
    tiny = with_data(facts(seconds=1e9), num_images=10**12, relative_sides=DATA.relative_sides / 10)
    assert chosen(rules.image_size, tiny)["model.min_size"] == 960  # twice the stored size


def test_a_stated_size_has_room() -> None:
    """The longest side follows from the shorter one that is stated, not from that which would be chosen."""
    given = with_data(facts(**{"model.min_size": 800}), num_images=MANY)
    stated = replace(given, stated={"model.min_size"})
    assert chosen(rules.image_size, stated)["model.max_size"] >= 800 * 640 / 480
    assert chosen(rules.image_size, given)["model.max_size"] < 800


def test_stated_anchors_are_built_on() -> None:
    """Shapes are chosen for sizes that are stated, and sizes for shapes."""
    sizes = [64, 128, 256, 512, 1024]  # twice those that would be chosen
    given = facts(**{"model.min_size": 480, "model.max_size": 800, "model.anchor_sizes": sizes})
    free = chosen(rules.anchors, given)
    bound = chosen(rules.anchors, replace(given, stated={"model.anchor_sizes"}))
    assert free["model.anchor_sizes"] != sizes
    assert bound["model.anchor_sizes"] == sizes
    settled = {**given.settled, "model.aspect_ratios": [1.0]}
    narrow = chosen(rules.anchors, replace(given, settled=settled, stated={"model.aspect_ratios"}))
    assert narrow["model.aspect_ratios"] == [1.0]
    assert narrow["model.anchor_sizes"] != sizes


def test_long_pictures_keep_their_shape() -> None:
    long = with_data(facts(36_000), num_images=MANY, image_size=(300, 1200))
    sizes = chosen(rules.image_size, long)
    assert sizes["model.max_size"] >= 4 * sizes["model.min_size"]


def test_anchors_reach_the_objects_and_follow_their_size_and_shape() -> None:
    given = facts(**{"model.min_size": 480, "model.max_size": 800})
    usual = chosen(rules.anchors, given)
    assert usual["model.aspect_ratios"] == [0.5, 1.0, 2.0]
    assert len(usual["model.anchor_sizes"]) == 5
    small = replace(given, boxes=np.concatenate([given.boxes[:, :2], given.boxes[:, :2] + 12], axis=1))
    assert chosen(rules.anchors, small)["model.anchor_sizes"][0] < usual["model.anchor_sizes"][0]
    flat = np.concatenate([given.boxes[:, :2], given.boxes[:, :2] + [224, 28]], axis=1)
    assert min(chosen(rules.anchors, replace(given, boxes=flat))["model.aspect_ratios"]) < 0.5


@pytest.mark.parametrize(("width", "height"), [(400, 24), (14, 200)])
def test_objects_longer_than_the_usual_shapes_get_shapes_of_their_own(width: int, height: int) -> None:
    given = facts(**{"model.min_size": 480, "model.max_size": 800})
    rng = np.random.default_rng(0)
    sides = np.array([width, height]) * rng.uniform(0.7, 1.4, (400, 2))
    corners = rng.uniform(0, [640, 480] - sides)
    aspects = np.percentile(sides[:, 1] / sides[:, 0], [5, 25, 50, 75, 95])
    long = replace(given, boxes=np.concatenate([corners, corners + sides], axis=1))
    before, after = (list(rules.anchors(one)) for one in (long, with_data(long, aspects=aspects)))
    share_before, share_after = (float(choices[0].because.partition("%")[0]) for choices in (before, after))
    assert share_after > 90 > share_before
    assert len(after[1].value) <= 5
    assert all(aspects[0] * 0.9 <= ratio <= aspects[4] * 1.1 for ratio in after[1].value)


def test_long_objects_of_one_shape_need_one_shape() -> None:
    boxes = np.tile([10.0, 10.0, 410.0, 30.0], (400, 1))
    given = replace(facts(**{"model.min_size": 480, "model.max_size": 800}), boxes=boxes)
    choices = chosen(rules.anchors, with_data(given, aspects=np.full(5, 0.05)))
    assert choices["model.aspect_ratios"] == [0.05]


def test_anchors_of_other_features_are_left_as_they_are() -> None:
    assert chosen(rules.anchors, facts(**{"model.layout": "c4"})) == {}
    assert chosen(rules.anchors, facts(**{"model.anchor_sizes": [8, 16, 32, 64]})) == {}


def test_what_a_rule_says_of_its_anchors_is_what_check_counts() -> None:
    given = facts(**{"model.min_size": 480, "model.max_size": 800})
    said = next(iter(rules.anchors(given))).because
    assert said.startswith(("99.", "100.0%"))


@pytest.mark.parametrize(("objects", "number"), [(3, 128), (20, 128), (60, 256), (500, 512)])
def test_more_objects_need_more_regions(objects: int, number: int) -> None:
    given = with_data(facts(), objects_per_image=np.array([1.0, 1, 1, 1, objects]))
    assert chosen(rules.regions, given) == {"model.box_batch_size_per_image": number}


def test_dense_images_keep_more_detections() -> None:
    assert chosen(rules.dense_images, facts()) == {}
    dense = chosen(rules.dense_images, with_data(facts(), most_objects=2000))
    assert dense["eval.max_detections"] >= 2000
    assert dense["model.rpn_post_nms_top_n_test"] >= dense["eval.max_detections"]


def test_tiny_objects_in_large_pictures_are_seen_in_tiles() -> None:
    assert chosen(rules.tiles, facts(**{"model.min_size": 480})) == {}
    large = with_data(
        facts(**{"model.min_size": 640}), image_size=(4000, 6000), object_sides=np.array([20.0, 25, 30, 40, 60])
    )
    side, overlap = chosen(rules.tiles, large)["eval.tiles"]
    assert side < 4000
    tiled = replace(large, settled={**large.settled, "eval.tiles": [side, overlap], "model.max_size": 800})
    assert chosen(rules.augmentation, tiled)["augment"][0] == {"RandomTile": {"side": side}}
    # In tiles objects keep their size, so anchors are larger than for whole images scaled down.
    boxes = np.concatenate([large.boxes[:, :2], large.boxes[:, :2] + 60], axis=1)
    tiled = replace(tiled, boxes=boxes, sizes=np.full((400, 2), [4000.0, 6000.0]))
    whole = replace(tiled, settled={**tiled.settled, "eval.tiles": None})
    smallest = [chosen(rules.anchors, given)["model.anchor_sizes"][0] for given in (tiled, whole)]
    assert smallest[0] > smallest[1]


def test_batches_grow_with_the_time_and_fit_into_memory() -> None:
    short = chosen(rules.batch, facts(500))["train.batch_size"]
    long = chosen(rules.batch, facts(100_000))["train.batch_size"]
    assert short == 2 < long
    assert chosen(rules.batch, facts(100_000, machine=replace(MACHINE, megapixels=1.5)))["train.batch_size"] == 2
    assert chosen(rules.batch, replace(facts(500), num_processes=3))["train.batch_size"] == 6
    assert chosen(rules.batch, facts(500, **{"model.norm": "batch"}))["train.batch_size"] == 8


def test_the_rate_falls_and_warmup_grows_with_the_number_of_steps() -> None:
    settled = {"model.min_size": 416, "train.batch_size": 2}
    few, many = (chosen(rules.optimizer, facts(seconds, **settled)) for seconds in (500, 50_000))
    assert few["optim.lr"] > many["optim.lr"] > 0
    assert few["optim.warmup_steps"] < many["optim.warmup_steps"]
    assert few["optim.warmup_steps"] < facts(500, **settled).estimated_steps / 5
    assert (few["optim.name"], few["optim.schedule"]) == ("adamw", "cosine")
    assert "optim.body_lr_factor" not in few  # the body is trained at the heads' rate


def test_images_are_mirrored_and_no_more() -> None:
    assert chosen(rules.augmentation, facts())["augment"] == [{"HorizontalFlip": {"p": 0.5}}]


def test_suppression_is_soft_but_for_thousands_of_detections() -> None:
    usual = chosen(rules.suppression, facts())
    assert usual == {"eval.tricks.nms": "soft-gaussian", "eval.tricks.voting": 0.75}
    assert chosen(rules.suppression, facts(**{"eval.max_detections": 2500}))["eval.tricks.nms"] == "hard"


def test_evaluations_keep_to_their_share_of_the_time() -> None:
    settled = {"model.min_size": 416, "train.batch_size": 2}
    assert chosen(rules.evaluation, facts(**settled)) == {"train.eval_every": None}
    many = replace(facts(**settled), num_val_images=5000)
    number = chosen(rules.evaluation, many)["train.eval_images"]
    assert 0.15 < number * many.detection_seconds / 540 <= 0.2
    # What is stated is left alone, and tiles make images dearer.
    assert replace(many, settled={**many.settled, "train.eval_images": 3000}).num_evaluated == 3000
    tiled = replace(many, settled={**many.settled, "eval.tiles": [200, 0.2]})
    assert tiled.num_evaluated < number / 4
    assert replace(many, run_seconds=None).num_evaluated == 5000


def test_long_runs_show_how_they_go_and_save() -> None:
    settled = {"model.min_size": 416, "train.batch_size": 2}
    long = facts(3600, **settled)
    every = chosen(rules.evaluation, long)["train.eval_every"]
    assert long.estimated_steps / 11 < every < long.estimated_steps / 3
    dear = chosen(rules.evaluation, replace(long, num_val_images=1000))
    assert dear["train.eval_every"] is None
    seconds_of_a_step = 3600 / long.estimated_steps
    assert 200 < dear["train.save_every"] * seconds_of_a_step < 400


def test_a_fixed_number_of_steps_leaves_the_clock_out() -> None:
    given = facts(None, **{"model.min_size": 416, "train.batch_size": 2})
    assert given.estimated_steps == 300
    assert chosen(rules.batch, given) == {"train.batch_size": 2}
    assert "time" not in next(iter(rules.image_size(given))).because
