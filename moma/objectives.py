"""What a step minimises: `loss(config, model, batch, denominator, vocab, detail, disturbances) -> Outcome`; the
loop never asks which it is.

    next_token     cross-entropy + z_weight * lse^2 + the routers' own losses      all parameters (Chameleon 2.3)
                   + aux_weight * BCE of the auxiliary routers, on detached states (joint training)
    aux_routers    BCE of the causal predictors against the training rule's choice; everything else frozen
                   (MoMa section 2.4)

A tally is a device tensor [sum, count]: summed over micro-batches, divided once when it is logged.
Routing uses the input token's modality, losses are split by the target's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moma.data.batch import Batch
from moma.modality import IGNORE, Vocabulary, modality_of
from moma.model.attention import document_mask
from moma.model.aux_routers import binary_cross_entropy
from moma.model.feed_forward import UNDISTURBED, Mode, SparseConfig, SparseFeedForward
from moma.model.loss import TokenLosses, linear_cross_entropy
from moma.model.routing import Disturbance, RouterStats, State
from moma.model.routing.noise import gumbel_noise, gumbel_sigmoid_noise
from moma.model.transformer import Transformer

Tallies = dict[str, Tensor]


class Outcome(NamedTuple):
    """`loss` to differentiate, tallies to log, and what each router's state needs of the micro-batch."""

    loss: Tensor
    tallies: Tallies
    observed: dict[str, State]


@dataclass(frozen=True)
class NextTokenConfig:
    """Pre-training; `z_weight` as in Chameleon. `aux_weight` above 0 trains the auxiliary routers along, from detached
    states and under a clipping of their own: the model is the same to the last bit."""

    kind: Literal["next_token"] = "next_token"
    z_weight: float = 1e-5
    aux_weight: float = 0.0

    @property
    def needs_aux_routers(self) -> bool:
        """Whether the model must have auxiliary routers."""
        return self.aux_weight > 0

    trains_model = True

    def __post_init__(self) -> None:
        if not 0 <= self.z_weight <= 0.01:
            raise ValueError(f"got z_weight={self.z_weight}, need 0 to 0.01 (Chameleon's is 1e-5): change it")
        if self.aux_weight < 0:
            raise ValueError(f"got aux_weight={self.aux_weight}, need 0 (not trained along) or more: change it")


@dataclass(frozen=True)
class AuxRoutersConfig:
    """Second stage: train the auxiliary routers of a finished run (`init_from`)."""

    kind: Literal["aux_routers"] = "aux_routers"
    needs_aux_routers = True
    trains_model = False


def run_model(
    model: Transformer,
    batch: Batch,
    denominator: float,
    mode: Mode = "train",
    z_weight: float = 0.0,
    disturbances: list[Disturbance] | None = None,
) -> tuple[TokenLosses, dict[str, RouterStats]]:
    """One forward pass over a micro-batch with its loss head: per-token losses (T,) and every router's decisions."""
    mask = document_mask(batch.document_RL, batch.alone)
    hidden_RLD, stats = model(batch.tokens_RL, batch.position_RL, mask, batch.groups, mode, disturbances=disturbances)
    losses = linear_cross_entropy(
        hidden_RLD.flatten(0, 1),
        model.head.weight,
        batch.target_RL.flatten(),
        denominator=denominator,
        z_weight=z_weight,
    )
    return losses, stats


