"""Attention by blocks against torch's under a boolean mask: float64, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from moma.model import blocked_attention
from moma.model.attention import dense_mask
from moma.model.blocked_attention import document_attention

# lengths of the documents of each row: one and many, boundaries on and off the blocks' (of 4 queries), a single token
ROWS = {
    "one": [[13]],
    "many": [[1, 3, 4, 2, 3], [4, 4, 1, 4]],
    "long_then_short": [[10, 1, 1, 1], [1, 12]],
    "of_one_token": [[1] * 6],
    "shorter_than_a_block": [[2, 1]],
}


def documents(rows):
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def draw(heads, key_heads, document_RL, dtype=torch.float64, seed=0):
    n_rows, length = document_RL.shape
    source = torch.Generator().manual_seed(seed)
    sizes = [(n_rows, length, n, 6) for n in (heads, key_heads, key_heads)]
    return [
        torch.randn(size, generator=source, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()
        for size in sizes
    ]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked_attention, "BLOCK", 4)


@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize("rows", ROWS)
def test_values_and_gradients_are_those_under_a_boolean_mask(rows, heads, key_heads):
    document_RL = documents(ROWS[rows])
    q, k, v = draw(heads, key_heads, document_RL)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(document_RL), enable_gqa=True)
    got = document_attention(q, k, v, document_RL)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    weight = torch.randn(got.shape, dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (got, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_bf16_is_as_close_to_float64_as_torch_s_own():
    document_RL = documents([[40, 24], [64]])
    exact = draw(4, 2, document_RL)
    low = [x.detach().bfloat16().requires_grad_() for x in exact]

    def outcome(attend, tensors):
        y = attend(*tensors)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return [y, *torch.autograd.grad((y.double() * weight).sum(), tensors)]

    def ours(q, k, v):
        return document_attention(q, k, v, document_RL)

    def theirs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(document_RL), enable_gqa=True)

    for want, got, other in zip(outcome(theirs, exact), outcome(ours, low), outcome(theirs, low), strict=True):
        off, off_other = ((x.double() - want).norm() / want.norm() for x in (got, other))
        assert off < 0.01 and off < 1.5 * off_other


def test_what_a_query_must_not_see_does_not_reach_it():
    document_RL = documents([[5, 8]])
    q, k, v = draw(2, 2, document_RL)
    before = document_attention(q, k, v, document_RL)
    with torch.no_grad():
        for hidden in (slice(0, 5), slice(9, 13)):  # another document, the future
            k[:, :, hidden], v[:, :, hidden] = 1e3, -1e3
    after = document_attention(q, k, v, document_RL)
    assert torch.equal(after[:, :, 5:9], before[:, :, 5:9]) and not torch.equal(after, before)


def test_it_compiles_to_one_graph_and_counts_the_flops_of_every_key():
    document_RL = documents([[5, 8]])
    q, k, v = draw(2, 2, document_RL)
    torch._dynamo.reset()
    compiled = torch.compile(document_attention, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, document_RL), document_attention(q, k, v, document_RL))
    with FlopCounterMode(display=False) as counter:
        document_attention(q, k, v, document_RL).sum().backward()
    assert counter.get_total_flops() == (4 + 8) * 2 * 13 * 13 * 6
