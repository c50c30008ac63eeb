"""Triton kernels for GPUs: the gather-sum of `slots.py` in one pass over memory.

    out[o] = sum over c of x[index[o, c]]           an index of -1 adds nothing

Bytes moved, for rows of D numbers of b bytes:      O D b (written)  +  the rows that are there D b  +  O C i (indices)

A row that is missing is not loaded. The plain form in eager mode moves 4 (C = 1) to 9 C + 1 times O D b. Inductor makes
one kernel of it too, together with what stands around it (a cast, the residual, a norm), so that the sum itself may
never be written; it reads row 0, from a cache, where a row is missing. A kernel of ours is a border in the middle of
that, hence `UNDER_COMPILE`. The SwiGLU with its gate is left to Inductor for the same reason: one kernel forward, one
backward, the sum that is the gate's gradient included.

Sums are in fp32, in the order of the columns, without atomics: the same bits every time, those of the plain form.
Offsets are 64 bits wide.

Triton comes with CUDA builds of torch; `TRITON_INTERPRET=1` runs the kernels on a CPU, for tests.
"""
# Triton is not there where types are checked, and its kernels are not typed.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportOptionalMemberAccess=false
# ruff: noqa: ANN001

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without
    triton = tl = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLUMNS = 16  # the loop over them is unrolled
TILE = 4096  # numbers of one program: 32 a thread, four 16-byte loads under way per column in bf16
WARPS = 4
UNDER_COMPILE = False  # whether compiled blocks take the kernel too: see above

if triton is not None:

    @triton.jit
    def _gather_sum(
        out_OD, x_ID, index_OC, n_out, dim, x_stride, index_stride, column_stride,
        COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        o = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for c in tl.static_range(COLUMNS):
            source = tl.load(index_OC + o * index_stride + c * column_stride, mask=o < n_out, other=-1).to(tl.int64)
            there = (source >= 0)[:, None] & (d < dim)[None, :]
            total += tl.load(x_ID + source[:, None] * x_stride + d[None, :], mask=there, other=0).to(tl.float32)
        inside = (o < n_out)[:, None] & (d < dim)[None, :]
        tl.store(out_OD + o[:, None] * dim + d[None, :], total.to(out_OD.dtype.element_ty), mask=inside)


def usable(x_ID: Tensor, index_OC: Tensor) -> bool:
    """Whether `gather_sum_fast` takes these, and is the better way: on a GPU, outside of compiled graphs."""
    wanted = UNDER_COMPILE or not torch.compiler.is_compiling()
    return triton is not None and x_ID.is_cuda and _takes(x_ID, index_OC) and wanted


def gather_sum_fast(x_ID: Tensor, index_OC: Tensor) -> Tensor:
    """out[o] = sum over c of x[index[o, c]], an index of -1 adding nothing: (O, D), dtype of x.

    `index_OC` is int32 or int64 with at most 16 columns. Sums in fp32. No gradient of its own: `slots.GatherSum` has
    it. Raises ValueError for another dtype or more columns.
    """
    if not _takes(x_ID, index_OC):
        raise ValueError(
            f"got {x_ID.dtype} and {index_OC.shape[1]} columns, need one of {', '.join(map(str, DTYPES))} and at most "
            f"{MAX_COLUMNS}: use moma.model.slots.gather_sum"
        )
    return _op(x_ID, index_OC)


def _takes(x_ID: Tensor, index_OC: Tensor) -> bool:
    return x_ID.dtype in DTYPES and index_OC.shape[1] <= MAX_COLUMNS


@torch.library.custom_op("moma::gather_sum", mutates_args=())
def _op(x_ID: Tensor, index_OC: Tensor) -> Tensor:
    (n_out, columns), dim = index_OC.shape, x_ID.shape[1]
    if not (n_out and columns and dim):
        return x_ID.new_zeros(n_out, dim)
    x_ID = x_ID if x_ID.stride(1) == 1 else x_ID.contiguous()
    out_OD = x_ID.new_empty(n_out, dim)
    width = min(triton.next_power_of_2(dim), TILE)
    rows = TILE // width
    grid = (triton.cdiv(n_out, rows), triton.cdiv(dim, width))
    _gather_sum[grid](
        out_OD, x_ID, index_OC, n_out, dim, x_ID.stride(0), *index_OC.stride(),
        COLUMNS=columns, ROWS=rows, WIDTH=width, num_warps=WARPS,
    )  # fmt: skip
    return out_OD


@_op.register_fake
def _(x_ID: Tensor, index_OC: Tensor) -> Tensor:
    return x_ID.new_empty(index_OC.shape[0], x_ID.shape[1])
