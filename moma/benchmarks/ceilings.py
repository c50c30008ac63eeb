"""What the machine does at best, measured in the same run: the ceilings that rates are a share of.

    gemm        FLOP/s of a square matmul in the compute type              2 n^3 / seconds
    gemm_layer  the same at the shape of the layer's first matrix          2 T d 2f / seconds
    read        bytes/s of summing a large fp32 buffer on the CPU          buffer / seconds
    copy        bytes/s of copying one, read and written counted           2 buffers / seconds

The best of a few repetitions: a ceiling is not a mean.
"""

from collections.abc import Callable
from typing import Any

import torch

from moma.benchmarks.timing import stopwatch

REPETITIONS = 5


def measure_ceilings(
    device: torch.device,
    dtype: torch.dtype,
    layer: tuple[int, int, int] | None = None,
    side: int | None = None,
    n_bytes: int | None = None,
) -> dict[str, float]:
    """The ceilings by name. `layer`: (m, k, n) of its matmul; `side` and `n_bytes` replace the sizes of a device:
    2,048 and 512 MB on a CPU, 8,192 and 4 GiB on a GPU."""
    cuda = device.type == "cuda"
    side = side or (8192 if cuda else 2048)
    n_bytes = n_bytes or (2**32 if cuda else 512 * 10**6)
    found = {"gemm": _gemm((side, side, side), dtype, device)}
    if layer is not None:
        found["gemm_layer"] = _gemm(layer, dtype, device)
    source = torch.ones(n_bytes // 4, device=device)
    found["read"] = n_bytes / _best(source.sum, device)
    target = torch.empty_like(source)
    found["copy"] = 2 * n_bytes / _best(lambda: target.copy_(source), device)
    return found


def _gemm(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    m, k, n = shape
    # zeros would let a GPU draw less power, and clock higher, than real numbers do
    x, w = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=dtype, device=device)
    return 2.0 * m * k * n / _best(lambda: torch.mm(x, w, out=out), device)


def _best(run: Callable[[], Any], device: torch.device) -> float:
    timed = stopwatch(device)
    run()
    return min(timed(run) for _ in range(REPETITIONS))
