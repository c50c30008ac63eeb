"""The sparse layer against loops: float64, one token and one expert at a time, written from MoMa Eq. 1.

g_e(x) = sigmoid(x . W_g[:, e]) if e chose x else 0          y = sum_e g_e(x) W2_e (silu(x W1_e) * (x W3_e))
expert e chooses floor(N / |E|) of its group's N tokens, best score first, lower index first among equals
"""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moma.modality import TokenGroups, exact_groups, modality_of, padded_groups
from moma.model.block import RMSNorm
from moma.model.feed_forward import CAUSAL_MODES, DenseConfig, DenseFeedForward, SparseConfig, build_feed_forward
from moma.model.routing import SELECTIONS, Group
from moma.model.routing.expert_choice import ExpertChoiceConfig
from moma.model.slots import (
    BAGGED,
    GatherSum,
    _sum_bags,
    combine,
    dispatch,
    gather_sum,
    plain_gather_sum,
    slots_of_tokens,
)

LAYERS_ONLY = True
DIM, HIDDEN = 6, 5
TWO = ("text", "image")
WORD, CODE, SOUND, PAD = 30, 4, 56, 1  # one id of each modality of the small vocabularies

# which token is of which modality: T text, I image, A audio (text where the vocabulary has none)
LAYOUTS = {
    "mixed": "TTIIATTIITAIITTTIITTAIITTTIII",
    "no_image": "TTTTATTTTTATTTT",
    "all_image": "IIIIIIIIIIIII",
    "one_token": "T",
    "one_image_token": "I",
    "fewer_tokens_than_experts": "TTIIA",
}


def ids_of(layout):
    return torch.tensor([{"T": WORD, "I": CODE, "A": SOUND, ".": PAD}[c] for c in layout])


def new_layer(variant, aux_routers=False, seed=0, scale=1.0):
    """Random weights; cut-offs and biases as after some training."""
    modalities = variant.vocabulary.modalities
    layer = build_feed_forward(variant.feed_forward, 0, 2, DIM, HIDDEN, modalities, aux_routers).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=scale, generator=generator)
    for name, state in layer.named_buffers():
        if name.endswith("age"):
            state.fill_(9)
        else:
            nn.init.normal_(state, std=0.5, generator=generator)
    return layer


