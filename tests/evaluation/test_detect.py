import copy
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import DataError, UserError, WeightsError
from resdet.evaluation import best_score_threshold, coco_metrics, detect, evaluate
from resdet.evaluation.coco import detections_to_coco
from resdet.evaluation.inference import inference
from resdet.evaluation.labels import with_model_classes
from resdet.evaluation.settings import InferenceSettings
from resdet.models.spec import Tricks
from resdet.processes import Processes
from resdet.types import Category, Detections, Prediction

NUM_IMAGES, IMAGE_SIZE, SEED = 7, 96, 3


def shapes() -> DetectionDataset:
    table = shapes_table(NUM_IMAGES, IMAGE_SIZE, SEED)
    return DetectionDataset(table, ShapesImages(image_size=IMAGE_SIZE, seed=SEED), training=False)


def seed_everything() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator is what this is about
    random.seed(1)


def draw_random_numbers() -> tuple[float, float, float]:
    return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002


class Oracle(nn.Module):
    """Recognises each image of a dataset and returns its ground truth, drawing random numbers in passing."""

    def __init__(self, dataset: DetectionDataset, categories: tuple[Category, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout()
        self.categories = categories
        self.answers = {}
        for index in range(len(dataset)):
            rows = dataset.table.rows(index)
            boxes = torch.from_numpy(dataset.table.boxes_in_image()[rows]).float()
            labels = torch.from_numpy(dataset.table.labels[rows])
            self.answers[dataset.image(index).tobytes()] = boxes, labels
        self.calls: list[int] = []

    def forward(self, images: list[Tensor]) -> list[Prediction]:
        assert not self.training
        assert not self.dropout.training
        assert not torch.is_grad_enabled()
        draw_random_numbers()
        self.calls.append(len(images))
        out = []
        for image in images:
            assert image.dtype == torch.float32
            assert image.shape[0] == 3
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy().tobytes()
            boxes, labels = self.answers[pixels]
            out.append(Prediction(boxes=boxes, labels=labels, scores=torch.linspace(0.9, 0.5, len(labels))))
        return out


def small_rcnn(num_classes: int = 4) -> FasterRCNN:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return FasterRCNN(
        backbone, num_classes, min_size=64, max_size=96, rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=20
    )


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (2, 2)])
def test_ground_truth_as_answers_is_perfect(batch_size, num_workers):
    dataset = shapes()
    model = Oracle(dataset, dataset.categories)
    result = evaluate(model, dataset, InferenceSettings(batch_size=batch_size, num_workers=num_workers))
    assert sum(model.calls) == NUM_IMAGES
    assert max(model.calls) == batch_size
    for name in ("AP", "AP50", "AP75", "AR_100", "voc_AP50", "voc_AP50_11point"):
        assert result.metrics[name] == pytest.approx(1, abs=1e-9), name
    assert all(isinstance(value, float) for value in result.metrics.values())
    assert [row.name for row in result.per_class] == [category.name for category in dataset.categories]
    # Every box of every image, in the dataset's order.
    np.testing.assert_array_equal(result.detections.image_index, dataset.table.image_of_box())
    np.testing.assert_allclose(result.detections.boxes, dataset.table.boxes_in_image(), atol=1e-5)  # float32
    np.testing.assert_array_equal(result.detections.labels, dataset.table.labels)


def test_one_wrong_label_is_noticed():
    dataset = shapes()
    model = Oracle(dataset, dataset.categories)
    key = dataset.image(0).tobytes()
    boxes, labels = model.answers[key]
    model.answers[key] = boxes, labels % 3 + 1
    assert evaluate(model, dataset).metrics["AP"] < 0.999


def test_classes_are_matched_by_name():
    dataset = shapes()
    names = [category.name for category in dataset.categories]
    turned = dataset.table.select_classes(names[::-1])
    other = DetectionDataset(turned, ShapesImages(image_size=IMAGE_SIZE, seed=SEED), training=False)
    model = Oracle(dataset, dataset.categories)
    assert evaluate(model, other).metrics["AP"] == pytest.approx(1, abs=1e-9)
    np.testing.assert_array_equal(evaluate(model, other).detections.labels, turned.labels)
    # Without names, labels are taken as they are.
    assert evaluate(Oracle(dataset), other).metrics["AP"] < 0.5


