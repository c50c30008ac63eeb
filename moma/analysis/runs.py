"""Run folders as plain data: what a run logged, what it was, how it was evaluated.

    RUN/metrics.jsonl                   columns over logged steps; NaN where a line lacks the metric
    RUN/checkpoints/step-*/meta.json    the newest: configuration, meter, versions
    RUN/eval.json                       if `moma evaluate` ran
    RUN/wandb/offline-run-*             in place of the first two, where a folder has nothing else (wandb_runs.py)

A sparse model is scored causally only after its auxiliary routers were trained, by a run of their own
(`objective=aux_routers init_from=RUN`). `collect` joins the two: the training run keeps its curves and takes
the evaluation of the routers' run.

Refuses a folder that is no run and a metrics file that is damaged before its last line; a last line that a
kill cut off is left out.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moma.analysis import wandb_runs
from moma.meter import Duration

AUX = "aux_routers"


@dataclass(frozen=True)
class Run:
    """One run. `metrics`: float64 columns over lines, `step` and `flops` without gaps; `routers`: the run
    that trained its auxiliary routers, if any; `eval`: eval.json, None where the run was not evaluated.
    """

    name: str
    metrics: dict[str, np.ndarray]
    meta: dict[str, Any]
    eval: dict[str, Any] | None = None
    folder: Path = field(default=Path("."))
    routers: "Run | None" = None

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    @property
    def objective(self) -> str:
        return self.config.get("objective", {}).get("kind", "next_token")

    @property
    def is_dense(self) -> bool:
        """Whether it is the baseline: one feed-forward, one attention, every block for every token."""
        return self.variant == "dense"

    @property
    def variant(self) -> str:
        """`dense`, or the paper's name and what else is special: `moe_8x`, `mod_moe_4t4i`, `moe_4t4i_threshold`."""
        ffn, name = self.config["feed_forward"], "dense"
        if ffn["kind"] != "dense":
            experts = {
                group: "_".join(map(str, n)) if isinstance(n, list) else n for group, n in ffn["experts"].items()
            }
            grouped = "".join(f"{count}{modality[0]}" for modality, count in experts.items())
            name = f"moe_{experts['all']}x" if list(experts) == ["all"] else f"moe_{grouped}"
            rule = ffn.get("selection", {}).get("kind", "expert_choice")
            name += "" if rule == "expert_choice" else f"_{rule}"
            name += "_shared" if ffn.get("shared") else ""
            name += "".join(_unusual(ffn))
        depth = self.config.get("depth", {}).get("kind", "full")
        name = name if depth == "full" else f"{depth}_{name}"
        attention = self.config.get("attention", {}).get("kind", "shared")
        name += "" if attention == "shared" else f"_{attention}"
        name += "_joint" if self.config.get("objective", {}).get("aux_weight") else ""
        return name + ("_upcycled" if self.meta.get("upcycled") else "")

    @property
    def sees_future(self) -> bool:
        """Whether its training rule looks at other tokens (expert choice, depth): then losses in mode `train` are not
        causal."""
        ffn = self.config["feed_forward"]
        counts = ffn.get("experts", {}).values() if ffn["kind"] != "dense" else ()
        routed = any(count > 1 for n in counts for count in (n if isinstance(n, list) else [n]))
        chooses = ffn.get("selection", {}).get("kind", "expert_choice") == "expert_choice"
        return (routed and chooses) or self.config.get("depth", {}).get("kind", "full") != "full"

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of a token, of the last logged step."""
        tokens, flops = self.column("tokens"), self.metrics["flops"]
        known = np.isfinite(tokens) & (tokens > 0)
        return float(flops[known][-1] / tokens[known][-1]) if known.any() else math.nan

    @property
    def unfinished(self) -> str | None:
        """Why the run is no whole one, None for a run that did all of its steps."""
        done, total = self.meta.get("step"), self.meta.get("total_steps")
        if done is not None and total is not None and done < total:
            return f"stopped at step {done} of {total}: run its command again"
        logged = int(self.metrics["step"][-1])
        if done is not None and logged < done:
            return f"metrics end at step {logged}, its checkpoint is of step {done}: restore the file"
        return self.meta.get("unfinished")

    @property
    def seed(self) -> tuple[int, int]:
        """Seeds of the data order and of the parameters; runs with equal ones are paired."""
        seed = self.config.get("seed", {})
        return seed.get("data", 0), seed.get("init", 0)

    @property
    def evaluated(self) -> "Run":
        """The run whose folder `eval` was read from: the routers' one where that was evaluated."""
        return self.routers if self.routers and self.routers.eval else self

    def column(self, name: str) -> np.ndarray:
        """A metric over all lines, NaN throughout if it was never logged."""
        return self.metrics.get(name, np.full(len(self.metrics["step"]), math.nan))


