"""Parameters, FLOPs and memory of any combination, from the meta device: nothing is allocated, no data is read.

Memory is estimated by `moma/memory.py`; `tests/test_describe.py` holds it within 10 % of a measured peak on `tiny`.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from moma.config import Composed, kind_field
from moma.memory import Recompute, Stored, step_memory
from moma.modality import Vocabulary
from moma.model.attention import ATTENTIONS, AttentionConfig, SharedAttentionConfig
from moma.model.depth import DEPTHS, DepthConfig, FullDepthConfig
from moma.model.feed_forward import FEED_FORWARDS, FeedForwardConfig
from moma.model.flops import padding_of, parts_of, totals
from moma.model.transformer import Architecture, ModelConfig, Transformer
from moma.run import DataConfig
from moma.tokenizer.vocab import asset_folder, load_vocabulary


@dataclass(frozen=True)
class DescribeConfig:
    """`vocab_size` replaces the tokenizer's (the paper's is 65,536); `output`: text or json."""

    model: ModelConfig
    feed_forward: FeedForwardConfig = kind_field(FEED_FORWARDS)
    attention: AttentionConfig = kind_field(ATTENTIONS, default=SharedAttentionConfig())
    depth: FullDepthConfig | DepthConfig = kind_field(DEPTHS, default=FullDepthConfig())
    data: DataConfig = field(kw_only=True)
    tokenizer: str = field(kw_only=True)
    vocab_size: int | None = None
    aux_routers: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: Recompute = "none"  # as parallel.recompute of a run
    state_dtype: Stored = "fp32"  # of AdamW's moments, as optim.state_dtype of a run
    grad_dtype: Stored = "fp32"  # of the gradients, as optim.grad_dtype
    parts: int = 1  # processes that share out the parameters
    output: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"got parts={self.parts}, need at least 1 process: change it")

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.model, self.feed_forward, self.attention, self.depth)


def main(composed: Composed) -> int:
    """`moma describe`: a table, or one JSON object with `output=json`."""
    config: DescribeConfig = composed.config
    result = {"choices": composed.choices} | describe(config)
    if config.output == "json":
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def describe(config: DescribeConfig) -> dict[str, Any]:
    """Keys: params_*, flops_per_token_*, parts, padding, memory (bytes), tokens_per_step, modality_shares."""
    vocab = load_vocabulary(asset_folder(config.tokenizer))
    size = config.vocab_size or vocab.size
    with torch.device("meta"):
        model = Transformer(config.architecture, size, vocab.modalities, config.aux_routers)
    data, shares = config.data, config.data.modality_shares(vocab)
    table = parts_of(model, data.row_length, shares)
    padding = padding_of(model, data.rows, data.row_length, _counts(data, vocab))
    return totals(table) | {
        "parts": {name: asdict(part) for name, part in table.items()},
        "padding": {name: asdict(each) for name, each in padding.items()},
        "memory": step_memory(
            model,
            vocab,
            data.rows,
            data.row_length,
            data.images,
            config.precision,
            config.recompute,
            config.parts,
            config.state_dtype,
            config.grad_dtype,
        ),
        "tokens_per_step": data.tokens_per_step,
        "modality_shares": dict(zip(vocab.modalities, shares, strict=True)),
        "vocab_size": size,
        "ffn_dim": config.model.ffn_dim,
    }


def _counts(data: DataConfig, vocab: Vocabulary) -> tuple[int, ...]:
    """Tokens of a micro-batch per modality; further modalities count as text, as in `modality_shares`."""
    images = data.images * vocab.tokens_per_image
    return (data.rows * data.row_length - images, images, *([0] * len(vocab.extra_modalities)))


def print_table(result: dict[str, Any]) -> None:
    """The same facts for people."""
    print("  ".join(f"{group}={option}" for group, option in result["choices"].items()))
    print(f"{'part':24}{'parameters':>16}{'active':>16}{'MFLOP/token fwd':>18}")
    for name, part in result["parts"].items():
        print(f"{name:24}{part['params']:>16,}{part['params_active']:>16,}{part['flops'] / 1e6:>18.3f}")
    forward, causal = result["flops_per_token_forward"], result["flops_per_token_forward_causal"]
    print(f"{'total':24}{result['params_total']:>16,}{result['params_active']:>16,}{forward / 1e6:>18.3f}")
    train, tokens = result["flops_per_token_train"] / 1e6, result["tokens_per_step"]
    print(f"training: {train:.3f} MFLOP/token (attention in full), {tokens:,} tokens per step")
    print(f"forward with the causal half of attention: {causal / 1e6:.3f} MFLOP/token")
    for name, each in result["padding"].items():
        if each["held"] > each["needed"]:
            kind, more = name.replace("_", " "), each["held"] / each["needed"]
            print(f"padding:  {each['held']:,} {kind} held where {each['needed']:,} are needed ({more:.2f} x)")
    sizes = (f"{kind} {size / 2**20:,.1f} MiB" for kind, size in result["memory"].items())
    print(f"memory:   {', '.join(sizes)}")
