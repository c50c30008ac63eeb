"""Kill trainings again and again and prove that nothing is lost, skipped or repeated.

    life 1      |== steps ==|= save =|== steps ==|= sa X          kill -9 between a save's first byte and its rename
    life 2                           |== steps ==|= save =|== st X           kill -9 anywhere; of one rank; kill -TERM
    ...                                                   |== ... ==| finished: compared with a run left alone

A *run* is one folder, a *life* is one process (or two) of `moma train` in it. Streams: `one` process, `two`, two with
`parallel.shard=true` (`sharded`), and `elastic`: one of the three drawn for every life. Most lives are forked from
this process, which has imported everything and calls `moma.cli.main` in the fork: a process of its own that starts in
0.3 s; a share goes through the plain command, two processes through `python -m torch.distributed.run` or
`parallel.processes=2`.

A kill counts when the life had written a step of its own into metrics.jsonl. It counts as *in a save* when afterwards
`.tmp-step-N` lies in the dead run's folder with bytes in it, `step-N` does not, and N is newer than every whole
checkpoint (a checkpoint that retention removes has a temporary name too, but is older).

Written: lives.jsonl (one line per life and per finished run; the same command goes on behind the last line) and
results.json. Ends with status 1 if anything is not as it must be.
"""

import argparse
import atexit
import ctypes
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

import torch  # noqa: E402

import moma.cli  # noqa: E402
import moma.train  # noqa: E402, F401  (imported once, for all forks)
from moma import checkpoint  # noqa: E402
from moma.config import compose  # noqa: E402
from moma.data.plan import Plan, PlanShape  # noqa: E402
from moma.data.shards import open_corpus  # noqa: E402
from moma.data.synthetic import write_synthetic  # noqa: E402
from moma.log import MEASURED  # noqa: E402
from moma.tokenizer.vocab import load_vocabulary  # noqa: E402

POLL_S = 0.0005
PATIENCE_S = 120.0  # a life that neither steps nor ends for so long is stuck
ALONE_S = 60.0  # within which the other rank must end when one is gone
# Much state and little work a step, so that a save lasts longer than a step: a copy that is none would show.
SHAPE, ACCUMULATION, EXPERTS = PlanShape(1, 96, 2), 4, 12
TOLERANCE, COMPARED = 1e-6, 5  # relative, of the loss; steps after a change of the number of processes
KILLS = {"in_save": 6, "anywhere": 2, "term": 2, "one_rank": 1, "term_then_kill": 1}  # so many in every twelve


class Setting(NamedTuple):
    """How many processes, and whether they share out the parameters."""

    world: int
    shard: bool

    @property
    def name(self) -> str:
        return {1: "one", 2: "sharded" if self.shard else "two"}[self.world]


ONE, TWO, SHARDED = Setting(1, False), Setting(2, False), Setting(2, True)
VIA = {1: ["command"], 2: ["torchrun", "processes"]}
STREAMS = {"one": [ONE], "two": [TWO], "sharded": [SHARDED], "elastic": [ONE, TWO, SHARDED]}


class Study(NamedTuple):
    """What is the same for all lives."""

    work: Path
    steps: int
    tokenizer: Path
    corpus: Path
    states: list[Any]  # the plan's state after every step, from the plan itself

    def arguments(self, run: Path, setting: Setting, *overrides: str) -> list[str]:
        """Of `moma train` for a run of this study."""
        return [
            f"tokenizer={self.tokenizer}", f"data.corpus={self.corpus}", f"run_dir={run}",
            f"data.rows={SHAPE.rows}", f"data.row_length={SHAPE.row_length}", f"data.images={SHAPE.images}",
            f"data.accumulation={ACCUMULATION}", "model.dim=64", "model.n_layers=2", "model.n_heads=2",
            "feed_forward=moe_4t4i", f"feed_forward.experts={{text:{EXPERTS},image:{EXPERTS}}}", "optim.lr=1e-3",
            "feed_forward.noise=gumbel", "objective.aux_weight=1.0",
            "precision=fp32", "parallel.device=cpu", "parallel.compile=off", "parallel.threads=1",
            f"parallel.shard={str(setting.shard).lower()}", "log.interval=1", f"duration={{steps:{self.steps}}}",
            "eval.interval={percent:100}", "eval.batches=4", "checkpoint.interval={steps:7}",
            "checkpoint.keep_last=2", *overrides,
        ]  # fmt: skip


