"""A checkpoint is complete or absent and loads strictly; a resumed run equals the whole one bit by bit."""

import errno
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from moma import checkpoint
from moma.checkpoint import (
    Keep,
    Saver,
    alone,
    latest,
    load,
    model_state,
    optimizer_state,
    read_meta,
    read_tensors,
    save,
)
from moma.optim import OptimConfig, build_optimizer


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11)).to(dtype)
    return model, build_optimizer(model.named_parameters(), OptimConfig(lr=1e-2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    losses = []
    for step in range(start, stop):
        ids = torch.randint(11, (16,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return {"model": model_state(model), "optimizer": optimizer_state(model, optimizer)}


@pytest.mark.parametrize("at", [0, 3])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_by_bit(tmp_path: Path, at: int) -> None:
    model, optimizer = make()
    losses = train(model, optimizer, 0, 6)

    first, first_optimizer = make()
    train(first, first_optimizer, 0, at)
    folder = save(tmp_path, at, everything(first, first_optimizer), {"tokens": 5}, keep_last=2)
    second, second_optimizer = make()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.normal_()
    load(folder, everything(second, second_optimizer))

    assert train(second, second_optimizer, at, 6) == losses[at:]
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key], second_optimizer.state[b][key])
    assert read_meta(folder)["tokens"] == 5 and read_meta(folder)["step"] == at


def test_saving_leaves_a_running_optimizer_alone(tmp_path: Path) -> None:
    expected = train(*make(), 0, 4)
    model, optimizer = make()
    losses = []
    for step in range(4):
        save(tmp_path, step, everything(model, optimizer), {}, keep_last=1)
        losses += train(model, optimizer, step, step + 1)
    assert losses == expected


def test_optimizer_state_refuses_gradients_before_the_first_step() -> None:
    model, optimizer = make()
    model(torch.arange(11)).sum().backward()
    with pytest.raises(ValueError, match="got a fresh optimizer with gradients, need none: call it before backward"):
        optimizer_state(model, optimizer)


def test_retention_keeps_the_newest_and_latest_finds_it(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None
    for step in (5, 10, 100):
        save(tmp_path, step, {"model": {"w": torch.ones(2)}}, {}, keep_last=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000010", "step-00000100"]
    assert latest(tmp_path) == tmp_path / "step-00000100"
    save(tmp_path, 101, {"model": {"w": torch.ones(2)}}, {}, keep_last=0)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_unfinished_save_is_ignored_and_removed_by_the_next(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {}, keep_last=2)

    def kill(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moma.checkpoint._fsync", kill)  # after the tensors and meta.json, before the rename
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, {"model": {"w": torch.ones(2)}}, {}, keep_last=2)
    assert (tmp_path / ".tmp-step-00000002").exists()
    assert latest(tmp_path) == tmp_path / "step-00000001"
    save(tmp_path, 3, {"model": {"w": torch.ones(2)}}, {}, keep_last=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000003"]


def test_all_is_safe_on_the_disk_before_the_name_and_the_name_before_the_old_goes(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 99_999_999, {"model": {"w": torch.ones(2)}}, {}, keep_last=1)
    seen: list[tuple[str, list[str]]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        steps = sorted(path.name for path in tmp_path.iterdir())
        seen.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, steps))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", record)
    save(tmp_path, 100_000_000, {"model": {"w": torch.ones(2)}}, {}, keep_last=1)
    before, after = [".tmp-step-100000000", "step-99999999"], ["step-100000000", "step-99999999"]
    assert seen == [
        ("__0_0.distcp", before),
        (".metadata.tmp", before),
        ("meta.json", before),
        (".tmp-step-100000000", before),
        (tmp_path.name, after),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["step-100000000"]


def test_a_group_can_be_read_alone(tmp_path: Path) -> None:
    model, optimizer = make(torch.bfloat16)
    folder = save(tmp_path, 0, everything(model, optimizer), {}, keep_last=1)
    tensors = read_tensors(folder, "model")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
    assert tensors["0.weight"].dtype == torch.bfloat16
    load(folder, {"model": model_state(make(torch.bfloat16)[0])})
    with pytest.raises(ValueError, match="without the group 'ema', need a checkpoint that holds it"):
        read_tensors(folder, "ema")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"model": {"w": torch.ones(3)}},
            r"got model/w as \(2,\) float32 in .*, need \(3,\) float32: build the",
        ),
        ({"model": {"w": torch.ones(2).half()}}, r"got model/w as \(2,\) float32 in .*, need \(2,\) float16"),
        ({"model": {}}, "also holds 1 tensors such as model/w, need the same names: build the model"),
        ({"model": {"w": torch.ones(2), "v": torch.ones(2)}}, "lacks 1 tensors such as model/v"),
        ({"model": {"w": 3}}, "got a int at model/w, need a tensor: put it into meta"),
    ],
)
def test_loading_is_strict(tmp_path: Path, state: dict, message: str) -> None:
    folder = save(tmp_path, 0, {"model": {"w": torch.ones(2)}}, {}, keep_last=1)
    with pytest.raises(ValueError, match=message):
        load(folder, state)


def test_damage_is_named(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2000)}}
    folder = save(tmp_path, 0, state, {}, keep_last=1)
    with pytest.raises(ValueError, match="got a second checkpoint of step 0, need one: resume from .* or remove"):
        save(tmp_path, 0, state, {}, keep_last=1)
    with pytest.raises(ValueError, match=r"got .* without meta.json, need a checkpoint folder"):
        read_meta(tmp_path)
    with pytest.raises(ValueError, match=r"got keep_last=-1, need 0 \(keep all\) or more"):
        save(tmp_path, 1, state, {}, keep_last=-1)

    (shard,) = folder.glob("*.distcp")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"got 100 bytes in .*distcp, need \d+: remove .*, resume from before"):
        load(folder, state)
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match=r"got a damaged .*: remove it, resume from before"):
        load(folder, state)

    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 9}))
    with pytest.raises(ValueError, match="of format 9, need 2: use the moma that wrote it"):
        load(folder, state)
    (folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="got a damaged .*meta.json .*: remove .*, resume from before"):
        load(folder, state)


