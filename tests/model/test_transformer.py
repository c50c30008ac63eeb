"""The whole decoder: causality by routing mode, one graph per block, caches, errors."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moma.model.attention import AttentionMask, dense_mask
from moma.model.feed_forward import CAUSAL_MODES
from moma.model.loss import linear_cross_entropy
from moma.model.transformer import ModelConfig


def hidden(model, batch, mode="train"):
    return model(batch.tokens_RL, batch.position_RL, batch.mask, batch.groups, mode)


def step(model, batch, mode="train"):
    """Loss, hidden states and gradients of one forward and backward pass."""
    model.zero_grad()
    h_RLD, stats = hidden(model, batch, mode)
    target_T = batch.target_RL.flatten()
    out = linear_cross_entropy(h_RLD.flatten(0, 1), model.head.weight, target_T, denominator=10.0)
    out.objective.backward()
    return out.objective.detach(), h_RLD.detach(), {n: p.grad for n, p in model.named_parameters()}, stats


def with_another_future(batch, vocab, row, position, rebuild):
    """The same batch with one token replaced by another of its modality."""
    tokens_RL = batch.tokens_RL.clone()
    old = int(tokens_RL[row, position])
    start, stop = vocab.text_start, vocab.text_stop
    for low, high in vocab.ranges:
        if low <= old < high:
            start, stop = low, high
    tokens_RL[row, position] = start + (old - start + 1) % (stop - start)
    return rebuild(tokens_RL, batch.document_RL, vocab)


def change_before(model, batch, other, row, position, mode):
    """Largest change among the outputs of earlier tokens of the row (and of all other rows)."""
    with torch.no_grad():
        change_RL = (hidden(model, batch, mode)[0] - hidden(model, other, mode)[0]).abs().amax(-1)
    assert change_RL[row, position] > 1e-3, "the planted token must matter"
    change_RL[row, position:] = 0
    return change_RL.max().item()


@pytest.mark.parametrize("norm_order", ["swin", "pre"])
def test_later_tokens_change_earlier_outputs_under_batch_wide_rules_alone(
    variant, norm_order, make_batch, make_model, rebuild, settle
):
    vocab = variant.vocabulary
    batch = make_batch(vocab, seed=7)
    model = make_model(variant, aux_routers=True, norm_order=norm_order)
    settle(model, batch)
    assert model.needs_future == variant.sees_future and model.causal_modes() == CAUSAL_MODES
    leaks = dict.fromkeys(("train", *CAUSAL_MODES), 0.0)
    for row in range(len(batch.tokens_RL)):
        for position in range(4, batch.tokens_RL.shape[1], 5):
            other = with_another_future(batch, vocab, row, position, rebuild)
            for mode in leaks:
                change = change_before(model, batch, other, row, position, mode)
                leaks[mode] = max(leaks[mode], change)
    if variant.sees_future:
        assert leaks.pop("train") > 1e-3, "the rule sees the future: the test must be able to tell"
    assert max(leaks.values()) < 1e-10


@pytest.mark.parametrize("mode", CAUSAL_MODES)
def test_documents_are_independent_in_causal_modes(variant, mode, make_batch, make_model, rebuild, settle):
    vocab = variant.vocabulary
    batch = make_batch(vocab, seed=8)
    model = make_model(variant, aux_routers=True)
    settle(model, batch)
    with torch.no_grad():
        packed, _ = hidden(model, batch, mode)
        for row in range(len(batch.tokens_RL)):
            for document in (0, 1):
                here = batch.document_RL[row] == document
                alone = rebuild(batch.tokens_RL[row, here][None], torch.zeros(1, int(here.sum())).long(), vocab)
                torch.testing.assert_close(hidden(model, alone, mode)[0][0], packed[row, here], rtol=0, atol=1e-10)


class FakeCache:
    def __init__(self):
        self.k = self.v = self.seen = None

    def update(self, k, v):
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v

    def let_in(self, in_RL):
        self.seen = in_RL if self.seen is None else torch.cat([self.seen, in_RL], dim=1)
        itself = torch.zeros(in_RL.shape[1], self.seen.shape[1], dtype=torch.bool)
        itself[:, -in_RL.shape[1] :] = torch.eye(in_RL.shape[1], dtype=torch.bool)
        return (self.seen[:, None] | itself)[:, None]


@pytest.mark.parametrize("mode", CAUSAL_MODES)
def test_token_by_token_with_caches_equals_the_full_forward(variant, mode, make_batch, make_model, rebuild, settle):
    vocab = variant.vocabulary
    batch = make_batch(vocab, seed=9, rows=2)
    model = make_model(variant, aux_routers=True, n_kv_heads=1)
    settle(model, batch)
    caches = [FakeCache() for _ in model.blocks]
    parts = []
    with torch.no_grad():
        full, _ = hidden(model, batch, mode)
        for i in range(batch.tokens_RL.shape[1]):
            here = slice(i, i + 1)
            groups = rebuild(batch.tokens_RL[:, here], batch.document_RL[:, here] * 0, vocab).groups
            mask = AttentionMask(dense_mask(batch.mask.document_RL)[:, :, here, : i + 1])
            x = batch.tokens_RL[:, here], batch.position_RL[:, here], mask, groups, mode, caches
            parts.append(model(*x)[0])
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-10)


def test_statistics_come_from_every_router(variant, make_batch, make_model):
    model = make_model(variant)
    _, stats = hidden(model, make_batch(variant.vocabulary, seed=1))
    need = {"0": variant.n_routed, "1": variant.n_routed} if variant.n_routed else {}
    if variant.depth.kind != "full":
        need["0.depth"] = 1 if variant.depth.kind == "mod" else 2
    assert {name: s.selected_TE.shape for name, s in stats.items()} == {n: (75, c) for n, c in need.items()}
    assert all(s.aux_logit_TE is None for s in stats.values()) and model.routers().keys() == stats.keys()


@pytest.mark.parametrize("padded, norm_order", [(False, "swin"), (True, "pre")])
def test_one_graph_serves_every_block_and_batch(variant, padded, norm_order, make_batch, make_model, rebuild):
    """Forward and backward in one graph each per kind of block, for batches of differing content."""
    if variant.depth.kind != "full" and padded:
        pytest.skip("test_depth.py compiles the padded form of every kind of depth")
    torch._dynamo.reset()
    vocab = variant.vocabulary
    eager, compiled = make_model(variant, norm_order=norm_order), make_model(variant, norm_order=norm_order)
    counter = CompileCounterWithBackend("aot_eager")
    for block in compiled.blocks:
        block.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            batch = make_batch(vocab, seed)
            if padded:  # rows end in a differing amount of padding
                document_RL = batch.document_RL.clone()
                document_RL[-1, 21 - seed :] = -1
                batch = rebuild(batch.tokens_RL, document_RL, vocab)
            loss, h_RLD, grads, stats = step(eager, batch)
            loss_c, h_c_RLD, grads_c, stats_c = step(compiled, batch)
            torch.testing.assert_close(loss_c, loss, rtol=1e-12, atol=0)
            torch.testing.assert_close(h_c_RLD, h_RLD, rtol=1e-11, atol=1e-12)
            for name in grads:
                torch.testing.assert_close(grads_c[name], grads[name], rtol=1e-9, atol=1e-12)
            for name, s in stats.items():
                assert torch.equal(s.selected_TE, stats_c[name].selected_TE)
    assert counter.frame_count == len({type(block) for block in compiled.blocks})
    torch._dynamo.reset()


@pytest.mark.skipif(not any(shutil.which(c) for c in ("g++", "clang++", "c++")), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["dense", "moe_4t4i"])
def test_inductor_equals_eager(name, variants, make_batch, make_model):
    """Whole blocks, forward and backward, as one graph that serves batches of differing content."""
    torch._dynamo.reset()
    variant = variants[name]
    eager = make_model(variant, dtype=torch.float32, n_layers=1)
    compiled = make_model(variant, dtype=torch.float32, n_layers=1)
    compiled.blocks[0].compile(fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            batch = make_batch(variant.vocabulary, seed)
            loss, h_RLD, grads, _ = step(eager, batch)
            loss_c, h_c_RLD, grads_c, _ = step(compiled, batch)
            torch.testing.assert_close(loss_c, loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(h_c_RLD, h_RLD, rtol=1e-4, atol=1e-5)
            for parameter, grad in grads.items():
                torch.testing.assert_close(grads_c[parameter], grad, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


def test_same_bits_every_time(variant, make_batch, make_model):
    batch = make_batch(variant.vocabulary, seed=2)
    runs = [step(make_model(variant, dtype=torch.float32), batch) for _ in range(2)]
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(runs[0][2][n], runs[1][2][n]) for n in runs[0][2])


def test_every_parameter_but_auxiliary_ones_gets_a_gradient(variant, make_batch, make_model):
    _, _, grads, _ = step(make_model(variant, aux_routers=True), make_batch(variant.vocabulary, seed=2))
    for name, grad in grads.items():
        if ".aux." in name:
            assert grad is None
        else:
            assert grad is not None and grad.isfinite().all() and grad.any(), name


def test_float64_stays_float64(variant, make_batch, make_model):
    """No step through fp32 on the way: a perturbation of 1e-12 of the embedding is still visible."""
    batch = make_batch(variant.vocabulary, seed=2)
    model = make_model(variant, aux_routers=True)
    h_RLD, stats = hidden(model, batch, "aux")
    assert h_RLD.dtype == torch.float64
    for s in stats.values():
        assert s.score_TE.dtype == torch.float64 and (s.aux_logit_TE is None or s.aux_logit_TE.dtype == torch.float64)
    direction = torch.randn(model.embedding.weight.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        model.embedding.weight += 1e-12 * direction
        change_RLD = (hidden(model, batch, "aux")[0] - h_RLD).abs()
    assert 0 < change_RLD.max() < 1e-9
    assert (change_RLD > 0).double().mean() > 0.9


def test_bf16_autocast_trains_without_nan(variant, make_batch, make_model):
    batch = make_batch(variant.vocabulary, seed=2)
    model = make_model(variant, dtype=torch.float32)
    loss, _, _, _ = step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        low, h_RLD, grads, stats = step(model, batch)
    assert h_RLD.dtype == torch.float32
    assert abs(low - loss) < 0.02 * loss
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values() if g is not None)
    assert all(s.score_TE.dtype == torch.float32 for s in stats.values())


@pytest.mark.parametrize("dim, n_heads", [(20, 3), (12, 4)])
def test_heads_must_divide_the_width_evenly(dim, n_heads):
    with pytest.raises(ValueError, match=f"got dim={dim} and n_heads={n_heads}, need an even dim / n_heads"):
        ModelConfig(dim=dim, n_layers=1, n_heads=n_heads)


def test_key_heads_must_divide_heads():
    with pytest.raises(ValueError, match="got n_heads=4 and n_kv_heads=3, need a multiple: change one of the two"):
        ModelConfig(dim=16, n_layers=1, n_heads=4, n_kv_heads=3)


@pytest.mark.parametrize("dim, width", [(512, 1376), (1024, 2752), (2048, 5472), (2304, 6144)])
def test_swiglu_width(dim, width):
    assert ModelConfig(dim=dim, n_layers=1, n_heads=8).ffn_dim == width
    assert ModelConfig(dim=dim, n_layers=1, n_heads=8, hidden_dim=100).ffn_dim == 100
