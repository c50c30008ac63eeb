"""Who carries tokens to the slots of experts and back: the gather-sum, and `Slots`. Knows neither experts nor routing.

    slot s computes token_S[s]          dispatch:  x_SD[s] = x_TD[token_S[s]]
                                        combine:   y_TD[t] = sum over t's slots of y_SD[s]

One is the adjoint of the other, and both are one operation, with a map and its inverse: deterministic, no atomics.
Slots have one of two forms, both with static shapes:

    equal    every expert has K slots, S = E K                      batched matmul
    ragged   expert e has the slots [ends[e-1], ends[e]), the       grouped matmul over the same S rows; the ends
             rest of the S slots is empty                           are known on the device only

Empty slots hold zeros on the way in and are left out on the way back.

Legend: T tokens, N rows of one group, E experts, K slots per expert, S slots of all experts, D dim, C columns of a map.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moma.model.kernels import gather_sum_fast, usable

FEW = 16  # entries of a map, up to which bags cost more than they save
BAGGED = (torch.float32, torch.bfloat16, torch.float16)  # whose bags end where they say; float64's last one does not


def gather_sum(x_ID: Tensor, index_OC: Tensor) -> Tensor:
    """out[o] = sum over c of x[index[o, c]], an index of -1 adding nothing; sums in at least fp32. (O, D).

    Deterministic everywhere. Where no gradient is asked of it (`GatherSum` does not), every row is read once: a GPU by
    `kernels.py`, a CPU by torch's embedding bags.
    """
    bare = not (torch.is_grad_enabled() and x_ID.requires_grad)
    if bare and usable(x_ID, index_OC):
        return gather_sum_fast(x_ID, index_OC)
    many = FEW < index_OC.numel() and 0 not in x_ID.shape
    if bare and many and x_ID.device.type == "cpu" and x_ID.dtype in BAGGED:
        return _sum_bags(x_ID, index_OC)
    return plain_gather_sum(x_ID, index_OC)


def plain_gather_sum(x_ID: Tensor, index_OC: Tensor) -> Tensor:
    """`gather_sum` in plain torch, for every device and dtype: one pass per column."""
    wide = torch.promote_types(x_ID.dtype, torch.float32)
    if index_OC.shape[1] == 0 or x_ID.shape[0] == 0:
        return x_ID.new_zeros(index_OC.shape[0], x_ID.shape[1])
    total_OD: Tensor | None = None
    for index_O in index_OC.unbind(1):
        row_OD = torch.where((index_O >= 0)[:, None], x_ID[index_O.clamp(min=0)], x_ID.new_zeros(()))
        if index_OC.shape[1] == 1:
            return row_OD
        total_OD = row_OD.to(wide) if total_OD is None else total_OD + row_OD
    assert total_OD is not None
    return total_OD.to(x_ID.dtype)


def _sum_bags(x_ID: Tensor, index_OC: Tensor) -> Tensor:
    """`gather_sum` with each row of the map as a bag: its entries that are not -1, one after the other."""
    live_OC = index_OC >= 0
    ends_O = live_OC.sum(1).cumsum(0)
    # the last place collects the entries of -1 and is cut off; all other targets are distinct
    place = torch.where(live_OC, live_OC.flatten().cumsum(0).view(live_OC.shape) - 1, index_OC.numel())
    entries = index_OC.new_zeros(index_OC.numel() + 1).scatter(0, place.flatten(), index_OC.flatten())[:-1]
    starts = torch.cat([ends_O.new_zeros(1), ends_O])
    out: Tensor = torch.ops.aten._embedding_bag_forward_only(
        x_ID.contiguous(), entries, starts, mode=0, include_last_offset=True
    )[0]
    return out


def in_inference() -> bool:
    """Whether this is inference mode, as in decoding, where no gradient is ever asked for: what only serves gradients
    costs more than the work for a token or two."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


class GatherSum(torch.autograd.Function):
    """`gather_sum` whose gradient is the same operation with the inverse map: no atomics, hence deterministic.

    Dispatch is `GatherSum(x_TD, token_S1, slots_TC)`, combine is `GatherSum(y_SD, slots_TC, token_S1)`: one is
    the adjoint of the other. `index_OC` and `inverse_IC` must be inverse to each other.
    """

    @staticmethod
    def forward(ctx: Any, x_ID: Tensor, index_OC: Tensor, inverse_IC: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_IC)
        return gather_sum(x_ID, index_OC)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_IC,) = ctx.saved_tensors
        return gather_sum(grads[0], inverse_IC), None, None


