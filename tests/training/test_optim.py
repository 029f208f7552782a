"""The learning rate as a function of the step, and what the optimizer decays."""

import pytest
import torch
from torch import nn

from resdet.training.optim import build_optimizer, lr_factor, scale_lr
from resdet.training.step import add_up


def factor(step: int, **changes: object) -> float:
    settings = {
        "num_steps": 90_000,
        "warmup_steps": 1000,
        "warmup_factor": 0.001,
        "schedule": "multistep",
        "milestones": (0.66667, 0.88889),
        "gamma": 0.1,
    }
    return lr_factor(step, **(settings | changes))  # type: ignore[arg-type]


def test_warmup_rises_linearly_and_ends_at_the_full_rate() -> None:
    assert factor(0) == 0.001
    assert factor(500) == pytest.approx(0.5005)
    assert factor(999) < 1
    assert factor(1000) == 1
    assert factor(0, warmup_steps=0) == 1


def test_multistep_drops_where_the_1x_recipe_drops() -> None:
    assert [factor(step) for step in (59_999, 60_000, 79_999, 80_000)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_cosine_falls_from_one_to_zero() -> None:
    values = [factor(step, schedule="cosine", warmup_steps=0, num_steps=10) for step in range(11)]
    assert values[0] == 1
    assert values[5] == pytest.approx(0.5)
    assert values[10] == pytest.approx(0)
    assert values == sorted(values, reverse=True)


def test_constant_stays() -> None:
    assert factor(89_999, schedule="constant") == 1


def test_rate_scales_with_the_batch() -> None:
    assert scale_lr(0.02, batch_size=2, lr_batch_size=16) == pytest.approx(0.0025)
    assert scale_lr(0.02, batch_size=2, lr_batch_size=None) == 0.02


def test_norms_have_their_own_decay_and_frozen_parameters_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1))
    model[3].requires_grad_(False)
    optimizer = build_optimizer(model, name="sgd", lr=0.1, weight_decay=0.5, norm_weight_decay=0.25)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay.get(id(p)) for p in model.parameters()] == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, None, None]


def test_the_body_has_its_own_rate() -> None:
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8))
    model.backbone.fpn = nn.Conv2d(8, 8, 1)
    optimizer = build_optimizer(model, name="adamw", lr=0.1, norm_weight_decay=0.25, body_lr_factor=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in model.parameters()] == [0.05, 0.05, 0.05, 0.05, 0.1, 0.1]
    assert all(group["lr"] == 0.1 * group["lr_factor"] for group in optimizer.param_groups)
    alike = build_optimizer(model, name="adamw", lr=0.1, norm_weight_decay=0.25)
    assert len(alike.param_groups) == 2  # as checkpoints without the factor have them


def test_a_position_moves_the_schedule_and_leaves_the_warmup() -> None:
    at = {"num_steps": 100, "warmup_factor": 0.0, "schedule": "cosine"}
    assert factor(10, position=50, warmup_steps=0, **at) == pytest.approx(0.5)
    assert factor(10, position=50, warmup_steps=20, **at) == pytest.approx(0.25)
    assert factor(50, warmup_steps=0, **at) == factor(10, position=50, warmup_steps=0, **at)


def test_adamw_by_name() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), name="adamw", lr=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)


def test_sums_by_name_are_those_of_each_name_alone() -> None:
    """Bit for bit, also where a resumed run's sums lack a name or have it at another place."""
    torch.manual_seed(0)
    sums: dict[str, torch.Tensor] = {}
    apart = {"loss": torch.zeros(()), "norm": torch.zeros(())}
    for _ in range(5):
        values = {name: torch.randn(()) for name in apart}
        sums = add_up(sums, values)
        apart = {name: apart[name] + values[name] for name in apart}
    assert all(torch.equal(sums[name], apart[name]) for name in apart)
    before = {"norm": torch.tensor(3.0), "loss": torch.tensor(5.0)}
    after = add_up(before, {name: torch.tensor(1.0) for name in ("loss", "norm", "new")})
    assert {name: value.item() for name, value in after.items()} == {"loss": 6, "norm": 4, "new": 1}
    assert before["norm"].item() == 3, "what is summed is not written to"
