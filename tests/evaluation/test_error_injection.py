"""Planted routing errors: none changes nothing, a flipped decision is a flipped decision, rates are realised."""

import pytest
import torch

from moma.data.batch import Batch
from moma.evaluation import perplexity
from moma.evaluation.error_injection import error_injection, targets
from moma.model.attention import document_mask
from moma.model.routing import Disturbance


@pytest.fixture
def batches(make_batch):
    def make(variant, n=2):
        found = [make_batch(variant.vocabulary, seed) for seed in range(n)]
        return [
            Batch(i, b.tokens_RL, b.target_RL, b.document_RL, b.position_RL, b.groups, 1, True)
            for i, b in enumerate(found)
        ]

    return make


def test_without_errors_it_is_the_training_mode(variant, make_model, batches):
    model, data = make_model(variant).requires_grad_(False), batches(variant)
    plain = perplexity(model, data, variant.vocabulary, "train")
    for target in (*targets(model), *(["both"] if targets(model) else [])):
        (row,) = error_injection(model, data, variant.vocabulary, [0.0], 0, target)
        assert row["sigma"] == row["realised_rate"] == 0
        for name, value in row.items():
            if name.startswith("loss"):
                assert value == pytest.approx(plain[name], rel=1e-12), (target, name)


def test_rates_are_realised_and_nested(variant, make_model, batches):
    model, data = make_model(variant).requires_grad_(False), batches(variant, 4)
    for target in targets(model):
        rows = error_injection(model, data, variant.vocabulary, [0.1, 0.3, 1.0], 0, target)
        assert rows[2]["realised_rate"] == 1
        for row in rows[:2]:
            assert row["realised_rate"] == pytest.approx(row["sigma"], abs=0.08)
        assert len({row["loss"] for row in rows}) == 3
        assert rows == error_injection(model, data, variant.vocabulary, [0.1, 0.3, 1.0], 0, target)
        assert rows[0]["loss"] != error_injection(model, data, variant.vocabulary, [0.1], 1, target)[0]["loss"]


def test_targets_are_the_routers_of_the_model(variants, make_model):
    assert {name: targets(make_model(v)) for name, v in variants.items() if name in ("dense", "moe_1t1i")} == {
        "dense": [], "moe_1t1i": []
    }  # fmt: skip
    assert targets(make_model(variants["moe_4t4i"])) == ["experts"]
    assert targets(make_model(variants["mod_dense"])) == ["depth"]
    assert targets(make_model(variants["mod_4t4i"])) == ["experts", "depth"]


def test_every_decision_turned_round_by_hand(variants, make_model, batches):
    """sigma = 1 executes exactly the complement of the training rule, of the tokens' own groups alone."""
    variant = variants["moe_4t4i"]
    model, (batch,) = make_model(variant).requires_grad_(False), batches(variant, 1)
    all_of_them = [Disturbance(flip_TE=torch.ones(75, 8, dtype=torch.bool))] * 2
    mask = document_mask(batch.document_RL)
    hidden_RLD, stats = model(batch.tokens_RL, batch.position_RL, mask, batch.groups, "train", disturbances=all_of_them)
    for s in stats.values():
        assert torch.equal(s.selected_TE, s.member_TE & ~s.reference_TE)
    logits = hidden_RLD.flatten(0, 1) @ model.head.weight.T
    target = batch.target_RL.flatten()
    wanted = torch.nn.functional.cross_entropy(logits[target >= 0], target[target >= 0]).item()
    (row,) = error_injection(model, [batch], variant.vocabulary, [1.0], 0)
    assert row["loss"] == pytest.approx(wanted, rel=1e-6)


def test_depth_quotas_have_one_decision_per_token(variants, make_model, batches):
    variant = variants["mod_quota_untied"]
    model, data = make_model(variant).requires_grad_(False), batches(variant, 4)
    (row,) = error_injection(model, data, variant.vocabulary, [0.2], 0, "depth")
    assert row["realised_rate"] == pytest.approx(0.2, abs=0.05)  # two independent draws would give 0.36


def test_refusals(variants, make_model, batches):
    data = batches(variants["moe_4t4i"])

    def plant(name, *arguments):
        error_injection(make_model(variants[name]), data, variants[name].vocabulary, *arguments)

    with pytest.raises(ValueError, match=r"got error rates \[0.1, 2\], need numbers in \[0, 1\]: 0.005 is half a perc"):
        plant("moe_4t4i", [0.1, 2], 0)
    with pytest.raises(ValueError, match="got target=depth for a model with routers of experts, need one that it has"):
        plant("moe_4t4i", [0.1], 0, "depth")
    with pytest.raises(ValueError, match="got target=both for a model with routers of no kind, need .*: a sparse"):
        plant("dense", [0.1], 0, "both")
