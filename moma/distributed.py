"""Where and how a step runs: device, precision, recomputation, compilation, ranks. Model code knows none of it.

    bf16    matmuls in bf16 over fp32 master weights (autocast); routers, norms, losses in fp32
    fp32    everything in fp32; on AMD's CPUs by the library that uses their vectors (`fast_float32`)

Every block is recomputed in backward, compiled and shared out by itself, from the inside out:

    share out [ compile [ recompute [ block ] ] ]       blocks of one kind share one graph

Under `torchrun` a command joins its process group (`process_group`): gloo on CPUs, NCCL on GPUs. Without one, the
functions that work across ranks leave their tensors as they are. Parameters are copies on every rank, or a block's
matrices are cut into equal parts (`shard_`, FSDP2) and put together for its forward and its backward, in bf16 where
they are multiplied in bf16. What is computed in fp32 (norms, routers) is small and stays a copy, so that the numbers
are those of one process. Losses are scaled by the number of ranks and gradients averaged, which gives their sum.

With `cuda_graphs` each block's forward and backward kernels are recorded once, per place in the model, and replayed
(torch.compile's graph trees): it saves the host's launches where kernels are small. All results of a micro-batch's
blocks lie in memory that the next micro-batch's replay writes over, from `begin_pass` on, which the loop calls before
each:

    hidden states, saved tensors    live within one forward and backward
    gradients                       must outlive it: `begin_pass` makes room for them outside first, and autograd adds
    routing statistics              every number kept beyond it is the result of an operation outside of the blocks (a
                                    tally, a mean over micro-batches); torch raises an error for one that is not
    what the host reads late        a copy on its way before the next replay, in the order of the same stream
    parameters                      stay where they are, changed in place; parts that come and go (`shard`) do not
    shapes and the host             static and not asked, as compiled blocks have it; evaluation runs eagerly
"""

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moma.model.block import Block
from moma.model.precision import wants_full_precision
from moma.model.transformer import Transformer

REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What gloo and NCCL say where the process at the other end is gone, or silent for too long.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "Timed out")
BUCKET = 2**24  # numbers summed together: bounds what a reduction copies

# FLOP/s of bf16 matmuls without sparsity, by what a GPU's name holds (data sheets)
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}

_aten = torch.ops.aten
# What `recompute=selective` keeps of a block: results of matmuls, attention and the routers' sorts, most of the work.
KEPT = {
    *(_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.sort.stable),
    *(_aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default),
    *(_aten._scaled_dot_product_cudnn_attention.default, torch.ops.moma.document_attention.default),
    *(torch.ops.moma.grouped_matmul.default, torch.ops.higher_order.flex_attention),
}


