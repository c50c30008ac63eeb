"""Runs that Weights & Biases recorded offline, read without its service.

    RUN/wandb/offline-run-<when>-<id>/run-<id>.wandb

The installed package has the messages of such a file (`wandb.proto`) but no reader for Python. The file is a log of
32 KiB blocks, as LevelDB writes its own:

    file    7 bytes (":W&B", two of magic, version 0), then records
    record  crc32 of what follows the length (4, little endian), length (2), kind (1), that many bytes
    kind    1 whole, 2 first part, 3 middle part, 4 last part; fewer than 7 bytes at a block's end are padding

A run that was resumed has several folders; steps of a later one win, as in metrics.jsonl after a resume. Numbers are
W&B's own JSON, so the columns are those of metrics.jsonl, without its nulls. A record that a kill cut off ends
the file. Refuses a file with another header, and a damaged record before the last one.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BLOCK, HEADER = 32768, struct.Struct("<IHB")
_START = b":W&B\xe1\xbe\x00"
_OWN = "_"  # W&B's own names begin so: _step, _runtime, _timestamp, _wandb


class Recorded(NamedTuple):
    """`rows`: metrics by step; `config`: as given to W&B; `exit_code`: None where the process never ended the run."""

    name: str
    config: dict[str, Any]
    rows: dict[int, dict[str, Any]]
    exit_code: int | None


def offline_files(folder: Path) -> tuple[Path, ...]:
    """The files of a run, oldest first: `folder` is one offline run, or has some in `wandb/`; none is no error."""
    found = folder.glob("*.wandb") if folder.name.startswith(("offline-run-", "run-")) else ()
    return tuple(sorted(found) or sorted(folder.glob("wandb/offline-run-*/*.wandb")))


def read_offline(files: Sequence[Path]) -> Recorded:
    """What W&B recorded of one run; raises ValueError for a file that is none of its own or damaged."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # generated code: its names exist at run time alone
    name, code = "", None
    config: dict[str, Any] = {}
    rows: dict[int, dict[str, Any]] = {}
    for path in files:
        code = None  # a resumed run is over when its last part is
        for data in _records(path):
            record = messages.Record.FromString(data)
            if record.HasField("run"):
                name = record.run.display_name
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                items = record.history.item
                row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
                values = {key: value for key, value in row.items() if not key.startswith(_OWN)}
                step = int(row["_step"])
                rows.setdefault(step, {"step": step}).update(values)
            elif record.HasField("exit"):
                code = record.exit.exit_code
    return Recorded(name, {key: value for key, value in config.items() if not key.startswith(_OWN)}, rows, code)


def _records(path: Path) -> Iterator[bytes]:
    """The records of one file in order, up to the first that is cut off."""
    data = path.read_bytes()
    if not data.startswith(_START[:4]):
        raise ValueError(f"got {path}, which is no file of W&B, need run-<id>.wandb of an offline run: check the path")
    if not data.startswith(_START):
        raise ValueError(f"got {path} of another version of W&B's format, need version 0: read metrics.jsonl instead")
    at, parts = len(_START), b""
    while at < len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER.size:
            at += room
            continue
        if at + HEADER.size > len(data):
            return
        crc, length, kind = HEADER.unpack_from(data, at)
        body = data[at + HEADER.size : at + HEADER.size + length]
        if len(body) < length or not kind:  # zeros: room that was set aside and never written
            return
        if zlib.crc32(bytes([kind]) + body) != crc:
            raise ValueError(f"got a damaged record at byte {at} of {path}, need a whole file: read metrics.jsonl")
        at += HEADER.size + length
        parts = body if kind in (1, 2) else parts + body
        if kind in (1, 4):
            yield parts
