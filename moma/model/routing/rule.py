"""What a selection rule is: which expert computes which token, decided over one group of tokens.

A rule's file holds its frozen config and five functions over one group of N tokens and E experts:

    share(config, group, E)                   c_e: expected share of the group's tokens that one expert computes
    choose(config, logit_NE, group) -> Choice  the training rule, over the micro-batch
    alone(config, logit_NE, state)            the same for each token by itself (None: the rule needs the batch)
    gate(config, logit_NE, selected_NE)       weights of the chosen experts' outputs
    update(config, state, observed)           new routing state, once per optimizer step

Routing *state* (moving cut-offs, correction biases) is explicit: one number per expert and name in `RULE.state`, zero
at the start. `choose` and `alone` read it, `update` returns it anew, nobody writes it in place; it is part of the
checkpoint. What `update` needs is *observed* by `choose` in every micro-batch and averaged over the step.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

State = dict[str, Tensor]  # name -> fp32 (E,)
# of identical experts a token gets: as much as of one; that or nothing; a multiple of it; a multiple or nothing
Copies = Literal["whole", "whole_or_none", "scaled", "partial"]


def state_of(module: nn.Module) -> State:
    """The explicit routing state of a module, kept in its buffers `routing_<name>`."""
    own = module.named_buffers(recurse=False)
    return {name.removeprefix("routing_"): buffer for name, buffer in own if name.startswith("routing_")}


def register_state(module: nn.Module, names: tuple[str, ...], size: int) -> None:
    """Give a module routing state: zeros, fp32 (size,) per name."""
    for name in names:
        module.register_buffer(f"routing_{name}", torch.zeros(size))


def write_state(module: nn.Module, new: State) -> None:
    """Replace a module's routing state: the training loop's business alone."""
    for name, values in new.items():
        module.get_buffer(f"routing_{name}").copy_(values)


class RouterStats(NamedTuple):
    """What one router decided for T tokens and its E columns (groups of one expert have no router).

    Return values, never buffers: recomputation under activation checkpointing would count them twice.
    """

    selected_TE: Tensor  # bool: the expert computed the token in this pass
    score_TE: Tensor  # fp32, detached: scores of the main router; 0 outside the token's group
    reference_TE: Tensor | None  # bool: what the training rule chooses on these very states; None in cached decoding
    aux_logit_TE: Tensor | None  # fp32: auxiliary routers' logits, where the model has them
    member_TE: Tensor  # bool: the expert belongs to the token's group (False everywhere at padding)
    dropped_TE: Tensor | None = None  # bool: by the rule chosen, but refused by a capacity; None: it refuses nothing
    losses: dict[str, Tensor] = {}  # noqa: RUF012  scalars with gradient, already weighted, to add to the objective
    observed: State = {}  # noqa: RUF012  what `update` needs of this micro-batch


class Group(NamedTuple):
    """What a rule knows of a group beside its logits."""

    name: str  # of the modality, or `all`
    state: State  # the group's part, (E,) each
    valid_N: Tensor | None = None  # bool, which of the N slots hold a token; None: all (exact form)
    noise_NE: Tensor | None = None  # see `noise.py`
    share: Fraction = Fraction(1)  # what the rule's `share` says of this group


class Choice(NamedTuple):
    """A rule's decision for the N tokens of a group.

    Exact form: `token_EK`, ascending per expert: every expert computes K tokens, so shapes are static and work is
    equal. General form (`token_EK is None`): the pairs of `selected_NE`, at most `bound` of them (an int known from
    shapes); experts may differ in how many they have.
    """

    selected_NE: Tensor | None  # bool; None in the exact form, where `token_EK` says it
    gate_NE: Tensor  # weights with gradient; what is not selected is not read
    token_EK: Tensor | None = None
    bound: int = 0
    dropped_NE: Tensor | None = None
    losses: dict[str, Tensor] = {}  # noqa: RUF012
    observed: State = {}  # noqa: RUF012


class Rule(NamedTuple):
    """One selection rule; see the module docstring."""

    config: type
    share: Callable[[Any, str, int], Fraction]
    choose: Callable[[Any, Tensor, Group], Choice]
    gate: Callable[[Any, Tensor, Tensor], Tensor]
    alone: Callable[[Any, Tensor, State], Tensor] | None = None
    state: tuple[str, ...] = ()
    update: Callable[[Any, State, State], State] | None = None
    draws: Callable[[Any, bool], bool] | None = None  # (config, pre-training?): whether `choose` needs Gumbel(0, 1)
    copies: Callable[[Any], Copies] = lambda config: "partial"


class Disturbance(NamedTuple):
    """What is added to the routing of one layer from outside, all of it drawn before the layer runs."""

    noise_TE: Tensor | None = None  # see `noise.py`
    flip_TE: Tensor | None = None  # bool: decisions of the training rule to turn round (error injection)
    depth_flip_TE: Tensor | None = None  # the same for the layer's depth router
