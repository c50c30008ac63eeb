"""How near reconstructions come to their pictures, and how a tokenizer uses its codes.

    PSNR    10 log10(255^2 / mean squared error), of each picture
    SSIM    mean of (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2)) over all whole windows:
            11 x 11, Gaussian of sigma 1.5, C = (0.01 * 255)^2 and (0.03 * 255)^2; of each colour channel, then their
            mean (Wang et al. 2004, who have grey pictures)
    kernel  squared MMD of picture features with k(x, y) = (x . y / d + 1)^3: without bias whatever the set sizes, hence
            at times below 0 (KID, arXiv 1801.01401)
    frechet |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) of their means and covariances (arXiv 1706.08500): biased upwards
            on few pictures, so that sets of one size alone compare

Features: the 1280 pooled ones of an EfficientNet-Lite0 trained on ImageNet, not Inception's: values compare with each
other, never with published KIDs and FIDs. Refuses pictures smaller than a window.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moma.vqgan.lite0 import Lite0
from moma.vqgan.quantize import code_statistics

FEATURES = 1280
WINDOW = 11
_SIGMA = 1.5
_SMALLEST_ERROR = 1e-3  # mean squared; keeps the PSNR of equal pictures finite (78 dB)


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


def reconstruction_metrics(
    pixels: np.ndarray, again: np.ndarray, codes: np.ndarray, n_codes: int, features: PictureFeatures | None = None
) -> dict[str, float]:
    """Metrics of pictures and their reconstructions, both uint8 (n, s, s, 3), and their `codes`, int, any shape.

    `psnr` dB and `ssim`, means over the pictures (`ssim` from WINDOW pixels a side on); `usage`, the share of the
    `n_codes` that occur, and `perplexity` of the codes over all pictures. With the network `features`:
    `kernel_distance` with `kernel_error` (from 4 pictures on) and `frechet_distance` (from 2). Every picture has its
    twin in the other set, so a good tokenizer's kernel distance lies below 0.
    """
    usage, perplexity = code_statistics(torch.from_numpy(codes), n_codes)
    metrics = {"psnr": float(psnr(pixels, again).mean())}
    if min(pixels.shape[1:3]) >= WINDOW:
        metrics["ssim"] = float(ssim(pixels, again).mean())
    metrics |= {"usage": float(usage), "perplexity": float(perplexity)}
    if features is not None:
        device = next(features.parameters()).device
        a, b = (picture_features(x, features, device=device) for x in (again, pixels))
        if len(a) >= 4:
            metrics["kernel_distance"], metrics["kernel_error"] = kernel_distance(a, b, min(10, len(a) // 2))
        if len(a) >= 2:
            metrics["frechet_distance"] = frechet_distance(a, b)
    return metrics


def psnr(pixels: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, float64 (n,), of each of the pictures uint8 (n, s, s, 3); at most 78."""
    error = np.array([np.square(a.astype(np.float64) - b).mean() for a, b in zip(again, pixels, strict=True)])
    return 10 * np.log10(255**2 / np.maximum(error, _SMALLEST_ERROR))


def ssim(pixels: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Structural similarity, float64 (n,), of each of the pictures uint8 (n, s, s, 3); formula above.

    Raises ValueError for pictures smaller than a window.
    """
    if min(pixels.shape[1:3]) < WINDOW:
        raise ValueError(
            f"got pictures of {pixels.shape[2]}x{pixels.shape[1]} pixels, need {WINDOW} a side or more for SSIM: "
            "measure larger ones"
        )
    taps = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    taps = torch.exp(-taps.square() / (2 * _SIGMA**2))
    taps = taps / taps.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))

    found = []
    for pair in zip(pixels, again, strict=True):
        # colour channels as a batch of grey pictures
        x, y = (torch.tensor(picture).double().permute(2, 0, 1).unsqueeze(1) for picture in pair)
        mean_x, mean_y = blurred(x), blurred(y)
        var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
        covariance = blurred(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        found.append(float((luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean()))
    return np.array(found)


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


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of features (n, d) and (m, d) as if both were normal, in float64.

    Raises ValueError for a set of fewer than two pictures.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"got sets of {len(a)} and {len(b)} pictures, need 2 or more in each: give more pictures")
    a, b = a.astype(np.float64), b.astype(np.float64)
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    x, y = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (a, b))
    # With covariances x^T x and y^T y the trace of the root is the sum of the singular values of x y^T, or of the
    # triangular factors, which are the smaller ones from d pictures on.
    root = np.linalg.norm(np.asarray(np.linalg.qr(x, "r")) @ np.asarray(np.linalg.qr(y, "r")).T, "nuc")
    return float(apart + np.square(x).sum() + np.square(y).sum() - 2 * root)


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