def routing_noise(
    model: Transformer, micro_batch: int, n_tokens: int, seed: int, training: bool = True, gumbel: bool = False
) -> list[Disturbance] | None:
    """What the layers of `model` draw for one micro-batch of `n_tokens`; None if nothing.

    Rules that draw do so where they say (some in evaluation too, where `seed` does not count); `gumbel` adds
    Gumbel-sigmoid noise to the logits of the others.
    """
    if not isinstance(model.architecture.feed_forward, SparseConfig):
        return None
    device, found = model.embedding.weight.device, []
    for layer, block in enumerate(model.blocks):
        own, key = block.feed_forward, f"{seed if training else 'evaluation'}/{micro_batch}/{layer}"
        noise_TE = None
        if isinstance(own, SparseFeedForward) and own.n_routed:
            if own.rule.draws is not None and own.rule.draws(own.selection, training):
                noise_TE = gumbel_noise(key, n_tokens, own.n_routed, device)
            elif gumbel and training:
                noise_TE = gumbel_sigmoid_noise(key, n_tokens, own.n_routed, device)
        found.append(UNDISTURBED if noise_TE is None else Disturbance(noise_TE))
    return found if any(d.noise_TE is not None for d in found) else None


def loss_tallies(losses: TokenLosses, target_T: Tensor, vocab: Vocabulary, z_weight: float = 0.0) -> Tallies:
    """Cross-entropy over all targets, per modality of the target, and of text without structural tokens."""
    modality_T, present_T = modality_of(target_T, vocab), target_T != IGNORE
    masks = {"loss": present_T}
    masks |= {f"loss_{name}": present_T & (modality_T == m) for m, name in enumerate(vocab.modalities)}
    masks["loss_text_plain"] = present_T & (target_T >= vocab.text_start) & (target_T < vocab.text_stop)
    tallies = {name: _tally(losses.cross_entropy_T, mask_T) for name, mask_T in masks.items()}
    return tallies | {"z_loss": _tally(losses.z_T * z_weight, present_T)}


def source_tallies(losses: TokenLosses, batch: Batch) -> Tallies:
    """Cross-entropy over the targets of every source."""
    if batch.source_RL is None:
        return {}
    source_T, present_T = batch.source_RL.flatten(), batch.target_RL.flatten() != IGNORE
    return {
        f"loss_source/{name}": _tally(losses.cross_entropy_T, present_T & (source_T == place))
        for place, name in enumerate(batch.sources)
    }


def router_tallies(stats: dict[str, RouterStats], batch: Batch, vocab: Vocabulary) -> Tallies:
    """Per router and modality: share of its tokens that none, one, several of its experts compute, mean number of
    experts, mean score, entropy of the experts' loads over its maximum, share of choices that a capacity refused."""
    modality_T = modality_of(batch.tokens_RL.flatten(), vocab)
    tallies: Tallies = {}
    for router, s in stats.items():
        picks_T = s.selected_TE.sum(1)
        for m, name in enumerate(vocab.modalities):
            tokens_T = s.member_TE.any(1) & (modality_T == m)
            chosen_TE = s.selected_TE & tokens_T[:, None]
            for what, values_T in (
                ("unserved", picks_T == 0),
                ("single", picks_T == 1),
                ("several", picks_T > 1),
                ("picks", picks_T),
            ):
                tallies[f"router/{router}/{what}_{name}"] = _tally(values_T.float(), tokens_T)
            tallies[f"router/{router}/score_{name}"] = _tally(s.score_TE, chosen_TE)
            entropy, some = load_entropy(chosen_TE.sum(0), (s.member_TE & tokens_T[:, None]).any(0))
            tallies[f"router/{router}/entropy_{name}"] = torch.stack([entropy, some])
            if s.dropped_TE is not None:
                refused_TE = s.dropped_TE & tokens_T[:, None]
                tallies[f"router/{router}/dropped_{name}"] = torch.stack(
                    [refused_TE.sum().float(), (refused_TE | chosen_TE).sum().float()]
                )
    return tallies