def main() -> int:
    """Run (or go on with) a study; 0 when every verdict is good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the runs, on a disk; kept for a second look")
    parser.add_argument("results", type=Path, help="folder for lives.jsonl and results.json")
    parser.add_argument("--kills", type=int, default=120, help="at least so many that count")
    parser.add_argument("--in-save", type=int, default=40, help="at least so many of them in a save")
    parser.add_argument("--per-run", type=int, default=12, help="at most so many before a run may finish")
    parser.add_argument("--steps", type=int, default=120, help="of every run")
    parser.add_argument("--plain", type=float, default=0.12, help="share of lives through the plain command")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: ranks that torch.distributed.run leaves behind come here
    options.work.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    study = prepare(options.work.resolve(), options.steps)
    compose("train", study.arguments(study.work / "none", ONE))  # imports what composing needs, for all forks
    log = options.results / "lives.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for name in dict.fromkeys(setting.name for stream in options.streams for setting in STREAMS[stream]):
        undisturbed(study, f"{name}-s0", {"one": ONE, "two": TWO, "sharded": SHARDED}[name])
    if "elastic" in options.streams:
        for seed in (1, 2):
            undisturbed(study, f"one-s{seed}", ONE, f"seed.init={seed}")

    with log.open("a") as file:

        def note(record: dict[str, Any]) -> None:
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()

        while True:
            counted = [r for r in records if r.get("counts")]
            finished = [r["stream"] for r in records if r["kind"] == "run"]
            enough = len(counted) >= options.kills and sum(r["in_save"] for r in counted) >= options.in_save
            if enough and set(options.streams) <= set(finished):
                break
            stream = min(options.streams, key=finished.count)
            torture(study, stream, finished.count(stream), records, note, options, began)
    results = verdicts(records, options, study)
    results["seconds_of_this_start"] = round(time.monotonic() - began, 1)
    (options.results / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, verdict in results["verdicts"].items():
        print(f"{'good' if verdict['good'] else 'BAD '} {name}: {verdict['seen']}")
    return 0 if all(verdict["good"] for verdict in results["verdicts"].values()) else 1


def prepare(work: Path, steps: int) -> Study:
    """The corpus, and the state of the plan after every step."""
    made = work / "made"
    if not (made / "corpus" / "manifest.json").exists():
        shutil.rmtree(made, ignore_errors=True)
        write_synthetic(made, pairs=400, texts=300)
    tokenizer, corpus = made / "tokenizer", made / "corpus"
    vocab = load_vocabulary(tokenizer)
    plan = Plan(dict(open_corpus(corpus, "train", vocab.hash)), SHAPE, 0, {})
    states: list[Any] = [{}]
    for micro_batch, state in plan.run():
        if (micro_batch.number + 1) % ACCUMULATION == 0:
            states.append(json.loads(json.dumps(state)))
        if len(states) > steps:
            break
    return Study(work, steps, tokenizer, corpus, states)


def undisturbed(study: Study, name: str, setting: Setting, *overrides: str) -> Path:
    """A run that nobody kills, by the plain command, with every checkpoint kept."""
    run = study.work / "whole" / name
    if not (run / "done").exists():
        shutil.rmtree(run, ignore_errors=True)
        begin = time.monotonic()
        life = start(
            VIA[setting.world][0],
            study.arguments(run, setting, "checkpoint.keep_last=0", *overrides),
            setting,
            run.parent,
        )
        try:
            while life.alive():
                time.sleep(0.05)
        finally:
            life.end()
        if life.codes() != [0]:
            raise SystemExit(f"the undisturbed run {name} failed:\n{life.tail(40)}")
        (run / "done").touch()
        print(f"undisturbed {name}: {time.monotonic() - begin:.1f} s")
    return run


# ---- one run, killed until it is finished ---------------------------------------------------------------------------
def torture(study: Study, stream: str, number: int, records: list[Any], note: Any, options: Any, began: float) -> None:
    """Kill a run up to `options.per_run` times, let it finish, judge it."""
    run = study.work / "cut" / f"{stream}-{number}"
    mine = [r for r in records if r["kind"] == "life" and r["run"] == run.name]
    if not mine:
        shutil.rmtree(run, ignore_errors=True)
    windows: dict[str, list[float]] = {}
    while not (mine and mine[-1]["end"] == "finished"):
        if len(mine) > 4 * options.per_run or (mine and mine[-1]["problems"] and mine[-1]["end"] == "by itself"):
            break  # it cannot go on: said in the line of that life
        rng = random.Random(f"{options.seed} {run.name} {len(mine)}")
        kills = sum(r["counts"] for r in mine)
        kind = next_kind(sum(bool(r.get("counts")) for r in records), options.seed)
        record = live(study, stream, run, mine, rng, kind if kills < options.per_run else None, options.plain, windows)
        note(record)
        mine.append(record)
        counted = [r for r in records if r.get("counts")]
        print(
            f"{time.monotonic() - began:6.0f} s  {len(counted)} kills, {sum(r['in_save'] for r in counted)} in a save"
            f" | {run.name} life {record['life']}: {record['setting']} {record['via']}, {record['from']} -> "
            f"{record['last']}, {record['end']}" + "".join(f"\n    PROBLEM: {p}" for p in record["problems"])
        )
    if mine[-1]["end"] == "finished":
        note(judge(study, stream, run))
        print(f"{'':10}{run.name} finished: {records[-1]['problems'] or 'as undisturbed'}")
    else:
        note({"kind": "run", "stream": stream, "run": run.name, "problems": ["did not finish"]})
    if not records[-1]["problems"] and not any(r["problems"] for r in mine):
        shutil.rmtree(run)


def next_kind(done: int, seed: int) -> str:
    """How the next life is to end: a shuffled pack of KILLS is dealt, then the next one."""
    pack = [kind for kind, n in KILLS.items() for _ in range(n)]
    random.Random(f"{seed} {done // len(pack)}").shuffle(pack)
    return pack[done % len(pack)]


class Seen(NamedTuple):
    """What the harness saw of a life while it lived; times since its start."""

    first_step_s: float | None
    saves: int  # begun after the first step
    steps: set[int]  # of the checkpoints that were there at any time
    aimed: bool  # at the moment to kill
    delay_ms: float  # from the first byte of the save that was aimed at, as planned
    problems: list[str]


def watch(
    life: "Life",
    run: Path,
    kind: str | None,
    rng: random.Random,
    offset: int,
    least: int,
    windows: list[float],
    world: int,
) -> Seen:
    """Look on until the moment for `kind` has come, not before `least` steps, or the life has ended.

    `offset`: where its lines of metrics.jsonl begin; `windows`: seconds from the first byte of a save to its name.
    """
    root, metrics, began = run / "checkpoints", run / "metrics.jsonl", time.monotonic()
    skip, share, later_s = rng.choice((0, 1, 1, 2)), rng.uniform(0, 0.9), rng.uniform(0, 1.5)
    stale = lines_after(metrics, offset)
    steps, problems = set(whole(root)), []
    first = save_began = None
    saving: str | None = None
    saves = polls = 0
    delay_ms = 0.0
    while True:
        now = time.monotonic()
        names, temporary = look(root)
        for step in names - steps:
            folder = root / f"step-{step:08d}"
            if not (folder / "meta.json").exists() and folder.exists():
                problems.append(f"step-{step:08d} was there without its meta.json")
        steps |= names
        fresh = {name for name, size in temporary.items() if size and step_of(name) > max(names, default=0)}
        if saving is None and fresh:
            saving, save_began = min(fresh), now
            saves += 1
        elif saving is not None and saving not in fresh:
            if step_of(saving) in names:
                windows.append(now - (save_began or now))
            saving = None
        if first is None:
            lines = lines_after(metrics, offset)
            if lines and (not stale or lines[0] != stale[0] or len(lines) > len(stale)):  # clocks differ in every line
                first, saves = now, 0
                if len(life.ranks()) != world:
                    problems.append(f"{len(life.ranks())} processes train instead of {world}")
        elif kind and (least == 1 or len(lines_after(metrics, offset)) >= least):
            if kind == "in_save" and saving is not None and saves > skip:
                window = statistics.median(windows[-20:]) if windows else 0.03
                delay_ms = share * window * 1e3
                time.sleep(max(0.0, share * window - (now - (save_began or now))))
                break
            if kind != "in_save" and now - first >= later_s:
                break
        polls += 1
        if polls % 20 == 0:
            if not life.alive():
                kind = None
                break
            if now - began > PATIENCE_S and (first is None or now - began > 4 * PATIENCE_S):
                problems.append(f"stuck for {now - began:.0f} s: {life.tail(5)}")
                kind = None
                break
        time.sleep(POLL_S)
    return Seen(first and round(first - began, 3), saves, steps, kind is not None, delay_ms, problems)


def live(
    study: Study, stream: str, run: Path, before: list[Any], rng: random.Random, kind: str | None, plain: float,
    windows: dict[str, list[float]],
) -> dict[str, Any]:  # fmt: skip
    """Start one life, kill it as drawn, look at what it left."""
    root, metrics = run / "checkpoints", run / "metrics.jsonl"
    setting = rng.choice(STREAMS[stream])
    kind = "anywhere" if kind == "one_rank" and setting.world == 1 else kind
    via = rng.choice(VIA[setting.world]) if rng.random() < plain else "fork"
    whole_before = whole(root)
    newest = max(whole_before, default=0)
    offset = checkpoint.read_meta(root / f"step-{newest:08d}")["metrics_offset"] if newest else 0
    changed_from = elastic_change(before, newest, setting)
    copied = study.work / "continued" / run.name
    if changed_from:
        copy_of(run, newest, copied)

    began = time.monotonic()
    life = start(via, study.arguments(run, setting), setting, study.work / "cut")
    try:
        least = COMPARED if changed_from else 1
        seen = watch(life, run, kind, rng, offset, least, windows.setdefault(setting.name, []), setting.world)
        problems = seen.problems
        if seen.aimed and not kill(life, str(kind), rng):
            problems.append(f"the other rank was still there after {ALONE_S:.0f} s")
    finally:
        life.end()
    end = str(kind) if seen.aimed else "by itself"
    seconds = time.monotonic() - began
    codes = life.codes()
    here = whole(root)
    names, temporary = look(root)
    after = {
        "whole": here,
        "temporary": {
            name: {"bytes": size, "final_exists": (root / name.removeprefix(".tmp-")).exists()}
            for name, size in temporary.items()
        },
    }
    in_save = end in ("in_save", "anywhere", "one_rank", "term_then_kill") and any(
        size > 0 and step_of(name) > max(here, default=0) and step_of(name) not in names
        for name, size in temporary.items()
    )  # fmt: skip
    rows, cut = parse(metrics)
    last = rows[-1]["step"] if rows else 0
    ended_well = codes == [0] * len(codes)
    if ended_well and last == study.steps:
        end = "finished"  # perhaps just before it was to be killed
    elif end == "term" and last == max(here, default=0) == study.steps:
        end = "finished"  # asked when everything was done and saved: killed on the way out
    elif end == "by itself" or seen.first_step_s is None:
        problems.append(f"ended by itself with {codes}: {life.tail(6)}")
    if end == "term" and not ended_well and via != "torchrun":  # its own status is never 0
        problems.append(f"SIGTERM ended in {codes}: {life.tail(6)}")
    if end == "term":
        if max(here, default=0) != last:
            problems.append(f"SIGTERM: the last step is {last}, the newest checkpoint {max(here, default=0)}")
        if f"stopped after step {last} of" not in life.text():
            problems.append(f"SIGTERM: no word of where it stopped: {life.tail(6)}")
    if max(here, default=0) < max(seen.steps, default=0):
        problems.append(f"checkpoint {max(seen.steps)} was whole, now the newest is {max(here, default=0)}")
    mine = [row for row in rows if row["step"] > newest] if seen.first_step_s is not None else []
    if seen.first_step_s is not None and (not mine or mine[0]["step"] != newest + 1):
        problems.append(f"went on at step {mine[0]['step'] if mine else None}, not behind checkpoint {newest}")
    problems += steps_once(rows) + consumed(study, rows) + checkpoints(study, root, here, stream)
    record: dict[str, Any] = {
        "kind": "life", "run": run.name, "stream": stream, "life": len(before), "setting": setting.name,
        "world": setting.world, "shard": setting.shard, "via": via, "end": end,
        "signal": {"term": "TERM", "finished": None, "by itself": None}.get(end, "KILL"),
        "from": newest, "last": last, "steps": len(mine),
        "first_step_s": seen.first_step_s, "seconds": round(seconds, 3), "delay_ms": round(seen.delay_ms, 2),
        "saves_begun": seen.saves, "codes": codes,
        "before": whole_before, "after": after, "line_cut": cut, "in_save": in_save,
        "counts": end in KILLS and seen.first_step_s is not None, "problems": problems,
    }  # fmt: skip
    if changed_from and mine:
        record["change"] = continued(study, copied, changed_from, newest, mine)
        record["problems"] += [p for p in [record["change"].pop("problem")] if p]
    return record


def kill(life: "Life", kind: str, rng: random.Random) -> bool:
    """Do it; False if a rank that was left alone did not end by itself."""
    if kind in ("in_save", "anywhere"):
        life.send(signal.SIGKILL)
    elif kind == "one_rank":
        victims = life.ranks()
        if victims:
            os.kill(rng.choice(victims), signal.SIGKILL)
    else:  # asked to stop: all ranks, one of them, or what has started them and passes it on
        to = [life.leader] if life.plain else life.ranks()
        for pid in to if rng.random() < 0.5 else rng.sample(to, min(1, len(to))):
            os.kill(pid, signal.SIGTERM)
        if kind == "term_then_kill":
            time.sleep(rng.uniform(0, 0.15))
            life.send(signal.SIGKILL)
    return life.wait(ALONE_S)


# ---- what must hold -------------------------------------------------------------------------------------------------
def steps_once(rows: list[Any]) -> list[str]:
    """Every step from the first stands once, in order."""
    wrong = [(row["step"], place) for place, row in enumerate(rows, 1) if row["step"] != place]
    return [f"metrics.jsonl holds step {wrong[0][0]} where {wrong[0][1]} belongs"] if wrong else []


def consumed(study: Study, rows: list[Any]) -> list[str]:
    """What every step says it has consumed is what the plan says."""
    for row in rows:
        state = study.states[row["step"]] if row["step"] < len(study.states) else None
        if state is None or any(row[f"data/{name}/tokens"] != tokens for name, tokens in state["tokens"].items()):
            return [f"step {row['step']} consumed other tokens than the plan's"]
        if row.get("micro_batches", row["step"] * ACCUMULATION) != row["step"] * ACCUMULATION:
            return [f"step {row['step']} counts {row['micro_batches']} micro-batches"]
        if row.get("skipped_steps"):
            return [f"step {row['step']} was skipped"]
    return []


@functools.lru_cache(maxsize=8)
def undisturbed_state(path: Path) -> dict[str, torch.Tensor]:
    """`everything`, of a checkpoint that stays."""
    return everything(path)


def checkpoints(study: Study, root: Path, steps: list[int], stream: str) -> list[str]:
    """Every checkpoint loads, its loader stands where the plan does, its tensors are the undisturbed run's."""
    problems = []
    for step in steps:
        path = root / f"step-{step:08d}"
        try:
            meta, tensors = checkpoint.read_meta(path), everything(path)
        except (ValueError, OSError) as error:
            problems.append(f"{path.name} does not load: {error}")
            continue
        if meta["data"] != study.states[step]:
            problems.append(f"{path.name}: the loader does not stand where the plan does")
        whole_run = study.work / "whole" / f"{stream}-s0" / "checkpoints" / path.name
        if whole_run.exists():
            problems += differing(undisturbed_state(whole_run), tensors, path.name)
        elif not all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point()):
            problems.append(f"{path.name} holds numbers that are not finite")
    return problems


