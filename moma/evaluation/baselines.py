"""What a model has to beat: n-gram baselines fitted on the training split, scored on the model's own targets.

text   smoothed bigram    p(w | v) = (c(v w) + t(v) p(w)) / (c(v) + t(v))      Witten-Bell, t(v) = types after v
       unigram            p(w)     = (c(w) + 1) / (n + V)
image  per-position unigram p(code | position) = (c + t p(code)) / (n + t), the same smoothing over the grid
"""

from dataclasses import dataclass

import numpy as np

from moma.modality import IGNORE, Vocabulary


@dataclass(frozen=True)
class Baselines:
    """Log-probabilities of the fitted n-grams; scores are nats per target."""

    vocab: Vocabulary
    unigram: np.ndarray  # (V,) log p over text targets
    pair_keys: np.ndarray  # sorted v V + w
    pair_counts: np.ndarray
    context_counts: np.ndarray  # (V,) c(v)
    context_types: np.ndarray  # (V,) t(v)
    position: np.ndarray  # (positions, codes) log p

    def score(self, tokens: np.ndarray, target: np.ndarray) -> dict[str, tuple[float, int]]:
        """Sums of -log p and counts on inputs and targets (rows, length): text_bigram, text_unigram, image."""
        text, image = _kinds(target, self.vocab)
        context, word = tokens[text], target[text]
        keys = context * self.vocab.size + word
        at = np.minimum(np.searchsorted(self.pair_keys, keys), len(self.pair_keys) - 1)
        seen = np.where(self.pair_keys[at] == keys, self.pair_counts[at], 0)
        types, total = self.context_types[context], self.context_counts[context]
        single = self.unigram[word]
        smoothed = np.where(total > 0, (seen + types * np.exp(single)) / np.maximum(total + types, 1), np.exp(single))
        where = image_positions(tokens, self.vocab)[image]
        code = target[image] - self.vocab.image_start
        return {
            "text_bigram": (-np.log(smoothed).sum(), len(word)),
            "text_unigram": (-single.sum(), len(word)),
            "image_position_unigram": (-self.position[where, code].sum(), len(code)),
        }


def image_positions(tokens: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """Position in its picture of the target that follows each input: BOI is followed by position 0. (rows, length)"""
    columns = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    start = np.maximum.accumulate(np.where(tokens == vocab.boi, columns, -1), axis=1)
    return np.where(start < 0, 0, columns - start) % vocab.tokens_per_image


def fit(tokens: np.ndarray, vocab: Vocabulary) -> Baselines:
    """Fit on the concatenated documents of the training split (each BOS ... EOS): int64 (n,)."""
    inputs, target = tokens[None, :-1], np.where(tokens[1:] == vocab.bos, IGNORE, tokens[1:])[None]
    text, image = _kinds(target, vocab)
    context, word, size = inputs[text], target[text], vocab.size
    words = np.bincount(word, minlength=size)
    keys, counts = np.unique(context * size + word, return_counts=True)
    codes = vocab.image_stop - vocab.image_start
    table = np.zeros((vocab.tokens_per_image, codes))
    np.add.at(table, (image_positions(inputs, vocab)[image], target[image] - vocab.image_start), 1.0)
    overall = (table.sum(0) + 1) / (table.sum() + codes)
    types = (table > 0).sum(1, keepdims=True)
    position = (table + types * overall) / np.maximum(table.sum(1, keepdims=True) + types, 1)
    return Baselines(
        vocab=vocab,
        unigram=np.log((words + 1) / (words.sum() + size)),
        pair_keys=keys,
        pair_counts=counts,
        context_counts=np.bincount(context, minlength=size),
        context_types=np.bincount(keys // size, minlength=size),
        position=np.log(np.where(types > 0, position, overall)),
    )


def _kinds(target: np.ndarray, vocab: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    image = (target >= vocab.image_start) & (target < vocab.image_stop)
    return (target != IGNORE) & ~image, image
