"""Causal self-attention inside documents: QK-norm before RoPE, grouped queries, no biases (Chameleon section 2.2).

    q, k = RoPE(LayerNorm(q)), RoPE(LayerNorm(k))       token i sees j  iff  j <= i and document(j) = document(i)

`shared`: one set of weights for every token. `untied` (Mixture-of-Transformers, arXiv 2411.04996): Q, K, V, O and
the QK-norms have weights per modality, token t takes those of its own; the softmax still runs over all tokens:

    q_t, k_t, v_t = x_t W_qkv[m(t)]        y_t = attention(q_t, k, v) W_o[m(t)]           FLOPs of the shared form

The tokens are gathered in the order of their modalities, go through one matmul per modality, and back: as many rows as
shared weights multiply, also where the modalities' counts are known on the device only (padded groups: the grouped
matmul of `experts.py`). Padding tokens have no modality: their q, k, v and outputs are exact zeros.

The mask is built once per micro-batch, outside the blocks: a boolean tensor on the CPU (FlexAttention has no backward
there), a FlexAttention BlockMask on a GPU. On the CPU, rows of up to SHORT_ROW keys in bf16 take two plain matmuls:
SDPA does not use the processor's bf16 units and takes 2.6 times as long (512 keys, head dim 64, forward + backward).
RoPE is our own dozen lines because the library's computes in fp32 whatever its input is, which float64 references
rule out.

Legend: R rows, L positions in a row, T = R L tokens, D dim, H heads, G key/value heads, J = H + 2 G, A head dim;
M modalities, N tokens of one modality, S slots of all, I and O inputs and outputs of a matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from moma.modality import TokenGroups
from moma.model.experts import combine, dispatch, grouped_matmul, slots_of_tokens

QkNorm = Literal["shared", "per_head", "none"]
SHORT_ROW = 1024  # keys: beyond it the score matrix costs more memory than the matmuls save time
_compiled_flex_attention: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True)
class SharedAttentionConfig:
    """One set of weights for the tokens of every modality."""

    kind: Literal["shared"] = "shared"


@dataclass(frozen=True)
class UntiedAttentionConfig:
    """Q, K, V, O and QK-norm weights per modality (Mixture-of-Transformers, arXiv 2411.04996)."""

    kind: Literal["untied"] = "untied"


ATTENTIONS = {"shared": SharedAttentionConfig, "untied": UntiedAttentionConfig}
AttentionConfig = SharedAttentionConfig | UntiedAttentionConfig


class AttentionMask(NamedTuple):
    """Which keys each query sees.

    `keys`: a boolean SDPA mask (R, 1, L, L_keys), or a FlexAttention BlockMask. `document_RL`: the document numbers
    the mask was made from, so that a layer can make that of some of its tokens; None in cached decoding.
    """

    keys: Any
    document_RL: Tensor | None = None


def document_mask(document_RL: Tensor) -> AttentionMask:
    """What every layer of a micro-batch attends to, from document numbers int64 (R, L)."""
    n_rows, length = document_RL.shape
    if document_RL.device.type == "cuda":

        def same_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (document_RL[row, query] == document_RL[row, key])

        keys = create_block_mask(same_document, n_rows, None, length, length, document_RL.device)
        return AttentionMask(keys, document_RL)
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=document_RL.device).tril()
    keys_RLL = (document_RL[:, None, :, None] == document_RL[:, None, None, :]) & causal_LL
    return AttentionMask(keys_RLL, document_RL)


def rotate(x_RHLA: Tensor, position_RL: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), pairs (a, a + A/2); computed in at least fp32."""
    wide, half = torch.promote_types(x_RHLA.dtype, torch.float32), x_RHLA.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x_RHLA.device, dtype=wide) / half)
    angle = position_RL[:, None, :, None].to(wide) * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x_RHLA.to(wide).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_RHLA.dtype)


def masked_attention(q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(A)) v under a boolean mask that leaves every query a key; softmax in at least fp32."""
    short = k_RGLA.shape[2] <= SHORT_ROW and q_RHLA.dtype == torch.bfloat16 and not q_RHLA.is_cuda
    if not short:
        grouped = q_RHLA.shape[1] != k_RGLA.shape[1]
        return F.scaled_dot_product_attention(q_RHLA, k_RGLA, v_RGLA, attn_mask=mask, enable_gqa=grouped)
    repeats = q_RHLA.shape[1] // k_RGLA.shape[1]
    k_RHLA, v_RHLA = (x if repeats == 1 else x.repeat_interleave(repeats, 1) for x in (k_RGLA, v_RGLA))
    score = (q_RHLA * q_RHLA.shape[-1] ** -0.5) @ k_RHLA.transpose(-1, -2)
    return torch.softmax(score.float().masked_fill(~mask, -torch.inf), dim=-1).to(q_RHLA.dtype) @ v_RHLA


def slots_by_modality(groups: TokenGroups) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens in the order of their modalities: `token_S` (-1: an empty slot), the inverse map `slots_T1` (-1: no
    slot, as padding has none), and where each modality ends.

    Exact groups: S is the sum of their sizes, which say the ends (None). Padded groups: S = T whatever their bounds,
    and `ends_M` int32 on the device.
    """
    slot_T, start, ends = torch.full_like(groups.slot[0], -1), 0, []
    for m, own_T in enumerate(groups.slot):
        slot_T = torch.where(own_T >= 0, own_T + start, slot_T)
        start = start + (groups.index[m].numel() if groups.valid is None else groups.valid[m].sum())
        ends.append(start)
    if groups.valid is None:
        return torch.cat(groups.index), slot_T[:, None], None
    return slots_of_tokens(slot_T[None], slot_T.numel())[:, 0], slot_T[:, None], torch.stack(ends).to(torch.int32)