def inputs(n_tokens, seed=1, copies=()):
    """Random states; `copies` = lists of positions that hold the same state."""
    x_TD = torch.randn(n_tokens, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for positions in copies:
        positions = [p for p in positions if p < n_tokens]
        x_TD[positions] = x_TD[positions[:1]].clone()
    return x_TD.requires_grad_()


def swiglu_by_hand(x_D, w13, w2):
    hidden = w2.shape[0]
    out = torch.zeros(w2.shape[1], dtype=x_D.dtype)
    for f in range(hidden):
        a, b = (x_D * w13[:, f]).sum(), (x_D * w13[:, hidden + f]).sum()
        out = out + a / (1 + torch.exp(-a)) * b * w2[f]
    return out


def best(values, k):
    """Numbers of the k first of a list, best first, lower number first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def expert_choice_by_hand(config, logit, state, alone):
    n, size = logit.shape
    k = min(n, math.floor(Fraction(config.capacity_factor).limit_denominator(100) / size * n))
    taken = {(t, e) for e in range(size) for t in best(logit[:, e].tolist(), k)}
    return taken, lambda t, e: 1 / (1 + torch.exp(-logit[t, e]))


def threshold_by_hand(config, logit, state, alone):
    n, size = logit.shape
    taken = set()
    for e in range(size):
        above = [t for t in range(n) if logit[t, e] > state["cutoff"][e]]
        room = n if alone else min(n, math.floor(config.bound * config.capacity_factor * n / size))
        taken |= {(t, e) for t in above[:room]}
    return taken, lambda t, e: 1 / (1 + torch.exp(-logit[t, e]))


def token_choice_by_hand(config, logit, state, alone):
    n, size = logit.shape
    p = [[torch.exp(v - max(row)) for v in row] for row in logit.unbind()]
    p = [[v / sum(row) for v in row] for row in p]
    first = [best([(v + b).item() for v, b in zip(row, state["bias"], strict=True)], config.k) for row in p]

    def gate(t, e):
        return p[t][e] if config.weights == "raw" else p[t][e] / sum(p[t][other] for other in first[t])

    return {(t, e) for t in range(n) for e in first[t]}, gate


def rule_itself(kind):
    """For rules without an entry below: their own decision on these logits; all around it is checked."""

    def by_hand(config, logit, state, alone):
        rule, n, size = SELECTIONS[kind], *logit.shape
        group = Group("all", state, share=rule.share(config, "all", size))
        if alone:
            selected = rule.alone(config, logit, state)
            gate = rule.gate(config, logit, selected)
        else:
            choice = rule.choose(config, logit, group)
            gate, selected = choice.gate_NE, choice.selected_NE
            if choice.token_EK is not None:
                selected = torch.zeros(n, size, dtype=torch.bool)
                for e, tokens in enumerate(choice.token_EK.tolist()):
                    selected[tokens, e] = True
        return {(t, e) for t, e in selected.nonzero().tolist()}, lambda t, e: gate[t, e]

    return by_hand


BY_HAND = {
    "expert_choice": expert_choice_by_hand,
    "threshold": threshold_by_hand,
    "token_choice": token_choice_by_hand,
}


def aux_by_hand(aux, x_D, e):
    h = [(x_D * aux.w1[:, j]).sum() for j in range(aux.w1.shape[1])]
    return sum(v / (1 + torch.exp(-v)) * aux.w2[j, e] for j, v in enumerate(h))


def causal_by_hand(layer, mode, x_TD, logit, state, members, group):
    """Pairs that a batch-wide rule's stand-in takes."""
    above = set()
    for n, t in enumerate(members):
        for e in range(logit.shape[1]):
            if mode == "threshold":
                taken = logit[n, e] > state["cutoff"][e]
            else:
                cut = 0.5 if mode == "aux" else 1 / (1 + torch.exp(-state["aux_cutoff"][e]))
                taken = 1 / (1 + torch.exp(-aux_by_hand(layer.aux[group], x_TD[t], e))) > cut
            above |= {(n, e)} if taken else set()
    return above


def loop_reference(layer, x_TD, modality, mode="train"):
    """Outputs (T, D), and the chosen (group, expert, token) triples; `modality` -1 marks padding."""
    sizes = [len(experts.w13) for experts in layer.experts]
    group_of = [-1 if m < 0 else (m if len(sizes) > 1 else 0) for m in modality]
    rows = [0 * x_TD[t] for t in range(len(modality))]
    chosen, column, routed = set(), 0, 0
    for group, size in enumerate(sizes):
        members = [t for t, g in enumerate(group_of) if g == group]
        w13, w2 = layer.experts[group].w13, layer.experts[group].w2
        if size == 1:
            for t in members:
                rows[t] = rows[t] + swiglu_by_hand(x_TD[t], w13[0], w2[0])
            continue
        scores = [(x_TD[t] * layer.router[:, column + e]).sum() for t in members for e in range(size)]
        logit = torch.stack(scores).view(-1, size) if members else x_TD.new_zeros(0, size)
        state = {name: value[column : column + size] for name, value in layer.routing_state().items()}
        alone = mode != "train" and layer.rule.alone is not None
        by_hand = BY_HAND.get(layer.selection.kind, rule_itself(layer.selection.kind))
        taken, gate = by_hand(layer.selection, logit, state, alone) if members else (set(), None)
        if mode != "train" and not alone:
            taken = causal_by_hand(layer, mode, x_TD, logit, state, members, routed)
        for n, e in sorted(taken, key=lambda pair: pair[1]):
            t = members[n]
            chosen.add((group, e, t))
            rows[t] = rows[t] + gate(n, e) * swiglu_by_hand(x_TD[t], w13[e], w2[e])
        column += size
        routed += 1
    if layer_shared(layer) is not None:
        for t in range(len(modality)):
            rows[t] = rows[t] + swiglu_by_hand(x_TD[t], layer.shared.w13[0], layer.shared.w2[0])
    return torch.stack(rows), chosen


def layer_shared(layer):
    return getattr(layer, "shared", None)


def columns_of(sizes):
    """(group, expert) of each column of the statistics."""
    return [(g, e) for g, size in enumerate(sizes) if size > 1 for e in range(size)]


def assert_equal_to_loop(layer, x_TD, groups, modality, **reference):
    parameters = dict(layer.named_parameters())
    weight = torch.randn(x_TD.shape, dtype=x_TD.dtype, generator=torch.Generator().manual_seed(9))
    y_TD, stats = layer(x_TD, groups, "train")
    expected_TD, chosen = loop_reference(layer, x_TD, modality, **reference)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-11, atol=1e-12)
    wanted = {"x": x_TD, **{n: p for n, p in parameters.items() if not n.startswith("aux")}}
    got = torch.autograd.grad((y_TD * weight).sum(), list(wanted.values()), allow_unused=True)
    need = torch.autograd.grad((expected_TD * weight).sum(), list(wanted.values()), allow_unused=True)
    for name, g, n in zip(wanted, got, need, strict=True):
        g, n = (torch.zeros_like(wanted[name]) if v is None else v for v in (g, n))
        torch.testing.assert_close(g, n, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    untouched = set(range(len(modality))) - {t for _, _, t in chosen}
    alone = {g for g, size in enumerate([len(e.w13) for e in layer.experts]) if size == 1}
    n_groups = len(layer.experts)
    for t in untouched:
        group = 0 if n_groups == 1 else modality[t]
        if layer_shared(layer) is None and (modality[t] < 0 or group not in alone):
            assert torch.equal(y_TD[t], torch.zeros(DIM, dtype=y_TD.dtype)), f"token {t} must be exactly zero"
    if stats is not None:
        sizes = [len(e.w13) for e in layer.experts]
        got_set = {
            (*columns_of(sizes)[c], t) for t, c in stats.selected_TE.nonzero().tolist()
        }  # fmt: skip
        assert got_set == chosen
    return y_TD, stats, chosen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_equal_the_loops(variant, layout):
    ids = ids_of(LAYOUTS[layout])
    modality = modality_of(ids, variant.vocabulary).tolist()
    layer, x_TD = new_layer(variant), inputs(len(ids))
    assert_equal_to_loop(layer, x_TD, exact_groups(ids, variant.vocabulary), modality)


def test_identical_tokens_are_taken_in_order(variant):
    """Many copies of one state straddle every expert's capacity: the lower positions win."""
    ids = ids_of(LAYOUTS["mixed"])
    modality = modality_of(ids, variant.vocabulary).tolist()
    text, image = ([t for t, c in enumerate(LAYOUTS["mixed"]) if c in kind] for kind in ("TA", "I"))
    layer = new_layer(variant)
    x_TD = inputs(len(ids), copies=(text[1::2] + text[::2], image[2:]))
    _, stats, _ = assert_equal_to_loop(layer, x_TD, exact_groups(ids, variant.vocabulary), modality)
    if stats is not None and layer.needs_future:  # the case is what it claims to be: a part of the copies
        taken = stats.selected_TE[image[2:]].sum(0)
        partly = (taken > 0) & (taken < len(image[2:]))
        assert partly.any() or variant.group_sizes[-1] == 1


def test_all_tokens_identical(variant):
    ids = ids_of(LAYOUTS["mixed"])
    modality = modality_of(ids, variant.vocabulary).tolist()
    x_TD = inputs(len(ids), copies=(range(len(ids)),))
    assert_equal_to_loop(new_layer(variant), x_TD, exact_groups(ids, variant.vocabulary), modality)


@pytest.mark.parametrize("name", ["moe_8x", "moe_4t4i", "moe_7t1i", "three_modalities"])
@pytest.mark.parametrize("capacity_factor", [0.5, 1.5, 6.0])
def test_other_capacities_equal_the_loops(name, variants, capacity_factor):
    variant = variants[name]
    selection = type(variant.feed_forward.selection)(capacity_factor=capacity_factor)
    variant = replace(variant, feed_forward=replace(variant.feed_forward, selection=selection))
    ids = ids_of(LAYOUTS["mixed"])
    modality = modality_of(ids, variant.vocabulary).tolist()
    groups = exact_groups(ids, variant.vocabulary)
    assert_equal_to_loop(new_layer(variant), inputs(len(ids)), groups, modality)


def test_capacity_factor_per_group():
    """Three experts for a text token and one for two image tokens, on average."""
    selection = ExpertChoiceConfig(capacity_factor={"text": 3.0, "image": 0.5})
    layer = build_feed_forward(
        SparseConfig({"text": 4, "image": 4}, selection=selection), 0, 1, DIM, HIDDEN, TWO, False
    )
    layer = layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    ids = ids_of("TTTTTTTTIIIIIIII")
    vocabulary_groups = TokenGroups(
        (torch.arange(8), torch.arange(8, 16)),
        (torch.cat([torch.arange(8), torch.full((8,), -1)]), torch.cat([torch.full((8,), -1), torch.arange(8)])),
    )
    _, stats = layer(inputs(len(ids)), vocabulary_groups, "train")
    assert stats.selected_TE.sum(0).tolist() == [6] * 4 + [1] * 4
    with pytest.raises(ValueError, match="got capacity_factor for .'text'., need one for the group image: add it"):
        wrong = ExpertChoiceConfig(capacity_factor={"text": 3.0})
        build_feed_forward(SparseConfig({"text": 4, "image": 4}, selection=wrong), 0, 1, DIM, HIDDEN, TWO, False)


@pytest.mark.parametrize("name", ["moe_8x", "moe_4t4i", "moe_7t1i", "moe_2t4i_shared", "three_modalities"])
def test_each_expert_takes_exactly_its_capacity(name, variants, make_batch):
    variant = variants[name]
    batch = make_batch(variant.vocabulary, seed=3)
    layer = new_layer(variant)
    _, stats = layer(inputs(batch.tokens_RL.numel()), batch.groups, "train")
    sizes = variant.group_sizes
    counts = [batch.tokens_RL.numel()] if len(sizes) == 1 else [i.numel() for i in batch.groups.index]
    need = [n // size for n, size in zip(counts, sizes, strict=True) if size > 1 for _ in range(size)]
    assert stats.selected_TE.sum(0).tolist() == need


def test_statistics_say_what_was_decided(variant, make_batch):
    batch = make_batch(variant.vocabulary, seed=4)
    layer, x_TD = new_layer(variant, aux_routers=True), inputs(batch.tokens_RL.numel())
    y_TD, stats = layer(x_TD, batch.groups, "train")
    sizes = variant.group_sizes
    if stats is None:
        assert max(sizes) == 1
        return
    modality = modality_of(batch.tokens_RL.flatten(), variant.vocabulary)
    member = torch.stack([(modality == g) | (len(sizes) == 1) for g, _ in columns_of(sizes)], 1)
    assert torch.equal(stats.member_TE, member)
    assert torch.equal(stats.selected_TE, stats.reference_TE)
    if layer.selection.kind != "token_choice":
        score = torch.sigmoid(x_TD @ layer.router).detach()
        torch.testing.assert_close(stats.score_TE, torch.where(member, score, 0), rtol=1e-14, atol=0)
    assert not (stats.selected_TE & ~member).any()
    assert not stats.score_TE.requires_grad and stats.selected_TE.dtype == torch.bool
    if not layer.needs_future:
        assert stats.aux_logit_TE is None and not len(layer.aux)
        return
    # outside its group a token has no auxiliary logit, and their training never moves the model
    assert torch.equal(stats.aux_logit_TE != 0, member)
    grads = torch.autograd.grad(stats.aux_logit_TE.sum(), [x_TD, layer.router], allow_unused=True)
    assert all(g is None or not g.any() for g in grads)
    _, causal = layer(x_TD, batch.groups, "aux")
    assert torch.equal(causal.reference_TE, stats.reference_TE)
    assert torch.equal(causal.selected_TE, (causal.aux_logit_TE > 0) & member)
    assert torch.equal(causal.score_TE, stats.score_TE)
    assert layer(x_TD, batch.groups, "aux", statistics=False)[1] is None


def test_1t1i_is_two_plain_feed_forwards(variants):
    variant = variants["moe_1t1i"]
    ids = ids_of(LAYOUTS["mixed"])
    layer, x_TD = new_layer(variant), inputs(len(ids))
    modality = modality_of(ids, variant.vocabulary)
    both = []
    for experts in layer.experts:
        h1, h3 = (x_TD @ experts.w13[0]).chunk(2, dim=-1)
        both.append((F.silu(h1) * h3) @ experts.w2[0])
    expected = torch.where((modality == 0)[:, None], both[0], both[1])
    for mode in ("train", "aux"):
        y_TD, stats = layer(x_TD, exact_groups(ids, variant.vocabulary), mode)
        assert stats is None
        torch.testing.assert_close(y_TD, expected, rtol=1e-13, atol=1e-14)


def test_dense_twin_shares_its_numbers_with_one_group_of_one():
    dense = DenseFeedForward(DIM, HIDDEN).double()
    alone = build_feed_forward(SparseConfig({"all": 1}), 0, 1, DIM, HIDDEN, ("text", "image"), False).double()
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    alone.load_state_dict(dense.state_dict())
    x_TD = inputs(9)
    groups = TokenGroups((torch.arange(9),), (torch.arange(9),))
    expected, _ = dense(x_TD, groups, "train")
    got, stats = alone(x_TD, groups, "train")
    assert stats is None and torch.equal(got, expected)


def test_permuting_tokens_within_a_modality_permutes_outputs(variant):
    ids = ids_of(LAYOUTS["mixed"])
    modality = modality_of(ids, variant.vocabulary)
    order = torch.arange(len(ids))
    for m in range(len(variant.vocabulary.modalities)):
        positions = (modality == m).nonzero().squeeze(1)
        shuffled = torch.randperm(positions.numel(), generator=torch.Generator().manual_seed(m))
        order[positions] = positions[shuffled]
    layer, x_TD = new_layer(variant), inputs(len(ids))
    groups = exact_groups(ids, variant.vocabulary)
    y_TD, _ = layer(x_TD, groups, "train")
    permuted_TD, _ = layer(x_TD[order], groups, "train")
    torch.testing.assert_close(permuted_TD, y_TD[order], rtol=1e-13, atol=1e-14)


PADDED = {
    "trailing": ("TTIIATTIITAIITTTIITTA", 8),
    "much": ("TTTTTIIIA", 20),
    "one_token": ("T", 6),
    "only_image": ("IIIIIII", 3),
    "none": ("TTIITTIIA", 0),
    "all_padding": ("", 5),
}


@pytest.mark.parametrize("case", PADDED)
def test_padded_form_equals_exact_form_and_the_loops(variant, case):
    layout, n_padding = PADDED[case]
    n_tokens = len(layout)
    ids = ids_of(layout + "." * n_padding)
    present = torch.arange(len(ids)) < n_tokens
    modality = modality_of(ids, variant.vocabulary).tolist()[:n_tokens] + [-1] * n_padding
    layer = new_layer(variant, aux_routers=True)
    x_TD = inputs(len(ids), copies=([0, 4, 6, 9],))
    groups = padded_groups(ids, present, variant.vocabulary)
    if variant.feed_forward.kind == "dense":  # computes padding too, which nothing reads
        modality = [0] * len(ids)
    y_TD, stats, _ = assert_equal_to_loop(layer, x_TD, groups, modality)
    if stats is not None:
        for field in (stats.selected_TE, stats.reference_TE, stats.member_TE, stats.score_TE, stats.aux_logit_TE):
            assert field is None or not field[n_tokens:].any()
    if n_tokens:
        exact = exact_groups(ids[:n_tokens], variant.vocabulary)
        for mode in ("train", *CAUSAL_MODES):
            got = layer(x_TD, groups, mode)[0][:n_tokens]
            torch.testing.assert_close(got, layer(x_TD[:n_tokens], exact, mode)[0], rtol=1e-13, atol=1e-14)


def test_padding_between_rows_is_never_selected(variant):
    layout = "TTIII...TIITA...TTTTIIAT"
    ids = ids_of(layout)
    present = torch.tensor([c != "." for c in layout])
    modality = torch.where(present, modality_of(ids, variant.vocabulary), -1).tolist()
    if variant.feed_forward.kind == "dense":
        modality = [0] * len(ids)
    groups = padded_groups(ids, present, variant.vocabulary)
    assert_equal_to_loop(new_layer(variant), inputs(len(ids)), groups, modality)


def test_garbage_in_padding_stays_there(variant):
    """A NaN in a padded position reaches neither another token nor a gradient."""
    layer = new_layer(variant)
    if variant.feed_forward.kind == "dense" or layer.shared is not None:
        pytest.skip("dense and shared experts compute every row by itself")
    ids = ids_of("TTIIATTIITTI....")
    present = ids != PAD
    groups = padded_groups(ids, present, variant.vocabulary)
    layer = new_layer(variant)
    x_TD = inputs(len(ids)).detach()
    clean, _ = layer(x_TD, groups, "train")
    x_TD[12:] = torch.nan
    y_TD, _ = layer(x_TD.requires_grad_(), groups, "train")
    assert torch.equal(y_TD[:12], clean[:12])
    y_TD[:12].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for n, p in layer.named_parameters() if "experts" in n)
    assert x_TD.grad is not None and x_TD.grad[:12].isfinite().all()


def test_bf16_autocast_stays_close_to_fp32(variant, make_batch):
    batch = make_batch(variant.vocabulary, seed=5)
    layer = new_layer(variant, scale=0.4).float()
    x_TD = inputs(batch.tokens_RL.numel()).detach().float().requires_grad_()
    y_TD, stats = layer(x_TD, batch.groups, "train")
    exact = torch.autograd.grad(y_TD.sum(), [x_TD, *layer.parameters()], allow_unused=True)
    with torch.autocast("cpu", torch.bfloat16):
        low_TD, low_stats = layer(x_TD, batch.groups, "train")
    low = torch.autograd.grad(low_TD.float().sum(), [x_TD, *layer.parameters()], allow_unused=True)
    assert low_TD.dtype == torch.bfloat16 and low_TD.isfinite().all()
    assert (low_TD.float() - y_TD).norm() < 0.02 * y_TD.norm()
    if stats is not None:  # routers compute in fp32 whatever autocast says: the choice is the same
        assert low_stats.score_TE.dtype == torch.float32
        assert torch.equal(low_stats.score_TE, stats.score_TE)
        assert torch.equal(low_stats.selected_TE, stats.selected_TE)
    for g, n in zip(low, exact, strict=True):
        if n is not None:
            assert g.dtype == torch.float32 and g.isfinite().all()
            assert (g - n).norm() <= 0.03 * n.norm()


def test_bf16_input_has_fp32_scores(variants):
    variant = variants["moe_4t4i"]
    ids = ids_of(LAYOUTS["mixed"])
    layer = new_layer(variant, aux_routers=True).bfloat16()
    for name, parameter in layer.named_parameters():
        if name.startswith(("router", "aux")):
            parameter.data = parameter.data.float()
    y_TD, stats = layer(inputs(len(ids)).bfloat16(), exact_groups(ids, variant.vocabulary), "train")
    assert y_TD.dtype == torch.bfloat16
    assert stats.score_TE.dtype == stats.aux_logit_TE.dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["dense", "moe_1t1i", "moe_8x", "moe_4t4i", "moe_7t1i", "three_modalities", "threshold"]
)
def test_tokens_nobody_chose_pass_a_post_norm_without_nan(name, variants):
    variant = variants[name]
    ids = ids_of(LAYOUTS["mixed"])
    layer, x_TD = new_layer(variant), inputs(len(ids))
    norm = RMSNorm(DIM, 1e-5).double()
    nn.init.ones_(norm.weight)
    y_TD, stats = layer(x_TD, exact_groups(ids, variant.vocabulary), "train")
    out_TD = x_TD + norm(y_TD)
    out_TD.square().sum().backward()
    assert out_TD.isfinite().all() and x_TD.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in [*layer.parameters(), *norm.parameters()])
    if stats is None:
        return
    alone = torch.zeros(len(ids), dtype=torch.bool)
    sizes = variant.group_sizes
    for m, size in enumerate(sizes):
        if size == 1 and len(sizes) > 1:
            alone |= modality_of(ids, variant.vocabulary) == m
    untouched = ~stats.selected_TE.any(1) & ~alone
    assert untouched.any()
    assert torch.equal(out_TD[untouched], x_TD[untouched])
    assert torch.equal(x_TD.grad[untouched], 2 * x_TD[untouched])


