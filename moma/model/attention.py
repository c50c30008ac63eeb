"""Causal self-attention inside documents: QK-norm before RoPE, grouped queries, no biases (Chameleon section 2.2).

    q, k = RoPE(LayerNorm(q)), RoPE(LayerNorm(k))       token i sees j  iff  j <= i and document(j) = document(i)

`shared`: one set of weights for every token. `untied` (Mixture-of-Transformers, arXiv 2411.04996): Q, K, V, O and
the QK-norms have weights per modality, token t takes those of its own; the softmax still runs over all tokens:

    q_t, k_t, v_t = x_t W_qkv[m(t)]        y_t = attention(q_t, k, v) W_o[m(t)]           FLOPs of the shared form

The tokens are gathered in the order of their modalities, go through one matmul per modality, and back: as many rows as
shared weights multiply, also where the modalities' counts are known on the device only (padded groups: the grouped
matmul of `grouped_matmul.py`). Padding tokens have no modality: their q, k, v and outputs are exact zeros.

The mask is built once per micro-batch, outside the blocks, on the device's own stream and without waiting for it:

    CPU                                 the documents themselves: `blocked_attention.py` skips what nobody may see
    GPU, rows shorter than FLEX_ROW     boolean, for SDPA
    GPU, longer rows                    FlexAttention BlockMask, from the documents of every 128 tokens (`flex_mask`)
    GPU, rows of one document each      none: SDPA's causal kernels; only the host can know, so it must say so

Cached decoding has boolean masks everywhere. RoPE is our own dozen lines because the library's computes in fp32
whatever its input is, which float64 references rule out. Its cosines and sines are made once for all layers
(`rotation`): a compiled block would compute them for every head, layer and pass again.

Legend: R rows, L positions in a row, T = R L tokens, D dim, H heads, G key/value heads, J = H + 2 G, A head dim;
M modalities, N tokens of one modality, S slots of all, I and O inputs and outputs of a matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moma.modality import TokenGroups
from moma.model.blocked_attention import document_attention
from moma.model.grouped_matmul import grouped_matmul
from moma.model.precision import full_precision
from moma.model.slots import combine, dispatch, slots_of_tokens

QkNorm = Literal["shared", "per_head", "none"]
# keys from which FlexAttention beats SDPA under a boolean mask on a GPU: 0.72 times its tokens/s at 512 keys, 1.31
# times at 2048, 2.34 times at 8192 (one H200, 125M parameters: KempnerForge, pull request 207); 1024 was not measured
FLEX_ROW = 2048
FLEX_BLOCK = 128  # tokens of a BlockMask's block, queries and keys alike
# cuDNN trains 1.7 to 2.3 times as fast as FlashAttention 2, SDPA's first choice, on an H100 (transformers, issue 48163)
CAUSAL_BACKENDS = [
    *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
]


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)  # when it is first wanted: it loads the compiler


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

    `keys`: a boolean SDPA mask (R, 1, L, L_keys), a FlexAttention BlockMask, document numbers (R, L) in runs (on a
    CPU), or None: all keys up to the query's own.
    `document_RL`: the document numbers the mask was made from, so that a layer can make that of some of its tokens;
    None in cached decoding.
    """

    keys: Any
    document_RL: Tensor | None = None


def document_mask(document_RL: Tensor, alone: bool = False) -> AttentionMask:
    """What every layer of a micro-batch attends to, from document numbers (R, L), in runs: a document's tokens
    follow each other.

    `alone`: every row is known to be one document, without padding; a GPU then takes SDPA's causal kernels.
    """
    if document_RL.device.type != "cuda":
        return AttentionMask(document_RL, document_RL)
    if alone:
        return AttentionMask(None, document_RL)
    long = document_RL.shape[1] >= FLEX_ROW
    return AttentionMask(flex_mask(document_RL) if long else dense_mask(document_RL), document_RL)


def dense_mask(document_RL: Tensor) -> Tensor:
    """The same as a boolean mask (R, 1, L, L)."""
    length = document_RL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=document_RL.device).tril()
    return (document_RL[:, None, :, None] == document_RL[:, None, None, :]) & causal_LL


