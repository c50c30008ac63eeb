"""Vocabulary ranges, token modalities and `TokenGroups`: the contract of data, model and generation.

    ids       0 1 2 3 | 4 ............... | eoi boi | reserved | text BPE ...
              specials   image codes        (text)    (text)     (text)

Only image codes are image tokens; BOI, EOI, BOS, EOS and padding are text (the order is Chameleon's,
arXiv 2405.09818; `image id = image_start + code`).

**Keystone.** Every training micro-batch holds exactly Q images, so the numbers of text and of image tokens are
constants, so expert capacities are constants: one graph, no host-device synchronisation, equal work on every
device. The batcher (`moma/data/batch.py`) builds the index sets of a micro-batch once, as `TokenGroups`; every
layer (`moma/model/feed_forward.py`) reuses them. Data pipeline and router are one design.

Imports torch only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TEXT, IMAGE = 0, 1
IGNORE = -100  # target id of a position that has no target


@dataclass(frozen=True)
class Vocabulary:
    """Id ranges of one tokenizer asset (`vocab.json`); every range is [start, stop).

    `modalities` lists the name and id range of each modality but the first; modality 0 (text) is every other id.
    A third modality is one more entry. `hash` identifies text ranks and image tokenizer together; shards and
    checkpoints carry it.
    """

    size: int
    bos: int
    pad: int
    eos: int
    boi: int
    eoi: int
    image_start: int
    image_stop: int
    text_start: int
    text_stop: int
    image_grid: tuple[int, int]
    hash: str
    extra_modalities: tuple[tuple[str, int, int], ...] = ()

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("text", "image", *(name for name, _, _ in self.extra_modalities))

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Id ranges of modalities 1, 2, ...; text is every other id."""
        return (
            (self.image_start, self.image_stop),
            *((start, stop) for _, start, stop in self.extra_modalities),
        )

    @property
    def tokens_per_image(self) -> int:
        """Image codes of one image, without BOI and EOI."""
        return self.image_grid[0] * self.image_grid[1]


def modality_of(ids: Tensor, vocab: Vocabulary) -> Tensor:
    """Modality index of each id: 0 text, 1 image, ...; int64, same shape as `ids`."""
    modality = torch.zeros_like(ids, dtype=torch.int64)
    for index, (start, stop) in enumerate(vocab.ranges, start=1):
        modality = torch.where((ids >= start) & (ids < stop), index, modality)
    return modality


class TokenGroups(NamedTuple):
    """The tokens of one micro-batch by modality, in flat (row, position) order; T tokens, M modalities.

    `index[m]`: int64 (N_m,), the ascending flat positions of modality m. `slot[m]`: int64 (T,), where token t
    stands in `index[m]`, or -1: the inverse map that makes dispatch and combine deterministic gathers.
    Exact form (`valid is None`): the N_m are the micro-batch's constant counts and sum to T.
    Padded form: every N_m is a fixed bound; `valid[m]` (bool, N_m) marks the slots that hold a token, which come
    first. Padding tokens of the batch stand in no valid slot of any modality and have slot -1 everywhere.
    """

    index: tuple[Tensor, ...]  # pyright: ignore[reportIncompatibleMethodOverride]
    slot: tuple[Tensor, ...]
    valid: tuple[Tensor, ...] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "TokenGroups":
        """The same groups with every tensor changed."""
        valid = None if self.valid is None else tuple(map(change, self.valid))
        return TokenGroups(tuple(map(change, self.index)), tuple(map(change, self.slot)), valid)

    def to(self, device: torch.device | str) -> "TokenGroups":
        """The same groups on `device`."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def merged(self) -> "TokenGroups":
        """All modalities as one group (the `all` partition): index = every position, padding not valid."""
        present = self.slot[0] >= 0
        for slot in self.slot[1:]:
            present = present | (slot >= 0)
        every = torch.arange(present.numel(), device=present.device)
        if self.valid is None:
            return TokenGroups((every,), (every,))
        return TokenGroups((every,), (torch.where(present, every, -1),), (present,))


def _slots(index: Tensor, n_tokens: int) -> Tensor:
    slot = torch.full((n_tokens,), -1, dtype=torch.int64, device=index.device)
    slot[index] = torch.arange(index.numel(), device=index.device)
    return slot


def exact_groups(ids: Tensor, vocab: Vocabulary) -> TokenGroups:
    """Index sets of a micro-batch without padding: `ids` int64, any shape (flattened to T)."""
    modality = modality_of(ids.reshape(-1), vocab)
    index = tuple((modality == m).nonzero().squeeze(1) for m in range(len(vocab.modalities)))
    return TokenGroups(index, tuple(_slots(i, modality.numel()) for i in index))


def padded_groups(ids: Tensor, present: Tensor, vocab: Vocabulary, bound: int | None = None) -> TokenGroups:
    """Index sets with a fixed bound per modality (default: all T), for batches whose counts are not constant.

    `present`: bool, same shape as `ids`, False at padding. Raises ValueError if a modality exceeds `bound`.
    """
    modality, keep = modality_of(ids.reshape(-1), vocab), present.reshape(-1)
    bound = modality.numel() if bound is None else bound
    index, slot, valid = [], [], []
    for m, name in enumerate(vocab.modalities):
        positions = ((modality == m) & keep).nonzero().squeeze(1)
        count = positions.numel()
        if count > bound:
            raise ValueError(f"got {count} {name} tokens, need at most the bound of {bound}: raise the bound")
        slots = torch.zeros(bound, dtype=torch.int64, device=ids.device)
        slots[:count] = positions
        index.append(slots)
        slot.append(_slots(positions, modality.numel()))
        valid.append(torch.arange(bound, device=ids.device) < count)
    return TokenGroups(tuple(index), tuple(slot), tuple(valid))
