"""Suite `step` at toy shapes: phases, FLOPs, the peer's loss against ours, and the goals of a GPU."""

from dataclasses import replace

import pytest
import torch

from moma.benchmarks import step
from moma.benchmarks.config import architecture
from moma.benchmarks.peers_model import chameleon, labels_of
from moma.benchmarks.timing import Absent, Case, measure, noise
from moma.config import compose
from moma.objectives import run_model

CPU = torch.device("cpu")
TOY = [
    *("suite=step", "model=tiny", "model.dim=32", "model.n_layers=2", "model.n_heads=2", "row_length=64"),
    *("vocab_size=256", "micro_batches=2", "rounds=3", "warmup=1"),
]


def config(*overrides):
    return compose("bench", [*TOY, *overrides]).config


def test_a_step_and_its_phases():
    variants = ["dense", "moe_4t4i"]
    wanted = config("precision=bf16", "peers=false", f"variants=[{','.join(variants)}]")
    bench = step.run(wanted, CPU)
    cases = {case.name: case for case in bench.cases}
    assert list(cases) == [f"{v}{phase}" for v in variants for phase in ("", ": forward and backward", ": optimizer")]
    for variant in variants:
        whole, once = cases[variant], cases[f"{variant}: forward and backward"]
        assert whole.flops == 2 * once.flops and whole.tokens == 2 * once.tokens == 128
        assert once.executed_flops == pytest.approx(once.flops, rel=0.01)
        assert bench.facts["models"][variant]["flops_causal"] < once.flops
    dense, sparse = (cases[f"{variant}: forward and backward"] for variant in variants)
    assert sparse.flops - dense.flops == 64 * 6 * 32 * 8 * 2 == sparse.executed_flops - dense.executed_flops
    assert bench.facts["image_share"] == 0.5 and bench.facts["micro_batches"] == 2
    readings, absent = measure(bench, 3, 1, CPU)
    assert not absent and readings[0].ratio == 1 and readings[-1].name == "dense again" == bench.twin.name
    assert noise(bench, readings).least > 0
    memory = {each.name: each.memory_bytes for each in readings}
    assert memory["moe_4t4i"] > memory["dense"] > 64 * 32 * 4 and memory["dense: optimizer"] is None
    assert [(goal.id, goal.case, goal.bound) for goal in bench.goals] == [
        ("P3", "dense", 1.3),
        ("P3", "dense", 1.3),
        ("P3", "moe_4t4i", 1.08),
    ]


def test_a_step_trains():
    """The loss of one micro-batch falls, and what is timed alone changes what it should."""
    wanted = config("micro_batches=1", "precision=bf16")
    vocab, batches = step.batches_of(wanted, 0.5, CPU)
    subject = step.build(wanted, architecture(wanted, "moe_4t4i"), vocab, batches, CPU)

    def loss():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return float(run_model(subject.twin.model, batches[0], batches[0].n_targets)[0].objective)

    before, at_first = loss(), {name: p.clone() for name, p in subject.model.named_parameters()}
    for group in subject.optimizer.param_groups:
        group["lr"] = 1e-2
    found = {"flops": 1.0, "executed_flops": 1.2, "flops_agree": False, "params_total": 1}
    cases = step.cases_of("x", subject, found)
    whole, once, optimize = (case.run for case in cases)
    once()
    assert all(torch.equal(p, at_first[name]) for name, p in subject.model.named_parameters())
    cutoff = subject.model.routers()["0"].routing_state()["cutoff"]
    assert not cutoff.any()
    optimize()
    assert cutoff.all()
    for _ in range(3):
        whole()
    assert loss() < before


def test_padded_groups_count_in_full():
    wanted = config()
    vocab, batches = step.batches_of(wanted, 0.5, CPU)
    small = replace(architecture(wanted, "mod_moe_1t1i"), model=wanted.model)
    found = step.flops_of(small, vocab, batches[0])
    assert found["executed_flops"] > 1.01 * found["flops"] and not found["flops_agree"]


def test_the_peer_computes_the_same_loss():
    pytest.importorskip("transformers")
    wanted = config("precision=fp32")
    vocab, batches = step.batches_of(wanted, 0.5, CPU)
    model = step.build(wanted, architecture(wanted, "dense"), vocab, batches, CPU).model
    peer, batch = chameleon(model, vocab, 64, masks_images=False), batches[0]
    with torch.no_grad():
        ours = run_model(model, batch, batch.n_targets)[0].objective
        theirs = peer(input_ids=batch.tokens_RL, labels=labels_of(batch.target_RL), use_cache=False).loss
    assert float(theirs) == pytest.approx(float(ours), rel=1e-5)
    assert peer.config.swin_norm
    found = list(step.peer_cases(wanted, vocab, batches, CPU, 7.0))
    assert [case.name for case in found] == [step.PEER] and found[0].flops == 14
    (low, pure) = step.peer_cases(config("precision=bf16"), vocab, batches, CPU, None)
    assert pure.name == f"{step.PEER}, bf16 parameters" and low.tokens == 128
    for case in (*found, low, pure):
        case.run()
        assert isinstance(case, Case) and case.memory is not None and case.memory() > 64 * 32


def test_a_peer_that_is_not_there_is_absent(monkeypatch):
    def missing(*inputs, masks_images):
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(step, "chameleon", missing)
    (found,) = step.run(config("precision=fp32", "variants=[dense]"), CPU).absent
    assert isinstance(found, Absent) and found.name == step.PEER
    assert found.reason.startswith("ImportError: No module named 'transformers' (pip install ")


def test_goals_of_a_gpu():
    variants = "variants=[dense,moe_1t1i,moe_4t4i,mod_moe_1t1i,mod_moe_4t4i]"
    made = compose("bench", ["suite=step", "model=435m", "micro_batches=8", variants]).config
    found = step.goals(made, "cuda", 989e12)
    assert [(goal.id, goal.case) for goal in found] == [
        ("H1", "dense"), ("H2", "moe_1t1i: forward and backward"), ("H2", "moe_4t4i: forward and backward"),
        ("H3", "moe_4t4i"), ("H4", "mod_moe_1t1i: forward and backward"), ("H4", "mod_moe_4t4i: forward and backward"),
        ("H7", "moe_4t4i"), ("H11", "moe_4t4i, 30% image tokens"), ("H11", "moe_4t4i, 70% image tokens"),
    ]  # fmt: skip
    assert found[0].bound == 0.45 * 989e12 and found[2].bound == 1.08 and found[3].bound == 1.09
    alone = compose("bench", ["suite=step", "model=tiny", "micro_batches=1", "variants=[dense]"]).config
    assert step.goals(alone, "cuda", None) == []


def test_other_shares_of_images():
    wanted = config("row_length=256", "micro_batches=1")
    vocab, batches = step.batches_of(wanted, 0.5, CPU)
    subject = step.build(wanted, architecture(wanted, "moe_4t4i"), vocab, batches, CPU)
    case = step.other_share(wanted, subject, 0.3)
    assert case.name == "moe_4t4i, 30% image tokens" and case.tokens == 256
    assert step.image_share(step.batches_of(wanted, 0.3, CPU)[1][0]) == pytest.approx(0.3, abs=0.01)
    case.run()
