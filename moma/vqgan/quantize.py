"""Nearest-code vector quantisation with a straight-through gradient, an EMA codebook and dead-code restarts.

    code = argmin_k |z - e_k|^2          out = z + stop(e_code - z)        (gradient of z: identity)
    loss = |stop(e) - z|^2 + beta |e - stop(z)|^2     legacy: beta on the wrong term (taming, Chameleon)
    loss = beta |stop(e) - z|^2 + |e - stop(z)|^2     correct order
    loss = beta |stop(e) - z|^2                       EMA codebook: e is not trained by gradients
    EMA:  n_k <- d n_k + (1-d) |{z of code k}|,  s_k <- d s_k + (1-d) sum z,  e_k = s_k / n_k
          (arXiv 1711.00937, appendix A.1)

The EMA state is explicit (`CodebookState`): the training loop calls `update_codebook` once per optimiser step
and checkpoints the state; `forward` never changes anything.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 8192  # rows of the distance matrix computed at once: bounds memory at large grids and code books


class Quantized(NamedTuple):
    """Result of quantising a batch: `quantized` (n, c, h, w), `codes` int64 (n, h, w), scalar `loss`."""

    quantized: Tensor
    codes: Tensor
    loss: Tensor


class CodebookState(NamedTuple):
    """EMA state: `counts` (K,) smoothed vectors per code and step, `totals` (K, C) their smoothed sums."""

    counts: Tensor
    totals: Tensor


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the row of `codebook` (K, C) that is nearest (L2) to each row of `z` (N, C); int64 (N,)."""
    # |z|^2 is the same for every code, so it is left out of the comparison.
    norm = codebook.square().sum(1)
    return torch.cat([torch.addmm(norm, rows, codebook.t(), alpha=-2).argmin(1) for rows in z.split(ROWS)])


def code_statistics(codes: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    """Usage (share of codes that occur) and perplexity (exp of entropy) of `codes`, any shape; scalars."""
    count = torch.bincount(codes.reshape(-1), minlength=n_codes).double()
    share = count / count.sum()
    return (count > 0).double().mean(), torch.exp(-torch.special.xlogy(share, share).sum())


class VectorQuantizer(nn.Module):
    """Code book of `n_embed` vectors of `embed_dim`; `beta` and `legacy` as in the module's formulas.

    `ema`: the code book follows `update_codebook` and gets no gradient.
    """

    def __init__(self, n_embed: int, embed_dim: int, *, beta: float = 0.25, legacy: bool = True, ema: bool = False):
        super().__init__()
        self.beta, self.legacy, self.ema = beta, legacy, ema
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)
        self.embedding.weight.requires_grad_(not ema)

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors (n, c, h, w) of `codes` int64 (n, h, w)."""
        return self.embedding(codes).permute(0, 3, 1, 2)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise `z` (n, c, h, w); distances and losses are in float32 or wider, also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            z = z if z.dtype == torch.float64 else z.float()
            flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
            with torch.no_grad():
                codes = nearest_codes(flat, self.embedding.weight)
            codes = codes.view(z.shape[0], *z.shape[2:])
            e = self.lookup(codes)
            commit = F.mse_loss(z, e.detach())
            if self.ema:
                loss = self.beta * commit
            else:
                book = F.mse_loss(e, z.detach())
                loss = commit + self.beta * book if self.legacy else self.beta * commit + book
            return Quantized(z + (e - z).detach(), codes, loss)


def empty_state(codebook: Tensor) -> CodebookState:
    """EMA state with no observations for a `codebook` (K, C): every code counts as dead, so the first
    `update_codebook` with restarts draws the whole book from the data."""
    return CodebookState(torch.zeros_like(codebook[:, 0]), torch.zeros_like(codebook))


@torch.no_grad()
def update_codebook(
    codebook: Tensor,
    state: CodebookState,
    z: Tensor,
    codes: Tensor,
    *,
    decay: float,
    dead_below: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """One EMA step on `codebook` (K, C) and `state`, in place, from `z` (N, C) and its `codes` (N,).

    A code whose smoothed count is below `dead_below` times the mean count N/K is replaced by a vector drawn
    from `z` (without replacement while N allows, from `generator`) and starts with the mean count; 0 = no
    restarts. A code never observed and not restarted keeps its vector.
    """
    k = codebook.shape[0]
    counts, totals = state
    counts.mul_(decay).index_add_(0, codes, torch.ones_like(z[:, 0]), alpha=1 - decay)
    totals.mul_(decay).index_add_(0, codes, z, alpha=1 - decay)
    mean = z.shape[0] / k
    if dead_below > 0:
        dead = (counts < dead_below * mean).nonzero().squeeze(1)
        order = torch.randperm(z.shape[0], generator=generator, device=z.device)
        chosen = z[order[torch.arange(dead.numel(), device=z.device) % z.shape[0]]]
        counts[dead] = mean
        totals[dead] = chosen * mean
    seen = counts > 1e-8
    codebook.copy_(torch.where(seen[:, None], totals / counts.clamp_min(1e-8)[:, None], codebook))
