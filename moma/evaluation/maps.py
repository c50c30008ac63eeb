"""Routing maps: which expert computes what, per layer; by modality, by place in the picture, by token.

Under expert choice the load of an expert is constant by construction; what differs is *which* tokens it takes: for
image experts the places of the grid, for text experts the tokens (lift = rate of the token among those taken, over
its rate among all). Under the causal routers loads differ too.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from moma.data.batch import Batch
from moma.evaluation.baselines import image_positions
from moma.modality import IMAGE, TEXT, Vocabulary, modality_of
from moma.model.attention import document_mask
from moma.model.feed_forward import Mode
from moma.model.transformer import Transformer

TOP_TOKENS = 12
MIN_COUNT = 20  # a token must occur this often to have a lift


@torch.no_grad()
def routing_maps(model: Transformer, batches: Iterable[Batch], vocab: Vocabulary, mode: Mode) -> dict[str, Any]:
    """`share` [layer][expert][modality], `image_position` [layer][expert][place], `score` [layer][expert] and
    `top_tokens` [layer][expert] as [id, lift]; empty lists where the model has no routers."""
    chosen: list[list[np.ndarray]] = []
    scores: list[list[np.ndarray]] = []
    ids, modality, places = [], [], []
    for batch in batches:
        mask = document_mask(batch.document_RL)
        _, stats = model(batch.tokens_RL, batch.position_RL, mask, batch.groups, mode)
        chosen = chosen or [[] for _ in stats]
        scores = scores or [[] for _ in stats]
        for layer, s in enumerate(stats):
            chosen[layer].append(s.selected_TE.cpu().numpy())
            scores[layer].append(s.score_TE.float().cpu().numpy())
        real = batch.document_RL.flatten() >= 0
        kinds = torch.where(real, modality_of(batch.tokens_RL.flatten(), vocab), -1)
        ids.append(batch.tokens_RL.flatten().cpu().numpy())
        modality.append(kinds.cpu().numpy())
        places.append(image_positions(batch.tokens_RL.cpu().numpy(), vocab).flatten() - 1)
    id_T, modality_T = np.concatenate(ids), np.concatenate(modality)
    place_T = np.concatenate(places) % vocab.tokens_per_image
    layers = [(np.concatenate(c), np.concatenate(s)) for c, s in zip(chosen, scores, strict=True)]
    kinds = range(len(vocab.modalities))
    return {
        "share": [[[_rate(c[:, e], modality_T == m) for m in kinds] for e in range(c.shape[1])] for c, _ in layers],
        "score": [[_mean(s[c[:, e], e]) for e in range(c.shape[1])] for c, s in layers],
        "image_position": [
            [_by_place(c[:, e], modality_T == IMAGE, place_T, vocab.tokens_per_image) for e in range(c.shape[1])]
            for c, _ in layers
        ],
        "top_tokens": [
            [_lifts(c[:, e], modality_T == TEXT, id_T, vocab.size) for e in range(c.shape[1])] for c, _ in layers
        ],
    }  # fmt: skip


def expert_names(sizes: tuple[int, ...], modalities: tuple[str, ...]) -> list[str]:
    """Names of the routed experts in the order of the statistics' columns: `text 0`, ..., `image 3`."""
    names = modalities if len(sizes) > 1 else ("mixed",)
    return [f"{name} {e}" for name, size in zip(names, sizes, strict=False) if size > 1 for e in range(size)]


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
