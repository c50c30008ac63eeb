"""Attention against loops over rows, heads and pairs of tokens, in float64; every token with its modality's weights."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from moma.modality import exact_groups, padded_groups
from moma.model.attention import ATTENTIONS, Attention, AttentionMask, document_mask, rotate

DIM, HEADS, THETA, EPS = 16, 4, 10_000.0, 1e-5
CASES = {
    "shared": ("shared", 4),
    "per_head": ("per_head", 4),
    "none": ("none", 4),
    "grouped_shared": ("shared", 2),
    "grouped_per_head": ("per_head", 2),
    "one_kv_head": ("per_head", 1),
}
KINDS = {"tied": None, "untied": 3}  # number of modalities
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1, 1]])

# which token is of which modality: T text, I image, A audio (text where the vocabulary has none), . padding
IDS = {"T": 30, "I": 4, "A": 56, ".": 1}
MIXED = ("TIATTIITA", "ITTAIITTT")
LAYOUTS = {
    "mixed": MIXED,
    "no_image": ("TTATTTTTA", "TTTATTTTT"),
    "one_modality": ("IIIIIIIII", "IIIIIIIII"),
    "padding": ("TIATTIIT.", ".TTAII..."),
    "one_token": (".....I...", "........."),
    "only_padding": (".........", "........."),
}


def new_attention(qk_norm, kv_heads, n_modalities, seed=0):
    module = Attention(DIM, HEADS, kv_heads, qk_norm, THETA, EPS, n_modalities).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return module


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def n_modalities(request):
    return request.param


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def attention(request, n_modalities):
    return new_attention(*request.param, n_modalities)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def untied(request):
    return new_attention(*request.param, KINDS["untied"])


@pytest.fixture
def groups_of(vocabulary, three_modalities):
    """`groups_of(rows, n_modalities=3)`: their groups, in the padded form where there is padding or `padded`."""

    def make(rows, n_modalities=3, padded=False):
        vocab = three_modalities if n_modalities == 3 else vocabulary
        ids = torch.tensor([[IDS[c] for c in row] for row in rows])
        present = ids != IDS["."]
        return padded_groups(ids, present, vocab) if padded or not present.all() else exact_groups(ids, vocab)

    return make


def modality_in(rows):
    """Modality of every token among text, image and audio; -1 for padding."""
    return [["TIA".find(c) for c in row] for row in rows]


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


def normed(v, module, name, head, modality):
    if not len(module.qk_norm):
        return v
    mean = v.mean()
    standard = (v - mean) / torch.sqrt(((v - mean) ** 2).mean() + EPS)
    weight, bias = module.qk_norm[f"{name}_weight"], module.qk_norm[f"{name}_bias"]
    if module.n_modalities is not None:
        weight, bias = weight[modality], bias[modality]
    head = head if len(weight) > 1 else 0
    return standard * weight[head, 0] + bias[head, 0]


def projected(module, x_D, modality):
    """q per head, k and v per key/value head, not yet rotated."""
    size, groups = DIM // HEADS, module.n_kv_heads
    if module.n_modalities is not None and modality < 0:
        return tuple([torch.zeros(size, dtype=x_D.dtype)] * n for n in (HEADS, groups, groups))
    matrix = module.wqkv.weight if module.n_modalities is None else module.wqkv[modality].T
    q, k, v = (part.split(size) for part in (matrix @ x_D).split([HEADS * size, groups * size, groups * size]))
    return (
        [normed(q[h], module, "q", h, modality) for h in range(HEADS)],
        [normed(k[g], module, "k", g, modality) for g in range(groups)],
        v,
    )


def loop_reference(module, x_RLD, position_RL, document_RL, modality_RL):
    size, groups = DIM // HEADS, module.n_kv_heads
    rows = []
    for r in range(len(x_RLD)):
        position, document, modality = position_RL[r].tolist(), document_RL[r].tolist(), modality_RL[r]
        qkv = [projected(module, x_D, m) for x_D, m in zip(x_RLD[r], modality, strict=True)]
        out = []
        for i in range(len(qkv)):
            heads = []
            for h in range(HEADS):
                g = h // (HEADS // groups)
                q = rotated(qkv[i][0][h], position[i])
                seen = [j for j in range(i + 1) if document[j] == document[i]]
                logits = [(q * rotated(qkv[j][1][g], position[j])).sum() / math.sqrt(size) for j in seen]
                weight = torch.stack(logits).exp()
                weight = weight / weight.sum()
                heads.append(sum(w * qkv[j][2][g] for w, j in zip(weight, seen, strict=True)))
            y_I = torch.cat(heads)
            if module.n_modalities is None:
                out.append(module.wo.weight @ y_I)
            else:
                out.append(y_I @ module.wo[modality[i]] if modality[i] >= 0 else torch.zeros_like(x_RLD[r, i]))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def assert_equal_to_loop(module, rows, groups, document_RL=DOCUMENTS):
    x_RLD = states(*document_RL.shape).requires_grad_()
    position_RL = positions(*document_RL.shape)
    got = module(x_RLD, position_RL, document_mask(document_RL), groups)
    expected = loop_reference(module, x_RLD, position_RL, document_RL, modality_in(rows))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    wanted = [x_RLD, *module.parameters()]
    weight = states(*document_RL.shape, seed=5)
    gradients = [
        torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True, materialize_grads=True)
        if y.requires_grad
        else [torch.zeros_like(w) for w in wanted]
        for y in (got, expected)
    ]
    for g, n in zip(*gradients, strict=True):
        torch.testing.assert_close(g, n, rtol=1e-9, atol=1e-11)


def test_equals_the_loops(attention, groups_of):
    assert_equal_to_loop(attention, MIXED, groups_of(MIXED))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "mixed"])
@pytest.mark.parametrize("case", ["per_head", "grouped_shared"])
def test_untied_equals_the_loops_whatever_the_modalities(case, layout, groups_of):
    """Modalities missing, padding inside and outside of documents, one token in the batch, none."""
    module = new_attention(*CASES[case], 3)
    assert_equal_to_loop(module, LAYOUTS[layout], groups_of(LAYOUTS[layout]))


def test_padded_form_equals_exact_form(untied, groups_of):
    x = states(*DOCUMENTS.shape), positions(*DOCUMENTS.shape), document_mask(DOCUMENTS)
    torch.testing.assert_close(
        untied(*x, groups_of(MIXED, padded=True)), untied(*x, groups_of(MIXED)), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("n, padded", [(2, False), (3, False), (3, True)])
@pytest.mark.parametrize("case", CASES)
def test_equal_weights_in_all_modalities_are_shared_attention(case, n, padded, groups_of):
    shared = new_attention(*CASES[case], None)
    module = new_attention(*CASES[case], n)
    with torch.no_grad():
        module.wqkv.copy_(shared.wqkv.weight.T.expand(n, -1, -1))
        module.wo.copy_(shared.wo.weight.T.expand(n, -1, -1))
        for name, parameter in module.qk_norm.items():
            parameter.copy_(shared.qk_norm[name].expand(n, -1, -1, -1))
    x_RLD, weight = states(*DOCUMENTS.shape).requires_grad_(), states(*DOCUMENTS.shape, seed=5)
    inputs = x_RLD, positions(*DOCUMENTS.shape), document_mask(DOCUMENTS), groups_of(MIXED, n, padded)
    got, expected = module(*inputs), shared(*inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    parts = torch.autograd.grad((got * weight).sum(), [x_RLD, module.wqkv, module.wo])
    whole = torch.autograd.grad((expected * weight).sum(), [x_RLD, shared.wqkv.weight, shared.wo.weight])
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-11)
    for part, gradient in zip(parts[1:], whole[1:], strict=True):
        torch.testing.assert_close(part.sum(0).T, gradient, rtol=0, atol=1e-11)


def test_modalities_meet_in_one_softmax(untied, groups_of):
    """A text token reads the image tokens before it; its result moves with the image's weights for k and v."""
    rows = ["IIT"]
    x = states(1, 3), positions(1, 3), document_mask(torch.zeros(1, 3).long()), groups_of(rows)
    before = untied(*x)
    with torch.no_grad():
        untied.wqkv[1] *= 1.5
        untied.wo[1] *= 2  # of the image tokens' own outputs alone
        if len(untied.qk_norm):
            untied.qk_norm["q_weight"][1] *= 3
    after = untied(*x)
    assert not torch.allclose(before[0, 2], after[0, 2])
    with torch.no_grad():
        untied.wqkv[2] += 1  # audio: nobody here
    assert torch.equal(untied(*x), after)


