"""The loss head: linear layer, cross-entropy and z-loss in chunks of tokens, so that the logits never exist at once.

    ce_t = lse_t - logit_t[target_t]        z_t = lse_t^2        (z-loss: Chameleon section 2.3.1, weight 1e-5)

The gradient is computed in the forward pass, chunk by chunk, while the logits are at hand, and written over them.
Memory beyond hidden states, weight and their gradients is one chunk of logits in the compute type. Softmax and sums
are in at least fp32; the two matmuls run in the stated compute type. FLOPs: 6 T D V, as with the plain form. Beside
the matmuls the logits are read for the sum, read and overwritten for the gradient: a GPU does it in one compiled
kernel, a CPU a few rows at a time, so that what is in between stays in its caches.

Legend: T tokens, C tokens of a chunk, V entries of the vocabulary, D dim.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moma.modality import IGNORE
from moma.model.precision import full_precision

CHUNK_BYTES = 2**28  # of logits: 2,048 tokens of 65,536 entries in bf16
CACHE_BYTES = 2**20  # of logits in fp32, of those rows that a CPU takes together


class TokenLosses(NamedTuple):
    """Per-token numbers, fp32, 0 where there is no target; only `objective` carries a gradient."""

    objective: Tensor  # scalar: sum of (cross-entropy + z_weight * lse^2) over targets, times `scale`
    cross_entropy_T: Tensor
    z_T: Tensor


def by_rows_(logit_CV: Tensor, target_C: Tensor, z_weight: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log-sum-exp of every row, in at least fp32 (C,); `gradient`: the logits become

        softmax - onehot / s,   s = 1 + 2 z_weight lse      (d ce = softmax - onehot,  d lse^2 = 2 lse softmax)

    which is the gradient of ce + z_weight lse^2 divided by s: a factor of a row of D numbers instead of V.
    """
    wide = torch.promote_types(logit_CV.dtype, torch.float32)
    losses, sums = [], []
    together = max(torch.get_num_threads(), CACHE_BYTES // (4 * logit_CV.shape[1]), 1)
    for low_rV, target_r in zip(logit_CV.split(together), target_C[:, None].split(together), strict=True):
        wide_rV = low_rV.to(wide)
        log_p_rV = torch.log_softmax(wide_rV, dim=1)
        ce_r = -log_p_rV.gather(1, target_r)
        lse_r = wide_rV.gather(1, target_r) + ce_r
        losses.append(ce_r)
        sums.append(lse_r)
        if gradient:
            low_rV.copy_(log_p_rV.exp_().scatter_add_(1, target_r, -1 / (1 + 2 * z_weight * lse_r)))
    return torch.cat(losses)[:, 0], torch.cat(sums)[:, 0]


def fused_(logit_CV: Tensor, target_C: Tensor, z_weight: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """`by_rows_` in the form that a compiler makes one kernel of."""
    wide_CV = logit_CV.to(torch.promote_types(logit_CV.dtype, torch.float32))
    lse_C = wide_CV.logsumexp(1)
    ce_C = lse_C - wide_CV.gather(1, target_C[:, None])[:, 0]
    if gradient:
        column_V = torch.arange(logit_CV.shape[1], device=logit_CV.device)
        hit_CV = column_V == target_C[:, None]
        size_C1 = (1 + 2 * z_weight * lse_C)[:, None]
        logit_CV.copy_((wide_CV - lse_C[:, None]).exp() - torch.where(hit_CV, 1 / size_C1, 0))
    return ce_C, lse_C


@cache
def _compiled_fused() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(fused_, dynamic=False)  # when it is first wanted: it loads the compiler


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target_T: Tensor,
        scale: Tensor | float,
        z_weight: float,
        compute_dtype: torch.dtype,
        needs_grad: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        weight, hidden = weight_VD.to(compute_dtype), hidden_TD.to(compute_dtype)
        losses, zs = [], []
        grad_hidden = torch.empty_like(hidden_TD) if needs_grad else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if needs_grad else None
        overwrite = _compiled_fused() if hidden.is_cuda else by_rows_
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            h_CD, target_C = hidden[rows], target_T[rows]
            logit_CV = h_CD @ weight.T
            present_C = target_C != IGNORE
            ce_C, lse_C = overwrite(logit_CV, torch.where(present_C, target_C, 0), z_weight, needs_grad)
            losses.append(torch.where(present_C, ce_C, 0))
            zs.append(torch.where(present_C, lse_C.square(), 0))
            if grad_hidden is None or grad_weight is None:
                continue
            size_C1 = ((1 + 2 * z_weight * lse_C) * present_C * scale)[:, None]
            grad_hidden[rows] = ((logit_CV @ weight) * size_C1).to(grad_hidden.dtype)
            grad_weight += logit_CV.T @ (h_CD * size_C1).to(compute_dtype)
        ce_T, z_T = torch.cat(losses), torch.cat(zs)
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        ctx.mark_non_differentiable(ce_T, z_T)
        return (ce_T.sum() + z_weight * z_T.sum()) * scale, ce_T, z_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None, None, None, None, None


def tokens_per_chunk(vocab_size: int, compute_dtype: torch.dtype) -> int:
    """As many tokens as make `CHUNK_BYTES` of logits."""
    return max(1, CHUNK_BYTES // (compute_dtype.itemsize * vocab_size))


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    denominator: Tensor | float,
    z_weight: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
) -> TokenLosses:
    """Cross-entropy of T tokens over V entries; positions with target `IGNORE` count for nothing.

    `denominator`: valid targets of the whole optimizer step; the objective is the sum divided by it.
    `compute_dtype`: type of the matmuls; default the autocast type where autocast is on, else the input's.
    `chunk_tokens`: default as many as make `CHUNK_BYTES` of logits.
    """
    device = hidden_TD.device
    if compute_dtype is None:
        autocast = torch.is_autocast_enabled(device.type)
        compute_dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_TD.dtype
    if chunk_tokens is None:
        chunk_tokens = tokens_per_chunk(weight_VD.shape[0], compute_dtype)
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    scale = 1.0 / (denominator.to(wide) if isinstance(denominator, Tensor) else denominator)
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    with full_precision(hidden_TD):
        out: Any = _LinearCrossEntropy.apply(
            hidden_TD, weight_VD, target_T, scale, z_weight, compute_dtype, needs_grad, chunk_tokens
        )
    return TokenLosses(*out)
