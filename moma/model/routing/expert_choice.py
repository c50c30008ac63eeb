"""Expert choice: each expert takes its k best tokens of the micro-batch (MoMa section 2.2; arXiv 2202.09368).

    score = sigmoid(x W_g)           k_e = floor(c_e N),  c_e = capacity_factor / |E|
    expert e takes the first k_e tokens in the order (score descending, index ascending)

A token may be taken by none, one or several experts; nothing is renormalised. The order is stable on every
device: identical states do occur (every BOS under a document mask), and a bare top-k breaks ties at will. Tokens are
ranked by logits: the same order as their scores, without what rounding in the sigmoid would add to it.
The rule sees the whole micro-batch, hence the future: it is for training, never for generation. What it observes,
the cut-offs of its choices, averaged over the training, is a causal stand-in (routing mode `threshold`).
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from moma.model.routing.cutoff import cutoff_of, falling, moving_average
from moma.model.routing.rule import Choice, Group, Rule, State


@dataclass(frozen=True)
class ExpertChoiceConfig:
    """Expert choice; `capacity_factor` is the mean number of experts per token (1 in the paper), of every group or by
    group; `cutoff_decay` that of the moving cut-offs."""

    kind: Literal["expert_choice"] = "expert_choice"
    capacity_factor: float | dict[str, float] = 1.0
    cutoff_decay: float = 0.99

    def __post_init__(self) -> None:
        check_capacity(self.capacity_factor)
        check_decay(self.cutoff_decay)


def check_capacity(factor: float | dict[str, float]) -> None:
    """Raise ValueError unless every capacity factor is above 0."""
    factors = factor.values() if isinstance(factor, dict) else [factor]
    if not all(f > 0 for f in factors):
        raise ValueError(f"got capacity_factor={factor}, need a number above 0: 1.0 matches dense FLOPs")


def check_decay(decay: float) -> None:
    """Raise ValueError unless a moving average can have this decay."""
    if not 0 <= decay < 1:
        raise ValueError(f"got cutoff_decay={decay}, need a number in [0, 1): 0.99 averages about 100 steps")


def capacity_share(factor: float | dict[str, float], group: str, n_experts: int) -> Fraction:
    """c_e as an exact fraction, at most 1, so that floor(c_e N) never suffers from rounding nor exceeds N."""
    if isinstance(factor, dict):
        if group not in factor:
            raise ValueError(
                f"got capacity_factor for {sorted(factor)}, need one for the group {group}: add it, or give one number"
            )
        factor = factor[group]
    return min(Fraction(factor).limit_denominator(10_000) / n_experts, Fraction(1))


def share(config: ExpertChoiceConfig, group: str, n_experts: int) -> Fraction:
    """c_e of a group."""
    return capacity_share(config.capacity_factor, group, n_experts)


def taken(order_EN: Tensor, share: Fraction, valid_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens come first: `taken_EN` bool in the order of the tokens, and how many per expert, `count_E`."""
    n_experts, n_tokens = order_EN.shape
    n_valid = torch.full((), n_tokens, device=order_EN.device) if valid_N is None else valid_N.sum()
    count = (share.numerator * n_valid) // share.denominator
    first_EN = (torch.arange(n_tokens, device=order_EN.device) < count).expand(n_experts, n_tokens)
    return torch.zeros_like(first_EN).scatter(1, order_EN, first_EN), count.expand(n_experts)


def quiet_cutoff(logit_NE: Tensor, group: Group, falling_EN: Tensor, count_E: Tensor) -> Tensor:
    """The micro-batch's cut-offs, of logits without noise: causal inference has none."""
    if group.noise_NE is not None:
        falling_EN, _ = falling(logit_NE, group.valid_N)
    return cutoff_of(falling_EN, count_E)


def choose(config: ExpertChoiceConfig, logit_NE: Tensor, group: Group) -> Choice:
    """Every expert's best tokens. Exact form: K = floor(c_e N). With `valid_N` the experts keep
    rank < floor(c_e n_valid), in the general form within the bound E K."""
    noisy_NE = logit_NE if group.noise_NE is None else logit_NE + group.noise_NE
    gate_NE = torch.sigmoid(noisy_NE)
    n_tokens, n_experts = logit_NE.shape
    c = group.share
    k = c.numerator * n_tokens // c.denominator
    falling_EN, order_EN = falling(noisy_NE, group.valid_N)
    if group.valid_N is None:
        count_E = torch.full((n_experts,), k, device=logit_NE.device)
        observed = {"cutoff": quiet_cutoff(logit_NE, group, falling_EN, count_E)}
        return Choice(None, gate_NE, order_EN[:, :k].sort(dim=1).values, observed=observed)
    taken_EN, count_E = taken(order_EN, c, group.valid_N)
    observed = {"cutoff": quiet_cutoff(logit_NE, group, falling_EN, count_E)}
    return Choice(taken_EN.T, gate_NE, bound=n_experts * k, observed=observed)


def gate(config: ExpertChoiceConfig, logit_NE: Tensor, selected_NE: Tensor) -> Tensor:
    """g = sigmoid(x W_g), nothing renormalised (MoMa Eq. 1)."""
    return torch.sigmoid(logit_NE)


def update(config: ExpertChoiceConfig, state: State, observed: State) -> State:
    """Moving cut-offs."""
    return moving_average(state, observed, config.cutoff_decay)


RULE = Rule(ExpertChoiceConfig, share, choose, gate, state=("cutoff", "age"), update=update)