def load_entropy(load_E: Tensor, open_E: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of a modality's choices over the experts it may go to, as a share of its maximum (1: equal loads), and
    1, or both 0 where there is no choice or no more than one expert."""
    share_E = load_E / load_E.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share_E, share_E).sum()
    n_open = open_E.sum()
    some = (n_open > 1) & (load_E.sum() > 0)
    most = torch.log(n_open.clamp(min=2).float())
    return torch.where(some, entropy / most, 0.0), some.float()


def _tally(values: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([torch.where(mask, values, 0).sum(dtype=torch.float32), mask.sum()])


def _aux_loss(stats: dict[str, RouterStats], detail: bool) -> tuple[Tensor, Tallies]:
    """Mean BCE over the routers that have predictors."""
    layers, tallies = [], {}
    for router, s in stats.items():
        if s.aux_logit_TE is None:
            continue
        assert s.reference_TE is not None
        layers.append(binary_cross_entropy(s.aux_logit_TE, s.reference_TE, s.member_TE))
        if detail:
            agree_TE = (s.aux_logit_TE > 0) == s.reference_TE
            tallies[f"aux/{router}/accuracy"] = _tally(agree_TE.float(), s.member_TE)
    loss = torch.stack(layers).mean()
    tallies["aux_loss"] = torch.stack([loss.detach().float(), torch.ones_like(loss)])
    return loss, tallies


def next_token(
    config: NextTokenConfig,
    model: Transformer,
    batch: Batch,
    denominator: float,
    vocab: Vocabulary,
    detail: bool,
    disturbances: list[Disturbance] | None = None,
) -> Outcome:
    """Loss of one micro-batch, its sum divided by the step's `denominator`; `detail` adds routing statistics."""
    losses, stats = run_model(model, batch, denominator, "train", config.z_weight, disturbances)
    tallies = loss_tallies(losses, batch.target_RL.flatten(), vocab, config.z_weight)
    tallies |= source_tallies(losses, batch)
    tallies |= router_tallies(stats, batch, vocab) if detail else {}
    loss, share = losses.objective, batch.n_targets / denominator
    own: dict[str, Tensor] = {}  # summed over the layers
    for s in stats.values():
        own |= {name: own[name] + value if name in own else value for name, value in s.losses.items()}
    for name, value in own.items():
        tallies[name] = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)])
        loss = loss + value * share
    if config.aux_weight:
        aux_loss, aux_tallies = _aux_loss(stats, detail)
        loss, tallies = loss + config.aux_weight * share * aux_loss, tallies | aux_tallies
    return Outcome(loss, tallies, {router: s.observed for router, s in stats.items()})


def aux_routers(
    config: AuxRoutersConfig,
    model: Transformer,
    batch: Batch,
    denominator: float,
    vocab: Vocabulary,
    detail: bool,
    disturbances: list[Disturbance] | None = None,
) -> Outcome:
    """Mean BCE over the routers, weighted by the micro-batch's share of the step's targets; the model's own routing
    state stays, only the predictors' cut-offs move."""
    mask = document_mask(batch.document_RL, batch.alone)
    _, stats = model(batch.tokens_RL, batch.position_RL, mask, batch.groups, "train")
    loss, tallies = _aux_loss(stats, detail)
    observed = {
        router: {"aux_cutoff": s.observed["aux_cutoff"]} for router, s in stats.items() if "aux_cutoff" in s.observed
    }
    return Outcome(loss * (batch.n_targets / denominator), tallies, observed)


OBJECTIVES: dict[str, tuple[type, Callable[..., Outcome]]] = {
    "next_token": (NextTokenConfig, next_token),
    "aux_routers": (AuxRoutersConfig, aux_routers),
}


def is_aux(name: str) -> bool:
    """Whether this is the name of an auxiliary router's parameter (or of its cut-offs)."""
    return ".aux." in name or ".routing_aux" in name


def freeze_for(config: Any, model: Transformer) -> None:
    """Leave trainable what the objective trains; raises ValueError where the model has nothing of it."""
    if config.needs_aux_routers and not any(is_aux(name) for name, _ in model.named_parameters()):
        raise ValueError(
            "got a model whose routers need no predictors, need one with expert choice or mixture-of-depths to train "
            "auxiliary routers: dense, moe_1t1i, token choice and threshold are causal as they are"
        )
    if config.trains_model:
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_aux(name))
