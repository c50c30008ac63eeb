"""The Triton kernels against loops in float64: in Triton's interpreter on a CPU, compiled on a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from moma.model import kernels, slots

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which comes with CUDA builds of torch"
)


def looped(x_ID, index_OC):
    out_OD = torch.zeros(len(index_OC), x_ID.shape[1], dtype=torch.float64)
    for o, row in enumerate(index_OC.tolist()):
        for i in row:
            if i >= 0:
                out_OD[o] += x_ID[i].double()
    return out_OD


def check_everything(device):
    """Shapes around the edges of the tiles, missing rows, all dtypes, rows that are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    # the interpreter cuts fp32 off to bf16, where everything else rounds
    cut = device == "cpu"
    tolerances = {torch.float32: 1e-6, torch.bfloat16: 2**-7 if cut else 2**-8, torch.float16: 2**-11}
    shapes = [
        *((7, 5, c, 24) for c in range(1, 9)),
        *((0, 4, 2, 8), (4, 0, 2, 8), (3, 9, 0, 8), (3, 2, 2, 0)),
        *((40, 70, 4, d) for d in (1, 33, 130, 1000, 4100)),
        (5, 300, 16, 16),
    ]
    for place, (n_in, n_out, columns, dim) in enumerate(shapes):
        dtype = list(tolerances)[place % 3]
        x = torch.randn(n_in, dim + 3, generator=generator).to(dtype)[:, 3:]
        index = torch.randint(-1, max(n_in, 1), (columns, n_out), generator=generator).T
        if not n_in or place % 4 == 3:
            index = torch.full_like(index, -1)
        index = index if place % 2 else index.to(torch.int32)
        got = kernels.gather_sum_fast(x.to(device), index.to(device)).cpu()
        assert got.dtype == dtype and got.shape == (n_out, dim)
        torch.testing.assert_close(got.double(), looped(x, index), rtol=tolerances[dtype], atol=1e-6)
        if not (cut and dtype == torch.bfloat16):
            assert torch.equal(got, slots.gather_sum(x, index.to(torch.int64)))  # the bits of the plain form
    x, index = x.to(device), index.to(device)
    torch.library.opcheck(torch.ops.moma.gather_sum, (x, index))
    print("checked", len(shapes))


@needs_triton
def test_gather_sum_in_the_interpreter():
    # the mode is read when the kernels are defined
    found = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert found.returncode == 0 and "checked 18" in found.stdout, found.stderr


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gather_sum_on_a_gpu():
    check_everything("cuda")
    x = torch.randn(1000, 512, device="cuda", dtype=torch.bfloat16)
    index = torch.zeros(3, 2, dtype=torch.int64, device="cuda")
    assert kernels.usable(x, index) and not kernels.usable(x.double(), index)
    compiled = torch.compile(lambda x: x + 1 if kernels.usable(x, index) else x - 1, fullgraph=True)
    assert torch.equal(compiled(x), x + 1 if kernels.UNDER_COMPILE else x - 1)


def test_a_cpu_keeps_the_plain_form():
    assert not kernels.usable(torch.zeros(2, 8), torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype, columns", [(torch.float64, 2), (torch.float32, 17)])
def test_what_the_kernel_cannot_do_is_refused(dtype, columns):
    index = torch.zeros(3, columns, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got .*need one of torch.float32.*at most 16: use moma.model.slots"):
        kernels.gather_sum_fast(torch.zeros(2, 8, dtype=dtype), index)


if __name__ == "__main__":
    check_everything("cpu")
