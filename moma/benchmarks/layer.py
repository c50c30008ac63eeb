"""Suite `layer`: one feed-forward, forward and backward, at the size of the model and the tokens of a micro-batch.

    x (T, D) fp32 --autocast--> y (T, D),   gradients of x and of every weight,   T = rows x row_length

Weights rest in the compute type, routers in fp32; peers get x in the compute type. A repetition returns the gradients
and frees them, so nobody accumulates. FLOPs: 3 x the forward of moma/model/flops.py. Memory: what forward saves for
backward, on a GPU the peak of a repetition. Where `fast_float32` changes anything, ours run in it, as in training;
peers run as torch runs them, and the best of them a second time in it.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moma.benchmarks.config import DTYPES, BenchConfig, compiles, feed_forward
from moma.benchmarks.memory import peak_extra_bytes, saved_bytes
from moma.benchmarks.micro_batch import images_of, micro_batch, vocabulary
from moma.benchmarks.peers import LAYERS, LayerShape, PeerLayer, built
from moma.benchmarks.timing import Absent, Bench, Case, Goal
from moma.distributed import autocast, choose_precision, fast_float32, helps_float32
from moma.modality import TokenGroups
from moma.model.feed_forward import build_feed_forward
from moma.model.flops import feed_forward_part, router_part
from moma.model.init import init_weights
from moma.model.precision import wants_full_precision
from moma.model.slots import combine, dispatch

EXPERTS = 8  # of the peers
LENT = ("transformers Mixtral grouped_mm", "grouped_mm as in torchtitan")  # also with our choice of fp32 matmuls


class _Work(NamedTuple):
    """What all cases share."""

    config: BenchConfig
    device: torch.device
    precision: str
    groups: TokenGroups
    shares: tuple[float, ...]
    x_TD: Tensor
    grad_TD: Tensor
    compiled: bool

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def step(self, forward: Callable[[], Tensor], parameters: list[Tensor], x_TD: Tensor) -> Callable[[], Any]:
        """One repetition: forward and backward."""

        def run() -> Any:
            y_TD = forward()
            return torch.autograd.grad(y_TD, [x_TD, *parameters], self.grad_TD.to(y_TD.dtype), allow_unused=True)

        return run

    def memory(self, step: Callable[[], Any], forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
        """Of one repetition; see the module docstring."""
        return peak_extra_bytes(step, self.device) if self.device.type == "cuda" else saved_bytes(forward, parameters)

    def executed_flops(self, forward: Callable[[], Tensor], parameters: list[Tensor], x_TD: Tensor) -> float:
        """FLOPs of the matmuls of one repetition, counted while it runs."""
        with FlopCounterMode(display=False) as counter:  # its hooks refuse autograd.grad
            y_TD = forward()
            y_TD.backward(self.grad_TD.to(y_TD.dtype))
        for tensor in (x_TD, *parameters):
            tensor.grad = None
        return float(counter.get_total_flops())


def run(config: BenchConfig, device: torch.device) -> Bench:
    """The variants and the peers; raises ValueError for a variant that is more than a feed-forward."""
    for name in config.variants:
        if name.startswith("mod_"):
            raise ValueError(f"got the variant {name} in suite=layer, need feed-forwards: leave it out, or suite=step")
    work = _work(config, device)
    cases = [_ours(work, name, name) for name in config.variants]
    baseline = "dense" if "dense" in config.variants else config.variants[0]
    twin = _ours(work, baseline, f"{baseline} (again)")
    cases.append(_ways(work))
    absent: list[Absent] = []
    if config.peers:
        sizes = (config.model.dim, config.model.ffn_dim, EXPERTS, config.rows, config.row_length)
        for name, entry in LAYERS.items():
            found = built(name, entry, LayerShape(*sizes, work.dtype, device))
            if isinstance(found, Absent):
                absent.append(found)
                continue
            cases.append(_peer(work, name, found))
            if name in LENT and work.dtype == torch.float32 and helps_float32(device):
                cases.append(
                    _peer(work, f"{name}, fp32 by oneDNN", found)._replace(within=partial(fast_float32, device))
                )
    facts = {
        "tokens": config.tokens,
        "tokens_per_modality": [index.numel() for index in work.groups.index],
        "dim": config.model.dim,
        "hidden_dim": config.model.ffn_dim,
        "peers_experts": EXPERTS,
        "compiled": work.compiled,
    }
    return Bench(cases, baseline, twin, absent, facts, goals(work.precision, device))


def _work(config: BenchConfig, device: torch.device) -> _Work:
    side, n_images = images_of(config.rows, config.row_length, config.image_share)
    batch = micro_batch(
        vocabulary(config.vocab_size, side), config.rows, config.row_length, n_images, seed=config.seed
    ).to(device)
    source = torch.Generator().manual_seed(config.seed)
    x_TD, grad_TD = (torch.randn(config.tokens, config.model.dim, generator=source).to(device) for _ in range(2))
    precision = choose_precision(config.precision, device)
    shares = tuple(index.numel() / config.tokens for index in batch.groups.index)
    grad_TD, compiled = grad_TD.to(DTYPES[precision]), compiles(config, device)
    return _Work(config, device, precision, batch.groups, shares, x_TD.requires_grad_(), grad_TD, compiled)


def _ours(work: _Work, variant: str, name: str) -> Case:
    model = work.config.model
    with torch.device("meta"):
        layer = build_feed_forward(
            feed_forward(variant), 0, model.n_layers, model.dim, model.ffn_dim, ("text", "image"), False
        )
    layer.to_empty(device=work.device)
    init_weights(nn.ModuleDict({"feed_forward": layer}), work.config.seed)
    for own, parameter in layer.named_parameters():
        if not wants_full_precision(own):
            parameter.data = parameter.data.to(work.dtype)
    parameters: list[Tensor] = list(layer.parameters())
    run_layer: Any = torch.compile(layer, fullgraph=True, dynamic=False) if work.compiled else layer

    def through(module: Any) -> Tensor:
        with autocast(work.precision, work.device):
            return module(work.x_TD, work.groups, "train")[0]

    step = work.step(lambda: through(run_layer), parameters, work.x_TD)
    per_token = feed_forward_part(layer, work.shares).flops + router_part(layer).flops
    return Case(
        name,
        step,
        flops=3 * per_token * work.config.tokens,
        executed_flops=work.executed_flops(lambda: through(layer), parameters, work.x_TD),
        tokens=work.config.tokens,
        memory=lambda: work.memory(step, lambda: through(run_layer), parameters),
        within=partial(fast_float32, work.device),
    )


def _ways(work: _Work) -> Case:
    """To the experts and back, and nothing in between: what moving costs, in bytes."""
    index_T = torch.cat(work.groups.index)
    slots_T1 = torch.empty_like(index_T).scatter_(0, index_T, torch.arange(len(index_T), device=index_T.device))[
        :, None
    ]
    x_TD = work.x_TD.detach().to(work.dtype)

    def there(x_TD: Tensor) -> Tensor:
        return dispatch(x_TD, index_T, slots_T1)

    def back(x_SD: Tensor) -> Tensor:
        return combine(x_SD, slots_T1, index_T)

    compile_: Any = partial(torch.compile, fullgraph=True, dynamic=False) if work.compiled else lambda way: way
    ways = [compile_(way) for way in (there, back)]  # by themselves: together a compiler would make one pass of them
    moved = 4 * x_TD.numel() * x_TD.element_size()  # read and written, twice
    return Case(
        "dispatch and combine alone",
        lambda: ways[1](ways[0](x_TD)),
        bytes=moved,
        note="forward alone, one column",
    )


def _peer(work: _Work, name: str, peer: PeerLayer) -> Case:
    x_TD = work.x_TD.detach().to(work.dtype).requires_grad_()
    parameters: list[Tensor] = list(peer.module.parameters())
    forward: Any = torch.compile(peer.forward, dynamic=False) if work.compiled and peer.graphs else peer.forward
    step = work.step(lambda: forward(x_TD), parameters, x_TD)
    flops = None if peer.flops_per_token is None else 3 * peer.flops_per_token * work.config.tokens
    executed = None
    if flops is None:
        with contextlib.suppress(Exception):  # what is wrong will be said when it is warmed up
            flops = executed = work.executed_flops(lambda: peer.forward(x_TD), parameters, x_TD)
    return Case(
        name,
        step,
        ours=False,
        flops=flops,
        executed_flops=executed,
        tokens=work.config.tokens,
        note=peer.note,
        memory=lambda: work.memory(step, lambda: forward(x_TD), parameters),
    )


def goals(precision: str, device: torch.device) -> list[Goal]:
    """What this suite is held to."""
    ours = "moe_4t4i"

    def faster(id: str, than: str, bound: float) -> Goal:
        return Goal(id, f"time of {than} / time of {ours}", bound, ours, than, at_least=True)

    kept = Goal("C4", "memory of moe_4t4i / memory of dense", 1.05, ours, of="memory")
    if device.type == "cuda":
        return [
            Goal("H5", "time of moe_4t4i / time of dense", 1.06, ours),
            faster("H5", "torchtitan", 1.15),
            faster("H5", "transformers Mixtral grouped_mm", 1.25),
            faster("H5", "ScatterMoE", 1.3),
            Goal("H5", "FLOP/s of moe_4t4i", 560e12, ours, of="flops", at_least=True),
            Goal("H6", "dispatch and combine, share of copy", 0.8, "dispatch and combine alone", of="ceiling",
                 at_least=True),
            kept._replace(id="H7"),
        ]  # fmt: skip
    return [
        Goal("P1", "time of moe_4t4i / time of dense", 1.10, ours),
        Goal("P1", "time of moe_1t1i / time of dense", 1.05, "moe_1t1i"),
        faster("P2", "transformers Mixtral grouped_mm", 1.10 if precision == "fp32" else 1.15),
        faster("P2", "transformers Mixtral eager", 1.2),
        faster("P2", "grouped_mm as in torchtitan", 1.05),
        faster("P2", "st-moe-pytorch", 2.0),
        kept,
    ]
