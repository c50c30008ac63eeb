"""Cached decoding for rows of different contents: what each row sees, and where its tokens stand.

    slot       0    1    2    3    4    5    6        one static cache per layer, the same slot for every row
    row 0      BOS  a    b    c    BOI  c0   c1       visible: all                     position = slot
    row 1      .    .    BOS  d    BOI  c0   c1       prompts end together: left padding, never visible
    row 2      BOS  BOS  BOS  BOS  BOI  c0   c1       restarted at slot 3: sees BOS BOI c0 c1

Every row takes a slot for every column fed, also where it has no token; `visible` says which slots a row attends
to, and a token's position is the number of visible slots before it, hence exact inside the document. An absent
token attends to itself alone (an empty softmax is not a number) and stands in no modality group. A restart
forgets a row's past without touching the cache: that is how the unconditional rows of classifier-free guidance
begin a picture.

Refuses to feed beyond the cache. Legend: R rows, L tokens fed at once, S slots, D dim.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from moma.modality import Vocabulary, padded_groups
from moma.model.attention import AttentionMask
from moma.model.block import Block
from moma.model.depth import DepthBlock
from moma.model.feed_forward import Mode
from moma.model.transformer import Transformer
from moma.twin import twin_of


def compute_dtype(model: Transformer) -> torch.dtype:
    """Type of keys and values: the autocast type where autocast is on, but for float64, else the parameters'."""
    weight = model.embedding.weight
    on = torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(weight.device.type) if on else weight.dtype


def for_decoding(model: Transformer) -> Transformer:
    """A model that shares everything with `model` but its blocks' matrices, which have the compute type (autocast would
    cast them at every token) and, on a CPU, lie as `laid_out` says. Itself where there is nothing to change."""
    low = compute_dtype(model)
    weight = model.embedding.weight
    if low == weight.dtype and weight.device.type != "cpu":
        return model
    twin = twin_of(model, low)
    for matrix in twin.low:
        stored_out_in = matrix.ndim == 2  # `nn.Linear`; stacks of experts and of modalities are (..., in, out)
        matrix.data = laid_out(matrix.data if stored_out_in else matrix.data.mT)
        matrix.data = matrix.data if stored_out_in else matrix.data.mT
    return twin.model


def laid_out(weight_OI: Tensor) -> Tensor:
    """The same matrix (..., O, I) in the order in which a CPU reads it fastest for a single token: bf16 by outputs,
    others by inputs (22 GB/s against 6, 26 against 15: one core, 65,536 x 512)."""
    if weight_OI.device.type != "cpu":
        return weight_OI
    return weight_OI.contiguous() if weight_OI.dtype == torch.bfloat16 else weight_OI.mT.contiguous().mT


@contextmanager
def plain_kernels(tokens: int, weight: Tensor, low: torch.dtype) -> Iterator[None]:
    """For a single token on a CPU in bf16, torch's own matrix-vector kernel: oneDNN's reads two thirds as fast.

    The switch is the process's: threads that decode at the same time see each other's.
    """
    if tokens > 1 or weight.device.type != "cpu" or low != torch.bfloat16 or not torch.backends.mkldnn.enabled:
        yield
        return
    torch._C._set_mkldnn_enabled(False)  # the public way would reset other settings too
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


def build_caches(model: Transformer, n_rows: int, n_slots: int) -> list[Any]:
    """One zeroed key/value cache per layer, (R, G, S, head dim) each, on the model's device, of compute type."""
    with _quiet():
        from torchtune.modules import KVCache  # here: importing it takes seconds
    attention, dtype = cast(Block, model.blocks[0]).attention, compute_dtype(model)
    with model.embedding.weight.device:
        plain = [KVCache(n_rows, n_slots, attention.n_kv_heads, attention.head_dim, dtype) for _ in model.blocks]
    return [
        DepthCache(cache, n_rows, n_slots) if isinstance(block, DepthBlock) else cache
        for cache, block in zip(plain, model.blocks, strict=True)
    ]


class DepthCache:
    """A layer's cache that knows which tokens its depth router let in: the others are no keys."""

    def __init__(self, cache: Any, n_rows: int, n_slots: int) -> None:
        self.cache, self.next_slot = cache, 0
        device = cache.k_cache.device
        self.in_RS = torch.zeros(n_rows, n_slots, dtype=torch.bool, device=device)
        self.slot_S = torch.arange(n_slots, device=device)

    def let_in(self, in_RL: Tensor) -> Tensor:
        """Note the next tokens, and what this layer's queries may see: bool (R, 1, L, S), themselves always."""
        start, stop = self.next_slot, self.next_slot + in_RL.shape[1]
        self.in_RS[:, start:stop] = in_RL
        self.next_slot = stop
        itself_LS = self.slot_S == self.slot_S[start:stop, None]
        return (self.in_RS[:, None] | itself_LS)[:, None]

    def update(self, k_RGLA: Tensor, v_RGLA: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots after the new ones are stored."""
        return self.cache.update(k_RGLA, v_RGLA)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchao's remarks at import on its own deprecated parts and on kernels that moma does not use."""
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class Decoder:
    """A model with the caches of `n_rows` rows: feed tokens, get the hidden states of the last one."""

    def __init__(self, model: Transformer, vocab: Vocabulary, n_rows: int, n_slots: int, mode: Mode) -> None:
        self.model, self.vocab, self.mode = model, vocab, mode
        self.n_slots, self.next_slot = n_slots, 0
        self.caches, self.low = build_caches(model, n_rows, n_slots), compute_dtype(model)
        device = model.embedding.weight.device
        self.visible_RS = torch.zeros(n_rows, n_slots, dtype=torch.bool, device=device)
        self.slot_S = torch.arange(n_slots, device=device)

    def feed(self, tokens_RL: Tensor, present_RL: Tensor, restart_R: Tensor | None = None) -> Tensor:
        """Hidden states (R, D) of the last column after feeding `tokens_RL`; meaningless where it is absent.

        `present_RL` bool: False takes a slot without a token. `restart_R` bool: forget the row's past first.
        Raises ValueError when the slots do not suffice.
        """
        start, stop = self.next_slot, self.next_slot + tokens_RL.shape[1]
        if stop > self.n_slots:
            raise ValueError(f"got token {stop} for a cache of {self.n_slots}, need room: build a longer one")
        if restart_R is not None:
            self.visible_RS &= ~restart_R[:, None]
        self.visible_RS[:, start:stop] = present_RL
        position_RL = (self.visible_RS.cumsum(1)[:, start:stop] - 1).clamp(min=0)
        query_L1 = self.slot_S[start:stop, None]
        mask_RLS = (self.visible_RS[:, None] & (self.slot_S <= query_L1)) | (self.slot_S == query_L1)
        groups = padded_groups(tokens_RL, present_RL, self.vocab)
        mask = AttentionMask(mask_RLS[:, None])
        with plain_kernels(tokens_RL.numel(), self.model.embedding.weight, self.low):
            hidden_RLD, _ = self.model(tokens_RL, position_RL, mask, groups, self.mode, self.caches)
        self.next_slot = stop
        return hidden_RLD[:, -1]
