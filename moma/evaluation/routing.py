"""How well the auxiliary routers know what expert choice would do, per layer.

Two kinds of states: `training` (the model routes by expert choice, the predictors look on) and `free-running` (the
model routes by its own predictors, so upstream errors reach the states; the reference is what expert choice would
choose on these very states). Accuracy stands beside the majority baseline (never choosing, for E > 2), AUC is the
rank statistic over (token, expert) pairs.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moma.data.batch import Batch
from moma.modality import Vocabulary
from moma.model.attention import document_mask
from moma.model.feed_forward import Mode
from moma.model.routing import RouterStats
from moma.model.transformer import Transformer


@torch.no_grad()
def routing(model: Transformer, batches: Iterable[Batch], vocab: Vocabulary, mode: Mode) -> list[dict[str, float]]:
    """One dict per routed layer: accuracy, majority, auc, precision, recall, experts_true, experts_predicted.

    `mode="train"`: training states; `mode="aux"`: free-running. Empty where the model has no auxiliary routers.
    """
    layers: list[list[RouterStats]] = []
    for batch in batches:
        mask = document_mask(batch.document_RL)
        _, stats = model(batch.tokens_RL, batch.position_RL, mask, batch.groups, mode)
        layers = layers or [[] for _ in stats]
        for collected, s in zip(layers, stats, strict=True):
            collected.append(s)
    return [_agreement(stats) for stats in layers if stats[0].aux_logit_TE is not None]


def _agreement(stats: list[RouterStats]) -> dict[str, float]:
    member = torch.cat([s.member_TE.flatten() for s in stats])
    true = torch.cat([s.reference_TE.flatten() for s in stats])[member]
    logit = torch.cat([s.aux_logit_TE.flatten() for s in stats if s.aux_logit_TE is not None])[member]
    predicted = logit > 0
    n_tokens = sum(int(s.member_TE.any(1).sum()) for s in stats)
    hits, share = (predicted & true).sum().item(), true.double().mean().item()
    return {
        "accuracy": (predicted == true).double().mean().item(),
        "majority": max(share, 1 - share),
        "auc": auc(logit, true),
        "precision": hits / max(1, int(predicted.sum())),
        "recall": hits / max(1, int(true.sum())),
        "experts_true": int(true.sum()) / max(1, n_tokens),
        "experts_predicted": int(predicted.sum()) / max(1, n_tokens),
    }


def auc(score: Tensor, label: Tensor) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties counting half. NaN if one-sided."""
    positive, negative = int(label.sum()), int((~label).sum())
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = torch.unique(score, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    rank = (last - (counts - 1) / 2).double()[inverse]  # mean rank within ties, from 1
    return ((rank[label].sum().item()) - positive * (positive + 1) / 2) / (positive * negative)