def test_post_norm_hides_the_gate_of_tokens_with_one_expert(variants):
    """Facts 1.1: under post-norm a token chosen by exactly one expert hardly moves the router."""
    variant = variants["moe_4t4i"]
    ids = ids_of(LAYOUTS["mixed"])
    layer, x_TD = new_layer(variant), inputs(len(ids)).detach()
    norm = RMSNorm(DIM, 1e-5).double()
    nn.init.ones_(norm.weight)
    y_TD, stats = layer(x_TD, exact_groups(ids, variant.vocabulary), "train")
    times = stats.selected_TE.sum(1)
    assert (times == 1).any() and (times > 1).any()

    def router_gradient(out_TD, rows):
        weight = torch.randn(out_TD.shape, generator=torch.Generator().manual_seed(0)).double()
        return torch.autograd.grad((out_TD * weight)[rows].sum(), layer.router, retain_graph=True)[0].norm()

    assert router_gradient(norm(y_TD), times == 1) < 0.02 * router_gradient(norm(y_TD), times > 1)
    assert router_gradient(y_TD, times == 1) > 0.1 * router_gradient(y_TD, times > 1)


def random_maps(seed, n_in=7, n_out=5, columns=3):
    """A random partial matching of inputs to (output, column) and its inverse (each input used at most once)."""
    generator = torch.Generator().manual_seed(seed)
    index_OC = torch.full((n_out, columns), -1)
    inverse_IC = torch.full((n_in, 1), -1)
    cells = torch.randperm(n_out * columns, generator=generator)[: n_in - 1]
    for i, cell in zip(torch.randperm(n_in, generator=generator).tolist(), cells.tolist(), strict=False):
        index_OC[cell // columns, cell % columns] = i
        inverse_IC[i, 0] = cell // columns
    return index_OC, inverse_IC


@pytest.mark.parametrize("seed", range(4))
def test_gather_sum_is_the_adjoint_of_its_inverse(seed):
    index_OC, inverse_IC = random_maps(seed)
    generator = torch.Generator().manual_seed(seed)
    x_ID, y_OD = (torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (7, 5))
    left = (gather_sum(x_ID, index_OC) * y_OD).sum()
    right = (x_ID * gather_sum(y_OD, inverse_IC)).sum()
    torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)
    many, one = x_ID.requires_grad_(), y_OD.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: GatherSum.apply(x, index_OC, inverse_IC), many)
    assert torch.autograd.gradcheck(lambda y: GatherSum.apply(y, inverse_IC, index_OC), one)


