"""The names and codes of held-out pictures, and the baseline."""

import numpy as np

from moma.data.shards import open_corpus
from moma.data.synthetic import WORDS, write_synthetic
from moma.evaluation.pictures import named_pictures, unigram_codes
from moma.tokenizer.text import TextTokenizer


def test_unigram_codes_follow_each_position():
    rng = np.random.default_rng(2)
    train = np.stack([rng.choice(4, size=500, p=p) for p in ([1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4])], 1)
    drawn = unigram_codes(train, 20_000, seed=3)
    assert drawn.shape == (20_000, 3) and drawn.dtype == np.int64
    for position in range(3):
        expected = np.bincount(train[:, position], minlength=4) / 500
        share = np.bincount(drawn[:, position], minlength=4) / 20_000
        np.testing.assert_allclose(share, expected, atol=0.015)
    # positions are independent: the pair frequencies are products
    pair = np.bincount(drawn[:, 1] * 4 + drawn[:, 2], minlength=16).reshape(4, 4) / 20_000
    np.testing.assert_allclose(pair, np.outer(pair.sum(1), pair.sum(0)), atol=0.015)
    assert np.array_equal(drawn, unigram_codes(train, 20_000, seed=3))
    assert not np.array_equal(drawn, unigram_codes(train, 20_000, seed=4))


def test_named_pictures_of_a_corpus(tmp_path):
    tokenizer, corpus, vocab = write_synthetic(tmp_path, pairs=40, texts=20)
    text, sources = TextTokenizer.load(tokenizer, vocab), open_corpus(corpus, "val", vocab.hash)
    pairs = list(named_pictures(sources, text, vocab))
    assert len(pairs) == 10 and {pair.name for pair in pairs} <= set(WORDS)
    assert all(pair.codes.shape == (16,) and 0 <= pair.codes.min() <= pair.codes.max() < 32 for pair in pairs)
    mixed = list(named_pictures(sources, text, vocab, seed=1))
    assert [pair.name for pair in mixed] != [pair.name for pair in pairs]
    assert sorted(pair.name for pair in mixed) == sorted(pair.name for pair in pairs)
