"""FLOPs of the named sizes: what torch counts, sparse against dense. Recorded parameters: tests/test_describe.py."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moma.modality import TokenGroups
from moma.model.feed_forward import SparseConfig
from moma.model.flops import parts_of, totals
from moma.model.routing.expert_choice import ExpertChoiceConfig
from moma.model.transformer import ModelConfig, Transformer

VOCAB = 65_536
SIZES = {
    "90m": ModelConfig(dim=512, n_layers=8, n_heads=8),
    "435m": ModelConfig(dim=1024, n_layers=24, n_heads=16),
    "1_4b": ModelConfig(dim=2048, n_layers=24, n_heads=16),
}
HALF = (0.5, 0.5)


def meta_model(config, variant, vocab_size=VOCAB, aux_routers=False):
    with torch.device("meta"):
        return Transformer(config, variant.feed_forward, vocab_size, variant.vocabulary.modalities, aux_routers)


@pytest.mark.parametrize("name", ["moe_8x", "moe_1t1i", "moe_4t4i", "moe_7t1i"])
def test_sparse_costs_its_dense_twin_plus_the_routers(name, variants):
    """Where capacities divide, whatever the modalities' shares."""
    config = SIZES["90m"]
    dense = parts_of(meta_model(config, variants["dense"]), 4096, HALF)
    sparse = parts_of(meta_model(config, variants[name]), 4096, (0.75, 0.25))
    routed = sum(size for size in variants[name].group_sizes if size > 1)
    routers = 8 * 2 * 512 * routed
    assert sparse["routers"].flops == routers and sparse["routers"].params == routers // 2
    need, got = totals(dense), totals(sparse)
    for key in ("flops_per_token_forward", "flops_per_token_forward_causal"):
        assert got[key] == pytest.approx(need[key] + routers, rel=1e-12)
    for key in ("flops_per_token_train", "flops_per_token_train_causal"):
        assert got[key] == pytest.approx(3 * (need[key] / 3 + routers), rel=1e-12)
    assert got["params_active"] == need["params_active"] + routers // 2


def test_causal_attention_is_the_mean_over_positions(variants):
    config, length = SIZES["90m"], 128
    table = parts_of(meta_model(config, variants["dense"]), length, HALF)
    mean = sum(4 * seen * 512 for seen in range(1, length + 1)) / length
    assert table["attention_scores"].flops_causal == 8 * mean
    assert table["attention_scores"].flops == 8 * 4 * length * 512


def test_grouped_queries_cost_less(variants):
    config = ModelConfig(dim=512, n_layers=8, n_heads=8, n_kv_heads=2)
    full = parts_of(meta_model(SIZES["90m"], variants["dense"]), 128, HALF)
    grouped = parts_of(meta_model(config, variants["dense"]), 128, HALF)
    saved = full["attention_projections"].params - grouped["attention_projections"].params
    assert saved == 8 * 512 * 2 * 6 * 64
    assert grouped["attention_scores"] == full["attention_scores"]


def test_auxiliary_routers_are_counted_as_parameters_alone(variants):
    plain, aux = (
        parts_of(meta_model(SIZES["90m"], variants["moe_4t4i"], aux_routers=a), 128, HALF) for a in (False, True)
    )
    assert aux["aux_routers"].params == 8 * 2 * (512 * 256 + 256 * 4)
    assert totals(aux)["flops_per_token_forward"] == totals(plain)["flops_per_token_forward"]


def counted_by_torch(config, variant, vocab_size, n_rows, length, counts):
    """Matmul FLOPs of one forward pass with the head, as torch counts them on the meta device (no memory, no work)."""
    n_tokens = n_rows * length
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = Transformer(config, variant.feed_forward, vocab_size, variant.vocabulary.modalities)
        tokens_RL = torch.zeros(n_rows, length, dtype=torch.int64)
        index = tuple(torch.zeros(n, dtype=torch.int64) for n in counts)
        groups = TokenGroups(index, tuple(torch.zeros(n_tokens, dtype=torch.int64) for _ in counts))
        mask = torch.ones(n_rows, 1, length, length, dtype=torch.bool)
        h_RLD, _ = model(tokens_RL, tokens_RL, mask, groups)
        model.head(h_RLD)
    return counter.get_total_flops()


TRUE_SIZES = [(size, n) for size in SIZES for n in ("dense", "moe_8x", "moe_1t1i", "moe_4t4i", "moe_7t1i")]


@pytest.mark.parametrize("size, name", TRUE_SIZES)
def test_true_sizes_equal_what_torch_counts(size, name, variants):
    n_rows, length, counts = 2, 4096, (7 * 896, 1920)  # 8,192 tokens; capacities divide by 7 and by 4
    assert sum(counts) == n_rows * length
    variant, config = variants[name], SIZES[size]
    shares = tuple(n / sum(counts) for n in counts)
    table = totals(parts_of(meta_model(config, variant), length, shares))
    counted = counted_by_torch(config, variant, VOCAB, n_rows, length, counts)
    assert table["flops_per_token_forward"] * n_rows * length == pytest.approx(counted, rel=1e-12)


def test_small_sizes_equal_what_torch_counts(variant, make_batch):
    batch = make_batch(variant.vocabulary, seed=0, rows=4, length=28)
    n_rows, length = batch.tokens_RL.shape
    counts = tuple(i.numel() for i in batch.groups.index)
    config = ModelConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=40)
    shares = tuple(n / (n_rows * length) for n in counts)
    table = totals(parts_of(meta_model(config, variant, 64), length, shares))
    counted = counted_by_torch(config, variant, 64, n_rows, length, counts)
    nominal = table["flops_per_token_forward"] * n_rows * length
    sizes = variant.group_sizes
    groups = zip([n_rows * length] if len(sizes) == 1 else counts, sizes, strict=True)
    dropped = sum(n % size for n, size in groups)  # tokens lost to the floor of capacities
    expert = 2 * 3 * config.dim * config.ffn_dim
    assert nominal - config.n_layers * expert * dropped == pytest.approx(counted, rel=1e-12)


def test_capacity_factor_scales_the_experts(variants):
    def flops(capacity_factor):
        selection = ExpertChoiceConfig(capacity_factor=capacity_factor)
        config = SparseConfig({"text": 4, "image": 4}, selection=selection)
        return parts_of(meta_model(SIZES["90m"], replace(variants["moe_4t4i"], feed_forward=config)), 128, HALF)[
            "feed_forward"
        ].flops

    one, half, many = (flops(c) for c in (1.0, 0.5, 100.0))
    assert half == one / 2 and many == 4 * one
