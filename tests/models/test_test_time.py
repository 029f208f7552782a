"""Test-time tricks: nothing changes that was not asked for, and what was asked for is what the sources say."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from resdet.config import parse_config, parse_tricks
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import ConfigError, UserError, WeightsError
from resdet.evaluation import detect
from resdet.evaluation.detect import inference
from resdet.evaluation.settings import InferenceSettings
from resdet.models.detector import Detector, build_detector
from resdet.models.spec import DetectorSpec, Tricks
from resdet.models.test_time import detect_with_tricks, merge, mirror_boxes
from resdet.prediction import predict
from resdet.types import Prediction

ALL = Tricks(scales=(64, 96), flip=True, refine=2, voting=0.7, nms="soft-linear", nms_threshold=0.3)


def torchvisions(min_size: int = 64, max_size: int = 96, num_classes: int = 4, **settings) -> FasterRCNN:
    """torchvision's own, on one level of features."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 7, stride=4, padding=3), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=4, padding=2), nn.ReLU()
    )
    backbone.out_channels = 32
    model = FasterRCNN(
        backbone,
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_head=TwoMLPHead(32 * 7 * 7, 32),
        box_predictor=FastRCNNPredictor(32, num_classes),
        rpn_post_nms_top_n_test=20,
        **settings,
    )
    return lively(model)


def ours(min_size: int = 64, max_size: int = 96, num_classes: int = 4, **settings) -> Detector:
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch="resnet18",
        norm="batch",
        out_channels=32,
        box_head_channels=32,
        min_size=min_size,
        max_size=max_size,
        rpn_post_nms_top_n_test=20,
        **settings,
    )
    return lively(build_detector(spec, num_classes=num_classes, trainable_layers=5))


def lively(model: nn.Module) -> nn.Module:
    """Larger last layers: at random weights all boxes would have the same score, and not move."""
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(20)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(20)
    return model.eval()


BUILDERS = pytest.mark.parametrize("build", [torchvisions, ours])


def picture(height: int = 64, width: int = 80, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]


def run(model: nn.Module, images: list[Tensor], tricks: Tricks) -> list[Prediction]:
    with torch.no_grad():
        return detect_with_tricks(model, images, tricks)


def plain(model: nn.Module, images: list[Tensor]) -> list[Prediction]:
    with torch.no_grad():
        return model(images)


def assert_same(found: list[Prediction], expected: list[Prediction], atol: float = 0) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def assert_different(found: list[Prediction], expected: list[Prediction]) -> None:
    with pytest.raises(AssertionError):
        assert_same(found, expected, atol=1e-2)


@BUILDERS
def test_no_tricks_is_the_model_itself(build):
    model, images = build(), [picture(), picture(50, 41, 1)]
    expected = plain(model, images)
    assert sum(len(part["scores"]) for part in expected) > 5
    assert_same(run(model, images, Tricks()), expected)


@BUILDERS
@pytest.mark.parametrize(
    "tricks",
    [
        Tricks(scales=(64,)),
        Tricks(nms_threshold=0.5),
        Tricks(voting=1.0),  # only a box itself, or its equal, overlaps it by 1
        Tricks(nms="hard", nms_sigma=0.1),
    ],
    ids=str,
)
def test_tricks_at_the_models_own_settings_change_nothing(build, tricks):
    # At scale 1, where boxes are suppressed in the same pixels. Elsewhere the IoU of two boxes differs a little in the
    # original and the scaled image, whose sides are rounded.
    model, images = build(), [picture(), picture(64, 72, 1)]
    assert_same(run(model, images, tricks), plain(model, images))


@BUILDERS
def test_at_another_scale_as_a_model_made_for_it(build):
    # Images that are scaled, one of them until its longer side is as long as is allowed.
    images = [picture(48, 56), picture(48, 160, 1)]
    tricks = Tricks(scales=(96,))
    found = run(build(), images, tricks)
    # Of another order only where the IoU of two boxes is the threshold, which is not here.
    assert_same(found, plain(build(96, 144), images), atol=1e-4)
    assert_different(found, plain(build(96, 120), images))
    assert_different(found, plain(build(), images))


def test_pillows_resize_scales_too():
    image = [picture(48, 56).mul(255).round() / 255]
    found = run(ours(resize="pil"), image, Tricks(scales=(96,)))
    assert_same(found, plain(ours(96, 144, resize="pil"), image), atol=1e-4)
    assert_different(found, run(ours(), image, Tricks(scales=(96,))))


def test_boxes_are_mirrored_exactly_and_back():
    boxes = torch.tensor([[0.0, 3, 10, 20], [7.5, 0, 64, 5.25]])
    mirrored = mirror_boxes(boxes, 64)
    assert mirrored.tolist() == [[54, 3, 64, 20], [0, 0, 56.5, 5.25]]
    assert torch.equal(mirror_boxes(mirrored, 64), boxes)
    assert not torch.equal(mirror_boxes(mirrored, 65), boxes)
    assert mirror_boxes(boxes[:0], 64).shape == (0, 4)


