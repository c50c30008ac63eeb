"""The decoder: embeddings, blocks, final norm, untied head (Chameleon section 2.2, MoMa section 2.1).

    tokens (R, L) -> hidden (R, L, D) -> [loss.py: chunked cross-entropy | logits (R, L, V)]

The head is not part of `forward`: the loss streams over it in chunks, and image decoding reads only the rows of
image codes. Refuses nothing at run time: `ModelConfig` and the data boundary have validated everything.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from moma.modality import TokenGroups
from moma.model.attention import (
    ATTENTIONS,
    Attention,
    AttentionConfig,
    AttentionMask,
    QkNorm,
    SharedAttentionConfig,
    UntiedAttentionConfig,
    rotation,
)
from moma.model.block import Block, NormOrder, RMSNorm
from moma.model.depth import DEPTHS, DepthBlock, DepthConfig, FullDepthConfig
from moma.model.feed_forward import (
    AUX_MODES,
    CAUSAL_MODES,
    FEED_FORWARDS,
    UNDISTURBED,
    DenseConfig,
    FeedForwardConfig,
    Mode,
    SparseFeedForward,
    build_feed_forward,
)
from moma.model.init import SWIN_GAIN, init_weights
from moma.model.routing import Disturbance, RouterStats, State
from moma.schema import kind_field

QK_NORM_EPS = 1e-5  # of LayerNorm, as in Chameleon's code, whatever `norm_eps` of the other norms is


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


@dataclass(frozen=True)
class Architecture:
    """Everything that decides a model's parameters, beside the vocabulary: a part of every run's configuration."""

    model: ModelConfig
    feed_forward: FeedForwardConfig = kind_field(FEED_FORWARDS, default=DenseConfig())
    attention: AttentionConfig = kind_field(ATTENTIONS, default=SharedAttentionConfig())
    depth: FullDepthConfig | DepthConfig = kind_field(DEPTHS, default=FullDepthConfig())


ARCHITECTURE = tuple(field.name for field in fields(Architecture))


class Transformer(nn.Module):
    """Early-fusion decoder over one vocabulary; feed-forwards, attention and depth may be sparse or untied."""

    def __init__(
        self,
        architecture: Architecture,
        vocab_size: int,
        modalities: tuple[str, ...] = ("text", "image"),
        aux_routers: bool = False,
    ) -> None:
        super().__init__()
        config = architecture.model
        self.architecture, self.config, self.vocab_size = architecture, config, vocab_size
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            _block(architecture, layer, modalities, aux_routers) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)

    def forward(
        self,
        tokens_RL: Tensor,
        position_RL: Tensor,
        mask: AttentionMask,
        groups: TokenGroups,
        mode: Mode = "train",
        caches: Sequence[Any] | None = None,
        disturbances: Sequence[Disturbance] | None = None,
    ) -> tuple[Tensor, dict[str, RouterStats]]:
        """Hidden states (R, L, D) after the final norm, and the decisions of every router by its name: "3" for the
        experts of layer 3, "3.depth" for its depth router.

        `disturbances`: noise and planted errors, one per layer.
        """
        x_RLD, stats = self.embedding(tokens_RL), {}
        config = self.config
        position = rotation(position_RL, config.dim // config.n_heads, config.rope_theta, x_RLD.dtype)
        for layer, block in enumerate(self.blocks):
            cache = None if caches is None else caches[layer]
            disturbance = UNDISTURBED if disturbances is None else disturbances[layer]
            x_RLD, found = block(x_RLD, position, mask, groups, mode, cache, disturbance)
            stats |= {f"{layer}{suffix}": value for suffix, value in found.items()}
        return self.norm(x_RLD), stats

    def routers(self) -> dict[str, SparseFeedForward | DepthBlock]:
        """The modules that route, by the names of their statistics; groups of one expert do not."""
        found: dict[str, SparseFeedForward | DepthBlock] = {}
        for layer, block in enumerate(cast(Iterable[Block], self.blocks)):
            if isinstance(block.feed_forward, SparseFeedForward) and block.feed_forward.n_routed:
                found[f"{layer}"] = block.feed_forward
            if isinstance(block, DepthBlock):
                found[f"{layer}.depth"] = block
        return found

    @property
    def needs_future(self) -> bool:
        """Whether a training rule looks at other tokens, so that causal inference needs one of `causal_modes`."""
        return any(isinstance(r, DepthBlock) or r.needs_future for r in self.routers().values())

    def causal_modes(self) -> tuple[Mode, ...]:
        """Causal routing modes that this model can run in; all of them, and all the same, if its rules are causal."""
        routers = [r for r in self.routers().values() if isinstance(r, DepthBlock) or r.needs_future]
        has_aux = all(r.aux is not None and len(list(r.aux.parameters())) for r in routers)
        return tuple(mode for mode in CAUSAL_MODES if has_aux or mode not in AUX_MODES)

    @torch.no_grad()
    def update_routing(self, observed: dict[str, State], skip: Tensor | None = None) -> None:
        """New routing state of every router from what it observed, averaged over one optimizer step.

        `skip`: a true scalar leaves everything as it is, decided on the device.
        """
        routers = self.routers()
        for name, values in observed.items():
            router = routers[name]
            before = {key: value.clone() for key, value in router.routing_state().items()}
            router.update_routing(values)
            if skip is not None:
                for key, value in router.routing_state().items():
                    value.copy_(torch.where(skip, before[key], value))


def _block(architecture: Architecture, layer: int, modalities: tuple[str, ...], aux_routers: bool) -> Block:
    """One block of the kind that the architecture wants at this layer."""
    config, depth = architecture.model, architecture.depth
    untied = len(modalities) if isinstance(architecture.attention, UntiedAttentionConfig) else None
    attention = Attention(
        config.dim,
        config.n_heads,
        config.kv_heads,
        config.qk_norm,
        config.rope_theta,
        QK_NORM_EPS,
        untied,
    )
    feed_forward = build_feed_forward(
        architecture.feed_forward, layer, config.n_layers, config.dim, config.ffn_dim, modalities, aux_routers
    )
    parts = (config.dim, attention, feed_forward, config.norm_order, config.norm_eps)
    if isinstance(depth, DepthConfig) and depth.chosen(layer):
        return DepthBlock(*parts, depth, len(modalities), aux_routers)
    return Block(*parts)


def build_model(
    architecture: Architecture,
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
        model = Transformer(architecture, vocab_size, modalities, aux_routers).to(dtype)
    model.to_empty(device=device)
    config = architecture.model
    pre = config.norm_order == "pre"
    init_weights(model, seed, (2 * config.n_layers) ** -0.5 if pre else 1.0, 1.0 if pre else SWIN_GAIN)
    return model
