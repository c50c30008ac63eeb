"""Causal self-attention inside documents: QK-norm before RoPE, grouped queries, no biases (Chameleon section 2.2).

    q, k = RoPE(LayerNorm(q)), RoPE(LayerNorm(k))       token i sees j  iff  j <= i and document(j) = document(i)

The mask is built once per micro-batch, outside the blocks: a boolean tensor on the CPU (FlexAttention has no backward
there), a FlexAttention BlockMask on a GPU. On the CPU, rows of up to SHORT_ROW keys in bf16 take two plain matmuls:
SDPA does not use the processor's bf16 units and takes 2.6 times as long (512 keys, head dim 64, forward + backward).
RoPE is our own dozen lines because the library's computes in fp32 whatever its input is, which float64 references
rule out.

Legend: R rows, L positions in a row, D dim, H heads, G key/value heads, A head dim.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

QkNorm = Literal["shared", "per_head", "none"]
SHORT_ROW = 1024  # keys: beyond it the score matrix costs more memory than the matmuls save time
_compiled_flex_attention: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)


def document_mask(document_RL: Tensor) -> Any:
    """What every layer of a micro-batch attends to, from document numbers (R, L): SDPA mask or BlockMask."""
    n_rows, length = document_RL.shape
    if document_RL.device.type == "cuda":

        def same_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (document_RL[row, query] == document_RL[row, key])

        return create_block_mask(same_document, n_rows, None, length, length, document_RL.device)
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=document_RL.device).tril()
    return (document_RL[:, None, :, None] == document_RL[:, None, None, :]) & causal_LL


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


class Attention(nn.Module):
    """Self-attention of one block, (R, L, D) -> (R, L, D)."""

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int, qk_norm: QkNorm, rope_theta: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.rope_theta, self.norm_eps = rope_theta, norm_eps
        self.wqkv = nn.Linear(dim, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)
        self.qk_norm = nn.ParameterDict()
        if qk_norm != "none":
            for name, heads in (("q", n_heads), ("k", n_kv_heads)):
                shape = (heads if qk_norm == "per_head" else 1, 1, self.head_dim)
                self.qk_norm[f"{name}_weight"] = nn.Parameter(torch.empty(shape))
                self.qk_norm[f"{name}_bias"] = nn.Parameter(torch.empty(shape))

    def _normed(self, x_RHLA: Tensor, name: str) -> Tensor:
        if not self.qk_norm:
            return x_RHLA
        wide = torch.promote_types(x_RHLA.dtype, torch.float32)
        normed = F.layer_norm(x_RHLA.to(wide), (self.head_dim,), eps=self.norm_eps)
        return (normed * self.qk_norm[f"{name}_weight"] + self.qk_norm[f"{name}_bias"]).to(x_RHLA.dtype)

    def forward(self, x_RLD: Tensor, position_RL: Tensor, mask: Any, cache: Any = None) -> Tensor:
        """`mask` from `document_mask`, or a boolean (R, 1, L, L_keys); `cache` has `update(k, v) -> (k, v)`."""
        n_rows, length, _ = x_RLD.shape
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        qkv = self.wqkv(x_RLD).view(n_rows, length, sum(heads), self.head_dim).transpose(1, 2)
        q_RHLA, k_RGLA, v_RGLA = qkv.split(heads, dim=1)
        q_RHLA = rotate(self._normed(q_RHLA, "q"), position_RL, self.rope_theta)
        k_RGLA = rotate(self._normed(k_RGLA, "k"), position_RL, self.rope_theta)
        if cache is not None:
            k_RGLA, v_RGLA = cache.update(k_RGLA, v_RGLA)
        if isinstance(mask, Tensor):
            y_RHLA = masked_attention(q_RHLA, k_RGLA, v_RGLA, mask)
        else:
            grouped = self.n_heads != self.n_kv_heads
            y_RHLA = _compiled_flex_attention(q_RHLA, k_RGLA, v_RGLA, block_mask=mask, enable_gqa=grouped)
        return self.wo(y_RHLA.transpose(1, 2).reshape(n_rows, length, -1))
