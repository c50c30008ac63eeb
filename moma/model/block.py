"""One decoder block: how attention and feed-forward join the residual stream, nothing else.

    pre:   h = x + attn(norm(x))        out = h + ffn(norm(h))          LLaMA, Chameleon-7B
    swin:  h = x + norm(attn(x))        out = h + norm(ffn(h))          Chameleon-34B, MoMa

Under `swin` the feed-forward's output is normalised, so the gate of a token chosen by exactly one expert hardly gets
a gradient, and an exactly zero output (a token nobody chose) stays exactly zero: rms_norm(0) = 0.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moma.modality import TokenGroups
from moma.model.attention import Attention, AttentionMask, Rotation
from moma.model.feed_forward import UNDISTURBED, DenseFeedForward, Mode, SparseFeedForward
from moma.model.routing import Disturbance, RouterStats

NormOrder = Literal["pre", "swin"]


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, computed and returned in at least fp32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)


class Block(nn.Module):
    """Attention and feed-forward with their norms, (R, L, D) -> (R, L, D)."""

    def __init__(
        self,
        dim: int,
        attention: Attention,
        feed_forward: DenseFeedForward | SparseFeedForward,
        norm_order: NormOrder,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm_order = norm_order
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_norm, self.feed_forward_norm = RMSNorm(dim, norm_eps), RMSNorm(dim, norm_eps)

    def forward(
        self,
        x_RLD: Tensor,
        position: Tensor | Rotation,
        mask: AttentionMask,
        groups: TokenGroups,
        mode: Mode,
        cache: Any = None,
        disturbance: Disturbance = UNDISTURBED,
    ) -> tuple[Tensor, dict[str, RouterStats]]:
        """One block; the statistics of its routers by their names, which follow the layer's number."""
        attended_RLD, fed_RLD, stats = self.updates(x_RLD, position, mask, groups, mode, cache, disturbance)
        return x_RLD + attended_RLD + fed_RLD, {} if stats is None else {"": stats}

    def updates(
        self,
        x_RLD: Tensor,
        position: Tensor | Rotation,
        mask: AttentionMask,
        groups: TokenGroups,
        mode: Mode,
        cache: Any,
        disturbance: Disturbance,
    ) -> tuple[Tensor, Tensor, RouterStats | None]:
        """What attention and feed-forward add to the residual stream, after their norms, and the decisions.

        The feed-forward sees the R L = T tokens as one flat sequence.
        """
        swin, shape, statistics = self.norm_order == "swin", x_RLD.shape, cache is None
        a_RLD = self.attention(x_RLD if swin else self.attention_norm(x_RLD), position, mask, groups, cache)
        a_RLD = self.attention_norm(a_RLD) if swin else a_RLD
        h_RLD = x_RLD + a_RLD
        given_RLD = h_RLD if swin else self.feed_forward_norm(h_RLD)
        y_TD, stats = self.feed_forward(given_RLD.flatten(0, 1), groups, mode, disturbance, statistics)
        y_RLD = (self.feed_forward_norm(y_TD) if swin else y_TD).view(shape)
        return a_RLD, y_RLD, stats
