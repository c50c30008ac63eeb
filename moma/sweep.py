"""Sweeps: `moma VERB -m key=a,b group=x,y` runs VERB once for every combination, each in a process of its own.

    runs/sweeps/<name>/sweep.json           the command, its jobs, and how each one ended
                       multirun.yaml        what Hydra's sweeper was given
                       <number>/job.json    overrides, run folder, status, last lines of stderr; stdout.txt, stderr.txt

Hydra's sweeper makes the jobs and a launcher of Hydra's runs them: here one after the other (the default), several at
once (hydra/launcher=joblib), or on a cluster (hydra/launcher=slurm). A job is the command `moma VERB overrides`, so
nothing that happens to it can take the sweep down: its failure is recorded, the others go on, and the end is a table
and 1. The same command again goes on: what is finished is left alone, all else runs (and resumes). The name comes from
the command, without the launcher; `hydra.sweep.dir=...` is another folder.

Every job is composed and checked before the first one starts. Refuses jobs that share a run folder, to be started
inside a process group (a job may be one: parallel.processes=N), and two sweeps at a time in one folder.

SIGTERM and Ctrl-C stop the running jobs in order, wherever they run, and no other starts: they look for a file `stop`
beside sweep.json. A second signal does not wait. On Slurm every task of a job is one process of its group, and the
signal before a time limit or a preemption stops the run in order before the job is queued again.
"""

import functools
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moma import launch
from moma.config import Composed, compose, locate, multirun, points

ROOT = Path("runs/sweeps")
LAST_LINES = 20  # of a failed job's stderr, in its record
POLL_S = 0.2


class Job(NamedTuple):
    """One command of a sweep. `shown`: the overrides that not all jobs share; `digest` of its whole configuration."""

    number: int
    overrides: list[str]
    shown: str
    folder: str
    digest: str


class _HandOver(BaseException):
    """A signal that a cluster's launcher answers once the run is saved."""


def _train_folder(composed: Composed) -> Path:
    return composed.config.run_dir or locate("moma.run:default_run_dir")(composed)


def _upcycle_folder(composed: Composed) -> Path:
    return composed.config.run_dir or locate("moma.upcycle:upcycled_run_dir")(composed)


def _evaluation(composed: Composed) -> Path:
    return composed.config.out or composed.config.run / "eval.json"


# Where a job of a verb writes: one job each
FOLDERS: dict[str, Callable[[Composed], Path]] = {
    "train": _train_folder,
    "upcycle": _upcycle_folder,
    "evaluate": _evaluation,
}


def sweep(verb: str, overrides: list[str]) -> int:
    """`moma VERB -m`: returns 0 when all jobs are finished, 1 when one is not, 130 when it was asked to stop.

    Raises ValueError for a user's mistake, before anything is started.
    """
    if launch.GROUP in os.environ:
        raise ValueError(
            "got -m inside a process group, need a process outside: start the sweep without torchrun, and each job "
            "with parallel.processes=N"
        )
    if verb not in FOLDERS:
        raise ValueError(f"got -m for {verb}, need one of {', '.join(FOLDERS)}: start one command for each value")
    name, directory = _place(verb, overrides)
    jobs = plan(verb, overrides, name)
    directory.mkdir(parents=True, exist_ok=True)
    with locate("moma.checkpoint:alone")(directory):
        left = sum(not _finished(verb, job, _record(directory, job)) for job in jobs)
        print(f"sweep {name}: {len(jobs)} jobs, {len(jobs) - left} finished, {left} to do; records in {directory}")
        _write_summary(directory, verb, overrides, jobs)
        stop, trouble = directory / "stop", ""
        stop.unlink(missing_ok=True)
        task = functools.partial(run_job, directory.resolve(), verb, jobs, os.getpid())
        with _stopping(stop):
            try:
                multirun(verb, overrides, directory, name, task)
            except KeyboardInterrupt:
                pass
            except (ValueError, OSError):
                raise
            except Exception as error:  # the launcher's: a job of a cluster that was lost
                trouble = f"{type(error).__name__}: {error}"
        stopped = stop.exists()
        statuses = _write_summary(directory, verb, overrides, jobs)
    _print_table(jobs, statuses)
    if trouble:
        print(f"moma {verb}: the launcher ended with {trouble}", file=sys.stderr)
    if all(status == "finished" for status in statuses):
        return 0
    missing = sum(status != "finished" for status in statuses)
    what = "interrupted" if stopped else f"got {missing} of {len(jobs)} jobs unfinished"
    print(f"moma {verb}: {what}; run the same command to go on", file=sys.stderr)
    return 130 if stopped else 1


