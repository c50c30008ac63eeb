"""Matmul of rows that belong to different experts, in differing numbers: the ragged form of `slots.py`.

Nobody multiplies the empty tail: the CPU reads the ends and takes one matmul per expert, a GPU of compute capability
9.0 or more leaves them where they are (bf16), and other GPUs or dtypes pay a synchronisation for them.

Legend: E experts, S rows of all experts, D and F columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moma.model.precision import autocast
from moma.model.slots import in_inference


def grouped_matmul(x_SD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows [ends[e-1], ends[e]) of x times w[e], exact zeros from ends[-1] on: (S, F). `ends_E` is int, ascending.

    Differentiable once, deterministic, casts under autocast as `bmm` does. bf16 on CUDA takes torch's `grouped_mm`
    (D and F multiples of 8; needs no host synchronisation from compute capability 9.0 on); everything else takes one
    matmul per expert, for which the ends are read on the host.
    """
    # decoding calls it often with a row or two, for which an operator of its own costs more than the matmul
    multiply = _multiply if in_inference() else _grouped_matmul
    return multiply(autocast(x_SD), autocast(w_EDF), ends_E.to(torch.int32))  # what the kernel takes


def grouped_outer(x_SD: Tensor, y_SF: Tensor, ends_E: Tensor) -> Tensor:
    """x^T y over each expert's rows, exact zeros for an expert without any: (E, D, F). Not differentiable."""
    return _grouped_outer(x_SD, y_SF, ends_E.to(torch.int32))


def _multiply(x_SD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    if _has_kernel(x_SD, w_EDF.shape[2]):
        return _kernel_matmul(x_SD, w_EDF, ends_E)
    ends = ends_E.tolist()
    y_SF = x_SD.new_empty(x_SD.shape[0], w_EDF.shape[2])
    *own, tail_SF = y_SF.tensor_split(ends)
    for x_ND, w_DF, y_NF in zip(x_SD.tensor_split(ends)[:-1], w_EDF, own, strict=True):
        if len(x_ND):
            torch.mm(x_ND, w_DF, out=y_NF)
    tail_SF.zero_()
    return y_SF


_grouped_matmul = torch.library.custom_op("moma::grouped_matmul", _multiply, mutates_args=())


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