def test_dispatch_and_combine_gradients():
    token_EK = torch.tensor([[0, 2, -1], [2, 3, 4]])
    slots_TC = slots_of_tokens(token_EK, 6)
    assert slots_TC.tolist() == [[0, -1], [-1, -1], [1, 3], [-1, 4], [-1, 5], [-1, -1]]
    token_S = token_EK.flatten()
    x_TD = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y_SD = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(dispatch(x_TD, token_S, slots_TC)[2], torch.zeros(3).double())
    assert torch.equal(combine(y_SD, slots_TC, token_S)[[1, 5]], torch.zeros(2, 3).double())
    assert torch.autograd.gradcheck(lambda x: dispatch(x, token_S, slots_TC), x_TD)
    assert torch.autograd.gradcheck(lambda y: combine(y, slots_TC, token_S), y_SD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 4), (6, 3), (40, 8)])
def test_gather_sum_is_a_loop_below_and_above_the_bound_of_bags(shape, dtype):
    """Up to FEW entries columns are added one by one, above it CPUs take embedding bags; both are called here too."""
    source = torch.Generator().manual_seed(0)
    x_ID, index_OC = torch.randn(9, 5, generator=source).to(dtype), torch.randint(-1, 9, shape, generator=source)
    index_OC[1:2] = -1  # nothing to add
    wanted_OD = torch.zeros(len(index_OC), 5, dtype=torch.float64)
    for row, entries in enumerate(index_OC.tolist()):
        for entry in entries:
            if entry >= 0:
                wanted_OD[row] += x_ID[entry].double()
    ways = [gather_sum, plain_gather_sum, *([_sum_bags] if dtype in BAGGED else [])]
    for way in ways:
        got_OD = way(x_ID, index_OC)
        assert got_OD.dtype == dtype and not got_OD[1:2].any()
        torch.testing.assert_close(got_OD.double(), wanted_OD, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gather_sum_adds_bf16_in_fp32():
    x_ID = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()  # 256 + 1 is 256 in bf16
    assert gather_sum(x_ID, torch.tensor([[0, 1, 2]])).item() == 258
    assert gather_sum(x_ID, torch.tensor([[0, 1, 2]])).dtype == torch.bfloat16
    assert _sum_bags(x_ID, torch.tensor([[0, 1, 2]])).item() == 258


@pytest.mark.parametrize("mode", CAUSAL_MODES)
@pytest.mark.parametrize("layout", ["mixed", "no_image", "one_token"])
def test_causal_modes_equal_the_dropless_loops(variant, layout, mode):
    ids = ids_of(LAYOUTS[layout])
    modality = modality_of(ids, variant.vocabulary).tolist()
    layer, x_TD = new_layer(variant, aux_routers=True), inputs(len(ids))
    y_TD, stats = layer(x_TD, exact_groups(ids, variant.vocabulary), mode)
    expected_TD, chosen = loop_reference(layer, x_TD, modality, mode)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-11, atol=1e-12)
    if stats is not None:
        columns = columns_of(variant.group_sizes)
        assert {(*columns[c], t) for t, c in stats.selected_TE.nonzero().tolist()} == chosen


