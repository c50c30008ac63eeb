"""Schedules against torch's own, groups by the rule in words, AdamW, also with what is stored in bf16, and clipping
against their formulas."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from moma import checkpoint
from moma.memory import step_memory
from moma.meter import Duration, Meter
from moma.optim import (
    OptimConfig,
    _update_,
    build_optimizer,
    check_accumulation,
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
        (
            {"betas": (0.9, 0.999), "state_dtype": "bf16"},
            r"got state_dtype=bf16 with betas=\(0.9, 0.999\), need both at most 0.96, .*: lower optim.betas, or set",
        ),
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


STORED = [
    {"state_dtype": "bf16"},
    {"grad_dtype": "bf16"},
    {"state_dtype": "bf16", "grad_dtype": "bf16"},
]


@pytest.mark.parametrize("stored", [{}, *STORED])
def test_a_skipped_step_changes_no_bit(stored: dict) -> None:
    toys = [Toy(), Toy()]
    toys[1].load_state_dict(toys[0].state_dict())
    optimizers = [build_optimizer(toy.named_parameters(), OptimConfig(lr=1e-2, **stored)) for toy in toys]
    for number in range(4):
        bad = number in (0, 2)  # the very first one too, which makes the state
        for toy, optimizer in zip(toys, optimizers, strict=True):
            if bad and toy is toys[0]:
                continue
            for parameter in toy.parameters():
                parameter.grad = torch.full_like(
                    parameter, math.nan if bad else 0.3 + number, dtype=parameter.grad_dtype
                )
            step_(optimizer, torch.tensor(bad))
    for one, two in zip(*(toy.parameters() for toy in toys), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(*(optimizer.state.values() for optimizer in optimizers), strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert {state["step"].item() for state in optimizers[1].state.values()} == {2.0}


def nearest(stored: float, exact: float, low: bool) -> bool:
    """Whether `stored` is `exact` rounded to the 8 significant bits of bf16, or else to fp32."""
    half = 2.0 ** (math.frexp(exact)[1] - 9) if low else 0.0
    return abs(stored - exact) <= half * (1 + 1e-3) + 2e-6 * abs(exact)


@pytest.mark.parametrize("stored", STORED)
def test_reduced_steps_equal_plain_loops_in_float64(stored: dict) -> None:
    torch.manual_seed(3)
    toy, config = Toy(), OptimConfig(**stored)
    optimizer = build_optimizer(toy.named_parameters(), config)
    trained = {name: p for name, p in toy.named_parameters() if p.requires_grad}
    numbers = lambda *tensors: zip(*(t.detach().double().flatten().tolist() for t in tensors), strict=True)  # noqa: E731
    for step in range(1, 8):
        lr = 1e-2 / step
        set_learning_rate(optimizer, lr)
        before: dict[str, list[tuple[float, ...]]] = {}
        for name, p in trained.items():
            p.grad = None
            given = torch.randn_like(p) * 10.0 ** (step % 5 - 3)
            (p * given).sum().backward()
            assert p.grad is not None
            low = "grad_dtype" in stored and "norm" not in name
            assert p.grad.dtype == (torch.bfloat16 if low else torch.float32)
            assert all(nearest(have, exact, low) for have, exact in numbers(p.grad, given))
            state = optimizer.state[p]
            before[name] = list(numbers(p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
        step_(optimizer, torch.tensor(False))
        for name, p in trained.items():
            low, state = "state_dtype" in stored and "norm" not in name, optimizer.state[p]
            assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16 if low else torch.float32}
            decay = 0.1 if name in ("embedding.weight", "experts", "linear.weight") else 0.0
            after = numbers(p, state["exp_avg"], state["exp_avg_sq"])
            for (old, g, m, v), (new, mean, square) in zip(before[name], after, strict=True):
                m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
                assert nearest(mean, m, low) and nearest(square, v, low)
                change = lr * m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.95**step)) + 1e-8)
                assert new == pytest.approx(old - lr * decay * old - change, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", ["constant", "normal", "rare", "fading"])
def test_moments_in_bf16_stay_within_their_bounds(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(400, 500, generator=generator)
    steps = torch.arange(400.0)[:, None]
    grads = {
        "constant": drawn[:1].expand(400, -1),
        "normal": drawn,
        "rare": drawn * (torch.rand(400, 500, generator=generator) < 0.02),
        "fading": drawn * 0.98**steps,
    }[kind]
    scalars = (torch.tensor(False), torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0), 0.9, 0.95, 1e-8)
    mean, square = torch.zeros(500, dtype=torch.bfloat16), torch.zeros(500, dtype=torch.bfloat16)
    exact, low, high, largest = (torch.zeros(500, dtype=torch.float64) for _ in range(4))
    m = torch.zeros(500, dtype=torch.float64)
    u, ratios = 2.0**-8 * 1.001, []
    for g in grads:
        _update_(torch.zeros(500), g, mean, square, *scalars)
        m = 0.9 * m + 0.1 * g.double()
        largest = torch.maximum(largest, torch.maximum(m.abs(), mean.double().abs()))
        exact, low, high = (
            (0.95 * v + 0.05 * g.double().square()) * (1 + d) for v, d in ((exact, 0.0), (low, -u), (high, u))
        )
        assert ((low <= square) & (square <= high)).all()
        assert ((mean.double() - m).abs() <= 0.039 * largest * 1.01 + 1e-30).all()
        ratios.append(square.double() / exact)
    late = torch.stack(ratios[100:])
    late = late[late.isfinite()]
    assert late.min() > 0.9 and late.max() < 1.1
    if kind != "constant":  # there, each stops on its way up when less than half a unit is missing
        assert late.mean() == pytest.approx(1, abs=0.004)


def test_bf16_gradients_are_for_one_micro_batch_and_whole_parameters(tmp_path: Path) -> None:
    config = OptimConfig(grad_dtype="bf16")
    check_accumulation(config, 1)
    check_accumulation(OptimConfig(), 4)
    with pytest.raises(ValueError, match="got grad_dtype=bf16 with 4 micro-batches per step and process, need 1"):
        check_accumulation(config, 4)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shared = nn.Parameter(DTensor.from_local(torch.zeros(2, 2), mesh, [Replicate()]))
        with pytest.raises(ValueError, match="got grad_dtype=bf16 with parameters that are shared out among processes"):
            build_optimizer([("weight", shared)], config)
        optimizer = build_optimizer([("weight", shared)], OptimConfig(state_dtype="bf16"))
        shared.grad = DTensor.from_local(torch.ones(2, 2), mesh, [Replicate()])
        step_(optimizer, torch.tensor(False))
        assert shared.to_local().tolist() == [[pytest.approx(-1e-4)] * 2] * 2
    finally:
        dist.destroy_process_group()


def test_bf16_states_are_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    def start() -> tuple[Toy, torch.optim.AdamW, dict[str, dict[str, Tensor]]]:
        torch.manual_seed(5)
        toy = Toy()
        optimizer = build_optimizer(toy.named_parameters(), OptimConfig(lr=1e-2, state_dtype="bf16", grad_dtype="bf16"))
        return (
            toy,
            optimizer,
            {"model": checkpoint.model_state(toy), "optimizer": checkpoint.optimizer_state(toy, optimizer)},
        )

    def steps(toy: Toy, optimizer: torch.optim.AdamW, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            loss = sum(((p + number) ** 2).sum() for p in toy.parameters() if p.requires_grad)
            assert isinstance(loss, Tensor)
            loss.backward()
            step_(optimizer, torch.tensor(False))

    toy, optimizer, state = start()
    steps(toy, optimizer, range(2))
    path = checkpoint.save(tmp_path, 2, state, {}, keep_last=1)
    steps(toy, optimizer, range(2, 4))
    other, resumed, again = start()
    checkpoint.load(path, again)
    steps(other, resumed, range(2, 4))
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, again["model"][name]), name
    for name, tensor in state["optimizer"].items():
        assert tensor.dtype == again["optimizer"][name].dtype and torch.equal(tensor, again["optimizer"][name]), name
    assert state["optimizer"]["state.experts.exp_avg"].dtype == torch.bfloat16


def test_low_gradients_are_clipped_by_a_norm_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    low = [nn.Parameter(torch.zeros(64, 64)) for _ in range(3)]
    wide = nn.Parameter(torch.zeros(9))
    for parameter in low:
        parameter.grad_dtype = torch.bfloat16
        parameter.grad = torch.randn(64, 64, generator=generator).bfloat16()
    wide.grad = torch.ones(9)
    gradients = lambda: torch.cat([p.grad.double().flatten() for p in (*low, wide) if p.grad is not None])  # noqa: E731
    before = gradients().norm()
    norm = clip_([*low, wide], 1.0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(before.item(), rel=1e-6)
    assert gradients().norm().item() == pytest.approx(1, rel=2**-8)


@torch.no_grad()
def test_the_compiled_update_is_one_graph_for_every_length() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(_update_, fullgraph=True, dynamic=True, backend=backend)
    for size, skip, lr in ((300, False, 1e-2), (5000, True, 1e-2), (70, False, 2e-2)):
        torch.manual_seed(size)
        stored = torch.randn(size), *(torch.rand(size).bfloat16() for _ in range(3))
        copies = [tensor.clone() for tensor in stored]
        scalars = (torch.tensor(skip), torch.tensor(1 - lr / 10), torch.tensor(lr), torch.tensor(0.5), 0.9, 0.95, 1e-8)
        _update_(*stored, *scalars)
        compiled(*copies, *scalars)
        assert all(torch.equal(one, two) for one, two in zip(stored, copies, strict=True))
    assert len(graphs) == 1


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


def test_the_memory_estimate_knows_what_is_stored(make_model: Callable, variants: dict) -> None:
    model = make_model(variants["moe_4t4i"], dtype=torch.float32)
    given = (model, variants["moe_4t4i"].vocabulary, 3, 25, 3, "fp32")
    plain, low = step_memory(*given), step_memory(*given, state_dtype="bf16", grad_dtype="bf16")
    config = OptimConfig(state_dtype="bf16", grad_dtype="bf16")
    optimizer = build_optimizer(model.named_parameters(), config)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert low["optimizer"] == sum(tensor.nbytes for tensor in moments) < 0.6 * plain["optimizer"]
    assert low["gradients"] == sum(p.numel() * p.grad_dtype.itemsize for p in model.parameters())
    assert plain["peak"] - low["peak"] >= plain["optimizer"] - low["optimizer"]