# ---- while training goes on -----------------------------------------------------------------------------------------


@contextmanager
def saver_of(root: Path, keep: Keep) -> Iterator[Saver]:
    saver = Saver(root, keep)
    try:
        yield saver
    finally:
        saver.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before it is set."""
    opened, commit = threading.Event(), checkpoint._commit

    def wait_and_commit(*arguments: Any) -> int:
        opened.wait()
        return commit(*arguments)

    monkeypatch.setattr(checkpoint, "_commit", wait_and_commit)
    yield opened
    opened.set()


def test_what_is_stored_is_what_was_there_when_save_returned(tmp_path: Path, gate: threading.Event) -> None:
    state = {"model": {"w": torch.zeros(3, 4).T, "n": torch.tensor(0), "b": torch.zeros(5, dtype=torch.bfloat16)}}
    meta = {"data": {"position": [0]}, "val_loss": 1.5}
    with saver_of(tmp_path, Keep()) as saver:
        saver.save(1, state, meta)
        assert latest(tmp_path) is None
        for tensor in state["model"].values():
            tensor += 1
        meta["data"]["position"][0] = 1
        gate.set()
        saver.wait()
        folder = latest(tmp_path)
        assert folder is not None and read_meta(folder)["data"] == {"position": [0]}
        assert all(not tensor.any() for tensor in read_tensors(folder, "model").values())
        files = (path for path in folder.iterdir() if path.name != "meta.json")
        assert saver.bytes == sum(path.stat().st_size for path in files) and 0 < saver.pause_s and 0 < saver.write_s

        place = saver._copies["model/w"].data_ptr()
        saver.save(2, state, meta)
        assert saver._copies["model/w"].data_ptr() == place  # its memory is used again
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]
    assert all((tensor == 1).all() for tensor in read_tensors(tmp_path / "step-00000002", "model").values())


def test_checkpoints_of_a_run_that_never_waits_resume_bit_by_bit(tmp_path: Path) -> None:
    losses = train(*make(), 0, 4)
    model, optimizer = make()
    with saver_of(tmp_path, Keep(last=0)) as saver:
        for step in range(4):
            saver.save(step, everything(model, optimizer), {})
            train(model, optimizer, step, step + 1)
    for step in range(4):
        again, again_optimizer = make()
        load(tmp_path / f"step-{step:08d}", everything(again, again_optimizer))
        assert train(again, again_optimizer, step, 4) == losses[step:]


def test_save_refuses_at_once(tmp_path: Path) -> None:
    with saver_of(tmp_path, Keep()) as saver:
        with pytest.raises(ValueError, match="got a int at model/w, need a tensor: put it into meta"):
            saver.save(1, {"model": {"w": 3}}, {})
        with pytest.raises(ValueError, match="not JSON compliant"):
            saver.save(1, {"model": {"w": torch.ones(2)}}, {"val_loss": float("nan")})
        saver.save(1, {"model": {"w": torch.ones(2)}}, {})
        with pytest.raises(ValueError, match="got a second checkpoint of step 1, need one: resume from .* or remove"):
            saver.save(1, {"model": {"w": torch.ones(2)}}, {})


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(last=1), [9]),
        (Keep(last=2), [8, 9]),
        (Keep(last=0), [0, 3, 5, 6, 8, 9]),
        (Keep(last=1, every=3), [0, 3, 6, 9]),
        (Keep(last=1, best=True), [5, 9]),
        (Keep(last=2, every=6, best=True), [0, 5, 6, 8, 9]),
    ],
)
def test_what_stays(tmp_path: Path, keep: Keep, left: list[int]) -> None:
    losses: dict[int, Any] = {0: 4.0, 3: None, 5: 2.0, 6: 2.0, 8: 3, 9: "2"}
    with saver_of(tmp_path, keep) as saver:
        for step, loss in losses.items():
            saver.save(step, {"model": {"w": torch.ones(2)}}, {"val_loss": loss} if step != 3 else {})
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{step:08d}" for step in left]


def test_a_damaged_record_is_never_the_best(tmp_path: Path) -> None:
    with saver_of(tmp_path, Keep(last=1, best=True)) as saver:
        for step in (1, 2, 3):
            saver.save(step, {"model": {"w": torch.ones(2)}}, {"val_loss": step})
            saver.wait()
            if step == 1:
                (tmp_path / "step-00000001" / "meta.json").write_text("{")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]


def test_keep_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=r"got keep_last=-1, need 0 \(keep all\) or more: change checkpoint.keep_last"):
        Keep(last=-1)
    with pytest.raises(ValueError, match="got keep_every=0 steps, need at least 1, or null: change checkpoint.keep_ev"):
        Keep(every=0)


def test_an_old_one_that_cannot_be_removed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    save(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {}, keep_last=1)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=r"0001 cannot be removed \(.*denied\): rem"):
        patch.setattr("moma.checkpoint.shutil.rmtree", refuse)
        save(tmp_path, 2, {"model": {"w": torch.ones(2)}}, {}, keep_last=1)
    assert latest(tmp_path) == tmp_path / "step-00000002" and not (tmp_path / "step-00000001").exists()


# ---- a write that fails ---------------------------------------------------------------------------------------------


@contextmanager
def no_file_above(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


GO_ON = "make room or give the right, then run the same command: it goes on from step-00000001, the last whole one$"


@pytest.mark.parametrize("limit", [100, 5_000, 60_000])  # at the first bytes, among the tensors, near the end
def test_a_full_disk_leaves_the_one_before_and_says_what_it_needs(tmp_path: Path, limit: int) -> None:
    state = {"model": {f"w{n}": torch.ones(500_000 if limit == 100 else 3_000) for n in range(6)}}
    need = 12 if limit == 100 else 1
    failed = rf"^got no checkpoint of step 2 in {tmp_path} \(\[Errno 27\] File too large\), need {need} MiB free there "
    failed += rf"\(\d+ MiB are\) and the right to write: {GO_ON}"
    with saver_of(tmp_path, Keep(last=0)) as saver:
        saver.save(1, {"model": {"w": torch.ones(2)}}, {})
        saver.wait()
        with no_file_above(limit):
            saver.save(2, state, {})
            with pytest.raises(OSError, match=failed):
                saver.save(3, state, {})  # the next call hears of it, whichever it is
            with pytest.raises(OSError, match=failed):
                save(tmp_path, 2, state, {}, keep_last=1)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        saver.save(3, state, {})  # told once; with room again it goes on
    assert latest(tmp_path) == tmp_path / "step-00000003"


def test_a_disk_that_is_full_at_the_end_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_fsync", full)  # of meta.json
    saver = Saver(tmp_path, Keep())
    saver.save(1, {"model": {"w": torch.ones(2)}}, {})
    start = "then run the same command: it starts over, there is no whole one yet$"
    with pytest.raises(
        OSError, match=rf"^got no checkpoint of step 1 .*No space left on device\), need 1 MiB .*{start}"
    ):
        saver.close()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("no folder")
    saver = Saver(tmp_path / "run" / "checkpoints", Keep())
    saver.save(1, {"model": {"w": torch.ones(2)}}, {})
    with pytest.raises(
        OSError, match=r"^got no checkpoint of step 1 in .*Not a directory: .* and the right to write: "
    ):
        saver.wait()
    saver.close()


MEMBER = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
from moma.checkpoint import Keep, Saver

root = Path(sys.argv[1])
rank = int(os.fork() == 0)  # two ranks for the imports of one
if rank:
    os.dup2(int(sys.argv[3]), 1)

def say(*words):
    print(*words, flush=True)

def never(descriptor):
    say("writing")
    time.sleep(600)

signal.alarm(120)
say(os.getpid())
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
mesh = dist.init_device_mesh("cpu", (2,))
tensors = {"shared": distribute_tensor(torch.arange(5000.0).view(5, 1000), mesh, [Shard(0)]), "whole": torch.ones(7)}
state = {"model": tensors}
saver = Saver(root, Keep(last=2))
saver.save(1, state, {})
for n in range(50):  # the training's own traffic while the threads talk
    total = torch.ones(1000)
    dist.all_reduce(total)
    assert (total == 2).all()
tensors["shared"].to_local().zero_(), tensors["whole"].zero_()
saver.wait()
say("there" if (root / "step-00000001").exists() else "absent", saver.bytes)

hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
if rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
saver.save(2, state, {})
try:
    saver.wait()
except OSError as error:
    say(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
saver.save(3, state, {})
saver.wait()

if rank == 1:
    os.fsync = never
saver.save(4, state, {})
try:
    saver.close()
except OSError as error:
    say(error)
dist.destroy_process_group()
os.fsync = never
alone = Saver(root, Keep(last=2))
alone.save(5, {"model": {"w": torch.ones(100_000)}}, {})
alone.wait()
"""