def everything(path: Path) -> dict[str, torch.Tensor]:
    """Parameters, routing state and optimizer state of a checkpoint."""
    return {
        f"{group}/{name}": tensor
        for group in ("model", "optimizer")
        for name, tensor in checkpoint.read_tensors(path, group).items()
    }


def differing(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], what: str) -> list[str]:
    """A line if two states differ in any bit."""
    if one.keys() != two.keys():
        return [f"{what} has other tensors than the undisturbed run's"]
    bad = [name for name in one if one[name].dtype != two[name].dtype or not torch.equal(one[name], two[name])]
    return [f"{what} differs from the undisturbed run's in {len(bad)} tensors such as {bad[0]}"] if bad else []


def judge(study: Study, stream: str, run: Path) -> dict[str, Any]:
    """A finished run beside the one that nobody disturbed."""
    reference = study.work / "whole" / f"{stream if stream != 'elastic' else 'one'}-s0"
    (rows, cut), (expected, _) = parse(run / "metrics.jsonl"), parse(reference / "metrics.jsonl")
    problems = steps_once(rows) + consumed(study, rows)
    if cut or len(rows) != study.steps:
        problems.append(f"metrics.jsonl holds {len(rows)} lines of {study.steps}, the last one cut: {cut}")
    final = f"step-{study.steps:08d}"
    metas = [checkpoint.read_meta(folder / "checkpoints" / final) for folder in (run, reference)]
    same = ("step", "data", "window", "total_steps", "vocab_hash", "precision", "threads")
    problems += [f"meta.json differs in {key}" for key in same if metas[0].get(key) != metas[1].get(key)]
    for key in ("tokens", "flops"):
        if metas[0]["meter"][key] != metas[1]["meter"][key]:
            problems.append(f"meta.json: {key} differ")
    record: dict[str, Any] = {"kind": "run", "stream": stream, "run": run.name, "problems": problems}
    if stream == "elastic":
        finals = [
            parse(study.work / "whole" / f"one-s{seed}" / "metrics.jsonl")[0][-1]["val_loss"] for seed in range(3)
        ]
        record |= {"val_loss": rows[-1]["val_loss"], "seeds": finals}
        record["worst_loss_difference"] = max(
            abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(rows, expected, strict=False)
        )
        if abs(rows[-1]["val_loss"] - finals[0]) > max(finals) - min(finals):
            problems.append(f"final val_loss {rows[-1]['val_loss']}, three seeds {finals}")
    else:
        problems += differing(
            everything(reference / "checkpoints" / final), everything(run / "checkpoints" / final), f"final {final}"
        )
        for row, other in zip(rows, expected, strict=False):
            one, two = ({k: v for k, v in r.items() if not k.startswith(MEASURED)} for r in (row, other))
            if one != two:
                names = sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
                problems.append(f"metrics.jsonl differs from step {row['step']} on in {names[:4]}")
                break
    return record


