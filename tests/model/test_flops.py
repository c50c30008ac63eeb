"""Parameters and FLOPs, part by part, and what torch counts on the meta device for every kind of model.

Recorded parameters of the named sizes: tests/test_describe.py.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moma.modality import TokenGroups
from moma.model.attention import AttentionMask, UntiedAttentionConfig
from moma.model.depth import DepthConfig
from moma.model.feed_forward import DenseConfig, SparseConfig
from moma.model.flops import Padding, aux_flops, padding_of, parts_of, totals
from moma.model.routing.expert_choice import ExpertChoiceConfig
from moma.model.routing.threshold import ThresholdConfig
from moma.model.routing.token_choice import TokenChoiceConfig
from moma.model.transformer import Architecture, ModelConfig, Transformer

VOCAB = 65_536
SIZES = {
    "90m": ModelConfig(dim=512, n_layers=8, n_heads=8),
    "435m": ModelConfig(dim=1024, n_layers=24, n_heads=16),
    "1_4b": ModelConfig(dim=2048, n_layers=24, n_heads=16),
}
SMALL = ModelConfig(dim=16, n_layers=3, n_heads=2, n_kv_heads=1, hidden_dim=64)
HALF = (0.5, 0.5)
FORWARD, CAUSAL = "flops_per_token_forward", "flops_per_token_forward_causal"


def meta_model(config, variant, vocab_size=VOCAB, aux_routers=False):
    architecture = Architecture(config, variant.feed_forward, variant.attention, variant.depth)
    with torch.device("meta"):
        return Transformer(architecture, vocab_size, variant.vocabulary.modalities, aux_routers)


COSTS_ITS_TWIN = ["moe_8x", "moe_1t1i", "moe_4t4i", "moe_7t1i", "token_choice", "threshold", "untied_4t4i"]


@pytest.mark.parametrize("name", COSTS_ITS_TWIN)
def test_sparse_costs_its_dense_twin_plus_the_routers(name, variants):
    """Where capacities divide, whatever the modalities' shares."""
    config = SIZES["90m"]
    dense = parts_of(meta_model(config, variants["dense"]), 4096, HALF)
    sparse = parts_of(meta_model(config, variants[name]), 4096, (0.75, 0.25))
    routers = 8 * 2 * 512 * variants[name].n_routed
    assert sparse["routers"].flops == routers and sparse["routers"].params == routers // 2
    need, got = totals(dense), totals(sparse)
    for key in (FORWARD, CAUSAL):
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


@pytest.mark.parametrize("depth", [False, True])
def test_flops_of_training_auxiliary_routers_are_what_torch_counts(variants, depth, make_model, make_batch):
    """Forward and backward of the predictors alone, out of a whole forward pass; quotas keep inner counts constant."""
    variant = variants["mod_quota_untied" if depth else "moe_4t4i"]
    model, batch = make_model(variant, aux_routers=True, dtype=torch.float32), make_batch(variant.vocabulary, 0)
    model.requires_grad_(False)
    counted = []
    for mode in ("forward", "training"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".aux." in name)
        with FlopCounterMode(display=False) as counter:
            _, stats = model(batch.tokens_RL, batch.position_RL, batch.mask, batch.groups)
            if mode == "training":
                torch.stack([s.aux_logit_TE.sum() for s in stats.values()]).sum().backward()
        counted.append(counter.get_total_flops())
    share = batch.groups.index[0].numel() / 75
    forward, training = aux_flops(model, (share, 1 - share))
    assert counted[1] - counted[0] == pytest.approx((training - forward) * 75, rel=0.02 if depth else 1e-9)


def test_auxiliary_routers_are_counted_as_parameters_alone(variants):
    for name, count in (
        ("moe_4t4i", 8 * 2 * (512 * 256 + 256 * 4)),
        ("mod_4t4i", 8 * 2 * (512 * 256 + 256 * 4) + 4 * (512 * 256 + 256)),
        ("mod_dense", 4 * (512 * 256 + 256)),
        ("token_choice", 0),
    ):
        plain, aux = (
            parts_of(meta_model(SIZES["90m"], variants[name], aux_routers=a), 128, HALF) for a in (False, True)
        )
        assert (aux["aux_routers"].params, aux["aux_routers"].params_active) == (count, 0), name
        assert totals(aux)[FORWARD] == totals(plain)[FORWARD]


def feed_forward_of(variants, config, shares=HALF):
    variant = replace(variants["dense"], feed_forward=config)
    return parts_of(meta_model(SIZES["90m"], variant), 128, shares)["feed_forward"]


