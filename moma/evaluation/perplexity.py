"""Cross-entropy of held-out documents, overall and per modality of the target (nats per target token)."""

from collections.abc import Iterable

import torch

from moma.data.batch import Batch
from moma.evaluation.decisions import evaluation_noise
from moma.modality import Vocabulary
from moma.model.feed_forward import Mode
from moma.model.transformer import Transformer
from moma.objectives import loss_tallies, run_model


@torch.no_grad()
def perplexity(model: Transformer, batches: Iterable[Batch], vocab: Vocabulary, mode: Mode) -> dict[str, float]:
    """`loss`, `loss_text`, `loss_text_plain`, `loss_image` (nats) and `targets`, over all `batches`.

    `mode="train"` routes by the training rule over each micro-batch, which may see the future; the others are causal.
    """
    totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        losses, _ = run_model(model, batch, 1.0, mode, disturbances=evaluation_noise(model, batch, mode))
        for name, tally in loss_tallies(losses, batch.target_RL.flatten(), vocab).items():
            totals[name] = totals.get(name, 0) + tally.double()
    metrics = {name: (t[0] / t[1].clamp(min=1)).item() for name, t in totals.items() if name != "z_loss"}
    return metrics | {"targets": totals["loss"][1].item()}
