"""Suite `head`: linear layer and cross-entropy with z-loss over the whole vocabulary, forward and backward.

    hidden (T, D), weight (V, D), both in the compute type  ->  mean loss over the targets, gradients of both

The baseline is the plain form: logits in the compute type, upcast to fp32, cross-entropy. FLOPs: 6 T D V. Memory: the
peak of a repetition beyond its inputs. Errors of loss and gradients are relative, against float64 on the first
ERROR_TOKENS tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moma.benchmarks.config import DTYPES, BenchConfig, compiles
from moma.benchmarks.memory import peak_extra_bytes
from moma.benchmarks.micro_batch import images_of, micro_batch, vocabulary
from moma.benchmarks.peers import HEADS, Z_WEIGHT, LayerShape, PeerHead, built
from moma.benchmarks.timing import Absent, Bench, Case, Goal, first_line
from moma.distributed import choose_precision, fast_float32
from moma.modality import IGNORE
from moma.model.loss import linear_cross_entropy

ERROR_TOKENS = 2048
REFERENCE_ROWS = 256  # logits of the reference at once
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Result(NamedTuple):
    """Mean loss over the targets, and its gradients."""

    loss: Tensor
    grad_TD: Tensor
    grad_VD: Tensor


def run(config: BenchConfig, device: torch.device) -> Bench:
    """Ours, the plain form and the peers."""
    precision = choose_precision(config.precision, device)
    dtype, dim = DTYPES[precision], config.model.dim
    side, n_images = images_of(config.rows, config.row_length, config.image_share)
    batch = micro_batch(vocabulary(config.vocab_size, side), config.rows, config.row_length, n_images, seed=config.seed)
    source = torch.Generator().manual_seed(config.seed)
    hidden_TD = torch.randn(config.tokens, dim, generator=source).to(device, dtype).requires_grad_()
    weight_VD = (torch.randn(config.vocab_size, dim, generator=source) * dim**-0.5).to(device, dtype).requires_grad_()
    target_T = batch.target_RL.flatten().to(device)
    few = slice(min(config.tokens, ERROR_TOKENS))
    few_TD = hidden_TD.detach()[few].requires_grad_()
    wanted = functools.cache(lambda z_weight: reference(few_TD, weight_VD, target_T[few], z_weight))
    compiled = compiles(config, device)
    absent: list[Absent] = []
    found: dict[str, dict[str, float]] = {}

    def case(name: str, head: PeerHead, own: bool = True) -> Case:
        step = functools.partial(result, head.loss, hidden_TD, weight_VD, target_T)
        found[name] = errors(
            result(head.loss, few_TD, weight_VD, target_T[few]), wanted(Z_WEIGHT if head.z_loss else 0.0)
        )
        return Case(
            name,
            step,
            own,
            flops=6.0 * config.tokens * dim * config.vocab_size,
            tokens=config.tokens,
            note=head.note,
            memory=lambda: peak_extra_bytes(step, device),
            within=functools.partial(fast_float32, device),
        )

    cases = [case("naive", PeerHead(naive, True)), case("ours", PeerHead(ours, True))]
    if compiled:
        cases.append(case("naive, compiled", PeerHead(torch.compile(naive, dynamic=False), True)))
    if config.peers:
        shape = LayerShape(dim, config.vocab_size, 1, config.rows, config.row_length, dtype, device)
        for name, entry in HEADS.items():
            head = built(name, entry, shape)
            if isinstance(head, Absent):
                absent.append(head)
                continue
            note = "; ".join(part for part in (head.note, "" if head.z_loss else "no z-loss") if part)
            try:
                cases.append(case(name, head._replace(note=note), own=False))
            except Exception as error:
                absent.append(Absent(name, first_line(error)))
    facts = {
        "tokens": config.tokens,
        "targets": batch.n_targets,
        "dim": dim,
        "vocab_size": config.vocab_size,
        "compiled": compiled,
        "error_tokens": few_TD.shape[0],
        "relative errors": found,
    }
    twin = case("naive (again)", PeerHead(naive, True))
    return Bench(cases, "naive", twin, absent, facts, goals(precision, device, found["ours"]["loss"]))


def naive(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """The plain form: all logits, in fp32; the mean over targets."""
    logit_TV = (hidden_TD @ weight_VD.T).float()
    lse_T = torch.where(target_T != IGNORE, logit_TV.logsumexp(1), 0)
    z_mean = lse_T.square().sum() / (target_T != IGNORE).sum()
    return F.cross_entropy(logit_TV, target_T, ignore_index=IGNORE) + Z_WEIGHT * z_mean


def ours(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Ours, as training calls it; the mean over targets."""
    count = (target_T != IGNORE).sum()
    return linear_cross_entropy(hidden_TD, weight_VD, target_T, denominator=count, z_weight=Z_WEIGHT).objective


def result(loss: Loss, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Result:
    """Forward and backward."""
    mean = loss(hidden_TD, weight_VD, target_T)
    return Result(mean.detach(), *torch.autograd.grad(mean, [hidden_TD, weight_VD]))


def reference(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, z_weight: float) -> Result:
    """The same in float64 from the same inputs, a few rows at a time."""
    weight = weight_VD.detach().double().requires_grad_()
    count = (target_T != IGNORE).sum()
    total, grads = torch.zeros((), dtype=torch.float64, device=weight.device), []
    grad_VD = torch.zeros_like(weight)
    for start in range(0, len(target_T), REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        hidden, target = hidden_TD.detach()[rows].double().requires_grad_(), target_T[rows]
        logit = hidden @ weight.T
        z = torch.where(target != IGNORE, logit.logsumexp(1), 0).square().sum()
        part = (F.cross_entropy(logit, target, ignore_index=IGNORE, reduction="sum") + z_weight * z) / count
        grad_hidden, grad_weight = torch.autograd.grad(part, [hidden, weight])
        total += part.detach()
        grads.append(grad_hidden)
        grad_VD += grad_weight
    return Result(total, torch.cat(grads), grad_VD)


def errors(found: Result, wanted: Result) -> dict[str, float]:
    """Relative errors: of the loss, and of the gradients in the 2-norm."""
    pairs = zip(Result._fields, found, wanted, strict=True)
    return {name: ((own.double() - exact).norm() / exact.norm()).item() for name, own, exact in pairs}


def goals(precision: str, device: torch.device, loss_error: float) -> list[Goal]:
    """What this suite is held to; P5 and the memory of C6 are for long vocabularies."""
    found = [Goal("C6", "relative error of our loss", 1e-5 if precision == "fp32" else 1e-3, of="value",
                  value=loss_error)]  # fmt: skip
    if device.type == "cuda":
        return [
            *found,
            Goal("H8", "time of ours / time of naive, compiled", 1.10, "ours", "naive, compiled"),
            Goal("H8", "memory of ours / memory of naive, compiled", 0.25, "ours", "naive, compiled", "memory"),
            Goal("H8", "time of Liger / time of ours", 2.0, "ours", "Liger", at_least=True),
            Goal("H8", "time of cut-cross-entropy / time of ours", 1.05, "ours", "cut-cross-entropy", at_least=True),
        ]
    return [
        *found,
        Goal("C6", "memory of ours / memory of naive", 0.30, "ours", of="memory"),
        Goal("P5", "time of ours / time of naive", 1.0, "ours"),
    ]
