"""Golden run: 20 AdamW steps in float64 on made-up data, against the losses in golden.json (rtol 1e-8).

It pins numerics and initialisation. A change that means to move them stores the losses anew, with its reason:

    python -m pytest tests/model/test_golden.py --write-golden
"""

import json
from pathlib import Path

import pytest
import torch

from moma.model.loss import linear_cross_entropy

GOLDEN = Path(__file__).with_name("golden.json")
STEPS, DISTINCT_BATCHES = 20, 4


def without_ties(batch, vocab, rebuild):
    """Each BOS a text token of its own: equal states may differ in the last bit from one processor to the next, and
    which of them an expert takes would then decide the losses."""
    tokens_RL = batch.tokens_RL.clone()
    starts = tokens_RL == vocab.bos
    tokens_RL[starts] = vocab.text_start + torch.arange(int(starts.sum())) % (vocab.text_stop - vocab.text_start)
    return rebuild(tokens_RL, batch.document_RL, vocab)


def losses_of(variant, make_batch, make_model, rebuild):
    """Objective of each step: cross-entropy per target + 1e-5 z-loss."""
    model = make_model(variant, seed=11)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    losses = []
    for step in range(STEPS):
        batch = without_ties(make_batch(variant.vocabulary, seed=step % DISTINCT_BATCHES), variant.vocabulary, rebuild)
        hidden_RLD, _ = model(batch.tokens_RL, batch.position_RL, batch.mask, batch.groups, "train")
        target_T = batch.target_RL.flatten()
        out = linear_cross_entropy(
            hidden_RLD.flatten(0, 1),
            model.head.weight,
            target_T,
            denominator=(target_T >= 0).sum(),
            z_weight=1e-5,
            chunk_tokens=32,
        )
        optimizer.zero_grad()
        out.objective.backward()
        optimizer.step()
        losses.append(out.objective.item())
    return losses


@pytest.mark.parametrize("name", ["dense", "moe_4t4i"])
def test_golden_run(name, variants, make_batch, make_model, rebuild, request):
    losses = losses_of(variants[name], make_batch, make_model, rebuild)
    assert losses[-1] < losses[0] - 0.1, "twenty steps must learn something"
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps({**stored, name: losses}, indent=1) + "\n")
        return
    assert losses == pytest.approx(stored[name], rel=1e-8, abs=0)
