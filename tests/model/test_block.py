"""Pre- and Swin-norm wiring against the formulas, and the norm itself."""

import pytest
import torch
from torch import nn

from moma.model.attention import Attention
from moma.model.block import Block, RMSNorm
from moma.model.feed_forward import build_feed_forward

LAYERS_ONLY = True
DIM, EPS = 16, 1e-5


def new_block(variant, norm_order):
    attention = Attention(DIM, 2, 2, "shared", 10_000.0, EPS)
    modalities = variant.vocabulary.modalities
    feed_forward = build_feed_forward(variant.feed_forward, 0, 2, DIM, 24, modalities, False)
    block = Block(DIM, attention, feed_forward, norm_order, EPS).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return block


def norm_by_hand(x, norm):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * norm.weight


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
def test_wiring_equals_the_formulas(variant, norm_order, make_batch):
    batch = make_batch(variant.vocabulary, seed=1)
    block = new_block(variant, norm_order)
    x = torch.randn(*batch.tokens_RL.shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def attn(v):
        return block.attention(v, batch.position_RL, batch.mask, batch.groups)

    def ffn(v):
        return block.feed_forward(v.reshape(-1, DIM), batch.groups, "train")[0].view(v.shape)

    first, second = block.attention_norm, block.feed_forward_norm
    if norm_order == "pre":
        h = x + attn(norm_by_hand(x, first))
        expected = h + ffn(norm_by_hand(h, second))
    else:
        h = x + norm_by_hand(attn(x), first)
        expected = h + norm_by_hand(ffn(h), second)
    got, stats = block(x, batch.position_RL, batch.mask, batch.groups, "train")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    assert list(stats) == ([""] if variant.n_routed else [])


def test_norm_of_zero_is_zero_with_a_finite_gradient():
    norm = RMSNorm(DIM, EPS).double()
    nn.init.ones_(norm.weight)
    x = torch.zeros(3, DIM, dtype=torch.float64, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y)) and x.grad.isfinite().all() and norm.weight.grad.isfinite().all()


def test_norm_is_computed_in_fp32():
    norm = RMSNorm(DIM, EPS)
    nn.init.ones_(norm.weight)
    x = torch.randn(4, DIM).bfloat16()
    assert norm(x).dtype == torch.float32
    torch.testing.assert_close(norm(x), norm_by_hand(x.double(), norm).float())
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
