"""Draws from logits: pure functions, rows of logits (R, V) in, token columns (R,) out.

    guidance -> mask -> repetition penalty -> temperature -> top-k -> top-p -> draw    (Chameleon's order)

A draw is the inverse of the cumulative distribution at one uniform number per row and step. Those numbers come
from a generator per row, seeded by (seed, row): what a row draws does not depend on its company. Disallowed
columns hold -inf. Nothing here waits for the device. Order among equal logits is (value descending, column
ascending).

Legend: R rows, V columns (the ids allowed by the head in use), N steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moma.seeds import generator


@dataclass(frozen=True)
class Sampling:
    """How to draw: `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `repetition_penalty` 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"got temperature={self.temperature}, need 0 (greedy) or more: 1 is the model's own")
        if self.top_k < 0:
            raise ValueError(f"got top_k={self.top_k}, need 0 (off) or more: change top_k")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"got top_p={self.top_p}, need above 0 and at most 1 (off): change top_p")
        if not self.repetition_penalty > 0:
            raise ValueError(
                f"got repetition_penalty={self.repetition_penalty}, need above 0: 1 is off, 1.2 discourages"
            )


OWN = Sampling()  # the model's own distribution
GREEDY = Sampling(temperature=0.0)


def guided(uncond_RV: Tensor, cond_RV: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance u + s (c - u) (arXiv 2207.12598 on logits); 1 is off."""
    return uncond_RV + scale * (cond_RV - uncond_RV)


def guided_three_way(
    uncond_RV: Tensor, image_RV: Tensor, full_RV: Tensor, image_scale: float, text_scale: float
) -> Tensor:
    """u + s_image (i - u) + s_text (f - i): i sees pictures, f everything (arXiv 2211.09800 eq. 3, Chameleon)."""
    return uncond_RV + image_scale * (image_RV - uncond_RV) + text_scale * (full_RV - image_RV)


def penalize_repeats(logits_RV: Tensor, seen_RV: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits where `seen_RV` (bool) by `penalty` (arXiv 1909.05858)."""
    lowered_RV = torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty)
    return torch.where(seen_RV, lowered_RV, logits_RV)


def keep_top_k(logits_RV: Tensor, k: int) -> Tensor:
    """-inf at all but the k largest logits."""
    order_RV = torch.sort(logits_RV, dim=1, descending=True, stable=True).indices
    return logits_RV.scatter(1, order_RV[:, k:], -torch.inf)


def keep_top_p(logits_RV: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of likeliest columns with a mass of at least p (arXiv 1904.09751)."""
    sorted_RV, order_RV = torch.sort(logits_RV, dim=1, descending=True, stable=True)
    probability_RV = sorted_RV.softmax(1)
    before_RV = probability_RV.cumsum(1) - probability_RV  # 0 in front: the first always stays
    return torch.full_like(logits_RV, -torch.inf).scatter(
        1, order_RV, sorted_RV.masked_fill(before_RV >= p, -torch.inf)
    )


def greedy(logits_RV: Tensor) -> Tensor:
    """Column of the largest logit, the first one among equals: int64 (R,)."""
    column_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    largest_RV = logits_RV == logits_RV.amax(1, keepdim=True)
    return torch.where(largest_RV, column_V, logits_RV.shape[1] - 1).amin(1)


def draw(logits_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The first column whose cumulative probability exceeds `uniform_R` in [0, 1): int64 (R,)."""
    cumulative_RV = logits_RV.double().softmax(1).cumsum(1)
    total_R1 = cumulative_RV[:, -1:]
    # below the last sum whatever the rounding: a draw must not run past the last column that has probability
    threshold_R1 = torch.minimum(uniform_R[:, None] * total_R1, total_R1.nextafter(torch.zeros_like(total_R1)))
    return (cumulative_RV <= threshold_R1).sum(1)


def sample(logits_RV: Tensor, uniform_R: Tensor, sampling: Sampling, seen_RV: Tensor | None = None) -> Tensor:
    """Columns (R,) drawn from masked logits; `seen_RV` marks what the repetition penalty applies to."""
    if seen_RV is not None and sampling.repetition_penalty != 1:
        logits_RV = penalize_repeats(logits_RV, seen_RV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return greedy(logits_RV)
    logits_RV = logits_RV / sampling.temperature
    if 0 < sampling.top_k < logits_RV.shape[1]:
        logits_RV = keep_top_k(logits_RV, sampling.top_k)
    if sampling.top_p < 1:
        logits_RV = keep_top_p(logits_RV, sampling.top_p)
    return draw(logits_RV, uniform_R)


def row_uniforms(seed: int, rows: Sequence[int], n_steps: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 (R, N) on the CPU; each row's generator is seeded by (seed, row number)."""
    numbers = []
    for row in rows:
        numbers.append(torch.rand(n_steps, generator=generator(f"{seed}/{row}"), dtype=torch.float64))
    return torch.stack(numbers) if numbers else torch.zeros(0, n_steps, dtype=torch.float64)