EXPERT = 3 * 512 * 1376


def test_shared_experts_serve_every_token(variants):
    part = feed_forward_of(variants, SparseConfig({"text": 4, "image": 4}, shared=2))
    assert part.params == 8 * (8 + 2) * EXPERT
    assert part.params_active == 8 * (1 + 2) * EXPERT
    assert part.flops == part.flops_causal == 2 * part.params_active


def test_experts_of_another_width(variants):
    part = feed_forward_of(variants, SparseConfig({"all": 4}, width=0.25, shared=1))
    assert part.params == 8 * (4 + 1) * 3 * 512 * 352  # 1376 / 4 = 344, rounded up to a multiple of 32
    assert part.params_active == 8 * 2 * 3 * 512 * 352


def test_the_other_layers_are_dense(variants):
    some = SparseConfig({"text": (2, 4), "image": (1, 3)}, layers=(1, 5))
    part = feed_forward_of(variants, some)
    assert part.params == (6 + 2 + 1 + 4 + 3) * EXPERT
    assert part.params_active == 8 * EXPERT
    variant = replace(variants["dense"], feed_forward=some)
    table = parts_of(meta_model(SIZES["90m"], variant), 128, HALF)
    assert table["routers"].params == (2 + 4 + 3) * 512


def test_token_choice_runs_k_experts(variants):
    for k, factor, mean in ((1, None, 1), (2, None, 2), (2, 1.5, 2), (2, 0.5, 1)):
        selection = TokenChoiceConfig(k=k, capacity_factor=factor)
        part = feed_forward_of(variants, SparseConfig({"text": 4, "image": 4}, selection=selection))
        assert part.params_active == 8 * mean * EXPERT and part.flops == 2 * part.params_active


def test_groups_may_take_different_numbers_of_experts(variants):
    selection = ExpertChoiceConfig(capacity_factor={"text": 2.0, "image": 1.0})
    part = feed_forward_of(variants, SparseConfig({"text": 4, "image": 4}, selection=selection), (0.75, 0.25))
    assert part.params_active == 8 * EXPERT * (0.75 * 2 + 0.25)
    threshold = ThresholdConfig(capacity_factor=0.5, bound=3.0)  # the bound is room, not need
    part = feed_forward_of(variants, SparseConfig({"all": 4}, selection=threshold))
    assert part.params_active == 8 * EXPERT * 0.5


def test_a_token_runs_through_the_attention_of_its_modality(variants):
    tied, untied = (variants[name] for name in ("dense", "untied_dense_3"))
    need, got = (parts_of(meta_model(SIZES["90m"], v), 128, (0.5, 0.25, 0.25)) for v in (tied, untied))
    assert got["attention_projections"].params == 3 * need["attention_projections"].params
    assert got["attention_projections"].params_active == need["attention_projections"].params
    assert got["attention_projections"].flops == need["attention_projections"].flops
    # QK-norms: gain and bias of q and k, 64 wide, per modality
    assert got["norms"].params == need["norms"].params + 8 * 2 * 4 * 64
    assert got["norms"].params_active == need["norms"].params_active == need["norms"].params
    assert totals(got)["params_active"] == totals(need)["params_active"]


def test_depth_routers_let_a_share_of_the_tokens_in(variants):
    """Half of the layers run a quarter of the tokens; of these tokens' attention, a sixteenth of the pairs."""
    variant = variants["mod_4t4i"]
    full = parts_of(meta_model(SIZES["90m"], variants["moe_4t4i"]), 4096, HALF)
    for kind in ("mod", "mod_quota"):
        part = parts_of(meta_model(SIZES["90m"], replace(variant, depth=DepthConfig(kind))), 4096, HALF)
        for name in ("attention_projections", "feed_forward"):
            assert part[name].params == full[name].params
            assert part[name].params_active == full[name].params * (0.625 if name[0] == "a" else 0.625 / 8)
            assert part[name].flops == 0.625 * full[name].flops
        assert part["attention_scores"].flops == 4 * 512 * 4096 * (4 + 4 / 16)
        chosen = sum(2 * (2 * seen) * 512 for seen in range(1, 1025)) / 4096  # 1,024 tokens of 4,096
        assert part["attention_scores"].flops_causal == 4 * (chosen + (2 * 4096 + 2) * 512)
        assert part["routers"].params == full["routers"].params + 4 * 512
        assert part["routers"].params_active == 0.625 * full["routers"].params + 4 * 512
        assert part["routers"].flops == 0.625 * full["routers"].flops + 4 * 2 * 512
        block = 2 * 512 + 4 * 64  # two norms, QK-norm; the final norm sees every token
        assert (part["norms"].params, part["norms"].params_active) == (8 * block + 512, 5 * block + 512)


