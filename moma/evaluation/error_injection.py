"""How much a wrong decision costs: losses under planted routing errors (the paper's analysis of mixture-of-depths).

    decision(token, expert) = training rule's, turned round with probability sigma      independently of each other

The executed pairs keep the main router's weights; nothing is dropped. sigma = 0 is the training rule itself. The draws
of a micro-batch's layer are one uniform number per decision, the same for every sigma: a larger sigma plants the
errors of a smaller one and more. Refuses rates outside [0, 1] and a target that the model lacks.

Legend: T tokens, E routed experts of a layer, C columns of a depth router.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from moma.data.batch import Batch
from moma.evaluation.decisions import evaluation_noise
from moma.modality import Vocabulary
from moma.model.depth import DepthBlock
from moma.model.feed_forward import UNDISTURBED, SparseFeedForward
from moma.model.routing import Disturbance
from moma.model.transformer import Transformer
from moma.objectives import loss_tallies, run_model
from moma.seeds import generator

Target = Literal["experts", "depth", "both"]


def check_rates(rates: Sequence[float]) -> None:
    """Raise ValueError unless every rate is a probability."""
    if not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"got error rates {list(rates)}, need numbers in [0, 1]: 0.005 is half a percent")


def targets(model: Transformer) -> list[Target]:
    """Which kinds of routers the model has: `experts`, `depth`."""
    routers = model.routers().values()
    kinds: list[tuple[Target, type]] = [("experts", SparseFeedForward), ("depth", DepthBlock)]
    return [name for name, kind in kinds if any(isinstance(router, kind) for router in routers)]


@torch.no_grad()
def error_injection(
    model: Transformer,
    batches: Iterable[Batch],
    vocab: Vocabulary,
    sigmas: Sequence[float],
    seed: int,
    target: Target = "experts",
) -> list[dict[str, float]]:
    """Per sigma: `sigma`, `realised_rate` (of the decisions of the target's routers), `loss` and `loss_{modality}`
    (nats per target token), over all `batches`, in mode `train` but for the errors."""
    check_rates(sigmas)
    kinds = targets(model)
    if not kinds or (target != "both" and target not in kinds):
        raise ValueError(
            f"got target={target} for a model with routers of {' and '.join(kinds) or 'no kind'}, need one that it has"
            f"{': ' + ', '.join(kinds) if kinds else ': a sparse model'}"
        )
    hit: set[Target] = set(kinds) if target == "both" else {target}
    totals: list[dict[str, Tensor]] = [{} for _ in sigmas]
    for batch in batches:
        drawn = _draw(model, batch, seed)
        for sigma, total in zip(sigmas, totals, strict=True):
            losses, stats = run_model(
                model, batch, 1.0, "train", disturbances=_disturb(model, batch, drawn, sigma, hit)
            )
            tallies = loss_tallies(losses, batch.target_RL.flatten(), vocab)
            wrong = torch.zeros(2, dtype=torch.float64, device=batch.tokens_RL.device)
            for name, s in stats.items():
                if ("depth" if name.endswith(".depth") else "experts") in hit:
                    assert s.reference_TE is not None
                    wrong += torch.stack([(s.selected_TE ^ s.reference_TE).sum(), s.member_TE.sum()])
            for name, tally in {**tallies, "realised_rate": wrong}.items():
                total[name] = total.get(name, 0) + tally.double()
    names = ("realised_rate", "loss", *(f"loss_{modality}" for modality in vocab.modalities))
    return [
        {"sigma": float(sigma)} | {name: (total[name][0] / total[name][1].clamp(min=1)).item() for name in names}
        for sigma, total in zip(sigmas, totals, strict=True)
    ]


def _draw(model: Transformer, batch: Batch, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Uniform numbers per layer, for its experts (T, E) and its depth router (T, 1); drawn on the CPU."""
    n_tokens, device, drawn = batch.tokens_RL.numel(), batch.tokens_RL.device, []
    for layer, block in enumerate(model.blocks):
        source = generator(f"errors/{seed}/{batch.number}/{layer}")
        own = block.feed_forward
        n_routed = own.n_routed if isinstance(own, SparseFeedForward) else 0
        depth_T1 = torch.rand(n_tokens, 1, generator=source)
        drawn.append((torch.rand(n_tokens, n_routed, generator=source).to(device), depth_T1.to(device)))
    return drawn


def _disturb(
    model: Transformer, batch: Batch, drawn: list[tuple[Tensor, Tensor]], sigma: float, hit: set[Target]
) -> list[Disturbance]:
    noise = evaluation_noise(model, batch, "train") or [UNDISTURBED] * len(drawn)
    found = []
    for block, own, (expert_TE, depth_T1) in zip(model.blocks, noise, drawn, strict=True):
        if "experts" in hit and expert_TE.shape[1]:
            own = own._replace(flip_TE=expert_TE < sigma)
        if "depth" in hit and isinstance(block, DepthBlock):
            # a token has one decision, whatever the number of columns
            n_columns = len(next(iter(block.routing_state().values())))
            own = own._replace(depth_flip_TE=(depth_T1 < sigma).expand(-1, n_columns))
        found.append(own)
    return found
