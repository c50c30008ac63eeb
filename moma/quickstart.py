"""Everything on a small real corpus: prepare, two trainings, causal routers, evaluation, generation, report.

    prepare -> train dense      -> evaluate -> generate \
            -> train moe_4t4i -> aux_routers -> evaluate -> generate -> report.html

Every stage is one `moma` command in a process of its own, printed before it runs, so that any of them can be run by
hand. Finished stages are recorded in OUT/quickstart.json with their CPU time; run it again after an interruption and
it goes on (trainings from their last checkpoint). Prints its CPU budget at the start and what it took at the end.
"""

import concurrent.futures
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moma.config import Composed
from moma.data.shards import write_json


@dataclass(frozen=True)
class QuickstartConfig:
    """`tokens` per training, `aux_tokens` for the routers. Per model, `pictures` are drawn to measure their distance
    from held-out ones, and `names` held-out names are drawn, and their pictures named, to be looked at."""

    out: Path
    corpus: Path
    tokens: float
    aux_tokens: float
    pictures: int
    names: int
    budget: dict[str, float]  # CPU minutes (user + system) per kind of stage, as planned


class Stage(NamedTuple):
    """One command; `kind` is its line of the budget."""

    name: str
    kind: str
    arguments: tuple[str, ...]


def main(composed: Composed) -> int:
    """`moma quickstart`: returns 0 when report.html is there."""
    config: QuickstartConfig = composed.config
    config.out.mkdir(parents=True, exist_ok=True)
    planned = ", ".join(f"{kind} {minutes:g}" for kind, minutes in config.budget.items())
    print(f"budget in CPU minutes (user + system): {planned}; together {sum(config.budget.values()):g}")
    record_path = config.out / "quickstart.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {"stages": {}}
    wanted = {"tokens": config.tokens, "aux_tokens": config.aux_tokens, "corpus": str(config.corpus)}
    if record.setdefault("config", wanted) != wanted:
        raise ValueError(
            f"got {wanted} for {config.out}, which holds {record['config']}, need the same to go on: choose another out"
        )
    for together in stages(config):
        run_stages(together, record, record_path)
    print_budget(record, config)
    print(f"report: {config.out / 'report' / 'report.html'}")
    return 0


def stages(config: QuickstartConfig) -> list[tuple[Stage, ...]]:
    """The commands in order; those in one tuple run side by side, on one thread each."""
    out, corpus = config.out, f"data.corpus={config.corpus}"
    dense, sparse, aux = out / "dense", out / "moe_4t4i", out / "moe_4t4i-aux_routers"
    common = (corpus, "parallel.threads=1")
    length, aux_length = f"duration.tokens={config.tokens:g}", f"duration.tokens={config.aux_tokens:g}"
    family, pictures = "feed_forward=moe_4t4i", f"pictures={config.pictures}"
    second = ("objective=aux_routers", "optim=aux_routers", f"init_from={sparse}", aux_length)
    drawn = [out / "generate-dense", out / "generate-moe_4t4i"]
    look = (f"held_out={config.names}", "samples=3", "guidance=1")
    runs, shown = f"runs=[{dense},{sparse},{aux}]", f"generations=[{drawn[0]},{drawn[1]}]"
    return [
        (Stage("prepare", "prepare", ("prepare", f"name={config.corpus.name}", f"corpora={config.corpus.parent}")),),
        (
            Stage("train dense", "train dense", ("train", "feed_forward=dense", *common, length, f"run_dir={dense}")),
            Stage("train moe_4t4i", "train moe_4t4i", ("train", family, *common, length, f"run_dir={sparse}")),
        ),
        (Stage("train routers", "train routers", ("train", family, *common, *second, f"run_dir={aux}")),),
        (Stage("evaluate dense", "the rest", ("evaluate", f"run={dense}", pictures)),),
        (Stage("evaluate moe_4t4i", "the rest", ("evaluate", f"run={aux}", pictures)),),
        (Stage("generate dense", "the rest", ("generate", f"run={dense}", *look, f"out={drawn[0]}")),),
        (Stage("generate moe_4t4i", "the rest", ("generate", f"run={aux}", *look, f"out={drawn[1]}")),),
        (Stage("report", "the rest", ("report", runs, shown, f"out={out / 'report'}")),),
    ]


