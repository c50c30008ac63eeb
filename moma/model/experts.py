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

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


def gather_sum(x_ID: Tensor, index_OC: Tensor) -> Tensor:
    """out[o] = sum over c of x[index[o, c]], an index of -1 adding nothing; sums in at least fp32. (O, D)."""
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
    return _grouped_matmul(_autocast(x_SD), _autocast(w_EDF), ends_E.to(torch.int32))  # what the kernel takes


def _autocast(x: Tensor) -> Tensor:
    """What autocast does to the operands of a matmul: it leaves float64 alone, and the meta device has none."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


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


class Experts(nn.Module):
    """E SwiGLU experts of equal size as two stacked weights; a dense feed-forward is E = 1."""

    def __init__(self, n_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.n_experts, self.dim, self.hidden_dim = n_experts, dim, hidden_dim
        self.w13 = nn.Parameter(torch.empty(n_experts, dim, 2 * hidden_dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))

    def forward(self, x_EKD: Tensor, gate_EK: Tensor | None = None) -> Tensor:
        """(E, K, D) -> (E, K, D), each row scaled by its gate (folded into the activation)."""
        if self.n_experts == 1:  # a plain matmul: the same numbers, and the dense twin's own kernel
            gate_K = None if gate_EK is None else gate_EK[0]
            return (_gated(x_EKD[0] @ self.w13[0], gate_K) @ self.w2[0])[None]
        return torch.bmm(_gated(torch.bmm(x_EKD, self.w13), gate_EK), self.w2)

    def run(self, x_TD: Tensor, slots: Slots) -> Tensor:
        """(T, D) -> (T, D): the sum of each token's slots, an exact zero for a token that has none."""
        token_S, gate_S, slots_TC, ends_E = slots
        x_SD = dispatch(x_TD, token_S, slots_TC)
        if ends_E is None:
            shape_EK = (self.n_experts, len(token_S) // self.n_experts)
            gate_EK = None if gate_S is None else gate_S.view(shape_EK)
            y_SD = self(x_SD.view(*shape_EK, self.dim), gate_EK).flatten(0, 1)
        else:
            activation_SF = _gated(grouped_matmul(x_SD, self.w13, ends_E), gate_S)
            y_SD = grouped_matmul(activation_SF, self.w2, ends_E)
        return combine(y_SD, slots_TC, token_S)


def _gated(h: Tensor, gate: Tensor | None) -> Tensor:
    h1, h3 = h.chunk(2, dim=-1)
    activation = F.silu(h1) * h3
    return activation if gate is None else (activation * gate[..., None]).to(h.dtype)
