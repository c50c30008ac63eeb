"""Starting and supervising the processes of one group: signals, deaths, messages. The processes are small scripts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moma import launch

AT = ("127.0.0.1", 1)  # a store that nobody asks
GROUP_VARIABLES = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in GROUP_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def script(text):
    """A worker: `rank`, `note(word)` writes a file NAME-rank into the folder given as argument."""
    head = (
        "import os, signal, sys, time\n"
        "rank, folder = int(os.environ['RANK']), sys.argv[1]\n"
        "def note(word): open(os.path.join(folder, f'{word}-{rank}'), 'a').write('x')\n"
        "def on(number, then): signal.signal(number, lambda *_: then())\n"
    )
    return (sys.executable, "-S", "-c", head + text)


def when(folder, names, act):
    """Do `act` in a thread once all files are there."""

    def wait():
        until = time.monotonic() + 20
        while not all((folder / name).exists() for name in names) and time.monotonic() < until:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def run(folder, text, n=2, **given):
    return launch.run_processes([str(folder)], n, script(text), AT, **given)


def test_every_process_gets_its_place_in_the_group(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    text = "import json; json.dump(dict(os.environ), open(os.path.join(folder, f'{rank}.json'), 'w'))"
    assert run(tmp_path, text, 3) == 0
    got = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [(e["RANK"], e["LOCAL_RANK"]) for e in got] == [("0", "0"), ("1", "1"), ("2", "2")]
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        assert {e[name] for e in got} == {"3"}
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"], e["OMP_NUM_THREADS"]) for e in got} == {("127.0.0.1", "1", "1")}
    assert len({e["TORCHELASTIC_RUN_ID"] for e in got}) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_a_stop_in_order_is_a_success(tmp_path, number, capfd):
    text = (
        "on(signal.SIGTERM, lambda: note('got')); on(signal.SIGINT, lambda: note('got')); note('up')\n"
        "while not os.path.exists(os.path.join(folder, f'got-{rank}')): time.sleep(0.01)\n"
        "time.sleep(0.3)\n"  # a step and a checkpoint: nobody hurries it
    )
    before = signal.getsignal(number)
    thread = when(tmp_path, ["up-0", "up-1"], lambda: os.kill(os.getpid(), number))
    assert run(tmp_path, text, grace_s=0.05, kill_s=0.05) == 0
    thread.join()
    assert [(tmp_path / f"got-{rank}").read_text() for rank in (0, 1)] == ["x", "x"]
    assert capfd.readouterr().err == "" and signal.getsignal(number) == before


def test_a_second_signal_kills(tmp_path, capfd):
    text = "on(signal.SIGTERM, lambda: note('got')); note('up')\nwhile True: time.sleep(0.01)\n"
    threads = [
        when(tmp_path, ["up-0", "up-1"], lambda: os.kill(os.getpid(), signal.SIGTERM)),
        when(tmp_path, ["got-0", "got-1"], lambda: os.kill(os.getpid(), signal.SIGTERM)),
    ]
    assert run(tmp_path, text) == 130
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err == "interrupted; run the same command to go on\n"


def test_others_may_end_by_themselves_when_one_dies(tmp_path, capfd):
    text = "if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.3); note('saved'); sys.exit(1)\n"
    assert run(tmp_path, text, grace_s=20) == 2
    assert (tmp_path / "saved-0").exists()
    assert capfd.readouterr().err == (
        "got process 1 of 2 ended by signal 9 (SIGKILL), need all: the others were stopped; "
        "run the same command to go on from the last checkpoint\n"
    )


def test_others_that_do_not_end_are_asked_and_then_killed(tmp_path, capfd):
    text = (
        "if rank == 1: time.sleep(0.2); sys.exit(7)\n"
        "on(signal.SIGTERM, lambda: note('asked') or rank or sys.exit(0))\n"
        "while True: time.sleep(0.01)\n"
    )
    began = time.monotonic()
    assert run(tmp_path, text, n=3, grace_s=0.1, kill_s=0.3) == 2
    assert 0.4 < time.monotonic() - began < 10
    assert (tmp_path / "asked-0").exists() and (tmp_path / "asked-2").exists()  # the last one did not mind
    assert "got process 1 of 3 ended with status 7, need all" in capfd.readouterr().err


def test_a_mistake_that_all_name_is_told_once(tmp_path, capfd):
    assert run(tmp_path, "sys.stderr.write('mistake\\n') if rank == 0 else None; sys.exit(2)") == 2
    assert capfd.readouterr().err == "mistake\n"


def test_nobody_outlives_the_process_that_started_them(tmp_path):
    worker = script(
        "note('up'); open(os.path.join(folder, f'pid-{rank}'), 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from moma import launch; launch.run_processes([{str(tmp_path)!r}], 2, {worker!r}, {AT!r})",
        ]
    )
    pids = []
    thread = when(tmp_path, ["up-0", "up-1"], lambda: time.sleep(0.2))
    thread.join()
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid):
    try:  # one that has died stays as a zombie where nobody collects orphans
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_two_processes_meet_at_the_store_of_their_parent(tmp_path, monkeypatch):
    """A reduction over two processes that know nothing but the environment."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = (
        "import sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo'); value = torch.tensor(float(dist.get_rank() + 1)); dist.all_reduce(value)\n"
        "open(f'{sys.argv[1]}/{dist.get_rank()}', 'w').write(str(value.item())); dist.destroy_process_group()\n"
    )
    assert launch.run_processes([str(tmp_path)], 2, (sys.executable, "-c", text)) == 0
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["3.0", "3.0"]


def test_who_starts_others(monkeypatch):
    assert [launch.wanted(n) for n in (None, 1, 2)] == [False, False, True]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not launch.wanted(None) and not launch.wanted(4)
    with pytest.raises(ValueError, match="got parallel.processes=2 in a process group of 4, need one or the other: "):
        launch.wanted(2)


def test_tasks_of_a_slurm_job_are_one_group():
    assert launch.slurm_group({}) == {} == launch.slurm_group({"SLURM_NTASKS": "1"})
    job = {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
    job |= {"SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_JOB_NODELIST": "gpu-[007-008,011],other3"}
    assert launch.slurm_group(job) == {
        "TORCHELASTIC_RUN_ID": "slurm-123456", "MASTER_ADDR": "gpu-007", "MASTER_PORT": "23456", "WORLD_SIZE": "16",
        "RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8",
    }  # fmt: skip
    assert launch.slurm_group(job | {"SLURM_JOB_NODELIST": "a1,a2"})["MASTER_ADDR"] == "a1"
    with pytest.raises(ValueError, match="got SLURM_NTASKS=16 and the nodes '', need their names: start it with srun"):
        launch.slurm_group(job | {"SLURM_JOB_NODELIST": ""})
