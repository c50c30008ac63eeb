"""Training on two processes, parameters copied or shared out, is training on one: losses, routing state, resumption."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moma import checkpoint, train
from moma.config import compose
from moma.data.synthetic import write_synthetic
from moma.distributed import Ranks
from moma.log import MEASURED
from moma.model.precision import wants_full_precision

KINDS = {  # every feed-forward, depth and attention
    "dense": ["feed_forward=dense"],
    "1t1i": ["feed_forward=moe_1t1i"],
    "8x": ["feed_forward=moe_8x"],
    "4t4i": ["feed_forward=moe_4t4i", "objective.aux_weight=1.0"],
    "shared": ["feed_forward=moe_4t4i_shared"],
    "threshold": ["feed_forward=moe_4t4i_threshold", "feed_forward.selection.warmup_steps=1"],
    "token_choice": ["feed_forward=moe_4t4i_token_choice"],
    "llava": ["feed_forward=moe_llava_released"],
    "mod": ["feed_forward=moe_4t4i", "depth=mod"],
    "mod_quota": ["feed_forward=dense", "depth=mod_quota"],
    "untied": ["feed_forward=moe_4t4i", "attention=untied"],
}
SHARD = ["parallel.shard=true"]
# (kind, recompute, compile, layout, precision): every pair of two settings of one place and another's occurs
PAIRS = [
    ("dense", "full", "off", "shard", "fp32"),
    ("dense", "selective", "on", "replicas", "bf16"),
    ("4t4i", "full", "off", "replicas", "bf16"),
    ("4t4i", "selective", "on", "shard", "fp32"),
    ("mod", "full", "on", "shard", "bf16"),
    ("mod", "selective", "off", "replicas", "fp32"),
]
LACKING = [("4t4i", "copies"), ("4t4i", "shard"), ("1t1i", "kept"), ("untied", "copies")]
LAYOUTS = {
    "copies": [],
    "shard": SHARD,
    "replicas": [*SHARD, "parallel.replicas=2"],
    "kept": [*SHARD, "parallel.reshard=false"],
}
RUNS = {
    "4t4i": [*KINDS["4t4i"], "eval.interval={steps:4}", "eval.batches=2"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("made"), pairs=60, texts=60)


def arguments(made, run_dir, *overrides):
    tokenizer, corpus, _ = made
    return [
        f"tokenizer={tokenizer}", f"data.corpus={corpus}", f"run_dir={run_dir}", "data.rows=2", "data.row_length=96",
        "data.images=4", "data.accumulation=4", "model.dim=32", "model.n_layers=2", "model.n_heads=2",
        "precision=fp32", "parallel.threads=1", "log.interval=1", "eval.interval=null", "checkpoint.interval={steps:3}",
        "checkpoint.keep_last=0", "optim.lr=1e-3", *overrides,
    ]  # fmt: skip


def on_two(folder, runs=(), cases=(), inductor=False):
    """Run trainings and compare steps in one process group of two; what was found in the comparisons."""
    (folder / "tasks.json").write_text(json.dumps({"runs": runs, "cases": cases, "inductor": inductor}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        *launcher,
        str(Path(__file__).with_name("two_ranks.py")),
        str(folder / "tasks.json"),
        str(folder / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out").read_text())


def case(made, kind, recompute="none", compiled="off", layout="shard", precision="fp32", lacks=False):
    overrides = [*KINDS[kind], *LAYOUTS[layout], f"parallel.recompute={recompute}", f"parallel.compile={compiled}"]
    overrides += [f"precision={precision}", "optim.warmup.steps=0", "duration={steps:2}"]
    name = "-".join([kind, recompute, compiled, layout, precision, *["lacks"] * lacks])
    return {"name": name, "lacks": lacks, "overrides": arguments(made, "unused", *overrides)}


def rows(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in lines]


def train_and_compare(made, folder):
    """Six steps of each of RUNS on one process and on two; four steps on two that one process continues to six; and
    the comparisons of single steps, which are returned."""
    six, four = "duration={steps:6}", "duration={steps:4}"
    runs = [
        arguments(made, folder / f"{name}-{kind}", six, *own, *LAYOUTS[kind])
        for name, own in RUNS.items()
        for kind in ("copies", "shard")
    ]
    constant = (*RUNS["4t4i"], "optim.schedule=constant")
    runs += [
        arguments(made, folder / f"4t4i-elastic-{kind}", four, *constant, *LAYOUTS[kind])
        for kind in ("copies", "shard")
    ]
    cases = [case(made, kind) for kind in KINDS] + [case(made, *pair) for pair in PAIRS]
    cases += [case(made, kind, layout=layout, lacks=True) for kind, layout in LACKING]
    found = on_two(folder, runs, cases)
    threads = torch.get_num_threads()
    for name, own in RUNS.items():
        assert train.main(compose("train", arguments(made, folder / f"{name}-one", six, *own))) == 0
    for run in ("elastic-copies", "elastic-shard", "straight"):
        assert train.main(compose("train", arguments(made, folder / f"4t4i-{run}", six, *constant))) == 0
    torch.set_num_threads(threads)
    return found


def test_two_processes_train_what_one_does(made, tmp_path):
    """All in one test, since all of it comes from one process group."""
    found = train_and_compare(made, tmp_path)
    checks = [(step_of_kind, found, kind) for kind in KINDS]
    checks += [(step_of_settings, found, pair) for pair in PAIRS]
    checks += [(step_without_a_modality, found, *one) for one in LACKING]
    checks += [(what_is_logged, tmp_path, name, layout) for name in RUNS for layout in ("copies", "shard")]
    checks += [(pieces_of_checkpoints, tmp_path, name) for name in RUNS]
    checks += [(another_number_of_processes, tmp_path, layout) for layout in ("copies", "shard")]
    wrong = []
    for check_it, *given in checks:
        try:
            check_it(*given)
        except AssertionError as error:
            wrong.append(f"{check_it.__name__}{given[1:]}: {error}")
    assert not wrong, "\n".join(wrong)


def check(found, precision):
    """Losses, gradients and statistics of two processes are those of one; nothing is counted twice."""
    assert max(found["loss"]) < 1e-6
    assert found["first"] < 1e-5
    # after a step of AdamW, which turns the last bits of a small gradient into a direction
    assert found["second"] < (1e-4 if precision == "fp32" else 1e-2)
    assert found["routing"] < 1e-5
    assert found["counts"]


def step_of_kind(found, kind):
    found = found[f"{kind}-none-off-shard-fp32"]
    check(found, "fp32")
    for name, (own, all_) in found["held"].items():
        assert own == (all_ if wants_full_precision(name) else all_ / 2), name


def step_of_settings(found, pair):
    found = found["-".join(pair)]
    check(found, pair[-1])
    if found["dtypes"]["router"]:  # an eager model with routers
        low = pair[3] != "copies" and pair[-1] == "bf16"
        assert found["dtypes"] == {
            "router": ["torch.float32"],
            "experts": ["torch.bfloat16" if low else "torch.float32"],
        }


def step_without_a_modality(found, kind, layout):
    """The second process sees no image: its image experts run on nothing, and nothing waits for them for ever."""
    check(found[f"{kind}-none-off-{layout}-fp32-lacks"], "fp32")


def test_the_pairs_cover_every_two_settings():
    columns = list(zip(*PAIRS, strict=True))
    for a, one in enumerate(columns):
        for b, two in list(enumerate(columns))[a + 1 :]:
            assert {(x, y) for x in set(one) for y in set(two)} == set(zip(one, two, strict=True)), (a, b)


def same(one, two):
    assert [row["step"] for row in one] == [row["step"] for row in two]
    assert [row.keys() for row in one] == [row.keys() for row in two]
    assert one[0] == pytest.approx(two[0], rel=1e-5, abs=1e-6) and one[0]["loss"] == pytest.approx(two[0]["loss"], 1e-6)
    for a, b in zip(one, two, strict=True):
        # sums in another order change a last bit, and a last bit turns a choice of the routers sooner or later
        assert a == pytest.approx(b, rel=0.1, abs=1e-3) and a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def what_is_logged(runs, name, kind):
    one, two = rows(runs / f"{name}-one"), rows(runs / f"{name}-{kind}")
    assert len(one) == 6
    same(one, two)
    saved = [checkpoint.by_step(runs / f"{name}-{n}" / "checkpoints") for n in ("one", kind)]
    before, after, other = (checkpoint.read_tensors(saved[n][step], "model") for n, step in ((0, 3), (0, 6), (1, 6)))
    for key, value in after.items():  # other choices: a sixth of what the last three steps changed, among five seeds
        assert (value - other[key]).norm() <= 0.5 * (value - before[key]).norm(), key


def pieces_of_checkpoints(runs, name):
    """Parameters and both moments of AdamW lie in the checkpoint as the processes held them."""
    for kind, pieces in (("copies", 1), ("shard", 2)):
        stored = checkpoint._stored(checkpoint.latest(runs / f"{name}-{kind}" / "checkpoints"))
        entries = {key: entry for key, entry in stored.items() if "routing_" not in key and not key.endswith("step")}
        assert len(entries) > 20
        for key, entry in entries.items():
            sizes = [torch.Size(chunk.sizes).numel() for chunk in entry.chunks]
            assert len(sizes) == (1 if wants_full_precision(key) else pieces) and len(set(sizes)) == 1, (key, sizes)


def another_number_of_processes(runs, layout):
    kind = f"elastic-{layout}"
    straight, elastic = rows(runs / "4t4i-straight"), rows(runs / f"4t4i-{kind}")
    same(straight, elastic)
    metas = [checkpoint.read_meta(checkpoint.latest(runs / f"4t4i-{n}" / "checkpoints")) for n in ("straight", kind)]
    assert metas[0]["data"] == metas[1]["data"] and metas[0]["data"]["number"] == 6 * 4


def test_a_number_of_micro_batches_that_does_not_divide_is_refused(made, tmp_path):
    composed = compose("train", arguments(made, tmp_path / "run", "duration={steps:2}", "data.accumulation=3"))
    with pytest.raises(ValueError, match="got data.accumulation=3 micro-batches per step on 2 processes, need a mult"):
        train._train(composed.config, composed.resolved, tmp_path / "run", Ranks(0, 2))
    assert not (tmp_path / "run").exists()
