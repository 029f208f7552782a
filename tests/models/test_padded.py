"""The forward pass over a padded batch, taken by the CPU, beside the usual one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resdet.devices import send
from resdet.errors import UserError
from resdet.models import padded
from resdet.models.detector import Detector, build_detector
from resdet.models.norm import calibrate_norm
from resdet.models.seeded import SeededTransform, draw, image_seeds, random_keys
from resdet.models.spec import DetectorSpec

TARGETS = [
    {"boxes": torch.tensor([[10.0, 10, 60, 70], [30, 20, 90, 80]]), "labels": torch.tensor([1, 2])},
    {"boxes": torch.tensor([[5.0, 5, 100, 90]]), "labels": torch.tensor([3])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]
SMALL: dict[str, Any] = {
    "arch": "resnet18",
    "min_size": (48,),
    "max_size": 72,
    "box_head_channels": 64,
    "rpn_post_nms_top_n_test": 60,
}
# Everything is sampled, so that it does not matter which random numbers are drawn.
ALL: dict[str, Any] = {
    "rpn_batch_size_per_image": 1600,
    "rpn_positive_fraction": 1.0,
    "box_batch_size_per_image": 64,
    "box_positive_fraction": 1.0,
    "rpn_pre_nms_top_n_train": 300,
    "rpn_post_nms_top_n_train": 60,
}
# Stage 4 is run on each proposal, and in float64 slowly.
C4: dict[str, Any] = {
    "layout": "c4",
    "anchor_sizes": (16, 32, 64),
    "box_batch_size_per_image": 12,
    "rpn_post_nms_top_n_train": 8,
    "rpn_post_nms_top_n_test": 12,
}
Pad = Callable[[bool], None]


@pytest.fixture
def pad(monkeypatch: pytest.MonkeyPatch) -> Pad:
    """A switch: whether the CPU takes the padded path."""
    return lambda answer: monkeypatch.setattr(padded, "is_queued", lambda _device: answer)


def detector(**settings: Any) -> Detector:
    torch.manual_seed(0)
    spec = DetectorSpec(**SMALL | settings)
    model = build_detector(spec, num_classes=5).double()
    if spec.norm == "frozen":
        calibrate_norm(model.whole_body(), [torch.randn(2, 3, 64, 96, dtype=torch.float64)])
    return model


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.rand(3, *size, generator=generator, dtype=torch.float64) for size in ((100, 140), (120, 110), (9, 80))
    ]


def targets() -> list[dict[str, Tensor]]:
    return [{"boxes": target["boxes"].double(), "labels": target["labels"]} for target in TARGETS]


def losses(model: Detector) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
    model.train()
    found = model(images(), targets())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(sum(found.values()), trained, materialize_grads=True)
    return found, list(gradients), model.training_counts()


SETTINGS = [
    pytest.param({}, id="default"),
    pytest.param({"class_loss": "focal", "box_loss": "giou"}, id="focal and giou"),
    pytest.param({"class_weights": (1.0, 2.0, 3.0, 0.5, 0.7)}, id="class weights", marks=pytest.mark.slow),
    pytest.param(C4, id="c4", marks=pytest.mark.slow),
    pytest.param({"layout": "dc5", "anchor_sizes": (16, 32, 64)}, id="dc5", marks=pytest.mark.slow),
    pytest.param({"norm": "batch"}, id="batch norm", marks=pytest.mark.slow),
    pytest.param(
        {"roi_aligned": True, "anchor_stride": "nominal", "rpn_rank_by": "logit"}, id="aligned", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_losses_and_gradients_are_those_of_the_usual_path(settings: dict[str, Any], pad: Pad) -> None:
    """In float64 both agree to rounding, but for objectness, which the usual path rounds to float32 in between."""
    model = detector(**ALL | settings)
    pad(False)
    expected = losses(model)
    pad(True)
    found = losses(model)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-7, check_dtype=False)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2], expected[2])
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight *= 1.01
    changed = losses(model)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(changed[0], expected[0], rtol=1e-6, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"box_min_size": 0.0, "rpn_min_size": 3.0},
        {"rpn_score_thresh": 0.5, "box_nms_thresh": 0.3, "box_detections_per_img": 7},
        {"layout": "dc5", "anchor_sizes": (16, 32, 64)},
        {"box_score_thresh": 0.0, "box_detections_per_img": 1000},
    ],
    ids=lambda settings: "-".join(map(str, settings)) or "default",
)
def test_detections_are_those_of_the_usual_path(settings: dict[str, Any], pad: Pad) -> None:
    """No scores tie here, whose order would be free."""
    model = detector(**{"box_score_thresh": 0.19} | settings).eval()
    with torch.no_grad():
        pad(False)
        expected = model(images()[:2])
        pad(True)
        found = model(images()[:2])
        assert sum(len(one["scores"]) for one in expected) > 10
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, dict(other), rtol=1e-6, atol=1e-6)
        model.roi_heads.box_predictor.bbox_pred.bias += 0.01
        changed = model(images()[:2])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(changed[0], dict(expected[0]), rtol=1e-6, atol=1e-6)


def test_a_batch_trains_on_the_samples_of_its_images_whatever_their_company(pad: Pad) -> None:
    """A batch of three and the same images one by one draw the same anchors and proposals from the images' seeds."""
    pad(True)
    model = detector(box_batch_size_per_image=32).train()  # as many as each image has
    pictures = torch.rand(3, 3, 60, 80, dtype=torch.float64)  # of one size, so that none is padded
    drawn = []
    for parts in ([[0, 1, 2]], [[0], [1], [2]], [[0, 1], [2]]):
        counts, total = [], 0.0
        for part in parts:
            with image_seeds(model, [7 + index for index in part]):
                found = model([pictures[index] for index in part], [targets()[index] for index in part])
            counts.append(model.rpn.fg_bg_sampler.num_positives)
            total += sum(found.values()).item() * len(part) / 3
        drawn.append((torch.cat(counts).tolist(), total))
    assert drawn[0][0] == drawn[1][0] == drawn[2][0]
    assert drawn[1][1] == pytest.approx(drawn[0][1], rel=1e-6)
    assert drawn[2][1] == pytest.approx(drawn[0][1], rel=1e-6)
    model(list(pictures), targets())  # without seeds others are drawn
    assert sum(model(list(pictures), targets()).values()).item() != pytest.approx(drawn[0][1], rel=1e-6)


