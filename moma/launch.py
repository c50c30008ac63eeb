"""Several processes of one command on this machine that form one process group: `moma train parallel.processes=N`.

    moma train parallel.processes=2 ...             starts the others, passes signals on, waits; no member itself
      |- python -m moma.cli train ...   RANK=0      the same overrides, in the group that the variables of
      '- python -m moma.cli train ...   RANK=1      `torchrun` announce (`distributed.process_group`)

`torchrun` starts the same processes, but answers SIGTERM by killing them after 30 s, which a step and a checkpoint may
not fit into, and never ends with 0 then. Here:

    SIGTERM, SIGINT     passed on to every process once; waits as long as they need; 0 if all end with 0
    a second one        kills them
    one process dies    the others may end by themselves for `grace_s`, then SIGTERM, then SIGKILL: 2, and which it was
    this process dies   the kernel kills the others

The processes meet at a store that this process holds: its port is chosen by the kernel, so no other program can have
it. Refuses to start processes inside a process group. Linux only (`prctl`). Imports torch for the store alone.
"""

import contextlib
import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

GROUP = "TORCHELASTIC_RUN_ID"  # set: this process is a member of a process group
MOMA = (sys.executable, "-m", "moma.cli")
GRACE_S = 60.0  # an asynchronous checkpoint that is on its way to the disk when another process dies may become whole
KILL_S = 10.0
POLL_S = 0.05
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def wanted(processes: int | None) -> bool:
    """Whether this process is to start `processes` others, rather than do the work itself.

    A member of a process group does the work. Raises ValueError where its group has another size.
    """
    if GROUP not in os.environ:
        return processes is not None and processes > 1
    world = os.environ.get("WORLD_SIZE", "")
    if processes is not None and str(processes) != world:
        raise ValueError(
            f"got parallel.processes={processes} in a process group of {world}, need one or the other: leave "
            "parallel.processes out under torchrun, or start the command without torchrun"
        )
    return False


def run_processes(
    arguments: Sequence[str],
    n: int,
    command: Sequence[str] = MOMA,
    address: tuple[str, int] | None = None,
    grace_s: float = GRACE_S,
    kill_s: float = KILL_S,
) -> int:
    """Run `command` + `arguments` as `n` processes of one group, until all have ended; returns the exit status.

    0: all ended with 0. 2: one died, named on stderr. 130: ended by signals before they could save. If all end alike
    by themselves, as with a mistake that each of them names, theirs. `address`: a store there is already.
    """
    asked: list[int] = []
    with _signals(asked.append), _store(n, address) as (host, port):
        shared = {GROUP: secrets.token_hex(8), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        # clients of the store of this process, as under torchrun, whose number of restarts is part of it
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        shared |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
        shared |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(n):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                workers.append(start([*command, *arguments], {**os.environ, **shared, **own}, signal.SIGKILL))
            return _supervise(workers, asked, grace_s, kill_s)
        finally:  # nothing to do unless starting or supervising failed
            _send(workers, signal.SIGKILL)


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    death: signal.Signals,
    stdout: IO[Any] | None = None,
    stderr: IO[Any] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that a terminal's Ctrl-C reaches it through this one alone.

    It gets the signal `death` when this process (its main thread) dies. It ignores SIGUSR1 and SIGUSR2, which clusters
    send to every process of a job.
    """
    parent = os.getpid()

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(death))
        if os.getppid() != parent:  # died before the line above
            os._exit(1)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    return subprocess.Popen(
        command, env=dict(environment), stdout=stdout, stderr=stderr, start_new_session=True, preexec_fn=prepare
    )


def ending(status: int) -> str:
    """How a process ended, in words, from its return code as `subprocess` gives it."""
    if status >= 0:
        return f"with status {status}"
    with contextlib.suppress(ValueError):
        return f"by signal {-status} ({signal.Signals(-status).name})"
    return f"by signal {-status}"


def slurm_group(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that make the tasks of a Slurm job step one process group; empty for a single task.

    One task per GPU (`srun`, or submitit's tasks_per_node). The first task holds the store, on the first node, at a
    port derived from the number of the job. Raises ValueError for a job whose nodes cannot be read.
    """
    world = int(environment.get("SLURM_NTASKS", 1))
    if world == 1:
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", nodes)  # n[007-010,012],m3: a name, or names with ranges
    if found is None:
        raise ValueError(f"got SLURM_NTASKS={world} and the nodes {nodes!r}, need their names: start it with srun")
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "")))
    job = environment["SLURM_JOB_ID"]
    return {
        GROUP: f"slurm-{job}",
        "MASTER_ADDR": found[1] + (found[2] or ""),
        "MASTER_PORT": str(20000 + int(job) % 20000),
        "WORLD_SIZE": str(world),
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[0] if tasks else str(world),
    }


def _supervise(workers: list[subprocess.Popen[bytes]], asked: list[int], grace_s: float, kill_s: float) -> int:
    """Wait for all; see the module docstring. `asked` grows by the signals that this process gets."""
    passed, first, since, pressure = 0, None, 0.0, 0
    while True:
        states = [worker.poll() for worker in workers]
        if len(asked) > passed:
            _send(workers, signal.Signals(asked[0]) if passed == 0 else signal.SIGKILL)
            passed = len(asked)
        died = [(status > 0, rank) for rank, status in enumerate(states) if status]  # by a signal before by itself
        if died and first is None:
            first, since = min(died)[1], time.monotonic()
        if None not in states:
            break
        if first is not None:
            waited = time.monotonic() - since
            due = 0 if waited < grace_s else 1 if waited < grace_s + kill_s else 2
            if due > pressure:
                _send(workers, signal.SIGTERM if due == 1 else signal.SIGKILL)
                pressure = due
        time.sleep(POLL_S)
    statuses = [worker.returncode for worker in workers]
    if first is None:
        return 0
    if asked:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    if not pressure and len(set(statuses)) == 1 and statuses[0] > 0:
        return statuses[0]
    print(
        f"got process {first} of {len(workers)} ended {ending(statuses[first])}, need all: the others were stopped; "
        "run the same command to go on from the last checkpoint",
        file=sys.stderr,
    )
    return 2


def _send(workers: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for worker in workers:
        worker.send_signal(number)  # does nothing to one that has ended


@contextlib.contextmanager
def _store(n: int, address: tuple[str, int] | None) -> Iterator[tuple[str, int]]:
    """Host and port of the store where the processes meet: it lives as long as this context."""
    if address is not None:
        yield address
        return
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, n, is_master=True, wait_for_workers=False)
    yield "127.0.0.1", store.port
    del store


@contextlib.contextmanager
def _signals(note: Callable[[int], None]) -> Iterator[None]:
    """Note every SIGTERM and SIGINT instead of dying of it."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda got, frame: note(got)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
