"""Mixture of depths against loops: float64, one token at a time, attention over the chosen tokens alone.

chosen: the floor(c T) best of sigmoid(x W_d), first among equals the earlier token (`mod_quota`: of every modality)
out = x + sigmoid(x W_d) (a + y) for them, a and y what attention and feed-forward add after their norms; out = x else
"""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from moma.generation.kv_cache import Decoder
from moma.modality import TokenGroups, exact_groups, modality_of, padded_groups
from moma.model.attention import AttentionMask, SharedAttentionConfig, UntiedAttentionConfig, document_mask
from moma.model.depth import DepthConfig, FullDepthConfig
from moma.model.feed_forward import CAUSAL_MODES, DenseConfig, SparseConfig
from moma.model.routing import Disturbance
from moma.model.routing.threshold import ThresholdConfig
from moma.model.routing.token_choice import TokenChoiceConfig

DIM, HEADS, KV_HEADS, HIDDEN, EPS, THETA = 8, 2, 1, 6, 1e-5, 10_000.0
FEED_FORWARDS = {
    "dense": DenseConfig(),
    "8x": SparseConfig({"all": 3}),
    "1t1i": SparseConfig({"text": 1, "image": 1}),
    "4t4i": SparseConfig({"text": 2, "image": 3}, shared=1),
    "token_choice": SparseConfig(
        {"text": 3, "image": 2}, selection=TokenChoiceConfig(k=2, weights="renormalised", balance=0.1)
    ),
    "threshold": SparseConfig({"text": 2, "image": 2}, selection=ThresholdConfig(warmup_steps=1, bound=2.0)),
    "threshold_8x": SparseConfig({"all": 3}, selection=ThresholdConfig(warmup_steps=1, bound=1.0)),
}
ATTENTIONS = {"shared": SharedAttentionConfig(), "untied": UntiedAttentionConfig()}
KINDS = ("mod", "mod_quota")

# rows of tokens (T text, I image, A audio, . padding) and their documents
LAYOUTS = {
    "mixed": (("TIITTIIT", "TTIITITI", "ITTTIITT"), ("00001111", "00111222", "00000000")),
    "padding": (("TIITTIIT", "TTIITI..", "....ITT."), ("00001111", "001112..", "....000.")),
    "no_image": (("TTTTTTTT", "TTTTTTTT"), ("00001111", "00000001")),
    "few": (("TIT",), ("000",)),
    "only_padding": (("....", "...."), ("....", "....")),
}
IDS = {"T": 30, "I": 4, "A": 56, ".": 1}
DOUBLE = torch.float64


class Batch(NamedTuple):
    position_RL: torch.Tensor
    mask: AttentionMask
    groups: TokenGroups
    modality: list[int]  # of the flat tokens, -1 for padding
    document: list[tuple[int, int]]  # row and document of the flat tokens


def batch_of(rows, documents, vocab, padded=False):
    ids_RL = torch.tensor([[IDS[c] for c in row] for row in rows])
    document_RL = torch.tensor([[-1 if c == "." else int(c) for c in row] for row in documents])
    present_RL = document_RL >= 0
    exact = present_RL.all() and not padded
    groups = exact_groups(ids_RL, vocab) if exact else padded_groups(ids_RL, present_RL, vocab)
    position_RL = torch.arange(ids_RL.shape[1]).expand(ids_RL.shape) + 3
    modality = torch.where(present_RL, modality_of(ids_RL, vocab), -1).flatten().tolist()
    document = [(r, d) for r, row in enumerate(document_RL.tolist()) for d in row]
    return Batch(position_RL, document_mask(document_RL), groups, modality, document)


@pytest.fixture
def new_block(variants, make_model):
    """`new_block(feed_forward, kind, capacity=0.5, ...)`: one block with random weights and routing state."""

    def make(feed_forward, kind, capacity=0.5, attention="shared", norm_order="swin", aux=False, three=False):
        base = variants["three_modalities" if three else "dense"]
        depth = FullDepthConfig() if kind == "full" else DepthConfig(kind, capacity)
        variant = replace(base, feed_forward=feed_forward, attention=ATTENTIONS[attention], depth=depth)
        sizes = dict(dim=DIM, n_layers=1, n_heads=HEADS, n_kv_heads=KV_HEADS, hidden_dim=HIDDEN, norm_eps=EPS)
        block = make_model(variant, aux_routers=aux, norm_order=norm_order, **sizes).blocks[0]
        shake(block)
        return block

    return make


