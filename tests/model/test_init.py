"""Initialisation: complete, reproducible, shared between a dense model and its sparse, untied and depth twins."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from moma.model.attention import UntiedAttentionConfig
from moma.model.feed_forward import SparseConfig
from moma.model.init import EMBEDDING_STD, SWIN_GAIN, init_weights
from moma.model.transformer import Architecture, ModelConfig, Transformer, build_model


@pytest.mark.parametrize("qk_norm", ["shared", "per_head", "none"])
@pytest.mark.parametrize("norm_order", ["swin", "pre"])
def test_every_parameter_is_initialised(variant, qk_norm, norm_order):
    config = ModelConfig(dim=16, n_layers=2, n_heads=2, qk_norm=qk_norm, norm_order=norm_order)
    vocab = variant.vocabulary
    architecture = Architecture(config, variant.feed_forward, variant.attention, variant.depth)
    with torch.device("meta"):
        model = Transformer(architecture, vocab.size, vocab.modalities, aux_routers=True)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan)
    init_weights(model, seed=0, gain=SWIN_GAIN)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            sublayer = name.endswith(("attention_norm.weight", "feed_forward_norm.weight"))
            assert (parameter == (SWIN_GAIN if sublayer else 1)).all(), name
        else:
            assert parameter.std() > 0, name
    for name, buffer in model.named_buffers():
        assert name.rsplit(".", 1)[1].startswith("routing_") and not buffer.any(), name


def test_routing_state_starts_at_zero(variants, make_model):
    model = make_model(variants["mod_4t4i"], aux_routers=True)
    state = {name for name, _ in model.named_buffers()}
    four = ("cutoff", "age", "aux_cutoff", "aux_age")
    assert state == {f"blocks.{n}.feed_forward.routing_{key}" for n in (0, 1) for key in four} | {
        f"blocks.0.routing_{key}" for key in four
    }
    assert not any(buffer.any() for buffer in model.buffers())
    assert not list(make_model(variants["dense"], aux_routers=True).buffers())


def test_scales(variant, make_model):
    """Standard deviations of the table, to sampling error."""
    hidden = int(96 * getattr(variant.feed_forward, "width", 1))
    ends = {  # what the name ends with, the first that fits: std
        "embedding.weight": EMBEDDING_STD,
        "head.weight": 64**-0.5,
        "attention.wqkv.weight": 64**-0.5,
        "attention.wqkv": 64**-0.5,
        "router": 64**-0.5,
        "aux.w1": 64**-0.5,
        "aux.w2": 32**-0.5,
        "w13": 64**-0.5,
        "attention.wo.weight": ("depth", 64**-0.5),
        "attention.wo": ("depth", 64**-0.5),
        "w2": ("depth", hidden**-0.5),
    }
    for norm_order, depth in (("swin", 1.0), ("pre", 4**-0.5)):
        fields = {"dim": 64, "hidden_dim": 96, "norm_order": norm_order}
        model = make_model(variant, dtype=torch.float32, aux_routers=True, **fields)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            plain = name
            for number in range(3):  # auxiliary routers of the experts are a list
                plain = plain.replace(f".aux.{number}.", ".aux.")
            std = next(std for end, std in ends.items() if plain.endswith(end))
            std = depth * std[1] if isinstance(std, tuple) else std
            matrices = parameter if parameter.ndim == 3 else parameter[None]
            for matrix in matrices:  # each expert, each modality
                error = 5 / (2 * matrix.numel()) ** 0.5 + 0.02  # cut at 3 std: 1.3 % less
                assert abs(matrix.std().item() / std - 1) < error, name
                assert matrix.abs().max() <= 3.0001 * std, name


def test_shared_experts_are_drawn_as_one_of_their_joint_width(variants, make_model):
    config = SparseConfig({"text": 2, "image": 2}, shared=3)
    model = make_model(replace(variants["dense"], feed_forward=config), dim=64, hidden_dim=32, norm_order="pre")
    shared = model.blocks[0].feed_forward.shared
    assert shared.w13.shape == (1, 64, 2 * 96) and shared.w2.shape == (1, 96, 64)
    for weight, std in ((shared.w13, 64**-0.5), (shared.w2, (4 * 96) ** -0.5)):
        assert abs(weight.std().item() / std - 1) < 0.06


def shared_names(one, two):
    """Names of the parameters that two models both have, in the same shape."""
    return {name for name in one if name in two and one[name].shape == two[name].shape}


def parameters(make_model, variant, **options):
    return dict(make_model(variant, seed=3, **options).named_parameters())


@pytest.mark.parametrize("norm_order", ["swin", "pre"])
def test_twins_start_from_the_same_bits(variant, variants, make_model, norm_order):
    """All but what an axis changes: experts, attention that is untied, routers of depth and of experts."""
    dense = parameters(make_model, variants["dense"], norm_order=norm_order)
    twin = parameters(make_model, variant, aux_routers=True, norm_order=norm_order)
    changed = {name for name in dense if "feed_forward.experts" in name}
    if isinstance(variant.attention, UntiedAttentionConfig):
        changed |= {name for name in dense if ".attention.w" in name or ".qk_norm." in name}
    both = shared_names(dense, twin)
    assert set(dense) - changed <= both
    for name in both:
        assert torch.equal(dense[name], twin[name]), name


def test_depth_and_untied_twins_share_their_experts(variants, make_model):
    plain = parameters(make_model, variants["moe_4t4i"])
    for name, new in (
        ("mod_4t4i", {"blocks.0.depth_router"}),
        ("untied_4t4i", {f"blocks.{n}.attention.{w}" for n in (0, 1) for w in ("wqkv", "wo")}),
    ):
        twin = parameters(make_model, variants[name])
        assert set(twin) - set(plain) == new
        for key in shared_names(plain, twin):
            assert torch.equal(plain[key], twin[key]), key


def test_dense_layers_between_sparse_ones_start_from_the_dense_bits(variants, make_model):
    dense = parameters(make_model, variants["dense"], n_layers=3)
    some = SparseConfig({"text": 4, "image": 4}, layers=(1,))
    sparse = parameters(make_model, replace(variants["dense"], feed_forward=some), n_layers=3)
    same = shared_names(dense, sparse)
    assert {name for name in dense if "blocks.1.feed_forward.experts" not in name} <= same
    assert all(torch.equal(dense[name], sparse[name]) for name in same)


def test_seeds_layers_and_experts_differ(variant, make_model):
    one, two = (dict(make_model(variant, seed=s).named_parameters()) for s in (0, 1))
    again = dict(make_model(variant, seed=0).named_parameters())
    for name, parameter in one.items():
        assert torch.equal(parameter, again[name])
        if "norm" not in name:
            assert not torch.equal(parameter, two[name]), name
            if name.startswith("blocks.0"):
                other = one.get(name.replace("blocks.0", "blocks.1"))  # not every layer has a depth router
                assert other is None or not torch.equal(parameter, other), name
        if parameter.ndim == 3 and "norm" not in name:
            assert len({w.sum().item() for w in parameter}) == len(parameter), "experts, modalities must differ"


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
    model = build_model(Architecture(config), 64, seed=0)
    model.blocks[0].extra = nn.ParameterDict({"mystery": nn.Parameter(torch.empty(2, 2))})
    with pytest.raises(KeyError, match="no initialisation for parameter blocks.0.extra.mystery"):
        init_weights(model, seed=0)
