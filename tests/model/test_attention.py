"""Attention against loops over rows, heads and pairs of tokens, in float64; every token with its modality's weights."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

from moma.modality import exact_groups, padded_groups
from moma.model.attention import (
    ATTENTIONS,
    Attention,
    AttentionMask,
    at_tokens,
    dense_mask,
    document_mask,
    flex_mask,
    rotate,
    rotation,
)

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
    mask = AttentionMask(dense_mask(torch.where(present_RL, DOCUMENTS, -1)))
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
    assert document_mask(DOCUMENTS).document_RL is DOCUMENTS
    keys = dense_mask(DOCUMENTS)
    assert keys.shape == (2, 1, 9, 9) and keys.dtype == torch.bool
    for r in range(2):
        for i in range(9):
            for j in range(9):
                assert keys[r, 0, i, j] == (j <= i and DOCUMENTS[r, i] == DOCUMENTS[r, j])


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
        visible = AttentionMask(dense_mask(DOCUMENTS)[:, :, here, : start + n])
        groups = groups_of([row[here] for row in MIXED], padded=True)
        parts.append(attention(x_RLD[:, here], position_RL[:, here], visible, groups, cache))
        start += n
    assert cache.k.shape == (2, attention.n_kv_heads, 9, DIM // HEADS)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-12)


def turned(x, position_RL):
    return rotate(x, rotation(position_RL, x.shape[-1], THETA, x.dtype))


def test_rotation_keeps_length_and_depends_on_distance_alone():
    x, y = (states(1, 6, seed).view(1, 1, 6, DIM) for seed in (1, 2))
    near = turned(x, positions(1, 6)) * turned(y, positions(1, 6) + 3)
    far = turned(x, positions(1, 6) + 500) * turned(y, positions(1, 6) + 503)
    torch.testing.assert_close(near.sum(-1), far.sum(-1), rtol=0, atol=1e-10)
    torch.testing.assert_close(turned(x, positions(1, 6)).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned(x, torch.zeros(1, 6).long()), x)


def test_rotation_of_low_precision_is_computed_in_fp32():
    x = states(1, 6).view(1, 1, 6, DIM)
    low = turned(x.bfloat16(), positions(1, 6) + 4000)
    exact = turned(x.bfloat16().double(), positions(1, 6) + 4000)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, rtol=0, atol=1e-3)  # angles of 4,000 in fp32


def test_a_rotation_made_once_gives_the_same_bits(attention, groups_of):
    x_RLD, mask, groups = states(*DOCUMENTS.shape), document_mask(DOCUMENTS), groups_of(MIXED)
    position_RL = positions(*DOCUMENTS.shape)
    once = rotation(position_RL, DIM // HEADS, THETA, x_RLD.dtype)
    assert torch.equal(attention(x_RLD, once, mask, groups), attention(x_RLD, position_RL, mask, groups))
    token_K = torch.tensor([17, 3, -1])
    assert at_tokens(position_RL, token_K).tolist() == [[8, 3, 0]]
    for part, whole in zip(at_tokens(once, token_K), once, strict=True):
        assert torch.equal(part[0, 0], whole.flatten(0, 2)[[17, 3, 0]])


def documents(*sizes):
    """One row of documents of these sizes, numbered in their order."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


PACKED = {
    "whole blocks": torch.stack([documents(512), documents(128, 256, 128)]),
    "across blocks": torch.stack([documents(1, 300, 211), documents(*[7] * 73, 1)]),
    "last block in part": torch.stack([documents(130, 260, 10), documents(400)]),
    "padding": torch.stack([documents(100, 300), torch.cat([documents(150, 100), torch.full((150,), -1)])]),
    "in any order": torch.randint(0, 3, (2, 300), generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("layout", PACKED)
def test_flex_mask_equals_the_boolean_mask(layout):
    document_RL = PACKED[layout]
    n_rows, length = document_RL.shape
    got, dense = flex_mask(document_RL), dense_mask(document_RL)

    def sees(row, head, query, key):
        return dense[row, 0, query, key]

    expected = create_block_mask(sees, n_rows, None, length, length, "cpu")
    assert got.shape == expected.shape
    if layout != "in any order":  # tight: no block is visited or looked into for nothing
        lists = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
        tight = layout != "padding"  # the block where the padding begins spans all numbers between
        for name in lists:
            ours, theirs = getattr(got, name), getattr(expected, name)
            assert torch.equal(ours, theirs) if tight else (ours >= theirs).all()
            assert getattr(got, name.replace("num_blocks", "indices")).dtype == torch.int32
    q, k, v = torch.randn(3, n_rows, 2, length, 16, generator=torch.Generator().manual_seed(1))
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=got), wanted, rtol=1e-4, atol=1e-5)


def test_rows_of_one_document_need_no_mask():
    document_RL, x_RLD = documents(9, 9).view(2, 9), states(2, 9)
    one = document_mask(document_RL)
    assert torch.equal(document_mask(document_RL, alone=True).keys, one.keys)  # a CPU keeps its kernels
    for kv_heads in (4, 2):
        module = new_attention("shared", kv_heads, None)
        inputs = x_RLD, positions(2, 9)
        torch.testing.assert_close(module(*inputs, AttentionMask(None), None), module(*inputs, one, None))
    with torch.no_grad():  # the order of the kernels is taken into a graph
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs, AttentionMask(None), None), module(*inputs, one, None))
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("alone, sizes", [(False, (900, 1, 1399)), (False, (200, 100)), (True, (2300,))])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_gpu_attends_as_the_loops_do(kv_heads, alone, sizes, device="cuda"):
    """FlexAttention, a boolean mask, the causal kernels: outputs and gradients in bf16 against float64 on the CPU."""
    exact = Attention(256, 4, kv_heads, "shared", THETA, EPS).double()
    with torch.no_grad():
        for parameter in exact.parameters():
            nn.init.normal_(parameter, std=1 / 16, generator=torch.Generator().manual_seed(0))
    low = copy.deepcopy(exact).to(device, torch.float32)
    document_RL, results = torch.stack([documents(*sizes), documents(*(sizes if alone else sizes[::-1]))]), []
    for module, where in ((exact, "cpu"), (low, device)):
        own_RL, dtype = document_RL.to(where), next(module.parameters()).dtype
        generator = torch.Generator().manual_seed(1)
        x_RLD = torch.randn(*document_RL.shape, 256, generator=generator).to(where, dtype).requires_grad_()
        position_RL = positions(*document_RL.shape).to(where)
        with torch.autocast(where, torch.bfloat16, enabled=module is low):
            y_RLD = module(x_RLD, position_RL, document_mask(own_RL, alone), None)
        weight = torch.randn(y_RLD.shape, generator=generator).to(where)
        results.append([y_RLD, *torch.autograd.grad((y_RLD * weight).sum(), [x_RLD, *module.parameters()])])
    for wanted, got in zip(*results, strict=True):
        assert (got.double().cpu() - wanted).norm() < 0.02 * wanted.norm()


def test_one_graph_serves_all_flex_masks():
    """The mask made outside, from documents of another content each time: what a GPU runs, forward only."""
    torch._dynamo.reset()
    module, counter = new_attention("shared", 4, None).float(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ((512,), (100, 412), (8,) * 64):
            document_RL, x_RLD = documents(*sizes)[None], states(1, 512).float()
            inputs = x_RLD, positions(1, 512)
            got = compiled(*inputs, AttentionMask(flex_mask(document_RL)), None)
            torch.testing.assert_close(got, module(*inputs, document_mask(document_RL), None), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


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
