"""Sweeps: jobs as processes, records, failures, stopping, going on. Most jobs are a small script in moma's place."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from moma import cli, config, launch, sweep
from moma.data.synthetic import write_synthetic

# `python -c SCRIPT train OVERRIDES...`: what it does depends on files beside its run folder
SCRIPT = """
import os, signal, sys, time
run = [o.partition("=")[2] for o in sys.argv if o.startswith("folder=")][-1].strip("'")
print("started", *sys.argv[2:], flush=True)
if os.path.exists(run + ".fail"):
    sys.exit("noise\\nmoma train: got a reason, need another: change it\\nmore noise")
if os.path.exists(run + ".die"):
    os.kill(os.getpid(), signal.SIGKILL)
if os.path.exists(run + ".wait"):
    signal.signal(signal.SIGTERM, lambda *_: (print("stopped in order", flush=True), sys.exit(0)))
    if "stubborn" in open(run + ".wait").read():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("waiting", flush=True)
    time.sleep(60)
os.makedirs(run, exist_ok=True)
open(run + "/done", "a").write("x")
"""
GIVEN = ["feed_forward=dense,moe_8x", "seed=0,1", "run_dir='out/${feed_forward.kind}-${seed.init}'"]
FOLDERS = ["out/dense-0", "out/dense-1", "out/sparse-0", "out/sparse-1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, where a job's command is SCRIPT and a run with a file `done` is finished."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(launch, "MOMA", (sys.executable, "-S", "-c", SCRIPT))
    monkeypatch.setattr(sweep, "POLL_S", 0.02)
    monkeypatch.setattr(sweep, "_done", lambda verb, job: (Path(job.folder) / "done").exists())
    start = launch.start

    def given(command, environment, *rest):  # with the folder, since the script cannot interpolate
        number = int(Path(rest[1].name).parent.name)
        return start([*command, f"folder={planned[number].folder}"], environment, *rest)

    monkeypatch.setattr(launch, "start", given)
    plan, planned = sweep.plan, []
    monkeypatch.setattr(sweep, "plan", lambda *rest: planned.__setitem__(slice(None), plan(*rest)) or list(planned))
    (tmp_path / "out").mkdir()
    return tmp_path


def records(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/sweeps/*/*/job.json"))]


def test_a_failed_job_is_recorded_and_the_same_command_finishes(place, capfd):
    for name in ("dense-1.fail", "sparse-0.die"):
        (place / "out" / name).touch()
    assert cli.main(["train", "-m", *GIVEN]) == 1
    captured = capfd.readouterr()
    reason = "failed with status 1: moma train: got a reason, need another: change it"
    assert f"job 1: {reason}\n" in captured.out
    table = captured.out.split("\n\n")[1].splitlines()
    assert [line.split()[:4] for line in table[1:]] == [
        [str(n), f"feed_forward={ff}", f"seed={seed}", FOLDERS[n]]
        for n, (ff, seed) in enumerate([("dense", 0), ("dense", 1), ("moe_8x", 0), ("moe_8x", 1)])
    ]
    assert [line.split(maxsplit=4)[4] for line in table[1:]] == [
        "finished", reason, "failed by signal 9 (SIGKILL): nothing on stderr", "finished",
    ]  # fmt: skip
    assert captured.err == "moma train: got 2 of 4 jobs unfinished; run the same command to go on\n"
    got = records(place)
    assert [r["status"] for r in got] == ["finished", "failed", "failed", "finished"]
    assert got[1]["stderr"][0] == "noise" and got[1]["folder"] == "out/dense-1"
    assert "seed=1" in got[1]["overrides"] and got[1]["ended"] == "with status 1"
    for name in ("dense-1.fail", "sparse-0.die"):
        (place / "out" / name).unlink()
    assert cli.main(["train", "-m", *GIVEN]) == 0
    assert "4 jobs, 2 finished, 2 to do" in capfd.readouterr().out
    assert [(place / folder / "done").read_text() for folder in FOLDERS] == ["x"] * 4  # each once
    (summary,) = place.glob("runs/sweeps/*/sweep.json")
    summary = json.loads(summary.read_text())
    assert [job["status"] for job in summary["jobs"]] == ["finished"] * 4
    assert summary["command"].startswith("moma train -m feed_forward=dense,moe_8x seed=0,1 ")
    assert sorted(path.name for path in place.iterdir()) == ["out", "runs"]  # none of Hydra's own folders


def signal_when(path_of, text, number, times=1):
    def wait():
        until = time.monotonic() + 30
        while time.monotonic() < until and not any(text in p.read_text() for p in path_of()):
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "how"), [(signal.SIGINT, ""), (signal.SIGTERM, "stubborn")])
def test_a_signal_stops_the_running_job_and_starts_no_other(place, capfd, number, how):
    (place / "out/dense-1.wait").write_text(how)
    command = ["train", "-m", "feed_forward=dense", "seed=0,1,2", GIVEN[-1]]
    before = signal.getsignal(number)
    thread = signal_when(lambda: place.glob("runs/sweeps/*/1/stdout.txt"), "waiting", number, 2 if how else 1)
    assert cli.main(command) == 130
    thread.join()
    captured = capfd.readouterr()
    assert captured.err == "moma train: interrupted; run the same command to go on\n"
    assert ("job 1: stopped in order" in captured.out) is not bool(how)
    statuses = [line.split(maxsplit=3)[3] for line in captured.out.split("\n\n")[1].splitlines()[1:]]
    assert statuses == ["finished", "stopped", "not started"]
    assert records(place)[1]["ended"] == ("by signal 9 (SIGKILL)" if how else "with status 0")
    assert signal.getsignal(number) == before
    if not how:
        (place / "out/dense-1.wait").unlink()
        assert cli.main(command) == 0


def test_a_job_for_weights_and_biases_belongs_to_the_sweep(monkeypatch):
    jobs = sweep.plan("train", ["feed_forward=dense,moe_8x", "log=wandb"], "mine")
    assert [job.overrides[-1] for job in jobs] == ["log.group=mine"] * 2
    assert sweep.plan("train", ["log=wandb", "log.group=own"], "mine")[0].overrides[-1] == "log.group=own"
    assert sweep._place("train", ["seed=0,1", "hydra/launcher=joblib"]) == sweep._place("train", ["seed=0,1"])
    assert sweep._place("train", ["experiment=fig3"])[0].startswith("fig3-")
    assert sweep._place("train", ["hydra.sweep.dir=runs/mine"]) == ("mine", Path("runs/mine"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["optim.lr=1e-3,1e-4"],
            "got jobs 0 (optim.lr=0.001) and 1 (optim.lr=0.0001) that share runs/emoji/tiny-moe_4t4i-s0, need a place "
            "for each, which not every key has in its name: add run_dir=runs/lr/... with what you sweep, as in "
            "run_dir='runs/lr/${optim.lr}-s${seed.init}'",
        ),
        (["seed=0,1", "optim.lr=x"], "job 0 (seed=0): got optim.lr='x' (str), need float: change optim.lr"),
        (["feed_forward=dense,x"], "job 1 (feed_forward=x): got feed_forward=x, need one of dense, "),
    ],
)
def test_a_wrong_job_is_named_before_the_first_one_starts(place, capfd, given, message):
    assert cli.main(["train", "-m", *given]) == 2
    assert message in capfd.readouterr().err and not (place / "runs").exists()


def test_a_sweep_is_no_member_of_a_process_group(place, monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cli.main(["train", "-m", "seed=0,1"]) == 2
    assert "got -m inside a process group, need a process outside: start the sweep without" in capfd.readouterr().err


def test_the_run_is_saved_before_a_cluster_queues_its_job_again(place, capfd):
    """submitit's handler of SIGUSR2 ends the job: it gets its turn once the run has stopped in order."""
    (place / "out/dense-0.wait").touch()
    jobs = sweep.plan("train", GIVEN)
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(records(place)[0]["status"]))
    thread = signal_when(lambda: place.glob("runs/sweeps/x/0/stdout.txt"), "waiting", signal.SIGUSR2)
    try:
        sweep.run_job(place / "runs/sweeps/x", "train", jobs, os.getpid(), 0, jobs[0].overrides)
    finally:
        signal.signal(signal.SIGUSR2, before)
    thread.join()
    assert heard == ["stopped"] and "job 0: stopped in order" in capfd.readouterr().out


