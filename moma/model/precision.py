"""Where autocast must not reach: router scores, norms and losses are computed in at least fp32."""

import contextlib
from typing import Any

import torch
from torch import Tensor


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off for the device of `x` (the meta device has none to switch off)."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def wants_full_precision(name: str) -> bool:
    """Whether the parameter of this name is read in at least fp32: norms, routers, auxiliary routers."""
    return "norm" in name or "router" in name or ".aux." in name


def autocast(x: Tensor) -> Tensor:
    """What autocast does to the operands of a matmul: it leaves float64 alone, and the meta device has none."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
