"""Suite `checkpoint` at toy shapes: each way writes the whole state, and nothing is left behind."""

import gc

import torch

from moma.benchmarks import checkpoint
from moma.benchmarks.timing import measure
from moma.config import compose

CPU = torch.device("cpu")


def test_what_saving_costs(tmp_path):
    wanted = compose(
        "bench",
        [
            *("suite=checkpoint", "model=tiny", "model.dim=32", "model.n_layers=2", "model.n_heads=2"),
            *("vocab_size=256", "variants=[dense]", "rounds=3", f"out={tmp_path / 'bench.json'}"),
        ],
    ).config  # fmt: skip
    bench = checkpoint.run(wanted, CPU)
    names = ["plain write", "Saver, begin to end", "DCP save in the loop", "torch.save in the loop"]
    assert [case.name for case in bench.cases] == names and bench.goals == []
    facts = bench.facts
    state = 12 * facts["parameters"]  # and AdamW's step counters
    assert 0 <= facts["bytes"] - state < 0.01 * state and all(case.bytes == facts["bytes"] for case in bench.cases)
    assert 0 < facts["pause_s"] < facts["write_s"] and len(facts["pauses_s"]) == 3
    readings, absent = measure(bench, 3, 1, CPU, {"copy": 1e9})
    assert not absent and all(each.ceiling_share is None for each in readings)
    (folder,) = tmp_path.iterdir()
    for name in ("plain", "again", "whole.pt", "dcp", "saver"):
        path = folder / name
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        assert facts["bytes"] <= sum(file.stat().st_size for file in files) < 1.5 * facts["bytes"], name
    (one,) = (folder / "saver").iterdir()
    assert one.name.startswith("step-01000")
    (goal,) = checkpoint.goals("cuda", facts)
    assert (goal.id, goal.bound, goal.value) == ("H13", 1.0, facts["pause_s"])
    del bench, readings
    gc.collect()
    assert list(tmp_path.iterdir()) == []
