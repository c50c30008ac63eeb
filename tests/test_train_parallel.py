"""Training on two processes, parameters copied or shared out, is training on one: losses, routing state, resumption."""

import json
import subprocess
import sys

import pytest
import torch

from moma import checkpoint, train
from moma.config import compose
from moma.data.synthetic import write_synthetic
from moma.distributed import Ranks

FAMILIES = {
    "dense": ["feed_forward=dense"],
    "4t4i": ["feed_forward=moe_4t4i", "objective.aux_weight=1.0", "eval.interval={steps:4}", "eval.batches=2"],
    "threshold": ["feed_forward=moe_4t4i_threshold", "feed_forward.selection.warmup_steps=2"],
    "token_choice": ["feed_forward=moe_4t4i_token_choice"],
    "depth": ["feed_forward=moe_1t1i", "depth=mod"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("made"), pairs=60, texts=60)


def arguments(made, run_dir, *overrides):
    tokenizer, corpus, _ = made
    return [
        f"tokenizer={tokenizer}", f"data.corpus={corpus}", f"run_dir={run_dir}", "data.rows=2", "data.row_length=96",
        "data.images=4", "data.accumulation=4", "model.dim=32", "model.n_layers=2", "model.n_heads=2",
        "precision=fp32", "parallel.threads=1", "log.interval=2", "eval.interval=null", "checkpoint.interval={steps:3}",
        "checkpoint.keep_last=0", "optim.lr=1e-3", *overrides,
    ]  # fmt: skip


def on_two(folder, commands):
    """Run trainings one after the other in one process group of two."""
    script = folder / "both.py"
    script.write_text(
        "import json, sys\n"
        "from moma import distributed, train\n"
        "distributed.BUCKET = 5000\n"  # several reductions a step, as large models have
        "from moma.config import compose\n"
        "from moma.distributed import process_group\n"
        "with process_group('cpu') as ranks:\n"
        "    assert ranks.world == 2\n"
        "    for command in json.load(open(sys.argv[1])):\n"
        "        assert train.main(compose('train', command)) == 0\n"
    )
    (folder / "commands.json").write_text(json.dumps(commands))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(script), str(folder / "commands.json")]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def rows(run_dir):
    timed = ("tokens_per_second", "data_wait_s", "time/")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in lines]


@pytest.fixture(scope="module")
def runs(made, tmp_path_factory):
    """Every family on one process and on two, six steps; and four steps on two that one process continues to six."""
    folder = tmp_path_factory.mktemp("runs")
    six, four = "duration={steps:6}", "duration={steps:4}"
    together = [
        arguments(made, folder / f"{name}-{kind}", six, *own, *more)
        for name, own in FAMILIES.items()
        for kind, more in (("two", ()), ("sharded", ("parallel.shard=true",)))
    ]
    together += [
        arguments(
            made, folder / f"4t4i-{kind}", four, *FAMILIES["4t4i"], "optim.schedule=constant", f"parallel.shard={shard}"
        )
        for kind, shard in (("elastic", "false"), ("elastic-sharded", "true"))
    ]
    done = on_two(folder, together)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    for name, own in FAMILIES.items():
        assert train.main(compose("train", arguments(made, folder / f"{name}-one", six, *own))) == 0
    own = (*FAMILIES["4t4i"], "optim.schedule=constant")
    for run in ("elastic", "elastic-sharded", "straight"):
        assert train.main(compose("train", arguments(made, folder / f"4t4i-{run}", six, *own))) == 0
    torch.set_num_threads(threads)
    return folder


def same(one, two):
    assert [row["step"] for row in one] == [row["step"] for row in two]
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        # held-out losses are of few targets, and a last bit may turn a choice of the routers
        held_out = [{key: value for key, value in row.items() if key.startswith("val_")} for row in (a, b)]
        assert held_out[0] == pytest.approx(held_out[1], rel=1e-3)
        trained = [{key: value for key, value in row.items() if key not in held_out[0]} for row in (a, b)]
        assert trained[0] == pytest.approx(trained[1], rel=2e-4, abs=1e-6)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["two", "sharded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_log_what_one_does(runs, name, kind):
    one, two = rows(runs / f"{name}-one"), rows(runs / f"{name}-{kind}")
    assert len(one) == 3
    same(one, two)
    tensors = [
        checkpoint.read_tensors(checkpoint.latest(runs / f"{name}-{n}" / "checkpoints"), "model") for n in ("one", kind)
    ]
    for key in tensors[0]:
        torch.testing.assert_close(tensors[0][key], tensors[1][key], rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_process_holds_a_half_of_what_is_shared_out(runs, name):
    """Parameters and both moments of AdamW lie in the checkpoint as the processes held them."""
    for kind, pieces in (("two", 1), ("sharded", 2)):
        stored = checkpoint._stored(checkpoint.latest(runs / f"{name}-{kind}" / "checkpoints"))
        entries = {key: entry for key, entry in stored.items() if "routing_" not in key and not key.endswith("step")}
        assert len(entries) > 20
        for key, entry in entries.items():
            sizes = [torch.Size(chunk.sizes).numel() for chunk in entry.chunks]
            assert len(sizes) == pieces and len(set(sizes)) == 1, (key, sizes)


@pytest.mark.parametrize("kind", ["elastic", "elastic-sharded"])
def test_another_number_of_processes_continues_a_run(runs, kind):
    straight, elastic = rows(runs / "4t4i-straight"), rows(runs / f"4t4i-{kind}")
    same(straight, elastic)
    metas = [checkpoint.read_meta(checkpoint.latest(runs / f"4t4i-{n}" / "checkpoints")) for n in ("straight", kind)]
    assert metas[0]["data"] == metas[1]["data"] and metas[0]["data"]["number"] == 6 * 4


def test_a_number_of_micro_batches_that_does_not_divide_is_refused(made, tmp_path):
    composed = compose("train", arguments(made, tmp_path / "run", "duration={steps:2}", "data.accumulation=3"))
    with pytest.raises(ValueError, match="got data.accumulation=3 micro-batches per step on 2 processes, need a mult"):
        train._train(composed.config, composed.resolved, tmp_path / "run", Ranks(0, 2))
    assert not (tmp_path / "run").exists()
