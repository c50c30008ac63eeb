"""What saving a checkpoint costs the training: `Saver` against writing in the loop, and against the disk itself.

    plain write       as many bytes as the state has, into one file, and fsync: what the disk does
    Saver             from `save` until the checkpoint has its name, nothing else going on
    DCP save          torch.distributed.checkpoint as it is, in the loop
    torch.save        one file, and fsync, in the loop
    pause (facts)     what the loop waits for `Saver.save`: the copy; write_s: of the thread behind it

The state is that of a training: parameters and both moments of AdamW in fp32. Files lie beside `out`, else in the
system's temporary folder, and are removed. Everything is written again and again to the same names, so that no more
than two checkpoints of a kind take room at once.
"""

import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from moma.benchmarks.config import BenchConfig, architecture
from moma.benchmarks.timing import Bench, Case, Goal
from moma.checkpoint import Keep, Saver, model_state, optimizer_state
from moma.model.transformer import build_model
from moma.optim import OptimConfig, build_optimizer

PLAIN, SAVER = "plain write", "Saver, begin to end"
PAUSE_S = 1.0  # on a GPU, for the 7 billion parameters of 1_4b with four experts per modality
CHUNK = 2**24  # bytes of one write


def run(config: BenchConfig, device: torch.device) -> Bench:
    """The state of the first variant; `plain write` is the baseline, so that ratios are times over the disk's."""
    folder = tempfile.TemporaryDirectory(prefix=".bench-", dir=config.out.parent if config.out else None)
    root = Path(folder.name)
    model = build_model(
        architecture(config, config.variants[0]), config.vocab_size, ("text", "image"), seed=config.seed, device=device
    )
    optimizer = build_optimizer(model.named_parameters(), OptimConfig())
    state = {"model": model_state(model), "optimizer": optimizer_state(model, optimizer)}
    tensors = {f"{part}/{name}": tensor for part, values in state.items() for name, tensor in values.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    saver = Saver(root / "saver", Keep(last=1))
    pauses = [_pause(saver, number, state) for number in range(config.rounds + 1)][1:]  # the first one allocates
    facts = {
        "size": config.size,
        "variant": config.variants[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "file_bytes": saver.bytes,
        "pause_s": statistics.median(pauses),
        "pauses_s": pauses,
        "write_s": saver.write_s,
    }
    ours = _saver_case(saver, state, size, folder)
    others = [
        _case("DCP save in the loop", lambda: _dcp(root / "dcp", tensors), size, False),
        _case("torch.save in the loop", lambda: _torch_save(root / "whole.pt", tensors), size, False),
    ]
    plain, again = (
        _case(name, lambda path=root / file: _plain(path, size), size, True)
        for name, file in ((PLAIN, "plain"), (f"{PLAIN} again", "again"))
    )
    return Bench([plain, ours, *others], PLAIN, again, [], facts, goals(device.type, facts))


def goals(device: str, facts: dict[str, Any]) -> list[Goal]:
    """The pause of the loop, on a GPU."""
    if device != "cuda":
        return []
    return [Goal("H13", "seconds that the loop pauses", PAUSE_S, of="value", value=facts["pause_s"])]


def _pause(saver: Saver, step: int, state: dict[str, Any]) -> float:
    """Seconds that one `save` keeps the loop waiting when nothing is being written."""
    saver.save(step, state, {})
    saver.wait()
    return saver.pause_s


def _saver_case(saver: Saver, state: dict[str, Any], size: int, folder: tempfile.TemporaryDirectory[str]) -> Case:
    """`folder` holds what all cases write: it is removed with this one."""
    step = 10**6  # after those of the pauses

    def save() -> None:
        nonlocal step
        assert folder.name
        step += 1
        saver.save(step, state, {})
        saver.wait()

    return _case(SAVER, save, size, True)


def _case(name: str, work: Callable[[], None], size: int, ours: bool) -> Case:
    return Case(name, work, ours, bytes=size, ceiling="disk")


def _plain(path: Path, size: int) -> None:
    block = memoryview(bytes(CHUNK))
    with open(path, "wb") as file:
        for start in range(0, size, CHUNK):
            file.write(block[: min(CHUNK, size - start)])
        _sync(file)


def _torch_save(path: Path, tensors: dict[str, Tensor]) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
        _sync(file)


def _dcp(folder: Path, tensors: dict[str, Tensor]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp_save(dict(tensors), storage_writer=FileSystemWriter(folder, sync_files=True), no_dist=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