@pytest.mark.slow
def test_a_real_sweep_crashes_and_finishes_on_repetition(tmp_path, monkeypatch, capfd):
    tokenizer, corpus, _ = write_synthetic(tmp_path / "made", pairs=30, texts=30)
    monkeypatch.chdir(tmp_path)
    command = [
        "train", "-m", "data.corpus=made/corpus,made/late", "run_dir=runs/${data.corpus}", f"tokenizer={tokenizer}",
        "duration={steps:2}", "data.rows=2", "data.row_length=96", "data.images=4", "model.dim=32", "model.n_layers=1",
        "model.n_heads=2", "feed_forward=dense", "precision=fp32", "parallel.threads=1", "eval.interval=null",
    ]  # fmt: skip
    assert cli.main(command) == 1
    assert [record["status"] for record in records(tmp_path)] == ["finished", "failed"]
    assert "late" in capfd.readouterr().out.splitlines()[-1]
    (tmp_path / "made/late").symlink_to(corpus)
    assert cli.main(command) == 0
    assert "2 jobs, 1 finished, 1 to do" in capfd.readouterr().out
    for name in ("corpus", "late"):
        rows = (tmp_path / "runs/made" / name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["step"] == 2


def test_a_slurm_job_is_one_task_per_gpu_that_is_warned_before_its_end(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    scripts = []

    def map_array(executor, function, *jobs):
        slurm = executor._executor
        slurm._throttle = lambda: None
        with_array = {**slurm.parameters, "map_count": len(jobs[0])}
        slurm.parameters = with_array
        scripts.append(slurm._make_submission_file_text("python job.py", "uid"))
        return []

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", map_array)
    given = ["hydra/launcher=slurm", "hydra.launcher.nodes=4", "hydra.launcher.partition=gpu", "seed=0,1,2"]
    config.multirun("train", given, tmp_path / "sweep", "fig3-1234", print)
    lines = set(scripts[0].splitlines())
    assert lines >= {
        "#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --ntasks-per-node=8", "#SBATCH --cpus-per-task=8",
        "#SBATCH --time=1440", "#SBATCH --signal=USR2@120", "#SBATCH --partition=gpu", "#SBATCH --array=0-2%3",
        "#SBATCH --job-name=fig3-1234", "#SBATCH --open-mode=append",
    }  # fmt: skip
    assert any(line.startswith("srun ") and line.endswith("python job.py") for line in lines)
