"""The loss head: linear layer, cross-entropy and z-loss in chunks of tokens, so that the logits never exist at once.

    ce_t = lse_t - logit_t[target_t]        z_t = lse_t^2        (z-loss: Chameleon section 2.3.1, weight 1e-5)

The gradient is computed in the forward pass, chunk by chunk, while the logits are at hand. Memory beyond hidden
states, weight and their gradients is one chunk of logits. Softmax and sums are in at least fp32; the two matmuls run
in the stated compute type. FLOPs: 6 T D V, as with the plain form.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moma.modality import IGNORE
from moma.model.precision import full_precision

CHUNK_TOKENS = 1024


class TokenLosses(NamedTuple):
    """Per-token numbers, fp32, 0 where there is no target; only `objective` carries a gradient."""

    objective: Tensor  # scalar: sum of (cross-entropy + z_weight * lse^2) over targets, times `scale`
    cross_entropy_T: Tensor
    z_T: Tensor


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
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            h_CD, target_C = hidden[rows], target_T[rows]
            low_CV = h_CD @ weight.T
            present_C = target_C != IGNORE
            safe_C = torch.where(present_C, target_C, 0)
            log_p_CV = torch.log_softmax(low_CV, dim=1, dtype=wide)
            ce_C = -log_p_CV.gather(1, safe_C[:, None]).squeeze(1)
            lse_C = low_CV.gather(1, safe_C[:, None]).squeeze(1).to(wide) + ce_C
            losses.append(torch.where(present_C, ce_C, 0))
            zs.append(torch.where(present_C, lse_C.square(), 0))
            if grad_hidden is None or grad_weight is None:
                continue
            # d ce = softmax - onehot,  d lse^2 = 2 lse softmax: with s = 1 + 2 z lse the gradient of a token is
            # s (softmax - onehot / s), and s scales a row of D numbers instead of V
            size_C = 1 + 2 * z_weight * lse_C
            grad_CV = log_p_CV.exp_().scatter_add_(1, safe_C[:, None], -1 / size_C[:, None]).to(compute_dtype)
            size_C1 = (size_C * present_C * scale)[:, None]
            grad_hidden[rows] = ((grad_CV @ weight) * size_C1).to(grad_hidden.dtype)
            grad_weight += grad_CV.T @ (h_CD * size_C1).to(compute_dtype)
        ce_T, z_T = torch.cat(losses), torch.cat(zs)
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        ctx.mark_non_differentiable(ce_T, z_T)
        return (ce_T.sum() + z_weight * z_T.sum()) * scale, ce_T, z_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None, None, None, None, None


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    denominator: Tensor | float,
    z_weight: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenLosses:
    """Cross-entropy of T tokens over V entries; positions with target `IGNORE` count for nothing.

    `denominator`: valid targets of the whole optimizer step; the objective is the sum divided by it.
    `compute_dtype`: type of the matmuls; default the autocast type where autocast is on, else the input's.
    """
    device = hidden_TD.device
    if compute_dtype is None:
        autocast = torch.is_autocast_enabled(device.type)
        compute_dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_TD.dtype
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    scale = 1.0 / (denominator.to(wide) if isinstance(denominator, Tensor) else denominator)
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    with full_precision(hidden_TD):
        out: Any = _LinearCrossEntropy.apply(
            hidden_TD, weight_VD, target_T, scale, z_weight, compute_dtype, needs_grad, chunk_tokens
        )
    return TokenLosses(*out)