def _unusual(ffn: dict[str, Any]) -> Iterator[str]:
    """What tells apart two models with the same experts and rule: settings off their usual values, short."""
    usual = {"k": 1, "weights": "raw", "capacity_factor": (1.0, None), "second_choice": "argmax", "drop": "position"}
    usual |= {"noise": ("none", "upcycled"), "layers": "all"}
    for name, value in {**ffn, **ffn.get("selection", {})}.items():
        ordinary = usual.get(name, value)
        if value != ordinary and not (isinstance(ordinary, tuple) and value in ordinary):
            plain = value if isinstance(value, str) else f"{name[0]}{json.dumps(value)}"
            yield "_" + re.sub(r"[^\w.]+", "-", plain).strip("-")


def read_run(folder: Path) -> Run:
    """The run in `folder`; raises ValueError where the folder is not a run, or its files are damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"got no folder {folder}, need one that `moma train` wrote: check the path")
    path = folder / "eval.json"
    offline = () if (folder / "metrics.jsonl").is_file() else wandb_runs.offline_files(folder)
    if offline:
        name, metrics, meta = _from_wandb(offline)
        found = _json(path, "run moma evaluate again") if path.is_file() else None
        return Run(name or folder.resolve().name, metrics, meta, found, folder)
    meta = _newest_meta(folder)
    found = _json(path, "run moma evaluate again") if path.is_file() else None
    metrics = read_metrics(folder / "metrics.jsonl")
    if seed := meta.get("upcycled"):  # what its seed cost counts: curves of upcycled runs begin there (MoMa 2.5)
        for name in ("tokens", "flops"):
            if name in metrics:
                metrics[name] = metrics[name] + seed[f"seed_{name}"]
    return Run(folder.resolve().name, metrics, meta, found, folder)


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of a metrics.jsonl, ascending in `step`, one row per step; missing values are NaN.

    `flops` is filled in from the neighbouring lines (steps are linear in FLOPs). Raises ValueError.
    """
    if not path.is_file():
        raise ValueError(f"got no {path}, need the metrics of a run: train it first")
    rows: dict[int, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.setdefault(row["step"], {}).update({k: v for k, v in row.items() if v is not None})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):  # no newline after it: the line that a kill cut off
                break
            raise ValueError(
                f"got a damaged line {number} in {path} ({error}), need one JSON object with a step per "
                "line: resume the run, which cuts the file at its checkpoint"
            ) from None
    return columns_of(rows, path)


def columns_of(rows: dict[int, dict[str, Any]], path: Path) -> dict[str, np.ndarray]:
    """Columns of rows by step, as `read_metrics` returns them; `path` is for the error where there are none."""
    if not rows:
        raise ValueError(f"got no whole line in {path}, need the metrics of a run: train for longer")
    steps = sorted(rows)
    names = sorted({name for row in rows.values() for name in row})
    columns = {name: np.array([rows[step].get(name, math.nan) for step in steps], float) for name in names}
    known = np.isfinite(columns.get("flops", np.full(len(steps), math.nan)))
    if not known.any():
        raise ValueError(
            f"got no flops in {path}, need them in at least one line: train until the first line is logged"
        )
    at, flops = columns["step"][known], columns["flops"][known]
    filled = np.interp(columns["step"], [0.0, *at], [0.0, *flops])
    beyond = columns["step"] > at[-1]
    filled[beyond] = columns["step"][beyond] * flops[-1] / at[-1]
    return columns | {"flops": filled}