@pytest.mark.parametrize("num_positives", [0, 3, 100])
@pytest.mark.parametrize("num_negatives", [0, 5, 400])
def test_draw_takes_as_many_as_the_sampler(num_positives: int, num_negatives: int) -> None:
    status = torch.full((2, 600), -1)
    status[:, :num_positives] = 1
    status[1, 150 : 150 + num_negatives] = 0
    keys = random_keys([3, 4], status.shape, status.device)
    drawn = draw(status, keys, 64, 0.25)
    positive = min(num_positives, 16)
    assert drawn.positive.sum(dim=1).tolist() == [positive, positive]
    assert drawn.used.sum(dim=1).tolist() == [positive, positive + min(num_negatives, 64 - positive)]
    taken = status.gather(1, drawn.rows)
    assert (taken[drawn.positive] == 1).all()
    assert (taken[drawn.used & ~drawn.positive] == 0).all()
    for rows, used in zip(drawn.rows, drawn.used, strict=True):
        assert len(rows[used].unique()) == used.sum()  # none twice


def test_random_keys_are_uniform_and_follow_from_the_seed_alone() -> None:
    shape = torch.Size((2, 100_000))
    keys = random_keys([1, 2], shape, torch.device("cpu"))
    assert keys.min() >= 0
    assert len(keys.unique()) == keys.numel()
    assert torch.equal(keys[1:], random_keys([2], torch.Size((1, 100_000)), torch.device("cpu")))
    uniform = keys.double() / 2**63
    # Of 100,000 uniform numbers the mean scatters by 0.0009, a tenth of them by 95 around 10,000.
    assert (uniform.mean(dim=1) - 0.5).abs().max() < 0.005
    tenths = torch.histc(uniform[0].float(), bins=10, min=0, max=1)
    assert (tenths - 10_000).abs().max() < 500
    # Neighbours, and the same place of two seeds, do not go together: correlations scatter by 0.003.
    rows = torch.stack([uniform[0, 1:], uniform[0, :-1], uniform[1, 1:]])
    assert (torch.corrcoef(rows) - torch.eye(3)).abs().max() < 0.02


def test_padding_normalises_and_resizes_as_forward_does() -> None:
    transform = SeededTransform((64, 96), 120, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]).eval()
    pictures = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((50, 80), (96, 96), (7, 100))]
    expected, _ = transform([picture.float() / 255 for picture in pictures])
    batch, sizes = transform.pad(pictures, torch.device("cpu"))
    assert sizes == expected.image_sizes
    torch.testing.assert_close(batch, expected.tensors, rtol=1e-5, atol=2e-6)  # float32, scaled before or after
    assert batch.is_contiguous(memory_format=torch.channels_last)
    again, _ = transform.pad([picture.float() / 255 for picture in pictures], torch.device("cpu"))
    torch.testing.assert_close(again, expected.tensors, rtol=1e-5, atol=2e-6)
    assert not torch.equal(transform.pad([255 - pictures[0]], torch.device("cpu"))[0], batch[:1])


def test_bad_input_is_refused_before_anything_is_computed(pad: Pad) -> None:
    pad(True)
    model = detector().train()
    flat = targets()
    flat[1]["boxes"][0] = torch.tensor([5.0, 5, 5, 90])
    with pytest.raises(
        UserError, match=r"targets\[1\]: boxes must have positive width and height, got \[5.0, 5.0, 5.0"
    ):
        model(images(), flat)
    with pytest.raises(
        UserError, match=r"targets\[0\]: boxes must be \[N, 4\] and labels \[N\], got \[2, 3\] and \[2\]"
    ):
        model(images(), [{"boxes": torch.ones(2, 3), "labels": torch.ones(2)}, *targets()[1:]])
    with pytest.raises(UserError, match=r"images\[1\]: must be \[3, H, W\], got \[1, 5, 6\]"):
        model([images()[0], torch.zeros(1, 5, 6)], targets()[:2])
    broken = images()
    broken[2][0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"images\[2\]: pixels must be finite"):
        model(broken, targets())
    with pytest.raises(AssertionError, match="targets should not be none"):
        model(images())


def test_a_hook_on_a_part_sees_the_usual_path(pad: Pad) -> None:
    pad(True)
    model = detector().eval()
    seen: list[int] = []
    model.rpn.register_forward_hook(lambda _module, _inputs, outputs: seen.append(len(outputs[0])))
    with torch.no_grad():
        model(images())
    assert seen == [3]


def test_send_leaves_what_is_there() -> None:
    tensor = torch.ones(2)
    assert send(tensor, torch.device("cpu")) is tensor
    assert send(tensor, torch.device("meta")).device.type == "meta"
