"""Where and how a step runs: device, precision, compilation, ranks. Model code knows none of it.

    bf16    matmuls in bf16 over fp32 master weights (autocast); routers, norms, losses in fp32
    fp32    everything in fp32

Blocks are compiled one by one (regional): they share one graph, so compile time does not grow with depth.

Under `torchrun` a command joins its process group (`process_group`): gloo on CPUs, NCCL on GPUs. Without one, the
functions that work across ranks leave their tensors as they are. Parameters are copies on every rank, or cut into equal
parts (`shard_`): a block's are put together for its forward and its backward, all others wait as parts.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from moma.model.transformer import Transformer

BUCKET = 2**24  # numbers summed together: bounds what a reduction copies


@dataclass(frozen=True)
class ParallelConfig:
    """Where and how a step runs; free to change on resume."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on a GPU
    threads: int | None = None  # CPU threads; None: as torch finds them
    shard: bool = False  # parameters, gradients and optimizer state among the processes (FSDP2), not copies
    peak_flops: float | None = None  # FLOP/s of the device for the MFU; None: no MFU

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"got threads={self.threads}, need at least 1, or null for torch's choice")


def choose_device(wanted: str) -> torch.device:
    """The device a configuration asks for; raises ValueError for a GPU that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("got device=cuda, need a GPU that torch sees: use device=cpu or auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> str:
    """bf16 where the hardware multiplies it natively, else fp32; decided once, at the first start of a run."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The stated policy: matmuls in bf16 over fp32 master weights, or everything in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def compile_blocks(model: Transformer, parallel: ParallelConfig, device: torch.device) -> None:
    """Compile every block as one graph with static shapes, where the configuration says so."""
    if parallel.compile == "on" or (parallel.compile == "auto" and device.type == "cuda"):
        # one graph per kind of block: a model whose layers differ must not run into dynamo's limit
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(model.blocks) + 8)
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)


class Ranks(NamedTuple):
    """This process among those that run together."""

    rank: int
    world: int


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Join the process group that `torchrun` announces, alone without one; a GPU rank takes the GPU of its number.

    A group that there is already is used and kept.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks(0, 1)
        return
    if choose_device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_before_others(ranks: Ranks) -> Iterator[None]:
    """Let the first rank through alone, the others after it."""
    if ranks.world > 1 and ranks.rank:
        dist.barrier()
    yield
    if ranks.world > 1 and not ranks.rank:
        dist.barrier()


def shard_(model: Transformer, ranks: Ranks) -> None:
    """Share out every block's parameters among the processes, and then what is left (FSDP2, `fully_shard`).

    Each is cut along its largest dimension that all processes can have an equal part of, else along the first.
    Gradients come out as means over the processes.
    """

    def placement(parameter: nn.Parameter) -> Shard:
        even = [dim for dim, size in enumerate(parameter.shape) if size % ranks.world == 0]
        return Shard(max(even, key=lambda dim: parameter.shape[dim], default=0))

    for block in model.blocks:
        fully_shard(block, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)


def sum_(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its sum over the ranks, in place; neighbours of one dtype go together."""
    if not dist.is_initialized():
        return
    waiting: list[Tensor] = []
    for tensor in tensors:
        full = sum(other.numel() for other in waiting) + tensor.numel() > BUCKET
        if waiting and (full or tensor.dtype != waiting[0].dtype):
            _sum_together(waiting)
            waiting = []
        waiting.append(tensor)
    if waiting:
        _sum_together(waiting)


def _sum_together(group: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in group])
    dist.all_reduce(flat)
    for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its mean over the ranks, in place."""
    if dist.is_initialized():
        tensors = list(tensors)
        sum_(tensors)
        for tensor in tensors:
            tensor /= dist.get_world_size()


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank: the same answer on all of them, for which the host waits."""
    if not dist.is_initialized():
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised)
    return bool(raised.item())


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be shared out, as every process has it when it is put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """The tensors (n, ...) of all ranks in their order, (world n, ...); all of one shape."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
