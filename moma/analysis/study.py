"""The runs of a comparison: read, joined to their routers, sorted by size, and the unfinished ones set aside.

    runs=[A, runs/emoji/*, runs/sweeps/S]  ->  {size: [dense ..., sparse ...]}, left out: [(folder, reason)]

A folder with a sweep.json stands for the run folders of its jobs.

A size is a dense model's: width and layers, by the paper's name where it has one. A sparse run belongs to the dense
model of its own width and layers; under mixture-of-depths, which has more layers for the same cost, to the one whose
training FLOPs per token are nearest, within SAME_COST. A run that stopped early has no final loss: it is named with
its reason and takes part in no statistic. Refuses paths that are no runs, a study without a finished dense run, and
runs that did not see the same micro-batches (same size and data seed) or the same vocabulary.
"""

import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moma.analysis import wandb_runs
from moma.analysis.fairness import unfair
from moma.analysis.runs import AUX, Run, join, read_run, refuse_twins
from moma.analysis.speedup import paired, sparse_variants

SAME_COST = 0.1  # of the dense model's training FLOPs per token; the paper's match within 3 %
_NAMES = {(512, 8): "90m", (1024, 24): "435m", (2048, 24): "1.4b"}  # (width, layers) of Table 1
_SHAPE = ("rows", "row_length", "images", "accumulation", "mixture", "stages", "balance")


class LeftOut(NamedTuple):
    """A run folder that takes part in no statistic, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Study:
    """Finished runs by size, smallest first, dense first in each; what was left out; notes on unequal pairs."""

    sizes: dict[str, list[Run]]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.sizes.values() for run in runs]

    @property
    def variants(self) -> list[str]:
        """Names of all variants, dense first, then in order of their names."""
        return sorted({run.variant for run in self.runs}, key=lambda name: (name != "dense", name))


def read_study(patterns: Sequence[Path | str]) -> Study:
    """The study of the run folders that `patterns` name; raises ValueError, see the module docstring."""
    read: list[Run] = []
    folders, left_out = run_folders(patterns)
    for folder in folders:
        if not (any(folder.glob("checkpoints/step-*/meta.json")) or wandb_runs.offline_files(folder)):
            left_out.append(LeftOut(folder, "no checkpoint: it stopped before its first one, run its command again"))
            continue
        run = read_run(folder)
        if run.unfinished:
            what = "its routers' training " if run.objective == AUX else ""
            left_out.append(LeftOut(folder, what + run.unfinished))
        else:
            read.append(run)
    joined = join(read)
    known = {one.folder.resolve() for one in left_out}
    left_out += [LeftOut(run.folder, run.unfinished) for run in joined
                 if run.unfinished and run.folder.resolve() not in known]  # fmt: skip
    sizes, alone = _by_size([run for run in joined if not run.unfinished], left_out)
    _refuse_other_data(sizes)
    notes = [
        f"{size}: {note}" if len(sizes) > 1 else note
        for size, runs in sizes.items()
        for note in (*_unpaired(runs), *_skipped(runs), *unfair(runs))
    ]
    return Study(sizes, (*left_out, *alone), tuple(dict.fromkeys(notes)))


def run_folders(patterns: Sequence[Path | str]) -> tuple[list[Path], list[LeftOut]]:
    """Folders of runs, each once: paths as they are, globs by name, sweeps by their jobs; and the jobs without a run.
    Raises ValueError for a pattern that gives none."""
    found: dict[Path, Path] = {}
    left_out = []
    for pattern in map(str, patterns):
        if glob.has_magic(pattern) and not Path(pattern).exists():
            matches = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if _is_run(Path(path))]
            if not matches:
                raise ValueError(f"got {pattern}, which matches no run folder, need some: check the path")
        elif not Path(pattern).is_dir():
            raise ValueError(f"got no folder {pattern}, need one that `moma train` wrote: check the path")
        elif (Path(pattern) / "sweep.json").is_file():
            matches, missing = _jobs(Path(pattern) / "sweep.json")
            left_out += missing
        elif _is_run(Path(pattern)):
            matches = [Path(pattern)]
        else:
            raise ValueError(
                f"got {pattern}, which is no run folder, need one with metrics.jsonl: name its runs, '{pattern}/*'"
            )
        for path in matches:
            found.setdefault(path.resolve(), path)
    if not found and not left_out:
        raise ValueError("got no runs, need a dense and a sparse run folder: runs=[RUN,RUN] or runs=['runs/sweep/*']")
    return list(found.values()), left_out


def _jobs(path: Path) -> tuple[list[Path], list[LeftOut]]:
    """Run folders of a sweep's jobs, and the jobs that made none."""
    try:
        listed = json.loads(path.read_text())["jobs"]
        jobs = [(Path(job["folder"]), f"job {job['number']}: {job['status']}") for job in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"got a damaged {path} ({error!r}), need what a sweep wrote: run the sweep again") from None
    return [folder for folder, _ in jobs if _is_run(folder)], [LeftOut(*job) for job in jobs if not _is_run(job[0])]


