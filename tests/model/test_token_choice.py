"""Token choice against loops in plain Python, and against DeepSpeed's top-2 gating."""

import itertools
from fractions import Fraction
from math import ceil

import pytest
import torch

from moma.model.routing.rule import Group
from moma.model.routing.token_choice import (
    RULE,
    TokenChoiceConfig,
    alone,
    capacity,
    choose,
    copies,
    gate,
    needs_noise,
    share,
    update,
)

MASKS = (None, "1101110111", "0000000000")


def made(seed, n_tokens, n_experts, ties=False):
    """Random logits, float64; with ties they are whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    logit_NE = 2 * torch.randn(n_tokens, n_experts, generator=generator, dtype=torch.float64)
    return logit_NE.round() if ties else logit_NE


def gumbel(seed, n_tokens, n_experts):
    uniform = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -(-uniform.log()).log()


def mask(word, n_tokens):
    return None if word is None else torch.tensor([c == "1" for c in word[:n_tokens]], dtype=torch.bool)


def in_loops(config, z, tokens, noise, bias):
    """The rule token by token: choices, kept pairs, gates {(t, e): weight}, losses, load.

    `z`, `noise`: nested lists, of 0-d float64 tensors where gradients are wanted. `tokens`: the valid ones.
    """
    experts, n_tokens = range(len(bias)), max(len(tokens), 1)
    p, choices = {}, {}
    for t in tokens:
        for e in experts:
            if config.scores == "sigmoid":
                p[t, e] = 1 / (1 + torch.exp(-z[t][e]))
            else:
                p[t, e] = torch.exp(z[t][e]) / sum(torch.exp(z[t][i]) for i in experts)
        seen = {e: p[t, e].item() for e in experts}
        ranked = sorted(experts, key=lambda e: (-(seen[e] + bias[e]), e))
        if noise is not None and config.second_choice != "argmax":
            ranked[1:] = sorted(ranked[1:], key=lambda e: (-(z[t][e].item() + noise[t][e]), e))
        choices[t] = ranked[: config.k]

    kept = {(t, e) for t in tokens for e in choices[t]}
    if config.capacity_factor is not None:
        limit = ceil(Fraction(str(config.capacity_factor)) * config.k * len(tokens) / len(bias))
        limit, order = max(limit, config.min_capacity), list(tokens)
        if config.drop == "priority":
            order.sort(key=lambda t: -p[t, choices[t][0]].item())
        if config.drop == "random" and noise is not None:
            order.sort(key=lambda t: -noise[t][choices[t][0]])
        queue = [0 for _ in experts]
        for rank in range(config.k):
            for t in order:
                e = choices[t][rank]
                if queue[e] >= limit:
                    kept.remove((t, e))
                queue[e] += 1

    gates = {}
    for t, e in kept:
        whole = sum(p[t, i] for i in experts if (t, i) in kept)
        gates[t, e] = p[t, e] / whole if config.weights == "renormalised" else p[t, e]

    balance, z_loss, load = torch.zeros(()).double(), torch.zeros(()).double(), []
    counted = 1 if config.balance_counts == "first" else config.k
    for e in experts:
        routed = sum(e in choices[t][:counted] for t in tokens) / (counted * n_tokens)
        mean = sum(p[t, e] / sum(p[t, i] for i in experts) for t in tokens) / n_tokens
        balance = balance + len(bias) * routed * mean
        load.append(sum(e in choices[t] for t in tokens) / (config.k * n_tokens))
    for t in tokens:
        z_loss = z_loss + torch.log(sum(torch.exp(z[t][e]) for e in experts)) ** 2 / n_tokens
    losses = {"balance_loss": config.balance * balance, "router_z_loss": config.z_loss * z_loss}
    return choices, kept, gates, {name: loss for name, loss in losses.items() if loss.item() != 0}, load


def check(config, logit_NE, word=None, noise_NE=None, bias_E=None):
    """Compare decisions, values and gradients with the loops; returns the choice."""
    n_tokens, n_experts = logit_NE.shape
    valid_N, bias_E = mask(word, n_tokens), torch.zeros(n_experts) if bias_E is None else bias_E
    logit_NE, slow_NE = logit_NE.clone().requires_grad_(), logit_NE.clone().requires_grad_()
    if valid_N is not None:  # what stands in empty slots must not matter
        logit_NE = torch.where(valid_N[:, None], logit_NE, torch.inf)
    got = choose(config, logit_NE, Group("all", {"bias": bias_E}, valid_N, noise_NE))
    choices, kept, gates, losses, load = in_loops(
        config,
        [list(row) for row in slow_NE],
        [t for t in range(n_tokens) if valid_N is None or valid_N[t]],
        None if noise_NE is None else noise_NE.tolist(),
        bias_E.double().tolist(),
    )

    def pairs(some_NE):
        assert some_NE.dtype == torch.bool
        return {tuple(pair) for pair in some_NE.nonzero().tolist()}

    assert got.token_EK is None
    assert pairs(got.selected_NE) == kept
    if config.capacity_factor is None:
        assert got.dropped_NE is None and got.bound == n_tokens * config.k
    else:
        assert pairs(got.dropped_NE) == {(t, e) for t in choices for e in choices[t]} - kept
        assert len(kept) <= got.bound <= n_tokens * config.k
    wanted = ("balance_loss", config.balance), ("router_z_loss", config.z_loss)
    assert list(got.losses) == [name for name, coefficient in wanted if coefficient > 0]
    for name, loss in got.losses.items():
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(torch.as_tensor(losses.get(name, 0.0)).item(), rel=1e-12)
    assert list(got.observed) == (["excess"] if config.bias_rate > 0 else [])
    for seen_E in got.observed.values():
        mean = sum(load) / n_experts
        assert seen_E.dtype == torch.float32 and not seen_E.requires_grad
        assert seen_E.tolist() == pytest.approx([own - mean for own in load], abs=1e-7)

    slow_gate_NE = torch.zeros(n_tokens, n_experts, dtype=torch.float64)
    for pair, weight in gates.items():
        slow_gate_NE[pair] = weight
    torch.testing.assert_close(got.gate_NE, slow_gate_NE, rtol=1e-12, atol=0)
    weight_NE = made(99, n_tokens, n_experts)
    slow = (slow_gate_NE * weight_NE).sum() + sum(losses.values()) + 0 * slow_NE.sum()
    fast = (got.gate_NE * weight_NE).sum() + sum(got.losses.values())
    (slow_grad_NE,) = torch.autograd.grad(slow, slow_NE)
    (fast_grad_NE,) = torch.autograd.grad(fast, logit_NE)
    torch.testing.assert_close(fast_grad_NE, slow_grad_NE, rtol=1e-9, atol=1e-12)
    return got


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weights", ["raw", "renormalised"])
@pytest.mark.parametrize("word", MASKS)
def test_dropless_choice_equals_the_loops(k, scores, weights, word):
    config = TokenChoiceConfig(k=k, scores=scores, weights=weights, balance=0.01, z_loss=0.1)
    for ties in (False, True):
        check(config, made(k, 10, 5, ties), word)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("drop", ["position", "random", "priority"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1])
@pytest.mark.parametrize("word", MASKS)
def test_capacity_refuses_what_the_loops_refuse(k, drop, factor, word):
    for seed, weights, scores in (
        (1, "raw", "softmax"),
        (2, "renormalised", "softmax"),
        (3, "renormalised", "sigmoid"),
    ):
        config = TokenChoiceConfig(k=k, scores=scores, weights=weights, capacity_factor=factor, drop=drop, balance=1.0)
        got = check(config, made(seed, 10, 4, ties=drop != "priority"), word, gumbel(seed, 10, 4))
        assert got.dropped_NE.any() or factor > 0.5 or word == MASKS[2]


@pytest.mark.parametrize("second_choice", ["gumbel", "gumbel_always"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("word", MASKS)
def test_drawn_choices_follow_the_noise(second_choice, k, word):
    config = TokenChoiceConfig(
        k=k, second_choice=second_choice, weights="renormalised", capacity_factor=1.0, drop="random", balance=0.1
    )
    check(config, made(3, 10, 4, ties=True), word, gumbel(5, 10, 4))
    check(config, made(3, 10, 4, ties=True), word)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("word", MASKS)
def test_bias_moves_the_choice_and_not_the_weights(k, scores, word):
    config = TokenChoiceConfig(k=k, scores=scores, bias_rate=0.1, balance=0.1, balance_counts="all")
    bias_E = torch.tensor([0.0, -2.0, 0.3, 0.1])
    got = check(config, made(7, 10, 4), word, bias_E=bias_E)
    assert not got.selected_NE[:, 1].any()
    if word is None:
        assert not torch.equal(got.selected_NE, check(config, made(7, 10, 4)).selected_NE)


@pytest.mark.parametrize("n_tokens", [0, 1])
@pytest.mark.parametrize("factor", [None, 0.5, 1.5])
@pytest.mark.parametrize("padded", [False, True])
def test_groups_of_no_token_and_of_one(n_tokens, factor, padded):
    for drop, noise_NE in itertools.product(("position", "random", "priority"), (None, gumbel(1, n_tokens, 3))):
        config = TokenChoiceConfig(
            k=2, weights="renormalised", capacity_factor=factor, drop=drop, balance=1.0, z_loss=1.0, bias_rate=0.1
        )
        check(config, made(0, n_tokens, 3), "1" if padded else None, noise_NE)


def test_token_that_lost_all_weighs_nothing():
    logit_NE = torch.tensor([[3.0, 1.0, 0.0]] * 4, dtype=torch.float64)
    got = check(TokenChoiceConfig(k=2, weights="renormalised", capacity_factor=0.5), logit_NE)
    # C = ceil(4 * 2 * 0.5 / 3) = 2
    assert got.selected_NE.tolist() == [[True, True, False]] * 2 + [[False] * 3] * 2
    assert (got.gate_NE[2:] == 0).all() and torch.allclose(got.gate_NE[:2].sum(1), torch.ones(2).double())
    with torch.autograd.set_detect_anomaly(True):  # nor is any number on the way back NaN
        weights = gate(TokenChoiceConfig(k=2, weights="renormalised"), logit_NE.requires_grad_(), got.selected_NE)
        weights.square().sum().backward()


def test_renormalised_weights_do_not_underflow():
    logit_NE = torch.tensor([[0.0, -300.0, -301.0, -400.0]], requires_grad=True)
    selected_NE = torch.tensor([[False, True, True, False]])
    for scores in ("softmax", "sigmoid"):
        gate_NE = gate(TokenChoiceConfig(k=2, weights="renormalised", scores=scores), logit_NE, selected_NE)
        assert gate_NE.tolist()[0] == pytest.approx([0, 1 / (1 + 2.718281828**-1), 1 / (1 + 2.718281828), 0])
        assert torch.autograd.grad(gate_NE[0, 1], logit_NE)[0].isfinite().all()


def test_ties_go_to_the_lowest_expert_and_in_the_queue_to_the_lowest_position():
    logit_NE = torch.zeros(3000, 4)
    group = Group("all", {"bias": torch.zeros(4)})
    assert torch.equal(choose(TokenChoiceConfig(k=3), logit_NE, group).selected_NE[:, 3], torch.zeros(3000).bool())
    for drop in ("position", "random", "priority"):
        got = choose(TokenChoiceConfig(capacity_factor=1.0, drop=drop), logit_NE, group)
        assert torch.equal(got.selected_NE[:, 0], torch.arange(3000) < 750)
        assert not got.selected_NE[:, 1:].any() and int(got.dropped_NE.sum()) == 2250


def test_priority_serves_the_surest_token_first():
    logit_NE = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 9.0]])
    got = choose(TokenChoiceConfig(capacity_factor=1.0, drop="priority"), logit_NE, Group("all", {}))
    assert got.selected_NE.tolist() == [[False, False], [True, False], [True, False], [False, True]]


def test_random_order_leaves_every_token_the_same_chance():
    """All first choices fall on expert 0, of which the half is kept, whatever the second choices are."""
    config = TokenChoiceConfig(k=2, second_choice="gumbel", capacity_factor=0.5, drop="random")
    logit_NE = torch.tensor([[5.0, 1.0, 0.0, -1.0]] * 8)
    kept_N = torch.zeros(8)
    for seed in range(400):
        got = choose(config, logit_NE, Group("all", {}, None, gumbel(seed, 8, 4).float()))
        assert int(got.selected_NE[:, 0].sum()) == 2
        kept_N += got.selected_NE[:, 0]
    assert ((kept_N / 400 - 0.25).abs() < 0.09).all()  # four standard deviations


def deepspeed_top2(logit_NE, noise_NE, capacity_factor, min_capacity):
    """`top2gating` of deepspeed/moe/sharded_moe.py, v0.9.5, the noise given: combine weights (N, E), auxiliary loss."""
    p_NE = logit_NE.softmax(1)
    n_tokens, n_experts = p_NE.shape
    limit = max(ceil(n_tokens / n_experts * capacity_factor * 2), min_capacity)
    one_hot = torch.eye(n_experts, dtype=torch.int64)
    mask1_NE = one_hot[p_NE.argmax(1)]
    mask2_NE = one_hot[(logit_NE + noise_NE).masked_fill(mask1_NE.bool(), -torch.inf).argmax(1)]
    place1_NE = mask1_NE.cumsum(0) - 1
    place2_NE = mask2_NE.cumsum(0) - 1 + mask1_NE.sum(0, keepdim=True)
    aux = (p_NE.mean(0) * mask1_NE.double().mean(0)).mean() * n_experts * n_experts
    mask1_NE = mask1_NE * (place1_NE < limit)
    mask2_NE = mask2_NE * (place2_NE < limit)
    gate1_N, gate2_N = (p_NE * mask1_NE).sum(1), (p_NE * mask2_NE).sum(1)
    whole_N = (gate1_N + gate2_N).clamp(min=torch.finfo(p_NE.dtype).eps)
    return (gate1_N / whole_N)[:, None] * mask1_NE + (gate2_N / whole_N)[:, None] * mask2_NE, aux


@pytest.mark.parametrize(("capacity_factor", "min_capacity"), [(1.5, 0), (1.0, 0), (0.5, 4), (0.25, 9), (2.0, 0)])
def test_released_preset_is_deepspeeds_top2(capacity_factor, min_capacity):
    config = TokenChoiceConfig(
        k=2,
        weights="renormalised",
        second_choice="gumbel_always",
        capacity_factor=capacity_factor,
        min_capacity=min_capacity,
        balance=1.0,
    )
    for seed in range(5):
        logit_NE, noise_NE = made(seed, 40, 4), gumbel(seed + 1, 40, 4)
        got = choose(config, logit_NE, Group("all", {"bias": torch.zeros(4)}, None, noise_NE))
        gate_NE, aux = deepspeed_top2(logit_NE, noise_NE, capacity_factor, min_capacity)
        torch.testing.assert_close(got.gate_NE, gate_NE)
        assert torch.equal(got.selected_NE, gate_NE > 0)
        torch.testing.assert_close(got.losses["balance_loss"], aux)


@pytest.mark.parametrize("n_experts", [3, 4, 7])
@pytest.mark.parametrize("factor", [0.1, 1.0, 1.1, 1.25, 1.5])
def test_capacity_is_exact_arithmetic(n_experts, factor):
    for k, n_tokens, low in itertools.product((1, 2), (0, 1, 10 * n_experts, 1001, 70_000), (0, 4)):
        config = TokenChoiceConfig(k=k, capacity_factor=factor, min_capacity=low)
        exact = max(ceil(Fraction(str(factor)) * k * n_tokens / n_experts), low)
        assert capacity(config, n_experts, n_tokens) == exact
        tensor = capacity(config, n_experts, torch.tensor(n_tokens))
        assert isinstance(tensor, torch.Tensor) and tensor.item() == exact


def test_bound_is_known_from_shapes():
    logit_NE, valid_N = made(0, 10, 4), torch.zeros(10, dtype=torch.bool)
    for factor, bound in ((None, 20), (1.0, 20), (0.5, 12), (9.0, 20)):
        got = choose(TokenChoiceConfig(k=2, capacity_factor=factor), logit_NE, Group("all", {}, valid_N))
        assert got.bound == bound and type(got.bound) is int


@pytest.mark.parametrize("counts", ["first", "all"])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_balance_loss_is_one_when_uniform(counts, scores):
    config = TokenChoiceConfig(k=2, scores=scores, balance=1.0, balance_counts=counts)
    logit_NE = torch.eye(4, dtype=torch.float64).repeat(3, 1) + 2 * torch.eye(4).roll(1, 1).repeat(3, 1)
    got = choose(config, logit_NE, Group("all", {}))
    assert got.losses["balance_loss"].item() == pytest.approx(1.0, abs=1e-12)
    collapsed = choose(config, torch.tensor([[50.0, 0.0, -50.0, -90.0]] * 5), Group("all", {}))
    # sigmoid scores of the collapsed router are 1 and 0.5: two thirds and a third
    first, second = (1.0, 0.0) if scores == "softmax" else (2 / 3, 1 / 3)
    want = 4 * first if counts == "first" else 4 * (first / 2 + second / 2)
    assert collapsed.losses["balance_loss"].item() == pytest.approx(want, abs=1e-6)


def test_balance_loss_evens_out_the_loads():
    logit_NE = (made(0, 400, 4) + torch.tensor([3.0, 0.0, 0.0, -2.0])).float()
    shift_E = torch.zeros(4, requires_grad=True)
    config = TokenChoiceConfig(balance=1.0)
    for _ in range(200):
        got = choose(config, logit_NE + shift_E, Group("all", {}))
        (grad_E,) = torch.autograd.grad(got.losses["balance_loss"], shift_E)
        shift_E = (shift_E - 0.5 * grad_E).detach().requires_grad_()
    before_E = choose(config, logit_NE, Group("all", {})).selected_NE.float().mean(0)
    after_E = choose(config, logit_NE + shift_E, Group("all", {})).selected_NE.float().mean(0)
    assert before_E.max() > 0.7 and after_E.max() < 0.4


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_bias_pulls_the_loads_together(scores):
    config = TokenChoiceConfig(k=2, scores=scores, bias_rate=0.003)
    state, seen = {"bias": torch.zeros(8)}, []
    for step in range(400):
        logit_NE = made(2 * step, 200, 8) + torch.linspace(-2, 2, 8)
        got = choose(config, logit_NE, Group("all", state))
        seen.append(8 * got.observed["excess"])
        old, state = state, update(config, state, got.observed)
        assert old is not state and (state["bias"] - old["bias"]).abs().max() < 0.00301
    first_E, last_E = torch.stack(seen[:20]).mean(0), torch.stack(seen[-200:]).mean(0)
    assert first_E.max() > 0.8 and last_E.abs().max() < 0.1  # of the mean load


def test_update_follows_the_sign_of_the_load():
    config, state = TokenChoiceConfig(bias_rate=0.5), {"bias": torch.tensor([1.0, 1.0, 1.0])}
    got = update(config, state, {"excess": torch.tensor([0.2, 0.0, -0.2])})
    assert got["bias"].tolist() == [0.5, 1.0, 1.5] and state["bias"].tolist() == [1.0, 1.0, 1.0]
    assert update(config, state, {}) is state
    assert update(TokenChoiceConfig(), state, {"excess": torch.ones(3)}) is state


@pytest.mark.parametrize("n_experts", [1, 3, 7, 10])
def test_even_loads_leave_the_bias_alone(n_experts):
    config, state = TokenChoiceConfig(bias_rate=0.5), {"bias": torch.zeros(n_experts)}
    for repeats in (0, 1, 3):
        observed = choose(config, torch.eye(n_experts).repeat(repeats, 1), Group("all", state)).observed
        assert torch.equal(update(config, state, observed)["bias"], state["bias"])


def test_alone_is_the_dropless_choice_of_each_token_by_itself():
    for ties in (False, True):
        logit_NE, state = made(5, 12, 4, ties), {"bias": torch.tensor([0.0, 0.2, -0.1, 0.0])}
        config = TokenChoiceConfig(k=2, second_choice="gumbel_always", capacity_factor=0.5)
        got_NE = alone(config, logit_NE, state)
        dropless = choose(TokenChoiceConfig(k=2), logit_NE, Group("all", state))
        assert torch.equal(got_NE, dropless.selected_NE) and (got_NE.sum(1) == 2).all()
        for t in range(12):
            assert torch.equal(alone(config, logit_NE[t : t + 1], state)[0], got_NE[t])


@pytest.mark.parametrize("word", MASKS)
def test_without_capacity_every_token_has_k_experts(word):
    for seed, k in itertools.product(range(5), (1, 2, 4)):
        config = TokenChoiceConfig(k=k, second_choice="gumbel", drop="random")
        got = choose(config, made(seed, 10, 4, seed % 2 == 0), Group("all", {}, mask(word, 10), gumbel(seed, 10, 4)))
        valid_N = torch.ones(10, dtype=torch.bool) if word is None else mask(word, 10)
        assert torch.equal(got.selected_NE.sum(1), valid_N * k)


def test_nothing_is_random_without_noise():
    for second_choice, drop in itertools.product(("argmax", "gumbel", "gumbel_always"), ("position", "random")):
        config = TokenChoiceConfig(k=2, second_choice=second_choice, capacity_factor=1.0, drop=drop)
        plain = TokenChoiceConfig(k=2, capacity_factor=1.0)
        got, again, want = (choose(c, made(0, 30, 4), Group("all", {})) for c in (config, config, plain))
        assert torch.equal(got.gate_NE, again.gate_NE) and torch.equal(got.gate_NE, want.gate_NE)


@pytest.mark.parametrize(
    ("fields", "in_training", "in_evaluation"),
    [
        ({"k": 2}, False, False),
        ({"k": 2, "second_choice": "gumbel"}, True, False),
        ({"k": 2, "second_choice": "gumbel_always"}, True, True),
        ({"k": 1, "second_choice": "gumbel_always"}, False, False),
        ({"drop": "random"}, False, False),
        ({"drop": "random", "capacity_factor": 1.0}, True, False),
        ({"drop": "priority", "capacity_factor": 1.0}, False, False),
    ],
)
def test_when_noise_is_needed(fields, in_training, in_evaluation):
    config = TokenChoiceConfig(**fields)
    assert (needs_noise(config, True), needs_noise(config, False)) == (in_training, in_evaluation)


COMPILED = [
    TokenChoiceConfig(balance=0.01),
    TokenChoiceConfig(k=2, weights="renormalised", second_choice="gumbel", capacity_factor=1.1, drop="random"),
    TokenChoiceConfig(k=2, weights="renormalised", capacity_factor=1.5, drop="priority", balance=0.1, z_loss=0.1),
    TokenChoiceConfig(k=3, scores="sigmoid", weights="renormalised", bias_rate=0.1, capacity_factor=0.3),
]


@pytest.mark.parametrize(("dynamic", "n_cases"), [(False, 4), (None, 2)])
def test_compiled_equals_eager(dynamic, n_cases):
    """One compiled function for several configs and shapes, as layers of one model share it."""

    def run(config, logit_NE, valid_N, noise_NE, bias_E):
        got = choose(config, logit_NE, Group("all", {"bias": bias_E}, valid_N, noise_NE))
        return got.gate_NE, got.selected_NE, got.dropped_NE, got.losses, got.observed

    def both(function, config, word, n_tokens, n_experts):
        logit_NE = made(0, n_tokens, n_experts).float().requires_grad_()
        noise_NE, bias_E = gumbel(0, n_tokens, n_experts).float(), torch.linspace(0, 0.3, n_experts)
        out = function(config, logit_NE, mask(word, n_tokens), noise_NE, bias_E)
        whole = out[0].square().sum() + sum(out[3].values())
        return out, torch.autograd.grad(whole, logit_NE)[0]

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    shapes = ((None, 10, 4), (None, 8, 3), ("1101110111", 10, 4), ("11010111", 8, 3))
    for case in list(zip(COMPILED, shapes, strict=True))[:n_cases]:
        torch.testing.assert_close(both(compiled, case[0], *case[1]), both(run, case[0], *case[1]), rtol=0, atol=0)


def test_share_of_one_expert():
    assert share(TokenChoiceConfig(k=2), "all", 8) == Fraction(1, 4)
    assert share(TokenChoiceConfig(k=2, capacity_factor=1.5), "all", 8) == Fraction(1, 4)
    assert share(TokenChoiceConfig(k=2, capacity_factor=0.7), "all", 8) == Fraction(7, 40)
    with pytest.raises(ValueError, match="got k=3 for the group image of 2 experts, need at most one choice per"):
        share(TokenChoiceConfig(k=3), "image", 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "got k=0, need at least 1 expert per token"),
        ({"capacity_factor": 0.0}, "got capacity_factor=0.0, need a number above 0: 1.0 leaves no slack"),
        ({"capacity_factor": float("nan")}, "got capacity_factor=nan, need a number above 0"),
        ({"min_capacity": -1}, "got min_capacity=-1, need 0 or more tokens"),
        ({"balance": -0.1}, "got balance=-0.1, need a number of 0 or more: 0 turns it off"),
        ({"z_loss": float("inf")}, "got z_loss=inf, need a number of 0 or more: 0 turns it off"),
        ({"bias_rate": -1.0}, "got bias_rate=-1.0, need a number of 0 or more: 0 turns it off"),
        (
            {"bias_rate": 0.1, "k": 2, "second_choice": "gumbel"},
            "got bias_rate=0.1 with second_choice=gumbel, need choices that follow the bias: set second_choice=argmax",
        ),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenChoiceConfig(**fields)


def test_rule_names_its_parts():
    assert RULE == (TokenChoiceConfig, share, choose, gate, alone, ("bias",), update, needs_noise, copies)