def test_padding_tokens_are_zeros_without_gradients(untied, groups_of):
    rows = LAYOUTS["padding"]
    present_RL = torch.tensor(modality_in(rows)) >= 0
    x_RLD, cache = states(*DOCUMENTS.shape).requires_grad_(), FakeCache()
    mask = document_mask(torch.where(present_RL, DOCUMENTS, -1))
    y_RLD = untied(x_RLD, positions(*DOCUMENTS.shape), mask, groups_of(rows), cache)
    assert not y_RLD[~present_RL].any() and y_RLD[present_RL].all()
    for state in (cache.k, cache.v):
        state_RLGA = state.transpose(1, 2)
        assert not state_RLGA[~present_RL].any() and state_RLGA[present_RL].all()
    grads = torch.autograd.grad(y_RLD.square().sum(), [x_RLD, *untied.parameters()])
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][~present_RL].any() and grads[0][present_RL].all()


def test_shared_weights_do_not_read_the_groups(groups_of):
    module = new_attention("shared", 4, None)
    assert module.n_modalities is None
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "wqkv.weight": (48, 16),
        "wo.weight": (16, 16),
        **{f"qk_norm.{n}_{leaf}": (1, 1, 4) for n in "qk" for leaf in ("weight", "bias")},
    }
    x = states(*DOCUMENTS.shape), positions(*DOCUMENTS.shape), document_mask(DOCUMENTS)
    assert torch.equal(module(*x, groups_of(MIXED)), module(*x, groups_of(LAYOUTS["only_padding"])))


