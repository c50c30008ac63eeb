r"""AdamW with Chameleon's settings (arXiv 2405.09818, section 2.3), schedules as pure functions, clipping.

    lr                  warm-up    lr * (step + 1) / warmup: never 0
    |  /--\             linear     lr -> end_lr, u = (step - warmup) / (total - warmup) runs from 0 to 1
    | /    \            cosine     lr -> end_lr, along (1 + cos(pi u)) / 2
    |/      \_ end_lr   wsd        lr until the last `decay` steps, then linear
    +---------- step    constant   lr

The learning rate is a function of the step alone: nothing to checkpoint, and a longer horizon is a new
argument. Which rate a step gets is written into the optimizer's groups by the loop (`set_learning_rate`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moma.distributed import whole
from moma.meter import Duration


@dataclass(frozen=True)
class OptimConfig:
    """Rates as in MoMa's Table 5, the rest as in Chameleon's section 2.3. `decay` is read by wsd alone."""

    lr: float = 1e-4
    end_lr: float = 1e-6
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    warmup: Duration = Duration(steps=4000)
    decay: Duration = Duration(percent=20)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.end_lr <= self.lr:
            raise ValueError(f"got lr={self.lr} and end_lr={self.end_lr}, need 0 <= end_lr <= lr: change one")
        if self.clip_norm <= 0 or self.eps <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"got clip_norm={self.clip_norm}, eps={self.eps}, weight_decay={self.weight_decay}, need "
                f"clip_norm > 0, eps > 0, weight_decay >= 0: clip_norm=1e9 turns clipping off"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"got betas={self.betas}, need both in [0, 1): change them")


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in optimizer groups: decayed and not, shared out among processes and not.

    Matrices decay: everything of two or more dimensions, so stacked experts, routers and embeddings too.
    Biases and norms do not, and a norm is known by its name, since QK-norm weights per head are
    two-dimensional. Raises ValueError when nothing is trainable.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and "norm" not in name
            groups.setdefault((not decays, isinstance(parameter, DTensor)), []).append(parameter)
    if not groups:
        raise ValueError("got a model without trainable parameters, need at least one: check what is frozen")
    return [{"params": groups[key], "weight_decay": 0.0 if key[0] else config.weight_decay} for key in sorted(groups)]


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`; build it once the model is sharded and on its device."""
    groups = parameter_groups(named_parameters, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(
    step: int,
    total_steps: int,
    config: OptimConfig,
    tokens_per_step: int | None = None,
    flops_per_token: float | None = None,
) -> float:
    """Learning rate of the optimizer step with this number, counted from 0.

    The last two arguments are needed only where warm-up or decay are given in tokens or FLOPs. Steps past
    `total_steps` get `end_lr` (constant: `lr`). Raises ValueError when warm-up and decay overlap.
    """
    units = (tokens_per_step, flops_per_token, total_steps)
    warmup = config.warmup.to_steps(*units)
    decay = config.decay.to_steps(*units) if config.schedule == "wsd" else max(0, total_steps - warmup)
    if warmup + decay > total_steps:
        raise ValueError(
            f"got a warm-up of {warmup} and a decay of {decay} steps, need at most {total_steps} together: "
            f"shorten optim.warmup or optim.decay, or train longer"
        )
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant" or step < total_steps - decay:
        return config.lr
    if step >= total_steps:
        return config.end_lr
    u = 1 - (total_steps - step) / decay
    share = (1 + cos(pi * u)) / 2 if config.schedule == "cosine" else 1 - u
    return share * config.lr + (1 - share) * config.end_lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in every group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def step_(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """One optimizer step, or none where the scalar `skip` is true: parameters, moments and counters stay to the last
    bit. Decided on the device, so that the host need not wait."""
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # read by the fused kernel
    optimizer.step()


def clip_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a global L2 norm of at most `max_norm`; returns the norm before, fp32
    scalar.

    The result stays on the device: nothing waits for it until it is logged. Sharded gradients give the norm
    over all ranks. A norm that is not finite makes the gradients not finite: such a step is not to be taken.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    parts = [[p for p in trained if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    parts = [part for part in parts if part]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])) for part in parts]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, max_norm, norm, foreach=True)
    return norm


def norms_by_part(named_parameters: Iterable[tuple[str, nn.Parameter]], world: int, replicas: int) -> dict[str, Tensor]:
    """Squared L2 norms of this process's share of the gradients, by part of the model: the sums over the processes are
    those of the whole gradient. fp32 scalars.

    What every process holds a copy of counts as the `world`-th part on each, what is shared out among groups of
    processes that each hold all of it (`replicas` of them) as the `replicas`-th.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in named_parameters:
        if parameter.grad is None:
            continue
        local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        square = local.float().square().sum() / (replicas if isinstance(parameter.grad, DTensor) else world)
        part = part_of(name)
        found[part] = found[part] + square if part in found else square
    return found


def part_of(name: str) -> str:
    """The part of a model that the parameter of this name belongs to."""
    for word, part in (
        (".aux.", "aux_routers"), ("norm", "norms"), ("router", "routers"), ("attention", "attention"),
        ("feed_forward", "feed_forward"),
    ):  # fmt: skip
        if word in name:
            return part
    return name.split(".")[0]  # embedding, head