def collect(folders: tuple[Path, ...] | list[Path]) -> list[Run]:
    """Training runs of `folders`, dense first, then by variant and seed; routers' runs joined to their run.

    A routers' run whose training run is not named brings it along. Raises ValueError for two runs of one
    variant and seed, and for a routers' run whose training run cannot be found.
    """
    runs = join([read_run(folder) for folder in folders])
    refuse_twins(runs)
    return runs


def join(read: Sequence[Run]) -> list[Run]:
    """The training runs among `read` with their routers' runs; dense first, then by variant and seed. ValueError for a
    routers' run whose training run cannot be found."""
    trained = {run.folder.resolve(): run for run in read if run.objective != AUX}
    for routers in (run for run in read if run.objective == AUX):
        base = _base_folder(routers, set(trained))
        run = trained.get(base) or read_run(base)
        trained[base] = replace(run, routers=routers, eval=routers.eval or run.eval)
    return sorted(trained.values(), key=lambda run: (not run.is_dense, run.variant, run.seed))


def refuse_twins(runs: Sequence[Run]) -> None:
    """Raises ValueError where two neighbours are of one variant and seed: they would count as two seeds."""
    for one, other in zip(runs, runs[1:], strict=False):
        if (one.variant, one.seed) == (other.variant, other.seed):
            raise ValueError(
                f"got {one.folder} and {other.folder}, both {one.variant} with the same seeds, need one "
                "run per variant and seed: leave one out"
            )


def _from_wandb(files: Sequence[Path]) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Name, columns and what stands for meta.json, of a run recorded by W&B alone."""
    recorded = wandb_runs.read_offline(files)
    config = recorded.config
    if "feed_forward" not in config:
        raise ValueError(
            f"got {files[-1]} without a configuration, need a run that `moma train` logged: check the path"
        )
    metrics = columns_of(recorded.rows, files[-1])
    data, duration = config.get("data", {}), config.get("duration")
    step, total = int(metrics["step"][-1]), config.pop("total_steps", None)
    if total is None and duration and {"rows", "row_length"} <= set(data):
        per_step = data["rows"] * data["row_length"] * data.get("accumulation", 1)
        per_token = float(metrics["flops"][-1]) / (step * per_step)
        total = Duration(**duration).to_steps(per_step, per_token)
    ended = None if recorded.exit_code == 0 else f"W&B recorded no end after step {step}: its process died"
    if recorded.exit_code:
        ended = f"ended with code {recorded.exit_code} after step {step}"
    last = {name: metrics[name][np.isfinite(metrics[name])] for name in ("tokens", "flops") if name in metrics}
    meter = {name: float(values[-1]) for name, values in last.items() if len(values)}
    meta = {"config": config, "step": step, "total_steps": total, "meter": meter, "unfinished": ended}
    return recorded.name, metrics, meta | {"upcycled": config.pop("upcycled", None)}


def _base_folder(routers: Run, known: set[Path]) -> Path:
    """The run whose parameters `routers` started from, as an absolute path."""
    origin = routers.config.get("init_from")
    if origin:
        path = Path(origin)
        for candidate in (path.resolve(), (routers.folder / ".." / path.name).resolve()):
            if candidate in known or (candidate / "metrics.jsonl").is_file():
                return candidate
    raise ValueError(
        f"got {routers.folder}, which trained routers of {origin or 'no run'}, need that run beside it: add it to runs"
    )


def _newest_meta(folder: Path) -> dict[str, Any]:
    found = sorted((folder / "checkpoints").glob("step-*/meta.json"))
    if not found:
        raise ValueError(f"got {folder} without a checkpoint, need a run that has saved one: train it first")
    meta = _json(found[-1], f"remove {found[-1].parent}")
    if not isinstance(meta.get("config"), dict) or "feed_forward" not in meta["config"]:
        raise ValueError(f"got {found[-1]} without a configuration, need one that `moma train` wrote: train again")
    return meta


def _json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"got a damaged {path} ({error}), need JSON: {remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"got {path} with a {type(found).__name__}, need a JSON object: {remedy}")
    return found


def with_routers(runs: Sequence[Run]) -> list[Run]:
    """Every run, followed by the one that trained its auxiliary routers."""
    return [one for run in runs for one in (run, run.routers) if one is not None]
