"""Attention inside documents on a CPU: block after block of queries, over the keys that one of them can see.

    for queries [a, b) of a row:   keys [start of a's document, b)     softmax(q k^T / sqrt(A)) v

Plain matmuls use the processor's bf16 units, torch's CPU kernel does not; keys of the future and of other documents
are skipped in whole blocks, so that the work follows the documents' lengths; a block's scores stay in the caches.
Nothing but q, k and v is kept: the backward pass computes the scores again. FLOPs where a row is one document: half of
4 R H L^2 A forward, of 10 R H L^2 A backward. Sums over blocks and softmax are in at least fp32.

Documents must be runs: tokens of one document follow each other in a row (`moma/data/batch.py` packs them so).

Legend: R rows, L positions, H query heads, G key heads, A head dim; B queries, K keys and M masked keys of a block.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

BLOCK = 128  # queries


def document_attention(q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor, document_RL: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(A)) v over the keys of the query's document up to the query itself: (R, H, L, A).

    `document_RL`: document numbers, in runs. H is a multiple of G. Differentiable once, deterministic.
    """
    return torch.ops.moma.document_attention(q_RHLA, k_RGLA, v_RGLA, document_RL)


class _Block(NamedTuple):
    row: int
    queries: slice
    keys: slice
    masked: slice  # those of the keys that some query must not see
    bias_BM: Tensor  # fp32: -inf where a query must not see one of them, else 0


def _blocks(document_RL: Tensor) -> Iterator[_Block]:
    n_rows, length = document_RL.shape
    position_L = torch.arange(length)
    begins_RL = torch.ones_like(document_RL, dtype=torch.bool)
    begins_RL[:, 1:] = document_RL[:, 1:] != document_RL[:, :-1]
    start_RL = torch.where(begins_RL, position_L, 0).cummax(1).values
    for row, starts in enumerate(start_RL.tolist()):
        for a in range(0, length, BLOCK):
            b = min(a + BLOCK, length)
            first, last = starts[a], starts[b - 1]  # of the first and the last query's document
            masked = a if first == last else first
            key_M = position_L[masked:b]
            hidden_BM = (key_M < start_RL[row, a:b, None]) | (key_M > position_L[a:b, None])
            bias_BM = torch.zeros(hidden_BM.shape).masked_fill_(hidden_BM, -torch.inf)
            yield _Block(row, slice(a, b), slice(first, b), slice(masked - first, b - first), bias_BM)


def _scores(q_GCA: Tensor, k_GKA: Tensor, block: _Block) -> Tensor:
    """q k^T / sqrt(A), -inf where a query must not look: (G, C, K), C = B H / G queries that share a key head."""
    score_GCK = torch.bmm(q_GCA * q_GCA.shape[-1] ** -0.5, k_GKA.mT)
    score_GCK[..., block.masked].unflatten(1, (-1, len(block.bias_BM))).add_(block.bias_BM)
    return score_GCK


def _per_key_head(x_HBA: Tensor, n_key_heads: int) -> Tensor:
    """(H, B, A) -> (G, H / G B, A): the queries of all heads that share a key head, one after the other."""
    return x_HBA.reshape(n_key_heads, -1, x_HBA.shape[-1])


@torch.library.custom_op("moma::document_attention", mutates_args=())
def _forward(q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor, document_RL: Tensor) -> Tensor:
    out_RHLA = torch.empty_like(q_RHLA, memory_format=torch.contiguous_format)
    k_RGLA, v_RGLA = k_RGLA.contiguous(), v_RGLA.contiguous()
    for block in _blocks(document_RL):
        k_GKA, v_GKA = k_RGLA[block.row, :, block.keys], v_RGLA[block.row, :, block.keys]
        own_HBA = out_RHLA[block.row, :, block.queries]
        q_GCA = _per_key_head(q_RHLA[block.row, :, block.queries], len(k_GKA))
        p_GCK = torch.softmax(_scores(q_GCA, k_GKA, block), -1)  # in fp32, stored as it is multiplied
        own_HBA.copy_(torch.bmm(p_GCK, v_GKA).view_as(own_HBA))
    return out_RHLA


@torch.library.custom_op("moma::document_attention_backward", mutates_args=())
def _backward(
    grad_RHLA: Tensor, q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor, document_RL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q_RHLA.dtype, torch.float32)
    dq_RHLA = torch.empty_like(q_RHLA, memory_format=torch.contiguous_format)
    dk_RGLA, dv_RGLA = (torch.zeros(k_RGLA.shape, dtype=wide) for _ in "kv")
    scale = q_RHLA.shape[-1] ** -0.5
    k_RGLA, v_RGLA = k_RGLA.contiguous(), v_RGLA.contiguous()
    for block in _blocks(document_RL):
        k_GKA, v_GKA = k_RGLA[block.row, :, block.keys], v_RGLA[block.row, :, block.keys]
        q_GCA, grad_GCA = (_per_key_head(x[block.row, :, block.queries], len(k_GKA)) for x in (q_RHLA, grad_RHLA))
        p_GCK = torch.softmax(_scores(q_GCA, k_GKA, block), -1, dtype=wide)
        dv_RGLA[block.row, :, block.keys] += torch.bmm(p_GCK.to(v_GKA.dtype).mT, grad_GCA)
        dp_GCK = torch.bmm(grad_GCA, v_GKA.mT).to(wide)
        ds_GCK = torch.ops.aten._softmax_backward_data(dp_GCK, p_GCK, -1, wide).to(q_GCA.dtype)
        own_HBA = dq_RHLA[block.row, :, block.queries]
        own_HBA.copy_((torch.bmm(ds_GCK, k_GKA) * scale).view_as(own_HBA))
        dk_RGLA[block.row, :, block.keys] += torch.bmm(ds_GCK.mT, q_GCA * scale)
    return dq_RHLA, dk_RGLA.to(k_RGLA.dtype), dv_RGLA.to(v_RGLA.dtype)


@_forward.register_fake
def _(q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor, document_RL: Tensor) -> Tensor:
    return torch.empty_like(q_RHLA, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    grad_RHLA: Tensor, q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor, document_RL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    like = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_RHLA, k_RGLA, v_RGLA))
    dq, dk, dv = like
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_RHLA: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.moma.document_attention_backward(grad_RHLA, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.moma.document_attention)
def _flops(q_shape: Any, *_: Any, **__: Any) -> int:
    """4 R H L^2 A: every key of the row counts, as in `flops.py`."""
    n_rows, n_heads, length, head_dim = q_shape
    return 4 * n_rows * n_heads * length**2 * head_dim


@register_flop_formula(torch.ops.moma.document_attention_backward)
def _backward_flops(grad_shape: Any, *_: Any, **__: Any) -> int:
    """Twice the forward's: what is computed again does not count."""
    return 2 * _flops(grad_shape)
