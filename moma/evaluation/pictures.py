"""How far a set of pictures is from another: kernel distance of image features (KID, arXiv 1801.01401).

    k(x, y) = (x . y / d + 1)^3
    distance = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

The squared maximum mean discrepancy, without bias whatever the set sizes (FID is biased on few pictures), hence at
times below 0. Features: the 1280 pooled ones of an EfficientNet-Lite0 trained on ImageNet, not Inception's: values
compare with each other, never with published KIDs. The baseline to beat is `unigram_codes`.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moma.data.shards import ShardedSource
from moma.modality import Vocabulary
from moma.tokenizer.documents import Picture, Text, decode_document
from moma.tokenizer.text import TextTokenizer
from moma.vqgan.lite0 import Lite0

FEATURES = 1280


class NamedPicture(NamedTuple):
    """A picture's codes, int64 (tokens per image,), 0 .. n - 1, and the text that stands with it."""

    name: str
    codes: np.ndarray


class PictureFeatures(nn.Module):
    """EfficientNet-Lite0 without its classifier: (n, 3, s, s) in [0, 255] -> (n, 1280).

    Raises ValueError if the package with the weights is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = Lite0()

    def forward(self, x: Tensor) -> Tensor:
        *_, last = self.network((x - 127) / 128)
        assert self.network.head is not None
        return F.relu6(self.network.head(last)).mean((2, 3))


@torch.no_grad()
def picture_features(
    pixels: np.ndarray, network: PictureFeatures, size: int = 128, batch: int = 32, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Features float32 (n, 1280) of pictures uint8 (n, s, s, 3), resized to `size` pixels a side (bicubic)."""
    network, found = network.to(device), [np.zeros((0, FEATURES), np.float32)]
    for start in range(0, len(pixels), batch):
        x = torch.tensor(pixels[start : start + batch]).to(device).permute(0, 3, 1, 2).float()
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        found.append(network(x).cpu().numpy())
    return np.concatenate(found)


def kernel_distance(a: np.ndarray, b: np.ndarray, blocks: int = 10) -> tuple[float, float]:
    """Unbiased squared MMD of features (n, d) and (m, d), and its standard error: the jackknife over `blocks`.

    Blocks are runs of neighbours, so samples that belong together (of one prompt) should stand together. Computed in
    float64. Raises ValueError where a set has fewer than two pictures a block.
    """
    if min(len(a), len(b)) < 2 * blocks or blocks < 2:
        raise ValueError(
            f"got sets of {len(a)} and {len(b)} pictures in {blocks} blocks, need 2 blocks or more of 2 pictures or "
            "more in each: give more pictures or take fewer blocks"
        )
    a, b = a.astype(np.float64), b.astype(np.float64)
    cuts = [_cuts(len(features), blocks) for features in (a, b)]
    own = [_block_sums(x, x, at, at, blocks, diagonal=False) for x, at in zip((a, b), cuts, strict=True)]
    cross = _block_sums(a, b, *cuts, blocks, diagonal=True)
    sizes = [np.bincount(at, minlength=blocks) for at in cuts]

    def distance(keep: np.ndarray) -> float:
        both = np.ix_(keep, keep)
        n, m = (int(size[keep].sum()) for size in sizes)
        return own[0][both].sum() / (n * (n - 1)) + own[1][both].sum() / (m * (m - 1)) - 2 * cross[both].sum() / (n * m)

    every = np.arange(blocks)
    left_out = np.array([distance(np.delete(every, block)) for block in every])
    error = np.sqrt((blocks - 1) / blocks * ((left_out - left_out.mean()) ** 2).sum())
    return float(distance(every)), float(error)


def unigram_codes(train_codes: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Codes int64 (n, positions) drawn from the frequencies of `train_codes` (k, positions), each position alone."""
    k, positions = train_codes.shape
    rows = np.random.default_rng(seed).integers(k, size=(n, positions))
    return train_codes[rows, np.arange(positions)].astype(np.int64)


def named_pictures(
    sources: Mapping[str, ShardedSource], text: TextTokenizer, vocab: Vocabulary, seed: int | None = None
) -> Iterator[NamedPicture]:
    """Every document of one picture and one text, in the corpus' order or shuffled by `seed`."""
    places = [(name, doc) for name, s in sources.items() for doc in np.flatnonzero(s.document_images == 1)]
    if seed is not None:
        places = [places[i] for i in np.random.default_rng(seed).permutation(len(places))]
    for name, doc in places:
        source = sources[name]
        parts = decode_document(source.read(int(doc), 0, int(source.document_tokens[doc])), text, vocab)
        words = [part.text.strip() for part in parts if isinstance(part, Text)]
        codes = [part.content for part in parts if isinstance(part, Picture)]
        if len(words) == 1 and words[0] and isinstance(codes[0], np.ndarray):
            yield NamedPicture(words[0], codes[0])


def _cuts(n: int, blocks: int) -> np.ndarray:
    """Block number of each of n neighbours, sizes as equal as can be."""
    return np.arange(n) * blocks // n


def _block_sums(
    x: np.ndarray, y: np.ndarray, block_x: np.ndarray, block_y: np.ndarray, blocks: int, diagonal: bool
) -> np.ndarray:
    """Sums of the kernel over pairs of blocks (blocks, blocks); without pairs of one and the same if not `diagonal`."""
    sums = np.zeros((blocks, blocks))
    for p in range(blocks):
        kernel = (x[block_x == p] @ y.T / x.shape[1] + 1) ** 3
        if not diagonal:
            kernel[np.arange(len(kernel)), np.flatnonzero(block_x == p)] = 0
        sums[p] = [kernel[:, block_y == q].sum() for q in range(blocks)]
    return sums
