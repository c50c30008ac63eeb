"""Parameters and forward FLOPs of every part of a model, collected into one table. Built on the meta device only.

    matmul (m, k) x (k, n): 2 m k n FLOPs.  Norms, activations, softmax and routing sorts are not counted.
    Attention scores and values: 4 L d per token in full, (2 L + 2) d counting the causal half alone.
    Training = 3 x forward.  A token runs through as many experts as its group's rule takes on average, and through a
    block behind a depth router with the probability of its capacity (attention: its square).

MFU must name which of the two attention counts it uses. Capacities are taken at their nominal share (floors and
documents' block masks neglected): equal to what is executed when capacities divide and the mask is dense, except
behind a depth router, where one mask spans the tokens of all rows (`padding_of`). Auxiliary routers are left out.

Active parameters are those a mean token runs through: of untied attention its modality's, of a block behind a depth
router the share of its capacity.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from moma.model.block import Block
from moma.model.depth import DepthBlock
from moma.model.feed_forward import DenseFeedForward, SparseFeedForward, experts_per_token
from moma.model.routing import Group
from moma.model.transformer import Transformer

BLOCK_PARTS = ("attention_projections", "attention_scores", "feed_forward", "routers", "aux_routers", "norms")


@dataclass(frozen=True)
class Part:
    """One line of the table; FLOPs are forward, per token."""

    params: int
    params_active: int
    flops: float
    flops_causal: float


@dataclass(frozen=True)
class Padding:
    """Rows (or pairs) that one micro-batch holds in all layers together, and how many of them are needed."""

    held: int
    needed: int


def parts_of(model: Transformer, row_length: int, modality_shares: tuple[float, ...]) -> dict[str, Part]:
    """Table of parts. `modality_shares`: fraction of tokens per modality, summing to 1."""
    dim = model.config.dim
    embedding = model.vocab_size * dim
    rows: dict[str, list[Part]] = {name: [] for name in BLOCK_PARTS}
    for block in _blocks(model):
        share = _capacity(block)
        layer = block.feed_forward
        projections, norms = attention_part(block), norms_part(block)
        keys = share * row_length  # a chosen query meets the chosen keys alone
        scores = Part(0, 0, 4 * keys * dim, (2 * keys + 2) * dim)
        inner = (projections, scores, feed_forward_part(layer, modality_shares), router_part(layer), norms)
        names = ("attention_projections", "attention_scores", "feed_forward", "routers", "norms")
        for name, part in zip(names, inner, strict=True):
            rows[name].append(_scaled(part, share))
        if isinstance(block, DepthBlock):  # its own router sees every token
            rows["routers"].append(Part(dim, dim, 2 * dim, 2 * dim))
            rows["aux_routers"].append(_aux(block.aux))
        rows["aux_routers"].append(_aux(layer.aux if isinstance(layer, SparseFeedForward) else None))
    rows["norms"].append(Part(dim, dim, 0, 0))
    table = {"embedding": Part(embedding, embedding, 0, 0)}
    table |= {name: _sum(parts) for name, parts in rows.items()}
    table["head"] = Part(embedding, embedding, 2 * embedding, 2 * embedding)
    total = sum(part.params for part in table.values())
    counted = sum(p.numel() for p in model.parameters())
    assert total == counted, f"the table holds {total} parameters, the model {counted}"
    return table


def _blocks(model: Transformer) -> Iterable[Block]:
    return cast(Iterable[Block], model.blocks)


def _capacity(block: Block) -> float:
    """Share of the tokens that a block computes."""
    return float(block.capacity) if isinstance(block, DepthBlock) else 1.0


def _scaled(part: Part, share: float) -> Part:
    """A part that only a share of the tokens runs through."""
    return Part(part.params, round(part.params_active * share), part.flops * share, part.flops_causal * share)


def _sum(parts: list[Part]) -> Part:
    return Part(
        sum(p.params for p in parts),
        sum(p.params_active for p in parts),
        sum(p.flops for p in parts),
        sum(p.flops_causal for p in parts),
    )


def attention_part(block: Block) -> Part:
    """Q, K, V and O of one block; untied, a token runs through those of its modality."""
    params = sum(p.numel() for name, p in block.attention.named_parameters() if "norm" not in name)
    active = params // (block.attention.n_modalities or 1)
    return Part(params, active, 2 * active, 2 * active)


def norms_part(block: Block) -> Part:
    """The norms of one block, those of queries and keys with the attention's modalities."""
    params = sum(p.numel() for name, p in block.named_parameters() if "norm" in name)
    of_qk = sum(p.numel() for p in block.attention.qk_norm.parameters())
    return Part(params, params - of_qk + of_qk // (block.attention.n_modalities or 1), 0, 0)


def feed_forward_part(layer: DenseFeedForward | SparseFeedForward, modality_shares: tuple[float, ...]) -> Part:
    """The experts of one layer; active parameters are those a mean token runs through."""
    params = sum(p.numel() for p in layer.experts.parameters())
    one = sum(w[0].numel() for w in layer.experts[0].parameters())
    if isinstance(layer, DenseFeedForward):
        return Part(params, one, 2 * one, 2 * one)
    shared = 0 if layer.shared is None else sum(p.numel() for p in layer.shared.parameters())
    active = one * experts_per_token(layer, modality_shares) + shared
    return Part(params + shared, round(active), 2 * active, 2 * active)


def router_part(layer: DenseFeedForward | SparseFeedForward) -> Part:
    """The main routers: one projection for all groups, computed for every token."""
    if not isinstance(layer, SparseFeedForward) or layer.router is None:
        return Part(0, 0, 0, 0)
    params = layer.router.numel()
    return Part(params, params, 2 * params, 2 * params)


def _aux(routers: nn.Module | None) -> Part:
    """Auxiliary routers; outside their training and causal inference they are not run: no FLOPs are counted."""
    return Part(0 if routers is None else sum(p.numel() for p in routers.parameters()), 0, 0, 0)


def padding_of(model: Transformer, n_rows: int, row_length: int, counts: tuple[int, ...]) -> dict[str, Padding]:
    """What static shapes hold beyond the nominal need, for a micro-batch of `counts` tokens per modality.

    `expert_rows`: slots gathered for experts against those computed; matmuls leave the difference out.
    `attention_pairs`: queries times keys; a dense mask computes them all, FlexAttention leaves most of them out.
    """
    n_tokens = n_rows * row_length
    found: dict[str, list[Padding]] = {"expert_rows": [], "attention_pairs": []}
    for block in _blocks(model):
        slots, tokens, padded = counts, counts, False  # per modality: places, and what needs one
        pairs = needed_pairs = n_rows * row_length**2
        if isinstance(block, DepthBlock):
            c = block.capacity
            k = c.numerator * n_tokens // c.denominator
            if block.quota:
                slots = tokens = tuple(c.numerator * n // c.denominator for n in counts)
                k = sum(slots)
            else:  # every modality might have all of the places
                slots, tokens, padded = (k,) * len(counts), tuple(round(k * n / n_tokens) for n in counts), True
            pairs, needed_pairs = k**2, round(c**2 * pairs)
        found["attention_pairs"].append(Padding(pairs, needed_pairs))
        found["expert_rows"].append(_expert_rows(block.feed_forward, slots, tokens, padded))
    return {name: Padding(sum(p.held for p in each), sum(p.needed for p in each)) for name, each in found.items()}


def _expert_rows(
    layer: DenseFeedForward | SparseFeedForward, slots: tuple[int, ...], tokens: tuple[int, ...], padded: bool
) -> Padding:
    """Rows of one layer's routed experts, given slots and tokens per modality."""
    if isinstance(layer, DenseFeedForward):
        return Padding(sum(tokens), sum(tokens))
    if "all" in layer.groups:
        slots = tokens = (sum(tokens),)
    held = needed = start = 0
    for (name, size), n_slots, n_tokens in zip(layer.groups.items(), slots, tokens, strict=True):
        if size == 1:
            held, needed = held + n_slots, needed + n_tokens
            continue
        logit_NE = torch.empty(n_slots, size, device="meta")
        valid_N = torch.empty(n_slots, dtype=torch.bool, device="meta") if padded else None
        state = {key: value[start : start + size].to("meta") for key, value in layer.routing_state().items()}
        choice = layer.rule.choose(layer.selection, logit_NE, Group(name, state, valid_N, share=layer.shares[name]))
        start += size
        if choice.token_EK is not None:
            held, needed = held + choice.token_EK.numel(), needed + choice.token_EK.numel()
        else:
            held, needed = held + choice.bound, needed + round(layer.shares[name] * size * n_tokens)
    return Padding(held, needed)


def aux_flops(model: Transformer, modality_shares: tuple[float, ...]) -> tuple[float, float]:
    """FLOPs per token of the auxiliary routers, forward and training: a token runs through those of its own group.

    They read detached states, so their first matrix has no gradient with respect to its input: 2 x instead of 3 x.
    """
    forward = training = 0.0
    for block in _blocks(model):
        layer = block.feed_forward
        found: list[tuple[float, nn.Module]] = []
        if isinstance(block, DepthBlock) and block.aux is not None:
            found.append((1.0, block.aux))
        if isinstance(layer, SparseFeedForward):
            shares = (1.0,) if "all" in layer.groups else modality_shares
            routed = [share for share, size in zip(shares, layer.groups.values(), strict=True) if size > 1]
            found += [(s * _capacity(block), aux) for s, aux in zip(routed, layer.aux, strict=False)]
        for share, aux in found:
            first, last = aux.get_parameter("w1").numel(), aux.get_parameter("w2").numel()
            forward += share * 2 * (first + last)
            training += share * 2 * (2 * first + 3 * last)
    return forward, training


def totals(table: dict[str, Part]) -> dict[str, float]:
    """`params_total`, `params_active`, and FLOPs per token, forward and training, in both attention counts."""
    whole = _sum(list(table.values()))
    return {
        "params_total": whole.params,
        "params_active": whole.params_active,
        "flops_per_token_forward": whole.flops,
        "flops_per_token_head": table["head"].flops,
        "flops_per_token_train": 3 * whole.flops,
        "flops_per_token_forward_causal": whole.flops_causal,
        "flops_per_token_train_causal": 3 * whole.flops_causal,
    }