@BUILDERS
def test_with_flip_a_mirrored_image_has_mirrored_detections(build):
    model, image = build(), picture(50, 67)
    tricks = Tricks(flip=True, refine=1)

    def mirrored_and_back(tricks: Tricks) -> list[Prediction]:
        [found] = run(model, [image.flip(-1)], tricks)
        return [found | {"boxes": mirror_boxes(found["boxes"], 67)}]

    # Both sides take the same two views, in another order.
    assert_same(mirrored_and_back(tricks), run(model, [image], tricks), atol=1e-3)
    assert_different(mirrored_and_back(Tricks()), run(model, [image], Tricks()))


def test_mirrored_objects_come_back_where_they_are():
    """A model that boxes the bright square finds it in both views at the same place."""
    image = torch.zeros(3, 60, 90)
    image[:, 20:40, 10:30] = 1
    model = torchvisions()
    seen: list[Tensor] = []

    def bright(batch: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        where = (batch[0, 0] > batch[0, 0].mean()).nonzero()
        (top, left), (bottom, right) = where.amin(dim=0).tolist(), where.amax(dim=0).tolist()
        seen.append(torch.tensor([[float(left), top, right + 1, bottom + 1]]))
        return [seen[-1]]

    model.rpn.forward = lambda images, features: (bright(images.tensors, images.image_sizes), {})
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.weight.zero_()
        model.roi_heads.box_predictor.bbox_pred.bias.zero_()
    [found] = run(model, [image], Tricks(flip=True, nms_threshold=1.0))
    assert seen[0][0, 0] != seen[1][0, 0]
    assert len(found["scores"]) >= 2
    # A pixel of the image as it was given: where a blurred edge ends is rounded.
    expected = torch.tensor([10.0, 20, 30, 40]).expand_as(found["boxes"])
    torch.testing.assert_close(found["boxes"], expected, rtol=0, atol=1.0)


def never_moving(build: Callable[..., nn.Module]) -> nn.Module:
    model = build()
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.weight.zero_()
        model.roi_heads.box_predictor.bbox_pred.bias.zero_()
    return model


@BUILDERS
def test_refinement_that_moves_nothing_changes_nothing(build):
    model, images = never_moving(build), [picture(), picture(64, 72, 1)]
    expected = plain(model, images)
    for tricks in (Tricks(refine=1), Tricks(refine=3), Tricks(refine=1, voting=0.999)):
        # Corners are decoded from center and size: they move by the last bits, and scores with them.
        assert_same(run(model, images, tricks), expected, atol=1e-3)
    assert_different(run(build(), images, Tricks(refine=1)), plain(build(), images))


@BUILDERS
def test_each_round_is_given_the_boxes_of_the_likeliest_class(build):
    model, image = never_moving(build), picture()
    # Class 2 is the likeliest, and its boxes go right by a tenth of their width; those of 1 and 3 go far left. The
    # background, likelier than all, goes down.
    with torch.no_grad():
        predictor = model.roi_heads.box_predictor
        predictor.cls_score.weight.zero_()
        predictor.cls_score.bias.copy_(torch.tensor([3.0, 0, 1, 0.5]))
        predictor.bbox_pred.bias.view(4, 4).copy_(
            torch.tensor([[0.0, 20, 0, 0], [-5, 0, 0, 0], [1, 0, 0, 0], [-5, 0, 0, 0]])
        )
    given: list[Tensor] = []
    handle = model.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1][0]))
    run(model, [image], Tricks(refine=2))
    handle.remove()
    assert len(given) == 3
    for before, after in itertools.pairwise(given):
        moved = before + torch.tensor([0.1, 0, 0.1, 0]) * (before[:, 2] - before[:, 0])[:, None]
        expected = moved.clamp(min=0).minimum(torch.tensor([80.0, 64, 80, 64]))
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-3)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(after, before, rtol=0, atol=1e-3)


@BUILDERS
def test_refinement_keeps_the_first_boxes_among_its_candidates(build):
    """Without suppression the first round's boxes are all there, and each round adds to them."""
    model, image = build(), picture()
    model.roi_heads.detections_per_img = 10_000

    def boxes(refine: int) -> set[tuple[float, ...]]:
        [found] = run(model, [image], Tricks(refine=refine, nms_threshold=1.0))
        return {tuple(box) for box in found["boxes"].tolist()}

    assert boxes(0) < boxes(1) < boxes(2)


