"""Attention against loops over rows, heads and pairs of tokens, in float64."""

import math

import pytest
import torch
from torch import nn

from moma.model.attention import Attention, document_mask, rotate

DIM, HEADS, THETA, EPS = 16, 4, 10_000.0, 1e-5
CASES = {
    "shared": ("shared", 4),
    "per_head": ("per_head", 4),
    "none": ("none", 4),
    "grouped_shared": ("shared", 2),
    "grouped_per_head": ("per_head", 2),
    "one_kv_head": ("per_head", 1),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def attention(request):
    qk_norm, kv_heads = request.param
    module = Attention(DIM, HEADS, kv_heads, qk_norm, THETA, EPS).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return module


def states(n_rows, length, seed=0):
    return torch.randn(n_rows, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positions(n_rows, length):
    return torch.arange(length).expand(n_rows, length)


def rotated(v, position):
    """Pairs (a, a + A/2) turned by position * theta^(-2a/A)."""
    size = len(v)
    out = [None] * size
    for a in range(size // 2):
        angle = position * THETA ** (-2 * a / size)
        c, s = math.cos(angle), math.sin(angle)
        out[a] = v[a] * c - v[a + size // 2] * s
        out[a + size // 2] = v[a + size // 2] * c + v[a] * s
    return torch.stack(out)


def normed(v, module, name, head):
    if not len(module.qk_norm):
        return v
    mean = v.mean()
    standard = (v - mean) / torch.sqrt(((v - mean) ** 2).mean() + EPS)
    weight, bias = module.qk_norm[f"{name}_weight"], module.qk_norm[f"{name}_bias"]
    head = head if len(weight) > 1 else 0
    return standard * weight[head, 0] + bias[head, 0]


def loop_reference(module, x_RLD, position_RL, document_RL):
    size, groups = DIM // HEADS, module.n_kv_heads
    wq, wk, wv = module.wqkv.weight.split([HEADS * size, groups * size, groups * size])
    rows = []
    for x_LD, position, document in zip(x_RLD, position_RL.tolist(), document_RL.tolist(), strict=True):
        out = []
        for i in range(len(x_LD)):
            heads = []
            for h in range(HEADS):
                g = h // (HEADS // groups)
                of = [slice(n * size, (n + 1) * size) for n in (h, g)]
                q = rotated(normed(wq[of[0]] @ x_LD[i], module, "q", h), position[i])
                seen = [j for j in range(i + 1) if document[j] == document[i]]
                logits = []
                for j in seen:
                    k = rotated(normed(wk[of[1]] @ x_LD[j], module, "k", g), position[j])
                    logits.append((q * k).sum() / math.sqrt(size))
                weight = torch.stack(logits).exp()
                weight = weight / weight.sum()
                heads.append(sum(w * (wv[of[1]] @ x_LD[j]) for w, j in zip(weight, seen, strict=True)))
            out.append(module.wo.weight @ torch.cat(heads))
        rows.append(torch.stack(out))
    return torch.stack(rows)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1, 1]])


def test_equals_the_loops(attention):
    x_RLD = states(*DOCUMENTS.shape).requires_grad_()
    position_RL = positions(*DOCUMENTS.shape)
    got = attention(x_RLD, position_RL, document_mask(DOCUMENTS))
    expected = loop_reference(attention, x_RLD, position_RL, DOCUMENTS)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    wanted = [x_RLD, *attention.parameters()]
    weight = states(*DOCUMENTS.shape, seed=5)
    for g, n in zip(
        torch.autograd.grad((got * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(g, n, rtol=1e-9, atol=1e-11)


def test_mask_is_causal_inside_documents():
    mask = document_mask(DOCUMENTS)
    assert mask.shape == (2, 1, 9, 9) and mask.dtype == torch.bool
    for r in range(2):
        for i in range(9):
            for j in range(9):
                assert mask[r, 0, i, j] == (j <= i and DOCUMENTS[r, i] == DOCUMENTS[r, j])


def test_sees_neither_the_future_nor_another_document(attention):
    x_RLD = states(*DOCUMENTS.shape).requires_grad_()
    y_RLD = attention(x_RLD, positions(*DOCUMENTS.shape), document_mask(DOCUMENTS))
    for r in range(2):
        for i in range(9):
            (grad,) = torch.autograd.grad(y_RLD[r, i].sum(), x_RLD, retain_graph=True)
            reached = grad.abs().sum(-1) > 0
            expected = torch.zeros(2, 9).bool()
            expected[r] = (torch.arange(9) <= i) & (DOCUMENTS[r] == DOCUMENTS[r, i])
            assert torch.equal(reached, expected)


def test_packed_documents_equal_each_document_alone(attention):
    """RoPE is relative: a document's outputs do not depend on where it stands in the row."""
    x_RLD = states(*DOCUMENTS.shape)
    packed = attention(x_RLD, positions(*DOCUMENTS.shape) + 37, document_mask(DOCUMENTS))
    for r in range(2):
        for d in range(int(DOCUMENTS[r].max()) + 1):
            here = DOCUMENTS[r] == d
            length = int(here.sum())
            one = document_mask(torch.zeros(1, length, dtype=torch.int64))
            alone = attention(x_RLD[r, here][None], positions(1, length), one)
            torch.testing.assert_close(packed[r, here], alone[0], rtol=0, atol=1e-10)


class FakeCache:
    """Appends keys and values; what a real cache must do."""

    def __init__(self):
        self.k = self.v = None

    def update(self, k, v):
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v


@pytest.mark.parametrize("chunks", [(9,), (4, 1, 1, 3), (1,) * 9])
def test_cache_equals_the_full_forward(attention, chunks):
    x_RLD, position_RL = states(*DOCUMENTS.shape), positions(*DOCUMENTS.shape)
    mask = document_mask(DOCUMENTS)
    full, cache, parts, start = attention(x_RLD, position_RL, mask), FakeCache(), [], 0
    for n in chunks:
        here = slice(start, start + n)
        visible = mask[:, :, here, : start + n]
        parts.append(attention(x_RLD[:, here], position_RL[:, here], visible, cache))
        start += n
    assert cache.k.shape == (2, attention.n_kv_heads, 9, DIM // HEADS)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-12)


def test_rotation_keeps_length_and_depends_on_distance_alone():
    x, y = (states(1, 6, seed).view(1, 1, 6, DIM) for seed in (1, 2))
    near = rotate(x, positions(1, 6), THETA) * rotate(y, positions(1, 6) + 3, THETA)
    far = rotate(x, positions(1, 6) + 500, THETA) * rotate(y, positions(1, 6) + 503, THETA)
    torch.testing.assert_close(near.sum(-1), far.sum(-1), rtol=0, atol=1e-10)
    torch.testing.assert_close(rotate(x, positions(1, 6), THETA).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, torch.zeros(1, 6).long(), THETA), x)


def test_rotation_of_low_precision_is_computed_in_fp32():
    x = states(1, 6).view(1, 1, 6, DIM)
    low = rotate(x.bfloat16(), positions(1, 6) + 4000, THETA)
    exact = rotate(x.bfloat16().double(), positions(1, 6) + 4000, THETA)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, rtol=2**-8, atol=2e-3)


def test_bf16_autocast_stays_close_to_fp32(attention):
    attention, x_RLD = attention.float(), states(*DOCUMENTS.shape).float().requires_grad_()
    mask = document_mask(DOCUMENTS)
    exact = attention(x_RLD, positions(*DOCUMENTS.shape), mask)
    with torch.autocast("cpu", torch.bfloat16):
        low = attention(x_RLD, positions(*DOCUMENTS.shape), mask)
    low.float().square().sum().backward()
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() < 0.03 * exact.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
