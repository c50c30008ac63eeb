"""Training on two processes is training on one: losses, routing state, consumed micro-batches, resumption."""

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
    "4t4i": ["feed_forward=moe_4t4i", "objective.aux_weight=1.0"],
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
        "from moma import train\n"
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
    together = [arguments(made, folder / f"{name}-two", six, *own) for name, own in FAMILIES.items()]
    together.append(arguments(made, folder / "4t4i-elastic", four, *FAMILIES["4t4i"], "optim.schedule=constant"))
    done = on_two(folder, together)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    for name, own in FAMILIES.items():
        assert train.main(compose("train", arguments(made, folder / f"{name}-one", six, *own))) == 0
    own = (*FAMILIES["4t4i"], "optim.schedule=constant")
    for run in ("elastic", "straight"):
        assert train.main(compose("train", arguments(made, folder / f"4t4i-{run}", six, *own))) == 0
    torch.set_num_threads(threads)
    return folder


def same(one, two):
    assert [row["step"] for row in one] == [row["step"] for row in two]
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-6)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_log_what_one_does(runs, name):
    one, two = rows(runs / f"{name}-one"), rows(runs / f"{name}-two")
    assert len(one) == 3
    same(one, two)
    tensors = [
        checkpoint.read_tensors(checkpoint.latest(runs / f"{name}-{n}" / "checkpoints"), "model")
        for n in ("one", "two")
    ]
    for key in tensors[0]:
        torch.testing.assert_close(tensors[0][key], tensors[1][key], rtol=1e-3, atol=2e-5, msg=key)


def test_another_number_of_processes_continues_a_run(runs):
    straight, elastic = rows(runs / "4t4i-straight"), rows(runs / "4t4i-elastic")
    same(straight, elastic)
    metas = [
        checkpoint.read_meta(checkpoint.latest(runs / f"4t4i-{n}" / "checkpoints")) for n in ("straight", "elastic")
    ]
    assert metas[0]["data"] == metas[1]["data"] and metas[0]["data"]["number"] == 6 * 4


def test_a_number_of_micro_batches_that_does_not_divide_is_refused(made, tmp_path):
    composed = compose("train", arguments(made, tmp_path / "run", "duration={steps:2}", "data.accumulation=3"))
    with pytest.raises(ValueError, match="got data.accumulation=3 micro-batches per step on 2 processes, need a mult"):
        train._train(composed.config, composed.resolved, tmp_path / "run", Ranks(0, 2))
    assert not (tmp_path / "run").exists()
