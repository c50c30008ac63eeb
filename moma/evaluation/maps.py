"""Routing maps: which column of a router (expert, or depth) computes what: by modality, by place in the picture, by
token.

Under expert choice the load of an expert is constant by construction; what differs is *which* tokens it takes: for
image experts the places of the grid, for text experts the tokens (lift = rate of the token among those taken, over
its rate among all). Under causal rules loads differ too.
"""

from typing import Any

import numpy as np
import torch

from moma.evaluation.decisions import Decisions
from moma.modality import IMAGE, TEXT, Vocabulary
from moma.model.depth import DepthBlock
from moma.model.feed_forward import SparseFeedForward
from moma.model.transformer import Transformer

TOP_TOKENS = 12
MIN_COUNT = 20  # a token must occur this often to have a lift


@torch.no_grad()
def routing_maps(model: Transformer, decisions: Decisions, vocab: Vocabulary) -> dict[str, dict[str, Any]]:
    """Per router, lists over its columns: `columns` (names), `expected` (nominal share of the group's tokens), `share`
    [column][modality], `score` (mean of the chosen), `image_position` [column][place] and `top_tokens` [column] as
    [id, lift]. Shares are of all tokens, also those that a depth router keeps from an expert."""
    id_T, modality_T, place_T = (t.numpy() for t in (decisions.id_T, decisions.modality_T, decisions.place_T))
    image_T, text_T = modality_T == IMAGE, modality_T == TEXT
    found = {}
    for name, router in model.routers().items():
        chosen_TE = decisions.joined(name, "selected_TE").numpy()
        score_TE = decisions.joined(name, "score_TE").float().numpy()
        columns, expected = column_names(router, vocab.modalities)
        every = range(len(columns))
        found[name] = {
            "columns": columns,
            "expected": expected,
            "share": [[_rate(chosen_TE[:, e], modality_T == m) for m in range(len(vocab.modalities))] for e in every],
            "score": [_mean(score_TE[chosen_TE[:, e], e]) for e in every],
            "image_position": [_by_place(chosen_TE[:, e], image_T, place_T, vocab.tokens_per_image) for e in every],
            "top_tokens": [_lifts(chosen_TE[:, e], text_T, id_T, vocab.size) for e in every],
        }
    return found


def column_names(router: SparseFeedForward | DepthBlock, modalities: tuple[str, ...]) -> tuple[list[str], list[float]]:
    """Names of a router's columns, and the share of its group's tokens that each takes by design.

    Experts: `text 0`, ..., `image 3`, or `mixed 0`, ...; depth: `depth`, or `depth text`, `depth image`.
    """
    if isinstance(router, DepthBlock):
        names = [f"depth {name}" for name in modalities] if router.quota else ["depth"]
        return names, [float(router.capacity)] * len(names)
    routed = [(group, size) for group, size in router.groups.items() if size > 1]
    names = [f"{'mixed' if group == 'all' else group} {e}" for group, size in routed for e in range(size)]
    return names, [float(router.shares[group]) for group, size in routed for _ in range(size)]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def _rate(chosen_T: np.ndarray, of_T: np.ndarray) -> float:
    return float(chosen_T[of_T].mean()) if of_T.any() else 0.0


def _by_place(chosen_T: np.ndarray, image_T: np.ndarray, place_T: np.ndarray, places: int) -> list[float]:
    taken = np.bincount(place_T[image_T & chosen_T], minlength=places)
    return (taken / np.maximum(np.bincount(place_T[image_T], minlength=places), 1)).round(4).tolist()


def _lifts(chosen_T: np.ndarray, text_T: np.ndarray, id_T: np.ndarray, size: int) -> list[list[float]]:
    taken = np.bincount(id_T[text_T & chosen_T], minlength=size)
    every = np.bincount(id_T[text_T], minlength=size)
    if not taken.sum():
        return []
    lift = np.where(every >= MIN_COUNT, taken / np.maximum(every, 1), 0) * every.sum() / taken.sum()
    best = np.argsort(-lift, kind="stable")[:TOP_TOKENS]
    return [[int(i), round(float(lift[i]), 3)] for i in best if lift[i] > 0]
