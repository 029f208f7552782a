import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace

import numpy as np
import pytest

from resdet.data.annotations import AnnotationTable
from resdet.data.coco import read_coco
from resdet.errors import DataError
from resdet.evaluation.coco import coco_metrics, read_coco_detections
from resdet.evaluation.errors import ERROR_KINDS, ErrorAnalysis, find_errors
from resdet.types import Category, Detections

# Sums of the same hits and counts in another order.
ROUNDING = 1e-9
MANY = 3000  # more detections than any case has in one image and class


def scene(num_images: int = 3) -> tuple[AnnotationTable, Detections]:
    """Return boxes of 20 x 20 far from one another, of alternating classes, and a perfect detection of each."""
    x, y = np.meshgrid(np.arange(4) * 100.0, np.arange(3) * 100.0)
    corners = np.tile(np.stack([x.ravel(), y.ravel()], axis=1), (num_images, 1))
    num = len(corners)
    table = AnnotationTable(
        name="scene",
        categories=(Category(1, 5, "cat"), Category(2, 2, "dog"), Category(3, 9, "owl")),
        image_ids=np.arange(num_images)[::-1] + 1,
        file_names=np.array([f"{i}.jpg" for i in range(num_images)]),
        sizes=np.full((num_images, 2), 400, dtype=np.int32),
        offsets=np.arange(num_images + 1) * 12,
        boxes_xywh=np.concatenate([corners, np.full((num, 2), 20.0)], axis=1),
        labels=np.arange(num) % 3 + 1,
        area=np.full(num, 400.0),
        crowd=np.zeros(num, dtype=np.bool_),
        difficult=np.zeros(num, dtype=np.bool_),
        annotation_ids=np.arange(num),
    )
    detections = Detections(
        table.image_of_box(),
        np.concatenate([corners, corners + 20], axis=1),
        table.labels.copy(),
        np.linspace(0.9, 0.5, num),
    )
    return table, detections


def select(detections: Detections, rows: np.ndarray) -> Detections:
    return Detections(*(getattr(detections, field.name)[rows] for field in fields(Detections)))


def added(detections: Detections, other: Detections) -> Detections:
    columns = (field.name for field in fields(Detections))
    return Detections(*(np.concatenate([getattr(detections, name), getattr(other, name)]) for name in columns))


def counts(analysis: ErrorAnalysis) -> dict[str, int]:
    return {cost.kind: cost.count for cost in analysis.kinds if cost.count}


def costs(analysis: ErrorAnalysis) -> dict[str, float]:
    return {cost.kind: cost.dAP for cost in analysis.kinds}


PLANTED = np.array([1, 7, 14, 23, 30])


def plant(kind: str, detections: Detections, rows: np.ndarray) -> Detections:
    boxes, labels = detections.boxes.copy(), detections.labels.copy()
    if kind == "localisation":
        boxes[rows, ::2] += 10  # IoU 1/3
    elif kind == "classification":
        labels[rows] = labels[rows] % 3 + 1
    elif kind == "missed":
        return select(detections, np.setdiff1d(np.arange(len(detections)), rows))
    else:
        extra = select(detections, rows)
        extra.scores[:] -= 0.3
        if kind == "background":
            extra.boxes[:] += 50
        elif kind == "both":
            extra.boxes[:, ::2] += 10
            extra.labels[:] = extra.labels % 3 + 1
        return added(detections, extra)
    return replace(detections, boxes=boxes, labels=labels)