def test_two_processes_agree_and_kills_leave_whole_checkpoints(tmp_path: Path) -> None:
    """What each says in turn: step 1 is there, step 2 failed on the second, step 4 lost the second, step 5 lost all."""
    root = tmp_path / "checkpoints"
    (tmp_path / "member.py").write_text(MEMBER)
    reading, writing = os.pipe()
    command = [sys.executable, str(tmp_path / "member.py"), str(root), str(tmp_path / "store"), str(writing)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[writing], start_new_session=True)
    os.close(writing)
    first, second = process.stdout, os.fdopen(reading)
    assert first is not None
    try:
        first_pid, second_pid = (int(out.readline()) for out in (first, second))
        lines = [[out.readline().strip() for _ in range(2)] for out in (first, second)]
        n_bytes = sum(path.stat().st_size for path in (root / "step-00000001").iterdir() if path.name != "meta.json")
        failed = (
            r"^got no checkpoint of step 2 in .*File too large\), need 1 MiB .*, and every process alive until it is "
        )
        for there, error in lines:
            assert there == f"there {n_bytes}"
            assert re.match(failed, error) and "it goes on from step-00000001, the last whole one" in error
        tensors = read_tensors(root / "step-00000001", "model")
        assert torch.equal(tensors["shared"], torch.arange(5000.0).view(5, 1000)) and (tensors["whole"] == 1).all()
        pieces = [tuple(chunk.sizes) for chunk in checkpoint._stored(root / "step-00000001")["model/shared"].chunks]
        assert sorted(pieces) == [(2, 1000), (3, 1000)]

        assert second.readline() == "writing\n"  # its bytes of step 4 are written, not safe
        assert (root / ".tmp-step-00000004" / "__1_0.distcp").stat().st_size > 0
        os.kill(second_pid, signal.SIGKILL)
        lost = first.readline()
        assert re.match("got no checkpoint of step 4 in .*, and every process alive until it is written: ", lost)
        assert "it goes on from step-00000003" in lost

        assert first.readline() == "writing\n"
        os.kill(first_pid, signal.SIGKILL)
        process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        second.close()
    assert (root / ".tmp-step-00000005" / "__0_0.distcp").stat().st_size > 0
    assert latest(root) == root / "step-00000003" and not read_tensors(root / "step-00000003", "model")["shared"].any()
    with saver_of(root, Keep(last=0)) as saver:
        saver.save(5, {"model": {"w": torch.ones(2)}}, {})
    steps = [f"step-0000000{step}" for step in (1, 3, 5)]
    assert [path.name for path in sorted(root.iterdir())] == steps


