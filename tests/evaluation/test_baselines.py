"""Baselines against plain loops; AUC and routing agreement against pair counting."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from moma.evaluation.baselines import fit, image_positions
from moma.evaluation.routing import auc
from moma.modality import IGNORE, Vocabulary

VOCAB = Vocabulary(
    size=30, bos=0, pad=1, eos=2, boi=9, eoi=8, image_start=4, image_stop=8, text_start=10, text_stop=30,
    image_grid=(1, 3), hash="",
)  # fmt: skip


def documents(rng, n):
    out = []
    for _ in range(n):
        text = rng.choice([10, 11, 12, 13], size=rng.integers(1, 6), p=[0.5, 0.3, 0.1, 0.1]).tolist()
        picture = [9, *rng.integers(4, 8, size=3).tolist(), 8]
        out.append([0, *picture, *text, 2] if rng.random() < 0.5 else [0, *text, *picture, 2])
    return out


def test_scores_equal_a_loop():
    rng = np.random.default_rng(0)
    train, held = documents(rng, 50), documents(rng, 10)
    held[0].insert(2, 29)  # a token the training split lacks
    del held[0][2]
    fitted = fit(np.concatenate(train), VOCAB)

    pairs, contexts, words, places = Counter(), Counter(), Counter(), Counter()
    for doc in train:
        for i, (a, b) in enumerate(zip(doc, doc[1:], strict=False)):
            if 4 <= b < 8:
                places[(i - doc.index(9), b)] += 1
            else:
                pairs[a, b] += 1
                contexts[a] += 1
                words[b] += 1
    total, n_words = {"text_bigram": 0.0, "text_unigram": 0.0, "image_position_unigram": 0.0}, 0
    for doc in held:
        for i, (a, b) in enumerate(zip(doc, doc[1:], strict=False)):
            if 4 <= b < 8:
                place = i - doc.index(9)
                overall = (sum(c for (_, x), c in places.items() if x == b) + 1) / (sum(places.values()) + 4)
                types = len({x for (p, x) in places if p == place})
                count = sum(c for (p, _), c in places.items() if p == place)
                total["image_position_unigram"] -= math.log((places[place, b] + types * overall) / (count + types))
            else:
                single = (words[b] + 1) / (sum(words.values()) + 30)
                types = len({y for (x, y) in pairs if x == a})
                smoothed = (pairs[a, b] + types * single) / (contexts[a] + types) if contexts[a] else single
                total["text_bigram"] -= math.log(smoothed)
                total["text_unigram"] -= math.log(single)
                n_words += 1

    length = max(map(len, held))
    tokens = np.full((len(held), length), VOCAB.pad)
    target = np.full((len(held), length), IGNORE)
    for row, doc in enumerate(held):
        tokens[row, : len(doc)] = doc
        target[row, : len(doc) - 1] = doc[1:]
    scored = fitted.score(tokens, target)
    for name, value in total.items():
        assert scored[name][0] == pytest.approx(value, rel=1e-12)
    assert scored["text_bigram"][1] == n_words and scored["image_position_unigram"][1] == 30


def test_probabilities_sum_to_one():
    fitted = fit(np.concatenate(documents(np.random.default_rng(1), 40)), VOCAB)
    assert np.exp(fitted.position).sum(1) == pytest.approx(1)
    assert np.exp(fitted.unigram).sum() == pytest.approx(1)
    text = [i for i in range(30) if not 4 <= i < 8]
    for context in (9, 10, 13):
        scores = [-fitted.score(np.array([[context]]), np.array([[w]]))["text_bigram"][0] for w in text]
        image = fitted.context_types[context] * np.exp(fitted.unigram[4:8]).sum()
        rest = image / max(fitted.context_counts[context] + fitted.context_types[context], 1)
        if fitted.context_counts[context]:
            assert np.exp(scores).sum() + rest == pytest.approx(1)


def test_image_positions_start_after_boi():
    tokens = np.array([[0, 9, 5, 6, 7, 8, 10, 9, 4, 4, 4, 8]])
    assert image_positions(tokens, VOCAB)[0, [1, 2, 3, 7, 8, 9]].tolist() == [0, 1, 2, 0, 1, 2]


def test_auc_equals_pair_counting_with_ties():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 6, (60,), generator=generator).double()
    label = torch.rand(60, generator=generator) < 0.4
    wins = [(p > n) + 0.5 * (p == n) for p in score[label] for n in score[~label]]
    assert auc(score, label) == pytest.approx(float(sum(wins)) / len(wins))
    assert math.isnan(auc(score, torch.ones(60, dtype=torch.bool)))