def flex_mask(document_RL: Tensor) -> BlockMask:
    """The same as a FlexAttention BlockMask: (R, L) -> blocks of FLEX_BLOCK queries times keys that attention visits.

    Two blocks may meet if their ranges of document numbers overlap, and see each other in full if both hold one
    document alone, the same; the mask itself decides inside the others. Exact for any numbers, and tight where a
    document's tokens stand together. Some thirty small operations on (L / 128)^2 numbers per row, where
    `create_block_mask` looks at L^2 and wants to be compiled for every shape.
    """
    n_rows, length = document_RL.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_RL[row, query] == document_RL[row, key])

    n_blocks, device = -(-length // FLEX_BLOCK), document_RL.device
    token = torch.arange(n_blocks * FLEX_BLOCK, device=device).clamp(max=length - 1)  # the last one fills its block up
    low_RN, high_RN = document_RL[:, token].view(n_rows, n_blocks, FLEX_BLOCK).aminmax(dim=-1)
    place_N = torch.arange(n_blocks, device=device)
    meet_RNN = (low_RN[:, :, None] <= high_RN[:, None]) & (low_RN[:, None] <= high_RN[:, :, None])
    meet_RNN &= place_N[:, None] >= place_N
    alone_RN = low_RN == high_RN
    whole_N = (place_N + 1) * FLEX_BLOCK <= length
    full_RNN = meet_RNN & alone_RN[:, None] & alone_RN[:, :, None] & (place_N[:, None] > place_N) & whole_N[:, None]

    def listed(blocks_RNN: Tensor) -> tuple[Tensor, Tensor]:  # how many blocks each one visits, and these first
        blocks_R1NN = blocks_RNN[:, None].to(torch.int32)
        order_R1NN = blocks_R1NN.argsort(dim=-1, descending=True, stable=True)
        return blocks_R1NN.sum(-1, dtype=torch.int32), order_R1NN.to(torch.int32)

    part_RNN = meet_RNN & ~full_RNN
    lists = (*listed(part_RNN), *listed(full_RNN), *listed(part_RNN.mT), *listed(full_RNN.mT))
    return BlockMask((length, length), *lists, (FLEX_BLOCK, FLEX_BLOCK), sees)


class Rotation(NamedTuple):
    """Of every token's angles, at least fp32, (R, 1, L, A): the cosines twice, the sines with a minus and without."""

    cos: Tensor
    sin: Tensor


def rotation(position_RL: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """What `rotate` needs of the positions, for queries and keys of one dtype; computed in at least fp32."""
    wide, half = torch.promote_types(dtype, torch.float32), head_dim // 2
    frequency = theta ** (-torch.arange(half, device=position_RL.device, dtype=wide) / half)
    angle = position_RL[:, None, :, None].to(wide) * frequency
    cos, sin = angle.cos(), angle.sin()
    return Rotation(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


def at_tokens(position: Tensor | Rotation, token_K: Tensor) -> Tensor | Rotation:
    """Positions (R, L), or what was made of them, of the flat tokens `token_K`, as one row; -1 gives token 0's."""
    token_K = token_K.clamp(min=0)
    if isinstance(position, Rotation):
        return Rotation(*(part.flatten(0, 2)[token_K][None, None] for part in position))
    return position.flatten()[token_K][None]


def rotate(x_RHLA: Tensor, turn: Rotation) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), pairs (a, a + A/2); in and out in at least fp32."""
    x_RHLA = x_RHLA.to(torch.promote_types(x_RHLA.dtype, torch.float32))
    a, b = x_RHLA.chunk(2, dim=-1)
    return torch.addcmul(x_RHLA * turn.cos, torch.cat([b, a], dim=-1), turn.sin)


def causal_attention(q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(A)) v over all keys up to the query's own, by the fastest kernel for training."""
    with sdpa_kernel(CAUSAL_BACKENDS, set_priority=True):
        grouped = q_RHLA.shape[1] != k_RGLA.shape[1]
        return F.scaled_dot_product_attention(q_RHLA, k_RGLA, v_RGLA, is_causal=True, enable_gqa=grouped)


def masked_attention(q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(A)) v under a boolean mask that leaves every query a key; softmax in at least fp32."""
    grouped = q_RHLA.shape[1] != k_RGLA.shape[1]
    if grouped and q_RHLA.is_cuda:  # the kernels that take a mask know no groups
        k_RGLA, v_RGLA = (x.repeat_interleave(q_RHLA.shape[1] // x.shape[1], 1) for x in (k_RGLA, v_RGLA))
        grouped = False
    return F.scaled_dot_product_attention(q_RHLA, k_RGLA, v_RGLA, attn_mask=mask, enable_gqa=grouped)


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
        """QK-norm of queries ("q") or keys ("k"), in at least fp32."""
        if not self.qk_norm:
            return x_RHLA
        x_RHLA, size = x_RHLA.to(torch.promote_types(x_RHLA.dtype, torch.float32)), (self.head_dim,)
        weight, bias = (self.qk_norm[f"{name}_{leaf}"].to(x_RHLA.dtype) for leaf in ("weight", "bias"))
        if self.n_modalities is None and weight.numel() == self.head_dim:
            return F.layer_norm(x_RHLA, size, weight.view(size), bias.view(size), self.norm_eps)
        if self.n_modalities is not None:
            weight, bias = (gains_by_modality(p, groups, len(x_RHLA)) for p in (weight, bias))
        return torch.addcmul(bias, F.layer_norm(x_RHLA, size, eps=self.norm_eps), weight)

    def _projected(self, x_RLI: Tensor, matrix: nn.Linear | Tensor, groups: TokenGroups) -> Tensor:
        if isinstance(matrix, nn.Linear):
            return matrix(x_RLI)
        return by_modality(x_RLI.flatten(0, 1), matrix, groups).unflatten(0, x_RLI.shape[:2])

    def forward(
        self,
        x_RLD: Tensor,
        position: Tensor | Rotation,
        mask: AttentionMask,
        groups: TokenGroups,
        cache: Any = None,
    ) -> Tensor:
        """`position`: (R, L), or the rotation made of it once for all layers; `groups`: of the flat R L tokens (shared
        weights do not read it); `cache` has `update(k, v) -> (k, v)`, in whose type attention is then computed."""
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        qkv_RLJA = self._projected(x_RLD, self.wqkv, groups).unflatten(2, (sum(heads), self.head_dim))
        q_RHLA, k_RGLA, v_RGLA = qkv_RLJA.transpose(1, 2).split(heads, dim=1)
        q_RHLA, k_RGLA = self._normed(q_RHLA, "q", groups), self._normed(k_RGLA, "k", groups)
        if not isinstance(position, Rotation):
            position = rotation(position, self.head_dim, self.rope_theta, q_RHLA.dtype)
        q_RHLA, k_RGLA = (rotate(x, position).to(v_RGLA.dtype) for x in (q_RHLA, k_RGLA))
        if cache is not None:
            k_RGLA, v_RGLA = cache.update(k_RGLA, v_RGLA)
            with full_precision(v_RGLA):
                y_RHLA = masked_attention(q_RHLA.to(k_RGLA.dtype), k_RGLA, v_RGLA, mask.keys)
        elif mask.keys is None:
            y_RHLA = causal_attention(q_RHLA, k_RGLA, v_RGLA)
        elif isinstance(mask.keys, Tensor) and mask.keys.dtype != torch.bool:
            y_RHLA = document_attention(q_RHLA, k_RGLA, v_RGLA, mask.keys)
        elif isinstance(mask.keys, Tensor):
            y_RHLA = masked_attention(q_RHLA, k_RGLA, v_RGLA, mask.keys)
        else:
            grouped = self.n_heads != self.n_kv_heads
            y_RHLA = _compiled_flex_attention()(q_RHLA, k_RGLA, v_RGLA, block_mask=mask.keys, enable_gqa=grouped)
        return self._projected(y_RHLA.transpose(1, 2).flatten(2), self.wo, groups)
