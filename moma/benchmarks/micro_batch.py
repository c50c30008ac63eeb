"""A micro-batch of random ids with whole images in it, and the vocabulary they are from.

    row:  text ... boi [image codes] eoi text ...  boi [image codes] eoi ...

Images have 1,024 tokens as Chameleon's, or the largest smaller square with which the share comes out within 1 %.
"""

import torch

from moma.data.batch import Batch
from moma.modality import IGNORE, Vocabulary, exact_groups

SIDES = (32, 16, 8, 4, 2, 1)
CODES = 8192  # of a vocabulary of 65,536; others have the same share of codes
TOLERANCE = 0.01


def vocabulary(vocab_size: int, side: int = SIDES[0]) -> Vocabulary:
    """Ids in Chameleon's order, `vocab_size` of them, an eighth of them codes of images of side x side tokens."""
    codes = vocab_size * CODES // 65_536
    text = 4 + codes + 2
    return Vocabulary(vocab_size, 0, 1, 2, text - 1, text - 2, 4, 4 + codes, text, vocab_size, (side, side), "bench")


def images_of(rows: int, row_length: int, image_share: float) -> tuple[int, int]:
    """Side and number of the images; raises ValueError where none fit."""
    for side in SIDES:
        n_images = round(image_share * rows * row_length / side**2)
        fits = n_images <= rows * (row_length // (side**2 + 2))
        off = abs(n_images * side**2 / (rows * row_length) - image_share)
        if fits and n_images and off <= TOLERANCE:
            return side, n_images
    raise ValueError(
        f"got image_share={image_share} for {rows} rows of {row_length} tokens, need images with a begin and an end "
        "token each to fit: change the share or make the rows longer"
    )


def micro_batch(
    vocab: Vocabulary, rows: int, row_length: int, n_images: int, documents: int = 1, seed: int = 0
) -> Batch:
    """`n_images` images spread over the rows, each row `documents` documents of equal length (the last one longer)."""
    source = torch.Generator().manual_seed(seed)
    size = (rows, row_length)
    ids_RL = torch.randint(vocab.text_start, vocab.text_stop, size, generator=source)
    length = vocab.tokens_per_image
    for row in range(rows):
        own = n_images // rows + (row < n_images % rows)
        for start in (torch.arange(own) * row_length).div(max(own, 1), rounding_mode="floor").tolist():
            codes = torch.randint(vocab.image_start, vocab.image_stop, (length,), generator=source)
            ids_RL[row, start], ids_RL[row, start + 1 + length] = vocab.boi, vocab.eoi
            ids_RL[row, start + 1 : start + 1 + length] = codes
    position_RL = torch.arange(row_length).expand(size)
    document_RL = (position_RL * documents // row_length).to(torch.int32)
    target_RL = torch.full(size, IGNORE)
    target_RL[:, :-1] = torch.where(document_RL[:, 1:] == document_RL[:, :-1], ids_RL[:, 1:], IGNORE)
    return Batch(
        number=0,
        tokens_RL=ids_RL,
        target_RL=target_RL,
        document_RL=document_RL,
        position_RL=position_RL,
        groups=exact_groups(ids_RL, vocab),
        n_targets=int((target_RL != IGNORE).sum()),
        exact=True,
        alone=documents == 1,
    )
