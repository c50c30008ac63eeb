"""W&B's offline files give the columns of metrics.jsonl; what is cut off or damaged is told apart."""

import json
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wandb.proto import wandb_internal_pb2

from moma.analysis.runs import read_metrics, read_run
from moma.analysis.study import read_study
from moma.analysis.wandb_runs import BLOCK, HEADER, offline_files, read_offline
from moma.log import LogConfig, RunLog

CONFIG = {
    "model": {"dim": 64, "n_layers": 2}, "feed_forward": {"kind": "dense"}, "objective": {"kind": "next_token"},
    "seed": {"data": 3, "init": 4}, "data": {"rows": 2, "row_length": 32, "images": 1, "accumulation": 2},
    "duration": {"steps": None, "tokens": 128.0 * 60, "flops": None, "percent": None}, "vocab_hash": "0123",
}  # fmt: skip


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps under our log with W&B offline: several blocks of its file."""
    folder = tmp_path_factory.mktemp("wandb") / "small-run"
    log = RunLog(folder, LogConfig(kind="wandb"), CONFIG)
    for step in range(1, 61):
        values = {"loss": 5 / step, "loss_text": 4 / step, "flops": step * 1.1e9, "tokens": step * 128}
        routers = {f"router/{layer}.depth/unserved_{group}": step / 61 for layer in range(9) for group in ("text", "x")}
        log.metrics(step, values | routers | {"grad_norm": None})
        if step % 20 == 0:
            log.metrics(step, {"val_loss": 6 / step})
    log.close()
    deadline = time.monotonic() + 30  # W&B's service may write the end of the file after `finish` has returned
    while read_offline(offline_files(folder)).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return folder


@pytest.fixture
def alone(logged: Path, tmp_path: Path) -> Path:
    """The same without our own file."""
    folder = tmp_path / "small-run"
    shutil.copytree(logged, folder, symlinks=True)
    (folder / "metrics.jsonl").unlink()
    return folder


def test_the_columns_are_those_of_metrics_jsonl(logged: Path, alone: Path) -> None:
    (path,) = offline_files(alone)
    assert path.stat().st_size > BLOCK  # more than one block, so records in parts
    own, (one, other) = read_metrics(logged / "metrics.jsonl"), (read_run(alone), read_run(path.parent))
    for run in (one, other):
        assert run.metrics.keys() == own.keys() and len(own) == 24
        for name, column in own.items():
            assert np.array_equal(run.metrics[name], column, equal_nan=True), name
        assert (run.name, run.variant, run.seed) == ("small-run", "dense", (3, 4))
        assert (run.meta["step"], run.meta["total_steps"], run.unfinished) == (60, 60, None)  # 60 from its duration
        assert run.config == CONFIG
    assert [run.folder for run in read_study([str(alone.parent / "*")]).runs] == [alone]


def test_a_file_that_a_kill_cut_off_ends_at_its_last_whole_record(alone: Path) -> None:
    (path,) = offline_files(alone)
    data = path.read_bytes()
    path.write_bytes(data[:BLOCK])
    run = read_run(alone)
    assert (
        0 < run.meta["step"] < 60
        and run.unfinished == f"stopped at step {run.meta['step']} of 60: run its command again"
    )
    path.write_bytes(data + bytes(3 * BLOCK))  # zeros: room never written
    assert read_run(alone).meta["step"] == 60
    later = alone / "wandb/offline-run-99999999_000000-other" / path.name
    later.parent.mkdir()
    later.write_bytes(data[:BLOCK])  # resumed, then killed: it is the last part that says whether a run ended
    assert read_offline(offline_files(alone)).exit_code is None and read_run(alone).meta["step"] == 60


def test_what_is_no_file_of_wandb_is_refused(alone: Path) -> None:
    (path,) = offline_files(alone)
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"got a damaged record at byte \d+ of .*, need a whole file: read metrics"):
        read_run(alone)
    data[6] = 9
    path.write_bytes(data)
    with pytest.raises(ValueError, match="of another version of W&B's format, need version 0"):
        read_run(alone)
    path.write_bytes(json.dumps({"step": 1}).encode())
    with pytest.raises(ValueError, match=r"which is no file of W&B, need run-<id>.wandb of an offline run"):
        read_run(alone)
    path.write_bytes(bytes.fromhex("3a572642e1be00"))
    with pytest.raises(ValueError, match="without a configuration, need a run that `moma train` logged"):
        read_run(alone)


def test_a_run_that_failed_says_with_which_code(tmp_path: Path) -> None:
    """A file made by hand: no duration, so its end alone tells whether it is whole."""

    def framed(record: Any) -> bytes:
        body = record.SerializeToString()
        return HEADER.pack(zlib.crc32(b"\1" + body), len(body), 1) + body

    messages: Any = wandb_internal_pb2
    start, line, end = messages.Record(), messages.Record(), messages.Record()
    start.run.display_name = "by-hand"
    start.run.config.update.add(key="feed_forward", value_json='{"kind": "dense"}')
    for name, value in {"_step": 5, "loss": 3.5, "flops": 1e9, "tokens": 320}.items():
        line.history.item.add(nested_key=[name], value_json=json.dumps(value))
    end.exit.exit_code = 3
    path = tmp_path / "offline-run-1-x/run-x.wandb"
    path.parent.mkdir()
    whole = b":W&B\xe1\xbe\0" + framed(start) + framed(line)
    for data, reason in {
        whole + framed(end): "ended with code 3 after step 5",
        whole: "W&B recorded no end after step 5: its process died",
    }.items():
        path.write_bytes(data)
        assert read_run(path.parent).unfinished == reason
    end.exit.exit_code = 0
    path.write_bytes(whole + framed(end))
    run = read_run(path.parent)
    assert (run.unfinished, run.name, run.flops_per_token) == (None, "by-hand", 1e9 / 320)
