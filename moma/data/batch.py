"""A planned micro-batch as tensors: tokens, targets, documents and the modality index sets (`TokenGroups`).

Keystone: the plan puts exactly Q images into every micro-batch, so the index sets built here, once per micro-batch,
have constant sizes, and every layer of the model reuses them. Data pipeline and router are one design.

Routing uses the modality of the *input* token; the loss that of the *target* (BOI predicts an image code). The first
token of a document is no target. Padding (only at the declared end of a finite stream) has document and source -1.

Without balance (`Plan`) the index sets are exact all the same and their sizes change: such batches run eagerly. Static
shapes take the padded form, with all T tokens as the bound of every modality.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moma.data.plan import MicroBatch, PlanShape
from moma.modality import IGNORE, TokenGroups, Vocabulary, exact_groups, padded_groups


class TokenReader(Protocol):
    """Reads token ids [start, stop) of a document, and their loss mask (0: never a target)."""

    def read(self, doc: int, start: int, stop: int) -> np.ndarray: ...
    def read_mask(self, doc: int, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one device; R rows, L positions. `n_targets` counts valid targets (host integer).

    `source_RL`: int16, the place of a token's source among `sources`; None in a batch of no corpus.
    """

    number: int
    tokens_RL: Tensor
    target_RL: Tensor
    document_RL: Tensor
    position_RL: Tensor
    groups: TokenGroups
    n_targets: int
    exact: bool
    alone: bool = False  # every row is one document, without padding
    source_RL: Tensor | None = None
    sources: tuple[str, ...] = ()

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        names = ("tokens_RL", "target_RL", "document_RL", "position_RL")
        source_RL = None if self.source_RL is None else change(self.source_RL)
        changed = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed, groups=self.groups.each(change), source_RL=source_RL)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; from pinned memory, nothing waits for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in memory that a GPU can read by itself."""
        return self._each(lambda tensor: tensor.contiguous().pin_memory())


def count_targets(micro_batch: MicroBatch, readers: Mapping[str, TokenReader]) -> int:
    """Valid targets of a planned micro-batch, from its pieces and their loss masks: no token is read."""
    count = 0
    for piece in (piece for row in micro_batch.rows for piece in row):
        beyond = 0 if piece.last else 1  # as in build_batch
        count += int((readers[piece.source].read_mask(piece.doc, piece.start, piece.stop + beyond)[1:] > 0).sum())
    return count


def build_batch(
    micro_batch: MicroBatch,
    readers: Mapping[str, TokenReader],
    shape: PlanShape,
    vocab: Vocabulary,
    padded: bool = False,
) -> Batch:
    """Read the pieces of `micro_batch`; `padded` forces the padded form of the index sets."""
    size = (shape.rows, shape.row_length)
    tokens = np.full(size, vocab.pad, dtype=np.int64)
    target = np.full(size, IGNORE, dtype=np.int64)
    document = np.full(size, -1, dtype=np.int32)
    source = np.full(size, -1, dtype=np.int16)
    places = {name: place for place, name in enumerate(sorted(readers))}
    for row, pieces in enumerate(micro_batch.rows):
        at = 0
        for number, piece in enumerate(pieces):
            end, reader = at + piece.tokens, readers[piece.source]
            beyond = 0 if piece.last else 1  # a cut piece knows the token that follows it
            ids = reader.read(piece.doc, piece.start, piece.stop + beyond)
            mask = reader.read_mask(piece.doc, piece.start, piece.stop + beyond)
            tokens[row, at:end] = ids[: piece.tokens]
            following = np.where(mask[1:] > 0, ids[1:].astype(np.int64), IGNORE)  # ids are unsigned
            target[row, at : at + len(following)] = following
            document[row, at:end], source[row, at:end] = number, places[piece.source]
            at = end
    ids_RL, present = torch.from_numpy(tokens), torch.from_numpy(document >= 0)
    groups = exact_groups(ids_RL, vocab) if micro_batch.exact and not padded else padded_groups(ids_RL, present, vocab)
    return Batch(
        number=micro_batch.number,
        tokens_RL=ids_RL,
        target_RL=torch.from_numpy(target),
        document_RL=torch.from_numpy(document),
        position_RL=torch.arange(shape.row_length).expand(size),
        groups=groups,
        n_targets=int((target != IGNORE).sum()),
        exact=micro_batch.exact,
        alone=not document.any(),
        source_RL=torch.from_numpy(source),
        sources=tuple(places),
    )
