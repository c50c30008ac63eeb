"""What every router decides on held-out micro-batches, in one pass per routing mode; all routing evaluators read it.

Everything is kept on the CPU: (T, E) per router and micro-batch, a few bytes per token and expert.

Legend: T tokens (of all micro-batches together), E columns of a router.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moma.data.batch import Batch
from moma.evaluation.baselines import image_positions
from moma.modality import Vocabulary, modality_of
from moma.model.attention import document_mask
from moma.model.feed_forward import Mode
from moma.model.routing import Disturbance, RouterStats
from moma.model.transformer import Transformer
from moma.objectives import routing_noise


@dataclass(frozen=True)
class Decisions:
    """Decisions in one mode: per router one `RouterStats` per micro-batch, and the tokens of all of them in a row.

    `modality_T` is -1 at padding; `place_T` is an image code's position in its picture, other tokens' is of no use.
    """

    mode: Mode
    routers: dict[str, list[RouterStats]]
    id_T: Tensor
    modality_T: Tensor
    place_T: Tensor

    def joined(self, router: str, field: str) -> Tensor:
        """One field of a router over all micro-batches, (T, E)."""
        return torch.cat([getattr(s, field) for s in self.routers[router]])


def evaluation_noise(model: Transformer, batch: Batch, mode: Mode) -> list[Disturbance] | None:
    """What rules that draw in evaluation too draw for a micro-batch; causal modes draw nothing."""
    return routing_noise(model, batch.number, batch.tokens_RL.numel(), 0, training=False) if mode == "train" else None


@torch.no_grad()
def decide(model: Transformer, batches: Iterable[Batch], vocab: Vocabulary, mode: Mode) -> Decisions:
    """Run the model without its loss head and keep what its routers decide."""
    routers: dict[str, list[RouterStats]] = {name: [] for name in model.routers()}
    ids, modalities, places = [], [], []
    for batch in batches:
        mask, noise = document_mask(batch.document_RL), evaluation_noise(model, batch, mode)
        _, stats = model(batch.tokens_RL, batch.position_RL, mask, batch.groups, mode, disturbances=noise)
        for name, found in stats.items():
            routers[name].append(_on_cpu(found))
        tokens_RL = batch.tokens_RL.cpu()
        ids.append(tokens_RL.flatten())
        present_T = batch.document_RL.flatten().cpu() >= 0
        modalities.append(torch.where(present_T, modality_of(ids[-1], vocab), -1))
        places.append(torch.from_numpy(image_positions(tokens_RL.numpy(), vocab)).flatten() - 1)
    return Decisions(mode, routers, torch.cat(ids), torch.cat(modalities), torch.cat(places) % vocab.tokens_per_image)


def _on_cpu(stats: RouterStats) -> RouterStats:
    values = (value.cpu() if isinstance(value, Tensor) else value for value in stats[:6])
    return RouterStats(*values)  # type: ignore[arg-type]
