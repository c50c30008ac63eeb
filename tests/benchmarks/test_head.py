"""Suite `head`: the reference, errors against it, and the memory that C6 bounds."""

import pytest
import torch

from moma.benchmarks import head
from moma.benchmarks.memory import peak_extra_bytes
from moma.benchmarks.peers import HEADS, Z_WEIGHT
from moma.benchmarks.timing import judge, measure, noise
from moma.config import compose
from moma.modality import IGNORE

CPU = torch.device("cpu")


def test_the_reference_is_the_plain_form_in_float64(monkeypatch):
    monkeypatch.setattr(head, "REFERENCE_ROWS", 3)
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 4, generator=source, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, 4, generator=source, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 2, IGNORE, 3, 0, 15, 7, IGNORE])
    logit = hidden @ weight.T
    lse = logit.logsumexp(1)
    keep = target != IGNORE
    ce = (lse - logit.gather(1, target.clamp(min=0)[:, None])[:, 0])[keep].mean()
    loss = ce + 0.5 * lse[keep].square().mean()
    wanted = (loss.detach(), *torch.autograd.grad(loss, [hidden, weight]))
    for own, exact in zip(head.reference(hidden, weight, target, 0.5), wanted, strict=True):
        torch.testing.assert_close(own, exact)
    found = head.errors(head.Result(wanted[0] * 1.5, *wanted[1:]), head.Result(*wanted))
    assert found["loss"] == pytest.approx(0.5) and found["grad_TD"] == found["grad_VD"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ours_and_the_plain_form_are_right_and_every_peer_is_named(precision):
    overrides = ["suite=head", "model.dim=16", "model.n_heads=2", "row_length=64", "vocab_size=512", "warmup=1"]
    suite = head.run(compose("bench", [*overrides, f"precision={precision}"]).config, CPU)
    assert {each.name for each in (*suite.cases, *suite.absent)} == {"naive", "ours", *HEADS}
    assert "Liger" in {each.name for each in suite.absent}
    found = suite.facts["relative errors"]
    bound = 1e-5 if precision == "fp32" else 0.02
    for name in ("naive", "ours"):
        assert found[name]["loss"] < (1e-5 if precision == "fp32" else 1e-3), name
        assert max(found[name]["grad_TD"], found[name]["grad_VD"]) < bound, name
    readings, _ = measure(suite, 3, 1, CPU)
    assert suite.cases[0].flops == 6 * 64 * 16 * 512
    judged = {goal.id: judge(goal, readings, noise(suite, readings), suite.baseline) for goal in suite.goals}
    assert judged["C6"].value is not None and judged["P5"].value is not None


def test_our_head_takes_less_than_a_third_of_the_plain_form_s_memory():
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 16, generator=source, requires_grad=True)
    weight = torch.randn(1024, 16, generator=source, requires_grad=True)
    target = torch.randint(0, 1024, (4096,), generator=source)

    def peak(loss):
        return peak_extra_bytes(lambda: head.result(loss, hidden, weight, target), CPU)

    assert Z_WEIGHT > 0 and peak(head.naive) >= 3 * 4096 * 1024 * 4
    assert peak(head.ours) <= 0.30 * peak(head.naive)
