"""Parameters and FLOPs of the named sizes: recorded integers, the paper's table, and what torch counts."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
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
# size, variant: exact total, 2 V d + d + l (4 d^2 + 3 d f E + 2 d + 4 d/h + d R) with E experts of width f and R
# routed ones; and the total the paper's sizes come to at width 8 d / 3, in millions
COUNTS = {
    ("90m", "dense"): (92_416_512, 92.3),
    ("90m", "moe_8x"): (210_807_296, 209.7),
    ("90m", "moe_1t1i"): (109_324_800, 109),
    ("90m", "moe_4t4i"): (210_807_296, 209.7),
    ("435m", "dense"): (437_836_800, 436.2),
    ("435m", "moe_8x"): (1_858_329_600, 1845),
    ("435m", "moe_1t1i"): (640_736_256, 637),
    ("435m", "moe_4t4i"): (1_858_329_600, 1845),
    ("1_4b", "dense"): (1_478_080_512, 1476),
    ("1_4b", "moe_8x"): (7_126_628_352, 7113),
    ("1_4b", "moe_1t1i"): (2_284_959_744, 2280),
    ("1_4b", "moe_4t4i"): (7_126_628_352, 7113),
}
HALF = (0.5, 0.5)


def meta_model(config, variant, vocab_size=VOCAB, aux_routers=False):
    with torch.device("meta"):
        return Transformer(config, variant.feed_forward, vocab_size, variant.vocabulary.modalities, aux_routers)


@pytest.mark.parametrize("size, name", COUNTS)
def test_parameter_counts(size, name, variants):
    exact, millions = COUNTS[size, name]
    model = meta_model(SIZES[size], variants[name])
    total = sum(p.numel() for p in model.parameters())
    assert totals(parts_of(model, 4096, HALF))["params_total"] == total == exact
    assert abs(total / 1e6 / millions - 1) < 0.01


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
    """Matmul FLOPs of one forward pass with the head, as torch counts them on fake tensors (no memory, no work).

    Fake CPU tensors and not the meta device, which autocast does not know; the plain attention kernel, which
    the counter sees as the two matmuls it is. `TokenGroups` of fake tensors need no index sets to be found.
    """
    with FakeTensorMode():
        model = Transformer(config, variant.feed_forward, vocab_size, variant.vocabulary.modalities)
        n_tokens = n_rows * length
        tokens_RL = torch.zeros(n_rows, length, dtype=torch.int64)
        index = tuple(torch.zeros(n, dtype=torch.int64) for n in counts)
        groups = TokenGroups(index, tuple(torch.zeros(n_tokens, dtype=torch.int64) for _ in counts))
        mask = torch.ones(n_rows, 1, length, length, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            h_RLD, _ = model(tokens_RL, tokens_RL, mask, groups)
            model.head(h_RLD)
    return counter.get_total_flops()


TRUE_SIZES = [("90m", n) for n in ("dense", "moe_8x", "moe_1t1i", "moe_4t4i", "moe_7t1i")] + [("1_4b", "dense")]


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


@pytest.mark.parametrize("size", ["90m", "435m", "1_4b"])
@pytest.mark.parametrize("name", ["dense", "moe_8x", "moe_1t1i", "moe_4t4i"])
def test_the_meta_device_executes_what_the_table_says(variants, size, name):
    """The forward pass with its head on meta tensors, attention in full: exact equality per token."""
    rows, length = 2, 512
    model = meta_model(SIZES[size], variants[name])

    def empty(*shape, dtype=torch.int64):
        return torch.empty(*shape, dtype=dtype, device="meta")

    tokens = rows * length
    groups = TokenGroups((empty(tokens // 2),) * 2, (empty(tokens),) * 2)
    position, mask = empty(rows, length), empty(rows, 1, length, length, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden, _ = model(empty(rows, length), position, mask, groups, "train")
        model.head(hidden)
    assert counter.get_total_flops() / tokens == totals(parts_of(model, length, HALF))["flops_per_token_forward"]
