"""What gradients lose when those of k micro-batches are added in bf16, as shares of the exact sum's norm: sums.py"""

import torch


def lost(k: int, shared: float, numbers: int = 2**16) -> float:
    """Relative L2 error; `shared`: the part of the gradients' variance that all micro-batches have in common."""
    generator = torch.Generator().manual_seed(k)
    common = shared**0.5 * torch.randn(numbers, generator=generator)
    exact, low = torch.zeros(numbers, dtype=torch.float64), torch.zeros(numbers, dtype=torch.bfloat16)
    for _ in range(k):
        grad = (common + (1 - shared) ** 0.5 * torch.randn(numbers, generator=generator)).bfloat16()
        exact += grad.double()
        low += grad
    return ((low.double() - exact).norm() / exact.norm()).item()


for k in (1, 2, 4, 8, 64, 512):
    print(f"{k:4} micro-batches: " + ", ".join(f"{s:.0%} in common {lost(k, s):.2%}" for s in (0.0, 0.1, 1.0)))