class Call:
    """Unpickling this calls `function` with `arguments`."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.reduced


def replace_metadata(folder: Path, content: Any) -> None:
    """Put another pickle in, and its size into meta.json, as whoever means harm would."""
    (folder / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][".metadata"] = (folder / ".metadata").stat().st_size
    (folder / "meta.json").write_text(json.dumps(meta))


def test_metadata_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2)}}
    folder = save(tmp_path, 0, state, {}, keep_last=1)
    mark = tmp_path / "mark"
    for call in (Call(os.system, f"touch {mark}"), Call(eval, f"open({str(mark)!r}, 'w')"), Call(Path.touch, mark)):
        replace_metadata(folder, {"x": call})
        for read in (lambda: load(folder, state), lambda: read_tensors(folder, "model")):
            with pytest.raises(ValueError, match=r"^got .*\.metadata that names \S+, need only what .*do not load it$"):
                read()
    # DCP's own fallback for a missing .metadata is one that each rank wrote.
    (folder / ".metadata").rename(folder / "__0.metadata")
    with pytest.raises(ValueError):
        load(folder, state)
    assert not mark.exists()


class OldPickler(pickle.Pickler):
    """Members of enumerations as Python 3.11.2 writes them, and 3.11.7 does not: getattr(class, name)."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def test_metadata_of_an_older_python_is_read(tmp_path: Path) -> None:
    state = {"model": {"w": torch.arange(3.0)}}
    folder = save(tmp_path, 0, state, {}, keep_last=1)
    buffer = io.BytesIO()
    OldPickler(buffer).dump(pickle.loads((folder / ".metadata").read_bytes()))
    assert b"getattr" in buffer.getvalue()
    replace_metadata(folder, buffer.getvalue())
    assert torch.equal(read_tensors(folder, "model")["w"], state["model"]["w"])


