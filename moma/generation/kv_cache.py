"""Cached decoding for rows of different contents: what each row sees, and where its tokens stand.

    slot       0    1    2    3    4    5    6        one store per layer, the same slot for every row
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

from moma.modality import Vocabulary, exact_groups, padded_groups
from moma.model.attention import AttentionMask
from moma.model.block import Block
from moma.model.depth import DepthBlock
from moma.model.feed_forward import Mode
from moma.model.transformer import Transformer
from moma.twin import matrices, twin_of


def compute_dtype(model: Transformer) -> torch.dtype:
    """Type of keys and values: the autocast type where autocast is on, but for float64, else the parameters'."""
    weight = model.embedding.weight
    on = torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(weight.device.type) if on else weight.dtype


def for_decoding(model: Transformer) -> Transformer:
    """A model that shares everything with `model` but its blocks' matrices, which have the compute type (autocast would
    cast them at every token) and, on a CPU, lie as `laid_out` says. Itself where there is nothing to change."""
    low = compute_dtype(model)

    def as_read(matrix: Tensor) -> Tensor:  # `nn.Linear` stores (out, in), stacks of matrices (in, out)
        return laid_out(matrix) if matrix.ndim == 2 else laid_out(matrix.mT).mT

    if all(m.dtype == low and as_read(m.data).data_ptr() == m.data_ptr() for m in matrices(model).values()):
        return model
    twin = twin_of(model, low)
    for matrix in twin.low:
        matrix.data = as_read(matrix.data)
    return twin.model


def laid_out(weight_OI: Tensor) -> Tensor:
    """The same matrix (..., O, I) in the order in which a CPU reads it fastest for a single token: bf16 by outputs,
    others by inputs (22 GB/s against 6, 26 against 15: one core, 65,536 x 512). Itself where it has that order."""
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


def build_caches(model: Transformer, n_rows: int, n_slots: int) -> list["LayerCache"]:
    """One zeroed key/value cache per layer, (R, G, S, head dim) each, on the model's device, of compute type; on a CPU
    at least fp32, in which its attention reads a slot seven times as fast as in bf16."""
    with _quiet():
        from torchtune.modules import KVCache  # here: importing it takes seconds
    attention, dtype = cast(Block, model.blocks[0]).attention, compute_dtype(model)
    device = model.embedding.weight.device
    if device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    with device:
        stores = [KVCache(n_rows, n_slots, attention.n_kv_heads, attention.head_dim, dtype) for _ in model.blocks]
    return [
        DepthCache(store) if isinstance(block, DepthBlock) else LayerCache(store)
        for store, block in zip(stores, model.blocks, strict=True)
    ]


class LayerCache:
    """Keys and values of one layer, in torchtune's store. Its own `update` would ask the device at every token where
    the next slot is, and hand out the empty slots as well."""

    def __init__(self, store: Any) -> None:
        self.k_RGSA, self.v_RGSA = store.k_cache, store.v_cache
        self.next_slot = 0

    def update(self, k_RGLA: Tensor, v_RGLA: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next slots; keys and values of all slots up to them."""
        start, stop = self.next_slot, self.next_slot + k_RGLA.shape[2]
        self.k_RGSA[:, :, start:stop], self.v_RGSA[:, :, start:stop] = k_RGLA, v_RGLA
        self.next_slot = stop
        return self.k_RGSA[:, :, :stop], self.v_RGSA[:, :, :stop]


class DepthCache(LayerCache):
    """A layer's cache that knows which tokens its depth router let in: the others are no keys."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        n_rows, _, n_slots, _ = self.k_RGSA.shape
        self.in_RS = torch.zeros(n_rows, n_slots, dtype=torch.bool, device=self.k_RGSA.device)
        self.slot_S = torch.arange(n_slots, device=self.k_RGSA.device)

    def let_in(self, in_RL: Tensor) -> Tensor:
        """Note the tokens that `update` is about to store, and what this layer's queries may see of the slots up to
        them: bool (R, 1, L, S), themselves always."""
        start, stop = self.next_slot, self.next_slot + in_RL.shape[1]
        self.in_RS[:, start:stop] = in_RL
        itself_LS = self.slot_S[:stop] == self.slot_S[start:stop, None]
        return (self.in_RS[:, None, :stop] | itself_LS)[:, None]


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
        visible_RS, slot_S, query_L1 = self.visible_RS[:, :stop], self.slot_S[:stop], self.slot_S[start:stop, None]
        position_RL = (visible_RS.cumsum(1)[:, start:] - 1).clamp(min=0)
        mask_RLS = (visible_RS[:, None] & (slot_S <= query_L1)) | (slot_S == query_L1)
        every = bool(present_RL.all())
        groups = exact_groups(tokens_RL, self.vocab) if every else padded_groups(tokens_RL, present_RL, self.vocab)
        mask = AttentionMask(mask_RLS[:, None])
        with plain_kernels(tokens_RL.numel(), self.model.embedding.weight, self.low):
            hidden_RLD, _ = self.model(tokens_RL, position_RL, mask, groups, self.mode, self.caches)
        self.next_slot = stop
        return hidden_RLD[:, -1]
