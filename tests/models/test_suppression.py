import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from resdet.models.suppression import soft_nms, suppress, vote


def random_candidates(num: int, num_groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes in clusters, so that many overlap; float64, so that a reference can be held to 1e-12."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(num // 8 + 1, 2, generator=generator, dtype=torch.float64) * 100
    corner = centers[torch.randint(len(centers), (num,), generator=generator)]
    corner = corner + torch.rand(num, 2, generator=generator, dtype=torch.float64) * 10
    size = 10 + 20 * torch.rand(num, 2, generator=generator, dtype=torch.float64)
    scores = torch.rand(num, generator=generator, dtype=torch.float64)
    groups = torch.randint(num_groups, (num,), generator=generator) * 3 + 1
    return torch.cat([corner, corner + size], dim=1), scores, groups


def reference_soft_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, *, decay, iou_threshold, sigma, score_threshold, limit
) -> tuple[list[int], list[float]]:
    """Figure 2 of the paper as it stands there, one group after another."""
    iou = box_iou(boxes, boxes).numpy()
    kept: list[tuple[float, int]] = []
    for group in groups.unique().tolist():
        left = {i: float(scores[i]) for i in np.flatnonzero(groups.numpy() == group).tolist()}
        while left:
            best = max(left, key=left.__getitem__)
            score = left.pop(best)
            if score < score_threshold:
                break
            kept.append((score, best))
            for i in left:
                overlap = iou[best, i]
                if decay == "gaussian":
                    left[i] *= np.exp(-(overlap**2) / sigma)
                elif overlap >= iou_threshold:
                    left[i] *= 1 - overlap
    kept.sort(key=lambda item: -item[0])
    return [i for _, i in kept[:limit]], [score for score, _ in kept[:limit]]


SETTINGS = {"iou_threshold": 0.3, "sigma": 0.5, "score_threshold": 0.001, "limit": 1000}


def assert_equals_reference(candidates: tuple[Tensor, Tensor, Tensor], **settings) -> None:
    kept, scores = soft_nms(*candidates, **SETTINGS | settings)
    expected, expected_scores = reference_soft_nms(*candidates, **SETTINGS | settings)
    assert kept.tolist() == expected
    # float64; the IoU is computed in another order of operations.
    np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=0, atol=1e-12)
    assert (scores.diff() <= 0).all()


@pytest.mark.parametrize("decay", ["linear", "gaussian"])
@pytest.mark.parametrize(
    ("num", "num_groups", "changes"),
    [
        (200, 1, {}),
        (200, 5, {}),
        (200, 150, {}),
        (200, 5, {"limit": 20}),
        (200, 2, {"score_threshold": 0.3}),
        (200, 2, {"iou_threshold": 0.6, "sigma": 0.1}),
        (1, 1, {}),
    ],
)
def test_soft_nms_is_the_papers_loop(decay, num, num_groups, changes):
    for seed in range(3):
        assert_equals_reference(random_candidates(num, num_groups, seed), decay=decay, **changes)


@pytest.mark.parametrize(("decay", "change"), [("linear", {"iou_threshold": 0.31}), ("gaussian", {"sigma": 0.51})])
def test_the_comparison_notices_another_parameter(decay, change):
    candidates = random_candidates(200, 5)
    kept, scores = soft_nms(*candidates, decay=decay, **SETTINGS | change)
    _, expected = reference_soft_nms(*candidates, decay=decay, **SETTINGS)
    assert len(scores) != len(expected) or np.abs(scores.numpy() - expected).max() > 1e-4
    assert len(kept) == len(scores)


def test_soft_nms_of_boxes_apart_changes_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    scores = torch.tensor([0.2, 0.9, 0.5])
    for decay in ("linear", "gaussian"):
        kept, left = soft_nms(boxes, scores, torch.zeros(3).long(), decay=decay, **SETTINGS)
        assert kept.tolist() == [1, 2, 0]
        assert torch.equal(left, scores[kept])


def test_soft_nms_with_decay_to_nothing_is_nms():
    """A Gaussian so narrow that every box with an IoU above 0 falls below the threshold."""
    boxes, scores, groups = random_candidates(100, 3)
    kept, _ = soft_nms(boxes, scores, groups, decay="gaussian", **SETTINGS | {"sigma": 1e-9, "score_threshold": 1e-6})
    assert kept.tolist() == batched_nms(boxes, scores, groups, 1e-4).tolist()


