"""Expert choice: each expert takes its k best tokens of the micro-batch (MoMa section 2.2; arXiv 2202.09368).

    score = sigmoid(x W_g)           k_e = floor(c_e N),  c_e = capacity_factor / |E|
    expert e takes the first k_e tokens in the order (score descending, index ascending)

A token may be taken by none, one or several experts; nothing is renormalised. The order is stable on every
device: identical states do occur (every BOS under a document mask), and a bare top-k breaks ties at will.
The rule sees the whole micro-batch, hence the future: it is for training, never for generation.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertChoiceConfig:
    """Expert choice; `capacity_factor` is the mean number of experts per token (1 in the paper)."""

    kind: Literal["expert_choice"] = "expert_choice"
    capacity_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.capacity_factor:
            raise ValueError(
                f"got capacity_factor={self.capacity_factor}, need a number above 0: 1.0 matches dense FLOPs"
            )


def capacity_share(capacity_factor: float, n_experts: int) -> Fraction:
    """c_e as an exact fraction, at most 1, so that floor(c_e N) never suffers from rounding nor exceeds N."""
    return min(Fraction(capacity_factor).limit_denominator(10_000) / n_experts, Fraction(1))


def select(logit_NE: Tensor, share: Fraction, valid_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Choose tokens: returns `token_EK` int64, ascending per expert, and `keep_EK` bool (None: all slots hold).

    `logit_NE`: logits of the N tokens of one group (same order as their scores, without what rounding in the sigmoid
    would add to it). `valid_N`: bool, None when all N are tokens (exact form,
    K = floor(share N)). In the padded form K is that same bound and each expert keeps
    rank < floor(share * n_valid); the slots beyond hold token 0 and are not kept.
    """
    n_tokens = logit_NE.shape[0]
    k = share.numerator * n_tokens // share.denominator
    # contiguous: indexing by a transposed tensor has other strides when traced by torch.compile than in eager mode
    logit_EN = logit_NE.detach().T.contiguous()
    if valid_N is None:
        order_EN = torch.sort(logit_EN, dim=1, descending=True, stable=True).indices
        return order_EN[:, :k].sort(dim=1).values, None
    order_EN = torch.sort(logit_EN.masked_fill(~valid_N, -torch.inf), dim=1, descending=True, stable=True).indices
    n_kept = (share.numerator * valid_N.sum()) // share.denominator
    rank_K = torch.arange(k, device=logit_NE.device)
    # dropped slots get a token number beyond every real one, so that sorting moves them to the end
    token_EK = torch.where(rank_K < n_kept, order_EN[:, :k], n_tokens).sort(dim=1).values
    keep_EK = token_EK < n_tokens
    return torch.where(keep_EK, token_EK, 0), keep_EK