def plan(verb: str, overrides: list[str], name: str = "") -> list[Job]:
    """All jobs of a sweep, each composed; ValueError for the first that is wrong, and for two with one folder."""
    given = points(verb, overrides)
    common = set(given[0]).intersection(*given)
    jobs: list[Job] = []
    for number, own in enumerate(given):
        shown = " ".join(override for override in own if override not in common)
        try:
            composed = compose(verb, own)
        except ValueError as error:
            raise ValueError(f"job {number} ({shown}): {error}" if shown else str(error)) from error
        text = json.dumps([verb, composed.resolved], sort_keys=True, default=str)
        log = composed.resolved.get("log", {})
        if name and log.get("kind") == "wandb" and log.get("group") is None:
            own = [*own, f"log.group={name}"]
        folder = str(FOLDERS[verb](composed))
        jobs.append(Job(number, own, shown, folder, hashlib.sha256(text.encode()).hexdigest()))
    _refuse_shared(verb, jobs)
    return jobs


def run_job(directory: Path, verb: str, jobs: list[Job], parent: int, number: int, overrides: list[str]) -> None:
    """Run one job's command to its end and record how it ended; called by Hydra's launcher, wherever that is.

    Raises only what stops the sweep. In a Slurm job of several tasks each of them calls it, as one process of the
    group, and the first one keeps the record. `parent`: the sweep's own process, which a terminal's Ctrl-C is for.
    """
    job, stop = jobs[number], directory / "stop"
    assert job.overrides[: len(overrides)] == overrides, (job.overrides, overrides)
    if stop.exists() or _finished(verb, job, _record(directory, job)):
        return
    group = launch.slurm_group(os.environ) if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else {}
    rank = group.get("RANK", "0")
    suffix = "" if rank == "0" else f"-{rank}"
    folder = directory / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    label = f"job {number}:"

    def note(words: str, **values: Any) -> None:
        if rank == "0":
            _note(folder, job, **values)
            print(f"{label} {words}", flush=True)

    began = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **group}
    paths = [folder / f"{name}{suffix}.txt" for name in ("stdout", "stderr")]
    with (
        paths[0].open("wb") as out,
        paths[1].open("wb") as err,
        paths[0].open("rb") as shown,
        _signals(parent) as after,
    ):
        child = launch.start([*launch.MOMA, verb, *job.overrides], environment, signal.SIGTERM, out, err)
        note(f"{job.shown or verb} -> {job.folder}", status="running", pid=child.pid)
        reason = _wait(child, stop, shown, label if rank == "0" else None)
    seconds = round(time.monotonic() - began, 1)
    how = launch.ending(child.returncode)
    if child.returncode:
        lines = paths[1].read_text(errors="replace").splitlines()[-LAST_LINES:]
        status = "failed" if reason is None and not stop.exists() else "stopped"
        note(f"{status} {how}: {_said(lines)}", status=status, ended=how, seconds=seconds, stderr=lines)
    else:
        status = "finished" if _done(verb, job) else "stopped"
        note(f"{status} after {seconds:.0f} s", status=status, ended=how, seconds=seconds)
    if isinstance(reason, _HandOver):
        after(reason.args[0], None)
    elif reason is not None:
        raise reason


def _wait(child: Any, stop: Path, shown: BinaryIO, label: str | None) -> BaseException | None:
    """Wait for a job's process, showing the lines it prints; stops it in order once `stop` is there, or when
    interrupted, which is returned."""
    reason: BaseException | None = None
    asked, rest = False, b""

    def show() -> None:
        nonlocal rest
        *lines, rest = (rest + shown.read()).split(b"\n")
        if label is not None:
            for line in lines:
                print(f"{label} {line.decode(errors='replace')}", flush=True)

    while True:
        try:
            while child.poll() is None:
                if not asked and stop.exists():
                    child.send_signal(signal.SIGTERM)
                    asked = True
                time.sleep(POLL_S)
                show()
            show()
            return reason
        except (KeyboardInterrupt, SystemExit, _HandOver) as error:
            if not asked or isinstance(error, KeyboardInterrupt):
                child.send_signal(signal.SIGKILL if asked else signal.SIGTERM)
            asked, reason = True, reason or error


