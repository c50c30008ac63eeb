"""Suite `data` at toy shapes: what is timed goes through the loader, token for token."""

import torch

from moma.benchmarks import data
from moma.benchmarks.timing import measure
from moma.config import compose

CPU = torch.device("cpu")


def test_the_loader_and_its_halves(monkeypatch):
    monkeypatch.setattr(data, "TOKENS", 4096)
    taken = []
    build = data.build_batch
    monkeypatch.setattr(data, "build_batch", lambda *inputs: taken.append(build(*inputs)))
    bench = data.run(compose("bench", ["suite=data", "rows=2", "row_length=128"]).config, CPU)
    names = ["loader, 2 x 128", "plan alone", "batches alone", "loader, small rows, 8 x 512"]
    assert [case.name for case in bench.cases] == names
    bench.cases[2].run()
    assert len(taken) == 16 and all(batch.exact and batch.tokens_RL.shape == (2, 128) for batch in taken)
    assert all(len(batch.groups.index[1]) == 16 * bench.facts["images"] for batch in taken)
    readings, _ = measure(bench, 3, 1, CPU)
    rates = {each.name: each.tokens_per_s for each in readings}
    assert min(rates.values()) > 0 and bench.cases[0].tokens == 16 * 256 and bench.cases[3].tokens == 2 * 8 * 512
    assert bench.facts["images"] == 8 and bench.facts["pieces_per_micro_batch"] >= 8
    (goal,) = bench.goals
    assert (goal.id, goal.case, goal.bound, goal.of) == ("D1", names[0], 1e6, "tokens")
