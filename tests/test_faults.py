"""What a training does when something breaks: real processes, real faults, brought in from here.

One process imports everything once and forks a training for every request (`serve`), so that a test costs the seconds
of its steps. In the fork, before `moma train` runs, ACTIONS are tied to micro-batches: as the objective meets number n,
the process gets a signal, its file system fills up, a shard shrinks, a loss turns into nan.
"""

import ctypes
import errno
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moma import checkpoint
from moma.data.plan import Plan
from moma.data.shards import open_corpus
from moma.data.synthetic import write_synthetic
from moma.run import DataConfig

STEPS, ACCUMULATION = 8, 2


# ---- in the forked training -----------------------------------------------------------------------------------------
def serve() -> None:
    """Read requests from stdin, one JSON object a line: fork the ranks of a training, or wait for them."""
    import torch._dynamo  # what a training would import on its way

    import moma.cli
    import moma.train  # noqa: F401
    from moma.config import compose

    compose("train", [])  # Hydra's plugins too
    torch.set_num_threads(1)
    gc.freeze()  # a child's collector would write to, and so copy, every page of what it shares
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = [ended(pid, request["until"]) for pid in request["wait"]]
        else:
            answer = [fork(rank, request) for rank in range(request["world"])]
        print(json.dumps(answer), flush=True)
    os._exit(0)  # nothing to tidy up


def fork(rank: int, request: dict[str, Any]) -> int:
    """The process of one rank."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        world = str(request["world"])
        if request["world"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"]), "TORCHELASTIC_RUN_ID": "x"}
        os.environ |= request["environment"]
        bring_in(request["faults"])
        import moma.cli

        code = moma.cli.main(["train", *request["arguments"]])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, until: float) -> int | None:
    """Exit status of a child, negative for a signal; None (and killed) if it was still there."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.time() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)


def bring_in(faults: list[list[Any]]) -> None:
    """[when, action, values...]: an action at the start, at a micro-batch's number, or at the system call of a path."""
    from moma.data.batch import Batch
    from moma.objectives import OBJECTIVES

    config, objective = OBJECTIVES["next_token"]
    at: dict[int, list[list[Any]]] = {}
    for when, *action in faults:
        if when == "start":
            ACTIONS[action[0]](*action[1:])
        elif when == "call":
            die_at(*action)
        else:
            at.setdefault(when, []).append(action)

    def disturbed(*given: Any) -> Any:
        batch = next(one for one in given if isinstance(one, Batch))
        model = given[1]
        poisons = []
        for name, *values in at.get(batch.number, []):
            if name in POISONS:
                poisons.append(POISONS[name])
            elif name == "nan_parameter":
                next(model.parameters()).data.view(-1)[0] = float("nan")
            else:
                ACTIONS[name](*values)
        loss, tallies, seen = objective(*given)
        for poison in poisons:
            loss, tallies = poison(loss, tallies)
        return loss, tallies, seen

    OBJECTIVES["next_token"] = (config, disturbed)  # type: ignore[assignment]


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


def nan_loss(loss: torch.Tensor, tallies: Any) -> Any:
    return loss * float("nan"), {name: tally * float("nan") for name, tally in tallies.items()}


def infinite_gradient(loss: torch.Tensor, tallies: Any) -> Any:
    return _InfiniteGradient.apply(loss), tallies


def send(*numbers: int) -> None:
    """Signals to this process, one right after the other."""
    for number in numbers:
        os.kill(os.getpid(), number)


def wait_for(path: str) -> None:
    """Until it is there: a checkpoint is written beside the training."""
    until = time.monotonic() + 30
    while not os.path.exists(path) and time.monotonic() < until:
        time.sleep(0.002)


def limit_files(n_bytes: int) -> None:
    """Writes beyond this length of a file fail with EFBIG: a disk (or a quota) that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def fill_disk_under(name: str) -> None:
    """The open file of this name goes to /dev/full from now on: every write fails with ENOSPC."""
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if path.endswith(f"/{name}"):
            os.dup2(os.open("/dev/full", os.O_WRONLY), int(descriptor))


def wait_for_wandb(seconds: float) -> None:
    """The time that its server has for the first answer."""
    import moma.log

    moma.log.WANDB_WAIT_S = seconds


def obey_modes() -> None:
    """Root reads and writes whatever the modes say; without these capabilities it does not. For later threads too."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, two sets of three
        assert libc.capget(header, data) == 0
        for place in (0, 1, 2):
            data[place] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


