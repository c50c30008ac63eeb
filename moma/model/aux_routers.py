"""Auxiliary routers: causal predictors of a router's batch-wide choice (MoMa section 2.4).

    logit = SiLU(x W_a1) W_a2        W_a1: d x d/2,  W_a2: d/2 x |E|       chosen if sigmoid(logit) > 0.5

They read the hidden state where the main router reads it, detached, so training them never moves the model.
Router-precision rule: computed in at least fp32 whatever autocast says.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moma.model.precision import full_precision


class AuxRouter(nn.Module):
    """Predicts, from a token's own past alone, which of `n_experts` will choose it: (N, D) -> logits (N, E)."""

    def __init__(self, dim: int, n_experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(dim, dim // 2))
        self.w2 = nn.Parameter(torch.empty(dim // 2, n_experts))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits (N, E) in at least fp32; no gradient flows into `x_ND`."""
        with full_precision(x_ND):
            x_ND = x_ND.detach().to(torch.promote_types(x_ND.dtype, torch.float32))
            return F.silu(x_ND @ self.w1) @ self.w2


def none_for(mode: str) -> ValueError:
    """What to raise where routing mode `mode` finds a model without auxiliary routers."""
    return ValueError(
        f"got routing mode {mode}, need auxiliary routers in the model: train them with objective=aux_routers, "
        "or use mode=threshold"
    )


def binary_cross_entropy(logit_TE: Tensor, target_TE: Tensor, member_TE: Tensor) -> Tensor:
    """Mean BCE over the (token, expert) pairs in which the expert belongs to the token's group: a scalar."""
    loss_TE = F.binary_cross_entropy_with_logits(logit_TE, target_TE.to(logit_TE.dtype), reduction="none")
    member = member_TE.to(loss_TE.dtype)
    return (loss_TE * member).sum() / member.sum().clamp(min=1)