def elastic_change(before: list[Any], newest: int, setting: Setting) -> Setting | None:
    """The setting that wrote the newest checkpoint, if it is another one."""
    for record in before:
        if newest in record["after"]["whole"] and newest not in record["before"]:
            wrote = Setting(record["world"], record["shard"])
            return wrote if wrote != setting else None
    return None


def copy_of(run: Path, step: int, to: Path) -> None:
    """A copy of a run as it stands at its newest checkpoint."""
    shutil.rmtree(to, ignore_errors=True)
    name = f"step-{step:08d}"
    shutil.copytree(run / "checkpoints" / name, to / "checkpoints" / name)
    offset = checkpoint.read_meta(run / "checkpoints" / name)["metrics_offset"]
    (to / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:offset])


def continued(study: Study, copied: Path, setting: Setting, step: int, mine: list[Any]) -> dict[str, Any]:
    """Continue the copy with the processes that wrote the checkpoint; compare the losses of the next steps."""
    wanted = [row["loss"] for row in mine[:COMPARED]]
    life = start_fork(study.arguments(copied, setting, "checkpoint.interval={steps:1000}"), setting, study.work / "cut")
    begin = time.monotonic()
    while life.alive() and time.monotonic() - begin < PATIENCE_S:
        rows = [row for row in parse(copied / "metrics.jsonl")[0] if row["step"] > step]
        if len(rows) >= len(wanted):
            break
        time.sleep(0.01)
    life.send(signal.SIGKILL)
    life.end()
    rows = [row for row in parse(copied / "metrics.jsonl")[0] if row["step"] > step]
    other = [row["loss"] for row in rows[: len(wanted)]]
    pairs = list(zip(wanted, other, strict=False))
    worst = max((abs(a - b) / abs(b) for a, b in pairs), default=math.inf)
    change = {"from": setting.name, "at": step, "steps": len(pairs), "worst": worst}
    ok = worst <= TOLERANCE and len(pairs) == len(wanted)
    change["problem"] = None if ok else f"after a change from {setting.name}: losses {wanted} instead of {other}"
    return change