@dataclass(frozen=True)
class ParallelConfig:
    """Where and how a step runs; free to change on resume."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on a GPU
    cuda_graphs: bool = False  # record the blocks' kernels and replay them: for models whose kernels are small
    threads: int | None = None  # CPU threads; None: as torch finds them
    processes: int | None = None  # to start on this machine; None: this one, or those of `torchrun`
    shard: bool = False  # parameters, gradients and optimizer state among the processes (FSDP2), not copies
    replicas: int = 1  # groups of processes of which each holds all parts (HSDP)
    reshard: bool = True  # give up a block's parameters after its forward and fetch them again for its backward
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"  # of gradients on their way between processes
    recompute: Literal["none", "selective", "full"] = "none"  # a block's activations, in backward
    timeout_min: float = 30.0  # minutes that a process waits for the others before it gives up
    peak_flops: float | None = None  # FLOP/s of one device, for the MFU; None: those of a known GPU, else no MFU

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"got threads={self.threads}, need at least 1, or null for torch's choice")
        if self.timeout_min <= 0:
            raise ValueError(f"got parallel.timeout_min={self.timeout_min}, need minutes above 0: change it")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"got parallel.processes={self.processes}, need at least 1, or null for this process")
        if self.replicas < 1 or (self.replicas > 1 and not self.shard):
            raise ValueError(
                f"got parallel.replicas={self.replicas} and shard={self.shard}, need at least 1, and shard=true for "
                "more: without it every process holds a copy"
            )
        if self.cuda_graphs and (self.compile == "off" or self.device == "cpu" or self.shard):
            raise ValueError(
                f"got parallel.cuda_graphs=true with compile={self.compile}, device={self.device}, shard={self.shard}, "
                "need compiled blocks on a GPU that holds all parameters: set parallel.cuda_graphs=false, or change "
                "these"
            )


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


@contextlib.contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """Let oneDNN do large fp32 matmuls on a CPU where MKL, torch's own choice, leaves half of the vectors idle: AMD
    with AVX-512 (twice the FLOP/s on Zen 5; MKL is the faster for single rows, as in decoding, and for products as
    small as 64 x 64 x 64).

    torch hands fp32 matmuls to oneDNN where it may round to bf16, and without matrix tiles (AMX) oneDNN has no such
    kernel: all stays fp32, which `_onednn_keeps_float32` makes sure of. Process-wide, and undone on leaving.
    """
    with _bf16_allowed() if helps_float32(device) else contextlib.nullcontext():
        yield


def helps_float32(device: torch.device) -> bool:
    """Whether `fast_float32` changes anything on this machine."""
    return device.type == "cpu" and _cpu_of_amd() and _onednn_keeps_float32()


@contextlib.contextmanager
def _bf16_allowed() -> Iterator[None]:
    # not torch.backends.mkldnn.matmul.fp32_precision: once that is set, Inductor may not read the precision any more
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def _cpu_of_amd() -> bool:
    with contextlib.suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False


@functools.cache
def _onednn_keeps_float32() -> bool:
    """Whether matmuls keep fp32's precision where torch is allowed to round their operands to bf16, whose error would
    be 2e-3: tried at sizes and layouts that call different kernels."""
    source = torch.Generator().manual_seed(0)

    def error(m: int, k: int, n: int) -> float:
        x_BMK, w_BKN = (torch.randn(2, *size, generator=source) for size in ((m, k), (k, n)))
        y_BMN, kept_BMN = torch.bmm(x_BMK, w_BKN), torch.bmm(x_BMK.double(), w_BKN.double())
        flat_MN, turned_MN = x_BMK[0] @ w_BKN[0], (w_BKN[0].mT.contiguous() @ x_BMK[0].mT.contiguous()).mT
        found = torch.stack([y_BMN[0], y_BMN[1], flat_MN, turned_MN]).double()
        exact = torch.stack([kept_BMN[0], kept_BMN[1], kept_BMN[0], kept_BMN[0]])
        return float((found - exact).norm() / exact.norm())

    with _bf16_allowed():
        return max(error(*size) for size in ((512, 256, 384), (1024, 64, 48), (96, 1376, 512))) < 1e-5


class Ranks(NamedTuple):
    """This process among those that run together."""

    rank: int
    world: int


def peak_flops(parallel: ParallelConfig, device: torch.device, world: int) -> float | None:
    """FLOP/s of all devices together, None where they are not known."""
    if parallel.peak_flops:
        return parallel.peak_flops * world
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops * world for part, flops in PEAK_FLOPS.items() if part in name), None)


def compiles(parallel: ParallelConfig, device: torch.device) -> bool:
    """Whether blocks are compiled, so that shapes must be static."""
    return parallel.compile == "on" or (parallel.compile == "auto" and device.type == "cuda")


def shares_out(parallel: ParallelConfig) -> bool:
    """Whether parameters are shared out among processes (FSDP2), which then casts them itself."""
    return parallel.shard and dist.is_initialized()


def arrange_(model: Transformer, parallel: ParallelConfig, ranks: Ranks, precision: str, device: torch.device) -> None:
    """Make every block recompute, compiled and shared out as the configuration says; raises what `shard_` does."""
    run: Callable[..., Any] = {"none": _run, "selective": _run_keeping, "full": _run_again}[parallel.recompute]
    if parallel.cuda_graphs and device.type != "cuda":
        raise ValueError(
            f"got parallel.cuda_graphs=true on {device.type}, need a GPU: set parallel.cuda_graphs=false, or run where "
            "one is"
        )
    if compiles(parallel, device):
        # one graph per kind of block: a model whose layers differ must not run into dynamo's limit
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(model.blocks) + 8)
        options: dict[str, Any] | None = {"triton.cudagraphs": True} if parallel.cuda_graphs else None
        run = torch.compile(run, fullgraph=True, dynamic=False, options=options)
    if run is not _run:
        for block in model.blocks:
            block.forward = partial(run, block)
    if shares_out(parallel):
        shard_(model, parallel, ranks, precision, device)


def begin_pass(parallel: ParallelConfig, parameters: Iterable[Tensor]) -> None:
    """Called before every micro-batch's forward: with `cuda_graphs`, its blocks may write over what they returned for
    the one before. Gradients get memory of their own (zeros) where they have none."""
    if not parallel.cuda_graphs:
        return
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    torch.compiler.cudagraph_mark_step_begin()


def _run(block: Block, *inputs: Any) -> Any:
    return type(block).forward(block, *inputs)


def _run_again(block: Block, *inputs: Any) -> Any:
    # noise comes as a tensor: there is no random state to restore
    return checkpoint(_run, block, *inputs, use_reentrant=False, preserve_rng_state=False)


def _run_keeping(block: Block, *inputs: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, _keep)
    return checkpoint(_run, block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def process_group(device: str, timeout_min: float = 30.0) -> Iterator[Ranks]:
    """Join the process group that `torchrun` announces, alone without one; a GPU rank takes the GPU of its number.

    A group that there is already is used and kept.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks(0, 1)
        return
    timeout = timedelta(minutes=timeout_min)
    if choose_device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST):
            raise
        raise OSError(
            f"got no answer from another process of {dist.get_world_size()} ({str(error).splitlines()[0]}), need all: "
            "see which one ended and why, then run the same command: it goes on from the last checkpoint"
        ) from error
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