def test_aux_mode_obeys_planted_logits(variants):
    """None, one and every expert of a group; more tokens than any capacity."""
    variant = variants["moe_4t4i"]
    ids = ids_of("T" * 9 + "I" * 6)
    layer, x_TD = new_layer(variant, aux_routers=True), inputs(len(ids))
    planted_text = torch.full((9, 4), -1.0).double()
    planted_text[:, 2] = 1.0  # all nine tokens go to text expert 2
    planted_text[0] = 1.0
    planted_text[1] = -1.0
    planted_text[3, 0] = 0.0  # sigmoid is 0.5: not above
    planted_image = torch.full((6, 4), -2.0).double()

    class Planted(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, x):
            assert x.shape == (len(self.logits), DIM)
            return self.logits

    layer.aux = nn.ModuleList([Planted(planted_text), Planted(planted_image)])
    y_TD, stats = layer(x_TD, exact_groups(ids, variant.vocabulary), "aux")
    assert torch.equal(stats.selected_TE[:9, :4], planted_text > 0)
    assert not stats.selected_TE[9:].any() and not stats.selected_TE[:, 4:].any()
    experts, score = layer.experts[0], torch.sigmoid(x_TD @ layer.router)
    for t in range(len(ids)):
        expected = torch.zeros(DIM, dtype=torch.float64)
        for e in range(4):
            if t < 9 and planted_text[t, e] > 0:
                expected = expected + score[t, e] * swiglu_by_hand(x_TD[t], experts.w13[e], experts.w2[e])
        torch.testing.assert_close(y_TD[t], expected, rtol=1e-12, atol=1e-13)


