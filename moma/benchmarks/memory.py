"""Memory of one repetition: exact numbers that do not depend on the load of a machine.

peak extra bytes   the most that is allocated at once beyond what was there before, results included
saved bytes        what a forward keeps for its backward: distinct storages, parameters left out
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most that one call has allocated at once, temporaries inside of operators included.

    On the CPU the sum over torch's own record of every allocation, so that the same call gives the same number. What
    a library allocates for itself (packed matrices of a matmul) is not in it. Not while a profiler is running.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    record: Any = recorded.profiler  # no public way leads to the single allocations
    events = record.kineto_results.events()
    changes = sorted((e.start_ns(), place, e.nbytes()) for place, e in enumerate(events) if e.name() == "[memory]")
    held = most = 0
    for _, _, size in changes:
        held += size
        most = max(most, held)
    return most


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that `forward` saves for backward, but those of `parameters`."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()  # held until here: a freed storage's place may be taken by another
    del out
    return sum(sizes.values())