def die_at(name: str, part: str, when: str) -> None:
    """SIGKILL to this process before or after the system call `name` on a path that ends in `part`."""
    call = getattr(os, name)

    def deadly(*given: Any, **named: Any) -> Any:
        first = os.readlink(f"/proc/self/fd/{given[0]}") if isinstance(given[0], int) else os.fspath(given[0])
        if first.endswith(part) and when == "before":
            send(signal.SIGKILL)
        result = call(*given, **named)
        if first.endswith(part):
            send(signal.SIGKILL)
        return result

    setattr(os, name, deadly)


POISONS = {"nan_loss": nan_loss, "infinite_gradient": infinite_gradient}
ACTIONS = {
    "send": send, "sleep": time.sleep, "wait_for": wait_for, "limit_files": limit_files,
    "fill_disk_under": fill_disk_under, "obey_modes": obey_modes, "chmod": os.chmod, "truncate": os.truncate,
    "wait_for_wandb": wait_for_wandb,
}  # fmt: skip


# ---- in the test ----------------------------------------------------------------------------------------------------
class Ended(NamedTuple):
    """What a training left: exit status per rank (None: it had to be killed), its words, its seconds."""

    codes: list[int | None]
    text: str
    seconds: float


class Server:
    """Trainings on request; one made-up corpus for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer, self.corpus, self.vocab = write_synthetic(folder / "made", pairs=60, texts=60)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._count = 0

    def ask(self, request: dict[str, Any]) -> list[Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def begin(self, run: Path, *overrides: str, world: int = 1, faults: Any = (), environment: Any = None) -> Any:
        """Start a training of STEPS steps, a checkpoint every second; overrides come last."""
        self._count += 1
        out = self.folder / f"out-{self._count}.txt"
        out.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = [
            f"tokenizer={self.tokenizer}", f"data.corpus={self.corpus}", f"run_dir={run}", "data.rows=2",
            "data.row_length=64", "data.images=3", f"data.accumulation={ACCUMULATION}", "model.dim=32",
            "model.n_layers=1", "model.n_heads=2", "precision=fp32", "parallel.threads=1", "parallel.device=cpu",
            "optim.lr=1e-2", "eval.interval=null", f"duration={{steps:{STEPS}}}", "log.interval=1",
            "checkpoint.interval={steps:2}", *overrides,
        ]  # fmt: skip
        request = {
            "arguments": arguments, "world": world, "faults": list(faults), "out": str(out), "port": port,
            "environment": environment or {},
        }  # fmt: skip
        return self.ask(request), out, time.monotonic()

    def end(self, begun: Any, within: float = 60.0) -> Ended:
        """Wait for its processes."""
        pids, out, start = begun
        codes = self.ask({"wait": pids, "until": time.time() + within})
        return Ended(codes, out.read_text(), time.monotonic() - start)

    def train(self, run: Path, *overrides: str, **how: Any) -> Ended:
        return self.end(self.begin(run, *overrides, **how))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("faults"))
    yield server
    server.close()


@pytest.fixture(scope="module", autouse=True)
def unreachable(server: Server) -> Iterator[Any]:
    """A training whose W&B server refuses connections: it waits for ten seconds, so the other tests go on meanwhile."""
    with socket.socket() as closed:  # bound, never listening
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
        own, faults = ("log=wandb", "log.mode=online"), [["start", "wait_for_wandb", 1.0]]
        yield server.begin(server.folder / "unreachable", *own, environment=environment, faults=faults)


@pytest.fixture(scope="module")
def whole(server: Server) -> Path:
    """A run that nothing disturbs."""
    done = server.train(server.folder / "whole", "checkpoint.keep_last=0")
    assert done.codes == [0], done.text
    return server.folder / "whole"


def whole_at(run: Path, step: int, number: int, *action: Any) -> list[list[Any]]:
    """Faults: an action at a micro-batch's number, once the checkpoint of `step` is whole."""
    return [[number, "wait_for", str(run / "checkpoints" / f"step-{step:08d}")], [number, *action]]


