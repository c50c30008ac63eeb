"""Gumbel-sigmoid noise: a pure function with a logistic distribution that enters choice and gate, in training only."""

import math
from dataclasses import replace

import pytest
import torch

from moma.data.batch import Batch
from moma.evaluation import perplexity
from moma.model.feed_forward import DenseConfig, SparseConfig
from moma.model.routing import Disturbance
from moma.model.routing.noise import gumbel_noise, gumbel_sigmoid_noise
from moma.model.routing.token_choice import TokenChoiceConfig
from moma.objectives import AuxRoutersConfig, NextTokenConfig, aux_routers, next_token, routing_noise


def test_it_depends_on_its_key_alone():
    first = gumbel_sigmoid_noise("0/7/1", 5, 3, "cpu")
    torch.manual_seed(123)
    assert first.shape == (5, 3) and torch.equal(first, gumbel_sigmoid_noise("0/7/1", 5, 3, "cpu"))
    assert not any(torch.equal(first, gumbel_sigmoid_noise(key, 5, 3, "cpu")) for key in ("1/7/1", "0/8/1", "0/7/2"))


def test_gumbel_noise_is_gumbel():
    noise = gumbel_noise("0", 100_000, 4, "cpu").double()
    assert noise.isfinite().all() and noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)


def test_it_is_the_difference_of_two_gumbel_variables():
    noise = gumbel_sigmoid_noise("0", 100_000, 4, "cpu").flatten().double()
    generator = torch.Generator().manual_seed(0)
    g = -torch.log(-torch.log(torch.rand(2, 400_000, generator=generator, dtype=torch.float64)))
    two = g[0] - g[1]
    assert noise.isfinite().all() and abs(noise.mean()) < 0.02
    variance = noise.var().item()
    assert variance == pytest.approx(math.pi**2 / 3, rel=0.01) and two.var().item() == pytest.approx(variance, rel=0.02)
    for p in (0.01, 0.1, 0.5, 0.9, 0.99):
        for sample in (noise, two):
            assert sample.quantile(p).item() == pytest.approx(math.log(p / (1 - p)), abs=0.06)


@pytest.mark.parametrize("name", ["moe_8x", "moe_4t4i"])
def test_it_enters_choice_and_gate(variants, make_batch, make_model, name):
    """Plain loop over experts: score = sigmoid(x W + noise), the best floor(N / E) tokens, the score as gate."""
    variant = variants[name]
    model, batch = make_model(variant), make_batch(variant.vocabulary, 0)
    layer, tokens = model.blocks[0].feed_forward, batch.tokens_RL.numel()
    x_TD = torch.randn(tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise_TE = gumbel_sigmoid_noise("0/0/0", tokens, layer.n_routed, "cpu").double()
    y_TD, stats = layer(x_TD, batch.groups, "train", Disturbance(noise_TE))
    quiet_TD, _ = layer(x_TD, batch.groups, "train")
    assert not torch.equal(y_TD, quiet_TD)
    score_TE = torch.sigmoid(x_TD @ layer.router + noise_TE)
    groups = [range(tokens)] if name == "moe_8x" else [index.tolist() for index in batch.groups.index]
    expected, column = torch.zeros_like(y_TD), 0
    for group, experts in zip(groups, layer.experts, strict=True):
        for e in range(experts.n_experts):
            order = sorted(group, key=lambda t, c=column: (-score_TE[t, c].item(), t))
            for t in order[: len(group) // experts.n_experts]:
                h = x_TD[t] @ experts.w13[e]
                h1, h3 = h.chunk(2)
                expected[t] += score_TE[t, column] * ((torch.nn.functional.silu(h1) * h3) @ experts.w2[e])
                assert stats.selected_TE[t, column]
            column += 1
    torch.testing.assert_close(y_TD, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", ["none", "gumbel"])
def test_only_pre_training_is_noisy(variants, make_batch, make_model, noise):
    variant = variants["moe_4t4i"]
    sparse = SparseConfig({"text": 4, "image": 4}, noise=noise)
    model = make_model(replace(variant, feed_forward=sparse), aux_routers=True)
    made, vocab = make_batch(variant.vocabulary, 0), variant.vocabulary

    def batch(number):
        return Batch(number, made.tokens_RL, made.target_RL, made.document_RL, made.position_RL, made.groups, 50, True)

    def drawn(number, seed):
        return routing_noise(model, number, 75, seed, gumbel=noise == "gumbel")

    assert (drawn(0, 0) is not None) == (noise == "gumbel")
    assert routing_noise(model, 0, 75, 0, training=False, gumbel=True) is None
    config = NextTokenConfig()
    losses = [
        next_token(config, model, batch(n), 50, vocab, False, drawn(n, seed))[0].item()
        for n, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert len(set(losses)) == (3 if noise == "gumbel" else 1)
    assert len({perplexity(model, [batch(n)], vocab, "train")["loss"] for n in (0, 1)}) == 1
    assert len({aux_routers(AuxRoutersConfig(), model, batch(n), 50, vocab, False)[0].item() for n in (0, 1)}) == 1


def test_models_without_routers_have_no_noise(variants, make_model):
    variant = variants["moe_1t1i"]
    for sparse in (SparseConfig({"text": 1, "image": 1}, noise="gumbel"), DenseConfig()):
        assert routing_noise(make_model(replace(variant, feed_forward=sparse)), 0, 75, 0, gumbel=True) is None


def test_every_layer_draws_its_own(variants, make_model):
    sparse = SparseConfig({"text": (4, 2), "image": 4}, noise="gumbel", layers=(0, 2))
    model = make_model(replace(variants["moe_4t4i"], feed_forward=sparse), n_layers=3)
    first, none, last = routing_noise(model, 5, 75, 0, gumbel=True)
    assert first.noise_TE.shape == (75, 8) and none.noise_TE is None and last.noise_TE.shape == (75, 6)
    assert not torch.equal(first.noise_TE[:, :6], last.noise_TE)


@pytest.mark.parametrize("second, training, drawn", [
    ("argmax", True, False), ("gumbel", True, True), ("gumbel", False, False), ("gumbel_always", False, True),
])  # fmt: skip
def test_token_choice_draws_where_it_says_so(variants, make_model, second, training, drawn):
    sparse = SparseConfig({"all": 4}, selection=TokenChoiceConfig(k=2, second_choice=second))
    model = make_model(replace(variants["moe_8x"], feed_forward=sparse))
    noise = routing_noise(model, 0, 75, 3, training)
    assert (noise is not None) == drawn
    if drawn:  # in training by the seed of the run, in evaluation always the same
        key = "3/0/1" if training else "evaluation/0/1"
        assert torch.equal(noise[1].noise_TE, gumbel_noise(key, 75, 4, "cpu"))