def test_aux_mode_needs_auxiliary_routers(variants):
    ids = ids_of(LAYOUTS["mixed"])
    variant = variants["moe_4t4i"]
    text = "got routing mode aux, need auxiliary routers.*objective=aux_routers, or use mode=threshold"
    with pytest.raises(ValueError, match=text):
        new_layer(variant)(inputs(len(ids)), exact_groups(ids, variant.vocabulary), "aux")


@pytest.mark.parametrize("experts", [{"text": 4}, {"all": 4, "text": 1}, {"text": 2, "picture": 2}])
def test_experts_must_name_the_modalities(experts):
    with pytest.raises(ValueError, match="got feed_forward.experts for .* need exactly .*give a number per modality"):
        SparseConfig(experts).groups(("text", "image"))


def test_groups_need_an_expert():
    with pytest.raises(ValueError, match="need at least 1 in every group"):
        SparseConfig({"text": 4, "image": 0}).groups(("text", "image"))


def test_numbers_of_experts_per_layer_and_layers_that_are_sparse():
    config = SparseConfig({"text": (4, 2), "image": 1}, layers=(0, 3))
    layers = [build_feed_forward(config, i, 4, DIM, HIDDEN, TWO, False) for i in range(4)]
    assert [isinstance(layer, DenseFeedForward) for layer in layers] == [False, True, True, False]
    assert [layers[i].groups for i in (0, 3)] == [{"text": 4, "image": 1}, {"text": 2, "image": 1}]
    assert SparseConfig({"all": 2}, layers="interval").sparse_layers(5) == (0, 2, 4)
    assert SparseConfig({"all": 2}, layers="first_half").sparse_layers(4) == (0, 1)
    assert SparseConfig({"all": 2}, layers="second_half").sparse_layers(4) == (2, 3)
    assert SparseConfig({"all": 2}).sparse_layers(3) == (0, 1, 2)