def shake(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        nn.init.normal_(parameter, std=0.6, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    for name, state in sorted(module.named_buffers()):
        state.fill_(9) if name.endswith("age") else nn.init.normal_(state, std=0.4, generator=generator)


def states(batch, seed=1):
    shape = (*batch.position_RL.shape, DIM)
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def run(block, x_RLD, batch, mode="train", cache=None, **disturbance):
    return block(
        x_RLD, batch.position_RL, batch.mask, batch.groups, mode, cache, Disturbance(**disturbance)
    )  # fmt: skip


# --- the reference ---------------------------------------------------------------------------------------------------


def first(values, k):
    """The numbers of the k first of a list, best first, lower number first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def sigmoid(v):
    return 1 / (1 + torch.exp(-v))


def rms(v, norm):
    return v / torch.sqrt((v * v).mean() + EPS) * norm.weight


def layer_norm(v, module, name, head, m):
    v = (v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + EPS)
    weight, bias = module.qk_norm[f"{name}_weight"], module.qk_norm[f"{name}_bias"]
    weight, bias = (weight, bias) if module.n_modalities is None else (weight[m], bias[m])
    return v * weight[head % len(weight), 0] + bias[head % len(bias), 0]


def rotated(v, position):
    half = len(v) // 2
    angle = torch.tensor([position * THETA ** (-a / half) for a in range(half)], dtype=v.dtype)
    a, b = v[:half], v[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def attention_by_hand(module, x, tokens, batch):
    """Outputs by token of `tokens` alone, states `x` by token."""
    size, position, q, k, v = DIM // HEADS, batch.position_RL.flatten().tolist(), {}, {}, {}
    for t in tokens:
        m = batch.modality[t]
        matrix = module.wqkv.weight.T if module.n_modalities is None else module.wqkv[m]
        parts = (x[t] @ matrix).split(size)
        q[t] = [rotated(layer_norm(parts[h], module, "q", h, m), position[t]) for h in range(HEADS)]
        k[t] = [rotated(layer_norm(parts[HEADS + g], module, "k", g, m), position[t]) for g in range(KV_HEADS)]
        v[t] = parts[HEADS + KV_HEADS :]
    out = {}
    for t in tokens:
        seen, heads = [j for j in tokens if j <= t and batch.document[j] == batch.document[t]], []
        for h in range(HEADS):
            g = h * KV_HEADS // HEADS
            weight = torch.stack([(q[t][h] * k[j][g]).sum() / math.sqrt(size) for j in seen]).exp()
            heads.append(sum(w / weight.sum() * v[j][g] for w, j in zip(weight, seen, strict=True)))
        matrix = module.wo.weight.T if module.n_modalities is None else module.wo[batch.modality[t]]
        out[t] = torch.cat(heads) @ matrix
    return out


def swiglu(v, experts, e):
    a, b = (v @ experts.w13[e]).chunk(2)
    return (a * sigmoid(a) * b) @ experts.w2[e]


def pairs_by_hand(layer, logit, state, mode, aux, n_slots):
    """Pairs (place in the group, expert) that a group's experts compute, and their gates given all pairs."""
    config, kind, (n, size) = layer.selection, layer.selection.kind, logit.shape
    if kind == "token_choice":
        chosen = [first((p.softmax(0) + state["bias"]).tolist(), config.k) for p in logit]
        p = logit.softmax(1)
        pairs = {(i, e) for i in range(n) for e in chosen[i]}
        return pairs, lambda i, e, taken: p[i, e] / sum(p[i, o] for o in range(size) if (i, o) in taken)
    if mode in ("aux", "aux_calibrated") and kind == "expert_choice":
        cutoff = torch.zeros(size) if mode == "aux" else state["aux_cutoff"]
        pairs = {(i, e) for i in range(n) for e in range(size) if aux[i, e] > cutoff[e]}
    elif mode != "train" or kind == "threshold":
        above = [[i for i in range(n) if logit[i, e] > state["cutoff"][e]] for e in range(size)]
        room = n if mode != "train" else math.floor(config.bound * n_slots / size)
        pairs = {(i, e) for e in range(size) for i in above[e][:room]}
    else:
        pairs = {(i, e) for e in range(size) for i in first(logit[:, e].tolist(), n // size)}
    return pairs, lambda i, e, taken: sigmoid(logit[i, e])


def feed_forward_by_hand(layer, x, tokens, batch, mode, flips, n_slots):
    """Outputs by token of `tokens` alone, and the computed pairs (column, token); `flips` are such pairs.

    `n_slots`: places that static shapes hold, of which the bound of the threshold rule is a share.
    """
    if not hasattr(layer, "groups"):
        return {t: swiglu(x[t], layer.experts[0], 0) for t in tokens}, set()
    out = {t: 0 * x[t] for t in tokens} if layer.shared is None else {t: swiglu(x[t], layer.shared, 0) for t in tokens}
    computed, column, routed = set(), 0, 0
    for m, (name, size) in enumerate(layer.groups.items()):
        members = [t for t in tokens if name == "all" or batch.modality[t] == m]
        if size == 1:
            for t in members:
                out[t] = out[t] + swiglu(x[t], layer.experts[m], 0)
            continue
        group = torch.stack([x[t] for t in members]) if members else torch.zeros(0, DIM, dtype=DOUBLE)
        logit = group @ layer.router[:, column : column + size]
        aux = layer.aux[routed](group) if len(layer.aux) else None
        state = {key: value[column : column + size] for key, value in layer.routing_state().items()}
        pairs, gate = pairs_by_hand(layer, logit, state, mode, aux, n_slots)
        pairs ^= {(members.index(t), c - column) for c, t in flips if t in members and column <= c < column + size}
        for i, e in sorted(pairs):
            out[members[i]] = out[members[i]] + gate(i, e, pairs) * swiglu(x[members[i]], layer.experts[m], e)
            computed.add((column + e, members[i]))
        column, routed = column + size, routed + 1
    return out, computed


def depth_by_hand(block, x_TD, batch, mode="train", flips=()):
    """The tokens that the depth router lets in, in their order; `flips` are tokens."""
    logit = (x_TD @ block.depth_router)[:, 0].tolist()
    valid = [t for t, m in enumerate(batch.modality) if m >= 0]
    n_groups = max(batch.modality, default=0) + 1
    groups = [[t for t in valid if batch.modality[t] == m] for m in range(n_groups)] if block.quota else [valid]
    if mode == "train":
        taken = {g[i] for g in groups for i in first([logit[t] for t in g], math.floor(block.capacity * len(g)))}
        return sorted(taken ^ (set(flips) & set(valid)))
    state, taken = block.routing_state(), set()
    for c, group in enumerate(groups):
        value, cutoff = logit, state["cutoff"][c]
        if mode != "threshold":
            value, cutoff = block.aux(x_TD)[:, 0].tolist(), 0 if mode == "aux" else state["aux_cutoff"][c]
        taken |= {t for t in group if value[t] > cutoff}
    return sorted(taken)


def loop_reference(block, x_RLD, batch, mode="train", flips=(), depth_flips=(), gate_first=False):
    """Outputs, the tokens let in, the computed pairs; `gate_first`: under Swin the gate before the norms."""
    x_TD = x_RLD.flatten(0, 1)
    tokens = depth_by_hand(block, x_TD, batch, mode, depth_flips)
    swin, first_norm, second_norm = block.norm_order == "swin", block.attention_norm, block.feed_forward_norm
    gate = {t: sigmoid(x_TD[t] @ block.depth_router[:, 0]) for t in tokens}
    inner = {t: gate[t] if gate_first else 1 for t in tokens}
    outer = {t: 1 if gate_first else gate[t] for t in tokens}
    x = {t: x_TD[t] for t in tokens}
    a = attention_by_hand(block.attention, x if swin else {t: rms(x[t], first_norm) for t in tokens}, tokens, batch)
    a = {t: rms(inner[t] * a[t], first_norm) if swin else a[t] for t in tokens}
    h = {t: x[t] + a[t] for t in tokens}
    given = h if swin else {t: rms(h[t], second_norm) for t in tokens}
    exact = batch.groups.valid is None or depth_flips
    n_slots = len(tokens) if exact else math.floor(block.capacity * len(x_TD))
    y, computed = feed_forward_by_hand(block.feed_forward, given, tokens, batch, mode, flips, n_slots)
    y = {t: rms(inner[t] * y[t], second_norm) if swin else y[t] for t in tokens}
    rows = [x_TD[t] + outer[t] * (a[t] + y[t]) if t in x else x_TD[t] for t in range(len(x_TD))]
    return torch.stack(rows).view(x_RLD.shape), tokens, computed


def pairs_of(selected_TE):
    return {(c, t) for t, c in selected_TE.nonzero().tolist()}


def assert_equal_to_loops(block, x_RLD, batch, mode="train", gradients=True, **flips):
    """Values, decisions and all gradients; returns what was let in, and the statistics."""
    x_RLD = x_RLD.clone().requires_grad_()
    disturbance = {}
    n_tokens = len(batch.modality)
    if "depth_flips" in flips:
        columns = len(block.routing_state()["cutoff"])
        disturbance["depth_flip_TE"] = torch.zeros(n_tokens, columns, dtype=torch.bool)
        disturbance["depth_flip_TE"][list(flips["depth_flips"])] = True
    if "flips" in flips:
        disturbance["flip_TE"] = torch.zeros(n_tokens, block.feed_forward.n_routed, dtype=torch.bool)
        for c, t in flips["flips"]:
            disturbance["flip_TE"][t, c] = True
    got, stats = run(block, x_RLD, batch, mode, **disturbance)
    need, tokens, computed = loop_reference(block, x_RLD, batch, mode, **flips)
    torch.testing.assert_close(got, need, rtol=1e-11, atol=1e-11)
    assert stats[".depth"].selected_TE.any(1).nonzero().flatten().tolist() == tokens
    out = torch.ones(n_tokens, dtype=torch.bool)
    out[tokens] = False
    assert torch.equal(got.flatten(0, 1)[out], x_RLD.flatten(0, 1)[out]), "the others pass as they are, bit by bit"
    if "" in stats:
        assert pairs_of(stats[""].selected_TE) == computed
    if gradients:
        weight = states(batch, seed=5)
        names = ["x", *(n for n, _ in block.named_parameters() if "aux" not in n)]
        wanted = [x_RLD, *(p for n, p in block.named_parameters() if "aux" not in n)]
        found = [torch.autograd.grad((v * weight).sum(), wanted, materialize_grads=True) for v in (got, need)]
        for name, g, n in zip(names, *found, strict=True):
            torch.testing.assert_close(g, n, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    return tokens, stats


@pytest.fixture(params=list(FEED_FORWARDS))
def feed_forward(request):
    return FEED_FORWARDS[request.param]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("norm_order, capacity", [("swin", 0.25), ("pre", 0.5), ("swin", 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_the_loops(
    feed_forward, kind, norm_order, capacity, attention, new_block, vocabulary
):
    """Exact groups, padded groups of the same tokens, padding, a modality missing, none let in, no token at all."""
    block = new_block(feed_forward, kind, capacity, attention, norm_order)
    for layout, padded in [("mixed", False), ("mixed", True), *((name, False) for name in list(LAYOUTS)[1:])]:
        batch = batch_of(*LAYOUTS[layout], vocabulary, padded)
        tokens, _ = assert_equal_to_loops(block, states(batch), batch)
        if layout in ("few", "only_padding") and capacity == 0.25:
            assert not tokens


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_three_modalities_equal_the_loops(kind, attention, new_block, three_modalities):
    feed_forward = SparseConfig({"text": 2, "image": 2, "audio": 1})
    block = new_block(feed_forward, kind, 0.5, attention, three=True)
    for rows, padded in [(("TAAITTAI", "IIAATTAI"), False), (("TAAITTAI", "AAIATT.."), False), (("TAAITTAI",), True)]:
        documents = ["".join("." if c == "." else d for c, d in zip(row, "00011122", strict=True)) for row in rows]
        batch = batch_of(rows, documents, three_modalities, padded)
        assert_equal_to_loops(block, states(batch), batch)


@pytest.mark.parametrize("name", ["dense", "token_choice"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_let_the_earlier_token_in(kind, padded, name, new_block, vocabulary):
    """Not with inner rules over the batch, whose order rounding in attention decides."""
    batch = batch_of(*LAYOUTS["mixed"], vocabulary, padded)
    block, x_TD = new_block(FEED_FORWARDS[name], kind), states(batch).flatten(0, 1)
    score_T = (x_TD @ block.depth_router)[:, 0]
    copies = score_T.argsort()[7:19].sort().values  # they straddle the capacity of 12 of 24
    x_TD[copies] = x_TD[copies[0]].clone()
    tokens, _ = assert_equal_to_loops(block, x_TD.view(3, 8, DIM), batch)
    inside = [t for t in copies.tolist() if t in tokens]
    assert 0 < len(inside) < 12
    if kind == "mod":
        assert inside == copies.tolist()[: len(inside)]
    same = x_TD[:1].expand(24, DIM).reshape(3, 8, DIM)
    tokens, _ = assert_equal_to_loops(block, same, batch)
    assert kind != "mod" or tokens == list(range(12))


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["mixed", "padding", "no_image"])
@pytest.mark.parametrize("capacity", [0.25, 0.3, 1.0])
def test_how_many_are_let_in(capacity, layout, new_block, vocabulary):
    batch = batch_of(*LAYOUTS[layout], vocabulary)
    per_modality = [batch.modality.count(m) for m in (0, 1)]
    for kind, counts in (("mod", [sum(per_modality)]), ("mod_quota", per_modality)):
        stats = run(new_block(DenseConfig(), kind, capacity), states(batch), batch)[1][".depth"]
        assert stats.selected_TE.sum(0).tolist() == [math.floor(round(capacity * 100) * n / 100) for n in counts]
        assert torch.equal(stats.selected_TE, stats.reference_TE)
        assert [stats.member_TE[t].tolist() for t, m in enumerate(batch.modality) if m < 0] == [
            [False] * len(counts)
        ] * batch.modality.count(-1)


@pytest.mark.parametrize("norm_order", ["swin", "pre"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_at_gate_one_are_the_plain_block(kind, norm_order, feed_forward, new_block, vocabulary):
    batch = batch_of(*LAYOUTS["mixed"], vocabulary)
    block, plain = (new_block(feed_forward, k, 1.0, "untied", norm_order) for k in (kind, "full"))
    plain.load_state_dict({name: v for name, v in block.state_dict().items() if name in plain.state_dict()})
    x_RLD = states(batch)
    x_RLD[..., 0] = 1
    with torch.no_grad():
        block.depth_router[0] = 100  # sigmoid: 1 to the last bit
    (got, stats), (need, plain_stats) = run(block, x_RLD, batch), run(plain, x_RLD, batch)
    torch.testing.assert_close(got, need, rtol=1e-11, atol=1e-12)
    for name, s in plain_stats.items():
        assert torch.equal(stats[name].selected_TE, s.selected_TE) and torch.equal(stats[name].member_TE, s.member_TE)
        torch.testing.assert_close(stats[name].observed, s.observed, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_stand_in_any_order(kind, feed_forward, new_block, vocabulary):
    if getattr(feed_forward, "selection", None) and feed_forward.selection.kind == "threshold":
        feed_forward = replace(feed_forward, selection=ThresholdConfig(warmup_steps=1, bound=4.0))  # drops by place
    rows, documents = LAYOUTS["mixed"]
    block, order = new_block(feed_forward, kind, 0.5, "untied"), [2, 0, 1]
    batch = batch_of(rows, documents, vocabulary)
    other = batch_of([rows[r] for r in order], [documents[r] for r in order], vocabulary)
    x_RLD = states(batch)
    torch.testing.assert_close(run(block, x_RLD[order], other)[0], run(block, x_RLD, batch)[0][order])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_let_in_reaches_nobody(kind, feed_forward, new_block, vocabulary):
    """Values of padding and of tokens with the lowest score, up to infinity and NaN, stay where they are."""
    batch = batch_of(*LAYOUTS["padding"], vocabulary)
    block, x_RLD = new_block(feed_forward, kind, 0.5, aux=True), states(batch)
    clean, _ = run(block, x_RLD, batch)
    dirty_RLD = x_RLD.clone()
    absent_RL = torch.tensor(batch.modality).view(3, 8) < 0
    dirty_RLD[absent_RL] = torch.nan
    lowest = (x_RLD @ block.depth_router)[0, :, 0].argmin()
    dirty_RLD[0, lowest, 0] = -torch.inf * block.depth_router[0, 0].sign()
    absent_RL[0, lowest] = True
    got, stats = run(block, dirty_RLD, batch)
    assert not stats[".depth"].selected_TE.any(1)[absent_RL.flatten()].any()
    assert torch.equal(got[~absent_RL], clean[~absent_RL])
    for mode in CAUSAL_MODES:  # no comparison with NaN is true
        dirty_RLD = x_RLD.clone()
        _, stats = run(block, x_RLD, batch, mode)
        some = int((~stats[".depth"].selected_TE.any(1)).nonzero()[0])
        dirty_RLD.view(-1, DIM)[some] = torch.nan
        clean, got = (run(block, x, batch, mode)[0].flatten(0, 1) for x in (x_RLD, dirty_RLD))
        others = torch.arange(24) != some
        assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, padded", [("4t4i", False), ("4t4i", True), ("token_choice", False)])
def test_one_graph_serves_batches_of_differing_content(name, padded, kind, new_block, vocabulary):
    """Static shapes though the number of text tokens let in differs; forward and backward, compiled once."""
    torch._dynamo.reset()
    attention = "untied" if name == "4t4i" else "shared"
    eager, compiled = (new_block(FEED_FORWARDS[name], kind, 0.5, attention) for _ in range(2))
    counter, n_text = CompileCounterWithBackend("aot_eager"), set()
    compiled.compile(backend=counter, fullgraph=True)
    rows, documents = LAYOUTS["padding" if padded else "mixed"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(3):
            order = [(r + n) % 3 for r in range(3)]
            batch = batch_of([rows[r] for r in order], [documents[r] for r in order], vocabulary)
            x_RLD = states(batch, seed=n)
            if n == 2:  # text first
                x_RLD += 4 * (torch.tensor(batch.modality) == 0).view(3, 8, 1) * eager.depth_router.detach()[:, 0]
            results = []
            for block in (eager, compiled):
                x = x_RLD.clone().requires_grad_()
                y, stats = run(block, x, batch)
                results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()], allow_unused=True)])
            for got, need in zip(*results, strict=True):
                torch.testing.assert_close(got, need, rtol=1e-9, atol=1e-10)
            let_in = stats[".depth"].selected_TE.any(1)
            n_text.add(int((let_in & (torch.tensor(batch.modality) == 0)).sum()))
    assert counter.frame_count == 1 and (len(n_text) > 1) == (kind == "mod")
    torch._dynamo.reset()


def inner_groups(block, x_RLD, batch):
    """The groups that the feed-forward sees."""
    seen = []
    block.feed_forward.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    run(block, x_RLD, batch)
    return seen[0]


def test_inner_counts_are_constants_where_they_can_be(new_block, vocabulary):
    batch = batch_of(*LAYOUTS["mixed"], vocabulary)
    counts = [batch.modality.count(m) for m in (0, 1)]
    for name in ("dense", "8x", "4t4i"):
        groups = inner_groups(new_block(FEED_FORWARDS[name], "mod"), states(batch), batch)
        sizes = [i.numel() for i in groups.index]
        if name == "4t4i":
            assert groups.valid is not None and sizes == [12, 12] and sum(int(v.sum()) for v in groups.valid) == 12
        else:
            assert groups.valid is None and sizes == [12] and torch.equal(groups.index[0], groups.slot[0])
        groups = inner_groups(new_block(FEED_FORWARDS[name], "mod_quota", attention="untied"), states(batch), batch)
        assert groups.valid is None and [i.numel() for i in groups.index] == [n // 2 for n in counts]


@pytest.mark.parametrize("kind", KINDS)
def test_untied_attention_multiplies_as_many_rows_as_shared(kind, new_block, vocabulary):
    batch, counts = batch_of(*LAYOUTS["mixed"], vocabulary), []
    for attention in ATTENTIONS:
        block = new_block(DenseConfig(), kind, 0.5, attention)
        with FlopCounterMode(display=False) as counter:
            run(block, states(batch), batch)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# --- causal modes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", CAUSAL_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_causal_modes_equal_the_loops(kind, mode, feed_forward, new_block, vocabulary):
    block = new_block(feed_forward, kind, 0.5, "untied", aux=True)
    for layout in LAYOUTS:
        batch = batch_of(*LAYOUTS[layout], vocabulary)
        tokens, _ = assert_equal_to_loops(block, states(batch), batch, mode)
        assert layout != "mixed" or 0 < len(tokens) < 24


@pytest.mark.parametrize("mode", CAUSAL_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_nothing_before_them(kind, mode, feed_forward, new_block, vocabulary):
    batch = batch_of(*LAYOUTS["mixed"], vocabulary)
    block, x_RLD = new_block(feed_forward, kind, 0.5, aux=True), states(batch)
    before, _ = run(block, x_RLD, batch, mode)
    for place in range(8):
        other = x_RLD.clone()
        other[1, place] = states(batch, seed=place + 10)[1, place]
        change_RL = (run(block, other, batch, mode)[0] - before).abs().amax(-1)
        change_RL[1, place:] = 0
        assert change_RL.max() < 1e-10


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mode", CAUSAL_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_caches_equals_the_full_forward(kind, mode, attention, variants, make_model, make_batch, settle):
    """Left padding, absent tokens, a restart: every row's states are those of its document alone, without caches."""
    variant = replace(
        variants["moe_4t4i"], attention=ATTENTIONS[attention], depth=DepthConfig(kind, capacity=0.5, interval=1)
    )
    vocab, let_in = variant.vocabulary, []
    model = make_model(variant, aux_routers=True, n_kv_heads=1)
    shake(model)
    settle(model, make_batch(vocab, seed=3))
    text, code = vocab.text_start, vocab.image_start
    long = [vocab.bos, text, text + 5, vocab.boi, *range(code, code + 4), vocab.eoi, text + 9, text + 1]
    short = [vocab.bos, text + 7, vocab.boi, *range(code + 5, code + 9)]

    def alone(row):
        ids = torch.tensor([row])
        document = torch.zeros_like(ids)
        mask, groups = document_mask(document), padded_groups(ids, document == 0, vocab)
        h_RLD, stats = model(ids, torch.arange(len(row))[None], mask, groups, mode)
        let_in.append(torch.stack([s.selected_TE.any(1) for name, s in stats.items() if name.endswith("depth")], 1))
        return h_RLD[0]

    with torch.no_grad():
        full = alone(long), alone(short)
        share = torch.cat(let_in).double().mean(0)
        assert 0 < share.min() and share.max() < 1, "some tokens in, some out"
        decoder, pad = Decoder(model, vocab, 2, 2 * len(long) + 3, mode), len(long) - len(short)
        tokens = torch.tensor([long, [vocab.pad] * pad + short])
        present = torch.tensor([[True] * len(long), [False] * pad + [True] * len(short)])
        columns = [slice(0, 4), *(slice(i, i + 1) for i in range(4, len(long)))]
        for here in columns:
            h_RD = decoder.feed(tokens[:, here], present[:, here])
            torch.testing.assert_close(h_RD[0], full[0][here.stop - 1], rtol=0, atol=1e-9)
            if here.stop > pad:
                torch.testing.assert_close(h_RD[1], full[1][here.stop - 1 - pad], rtol=0, atol=1e-9)
        # row 0 goes on, with a gap; row 1 begins anew with the other's document
        more = long + [text + 2, text + 3]
        full = alone(more), full[0]
        for place, token in enumerate(long):
            go_on = place in (0, 2)
            fed = torch.tensor([[more[len(long) + place // 2] if go_on else text], [token]])
            restart = torch.tensor([False, True]) if place == 0 else None
            h_RD = decoder.feed(fed, torch.tensor([[go_on], [True]]), restart)
            torch.testing.assert_close(h_RD[1], full[1][place], rtol=0, atol=1e-9)
            if go_on:
                torch.testing.assert_close(h_RD[0], full[0][len(long) + place // 2], rtol=0, atol=1e-9)


# --- statistics, planted errors, routing state -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["8x", "4t4i", "token_choice", "threshold"])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_inner_experts_are_of_the_tokens_let_in(kind, name, new_block, vocabulary):
    batch = batch_of(*LAYOUTS["padding"], vocabulary)
    block, x_RLD = new_block(FEED_FORWARDS[name], kind, 0.5, aux=True), states(batch)
    tokens, stats = assert_equal_to_loops(block, x_RLD, batch)
    inside, column = stats[""], 0
    for m, (group, size) in enumerate(block.feed_forward.groups.items()):
        for _ in range(size):
            members = [t for t in tokens if group == "all" or batch.modality[t] == m]
            assert inside.member_TE[:, column].nonzero().flatten().tolist() == members
            column += 1
    assert column == inside.member_TE.shape[1] and len(inside.member_TE) == 24
    for field in ("selected_TE", "reference_TE", "member_TE", "dropped_TE"):
        value = getattr(inside, field)
        assert value is None or (value.dtype == torch.bool and not (value & ~inside.member_TE).any())
    assert not inside.score_TE[~inside.member_TE].any()
    assert inside.aux_logit_TE is None or not inside.aux_logit_TE[~inside.member_TE].any()


def halfway(values, k):
    """Between the k-th and the next of a list; 1 beside the end where there is no next."""
    best = sorted(values, reverse=True)
    return best[0] + 1 if k == 0 else best[-1] - 1 if k == len(best) else (best[k - 1] + best[k]) / 2


@pytest.mark.parametrize("layout", ["mixed", "padding"])
@pytest.mark.parametrize("kind", KINDS)
def test_observed_cut_offs_and_what_becomes_of_them(kind, layout, new_block, vocabulary):
    batch = batch_of(*LAYOUTS[layout], vocabulary)
    block, x_RLD = new_block(DenseConfig(), kind, 0.25, aux=True), states(batch)
    stats, x_TD = run(block, x_RLD, batch)[1][".depth"], x_RLD.flatten(0, 1)
    groups = [(0,), (1,)] if kind == "mod_quota" else [(0, 1)]
    values = {"cutoff": (x_TD @ block.depth_router)[:, 0], "aux_cutoff": block.aux(x_TD)[:, 0]}
    assert stats.observed.keys() == values.keys()
    for name, value in values.items():
        members = [[t for t, m in enumerate(batch.modality) if m in group] for group in groups]
        need = [halfway(value[ts].tolist(), len(ts) // 4) for ts in members]
        torch.testing.assert_close(stats.observed[name], torch.tensor(need, dtype=DOUBLE), rtol=1e-12, atol=1e-13)
        for c, ts in enumerate(members):
            torch.testing.assert_close(stats.aux_logit_TE[ts, c], values["aux_cutoff"][ts])
            torch.testing.assert_close(stats.score_TE[ts, c], torch.sigmoid(values["cutoff"][ts]))
    old = {name: value.clone() for name, value in block.routing_state().items()}
    block.update_routing(stats.observed)
    for name, age in (("cutoff", "age"), ("aux_cutoff", "aux_age")):
        need = old[name] + 0.1 * (stats.observed[name].to(old[name].dtype) - old[name])  # the tenth observation
        torch.testing.assert_close(block.routing_state()[name], need)
        assert torch.equal(block.routing_state()[age], old[age] + 1)
    # a modality without tokens, or a step without any, leaves the cut-offs alone
    block.update_routing({name: torch.full_like(value, torch.nan) for name, value in stats.observed.items()})
    assert torch.equal(block.routing_state()["age"], old["age"] + 1)


@pytest.mark.parametrize("name", ["dense", "8x", "4t4i", "token_choice"])
@pytest.mark.parametrize("kind", KINDS)
def test_planted_errors_turn_just_their_decisions_round(kind, name, new_block, vocabulary):
    batch = batch_of(*LAYOUTS["padding"], vocabulary)
    block, x_RLD = new_block(FEED_FORWARDS[name], kind, 0.5, "untied"), states(batch)
    plain, _ = run(block, x_RLD, batch)
    same, stats = run(block, x_RLD, batch, depth_flip_TE=torch.zeros(24, 2 if block.quota else 1, dtype=torch.bool))
    torch.testing.assert_close(same, plain, rtol=1e-12, atol=1e-13)
    reference = set(stats[".depth"].selected_TE.any(1).nonzero().flatten().tolist())
    flips = {0, 3, 7, 9, 14, 15, 20}  # padding among them
    tokens, stats = assert_equal_to_loops(block, x_RLD, batch, depth_flips=flips)
    assert set(tokens) == reference ^ (flips - {14, 15}) and batch.modality[14] < 0
    assert set(stats[".depth"].reference_TE.any(1).nonzero().flatten().tolist()) == reference
    if name == "dense":
        return
    pairs = {(c, t) for c in range(block.feed_forward.n_routed) for t in range(24) if (c + t) % 4 == 0}
    tokens, stats = assert_equal_to_loops(block, x_RLD, batch, flips=pairs)
    wrong = pairs_of(stats[""].selected_TE ^ stats[""].reference_TE)
    assert set(tokens) == reference and wrong == pairs & pairs_of(stats[""].member_TE) and wrong
    assert_equal_to_loops(block, x_RLD, batch, flips=pairs, depth_flips=flips)


def test_noise_follows_the_tokens(new_block, vocabulary):
    """The inner routers get the noise of the tokens let in: equal to noise on no other token."""
    batch = batch_of(*LAYOUTS["mixed"], vocabulary)
    block, x_RLD = new_block(FEED_FORWARDS["4t4i"], "mod"), states(batch)
    noise_TE = 3 * torch.randn(24, 5, generator=torch.Generator().manual_seed(3))
    noisy, stats = run(block, x_RLD, batch, noise_TE=noise_TE)
    let_in = stats[".depth"].selected_TE
    assert torch.equal(run(block, x_RLD, batch, noise_TE=noise_TE * let_in)[0], noisy)
    assert not torch.allclose(run(block, x_RLD, batch)[0], noisy)


def test_auxiliary_routers_learn_without_moving_the_model(new_block, vocabulary):
    batch = batch_of(*LAYOUTS["padding"], vocabulary)
    block, x_RLD = new_block(FEED_FORWARDS["4t4i"], "mod", aux=True), states(batch).requires_grad_()
    _, stats = run(block, x_RLD, batch)
    for name, own in (("", block.feed_forward.aux), (".depth", block.aux)):
        block.zero_grad()
        stats[name].aux_logit_TE.square().sum().backward(retain_graph=True)
        moved = {p for p in block.parameters() if p.grad is not None and p.grad.any()}
        assert moved == set(own.parameters()) and x_RLD.grad is None


# --- precision, gradient of the router, errors -----------------------------------------------------------------------


@pytest.mark.parametrize("norm_order", ["swin", "pre"])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_keeps_residual_stream_and_gate_in_fp32(kind, norm_order, feed_forward, new_block, vocabulary):
    batch = batch_of(*LAYOUTS["mixed"], vocabulary)
    block, x_RLD = new_block(feed_forward, kind, 0.5, "untied", norm_order), states(batch)
    exact, _ = run(block, x_RLD, batch)
    block, x_RLD = block.float(), x_RLD.float().requires_grad_()
    fp32, _ = run(block, x_RLD, batch)
    torch.testing.assert_close(fp32, exact.float(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low, stats = run(block, x_RLD, batch)
    assert low.dtype == stats[".depth"].score_TE.dtype == torch.float32
    update, exact_update = low - x_RLD, exact.float() - x_RLD
    assert stats[""].selected_TE.shape[0] == 24 if "" in stats else True
    if isinstance(feed_forward, DenseConfig):  # no decision inside that rounding could turn
        assert (update - exact_update).norm() < 0.03 * exact_update.norm()
    score_T = torch.sigmoid((x_RLD.flatten(0, 1) @ block.depth_router)[:, 0])
    got = stats[".depth"].score_TE.sum(1)
    torch.testing.assert_close(got, score_T, rtol=0, atol=1e-6)  # bf16 would be off by 1e-3
    low.square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    assert block.depth_router.grad.abs().min() > 0


def test_the_gate_keeps_its_gradient_under_swin_norm(new_block, vocabulary):
    """It multiplies the update after the norms; before them it would cancel out: rms_norm(g v) = rms_norm(v)."""
    batch = batch_of(*LAYOUTS["mixed"], vocabulary)
    block, x_RLD, weight = new_block(DenseConfig(), "mod"), states(batch), states(batch, seed=5)
    norms = []
    for gate_first in (False, True):
        y_RLD, _, _ = loop_reference(block, x_RLD, batch, gate_first=gate_first)
        (grad,) = torch.autograd.grad((y_RLD * weight).sum(), block.depth_router)
        norms.append(grad.norm().item())
    y_RLD, _ = run(block, x_RLD, batch)
    (grad,) = torch.autograd.grad((y_RLD * weight).sum(), block.depth_router)
    assert grad.norm() == pytest.approx(norms[0], rel=1e-9)
    print(f"gradient of the depth router: {norms[0]:.3g} after the norms, {norms[1]:.3g} before them")
    assert norms[1] < 1e-3 * norms[0]


def test_causal_modes_without_auxiliary_routers_are_refused(new_block, vocabulary):
    batch = batch_of(*LAYOUTS["mixed"], vocabulary)
    block = new_block(DenseConfig(), "mod")
    for mode in ("aux", "aux_calibrated"):
        text = f"got routing mode {mode}, need auxiliary routers in the model: train them .*, or use mode=threshold"
        with pytest.raises(ValueError, match=text):
            run(block, states(batch), batch, mode)
    assert run(block, states(batch), batch, "threshold")[0].isfinite().all()


@pytest.mark.parametrize("wrong", [dict(capacity=0.0), dict(capacity=1.5), dict(interval=0), dict(start=-1)])
def test_a_depth_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="need 0 < capacity <= 1, interval >= 1, start >= 0: change depth"):
        DepthConfig(**wrong)


def test_alternate_layers_from_the_first():
    assert [DepthConfig().chosen(layer) for layer in range(5)] == [True, False, True, False, True]
    assert [DepthConfig(interval=3, start=1).chosen(layer) for layer in range(5)] == [False, True, False, False, True]
