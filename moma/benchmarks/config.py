"""What all suites are told, and the models that their variants name.

A variant is an option of conf/feed_forward, at the size that was chosen; `mod_NAME` is NAME behind mixture-of-depths,
at the `_mod` size of the same FLOPs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from moma.config import compose, options
from moma.model.feed_forward import FeedForwardConfig
from moma.model.transformer import Architecture, ModelConfig
from moma.schema import nearest

SuiteName = Literal["layer", "head", "attention", "step", "decode", "data", "checkpoint"]
GRAPHS = 64  # of one function
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BenchConfig:
    """The micro-batch has `rows` x `row_length` random tokens, `image_share` of them image codes in whole images."""

    suite: SuiteName
    model: ModelConfig
    size: str  # name of the model option
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int | None = 1  # of the CPU; null: as torch finds them
    rounds: int = 9
    warmup: int = 2
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rows: int = 1
    row_length: int = 4096
    image_share: float = 0.5
    documents: int = 4  # per row, where they are packed
    vocab_size: int = 65_536
    variants: tuple[str, ...] = ("dense", "moe_1t1i", "moe_4t4i")
    micro_batches: int = 8  # of an optimizer step (suite step)
    prompt_tokens: int = 32  # before the new ones (suite decode)
    new_tokens: int = 128
    peers: bool = True
    peers_path: Path | None = None  # a folder that holds peers which are not installed
    ceilings: bool = True
    seed: int = 0
    out: Path | None = None  # JSON

    def __post_init__(self) -> None:
        if self.rounds < 3 or self.warmup < 1:
            raise ValueError(
                f"got rounds={self.rounds} and warmup={self.warmup}, need at least 3 rounds for quartiles and 1 "
                "repetition before them: raise them"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"got threads={self.threads}, need at least 1, or null for torch's choice")
        if min(self.rows, self.row_length, self.documents) < 1 or self.vocab_size < 64:
            raise ValueError(
                f"got rows={self.rows}, row_length={self.row_length}, documents={self.documents}, vocab_size="
                f"{self.vocab_size}, need at least 1 of each and 64 ids: raise them"
            )
        if not 0 < self.image_share < 1:
            raise ValueError(f"got image_share={self.image_share}, need tokens of both modalities: between 0 and 1")
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(f"got variants={list(self.variants)}, need at least one, and each once: correct the list")
        for name in self.variants:
            if name.removeprefix("mod_") not in (known := options("feed_forward")):
                hint = nearest(name, known) or f": choose from {', '.join(known)}, or mod_ and one of them"
                raise ValueError(f"got the variant {name}, need an option of feed_forward{hint}")
        if self.peers_path is not None and not self.peers_path.is_dir():
            raise ValueError(f"got peers_path={self.peers_path}, need a folder with the peers' sources: correct it")

    @property
    def tokens(self) -> int:
        """T, of one micro-batch."""
        return self.rows * self.row_length


def compiles(config: BenchConfig, device: torch.device) -> bool:
    """Whether cases are compiled; if so, one function may have a graph for each of them."""
    wanted = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    if wanted:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    return wanted


def architecture(config: BenchConfig, variant: str) -> Architecture:
    """The architecture that a variant names; ValueError for a size without its `_mod` twin."""
    name = variant.removeprefix("mod_")
    if name == variant:
        return Architecture(config.model, feed_forward(name))
    composed = compose("describe", [f"model={config.size}_mod", f"feed_forward={name}", "depth=mod"]).config
    return composed.architecture


def feed_forward(variant: str) -> FeedForwardConfig:
    """The option of conf/feed_forward of this name."""
    return compose("describe", [f"feed_forward={variant}"]).config.feed_forward