def by_modality(x_TI: Tensor, weight_MIO: Tensor, groups: TokenGroups) -> Tensor:
    """(T, I) -> (T, O): every token times the matrix of its modality; zeros for padding tokens."""
    token_S, slots_T1, ends_M = slots_by_modality(groups)
    x_SI = dispatch(x_TI, token_S, slots_T1)
    if ends_M is None:
        parts = x_SI.split([index_N.numel() for index_N in groups.index])
        y_SO = torch.cat([x_NI @ weight_IO for x_NI, weight_IO in zip(parts, weight_MIO.unbind(), strict=True)])
    else:
        y_SO = grouped_matmul(x_SI, weight_MIO, ends_M)
    return combine(y_SO, slots_T1, token_S)


def gains_by_modality(gain_MH1A: Tensor, groups: TokenGroups, n_rows: int) -> Tensor:
    """(R, H, L, A): the gains (or biases) of every token's modality; zeros for padding tokens."""
    own: Tensor = gain_MH1A.new_zeros(())
    for gain_H1A, slot_T in zip(gain_MH1A.unbind(), groups.slot, strict=True):
        own = torch.where((slot_T >= 0).view(n_rows, 1, -1, 1), gain_H1A, own)
    return own


class Attention(nn.Module):
    """Self-attention of one block, (R, L, D) -> (R, L, D).

    `n_modalities` None: shared weights, `nn.Linear`s `wqkv` and `wo`. Else untied: parameters `wqkv` (M, D, J A) and
    `wo` (M, H A, D), and a leading M on those of `qk_norm`.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        qk_norm: QkNorm,
        rope_theta: float,
        norm_eps: float,
        n_modalities: int | None = None,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.rope_theta, self.norm_eps, self.n_modalities = rope_theta, norm_eps, n_modalities
        projected, attended = (n_heads + 2 * n_kv_heads) * self.head_dim, n_heads * self.head_dim
        if n_modalities is None:
            self.wqkv = nn.Linear(dim, projected, bias=False)
            self.wo = nn.Linear(attended, dim, bias=False)
        else:
            self.wqkv = nn.Parameter(torch.empty(n_modalities, dim, projected))
            self.wo = nn.Parameter(torch.empty(n_modalities, attended, dim))
        self.qk_norm = nn.ParameterDict()
        if qk_norm != "none":
            for name, heads in (("q", n_heads), ("k", n_kv_heads)):
                shape = (heads if qk_norm == "per_head" else 1, 1, self.head_dim)
                if n_modalities is not None:
                    shape = (n_modalities, *shape)
                self.qk_norm[f"{name}_weight"] = nn.Parameter(torch.empty(shape))
                self.qk_norm[f"{name}_bias"] = nn.Parameter(torch.empty(shape))

    def _normed(self, x_RHLA: Tensor, name: str, groups: TokenGroups) -> Tensor:
        """QK-norm of queries ("q") or keys ("k")."""
        if not self.qk_norm:
            return x_RHLA
        wide = torch.promote_types(x_RHLA.dtype, torch.float32)
        normed_RHLA = F.layer_norm(x_RHLA.to(wide), (self.head_dim,), eps=self.norm_eps)
        weight, bias = self.qk_norm[f"{name}_weight"], self.qk_norm[f"{name}_bias"]
        if self.n_modalities is not None:
            weight, bias = (gains_by_modality(p, groups, len(x_RHLA)) for p in (weight, bias))
        return (normed_RHLA * weight + bias).to(x_RHLA.dtype)

    def _projected(self, x_RLI: Tensor, matrix: nn.Linear | Tensor, groups: TokenGroups) -> Tensor:
        if isinstance(matrix, nn.Linear):
            return matrix(x_RLI)
        return by_modality(x_RLI.flatten(0, 1), matrix, groups).unflatten(0, x_RLI.shape[:2])

    def forward(
        self, x_RLD: Tensor, position_RL: Tensor, mask: AttentionMask, groups: TokenGroups, cache: Any = None
    ) -> Tensor:
        """`groups`: of the flat R L tokens (shared weights do not read it); `cache` has `update(k, v) -> (k, v)`."""
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        qkv_RLJA = self._projected(x_RLD, self.wqkv, groups).unflatten(2, (sum(heads), self.head_dim))
        q_RHLA, k_RGLA, v_RGLA = qkv_RLJA.transpose(1, 2).split(heads, dim=1)
        q_RHLA, k_RGLA = self._normed(q_RHLA, "q", groups), self._normed(k_RGLA, "k", groups)
        q_RHLA = rotate(q_RHLA, position_RL, self.rope_theta)
        k_RGLA = rotate(k_RGLA, position_RL, self.rope_theta)
        if cache is not None:
            k_RGLA, v_RGLA = cache.update(k_RGLA, v_RGLA)
        if isinstance(mask.keys, Tensor):
            y_RHLA = masked_attention(q_RHLA, k_RGLA, v_RGLA, mask.keys)
        else:
            grouped = self.n_heads != self.n_kv_heads
            y_RHLA = _compiled_flex_attention(q_RHLA, k_RGLA, v_RGLA, block_mask=mask.keys, enable_gqa=grouped)
        return self._projected(y_RHLA.transpose(1, 2).flatten(2), self.wo, groups)