@pytest.mark.parametrize("config", [DepthConfig(start=1, interval=3), DepthConfig(capacity=0.1)])
def test_the_chosen_layers_and_the_capacity_count(config, variants):
    layers = 1 + 1 + 1 if config.interval == 3 else 4  # of 8: 1, 4, 7 or 0, 2, 4, 6
    part = parts_of(meta_model(SIZES["90m"], replace(variants["dense"], depth=config)), 4096, HALF)
    runs = layers * config.capacity + 8 - layers
    assert part["feed_forward"].flops == pytest.approx(2 * runs * EXPERT, rel=1e-12)


def counted_by_torch(config, variant, vocab_size, n_rows, length, counts):
    """Matmul FLOPs of one forward pass with the head, as torch counts them on the meta device (no memory, no work)."""
    n_tokens = n_rows * length
    model = meta_model(config, variant, vocab_size)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens_RL = torch.zeros(n_rows, length, dtype=torch.int64)
        index = tuple(torch.zeros(n, dtype=torch.int64) for n in counts)
        groups = TokenGroups(index, tuple(torch.zeros(n_tokens, dtype=torch.int64) for _ in counts))
        mask = AttentionMask(torch.ones(n_rows, 1, length, length, dtype=torch.bool), tokens_RL)
        h_RLD, _ = model(tokens_RL, tokens_RL, mask, groups)
        model.head(h_RLD)
    return counter.get_total_flops()


def hidden_of(model: Any) -> int:
    """Width of the first layer's experts."""
    return model.blocks[0].feed_forward.experts[0].hidden_dim


def beyond_the_need(model, padding):
    """FLOPs that torch counts for what static shapes hold beyond the need; real matmuls leave out the experts' part."""
    dim = model.config.dim
    cost = {"expert_rows": 2 * 3 * dim * hidden_of(model), "attention_pairs": 4 * dim}
    return sum(cost[name] * (each.held - each.needed) for name, each in padding.items())


STATIC = ("dense", "moe_8x", "moe_1t1i", "moe_4t4i", "moe_7t1i")
TRUE_SIZES = [(size, name) for size in SIZES for name in STATIC]


@pytest.mark.parametrize("size, name", TRUE_SIZES)
def test_true_sizes_equal_what_torch_counts(size, name, variants):
    n_rows, length, counts = 2, 4096, (7 * 896, 1920)  # 8,192 tokens; capacities divide by 7 and by 4
    assert sum(counts) == n_rows * length
    variant, config = variants[name], SIZES[size]
    shares = tuple(n / sum(counts) for n in counts)
    table = totals(parts_of(meta_model(config, variant), length, shares))
    counted = counted_by_torch(config, variant, VOCAB, n_rows, length, counts)
    assert table[FORWARD] * n_rows * length == pytest.approx(counted, rel=1e-12)


def test_every_kind_equals_what_torch_counts(variant):
    """Capacities divide here. Exact: all kinds without a bound and without depth, `mod_quota` of one row. The others
    differ by what `padding_of` says."""
    n_modalities = len(variant.vocabulary.modalities)
    counts = {2: (7 * 96, 96 + 128), 3: (7 * 96, 192, 32)}[n_modalities]
    selection = getattr(variant.feed_forward, "selection", None)
    ragged = isinstance(variant.depth, DepthConfig) or isinstance(selection, ThresholdConfig)
    for n_rows in (1, 4):
        length = sum(counts) // n_rows
        shares = tuple(n / sum(counts) for n in counts)
        model = meta_model(SMALL, variant, 64)
        nominal = totals(parts_of(model, length, shares))[FORWARD] * sum(counts)
        padding = padding_of(model, n_rows, length, counts)
        extra = beyond_the_need(model, padding)
        counted = counted_by_torch(SMALL, variant, 64, n_rows, length, counts)
        assert nominal + extra == pytest.approx(counted, rel=1e-12)
        if not ragged or (n_rows == 1 and getattr(variant.depth, "kind", "") == "mod_quota"):
            assert extra == 0


