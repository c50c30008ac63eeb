"""Initialisation: complete, reproducible, shared between a dense model and its sparse twin."""

import pytest
import torch
from torch import nn

from moma.model.init import EMBEDDING_STD, init_weights
from moma.model.transformer import ModelConfig, Transformer, build_model


@pytest.mark.parametrize("qk_norm", ["shared", "per_head", "none"])
@pytest.mark.parametrize("norm_order", ["swin", "pre"])
def test_every_parameter_is_initialised(variant, qk_norm, norm_order):
    config = ModelConfig(dim=16, n_layers=2, n_heads=2, qk_norm=qk_norm, norm_order=norm_order)
    vocab = variant.vocabulary
    with torch.device("meta"):
        model = Transformer(config, variant.feed_forward, vocab.size, vocab.modalities, aux_routers=True)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan)
    init_weights(model, seed=0)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std() > 0, name
    assert not list(model.buffers())


def test_scales(variant, make_model):
    """Standard deviations of the table, to sampling error."""
    for norm_order, depth in (("swin", 1.0), ("pre", 4**-0.5)):
        fields = {"dim": 64, "hidden_dim": 96, "norm_order": norm_order}
        model = make_model(variant, dtype=torch.float32, aux_routers=True, **fields)
        expected = {"embedding.weight": EMBEDDING_STD, "head.weight": 64**-0.5}
        for name, parameter in model.named_parameters():
            if name in expected:
                std = expected[name]
            elif "norm" in name:
                continue
            elif "wqkv" in name or name.endswith(("router", "w13", "w1")):
                std = 64**-0.5
            elif name.endswith("wo.weight"):
                std = depth * 64**-0.5
            elif ".aux." in name:
                std = 32**-0.5
            else:
                std = depth * 96**-0.5
            error = 5 / (2 * parameter.numel()) ** 0.5 + 0.02  # cut at 3 std: 1.3 % less
            assert abs(parameter.std().item() / std - 1) < error, name
            assert parameter.abs().max() <= 3.0001 * std, name


def test_sparse_model_starts_from_its_dense_twins_bits(variant, variants, make_model):
    dense = dict(make_model(variants["dense"], seed=3).named_parameters())
    sparse = dict(make_model(variant, seed=3, aux_routers=True).named_parameters())
    shared = [n for n in dense if "feed_forward.experts" not in n]
    assert len(shared) == len(dense) - 4
    for name in shared:
        assert torch.equal(dense[name], sparse[name]), name


def test_seeds_layers_and_experts_differ(variant, make_model):
    one, two = (dict(make_model(variant, seed=s).named_parameters()) for s in (0, 1))
    again = dict(make_model(variant, seed=0).named_parameters())
    for name, parameter in one.items():
        assert torch.equal(parameter, again[name])
        if "norm" not in name:
            assert not torch.equal(parameter, two[name]), name
            if name.startswith("blocks.0"):
                assert not torch.equal(parameter, one[name.replace("blocks.0", "blocks.1")]), name
        if name.endswith("w13"):
            assert len({w.sum().item() for w in parameter}) == len(parameter), "experts must differ"


def test_precision_does_not_change_the_numbers(variants, make_model):
    low, high = (make_model(variants["moe_4t4i"], dtype=d) for d in (torch.float32, torch.float64))
    for a, b in zip(low.parameters(), high.parameters(), strict=True):
        assert torch.equal(a.double(), b)


def test_global_generator_is_left_alone(variants, make_model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make_model(variants["dense"])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_parameter_is_an_error(variants):
    config = ModelConfig(dim=16, n_layers=1, n_heads=2)
    model = build_model(config, variants["dense"].feed_forward, 64, seed=0)
    model.blocks[0].extra = nn.ParameterDict({"mystery": nn.Parameter(torch.empty(2, 2))})
    with pytest.raises(KeyError, match="no initialisation for parameter blocks.0.extra.mystery"):
        init_weights(model, seed=0)