@pytest.mark.parametrize("layers", [(), (1, 1), (2, 1), (-1,), (4,)])
def test_sparse_layers_must_exist(layers):
    with pytest.raises(ValueError, match="got feed_forward.layers=.* need rising layer numbers from 0 to 3: change it"):
        SparseConfig({"all": 2}, layers=layers).sparse_layers(4)


def test_a_list_of_expert_numbers_must_cover_the_sparse_layers():
    for config in (SparseConfig({"text": (4, 2), "image": 1}), SparseConfig({"text": (4, 2, 2, 9), "image": 1})):
        with pytest.raises(ValueError, match="entries in feed_forward.experts.text, need one for each of the 3 sp"):
            build_feed_forward(config, 2, 3, DIM, HIDDEN, TWO, False)


@pytest.mark.parametrize("fields", [{"width": 0.0}, {"shared": -1}])
def test_width_and_shared_experts_are_checked(fields):
    with pytest.raises(ValueError, match="need width > 0 and shared >= 0"):
        SparseConfig({"all": 2}, **fields)


def test_token_choice_has_no_gumbel_sigmoid():
    with pytest.raises(ValueError, match="got noise=gumbel for selection.kind=token_choice, need noise=none"):
        SparseConfig({"all": 2}, noise="gumbel", selection=SELECTIONS["token_choice"].config())


def saved_bytes(layer, x_TD, groups):
    """Bytes kept for the backward pass beyond the parameters and the input, each storage once."""
    known = {t.untyped_storage().data_ptr() for t in [x_TD, *layer.parameters()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD, _ = layer(x_TD, groups, "train")
    total = sum(n for n, _ in kept.values())
    del y_TD
    return total


def test_sparse_layer_keeps_little_more_than_dense_for_the_backward_pass(vocabulary):
    dim, hidden, n_tokens = 64, 192, 1024
    ids = torch.tensor([WORD, CODE]).repeat(n_tokens // 2)
    groups = exact_groups(ids, vocabulary)
    x_TD = torch.randn(n_tokens, dim, requires_grad=True)
    size = {}
    for name, config in (("dense", DenseConfig()), ("sparse", SparseConfig({"text": 4, "image": 4}))):
        layer = build_feed_forward(config, 0, 1, dim, hidden, ("text", "image"), False)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1)
        size[name] = saved_bytes(layer, x_TD, groups)
    assert size["sparse"] <= 1.5 * size["dense"], size