@pytest.mark.parametrize("kind", ["mod", "mod_quota"])
@pytest.mark.parametrize("attention", ["shared", "untied"])
def test_mixture_of_depths_equals_what_torch_counts(kind, attention, variants):
    """Experts of one group (`moe_8x`) and dense ones never hold empty slots; the mask over all rows costs R times."""
    for feed_forward in (DenseConfig(), SparseConfig({"all": 8}), SparseConfig({"text": 4, "image": 4})):
        variant = replace(variants["mod_dense"], feed_forward=feed_forward, depth=DepthConfig(kind))
        if attention == "untied":
            variant = replace(variant, attention=UntiedAttentionConfig())
        counts, n_rows, length = (5 * 64, 3 * 64), 2, 256
        model = meta_model(SMALL, variant, 64)
        padding = padding_of(model, n_rows, length, counts)
        nominal = totals(parts_of(model, length, (5 / 8, 3 / 8)))[FORWARD] * 512
        counted = counted_by_torch(SMALL, variant, 64, n_rows, length, counts)
        assert nominal + beyond_the_need(model, padding) == pytest.approx(counted, rel=1e-12)
        # two of three layers have a depth router, which lets 128 of 512 tokens in
        assert padding["attention_pairs"] == Padding(2 * 128**2 + 2 * 256**2, 2 * 2 * 64**2 + 2 * 256**2)
        empty = 2 * 128 if kind == "mod" else 0
        groups = empty if "text" in getattr(feed_forward, "experts", {}) else 0
        assert padding["expert_rows"] == Padding(512 + 2 * 128 + groups, 512 + 2 * 128)


def test_padding_of_ragged_rules(variants):
    """Threshold keeps room for `bound` expected loads; token choice and expert choice have no empty slots."""
    counts, clean = (384, 128), Padding(3 * 512, 3 * 512)
    for bound, rows in ((1.0, 512), (1.5, 768), (100.0, 4 * 512)):  # an expert never holds more than its whole group
        threshold = SparseConfig({"text": 4, "image": 4}, selection=ThresholdConfig(bound=bound))
        model = meta_model(SMALL, replace(variants["dense"], feed_forward=threshold), 64)
        assert padding_of(model, 2, 256, counts)["expert_rows"] == Padding(3 * rows, 3 * 512)
    for name, rows in (
        ("dense", clean),
        ("moe_7t1i", Padding(3 * (378 + 128), 3 * (378 + 128))),  # 7 floor(384 / 7)
        ("moe_4t4i", clean),
        ("token_choice", clean),
        ("token_choice_4x", Padding(3 * 1024, 3 * 1024)),
        ("untied_4t4i", clean),
    ):
        padding = padding_of(meta_model(SMALL, variants[name], 64), 2, 256, counts)
        assert padding["expert_rows"] == rows, name
        assert padding["attention_pairs"].held == 3 * 2 * 256**2
        assert padding["attention_pairs"].held == padding["attention_pairs"].needed


@pytest.mark.parametrize("name", [*STATIC, "moe_2t4i_shared", "three_modalities", "threshold", "untied_4t4i"])
def test_small_sizes_equal_what_torch_counts(name, variants, make_batch):
    """Capacities do not divide here: the same, less the experts' rows that floors cost."""
    variant = variants[name]
    batch = make_batch(variant.vocabulary, seed=0, rows=4, length=28)
    n_rows, length = batch.tokens_RL.shape
    n_tokens = n_rows * length
    counts = tuple(i.numel() for i in batch.groups.index)
    shares = tuple(n / n_tokens for n in counts)
    model = meta_model(SMALL, variant, 64)
    nominal = totals(parts_of(model, length, shares))[FORWARD] * n_tokens
    counted = counted_by_torch(SMALL, variant, 64, n_rows, length, counts)
    sizes, bound = variant.group_sizes, 4 if name == "threshold" else 1
    groups = zip([n_tokens] if len(sizes) == 1 else counts, sizes, strict=True)
    rows = sum(n if size == 1 else min(n, bound * n // size) * size for n, size in groups)
    expert = 3 * SMALL.dim * hidden_of(model)
    assert nominal + SMALL.n_layers * 2 * expert * (rows - n_tokens) == pytest.approx(counted, rel=1e-12)


def test_capacity_factor_scales_the_experts(variants):
    def flops(capacity_factor):
        selection = ExpertChoiceConfig(capacity_factor=capacity_factor)
        return feed_forward_of(variants, SparseConfig({"text": 4, "image": 4}, selection=selection)).flops

    one, half, many = (flops(c) for c in (1.0, 0.5, 100.0))
    assert half == one / 2 and many == 4 * one
