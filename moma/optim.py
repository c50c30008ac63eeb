r"""AdamW with Chameleon's settings (arXiv 2405.09818, section 2.3), schedules as pure functions, clipping.

    lr                  warm-up    lr * (step + 1) / warmup: never 0
    |  /--\             linear     lr -> end_lr, u = (step - warmup) / (total - warmup) runs from 0 to 1
    | /    \            cosine     lr -> end_lr, along (1 + cos(pi u)) / 2
    |/      \_ end_lr   wsd        lr until the last `decay` steps, then linear
    +---------- step    constant   lr

The learning rate is a function of the step alone: nothing to checkpoint, and a longer horizon is a new
argument. Which rate a step gets is written into the optimizer's groups by the loop (`set_learning_rate`).

Moments and gradients may be stored in bf16 (`state_dtype`, `grad_dtype`): 10 bytes per fp32 parameter (4 + 2 + 2 + 2)
instead of 16. Norms and routers keep fp32 for both. A step computes in fp32 and rounds the new moments to the nearest:

    m' = (beta1 m + (1 - beta1) g) (1 + d)      v' = (beta2 v + (1 - beta2) g^2) (1 + d),      |d| <= u = 2^-8

No term of v is negative, so whatever the gradients are, v lies between the averages that forget by beta2 (1 - u) and by
beta2 (1 + u), times (1 - u) and (1 + u): with beta2 = 0.95 a memory of 18.6 to 21.6 steps instead of 20. Where all
gradients are the same, v is at most 8.5 % off and the step 4 %. The error of m is at most u / (1 - beta1) = 3.9 % of
its largest value. Gradients that vary spread the roundings, which then cancel. Rounding to the nearest is a function
of its input alone: nothing to seed or to checkpoint. Betas nearer 1 make the bounds wide, and from 1 - u on void (with
0.999 v stops far from g^2): they are refused.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import cos, pi
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moma.distributed import whole
from moma.meter import Duration
from moma.model.precision import wants_full_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST_BETA = 0.96  # of moments in bf16
PIECE = 2**16  # numbers updated at a time on a CPU: what a core's cache holds


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
    state_dtype: Literal["fp32", "bf16"] = "fp32"  # of both moments, as stored
    grad_dtype: Literal["fp32", "bf16"] = "fp32"  # of the gradients, as stored

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
        if self.state_dtype == "bf16" and max(self.betas) > LARGEST_BETA:
            raise ValueError(
                f"got state_dtype=bf16 with betas={self.betas}, need both at most {LARGEST_BETA}, since above it small "
                "updates of the moments are rounded away: lower optim.betas, or set optim.state_dtype=fp32"
            )


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
    """Fused AdamW over `parameter_groups`; build it once the model is sharded and on its device.

    With `grad_dtype=bf16` the parameters' `grad_dtype` is set: autograd rounds what it adds to `.grad`, and only a
    gradient of that dtype can be assigned. With either in bf16 the moments exist from the start. Raises ValueError for
    bf16 gradients of parameters that are shared out among processes.
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    groups = parameter_groups(named, config)
    kind = torch.optim.AdamW if config.state_dtype == config.grad_dtype == "fp32" else ReducedAdamW
    optimizer = kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if kind is torch.optim.AdamW:
        return optimizer
    for name, parameter in named:
        keeps = wants_full_precision(name)
        if config.grad_dtype != "fp32" and not keeps:
            if isinstance(parameter, DTensor):
                raise ValueError(
                    "got grad_dtype=bf16 with parameters that are shared out among processes, whose gradients FSDP2 "
                    "keeps in fp32, need whole ones: set optim.grad_dtype=fp32 or parallel.shard=false"
                )
            parameter.grad_dtype = DTYPES[config.grad_dtype]
        moments = torch.float32 if keeps else DTYPES[config.state_dtype]
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=moments),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=moments),
        }
    return optimizer


def check_accumulation(config: OptimConfig, micro_batches: int) -> None:
    """Raise ValueError where a process would add the gradients of several micro-batches of a step in bf16.

    Every sum would be rounded, so that a step depended on how many processes share its micro-batches.
    """
    if config.grad_dtype != "fp32" and micro_batches > 1:
        raise ValueError(
            f"got grad_dtype={config.grad_dtype} with {micro_batches} micro-batches per step and process, need 1, "
            "since their sum would be rounded after each: set optim.grad_dtype=fp32, or start as many processes as a "
            "step has micro-batches"
        )


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