@contextmanager
def _signals(parent: int) -> Iterator[Callable[[int, Any], Any]]:
    """Put off what a cluster's launcher does at SIGUSR1 or SIGUSR2 (submitit queues the job again, which ends it) until
    the run is saved; yields its own handler. Outside the sweep's own process, Ctrl-C is left to that one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    taken = {number: handler for number, handler in before.items() if callable(handler)}
    changed: dict[signal.Signals, Any] = dict(taken)

    def hand_over(number: int, frame: Any) -> None:
        raise _HandOver(number)

    for number in taken:
        signal.signal(number, hand_over)
    if os.getpid() != parent:
        with suppress(ValueError):  # in a thread
            changed[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield lambda number, frame: taken[signal.Signals(number)](number, frame)
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


@contextmanager
def _stopping(stop: Path) -> Iterator[None]:
    """The first SIGTERM or SIGINT makes the file that jobs look for, a second one interrupts this process."""

    def ask(number: int, frame: Any) -> None:
        if stop.exists():
            raise KeyboardInterrupt
        stop.touch()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _place(verb: str, overrides: list[str]) -> tuple[str, Path]:
    """Name and folder of a sweep: the same for the same command, whatever launches it."""
    given = [override.partition("=")[2] for override in overrides if override.startswith("hydra.sweep.dir=")]
    if given:
        folder = Path(given[-1].strip("'\""))
        return folder.name, folder
    what = sorted(override for override in overrides if not re.match(r"hydra[./]launcher", override))
    digest = hashlib.sha256("\0".join([verb, *what]).encode()).hexdigest()[:8]
    experiment = [override.partition("=")[2] for override in what if re.match(r"\+?experiment=", override)]
    name = f"{re.sub(r'[^0-9A-Za-z_.]+', '-', experiment[0]) if experiment else verb}-{digest}"
    return name, ROOT / name


def _refuse_shared(verb: str, jobs: list[Job]) -> None:
    by_folder: dict[str, Job] = {}
    for job in jobs:
        other = by_folder.setdefault(os.path.normpath(job.folder), job)
        if other is not job:
            key, value = ("out", "runs/evaluations/...") if verb == "evaluate" else ("run_dir", "runs/lr/...")
            example = "" if verb == "evaluate" else ", as in run_dir='runs/lr/${optim.lr}-s${seed.init}'"
            raise ValueError(
                f"got jobs {other.number} ({other.shown}) and {job.number} ({job.shown}) that share {job.folder}, need "
                f"a place for each, which not every key has in its name: add {key}={value} with what you sweep{example}"
            )


def _record(directory: Path, job: Job) -> dict[str, Any]:
    """What the job's record says; empty without one, or where it is of another configuration."""
    try:
        record = json.loads((directory / str(job.number) / "job.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("digest") == job.digest else {}


def _note(folder: Path, job: Job, **values: Any) -> None:
    record = {**job._asdict(), "host": os.uname().nodename, "time": round(time.time()), **values}
    _write(folder / "job.json", record)


def _write(path: Path, record: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def _finished(verb: str, job: Job, record: dict[str, Any]) -> bool:
    return record.get("status") == "finished" and _done(verb, job)


def _done(verb: str, job: Job) -> bool:
    """Whether what the job was to make is there: a run at its last step, an evaluation of the newest checkpoint."""
    folder = Path(job.folder)
    newest = locate("moma.checkpoint:latest")
    if verb == "evaluate":
        if not folder.is_file():
            return False
        run = newest(folder.parent / "checkpoints")
        return run is None or run.stat().st_mtime <= folder.stat().st_mtime
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None:
        return False
    if verb == "upcycle":
        return (folder / "upcycle.json").is_file()
    meta = locate("moma.checkpoint:read_meta")(checkpoint)
    return meta["step"] >= meta["total_steps"]


def _write_summary(directory: Path, verb: str, overrides: list[str], jobs: list[Job]) -> list[str]:
    """Write sweep.json; the status of every job in a word or a line."""
    statuses, listed = [], []
    for job in jobs:
        record = _record(directory, job)
        status = str(record.get("status", "not started"))
        if status == "finished" and not _done(verb, job):
            status = "not started"
        statuses.append(f"failed {record['ended']}: {_said(record['stderr'])}" if status == "failed" else status)
        listed.append({**job._asdict(), "status": status, "ended": record.get("ended")})
    command = shlex.join(["moma", verb, "-m", *overrides])
    _write(directory / "sweep.json", {"command": command, "verb": verb, "name": directory.name, "jobs": listed})
    return statuses


def _said(lines: list[str]) -> str:
    """The line of stderr that says most: a mistake in moma's own words, else the last one."""
    return next((line for line in lines if line.startswith("moma ")), lines[-1] if lines else "nothing on stderr")


def _print_table(jobs: list[Job], statuses: list[str]) -> None:
    shown, folder = (max(len(getattr(job, name)) for job in jobs) for name in ("shown", "folder"))
    print(f"\njob  {'choices':<{shown}}  {'folder':<{folder}}  status")
    for job, status in zip(jobs, statuses, strict=True):
        print(f"{job.number:>3}  {job.shown:<{shown}}  {job.folder:<{folder}}  {status}")
