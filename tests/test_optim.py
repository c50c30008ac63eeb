"""Schedules against torch's own, groups by the rule in words, AdamW and clipping against their formulas."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from moma.meter import Duration, Meter
from moma.optim import (
    OptimConfig,
    build_optimizer,
    clip_,
    learning_rate,
    norms_by_part,
    parameter_groups,
    part_of,
    set_learning_rate,
    step_,
)

WARMUP, TOTAL = 5, 25
CONFIG = {"lr": 1e-2, "end_lr": 1e-3, "warmup": Duration(steps=WARMUP)}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_equal_torch(schedule: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    tail = {
        "linear": LinearLR(optimizer, 1.0, 0.1, TOTAL - WARMUP),
        "cosine": CosineAnnealingLR(optimizer, TOTAL - WARMUP, 1e-3),
    }
    warm = LinearLR(optimizer, 1 / WARMUP, 1.0, WARMUP - 1)
    scheduler = SequentialLR(optimizer, [warm, tail[schedule]], [WARMUP])
    config = OptimConfig(schedule=schedule, **CONFIG)  # type: ignore[arg-type]
    for step in range(TOTAL + 1):
        assert learning_rate(step, TOTAL, config) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_wsd_and_constant_closed_forms() -> None:
    wsd = OptimConfig(schedule="wsd", decay=Duration(percent=20), **CONFIG)  # the last 5 of 25 steps
    rates = [learning_rate(step, TOTAL, wsd) for step in range(TOTAL + 1)]
    assert rates[:WARMUP] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2])
    assert rates[WARMUP:21] == [1e-2] * 16
    assert rates[20:] == pytest.approx([1e-2 - 9e-3 * k / 5 for k in range(6)])
    constant = OptimConfig(schedule="constant", **CONFIG)
    assert {learning_rate(step, TOTAL, constant) for step in range(WARMUP - 1, TOTAL + 9)} == {1e-2}
    assert learning_rate(TOTAL + 100, TOTAL, wsd) == 1e-3


def test_warmup_in_tokens() -> None:
    config = OptimConfig(lr=1.0, warmup=Duration(tokens=400))
    assert learning_rate(0, 100, config, tokens_per_step=100) == 0.25
    with pytest.raises(ValueError, match="got a duration in tokens or flops without tokens per step, need it"):
        learning_rate(0, 100, config)


def test_overlap_is_an_error() -> None:
    config = OptimConfig(schedule="wsd", warmup=Duration(percent=90))
    with pytest.raises(ValueError, match="got a warm-up of 90 and a decay of 20 steps, need at most 100 together"):
        learning_rate(0, 100, config)
    with pytest.raises(ValueError, match="got a warm-up of 4000 and a decay of 0 steps, need at most 100"):
        learning_rate(0, 100, OptimConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 1e-4, "end_lr": 1e-3}, "got lr=0.0001 and end_lr=0.001, need 0 <= end_lr <= lr"),
        ({"clip_norm": 0.0}, "need clip_norm > 0, .*: clip_norm=1e9 turns clipping off"),
        ({"betas": (0.9, 1.0)}, r"got betas=\(0.9, 1.0\), need both in \[0, 1\)"),
    ],
)
def test_config_refuses_nonsense(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**fields)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.experts = nn.Parameter(torch.randn(3, 4, 4))
        self.linear = nn.Linear(4, 4)
        self.q_norm = nn.Parameter(torch.ones(2, 4))  # QK-norm, one weight vector per head
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)


def test_matrices_decay_norms_and_biases_do_not() -> None:
    toy = Toy()
    decayed, free = parameter_groups(toy.named_parameters(), OptimConfig())
    assert {id(p) for p in decayed["params"]} == {
        id(toy.embedding.weight),
        id(toy.experts),
        id(toy.linear.weight),
    }
    assert {id(p) for p in free["params"]} == {id(toy.linear.bias), id(toy.q_norm)}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    with pytest.raises(ValueError, match="got a model without trainable parameters, need at least one"):
        parameter_groups([("frozen", toy.frozen)], OptimConfig())


def test_one_adamw_step_equals_the_formula() -> None:
    toy = Toy().double()
    config = OptimConfig(lr=1e-2)
    optimizer = build_optimizer(toy.named_parameters(), config)
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    loss = sum(((p + 0.3) ** 2).sum() for p in toy.parameters() if p.requires_grad)
    loss.backward()
    set_learning_rate(optimizer, 5e-3)
    optimizer.step()
    for name, parameter in toy.named_parameters():
        old = before[name]
        expected = old
        if parameter.requires_grad:
            decay = 0.1 if name in ("embedding.weight", "experts", "linear.weight") else 0.0
            grad = 2 * (old + 0.3)  # after one step both bias-corrected moments are the gradient and its square
            expected = old * (1 - 5e-3 * decay) - 5e-3 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_clip_returns_the_norm_before_and_scales_to_the_limit() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 4))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    norm = clip_(parameters, 1.0)
    assert isinstance(norm, torch.Tensor) and norm.item() == pytest.approx(math.sqrt(19))
    after = math.sqrt(sum(p.grad.square().sum().item() for p in parameters if p.grad is not None))
    assert after == pytest.approx(1.0, rel=1e-5)
    assert clip_(parameters, 10.0).item() == pytest.approx(1.0, rel=1e-5)


def test_a_skipped_step_changes_no_bit() -> None:
    toys = [Toy(), Toy()]
    toys[1].load_state_dict(toys[0].state_dict())
    optimizers = [build_optimizer(toy.named_parameters(), OptimConfig(lr=1e-2)) for toy in toys]
    for number in range(4):
        bad = number in (0, 2)  # the very first one too, which makes the state
        for toy, optimizer in zip(toys, optimizers, strict=True):
            if bad and toy is toys[0]:
                continue
            for parameter in toy.parameters():
                parameter.grad = torch.full_like(parameter, math.nan if bad else 0.3 + number)
            step_(optimizer, torch.tensor(bad))
    for one, two in zip(*(toy.parameters() for toy in toys), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(*(optimizer.state.values() for optimizer in optimizers), strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert {state["step"].item() for state in optimizers[1].state.values()} == {2.0}


def test_norms_by_part_add_up_to_the_norm() -> None:
    toy = Toy()
    for parameter in toy.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    squares = norms_by_part(toy.named_parameters(), 1, 1)
    assert set(squares) == {"embedding", "experts", "linear", "norms"}
    whole = clip_(toy.parameters(), 1e9)
    torch.testing.assert_close(torch.stack(list(squares.values())).sum().sqrt(), whole)
    halves = norms_by_part(toy.named_parameters(), 2, 1)  # of copies, every process counts its share
    assert all(halves[name] * 2 == square for name, square in squares.items())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("embedding.weight", "embedding"),
        ("blocks.3.attention.wq.weight", "attention"),
        ("blocks.3.attention.q_norm.weight", "norms"),
        ("blocks.3.feed_forward.experts.0.w13", "feed_forward"),
        ("blocks.3.feed_forward.router", "routers"),
        ("blocks.3.depth_router", "routers"),
        ("blocks.3.feed_forward.aux.1.w2", "aux_routers"),
        ("norm.weight", "norms"),
        ("head.weight", "head"),
    ],
)
def test_parts_by_name(name: str, part: str) -> None:
    assert part_of(name) == part


def test_durations() -> None:
    assert Duration(steps=7).to_steps() == 7
    assert Duration(percent=5).to_steps(total_steps=100) == 5
    assert Duration(tokens=1e3).to_steps(tokens_per_step=300) == 4
    assert Duration(flops=1e12).to_steps(tokens_per_step=1000, flops_per_token=1e7) == 100
    with pytest.raises(ValueError, match=r"got a duration with \['steps', 'tokens'\], need exactly one of steps"):
        Duration(steps=1, tokens=1)
    with pytest.raises(ValueError, match="got a duration with no unit, need exactly one"):
        Duration()
    with pytest.raises(ValueError, match="got a duration of 101 percent, need at most 100"):
        Duration(percent=101)
    with pytest.raises(ValueError, match=r"need a finite number >= 0"):
        Duration(steps=-1)


def test_meter_survives_a_restart_and_books_every_second_once() -> None:
    now = [0.0]

    def spend(meter: Meter, kind: str, seconds: float) -> None:
        with meter.time(kind):
            now[0] += seconds

    meter = Meter(peak_flops=1e3, convention="causal", clock=lambda: now[0])
    with meter.time("train"):
        now[0] += 3
        spend(meter, "data_wait", 1)
    spend(meter, "eval", 10)
    meter.add(tokens=400, flops=2000.0)
    rates = meter.rates()  # four seconds of training and waiting; the evaluation is left out
    assert rates["tokens_per_second"] == pytest.approx(100)
    assert rates["data_wait_s"] == 1 and rates["mfu_causal"] == pytest.approx(0.5)
    again = Meter(state=meter.state(), clock=lambda: now[0])
    spend(again, "train", 2)
    again.add(tokens=100, flops=1.0)
    assert again.rates() == {
        "tokens": 500,
        "flops": 2001.0,
        "tokens_per_second": pytest.approx(50),
        "data_wait_s": 0,
    }
    assert again.seconds() == {
        "time/train_s": 5,
        "time/eval_s": 10,
        "time/data_wait_s": 1,
        "time/compile_s": 0,
        "time/checkpoint_s": 0,
    }
    with pytest.raises(ValueError, match="got the kind of time 'sleep', need one of train, eval"):
        spend(again, "sleep", 1)