@BUILDERS
@pytest.mark.parametrize("tricks", [ALL, Tricks(refine=1), Tricks(flip=True, class_agnostic=True)], ids=["all", "", ""])
def test_a_batch_has_the_answers_of_its_images(build, tricks):
    model = build()
    images = [picture(seed=seed) for seed in range(3)]
    alone = [run(model, [image], tricks)[0] for image in images]
    # Convolutions of a batch add in another order.
    assert_same(run(model, images, tricks), alone, atol=1e-3)
    assert_different(run(model, images[::-1], tricks), alone)


@BUILDERS
@pytest.mark.parametrize("nms", ["hard", "soft-linear", "soft-gaussian"])
def test_answers_fall_in_score_and_are_no_more_than_the_model_gives(build, nms):
    model, image = build(), picture()
    tricks = Tricks(**{**ALL.model_dump(), "nms": nms})
    [all_of_them] = run(model, [image], tricks)
    model.roi_heads.detections_per_img = 5
    [found] = run(model, [image], tricks)
    assert found["boxes"].shape == (5, 4)
    assert (found["scores"].diff() <= 0).all()
    assert_same([found], [{key: value[:5] for key, value in all_of_them.items()}])
    assert {key: value.dtype for key, value in found.items()} == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "scores": torch.float32,
    }
    assert (found["boxes"] >= 0).all()
    # The last bit: a mirrored corner is the difference of two numbers.
    assert (found["boxes"] <= torch.tensor([80.0, 64, 80, 64]) + 1e-4).all()


@BUILDERS
def test_nothing_found(build):
    image = picture()
    model = build(box_score_thresh=1.0)
    no_proposals = build()
    no_proposals.rpn.score_thresh = 1.1
    for tricks in (
        ALL,
        Tricks(refine=1, voting=0.5),
        Tricks(nms="soft-gaussian", class_agnostic=True),
    ):
        for silent in (model, no_proposals):
            for found in run(silent, [image, image], tricks):
                assert (found["boxes"].shape, found["labels"].shape, found["scores"].shape) == ((0, 4), (0,), (0,))
                assert found["labels"].dtype == torch.int64


@BUILDERS
def test_one_class(build):
    model = build(num_classes=2)
    [found] = run(model, [picture()], ALL)
    assert len(found["scores"]) > 0
    assert set(found["labels"].tolist()) == {1}


@BUILDERS
def test_the_model_is_afterwards_what_it_was(build):
    model = build()

    def settings() -> tuple:
        heads, transform = model.roi_heads, model.transform
        return heads.nms_thresh, heads.detections_per_img, transform.min_size, transform.max_size

    before = settings()
    expected = plain(model, [picture()])
    run(model, [picture()], ALL)
    assert settings() == before

    def fail(*_: object) -> None:
        assert settings() != before
        raise ZeroDivisionError

    handle = model.roi_heads.box_head.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run(model, [picture()], ALL)
    handle.remove()
    assert settings() == before
    assert_same(plain(model, [picture()]), expected)


def candidates(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Prediction:
    return Prediction(boxes=torch.tensor(boxes), labels=torch.tensor(labels), scores=torch.tensor(scores))


def test_merging_by_hand():
    # IoU of the first two 90 / 110 = 0.82, of other classes; the third is the first's neighbour, 80 / 120 = 0.67.
    parts = [
        candidates([[0.0, 0, 10, 10], [1, 0, 11, 10]], [1, 2], [0.9, 0.8]),
        candidates([[2.0, 0, 12, 10]], [1], [0.6]),
    ]

    def merged(**tricks) -> Prediction:
        return merge(parts, Tricks(**tricks), nms_threshold=0.5, limit=10)

    found = merged()
    assert found["labels"].tolist() == [1, 2]
    assert found["boxes"].tolist() == [[0, 0, 10, 10], [1, 0, 11, 10]]
    assert merged(class_agnostic=True)["labels"].tolist() == [1]
    assert merge(parts, Tricks(class_agnostic=True), nms_threshold=0.9, limit=10)["labels"].tolist() == [1, 2, 1]

    voted = merged(voting=0.5)
    assert voted["scores"].tolist() == found["scores"].tolist()
    moved = 0.6 * 2 / (0.9 + 0.6)
    torch.testing.assert_close(voted["boxes"][0], torch.tensor([moved, 0, 10 + moved, 10]))
    assert torch.equal(voted["boxes"][1], found["boxes"][1])
    # Dropped boxes of the class vote, those of others do not, suppressed by it or not.
    torch.testing.assert_close(merged(voting=0.5, class_agnostic=True)["boxes"], voted["boxes"][:1])

    softened = merged(nms="soft-linear")
    assert softened["labels"].tolist() == [1, 2, 1]
    torch.testing.assert_close(softened["scores"], torch.tensor([0.9, 0.8, 0.6 * (1 - 80 / 120)]))
    softened = merged(nms="soft-gaussian", nms_sigma=0.25)
    torch.testing.assert_close(
        softened["scores"], torch.tensor([0.9, 0.8, 0.6 * 2.718281828 ** -((80 / 120) ** 2 / 0.25)])
    )
    assert len(merge(parts, Tricks(nms="soft-linear"), nms_threshold=0.5, limit=1)["scores"]) == 1


class Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: list[Tensor]) -> list[Prediction]:
        return [candidates([[0.0, 0, 1, 1]], [1], [0.5]) for _ in images]


