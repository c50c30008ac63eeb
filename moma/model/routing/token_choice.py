"""Token choice: each token takes its k best experts (MoE-LLaVA, arXiv 2401.15947; GShard, arXiv 2006.16668).

    p = softmax(z) or sigmoid(z),  z = x W_g        gate = p, or p / sum of p over the choices kept
    choices = the first k experts in the order (p + bias descending, index ascending)

*Capacity*: with a capacity factor f an expert holds at most C = max(ceil(k f n / E), min_capacity) of n tokens. The
queue: all first choices, behind them all second ones, and so on; among choices of one rank by position, at random, or
by priority (Batch Priority Routing, arXiv 2106.05974: the surest first choice first). Refused choices still count in
the queue, as in DeepSpeed 0.9.5. Without a factor nothing is refused (dropless).
*Drawn choices*: those after the first can be drawn from z + Gumbel(0, 1) noise, which the caller makes where
`needs_noise` says so; without noise every choice is deterministic.
*Losses*: balance * E sum_e F_e G_e, F_e the share of choices that fell on e, refused ones included, without gradient,
G_e its mean probability (MoE-LLaVA Eq. 9-11: 1 when uniform); z_loss * mean logsumexp(z)^2 (ST-MoE, arXiv 2202.08906).
*Bias*: state that only the choice reads, moved by bias_rate * sign(mean load - load) each step (DeepSeek-V3, arXiv
2412.19437, section 2.1.2), so that loads even out without a loss.

A token's choices never depend on other tokens, but a capacity refuses some by what stands elsewhere in the
micro-batch: causal inference is dropless.

Legend: N tokens of the group, E its experts, K choices per token, Q = K N places of the queue.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moma.model.routing.rule import Choice, Copies, Group, Rule, State


@dataclass(frozen=True)
class TokenChoiceConfig:
    """Token choice; the defaults are plain dropless top-1 with raw softmax gates and no balancing."""

    kind: Literal["token_choice"] = "token_choice"
    k: int = 1
    scores: Literal["softmax", "sigmoid"] = "softmax"
    weights: Literal["raw", "renormalised"] = "raw"
    second_choice: Literal["argmax", "gumbel", "gumbel_always"] = "argmax"  # drawn: in pre-training, in evaluation too
    capacity_factor: float | None = None  # None: dropless
    min_capacity: int = 0
    drop: Literal["position", "random", "priority"] = "position"  # `random` is by position without noise
    balance: float = 0.0  # coefficient
    balance_counts: Literal["first", "all"] = "first"
    z_loss: float = 0.0  # coefficient
    bias_rate: float = 0.0  # per optimizer step; 0 keeps the bias as it is
    # capacity_factor in exact whole numbers, 1 without; made here, since tracing makes numbers that differ between
    # layers symbolic, which Fraction does not take
    ratio: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"got k={self.k}, need at least 1 expert per token: set k=1 or more")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < float("inf"):
            raise ValueError(
                f"got capacity_factor={self.capacity_factor}, need a number above 0: 1.0 leaves no slack, "
                "null refuses nothing"
            )
        if self.min_capacity < 0:
            raise ValueError(f"got min_capacity={self.min_capacity}, need 0 or more tokens: 0 sets no minimum")
        for name in ("balance", "z_loss", "bias_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"got {name}={getattr(self, name)}, need a number of 0 or more: 0 turns it off")
        if self.bias_rate > 0 and self.k > 1 and self.second_choice != "argmax":
            raise ValueError(
                f"got bias_rate={self.bias_rate} with second_choice={self.second_choice}, need choices that follow the "
                "bias: set second_choice=argmax, or bias_rate=0"
            )
        factor = 1.0 if self.capacity_factor is None else self.capacity_factor
        object.__setattr__(self, "ratio", Fraction(factor).limit_denominator(10_000).as_integer_ratio())


def needs_noise(config: TokenChoiceConfig, training: bool) -> bool:
    """Whether `choose` wants Gumbel(0, 1) noise (N, E); `training`: in pre-training, not in evaluation."""
    drawn = config.k > 1 and config.second_choice != "argmax"
    shuffled = config.capacity_factor is not None and config.drop == "random"
    return (training and (drawn or shuffled)) or (drawn and config.second_choice == "gumbel_always")


def share(config: TokenChoiceConfig, group: str, n_experts: int) -> Fraction:
    """Share of a group's tokens that one expert computes when loads are even: k / E, less below a capacity factor of 1.

    Raises ValueError if the group has fewer than k experts.
    """
    if config.k > n_experts:
        raise ValueError(
            f"got k={config.k} for the group {group} of {n_experts} experts, need at most one choice per expert: "
            "lower feed_forward.selection.k, or give the group more experts"
        )
    return Fraction(config.k, n_experts) * min(Fraction(*config.ratio), Fraction(1))


def choose(config: TokenChoiceConfig, logit_NE: Tensor, group: Group) -> Choice:
    """The k experts of each token, less what a capacity refuses; slots without a token choose nothing.

    `logit_NE` fp32 or float64. `group.noise_NE` is Gumbel(0, 1) noise, where `needs_noise`.
    """
    n_tokens, n_experts = logit_NE.shape
    valid_N = group.valid_N
    if valid_N is not None:  # what stands in the other slots must reach neither losses nor gradients
        logit_NE = torch.where(valid_N[:, None], logit_NE, 0)
    choice_NK = _choices(config, logit_NE.detach(), group.state, group.noise_NE)
    chosen_NE = selected_NE = _spread(choice_NK, n_experts, valid_N)
    dropped_NE, bound = None, n_tokens * config.k
    if config.capacity_factor is not None:
        order_N = _queue_order(config, logit_NE.detach(), choice_NK[:, :1], group.noise_NE)
        limit = capacity(config, n_experts, n_tokens if valid_N is None else valid_N.sum())
        kept_NK = _within_capacity(choice_NK, valid_N, order_N, limit, n_experts)
        selected_NE = torch.zeros_like(chosen_NE).scatter(1, choice_NK, kept_NK) & chosen_NE
        dropped_NE = chosen_NE & ~selected_NE
        bound = min(bound, n_experts * int(capacity(config, n_experts, n_tokens)))
    observed: State = {}
    if config.bias_rate > 0:
        observed["excess"] = _excess(chosen_NE)
    return Choice(
        selected_NE,
        gate(config, logit_NE, selected_NE),
        bound=bound,
        dropped_NE=dropped_NE,
        losses=_losses(config, logit_NE, choice_NK, valid_N),
        observed=observed,
    )


def alone(config: TokenChoiceConfig, logit_NE: Tensor, state: State) -> Tensor:
    """The k best experts of each token, without noise and without capacity: `selected_NE`, bool."""
    return _spread(_choices(config, logit_NE.detach(), state, None), logit_NE.shape[1], None)


def gate(config: TokenChoiceConfig, logit_NE: Tensor, selected_NE: Tensor) -> Tensor:
    """Weights of the selected experts' outputs, with gradient; 0 elsewhere, also for a token that lost all."""
    if config.weights == "raw":
        return torch.where(selected_NE, _scores(config, logit_NE), 0)
    # p / sum of p as a softmax of log p: nothing underflows. Rows without a selection stay finite, and their gradient 0
    live_NE = selected_NE | ~selected_NE.any(1, keepdim=True)
    weight_NE = torch.where(live_NE, _log_scores(config, logit_NE), -torch.inf).softmax(1)
    return torch.where(selected_NE, weight_NE, 0)


