"""Milliseconds and bytes per parameter of an optimizer step, and the compiled update against the eager one.

python speed.py [DEVICE] [PARAMETERS]      cuda 4e8 on a GPU; cpu 4e6 is a dry run
"""

import sys
import time

import torch
from torch import nn

from moma.optim import OptimConfig, ReducedAdamW, _update_, build_optimizer, step_

device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
numbers, tensors, rounds = int(float(sys.argv[2] if len(sys.argv) > 2 else 4e8)), 40, 12


def clock() -> float:
    """Seconds, once the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


no = torch.zeros((), dtype=torch.bool, device=device)
for state_dtype, grad_dtype, moved in (("fp32", "fp32", 28), ("bf16", "fp32", 20), ("bf16", "bf16", 18)):
    torch.manual_seed(0)
    named = [(f"w{i}", nn.Parameter(torch.randn(8, numbers // tensors // 8, device=device))) for i in range(tensors)]
    optimizer = build_optimizer(named, OptimConfig(state_dtype=state_dtype, grad_dtype=grad_dtype))  # type: ignore[arg-type]
    for _, p in named:
        p.grad = torch.randn_like(p).to(p.grad_dtype)
    laps = []
    for _ in range(rounds):
        begin = clock()
        step_(optimizer, no)
        queued = time.perf_counter() - begin
        laps.append((clock() - begin, queued))
    took, queued = min(laps[2:])
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    held += sum(p.nbytes + p.grad.nbytes for _, p in named if p.grad is not None)
    name = f"{type(optimizer).__name__:12} moments {state_dtype} gradients {grad_dtype}"
    print(
        f"{name}: {took * 1e3:.2f} ms, {queued * 1e3:.2f} of them to queue it, {held / numbers:.1f} B held and "
        f"{moved} B moved per parameter, {moved * numbers / took / 1e9:.0f} GB/s"
    )
    if isinstance(optimizer, ReducedAdamW):  # one more step, and the same by the eager function
        p = named[0][1]
        state = optimizer.state[p]
        before = [t.detach().clone().view(-1) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]  # type: ignore[union-attr]
        lr, t = optimizer.param_groups[0]["lr"], rounds + 1
        scalars = [torch.tensor(x, device=device) for x in (1 - lr * 0.1, lr / (1 - 0.9**t), (1 - 0.95**t) ** 0.5)]
        step_(optimizer, no)
        with torch.no_grad():
            _update_(*before, no, *scalars, 0.9, 0.95, 1e-8)
        torch.testing.assert_close(p.detach().view(-1), before[0], rtol=1e-5, atol=1e-8)
        for key, wanted in (("exp_avg", before[2]), ("exp_avg_sq", before[3])):
            torch.testing.assert_close(state[key].view(-1), wanted, rtol=2**-7, atol=1e-12)
    del optimizer, named
