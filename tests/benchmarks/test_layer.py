"""Suite `layer` at toy shapes: FLOPs, memory, the peers that are there and those that are not."""

import pytest
import torch

from moma import distributed
from moma.benchmarks import layer
from moma.benchmarks.peers import LAYERS, LayerShape, built
from moma.benchmarks.timing import Absent, measure
from moma.config import compose

CPU = torch.device("cpu")
TOY = ["suite=layer", "model.dim=32", "model.n_heads=2", "rows=2", "row_length=64", "vocab_size=256"]


def config(*overrides):
    return compose("bench", [*TOY, *overrides]).config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_by_formula_are_those_executed(precision):
    suite = layer.run(config("peers=false", f"precision={precision}", "variants=[dense,moe_1t1i,moe_4t4i,moe_8x]"), CPU)
    assert [case.name for case in suite.cases] == "dense,moe_1t1i,moe_4t4i,moe_8x,dispatch and combine alone".split(",")
    tokens, dim, hidden = 128, 32, 96
    assert suite.cases[0].flops == 18 * tokens * dim * hidden
    for case in (*suite.cases[:4], suite.twin):
        assert case.executed_flops == pytest.approx(case.flops, rel=0.01), case.name
    assert suite.cases[4].bytes == 4 * tokens * dim * (4 if precision == "fp32" else 2)
    readings, _ = measure(suite, 3, 1, CPU)
    memory = {each.name: each.memory_bytes for each in readings}
    # of dense at least: x and both halves of the hidden state
    assert memory["dense"] >= tokens * (dim + 2 * hidden) * (4 if precision == "fp32" else 2)
    assert memory["moe_4t4i"] < 1.5 * memory["dense"] and memory["dispatch and combine alone"] is None
    assert {goal.id for goal in suite.goals} == {"P1", "P2", "C4"}


def test_mixture_of_depths_is_no_feed_forward():
    with pytest.raises(ValueError, match="got the variant mod_dense in suite=layer, need feed-forwards: leave it out"):
        layer.run(config("variants=[mod_dense]"), CPU)


def test_peers_run_or_say_why_not(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(layer, "helps_float32", lambda device: False)
    suite = layer.run(config("precision=fp32", "variants=[dense]", "threads=1"), CPU)
    readings, absent = measure(suite, 3, 1, CPU)
    peers = {each.name: each for each in readings if not each.ours}
    assert set(peers) | {each.name for each in absent} == set(LAYERS)
    assert len([name for name in peers if name.startswith("transformers")]) == 5
    reasons = {each.name: each.reason for each in absent}
    assert "(no package: its sources, and peers_path=FOLDER" in reasons["ScatterMoE"]
    grouped = peers["transformers Mixtral grouped_mm"]
    assert grouped.flops == pytest.approx(suite.cases[0].flops + 6 * 128 * 32 * 8)  # and the router
    assert peers["grouped_mm as in torchtitan"].note.startswith("top-1 of 8")


def test_peers_run_as_torch_does_and_the_best_of_them_also_as_ours(monkeypatch):
    def matmuls(case):
        with case.within():
            return torch.get_float32_matmul_precision()

    monkeypatch.setattr(layer, "helps_float32", lambda device: True)
    monkeypatch.setattr(distributed, "helps_float32", lambda device: True)
    suite = layer.run(config("precision=fp32", "variants=[dense]", "threads=1"), CPU)
    lent = [case.name for case in suite.cases if case.name.endswith(", fp32 by oneDNN")]
    assert "grouped_mm as in torchtitan, fp32 by oneDNN" in lent
    for case in suite.cases:
        if case.name != "dispatch and combine alone":
            assert matmuls(case) == ("medium" if case.ours or case.name in lent else "highest"), case.name
    assert not any("oneDNN" in case.name for case in layer.run(config("precision=bf16"), CPU).cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_layer_is_token_choice(dtype):
    peer = built("", LAYERS["grouped_mm as in torchtitan"], LayerShape(16, 32, 4, 1, 24, dtype, CPU))
    x_TD = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = []
    for x_D in x_TD:
        score_E = torch.sigmoid(peer.module.gate(x_D).float())
        e = int(score_E.argmax())
        hidden_F = torch.nn.functional.silu(peer.module.w1[e] @ x_D) * (peer.module.w3[e] @ x_D)
        wanted.append((peer.module.w2[e] @ hidden_F).float() * score_E[e])
    close = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 0.05}
    torch.testing.assert_close(peer.forward(x_TD).float(), torch.stack(wanted), rtol=0.02, **close)


def test_weights_copied_for_every_token_must_fit():
    shape = LayerShape(512, 1376, 8, 1, 4096, torch.float32, CPU)
    found = built("batched", LAYERS["transformers Mixtral batched_mm"], shape)
    assert isinstance(found, Absent) and "copies its experts' weights for every token, 32 GiB here" in found.reason