def dispatch(x_TD: Tensor, token_S: Tensor, slots_TC: Tensor) -> Tensor:
    """Rows of x for S slots (a slot with token -1 holds zeros): (S, D)."""
    if in_inference():
        return gather_sum(x_TD, token_S[:, None])
    out: Any = GatherSum.apply(x_TD, token_S[:, None], slots_TC)
    return out


def combine(y_SD: Tensor, slots_TC: Tensor, token_S: Tensor) -> Tensor:
    """Sum of each token's slots, exact zero for a token without one: (T, D)."""
    if in_inference():
        return gather_sum(y_SD, slots_TC)
    out: Any = GatherSum.apply(y_SD, slots_TC, token_S[:, None])
    return out


def slots_of_tokens(token_EK: Tensor, n_tokens: int) -> Tensor:
    """Inverse map int64 (T, E): the slot e K + k that expert e gave to token t, or -1. `token_EK` is -1 when empty."""
    n_experts, k = token_EK.shape
    slot_EK = torch.arange(n_experts * k, device=token_EK.device).view(n_experts, k)
    return _inverse(token_EK, slot_EK, token_EK >= 0, n_tokens)


def _inverse(token_EI: Tensor, slot_EI: Tensor, live_EI: Tensor, n_tokens: int) -> Tensor:
    """(T, E): the slot of each token's live entry in the row of expert e, or -1."""
    # column T collects what is not live and is cut off; all other targets are distinct
    column_EI = torch.where(live_EI, token_EI, n_tokens)
    slots_ET = torch.full((len(token_EI), n_tokens + 1), -1, dtype=torch.int64, device=token_EI.device)
    return slots_ET.scatter(1, column_EI, slot_EI)[:, :n_tokens].T


class Slots(NamedTuple):
    """Which token each of S slots computes, and the way back; see the module docstring for the two forms."""

    token_S: Tensor  # int64, flat token of each slot, -1: empty
    gate_S: Tensor | None  # weight of each slot's output, 0 in empty slots; None: all 1
    slots_TC: Tensor  # int64, the inverse: the slot of token t in column c, or -1
    ends_E: Tensor | None  # int, where expert e's slots end (ragged form); None: S / E slots each (equal form)


def equal_slots(token_EK: Tensor, gate_EK: Tensor | None, n_tokens: int) -> Slots:
    """Slots of experts that take K tokens each: flat `token_EK` (-1: empty) and their weights, out of T tokens."""
    live_EK = token_EK >= 0
    # whatever stands in an empty slot's gate, even NaN, must not reach a product
    gate_S = None if gate_EK is None else torch.where(live_EK, gate_EK, 0).reshape(-1)
    return Slots(token_EK.reshape(-1), gate_S, slots_of_tokens(token_EK, n_tokens), None)


def ragged_slots(selected_NE: Tensor, gate_NE: Tensor | None, bound: int, index_N: Tensor, n_tokens: int) -> Slots:
    """Slots of the pairs of a mask: bool (N, E) and the weights there, for the rows' flat tokens `index_N` out of T.

    S = `bound` slots in the order (expert, row); static shapes, cost linear in N E, no sort. The caller must know that
    no more than `bound` pairs are selected: those beyond it would be cut off. An expert must not select two rows of
    the same token; rows that nobody selects may repeat one (as in padding).
    """
    n_rows, n_experts = selected_NE.shape
    selected_EN = selected_NE.T
    place_EN = selected_EN.reshape(-1).cumsum(0).view(n_experts, n_rows) - 1
    live_EN = selected_EN & (place_EN < bound)
    # slot `bound` collects the other pairs and is cut off; all other targets are distinct
    slot_EN = torch.where(live_EN, place_EN, bound)
    token_EN = index_N.expand(n_experts, n_rows)

    def compact(values_EN: Tensor, empty: int) -> Tensor:  # scatter, so that its gradient is a gather
        room = values_EN.new_full((bound + 1,), empty)
        return room.scatter(0, slot_EN.reshape(-1), values_EN.reshape(-1))[:bound]

    ends_E = selected_NE.sum(0).cumsum(0).clamp(max=bound).to(torch.int32)
    gate_S = None if gate_NE is None else compact(gate_NE.T, 0)
    return Slots(compact(token_EN, -1), gate_S, _inverse(token_EN, slot_EN, live_EN, n_tokens), ends_E)
