"""A checkpoint is complete or absent and loads strictly; a resumed run equals the whole one bit by bit."""

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moma.checkpoint import alone, latest, load, model_state, optimizer_state, read_meta, read_tensors, save
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


class Call:
    """Unpickling this calls `function` with `arguments`."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.reduced


def replace_metadata(folder: Path, content: Any) -> None:
    """Put another pickle in, and its size into meta.json, as whoever means harm would."""
    (folder / ".metadata").write_bytes(pickle.dumps(content))
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


def test_metadata_of_another_kind_is_damage(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2)}}
    folder = save(tmp_path, 0, state, {}, keep_last=1)
    replace_metadata(folder, ["allowed, but no metadata"])
    with pytest.raises(ValueError, match=r"got a damaged .* \(TypeError\): remove it, resume from before"):
        load(folder, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.complex64])
def test_every_dtype_is_read_again(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"w": torch.ones(3, 2).to(dtype), "scalar": torch.ones(()).to(dtype)}
    again = read_tensors(save(tmp_path, 0, {"model": tensors}, {}, keep_last=1), "model")
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
