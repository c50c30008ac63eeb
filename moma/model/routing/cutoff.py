"""Cut-offs: the score that separates what an expert takes from what it leaves, and its moving average.

    cut-off of a micro-batch = halfway between the k-th and the (k+1)-th largest logit of an expert
    average <- average + w (cut-off - average)      w = max(1 - decay, 1 / (age + 1))

The first observation is the average; later ones move it slowly. Kept per expert, in logits: a monotone function of
the scores, so the comparison is the same, and averages do not saturate (arXiv 2603.11535 keeps such averages).

Legend: N tokens of a group, E experts.
"""

import torch
from torch import Tensor

from moma.model.routing.rule import State

CUTOFF_DECAY = 0.99  # where no configuration says another
AUX_STATE = ("aux_cutoff", "aux_age")


def cutoff_of(falling_EN: Tensor, count_E: Tensor) -> Tensor:
    """Cut-off (E,) of logits sorted in falling order, of which the first `count_E` (int64) are taken.

    Where everything is taken it lies 1 below the last, where nothing is 1 above the first; NaN without tokens.
    Entries of -inf (padding) must come last and must not be counted.
    """
    n_tokens = falling_EN.shape[1]
    if n_tokens == 0:
        return falling_EN.new_full((falling_EN.shape[0],), torch.nan)
    last_E1 = (count_E - 1).clamp(min=0)[:, None]
    next_E1 = count_E.clamp(max=n_tokens - 1)[:, None]
    low_E, high_E = falling_EN.gather(1, next_E1)[:, 0], falling_EN.gather(1, last_E1)[:, 0]
    none_left = (count_E >= n_tokens) | ~torch.isfinite(low_E)
    low_E = torch.where(none_left, high_E - 2, low_E)
    high_E = torch.where(count_E <= 0, falling_EN[:, 0] + 2, high_E)
    return (low_E + high_E) / 2


def falling(logit_NE: Tensor, valid_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits per expert in the order (score descending, index ascending), and that order: (E, N) each."""
    # contiguous: indexing by a transposed tensor has other strides when traced by torch.compile than in eager mode
    logit_EN = logit_NE.detach().T.contiguous()
    if valid_N is not None:
        logit_EN = logit_EN.masked_fill(~valid_N, -torch.inf)
    return torch.sort(logit_EN, dim=1, descending=True, stable=True)


def moving_average(
    state: State, observed: State, decay: float, age: str = "age", names: tuple[str, ...] = ("cutoff",)
) -> State:
    """`state` with its moving cut-offs `names`; an expert whose observation is not finite keeps its own."""
    if names[0] not in observed:
        return state
    new, weight_E = dict(state), torch.clamp(1 / (state[age] + 1), min=1 - decay)
    for name in names:
        old_E = state[name]
        seen_E = observed[name].to(old_E.dtype)
        new[name] = old_E + weight_E * (torch.where(torch.isfinite(seen_E), seen_E, old_E) - old_E)
    new[age] = state[age] + torch.isfinite(observed[names[0]]).to(state[age].dtype)
    return new


def aux_average(state: State, observed: State) -> State:
    """`state` with the moving cut-offs of auxiliary routers, names AUX_STATE."""
    return moving_average(state, observed, CUTOFF_DECAY, AUX_STATE[1], AUX_STATE[:1])
