"""Selection rules: which tokens an expert computes. One file per rule, pure functions; `SELECTIONS` is the list.

A rule's file holds its frozen config, its capacity and its `select`. Adding a rule = one file, one line here, one
YAML.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor

from moma.model.routing import expert_choice


class RouterStats(NamedTuple):
    """What one sparse layer decided for T tokens and its E routed experts (groups of one expert have no router).

    Return values, never buffers: recomputation under activation checkpointing would count them twice.
    """

    selected_TE: Tensor  # bool: the expert computed the token in this pass
    score_TE: Tensor  # fp32, detached: sigmoid scores of the main router; 0 outside the token's group
    reference_TE: Tensor  # bool: what the training rule chooses on these very states
    aux_logit_TE: Tensor | None  # fp32: auxiliary routers' logits, where they were asked for
    member_TE: Tensor  # bool: the expert belongs to the token's group (False everywhere at padding)


class Rule(NamedTuple):
    """One selection rule: `share(capacity_factor, n_experts)` is c_e of a group."""

    config: type
    share: Callable[[float, int], Fraction]
    # select(logit_NE, share, valid_N) -> (token_EK, keep_EK)
    select: Callable[[Tensor, Fraction, Tensor | None], tuple[Tensor, Tensor | None]]


SELECTIONS = {
    "expert_choice": Rule(expert_choice.ExpertChoiceConfig, expert_choice.capacity_share, expert_choice.select),
}

__all__ = ["SELECTIONS", "RouterStats", "Rule"]
