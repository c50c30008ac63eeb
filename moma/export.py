"""Export: a checkpoint of a run -> one safetensors file, and that file back.

    RUN/checkpoints/step-N      parameters and routing state  -->  OUT.safetensors, by their names in the model
      meta.json                 what they belong to           -->  its metadata, one JSON value each:

    config       the architecture, objective, tokenizer's name, precision, vocabulary's hash; rows, row length and
                 images of a micro-batch, which routing runs over
    vocab_hash, step, git       of the run; git: commit and whether the tree was clean
    moma         the version that wrote the file

Any reader of safetensors gets the tensors: `build_model(Architecture, ...)` of `config` takes them with
`load_state_dict`. `moma train init_from=FILE` begins from one as from a run. Optimizer and place in the data stay
behind: resume from the run itself.

One tensor at a time is in memory. Written under a temporary name, fsynced, renamed: the file is whole or not there.
Refuses to replace a file unless told to.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moma import __version__, checkpoint, hf_chameleon
from moma.checkpoint import Lazy
from moma.config import Composed
from moma.model.transformer import ARCHITECTURE

_MICRO_BATCH = ("rows", "row_length", "images")
_RECORD = {"config": dict, "vocab_hash": str, "step": int, "git": dict, "moma": str}


@dataclass(frozen=True)
class ExportConfig:
    """`run`: a run folder; `out`: the file to write; `step`: of which checkpoint, None: the newest."""

    run: Path
    out: Path
    step: int | None = None
    overwrite: bool = False


def main(composed: Composed) -> int:
    """`moma export`: writes the file; returns 0."""
    config: ExportConfig = composed.config
    n_bytes, step = export(config)
    print(f"{config.out}: {n_bytes / 1e9:.3f} GB of tensors, step {step} of {config.run}")
    return 0


def export(config: ExportConfig) -> tuple[int, int]:
    """Write `config.out`; returns the bytes of its tensors and the step they are of.

    Raises ValueError for a run or step without a checkpoint and a file that is there already, OSError when it cannot
    be written.
    """
    out = config.out
    if out.is_dir():
        raise ValueError(f"got out={out}, a folder, need a file: set out={out / 'model.safetensors'}")
    if out.exists() and not config.overwrite:
        raise ValueError(f"got out={out}, which is there already, need a new file: give another, or overwrite=true")
    folder = _checkpoint_of(config.run, config.step)
    meta, tensors = checkpoint.read_meta(folder), checkpoint.open_group(folder, "model")
    metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in _record(meta).items()}
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        n_bytes = hf_chameleon.write_lazily(temporary, tensors, metadata)
        temporary.replace(out)
    except OSError as error:
        raise OSError(_unwritten(out, tensors, error)) from error
    finally:
        if os.path.exists(temporary):
            temporary.unlink()
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    return n_bytes, meta["step"]


def read_export(path: Path) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """The tensors of an exported file, each read when it is fetched, and its metadata as values.

    Raises ValueError for a file that is damaged, or of another origin.
    """
    file, metadata = hf_chameleon.open_files([path]), hf_chameleon.read_metadata(path)
    record = {}
    for name, kind in _RECORD.items():
        try:
            record[name] = json.loads(metadata[name])
        except (KeyError, ValueError, RecursionError):
            record[name] = None
        if type(record[name]) is not kind:
            raise ValueError(
                f"got {path} without {name} of its run in the metadata, need a file that `moma export` wrote: export "
                "the run again"
            )

    def lazy(name: str) -> Lazy:
        return Lazy(*file.forms[name], lambda: hf_chameleon.fetch(file, name))

    return {name: lazy(name) for name in file.forms}, record


def open_parameters(init_from: Path) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """What a run or an exported file has to begin another run with: tensors by name, each read when it is fetched,
    and a record with `config` (the vocabulary's hash in it) and `step`.

    Raises ValueError for a folder without a checkpoint, and for what `read_export` refuses.
    """
    if init_from.is_file():
        return read_export(init_from)
    newest = checkpoint.latest(init_from / "checkpoints")
    if newest is None:
        raise ValueError(
            f"got init_from={init_from} without a checkpoint, need a trained run: train it first, or give a file that "
            "`moma export` wrote"
        )
    return checkpoint.open_group(newest, "model"), checkpoint.read_meta(newest)


def _checkpoint_of(run: Path, step: int | None) -> Path:
    found = checkpoint.by_step(run / "checkpoints")
    if not found:
        raise ValueError(f"got run={run} without a checkpoint, need a trained or imported run: train it first")
    if step is None:
        step = max(found)
    if step not in found:
        there = ", ".join(map(str, found))
        raise ValueError(f"got step={step}, need one that {run} has a checkpoint of ({there}): correct step")
    return found[step]


def _record(meta: dict[str, Any]) -> dict[str, Any]:
    """What the file says of its tensors: no path of this machine is in it."""
    stored = meta["config"]
    config = {name: stored[name] for name in (*ARCHITECTURE, "objective")}
    config |= {"tokenizer": Path(stored["tokenizer"]).name, "precision": meta["precision"]}
    config |= {"vocab_hash": meta["vocab_hash"]}
    if "data" in stored:
        config["data"] = {name: stored["data"][name] for name in _MICRO_BATCH}
    return {
        "config": config,
        "vocab_hash": meta["vocab_hash"],
        "step": meta["step"],
        "git": meta.get("git", {}),
        "moma": __version__,
    }


def _unwritten(out: Path, tensors: dict[str, Lazy], error: OSError) -> str:
    there = next(path for path in out.absolute().parents if os.path.isdir(path))
    need = sum(math.prod(lazy.shape) * lazy.dtype.itemsize for lazy in tensors.values())
    return (
        f"got no {out} ({error}), need {math.ceil(need / 2**20)} MiB free there "
        f"({shutil.disk_usage(there).free // 2**20} MiB are) and the right to write: make room, or give another out"
    )