def run_stages(stages: tuple[Stage, ...], record: dict[str, Any], path: Path) -> None:
    """Run stages side by side, each in a process, unless the same command is recorded as finished.

    Adds CPU and wall time of each to the record. A failure or an interruption is raised once all have ended.
    """
    # the report is cheap and must show the times of everything before it: it is always made again
    entries = [record["stages"].setdefault(stage.name, {"cpu_s": 0.0, "wall_s": 0.0}) for stage in stages]
    todo = []
    for stage, entry in zip(stages, entries, strict=True):
        command = shlex.join(("moma", *stage.arguments))
        finished = entry.get("done") == command and stage.name != "report"
        print(f"[{stage.name}] {'done before: ' if finished else ''}{command}", flush=True)
        if not finished:
            todo.append((stage, entry, command))
    failures, interrupted = [], False
    with concurrent.futures.ThreadPoolExecutor(len(stages)) as pool:
        jobs = [pool.submit(_run, stage, len(todo) > 1) for stage, _, _ in todo]
        while not all(job.done() for job in jobs):
            try:
                concurrent.futures.wait(jobs)
            except KeyboardInterrupt:  # the children got it too: let them finish their step and save
                interrupted = True
    for (stage, entry, command), job in zip(todo, jobs, strict=True):
        code, cpu_s, wall_s = job.result()
        entry["cpu_s"] += cpu_s
        entry["wall_s"] += wall_s
        entry |= {"command": command, "kind": stage.kind}
        if code == 0 and not interrupted and _finished(stage):
            entry["done"] = command
        elif code == 0:  # a training that was asked to stop has saved and ended in order
            interrupted = True
        elif code:
            failures.append(f"got exit code {code} from `{command}`, need 0: correct what it says, then run again")
    record["machine"] = {"cpu": _cpu_name(), "python": platform.python_version(), "system": platform.system()}
    write_json(path, record)
    if interrupted:
        raise KeyboardInterrupt
    if failures:
        raise ValueError("; ".join(failures))


def _run(stage: Stage, prefixed: bool) -> tuple[int, float, float]:
    """Exit code, CPU seconds (with those of its own children) and wall seconds of one command."""
    start = time.monotonic()
    pipe = subprocess.PIPE if prefixed else None
    process = subprocess.Popen((sys.executable, "-m", "moma.cli", *stage.arguments), stdout=pipe, text=prefixed)
    if process.stdout is not None:
        for line in process.stdout:
            print(f"[{stage.name}] {line}", end="", flush=True)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime, time.monotonic() - start


def _finished(stage: Stage) -> bool:
    """Whether a training has reached its last step; other stages are finished when they end."""
    if stage.arguments[0] != "train":
        return True
    (run_dir,) = (Path(a.removeprefix("run_dir=")) for a in stage.arguments if a.startswith("run_dir="))
    metas = sorted((run_dir / "checkpoints").glob("step-*/meta.json"))
    meta = json.loads(metas[-1].read_text()) if metas else {"step": 0, "total_steps": 1}
    return meta["step"] == meta["total_steps"]


def print_budget(record: dict[str, Any], config: QuickstartConfig) -> None:
    """Planned and used CPU minutes by kind."""
    used: dict[str, float] = dict.fromkeys(config.budget, 0.0)
    for entry in record["stages"].values():
        used[entry["kind"]] = used.get(entry["kind"], 0.0) + entry["cpu_s"] / 60
    for kind, minutes in used.items():
        print(f"  {kind:16} {minutes:5.1f} of {config.budget.get(kind, 0):g} CPU minutes")
    print(f"  {'together':16} {sum(used.values()):5.1f} of {sum(config.budget.values()):g} CPU minutes")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
