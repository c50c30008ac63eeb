"""Stacked SwiGLU experts over their slots. Knows no routing.

    y = W2 ( g * silu(x W1) * (x W3) )        weights (E, in, out), W1 and W3 fused: one multiplication each

All groups of a layer go together: one gather, a batched (or grouped) matmul per group, one gather-sum. FLOPs are those
of a dense feed-forward over the filled slots. Bytes beside the matmuls: every row of x and y is read and written once,
and the activation passes are those of a dense feed-forward.

Legend: T tokens, E experts of a group, K slots per expert, S slots of all groups, D dim, F hidden width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moma.model.grouped_matmul import grouped_matmul, grouped_outer
from moma.model.precision import autocast, full_precision
from moma.model.slots import Slots, gather_sum, in_inference

PART = 64  # rows


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


def run(groups: Sequence[tuple[Experts, Slots]], x_TD: Tensor) -> Tensor:
    """(T, D) -> (T, D): the sum of each token's slots of all groups, an exact zero for a token that has none."""
    if not groups:
        return torch.zeros_like(autocast(x_TD))
    start, maps = 0, []
    for _, own in groups:
        maps.append(own.slots_TC if start == 0 else torch.where(own.slots_TC >= 0, own.slots_TC + start, -1))
        start += len(own.token_S)
    parts = [(experts, own.gate_S, own.ends_E, len(own.token_S)) for experts, own in groups]
    token_S = groups[0][1].token_S if len(groups) == 1 else torch.cat([own.token_S for _, own in groups])
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
        if in_inference():  # nothing to keep, for which a decoded token would pay
            return _forward(low_TD, token_S, slots_TC, sizes, tensors)[0]
        out: Any = _SwiGLU.apply(low_TD, token_S, slots_TC, sizes, *tensors)
    return out


def _forward(
    x_TD: Tensor,
    token_S: Tensor | None,
    slots_TC: Tensor | None,
    sizes: tuple[int, ...],
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor]]:
    """(T, D) -> (T, D), and the result of each group's first multiplication."""
    x_SD = x_TD if token_S is None else gather_sum(x_TD, token_S[:, None])
    hidden, results = [], []
    for x, w13, w2, gate, ends in _by_group(x_SD, sizes, tensors):
        h_SF = _times(x, w13, ends)
        results.append(_times(_gated(h_SF, gate), w2, ends))
        hidden.append(h_SF)
    y_SD = results[0] if len(results) == 1 else torch.cat(results)
    return y_SD if slots_TC is None else gather_sum(y_SD, slots_TC), hidden


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
        y_TD, hidden = _forward(x_TD, token_S, slots_TC, sizes, tensors)
        ctx.sizes = sizes
        ctx.save_for_backward(x_TD, token_S, slots_TC, *hidden, *tensors)
        return y_TD

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
        return grouped_outer(x_SD, y_SF, ends_E)
    if n_experts == 1:
        return (x_SD.T @ y_SF)[None]
    return torch.bmm(x_SD.view(n_experts, -1, x_SD.shape[1]).mT, y_SF.view(n_experts, -1, y_SF.shape[1]))


def _gated(h_SF: Tensor, gate_S: Tensor | None) -> Tensor:
    """g silu(h1) h3 for h = [h1, h3], in the type of h."""
    if not _in_parts(h_SF):
        return _gate_rows(h_SF, gate_S).to(h_SF.dtype)
    a_SF = h_SF.new_empty(h_SF.shape[0], h_SF.shape[1] // 2)
    for rows in _parts(len(h_SF)):
        a_SF[rows] = _gate_rows(h_SF[rows], None if gate_S is None else gate_S[rows])
    return a_SF


def _gate_rows(h_SF: Tensor, gate_S: Tensor | None) -> Tensor:
    h1, h3 = _wide(h_SF).chunk(2, dim=-1)
    a_SF = F.silu(h1).mul_(h3)
    return a_SF if gate_S is None else a_SF.mul_(gate_S[:, None])


def _gated_backward(
    h_SF: Tensor, gate_S: Tensor | None, da_SF: Tensor, one: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activation again, and the gradients of h and of the gate, from that of the activation.

    `one`: 1, where the activation must not be the same term as in the forward pass.
    """
    if not _in_parts(h_SF):
        a, dh1, dh3, dgate = _gate_rows_backward(h_SF, gate_S, da_SF, one)
        dh_SF = torch.cat([dh1.to(h_SF.dtype), dh3.to(h_SF.dtype)], 1)  # a compiler would write it in fp32 first
        return a.to(h_SF.dtype), dh_SF, dgate
    a_SF, dh_SF = torch.empty_like(da_SF), torch.empty_like(h_SF)
    dgate_S = None if gate_S is None else torch.empty_like(gate_S)
    dh1_SF, dh3_SF = dh_SF.chunk(2, dim=-1)
    for rows in _parts(len(h_SF)):
        gate = None if gate_S is None else gate_S[rows]
        a_SF[rows], dh1_SF[rows], dh3_SF[rows], dgate = _gate_rows_backward(h_SF[rows], gate, da_SF[rows], None)
        if dgate_S is not None and dgate is not None:
            dgate_S[rows] = dgate
    return a_SF, dh_SF, dgate_S


def _gate_rows_backward(
    h_SF: Tensor, gate_S: Tensor | None, da_SF: Tensor, one: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    h1, h3 = _wide(h_SF).chunk(2, dim=-1)
    silu = F.silu(h1) if one is None else F.silu(h1) * one
    a_SF, da_SF, dgate_S = silu * h3, _wide(da_SF), None
    if gate_S is not None:
        dgate_S = (da_SF * a_SF).sum(1).to(gate_S.dtype)
        a_SF, da_SF = a_SF.mul_(gate_S[:, None]), da_SF * gate_S[:, None]
    return a_SF, torch.ops.aten.silu_backward(da_SF * h3, h1), silu.mul_(da_SF), dgate_S


def _wide(x: Tensor) -> Tensor:
    """In at least fp32, so that what is in between is not rounded, and kernels of one type are called: those for mixed
    types are slow on a CPU."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _in_parts(h_SF: Tensor) -> bool:
    """Whether rows are taken a few at a time, so that what is in between stays in a CPU's caches; a compiler makes one
    pass of it by itself."""
    return h_SF.device.type == "cpu" and not torch.compiler.is_compiling() and len(h_SF) > PART


def _parts(n_rows: int) -> Iterator[slice]:
    return (slice(start, start + PART) for start in range(0, n_rows, PART))