@pytest.mark.parametrize("indices", [[4, 1], [6, 0, 3, 3, 5, 0, 3], range(1, 7, 2), torch.tensor([2, -1]), [0]])
def test_a_subset_is_the_dataset_of_its_images(indices):
    dataset = shapes()
    # Wrong answers for some images, so that it matters which are in it.
    model = Oracle(dataset, dataset.categories)
    for index in (1, 3):
        key = dataset.image(index).tobytes()
        boxes, labels = model.answers[key]
        model.answers[key] = boxes * 0.9, labels % 3 + 1
    rows = np.arange(NUM_IMAGES)[np.asarray(indices)]
    # Unique ids in the same order as before, because equal scores of two images are ordered by id.
    image_ids = np.argsort(np.argsort(rows, kind="stable"))
    table = replace(dataset.table.select_images(rows), image_ids=image_ids)
    whole = detect(model, dataset)
    parts = [np.flatnonzero(whole.image_index == row) for row in rows]
    picked = np.concatenate(parts)
    by_hand = Detections(
        np.repeat(np.arange(len(rows)), [len(part) for part in parts]),
        *(column[picked] for column in (whole.boxes, whole.labels, whole.scores)),
    )
    turned = Subset(dataset, range(NUM_IMAGES - 1, -1, -1))
    for subset in (Subset(dataset, indices), Subset(turned, (NUM_IMAGES - 1 - rows).tolist())):
        result = evaluate(model, subset, InferenceSettings(batch_size=2, num_workers=1 if len(rows) > 2 else 0))
        assert result.coco == coco_metrics(table, by_hand)
        np.testing.assert_array_equal(result.detections.image_index, by_hand.image_index)
        np.testing.assert_array_equal(result.detections.boxes, by_hand.boxes)
        assert result.score_threshold == best_score_threshold(table, by_hand)
    if len(rows) > 1:
        assert result.coco != coco_metrics(dataset.table, whole)


def test_other_classes_are_an_error_that_names_them():
    dataset = shapes()
    first, *others = dataset.categories
    model = Oracle(dataset, (replace(first, name="pentagon"), *others))
    with pytest.raises(DataError, match=f"has '{first.name}'; only the model has 'pentagon'"):
        evaluate(model, dataset)
    assert model.calls == []
    with pytest.raises(DataError, match=f"has '{first.name}'; only the model has none"):
        evaluate(Oracle(dataset, tuple(others)), dataset)
    with pytest.raises(DataError, match=r"the model has 91 classes, background included, and .* has 4"):
        evaluate(small_rcnn(num_classes=91), dataset)


def lacking(dataset, name, **ids):
    """A dataset in which one class does not occur, nor is known, and the others have other ids."""
    kept = [category.name for category in dataset.categories if category.name != name]
    table = dataset.table.select_classes(kept[::-1])
    categories = tuple(replace(own, category_id=ids.get(own.name, own.category_id)) for own in table.categories)
    images = ShapesImages(image_size=IMAGE_SIZE, seed=SEED)
    return DetectionDataset(replace(table, categories=categories), images, training=False)


@pytest.mark.parametrize("position", range(3))
def test_a_dataset_without_one_of_the_models_classes_is_judged_on_the_others(position):
    dataset = shapes()
    absent = dataset.categories[position]
    others = [category.name for category in dataset.categories if category is not absent]
    part = lacking(dataset, absent.name, **{name: 50 - number for number, name in enumerate(others)})
    model = Oracle(dataset, dataset.categories)
    found = evaluate(model, part)
    assert [row.name for row in found.per_class] == [*others[::-1], absent.name]
    assert [row.AP for row in found.per_class] == pytest.approx([1, 1, -1], abs=1e-9)
    assert [row.AP for row in found.voc.per_class] == pytest.approx([1, 1, -1], abs=1e-9)
    assert found.metrics["AP"] == pytest.approx(1, abs=1e-9)
    judged = with_model_classes(model, part)
    assert found.coco == coco_metrics(judged.table, found.detections)
    # What it finds of the absent class keeps the model's id, and its own label above the others.
    wanted = dataset.table.labels == absent.label
    assert (found.detections.labels == 3).sum() == wanted.sum() > 0
    entries = detections_to_coco(judged.table, found.detections)
    assert {entry["category_id"] for entry in entries} == {49, 50, absent.category_id}


def test_placeholders_of_a_models_classes_are_no_classes():
    """torchvision's detectors of COCO have rows for the ids that COCO does not use."""
    dataset = shapes()
    first, second, third = dataset.categories
    categories = (first, Category(2, 12, "N/A (12)"), replace(second, label=3), replace(third, label=4))
    model = Oracle(dataset, categories)
    for key, (boxes, labels) in model.answers.items():
        wrong = torch.tensor([2])  # the placeholder's, and the best
        model.answers[key] = torch.cat([boxes[:1], boxes]), torch.cat([wrong, torch.tensor([0, 1, 3, 4])[labels]])
    found = evaluate(model, dataset)
    assert [row.name for row in found.per_class] == [one.name for one in dataset.categories]
    assert found.metrics["AP"] == pytest.approx(1, abs=1e-9)
    np.testing.assert_array_equal(found.detections.labels, dataset.table.labels)
    lacks = lacking(dataset, second.name)
    assert [row.AP for row in evaluate(model, lacks).per_class] == pytest.approx([1, 1, -1], abs=1e-9)


