"""Everything on a small real corpus: prepare, two trainings, causal routers, evaluation, generation, report.

    prepare -> train dense      -> evaluate -> generate \
            -> train moe_4t4i -> aux_routers -> evaluate -> generate -> report.html

Every stage is one `moma` command in a process of its own, printed before it runs, so that any of them can be run by
hand. Finished stages are recorded in OUT/quickstart.json with their CPU time; run it again after an interruption and
it goes on (trainings from their last checkpoint). Prints its CPU budget at the start and what it took at the end.
"""

import json
import platform
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moma.config import Composed


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
    for stage in stages(config):
        run_stage(stage, record, record_path)
    print_budget(record, config)
    print(f"report: {config.out / 'report' / 'report.html'}")
    return 0


def stages(config: QuickstartConfig) -> list[Stage]:
    """The commands in order."""
    out, corpus = config.out, f"data.corpus={config.corpus}"
    dense, sparse, aux = out / "dense", out / "moe_4t4i", out / "moe_4t4i-aux_routers"
    length, aux_length = f"duration.tokens={config.tokens:g}", f"duration.tokens={config.aux_tokens:g}"
    family = "feed_forward=moe_4t4i"
    second = ("objective=aux_routers", "optim=aux_routers", f"init_from={sparse}", aux_length)
    pictures = f"pictures={config.pictures}"
    generations = f"[{out / 'generate-dense'},{out / 'generate-moe_4t4i'}]"
    return [
        Stage("prepare", "prepare", ("prepare", f"name={config.corpus.name}", f"corpora={config.corpus.parent}")),
        Stage("train dense", "train dense", ("train", "feed_forward=dense", corpus, length, f"run_dir={dense}")),
        Stage("train moe_4t4i", "train moe_4t4i", ("train", family, corpus, length, f"run_dir={sparse}")),
        Stage("train routers", "train routers", ("train", family, corpus, *second, f"run_dir={aux}")),
        Stage("evaluate dense", "the rest", ("evaluate", f"run={dense}", pictures)),
        Stage("evaluate moe_4t4i", "the rest", ("evaluate", f"run={aux}", pictures)),
        *(
            Stage(f"generate {name}", "the rest", ("generate", f"run={run}", f"held_out={config.names}", "samples=3",
                  f"out={out / f'generate-{name}'}"))
            for name, run in (("dense", dense), ("moe_4t4i", aux))
        ),
        Stage("report", "the rest", ("report", f"runs=[{dense},{sparse},{aux}]",
              f"generations={generations}", f"out={out / 'report'}")),
    ]  # fmt: skip


def run_stage(stage: Stage, record: dict[str, Any], path: Path) -> None:
    """Run a stage unless the same command is recorded as finished; adds its CPU and wall time. Exits on failure."""
    command = shlex.join(("moma", *stage.arguments))
    entry = record["stages"].setdefault(stage.name, {"cpu_s": 0.0, "wall_s": 0.0})
    # the report is cheap and must show the times of everything before it: it is always made again
    if entry.get("done") == command and stage.name != "report":
        print(f"[{stage.name}] done before: {command}")
        return
    print(f"[{stage.name}] {command}", flush=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    result, interrupted = None, False
    with subprocess.Popen((sys.executable, "-m", "moma.cli", *stage.arguments)) as process:
        while result is None:
            try:
                result = process.wait()
            except KeyboardInterrupt:  # the child got it too: let it finish its step and save
                interrupted = True
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    entry["cpu_s"] += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    entry["wall_s"] += time.monotonic() - start
    entry |= {"command": command, "kind": stage.kind}
    if not interrupted and result == 0:
        entry["done"] = command
    record["machine"] = {"cpu": _cpu_name(), "python": platform.python_version(), "system": platform.system()}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
    if interrupted:
        raise KeyboardInterrupt
    if result:
        raise ValueError(f"got exit code {result} from `{command}`, need 0: correct what it says, then run again")


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