def test_models_that_tricks_do_not_fit_are_refused():
    assert len(run(Stranger(), [picture()], Tricks())) == 1
    with pytest.raises(UserError, match=r"need the parts of a two-stage detector .* got Stranger"):
        run(Stranger(), [picture()], Tricks(flip=True))
    fixed = torchvisions(fixed_size=(64, 64))
    with pytest.raises(UserError, match=r"tricks\.scales has no meaning .* one size, \(64, 64\)"):
        run(fixed, [picture()], Tricks(scales=(64,)))
    assert len(run(fixed, [picture()], Tricks(flip=True))) == 1


def shapes() -> DetectionDataset:
    return DetectionDataset(shapes_table(3, 64, 3), ShapesImages(image_size=64, seed=3), training=False)


@BUILDERS
def test_datasets_and_arrays_are_gone_through_with_tricks(build):
    model, dataset = build(), shapes()
    tricks = Tricks(flip=True, refine=1, voting=0.5)
    found = detect(model, dataset, InferenceSettings(batch_size=2, tricks=tricks))
    [*results] = predict(model, [dataset.image(index) for index in range(3)], InferenceSettings(tricks=tricks))
    other = detect(model, dataset, InferenceSettings(batch_size=2))
    for index, result in enumerate(results):
        prediction = Prediction(boxes=result.boxes, labels=result.labels, scores=result.scores)
        assert_same([prediction], [found.of_image(index)], atol=1e-3)
        assert_different([prediction], [other.of_image(index)])


@BUILDERS
def test_bf16_answers_are_close_to_fp32(build):
    model, tricks = build(), Tricks(flip=True, refine=1, voting=0.5)
    image = [(picture() * 255).byte()]
    with inference(model, InferenceSettings(tricks=tricks)) as exact:
        [expected] = exact(image, "the picture")
    with inference(model, InferenceSettings(precision="bf16", tricks=tricks)) as rough:
        [found] = rough(image, "the picture")
    # bf16 keeps 8 bits, and scores are those of a softmax whose weights were made large.
    torch.testing.assert_close(found["scores"][:3], expected["scores"][:3], rtol=0.1, atol=0)
    assert not torch.equal(found["scores"][:3], expected["scores"][:3])
    assert found["boxes"].dtype == torch.float32


def test_nan_is_an_error_with_tricks_too():
    model = torchvisions()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[0] = torch.nan
    with pytest.raises(WeightsError, match=r"NaN or infinity .*cls_score\.bias is not finite"):
        detect(model, shapes(), InferenceSettings(tricks=ALL))


def test_settings_are_checked():
    for wrong in ({"refine": -1}, {"voting": 0.0}, {"scales": (64, 64)}, {"nms": "softest"}, {"nms_sigma": 0.0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            Tricks(**wrong)
    with pytest.raises(ValidationError, match="frozen"):
        ALL.refine = 3


def test_the_same_keys_in_a_configuration_and_on_the_command_line():
    expected = Tricks(scales=(416, 512), flip=True, refine=1, voting=0.8, nms="soft-linear")
    settings = ["scales=[416, 512]", "flip=true", "refine=1", "voting=0.8", "nms=soft-linear"]
    assert parse_tricks(settings) == expected
    assert parse_tricks([]) == Tricks()
    small = "{data: {train: {format: shapes}, val: {format: shapes}}, train: {steps: 1}, output_dir: x}"
    assert parse_config(small).eval.tricks == Tricks()
    assert parse_config(small, [f"eval.tricks.{setting}" for setting in settings]).eval.tricks == expected
    with pytest.raises(ConfigError) as caught:
        parse_tricks(["refin=1", "voting=2", "scales=416", "flip"])
    assert caught.value.problems == [
        "command line (flip): must be key=value with a dotted key, as in optim.lr=0.01",
        "command line (scales=416): scales: must be array; got 416 (whole number)",
        "command line (voting=2): voting: must be less than or equal to 1; got 2 (whole number)",
        "command line (refin=1): refin: unknown key; did you mean refine?",
    ]
    with pytest.raises(ConfigError, match=r"eval\.tricks\.refin: unknown key; did you mean refine"):
        parse_config(small, ["eval.tricks.refin=1"])
