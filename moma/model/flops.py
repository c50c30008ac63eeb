"""Parameters and forward FLOPs of every part of a model, collected into one table. Built on the meta device only.

    matmul (m, k) x (k, n): 2 m k n FLOPs.  Norms, activations, softmax and routing sorts are not counted.
    Attention scores and values: 4 L d per token in full, (2 L + 2) d counting the causal half alone.
    Training = 3 x forward.  Expert choice computes capacity_factor experts per token of each group.

MFU must name which of the two attention counts it uses. Capacities are taken at their nominal share (floors and
documents' block masks neglected): equal to what is executed when capacities divide and the mask is dense.
"""

from dataclasses import dataclass

from moma.model.feed_forward import DenseFeedForward, SparseFeedForward
from moma.model.transformer import Transformer


@dataclass(frozen=True)
class Part:
    """One line of the table; FLOPs are forward, per token."""

    params: int
    params_active: int
    flops: float
    flops_causal: float


def parts_of(model: Transformer, row_length: int, modality_shares: tuple[float, ...]) -> dict[str, Part]:
    """Table of parts. `modality_shares`: fraction of tokens per modality, summing to 1."""
    config, dim, n = model.config, model.config.dim, len(model.blocks)
    head_dim = dim // config.n_heads
    projections = dim * (config.n_heads + 2 * config.kv_heads) * head_dim + dim * config.n_heads * head_dim
    scores = 4 * row_length * config.n_heads * head_dim
    causal = (2 * row_length + 2) * config.n_heads * head_dim
    embedding = model.vocab_size * dim
    table = {
        "embedding": Part(embedding, embedding, 0, 0),
        "attention_projections": Part(n * projections, n * projections, 2 * n * projections, 2 * n * projections),
        "attention_scores": Part(0, 0, n * scores, n * causal),
        "feed_forward": _sum([feed_forward_part(b.feed_forward, modality_shares) for b in model.blocks]),
        "routers": _sum([router_part(b.feed_forward) for b in model.blocks]),
        "aux_routers": _sum([aux_part(b.feed_forward) for b in model.blocks]),
        "head": Part(embedding, embedding, 2 * embedding, 2 * embedding),
    }
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    table["norms"] = Part(norms, norms, 0, 0)
    total = sum(part.params for part in table.values())
    counted = sum(p.numel() for p in model.parameters())
    assert total == counted, f"the table holds {total} parameters, the model {counted}"
    return table


def _sum(parts: list[Part]) -> Part:
    return Part(
        sum(p.params for p in parts),
        sum(p.params_active for p in parts),
        sum(p.flops for p in parts),
        sum(p.flops_causal for p in parts),
    )


def feed_forward_part(layer: object, modality_shares: tuple[float, ...]) -> Part:
    """The experts of one layer; active parameters are those a mean token runs through."""
    assert isinstance(layer, DenseFeedForward | SparseFeedForward)
    sizes = [len(experts.w13) for experts in layer.experts]  # type: ignore[arg-type]
    one = sum(w[0].numel() for w in layer.experts[0].parameters())
    shares = (1.0,) if len(sizes) == 1 else modality_shares
    if isinstance(layer, DenseFeedForward):
        experts_per_token = 1.0
    else:  # a group of one expert runs on every token of the group, whatever the capacity factor
        groups = zip(shares, layer.shares, sizes, strict=True)
        experts_per_token = sum(s * (1 if size == 1 else share * size) for s, share, size in groups)
        experts_per_token = float(experts_per_token)
    flops = 2 * one * experts_per_token
    return Part(one * sum(sizes), round(one * experts_per_token), flops, flops)


def router_part(layer: object) -> Part:
    """The main routers: one projection for all groups, computed for every token."""
    if not isinstance(layer, SparseFeedForward) or layer.router is None:
        return Part(0, 0, 0, 0)
    params = layer.router.numel()
    return Part(params, params, 2 * params, 2 * params)


def aux_part(layer: object) -> Part:
    """Auxiliary routers; outside their training and causal inference they are not run: no FLOPs are counted."""
    if not isinstance(layer, SparseFeedForward):
        return Part(0, 0, 0, 0)
    return Part(sum(p.numel() for p in layer.aux.parameters()), 0, 0, 0)


def totals(table: dict[str, Part]) -> dict[str, float]:
    """`params_total`, `params_active`, and FLOPs per token, forward and training, in both attention counts."""
    whole = _sum(list(table.values()))
    return {
        "params_total": whole.params,
        "params_active": whole.params_active,
        "flops_per_token_forward": whole.flops,
        "flops_per_token_train": 3 * whole.flops,
        "flops_per_token_forward_causal": whole.flops_causal,
        "flops_per_token_train_causal": 3 * whole.flops_causal,
    }