def test_untied_weights_are_stacked_by_modality():
    module = new_attention("per_head", 2, 3)
    assert module.n_modalities == 3
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "wqkv": (3, 16, 32),
        "wo": (3, 16, 16),
        **{f"qk_norm.q_{leaf}": (3, 4, 1, 4) for leaf in ("weight", "bias")},
        **{f"qk_norm.k_{leaf}": (3, 2, 1, 4) for leaf in ("weight", "bias")},
    }


def test_untied_costs_the_matmuls_of_shared(groups_of):
    x = states(*DOCUMENTS.shape), positions(*DOCUMENTS.shape), document_mask(DOCUMENTS), groups_of(MIXED)
    counts = []
    for n in (None, 3):
        module = new_attention("per_head", 2, n)
        with FlopCounterMode(display=False) as counter:
            module(*x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_every_kind_has_a_config_of_its_name():
    assert {name: config().kind for name, config in ATTENTIONS.items()} == {name: name for name in ATTENTIONS}


def test_mask_is_causal_inside_documents():
    mask = document_mask(DOCUMENTS)
    assert mask.document_RL is DOCUMENTS
    assert mask.keys.shape == (2, 1, 9, 9) and mask.keys.dtype == torch.bool
    for r in range(2):
        for i in range(9):
            for j in range(9):
                assert mask.keys[r, 0, i, j] == (j <= i and DOCUMENTS[r, i] == DOCUMENTS[r, j])


def test_sees_neither_the_future_nor_another_document(attention, groups_of):
    x_RLD = states(*DOCUMENTS.shape).requires_grad_()
    y_RLD = attention(x_RLD, positions(*DOCUMENTS.shape), document_mask(DOCUMENTS), groups_of(MIXED))
    for r in range(2):
        for i in range(9):
            (grad,) = torch.autograd.grad(y_RLD[r, i].sum(), x_RLD, retain_graph=True)
            reached = grad.abs().sum(-1) > 0
            expected = torch.zeros(2, 9).bool()
            expected[r] = (torch.arange(9) <= i) & (DOCUMENTS[r] == DOCUMENTS[r, i])
            assert torch.equal(reached, expected)


def test_packed_documents_equal_each_document_alone(attention, groups_of):
    """RoPE is relative: a document's outputs do not depend on where it stands in the row."""
    x_RLD = states(*DOCUMENTS.shape)
    packed = attention(x_RLD, positions(*DOCUMENTS.shape) + 37, document_mask(DOCUMENTS), groups_of(MIXED))
    for r in range(2):
        for d in range(int(DOCUMENTS[r].max()) + 1):
            here = DOCUMENTS[r] == d
            length = int(here.sum())
            one = document_mask(torch.zeros(1, length, dtype=torch.int64))
            row = "".join(c for c, inside in zip(MIXED[r], here.tolist(), strict=True) if inside)
            alone = attention(x_RLD[r, here][None], positions(1, length), one, groups_of([row]))
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
def test_cache_equals_the_full_forward(attention, chunks, groups_of):
    x_RLD, position_RL = states(*DOCUMENTS.shape), positions(*DOCUMENTS.shape)
    mask = document_mask(DOCUMENTS)
    full, cache, parts, start = attention(x_RLD, position_RL, mask, groups_of(MIXED)), FakeCache(), [], 0
    for n in chunks:
        here = slice(start, start + n)
        visible = AttentionMask(mask.keys[:, :, here, : start + n])
        groups = groups_of([row[here] for row in MIXED], padded=True)
        parts.append(attention(x_RLD[:, here], position_RL[:, here], visible, groups, cache))
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


def test_bf16_autocast_stays_close_to_fp32(attention, groups_of):
    attention, x_RLD = attention.float(), states(*DOCUMENTS.shape).float().requires_grad_()
    inputs = x_RLD, positions(*DOCUMENTS.shape), document_mask(DOCUMENTS), groups_of(MIXED)
    exact = attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        low = attention(*inputs)
    low.float().square().sum().backward()
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() < 0.03 * exact.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
    assert all(p.grad.dtype == torch.float32 for p in attention.parameters())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("low", [False, True], ids=["float64", "bf16"])
def test_one_graph_serves_batches_of_differing_content(n_modalities, padded, low, groups_of):
    """Forward and backward without a graph break, and compiled once."""
    torch._dynamo.reset()
    eager, compiled = (new_attention("per_head", 2, n_modalities) for _ in range(2))
    if low:
        eager, compiled = eager.float(), compiled.float()
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.autocast("cpu", torch.bfloat16, enabled=low):
        for n in range(3):
            rows = [row[n:] + row[:n] for row in (LAYOUTS["padding"] if padded else MIXED)]
            x_RLD = states(*DOCUMENTS.shape, seed=n).to(next(eager.parameters()).dtype)
            document_RL = DOCUMENTS.roll(-n, 1)
            results = []
            for module in (eager, compiled):
                x = x_RLD.clone().requires_grad_()
                y = module(x, positions(*DOCUMENTS.shape), document_mask(document_RL), groups_of(rows))
                results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])])
            for got, expected in zip(*results, strict=True):
                tolerance = dict(rtol=2e-2, atol=2e-2) if low else dict(rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(got, expected, **tolerance)
    assert counter.frame_count == 1
    torch._dynamo.reset()