def shard_(model: Transformer, parallel: ParallelConfig, ranks: Ranks, precision: str, device: torch.device) -> None:
    """Share out every block's matrices among the processes, and then embedding and head (FSDP2, `fully_shard`).

    Gradients come out as means over the processes. Raises ValueError where `replicas` does not divide them, or a
    matrix would leave a process without a part.
    """
    if ranks.world % parallel.replicas:
        raise ValueError(
            f"got parallel.replicas={parallel.replicas} of {ranks.world} processes, need a divisor: change one of them"
        )
    parts = ranks.world // parallel.replicas
    copies = parallel.replicas > 1
    mesh = init_device_mesh(
        device.type,
        (parallel.replicas, parts) if copies else (parts,),
        mesh_dim_names=("replicas", "parts") if copies else ("parts",),
    )
    wide = {parameter for name, parameter in model.named_parameters() if wants_full_precision(name)}
    low = torch.bfloat16 if precision == "bf16" else None
    for module, dtype in (*((block, low) for block in model.blocks), (model, None)):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=parallel.reshard if module is not model else None,
            shard_placement_fn=lambda parameter: Shard(cut_along(tuple(parameter.shape), parts)),
            mp_policy=MixedPrecisionPolicy(dtype, REDUCE_DTYPES[parallel.reduce_dtype], None, False),
            ignored_params=wide,
        )


def cut_along(shape: tuple[int, ...], parts: int) -> int:
    """The dimension along which a parameter is cut: the first of which every process gets an equal part, else the
    first if none stays empty. Raises ValueError if one would."""
    even = next((dim for dim, size in enumerate(shape) if size % parts == 0), None)
    if even is not None:
        return even
    if -(-shape[0] // -(-shape[0] // parts)) < parts:  # FSDP2 cuts into pieces of ceil(size / parts)
        raise ValueError(
            f"got {parts} processes for a parameter of {' x '.join(map(str, shape))}, need a number that divides one "
            "of these, so that none is left without a part: start another number, or set parallel.replicas or "
            "parallel.shard=false"
        )
    return 0


def send_gradients(model: Transformer, send: bool) -> None:
    """Whether a shared out model's next backward sends its gradients on: the last one of a step does, for all."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(send)


def sum_(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
    """Replace every tensor by its sum over the ranks, in place; neighbours of one dtype go together.

    `dtype`: what they travel as, theirs if None.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if waiting and (size + tensor.numel() > BUCKET or tensor.dtype != waiting[0].dtype):
            _sum_together(waiting, dtype)
            waiting, size = [], 0
        waiting.append(tensor)
        size += tensor.numel()
    if waiting:
        _sum_together(waiting, dtype)


def _sum_together(group: list[Tensor], dtype: torch.dtype | None) -> None:
    flat = torch.cat([tensor.reshape(-1).to(dtype or tensor.dtype) for tensor in group])
    dist.all_reduce(flat)
    for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
    """Replace every tensor by its mean over the ranks, in place; `dtype` as for `sum_`."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        tensors = list(tensors)
        sum_(tensors, dtype)
        for tensor in tensors:
            tensor /= dist.get_world_size()


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


class Late:
    """Small tensors of a step that the host reads one step late, while the device works on: it never waits idle."""

    def __init__(self) -> None:
        self._sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, step: int, tensor: Tensor) -> None:
        """Start the way of a tensor to the host."""
        event, host = None, tensor.detach().to("cpu", copy=True) if not tensor.is_cuda else None
        if host is None:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._sent.append((step, host, event))

    def read(self, behind: int) -> Iterator[tuple[int, list[float]]]:
        """What has been sent, but for the last `behind`: (step, numbers) in order."""
        while len(self._sent) > behind:
            step, host, event = self._sent.popleft()
            if event is not None:
                event.synchronize()
            yield step, host.tolist()
