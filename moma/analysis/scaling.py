"""Loss against compute over model sizes, per family: L(C) = c + a (C / C0)^-b.

    C    training FLOPs of a run          c   the loss no compute gets below
    C0   one number for all families      a   what is above it at C0       b   how fast it falls

One point per run: its final loss at its FLOPs. b is searched on a grid that is refined; given b, the best c and a are a
weighted straight line, c and a not below 0. Robust: points far off the line weigh less (Huber's weights, iterated). At
least SIZES sizes, since three numbers are fitted; exactly three sizes leave nothing over to test the law with. The
interval resamples seeds, the same ones at every size: all multisets of up to five seeds, weighted by how often they
are drawn, beyond that 100 drawn ones. With few seeds it is rather too narrow. Refuses arrays of unequal
length.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moma.analysis.comparison import final_losses
from moma.analysis.efficiency import CAUSAL, TRAIN
from moma.analysis.speedup import LOSSES
from moma.analysis.study import Study, final_flops

SIZES = 3
EXPONENTS = (0.005, 3.0)
_HUBER = 1.345  # standard deviations beyond which a point weighs less: 95 % efficient on normal noise
_DRAWS = 100


class PowerLaw(NamedTuple):
    """c + a (C / at)^-b, nats; `at` in FLOPs."""

    c: float
    a: float
    b: float
    at: float

    def loss(self, flops: np.ndarray | float) -> np.ndarray:
        """Loss at `flops`, nats."""
        return self.c + self.a * (np.asarray(flops, float) / self.at) ** -self.b


class Point(NamedTuple):
    """The final loss of one run."""

    size: str
    seed: tuple[int, int]
    flops: float
    loss: float


@dataclass(frozen=True)
class Family:
    """A variant's points on one loss in one mode and their fit; `law` is None for the reason in `why_not`.

    `residuals`: loss minus fit by point, nats. `resampled`: (law, weight) over seeds, empty with fewer than two.
    """

    variant: str
    what: str
    mode: str
    points: tuple[Point, ...]
    law: PowerLaw | None
    why_not: str = ""
    residuals: tuple[float, ...] = ()
    resampled: tuple[tuple[PowerLaw, float], ...] = ()

    @property
    def remarks(self) -> list[str]:
        """What weakens the fit."""
        if self.law is None:
            return [self.why_not]
        found = []
        if len({point.size for point in self.points}) == SIZES:
            found.append(f"{SIZES} sizes fix 3 numbers: nothing tests the law")
        if self.law.c == 0:
            found.append("c is at its bound 0")
        if not EXPONENTS[0] * 1.01 < self.law.b < EXPONENTS[1] * 0.99:
            found.append("b is at the edge of its range")
        return found

    def range(self, name: str) -> tuple[float, float] | None:
        """95 % of the resampled values of `c`, `a` or `b`; None with fewer than two seeds."""
        return _spread([(getattr(law, name), weight) for law, weight in self.resampled])

    def band(self, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """95 % of the resampled losses at each of `flops`; None with fewer than two seeds."""
        if not self.resampled:
            return None
        lines = np.stack([law.loss(flops) for law, _ in self.resampled])
        weights = [weight for _, weight in self.resampled]
        ends = [_spread(list(zip(column, weights, strict=True))) for column in lines.T]
        low, high = np.array(ends).T
        return low, high


def families(study: Study) -> list[Family]:
    """Fits of all variants, per loss, in mode train (training losses) and causal (held-out losses)."""
    largest = max(final_flops(run) for run in study.runs)
    found = []
    for mode in (TRAIN, CAUSAL):
        finals = {id(run): final_losses(study, run, mode) for run in study.runs}
        for variant in study.variants:
            for what in LOSSES:
                points = tuple(
                    Point(size, run.seed, final_flops(run), finals[id(run)][what])
                    for size, runs in study.sizes.items()
                    for run in runs
                    if run.variant == variant and what in finals[id(run)]
                )
                if points:
                    found.append(_family(variant, what, mode, points, largest))
    return found


def fit(flops: np.ndarray, loss: np.ndarray, at: float, weights: np.ndarray | None = None) -> PowerLaw | None:
    """The power law through points, None where the loss does not fall; `weights`: how often each point counts.

    Raises ValueError for arrays of unequal length or of fewer than three different FLOPs.
    """
    flops, loss = np.asarray(flops, float), np.asarray(loss, float)
    if flops.shape != loss.shape or len(np.unique(flops)) < 3:
        raise ValueError(
            f"got {flops.shape} FLOPs and {loss.shape} losses at {len(np.unique(flops))} places, need as many of both "
            "at three or more: add sizes"
        )
    times = np.ones_like(loss) if weights is None else np.asarray(weights, float)
    x, robust, law = flops / at, times, None
    for _ in range(12):
        law = _weighted(x, loss, robust, at, near=law)
        if law is None:
            return None
        off = np.abs(loss - law.loss(flops))
        scale = 1.4826 * float(np.median(off[times > 0]))
        if scale < 1e-9:  # the points are on the line
            break
        fresh = times * np.minimum(1.0, _HUBER * scale / np.maximum(off, 1e-12))
        if np.allclose(fresh, robust, rtol=1e-4):
            break
        robust = fresh
    return law


def _weighted(
    x: np.ndarray, loss: np.ndarray, weights: np.ndarray, at: float, near: PowerLaw | None = None
) -> PowerLaw | None:
    """Least squares: b on a grid that is refined around the best, c and a in closed form; `near`: where to look."""
    low, high = np.log(EXPONENTS) if near is None else np.log(near.b) + np.array([-0.3, 0.3])
    low, high = max(low, math.log(EXPONENTS[0])), min(high, math.log(EXPONENTS[1]))
    best = (math.nan, math.nan, math.nan)
    for _ in range(5 if near is None else 4):
        exponents = np.exp(np.linspace(low, high, 41))
        c, a, error = _lines(x[None] ** -exponents[:, None], loss, weights)
        if not np.isfinite(error).any():
            return None
        i = int(np.nanargmin(error))
        best = (float(c[i]), float(a[i]), float(exponents[i]))
        low, high = np.log(exponents[max(i - 1, 0)]), np.log(exponents[min(i + 1, len(exponents) - 1)])
    return PowerLaw(*best, at)


def _lines(t: np.ndarray, loss: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """loss = c + a t for every row of `t`: c, a and the squared error; c is held at 0 where it would be negative, and
    an a that is not positive has no error."""
    total = weights.sum()
    mean_t, mean_y = t @ weights / total, loss @ weights / total
    from_t, from_y = t - mean_t[:, None], loss - mean_y
    spread = (from_t**2) @ weights
    with np.errstate(divide="ignore", invalid="ignore"):
        a = (from_t * from_y) @ weights / spread
        c = mean_y - a * mean_t
        through_zero = (t * loss) @ weights / ((t**2) @ weights)
    a, c = np.where(c < 0, through_zero, a), np.maximum(c, 0.0)
    error = ((loss - c[:, None] - a[:, None] * t) ** 2) @ weights
    return c, a, np.where(a > 0, error, np.nan)


def _family(variant: str, what: str, mode: str, points: tuple[Point, ...], at: float) -> Family:
    sizes = list(dict.fromkeys(point.size for point in points))
    if len(sizes) < SIZES:
        return Family(variant, what, mode, points, None, f"{len(sizes)} of {SIZES} sizes: {', '.join(sizes)}")
    flops, loss = np.array([point.flops for point in points]), np.array([point.loss for point in points])
    law = fit(flops, loss, at)
    if law is None:
        return Family(variant, what, mode, points, None, "the loss does not fall with compute")
    residuals = tuple((loss - law.loss(flops)).tolist())
    return Family(variant, what, mode, points, law, "", residuals, tuple(_resampled(points, flops, loss, at)))


def _resampled(
    points: Sequence[Point], flops: np.ndarray, loss: np.ndarray, at: float
) -> Iterator[tuple[PowerLaw, float]]:
    """Laws over resampled seeds that every size has, with the share of draws that give them."""
    sizes = {point.size for point in points}
    by_seed = {seed: {p.size for p in points if p.seed == seed} for seed in {point.seed for point in points}}
    seeds = sorted(seed for seed, own in by_seed.items() if own == sizes)
    if len(seeds) < 2:
        return
    place = np.array([seeds.index(point.seed) if point.seed in seeds else -1 for point in points])
    for counts, share in _multisets(len(seeds)):
        law = fit(flops, loss, at, np.where(place < 0, 0.0, counts[place]))
        if law is not None:
            yield law, share


def _multisets(n: int) -> Iterator[tuple[np.ndarray, float]]:
    """How often each of n seeds is drawn in n draws, and how likely that is."""
    if n > 5:
        rng = np.random.default_rng(0)
        for _ in range(_DRAWS):
            yield np.bincount(rng.integers(0, n, n), minlength=n).astype(float), 1 / _DRAWS
        return
    for drawn in itertools.combinations_with_replacement(range(n), n):
        counts = np.bincount(drawn, minlength=n)
        yield counts.astype(float), math.factorial(n) / math.prod(map(math.factorial, counts)) / n**n


def _spread(values: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """2.5 and 97.5 % quantiles of weighted values."""
    if not values:
        return None
    ordered = sorted(values)
    share = np.cumsum([weight for _, weight in ordered])
    share /= share[-1]
    low, high = (int(np.searchsorted(share, q - 1e-12)) for q in (0.025, 0.975))
    return float(ordered[low][0]), float(ordered[min(high, len(ordered) - 1)][0])
