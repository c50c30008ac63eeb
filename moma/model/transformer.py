"""The decoder: embeddings, blocks, final norm, untied head (Chameleon section 2.2, MoMa section 2.1).

    tokens (R, L) -> hidden (R, L, D) -> [loss.py: chunked cross-entropy | logits (R, L, V)]

The head is not part of `forward`: the loss streams over it in chunks, and image decoding reads only the rows of
image codes. Refuses nothing at run time: `ModelConfig` and the data boundary have validated everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moma.modality import TokenGroups
from moma.model.attention import Attention, QkNorm
from moma.model.block import Block, NormOrder, RMSNorm
from moma.model.feed_forward import FeedForwardConfig, Mode, build_feed_forward
from moma.model.init import SWIN_GAIN, init_weights
from moma.model.routing import RouterStats


@dataclass(frozen=True)
class ModelConfig:
    """Size and wiring of the decoder; the named sizes are Table 1 of the paper."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None  # None: as many as heads
    hidden_dim: int | None = None  # None: 8 dim / 3 rounded up to a multiple of 32
    norm_order: NormOrder = "swin"
    norm_eps: float = 1e-5
    qk_norm: QkNorm = "shared"
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        sizes = (self.dim, self.n_layers, self.n_heads, self.kv_heads, self.ffn_dim)
        if min(sizes) < 1:
            raise ValueError(
                f"got dim, n_layers, n_heads, n_kv_heads, hidden_dim = {sizes}, need at least 1 of each: raise them"
            )
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(
                f"got dim={self.dim} and n_heads={self.n_heads}, need an even dim / n_heads: change one of the two"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"got n_heads={self.n_heads} and n_kv_heads={self.n_kv_heads}, need a multiple: change one of the two"
            )

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_dim(self) -> int:
        """SwiGLU width: 8 d / 3 rounded up to a multiple of 32 (a declared difference from Table 1)."""
        return -(-8 * self.dim // 3 // 32) * 32 if self.hidden_dim is None else self.hidden_dim


class Transformer(nn.Module):
    """Early-fusion decoder over one vocabulary; its feed-forwards may be dense or sparse."""

    def __init__(
        self,
        config: ModelConfig,
        feed_forward: FeedForwardConfig,
        vocab_size: int,
        modalities: tuple[str, ...] = ("text", "image"),
        aux_routers: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.feed_forward = config, vocab_size, feed_forward
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList()
        for _ in range(config.n_layers):
            attention = Attention(
                config.dim,
                config.n_heads,
                config.kv_heads,
                config.qk_norm,
                config.rope_theta,
                config.norm_eps,
            )
            sparse = build_feed_forward(feed_forward, config.dim, config.ffn_dim, modalities, aux_routers)
            self.blocks.append(Block(config.dim, attention, sparse, config.norm_order, config.norm_eps))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)

    def forward(
        self,
        tokens_RL: Tensor,
        position_RL: Tensor,
        mask: Any,
        groups: TokenGroups,
        mode: Mode = "train",
        caches: Sequence[Any] | None = None,
        noise_NTE: Tensor | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        """Hidden states (R, L, D) after the final norm, and the decisions of every layer that has a router.

        `noise_NTE`: routing noise of the N layers (training only).
        """
        x_RLD, stats = self.embedding(tokens_RL), []
        for layer, block in enumerate(self.blocks):
            cache = None if caches is None else caches[layer]
            noise_TE = None if noise_NTE is None else noise_NTE[layer]
            x_RLD, layer_stats = block(x_RLD, position_RL, mask, groups, mode, cache, noise_TE)
            if layer_stats is not None:
                stats.append(layer_stats)
        return self.norm(x_RLD), stats


def build_model(
    config: ModelConfig,
    feed_forward: FeedForwardConfig,
    vocab_size: int,
    modalities: tuple[str, ...] = ("text", "image"),
    *,
    seed: int,
    aux_routers: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Build on the meta device, materialise on `device`, initialise every parameter from `seed` (fp32 masters)."""
    with torch.device("meta"):
        model = Transformer(config, feed_forward, vocab_size, modalities, aux_routers).to(dtype)
    model.to_empty(device=device)
    pre = config.norm_order == "pre"
    init_weights(model, seed, (2 * config.n_layers) ** -0.5 if pre else 1.0, 1.0 if pre else SWIN_GAIN)
    return model
