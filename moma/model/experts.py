"""Stacked SwiGLU experts, and the gather-sum that carries tokens to them and back. Knows no routing.

    y = W2 ( g * silu(x W1) * (x W3) )        weights (E, in, out), W1 and W3 fused: one multiplication each

`Slots` say which token each expert computes, in one of two forms, both with static shapes:

    equal    every expert has K slots, S = E K                      batched matmul
    ragged   expert e has the slots [ends[e-1], ends[e]), the       grouped matmul over the same S rows; the ends
             rest of the S slots is empty                           are known on the device only

Empty slots hold zeros on the way in and are left out on the way back. Nobody multiplies the ragged form's empty tail:
the CPU reads the ends and takes one matmul per expert, a GPU of compute capability 9.0 or more leaves them where they
are (bf16), and other GPUs or dtypes pay a synchronisation for them.

Legend: T tokens, N rows of one group, E experts, K slots per expert, S slots of all experts, D dim, F hidden width,
C columns of a map.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from moma.model.kernels import gather_sum_fast, usable
from moma.model.precision import autocast, full_precision

BAGGED = (torch.float32, torch.bfloat16, torch.float16)  # whose bags end where they say; float64's last one does not


def gather_sum(x_ID: Tensor, index_OC: Tensor) -> Tensor:
    """out[o] = sum over c of x[index[o, c]], an index of -1 adding nothing; sums in at least fp32. (O, D).

    Deterministic everywhere. Where no gradient is asked of it (`GatherSum` does not), every row is read once: a GPU by
    `kernels.py`, a CPU by torch's embedding bags.
    """
    bare = not (torch.is_grad_enabled() and x_ID.requires_grad)
    if bare and usable(x_ID, index_OC):
        return gather_sum_fast(x_ID, index_OC)
    if bare and x_ID.device.type == "cpu" and x_ID.dtype in BAGGED and 0 not in (*x_ID.shape, *index_OC.shape):
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
    out: Any = GatherSum.apply(x_TD, token_S[:, None], slots_TC)
    return out


def combine(y_SD: Tensor, slots_TC: Tensor, token_S: Tensor) -> Tensor:
    """Sum of each token's slots, exact zero for a token without one: (T, D)."""
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


