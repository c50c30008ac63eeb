"""Where and how a step runs: device, precision, compilation. Model code knows none of it.

    bf16    matmuls in bf16 over fp32 master weights (autocast); routers, norms, losses in fp32
    fp32    everything in fp32

Blocks are compiled one by one (regional): they share one graph, so compile time does not grow with depth.
"""

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moma.model.transformer import Transformer


@dataclass(frozen=True)
class ParallelConfig:
    """Where and how a step runs; free to change on resume."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on a GPU
    threads: int | None = None  # CPU threads; None: as torch finds them
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
