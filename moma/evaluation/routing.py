"""Everything about a model's routers in one routing mode, and how well a causal rule knows what the training rule does.

Two kinds of states: *training* (the model routes by its training rule, the causal rules look on) and *free-running*
(the model routes by the causal rule, so upstream errors reach the states; the reference is what the training rule
would choose on these very states). The causal rules and the scores that they cut:

    aux               auxiliary router's logit > 0
    aux_calibrated    auxiliary router's logit > its moving cut-off
    threshold         the main router's score > its moving cut-off

Numbers are over pairs (token, expert) in which the expert belongs to the token's group. Accuracy stands beside the
majority baseline (never choosing, for E > 2). AUC is the rank statistic of the raw score over all pairs, so cut-offs
that differ between experts are no part of it. `tie_share` is the share of pairs that no causal rule can know: their
score equals, to the last bit, a score on the other side of the cut in the same micro-batch and expert, so that the
order of indices alone decides them. Scores are fp32 sigmoids: where those saturate, unequal logits count as ties too.

Routers whose own rule is causal (token choice, expert threshold) have nothing to predict and are left out.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moma.data.batch import Batch
from moma.evaluation.decisions import Decisions, decide
from moma.evaluation.diagnostics import diagnostics
from moma.evaluation.maps import routing_maps
from moma.modality import Vocabulary
from moma.model.depth import DepthBlock
from moma.model.feed_forward import AUX_MODES, Mode
from moma.model.routing import RouterStats
from moma.model.transformer import Transformer

Agreement = dict[str, dict[str, dict[str, float | None]]]


def routing(model: Transformer, batches: Iterable[Batch], vocab: Vocabulary, mode: Mode) -> dict[str, Any]:
    """One pass over `batches`: `agreement`, `maps` and `diagnostics` of every router; {} for a model without routers.

    `mode="train"` looks at training states, the causal modes at free-running ones.
    """
    if not model.routers():
        return {}
    decisions = decide(model, batches, vocab, mode)
    return {
        "agreement": agreement(model, decisions),
        "maps": routing_maps(model, decisions, vocab),
        "diagnostics": diagnostics(decisions, vocab),
    }


def agreement(model: Transformer, decisions: Decisions) -> Agreement:
    """Per router and causal rule: accuracy, majority, auc, precision, recall, experts_true, experts_predicted (experts
    per token), tie_share. On training states of all rules that the model has, on free-running ones of their own."""
    rules = model.causal_modes() if decisions.mode == "train" else (decisions.mode,)
    found: Agreement = {}
    for name, router in model.routers().items():
        if not (isinstance(router, DepthBlock) or router.needs_future):
            continue
        stats = decisions.routers[name]
        member = decisions.joined(name, "member_TE")
        true = decisions.joined(name, "reference_TE")[member]
        n_tokens, ties = int(member.any(1).sum()), sum(map(ties_of, stats)) / max(1, int(member.sum()))
        state = {key: value.cpu() for key, value in router.routing_state().items()}
        found[name] = {}
        for rule in rules:
            score_TE = decisions.joined(name, "aux_logit_TE" if rule in AUX_MODES else "score_TE")
            if decisions.mode != "train":
                decided_TE = decisions.joined(name, "selected_TE")
            elif rule == "threshold":
                decided_TE = score_TE > torch.sigmoid(state["cutoff"])
            else:
                decided_TE = score_TE > (state["aux_cutoff"] if rule == "aux_calibrated" else 0)
            found[name][rule] = _compare(decided_TE[member], true, score_TE[member], n_tokens) | {"tie_share": ties}
    return found


def _compare(predicted: Tensor, true: Tensor, score: Tensor, n_tokens: int) -> dict[str, float | None]:
    hits, share, area = int((predicted & true).sum()), true.double().mean().item(), auc(score, true)
    return {
        "accuracy": (predicted == true).double().mean().item(),
        "majority": max(share, 1 - share),
        "auc": None if math.isnan(area) else area,
        "precision": hits / max(1, int(predicted.sum())),
        "recall": hits / max(1, int(true.sum())),
        "experts_true": int(true.sum()) / max(1, n_tokens),
        "experts_predicted": int(predicted.sum()) / max(1, n_tokens),
    }


def ties_of(stats: RouterStats) -> int:
    """Pairs of one micro-batch whose score stands on both sides of the training rule's cut, per expert."""
    assert stats.reference_TE is not None
    n_ties = 0
    for score_T, true_T, member_T in zip(stats.score_TE.T, stats.reference_TE.T, stats.member_TE.T, strict=True):
        taken, left = score_T[member_T & true_T], score_T[member_T & ~true_T]
        n_ties += int(torch.isin(taken, left).sum()) + int(torch.isin(left, taken).sum())
    return n_ties


def auc(score: Tensor, label: Tensor) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties counting half. NaN if one-sided."""
    positive, negative = int(label.sum()), int((~label).sum())
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = torch.unique(score, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    rank = (last - (counts - 1) / 2).double()[inverse]  # mean rank within ties, from 1
    return ((rank[label].sum().item()) - positive * (positive + 1) / 2) / (positive * negative)
