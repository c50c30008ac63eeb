"""Stacked SwiGLU experts, and the gather-sum that carries tokens to them and back. Knows no routing.

    y = W2 ( g * silu(x W1) * (x W3) )        weights (E, in, out), W1 and W3 fused: one batched matmul each

Legend: T tokens, E experts, K slots per expert, S = E K slots, D dim, F hidden width, C columns of a map.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gather_sum(x_ID: Tensor, index_OC: Tensor) -> Tensor:
    """out[o] = sum over c of x[index[o, c]], an index of -1 adding nothing; sums in at least fp32. (O, D)."""
    wide = torch.promote_types(x_ID.dtype, torch.float32)
    if index_OC.shape[1] == 0 or x_ID.shape[0] == 0:
        return x_ID.new_zeros(index_OC.shape[0], x_ID.shape[1])
    total_OD: Tensor | None = None
    for index_O in index_OC.unbind(1):
        row_OD = torch.where((index_O >= 0)[:, None], x_ID[index_O.clamp(min=0)], 0)
        if index_OC.shape[1] == 1:
            return row_OD
        total_OD = row_OD.to(wide) if total_OD is None else total_OD + row_OD
    assert total_OD is not None
    return total_OD.to(x_ID.dtype)


class GatherSum(torch.autograd.Function):
    """`gather_sum` whose gradient is the same operation with the inverse map: no atomics, hence deterministic.

    Dispatch is `GatherSum(x_TD, token_S1, slots_TC)`, combine is `GatherSum(y_SD, slots_TC, token_S1)`: one is
    the adjoint of the other. `index_OC` and `inverse_IC` must be inverse to each other.
    """

    @staticmethod
    def forward(ctx: Any, x_ID: Tensor, index_OC: Tensor, inverse_IC: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_IC)
        return gather_sum(x_ID, index_OC)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_IC,) = ctx.saved_tensors
        return gather_sum(grads[0], inverse_IC), None, None


def dispatch(x_TD: Tensor, token_S: Tensor, slots_TC: Tensor) -> Tensor:
    """Rows of x for S slots (a slot with token -1 holds zeros): (S, D)."""
    out: Any = GatherSum.apply(x_TD, token_S[:, None], slots_TC)
    return out


def combine(y_SD: Tensor, slots_TC: Tensor, token_S: Tensor) -> Tensor:
    """Sum of each token's slots, exact zero for a token without one: (T, D)."""
    out: Any = GatherSum.apply(y_SD, slots_TC, token_S[:, None])
    return out


def slots_of_tokens(token_EK: Tensor, n_tokens: int) -> Tensor:
    """Inverse map int64 (T, E): the slot e K + k that expert e gave to token t, or -1. `token_EK` is -1 when empty."""
    n_experts, k = token_EK.shape
    slot_EK = torch.arange(n_experts * k, device=token_EK.device).view(n_experts, k)
    # row T collects the empty slots and is cut off; all other targets are distinct
    row_EK = torch.where(token_EK >= 0, token_EK, n_tokens)
    slots_ET = torch.full((n_experts, n_tokens + 1), -1, dtype=torch.int64, device=token_EK.device)
    return slots_ET.scatter(1, row_EK, slot_EK)[:, :n_tokens].T


class Experts(nn.Module):
    """E SwiGLU experts of equal size as two stacked weights; a dense feed-forward is E = 1."""

    def __init__(self, n_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.n_experts, self.dim, self.hidden_dim = n_experts, dim, hidden_dim
        self.w13 = nn.Parameter(torch.empty(n_experts, dim, 2 * hidden_dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))

    def forward(self, x_EKD: Tensor, gate_EK: Tensor | None = None) -> Tensor:
        """(E, K, D) -> (E, K, D), each row scaled by its gate (folded into the activation)."""
        return _swiglu(x_EKD, self.w13, self.w2, gate_EK)

    def one(self, expert: int, x_ND: Tensor, gate_N: Tensor | None) -> Tensor:
        """A single expert on N rows: (N, D)."""
        gate = None if gate_N is None else gate_N[None]
        weights = self.w13[expert : expert + 1], self.w2[expert : expert + 1]
        return _swiglu(x_ND[None], *weights, gate)[0]


def _swiglu(x_EKD: Tensor, w13_EDF: Tensor, w2_EFD: Tensor, gate_EK: Tensor | None) -> Tensor:
    if x_EKD.shape[0] == 1:  # a plain matmul: the same numbers, and the dense twin's own kernel
        gate_K = None if gate_EK is None else gate_EK[0]
        return (_gated(x_EKD[0] @ w13_EDF[0], gate_K) @ w2_EFD[0])[None]
    return torch.bmm(_gated(torch.bmm(x_EKD, w13_EDF), gate_EK), w2_EFD)


def _gated(h: Tensor, gate: Tensor | None) -> Tensor:
    h1, h3 = h.chunk(2, dim=-1)
    activation = F.silu(h1) * h3
    return activation if gate is None else (activation * gate[..., None]).to(h.dtype)