@pytest.mark.parametrize("of", [(torch.Size, "mro"), (Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__members__")])
def test_only_members_of_enumerations_are_looked_up(tmp_path: Path, of: tuple[type, str]) -> None:
    folder = save(tmp_path, 0, {"model": {"w": torch.ones(2)}}, {}, keep_last=1)
    replace_metadata(folder, {"x": Call(getattr, *of)})
    with pytest.raises(ValueError, match=r"that names builtins\.getattr, need only what .*do not load it$"):
        read_tensors(folder, "model")


def test_metadata_of_another_kind_is_damage(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2)}}
    folder = save(tmp_path, 0, state, {}, keep_last=1)
    replace_metadata(folder, ["allowed, but no metadata"])
    with pytest.raises(ValueError, match=r"got a damaged .* \(TypeError\): remove it, resume from before"):
        load(folder, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.complex64])
def test_every_dtype_is_read_again(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"w": torch.ones(3, 2).to(dtype), "scalar": torch.ones(()).to(dtype)}
    save(tmp_path, 0, {"model": tensors}, {}, keep_last=0)
    saver = Saver(tmp_path, Keep(last=0))
    saver.save(1, {"model": tensors}, {})
    saver.close()
    for folder in tmp_path.iterdir():
        again = read_tensors(folder, "model")
        assert all(again[name].dtype == dtype and torch.equal(again[name], tensors[name]) for name in tensors)


SECOND = """
import sys
from pathlib import Path
from moma.checkpoint import alone
with alone(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""
BUSY = "got a second process in .*run, need one at a time: wait for it or choose another folder"


def test_one_process_at_a_time_in_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    command = [sys.executable, "-c", SECOND, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match=BUSY), alone(run):
            pass
        assert run.exists()
        other.kill()  # leaves the file, not the lock
        other.wait()
    assert (run / ".lock").exists()
    with alone(run):
        with pytest.raises(ValueError, match=BUSY), alone(run):
            pass
        (run / "result").write_text("kept")
    assert [path.name for path in run.iterdir()] == ["result"]


def test_the_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), alone(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with alone(tmp_path / "mine"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_lock_whose_file_was_removed_spares_the_lock_of_the_next(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = alone(run), alone(run)
    first.__enter__()
    (run / ".lock").unlink()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(ValueError, match=BUSY), alone(run):
        pass
    second.__exit__(None, None, None)
    assert list(run.iterdir()) == []


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("moma.checkpoint.fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="is not locked .*not implemented.*: start one process at a time in it"):
        with alone(tmp_path / "run"):
            assert (tmp_path / "run").exists()