class ReducedAdamW(torch.optim.AdamW):
    """AdamW for moments and gradients of any dtype, which are there before the first step.

    On a GPU one compiled pass over each tensor, which moves 18 bytes per parameter with both in bf16 (20 with fp32
    gradients; the fused kernel in fp32: 28); on a CPU piece by piece, so that temporary results stay in the cache.
    """

    found_inf: Tensor | None = None  # 1: leave out this step, 0: take it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step with the gradients that are there, as `torch.optim.AdamW.step`."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self.state[parameter] for parameter in parameters]
            counters = [state["step"] for state in states]
            found_inf = torch.zeros_like(counters[0]) if self.found_inf is None else self.found_inf
            on_gpu = found_inf.is_cuda
            if not on_gpu and found_inf > 0:  # known without waiting
                return
            torch._foreach_add_(counters, 1 - found_inf)  # type: ignore[attr-defined]
            (beta1, beta2), steps, skip = group["betas"], torch.stack(counters), found_inf > 0
            sizes = (group["lr"] / (1 - beta1**steps)).unbind()
            roots = (1 - beta2**steps).sqrt().unbind()
            keep = torch.full_like(skip, 1 - group["lr"] * group["weight_decay"], dtype=torch.float32)
            for parameter, state, size, root in zip(parameters, states, sizes, roots, strict=True):
                stored = (parameter, parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
                flat = [_local(tensor).view(-1) for tensor in stored]
                numbers = (keep, size, root, beta1, beta2, group["eps"])
                if on_gpu:
                    _compiled()(*flat, skip, *numbers)
                    continue
                for p, grad, mean, square in zip(*(tensor.split(PIECE) for tensor in flat), strict=True):
                    new = _updated(p, grad, mean, square, *numbers)
                    for old, value in zip((p, mean, square), new, strict=True):
                        old.copy_(value)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be shared out."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _updated(
    p: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    keep: Tensor,
    size: Tensor,
    root: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW's next parameters and moments (n,) in fp32, whatever they are stored in.

    Scalars: `keep` = 1 - lr weight_decay, `size` = lr / (1 - beta1^t), `root` = sqrt(1 - beta2^t).
    """
    g = grad.float()
    new_mean = mean.float().lerp(g, 1 - beta1)
    new_square = (square.float() * beta2).addcmul_(g, g, value=1 - beta2)
    new = (p * keep).addcdiv_(new_mean * -size, new_square.sqrt().div_(root).add_(eps))
    return new, new_mean, new_square


def _update_(p: Tensor, grad: Tensor, mean: Tensor, square: Tensor, skip: Tensor, *numbers: Any) -> None:
    """`_updated` in place; nothing where `skip` is true."""
    for old, value in zip((p, mean, square), _updated(p, grad, mean, square, *numbers), strict=True):
        old.copy_(torch.where(skip, old, value))


@cache
def _compiled() -> Callable[..., None]:
    """`_update_` as one kernel for every length."""
    return torch.compile(_update_, fullgraph=True, dynamic=True)


def clip_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a global L2 norm of at most `max_norm`; returns the norm before, fp32
    scalar.

    The result stays on the device: nothing waits for it until it is logged. Sharded gradients give the norm
    over all ranks. A norm that is not finite makes the gradients not finite: such a step is not to be taken.
    Gradients in bf16 are scaled by a factor in bf16, so that the limit holds to 0.4 %.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    low = [p.grad for p in trained if p.grad is not None and p.grad.dtype == torch.bfloat16]
    trained = [p for p in trained if p.grad is not None and p.grad.dtype != torch.bfloat16]
    parts = [[p for p in trained if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    parts = [part for part in parts if part]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])) for part in parts]
    if low:
        each = torch._foreach_norm(low, 2, torch.float32)  # type: ignore[attr-defined]
        norms.append(torch.linalg.vector_norm(torch.stack(each)))
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, max_norm, norm, foreach=True)
    if low:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(low, factor.to(torch.bfloat16))  # type: ignore[attr-defined]
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