def size_of(run: Run) -> str:
    """The paper's name of a size, or `width x layers`."""
    model = run.config.get("model", {})
    place = (model.get("dim"), model.get("n_layers"))
    return _NAMES.get(place) or "×".join(map(str, place))  # type: ignore[arg-type]


def final_flops(run: Run) -> float:
    """Training FLOPs of the whole run, without its auxiliary routers."""
    return float(run.metrics["flops"][-1])


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / "metrics.jsonl").is_file()
        or (folder / "checkpoints").is_dir()
        or bool(wandb_runs.offline_files(folder))
    )


def _by_size(runs: Sequence[Run], left_out: Sequence[LeftOut]) -> tuple[dict[str, list[Run]], list[LeftOut]]:
    """Runs under their dense model, smallest first; those without one."""
    cost = {size_of(run): run.flops_per_token for run in runs if run.is_dense}
    if not cost:
        missing = "".join(f"; left out: {one.folder} ({one.reason})" for one in left_out)
        raise ValueError(
            f"got no finished dense run among {', '.join(run.name for run in runs) or 'them'}{missing}, need the "
            "baseline of the same size and seeds: train one with feed_forward=dense and add it"
        )
    sizes: dict[str, list[Run]] = {size: [] for size in sorted(cost, key=lambda size: cost[size])}
    alone = []
    for run in runs:
        own = size_of(run)
        near = min(cost, key=lambda size: abs(cost[size] - run.flops_per_token))
        full = run.config.get("depth", {}).get("kind", "full") == "full"
        if full and own in cost:
            sizes[own].append(run)
        elif abs(run.flops_per_token - cost[near]) <= SAME_COST * cost[near]:
            sizes[near].append(run)
        else:
            reason = f"no dense run of its size ({own}, {run.flops_per_token / 1e9:.3g} GFLOP per token)"
            alone.append(LeftOut(run.folder, reason))
    for own in sizes.values():
        own.sort(key=lambda run: (not run.is_dense, run.variant, run.seed))
        refuse_twins(own)
    return sizes, alone


def _refuse_other_data(sizes: dict[str, list[Run]]) -> None:
    """Raises ValueError for runs of other vocabularies, and of other micro-batches in one size and data seed."""
    runs = [run for own in sizes.values() for run in own]
    for run in runs:
        _refuse(runs[0], run, {"vocab_hash": lambda run: run.config.get("vocab_hash")})
    for own in sizes.values():
        first: dict[Any, Run] = {}
        for run in own:
            _refuse(own[0], run, {f"data.{name}": lambda run, name=name: _data(run, name) for name in _SHAPE})
            same_seed = first.setdefault(run.seed[0], run)
            _refuse(same_seed, run, {"plan": lambda run: run.config.get("plan")})


def _data(run: Run, name: str) -> Any:
    return run.config.get("data", {}).get(name)


def _refuse(one: Run, other: Run, fields: dict[str, Any]) -> None:
    values = {name: (read(one), read(other)) for name, read in fields.items()}
    known = {name: pair for name, pair in values.items() if None not in pair}  # an older version did not write all
    differing = [f"{name} ({a} and {b})" for name, (a, b) in known.items() if a != b]
    if differing:
        raise ValueError(
            f"got {one.folder} and {other.folder} with different {', '.join(differing)}, need runs on the same data: "
            "their losses do not compare, leave one out"
        )


def _unpaired(runs: Sequence[Run]) -> Iterable[str]:
    """Sparse runs whose seeds no dense run has: they count in no pair."""
    for variant in sparse_variants(runs):
        with_pair = {sparse.seed for _, sparse in paired(runs, variant)}
        missing = [run.seed[1] for run in runs if run.variant == variant and run.seed not in with_pair]
        if missing:
            yield f"No dense run with the seeds of {variant}, seed {', '.join(map(str, missing))}: in no pair."


def _skipped(runs: Sequence[Run]) -> Iterable[str]:
    """Runs that left out steps whose loss or gradient was not finite: they did not learn from the same documents."""
    for run in runs:
        if steps := run.meta.get("skipped"):
            yield f"{run.name} left out {steps} of its steps, not finite: its skipped.jsonl names them."
