"""Parameters, FLOPs and memory of any combination, from the meta device: nothing is allocated, no data is read.

Memory is an estimate for one step on one device, eager, in bytes by kind:

    parameters, gradients   4 B each          optimizer       AdamW, 8 B          (all parameters trained)
    activations             what autograd keeps of the blocks, one of each kind measured without memory
    loss_head               hidden states, chunk of logits, gradient of the head, all at once
    peak                    parameters + optimizer + max(loss head + activations, one block's backward + gradients)

Compiled blocks keep less. `tests/test_describe.py` holds the estimate within 10 % of a measured peak on `tiny`.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moma.config import Composed, kind_field
from moma.modality import TokenGroups, Vocabulary
from moma.model.attention import ATTENTIONS, AttentionConfig, AttentionMask, SharedAttentionConfig
from moma.model.block import Block
from moma.model.depth import DEPTHS, DepthConfig, FullDepthConfig
from moma.model.feed_forward import FEED_FORWARDS, FeedForwardConfig
from moma.model.flops import padding_of, parts_of, totals
from moma.model.loss import CHUNK_TOKENS
from moma.model.transformer import Architecture, ModelConfig, Transformer
from moma.tokenizer.vocab import asset_folder, load_vocabulary
from moma.train import DataConfig


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
    output: Literal["text", "json"] = "text"

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
        "memory": memory(config, model, vocab),
        "tokens_per_step": data.tokens_per_step,
        "modality_shares": dict(zip(vocab.modalities, shares, strict=True)),
        "vocab_size": size,
        "ffn_dim": config.model.ffn_dim,
    }


def memory(config: DescribeConfig, model: Transformer, vocab: Vocabulary) -> dict[str, int]:
    """Bytes of one training step by kind, and their peak; `model` on the meta device, all of it trained."""
    data, precision = config.data, config.precision
    params = sum(p.numel() for p in model.parameters())
    tokens, dim, size = data.rows * data.row_length, model.config.dim, model.vocab_size
    low = 2 if precision == "bf16" else 4
    blocks = block_activations(config, vocab)
    chunk = min(CHUNK_TOKENS, tokens)
    casts = low * size * dim + low * tokens * dim if precision == "bf16" else 0
    # of one chunk: logits, their fp32 copy (bf16 only), log-softmax; both gradients; the cast weight and states
    wide = 4 if precision == "bf16" else 0
    head = chunk * size * (low + wide + 4) + 4 * (size * dim + tokens * dim) + casts
    stem = 4 * tokens * dim * 2  # embedding output, final norm
    bytes_ = {
        "parameters": 4 * params,
        "gradients": 4 * params,
        "optimizer": 8 * params,
        "activations": sum(kept for kept, _ in blocks) + stem,
        "loss_head": head,
    }
    forward = bytes_["activations"] + head
    backward = bytes_["gradients"] + max(kept + transient for kept, transient in blocks)
    return bytes_ | {"peak": 12 * params + max(forward, backward)}


def block_activations(config: DescribeConfig, vocab: Vocabulary) -> list[tuple[int, int]]:
    """Per block, bytes that autograd keeps of one micro-batch, and the largest of these tensors."""
    data, found = config.data, {}
    with FakeTensorMode():  # meta tensors that say "cpu", so that autocast applies
        model = Transformer(config.architecture, 1, vocab.modalities, config.aux_routers)
        x_RLD = torch.empty(data.rows, data.row_length, config.model.dim, requires_grad=True)
        position_RL = torch.empty(data.rows, data.row_length, dtype=torch.int64)
        keys = torch.empty(data.rows, 1, data.row_length, data.row_length, dtype=torch.bool)
        mask, groups = AttentionMask(keys, torch.empty_like(position_RL)), _groups(data, vocab)
        blocks = [(_kind(block), block) for block in cast(Iterable[Block], model.blocks)]
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            for kind, block in blocks:
                if kind not in found:
                    found[kind] = _kept(block, x_RLD, position_RL, mask, groups)
    return [found[kind] for kind, _ in blocks]


def _kind(block: Block) -> Any:
    """What two blocks have in common if they keep the same."""
    return type(block), tuple((name, p.shape) for name, p in block.named_parameters())


def _kept(
    block: Block, x_RLD: Tensor, position_RL: Tensor, mask: AttentionMask, groups: TokenGroups
) -> tuple[int, int]:
    """Bytes that autograd keeps of one block beside its inputs and parameters, and the largest tensor of them."""
    assert mask.document_RL is not None
    given = (position_RL, mask.keys, mask.document_RL, *groups.index, *groups.slot, *block.parameters())
    own = {tensor.untyped_storage()._cdata for tensor in given}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # keeps storages alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x_RLD, position_RL, mask, groups, "train")
    return sum(kept.values()), max(kept.values(), default=0)


def _counts(data: DataConfig, vocab: Vocabulary) -> tuple[int, ...]:
    """Tokens of a micro-batch per modality; further modalities count as text, as in `modality_shares`."""
    images = data.images * vocab.tokens_per_image
    return (data.rows * data.row_length - images, images, *([0] * len(vocab.extra_modalities)))


def _groups(data: DataConfig, vocab: Vocabulary) -> TokenGroups:
    """Index sets of the right sizes without contents."""
    counts, tokens = _counts(data, vocab), data.rows * data.row_length
    empty = lambda n: torch.empty(n, dtype=torch.int64)  # noqa: E731
    return TokenGroups(tuple(empty(n) for n in counts), tuple(empty(tokens) for _ in counts))


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
