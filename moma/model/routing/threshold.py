"""Expert threshold: an expert takes every token whose score exceeds its moving cut-off (arXiv 2603.11535).

    expert e takes t  iff  logit_te > cutoff_e          cutoff_e: moving average of the cut-offs of expert choice
                                                        (`cutoff.py`), over the micro-batches of the training

The same causal rule in training and inference: a token's experts depend on its own state alone, no auxiliary router
is needed, and loads are balanced on average. During the first `warmup_steps` updates, while cut-offs move fast, the
rule is expert choice; both are one graph.

Noise on the logits has cut-offs of its own, so that loads stay what they should be; causal inference has no noise.

Training computes at most `bound` times the expected load of an expert, so that shapes stay static; beyond it the
later tokens of the micro-batch are dropped (never an earlier one because of a later one: still causal), counted in
`dropped`. Causal inference is dropless.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from moma.model.routing.cutoff import cutoff_of, falling, moving_average
from moma.model.routing.expert_choice import capacity_share, check_capacity, check_decay, quiet_cutoff, taken
from moma.model.routing.rule import Choice, Group, Rule, State


@dataclass(frozen=True)
class ThresholdConfig:
    """`capacity_factor`: mean number of experts per token that the cut-offs aim at, of every group or by group;
    `bound`: most that an expert computes in training, in expected loads."""

    kind: Literal["threshold"] = "threshold"
    capacity_factor: float | dict[str, float] = 1.0
    cutoff_decay: float = 0.9  # about ten steps: loads follow it (experiments/rehearsal)
    warmup_steps: int = 100
    bound: float = 2.0

    def __post_init__(self) -> None:
        check_capacity(self.capacity_factor)
        check_decay(self.cutoff_decay)
        if self.warmup_steps < 1:
            raise ValueError(f"got warmup_steps={self.warmup_steps}, need at least 1 for a first cut-off: raise it")
        if self.bound < 1:
            raise ValueError(f"got bound={self.bound}, need at least 1: below it the expected load does not fit")


def share(config: ThresholdConfig, group: str, n_experts: int) -> Fraction:
    """Expected share of a group's tokens per expert."""
    return capacity_share(config.capacity_factor, group, n_experts)


def choose(config: ThresholdConfig, logit_NE: Tensor, group: Group) -> Choice:
    """Tokens above the moving cut-offs (warm-up: expert choice), at most floor(bound c_e N) per expert."""
    noisy_NE = logit_NE if group.noise_NE is None else logit_NE + group.noise_NE
    n_tokens, n_experts = logit_NE.shape
    c = group.share
    falling_EN, order_EN = falling(noisy_NE, group.valid_N)
    taken_EN, count_E = taken(order_EN, c, group.valid_N)
    warm_E = group.state["age"] < config.warmup_steps
    cutoff_E = group.state["cutoff" if group.noise_NE is None else "noisy_cutoff"]
    wanted_NE = torch.where(warm_E, taken_EN.T, noisy_NE.detach() > cutoff_E)
    if group.valid_N is not None:
        wanted_NE = wanted_NE & group.valid_N[:, None]
    limit = min(n_tokens, int(config.bound * c.numerator * n_tokens / c.denominator))
    selected_NE = wanted_NE & (wanted_NE.cumsum(0) <= limit)
    return Choice(
        selected_NE,
        torch.sigmoid(noisy_NE),
        bound=n_experts * limit,
        dropped_NE=wanted_NE & ~selected_NE,
        observed={
            "cutoff": quiet_cutoff(logit_NE, group, falling_EN, count_E),
            "noisy_cutoff": cutoff_of(falling_EN, count_E),
        },
    )


def alone(config: ThresholdConfig, logit_NE: Tensor, state: State) -> Tensor:
    """Tokens above the moving cut-offs, each by itself."""
    return logit_NE > state["cutoff"]


def gate(config: ThresholdConfig, logit_NE: Tensor, selected_NE: Tensor) -> Tensor:
    """g = sigmoid(x W_g)."""
    return torch.sigmoid(logit_NE)


def update(config: ThresholdConfig, state: State, observed: State) -> State:
    """Moving cut-offs."""
    return moving_average(state, observed, config.cutoff_decay, names=("cutoff", "noisy_cutoff"))


RULE = Rule(ThresholdConfig, share, choose, gate, alone, ("cutoff", "noisy_cutoff", "age"), update)