def update(config: TokenChoiceConfig, state: State, observed: State) -> State:
    """The state after an optimizer step: the bias of experts below their group's mean load rises, above it falls."""
    if config.bias_rate == 0 or "excess" not in observed:
        return state
    return state | {"bias": state["bias"] - config.bias_rate * observed["excess"].sign()}


def capacity(config: TokenChoiceConfig, n_experts: int, n_tokens: int | Tensor) -> int | Tensor:
    """C of n tokens, max(ceil(k f n / E), min_capacity) in exact arithmetic; an int64 scalar for a tensor of n."""
    over, under = config.ratio
    count = -(-over * config.k * n_tokens // (under * n_experts))
    return count.clamp(min=config.min_capacity) if isinstance(count, Tensor) else max(count, config.min_capacity)


def _scores(config: TokenChoiceConfig, logit_NE: Tensor) -> Tensor:
    return logit_NE.softmax(1) if config.scores == "softmax" else logit_NE.sigmoid()


def _log_scores(config: TokenChoiceConfig, logit_NE: Tensor) -> Tensor:
    """log p up to a constant per token."""
    return logit_NE if config.scores == "softmax" else F.logsigmoid(logit_NE)


def _choices(config: TokenChoiceConfig, logit_NE: Tensor, state: State, noise_NE: Tensor | None) -> Tensor:
    """The experts of each token by rank of choice, `choice_NK`."""
    score_NE = _scores(config, logit_NE)
    if "bias" in state:
        score_NE = score_NE + state["bias"]
    order_NE = torch.sort(score_NE, dim=1, descending=True, stable=True).indices
    if noise_NE is None or config.second_choice == "argmax":
        return order_NE[:, : config.k]
    first_N1 = order_NE[:, :1]
    noisy_NE = (logit_NE + noise_NE).scatter(1, first_N1, -torch.inf)
    others_NE = torch.sort(noisy_NE, dim=1, descending=True, stable=True).indices
    return torch.cat([first_N1, others_NE[:, : config.k - 1]], 1)


def _spread(choice_NK: Tensor, n_experts: int, valid_N: Tensor | None) -> Tensor:
    """Choices as bool (N, E), of tokens alone."""
    none_NE = torch.zeros(choice_NK.shape[0], n_experts, dtype=torch.bool, device=choice_NK.device)
    chosen_NE = none_NE.scatter(1, choice_NK, True)
    return chosen_NE if valid_N is None else chosen_NE & valid_N[:, None]


def _queue_order(
    config: TokenChoiceConfig, logit_NE: Tensor, first_N1: Tensor, noise_NE: Tensor | None
) -> Tensor | None:
    """The tokens in the order of the queue within one rank of choice; None: by position."""
    if config.drop == "priority":
        key_NE = _scores(config, logit_NE)
    elif config.drop == "random" and noise_NE is not None:
        key_NE = noise_NE  # at its first choice: the one number of a token that no drawn choice depends on
    else:
        return None
    return torch.sort(key_NE.gather(1, first_N1).squeeze(1), descending=True, stable=True).indices


def _within_capacity(
    choice_NK: Tensor, valid_N: Tensor | None, order_N: Tensor | None, limit: int | Tensor, n_experts: int
) -> Tensor:
    """Which choices stand within the first `limit` of their expert's queue, `kept_NK`."""
    n_tokens, k = choice_NK.shape
    if order_N is not None:
        choice_NK = choice_NK[order_N]
        valid_N = None if valid_N is None else valid_N[order_N]
    expert_Q = choice_NK.T.reshape(-1)
    arrives_EQ = expert_Q == torch.arange(n_experts, device=expert_Q.device)[:, None]
    if valid_N is not None:
        arrives_EQ = arrives_EQ & valid_N.repeat(k)
    place_Q = arrives_EQ.cumsum(1).gather(0, expert_Q[None])[0]  # counted from 1, refused ones included
    kept_NK = (place_Q <= limit).view(k, n_tokens).T
    if order_N is None:
        return kept_NK
    place_N = torch.arange(n_tokens, device=order_N.device)
    return kept_NK[torch.empty_like(order_N).scatter(0, order_N, place_N)]


def _shares(chosen_NE: Tensor, k: int, valid_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Share of the tokens' k choices each that fell on every expert, (E,): sums to 1, or 0 without a token."""
    return chosen_NE.sum(0).to(dtype) / (k * _at_least_one(chosen_NE, valid_N))


def _excess(chosen_NE: Tensor) -> Tensor:
    """Load less mean load, fp32 (E,): of the group's choices, the share that fell on an expert less 1 / E.

    Exactly 0 where loads are even; the mean is the group's own, so groups side by side in one state do not mix.
    """
    count_E = chosen_NE.sum(0)
    total, n_experts = count_E.sum(), chosen_NE.shape[1]
    return (count_E * n_experts - total).float() / (total.clamp(min=1) * n_experts)


def _at_least_one(any_NE: Tensor, valid_N: Tensor | None) -> int | Tensor:
    """Number of tokens, to divide by."""
    return max(any_NE.shape[0], 1) if valid_N is None else valid_N.sum().clamp(min=1)


def _losses(
    config: TokenChoiceConfig, logit_NE: Tensor, choice_NK: Tensor, valid_N: Tensor | None
) -> dict[str, Tensor]:
    losses, n_experts = {}, logit_NE.shape[1]
    n_tokens = _at_least_one(logit_NE, valid_N)
    live_N1 = torch.ones_like(logit_NE[:, :1], dtype=torch.bool) if valid_N is None else valid_N[:, None]
    if config.balance > 0:
        counted_NK = choice_NK[:, :1] if config.balance_counts == "first" else choice_NK
        counted_NE = _spread(counted_NK, n_experts, valid_N)
        routed_E = _shares(counted_NE, counted_NK.shape[1], valid_N, logit_NE.dtype)
        probability_NE = _log_scores(config, logit_NE).softmax(1)  # scores that sum to 1
        mean_E = torch.where(live_N1, probability_NE, 0).sum(0) / n_tokens
        losses["balance_loss"] = config.balance * n_experts * (routed_E * mean_E).sum()
    if config.z_loss > 0:
        square_N1 = logit_NE.logsumexp(1, keepdim=True).square()
        losses["router_z_loss"] = config.z_loss * torch.where(live_N1, square_N1, 0).sum() / n_tokens
    return losses


def copies(config: TokenChoiceConfig) -> Copies:
    """Dropless, every token gets an expert; renormalised, their weights sum to 1."""
    if config.weights == "renormalised":
        return "whole" if config.capacity_factor is None else "whole_or_none"
    return "scaled" if config.capacity_factor is None else "partial"


RULE = Rule(TokenChoiceConfig, share, choose, gate, alone, ("bias",), update, needs_noise, copies)