# ---- processes ------------------------------------------------------------------------------------------------------
class Life:
    """The processes of one life; must be ended."""

    def __init__(self, leader: int, others: list[int], plain: bool, out: Path) -> None:
        self.leader, self.plain, self.out = leader, plain, out
        self._own = [leader, *others]
        self._known: dict[int, int | None] = dict.fromkeys(self._own)  # exit statuses

    def _reap(self) -> None:
        for pid, code in self._known.items():
            if code is None:
                try:
                    done, status = os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:  # another's child still, or gone
                    if not running(pid):
                        self._known[pid] = -1000
                    continue
                if done:
                    self._known[pid] = os.waitstatus_to_exitcode(status)

    def alive(self) -> bool:
        """Whether any process of it is left."""
        if self.plain:
            self._known = dict.fromkeys(family(self.leader)) | self._known
        self._reap()
        return any(code is None for code in self._known.values())

    def ranks(self) -> list[int]:
        """The processes that train."""
        self.alive()
        if not self.plain:
            return [pid for pid in self._own if self._known[pid] is None]
        children = [pid for pid in self._known if pid != self.leader and self._known[pid] is None]
        return [pid for pid in children if b"moma.cli" in command_of(pid)] or [self.leader]

    def send(self, number: int) -> None:
        """A signal to all of them at once."""
        self.alive()
        for pid, code in self._known.items():
            if code is None:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass

    def wait(self, seconds: float) -> bool:
        """Whether all are gone within `seconds`."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def end(self) -> None:
        """Kill what is left."""
        if self.alive():
            self.send(signal.SIGKILL)
            self.wait(ALONE_S)

    def codes(self) -> list[int]:
        """Exit statuses of the processes that were started here (negative: the signal)."""
        return [self._known[pid] if self._known[pid] is not None else -1000 for pid in self._own]  # type: ignore[misc]

    def text(self) -> str:
        """All that they said."""
        return self.out.read_text(errors="replace")

    def tail(self, n: int) -> str:
        """The last lines of it."""
        return " | ".join(self.text().splitlines()[-n:])


def start(via: str, arguments: list[str], setting: Setting, folder: Path) -> "Life":
    """A life as a fork of this process or by a command, see VIA; what it says goes to out.txt in `folder`."""
    return start_fork(arguments, setting, folder) if via == "fork" else start_plain(via, arguments, setting, folder)


def start_plain(via: str, arguments: list[str], setting: Setting, folder: Path) -> Life:
    """`python -m moma.cli train ...`; two processes by `python -m torch.distributed.run` or by moma's own launcher."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={setting.world}"]
    launch, own = {"torchrun": (torchrun, []), "processes": ([], [f"parallel.processes={setting.world}"])}.get(
        via if setting.world > 1 else "", ([], [])
    )
    command = [sys.executable, *launch, "-m", "moma.cli", "train", *arguments, *own]
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "out.txt"
    with out.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip
    process.returncode = 0  # it is waited for here, not by subprocess
    return Life(process.pid, [], True, out)