def grouped_matmul(x_SD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows [ends[e-1], ends[e]) of x times w[e], exact zeros from ends[-1] on: (S, F). `ends_E` is int, ascending.

    Differentiable once, deterministic, casts under autocast as `bmm` does. bf16 on CUDA takes torch's `grouped_mm`
    (D and F multiples of 8; needs no host synchronisation from compute capability 9.0 on); everything else takes one
    matmul per expert, for which the ends are read on the host.
    """
    return _grouped_matmul(autocast(x_SD), autocast(w_EDF), ends_E.to(torch.int32))  # what the kernel takes


@torch.library.custom_op("moma::grouped_matmul", mutates_args=())
def _grouped_matmul(x_SD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    if _has_kernel(x_SD, w_EDF.shape[2]):
        return _kernel_matmul(x_SD, w_EDF, ends_E)
    ends = ends_E.tolist()
    y_SF = x_SD.new_empty(x_SD.shape[0], w_EDF.shape[2])
    *own, tail_SF = y_SF.tensor_split(ends)
    for x_ND, w_DF, y_NF in zip(x_SD.tensor_split(ends)[:-1], w_EDF, own, strict=True):
        torch.mm(x_ND, w_DF, out=y_NF)
    tail_SF.zero_()
    return y_SF


@torch.library.custom_op("moma::grouped_outer", mutates_args=())
def _grouped_outer(x_SD: Tensor, y_SF: Tensor, ends_E: Tensor) -> Tensor:
    """x^T y over each expert's rows, exact zeros for an expert without any: (E, D, F). The gradient of the weights."""
    if _has_kernel(x_SD, y_SF.shape[1]):
        return _kernel_outer(x_SD, y_SF, ends_E)
    ends = ends_E.tolist()
    w_EDF = x_SD.new_empty(len(ends), x_SD.shape[1], y_SF.shape[1])
    parts = zip(x_SD.tensor_split(ends)[:-1], y_SF.tensor_split(ends)[:-1], w_EDF, strict=True)
    for x_ND, y_NF, w_DF in parts:
        torch.mm(x_ND.T, y_NF, out=w_DF)  # without rows: zeros
    return w_EDF


def _has_kernel(x_SD: Tensor, n_columns: int) -> bool:
    """Whether `grouped_mm` takes these operands: bf16 on CUDA, every row a multiple of 16 bytes."""
    aligned = x_SD.shape[1] % 8 == 0 and n_columns % 8 == 0 and x_SD.shape[0] > 0
    return x_SD.is_cuda and x_SD.dtype == torch.bfloat16 and aligned


def _kernel_matmul(x_SD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """The grouped matmul by torch's kernel, which leaves the rows from ends[-1] on undefined: (S, F)."""
    y_SF = F.grouped_mm(x_SD.contiguous(), w_EDF, offs=ends_E)
    tail_S = torch.arange(len(y_SF), device=ends_E.device) >= ends_E[-1]
    return y_SF.masked_fill_(tail_S[:, None], 0)


def _kernel_outer(x_SD: Tensor, y_SF: Tensor, ends_E: Tensor) -> Tensor:
    """The weights' gradient by torch's kernel: (E, D, F).

    An expert without rows gets anything from it on some GPUs (pytorch issue 172439).
    """
    w_EDF = F.grouped_mm(x_SD.contiguous().T, y_SF.contiguous(), offs=ends_E)
    empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
    return w_EDF.masked_fill_(empty_E[:, None, None], 0)


@_grouped_matmul.register_fake
def _(x_SD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    return x_SD.new_empty(x_SD.shape[0], w_EDF.shape[2])


@_grouped_outer.register_fake
def _(x_SD: Tensor, y_SF: Tensor, ends_E: Tensor) -> Tensor:
    return x_SD.new_empty(ends_E.shape[0], x_SD.shape[1], y_SF.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x_SD, w_EDF, ends_E = inputs
    needs_x, needs_w = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x_SD if needs_w else None, w_EDF if needs_x else None, ends_E)


def _backward(ctx: Any, grad_SF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_SD, w_EDF, ends_E = ctx.saved_tensors
    dx_SD = None if w_EDF is None else _grouped_matmul(grad_SF, w_EDF.mT, ends_E)
    dw_EDF = None if x_SD is None else _grouped_outer(x_SD, grad_SF, ends_E)
    return dx_SD, dw_EDF, None


_grouped_matmul.register_autograd(_backward, setup_context=_keep)


@register_flop_formula([torch.ops.moma.grouped_matmul, torch.ops.moma.grouped_outer])
def _grouped_flops(x_shape: Any, other_shape: Any, *_: Any, **__: Any) -> int:
    """2 S D F: all S slots count, a bound, because how many are filled is known on the device only."""
    return 2 * x_shape[0] * x_shape[1] * other_shape[-1]


@torch.library.custom_op("moma::after", mutates_args=())
def _after(x: Tensor, gradient: Tensor) -> Tensor:
    """A copy of x that cannot exist before `gradient`: what depends on it is computed in the backward pass, also where
    a compiler sees both passes and would rather keep the result of the same sum in the forward pass."""
    return x.clone()


@_after.register_fake
def _(x: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(x)


class Experts(nn.Module):
    """E SwiGLU experts of equal size as two stacked weights; a dense feed-forward is E = 1."""

    def __init__(self, n_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.n_experts, self.dim, self.hidden_dim = n_experts, dim, hidden_dim
        self.w13 = nn.Parameter(torch.empty(n_experts, dim, 2 * hidden_dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D): every row through the only expert."""
        return _compute(x_TD, None, None, [(self, None, None, len(x_TD))])


def run(groups: Iterable[Experts], x_TD: Tensor, slots: Iterable[Slots]) -> Tensor:
    """(T, D) -> (T, D): the sum of each token's slots of all groups, an exact zero for a token that has none."""
    slots, start, maps = list(slots), 0, []
    for own in slots:
        maps.append(own.slots_TC if start == 0 else torch.where(own.slots_TC >= 0, own.slots_TC + start, -1))
        start += len(own.token_S)
    parts = [(g, own.gate_S, own.ends_E, len(own.token_S)) for g, own in zip(groups, slots, strict=True)]
    token_S = slots[0].token_S if len(slots) == 1 else torch.cat([own.token_S for own in slots])
    return _compute(x_TD, token_S, maps[0] if len(maps) == 1 else torch.cat(maps, 1), parts)


def _compute(
    x_TD: Tensor,
    token_S: Tensor | None,
    slots_TC: Tensor | None,
    parts: list[tuple[Experts, Tensor | None, Tensor | None, int]],
) -> Tensor:
    tensors: list[Tensor | None] = []
    for experts, gate_S, ends_E, _ in parts:
        tensors += [autocast(experts.w13), autocast(experts.w2), gate_S, ends_E]
    sizes = tuple(size for *_, size in parts)
    low_TD = autocast(x_TD)
    with full_precision(x_TD):  # everything has the type it is to be multiplied in
        out: Any = _SwiGLU.apply(low_TD, token_S, slots_TC, sizes, *tensors)
    return out


class _SwiGLU(torch.autograd.Function):
    """Groups of experts over their slots, from tokens to tokens; without a map, every token is a slot.

    Keeps the tokens, the results of the first multiplication and the gates. The gathered tokens and the activations
    are made again in the backward pass: a sparse layer keeps what a dense one does. Tensors per group: w13, w2, gate
    of each slot or None, ends of the ragged form or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        token_S: Tensor | None,
        slots_TC: Tensor | None,
        sizes: tuple[int, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        x_SD = x_TD if token_S is None else gather_sum(x_TD, token_S[:, None])
        hidden, results = [], []
        for x, w13, w2, gate, ends in _by_group(x_SD, sizes, tensors):
            h_SF = _times(x, w13, ends)
            results.append(_times(_gated(h_SF, gate), w2, ends))
            hidden.append(h_SF)
        ctx.sizes = sizes
        ctx.save_for_backward(x_TD, token_S, slots_TC, *hidden, *tensors)
        y_SD = results[0] if len(results) == 1 else torch.cat(results)
        return y_SD if slots_TC is None else gather_sum(y_SD, slots_TC)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TD,) = grads
        x_TD, token_S, slots_TC, *rest = ctx.saved_tensors
        hidden, tensors = rest[: len(ctx.sizes)], rest[len(ctx.sizes) :]
        one: Tensor | None = None
        if torch.compiler.is_compiling():
            one = torch.ops.moma.after(x_TD.new_ones(()), dy_TD)
        dy_SD, x_SD = dy_TD, x_TD
        if token_S is not None:
            dy_SD = gather_sum(dy_TD, token_S[:, None])
            if one is not None:
                token_S = torch.ops.moma.after(token_S, dy_TD)
            x_SD = gather_sum(x_TD, token_S[:, None])
        needs = ctx.needs_input_grad
        dx, found = [], []
        groups = zip(_by_group(x_SD, ctx.sizes, tensors), dy_SD.split(ctx.sizes), hidden, strict=True)
        for g, ((x, w13, w2, gate, ends), dy, h) in enumerate(groups):
            needs_w13, needs_w2 = needs[4 + 4 * g : 6 + 4 * g]
            a, dh, dgate = _gated_backward(h, gate, _times(dy, w2.mT, ends), one)
            dw2 = _outer(a, dy, len(w2), ends) if needs_w2 else None
            dw13 = _outer(x, dh, len(w13), ends) if needs_w13 else None
            found += [dw13, dw2, dgate, None]
            if needs[0]:
                dx.append(_times(dh, w13.mT, ends))
        dx_TD: Tensor | None = None
        if dx:
            dx_TD = dx[0] if len(dx) == 1 else torch.cat(dx)
            dx_TD = dx_TD if slots_TC is None else gather_sum(dx_TD, slots_TC)
        return dx_TD, None, None, None, *found


def _by_group(
    x_SD: Tensor, sizes: tuple[int, ...], tensors: Sequence[Tensor | None]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Rows, w13, w2, gate and ends of each group."""
    for g, rows in enumerate(x_SD.split(sizes)):
        w13, w2, gate, ends = tensors[4 * g : 4 * g + 4]
        assert w13 is not None and w2 is not None
        yield rows, w13, w2, gate, ends


def _times(x_SD: Tensor, w_EDF: Tensor, ends_E: Tensor | None) -> Tensor:
    """Every slot times the matrix of its expert: (S, F)."""
    if ends_E is not None:
        return grouped_matmul(x_SD, w_EDF, ends_E)
    if len(w_EDF) == 1:  # the dense twin's own kernel
        return x_SD @ w_EDF[0]
    return torch.bmm(x_SD.view(len(w_EDF), -1, x_SD.shape[1]), w_EDF).flatten(0, 1)


def _outer(x_SD: Tensor, y_SF: Tensor, n_experts: int, ends_E: Tensor | None) -> Tensor:
    """The gradient of the matrices: x^T y over each expert's slots, (E, D, F)."""
    if ends_E is not None:
        return torch.ops.moma.grouped_outer(x_SD, y_SF, ends_E.to(torch.int32))
    if n_experts == 1:
        return (x_SD.T @ y_SF)[None]
    return torch.bmm(x_SD.view(n_experts, -1, x_SD.shape[1]).mT, y_SF.view(n_experts, -1, y_SF.shape[1]))


def _gated(h_SF: Tensor, gate_S: Tensor | None) -> Tensor:
    """g silu(h1) h3 for h = [h1, h3], in the type of h."""
    h1, h3 = h_SF.chunk(2, dim=-1)
    activation = F.silu(h1).mul_(h3)
    return activation if gate_S is None else activation.mul_(gate_S[:, None])


def _gated_backward(
    h_SF: Tensor, gate_S: Tensor | None, da_SF: Tensor, one: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activation again, and the gradients of h and of the gate, from that of the activation.

    `one`: 1, where the activation must not be the same term as in the forward pass.
    """
    h1, h3 = h_SF.chunk(2, dim=-1)
    silu = F.silu(h1) if one is None else F.silu(h1) * one
    a_SF, dgate_S = silu * h3, None
    if gate_S is not None:
        wide = torch.promote_types(da_SF.dtype, torch.float32)
        dgate_S = (da_SF.to(wide) * a_SF).sum(1).to(gate_S.dtype)
        a_SF, da_SF = a_SF.mul_(gate_S[:, None]), da_SF.mul_(gate_S[:, None])
    if one is not None:
        dh_SF = torch.cat([torch.ops.aten.silu_backward(da_SF * h3, h1), da_SF * silu], 1)
    else:  # written in place: two passes less
        dh_SF = torch.empty_like(h_SF)
        dh1, dh3 = dh_SF.chunk(2, dim=-1)
        torch.mul(da_SF, silu, out=dh3)
        torch.ops.aten.silu_backward.grad_input(da_SF.mul_(h3), h1, grad_input=dh1)
    return a_SF, dh_SF, dgate_S
