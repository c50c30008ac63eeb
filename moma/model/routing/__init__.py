"""Selection rules: which tokens an expert computes. One file per rule, pure functions; `SELECTIONS` is the list.

A rule's file holds its frozen config and its `select`. Adding a rule = one file, one line here, one YAML.
"""

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


SELECTIONS = {"expert_choice": expert_choice}

__all__ = ["SELECTIONS", "RouterStats"]