def start_fork(arguments: list[str], setting: Setting, folder: Path) -> Life:
    """Fork a process per rank, each of which does what the plain command does after its imports."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "out.txt"
    out.write_bytes(b"")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(setting.world):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, setting.world, port, arguments, out)
        pids.append(pid)
    return Life(pids[0], pids[1:], False, out)


def be_rank(rank: int, world: int, port: int, arguments: list[str], out: Path) -> None:
    """A fresh fork: never returns."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the harness
        descriptor = os.open(out, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if world > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "torture",
            }  # fmt: skip
        code = moma.cli.main(["train", *arguments])
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does at its end
        atexit._run_exitfuncs()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for one in found:
        try:
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except OSError:
            pass
    return found


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def command_of(pid: int) -> bytes:
    """Its command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# ---- files ----------------------------------------------------------------------------------------------------------
def look(root: Path) -> tuple[set[int], dict[str, int]]:
    """Steps under a final name, and bytes in each folder under a temporary one."""
    names, temporary = set(), {}
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if re.fullmatch(r"step-\d{8}", entry.name):
                    names.add(int(entry.name[5:]))
                elif re.fullmatch(r"\.tmp-step-\d{8}", entry.name):
                    try:
                        with os.scandir(entry.path) as files:
                            temporary[entry.name] = sum(file.stat().st_size for file in files)
                    except OSError:  # renamed or removed meanwhile
                        pass
    except FileNotFoundError:
        pass
    return names, temporary


def step_of(name: str) -> int:
    """Of a folder's name."""
    return int(name.rpartition("-")[2])


