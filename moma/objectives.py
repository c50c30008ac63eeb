"""What a step minimises: `loss(config, model, batch, denominator, vocab, detail, seed) -> (loss, tallies)`; the loop
never asks which it is. `seed` is that of routing noise.

    next_token     cross-entropy + z_weight * lse^2          all parameters (Chameleon section 2.3)
    aux_routers    BCE of the causal predictors against the training rule's choice; everything else frozen
                   (MoMa section 2.4)

A tally is a device tensor [sum, count]: summed over micro-batches, divided once when it is logged.
Routing uses the input token's modality, losses are split by the target's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moma.data.batch import Batch
from moma.modality import IGNORE, Vocabulary, modality_of
from moma.model.attention import document_mask
from moma.model.aux_routers import binary_cross_entropy
from moma.model.feed_forward import Mode, SparseConfig, SparseFeedForward
from moma.model.loss import TokenLosses, linear_cross_entropy
from moma.model.routing import RouterStats
from moma.model.routing.noise import gumbel_noise
from moma.model.transformer import Transformer

Tallies = dict[str, Tensor]


@dataclass(frozen=True)
class NextTokenConfig:
    """Pre-training; `z_weight` as in Chameleon."""

    kind: Literal["next_token"] = "next_token"
    z_weight: float = 1e-5
    needs_aux_routers = False


@dataclass(frozen=True)
class AuxRoutersConfig:
    """Second stage: train the auxiliary routers of a finished run (`init_from`)."""

    kind: Literal["aux_routers"] = "aux_routers"
    needs_aux_routers = True


def run_model(
    model: Transformer,
    batch: Batch,
    denominator: float,
    mode: Mode = "train",
    z_weight: float = 0.0,
    noise_seed: int | None = None,
) -> tuple[TokenLosses, list[RouterStats]]:
    """One forward pass over a micro-batch with its loss head: per-token losses (T,) and every layer's decisions.

    `noise_seed`: seed of the routing noise of a model that is configured with it; None: no noise.
    """
    mask = document_mask(batch.document_RL)
    noise_NTE = None if noise_seed is None else routing_noise(model, batch, noise_seed)
    hidden_RLD, stats = model(batch.tokens_RL, batch.position_RL, mask, batch.groups, mode, None, noise_NTE)
    losses = linear_cross_entropy(
        hidden_RLD.flatten(0, 1),
        model.head.weight,
        batch.target_RL.flatten(),
        denominator=denominator,
        z_weight=z_weight,
    )
    return losses, stats


def routing_noise(model: Transformer, batch: Batch, seed: int) -> Tensor | None:
    """The noise of a micro-batch (layers, T, E), or None for a model without noise or without routers."""
    config, layer = model.feed_forward, model.blocks[0].feed_forward
    if not isinstance(config, SparseConfig) or config.noise == "none":
        return None
    assert isinstance(layer, SparseFeedForward)
    if not layer.n_routed:
        return None
    tokens_RL = batch.tokens_RL
    return gumbel_noise(seed, batch.number, len(model.blocks), tokens_RL.numel(), layer.n_routed, tokens_RL.device)


def loss_tallies(losses: TokenLosses, target_T: Tensor, vocab: Vocabulary, z_weight: float = 0.0) -> Tallies:
    """Cross-entropy over all targets, per modality of the target, and of text without structural tokens."""
    modality_T, present_T = modality_of(target_T, vocab), target_T != IGNORE
    masks = {"loss": present_T}
    masks |= {f"loss_{name}": present_T & (modality_T == m) for m, name in enumerate(vocab.modalities)}
    masks["loss_text_plain"] = present_T & (target_T >= vocab.text_start) & (target_T < vocab.text_stop)
    tallies = {name: _tally(losses.cross_entropy_T, mask_T) for name, mask_T in masks.items()}
    return tallies | {"z_loss": _tally(losses.z_T * z_weight, present_T)}


def router_tallies(stats: list[RouterStats], batch: Batch, vocab: Vocabulary) -> Tallies:
    """Per layer and modality: share of tokens that no routed expert computes, mean number of experts, mean score."""
    modality_T = modality_of(batch.tokens_RL.flatten(), vocab)
    tallies: Tallies = {}
    for layer, s in enumerate(stats):
        picks_T = s.selected_TE.sum(1)
        for m, name in enumerate(vocab.modalities):
            tokens_T = s.member_TE.any(1) & (modality_T == m)
            tallies[f"router/{layer}/unserved_{name}"] = _tally((picks_T == 0).float(), tokens_T)
            tallies[f"router/{layer}/picks_{name}"] = _tally(picks_T.float(), tokens_T)
            chosen_TE = s.selected_TE & tokens_T[:, None]
            tallies[f"router/{layer}/score_{name}"] = _tally(s.score_TE, chosen_TE)
    return tallies


def _tally(values: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([torch.where(mask, values, 0).sum(dtype=torch.float32), mask.sum()])


def next_token(
    config: NextTokenConfig,
    model: Transformer,
    batch: Batch,
    denominator: float,
    vocab: Vocabulary,
    detail: bool,
    seed: int,
) -> tuple[Tensor, Tallies]:
    """Loss of one micro-batch, its sum divided by the step's `denominator`; `detail` adds routing statistics."""
    losses, stats = run_model(model, batch, denominator, "train", config.z_weight, seed)
    tallies = loss_tallies(losses, batch.target_RL.flatten(), vocab, config.z_weight)
    return losses.objective, tallies | (router_tallies(stats, batch, vocab) if detail else {})


def aux_routers(
    config: AuxRoutersConfig,
    model: Transformer,
    batch: Batch,
    denominator: float,
    vocab: Vocabulary,
    detail: bool,
    seed: int,
) -> tuple[Tensor, Tallies]:
    """Mean BCE over the layers, weighted by the micro-batch's share of the step's targets."""
    mask = document_mask(batch.document_RL)
    _, stats = model(batch.tokens_RL, batch.position_RL, mask, batch.groups, "train")
    layers, tallies = [], {}
    for layer, s in enumerate(stats):
        assert s.aux_logit_TE is not None
        layers.append(binary_cross_entropy(s.aux_logit_TE, s.reference_TE, s.member_TE))
        agree_TE = (s.aux_logit_TE > 0) == s.reference_TE
        if detail:
            tallies[f"aux/{layer}/accuracy"] = _tally(agree_TE.float(), s.member_TE)
    loss = torch.stack(layers).mean()
    tallies["aux_loss"] = torch.stack([loss.detach().float(), torch.ones_like(loss)])
    return loss * (batch.n_targets / denominator), tallies


OBJECTIVES: dict[str, tuple[type, Callable[..., tuple[Tensor, Tallies]]]] = {
    "next_token": (NextTokenConfig, next_token),
    "aux_routers": (AuxRoutersConfig, aux_routers),
}


def freeze_for(config: Any, model: Transformer) -> None:
    """Leave trainable what the objective trains; raises ValueError where the model has nothing of it."""
    if not config.needs_aux_routers:
        return
    names = [name for name, _ in model.named_parameters() if ".aux." in name]
    if not names:
        raise ValueError(
            "got a model without learned routers, need one for objective=aux_routers: dense and moe_1t1i have none, "
            "they are causal as they are"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".aux." in name)