def test_soft_nms_of_nothing_and_of_boxes_without_extent():
    none = torch.empty(0, 4), torch.empty(0), torch.empty(0).long()
    kept, scores = soft_nms(*none, decay="linear", **SETTINGS)
    assert (kept.dtype, kept.shape, scores.dtype, scores.shape) == (torch.int64, (0,), torch.float32, (0,))
    points = torch.tensor([[5.0, 5, 5, 5]] * 2), torch.tensor([0.5, 0.25]), torch.ones(2).long()
    for decay in ("linear", "gaussian"):
        kept, scores = soft_nms(*points, decay=decay, **SETTINGS)
        assert kept.tolist() == [0, 1]
        assert scores.tolist() == [0.5, 0.25]
    kept, scores = soft_nms(*points, decay="linear", **SETTINGS | {"score_threshold": 0.6})
    assert kept.shape == scores.shape == (0,)


def hand_made_votes() -> dict[str, Tensor]:
    return {
        "kept_boxes": torch.tensor([[0.0, 0, 10, 10]]),
        "kept_labels": torch.tensor([1]),
        # Itself; IoU 80/120 = 0.67; IoU 90/110 = 0.82 of another class; IoU 40/160 = 0.25.
        "boxes": torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [1, 0, 11, 10], [6, 0, 16, 10]]),
        "scores": torch.tensor([0.9, 0.3, 0.8, 0.7]),
        "labels": torch.tensor([1, 1, 2, 1]),
    }


def test_votes_by_hand():
    case = hand_made_votes()
    moved = (0.9 * 0 + 0.3 * 2) / (0.9 + 0.3)
    expected = torch.tensor([[moved, 0, 10 + moved, 10]])
    torch.testing.assert_close(vote(**case, iou_threshold=0.5), expected)
    # The threshold itself is inside.
    torch.testing.assert_close(vote(**case, iou_threshold=80 / 120 - 1e-7), expected)
    assert torch.equal(vote(**case, iou_threshold=0.7), case["kept_boxes"])
    moved = (0.3 * 2 + 0.7 * 6) / (0.9 + 0.3 + 0.7)
    torch.testing.assert_close(vote(**case, iou_threshold=0.2), torch.tensor([[moved, 0, 10 + moved, 10]]))


@pytest.mark.parametrize(("key", "value"), [("scores", 0.31), ("labels", 2), ("boxes", 2.1)])
def test_one_other_voter_is_noticed(key, value):
    case = hand_made_votes()
    expected = vote(**case, iou_threshold=0.5)
    case[key][1] = value
    with pytest.raises(AssertionError):
        torch.testing.assert_close(vote(**case, iou_threshold=0.5), expected)


def test_without_voters_boxes_stay():
    case = hand_made_votes()
    assert torch.equal(vote(**case | {"labels": case["labels"] + 5}, iou_threshold=0.5), case["kept_boxes"])
    assert torch.equal(vote(**case | {"scores": torch.zeros(4)}, iou_threshold=0.5), case["kept_boxes"])
    nothing = {"kept_boxes": torch.empty(0, 4), "kept_labels": torch.empty(0).long()}
    assert vote(**case | nothing, iou_threshold=0.5).shape == (0, 4)


def test_votes_are_counted_exactly_under_autocast():
    boxes, scores, labels = random_candidates(60, 2)
    boxes, scores = boxes.float() + 800, scores.float()
    arguments = (boxes[:10], labels[:10], boxes, scores, labels)
    expected = vote(*arguments, iou_threshold=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vote(*arguments, iou_threshold=0.5), expected)
        rough = scores[None] @ boxes / scores.sum()
    assert rough.dtype == torch.bfloat16, "a plain product is not exact here"


@pytest.mark.parametrize("sizes", [(1500, 1200), (1500, 30), (1001,), (40, 0)])
def test_suppression_of_many_groups_is_torchvisions(sizes: tuple[int, ...]) -> None:
    """Images above and below the size from which torchvision goes through the groups, and threads here."""
    images = [random_candidates(size, 5, seed) if size else random_candidates(8, 5) for seed, size in enumerate(sizes)]
    images = [tuple(part[:size] for part in image) for image, size in zip(images, sizes, strict=True)]
    boxes, scores, groups = (list(column) for column in zip(*images, strict=True))
    expected = [batched_nms(*image, 0.5) for image in images]
    found = suppress(boxes, scores, groups, 0.5)
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    assert any(0 < len(part) < size for part, size in zip(found, sizes, strict=True))
    changed = [part.clone() for part in groups]
    changed[0][:] = 1
    assert suppress(boxes, scores, changed, 0.5)[0].tolist() != expected[0].tolist()