def test_perfect_detections_have_no_errors():
    analysis = find_errors(*scene())
    assert analysis.AP == 1
    assert len(analysis.errors) == 0
    assert counts(analysis) == {}
    assert set(costs(analysis).values()) == {0}
    assert not analysis.image_loss.any()
    assert not analysis.worst_images(3).size


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_planted_errors_are_found_and_nothing_else(kind):
    table, detections = scene()
    planted = plant(kind, detections, PLANTED)
    analysis = find_errors(table, planted)
    errors = analysis.errors
    assert counts(analysis) == {kind: len(PLANTED)}
    assert [ERROR_KINDS[k] for k in errors.kind] == [kind] * len(PLANTED)
    assert errors.image_index.tolist() == (PLANTED // 12).tolist()
    fixable = kind in ("localisation", "classification")
    assert errors.becomes_hit.tolist() == [fixable] * len(PLANTED)
    assert analysis.false_positives.count == (0 if kind == "missed" else len(PLANTED))
    assert analysis.false_negatives.count == (len(PLANTED) if fixable or kind == "missed" else 0)
    assert errors.box.tolist() == ([-1] * len(PLANTED) if kind == "background" else PLANTED.tolist())
    if kind == "missed":
        assert errors.label.tolist() == table.labels[PLANTED].tolist()
        assert set(errors.detection.tolist()) == {-1}
        assert set(errors.score.tolist()) == {0}
    else:
        rows = errors.detection
        assert rows.tolist() == (PLANTED if fixable else 36 + np.arange(len(PLANTED))).tolist()
        assert errors.label.tolist() == planted.labels[rows].tolist()
        assert errors.score.tolist() == planted.scores[rows].tolist()
        iou = {"classification": 1, "duplicate": 1, "background": 0}.get(kind, 1 / 3)
        np.testing.assert_allclose(errors.iou, iou)
    # Fixing this kind restores the whole AP, and fixing any other kind changes nothing.
    assert costs(analysis)[kind] == pytest.approx(1 - analysis.AP)
    assert sum(costs(analysis).values()) == pytest.approx(1 - analysis.AP)


def test_planted_errors_of_all_kinds_do_not_hide_each_other():
    table, detections = scene(num_images=6)
    expected = {}
    for number, kind in enumerate(ERROR_KINDS):
        expected[kind] = number + 1
        detections = plant(kind, detections, 12 * number + np.arange(number + 1))
    analysis = find_errors(table, detections)
    assert counts(analysis) == expected
    assert analysis.errors.image_index.tolist() == analysis.errors.kind.tolist()


def test_a_dog_found_as_a_cat_by_hand():
    # Two cats, two dogs. By falling score: cat hit, a "cat" on the first dog, cat hit, dog hit. The cats' curve has
    # precision 1 up to recall 1/2 (51 recalls) and 2/3 up to 1 (50); the dogs' has precision 1 up to 1/2.
    table, detections = scene(1)
    keep = np.array([0, 3, 1, 4])
    table = replace(
        table,
        offsets=np.array([0, 4]),
        **{
            name: getattr(table, name)[keep]
            for name in ("boxes_xywh", "labels", "area", "crowd", "difficult", "annotation_ids")
        },
    )
    detections = replace(select(detections, keep), labels=np.array([1, 1, 1, 2]), scores=np.array([0.9, 0.7, 0.8, 0.6]))
    analysis = find_errors(table, detections)
    cat, dog, owl = analysis.per_class
    assert pytest.approx(((51 + 50 * 2 / 3) / 101, 51 / 101, -1)) == (cat.AP, dog.AP, owl.AP)
    assert pytest.approx((cat.AP + dog.AP) / 2) == analysis.AP
    assert counts(analysis) == {"classification": 1}
    assert (cat.kinds[0].count, dog.kinds[0].count) == (1, 0)
    assert (cat.kinds[0].dAP, dog.kinds[0].dAP, owl.kinds[0].dAP) == pytest.approx((1 - cat.AP, 1 - dog.AP, -1))
    # Removing the wrong "cat" helps the cats only; not counting the dog that was not found helps the dogs only.
    assert analysis.false_positives.dAP == pytest.approx((1 - cat.AP) / 2)
    assert analysis.false_negatives.dAP == pytest.approx((1 - dog.AP) / 2)
    assert analysis.image_loss.tolist() == pytest.approx([1 - analysis.AP])


def test_only_the_best_scored_error_about_a_box_becomes_a_hit():
    table, detections = scene(1)
    box = detections.boxes[[1, 1]] + [10, 0, 10, 0]
    both = added(
        select(detections, np.delete(np.arange(12), 1)), Detections(np.zeros(2, int), box, np.full(2, 2), np.ones(2))
    )
    both.scores[-2:] = 0.2, 0.3
    errors = find_errors(table, both).errors
    assert errors.score.tolist() == [0.3, 0.2]
    assert errors.becomes_hit.tolist() == [True, False]
    # Not missed: a localisation error is about it.
    assert counts(find_errors(table, both)) == {"localisation": 2}


@pytest.mark.parametrize("flag", ["crowd", "difficult"])
def test_ignored_boxes_are_neither_missed_nor_found(flag):
    table, detections = scene(1)
    table = replace(table, **{flag: np.isin(np.arange(12), [0, 5])})
    assert counts(find_errors(table, detections)) == {}
    assert counts(find_errors(table, select(detections, np.arange(1, 12)))) == {}
    swapped = replace(detections, labels=np.where(np.arange(12) == 0, 2, detections.labels))
    assert counts(find_errors(table, swapped)) == {"background": 1}


def physically_fixed(
    table: AnnotationTable, detections: Detections, analysis: ErrorAnalysis, which: np.ndarray
) -> list[float]:
    """Compute AP50 of each class after actually changing the errors' boxes, labels and detections."""
    errors = analysis.errors
    boxes, labels = detections.boxes.copy(), detections.labels.copy()
    hits = np.flatnonzero(which & errors.becomes_hit)
    truth = table.boxes_xywh[errors.box[hits]]
    boxes[errors.detection[hits]] = np.concatenate([truth[:, :2], truth[:, :2] + truth[:, 2:]], axis=1)
    labels[errors.detection[hits]] = table.labels[errors.box[hits]]
    gone = errors.detection[which & ~errors.becomes_hit & (errors.detection >= 0)]
    left = np.setdiff1d(np.arange(len(detections)), gone)
    missed = which & (errors.detection < 0)
    keep = np.setdiff1d(np.arange(table.num_boxes), errors.box[missed])
    before = np.concatenate([[0], np.cumsum(np.isin(np.arange(table.num_boxes), keep))])
    columns = ("boxes_xywh", "labels", "area", "crowd", "difficult", "annotation_ids")
    fixed_table = replace(
        table, offsets=before[table.offsets], **{name: getattr(table, name)[keep] for name in columns}
    )
    fixed = select(replace(detections, boxes=boxes, labels=labels), left)
    return [row.AP50 for row in coco_metrics(fixed_table, fixed, max_detections=MANY).per_class]


def sound(case: Callable, seed: int) -> tuple[AnnotationTable, Detections]:
    """Return a case whose boxes have an area: a detection cannot be moved onto one that has none."""
    table, detections = case(seed)
    boxes_xywh = np.maximum(table.boxes_xywh, [-np.inf, -np.inf, 1, 1])
    return replace(table, boxes_xywh=boxes_xywh), detections


def assert_after(analysis: ErrorAnalysis, after: Iterable[float], expected: Iterable[float]) -> None:
    for row, ours, really in zip(analysis.per_class, after, expected, strict=True):
        if row.num_boxes and really >= 0:
            np.testing.assert_allclose(ours, really, rtol=0, atol=ROUNDING)
        elif row.num_boxes:  # nothing is left to find
            assert ours in (0, 1)


@pytest.mark.parametrize("seed", range(20))
def test_costs_are_what_evaluation_says_after_the_fix(case, seed):
    table, detections = sound(case, seed)
    analysis = find_errors(table, detections, max_detections=MANY)
    metrics = coco_metrics(table, detections, max_detections=MANY)
    np.testing.assert_allclose([row.AP for row in analysis.per_class], [row.AP50 for row in metrics.per_class])
    assert pytest.approx(metrics.AP50, abs=ROUNDING) == analysis.AP
    for number, kind in enumerate(analysis.kinds):
        after = [row.AP + row.kinds[number].dAP for row in analysis.per_class]
        expected = physically_fixed(table, detections, analysis, analysis.errors.kind == number)
        assert_after(analysis, after, expected)
        assert kind.count == np.count_nonzero(analysis.errors.kind == number)
        assert kind.count == sum(row.kinds[number].count for row in analysis.per_class)
        rises = [row.kinds[number].dAP for row in analysis.per_class if row.num_boxes]
        assert kind.dAP == (pytest.approx(np.mean(rises), abs=ROUNDING) if rises else -1)
        assert min(rises, default=0) >= 0


@pytest.mark.parametrize("seed", range(20))
def test_fixing_everything_gives_an_ap_of_one(case, seed):
    table, detections = sound(case, seed)
    analysis = find_errors(table, detections, max_detections=MANY)
    everything = np.ones(len(analysis.errors), dtype=np.bool_)
    after = physically_fixed(table, detections, analysis, everything)
    assert {round(value, 9) for value in after} <= {1, -1}
    # With one fix left out it does not.
    if (hits := np.flatnonzero(analysis.errors.becomes_hit)).size:
        everything[hits[0]] = False
        assert min(v for v in physically_fixed(table, detections, analysis, everything) if v >= 0) < 1


@pytest.mark.parametrize("seed", range(0, 40, 3))
def test_image_loss_is_what_evaluation_says_after_the_fix(case, seed):
    table, detections = sound(case, seed)
    analysis = find_errors(table, detections, max_detections=MANY)
    defined = np.array([row.num_boxes > 0 for row in analysis.per_class])
    before = np.array([row.AP for row in analysis.per_class])
    for image, loss in enumerate(analysis.image_loss):
        after = np.array(physically_fixed(table, detections, analysis, analysis.errors.image_index == image))
        if defined.any() and (after[defined] >= 0).all():
            assert loss == pytest.approx((after - before)[defined].mean(), abs=ROUNDING)
        rows = analysis.errors.of_image(image)
        assert (analysis.errors.image_index[rows] == image).all()
        assert (np.diff(analysis.errors.score[rows]) <= 0).all()
    assert sum(np.count_nonzero(analysis.errors.image_index == i) for i in range(table.num_images)) == len(
        analysis.errors
    )


def test_image_loss_notices_one_changed_value(case):
    table, detections = sound(case, 3)
    analysis = find_errors(table, detections)
    image = int(analysis.worst_images(1)[0])
    others = replace(detections, scores=np.where(detections.image_index == image, 1, detections.scores))
    assert abs(find_errors(table, others).image_loss[image] - analysis.image_loss[image]) > ROUNDING


def test_worst_images_come_first():
    table, detections = scene()
    drop = [0, 1, 2, 3, 4, 24]  # five objects of image 0, one of image 2
    analysis = find_errors(table, select(detections, np.delete(np.arange(36), drop)))
    assert analysis.worst_images(10).tolist() == [0, 2]
    assert analysis.worst_images(1).tolist() == [0]
    assert analysis.image_loss[1] == 0
    assert analysis.errors.box[analysis.errors.of_image(0)].tolist() == [0, 1, 2, 3, 4]


def tide_run(table: AnnotationTable, detections: Detections):
    tidecv = pytest.importorskip("tidecv", reason="needs tidecv, which brings an OpenCV that overwrites ours")
    truth, found = tidecv.Data("truth", max_dets=100), tidecv.Data("found")
    for category in table.categories:
        truth.add_class(category.label, category.name)
    for image in range(table.num_images):
        truth.add_image(image, str(image))
        found.add_image(image, str(image))
    for row, image in enumerate(table.image_of_box().tolist()):
        add = truth.add_ignore_region if table.crowd[row] else truth.add_ground_truth
        add(image, int(table.labels[row]), table.boxes_xywh[row].tolist())
    for row in range(len(detections)):
        x1, y1, x2, y2 = detections.boxes[row].tolist()
        image, label = int(detections.image_index[row]), int(detections.labels[row])
        found.add_detection(image, label, float(detections.scores[row]), [x1, y1, x2 - x1, y2 - y1])
    return tidecv.TIDE().evaluate(truth, found, mode=tidecv.TIDE.BOX)


def assert_same_as_tide(analysis: ErrorAnalysis, run) -> int:
    """Compare every class's AP after each fix, and the counts; return how many numbers were compared."""
    from tidecv.errors import main_errors as tide

    kinds = (
        tide.ClassError, tide.BoxError, tide.OtherError, tide.DuplicateError, tide.BackgroundError, tide.MissedError
    )  # fmt: skip
    fixed = [run.fix_errors(lambda error, kind=kind: isinstance(error, kind)) for kind in kinds]
    fixed.append(run.fix_errors(transform=tide.FalsePositiveError.fix))
    fixed.append(run.fix_errors(false_neg_dict=run.false_negatives))
    compared = 0
    for label, row in enumerate(analysis.per_class, start=1):
        # tidecv reads precision at the doubles nearest to k / 100, COCO at ten slightly higher ones, which matters
        # where a recall is one of these: for a number of boxes that 10 divides.
        if row.num_boxes and row.num_boxes % 10:
            for cost, after in zip((*row.kinds, row.false_positives, row.false_negatives), fixed, strict=True):
                curve = after.objs[label]
                expected = 100 if curve.is_empty() else curve.get_ap()
                if cost.kind == "false negatives" and not curve.num_gt_positives:
                    continue  # nothing is left to find: a matter of definition
                np.testing.assert_allclose(row.AP + cost.dAP, expected / 100, rtol=0, atol=ROUNDING)
                compared += 1
    for cost, kind in zip(analysis.kinds, kinds, strict=True):
        # tidecv counts ignored detections as errors, though most of them change nothing when fixed.
        counted = [e for e in run.error_dict[kind] if e.original[1] or e.fixed[1]]
        assert cost.count == len(counted)
    return compared


def tide_case(case: Callable, seed: int) -> tuple[AnnotationTable, Detections] | None:
    table, detections = case(seed)
    if not table.num_boxes or np.bincount(detections.image_index, minlength=1).max() > 100:
        return None  # tidecv divides by zero, or cuts detections per image
    # No equal scores, which tidecv reorders when it fixes something.
    scores = np.random.default_rng(seed).permutation(len(detections)) / max(len(detections), 1)
    return table, replace(detections, scores=scores)


@pytest.mark.parametrize("seed", range(1, 40))
def test_equals_tide_on_generated_cases(case, seed):
    made = tide_case(case, seed)
    if made is not None:
        assert_same_as_tide(find_errors(*made), tide_run(*made))


@pytest.mark.parametrize("perturb", ["box", "label", "crowd"])
def test_equality_with_tide_notices_one_changed_value(case, perturb):
    table, detections = tide_case(case, 3)
    run = tide_run(table, detections)
    assert assert_same_as_tide(find_errors(table, detections), run) > 10
    best = np.argmax(detections.scores)
    if perturb == "box":
        detections.boxes[best] += 1000
    elif perturb == "label":
        detections.labels[best] = detections.labels[best] % 3 + 1
    else:
        table.crowd[0] = ~table.crowd[0]
    with pytest.raises(AssertionError):
        assert_same_as_tide(find_errors(table, detections), run)


def test_equals_tide_on_cocoapi_detections(assets):
    folder = assets / "cocoapi_eval"
    table = read_coco(folder / "instances_val2014_100.json")
    detections = read_coco_detections(folder / "instances_val2014_fakebbox100_results.json", table)
    analysis = find_errors(table, detections)
    assert pytest.approx(coco_metrics(table, detections).AP50, abs=ROUNDING) == analysis.AP
    assert assert_same_as_tide(analysis, tide_run(table, detections)) > 400


def test_no_detections_and_no_boxes(no_detections):
    table, detections = scene(1)
    analysis = find_errors(table, no_detections)
    assert analysis.AP == 0
    assert counts(analysis) == {"missed": 12}
    assert costs(analysis)["missed"] == analysis.false_negatives.dAP == 1
    assert analysis.image_loss.tolist() == [1]
    empty = table.select_images(np.array([0]))
    empty = replace(
        empty,
        offsets=np.array([0, 0]),
        **{
            name: getattr(empty, name)[:0]
            for name in ("boxes_xywh", "labels", "area", "crowd", "difficult", "annotation_ids")
        },
    )
    analysis = find_errors(empty, detections)
    assert analysis.AP == -1
    assert counts(analysis) == {"background": 12}
    assert set(costs(analysis).values()) == {-1}
    assert analysis.image_loss.tolist() == [0]
    assert len(find_errors(empty, no_detections).errors) == 0


def test_options_are_checked():
    table, detections = scene(1)
    with pytest.raises(ValueError, match=r"background_threshold: .* below iou_threshold \(0.5\), got 0.6"):
        find_errors(table, detections, background_threshold=0.6)
    with pytest.raises(ValueError, match="iou_threshold"):
        find_errors(table, detections, iou_threshold=1.5)
    with pytest.raises(DataError, match=r"labels must be in 1\.\.3"):
        find_errors(table, replace(detections, labels=detections.labels + 1))


def test_a_fifth_of_coco_takes_a_second():
    rng = np.random.default_rng(0)
    num_images, num_classes, num_boxes, num_found = 1000, 80, 7200, 100_000
    labels = np.minimum(rng.geometric(0.06, num_boxes), num_classes)
    boxes = np.concatenate([rng.uniform(0, 400, (num_boxes, 2)), rng.uniform(10, 240, (num_boxes, 2))], axis=1)
    table = AnnotationTable(
        name="large",
        categories=tuple(Category(k, k, f"class {k}") for k in range(1, num_classes + 1)),
        image_ids=np.arange(num_images),
        file_names=np.array([""] * num_images),
        sizes=np.full((num_images, 2), 640, dtype=np.int32),
        offsets=np.linspace(0, num_boxes, num_images + 1).astype(np.int64),
        boxes_xywh=boxes,
        labels=labels,
        area=boxes[:, 2] * boxes[:, 3],
        crowd=np.zeros(num_boxes, dtype=np.bool_),
        difficult=np.zeros(num_boxes, dtype=np.bool_),
        annotation_ids=np.arange(num_boxes),
    )
    near = rng.integers(0, num_boxes, num_found)
    xywh = boxes[near] + rng.normal(0, 1, (num_found, 4)) * rng.choice([2, 10, 60], (num_found, 1))
    xywh[:, 2:] = np.maximum(xywh[:, 2:], 1)
    detections = Detections(
        table.image_of_box()[near],
        np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        np.where(rng.random(num_found) < 0.7, labels[near], rng.integers(1, 81, num_found)),
        rng.random(num_found),
    )
    start = time.process_time()
    find_errors(table, detections)
    assert time.process_time() - start < 5  # measured: 0.6