def steps(run: Path) -> list[int]:
    """Of the whole checkpoints."""
    return [int(path.name[5:]) for path in checkpoint._complete(run / "checkpoints")]


def state(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state of a checkpoint, the newest one if none is named."""
    root = run / "checkpoints"
    path = root / f"step-{step:08d}" if step else checkpoint.latest(root)
    assert path is not None
    return {f"{g}/{n}": t for g in ("model", "optimizer") for n, t in checkpoint.read_tensors(path, g).items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in lines(run)]


def goes_on(server: Server, run: Path, whole: Path, step: int, *overrides: str) -> None:
    """The same command goes on behind the checkpoint of `step` and ends as if nothing had been."""
    assert steps(run)[-1] == step
    done = server.train(run, *overrides)
    assert done.codes == [0] and f"resume at step {step}," in done.text, done.text
    assert losses(run) == losses(whole) and equal(state(run), state(whole))
    assert not list((run / "checkpoints").glob(f"{checkpoint.TMP}*"))


def said(text: str, *wanted: str) -> str:
    """The one line on stderr with which a command refuses; it holds all that is `wanted`."""
    found = [line for line in text.splitlines() if line.startswith("moma train: ")]
    assert len(found) == 1 and "Traceback" not in text, text
    assert all(part in found[0] for part in wanted), found[0]
    return found[0]


# ---- asked to stop --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("world", "shard", "number", "who"),
    [(1, False, signal.SIGTERM, 6), (2, False, signal.SIGTERM, 7), (2, True, signal.SIGINT, 6)],
)
def test_a_signal_to_any_rank_stops_all_after_the_same_step(
    server: Server, whole: Path, tmp_path: Path, world: int, shard: bool, number: int, who: int
) -> None:
    """Micro-batch 6 of step 4 is the first rank's, 7 the second's; that step is neither logged nor saved."""
    own = (f"parallel.shard={str(shard).lower()}", "log.interval=1000", "checkpoint.interval={steps:1000}")
    done = server.train(tmp_path / "run", *own, world=world, faults=[[who, "send", number]])
    assert done.codes == [0] * world, done.text
    assert done.text.count("run the same command to go on") == 1
    assert "stopped after step 4 of 8: run the same command to go on" in done.text
    assert steps(tmp_path / "run") == [4]
    if world == 1:
        assert equal(state(tmp_path / "run"), state(whole, 4))


def test_a_second_signal_ends_at_once(server: Server, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    faults = [*whole_at(run, 2, 6, "send", signal.SIGTERM), [6, "sleep", 1.1], [6, "send", signal.SIGTERM]]
    done = server.train(run, faults=faults)  # sooner, it would be the same request on another way
    assert done.codes == [-signal.SIGTERM]
    goes_on(server, run, whole, 2)


# ---- killed while it saves ------------------------------------------------------------------------------------------
def test_kill_9_at_any_point_of_a_save_leaves_the_last_whole_checkpoint(
    server: Server, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for call, part, when, newest in (
        ("fsync", ".tmp-step-00000004/__0_0.distcp", "before", 2),  # tensors, not yet on the disk
        ("fsync", ".tmp-step-00000004/meta.json", "after", 2),
        ("rename", ".tmp-step-00000004", "before", 2),
        ("rename", ".tmp-step-00000004", "after", 4),
        ("rename", "/step-00000004", "after", 6),  # retention has begun to remove it
    ):
        done = server.train(run, "checkpoint.keep_last=1", faults=[["call", call, part, when]])
        assert done.codes == [-signal.SIGKILL], (call, part, when, done.text)
        assert steps(run)[-1] == newest, (call, part, when)
        assert list((run / "checkpoints").glob(f"{checkpoint.TMP}*")) or newest == 4
    goes_on(server, run, whole, 6, "checkpoint.keep_last=1")
    assert steps(run) == [8]


# ---- losses and gradients that are not finite -----------------------------------------------------------------------
def documents(server: Server, number: int) -> list[list[Any]]:
    """Source, document, start and stop of what a micro-batch holds, from the plan itself."""
    shape = DataConfig(server.corpus, 2, 64, 3).shape
    plan = Plan(dict(open_corpus(server.corpus, "train", server.vocab.hash)), shape, 0, {})
    return [[p.source, p.doc, p.start, p.stop] for row in plan.micro_batch(number).rows for p in row]


@pytest.mark.parametrize(
    ("world", "shard", "poison", "what", "named"),
    [(1, "false", "nan_loss", "loss", [7]), (2, "true", "infinite_gradient", "gradient", [6, 7])],
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(
    server: Server, tmp_path: Path, world: int, shard: str, poison: str, what: str, named: list[int]
) -> None:
    run = tmp_path / "run"
    own = (f"parallel.shard={shard}", "checkpoint.interval={steps:1}", "checkpoint.keep_last=0")
    if world == 1:  # killed before a checkpoint holds the skipped step: it will be run, and named, again
        late = (*own, "checkpoint.interval={steps:1000}")
        assert server.train(run, *late, faults=[[7, poison], [9, "send", signal.SIGKILL]]).codes == [-signal.SIGKILL]
        assert (run / "skipped.jsonl").exists()
    done = server.train(run, *own, world=world, faults=[[7, poison]])
    assert done.codes == [0] * world, done.text
    (record,) = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert record["step"] == 4 and record["what"] == what
    assert [m["number"] for m in record["micro_batches"]] == named
    assert all(m["documents"] == documents(server, m["number"]) for m in record["micro_batches"])
    (line,) = [line for line in done.text.splitlines() if line.startswith("skipped ")]
    assert "step 4" in line and str(named) in line and str(run / "skipped.jsonl") in line
    states = {step: state(run, step) for step in steps(run)}
    last = max(step for step in states if step < 4)
    if 4 in states:
        assert equal(states[last], states[4])
    assert last == 3 and not equal(states[3], states[5])
    rows = lines(run)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] is not None for row in rows if row["step"] != 4)
    assert rows[-1]["micro_batches"] == STEPS * ACCUMULATION


def test_too_many_such_steps_end_the_run(server: Server, whole: Path, tmp_path: Path) -> None:
    run, own = tmp_path / "run", ("checkpoint.interval={steps:4}", "max_skipped=2")
    done = server.train(run, *own, faults=[[number, "nan_loss"] for number in range(8, 16)])
    assert done.codes == [2], done.text
    said(
        done.text,
        "not finite in 3 steps",
        "need at most max_skipped=2",
        "[12, 13]",
        str(run / "skipped.jsonl"),
        "is good",
    )
    records = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 6, 7]
    goes_on(server, run, whole, 4, *own)
    assert lines(run)[-1]["skipped_steps"] == 0 and not (run / "skipped.jsonl").read_text()


def test_parameters_that_are_not_finite_reach_no_checkpoint(server: Server, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = server.train(run, "checkpoint.keep_last=1", faults=whole_at(run, 4, 8, "nan_parameter"))
    assert done.codes == [2], done.text
    said(done.text, "not finite", str(run), "is good")
    assert all(tensor.isfinite().all() for tensor in state(run).values())
    goes_on(server, run, whole, 4)


# ---- disks ----------------------------------------------------------------------------------------------------------
def test_a_disk_that_is_full_for_a_checkpoint(server: Server, tmp_path: Path) -> None:
    """Each of two processes writes its half, the second one's disk is full: both say so and end."""
    run = tmp_path / "run"
    done = server.train(run, "parallel.shard=true", world=2, faults=whole_at(run, 4, 9, "limit_files", 20_000))
    assert done.codes == [2, 2] and "Traceback" not in done.text, done.text
    wanted = ("got no checkpoint of step 6", os.strerror(errno.EFBIG), "MiB free", "step-00000004")
    found = [line for line in done.text.splitlines() if line.startswith("moma train: ")]
    assert len(found) == 2 and all(part in line for part in wanted for line in found), done.text
    assert steps(run) == [2, 4] and not list((run / "checkpoints").glob(f"{checkpoint.TMP}*"))


def test_a_disk_that_is_full_for_metrics(server: Server, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = server.train(run, faults=whole_at(run, 4, 8, "fill_disk_under", "metrics.jsonl"))
    assert done.codes == [2], done.text
    said(done.text, os.strerror(errno.ENOSPC), "metrics.jsonl")
    goes_on(server, run, whole, 4)


def test_a_folder_that_may_not_be_written(server: Server, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    closing = whole_at(run, 4, 8, "chmod", str(run / "checkpoints"), 0o555)
    done = server.train(run, faults=[["start", "obey_modes"], *closing])
    os.chmod(run / "checkpoints", 0o755)
    assert done.codes == [2], done.text
    said(done.text, "got no checkpoint of step 6", "Permission denied", "the right to write", "step-00000004")
    assert steps(run) == [2, 4] and equal(state(run), state(whole, 4))

    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "file").write_text("")
    for parent, reason in (("closed", "Permission denied"), ("file", "Not a directory")):
        done = server.train(tmp_path / parent / "run", faults=[["start", "obey_modes"]])
        assert done.codes == [2], done.text
        said(done.text, str(tmp_path / parent / "run"), reason)


# ---- shards ---------------------------------------------------------------------------------------------------------
def test_a_shard_that_is_gone_cut_short_or_unreadable(server: Server, tmp_path: Path) -> None:
    """Before the start, and while it trains: the loader is a few steps ahead, so the run is longer here."""
    run = tmp_path / "run"
    shard = server.corpus / "train" / "text" / "shard-00000.tokens.bin"
    content, mode = shard.read_bytes(), shard.stat().st_mode
    longer = "duration={steps:24}"
    try:
        done = server.train(run, longer, faults=whole_at(run, 4, 8, "truncate", str(shard), 100))
        assert done.codes == [2], done.text
        said(done.text, str(shard), "bytes", "copy it again")
        newest = steps(run)[-1]
        assert newest >= 4
        for change, parts in (
            (lambda: None, ("got 100 bytes in", "copy it again")),
            (shard.unlink, ("got no file", "copy it")),
            (lambda: (shard.write_bytes(content), shard.chmod(0)), ("cannot be read", "permissions")),
        ):
            change()
            done = server.train(run, longer, faults=[["start", "obey_modes"]])
            assert done.codes == [2], done.text
            said(done.text, str(shard), *parts)
    finally:
        if shard.exists():
            shard.chmod(mode)
        shard.write_bytes(content)
    done = server.train(run, longer)
    assert done.codes == [0] and f"resume at step {newest}," in done.text
    assert [row["step"] for row in lines(run)] == list(range(1, 25))


# ---- others ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("shard", "number"), [("false", 9), ("true", 8)])
def test_when_a_rank_dies_the_other_ends(server: Server, tmp_path: Path, shard: str, number: int) -> None:
    """And says why; which one it was is told by what started them (tests/test_launch.py)."""
    run = tmp_path / "run"
    faults = whole_at(run, 4, number, "send", signal.SIGKILL)
    begun = server.begin(run, f"parallel.shard={shard}", world=2, faults=faults)
    done = server.end(begun, within=30)
    killed = number % 2
    assert done.codes[killed] == -signal.SIGKILL and done.codes[1 - killed] == 2, (done.codes, done.text)
    said(done.text, "another process", "run the same command")
    assert steps(run) == [2, 4]


def test_wandb_that_cannot_be_reached_is_no_reason_to_stop(unreachable: Any, server: Server, whole: Path) -> None:
    run = server.folder / "unreachable"
    done = server.end(unreachable)
    assert done.codes == [0], done.text
    assert "W&B does not answer" in done.text and f"wandb sync {run}/wandb/offline-run-" in done.text
    assert "Traceback" not in done.text
    assert losses(run) == losses(whole)
    (offline,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert offline.stat().st_size > 1000


if __name__ == "__main__":
    serve()