def test_the_id_of_an_absent_class_is_not_another_classs():
    dataset = shapes()
    absent, other, _ = dataset.categories
    part = lacking(dataset, absent.name, **{other.name: absent.category_id})
    table = with_model_classes(Oracle(dataset, dataset.categories), part).table
    assert len({category.category_id for category in table.categories}) == 3
    assert table.categories[:2] == part.categories


def test_the_classes_of_a_model_in_another_unicode_form_are_the_same():
    dataset = shapes()
    first, *others = dataset.categories
    named = replace(dataset.table, categories=(replace(first, name="B\xe4r"), *others))
    own = DetectionDataset(named, ShapesImages(image_size=IMAGE_SIZE, seed=SEED), training=False)
    model = Oracle(dataset, (replace(first, name="Ba\u0308r"), *others))
    assert len(evaluate(model, own).per_class) == 3


def test_training_flags_and_random_states_are_restored():
    dataset = shapes()
    model = Oracle(dataset).train()
    model.dropout.eval()
    seed_everything()
    expected = draw_random_numbers()
    assert draw_random_numbers() != expected
    seed_everything()
    detect(model, dataset, InferenceSettings(num_workers=1))
    assert draw_random_numbers() == expected
    assert model.training
    assert not model.dropout.training
    with pytest.raises(ZeroDivisionError), inference(model):
        raise ZeroDivisionError
    assert model.training


def losses_and_gradients(model: nn.Module, dataset: DetectionDataset) -> dict[str, Tensor]:
    torch.manual_seed(7)
    image, target = dataset[0]
    losses = model([image.float() / 255], [target])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: value.detach() for name, value in losses.items()}, **gradients}


def check_an_evaluation_does_not_change_training(model: nn.Module, dataset: DetectionDataset) -> None:
    untouched = copy.deepcopy(model)
    detect(model, dataset, InferenceSettings(batch_size=2))
    seen, expected = losses_and_gradients(model, dataset), losses_and_gradients(untouched, dataset)
    assert seen.keys() == expected.keys()
    assert any(name.startswith("backbone") for name in seen)
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=0, atol=0, msg=name)


def test_an_evaluation_does_not_change_the_training_after_it():
    check_an_evaluation_does_not_change_training(small_rcnn().train(), shapes())


def test_an_evaluation_does_not_change_the_training_of_our_detector_after_it():
    from resdet import fasterrcnn_resnet101_fpn

    dataset = shapes()
    torch.manual_seed(0)
    model = fasterrcnn_resnet101_fpn(weights=None, weights_backbone=None, num_classes=4, trainable_backbone_layers=5)
    model.transform.min_size, model.transform.max_size = (32,), 48
    # Frozen norms on random weights let activations grow by stages; scaled down they stay finite.
    with torch.no_grad():
        for name, parameter in model.backbone.body.named_parameters():
            if name.endswith("conv3.weight"):
                parameter.mul_(0.1)
    check_an_evaluation_does_not_change_training(model.train(), dataset)


@pytest.mark.parametrize("name", ["backbone.body.layer3.0.conv1.weight", "roi_heads.box_predictor.cls_score.bias"])
def test_nan_is_an_error_and_not_an_empty_answer(name):
    dataset = shapes()
    model = small_rcnn().eval()
    # In torchvision, a diverged model silently finds nothing.
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = torch.nan
        assert all(len(output["scores"]) == 0 for output in model([torch.rand(3, 64, 64)]))
    with pytest.raises(WeightsError, match=rf"NaN or infinity on image_id=\[\d+, \d+\] of .*its {name} is not finite"):
        evaluate(model, dataset, InferenceSettings(batch_size=2))
    assert not model.rpn.head._forward_hooks
    assert not model.roi_heads.box_predictor._forward_hooks


def test_nan_in_the_answer_is_an_error():
    dataset = shapes()
    model = Oracle(dataset)
    key = dataset.image(4).tobytes()
    model.answers[key] = model.answers[key][0] * torch.nan, model.answers[key][1]
    with pytest.raises(WeightsError, match=rf"image_id=\[{dataset.table.image_ids[4]}\].*weights are finite"):
        detect(model, dataset)


def test_bf16_answers_are_close_to_fp32():
    dataset = shapes()
    model = small_rcnn()
    model.roi_heads.score_thresh = 0.0
    exact, rough = detect(model, dataset), detect(model, dataset, InferenceSettings(precision="bf16"))
    assert rough.boxes.dtype == rough.scores.dtype == np.float64
    # bf16 keeps 8 bits: scores of a softmax over random weights move by about 1 %.
    assert len(exact) > 0
    np.testing.assert_allclose(np.sort(rough.scores)[-5:], np.sort(exact.scores)[-5:], rtol=0.1)
    assert (np.sort(rough.scores)[-5:] != np.sort(exact.scores)[-5:]).any()