def whole(root: Path) -> list[int]:
    """Steps whose folder has its final name."""
    return sorted(look(root)[0])


def lines_after(path: Path, offset: int) -> list[bytes]:
    """Whole lines of a file behind an offset."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def parse(path: Path) -> tuple[list[Any], bool]:
    """The whole lines of metrics.jsonl, and whether a cut one follows."""
    if not path.exists():
        return [], False
    *lines, rest = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines], bool(rest)


# ---- all together ---------------------------------------------------------------------------------------------------
def verdicts(records: list[Any], options: Any, study: Study) -> dict[str, Any]:
    """Counts, and every line of the promise with what was seen."""
    lives, runs = ([r for r in records if r["kind"] == kind] for kind in ("life", "run"))
    counted = [r for r in lives if r["counts"]]
    in_save = [r for r in counted if r["in_save"]]
    changes = [r["change"] for r in lives if "change" in r]

    def tally(rows: list[Any], key: str) -> dict[str, int]:
        return {name: sum(r[key] == name for r in rows) for name in sorted({r[key] for r in rows})}

    def none(words: tuple[str, ...], rows: list[Any]) -> dict[str, Any]:
        found = [f"{r['run']}: {p}" for r in rows for p in r["problems"] if not words or any(w in p for w in words)]
        return {"good": not found, "seen": found[:5] or "none"}

    fixed, elastic = ([r for r in runs if (r["stream"] == "elastic") == e] for e in (False, True))
    return {
        "versions": {"commit": commit(), "python": sys.version.split()[0], "torch": torch.__version__},
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "lives": len(lives),
        "kills": {
            "all": len(counted), "signal": tally(counted, "signal"), "kind": tally(counted, "end"),
            "stream": tally(counted, "stream"), "setting": tally(counted, "setting"), "via": tally(counted, "via"),
        },
        "in_save": {
            "all": len(in_save), "stream": tally(in_save, "stream"), "setting": tally(in_save, "setting"),
            "bytes": [max(t["bytes"] for t in r["after"]["temporary"].values()) for r in in_save],
        },
        "steps_run_again": sum(max(0, a["last"] - b["from"]) for a, b in zip(lives, lives[1:], strict=False)
                               if a["run"] == b["run"]),
        "lines_cut": sum(r["line_cut"] for r in lives),
        "seconds_of_lives": round(sum(r["seconds"] for r in lives), 1),
        "runs": runs,
        "changes": {"all": len(changes), "worst": max((c["worst"] for c in changes), default=None), "each": changes},
        "verdicts": {
            f"at least {options.kills} kills after a life's first step": {
                "good": len(counted) >= options.kills, "seen": len(counted)},
            f"at least {options.in_save} of them in a save": {
                "good": len(in_save) >= options.in_save, "seen": len(in_save)},
            "by SIGKILL and by SIGTERM": {
                "good": {r["signal"] for r in counted} == {"KILL", "TERM"}, "seen": tally(counted, "signal")},
            "every stream finished": {
                "good": all(r["problems"] != ["did not finish"] for r in runs)
                and {r["stream"] for r in runs} == set(options.streams),
                "seen": tally(runs, "stream")},
            "same processes: weights, optimizer, metrics as undisturbed": {
                **none((), fixed), **({} if fixed else {"good": "one" not in options.streams})},
            "no checkpoint lost, all load, bit for bit": none(
                ("was whole", "does not load", "without its meta", "differs from", "not finite", "other tensors"),
                lives),
            "no document skipped or repeated": none(("loader", "consumed", "micro-batches", "skipped"), lives + runs),
            "no step twice, none missing": none(("belongs", "went on at", "lines of"), lives + runs),
            "SIGTERM saves, says so, ends with 0": none(("SIGTERM",), lives),
            "nobody stuck, nobody ended alone": none(("stuck", "still there", "by itself", "processes train"), lives),
            f"first {COMPARED} steps after a change within {TOLERANCE}": {
                "good": bool(changes) == ("elastic" in options.streams) and none(("after a change",), lives)["good"],
                "seen": {"changes": len(changes), "worst": max((c["worst"] for c in changes), default=None)}},
            "final loss of elastic runs within the spread of three seeds": {
                **none((), elastic),
                "seen": [{"val_loss": r.get("val_loss"), "seeds": r.get("seeds")} for r in elastic]},
            "nothing else": none((), lives + runs),
        },
    }  # fmt: skip


def commit() -> str:
    """Of the checkout; a + where it has changes."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


if __name__ == "__main__":
    sys.exit(main())