def test_order_within_an_image_is_by_falling_score():
    found = detect(small_rcnn(), shapes(), InferenceSettings(batch_size=3))
    for index in range(NUM_IMAGES):
        assert (np.diff(found.scores[found.image_index == index]) <= 0).all()


def evaluate_as_one_of(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)  # a forked process has no OpenMP threads to wait for
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    dataset = shapes()
    model = Oracle(dataset, dataset.categories)
    result = evaluate(model, dataset, InferenceSettings(batch_size=2), Processes(rank, world_size, torch.device("cpu")))
    torch.save(
        {
            "metrics": result.metrics,
            "seen": sum(model.calls),
            "image_index": torch.from_numpy(result.detections.image_index),
            "boxes": torch.from_numpy(result.detections.boxes),
        },
        Path(folder, f"{rank}.pt"),
    )
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_two_processes_share_the_images_and_agree_with_one(tmp_path):
    # Forked: two fresh interpreters would spend ten seconds importing torch.
    mp.start_processes(evaluate_as_one_of, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    dataset = shapes()
    alone = evaluate(Oracle(dataset, dataset.categories), dataset)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [rank["seen"] for rank in ranks] == [4, 3]
    for rank in ranks:
        assert rank["metrics"] == alone.metrics
        np.testing.assert_array_equal(rank["image_index"].numpy(), alone.detections.image_index)
        np.testing.assert_array_equal(rank["boxes"].numpy(), alone.detections.boxes)


def test_evaluation_says_nothing(capsys, caplog):
    dataset = shapes()
    with caplog.at_level("INFO"):
        evaluate(Oracle(dataset, dataset.categories), dataset)
    captured = capsys.readouterr()
    assert captured.out == captured.err == caplog.text == ""


def test_progress_is_shown_only_when_asked(capsys):
    dataset = shapes()
    detect(Oracle(dataset), dataset)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    detect(Oracle(dataset), dataset, InferenceSettings(progress=True))
    captured = capsys.readouterr()
    assert "7/7" in captured.err
    assert captured.out == ""


def dense(num_boxes: int) -> DetectionDataset:
    """One picture with many objects, as of cells or grains."""
    side = 4 * math.ceil(num_boxes**0.5)
    places = np.stack(np.divmod(np.arange(num_boxes), side // 4), axis=1) * 4.0
    table = shapes_table(1, side, SEED)
    table = replace(
        table,
        offsets=np.array([0, num_boxes]),
        boxes_xywh=np.concatenate([places, np.full((num_boxes, 2), 3.0)], axis=1),
        labels=np.ones(num_boxes, dtype=np.int64),
        area=np.full(num_boxes, 9.0),
        crowd=np.zeros(num_boxes, dtype=np.bool_),
        difficult=np.zeros(num_boxes, dtype=np.bool_),
        annotation_ids=np.arange(num_boxes),
    )
    return DetectionDataset(table, ShapesImages(image_size=side, seed=SEED), training=False)


def test_all_objects_of_a_dense_image_count_where_the_limit_is_raised():
    dataset = dense(2000)
    model = Oracle(dataset, dataset.categories)
    metrics = evaluate(model, dataset, InferenceSettings(max_detections=2000)).metrics
    assert metrics["AP"] == metrics["AP50"] == metrics["AP_small"] == metrics["AR_2000"] == pytest.approx(1, abs=1e-9)
    assert "AR_100" not in metrics
    usual = evaluate(model, dataset).metrics
    assert usual["AR_100"] == pytest.approx(100 / 2000)
    assert usual["AP"] < 0.06


@pytest.mark.parametrize("tricks", [None, Tricks(flip=True)])
def test_the_model_returns_as_many_detections_as_are_asked_for(tricks):
    model = small_rcnn().eval()
    model.rpn._pre_nms_top_n["testing"] = 30  # of each of the five levels
    model.roi_heads.score_thresh = 0.0
    images = [torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))]

    def count(limit: int | None) -> int:
        with inference(model, InferenceSettings(max_detections=limit, tricks=tricks)) as run:
            return len(run(images, "one image")[0]["scores"])

    built = model.roi_heads.detections_per_img, dict(model.rpn._pre_nms_top_n), dict(model.rpn._post_nms_top_n)
    assert count(7) == 7
    assert count(400) > count(None)  # more than 20 proposals of three classes give
    assert built == (model.roi_heads.detections_per_img, model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n)
    with pytest.raises(UserError, match=r"^max_detections must be at least 1, got 0$"):
        count(0)
